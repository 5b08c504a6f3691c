"""The one walker over neighbouring pixel pairs."""

import math
from collections.abc import Iterator, Sequence
from itertools import product

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
        yield [(beside(t, offset, (0,) * len(offset)), beside(t, offset, offset)) for t in tensors]


def beside(tensor: Tensor, offset: Offset, step: Offset) -> Tensor:
    """View of ``tensor [..., *spatial]`` at this step from the first pixel of every pair that is ``offset`` apart.

    The step stays within the bounding box of the pair.
    """
    for axis, (apart, along) in enumerate(zip(offset, step, strict=True), tensor.dim() - len(offset)):
        tensor = tensor.narrow(axis, max(0, -apart) + along, tensor.shape[axis] - abs(apart))
    return tensor


def cube(radii: Sequence[int]) -> list[Offset]:
    """One of each two opposite offsets that are at most so long along each axis, row by row."""
    every = product(*(range(-radius, radius + 1) for radius in radii))
    return [offset for offset in every if offset > (0,) * len(offset)]


def disc(radius: float, height: int, width: int) -> list[Offset]:
    """One of each two opposite offsets that are strictly shorter than ``radius`` and fit into the image, row by row."""
    down, right = (min(math.ceil(radius), side) - 1 for side in (height, width))
    candidates = ((i, j) for i in range(down + 1) for j in range(-right if i else 1, right + 1))
    return [offset for offset in candidates if math.hypot(*offset) < radius]
