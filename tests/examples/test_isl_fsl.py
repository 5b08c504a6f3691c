"""The add-on recipe as a user runs it, on a tiny budget."""

import os
import re
import subprocess
import sys
from pathlib import Path

import isl_fsl
import torch
from matplotlib.image import imread

ROOT = Path(__file__).parents[2]


def test_it_compares_the_losses_and_draws_their_maps(tmp_path: Path) -> None:
    options = ["--steps", "3", "--pretrain-steps", "2", "--scenes", "24", "--size", "32", "--device", "cpu", "--out"]
    command = [sys.executable, str(ROOT / "examples" / "isl_fsl.py"), *options, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+(?: \+ \w+)*) +([\d.]+) +([\d.]+) +([\d.]+) +0\.\d\d +\d+$", done.stdout, re.M)
    assert [row[0] for row in rows] == ["start", *isl_fsl.LOSSES]
    for _, region, contour, both in rows:
        assert abs(float(both) - (float(region) + float(contour)) / 2) < 1.1e-3
    assert imread(tmp_path / "isl_fsl.png").shape == (1350, 900, 4)


def test_every_loss_has_a_finite_gradient_for_all_of_the_classifier() -> None:
    batch = {"image": torch.rand(2, 3, 32, 32), "tags": torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])}
    for loss in isl_fsl.LOSSES.values():
        model = isl_fsl.Classifier(4)
        scores = model(batch["image"])
        assert scores.shape == (2, 4, 16, 16)
        loss(scores, batch).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_perfect_maps_get_full_marks() -> None:
    labels = torch.zeros(3, 32, 32, dtype=torch.int64)
    labels[0, 4:20, 6:22], labels[1, 8:30, 2:20], labels[2, 3:12, 3:12], labels[2, 16:30, 14:28] = 1, 2, 3, 4
    maps = (labels[:, None] == torch.arange(1, 5).view(-1, 1, 1)).float()
    test = {"image": maps, "labels": labels, "tags": maps.amax((2, 3)).long()}
    outcome = isl_fsl.assess(torch.nn.Identity(), test, seconds=1.0)
    assert (outcome.region == 1).all()
    assert (outcome.contour == 1).all()
    assert torch.equal(outcome.masks, labels)
