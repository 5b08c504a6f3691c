"""The one walker over neighbouring pixel pairs."""

from collections.abc import Iterator, Sequence

from torch import Tensor


def neighbours(tensors: Sequence[Tensor], offsets: Sequence[tuple[int, int]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each offset (down, right) the views of every tensor ``[..., H, W]`` at both ends of all pairs that far apart.

    Offsets go down (or right within a row), so that each unordered pair is met once.
    """
    for down, right in offsets:
        height, width = tensors[0].shape[-2:]
        if down >= height or abs(right) >= width:
            continue
        left = slice(max(0, -right), width - max(0, right))
        moved = slice(max(0, right), width - max(0, -right))
        yield [(t[..., : height - down, left], t[..., down:, moved]) for t in tensors]
