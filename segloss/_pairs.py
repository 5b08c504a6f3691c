"""The one walker over neighbouring pixel pairs."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from torch import Tensor

Offset = tuple[int, ...]  # along each spatial axis, from the first pixel of a pair to the second: (down, right)


def neighbours(tensors: Sequence[Tensor], offsets: Sequence[Offset]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each offset the views of every tensor ``[..., *spatial]`` at both ends of all pairs that far apart.

    Of two opposite offsets only one is to be given, so that each unordered pair is met once.
    """
    for offset in offsets:
        size = tensors[0].shape[-len(offset) :]
        if any(abs(step) >= length for step, length in zip(offset, size, strict=True)):
            continue
        here, there = (_places(size, offset, step) for step in ((0,) * len(offset), offset))
        yield [(t[here], t[there]) for t in tensors]


def beside(tensor: Tensor, offset: Offset, step: Offset) -> Tensor:
    """View of ``tensor [..., *spatial]`` at this step from the first pixel of every pair that is ``offset`` apart.

    The step stays within the bounding box of the pair.
    """
    return tensor[_places(tensor.shape[-len(offset) :], offset, step)]


def _places(size: Sequence[int], offset: Offset, step: Offset) -> tuple[Any, ...]:
    """Index of what :func:`beside` is a view of; a slice of a whole axis costs nothing, nor does its gradient."""
    first = [max(0, -apart) + along for apart, along in zip(offset, step, strict=True)]
    last = [start + length - abs(apart) for start, length, apart in zip(first, size, offset, strict=True)]
    return (..., *map(slice, first, last))


def cube(radii: Sequence[int]) -> list[Offset]:
    """One of each two opposite offsets that are at most so long along each axis, row by row."""
    every = product(*(range(-radius, radius + 1) for radius in radii))
    return [offset for offset in every if offset > (0,) * len(offset)]


def disc(radius: float, height: int, width: int) -> list[Offset]:
    """One of each two opposite offsets that are strictly shorter than ``radius`` and fit into the image, row by row."""
    down, right = (min(math.ceil(radius), side) - 1 for side in (height, width))
    candidates = ((i, j) for i in range(down + 1) for j in range(-right if i else 1, right + 1))
    return [offset for offset in candidates if math.hypot(*offset) < radius]
