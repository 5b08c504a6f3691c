"""The largest value of a map on the line between two pixels, for all pairs of pixels closer than a radius.

Maps hold ranks, so that a maximum names the pixel that it comes from and no gradient has to find its way back through
maxima. A function of the maxima alone, summed over many pairs, is a sum over pixels that are weighted by the number of
pairs in which they are the largest: these numbers are all that a loss has to know about the lines.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from segloss._pairs import Offset, beside, disc, neighbours
from segloss.common.registration import fold, register


def line(offset: Offset) -> list[Offset]:
    """Pixels on the line between two, as steps from the first: less than 1 from it and within the bounding box."""
    down, right = offset
    columns = range(min(right, 0), max(right, 0) + 1)
    return [(i, j) for i in range(down + 1) for j in columns if (right * i - down * j) ** 2 < right**2 + down**2]


def line_maxima(ranks: Tensor, offsets: Sequence[Offset]) -> Iterator[Tensor]:
    """For each offset the maximum of ``ranks [B, H, W]`` on the line from the upper pixel of every pair to the lower.

    A line is cut into runs along its longer side, whose maxima all lines share: a quarter of the work.
    """
    longest = max((max(down, abs(right)) for down, right in offsets), default=0)
    across = _run_maxima(ranks, longest)
    upright = [table.mT for table in _run_maxima(ranks.mT, longest)]
    for offset in offsets:
        steep = offset[0] > abs(offset[1])
        runs: dict[int, list[Offset]] = {}
        for i, j in line(offset):
            runs.setdefault(j if steep else i, []).append((i, j))
        tables = upright if steep else across
        first, *others = (beside(tables[len(run) - 1], offset, run[0]) for run in runs.values())
        largest = first.clone()
        for other in others:
            torch.maximum(largest, other, out=largest)
        yield largest


def _run_maxima(ranks: Tensor, longest: int) -> list[Tensor]:
    """Maxima of 1, 2, ... pixels from each pixel rightwards; of fewer at the end of a row, where no run begins."""
    tables = [ranks]
    for length in range(1, longest + 1):
        table = tables[-1].clone()
        table[..., :-length] = torch.maximum(table[..., :-length], ranks[..., length:])
        tables.append(table)
    return tables


def _line_votes(ranks: Tensor, labels: Tensor, radius: float, ignore_index: int, margin: int) -> Tensor:
    """``[B, 2, H * W]`` int32: by rank, in how many pairs of same and of different labels a pixel is the largest.

    ``ranks [B, H, W]`` order the pixels of each image, from 0 up. Pairs whose upper pixel is fewer than ``margin``
    pixels from the left, right or bottom border do not count.
    """
    images, height, width = ranks.shape
    total = ranks.numel()
    places = ranks.int() + height * width * torch.arange(images, dtype=torch.int32, device=ranks.device)[:, None, None]
    known = labels != ignore_index
    upper = known & inner(height, width, margin, labels.device)
    votes = places.new_zeros(3 * total)  # of pairs of the same label, of different ones, and of no interest
    one = places.new_ones(1)
    offsets = disc(radius, height, width)
    ends = neighbours((labels, upper, known), offsets)
    for place, ((a, b), (a_known, _), (_, b_known)) in zip(line_maxima(places, offsets), ends, strict=True):
        place.add_(a != b, alpha=total)
        place.masked_fill_(~(a_known & b_known), 2 * total)
        votes.index_add_(0, place.flatten(), one.expand(place.numel()))
    return votes[: 2 * total].view(2, images, height * width).movedim(1, 0).contiguous()


def inner(height: int, width: int, margin: int, device: torch.device) -> Tensor:
    """True for pixels at least ``margin`` pixels from the left, right and bottom border, bool, ``[H, W]``."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return (rows < height - margin)[:, None] & (columns >= margin) & (columns < width - margin)


register(
    "line_votes(Tensor ranks, Tensor labels, float radius, int ignore_index, int margin) -> Tensor",
    _line_votes,
    fake=lambda ranks, labels, radius, ignore_index, margin: ranks.new_empty(
        (len(ranks), 2, ranks.shape[1] * ranks.shape[2]), dtype=torch.int32
    ),
)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], ranks: Tensor, labels: Tensor, *settings: float
) -> tuple[Tensor, int]:
    tensors = (fold(t, d, info.batch_size) for t, d in zip((ranks, labels), in_dims[:2], strict=True))
    return torch.ops.segloss.line_votes(*tensors, *settings).unflatten(0, (info.batch_size, -1)), 0


torch.library.register_vmap("segloss::line_votes", _vmap)
