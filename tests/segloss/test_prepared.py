"""The filter of one image for many values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from segloss import bilateral_filter, potts_crf
from segloss.bilateral import PreparedFilter, blocksparse, guide_features
from tests.segloss.test_bilateral import picture


@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_tiles_found_once_serve_any_number_of_channels(tolerance: float) -> None:
    image = torch.cat([picture("smooth", 40, 37), picture("photograph", 40, 37)]).double()
    features = guide_features(image, 0.05, 10.0)
    kernel = blocksparse.prepare(features, tolerance)
    for channels in (1, 5, 40):
        values = torch.rand(2, channels, 40 * 37, dtype=torch.float64)
        expected = blocksparse.gaussian_filter(values, features, tolerance)
        torch.testing.assert_close(kernel.filtered(values), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["exact", "blocksparse"])
def test_it_is_the_bilateral_filter_also_under_autocast(method: str) -> None:
    image, values = picture("smooth", 40, 37).float(), torch.rand(1, 4, 40, 37)
    run = PreparedFilter(image, sigma_rgb=0.05, sigma_xy=10.0, method=method)
    expected = bilateral_filter(values, image, sigma_rgb=0.05, sigma_xy=10.0, method=method)
    with torch.autocast("cpu"):
        torch.testing.assert_close(run(values), expected)


def test_one_image_serves_a_batch_of_values() -> None:
    image, values = picture("smooth", 12, 9), torch.rand(3, 2, 12, 9, dtype=torch.float64)
    run = PreparedFilter(image.double(), sigma_rgb=0.1, sigma_xy=4.0)
    expected = bilateral_filter(values, image.double().expand(3, -1, -1, -1), sigma_rgb=0.1, sigma_xy=4.0)
    torch.testing.assert_close(run(values), expected)
    assert run(values[:0]).shape == (0, 2, 12, 9)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_values_get_gradients_twice(method: str, filled: bool) -> None:
    torch.manual_seed(0)
    run = PreparedFilter(torch.rand(2, 3, 4, 5).double(), sigma_rgb=0.3, sigma_xy=2.0, method=method, filled=filled)
    values = torch.rand(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(run, values)
    torch.autograd.gradgradcheck(lambda values: run(values**2), values)


@pytest.mark.parametrize("method", ["blocksparse", "lattice"])
def test_a_step_on_a_filter_that_is_kept_is_one_of_potts_crf(method: str) -> None:
    torch.manual_seed(0)
    image = picture("photograph", 40, 37).double()
    settings = {"sigma_rgb": 0.1, "sigma_xy": 6.0, "method": method}
    logits = torch.randn(1, 3, 40, 37, dtype=torch.float64, requires_grad=True)
    expected = potts_crf(logits, image, **settings)
    probability = logits.softmax(1)
    loss = ((1 - probability) * PreparedFilter(image, **settings)(probability)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(energy, logits)[0] for energy in (loss, expected)))


def test_orders_that_alternate_give_no_gradient() -> None:
    run = PreparedFilter(torch.rand(1, 3, 4, 4), method="lattice", alternate=True)
    values = torch.rand(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="values: expected no gradient with alternate=True"):
        run(values)
    with torch.no_grad():
        assert run(values).shape == values.shape


@pytest.mark.parametrize(
    ("image", "values", "settings", "error", "message"),
    [
        (torch.rand(1, 3, 0, 4), torch.rand(1, 1, 0, 4), {}, ValueError, "image: expected at least one pixel"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4), {"method": "lowrank"}, ValueError, "method: expected one of"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4), {"sigma_xy": 0}, ValueError, "sigma_xy: expected"),
        (
            torch.rand(1, 3, 4, 4),
            torch.rand(1, 4, 4),
            {},
            ValueError,
            "values: expected \\[1, 4, 4, 4\\] to go with image",
        ),
        (torch.rand(2, 3, 4, 4), torch.rand(1, 1, 4, 4), {}, ValueError, "values: expected \\[2, 1, 4, 4\\]"),
        (torch.rand(1, 3, 4, 4), torch.ones(1, 1, 4, 4).long(), {}, TypeError, "values: expected a floating-point"),
        (torch.rand(1, 3, 4, 4), torch.full((1, 1, 4, 4), torch.nan), {}, ValueError, "values: expected finite"),
    ],
)
def test_errors(image: Tensor, values: Tensor, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PreparedFilter(image, **settings)(values)
