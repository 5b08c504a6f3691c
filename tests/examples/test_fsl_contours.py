"""The ablation of the feature similarity loss as a user runs it, and what it claims, on a small budget."""

import re
from pathlib import Path

import pytest
import torch
from fsl_contours import Config, gaussian_scores, load, optimise, quality
from matplotlib.image import imread

import segloss
from tests.run_example import run_example


@pytest.mark.slow
def test_it_prints_a_row_for_each_setting_and_draws_a_picture(tmp_path: Path) -> None:
    done = run_example(
        "fsl_contours", "--scenes", "2", "--steps", "2", "--size", "32", "--device", "cpu", "--out", tmp_path / "new"
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(max|sigmoid) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([+-][\d.]+)$", done.stdout, re.M
    )
    assert [row[0] for row in rows] == ["max"] * 8 + ["sigmoid"] * 8
    start = float(re.search(r"^start +[\d.]+ +[\d.]+ +([\d.]+)$", done.stdout, re.M)[1])  # type: ignore[index]
    for *_, region, contour, both, gain in rows:
        assert float(both) == pytest.approx((float(region) + float(contour)) / 2, abs=1.1e-3)
        assert float(gain) == pytest.approx(float(both) - start, abs=1.1e-3)
    assert imread(tmp_path / "new" / "fsl_contours.png").shape == (900, 1100, 4)


def test_the_start_has_mean_and_variances_of_the_mask() -> None:
    mask = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    mask[..., 10:21, 15:18] = True
    weight = (gaussian_scores(mask)[0, 0].double() + 1) / 2  # the Gaussian
    weight /= weight.sum()
    rows, columns = weight.sum(1), weight.sum(0)
    place = torch.arange(40.0, dtype=torch.float64)
    for share, mean, variance in ((rows, 15, 10.0), (columns, 16, 2 / 3)):
        assert (share * place).sum().item() == pytest.approx(mean, abs=0.1)
        assert (share * (place - mean) ** 2).sum().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.slow
def test_contours_improve_and_with_the_sigmoid_gate_j_and_f_rises_by_more_than_five_points() -> None:
    image, mask = load("train", Config(scenes=4, seed=3))
    start = gaussian_scores(mask)
    for gate in ("max", "sigmoid"):
        loss = segloss.FeatureSimilarity(gate=gate, reduction="sum")
        run = optimise(start, image, mask, loss, Config().steps)
        assert run.curve[0] == quality(start, mask)
        assert run.curve[-1] == quality(run.scores, mask)
        assert run.curve[-1][1] > run.curve[0][1]
        if gate == "sigmoid":
            assert run.curve[-1][2] > run.curve[0][2] + 0.05
        else:
            assert ((run.scores > 0) <= (start > 0)).all()  # without a gradient below 0, masks only shrink
