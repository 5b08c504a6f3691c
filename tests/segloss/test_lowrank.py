"""The low-rank kernel: its error, its refusals, and that it is symmetric positive semi-definite."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from torch import Tensor

import segloss
from segloss import ToleranceError, bilateral_error, bilateral_filter
from segloss.bilateral import guide_features, lowrank
from segloss.bilateral.error import sample_pixels, sampled_error
from segloss.bilateral.gaussian import gaussian, squared_distances
from segloss.bilateral.landmarks import choose_landmarks
from segloss.bilateral.operator import Plan
from segloss.bilateral.reference import gaussian_filter_reference
from tests.segloss.test_bilateral import CASES, images, picture, relative_error, sigmas, widths


def photograph(name: str, side: int) -> Tensor:
    """The whole picture, ``[1, 3, side, side]``, float64: many more colours than a small cut of it."""
    image = torch.from_numpy(np.asarray(getattr(data, name)())).permute(2, 0, 1)[None].double() / 255
    return torch.nn.functional.interpolate(image, (side, side), mode="area")


def kernel_of(image: Tensor, tolerance: float, sigma_rgb: float, sigma_xy: float, most: int = 64) -> lowrank.LowRank:
    features = guide_features(image, sigma_rgb, sigma_xy)[0]
    landmarks, _ = choose_landmarks(features[:-2], 1e-3, most)
    return lowrank.LowRank(features, tuple(image.shape[2:]), landmarks, tolerance, features.dtype)


def matrix(kernel: lowrank.LowRank) -> Tensor:
    identity = torch.eye(math.prod(kernel.size), dtype=torch.float64)
    return lowrank.multiply(kernel, identity).filtered()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tolerance", [4e-2, 1e-2, 2e-3])
def test_golden_values_within_the_tolerance(golden: Any, case: str, tolerance: float) -> None:
    arrays = golden(f"crf/{case}")
    probability, image = arrays["S"].double().requires_grad_(), arrays["image"].double()
    mask = arrays["mask"].double() if "mask" in arrays else torch.ones_like(probability[:, 0])
    options = {"sigma_rgb": arrays["sigma_rgb"].item(), "sigma_xy": arrays["sigma_xy"].item()}
    options |= {"method": "lowrank", "tolerance": tolerance}
    filtered = bilateral_filter(probability * mask[:, None], image, **options)
    assert relative_error(filtered, arrays["WS"]) <= tolerance
    options |= {"valid": mask > 0, "from_logits": False, "reduction": "none"}
    quadratic = segloss.potts_crf(probability, image, form="quadratic", **options)
    assert relative_error(quadratic, arrays["neg_quad"]) <= tolerance
    energy = segloss.potts_crf(probability, image, **options)
    # The energy is a difference of such terms, and its gradient W m - 2 W S.
    assert (energy - arrays["potts"]).abs().max() <= 2 * tolerance * arrays["neg_quad"].abs().max() + 1e-9
    (gradient,) = torch.autograd.grad(energy.sum(), probability)
    assert (gradient - arrays["grad_S"]).norm() <= 4 * tolerance * arrays["WS"].sum(1).norm()


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
@pytest.mark.parametrize("tolerance", [4e-2, 1e-2, 3e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_photographs_are_filtered_to_the_tolerance(name: str, tolerance: float, dtype: torch.dtype) -> None:
    image = photograph(name, 96)
    values = torch.randn(1, 5, 96, 96, dtype=torch.float64).mul(2).softmax(1)
    exact = bilateral_filter(values, image, sigma_xy=20.0, method="exact")
    options = {"sigma_xy": 20.0, "method": "lowrank", "tolerance": tolerance}
    filtered = bilateral_filter(values.to(dtype), image.to(dtype), **options)
    assert filtered.dtype == dtype
    error = relative_error(filtered, exact)
    assert error <= tolerance
    estimate = bilateral_error(values.to(dtype), image.to(dtype), filtered, sigma_xy=20.0)
    assert 0.5 < estimate.item() / error < 2


@settings(max_examples=60)
@given(
    kind=images,
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    sigma_rgb=sigmas,
    sigma_xy=widths,
    tolerance=st.sampled_from([0.3, 4e-2, 1e-2, 1e-3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    signed=st.booleans(),
)
def test_the_error_is_below_the_tolerance_or_the_method_refuses(
    kind: str,
    height: int,
    width: int,
    sigma_rgb: float,
    sigma_xy: float,
    tolerance: float,
    dtype: torch.dtype,
    signed: bool,
) -> None:
    image = picture(kind, height, width).to(dtype)
    values = torch.randn(1, 3, height, width, dtype=dtype)
    values = values if signed else values.softmax(1)
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy}
    exact = bilateral_filter(values.double(), image.double(), method="exact", **options)
    try:
        filtered = bilateral_filter(values, image, method="lowrank", tolerance=tolerance, **options)
    except ToleranceError as error:
        assert f"tolerance={tolerance:g} on image 0, its error is about" in str(error)  # noqa: PT017
        return
    assert relative_error(filtered, exact) <= 1.5 * tolerance
    estimate = bilateral_error(values, image, filtered, **options).item()
    assert estimate <= tolerance


@pytest.mark.parametrize("side", [33, 45, 47, 63, 65])
def test_blocks_are_never_too_large_for_the_tolerance(side: int) -> None:
    values, image = torch.rand(1, 3, side, side), photograph("chelsea", side).float()
    filtered = bilateral_filter(values, image, sigma_xy=100.0, method="lowrank")
    exact = bilateral_filter(values.double(), image.double(), sigma_xy=100.0, method="exact")
    assert relative_error(filtered, exact) <= 1e-2


@pytest.mark.parametrize("kind", ["constant", "two colours", "smooth", "photograph", "odd last pixel"])
@pytest.mark.parametrize("sigma_rgb", [0.06, 0.5, math.inf])
@pytest.mark.parametrize("sigma_xy", [5.0, math.inf])
def test_pictures_of_few_colours_are_never_refused(kind: str, sigma_rgb: float, sigma_xy: float) -> None:
    image, values = picture(kind, 40, 33).float(), torch.rand(1, 2, 40, 33)
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy}
    filtered = bilateral_filter(values, image, method="lowrank", **options)
    exact = bilateral_filter(values.double(), image.double(), method="exact", **options)
    assert relative_error(filtered, exact) <= 1e-2


@settings(max_examples=25)
@given(
    kind=images,
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    sigma_rgb=sigmas,
    sigma_xy=widths,
    tolerance=st.sampled_from([0.2, 1e-2]),
)
def test_the_kernel_is_symmetric_and_positive_semidefinite(
    kind: str, height: int, width: int, sigma_rgb: float, sigma_xy: float, tolerance: float
) -> None:
    w = matrix(kernel_of(picture(kind, height, width), tolerance, sigma_rgb, sigma_xy))
    torch.testing.assert_close(w, w.t(), rtol=0, atol=1e-6)
    assert torch.linalg.eigvalsh(w + w.t()).min() > -1e-6


def test_it_is_the_product_of_its_parts() -> None:
    # W^ = A C A' from the formula with dense matrices: functions on blocks, and the spatial kernel projected onto them.
    side, sigma = 23, 20.0
    image = photograph("coffee", side)
    kernel = kernel_of(image, 0.01, 0.2, sigma)
    assert kernel.block == (6, 6)  # the last block of a side is cut off
    place = torch.arange(24, dtype=torch.float64)
    constant = (place[:, None] // 6 == torch.arange(4)).double()
    linear = constant * (place % 6 - 2.5)[:, None]
    space = [
        torch.einsum("yi,xj->yxij", u, v).reshape(24**2, -1) for u, v in ((constant, constant), (constant, linear))
    ]
    space.append(torch.einsum("yi,xj->yxij", linear, constant).reshape(24**2, -1))
    base = torch.linalg.qr(torch.cat(space, 1))[0]
    along = torch.exp(-(place[:, None] - place).square() / (2 * sigma**2))
    exact = torch.einsum("yz,xw->yxzw", along, along).reshape(24**2, 24**2)
    projected = (base @ (base.t() @ exact @ base) @ base.t()).view(24, 24, 24, 24)[:side, :side, :side, :side]
    colour = guide_features(image, 0.2, sigma)[0, :-2].t()
    z = kernel.landmarks
    nystroem = gaussian(colour, z, compact=False)
    inner = gaussian(z, z, compact=False) + 1e-3 * torch.eye(len(z))
    expected = projected.reshape(side**2, side**2) * (nystroem @ torch.linalg.solve(inner, nystroem.t()))
    expected += torch.diag((1 - expected.diagonal()) * (nystroem.amax(1) < 0.5))
    # Eigenvalues of the spatial kernel below a thousandth are left out.
    torch.testing.assert_close(matrix(kernel), expected, rtol=0, atol=5e-3)


def test_expanding_at_some_pixels_is_expanding_everywhere() -> None:
    image = photograph("rocket", 37)[:, :, :, :29]
    kernel = kernel_of(image, 0.05, 0.1, 9.0)
    values = torch.randn(3, 37 * 29, dtype=torch.float64)
    core = kernel.solve(kernel.gather(values))
    pixels = torch.randperm(37 * 29)[:50]
    torch.testing.assert_close(kernel.expand_at(core, pixels), kernel.expand(core)[:, pixels])


def test_energy_and_gradient_are_of_one_kernel() -> None:
    image, logits = photograph("coffee", 66), torch.randn(1, 3, 66, 66, dtype=torch.float64, requires_grad=True)
    options = {"sigma_xy": 15.0, "method": "lowrank", "tolerance": 3e-2}
    assert torch.autograd.gradcheck(
        lambda x: segloss.potts_crf(x, image, normalize="pixels", **options), logits, fast_mode=True
    )
    value = segloss.potts_crf(logits, image, **options)
    exact = segloss.potts_crf(logits, image, sigma_xy=15.0, method="exact")
    torch.testing.assert_close(value, exact, rtol=3e-2, atol=0)
    expected, gradient = (torch.autograd.grad(loss, logits)[0] for loss in (exact, value))
    assert relative_error(gradient, expected) < 0.1


@pytest.mark.parametrize("form", ["potts", "quadratic"])
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("method", ["exact", "lowrank"])
def test_the_value_alone_is_that_of_the_filtered_image(form: str, from_logits: bool, method: str) -> None:
    image = torch.cat([photograph("coffee", 40), photograph("rocket", 40)])
    values = torch.rand(2, 3, 40, 40, dtype=torch.float64)
    valid = torch.rand(2, 40, 40) < 0.8
    options = {"sigma_xy": 10.0, "method": method, "tolerance": 4e-2, "form": form, "from_logits": from_logits}
    value = segloss.potts_crf(values, image, valid=valid, reduction="none", **options)
    trained = segloss.potts_crf(values.requires_grad_(), image, valid=valid, reduction="none", **options)
    assert trained.requires_grad
    assert not value.requires_grad
    torch.testing.assert_close(value, trained.detach())


def test_the_value_alone_expands_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank.LowRank, "expand", None)
    logits, image = torch.randn(1, 3, 40, 40), photograph("coffee", 40)
    assert segloss.potts_crf(logits, image, sigma_xy=10.0, method="lowrank", tolerance=0.1) > 0


def test_gradients_of_values_come_from_the_same_landmarks() -> None:
    image = photograph("astronaut", 48)
    values, grad = torch.rand(2, 1, 2, 48, 48, dtype=torch.float64)
    values.requires_grad_()
    options = {"sigma_xy": 12.0, "method": "lowrank", "tolerance": 4e-2}
    filtered = bilateral_filter(values, image, **options)
    (pulled,) = torch.autograd.grad(filtered, values, grad, create_graph=True)
    torch.testing.assert_close((pulled * values).sum(), (filtered * grad).sum())
    other = torch.rand_like(values)
    torch.testing.assert_close(
        (pulled * other).sum(), (torch.autograd.grad(filtered, values, other)[0] * grad).sum(), rtol=1e-6, atol=0
    )


def test_gradients_of_image_and_sigmas_are_those_of_the_exact_kernel() -> None:
    values = torch.rand(1, 2, 40, 40, dtype=torch.float64)
    grads = []
    for method, tolerance in (("exact", 1e-2), ("lowrank", 1e-3)):
        image = photograph("coffee", 40).requires_grad_()
        sigma = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        filtered = bilateral_filter(values, image, sigma_xy=sigma, method=method, tolerance=tolerance)
        grads.append(torch.autograd.grad(filtered.square().sum(), (image, sigma)))
    for exact, approximate in zip(*grads, strict=True):
        assert relative_error(approximate, exact) < 2e-2


def test_noise_is_refused_with_the_estimate_and_auto_copes() -> None:
    image, values = torch.rand(2, 3, 90, 90), torch.rand(2, 2, 90, 90)
    image[0] = 0.5
    with pytest.raises(ToleranceError, match=r"method: 'lowrank' cannot reach tolerance=0.01 on image 1, its error is"):
        bilateral_filter(values, image, method="lowrank")
    filtered = bilateral_filter(values, image)
    assert (bilateral_error(values, image, filtered) < 1e-2).all()


def test_images_of_a_batch_have_their_own_rank_and_result() -> None:
    image = torch.cat([photograph("coffee", 64), photograph("rocket", 64), torch.full((1, 3, 64, 64), 0.2)]).float()
    values = torch.rand(3, 4, 64, 64)
    together = bilateral_filter(values, image, sigma_xy=20.0, method="lowrank")
    for i in range(3):
        alone = bilateral_filter(values[i : i + 1], image[i : i + 1], sigma_xy=20.0, method="lowrank")
        assert torch.equal(together[i], alone[0])


def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernel_of(photograph("rocket", 37)[:, :, :, :29], 0.05, 0.1, 9.0)
    values = torch.randn(3, 37 * 29, dtype=torch.float64)
    whole = kernel.expand(kernel.gather(values))
    for chunk in (
        1,
        3 * kernel.area * len(kernel.landmarks),
        2 * kernel.area * kernel.grid[-1] * len(kernel.landmarks),
    ):
        monkeypatch.setitem(lowrank._CHUNK, "cpu", chunk)
        torch.testing.assert_close(kernel.expand(kernel.gather(values)), whole)


def test_many_channels_are_filtered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    image, values = photograph("coffee", 40), torch.rand(1, 9, 40, 40, dtype=torch.float64)
    whole = bilateral_filter(values, image, sigma_xy=10.0, method="lowrank", tolerance=5e-2)
    monkeypatch.setattr(lowrank, "_LARGEST_CORE", 1)
    parts = bilateral_filter(values, image, sigma_xy=10.0, method="lowrank", tolerance=5e-2)
    torch.testing.assert_close(parts, whole)


def test_bfloat16_products_keep_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    image, values = photograph("coffee", 64).float(), torch.rand(1, 3, 64, 64).softmax(1)
    options = {"sigma_xy": 15.0, "method": "lowrank", "tolerance": 1e-2}
    exact = bilateral_filter(values.double(), image.double(), sigma_xy=15.0, method="exact")
    monkeypatch.setattr(lowrank, "_fast_bfloat16", lambda device: True)
    auto = bilateral_filter(values, image, **options)
    full = bilateral_filter(values, image, precision="float32", **options)
    assert relative_error(auto, full.double()) > 1e-4  # they did run in bfloat16
    assert relative_error(auto, exact) <= 1e-2
    tight = {**options, "tolerance": 3e-3}  # where bfloat16 would not do
    assert torch.equal(
        bilateral_filter(values, image, **tight), bilateral_filter(values, image, precision="float32", **tight)
    )


def test_landmarks_are_few_distinct_and_the_same_every_time() -> None:
    colour = guide_features(photograph("chelsea", 64), 15 / 255, 1.0)[0, :-2]
    state = torch.get_rng_state()
    first, residuals = choose_landmarks(colour, 0.05, 512)
    again, _ = choose_landmarks(colour, 0.05, 512)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert (residuals[1:] <= residuals[:-1]).all()
    assert residuals[-1] <= 0.05 < residuals[-2]
    apart = squared_distances(first, first) + torch.eye(len(first))
    assert apart.min() > 0
    # The residual of the diagonal, from its definition, over all pixels.
    weights = gaussian(colour.t(), first, compact=False)
    inner = gaussian(first, first, compact=False) + 1e-9 * torch.eye(len(first))
    diagonal = (weights * torch.linalg.solve(inner, weights.t()).t()).sum(1)
    assert (1 - diagonal).mean().item() < 0.06
    one, _ = choose_landmarks(torch.full((3, 500), 0.3, dtype=torch.float64), 1e-3, 512)
    torch.testing.assert_close(one, torch.full((1, 3), 0.3, dtype=torch.float64))


@given(count=st.integers(0, 5000))
def test_sampled_pixels_are_distinct_and_inside(count: int) -> None:
    pixels = sample_pixels(count)
    assert min(count, 64) <= len(pixels) <= 256
    assert len(pixels.unique()) == len(pixels)
    assert ((pixels >= 0) & (pixels < count)).all()


def test_the_error_of_small_images_is_that_of_all_pixels() -> None:
    values, features = torch.randn(3, 50, dtype=torch.float64), torch.randn(4, 50, dtype=torch.float64)
    filtered = torch.randn(3, 50, dtype=torch.float64)
    exact = gaussian_filter_reference(values[None], features[None])[0]
    expected = ((filtered - exact).norm() / exact.norm()).item()
    assert sampled_error(values, features, filtered, sample_pixels(50)) == pytest.approx(expected)


def test_errors_of_bilateral_error_name_the_argument() -> None:
    values, image = torch.rand(1, 2, 8, 8), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"filtered: expected \[1, 2, 8, 8\] to go with values"):
        bilateral_error(values, image, values[:, :1])
    with pytest.raises(ValueError, match=r"image: expected \[1, 3, 8, 8\]"):
        bilateral_error(values, image[:, :, :4], values)


@settings(max_examples=30)
@given(
    scale=st.sampled_from([1e-3, 1.0, 1e3, 1e14]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6)),
)
def test_gaussian_weights(scale: float, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    a, b = torch.randn(shape[0], shape[2], dtype=dtype), torch.randn(shape[1], shape[2], dtype=dtype)
    a, b = a * scale, torch.cat([b * scale, a[:1] * scale])
    expected = torch.exp(-(a.double()[:, None] - b.double()).square().sum(2) / 2)
    for compact in {False, scale <= 1}:
        torch.testing.assert_close(gaussian(a, b, compact=compact).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["rocket", "coffee", "astronaut"])
@pytest.mark.parametrize("side", [96, 110])
def test_pixels_of_rare_colours_keep_their_own_weight(name: str, side: int) -> None:
    image = photograph(name, side)
    ones = torch.ones(1, 1, side, side, dtype=torch.float64)
    sums = bilateral_filter(ones, image, sigma_xy=20.0, method="lowrank")
    assert sums.min() > 0.7  # every pixel has weight 1 with itself


def test_the_error_of_a_refusal_is_above_the_tolerance() -> None:
    image, values = photograph("astronaut", 60).float(), torch.randn(1, 2, 60, 60)
    for tolerance in (1e-3, 3e-3, 1e-2):
        with pytest.raises(ToleranceError, match="cannot reach") as refusal:
            bilateral_filter(values, image, sigma_xy=20.0, sigma_rgb=0.02, method="lowrank", tolerance=tolerance)
        assert float(str(refusal.value).split("its error is about ")[1].split(";")[0]) > tolerance


def test_kernels_that_are_too_narrow_are_refused_at_once() -> None:
    values, image = torch.rand(1, 21, 128, 128), photograph("coffee", 128).float()
    with pytest.raises(ToleranceError, match=r"sigma_xy: expected a wider kernel for method='lowrank'"):
        bilateral_filter(values, image, sigma_xy=1.0, method="lowrank")


@pytest.mark.parametrize("method", ["auto", "lowrank"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_checked_spoil_their_own_image_only(method: str, bad: float) -> None:
    image = torch.cat([photograph("coffee", 104), photograph("coffee", 104)]).float()
    values = torch.rand(2, 2, 104, 104)
    expected = bilateral_filter(values, image, sigma_xy=30.0, method=method)
    image[1, 0, 50, 50] = bad
    with_vmap = torch.func.vmap(lambda v, i: bilateral_filter(v[None], i[None], sigma_xy=30.0, method=method)[0])
    filtered = with_vmap(values, image)
    torch.testing.assert_close(filtered[0], expected[0])
    assert not filtered[1].isfinite().all()


def test_transforms_and_compilation_reach_low_rank() -> None:
    logits, image = (
        torch.randn(2, 3, 104, 104),
        torch.cat([photograph("coffee", 104), photograph("rocket", 104)]).float(),
    )

    def loss(x: Tensor, guide: Tensor) -> Tensor:
        return segloss.potts_crf(x, guide, sigma_xy=30.0, method="lowrank", normalize="pairs")

    expected = torch.stack([torch.func.grad(loss)(x[None], i[None])[0] for x, i in zip(logits, image, strict=True)])
    mapped = torch.func.vmap(lambda x, i: torch.func.grad(loss)(x[None], i[None])[0])(logits, image)
    torch.testing.assert_close(mapped, expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(leaf, image), leaf)
    torch.testing.assert_close(gradient, expected / 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(logits, image), loss(logits, image), rtol=0, atol=0)


def test_second_derivatives_in_the_logits_do_not_touch_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segloss.bilateral.operator._guide_gradient", None)
    image, logits = photograph("coffee", 40), torch.randn(1, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    value = segloss.potts_crf(logits, image, sigma_xy=10.0, method="lowrank", tolerance=0.1)
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), logits)[0].abs().sum() > 0


def test_threads_and_random_numbers_stay_as_they_were() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    values, image = torch.rand(1, 1, 50, 50, generator=torch.Generator()), photograph("chelsea", 50).float()
    first = bilateral_filter(values, image, sigma_xy=20.0, method="lowrank")
    assert torch.equal(first, bilateral_filter(values, image, sigma_xy=20.0, method="lowrank"))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["exact", "lowrank"])
def test_the_operator_for_the_value_is_registered_correctly(method: str) -> None:
    features = guide_features(photograph("coffee", 12), 0.2, 9.0)
    values, mask = torch.rand(1, 3, 144, dtype=torch.float64), torch.ones(1, 1, 144, dtype=torch.float64)
    plan = Plan((12, 12), method, 0.2, False, False)
    torch.library.opcheck(torch.ops.segloss.bilateral.default, (values, features, *plan))
    torch.library.opcheck(torch.ops.segloss.bilateral_energy.default, (values, mask, features, False, True, *plan))
