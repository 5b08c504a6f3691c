"""Gaussian filter and its guide gradient in Triton: the method of ``blocksparse.py``, one program per tile of pixels.

For float32 a program walks the list of its tile (``kernel_tiles.py``) like flash attention: the exponents of 64 x 64
pixel pairs come from one half-precision product of 16 columns (for up to 5 features, 32 for up to 10), and the weights,
in half precision, multiply the values on tensor cores. Numbers are split into two half-precision limbs where one would
lose accuracy, so that errors are about 1e-5 of the sum of the absolute terms, and 5e-4 at worst, when the rounding of
the weights does not average out. Tiles too far out for products use differences of features instead. float64 uses no
tensor cores and is as accurate as the dtype.
"""

# Kernels are untyped.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from segloss.bilateral.kernel_tiles import (
    LOG2E,
    ROOT_LOG2E,
    Tiles,
    cut,
    kernel,
    listed,
    lists,
    matrix,
    placed,
    product_columns,
    vector,
)
from segloss.common.launching import launching_on

_LIFT = tl.constexpr(16384.0)  # largest value in limbs: the lower limb stays clear of the end of half precision
_TINY = tl.constexpr(1e-33)  # smaller numbers count as 0; its inverse times the lift is finite
_FULL_BLOCK = 8  # channels at a time without tensor cores


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
def _channels(block, image, pixel, real, pixels, channels, BLOCK: tl.constexpr):
    """Offsets of a block of the channels of the pixels of a tile in ``[B, K, N]``, and which of them are real."""
    channel = block * BLOCK + tl.arange(0, BLOCK)
    offsets = (image * channels + channel)[None, :] * pixels + pixel[:, None]
    return offsets, real[:, None] & (channel < channels)[None, :]


@kernel
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
    image, pixel, real = placed(row, order, order_stride, pixels, tiles, TILE)
    if SHARED:
        most = tl.zeros([BLOCK], tl.float32)
        for block in range(BLOCKS):
            source, mask = _channels(block, image, pixel, real, pixels, channels, BLOCK)
            v = tl.load(values + source, mask=mask, other=0.0)
            most = tl.maximum(most, tl.max(tl.abs(v), 0))
        shared = tl.max(most, 0)
        tl.store(scale + row, tl.where(shared > _TINY, shared, 0.0))
    for block in range(BLOCKS):
        source, mask = _channels(block, image, pixel, real, pixels, channels, BLOCK)
        v = tl.load(values + source, mask=mask, other=0.0)
        number = row.to(tl.int64) * BLOCKS + block
        if SHARED:
            largest = tl.zeros([BLOCK], tl.float32) + shared
        else:
            largest = tl.max(tl.abs(v), 0)
            tl.store(vector(scale, number, BLOCK), tl.where(largest > _TINY, largest, 0.0) * (1 / _LIFT))
        v *= tl.where(largest > _TINY, _LIFT / tl.maximum(largest, _TINY), 0.0)[None, :]
        limb = v.to(tl.float16)
        tl.store(matrix(upper, number, TILE, BLOCK), limb)
        tl.store(matrix(lower, number, TILE, BLOCK), (v - limb.to(tl.float32)).to(tl.float16))


@triton.jit
def _near_weights(q, half_q, key, half, other, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """The key of another tile, and the weights of the pairs with it, by a product."""
    k = tl.load(matrix(key, other, TILE, COLUMNS))
    exponent = tl.dot(q, tl.trans(k), half_q[:, None] + tl.load(vector(half, other, TILE))[None, :])
    return k, tl.exp2(exponent)


@triton.jit
def _far_weights(points, row, other, DIMS: tl.constexpr, TILE: tl.constexpr):
    """The weights of the pairs of two tiles, from differences of features."""
    square = tl.zeros([TILE, TILE], points.dtype.element_ty)
    for d in range(DIMS):
        own = tl.load(vector(points, row.to(tl.int64) * DIMS + d, TILE))
        apart = own[:, None] - tl.load(vector(points, other.to(tl.int64) * DIMS + d, TILE))[None, :]
        square += apart * apart
    return tl.exp2(square * (-0.5 * LOG2E))


@triton.jit
def _weighted_sum(
    weights, upper, lower, scale, other, block, TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """What a block of channels of another tile adds; from 0, since tensor cores round towards 0 in long sums."""
    weights = weights.to(tl.float16)
    number = other.to(tl.int64) * BLOCKS + block
    part = tl.dot(weights, tl.load(matrix(upper, number, TILE, BLOCK)))
    part = tl.dot(weights, tl.load(matrix(lower, number, TILE, BLOCK)), part)
    return part * tl.load(vector(scale, number, BLOCK))[None, :]


@kernel
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
    """A block of channels of a tile, filtered on tensor cores."""
    row, entries, counts = listed(entries, counts, first, tiles)
    block = tl.program_id(1)
    q = tl.load(matrix(query, row, TILE, COLUMNS))
    half_q = tl.load(vector(half, row, TILE))
    result = tl.zeros([TILE, BLOCK], tl.float32)
    for n in range(tl.load(counts)):
        other = tl.load(entries + n)
        _, weights = _near_weights(q, half_q, key, half, other, TILE, COLUMNS)
        result += _weighted_sum(weights, upper, lower, scale, other, block, TILE, BLOCK, BLOCKS)
    for n in range(tl.load(counts + 1)):
        other = tl.load(entries + tiles - 1 - n)
        weights = _far_weights(points, row, other, DIMS, TILE)
        result += _weighted_sum(weights, upper, lower, scale, other, block, TILE, BLOCK, BLOCKS)
    _store(result, order, order_stride, out, row, block, pixels, tiles, channels, TILE, BLOCK)


@triton.jit
def _store(
    result,
    order,
    order_stride,
    out,
    row,
    block,
    pixels,
    tiles,
    channels,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a block of the channels of a tile to its pixels."""
    image, pixel, real = placed(row, order, order_stride, pixels, tiles, TILE)
    target, mask = _channels(block, image, pixel, real, pixels, channels, BLOCK)
    tl.store(out + target, result, mask=mask)


@triton.jit
def _add_products(a_upper, a_lower, p, b_upper, b_lower, q, sum, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """sum + a_p b_q' for matrices in two limbs; the product of the lower ones is below rounding."""
    a = tl.load(matrix(a_upper, p, TILE, BLOCK))
    b = tl.trans(tl.load(matrix(b_upper, q, TILE, BLOCK)))
    sum = tl.dot(tl.load(matrix(a_lower, p, TILE, BLOCK)), b, sum)
    sum = tl.dot(a, tl.trans(tl.load(matrix(b_lower, q, TILE, BLOCK))), sum)
    return tl.dot(a, b, sum)


@triton.jit
def _slopes(
    g_upper,
    g_lower,
    g_scale,
    v_upper,
    v_lower,
    v_scale,
    row,
    other,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """g_p . v_q + v_p . g_q for the pairs of two tiles, and a number that it is relative to."""
    first = tl.zeros([TILE, TILE], tl.float32)
    second = tl.zeros([TILE, TILE], tl.float32)
    for block in range(BLOCKS):
        p = row.to(tl.int64) * BLOCKS + block
        q = other.to(tl.int64) * BLOCKS + block
        first = _add_products(g_upper, g_lower, p, v_upper, v_lower, q, first, TILE, BLOCK)
        second = _add_products(v_upper, v_lower, p, g_upper, g_lower, q, second, TILE, BLOCK)
    first_scale = tl.load(g_scale + row) * tl.load(v_scale + other)
    second_scale = tl.load(v_scale + row) * tl.load(g_scale + other)
    scale = tl.maximum(first_scale, second_scale)
    inverse = tl.where(scale > _TINY, 1.0 / tl.maximum(scale, _TINY), 0.0)
    first *= first_scale * inverse * (1 / _LIFT / _LIFT)
    return first + second * (second_scale * inverse * (1 / _LIFT / _LIFT)), scale


@triton.jit
def _pull(factors, points, row, other, DIMS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """sum_q factors_pq (f_q - f_p) over the pairs of two tiles, one column for each feature."""
    column = tl.arange(0, WIDTH)
    pull = tl.zeros([TILE, WIDTH], points.dtype.element_ty)
    for d in range(DIMS):
        own = tl.load(vector(points, row.to(tl.int64) * DIMS + d, TILE))
        apart = tl.load(vector(points, other.to(tl.int64) * DIMS + d, TILE))[None, :] - own[:, None]
        pull += tl.where((column == d)[None, :], tl.sum(factors * apart, 1)[:, None], 0.0)
    return pull


@kernel
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
    """The guide gradient of a tile on tensor cores."""
    row, entries, counts = listed(entries, counts, first, tiles)
    q = tl.load(matrix(query, row, TILE, COLUMNS))
    half_q = tl.load(vector(half, row, TILE))
    sums = tl.zeros([TILE, COLUMNS], tl.float32)
    for n in range(tl.load(counts)):
        other = tl.load(entries + n)
        k, weights = _near_weights(q, half_q, key, half, other, TILE, COLUMNS)
        slopes, scale = _slopes(g_upper, g_lower, g_scale, v_upper, v_lower, v_scale, row, other, TILE, BLOCK, BLOCKS)
        factors = slopes * weights
        limb = factors.to(tl.float16)
        part = tl.dot((factors - limb.to(tl.float32)).to(tl.float16), k)
        sums += tl.dot(limb, k, part) * scale
    pull = tl.zeros([TILE, WIDTH], tl.float32)
    for n in range(tl.load(counts + 1)):
        other = tl.load(entries + tiles - 1 - n)
        slopes, scale = _slopes(g_upper, g_lower, g_scale, v_upper, v_lower, v_scale, row, other, TILE, BLOCK, BLOCKS)
        factors = slopes * _far_weights(points, row, other, DIMS, TILE) * scale
        pull += _pull(factors, points, row, other, DIMS, WIDTH, TILE)
    # The columns of the key: f_q in two limbs, once more, and 1.
    column = tl.arange(0, COLUMNS)
    wide = tl.arange(0, WIDTH)
    total = tl.sum(tl.where((column == 3 * DIMS)[None, :], sums, 0.0), 1)
    for d in range(DIMS):
        own = tl.load(vector(points, row.to(tl.int64) * DIMS + d, TILE))
        both = ((column == d) | (column == d + DIMS))[None, :]
        near = tl.sum(tl.where(both, sums, 0.0), 1) * (1 / ROOT_LOG2E) - own * total
        pull += tl.where((wide == d)[None, :], near[:, None], 0.0)
    _store(pull, order, order_stride, out, row, 0, pixels, tiles, DIMS, TILE, WIDTH)


@triton.jit
def _entry(entries, n, front, tiles):
    """Number n of a list, which stands in two parts."""
    return tl.load(entries + tl.where(n < front, n, tiles - 1 - (n - front)))


@kernel
def _filter_full(
    points,
    arranged,
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
    """A block of channels of a tile, filtered in full precision."""
    row, entries, counts = listed(entries, counts, first, tiles)
    block = tl.program_id(1)
    inside = tl.arange(0, TILE)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros([TILE, BLOCK], points.dtype.element_ty)
    front = tl.load(counts)
    for n in range(front + tl.load(counts + 1)):
        other = _entry(entries, n, front, tiles)
        weights = _far_weights(points, row, other, DIMS, TILE)
        source = (other.to(tl.int64) * channels + channel)[None, :] * TILE + inside[:, None]
        v = tl.load(arranged + source, mask=(channel < channels)[None, :], other=0.0)
        result += tl.sum(weights[:, :, None] * v[None, :, :], 1)
    _store(result, order, order_stride, out, row, block, pixels, tiles, channels, TILE, BLOCK)


@kernel
def _guide_full(
    points,
    grad,
    arranged,
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
    """The guide gradient of a tile in full precision."""
    row, entries, counts = listed(entries, counts, first, tiles)
    pull = tl.zeros([TILE, WIDTH], points.dtype.element_ty)
    front = tl.load(counts)
    for n in range(front + tl.load(counts + 1)):
        other = _entry(entries, n, front, tiles)
        factors = tl.zeros([TILE, TILE], points.dtype.element_ty)
        for channel in range(channels):
            p = row.to(tl.int64) * channels + channel
            q = other.to(tl.int64) * channels + channel
            factors += tl.load(vector(grad, p, TILE))[:, None] * tl.load(vector(arranged, q, TILE))[None, :]
            factors += tl.load(vector(arranged, p, TILE))[:, None] * tl.load(vector(grad, q, TILE))[None, :]
        factors *= _far_weights(points, row, other, DIMS, TILE)
        pull += _pull(factors, points, row, other, DIMS, WIDTH, TILE)
    _store(pull, order, order_stride, out, row, 0, pixels, tiles, DIMS, TILE, WIDTH)


def _split_values(values: Tensor, tiles: Tiles, block: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values of each tile in two limbs, ``[B T, blocks, size, block]``, and their scales.

    The channels are padded to multiples of the block. Scales are ``[B T]`` if shared, else ``[B T, blocks, block]``.
    """
    batch, channels, pixels = values.shape
    blocks = triton.cdiv(channels, block)
    rows = batch * tiles.number
    upper, lower = (values.new_empty((rows, blocks, tiles.size, block), dtype=torch.float16) for _ in range(2))
    scale = values.new_empty((rows,) if shared else (rows, blocks, block))
    _split[(rows,)](
        values,
        tiles.order,
        tiles.order.stride(0),
        upper,
        lower,
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
    return upper, lower, scale


def _arrange_values(values: Tensor, tiles: Tiles) -> Tensor:
    """Values of each tile, ``[B T, K, size]``, 0 at padding."""
    channels, pixels = values.shape[1:]
    padded = values.new_zeros(*values.shape[:2], tiles.number * tiles.size)
    padded[:, :, :pixels] = values.gather(2, tiles.order[:, None].expand(-1, channels, -1))
    return padded.unflatten(2, (-1, tiles.size)).transpose(1, 2).contiguous()


def _block(channels: int, most: int) -> int:
    """Channels at a time: tensor cores take at least 16."""
    return min(most, max(16, triton.next_power_of_2(channels)))


def _config(table: dict[int, Config], features: Tensor) -> Config:
    return table.get(_capability(features.device), table[0]) if product_columns(features) else _FULL


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _launch(
    run: Any,
    inputs: Iterable[Tensor],
    tiles: Tiles,
    tolerance: float,
    config: Config,
    out: Tensor,
    *sizes: int,
    blocks: int = 1,
    **settings: int,
) -> None:
    """Runs a kernel over the lists of all tiles; ``inputs`` are its arguments before these, ``sizes`` the last ones."""
    place = (tiles.order, tiles.order.stride(0), out)
    sizes = (tiles.order.shape[1], tiles.number, *sizes)
    settings |= {"DIMS": tiles.points.shape[1], "TILE": tiles.size}
    settings |= {"num_warps": config.warps, "num_stages": config.stages}
    for first, *met in lists(tiles, tolerance):
        run[(len(met[0]), blocks)](*inputs, *met, *place, first, *sizes, **settings)


def gaussian_filter(values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    """``values [B, K, N]`` times the kernel of ``features [B, D, N]``, as in ``blocksparse.py``; float32 or float64."""
    if values.numel() == 0:
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    values, features = values.contiguous(), features.contiguous()
    channels = values.shape[1]
    out = torch.empty_like(values)
    config, columns = _config(_FILTER, features), product_columns(features)
    with launching_on(values.device):
        tiles = cut(features, tolerance, config.tile)
        if columns:
            block = _block(channels, 64)
            blocks = triton.cdiv(channels, block)
            split = _split_values(values, tiles, block, shared=False)
            inputs = (tiles.query, tiles.key, tiles.half, tiles.points, *split)
            settings = {"COLUMNS": columns, "BLOCK": block, "BLOCKS": blocks}
            _launch(_filter, inputs, tiles, tolerance, config, out, channels, blocks=blocks, **settings)
        else:
            blocks = triton.cdiv(channels, _FULL_BLOCK)
            full = (tiles.points, _arrange_values(values, tiles))
            _launch(_filter_full, full, tiles, tolerance, config, out, channels, blocks=blocks, BLOCK=_FULL_BLOCK)
    return out


def guide_gradient(grad: Tensor, values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    """Gradient of ``(grad * gaussian_filter(values, features)).sum()`` with respect to ``features``, ``[B, D, N]``.

    For pixel p it is the sum over q of (g_p . v_q + v_p . g_q) W_pq (f_q - f_p), over the same pairs as the filter.
    """
    if values.numel() == 0:
        return torch.zeros_like(features, memory_format=torch.contiguous_format)
    grad, values, features = grad.contiguous(), values.contiguous(), features.contiguous()
    channels, width = values.shape[1], triton.next_power_of_2(features.shape[1])
    out = torch.empty_like(features)
    config, columns = _config(_GUIDE, features), product_columns(features)
    with launching_on(values.device):
        tiles = cut(features, tolerance, config.tile)
        if columns:
            block = _block(channels, 32)
            split = [t for v in (grad, values) for t in _split_values(v, tiles, block, shared=True)]
            inputs = (tiles.query, tiles.key, tiles.half, tiles.points, *split)
            settings = {"WIDTH": width, "COLUMNS": columns, "BLOCK": block, "BLOCKS": triton.cdiv(channels, block)}
            _launch(_guide, inputs, tiles, tolerance, config, out, **settings)
        else:
            full = (tiles.points, *(_arrange_values(v, tiles) for v in (grad, values)))
            _launch(_guide_full, full, tiles, tolerance, config, out, channels, WIDTH=width)
    return out
