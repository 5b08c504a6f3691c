"""High gradient ratio, against counts made pixel by pixel."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from segattr import metrics


def pixels(mask: Tensor) -> set[tuple[int, int]]:
    return {(row, column) for row, column in np.argwhere(mask.numpy()).tolist()}


def gradients_of_layers(case: dict[str, Tensor]) -> list[Tensor]:
    """Of both features and of the score of class 1 with respect to the images."""
    images = case["x"].clone().requires_grad_()
    first = F.conv2d(images, case["net/conv1.weight"], case["net/conv1.bias"], padding=1).relu()
    second = F.conv2d(first, case["net/conv2.weight"], case["net/conv2.bias"], stride=2, padding=1).relu()
    score = F.linear(second.mean((2, 3)), case["net/fc.weight"])[:, 1]
    return [torch.autograd.grad(value.sum(), images, retain_graph=True)[0] for value in (first, second, score)]


def test_high_gradient_ratio_golden(golden: Callable[[str], dict[str, Tensor]]) -> None:
    case = golden("attr/hgr")
    regions = case["regions"].expand(2, -1, -1, -1)
    for layer, gradients in enumerate(gradients_of_layers(case)):
        for given_gradients in (gradients, case["magnitudes"][layer]):
            ratio = metrics.high_gradient_ratio(given_gradients, regions)
            assert ratio.dtype == torch.float64
            torch.testing.assert_close(ratio, case["relative"][layer], rtol=0, atol=1e-9)
            threshold = case["thresholds"][layer].item()
            ratio = metrics.high_gradient_ratio(given_gradients, regions, threshold=threshold, scale=1)
            torch.testing.assert_close(ratio, case["absolute"][layer], rtol=0, atol=1e-9)


def test_high_gradients_are_above_the_threshold_in_any_channel_of_any_sign() -> None:
    gradients = torch.tensor([[[[10.0, 3.0, 0.0, 0.0]], [[0.0, 0.0, -3.5, 1.0]]]])
    everywhere = torch.ones(1, 1, 4, dtype=torch.bool)
    assert metrics.high_gradient_ratio(gradients, everywhere, threshold=0.25) == 0.75
    assert metrics.high_gradient_ratio(gradients, everywhere, threshold=3, scale=1) == 0.5  # 3 itself is not above
    assert metrics.high_gradient_ratio(gradients, everywhere, threshold=0) == 1
    assert metrics.high_gradient_ratio(gradients, everywhere, threshold=1) == 0


@given(hnp.arrays(np.float64, (2, 3, 4, 5), elements=st.floats(-1, 1, width=16)), st.floats(0, 1.2), st.floats(0, 2))
def test_high_gradient_ratio_counts_pixels(values: Any, threshold: float, scale: float) -> None:
    regions = torch.rand(2, 3, 4, 5) < 0.5
    for by_image in (None, scale, torch.tensor([scale, 2 * scale], dtype=torch.float64)):
        found = metrics.high_gradient_ratio(torch.from_numpy(values), regions, threshold=threshold, scale=by_image)
        for n, r in itertools.product(range(2), range(3)):
            magnitude = abs(values[n]).max(0)
            unit = [magnitude.max(), scale, scale * (n + 1)][0 if by_image is None else 1 if by_image is scale else 2]
            high = [magnitude[x] > threshold * unit for x in pixels(regions[n, r])]
            expected = sum(high) / len(high) if high else math.nan
            assert found[n, r].item() == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_the_scale_of_the_start_shows_a_rise_of_all_gradients_alike() -> None:
    gradients, regions = torch.rand(3, 1, 9, 9) + 0.1, torch.ones(3, 9, 9, dtype=torch.bool)
    start = gradients.abs().amax((1, 2, 3))
    before = metrics.high_gradient_ratio(gradients, regions)
    assert torch.equal(metrics.high_gradient_ratio(gradients, regions, scale=start), before)
    assert torch.equal(metrics.high_gradient_ratio(8 * gradients, regions), before)
    assert (metrics.high_gradient_ratio(8 * gradients, regions, scale=start) == 1).all()


def test_regions_without_pixels_have_no_ratio_and_zero_gradients_are_not_high() -> None:
    regions = torch.tensor([[[True, False]], [[False, False]]])
    ratio = metrics.high_gradient_ratio(torch.zeros(2, 3, 1, 2), regions)
    assert ratio[0] == 0
    assert ratio[1].isnan()
    no_images, no_pixels = torch.zeros(0, 2, 4, 4), torch.zeros(1, 0, 4)
    assert metrics.high_gradient_ratio(no_images, no_images.bool()).shape == (0, 2)
    assert metrics.high_gradient_ratio(no_pixels, no_pixels.bool()).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_high_gradient_ratio_of_narrow_gradients_is_that_of_their_values(dtype: torch.dtype) -> None:
    gradients, regions = torch.rand(2, 3, 9, 9).to(dtype), torch.rand(2, 9, 9) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        ratio = metrics.high_gradient_ratio(gradients.requires_grad_(), regions)
    assert ratio.dtype == torch.float32
    assert not ratio.requires_grad
    assert torch.equal(ratio, metrics.high_gradient_ratio(gradients.float(), regions))


GRADIENTS, REGIONS = torch.ones(2, 3, 4, 5), torch.ones(2, 4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("gradients", "regions", "options", "error", "message"),
    [
        (GRADIENTS.long(), REGIONS, {}, TypeError, "gradients: expected a floating-point tensor, got torch.int64"),
        (GRADIENTS[0, 0], REGIONS, {}, ValueError, r"gradients: expected \[B, C, H, W\] or .* got \[4, 5\]"),
        (GRADIENTS[:, :0], REGIONS, {}, ValueError, r"gradients: expected at least one channel, got \[2, 0, 4, 5\]"),
        (GRADIENTS / 0, REGIONS, {}, ValueError, "gradients: expected finite values"),
        (GRADIENTS, REGIONS.float(), {}, TypeError, "regions: expected a bool tensor"),
        (GRADIENTS, REGIONS[:1], {}, ValueError, r"regions: expected \[2, 4, 5\] .* got \[1, 4, 5\]"),
        (GRADIENTS, REGIONS[0], {}, ValueError, r"regions: expected \[2, 4, 5\] .* got \[4, 5\]"),
        (GRADIENTS, REGIONS[:, None].mT, {}, ValueError, r"regions: expected \[2, 1, 4, 5\] .* got \[2, 1, 5, 4\]"),
        (GRADIENTS, REGIONS.to("meta"), {}, ValueError, "regions: expected device cpu"),
        (GRADIENTS, REGIONS, {"threshold": -1}, ValueError, "threshold: expected a"),
        (GRADIENTS, REGIONS, {"threshold": None}, TypeError, "threshold: expected a number, got NoneType"),
        (GRADIENTS, REGIONS, {"scale": -1.0}, ValueError, "scale: expected a"),
        (GRADIENTS, REGIONS, {"scale": "max"}, TypeError, "scale: expected a number, got str"),
        (GRADIENTS, REGIONS, {"scale": torch.ones(2).long()}, TypeError, "scale: expected a floating-point tensor"),
        (GRADIENTS, REGIONS, {"scale": torch.ones(3)}, ValueError, r"scale: expected \[2\] .* got \[3\]"),
        (GRADIENTS, REGIONS, {"scale": torch.tensor([1.0, -2.0])}, ValueError, "scale: expected at least 0, got -2"),
        (GRADIENTS, REGIONS, {"scale": torch.tensor([1.0, math.inf])}, ValueError, "scale: expected finite values"),
    ],
)
def test_high_gradient_ratio_refuses_what_makes_no_sense(
    gradients: Any, regions: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metrics.high_gradient_ratio(gradients, regions, **options)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives() -> None:
    gradients, regions = torch.randn(4, 3, 60, 80), torch.rand(4, 2, 60, 80) < 0.5
    ratio = metrics.high_gradient_ratio(gradients.cuda(), regions.cuda()).cpu()
    torch.testing.assert_close(ratio, metrics.high_gradient_ratio(gradients, regions))
