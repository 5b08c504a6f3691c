"""All methods together as a user runs them, on a tiny budget."""

import re
from itertools import pairwise
from pathlib import Path

import everything
import pytest
import torch
from data.augment import Fit
from data.sample import VOID, Stacked
from data.scenes import CLASSES, Scenes, stack
from data.stream import Whole
from data.write_voc import write_voc
from engine.command import parse
from matplotlib.image import imread
from parts import supervisions
from pseudo_labels import Quality, Relabelled

from tests.run_example import run_example
from tests.tiny_photographs import write_tiny_photographs

TINY = (
    *("--pretrain-steps", "2", "--classifier-steps", "2", "--steps", "2", "--maps", "3"),
    *("--scenes", "24", "--ood", "44", "--size", "32", "--device", "cpu"),
)
STAGES = ["CAM", "+ ISL and FSL", "+ W-OoD", "+ AdvCAM and RIB", "+ random walk", "+ dense CRF"]


def rows(printed: str) -> dict[str, list[str]]:
    """Cells of the rows of both tables."""
    found = re.findall(r"^(\+? ?[A-Za-z].*?)((?: +-?\d+\.\d(?: ±\d+\.\d)?){4,5})$", printed, re.M)
    return {name: re.findall(r"-?\d+\.\d", re.sub(r"±\d+\.\d", "", cells)) for name, cells in found}


@pytest.mark.slow
def test_it_prints_what_each_stage_adds_and_draws_it(tmp_path: Path) -> None:
    done = run_example("everything", *TINY, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert list(found) == [*STAGES, "pseudo-labels", *everything.NETWORKS]
    for above, name in pairwise(found):
        if name.startswith("+"):
            gain = float(found[name][0]) - float(found[above][0])
            assert abs(float(found[name][1]) - gain) < 0.11  # each is rounded
    assert imread(tmp_path / "everything.png").shape[2] == 4


@pytest.mark.slow
def test_it_leaves_out_wood_and_trains_deeplab_on_a_folder_in_the_layout_of_voc(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {"train": Scenes("train", 24, size=40), "val": Scenes("val", 8, size=40, void_width=2)})
    options = ("--data", "voc", "--root", tmp_path / "voc", "--repeats", "2", "--out", tmp_path / "out")
    network = ("--network", "deeplabv3_mobilenet_v3_large", "--weights", "none", "--batch-size", "4")
    done = run_example("everything", *TINY, *options, *network)
    assert done.returncode == 0, done.stderr
    assert "without W-OoD: only scenes have out-of-distribution images" in done.stdout
    kept = [name for name in STAGES if name != "+ W-OoD"]
    assert list(rows(done.stdout)) == [*kept, "pseudo-labels", *everything.NETWORKS]
    assert len(re.findall(r"^\+ AdvCAM and RIB .*±", done.stdout, re.M)) == 1


@pytest.mark.slow
def test_a_pretrained_network_runs_through_all_stages_on_photographs_and_after_a_stop(tmp_path: Path) -> None:
    write_tiny_photographs(tmp_path / "photographs")
    words = ("--data", "voc", "--root", tmp_path / "photographs", "--quick", "--weights", "none", "--out", tmp_path)
    small = ("--pretrain-steps", 2, "--classifier-steps", 2, "--steps", 2, "--maps", 4, "--size", 64, "--device", "cpu")
    done = run_example("everything", *words, *small, "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    kept = [name for name in STAGES if name != "+ W-OoD"]
    assert list(rows(done.stdout)) == [*kept, "pseudo-labels", *everything.NETWORKS]
    assert not list((tmp_path / "checkpoints").glob("*start*")), "of pretrained ones no network trains on tags"
    (tmp_path / "checkpoints" / "network_Potts_seed_0.pt").unlink()
    again = run_example("everything", *words, *small, "--batch-size", 4, "--resume")
    assert again.stdout == done.stdout


def test_presets_for_photographs() -> None:
    words = ["--data", "voc", "--root", "."]
    papers, quick = (parse(everything.Config, [*words, *more]) for more in ([], ["--quick"]))
    assert (papers.network, papers.weights) == (quick.network, quick.weights) == ("efficientnet_lite0", "imagenet")
    assert (papers.size, papers.maps, papers.steps, papers.crf_scale, papers.frozen) == (320, 0, 10000, 0.5, False)
    assert (quick.size, quick.maps, quick.steps, quick.crf_scale, quick.frozen) == (224, 80, 80, 0.25, True)
    assert parse(everything.Config, []).network == "small"


def test_options_that_do_not_go_together_are_named() -> None:
    with pytest.raises(ValueError, match="--weights: expected a DeepLabV3 as --network with coco, got small"):
        everything.Config(weights="coco")
    with pytest.raises(ValueError, match="--batch-size: expected at least 2 images at once for a DeepLabV3, got 1"):
        everything.Config(network="deeplabv3_resnet50", batch_size=4, accumulate=4)
    with pytest.raises(ValueError, match="--crf-scale: expected above 0 and at most 1, got 2"):
        everything.Config(crf_scale=2)


def test_each_stage_adds_one_method_to_the_one_above() -> None:
    stages = everything.methods(["GAP", "ISL + FSL", "W-OoD + GAP", "W-OoD + ISL + FSL"])
    assert [*stages, everything.CRF] == STAGES
    classifiers = [method.classifier for method in stages.values()]
    assert classifiers == ["GAP", "ISL + FSL", *["W-OoD + ISL + FSL"] * 3]
    without = everything.methods(["GAP", "ISL + FSL"])
    assert [method.classifier for method in without.values()] == ["GAP", *["ISL + FSL"] * 3]
    assert without[everything.WALK].maps == ("AdvCAM + random walk", "RIB + random walk")


def test_size_targets_cost_nothing_at_the_target_and_leave_out_padding() -> None:
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 1] = torch.tensor(3.0).log()  # probabilities 1/4 and 3/4
    logits[:, :, :, 2:] = torch.tensor([50.0, 0.0]).view(2, 1, 1)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, :, 2:] = False
    batch = {"targets": torch.tensor([[0.25, 0.75]]), "valid": valid}
    assert float(supervisions.size(logits, batch)) == pytest.approx(0, abs=1e-6)
    assert float(supervisions.size(logits, batch | {"valid": torch.ones_like(valid)})) > 0.1


def test_the_potts_loss_prefers_segments_that_end_at_edges_of_the_image() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1
    batch = {"image": image, "valid": torch.ones(1, 16, 16, dtype=torch.bool)}

    def loss(column: int) -> float:
        logits = torch.zeros(1, 2, 16, 16)
        logits[:, 1, :, column:] = 20
        logits[:, 0, :, :column] = 20
        return float(everything.edges(logits, batch))

    assert loss(8) < 0.1 * loss(4)


def test_padding_counts_neither_as_a_label_nor_in_the_size_targets() -> None:
    scenes = stack(Scenes("train", 2, size=32))
    image, labels = scenes.image[:, :, :16], scenes.labels[:, :16]  # wide ones
    whole = Whole(Stacked(CLASSES, image, labels), Fit(32, mirror=False))
    masks = [torch.zeros(32, 32, dtype=torch.uint8) for _ in whole.names]
    masks[0][:16] = 2  # the upper half of the image, and the padding above it
    known = Relabelled(whole, masks)
    assert known.sizes()[0].tolist() == [0.5, 0, 0.5, 0, 0]
    assert (known[0]["labels"] == VOID).sum() == 32 * 16


def test_gains_are_paired_by_seed_and_only_for_rows_with_a_plus() -> None:
    def quality(miou: float) -> Quality:
        return Quality(miou, 0, 0, 0, 0, 100, 0)

    runs = [{"stage": {"CAM": quality(a), "+ CRF": quality(a + 2), "bound": quality(90)}} for a in (40.0, 60.0)]
    _, cam, crf, bound = everything.table(runs).splitlines()
    assert cam.split() == ["CAM", "50.0", "±14.1", "0.0", "±0.0", "0.0", "±0.0", "100.0", "±0.0"]
    assert crf.split()[:6] == ["+", "CRF", "52.0", "±14.1", "2.0", "±0.0"]
    assert bound.split()[:3] == ["bound", "90.0", "±0.0"]
    assert len(bound.split()) == len(cam.split())
