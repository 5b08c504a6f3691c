"""The filter as an operator with gradients: what ``torch.compile``, ``vmap`` and autograd see of it."""

from typing import Any

import torch
from torch import Tensor

from segloss._register import register
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
    if torch.is_grad_enabled():  # create_graph: the dense formula, which can be differentiated once more
        return guide_gradient_reference(grad, values, features)
    return torch.ops.segloss.bilateral_guide(grad.contiguous(), values, features, tolerance)


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
            if torch.is_grad_enabled():  # create_graph: the saved output is a constant, so filter again
                filtered = Bilateral.apply(values, features, ctx.tolerance)
                if not (ctx.quadratic or ctx.complete):
                    filtered = torch.cat([filtered, Bilateral.apply(mask, features, ctx.tolerance)], 1)
            slope = -2 * filtered[:, : values.shape[1]]
            if not ctx.quadratic:
                slope = slope + (filtered.sum(1, keepdim=True) if ctx.complete else filtered[:, -1:])
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


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge a mapped dimension, or repeat an unmapped tensor, into the batch: every image is independent."""
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)
