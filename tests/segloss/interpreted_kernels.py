"""What the Triton kernels compute, in Triton's interpreter on the CPU; ``test_kernels.py`` runs this file.

Memory that is not initialised is poisoned, and every address is checked.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from segloss import _average, _average_kernels
from segloss.bilateral import guide_features, kernel_tiles, kernels
from segloss.bilateral.reference import gaussian_filter_reference, guide_gradient_reference

# The interpreter of Triton 3.3 takes numbers out of arrays in a way that NumPy has called deprecated since 1.25.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton.runtime.interpreter"
)

REACH = {torch.float32: 6e-4, torch.float64: 1e-13}  # of the sum of the absolute terms, at most
USUAL = {torch.float32: 1e-3, torch.float64: 1e-14}  # in the norm

EITHER = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])

sigmas = st.sampled_from([0.002, 0.05, 0.3, 5.0, math.inf])
dtypes = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(autouse=True, scope="module")
def _poison() -> Iterator[None]:
    """Memory that is not initialised is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _bounds() -> Iterator[None]:
    """Nothing is read or written outside the tensors of a launch; the interpreter itself would do it."""
    bounds: list[tuple[int, int]] = []
    launch, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def watched_launch(self: Any, *arguments: Any, **named: Any) -> None:
        storages = [t.untyped_storage() for t in arguments if isinstance(t, Tensor)]
        bounds[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        launch(self, *arguments, **named)

    def check(pointers: Any, mask: Any) -> None:
        address = pointers.data[mask.data]
        if address.size:
            low, high = int(address.min()), int(address.max()) + pointers.get_element_ty().primitive_bitwidth // 8
            assert any(start <= low and high <= end for start, end in bounds)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", watched_launch)
        patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        yield


def inputs(
    batch: int, channels: int, dims: int, pixels: int, sigma: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, a gradient, and clustered features, all rounded to the dtype but in float64."""
    centres = torch.rand(batch, dims, 4, dtype=torch.float64)
    features = centres[:, :, torch.randint(4, (pixels,))] + 0.05 * torch.randn(batch, dims, pixels, dtype=torch.float64)
    values, grad = torch.randn(2, batch, channels, pixels, dtype=torch.float64)
    return values.to(dtype).double(), grad.to(dtype).double(), (features / sigma).to(dtype).double()


def check_filter(values: Tensor, features: Tensor, dtype: torch.dtype) -> None:
    filtered = kernels.gaussian_filter(values.to(dtype), features.to(dtype), 0.0)
    assert filtered.dtype == dtype
    expected = gaussian_filter_reference(values, features)
    error = (filtered.double() - expected).abs()
    # Half precision ends at 6e-8 of the largest value of a tile.
    least = 1e-6 * values.abs().amax(2, keepdim=True) * values.shape[2] ** 0.5 if dtype == torch.float32 else 0
    assert (error <= REACH[dtype] * gaussian_filter_reference(values.abs(), features) + least).all()
    assert error.norm() <= USUAL[dtype] * expected.norm()


def check_gradient(grad: Tensor, values: Tensor, features: Tensor, dtype: torch.dtype) -> None:
    gradient = kernels.guide_gradient(grad.to(dtype), values.to(dtype), features.to(dtype), 0.0)
    assert gradient.dtype == dtype
    expected = guide_gradient_reference(grad, values, features)
    scale = gaussian_filter_reference(values.abs(), features).max() * grad.abs().sum(1).max()
    assert (gradient - expected).abs().max() <= (3e-5 if dtype == torch.float32 else 1e-13) * scale


problems = given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([1, 2, 5, 17]),
    dims=st.integers(1, 6),
    pixels=st.integers(1, 150),
    sigma=sigmas,
    dtype=dtypes,
)


def check_definitions(batch: int, channels: int, dims: int, pixels: int, sigma: float, dtype: torch.dtype) -> None:
    values, grad, features = inputs(batch, channels, dims, pixels, sigma, dtype)
    check_filter(values, features, dtype)
    check_gradient(grad, values, features, dtype)


@settings(max_examples=4)
@problems
def test_filter_and_guide_gradient_equal_their_definitions(**problem: Any) -> None:
    check_definitions(**problem)


@pytest.mark.slow
@settings(max_examples=25)
@problems
def test_filter_and_guide_gradient_equal_their_definitions_in_more_cases(**problem: Any) -> None:
    check_definitions(**problem)


@pytest.mark.parametrize(
    ("channels", "dims"),
    [(70, 5), (3, 10), (3, 21), (3, 25)],
    ids=["blocks of channels", "32 columns", "64 columns", "no columns"],
)
@EITHER
def test_many_channels_and_features(channels: int, dims: int, dtype: torch.dtype) -> None:
    values, grad, features = inputs(1, channels, dims, 70, 0.5, dtype)
    check_filter(values, features, dtype)
    check_gradient(grad, values, features, dtype)


@pytest.mark.parametrize("channels", [1, 3, 4], ids=["16 columns", "32 columns", "32 columns, full"])
def test_volumes_are_filtered_by_wider_products(channels: int) -> None:
    image = torch.rand(1, channels, 4, 5, 6, dtype=torch.float64)
    features = guide_features(image, 0.5, 2.0, (2.0, 1.0, 0.5)).float().double()
    values, grad = torch.randn(2, 1, 3, 120).double()
    assert kernel_tiles.product_columns(features.float()) == (16 if channels == 1 else 32)
    check_filter(values, features, torch.float32)
    check_gradient(grad, values, features, torch.float32)


def check_what_is_left_out(side: int, sigma: float, tolerance: float) -> None:
    image = (torch.rand(1, 3, 4, 4, dtype=torch.float64) * 3).repeat_interleave(side // 4 + 1, 2)
    image = image.repeat_interleave(side // 4 + 1, 3)[:, :, :side, :side]
    features = guide_features(image, sigma, side / 5)
    identity = torch.eye(side * side, dtype=torch.float64)[None]
    exact = gaussian_filter_reference(identity, features)
    kernel = kernels.gaussian_filter(identity, features, tolerance)
    assert torch.equal(kernel, kernel.transpose(1, 2))
    kept = kernel > 0
    torch.testing.assert_close(kernel[kept], exact[kept])
    assert (exact - kernel).sum() <= tolerance * exact.sum()
    # The guide gradient is that of the same kernel.
    values, grad = torch.rand(2, 1, 2, side * side, dtype=torch.float64)
    difference = features[:, :, None, :] - features[:, :, :, None]
    products = grad.transpose(1, 2) @ values
    expected = ((products + products.transpose(1, 2)) * kernel)[:, None] * difference
    torch.testing.assert_close(kernels.guide_gradient(grad, values, features, tolerance), expected.sum(3))


scenes = given(
    side=st.integers(7, 11), sigma=st.sampled_from([0.02, 0.1, 1.0]), tolerance=st.sampled_from([0.3, 1e-2, 1e-3])
)


@settings(max_examples=2)
@scenes
def test_what_is_left_out_is_symmetric_and_below_the_tolerance(**scene: Any) -> None:
    check_what_is_left_out(**scene)


@pytest.mark.slow
@settings(max_examples=10)
@scenes
def test_what_is_left_out_in_more_cases(**scene: Any) -> None:
    check_what_is_left_out(**scene)


@EITHER
def test_pairs_are_left_out_where_that_is_allowed(dtype: torch.dtype) -> None:
    # Two colours far apart in random places: sorting brings them together, and their tiles do not meet.
    features = 50 * torch.randint(2, (1, 1, 512)).to(dtype)
    tiles = kernel_tiles.cut(features, 1e-2, 64)
    counts = torch.cat([counts.sum(1) for _, _, counts in kernel_tiles.lists(tiles, 1e-2)])
    assert counts.sum() < 48
    values = torch.rand(1, 3, 512, dtype=dtype)
    filtered = kernels.gaussian_filter(values, features, 1e-2)
    torch.testing.assert_close(filtered, gaussian_filter_reference(values, features), rtol=1e-4, atol=0)


def test_lists_are_made_for_a_group_of_tiles_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values, grad, features = (t.float() for t in inputs(2, 3, 3, 70, 0.1, torch.float32))
    filtered = kernels.gaussian_filter(values, features, 1e-2)
    gradient = kernels.guide_gradient(grad, values, features, 1e-2)
    monkeypatch.setattr(kernel_tiles, "_MOST_ENTRIES", 3)  # one row of two or three tiles
    assert torch.equal(kernels.gaussian_filter(values, features, 1e-2), filtered)
    assert torch.equal(kernels.guide_gradient(grad, values, features, 1e-2), gradient)


@pytest.mark.parametrize(
    ("level", "tolerance"),
    [(1e4, 1e-2), *(pytest.param(level, 0.0, marks=pytest.mark.slow) for level in (1e2, 1e4, 6e4, 1e8, 1e14))],
)
def test_features_far_out_are_compared_by_differences(level: float, tolerance: float) -> None:
    # Equal colours meet, at any distance from the middle; two dimensions besides keep the weights different.
    features = torch.cat([level * torch.randint(-1, 2, (1, 1, 150)), torch.rand(1, 2, 150)], 1)
    values, grad = torch.rand(2, 1, 2, 150)
    filtered = kernels.gaussian_filter(values, features, tolerance)
    expected = gaussian_filter_reference(values.double(), features.double())
    torch.testing.assert_close(filtered.double(), expected, rtol=4e-4, atol=0)
    gradient = kernels.guide_gradient(grad, values, features, tolerance)
    expected = guide_gradient_reference(grad.double(), values.double(), features.double())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("scale", [1e-30, *(pytest.param(s, marks=pytest.mark.slow) for s in (1e-4, 1e6)), 1e34])
def test_values_of_any_magnitude(scale: float) -> None:
    values, grad, features = inputs(1, 4, 3, 150, 0.1, torch.float32)
    values *= torch.tensor([1.0, scale, 0.0, 1e-3 * scale])[:, None]
    check_filter(values, features, torch.float32)
    alone = values[:, 1:2]
    gradient = kernels.guide_gradient(grad[:, :1].float(), alone.float(), features.float(), 0.0).double()
    expected = guide_gradient_reference(grad[:, :1], alone, features)
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_filtered_probabilities_are_accurate_to_a_few_parts_in_ten_thousand() -> None:
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64).repeat_interleave(4, 2).repeat_interleave(4, 3)
    features = guide_features(image, 0.2, 5.0).float()
    values = torch.softmax(2 * torch.randn(1, 21, 256), 1)
    exact = gaussian_filter_reference(values.double(), features.double())
    filtered = kernels.gaussian_filter(values, features, 0.0)
    torch.testing.assert_close(filtered.double(), exact, rtol=3e-4, atol=0)
    assert (filtered - exact).norm() <= 1e-4 * exact.norm()


def test_one_large_value_does_not_drown_small_ones() -> None:
    values, _, features = inputs(1, 1, 2, 64, 1e-4, torch.float32)
    values[0, 0, 7] = 1e4
    filtered = kernels.gaussian_filter(values.float(), features.float(), 0.0)
    torch.testing.assert_close(filtered.double(), gaussian_filter_reference(values, features), rtol=1e-4, atol=1e-4)


class Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, features: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, features)
        return kernels.gaussian_filter(values, features, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        values, features = ctx.saved_tensors
        return kernels.gaussian_filter(grad, features, 0.0), kernels.guide_gradient(grad, values, features, 0.0)


@pytest.mark.slow
def test_gradients_of_the_full_precision_kernels() -> None:
    values, _, features = inputs(2, 2, 3, 40, 0.5, torch.float64)
    assert torch.autograd.gradcheck(Filter.apply, (values.requires_grad_(), features.requires_grad_()), fast_mode=True)


def test_strided_inputs() -> None:
    values, grad, features = (t.float() for t in inputs(2, 3, 3, 50, 0.2, torch.float32))
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (grad, values, features)]
    assert torch.equal(kernels.gaussian_filter(*strided[1:], 1e-2), kernels.gaussian_filter(values, features, 1e-2))
    expected = kernels.guide_gradient(grad, values, features, 1e-2)
    assert torch.equal(kernels.guide_gradient(*strided, 1e-2), expected)
    one = values[:, :1].expand(-1, 3, -1)
    filtered = kernels.gaussian_filter(one, features[:1].expand(2, -1, -1), 1e-2)
    torch.testing.assert_close(filtered[:, 0], filtered[:, 2])


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_nothing_to_filter(shape: tuple[int, int, int]) -> None:
    values, features = torch.rand(shape), torch.rand(shape[0], 3, shape[2])
    assert kernels.gaussian_filter(values, features, 1e-2).shape == shape
    gradient = kernels.guide_gradient(values, values, features, 1e-2)
    assert torch.equal(gradient, torch.zeros_like(features))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
def test_nan_stays_in_its_image_and_pixels_stay_in_place() -> None:
    values, grad, features = (t.float() for t in inputs(2, 2, 3, 70, 0.2, torch.float32))
    features[0, 0, 5] = torch.nan
    filtered = kernels.gaussian_filter(values, features, 1e-2)
    alone = kernels.gaussian_filter(values[1:], features[1:], 1e-2)
    assert torch.equal(filtered[1:], alone)
    assert kernels.guide_gradient(grad, values, features, 1e-2)[1].isfinite().all()


def test_what_is_outside_of_tensors_is_noticed() -> None:
    codes = torch.empty(20, dtype=torch.int32)
    one = torch.ones(1)
    launch = kernel_tiles._morton[(1,)]
    arguments = (torch.zeros(1, dtype=torch.int64), one, one, codes)
    launch(torch.rand(20), *arguments, 20, 1, WIDE=1, BITS=1, BLOCK=32)
    for features, pixels in ((torch.rand(20), 21), (torch.rand(19), 20)):
        with pytest.raises(InterpreterError, match="AssertionError"):
            launch(features, *arguments, pixels, 1, WIDE=1, BITS=1, BLOCK=32)


def log_sums(top: Tensor, total: Tensor) -> Tensor:
    return (top + total.log()).clamp(min=_average.LOG_FLOOR)


def check_log_sum(logits: Tensor, valid: Tensor | None) -> None:
    top, total, peak, inverse = _average_kernels.log_sum(logits, valid)
    exact = _average._log_sum(logits, valid)
    eps = 20 * torch.finfo(top.dtype).eps
    expected = _average.log_sum_reference(logits.double(), valid)
    torch.testing.assert_close(log_sums(top, total).double(), expected, rtol=eps, atol=10 * eps)
    torch.testing.assert_close(top, exact[0], rtol=eps, atol=0)
    torch.testing.assert_close(peak, exact[2], rtol=0, atol=0)
    torch.testing.assert_close(inverse, exact[3], rtol=10 * eps, atol=0)
    grad = torch.randn_like(top)
    gradient = _average_kernels.log_sum_backward(grad, logits, top, total, peak, inverse)
    assert gradient.dtype == logits.dtype
    assert gradient.is_contiguous()
    wanted = _average._log_sum_backward(grad, logits.to(top.dtype), *exact)
    eps = max(10 * eps, torch.finfo(logits.dtype).eps)
    torch.testing.assert_close(gradient.to(top.dtype), wanted, rtol=eps, atol=eps * wanted.abs().max().item())


@settings(max_examples=8)
@given(
    batch=st.integers(1, 3),
    classes=st.sampled_from([2, 3, 21, 33]),
    pixels=st.integers(1, 120),
    masked=st.booleans(),
    last=st.booleans(),
    spread=st.sampled_from([0.1, 3.0, 50.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_log_sum_equals_its_definition(
    batch: int, classes: int, pixels: int, masked: bool, last: bool, spread: float, dtype: torch.dtype
) -> None:
    logits = (spread * torch.randn(batch, classes, pixels)).to(dtype)
    valid = torch.rand(batch, pixels) < 0.5 if masked else None
    if last:  # channels last
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    check_log_sum(logits, valid)


@pytest.mark.parametrize("classes", [100, 256])
def test_log_sum_of_many_classes(classes: int) -> None:
    check_log_sum(torch.randn(1, classes, 50), None)


@pytest.mark.parametrize("gap", [30.0, 59.0, 61.0, 200.0, 1e4, 1e29])
def test_classes_that_have_vanished_keep_their_sum_and_gradient(gap: float) -> None:
    logits = torch.randn(2, 3, 400)
    logits[0, 1] -= gap
    logits[1, 2, ::7] -= gap
    check_log_sum(logits, None)
    check_log_sum(logits, torch.rand(2, 400) < 0.1)


def test_images_without_valid_pixels() -> None:
    logits, valid = torch.randn(2, 3, 40), torch.zeros(2, 40, dtype=torch.bool)
    valid[0] = True
    check_log_sum(logits, valid)
    assert (_average_kernels.log_sum(logits, valid)[1][1] == 0).all()


def test_strided_masks_and_gradients() -> None:
    logits, valid = torch.randn(2, 3, 40), torch.rand(40, 2) < 0.5
    check_log_sum(logits, valid.t())
    saved = _average_kernels.log_sum(logits, valid.t())
    grad = torch.randn(3, 2).t()
    expected = _average_kernels.log_sum_backward(grad.contiguous(), logits, *saved)
    assert torch.equal(_average_kernels.log_sum_backward(grad, logits, *saved), expected)


def test_many_pixels_are_shared_between_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_average_kernels, "_PROGRAMS", 6)
    check_log_sum(torch.randn(2, 21, 500), torch.rand(2, 500) < 0.8)
