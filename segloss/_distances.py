"""L1 distances of the features of all pairs of pixels closer than a radius, without a map of features per offset."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from segloss._pairs import disc, neighbours
from segloss.common.registration import fold, known, register


def _distances(features: Tensor, radius: float) -> Tensor:
    offsets = disc(radius, *features.shape[2:])
    out = features.new_zeros((len(features), len(offsets), *features.shape[2:]))
    for index, ((f, g), (at_f, _)) in enumerate(neighbours((features, out), offsets)):
        at_f[:, index] = (f - g).abs_().sum(1)
    return out


def _pull(grad: Tensor, features: Tensor, radius: float) -> Tensor:
    """Gradient of ``(grad * _distances(features, radius)).sum()`` with respect to ``features``, itself differentiable.

    Its derivative with respect to ``features`` is 0.
    """
    out = (features * 0).contiguous()  # not plain zeros: autograd wants it in its graph before views of it change
    tensors = (features, grad, out)
    for index, ((f, g), (h, _), (to_f, to_g)) in enumerate(neighbours(tensors, disc(radius, *features.shape[2:]))):
        pull = (f - g).sign_().mul_(h[:, index : index + 1])
        to_f.add_(pull)
        to_g.sub_(pull)
    return out


register(
    "pair_distances(Tensor features, float radius) -> Tensor",
    _distances,
    fake=lambda features, radius: features.new_empty(
        (len(features), len(disc(radius, *features.shape[2:])), *features.shape[2:])
    ),
)
register(
    "pair_distances_pull(Tensor grad, Tensor features, float radius) -> Tensor",
    _pull,
    fake=lambda grad, features, radius: torch.empty_like(features, memory_format=torch.contiguous_format),
)


class PairDistances(torch.autograd.Function):
    """``features [B, D, H, W]`` to ``[B, N, H, W]``: distances to the partner at each of the N offsets of ``disc``.

    Each pair stands at its upper pixel; 0 where the partner lies outside.
    """

    @staticmethod
    def forward(features: Tensor, radius: float) -> Tensor:
        return torch.ops.segloss.pair_distances(features, radius)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        features, ctx.radius = inputs
        ctx.save_for_backward(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        fast = partial(torch.ops.segloss.pair_distances_pull, radius=ctx.radius)
        return known(fast, partial(_pull, radius=ctx.radius), (grad, *ctx.saved_tensors)), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], features: Tensor, radius: float) -> tuple[Tensor, int]:
        folded = fold(features, in_dims[0], info.batch_size)
        return PairDistances.apply(folded, radius).unflatten(0, (info.batch_size, -1)), 0
