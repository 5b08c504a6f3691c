"""Transposed convolution to an image: the stem of a classifier with stride, which is where a decoder ends."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

Pair = tuple[int, int]


class SubPixel(torch.autograd.Function):
    r"""Transposed convolution with a stride, run as an ordinary one at the low resolution (sub-pixel convolution).

    Output pixel :math:`s i + a` of a transposed convolution with stride s gets the input pixels :math:`i - t` through
    the taps :math:`s t + a` of the kernel. So each of the s phases a, per dimension, is an ordinary convolution with
    every s-th tap, and one convolution gives all phases as channels. On a CPU this takes a third of the time where
    there are few output channels, three for an image. Its own backward pass would be slower than that of a transposed
    convolution, which is therefore used, in operations that autograd can differentiate again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, weight: Tensor, stride: Pair, padding: Pair, size: Pair) -> Tensor:
        taps = [-(-k // s) for k, s in zip(weight.shape[2:], stride, strict=True)]  # of each phase
        missing = [n * s - k for n, s, k in zip(taps, stride, weight.shape[2:], strict=True)]
        whole = F.pad(weight, (0, missing[1], 0, missing[0]))
        phases = whole.unflatten(3, (taps[1], stride[1])).unflatten(2, (taps[0], stride[0]))
        kernel = phases.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flip(-2, -1)
        low = F.conv2d(gradient, kernel, padding=(taps[0] - 1, taps[1] - 1))
        interleaved = low.unflatten(1, (-1, *stride)).permute(0, 1, 4, 2, 5, 3)
        full = interleaved.flatten(4, 5).flatten(2, 3)
        rest = [n + p - m for n, p, m in zip(size, padding, full.shape[2:], strict=True)]
        return F.pad(full, (-padding[1], rest[1], -padding[0], rest[0]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gradient, weight, ctx.stride, ctx.padding, _ = inputs
        ctx.save_for_backward(gradient, weight)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = (saved.to(above.dtype) for saved in ctx.saved_tensors)  # autocast's, where it was on
        down = F.conv2d(above, weight, None, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None
        along = (
            conv2d_weight(above, weight.shape, gradient, ctx.stride, ctx.padding) if ctx.needs_input_grad[1] else None
        )
        return down, along, None, None, None
