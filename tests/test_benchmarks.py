"""The benchmark command: its table, its file, its errors."""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import segattr
from benchmarks import losses, volumes
from benchmarks.__main__ import collect, markdown
from benchmarks.baselines import (
    batched_heatmaps,
    deepcopy_rib,
    dense_filter,
    dense_mean_field,
    expanded_scores,
    log_space_size_kl,
    naive_feature_similarity,
    naive_path_affinity_loss,
    naive_size_kl,
    plain_advcam,
    released_advcam,
    sequential_grad_cam,
    sequential_heatmaps,
    squared_walk,
)
from segattr.ficklenet import stochastic_conv2d
from segattr.lrp import unroll
from segloss import feature_similarity, path_affinity_loss, size_kl
from segloss.bilateral.reference import gaussian_filter_reference
from tests.forked import run

ROOT = Path(__file__).parents[1]
ROW = {
    "group": str,
    "method": str,
    "seconds": float,
    "spread": float,
    "rounds": int,
    "megabytes": float,
    "error": float,
}


def bench(group: str, method: str, median: float, extra_bytes: int) -> dict[str, object]:
    info = {"method": method, "rival": "plain", "error": 0.0, "extra_bytes": extra_bytes}
    return {"group": group, "extra_info": info, "stats": {"median": median, "iqr": median / 10, "rounds": 3}}


def test_shares_are_of_the_rival_in_the_same_group() -> None:
    benches = [bench("a", "ours", 1.0, 2**20), bench("a", "plain", 4.0, 2**21), bench("b", "plain", 1.0, 0)]
    rows = collect({"benchmarks": benches})
    assert [row["time_ratio"] for row in rows] == [0.25, 1, 1]
    assert [row["memory_ratio"] for row in rows] == [0.5, 1, None]
    where = {"date": "today", "processor": "one", "instructions": "none", "threads": 1, "torch": "2"}
    table = markdown(rows, where)
    assert table.index("| plain | 4e+03 ms") < table.index("| ours | 1e+03 ms | 10% | 0.250 | 1.0 MB | 0.500 |")


def test_baselines_compute_what_they_are_compared_with() -> None:
    logits, sizes = torch.randn(2, 3, 8, 8), torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    for baseline in (naive_size_kl, log_space_size_kl):
        torch.testing.assert_close(baseline(logits, sizes), size_kl(logits, sizes))
    values, features = torch.rand(50, 4), torch.rand(50, 5) * 3
    expected = gaussian_filter_reference(values.t()[None], features.t()[None])[0].t()
    torch.testing.assert_close(dense_filter(values, features), expected)
    maps, image = torch.rand(2, 3, 7, 5), torch.rand(2, 3, 7, 5)
    torch.testing.assert_close(naive_feature_similarity(maps, image), feature_similarity(maps, image, gate="raw"))
    logits, labels = torch.randn(2, 1, 9, 7), torch.randint(0, 3, (2, 9, 7))
    for radius in (1, 4):
        expected = path_affinity_loss(logits, labels, radius=radius)
        torch.testing.assert_close(naive_path_affinity_loss(logits, labels, radius), expected)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    images = torch.randn(2, 3, 8, 8)
    for heatmaps in (sequential_heatmaps, batched_heatmaps):
        torch.testing.assert_close(heatmaps(model, images, False), unroll(model)(images))


def test_attribution_baselines_compute_what_they_are_compared_with() -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()).double()
    linear = nn.Linear(6, 4).double()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    clf, images = segattr.Classifier(features, head), torch.rand(2, 3, 8, 9, dtype=torch.float64)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)

    for baseline, options in ((released_advcam, {"penalty": 7.0, "reference": True}), (plain_advcam, {})):
        close(
            baseline(features, linear, images[:1], [2, 0], 3),
            segattr.advcam(clf, images[:1], [2, 0], steps=3, **options)[0],
        )
    for whole in (True, False):
        close(
            sequential_grad_cam(features, head, images, [0, 3], whole),
            segattr.grad_cam(clf, images, [0, 3], norm="raw"),
        )
    tags = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.float64)
    companions = [(torch.rand(2, 3, 8, 9, dtype=torch.float64), tags.flip(0)) for _ in range(2)]
    tuned = segattr.rib(clf, images, tags, companions=companions, steps=2, lr=0.01)
    close(deepcopy_rib(features, linear, images, tags, companions, 0.01), tuned)

    layer = segattr.StochasticConv2d(6, 4, kernel=3, drop=0.5).double()
    f = features(images).detach()
    keep = torch.rand(2, 8, 9, 3, 3) < 0.5
    close(expanded_scores(f, layer.weight, keep, 0.5), stochastic_conv2d(f, layer.weight, keep, drop=0.5))
    maps, affinity = torch.rand(1, 2, 5, 6, dtype=torch.float64), torch.rand(1, 30, 30, dtype=torch.float64)
    affinity = affinity + affinity.mT
    close(squared_walk(maps, affinity, 2.0, 3), segattr.refine.random_walk(maps, affinity, beta=2.0, steps=8))
    probabilities = torch.rand(1, 3, 9, 7, dtype=torch.float64)
    image = torch.rand(1, 3, 9, 7, dtype=torch.float64)
    found = segattr.refine.dense_crf(probabilities, image, **segattr.refine.IRN_CRF)
    close(dense_mean_field(probabilities, image, **segattr.refine.IRN_CRF), found)


@pytest.mark.parametrize("name", [name for name, _ in losses.pairs(1, 4)])
def test_losses_are_those_of_the_plain_code(name: str) -> None:
    ours, plain, arguments = dict(losses.pairs(2, 12))[name]
    draws, tolerance = (100, 0.02) if name == "importance_sampling" else (1, 1e-4)
    mine, other = (torch.stack([loss(*arguments) for _ in range(draws)]).mean() for loss in (ours, plain))
    torch.testing.assert_close(mine, other, rtol=tolerance, atol=1e-5)


def test_losses_are_measured_with_and_without_checks() -> None:
    ours, plain, arguments = dict(losses.pairs(2, 12))["size_kl"]
    wrong = (arguments[0], arguments[1] + 1)  # refused, where values are looked at
    row = {"loss": "size_kl", "shape": "2 x 12"} | losses.measure((ours, plain, arguments), 3, time.process_time)
    assert row["ratio"] > 0
    with losses.unchecked():
        assert ours(*wrong).isfinite()
    with pytest.raises(ValueError, match="sizes"):
        ours(*wrong)
    where = {"date": "today", "processor": "one", "threads": 1, "load": 0.5, "torch": "2"}
    assert f"| `size_kl` | {row['ratio']:.2f} ({row['unchecked']:.2f}) |" in losses.markdown([row], where)


def test_the_brute_force_of_volumes_is_what_the_loss_approximates() -> None:
    for figure in volumes.errors((20, 24, 26), "lowrank, tolerance 2e-2").values():
        assert 0 < figure < 2e-2
    assert volumes.errors((8, 9, 10), "auto")["error"] < 1e-5
    assert volumes.brute_force_seconds((8, 9, 10)) > 0


@pytest.mark.slow
def test_the_command_writes_results_with_their_environment(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "-k", "2x21x64x64", "--out", str(tmp_path / "new")]
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert {"date", "torch", "processor", "threads", "load"} <= written["environment"].keys()
    assert [row["method"] for row in written["results"]] == ["naive autograd", "log-space autograd", "segloss.size_kl"]
    for row in written["results"]:
        for key, kind in ROW.items():
            assert isinstance(row[key], kind), key
        assert row["seconds"] > 0
        assert row["megabytes"] >= 0
    assert (tmp_path / "new" / "cpu.md").read_text() in done.stdout


@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.losses", "benchmarks.dense_crf", "benchmarks.volumes"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, module: str) -> None:
    (tmp_path / "file").touch()
    done = run("-m", module, "--out", tmp_path / "file" / "folder")
    assert done.returncode == 2
    assert done.stderr.startswith("--out: expected a folder that can be written")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("module", "option"), [("benchmarks.dense_crf", "--truths"), ("benchmarks.zoo", "--output")])
def test_other_folders_that_cannot_be_written_are_one_line(tmp_path: Path, module: str, option: str) -> None:
    (tmp_path / "file").touch()
    done = run("-m", module, "--out" if option == "--truths" else option, tmp_path / "out", option, tmp_path / "file")
    assert done.returncode == 2
    assert re.fullmatch(f"{option}: expected a folder that can be written, got .*file .*\n", done.stderr)


def test_a_folder_without_photographs_is_one_line(tmp_path: Path) -> None:
    done = run("-m", "benchmarks.reading", tmp_path / "nowhere", "--out", tmp_path / "out.json")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/nowhere: expected a folder, found none\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "size"), "argument --loss: invalid choice: 'size'"),
        (("--rounds", "0"), "argument --rounds: expected a whole number above 0, got 0"),
    ],
)
def test_a_mistake_in_the_command_of_the_losses_is_one_line(words: tuple[str, ...], message: str) -> None:
    done = run("-m", "benchmarks.losses", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
