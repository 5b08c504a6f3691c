"""The bilateral filter on a permutohedral lattice against the dense kernel, and what it promises besides."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segloss import bilateral_error, bilateral_filter, potts_crf
from segloss.bilateral import LatticeError, PreparedFilter, guide_features
from segloss.bilateral.lattice import Lattice, gaussian_filter
from segloss.bilateral.operator import Plan
from segloss.bilateral.reference import gaussian_filter_reference
from tests.segloss.test_bilateral import images, picture, relative_error, sides, sigmas, widths

LATTICE = {"method": "lattice"}


def kernel(features: Tensor, *, filled: bool = False) -> Tensor:
    """W~ of ``features [D, N]`` as a matrix."""
    return Lattice(features, filled=filled).filtered(torch.eye(features.shape[1], dtype=features.dtype))


def scattered(dims: int, count: int = 150, *, spread: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(dims)
    return spread * torch.randn(dims, count, generator=generator, dtype=torch.float64)


@settings(max_examples=60)
@given(
    kind=images,
    height=sides,
    width=sides,
    sigma_rgb=sigmas,
    sigma_xy=widths,
    channels=st.integers(1, 6),
    classes=st.integers(1, 6),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_its_error_is_what_bilateral_error_measures(
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
    values = torch.softmax(torch.randn(batch, classes, height, width, dtype=torch.float64), 1)
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy}
    filtered = bilateral_filter(values.to(dtype), image.to(dtype), **options, **LATTICE)
    assert filtered.dtype == dtype
    features = guide_features(image, sigma_rgb, sigma_xy)
    exact = gaussian_filter_reference(values.flatten(2), features).view_as(values)
    measured = bilateral_error(values.to(dtype), image.to(dtype), filtered, **options)
    for result, expected, error in zip(filtered, exact, measured, strict=True):
        assert relative_error(result, expected) <= 1.3 * error.item() + 1e-3
    assert measured.max() < 0.6


@pytest.mark.parametrize(("sigma_rgb", "sigma_xy"), [(5 / 255, 20.0), (15 / 255, 50.0), (0.1, 10.0)])
def test_its_error_is_moderate_on_photographs(sigma_rgb: float, sigma_xy: float) -> None:
    image, values = picture("photograph", 100, 120).float(), torch.rand(1, 3, 100, 120)
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy}
    error = bilateral_error(values, image, bilateral_filter(values, image, **options, **LATTICE), **options)
    assert error < 0.3


@pytest.mark.parametrize(("dims", "error"), [(1, 0.03), (2, 0.03), (3, 0.06)])
def test_dense_points_of_few_features_are_filtered_accurately(dims: int, error: float) -> None:
    features = scattered(dims, 1000)
    values = torch.rand(1, 4, 1000, dtype=torch.float64)
    exact = gaussian_filter_reference(values, features[None])
    assert relative_error(gaussian_filter(values, features[None]), exact) < error


@pytest.mark.parametrize("dims", range(1, 9))
@pytest.mark.parametrize("spread", [0.3, 1.5, 20.0])
def test_the_kernel_is_symmetric_and_a_pixel_has_its_weight_with_itself(dims: int, spread: float) -> None:
    matrix = kernel(scattered(dims, spread=spread))
    torch.testing.assert_close(matrix, matrix.t(), rtol=0, atol=1e-14)
    assert (matrix.diagonal() - 1).abs().max() < (1e-12 if dims <= 2 else 0.12)
    assert matrix.flatten().min() > -1e-9


def test_on_photographs_own_weights_are_1_to_5_percent() -> None:
    features = guide_features(picture("photograph", 40, 50), 5 / 255, 10.0)[0]
    assert (kernel(features).diagonal() - 1).abs().max() < 0.05


@pytest.mark.parametrize("dims", range(1, 9))
def test_a_filled_lattice_is_symmetric_too(dims: int) -> None:
    matrix = kernel(scattered(dims), filled=True)
    torch.testing.assert_close(matrix, matrix.t(), rtol=0, atol=1e-14)
    assert (matrix.diagonal() - 1).abs().max() < 0.12
    assert matrix.flatten().min() > -1e-9


@pytest.mark.parametrize(("sigma_rgb", "sigma_xy"), [(5 / 255, 10.0), (3 / 255, 20.0)])
def test_a_filled_lattice_is_nearer_to_the_gaussian(sigma_rgb: float, sigma_xy: float) -> None:
    image, values = picture("photograph", 60, 70), torch.rand(1, 3, 60, 70, dtype=torch.float64)
    features = guide_features(image, sigma_rgb, sigma_xy)
    exact = gaussian_filter_reference(values.flatten(2), features)
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy, **LATTICE}
    sparse, filled = (
        relative_error(PreparedFilter(image, filled=filled, **options)(values).flatten(2), exact)
        for filled in (False, True)
    )
    assert filled < 0.8 * sparse


def test_pixels_far_from_all_others_keep_their_values() -> None:
    features = scattered(5, 200, spread=300.0)
    torch.testing.assert_close(kernel(features), torch.eye(200, dtype=torch.float64), rtol=0, atol=0.03)


def test_features_that_do_not_differ_do_not_count() -> None:
    values, image = torch.rand(2, 3, 20, 30), torch.rand(2, 2, 20, 30)
    summed = bilateral_filter(values, image, sigma_rgb=math.inf, sigma_xy=math.inf, **LATTICE)
    torch.testing.assert_close(summed, values.sum((2, 3), keepdim=True).expand_as(values))
    constant = bilateral_filter(values, torch.full_like(image, 0.3), sigma_xy=4.0, **LATTICE)
    torch.testing.assert_close(constant, bilateral_filter(values, image, sigma_rgb=math.inf, sigma_xy=4.0, **LATTICE))
    one = torch.rand(1, 2, 1, 1)
    torch.testing.assert_close(bilateral_filter(one, torch.rand(1, 3, 1, 1), **LATTICE), one)


def test_wide_keys_are_those_of_narrow_ones() -> None:
    # Two halves of an image so far apart that keys need 64 bits: each is filtered as it is alone.
    left, values = picture("noise", 12, 9), torch.rand(1, 2, 12, 18, dtype=torch.float64)
    halves = torch.cat([left, left + 1e5], 3)
    options = {"sigma_rgb": 0.3, "sigma_xy": math.inf, **LATTICE}
    together = bilateral_filter(values, halves, **options)
    assert relative_error(together[..., :9], bilateral_filter(values[..., :9], left, **options)) < 0.2
    assert relative_error(together, bilateral_filter(values, halves, **{**options, "method": "exact"})) < 0.3


@pytest.mark.parametrize("sigmas", [{"sigma_rgb": 1e-8}, {"sigma_xy": 1e-6}, {"sigma_rgb": 1e-4, "sigma_xy": 1e-3}])
def test_sigmas_that_are_too_small_are_refused_by_name(sigmas: dict[str, float]) -> None:
    values, image = torch.rand(2, 1, 30, 40), torch.rand(2, 6, 30, 40)
    image[0] = 0.5
    named = "image 0" if "sigma_xy" in sigmas else "image 1"
    with pytest.raises(LatticeError, match=f"method: 'lattice' .* {named}.* expected a larger sigma_rgb or sigma_xy"):
        bilateral_filter(values, image, **sigmas, **LATTICE)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_gradients_of_values_are_those_of_its_own_kernel(channels: int) -> None:
    image = picture("smooth", 7, 8, channels=channels, batch=2)
    values = torch.rand(2, 2, 7, 8, dtype=torch.float64, requires_grad=True)

    def filtered(values: Tensor) -> Tensor:
        return bilateral_filter(values, image, sigma_rgb=0.2, sigma_xy=3.0, **LATTICE)

    assert torch.autograd.gradcheck(filtered, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(filtered, values, fast_mode=True)


def test_gradients_of_image_and_sigmas_are_those_of_the_exact_kernel() -> None:
    image = picture("photograph", 14, 15).requires_grad_()
    sigma = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    values, grad = torch.rand(2, 1, 2, 14, 15, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(
            bilateral_filter(values, image, sigma_xy=sigma, method=method, tolerance=1e-9), (image, sigma), grad
        )
        for method in ("lattice", "exact")
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["potts", "quadratic"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_logit_gradient_of_potts_crf_is_that_of_its_value(form: str, gated: bool) -> None:
    image, gate = picture("photograph", 9, 8, batch=2), torch.rand(2, 9, 8, dtype=torch.float64)
    valid = torch.rand(2, 9, 8) < 0.8
    logits = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)

    def loss(logits: Tensor) -> Tensor:
        options = {"form": form, "gate": gate if gated else None, "valid": valid}
        return potts_crf(logits, image, sigma_rgb=0.1, sigma_xy=3.0, **options, **LATTICE)

    assert torch.autograd.gradcheck(loss, logits, fast_mode=True)
    with torch.no_grad():
        alone = loss(logits)
    torch.testing.assert_close(alone, loss(logits))


def test_an_image_prepared_once_serves_batches_and_any_number_of_channels() -> None:
    image = picture("photograph", 24, 20).float()
    run = PreparedFilter(image, sigma_xy=6.0, **LATTICE)
    for batch, channels in ((1, 1), (3, 2), (2, 30)):
        values = torch.rand(batch, channels, 24, 20)
        expected = bilateral_filter(values, image.expand(batch, -1, -1, -1), sigma_xy=6.0, **LATTICE)
        with torch.autocast("cpu"):
            torch.testing.assert_close(run(values), expected)


def test_results_do_not_depend_on_layout_precision_or_neighbours_in_the_batch() -> None:
    values, image = torch.rand(3, 4, 20, 24), picture("photograph", 20, 24, batch=3).float()
    image[1] = torch.rand(3, 20, 24)
    filtered = bilateral_filter(values, image, sigma_xy=4.0, **LATTICE)
    for i in range(3):
        alone = bilateral_filter(values[i : i + 1], image[i : i + 1], sigma_xy=4.0, **LATTICE)
        torch.testing.assert_close(alone[0], filtered[i])
    last = [t.contiguous(memory_format=torch.channels_last) for t in (values, image)]
    torch.testing.assert_close(bilateral_filter(*last, sigma_xy=4.0, **LATTICE), filtered)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bilateral_filter(values, image, sigma_xy=4.0, **LATTICE), filtered)
    double = bilateral_filter(values.double(), image.double(), sigma_xy=4.0, **LATTICE)
    torch.testing.assert_close(filtered.double(), double, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 0, 4, 4), (2, 2, 0, 4)])
def test_nothing_to_filter(shape: tuple[int, ...]) -> None:
    assert bilateral_filter(torch.rand(shape), torch.rand(shape[0], 3, *shape[2:]), **LATTICE).shape == shape


def test_operators_compile_and_map() -> None:
    values, features = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)
    plan = Plan((2, 5), "lattice", 1e-2, False, False)
    torch.library.opcheck(torch.ops.segloss.bilateral.default, (values, features, *plan))
    stack, images = torch.rand(3, 2, 2, 6, 5), torch.rand(3, 2, 3, 6, 5)

    def energy(values: Tensor, image: Tensor) -> Tensor:
        return bilateral_filter(values, image, sigma_xy=3.0, **LATTICE).square().sum()

    mapped = torch.func.vmap(torch.func.grad(energy))(stack, images)
    each = [torch.func.grad(energy)(v, i) for v, i in zip(stack, images, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each))
    values = stack[0].clone().requires_grad_()
    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(values, images[0]), values)
    torch.testing.assert_close(found, each[0])


@pytest.mark.gpu
def test_devices_agree() -> None:
    values, image = torch.rand(2, 3, 60, 70), picture("photograph", 60, 70, batch=2).float()
    on_cpu = bilateral_filter(values, image, sigma_xy=10.0, **LATTICE)
    on_gpu = bilateral_filter(values.cuda(), image.cuda(), sigma_xy=10.0, **LATTICE)
    assert relative_error(on_gpu.cpu(), on_cpu.double()) < 1e-3
