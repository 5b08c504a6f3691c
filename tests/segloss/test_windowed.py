"""What is particular to the windowed Potts loss, and the share of the kernel that a window keeps."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segloss
from segloss import _window
from segloss.bilateral import guide_features
from segloss.bilateral.reference import gaussian_filter_reference
from tests.segloss.test_bilateral import images, picture, sigmas, widths

seeds = st.integers(0, 2**16)
sides = st.integers(1, 9)
radii = st.integers(0, 10)


def dense_window(height: int, width: int, radius: int) -> Tensor:
    """1 for pairs of pixels within the window, ``[H W, H W]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down = (rows.flatten()[:, None] - rows.flatten()).abs()
    right = (columns.flatten()[:, None] - columns.flatten()).abs()
    return (torch.maximum(down, right) <= radius).double()


def dense_weights(image: Tensor, sigma_rgb: float | Tensor, sigma_xy: float | Tensor) -> Tensor:
    """The whole kernel, ``[B, H W, H W]``."""
    features = guide_features(image, sigma_rgb, sigma_xy)
    pixels = torch.eye(features.shape[2], dtype=features.dtype).expand(len(image), -1, -1)
    return gaussian_filter_reference(pixels, features)


def dense_energy(probability: Tensor, image: Tensor, valid: Tensor, radius: int, **sigma: Any) -> Tensor:
    weights = dense_weights(image, **sigma) * dense_window(*image.shape[2:], radius)
    probability, mask = probability.flatten(2), valid.flatten(1)[:, None]
    return torch.einsum("bkp,bpq,bkq->b", mask * (1 - probability), weights, mask * probability)


@settings(max_examples=40)
@given(
    seed=seeds,
    height=sides,
    width=sides,
    radius=radii,
    kind=images,
    sigma_rgb=sigmas,
    sigma_xy=widths,
    from_logits=st.booleans(),
)
def test_value_and_gradients_are_those_of_the_dense_formula(
    seed: int,
    height: int,
    width: int,
    radius: int,
    kind: str,
    sigma_rgb: float,
    sigma_xy: float,
    from_logits: bool,
) -> None:
    torch.manual_seed(seed)
    image = picture(kind, height, width, batch=2, seed=seed).requires_grad_()
    logits = torch.rand(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    sigma = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in (("sigma_rgb", sigma_rgb), ("sigma_xy", sigma_xy))
    }
    valid = torch.rand(2, height, width) < 0.8
    energy = segloss.windowed_potts(
        logits, image, radius=radius, valid=valid, from_logits=from_logits, reduction="none", **sigma
    )
    expected = dense_energy(logits.softmax(1) if from_logits else logits, image, valid, radius, **sigma)
    torch.testing.assert_close(energy, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(2, dtype=torch.float64)
    inputs = (logits, image, *sigma.values())
    found, wanted = (torch.autograd.grad((value * weight).sum(), inputs) for value in (energy, expected))
    for grad, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-10, equal_nan=True)


@settings(max_examples=20)
@given(seed=seeds, height=sides, width=sides, beyond=st.sampled_from([0, 1, 10**6]))
@pytest.mark.parametrize("normalize", [None, "pixels", "pairs"])
def test_a_window_over_the_whole_image_gives_the_dense_loss(
    normalize: str | None, seed: int, height: int, width: int, beyond: int
) -> None:
    torch.manual_seed(seed)
    image = picture("smooth", height, width, batch=2, seed=seed).requires_grad_()
    logits = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    options = {"sigma_xy": 4.0, "valid": torch.rand(2, height, width) < 0.8, "normalize": normalize}
    windowed = segloss.windowed_potts(logits, image, radius=max(height, width) - 1 + beyond, **options)
    dense = segloss.potts_crf(logits, image, method="exact", **options)
    torch.testing.assert_close(windowed, dense)
    for grad, truth in zip(*(torch.autograd.grad(loss, (logits, image)) for loss in (windowed, dense)), strict=True):
        torch.testing.assert_close(grad, truth)


def test_radius_0_leaves_each_pixel_with_itself() -> None:
    probability = torch.rand(2, 3, 4, 5)
    loss = segloss.windowed_potts(probability, torch.rand(2, 3, 4, 5), radius=0, from_logits=False, reduction="sum")
    torch.testing.assert_close(loss, (probability * (1 - probability)).sum())


def test_a_wider_window_costs_more_and_a_neighbourhood_is_the_grid_loss() -> None:
    image, logits = picture("noise", 6, 7), torch.randn(1, 3, 6, 7, dtype=torch.float64)
    costs = [segloss.windowed_potts(logits, image, sigma_rgb=0.5, radius=radius).item() for radius in range(8)]
    assert costs[:7] == sorted(set(costs))
    assert costs[6] == costs[7]
    one, none = (segloss.windowed_potts(logits, image, sigma_rgb=0.5, sigma_xy=math.inf, radius=r) for r in (1, 0))
    torch.testing.assert_close(one - none, segloss.grid_potts(logits, image, sigma_rgb=0.5, connectivity=8))


def test_normalisation_divides_by_valid_pixels_or_by_their_pairs_within_the_window() -> None:
    logits, image = torch.randn(2, 3, 5, 6), torch.rand(2, 3, 5, 6)
    valid = torch.rand(2, 5, 6) < 0.7
    plain = segloss.windowed_potts(logits, image, valid=valid, radius=2, reduction="none")
    flat = valid.flatten(1).double()
    counts = {"pixels": flat.sum(1), "pairs": ((flat @ dense_window(5, 6, 2)) * flat).sum(1)}
    for normalize, count in counts.items():
        divided = segloss.windowed_potts(logits, image, valid=valid, radius=2, normalize=normalize, reduction="none")
        torch.testing.assert_close(divided, plain / count.float())


def test_image_and_sigmas_can_be_differentiated_twice() -> None:
    image, logits = picture("noise", 4, 5).requires_grad_(), torch.randn(1, 2, 4, 5, dtype=torch.float64)
    sigma_rgb, sigma_xy = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 2.0))
    valid = torch.rand(1, 4, 5) < 0.8

    def loss(logits: Tensor, image: Tensor, sigma_rgb: Tensor, sigma_xy: Tensor) -> Tensor:
        return segloss.windowed_potts(logits, image, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, radius=2, valid=valid)

    inputs = (logits.requires_grad_(), image, sigma_rgb, sigma_xy)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("inputs", [("logits",), ("logits", "image")])
def test_what_is_kept_for_the_backward_pass_does_not_depend_on_the_radius(inputs: tuple[str, ...]) -> None:
    tensors = {"logits": torch.randn(1, 4, 16, 16), "image": torch.rand(1, 3, 16, 16)}
    for name in inputs:
        tensors[name].requires_grad_()

    def kept(radius: int) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            segloss.windowed_potts(**tensors, radius=radius)
        return sum(sizes)

    assert kept(1) == kept(7)


def test_the_walk_runs_once_for_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = _window.window_filter
    monkeypatch.setattr(_window, "window_filter", lambda *a: runs.append(1) or run(*a))
    image = torch.rand(1, 3, 6, 6)
    segloss.windowed_potts(torch.randn(1, 3, 6, 6, requires_grad=True), image).backward()
    torch.func.grad(lambda x: segloss.windowed_potts(x, image))(torch.randn(1, 2, 6, 6))
    assert len(runs) == 2


def test_operators_are_registered_correctly() -> None:
    values, features = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 5, 4, 5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.segloss.window.default, (values, features, 2))
    torch.library.opcheck(torch.ops.segloss.window_guide.default, (values, values, features, 2))


@pytest.mark.slow
def test_compiles_into_one_graph_with_gradients_to_all_inputs() -> None:
    logits, image = torch.randn(1, 2, 6, 7, requires_grad=True), torch.rand(1, 3, 6, 7, requires_grad=True)
    sigma = torch.tensor(3.0, requires_grad=True)

    def loss(logits: Tensor, image: Tensor, sigma: Tensor, radius: int) -> Tensor:
        return segloss.windowed_potts(logits, image, sigma_xy=sigma, radius=radius, normalize="pairs")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for radius in (1, 2, 3):
        expected = torch.autograd.grad(loss(logits, image, sigma, radius), (logits, image, sigma))
        found = torch.autograd.grad(compiled(logits, image, sigma, radius), (logits, image, sigma))
        for grad, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, truth)


def test_functional_transforms_reach_image_and_second_derivatives() -> None:
    logits, image = torch.randn(3, 1, 2, 4, 4, dtype=torch.float64), picture("noise", 4, 4, batch=3)[:, None]

    def loss(logits: Tensor, image: Tensor) -> Tensor:
        return segloss.windowed_potts(logits, image, sigma_rgb=0.5, radius=1)

    mapped = torch.func.vmap(torch.func.grad(loss, argnums=1))(logits, image)
    alone = torch.stack([torch.func.grad(loss, argnums=1)(x, y) for x, y in zip(logits, image, strict=True)])
    torch.testing.assert_close(mapped, alone)
    curvature = torch.func.jacrev(torch.func.grad(loss))(logits[0], image[0])
    torch.testing.assert_close(curvature, torch.autograd.functional.hessian(lambda x: loss(x, image[0]), logits[0]))


@pytest.mark.parametrize(("scale", "sigma"), [(1.0, 1e-40), (3e38, 0.1), (1e20, 1e-20)])
def test_extreme_guides_keep_value_and_gradients_finite(scale: float, sigma: float) -> None:
    logits = torch.randn(1, 2, 6, 6, requires_grad=True)
    image = (torch.rand(1, 3, 6, 6) * scale).requires_grad_()
    value = segloss.windowed_potts(logits, image, sigma_rgb=sigma)
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, (logits, image)))


def test_numbers_may_come_from_numpy() -> None:
    logits, image = torch.randn(1, 2, 6, 6), torch.rand(1, 3, 6, 6)
    for normalize in (None, "pairs"):
        plain = segloss.windowed_potts(logits, image, radius=2, normalize=normalize)
        assert segloss.windowed_potts(logits, image, radius=np.int64(2), normalize=normalize) == plain
    assert segloss.window_mass(image, radius=np.int64(2)) == segloss.window_mass(image, radius=2)


def test_a_sigma_that_is_a_parameter_learns_with_the_module() -> None:
    learnt = segloss.WindowedPotts(sigma_rgb=torch.nn.Parameter(torch.tensor(0.25)))
    learnt(torch.randn(1, 2, 6, 6), torch.rand(1, 3, 6, 6)).backward()
    assert learnt.sigma_rgb.grad.abs() > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"radius": -1}, ValueError, "radius: expected a finite number of at least 0, got -1"),
        ({"radius": 2.0}, TypeError, "radius: expected an int, got float"),
        ({"radius": True}, TypeError, "radius: expected an int, got bool"),
        ({"normalize": "images"}, ValueError, "normalize: expected one of None, 'pixels', 'pairs', got 'images'"),
        ({"sigma_xy": 0}, ValueError, "sigma_xy: expected a number above 0, got 0"),
        ({"sigma_rgb": math.nan}, ValueError, "sigma_rgb: expected a number above 0, got nan"),
        ({"from_logits": 1}, TypeError, "from_logits: expected a bool, got int"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        segloss.windowed_potts(torch.randn(2, 3, 6, 5), torch.zeros(2, 3, 6, 5), **changes)
    with pytest.raises(error, match=message):
        segloss.WindowedPotts(**changes)


def gated_crf(probability: Tensor, image: Tensor, sigma_rgb: float, sigma_xy: float, radius: int) -> Tensor:
    """Its formula in plain unfolded form: pixels outside the image are black ones at (0, 0), p = q is left out."""
    height, width = image.shape[2:]
    side = 2 * radius + 1
    place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    features = torch.cat([image / sigma_rgb, (place / sigma_xy).expand(len(image), -1, -1, -1)], 1)
    around, other = (F.unfold(t, side, padding=radius).unflatten(1, (-1, side**2)) for t in (features, probability))
    weights = torch.exp(-(around - features.flatten(2)[:, :, None]).square().sum(1) / 2)
    weights[:, side**2 // 2] = 0
    same = (other * probability.flatten(2)[:, :, None]).sum(1)
    return (weights * (1 - same)).sum() / (len(image) * height * width)


def gated_part(logits: Tensor, image: Tensor, radius: int, **options: Any) -> Tensor:
    """The same without the constant of the outside pixels, as the docstring has it."""
    parts = (segloss.windowed_potts(logits, image, radius=r, normalize="pixels", **options) for r in (radius, 0))
    return next(parts) - next(parts)


def test_gated_crf_is_the_windowed_loss_without_the_diagonal(golden: Any) -> None:
    arrays = golden("crf/h_gated_32x32_k4_r5")
    probability, image = arrays["S"].double().requires_grad_(), arrays["image"].double()
    sigma = {"sigma_rgb": arrays["sigma_rgb"].item(), "sigma_xy": arrays["sigma_xy"].item()}
    radius = int(arrays["radius"])
    public = gated_crf(probability, image, **sigma, radius=radius)
    torch.testing.assert_close(public, arrays["loss"].double(), rtol=1e-6, atol=0)
    loss = gated_part(probability, image, radius, **sigma, from_logits=False)
    torch.testing.assert_close(loss, arrays["loss"].double(), rtol=1e-6, atol=0)
    # With respect to S, the public gradient is that of -S'WS: it lacks the W 1 that eq. (3) has at S = 0.
    grad = torch.autograd.grad(loss, probability)[0]
    nothing = torch.zeros_like(probability, requires_grad=True)
    linear = torch.autograd.grad(gated_part(nothing, image, radius, **sigma, from_logits=False), nothing)[0]
    torch.testing.assert_close(grad - linear, arrays["grad_S"].double(), rtol=1e-5, atol=1e-7)


def test_gated_crf_on_dark_images_is_the_same_up_to_a_constant() -> None:
    image = picture("smooth", 8, 9, batch=2) / 5
    constants = []
    for _ in range(2):
        logits = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
        public = gated_crf(logits.softmax(1), image, sigma_rgb=0.1, sigma_xy=6.0, radius=3)
        loss = gated_part(logits, image, 3, sigma_rgb=0.1, sigma_xy=6.0)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, public)))
        constants.append((public - loss).detach())
    assert constants[0] > 0.1
    torch.testing.assert_close(*constants)


@settings(max_examples=40)
@given(seed=seeds, height=sides, width=sides, radius=radii, kind=images, sigma_rgb=sigmas, sigma_xy=widths)
def test_mass_is_that_of_the_dense_kernel(
    seed: int, height: int, width: int, radius: int, kind: str, sigma_rgb: float, sigma_xy: float
) -> None:
    image = picture(kind, height, width, batch=2, seed=seed)
    weights = dense_weights(image, sigma_rgb, sigma_xy)
    expected = (weights * dense_window(height, width, radius)).sum((1, 2)) / weights.sum((1, 2))
    mass = segloss.window_mass(image, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, radius=radius)
    torch.testing.assert_close(mass, expected, rtol=1e-6, atol=0)
    assert ((mass > 0) & (mass <= 1)).all()
    whole = segloss.window_mass(image, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, radius=max(height, width))
    torch.testing.assert_close(whole, torch.ones_like(whole))
    single = segloss.window_mass(image.float(), sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, radius=radius)
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_mass_of_a_larger_photograph() -> None:
    image = picture("photograph", 56, 60)
    weights = dense_weights(image, 15 / 255, 100.0)
    expected = (weights * dense_window(56, 60, 5)).sum() / weights.sum()
    torch.testing.assert_close(segloss.window_mass(image), expected[None], rtol=1e-6, atol=0)


def test_mass_needs_an_image_and_a_radius() -> None:
    image = torch.rand(1, 3, 4, 4, requires_grad=True)
    assert not segloss.window_mass(image).requires_grad
    with pytest.raises(ValueError, match=r"image: expected \[B, C, \*spatial\] of 1 to 3 dimensions, got \[4, 4\]"):
        segloss.window_mass(image[0, 0])
    with pytest.raises(TypeError, match=r"image: expected a floating-point tensor, got torch\.uint8"):
        segloss.window_mass(image.byte())
    with pytest.raises(ValueError, match="radius: expected a finite number of at least 0, got -1"):
        segloss.window_mass(image, radius=-1)
    with pytest.raises(ValueError, match="sigma_rgb: expected a number above 0, got 0"):
        segloss.window_mass(image, sigma_rgb=0)


def test_windows_of_any_radius_and_images_without_pixels() -> None:
    logits, image = torch.randn(1, 2, 5, 6), torch.rand(1, 3, 5, 6)
    whole = segloss.windowed_potts(logits, image, radius=6, normalize="pairs")
    torch.testing.assert_close(segloss.windowed_potts(logits, image, radius=2**40, normalize="pairs"), whole)
    empty = segloss.windowed_potts(torch.zeros(1, 2, 0, 8), torch.zeros(1, 3, 0, 8), normalize="pairs")
    assert empty == 0
    assert segloss.window_mass(torch.zeros(1, 3, 0, 8)) == 1
