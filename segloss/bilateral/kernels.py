"""Gaussian filter and its guide gradient in Triton: the method of ``blocksparse.py``, one program per tile of pixels.

Pixels are ordered by a Morton code in feature space and cut into tiles; each tile has a list of the tiles that it
meets, made on the device. For float32 a program walks its list like flash attention: the exponents of 64 x 64 pixel
pairs come from one half-precision product of 16 columns (for up to 5 features), and the weights, in half precision,
multiply the values on tensor cores. Numbers are split into two half-precision limbs where one would lose accuracy, so
that errors are about 1e-5 of the sum of the absolute terms, and 5e-4 at worst, when the rounding of the weights does
not average out. Tiles too far out for products use differences of features instead. float64 uses no tensor cores and
is as accurate as the dtype.
"""

# Kernels are untyped.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
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
_LIFT = tl.constexpr(16384.0)  # largest value in limbs: the lower limb stays clear of the end of half precision
_TINY = tl.constexpr(1e-33)  # smaller numbers count as 0; its inverse times the lift is finite
_LOG2E = tl.constexpr(1.4426950408889634)
_ROOT_LOG2E = tl.constexpr(1.2011224087864498)


class Config(NamedTuple):
    """Launch settings of a kernel."""

    tile: int  # pixels
    warps: int
    stages: int


# By compute capability; others get the first.
_FILTER = {0: Config(64, 4, 2), 80: Config(64, 4, 3), 90: Config(64, 4, 3)}
_GUIDE = {0: Config(32, 2, 1), 80: Config(32, 2, 2), 90: Config(64, 4, 2)}
_FULL = Config(32, 4, 1)


@triton.jit
def _morton(
    features, which, low, reach, codes, pixels, stride, WIDE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    image = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = place < pixels
    code = tl.zeros([BLOCK], tl.int32)
    for d in tl.static_range(WIDE):
        entry = image * WIDE + d
        source = features + (image.to(tl.int64) * stride + tl.load(which + entry)) * pixels
        x = (tl.load(source + place, mask=real, other=0.0) - tl.load(low + entry)) / tl.load(reach + entry)
        cell = tl.minimum(tl.maximum(x, 0.0) * (1 << BITS), (1 << BITS) - 1.0).to(tl.int32)
        for bit in tl.static_range(BITS):
            code |= ((cell >> bit) & 1) << (bit * WIDE + WIDE - 1 - d)
    tl.store(codes + image.to(tl.int64) * pixels + place, code, mask=real)


@triton.jit
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
    row = tl.program_id(0)
    image = (row // tiles).to(tl.int64)
    tile = row % tiles
    place = tile * TILE + tl.arange(0, TILE)
    real = place < pixels
    count = tl.minimum(TILE, pixels - tile * TILE)
    pixel = tl.load(order + image * order_stride + place, mask=real, other=0)
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
        tl.store(points + line * tiles * TILE + place, x)
        tl.store(low + line * tiles + tile, tl.min(tl.where(real, x, float("inf")), 0))
        tl.store(high + line * tiles + tile, tl.max(tl.where(real, x, float("-inf")), 0))
        tl.store(mean + line * tiles + tile, centre)
    tl.store(spread + row, tl.sum(total, 0) / count)
    tl.store(norm + row, tl.max(square, 0))
    if COLUMNS > 0:
        # a.b for limbs a = ah + al: columns (ah, ah, al) of the query meet (bh, bl, bh) of the key. A last column of
        # the key counts pixels in the guide gradient.
        target = row.to(tl.int64) * TILE + tl.arange(0, TILE)
        tl.store(half + target, square * (-0.5 * _LOG2E))
        column = tl.arange(0, COLUMNS)
        used = column < 3 * DIMS
        line = image * DIMS + column % DIMS
        x = tl.load(features + line[None, :] * pixels + pixel[:, None], mask=real[:, None] & used[None, :], other=0.0)
        x = (x - tl.load(middle + line)[None, :]) * _ROOT_LOG2E
        x = tl.where(real[:, None] & used[None, :], x, 0.0)
        x = tl.minimum(tl.maximum(x, -6e4), 6e4)  # what is beyond uses differences
        upper = x.to(tl.float16)
        lower = (x - upper.to(tl.float32)).to(tl.float16)
        address = target[:, None] * COLUMNS + column[None, :]
        tl.store(query + address, tl.where((column < 2 * DIMS)[None, :], upper, lower))
        middle_third = (column >= DIMS) & (column < 2 * DIMS)
        ones = tl.where((column == 3 * DIMS)[None, :], 1.0, upper.to(tl.float32)).to(tl.float16)
        tl.store(key + address, tl.where(middle_third[None, :], lower, ones))


@triton.jit
def _most(low, high, image, tile, others, present, pixels, tiles, DIMS: tl.constexpr, TILE: tl.constexpr):
    """Largest possible weight between a pixel of a tile and one of each other tile, by their bounding boxes."""
    gap = tl.zeros(others.shape, low.dtype.element_ty)
    for d in range(DIMS):
        line = (image * DIMS + d) * tiles
        above = tl.load(low + line + tile) - tl.load(high + line + others, mask=present, other=0.0)
        below = tl.load(low + line + others, mask=present, other=0.0) - tl.load(high + line + tile)
        apart = tl.maximum(tl.maximum(above, below), 0.0)
        gap += apart * apart
    return tl.exp2(gap * (-0.5 * _LOG2E))


@triton.jit
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
        least += count * tl.exp2(between * (-0.5 * _LOG2E))
    # Every pixel has weight 1 with itself. What rounding adds to the sums is far below 1e-4 of them.
    budget = tl.maximum(tl.sum(least, 0), 1.0) * tolerance * 0.9999
    # All that is below the last level fits the budget, nothing above the first does.
    level = budget * tl.exp2(-octaves / (LEVELS - 1) * tl.arange(0, LEVELS)).to(dtype)
    below = tl.zeros([LEVELS], dtype)
    for start in range(0, tiles, BLOCK):
        others = start + tl.arange(0, BLOCK)
        present = others < tiles
        count = tl.where(present, tl.minimum(TILE, pixels - others * TILE), 0)
        most = count * _most(low, high, image, tile, others, present, pixels, tiles, DIMS, TILE)
        below += tl.sum(tl.where(most[None, :] <= level[:, None], most[None, :], 0.0), 1)
    tl.store(threshold + row, tl.max(tl.where(below <= budget, level, 0.0), 0))


@triton.jit
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
    line = tl.program_id(0)
    row = first + line
    image = (row // tiles).to(tl.int64)
    tile = row % tiles
    entries += line.to(tl.int64) * tiles
    own_count = tl.minimum(TILE, pixels - tile * TILE)
    own_threshold = tl.load(threshold + row)
    own_norm = tl.load(norm + row)
    front = 0
    back = 0
    for start in range(0, tiles, BLOCK):
        others = start + tl.arange(0, BLOCK)
        present = others < tiles
        weight = _most(low, high, image, tile, others, present, pixels, tiles, DIMS, TILE)
        count = tl.minimum(TILE, pixels - others * TILE)
        there = tl.load(threshold + image * tiles + others, mask=present, other=0.0)
        # Left out if both sides can do without: the kernel stays symmetric.
        drop = (count * weight <= own_threshold) & (own_count * weight <= there) & (others != tile)
        near = own_norm + tl.load(norm + image * tiles + others, mask=present, other=0.0) <= compact
        near_kept = (present & ~drop & near).to(tl.int32)
        far_kept = (present & ~drop & ~near).to(tl.int32)
        tl.store(entries + front + tl.cumsum(near_kept, 0) - 1, others, mask=near_kept > 0)
        tl.store(entries + tiles - back - tl.cumsum(far_kept, 0), others, mask=far_kept > 0)
        front += tl.sum(near_kept, 0)
        back += tl.sum(far_kept, 0)
    tl.store(counts + 2 * line, front)
    tl.store(counts + 2 * line + 1, back)


@triton.jit
def _split(
    values,
    order,
    order_stride,
    upper,
    lower,
    scale,
    pixels,
    tiles,
    channels,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Values of a tile in two half-precision limbs, relative to their largest, of each channel or of all (SHARED)."""
    row = tl.program_id(0)
    image = (row // tiles).to(tl.int64)
    place = (row % tiles) * TILE + tl.arange(0, TILE)
    real = place < pixels
    pixel = tl.load(order + image * order_stride + place, mask=real, other=0)
    target = row.to(tl.int64) * TILE + tl.arange(0, TILE)
    if SHARED:
        most = tl.zeros([BLOCK], tl.float32)
        for block in range(BLOCKS):
            channel = block * BLOCK + tl.arange(0, BLOCK)
            source = (image * channels + channel)[None, :] * pixels + pixel[:, None]
            v = tl.load(values + source, mask=real[:, None] & (channel < channels)[None, :], other=0.0)
            most = tl.maximum(most, tl.max(tl.abs(v), 0))
        shared = tl.max(most, 0)
        tl.store(scale + row, tl.where(shared > _TINY, shared, 0.0))
    for block in range(BLOCKS):
        channel = block * BLOCK + tl.arange(0, BLOCK)
        source = (image * channels + channel)[None, :] * pixels + pixel[:, None]
        v = tl.load(values + source, mask=real[:, None] & (channel < channels)[None, :], other=0.0)
        if SHARED:
            largest = tl.zeros([BLOCK], tl.float32) + shared
        else:
            largest = tl.max(tl.abs(v), 0)
            address = scale + row.to(tl.int64) * BLOCKS * BLOCK + channel
            tl.store(address, tl.where(largest > _TINY, largest, 0.0) * (1 / _LIFT))
        v *= tl.where(largest > _TINY, _LIFT / tl.maximum(largest, _TINY), 0.0)[None, :]
        limb = v.to(tl.float16)
        address = target[:, None] * (BLOCKS * BLOCK) + channel[None, :]
        tl.store(upper + address, limb)
        tl.store(lower + address, (v - limb.to(tl.float32)).to(tl.float16))


@triton.jit
def _exponent(points, stride, a, b, DIMS: tl.constexpr):
    """log2(weight) of the pairs of two tiles at places a and b, from differences."""
    exponent = tl.zeros([a.shape[0], b.shape[0]], points.dtype.element_ty)
    for d in range(DIMS):
        apart = tl.load(points + d * stride + a)[:, None] - tl.load(points + d * stride + b)[None, :]
        exponent -= apart * apart
    return exponent * (0.5 * _LOG2E)


@triton.jit
def _add_pull(pull, factors, points, stride, a, b, DIMS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds sum_q factors_pq (f_q - f_p) of the pairs of two tiles, one column for each feature."""
    column = tl.arange(0, WIDTH)
    for d in range(DIMS):
        apart = tl.load(points + d * stride + b)[None, :] - tl.load(points + d * stride + a)[:, None]
        pull += tl.where((column == d)[None, :], tl.sum(factors * apart, 1)[:, None], 0.0)
    return pull


@triton.jit
def _filter(
    query,
    key,
    half,
    points,
    upper,
    lower,
    scale,
    entries,
    counts,
    order,
    order_stride,
    out,
    first,
    pixels,
    tiles,
    channels,
    DIMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    line = tl.program_id(0)
    row = first + line
    image = (row // tiles).to(tl.int64)
    tile = row % tiles
    # Within an image 32 bits are enough.
    start = image * tiles * TILE
    query += start * COLUMNS
    key += start * COLUMNS
    half += start
    points += start * DIMS
    upper += start * (BLOCKS * BLOCK)
    lower += start * (BLOCKS * BLOCK)
    scale += image * tiles * (BLOCKS * BLOCK)
    entries += line.to(tl.int64) * tiles
    inside = tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tile * TILE + inside
    q = tl.load(query + place[:, None] * COLUMNS + column[None, :])
    half_q = tl.load(half + place)
    result = tl.zeros([TILE, BLOCK], tl.float32)
    # Every product of tiles starts from 0: tensor cores round towards 0 when they add to a long sum.
    for n in range(tl.load(counts + 2 * line)):
        other = tl.load(entries + n)
        there = other * TILE + inside
        k = tl.load(key + there[:, None] * COLUMNS + column[None, :])
        exponent = tl.dot(q, tl.trans(k), half_q[:, None] + tl.load(half + there)[None, :])
        weights = tl.exp2(exponent).to(tl.float16)
        address = there[:, None] * (BLOCKS * BLOCK) + channel[None, :]
        part = tl.dot(weights, tl.load(upper + address))
        part = tl.dot(weights, tl.load(lower + address), part)
        result += part * tl.load(scale + other * (BLOCKS * BLOCK) + channel)[None, :]
    for n in range(tl.load(counts + 2 * line + 1)):
        other = tl.load(entries + tiles - 1 - n)
        there = other * TILE + inside
        weights = tl.exp2(_exponent(points, tiles * TILE, place, there, DIMS)).to(tl.float16)
        address = there[:, None] * (BLOCKS * BLOCK) + channel[None, :]
        part = tl.dot(weights, tl.load(upper + address))
        part = tl.dot(weights, tl.load(lower + address), part)
        result += part * tl.load(scale + other * (BLOCKS * BLOCK) + channel)[None, :]
    real = place < pixels
    pixel = tl.load(order + image * order_stride + place, mask=real, other=0)
    target = out + (image * channels + channel)[None, :] * pixels + pixel[:, None]
    tl.store(target, result, mask=real[:, None] & (channel < channels)[None, :])


@triton.jit
def _dot(a_upper, a_lower, b_upper, b_lower, sum):
    """sum + a b' for matrices in two limbs; the product of the lower ones is below rounding."""
    sum = tl.dot(a_lower, tl.trans(b_upper), sum)
    sum = tl.dot(a_upper, tl.trans(b_lower), sum)
    return tl.dot(a_upper, tl.trans(b_upper), sum)


@triton.jit
def _slopes(
    g_upper,
    g_lower,
    v_upper,
    v_lower,
    g_scale,
    v_scale,
    place,
    there,
    tile,
    other,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """g_p . v_q + v_p . g_q for the pairs of two tiles, and a number that it is relative to."""
    first = tl.zeros([place.shape[0], there.shape[0]], tl.float32)
    second = tl.zeros([place.shape[0], there.shape[0]], tl.float32)
    for block in range(BLOCKS):
        channel = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        p = place[:, None] * (BLOCKS * BLOCK) + channel
        q = there[:, None] * (BLOCKS * BLOCK) + channel
        first = _dot(tl.load(g_upper + p), tl.load(g_lower + p), tl.load(v_upper + q), tl.load(v_lower + q), first)
        second = _dot(tl.load(v_upper + p), tl.load(v_lower + p), tl.load(g_upper + q), tl.load(g_lower + q), second)
    first_scale = tl.load(g_scale + tile) * tl.load(v_scale + other)
    second_scale = tl.load(v_scale + tile) * tl.load(g_scale + other)
    scale = tl.maximum(first_scale, second_scale)
    inverse = tl.where(scale > _TINY, 1.0 / tl.maximum(scale, _TINY), 0.0)
    first *= first_scale * inverse * (1 / _LIFT / _LIFT)
    return first + second * (second_scale * inverse * (1 / _LIFT / _LIFT)), scale


@triton.jit
def _guide(
    query,
    key,
    half,
    points,
    g_upper,
    g_lower,
    g_scale,
    v_upper,
    v_lower,
    v_scale,
    entries,
    counts,
    order,
    order_stride,
    out,
    first,
    pixels,
    tiles,
    DIMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    line = tl.program_id(0)
    row = first + line
    image = (row // tiles).to(tl.int64)
    tile = row % tiles
    start = image * tiles * TILE
    query += start * COLUMNS
    key += start * COLUMNS
    half += start
    points += start * DIMS
    g_upper += start * (BLOCKS * BLOCK)
    g_lower += start * (BLOCKS * BLOCK)
    g_scale += image * tiles
    v_upper += start * (BLOCKS * BLOCK)
    v_lower += start * (BLOCKS * BLOCK)
    v_scale += image * tiles
    entries += line.to(tl.int64) * tiles
    inside = tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    place = tile * TILE + inside
    q = tl.load(query + place[:, None] * COLUMNS + column[None, :])
    half_q = tl.load(half + place)
    sums = tl.zeros([TILE, COLUMNS], tl.float32)
    for n in range(tl.load(counts + 2 * line)):
        other = tl.load(entries + n)
        there = other * TILE + inside
        k = tl.load(key + there[:, None] * COLUMNS + column[None, :])
        exponent = tl.dot(q, tl.trans(k), half_q[:, None] + tl.load(half + there)[None, :])
        slopes, scale = _slopes(
            g_upper, g_lower, v_upper, v_lower, g_scale, v_scale, place, there, tile, other, BLOCK, BLOCKS
        )
        factors = slopes * tl.exp2(exponent)
        limb = factors.to(tl.float16)
        part = tl.dot((factors - limb.to(tl.float32)).to(tl.float16), k)
        sums += tl.dot(limb, k, part) * scale
    pull = tl.zeros([TILE, WIDTH], tl.float32)
    for n in range(tl.load(counts + 2 * line + 1)):
        other = tl.load(entries + tiles - 1 - n)
        there = other * TILE + inside
        slopes, scale = _slopes(
            g_upper, g_lower, v_upper, v_lower, g_scale, v_scale, place, there, tile, other, BLOCK, BLOCKS
        )
        factors = slopes * tl.exp2(_exponent(points, tiles * TILE, place, there, DIMS)) * scale
        pull = _add_pull(pull, factors, points, tiles * TILE, place, there, DIMS, WIDTH)
    real = place < pixels
    pixel = tl.load(order + image * order_stride + place, mask=real, other=0)
    wide = tl.arange(0, WIDTH)
    # The columns of the key: f_q in two limbs, once more, and 1.
    total = tl.sum(tl.where((column == 3 * DIMS)[None, :], sums, 0.0), 1)
    for d in range(DIMS):
        own = tl.load(points + d * tiles * TILE + place)
        both = (column == d) | (column == d + DIMS)
        near_part = tl.sum(tl.where(both[None, :], sums, 0.0), 1) * (1 / _ROOT_LOG2E) - own * total
        far_part = tl.sum(tl.where((wide == d)[None, :], pull, 0.0), 1)
        tl.store(out + (image * DIMS + d) * pixels + pixel, near_part + far_part, mask=real)


@triton.jit
def _filter_full(
    points,
    values,
    entries,
    counts,
    order,
    order_stride,
    out,
    first,
    pixels,
    tiles,
    channels,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0)
    row = first + line
    image = (row // tiles).to(tl.int64)
    tile = row % tiles
    points += image * tiles * TILE * DIMS
    order += image * order_stride
    entries += line.to(tl.int64) * tiles
    inside = tl.arange(0, TILE)
    place = tile * TILE + inside
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    plane = (image * channels + channel) * pixels
    result = tl.zeros([TILE, BLOCK], points.dtype.element_ty)
    front = tl.load(counts + 2 * line)
    for n in range(front + tl.load(counts + 2 * line + 1)):
        other = tl.load(entries + tl.where(n < front, n, tiles - 1 - (n - front)))
        there = other * TILE + inside
        real = there < pixels
        weights = tl.exp2(_exponent(points, tiles * TILE, place, there, DIMS))
        pixel = tl.load(order + there, mask=real, other=0)
        mask = real[:, None] & (channel < channels)[None, :]
        v = tl.load(values + plane[None, :] + pixel[:, None], mask=mask, other=0.0)
        result += tl.sum(weights[:, :, None] * v[None, :, :], 1)
    real = place < pixels
    pixel = tl.load(order + place, mask=real, other=0)
    tl.store(out + plane[None, :] + pixel[:, None], result, mask=real[:, None] & (channel < channels)[None, :])


@triton.jit
def _guide_full(
    points,
    grad,
    values,
    entries,
    counts,
    order,
    order_stride,
    out,
    first,
    pixels,
    tiles,
    channels,
    DIMS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    line = tl.program_id(0)
    row = first + line
    image = (row // tiles).to(tl.int64)
    tile = row % tiles
    points += image * tiles * TILE * DIMS
    order += image * order_stride
    entries += line.to(tl.int64) * tiles
    inside = tl.arange(0, TILE)
    place = tile * TILE + inside
    real = place < pixels
    pixel = tl.load(order + place, mask=real, other=0)
    pull = tl.zeros([TILE, WIDTH], points.dtype.element_ty)
    front = tl.load(counts + 2 * line)
    for n in range(front + tl.load(counts + 2 * line + 1)):
        other = tl.load(entries + tl.where(n < front, n, tiles - 1 - (n - front)))
        there = other * TILE + inside
        other_real = there < pixels
        other_pixel = tl.load(order + there, mask=other_real, other=0)
        factors = tl.zeros([TILE, TILE], points.dtype.element_ty)
        for channel in range(channels):
            plane = (image * channels + channel) * pixels
            g = tl.load(grad + plane + pixel, mask=real, other=0.0)
            v = tl.load(values + plane + pixel, mask=real, other=0.0)
            other_g = tl.load(grad + plane + other_pixel, mask=other_real, other=0.0)
            other_v = tl.load(values + plane + other_pixel, mask=other_real, other=0.0)
            factors += g[:, None] * other_v[None, :] + v[:, None] * other_g[None, :]
        factors *= tl.exp2(_exponent(points, tiles * TILE, place, there, DIMS))
        pull = _add_pull(pull, factors, points, tiles * TILE, place, there, DIMS, WIDTH)
    column = tl.arange(0, WIDTH)
    for d in range(DIMS):
        result = tl.sum(tl.where((column == d)[None, :], pull, 0.0), 1)
        tl.store(out + (image * DIMS + d) * pixels + pixel, result, mask=real)


class _Tiles(NamedTuple):
    """Pixels of a batch of images in tiles, T to an image; tile t of image b is row b T + t."""

    number: int  # T
    size: int  # pixels
    order: Tensor  # [B, N]: pixel at each place
    points: Tensor  # [B, D, T size]: sorted features, relative to the middle of the image
    low: Tensor  # [B, D, T]
    high: Tensor  # [B, D, T]
    mean: Tensor  # [B, D, T]
    spread: Tensor  # [B, T]: mean square distance from the mean
    norm: Tensor  # [B, T]: largest square distance from the middle of the image
    query: Tensor  # [B T size, columns], what the product for the distances needs
    key: Tensor  # [B T size, columns]
    half: Tensor  # [B T size]: -log2(e) / 2 of the square distance from the middle


def _columns(features: Tensor) -> int:
    """Columns of the product that gives the distances; 0 if they come from differences."""
    columns = max(16, triton.next_power_of_2(3 * features.shape[1] + 1))
    return columns if features.dtype == torch.float32 and columns <= _MOST_COLUMNS else 0


def _sort(features: Tensor, low: Tensor, extent: Tensor) -> Tensor:
    """Order of the pixels of each image along a Morton curve through the widest features."""
    batch, dims, pixels = features.shape
    wide, which = extent.topk(min(dims, _DIMS_SORTED), 1)
    reach = torch.maximum(wide, wide[:, :1].clamp(1e-30, _CODE_REACH))
    codes = torch.empty(batch, pixels, dtype=torch.int32, device=features.device)
    bits = min(_CODE_BITS // wide.shape[1], 16)
    _morton[(triton.cdiv(pixels, 512), batch)](
        features, which, low.gather(1, which), reach, codes, pixels, dims, WIDE=wide.shape[1], BITS=bits, BLOCK=512
    )
    return codes.argsort(stable=True, dim=1)


def _cut_tiles(features: Tensor, tolerance: float, size: int) -> _Tiles:
    batch, dims, pixels = features.shape
    low, high = torch.aminmax(features, dim=2)
    if tolerance == 0:
        order = torch.arange(pixels, device=features.device).expand(batch, -1)
    else:
        order = _sort(features, low, high - low)
    count = triton.cdiv(pixels, size)
    columns = _columns(features)
    boxes = features.new_empty(3, batch, dims, count)
    rows = features.new_empty(2, batch, count)
    pairs = torch.empty(2, batch * count * size, columns, dtype=torch.float16, device=features.device)
    half = features.new_empty(batch * count * size if columns else 0)
    points = features.new_empty(batch, dims, count * size)
    (low_box, high_box, mean), (spread, norm), (query, key) = boxes, rows, pairs
    tiles = _Tiles(count, size, order, points, low_box, high_box, mean, spread, norm, query, key, half)
    middle = low / 2 + high / 2
    _cut[(batch * count,)](
        features, middle, order, order.stride(0), *tiles[3:], pixels, count, DIMS=dims, TILE=size, COLUMNS=columns
    )
    return tiles


def _lists(tiles: _Tiles, tolerance: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For groups of rows: the first one, the tiles that each row meets, ``[rows, T]``, and how many, ``[rows, 2]``.

    Those that are close enough to the middle of the image for products stand in front, others at the end. Pairs are
    left out as in ``blocksparse.kept_pairs``, except that the largest negligible ones of a row are found to within a
    few percent.
    """
    batch, dims, count = tiles.low.shape
    pixels = tiles.order.shape[1]
    sizes = {"DIMS": dims, "TILE": tiles.size}
    # All weights are at least 0: nothing is left out.
    threshold = torch.full_like(tiles.spread, -1)
    if tolerance > 0:
        _thresholds[(batch * count,)](
            tiles.low,
            tiles.high,
            tiles.mean,
            tiles.spread,
            threshold,
            tolerance,
            math.log2(max(count, 2)),
            pixels,
            count,
            BLOCK=64,
            LEVELS=64,
            **sizes,
        )
    rows = min(batch * count, max(1, _MOST_ENTRIES // count))
    entries = torch.empty(rows, count, dtype=torch.int32, device=tiles.low.device)
    counts = torch.empty(rows, 2, dtype=torch.int32, device=tiles.low.device)
    for first in range(0, batch * count, rows):
        part = slice(0, min(rows, batch * count - first))
        _list[(part.stop,)](
            tiles.low,
            tiles.high,
            tiles.norm,
            threshold,
            entries,
            counts,
            first,
            pixels,
            count,
            _COMPACT,
            BLOCK=256,
            **sizes,
        )
        yield first, entries[part], counts[part]


def _split_values(values: Tensor, tiles: _Tiles, block: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values at the places of the tiles in two limbs, ``[B T size, K']``, and their scales, ``[B T]`` or ``[B T, K']``.

    K' is K in multiples of the block.
    """
    batch, channels, pixels = values.shape
    blocks = triton.cdiv(channels, block)
    rows = batch * tiles.number
    limbs = torch.empty(2, rows * tiles.size, blocks * block, dtype=torch.float16, device=values.device)
    scale = values.new_empty((rows,) if shared else (rows, blocks * block))
    _split[(rows,)](
        values,
        tiles.order,
        tiles.order.stride(0),
        *limbs,
        scale,
        pixels,
        tiles.number,
        channels,
        SHARED=shared,
        TILE=tiles.size,
        BLOCK=block,
        BLOCKS=blocks,
        num_warps=block // 8,
    )
    return limbs[0], limbs[1], scale


def _block(channels: int, most: int) -> int:
    """Channels at a time: tensor cores take at least 16."""
    return min(most, max(16, triton.next_power_of_2(channels)))


def _config(table: dict[int, Config], features: Tensor) -> Config:
    if not _columns(features):
        return _FULL
    return table.get(_capability(features.device), table[0])


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; the interpreter, for tests, runs on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def gaussian_filter(values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    """``values [B, K, N]`` times the kernel of ``features [B, D, N]``, as in ``blocksparse.py``; float32 or float64."""
    if values.numel() == 0:
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    values, features = values.contiguous(), features.contiguous()
    (_, channels, pixels), dims = values.shape, features.shape[1]
    out = torch.empty_like(values)
    config = _config(_FILTER, features)
    launch = {"TILE": config.tile, "num_warps": config.warps, "num_stages": config.stages}
    with _on(values.device):
        tiles = _cut_tiles(features, tolerance, config.tile)
        place = (tiles.order, tiles.order.stride(0), out)
        columns = _columns(features)
        if columns:
            block = _block(channels, 64)
            blocks = triton.cdiv(channels, block)
            split = _split_values(values, tiles, block, shared=False)
        for first, entries, counts in _lists(tiles, tolerance):
            sizes = (first, pixels, tiles.number, channels)
            if columns:
                _filter[(len(entries), blocks)](
                    tiles.query,
                    tiles.key,
                    tiles.half,
                    tiles.points,
                    *split,
                    entries,
                    counts,
                    *place,
                    *sizes,
                    DIMS=dims,
                    COLUMNS=columns,
                    BLOCK=block,
                    BLOCKS=blocks,
                    **launch,
                )
            else:
                _filter_full[(len(entries), triton.cdiv(channels, 8))](
                    tiles.points, values, entries, counts, *place, *sizes, DIMS=dims, BLOCK=8, **launch
                )
    return out


def guide_gradient(grad: Tensor, values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    """Gradient of ``(grad * gaussian_filter(values, features)).sum()`` with respect to ``features``, ``[B, D, N]``.

    For pixel p it is the sum over q of (g_p . v_q + v_p . g_q) W_pq (f_q - f_p), over the same pairs as the filter.
    """
    if values.numel() == 0:
        return torch.zeros_like(features, memory_format=torch.contiguous_format)
    grad, values, features = grad.contiguous(), values.contiguous(), features.contiguous()
    (_, channels, pixels), dims = values.shape, features.shape[1]
    out = torch.empty_like(features)
    config = _config(_GUIDE, features)
    launch = {"TILE": config.tile, "num_warps": config.warps, "num_stages": config.stages}
    with _on(values.device):
        tiles = _cut_tiles(features, tolerance, config.tile)
        place = (tiles.order, tiles.order.stride(0), out)
        columns = _columns(features)
        width = triton.next_power_of_2(dims)
        if columns:
            block = _block(channels, 32)
            g = _split_values(grad, tiles, block, shared=True)
            v = _split_values(values, tiles, block, shared=True)
        for first, entries, counts in _lists(tiles, tolerance):
            sizes = (first, pixels, tiles.number)
            if columns:
                _guide[(len(entries),)](
                    tiles.query,
                    tiles.key,
                    tiles.half,
                    tiles.points,
                    *g,
                    *v,
                    entries,
                    counts,
                    *place,
                    *sizes,
                    DIMS=dims,
                    WIDTH=width,
                    COLUMNS=columns,
                    BLOCK=block,
                    BLOCKS=triton.cdiv(channels, block),
                    **launch,
                )
            else:
                _guide_full[(len(entries),)](
                    tiles.points,
                    grad,
                    values,
                    entries,
                    counts,
                    *place,
                    *sizes,
                    channels,
                    DIMS=dims,
                    WIDTH=width,
                    **launch,
                )
    return out
