"""Sizes of classes as annotators would tell them, made from masks."""

import math

import torch
from data.sample import VOID, DataError, Images
from torch import Tensor

import segloss


def exact_sizes(images: Images) -> Tensor:
    """Shares of the classes in the labelled pixels of each mask, ``[N, K]``.

    Raises:
        DataError: a mask without labelled pixels.
    """
    sizes = images.sizes()
    for name, row in zip(images.names, sizes, strict=True):
        if not row.any():
            raise DataError(f"{name}: expected a mask with labelled pixels, got one that is all void ({VOID})")
    return sizes


def noisy_sizes(exact: Tensor, error: float, seed: int) -> Tensor:
    """Sizes with a nominal mean relative error, which is that of a noise of sqrt(pi / 2) times as much.

    Args:
        exact: the sizes without it, ``[N, K]``.
        error: the nominal one.
        seed: of the noise, of which a larger error has more.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy: Tensor = segloss.corrupt_sizes(exact, error * math.sqrt(math.pi / 2), generator=generator)
    return noisy
