"""Pixels in tiles, and for each tile a list of the tiles that it meets, made on the device by Triton kernels.

Pixels are ordered by a Morton code in feature space and cut into tiles. Which pairs of tiles count is decided as in
``blocksparse.py``, from bounding boxes and means, but one tile at a time: nothing is as large as the table of pairs but
the lists, and those are made for a group of tiles at a time.
"""

# Kernels are untyped.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_DIMS_SORTED = 6  # features of a Morton code, the widest ones
_CODE_BITS = 30  # of a Morton code: half the sorting time of 60, and cells that are finer than a tile
_CODE_REACH = 64.0  # in sigmas: narrower features share one scale, wider ones must not drown them
_MOST_COLUMNS = 64  # of the product that gives the distances
_MOST_ENTRIES = 1 << 25  # of the tile lists at a time
# Largest |a|^2 + |b|^2 for which limbs of a and b, relative to the middle of the image, give |a - b|^2 / 2 to 1e-4.
_COMPACT = 1024.0
LOG2E = tl.constexpr(1.4426950408889634)
ROOT_LOG2E = tl.constexpr(1.2011224087864498)

# Launched from Python. What depends on these arguments are gathers and masks, which gain nothing from knowing that a
# number is a multiple of 16: so one build serves images of every size.
kernel = triton.jit(
    do_not_specialize=["features", "values", "out", "order_stride", "first", "pixels", "tiles", "channels", "dims"]
)


class Tiles(NamedTuple):
    """Pixels of a batch of images in tiles, T to an image; tile t of image b is row b T + t.

    At the end of an image the last tile is padded: features and what comes from them are 0 there.
    """

    number: int  # T
    size: int  # pixels
    order: Tensor  # [B, N]: pixel at each place
    points: Tensor  # [B T, D, size]: features relative to the middle of the image
    low: Tensor  # [B, D, T]
    high: Tensor  # [B, D, T]
    mean: Tensor  # [B, D, T]
    spread: Tensor  # [B, T]: mean square distance from the mean
    norm: Tensor  # [B, T]: largest square distance from the middle of the image
    query: Tensor  # [B T, size, columns], what the product for the distances needs
    key: Tensor  # [B T, size, columns]
    half: Tensor  # [B T, size]: -log2(e) / 2 of the square distance from the middle


@triton.jit
def vector(pointer, number, SIZE: tl.constexpr):
    """Addresses of the vector of this number in a stack of them: within it 32 bits are enough."""
    return pointer + number.to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def matrix(pointer, number, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of the matrix of this number in a stack of them."""
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return pointer + number.to(tl.int64) * (ROWS * COLUMNS) + place


@triton.jit
def placed(row, order, order_stride, pixels, tiles, TILE: tl.constexpr):
    """The image of a tile, its pixels, and which of these are real: the others are padding."""
    image = (row // tiles).to(tl.int64)
    place = row % tiles * TILE + tl.arange(0, TILE)
    real = place < pixels
    return image, tl.load(order + image * order_stride + place, mask=real, other=0), real


@triton.jit
def listed(entries, counts, first, tiles):
    """The tile of a program, and the addresses of its list and of the two counts of that."""
    line = tl.program_id(0)
    return first + line, entries + line.to(tl.int64) * tiles, counts + 2 * line


@kernel
def _morton(
    features,
    which,
    low,
    reach,
    codes,
    pixels,
    dims,
    WIDE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Morton codes of a block of pixels: the bits of their widest features, one of each in turn."""
    blocks = tl.cdiv(pixels, BLOCK)
    image = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = place < pixels
    code = tl.zeros([BLOCK], tl.int32)
    for d in tl.static_range(WIDE):
        entry = image * WIDE + d
        source = features + (image.to(tl.int64) * dims + tl.load(which + entry)) * pixels
        x = (tl.load(source + place, mask=real, other=0.0) - tl.load(low + entry)) / tl.load(reach + entry)
        cell = tl.minimum(tl.maximum(x, 0.0) * (1 << BITS), (1 << BITS) - 1.0).to(tl.int32)
        for bit in tl.static_range(BITS):
            code |= ((cell >> bit) & 1) << (bit * WIDE + WIDE - 1 - d)
    tl.store(codes + image.to(tl.int64) * pixels + place, code, mask=real)


@kernel
def _cut(
    features,
    middle,
    order,
    order_stride,
    points,
    low,
    high,
    mean,
    spread,
    norm,
    query,
    key,
    half,
    pixels,
    tiles,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All that :class:`Tiles` holds of one tile."""
    row = tl.program_id(0)
    image, pixel, real = placed(row, order, order_stride, pixels, tiles, TILE)
    tile = row % tiles
    count = tl.minimum(TILE, pixels - tile * TILE)
    square = tl.zeros([TILE], points.dtype.element_ty)
    total = tl.zeros([TILE], points.dtype.element_ty)
    for d in range(DIMS):
        line = image * DIMS + d
        x = tl.load(features + line * pixels + pixel, mask=real, other=0.0) - tl.load(middle + line)
        x = tl.where(real, x, 0.0)
        centre = tl.sum(x, 0) / count
        away = tl.where(real, x - centre, 0.0)
        square += x * x
        total += away * away
        tl.store(vector(points, row.to(tl.int64) * DIMS + d, TILE), x)
        tl.store(low + line * tiles + tile, tl.min(tl.where(real, x, float("inf")), 0))
        tl.store(high + line * tiles + tile, tl.max(tl.where(real, x, float("-inf")), 0))
        tl.store(mean + line * tiles + tile, centre)
    tl.store(spread + row, tl.sum(total, 0) / count)
    tl.store(norm + row, tl.max(square, 0))
    if COLUMNS > 0:
        # a.b for limbs a = ah + al: columns (ah, ah, al) of the query meet (bh, bl, bh) of the key. A last column of
        # the key counts pixels in the guide gradient.
        tl.store(vector(half, row, TILE), square * (-0.5 * LOG2E))
        column = tl.arange(0, COLUMNS)
        used = real[:, None] & (column < 3 * DIMS)[None, :]
        line = image * DIMS + column % DIMS
        x = tl.load(features + line[None, :] * pixels + pixel[:, None], mask=used, other=0.0)
        x = tl.where(used, (x - tl.load(middle + line)[None, :]) * ROOT_LOG2E, 0.0)
        x = tl.minimum(tl.maximum(x, -6e4), 6e4)  # what is beyond uses differences
        upper = x.to(tl.float16)
        lower = (x - upper.to(tl.float32)).to(tl.float16)
        tl.store(matrix(query, row, TILE, COLUMNS), tl.where((column < 2 * DIMS)[None, :], upper, lower))
        middle_third = (column >= DIMS) & (column < 2 * DIMS)
        ones = tl.where((column == 3 * DIMS)[None, :], 1.0, upper.to(tl.float32)).to(tl.float16)
        tl.store(matrix(key, row, TILE, COLUMNS), tl.where(middle_third[None, :], lower, ones))


@triton.jit
def _most(low, high, image, tile, others, present, tiles, DIMS: tl.constexpr):
    """Largest possible weight between a pixel of a tile and one of each other tile, by their bounding boxes."""
    gap = tl.zeros(others.shape, low.dtype.element_ty)
    for d in range(DIMS):
        line = (image * DIMS + d) * tiles
        above = tl.load(low + line + tile) - tl.load(high + line + others, mask=present, other=0.0)
        below = tl.load(low + line + others, mask=present, other=0.0) - tl.load(high + line + tile)
        apart = tl.maximum(tl.maximum(above, below), 0.0)
        gap += apart * apart
    return tl.exp2(gap * (-0.5 * LOG2E))


@kernel
def _thresholds(
    low,
    high,
    mean,
    spread,
    threshold,
    tolerance,
    octaves,
    pixels,
    tiles,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """The bound of a pair's weights below which a tile can do without all its pairs."""
    row = tl.program_id(0)
    image = (row // tiles).to(tl.int64)
    tile = row % tiles
    dtype = low.dtype.element_ty
    least = tl.zeros([BLOCK], dtype)
    for start in range(0, tiles, BLOCK):
        others = start + tl.arange(0, BLOCK)
        present = others < tiles
        between = tl.load(spread + row) + tl.load(spread + image * tiles + others, mask=present, other=0.0)
        for d in range(DIMS):
            line = mean + (image * DIMS + d) * tiles
            apart = tl.load(line + tile) - tl.load(line + others, mask=present, other=0.0)
            between += apart * apart
        count = tl.where(present, tl.minimum(TILE, pixels - others * TILE), 0)
        least += count * tl.exp2(between * (-0.5 * LOG2E))
    # Every pixel has weight 1 with itself. What rounding adds to the sums is far below 1e-4 of them.
    budget = tl.maximum(tl.sum(least, 0), 1.0) * tolerance * 0.9999
    # All that is below the last level fits the budget, nothing above the first does.
    level = budget * tl.exp2(-octaves / (LEVELS - 1) * tl.arange(0, LEVELS)).to(dtype)
    below = tl.zeros([LEVELS], dtype)
    for start in range(0, tiles, BLOCK):
        others = start + tl.arange(0, BLOCK)
        present = others < tiles
        count = tl.where(present, tl.minimum(TILE, pixels - others * TILE), 0)
        most = count * _most(low, high, image, tile, others, present, tiles, DIMS)
        below += tl.sum(tl.where(most[None, :] <= level[:, None], most[None, :], 0.0), 1)
    tl.store(threshold + row, tl.max(tl.where(below <= budget, level, 0.0), 0))


@kernel
def _list(
    low,
    high,
    norm,
    threshold,
    entries,
    counts,
    first,
    pixels,
    tiles,
    compact,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows that a tile meets: from the front those near enough for products, from the back the others."""
    row, entries, counts = listed(entries, counts, first, tiles)
    image = (row // tiles).to(tl.int64)
    tile = row % tiles
    own_count = tl.minimum(TILE, pixels - tile * TILE)
    own_threshold = tl.load(threshold + row)
    own_norm = tl.load(norm + row)
    front = 0
    back = 0
    for start in range(0, tiles, BLOCK):
        others = start + tl.arange(0, BLOCK)
        present = others < tiles
        weight = _most(low, high, image, tile, others, present, tiles, DIMS)
        count = tl.minimum(TILE, pixels - others * TILE)
        there = tl.load(threshold + image * tiles + others, mask=present, other=0.0)
        # Left out if both sides can do without: the kernel stays symmetric.
        drop = (count * weight <= own_threshold) & (own_count * weight <= there) & (others != tile)
        near = own_norm + tl.load(norm + image * tiles + others, mask=present, other=0.0) <= compact
        # The interpreter of Triton 3.3 has no negation of masks.
        near_kept = tl.where(drop, 0, (present & near).to(tl.int32))
        far_kept = tl.where(drop | near, 0, present.to(tl.int32))
        rows = row - tile + others
        tl.store(entries + front + tl.cumsum(near_kept, 0) - 1, rows, mask=near_kept > 0)
        tl.store(entries + tiles - back - tl.cumsum(far_kept, 0), rows, mask=far_kept > 0)
        front += tl.sum(near_kept, 0)
        back += tl.sum(far_kept, 0)
    tl.store(counts, front)
    tl.store(counts + 1, back)


def product_columns(features: Tensor) -> int:
    """Columns of the product that gives the distances; 0 if they come from differences."""
    columns = max(16, triton.next_power_of_2(3 * features.shape[1] + 1))
    return columns if features.dtype == torch.float32 and columns <= _MOST_COLUMNS else 0


def cut(features: Tensor, tolerance: float, size: int) -> Tiles:
    """Cuts ``[B, D, N]`` into tiles of ``size`` pixels, as they come for tolerance 0: all pairs are visited then."""
    batch, dims, pixels = features.shape
    low, high = torch.aminmax(features, dim=2)
    if tolerance == 0:
        order = torch.arange(pixels, device=features.device).expand(batch, -1)
    else:
        order = _sort(features, low, high - low)
    count = triton.cdiv(pixels, size)
    rows, columns = batch * count, product_columns(features)
    low_box, high_box, mean = (features.new_empty((batch, dims, count)) for _ in range(3))
    spread, norm = (features.new_empty((batch, count)) for _ in range(2))
    query, key = (features.new_empty((rows, size, columns), dtype=torch.float16) for _ in range(2))
    half = features.new_empty((rows, size if columns else 0))
    points = features.new_empty((rows, dims, size))
    made = (points, low_box, high_box, mean, spread, norm, query, key, half)
    middle = low / 2 + high / 2
    _cut[(rows,)](features, middle, order, order.stride(0), *made, pixels, count, DIMS=dims, TILE=size, COLUMNS=columns)
    return Tiles(count, size, order, *made)


def _sort(features: Tensor, low: Tensor, extent: Tensor) -> Tensor:
    """Order of the pixels of each image along a Morton curve through the widest features."""
    batch, dims, pixels = features.shape
    extents, which = extent.topk(min(dims, _DIMS_SORTED), 1)
    reach = torch.maximum(extents, extents[:, :1].clamp(1e-30, _CODE_REACH))
    codes = torch.empty(batch, pixels, dtype=torch.int32, device=features.device)
    wide = extents.shape[1]
    bits = min(_CODE_BITS // wide, 16)
    _morton[(triton.cdiv(pixels, 512) * batch,)](
        features, which, low.gather(1, which), reach, codes, pixels, dims, WIDE=wide, BITS=bits, BLOCK=512
    )
    return codes.argsort(stable=True, dim=1)


def lists(tiles: Tiles, tolerance: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For groups of rows: the first one, the rows that each of them meets, ``[rows, T]``, and how many, ``[rows, 2]``.

    Those that are close enough to the middle of the image for products stand in front, others at the end. Pairs are
    left out as in ``blocksparse.kept_pairs``, except that the largest negligible ones of a row are found to within a
    few percent. The memory is the same for every group: each must be used before the next one is asked for.
    """
    batch, dims, count = tiles.low.shape
    pixels = tiles.order.shape[1]
    sizes = {"DIMS": dims, "TILE": tiles.size}
    # All weights are at least 0: nothing is left out.
    threshold = torch.full_like(tiles.spread, -1)
    if tolerance > 0:
        octaves = math.log2(max(count, 2))
        bounds = (tiles.low, tiles.high, tiles.mean, tiles.spread)
        _thresholds[(batch * count,)](
            *bounds, threshold, tolerance, octaves, pixels, count, BLOCK=64, LEVELS=64, **sizes
        )
    rows = min(batch * count, max(1, _MOST_ENTRIES // count))
    entries = torch.empty(rows, count, dtype=torch.int32, device=tiles.low.device)
    counts = torch.empty(rows, 2, dtype=torch.int32, device=tiles.low.device)
    bounds = (tiles.low, tiles.high, tiles.norm, threshold)
    for first in range(0, batch * count, rows):
        part = slice(0, min(rows, batch * count - first))
        _list[(part.stop,)](*bounds, entries, counts, first, pixels, count, _COMPACT, BLOCK=256, **sizes)
        yield first, entries[part], counts[part]
