"""The transposed convolution at low resolution is the transposed convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segattr.lrp.subpixel import SubPixel


@st.composite
def convolutions(draw: st.DrawFn, dims: int) -> tuple[tuple[int, ...], ...]:
    """Kernel, stride, padding, the sizes of an image that it fits into, and those of the map that it gives."""
    most = {2: 7, 3: 4}[dims]
    kernel, stride = (tuple(draw(st.integers(1, most)) for _ in range(dims)) for _ in range(2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(draw(st.integers(k, 2 * k + 5)) for k in kernel)
    low = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True))
    return kernel, stride, padding, size, low


def tensors(kernel: tuple[int, ...], low: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gradient, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 4, *low), (4, 3, *kernel))
    )
    return gradient, weight


def both(case: tuple[tuple[int, ...], ...], gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kernel, stride, padding, size, low = case
    rest = [n - ((m - 1) * s - 2 * p + k) for n, m, s, p, k in zip(size, low, stride, padding, kernel, strict=True)]
    transposed = F.conv_transpose2d if len(kernel) == 2 else F.conv_transpose3d
    expected = transposed(gradient, weight, None, stride, padding, rest)
    return SubPixel.apply(gradient, weight, stride, padding, size), expected


@pytest.mark.parametrize("dims", [2, 3])
@given(data=st.data())
@settings(max_examples=60)
def test_values_and_gradients_are_those_of_the_transposed_convolution(dims: int, data: st.DataObject) -> None:
    case = data.draw(convolutions(dims))
    inputs = tensors(case[0], case[-1])
    actual, expected = both(case, *inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    above = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(*(torch.autograd.grad(y, inputs, above) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("stride", "padding", "size", "kernel", "low"),
    [((2, 3), (1, 0), (8, 7), (3, 2), (4, 2)), ((2, 3, 2), (1, 0, 0), (4, 5, 2), (3, 2, 2), (2, 2, 1))],
)
def test_it_can_be_differentiated_twice(
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    low: tuple[int, ...],
) -> None:
    inputs = tensors(kernel, low)
    assert torch.autograd.gradgradcheck(lambda g, w: SubPixel.apply(g, w, stride, padding, size), inputs)


def test_it_trains_under_autocast() -> None:
    gradient, weight = (tensor.detach().float().requires_grad_() for tensor in tensors((3, 3), (4, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        output = SubPixel.apply(gradient, weight, (2, 2), (1, 1), (8, 8))
    exact = F.conv_transpose2d(gradient, weight, None, 2, 1, 1)
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.2)
    for one, other in zip(
        *(torch.autograd.grad(y.float().square().sum(), (gradient, weight)) for y in (output, exact)), strict=True
    ):
        assert (one - other).norm() < 0.03 * other.norm()
