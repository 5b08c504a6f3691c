"""Reduction of a loss over images, and the precision it is computed in."""

from typing import Literal

import torch
from torch import Tensor

from segloss.common.checks import check_choice

# No value counts as larger: sums of it over the pixels of any image still fit into float32.
LARGEST = 1e30
# Stands for the logarithm of a probability that has underflowed beyond what a float can hold.
LOG_FLOOR = -LARGEST

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: object) -> None:
    check_choice("reduction", reduction, ("mean", "sum", "none"))


def reduce(per_image: Tensor, reduction: Reduction, seen: Tensor | None = None) -> Tensor:
    """``[B]`` to a scalar, or itself for ``"none"``; images that are not ``seen`` count as 0.

    The mean over an empty batch is 0, not NaN.
    """
    if seen is not None:
        per_image = torch.where(seen, per_image, 0)
    if reduction == "none":
        return per_image
    return per_image.mean() if reduction == "mean" and len(per_image) else per_image.sum()


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What the losses compute in, whatever autocast says: float64 for float64, float32 for anything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """In the dtype the losses compute in, and within ±1e30, so that sums over an image or a batch stay finite.

    No gradient flows where a value lies beyond.
    """
    return tensor.to(wide_dtype(tensor)).clamp(-LARGEST, LARGEST)
