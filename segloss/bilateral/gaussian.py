"""Gaussian weights between two sets of points, as fast as plain torch computes them and safe for any finite points."""

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
UNDERFLOW = -100.0  # powers of 2 below it are as good as 0 and would become denormal numbers, which are slow
# Largest squared extent, in units of sigma, for which |a|^2 + |b|^2 - 2ab is accurate enough in place of |a - b|^2:
# rounding errors are this times the machine precision.
_COMPACT = {torch.float32: 3e3, torch.float64: 1e9}


def is_compact(points: Tensor) -> bool:
    """Whether :func:`gaussian` may take the short way for ``[D, N]`` points around 0."""
    return points.numel() == 0 or points.square().sum(0).max().item() <= _COMPACT[points.dtype]


def gaussian(a: Tensor, b: Tensor, *, compact: bool) -> Tensor:
    """exp(-|a - b|^2 / 2) of ``[n, D]`` and ``[m, D]``, ``[n, m]``; ``compact``: see :func:`is_compact`."""
    if compact:
        # One product gives the exponent in base 2: log2(e) (ab - aa/2 - bb/2).
        ones_a, ones_b = torch.ones_like(a[:, :1]), torch.ones_like(b[:, :1])
        left = torch.cat([a * LOG2E, a.square().sum(1, keepdim=True) * (-LOG2E / 2), ones_a], 1)
        right = torch.cat([b, ones_b, b.square().sum(1, keepdim=True) * (-LOG2E / 2)], 1)
        exponent = left @ right.t()
    else:
        exponent = squared_distances(a, b).mul_(-LOG2E / 2)
    return exponent.clamp_(UNDERFLOW, 0).exp2_()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of ``[n, D]`` and ``[m, D]``, ``[n, m]``: accurate however far from 0 the points are."""
    square = a.new_zeros(len(a), len(b))
    for d in range(a.shape[1]):
        apart = a[:, d, None] - b[:, d]
        square.addcmul_(apart, apart)
    return square
