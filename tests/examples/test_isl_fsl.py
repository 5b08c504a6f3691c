"""The add-on recipe as a user runs it, on a tiny budget."""

import re
from pathlib import Path

import isl_fsl
import pytest
import torch
from data.scenes import Scenes
from data.write_voc import write_voc
from matplotlib.image import imread
from parts import tag_classifier
from parts.tag_classifier import Output
from torch import Tensor

from tests.run_example import run_example
from tests.tiny_photographs import write_tiny_photographs

TINY = ("--steps", "3", "--pretrain-steps", "2", "--scenes", "24", "--size", "32", "--device", "cpu")


@pytest.mark.slow
def test_it_compares_the_losses_and_draws_their_maps(tmp_path: Path) -> None:
    done = run_example("isl_fsl", *TINY, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+(?: \+ \w+)*) +([\d.]+) +([\d.]+) +([\d.]+) +0\.\d\d +\d+$", done.stdout, re.M)
    assert [row[0] for row in rows] == ["start", *isl_fsl.LOSSES]
    for _, region, contour, both in rows:
        assert abs(float(both) - (float(region) + float(contour)) / 2) < 1.1e-3
    assert imread(tmp_path / "isl_fsl.png").shape == (1350, 900, 4)


@pytest.mark.slow
def test_it_trains_on_a_folder_in_the_layout_of_voc(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {"train": Scenes("train", 24, size=40), "val": Scenes("val", 8, size=40, void_width=2)})
    options = ("--data", "voc", "--root", tmp_path / "voc", "--network", "small", "--out", tmp_path / "out")
    done = run_example("isl_fsl", *TINY, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == len(isl_fsl.LOSSES) + 3
    assert (tmp_path / "out" / "isl_fsl.png").exists()


@pytest.mark.slow
def test_a_pretrained_network_goes_on_training_on_photographs_and_after_a_stop(tmp_path: Path) -> None:
    write_tiny_photographs(tmp_path / "photographs")
    words = ("--data", "voc", "--root", tmp_path / "photographs", "--quick", "--weights", "none", "--out", tmp_path)
    small = ("--steps", 2, "--pretrain-steps", 2, "--size", 64, "--batch-size", 4, "--device", "cpu")
    done = run_example("isl_fsl", *words, *small)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "isl_fsl.png").exists()
    lost = [tmp_path / "pooled" / "coffee_train_60.npz", tmp_path / "checkpoints" / "GAP_FSL.pt"]
    for path in lost:
        path.unlink()
    again = run_example("isl_fsl", *words, *small, "--resume")
    assert again.returncode == 0, again.stderr
    qualities = [re.findall(r"^(.+?) +\d+$", printed, re.M) for printed in (done.stdout, again.stdout)]
    assert qualities[0] == qualities[1]
    assert len(qualities[0]) == 1 + len(isl_fsl.LOSSES)
    assert all(path.exists() for path in lost)


def test_every_loss_has_a_finite_gradient_for_all_of_the_classifier() -> None:
    batch = {"image": torch.rand(2, 3, 32, 32), "tags": torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]])}
    for loss in isl_fsl.LOSSES.values():
        model = tag_classifier.build("small", 4, "none")
        _, scores = model(batch["image"])
        assert scores.shape == (2, 4, 16, 16)
        loss(scores, batch).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Perfect(torch.nn.Module):
    """Its score maps are the images."""

    def forward(self, image: Tensor) -> Output:
        return image, image


def test_perfect_maps_get_full_marks() -> None:
    labels = torch.zeros(3, 32, 32, dtype=torch.int64)
    labels[0, 4:20, 6:22], labels[1, 8:30, 2:20], labels[2, 3:12, 3:12], labels[2, 16:30, 14:28] = 1, 2, 3, 4
    maps = (labels[:, None] == torch.arange(1, 5).view(-1, 1, 1)).float()
    test = {"image": maps, "labels": labels, "tags": torch.nn.functional.pad(maps.amax((2, 3)).long(), (1, 0), value=1)}
    outcome = isl_fsl.assess(Perfect(), test, seconds=1.0)
    assert (outcome.region == 1).all()
    assert (outcome.contour == 1).all()
    assert torch.equal(outcome.masks, labels)
