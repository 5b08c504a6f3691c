"""Transposed convolution to an image: the stem of a classifier with stride, which is where a decoder ends."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight, conv3d_weight

PerAxis = tuple[int, ...]


class SubPixel(torch.autograd.Function):
    r"""Transposed convolution with a stride, run as an ordinary one at the low resolution (sub-pixel convolution).

    In two or three dimensions. Output pixel :math:`s i + a` of a transposed convolution with stride s gets the input
    pixels :math:`i - t` through the taps :math:`s t + a` of the kernel. So each of the s phases a, per dimension, is an
    ordinary convolution with every s-th tap, and one convolution gives all phases as channels. On a CPU this takes a
    third of the time where there are few output channels, three for an image. Its own backward pass would be slower
    than that of a transposed convolution, which is therefore used, in operations that autograd can differentiate again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, weight: Tensor, stride: PerAxis, padding: PerAxis, size: PerAxis) -> Tensor:
        axes = range(len(stride))
        taps = [-(-k // s) for k, s in zip(weight.shape[2:], stride, strict=True)]  # of each phase
        missing = [n * s - k for n, s, k in zip(taps, stride, weight.shape[2:], strict=True)]
        phases = F.pad(weight, _pads((0, after) for after in missing))
        for axis in reversed(axes):
            phases = phases.unflatten(2 + axis, (taps[axis], stride[axis]))
        kernel = phases.permute(1, *(3 + 2 * axis for axis in axes), 0, *(2 + 2 * axis for axis in axes))
        kernel = kernel.flatten(0, len(stride)).flip([-1 - axis for axis in axes])
        low = _convolution(gradient)(gradient, kernel, padding=[n - 1 for n in taps])
        apart = low.unflatten(1, (-1, *stride))
        full = apart.permute(0, 1, *(d for axis in axes for d in (2 + len(stride) + axis, 2 + axis)))
        for axis in reversed(axes):
            full = full.flatten(2 + 2 * axis, 3 + 2 * axis)
        rest = [n + p - m for n, p, m in zip(size, padding, full.shape[2:], strict=True)]
        return F.pad(full, _pads((-p, after) for p, after in zip(padding, rest, strict=True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gradient, weight, ctx.stride, ctx.padding, _ = inputs
        ctx.save_for_backward(gradient, weight)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = (saved.to(above.dtype) for saved in ctx.saved_tensors)  # autocast's, where it was on
        down = _convolution(above)(above, weight, None, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None
        of_weight = conv2d_weight if above.dim() == 4 else conv3d_weight
        along = of_weight(above, weight.shape, gradient, ctx.stride, ctx.padding) if ctx.needs_input_grad[1] else None
        return down, along, None, None, None


def _convolution(like: Tensor) -> Callable[..., Tensor]:
    return F.conv2d if like.dim() == 4 else F.conv3d


def _pads(before_and_after: Iterable[tuple[int, int]]) -> list[int]:
    """Of each spatial axis, in the order of ``F.pad``: the last one first."""
    return [n for pair in reversed([*before_and_after]) for n in pair]
