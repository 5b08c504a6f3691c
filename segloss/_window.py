"""The bilateral kernel restricted to pairs of pixels within a window, a square or cube: linear in the pixels.

Each pair of neighbours is met once and counts for both its pixels; no map outlives its offset, so that memory does not
grow with the radius.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from segloss._pairs import Offset, cube, neighbours
from segloss.common.registration import fold, known, register

_NEGLIGIBLE = -50.0  # exponents of weights that are as good as 0 beside a pixel's own of 1, and never denormal


def window_filter(values: Tensor, features: Tensor, radius: int) -> Tensor:
    """``values [B, K, *spatial]`` times W_pq = exp(-|f_p - f_q|^2 / 2) of ``features [B, D, *spatial]``.

    Only pairs count that are at most ``radius`` pixels apart along every axis; p = q does.
    """
    out = values.clone(memory_format=torch.contiguous_format)
    for (f, g), (v, w), (to_v, to_w) in neighbours((features, values, out), _offsets(values, radius)):
        weight = _weight(g - f)
        to_v.addcmul_(weight, w)
        to_w.addcmul_(weight, v)
    return out


def window_guide_gradient(grad: Tensor, values: Tensor, features: Tensor, radius: int) -> Tensor:
    """Gradient of ``(grad * window_filter(values, features, radius)).sum()`` with respect to ``features``."""
    out = (features * 0).contiguous()  # not plain zeros: autograd wants it in its graph before views of it change
    tensors = (features, values, grad, out)
    for (f, g), (v, w), (s, t), (to_f, to_g) in neighbours(tensors, _offsets(values, radius)):
        apart = g - f
        pull = _weight(apart) * (s * w + t * v).sum(1, keepdim=True) * apart
        to_f.add_(pull)
        to_g.sub_(pull)
    return out


def _weight(apart: Tensor) -> Tensor:
    return torch.exp((apart.square().sum(1, keepdim=True) / -2).clamp(min=_NEGLIGIBLE))


def _offsets(like: Tensor, radius: int) -> list[Offset]:
    """One of each two opposite offsets within the window, and within the image."""
    return cube([min(radius, length - 1) for length in like.shape[2:]])


def _window(values: Tensor, features: Tensor, radius: int) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return window_filter(values, features, radius)


def _window_guide(grad: Tensor, values: Tensor, features: Tensor, radius: int) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return window_guide_gradient(grad, values, features, radius)


register(
    "window(Tensor values, Tensor features, int radius) -> Tensor",
    _window,
    fake=lambda values, features, radius: torch.empty_like(values, memory_format=torch.contiguous_format),
)
register(
    "window_guide(Tensor grad, Tensor values, Tensor features, int radius) -> Tensor",
    _window_guide,
    fake=lambda grad, values, features, radius: torch.empty_like(features, memory_format=torch.contiguous_format),
)


class WindowedEnergy(torch.autograd.Function):
    """Potts energy of each image, sum_k (m - v_k)' W v_k, within a window; the gradient comes from the filter's output.

    ``values [B, K, *spatial]`` are the probabilities times the mask ``mask [B, 1, *spatial]``. Returns the energies
    ``[B]`` and, for the backward pass, W v and W m. A second derivative keeps maps of every offset.
    """

    @staticmethod
    def forward(values: Tensor, mask: Tensor, features: Tensor, radius: int) -> tuple[Tensor, Tensor]:
        filtered = torch.ops.segloss.window(torch.cat([values, mask], 1), features, radius)
        return ((mask - values) * filtered[:, :-1]).flatten(1).sum(1), filtered

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        values, mask, features, ctx.radius = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(values, mask, features, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        values, mask, features, filtered = ctx.saved_tensors
        grad = grad.view(-1, *(1,) * (values.dim() - 1))
        to_values = to_features = None
        if ctx.needs_input_grad[0]:
            slope = known(_slope_of_filtered, partial(_slope, ctx.radius), (values, features), (mask, filtered))
            to_values = grad * slope
        if ctx.needs_input_grad[2]:
            fast = partial(torch.ops.segloss.window_guide, radius=ctx.radius)
            slow = partial(window_guide_gradient, radius=ctx.radius)
            to_features = known(fast, slow, (grad * (mask - values), values, features))
        return to_values, None, to_features, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, mask: Tensor, features: Tensor, radius: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors = (fold(t, d, info.batch_size) for t, d in zip((values, mask, features), in_dims[:3], strict=True))
        energy, filtered = WindowedEnergy.apply(*tensors, radius)
        return (energy.unflatten(0, (info.batch_size, -1)), filtered.unflatten(0, (info.batch_size, -1))), (0, 0)


def _slope(radius: int, values: Tensor, features: Tensor, mask: Tensor, filtered: Tensor) -> Tensor:
    """Derivative of the energy with respect to the values: W m - 2 W v."""
    return window_filter(mask - 2 * values, features, radius)


def _slope_of_filtered(values: Tensor, features: Tensor, mask: Tensor, filtered: Tensor) -> Tensor:
    """The same from the saved output of the filter."""
    return filtered[:, -1:] - 2 * filtered[:, :-1]
