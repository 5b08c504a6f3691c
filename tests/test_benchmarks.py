"""The benchmark command: its table, its file, its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import collect, markdown
from benchmarks.baselines import (
    batched_heatmaps,
    dense_filter,
    log_space_size_kl,
    naive_feature_similarity,
    naive_path_affinity_loss,
    naive_size_kl,
    sequential_heatmaps,
)
from segattr.lrp import unroll
from segloss import feature_similarity, path_affinity_loss, size_kl
from segloss.bilateral.reference import gaussian_filter_reference

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


@pytest.mark.slow
def test_the_command_writes_results_with_their_environment(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "-k", "2x21x64x64", "--out", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "benchmarks", "--out", str(tmp_path / "file" / "folder")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("--out: expected a folder that can be written")
    assert done.stderr.count("\n") == 1
