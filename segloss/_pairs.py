"""The one walker over neighbouring pixel pairs."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

Offset = tuple[int, int]  # (down, right), from the upper pixel of a pair to the lower one, or rightwards within a row


def neighbours(tensors: Sequence[Tensor], offsets: Sequence[Offset]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each offset (down, right) the views of every tensor ``[..., H, W]`` at both ends of all pairs that far apart.

    Offsets go down (or right within a row), so that each unordered pair is met once.
    """
    for down, right in offsets:
        height, width = tensors[0].shape[-2:]
        if down >= height or abs(right) >= width:
            continue
        yield [(beside(t, (down, right), (0, 0)), beside(t, (down, right), (down, right))) for t in tensors]


def beside(tensor: Tensor, offset: Offset, step: Offset) -> Tensor:
    """View of ``tensor [..., H, W]`` at this step from the upper pixel of every pair that is ``offset`` apart.

    The step stays within the bounding box of the pair.
    """
    (down, right), (i, j) = offset, step
    height, width = tensor.shape[-2:]
    column = max(0, -right) + j
    return tensor[..., i : i + height - down, column : column + width - abs(right)]


def disc(radius: float, height: int, width: int) -> list[Offset]:
    """One of each two opposite offsets that are strictly shorter than ``radius`` and fit into the image, row by row."""
    down, right = (min(math.ceil(radius), side) - 1 for side in (height, width))
    candidates = ((i, j) for i in range(down + 1) for j in range(-right if i else 1, right + 1))
    return [offset for offset in candidates if math.hypot(*offset) < radius]
