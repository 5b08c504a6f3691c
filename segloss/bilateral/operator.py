"""The filter as an operator with gradients: what ``torch.compile``, ``vmap`` and autograd see of it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from segloss._register import fold, known, register
from segloss.bilateral import blocksparse
from segloss.bilateral.reference import guide_gradient_reference


def _bilateral(values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return blocksparse.gaussian_filter(values, features, tolerance)


def _bilateral_guide(grad: Tensor, values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return blocksparse.guide_gradient(grad, values, features, tolerance)


def _like_values(values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _like_features(grad: Tensor, values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    return torch.empty_like(features, memory_format=torch.contiguous_format)


register("bilateral(Tensor values, Tensor features, float tolerance) -> Tensor", _bilateral, fake=_like_values)
register(
    "bilateral_guide(Tensor grad, Tensor values, Tensor features, float tolerance) -> Tensor",
    _bilateral_guide,
    fake=_like_features,
)


def _guide_gradient(grad: Tensor, values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    def fast(grad: Tensor, values: Tensor, features: Tensor) -> Tensor:
        return torch.ops.segloss.bilateral_guide(grad.contiguous(), values, features, tolerance)

    return known(fast, guide_gradient_reference, (grad, values, features))


class Bilateral(torch.autograd.Function):
    """``values [B, K, N]`` filtered by the Gaussian kernel of ``features [B, D, N]``, both of one dtype.

    The kernel is symmetric: the gradient of the values is the same filter. Differentiable twice with respect to the
    values at the same cost; with respect to the features by dense matrices, quadratic in N.
    """

    @staticmethod
    def forward(values: Tensor, features: Tensor, tolerance: float) -> Tensor:
        return torch.ops.segloss.bilateral(values, features, tolerance)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        values, features, ctx.tolerance = inputs
        ctx.save_for_backward(values, features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, features = ctx.saved_tensors
        to_values = to_features = None
        if ctx.needs_input_grad[0]:
            to_values = Bilateral.apply(grad.contiguous(), features, ctx.tolerance)
        if ctx.needs_input_grad[1]:
            to_features = _guide_gradient(grad, values, features, ctx.tolerance)
        return to_values, to_features, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None, None], values: Tensor, features: Tensor, tolerance: float
    ) -> tuple[Tensor, int]:
        values, features = (fold(t, d, info.batch_size) for t, d in zip((values, features), in_dims[:2], strict=True))
        return Bilateral.apply(values, features, tolerance).unflatten(0, (info.batch_size, -1)), 0


class PairwiseEnergy(torch.autograd.Function):
    """Potts energy of each image from one run of the filter; the gradient comes from its saved output.

    ``values [B, K, N]`` are the probabilities times the mask ``mask [B, 1, N]``. The Potts form is
    sum_k (m - v_k)' W v_k, the quadratic one -sum_k v_k' W v_k. ``complete`` says that the values sum to the mask, so
    that W m is the sum of the filtered values and need not be computed. Returns the energies ``[B]`` and, for the
    backward pass, the filtered values.
    """

    @staticmethod
    def forward(
        values: Tensor, mask: Tensor, features: Tensor, tolerance: float, quadratic: bool, complete: bool
    ) -> tuple[Tensor, Tensor]:
        inputs = values if quadratic or complete else torch.cat([values, mask], 1)
        filtered = torch.ops.segloss.bilateral(inputs.contiguous(), features, tolerance)
        partner = -values if quadratic else mask - values
        return (partner * filtered[:, : values.shape[1]]).sum((1, 2)), filtered

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        values, mask, features, ctx.tolerance, ctx.quadratic, ctx.complete = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(values, mask, features, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        values, mask, features, filtered = ctx.saved_tensors
        grad = grad[:, None, None]
        to_values = to_features = None
        if ctx.needs_input_grad[0]:
            fast = partial(_slope_of_filtered, ctx.quadratic, ctx.complete)
            slope = known(fast, partial(_slope, ctx.tolerance, ctx.quadratic), (values, features), (mask, filtered))
            to_values = grad * slope
        if ctx.needs_input_grad[2]:
            partner = -values if ctx.quadratic else mask - values
            to_features = _guide_gradient(grad * partner, values, features, ctx.tolerance)
        return to_values, None, to_features, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, mask: Tensor, features: Tensor, *settings: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors = (fold(t, d, info.batch_size) for t, d in zip((values, mask, features), in_dims[:3], strict=True))
        energy, filtered = PairwiseEnergy.apply(*tensors, *settings)
        return (energy.unflatten(0, (info.batch_size, -1)), filtered.unflatten(0, (info.batch_size, -1))), (0, 0)


def _slope(
    tolerance: float, quadratic: bool, values: Tensor, features: Tensor, mask: Tensor, filtered: Tensor
) -> Tensor:
    """Derivative of the energy with respect to the values: W m - 2 W v, or -2 W v."""
    slope = -2 * Bilateral.apply(values, features, tolerance)
    return slope if quadratic else slope + Bilateral.apply(mask, features, tolerance)


def _slope_of_filtered(
    quadratic: bool, complete: bool, values: Tensor, features: Tensor, mask: Tensor, filtered: Tensor
) -> Tensor:
    """The same from the saved output of the filter."""
    slope = -2 * filtered[:, : values.shape[1]]
    if quadratic:
        return slope
    return slope + (filtered.sum(1, keepdim=True) if complete else filtered[:, -1:])
