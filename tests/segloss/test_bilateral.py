"""The bilateral filter against its dense definition."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from torch import Tensor

from segloss import bilateral_error, bilateral_filter
from segloss.bilateral import blocksparse, guide_features
from segloss.bilateral.operator import Bilateral, Plan
from segloss.bilateral.reference import gaussian_filter_reference, guide_gradient_reference

CASES = ["a_24x20_k4_b2", "b_40x56_k21", "c_mask_40x56_k5", "d_onehot_17x13_k3_unit_image", "e_sigmoid_16x9_k2"]
CASES += ["f_const_12x12_k2", "g_huge_sigma_12x12_k2"]
METHODS = ["exact", "blocksparse"]  # those that reach any tolerance
ALL_METHODS = [*METHODS, "lowrank"]

images = st.sampled_from(["smooth", "noise", "constant", "photograph", "two colours", "odd last pixel"])
sides = st.integers(1, 24)
sigmas = st.sampled_from([1e-3, 0.06, 0.5, 10.0, math.inf])
widths = st.sampled_from([0.2, 2.0, 10.0, 1e4, math.inf])


def picture(kind: str, height: int, width: int, *, channels: int = 3, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, channels, height, width, generator=generator, dtype=torch.float64)
    if kind == "smooth":
        coarse = torch.rand(batch, channels, 3, 3, generator=generator, dtype=torch.float64)
        return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    if kind == "constant":
        return image[:, :, :1, :1].expand(-1, -1, height, width).contiguous()
    if kind == "two colours":
        return image.round()
    if kind == "odd last pixel":
        image[:] = 0.2
        image[:, :, -1, -1] = 0.6
        return image
    if kind == "photograph":
        photo = torch.from_numpy(np.asarray(data.astronaut())).permute(2, 0, 1)[None] / 255
        return (
            photo[:, :, 100 : 100 + height, 100 : 100 + width]
            .repeat(batch, channels // 3 + 1, 1, 1)[:, :channels]
            .double()
        )
    return image


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def missing_share(ones: Tensor, image: Tensor, tolerance: float, *, sigma_rgb: float, sigma_xy: float) -> float:
    """What the tolerance bounds: in the worst tile, the weights left out as a share of all its weights."""
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy, "tolerance": tolerance}
    exact, kept = (bilateral_filter(ones, image, method=method, **options) for method in METHODS)
    tiles = blocksparse.cut(guide_features(image, sigma_rgb, sigma_xy))
    missing, weights = (tiles.gather(t.flatten(2)).sum((1, 2)) for t in (exact - kept, exact))
    return ((missing - 1e-9) / weights.clamp(min=1e-9)).max().item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_filtered_values_are_the_golden_ones(golden, case, method, dtype, tolerance) -> None:  # type: ignore[no-untyped-def]
    arrays = golden(f"crf/{case}")
    values = arrays["S"].to(dtype) * (arrays["mask"].to(dtype)[:, None] if "mask" in arrays else 1)
    sigma_rgb, sigma_xy = arrays["sigma_rgb"].item(), arrays["sigma_xy"].item()
    filtered = bilateral_filter(
        values, arrays["image"].to(dtype), sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, method=method, tolerance=1e-5
    )
    assert filtered.dtype == dtype
    assert relative_error(filtered, arrays["WS"]) <= (tolerance if method == "exact" else 1e-5)


@settings(max_examples=60)
@given(
    kind=images,
    height=sides,
    width=sides,
    sigma_rgb=sigmas,
    sigma_xy=widths,
    channels=st.integers(1, 5),
    classes=st.integers(1, 6),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_exact_filter_and_gradients_equal_the_definition(
    kind: str,
    height: int,
    width: int,
    sigma_rgb: float,
    sigma_xy: float,
    channels: int,
    classes: int,
    batch: int,
    dtype: torch.dtype,
) -> None:
    image = picture(kind, height, width, channels=channels, batch=batch)
    features = guide_features(image, sigma_rgb, sigma_xy).requires_grad_()
    values = torch.randn(batch, classes, height * width, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(batch, classes, height * width, dtype=torch.float64)
    expected = gaussian_filter_reference(values, features)
    expected_grads = torch.autograd.grad(expected, (values, features), grad)
    cast = [t.detach().to(dtype).requires_grad_() for t in (values, features)]
    filtered = Bilateral.apply(*cast, Plan((height, width), "exact", 0.5, False, False))[0]
    grads = torch.autograd.grad(filtered, cast, grad.to(dtype))
    # Rounded features shift every distance d by about d eps |f|, which no filter of them can undo.
    rounding = torch.finfo(dtype).eps * (1 + features.detach().abs().max().item())
    tolerance = 30 * rounding * values.detach().abs().sum().item()
    torch.testing.assert_close(filtered.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        grads[0].double(), expected_grads[0], rtol=0, atol=30 * rounding * grad.abs().sum().item()
    )
    scale = (grad.abs().sum() * values.detach().abs().sum()).item()
    torch.testing.assert_close(grads[1].double(), expected_grads[1], rtol=0, atol=30 * rounding * scale)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    kind=images,
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    sigma_rgb=sigmas,
    sigma_xy=widths,
    tolerance=st.sampled_from([1e-1, 1e-2, 1e-3]),
    seed=st.integers(0, 100),
)
def test_blocksparse_error_is_below_the_tolerance(
    kind: str, height: int, width: int, sigma_rgb: float, sigma_xy: float, tolerance: float, seed: int
) -> None:
    image = picture(kind, height, width, seed=seed)
    values = torch.softmax(3 * torch.randn(1, 5, height, width, dtype=torch.float64), 1)
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy, "tolerance": tolerance}
    exact = bilateral_filter(values, image, method="exact", **options)
    filtered = bilateral_filter(values, image, method="blocksparse", **options)
    assert relative_error(filtered, exact) <= tolerance
    assert missing_share(torch.ones_like(values[:, :1]), image, **options) <= tolerance


@given(height=sides, width=sides, batch=st.integers(1, 3), tolerance=st.sampled_from([0.0, 1e-2]))
def test_every_pixel_has_one_place_in_the_tiles(height: int, width: int, batch: int, tolerance: float) -> None:
    features = guide_features(picture("noise", height, width, batch=batch), 0.1, 3.0)
    tiles = blocksparse.cut(features)
    values = torch.randn(batch, 2, height * width)
    assert torch.equal(tiles.scatter(tiles.gather(values)), values)
    order = tiles.order.sort(1).values
    assert torch.equal(order, torch.arange(order.shape[1]).expand(batch, -1))
    first, second = blocksparse.kept_pairs(tiles, tolerance)
    assert (first <= second).all()
    count = len(tiles.features) // batch
    assert torch.equal(first // count, second // count)  # never across images
    assert ((first == second).sum() == batch * count).item()


@settings(max_examples=20)
@given(kind=images, sigma_rgb=sigmas, sigma_xy=widths)
def test_the_kernel_is_symmetric(kind: str, sigma_rgb: float, sigma_xy: float) -> None:
    image = picture(kind, 30, 25)
    u, v = torch.rand(2, 1, 1, 30, 25, dtype=torch.float64)
    for method in METHODS:
        options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy, "method": method, "tolerance": 0.1}
        left, right = bilateral_filter(u, image, **options), bilateral_filter(v, image, **options)
        torch.testing.assert_close((left * v).sum(), (right * u).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_values_image_and_sigmas(method: str) -> None:
    image = picture("smooth", 9, 8).requires_grad_()
    values = torch.rand(1, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    sigma_rgb, sigma_xy = (torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (0.3, 4.0))

    def filtered(values: Tensor, image: Tensor, sigma_rgb: Tensor, sigma_xy: Tensor) -> Tensor:
        return bilateral_filter(values, image, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, method=method, tolerance=1e-9)

    arguments = (values, image, sigma_rgb, sigma_xy)
    assert torch.autograd.gradcheck(filtered, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(filtered, arguments, fast_mode=True)


def test_guide_gradient_equals_its_definition_when_tiles_are_many() -> None:
    features = guide_features(picture("photograph", 31, 29), 0.1, 6.0)
    values, grad = torch.randn(2, 1, 3, 31 * 29, dtype=torch.float64)
    expected = guide_gradient_reference(grad, values, features)
    torch.testing.assert_close(blocksparse.guide_gradient(grad, values, features, 0.0), expected)


def test_loose_tiles_are_as_accurate_as_compact_ones() -> None:
    # A kernel far narrower than a grey level: tiles are huge in units of sigma, yet equal colours must meet.
    image = picture("two colours", 24, 24).float()
    values = torch.rand(1, 2, 24, 24)
    filtered = bilateral_filter(values, image, sigma_rgb=1e-4, sigma_xy=3.0, method="exact")
    exact = bilateral_filter(values.double(), image.double(), sigma_rgb=1e-4, sigma_xy=3.0, method="exact")
    assert relative_error(filtered, exact) < 1e-5


def test_padding_has_no_weight_of_its_own() -> None:
    # 63 x 55 pixels leave places to fill; copies of the odd last pixel must not drown it.
    image = torch.zeros(1, 1, 63, 55, dtype=torch.float64)
    image[:, :, -1, -1] = 4.0
    options = {"sigma_rgb": 1.0, "sigma_xy": 1e3}
    assert missing_share(torch.ones_like(image), image, 1e-3, **options) <= 1e-3


@pytest.mark.parametrize("offset", [1e2, 1e4, -1e5])
def test_the_level_of_a_guide_does_not_matter(offset: float) -> None:
    # Steps of 1/64 survive the offset in float32, so both guides are the same picture.
    image = (picture("smooth", 30, 30) * 64).round() / 64
    values = torch.rand(1, 2, 30, 30)
    exact = bilateral_filter(values, image.float(), sigma_rgb=0.2, sigma_xy=5.0)
    shifted = bilateral_filter(values, (image + offset).float(), sigma_rgb=0.2, sigma_xy=5.0)
    torch.testing.assert_close(shifted, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [1e10, 1e30, 1e38, 3e38])
def test_huge_guides_still_tell_colours_apart(level: float) -> None:
    image = picture("two colours", 20, 20).float()
    values = torch.rand(1, 1, 20, 20)
    expected = bilateral_filter(values, image, sigma_rgb=1e-5, sigma_xy=4.0)
    huge = (image * level).requires_grad_()
    filtered = bilateral_filter(values, huge, sigma_rgb=15 / 255, sigma_xy=4.0)
    torch.testing.assert_close(filtered, expected)
    assert torch.autograd.grad(filtered.sum(), huge)[0].isfinite().all()


def test_half_precision_sigmas_and_huge_guides() -> None:
    image = picture("two colours", 20, 20).float()
    values = torch.rand(1, 1, 20, 20)
    sigma = torch.tensor(0.05, dtype=torch.float16)
    expected = bilateral_filter(values, image, sigma_rgb=sigma.item())
    torch.testing.assert_close(bilateral_filter(values, image, sigma_rgb=sigma), expected)
    assert bilateral_filter(values, image * 1e38, sigma_rgb=sigma).isfinite().all()


@pytest.mark.parametrize("sigma", [1e-38, 1e-20, 1e-10, 1e-3, 1e10, 1e30])
def test_gradients_of_extreme_sigmas_are_finite(sigma: float) -> None:
    image = picture("noise", 12, 12).float().requires_grad_()
    sigmas = [torch.tensor(sigma, requires_grad=True) for _ in range(2)]
    filtered = bilateral_filter(torch.rand(1, 2, 12, 12), image, sigma_rgb=sigmas[0], sigma_xy=sigmas[1])
    grads = torch.autograd.grad(filtered.square().sum(), (image, *sigmas))
    assert filtered.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_first_derivatives_never_need_dense_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segloss.bilateral.operator.guide_gradient_reference", None)
    image = picture("smooth", 10, 10).float()
    gradient = torch.func.grad(lambda x: bilateral_filter(torch.ones(1, 1, 10, 10), x, sigma_rgb=0.3).sum())(image)
    assert gradient.abs().sum() > 0


def test_infinite_sigmas_sum_over_all_pixels() -> None:
    values = torch.rand(2, 3, 20, 30)
    summed = bilateral_filter(values, torch.rand(2, 1, 20, 30), sigma_rgb=math.inf, sigma_xy=math.inf)
    torch.testing.assert_close(summed, values.sum((2, 3), keepdim=True).expand_as(values))


def test_the_narrowest_kernel_is_the_identity() -> None:
    values, image = torch.rand(1, 3, 20, 30), torch.rand(1, 3, 20, 30)
    torch.testing.assert_close(bilateral_filter(values, image, sigma_xy=1e-35), values)
    torch.testing.assert_close(bilateral_filter(values, image, sigma_rgb=1e-35), values)


@pytest.mark.parametrize(
    ("kind", "side", "sigma_xy", "method"),
    [
        ("smooth", 16, 30.0, "exact"),  # few pixels
        ("smooth", 50, 30.0, "blocksparse"),
        ("photograph", 110, 30.0, "lowrank"),
        ("photograph", 110, 5.0, "blocksparse"),  # a narrow kernel
        ("noise", 110, 30.0, "blocksparse"),  # too many colours for low rank
    ],
)
def test_auto_takes_the_method_that_suits_the_image(kind: str, side: int, sigma_xy: float, method: str) -> None:
    values, image = torch.rand(1, 2, side, side), picture(kind, side, side).float()
    auto = bilateral_filter(values, image, sigma_xy=sigma_xy)
    assert torch.equal(auto, bilateral_filter(values, image, sigma_xy=sigma_xy, method=method))
    exact = bilateral_filter(values, image, sigma_xy=sigma_xy, method="exact")
    assert relative_error(auto, exact.double()) < 1e-2


def test_result_does_not_depend_on_memory_layout_or_neighbours_in_the_batch() -> None:
    values, image = torch.rand(3, 4, 20, 24), picture("noise", 20, 24, batch=3).float()
    filtered = bilateral_filter(values, image, sigma_xy=4.0)
    for i in range(3):
        torch.testing.assert_close(bilateral_filter(values[i : i + 1], image[i : i + 1], sigma_xy=4.0)[0], filtered[i])
    last = torch.channels_last
    torch.testing.assert_close(
        bilateral_filter(values.to(memory_format=last), image.to(memory_format=last), sigma_xy=4.0), filtered
    )
    turned = bilateral_filter(values.transpose(2, 3), image.transpose(2, 3), sigma_xy=4.0)
    torch.testing.assert_close(turned.transpose(2, 3), filtered)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is filled with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize(("height", "width"), [(37, 41), (16, 8), (1, 30)])
def test_nothing_is_read_that_was_not_written(method: str, height: int, width: int) -> None:
    image = picture("smooth", height, width, batch=2).requires_grad_()
    values = torch.rand(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    filtered = bilateral_filter(values, image, sigma_xy=8.0, method=method)
    assert filtered.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(filtered.square().sum(), (values, image)))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_gradients_that_arrive_strided_are_handled(method: str) -> None:
    image, others = picture("smooth", 20, 18).float(), torch.rand(1, 2, 20, 18)
    values, grad = torch.rand(1, 3, 20, 18, requires_grad=True), torch.randn(1, 5, 20, 18)
    filtered = bilateral_filter(values, image, sigma_xy=5.0, method=method, tolerance=0.05)
    (expected,) = torch.autograd.grad(filtered, values, grad[:, 1:4].contiguous(), retain_graph=True)
    joined = torch.cat([others[:, :1], filtered, others[:, 1:]], 1)
    torch.testing.assert_close(torch.autograd.grad(joined, values, grad)[0], expected)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 0, 4, 4), (2, 2, 0, 4)])
def test_nothing_to_filter(shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, requires_grad=True)
    image = torch.rand(shape[0], 3, *shape[2:], requires_grad=True)
    filtered = bilateral_filter(values, image)
    filtered.sum().backward()
    assert filtered.shape == shape
    assert values.grad is not None
    assert image.grad is not None
    assert image.grad.abs().sum() == 0


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    values, image = torch.rand(1, 2, 12, 12), torch.rand(1, 3, 12, 12)
    exact = bilateral_filter(values, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bilateral_filter(values, image), exact)
    half = bilateral_filter(values.half(), image.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-2)


def test_operators_are_registered_correctly() -> None:
    values, features = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)
    for method in ("exact", "blocksparse", "auto"):
        plan = Plan((2, 5), method, 1e-2, False, False)
        torch.library.opcheck(torch.ops.segloss.bilateral.default, (values, features, *plan))
        _, landmarks = torch.ops.segloss.bilateral(values, features, *plan)
        torch.library.opcheck(torch.ops.segloss.bilateral_with.default, (values, features, landmarks, *plan))
        torch.library.opcheck(torch.ops.segloss.bilateral_guide.default, (values, values, features, *plan))
    torch.library.opcheck(torch.ops.segloss.bilateral_error.default, (values, features, values))


def test_compiles_into_one_graph_with_gradients_to_all_inputs() -> None:
    values = torch.rand(1, 2, 8, 8, requires_grad=True)
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    sigma = torch.tensor(3.0, requires_grad=True)

    def filtered(values: Tensor, image: Tensor, sigma: Tensor) -> Tensor:
        return bilateral_filter(values, image, sigma_xy=sigma).square().sum()

    expected = torch.autograd.grad(filtered(values, image, sigma), (values, image, sigma))
    compiled = torch.compile(filtered, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(values, image, sigma), (values, image, sigma))
    torch.testing.assert_close(grads, expected)


def test_functional_transforms() -> None:
    stack, images = torch.rand(3, 2, 2, 6, 5), torch.rand(3, 2, 3, 6, 5)

    def energy(values: Tensor, image: Tensor) -> Tensor:
        return bilateral_filter(values, image, sigma_xy=3.0).square().sum()

    both = torch.func.vmap(torch.func.grad(energy, argnums=(0, 1)))(stack, images)
    each = [torch.func.grad(energy, argnums=(0, 1))(v, i) for v, i in zip(stack, images, strict=True)]
    for mapped, alone in zip(both, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(mapped, torch.stack(alone))
    shared = torch.func.vmap(energy, in_dims=(0, None))(stack, images[0])
    torch.testing.assert_close(shared[1], energy(stack[1], images[0]))


def test_threads_and_random_numbers_stay_as_they_were() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    bilateral_filter(torch.rand(1, 1, 50, 50, generator=torch.Generator()), torch.zeros(1, 3, 50, 50))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"values": torch.zeros(2, 3)},
            ValueError,
            r"values: expected \[B, K, \*spatial\] of 1 to 3 dimensions, got \[2, 3\]",
        ),
        ({"values": torch.zeros(1, 2, 4, 4).long()}, TypeError, "values: expected a floating-point tensor"),
        ({"values": torch.full((1, 2, 4, 4), torch.inf)}, ValueError, "values: expected finite values"),
        (
            {"image": torch.zeros(1, 3, 8, 8)},
            ValueError,
            r"image: expected \[1, 3, 4, 4\] to go with values \[1, 2, 4, 4\]",
        ),
        ({"image": torch.zeros(1, 0, 4, 4)}, ValueError, r"image: expected \[B, C, \*spatial\] with C >= 1"),
        (
            {"image": torch.zeros(1, 3, 4, 4).byte()},
            TypeError,
            "image: expected a floating-point tensor, got torch.uint8",
        ),
        ({"image": torch.full((1, 3, 4, 4), torch.nan)}, ValueError, "image: expected finite values"),
        ({"image": torch.zeros(1, 3, 4, 4, device="meta")}, ValueError, "image: expected device cpu"),
        ({"sigma_rgb": 0}, ValueError, "sigma_rgb: expected a number above 0, got 0"),
        ({"sigma_xy": -1.0}, ValueError, "sigma_xy: expected a number above 0, got -1.0"),
        ({"sigma_xy": math.nan}, ValueError, "sigma_xy: expected a number above 0, got nan"),
        ({"sigma_xy": "wide"}, TypeError, "sigma_xy: expected a number, got str"),
        ({"sigma_xy": torch.tensor(-2.0)}, ValueError, "sigma_xy: expected a number above 0, got -2"),
        ({"sigma_xy": torch.ones(2)}, ValueError, r"sigma_xy: expected a number or a scalar tensor, got \[2\]"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a finite number above 0 and below 1, got 0.0"),
        (
            {"method": "fast"},
            ValueError,
            "method: expected one of 'auto', 'exact', 'blocksparse', 'lowrank', 'lattice', got 'fast'",
        ),
        ({"precision": "half"}, ValueError, "precision: expected one of 'auto', 'float32', got 'half'"),
        ({"backend": "triton"}, ValueError, "backend: expected a CUDA device for 'triton', got an image on cpu"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, error, message) -> None:  # type: ignore[no-untyped-def]
    arguments = {"values": torch.zeros(1, 2, 4, 4), "image": torch.zeros(1, 3, 4, 4), **changes}
    with pytest.raises(error, match=message):
        bilateral_filter(**arguments)


def test_values_whose_sums_would_overflow_are_refused() -> None:
    values, image = torch.full((1, 1, 30, 30), 1e38), torch.zeros(1, 3, 30, 30)
    with pytest.raises(ValueError, match=r"values: expected finite values within ±1e\+30, got 1e\+38"):
        bilateral_filter(values, image)
    with pytest.raises(ValueError, match=r"values: expected finite values within ±1e\+30, got NaN or infinity"):
        bilateral_filter(values.mul(torch.inf), image)
    assert bilateral_filter(values.clamp(max=1e30), image).isfinite().all()


@pytest.mark.parametrize("method", ["exact", "blocksparse", "lowrank"])
def test_float64_holds_larger_sums(method: str) -> None:
    values, image = (
        torch.rand(1, 2, 20, 20, dtype=torch.float64),
        torch.linspace(0, 1, 20).expand(1, 1, 20, 20).double(),
    )
    small, large = (bilateral_filter(values * scale, image, method=method) for scale in (1, 1e130))
    torch.testing.assert_close(large / 1e130, small)
    assert bilateral_error(values * 1e130, image, large).item() < 1e-2
    with pytest.raises(ValueError, match=r"values: expected finite values within ±1e\+130, got 1e\+131"):
        bilateral_filter(torch.full_like(values, 1e131), image)


def test_the_error_of_what_should_be_next_to_nothing_is_finite() -> None:
    values, image = torch.full((1, 1, 4, 4), 1e-40), torch.zeros(1, 3, 4, 4)
    assert bilateral_error(values, image, torch.ones_like(values)).item() == pytest.approx(1e30)
