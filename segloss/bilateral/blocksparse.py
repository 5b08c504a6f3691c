"""Gaussian filter over pairs of pixel tiles: exact, or with only as many exact pairs as a tolerance asks for.

Pixels are ordered by a k-d tree in feature space and cut into tiles of about 128. Of pairs of tiles with provably
negligible weights only the mean weight counts (in :func:`guide_gradient` nothing); pairs of small tiles are expanded
about their centres (``farfield.py``); each of the others is visited once, for both its directions, since the kernel is
symmetric. Everything is a batched product of small matrices: no loop over pixels, and one Python step for some hundred
tile pairs.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.bilateral import farfield
from segloss.bilateral.gaussian import LOG2E, UNDERFLOW

_TILE = 128  # pixels per tile: smaller ones keep fewer pairs, larger ones multiply faster
_MOST_TILES = 2048  # per image; beyond that tiles grow, so that the table of pairs stays small
_CHUNK = 1 << 19  # pixel pairs at a time: the weights stay in cache
_NEGLIGIBLE = 1 / 16  # share of the tolerance for pairs of which only the mean weight counts
# Largest squared extent of a tile, in units of sigma, for which |a|^2 + |b|^2 - 2ab is accurate enough in place of
# |a - b|^2: rounding errors are this times the machine precision.
_COMPACT = {torch.float32: 64.0, torch.float64: 1e3}


class Tiles(NamedTuple):
    """Pixels of a batch of images, cut into tiles of equal size; tiles of image b are numbers b T to (b + 1) T - 1."""

    features: Tensor  # [B T, D, t]
    order: Tensor  # [B, T t]: pixel at each place; numbers from N on are padding
    batch: int
    pixels: int

    def gather(self, values: Tensor) -> Tensor:
        """``[B, K, N]`` to ``[B T, K, t]``; padding becomes 0."""
        padded = F.pad(values, (0, self.order.shape[1] - self.pixels))
        sorted_values = padded.gather(2, self.order[:, None].expand(-1, values.shape[1], -1))
        tiles = sorted_values.unflatten(2, (-1, self.features.shape[2])).transpose(1, 2)
        return tiles.flatten(0, 1).contiguous()

    def scatter(self, tiles: Tensor) -> Tensor:
        """``[B T, K, t]`` back to ``[B, K, N]``."""
        sorted_values = tiles.unflatten(0, (self.batch, -1)).transpose(1, 2).flatten(2)
        place = self.order.argsort(1)[:, None, : self.pixels]
        return sorted_values.gather(2, place.expand(-1, tiles.shape[1], -1))


def cut(features: Tensor) -> Tiles:
    """Orders the pixels of ``[B, D, N]`` by a k-d tree: halves along the widest dimension until tiles are small."""
    batch, dims, pixels = features.shape
    depth = max(0, round(math.log2(pixels / max(_TILE, pixels / _MOST_TILES))))
    size = -(-pixels // 2**depth)
    padding = size * 2**depth - pixels
    # Padding repeats pixels from all over the image, so that it does not fill tiles of its own.
    repeated = torch.arange(padding, device=features.device) * pixels // max(padding, 1)
    nodes = torch.cat([features, features[:, :, repeated]], 2).transpose(1, 2)
    order = torch.arange(pixels + padding, device=features.device).expand(batch, -1)
    for _ in range(depth):
        widest = (nodes.amax(1) - nodes.amin(1)).argmax(1)
        key = nodes.gather(2, widest[:, None, None].expand(-1, nodes.shape[1], 1))[:, :, 0]
        by_key = key.argsort(1)
        half = (2 * nodes.shape[0], nodes.shape[1] // 2)
        order = order.gather(1, by_key).reshape(half)
        nodes = nodes.gather(1, by_key[:, :, None].expand(-1, -1, dims)).reshape(*half, dims)
    tiles = nodes.transpose(1, 2).contiguous()
    return Tiles(tiles, order.reshape(batch, -1), batch, pixels)


def kept_pairs(tiles: Tiles, tolerance: float) -> tuple[Tensor, Tensor]:
    """Numbers (I, J), I <= J, of the tile pairs to visit; all pairs within the images for tolerance 0.

    Pairs are left out, least first, while an upper bound of their weights (from the distance of the bounding boxes)
    adds up to at most ``tolerance`` times a lower bound of all weights of the tile (Jensen's inequality for the mean
    over the pixels of two tiles). So the weights missing in a tile sum to at most ``tolerance`` of the tile's weights.
    """
    if tolerance == 0:
        count = tiles.features.shape[0] // tiles.batch
        return _pairs(torch.ones(tiles.batch, count, count, dtype=torch.bool, device=tiles.features.device))
    masks = []
    for features, real in _images(tiles):
        most, least = _bounds(features, real)
        masks.append(~_cheapest(most, tolerance * least))
    return _pairs(torch.stack(masks))


def _images(tiles: Tiles) -> Iterator[tuple[Tensor, Tensor]]:
    """Features ``[T, D, t]`` of each image, and ``[T, t]`` that is 0 at padding."""
    features = tiles.features.unflatten(0, (tiles.batch, -1))
    real = (tiles.order < tiles.pixels).to(features.dtype).unflatten(1, (features.shape[1], -1))
    return zip(features, real, strict=True)


def _pairs(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (I, J), I <= J, of the tile pairs in symmetric ``[B, T, T]`` masks."""
    image, first, second = keep.triu().nonzero(as_tuple=True)
    return image * keep.shape[1] + first, image * keep.shape[1] + second


def _bounds(tiles: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds ``[T, T]`` of the weights between two tiles, and lower ones ``[T]`` of all weights of a tile."""
    low, high = tiles.amin(2), tiles.amax(2)
    pixels = real.sum(1)
    share = (real / pixels.clamp(min=1)[:, None])[:, None]
    centre = (tiles * share).sum(2)
    spread = ((tiles - centre[:, :, None]).square() * share).sum((1, 2))
    gap = torch.zeros(len(tiles), len(tiles), dtype=tiles.dtype, device=tiles.device)
    between = spread[:, None] + spread
    for d in range(tiles.shape[1]):
        apart = torch.maximum(low[:, None, d] - high[:, d], low[:, d] - high[:, None, d])
        gap.addcmul_(apart.clamp_(min=0), apart)
        between.add_((centre[:, None, d] - centre[:, d]).square_())
    most = gap.div_(-2).exp_().mul_(pixels).mul_(pixels[:, None])
    # Every pixel has weight 1 with itself.
    least = between.div_(-2).exp_().mul_(pixels).sum(1).clamp_(min=1).mul_(pixels)
    return most, least


def _cheapest(cost: Tensor, budget: Tensor) -> Tensor:
    """Symmetric mask of pairs, none on the diagonal, whose costs ``[T, T]`` sum to at most the budget ``[T]``."""
    chosen = torch.empty_like(cost, dtype=torch.bool)
    rows = max(1, (1 << 20) // len(cost))
    for part, limit, out in zip(cost.split(rows), budget.split(rows), chosen.split(rows), strict=True):
        ascending, order = part.sort(1)
        out.scatter_(1, order, ascending.cumsum(1) <= limit[:, None])
    return (chosen & chosen.t()).fill_diagonal_(False)


class _Pairs(NamedTuple):
    """A chunk of P tile pairs with their weights; features are relative to the centre of the first tile."""

    first: Tensor  # [P]
    second: Tensor  # [P]
    a: Tensor  # [P, D, t]
    b: Tensor  # [P, D, t]
    weights: Tensor  # [P, t, t], halved for a tile with itself, which is visited for both its directions


def _weighted(tiles: Tiles, first: Tensor, second: Tensor) -> Iterator[_Pairs]:
    """The tile pairs in chunks."""
    features = tiles.features
    dims, size = features.shape[1:]
    centre = features.mean(2, keepdim=True)
    centred = features - centre
    extent = centred.square().sum(1).amax(1)
    compact = extent[first] + extent[second] <= _COMPACT[features.dtype]
    step = max(1, _CHUNK // size**2)
    buffer = features.new_empty((step, size, size))
    for group, accurate in ((compact, True), (~compact, False)):
        for i, j in zip(first[group].split(step), second[group].split(step), strict=True):
            weights = buffer[: len(i)]
            a = centred.index_select(0, i)
            b = features.index_select(0, j) - centre.index_select(0, i)
            half = (i == j).to(a.dtype)[:, None, None]
            if accurate:
                # One product gives the exponent in base 2: log2(e) (ab - aa/2 - bb/2) - [same tile].
                ones = torch.ones_like(a[:, :1])
                left = torch.cat([a * LOG2E, a.square().sum(1, keepdim=True) * (-LOG2E / 2), ones], 1)
                right = torch.cat([b, ones, b.square().sum(1, keepdim=True) * (-LOG2E / 2) - half], 1)
                torch.bmm(left.transpose(1, 2), right, out=weights)
            else:
                weights.copy_(-half.expand_as(weights))
                for d in range(dims):
                    weights.sub_((a[:, d, :, None] - b[:, d, None, :]).square_().mul_(LOG2E / 2))
            yield _Pairs(i, j, a, b, weights.clamp_(min=UNDERFLOW).exp2_())


def gaussian_filter(values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    """``values [B, K, N]`` times the kernel of ``features [B, D, N]``.

    The weights that are missing or wrong in a tile, added up as absolute values, are at most ``tolerance`` times all
    weights of the tile. For 0 every pair of pixels is visited.
    """
    if values.numel() == 0:
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    tiles = cut(features)
    v = tiles.gather(values)
    if tolerance == 0:
        out = torch.zeros_like(v)
        first, second = kept_pairs(tiles, 0)
    else:
        parts = [
            _approximate(part, *image, tolerance)
            for part, image in zip(v.unflatten(0, (tiles.batch, -1)), _images(tiles), strict=True)
        ]
        out = torch.cat([part for part, _ in parts])
        first, second = _pairs(torch.stack([near for _, near in parts]))
    return tiles.scatter(_add_near(out, v, tiles, first, second))


def _approximate(values: Tensor, features: Tensor, real: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """What ``values [T, K, t]`` of an image receive from pairs that need not be exact, and a mask of those that do."""
    far, near = _split(features, real, tolerance)
    return far.filtered(values), near


def _add_near(out: Tensor, values: Tensor, tiles: Tiles, first: Tensor, second: Tensor) -> Tensor:
    """Adds to ``out`` what the exact pairs of tiles (first, second) send to each other, ``[B T, K, t]``."""
    for pair in _weighted(tiles, first, second):
        out.index_add_(0, pair.first, torch.bmm(values.index_select(0, pair.second), pair.weights.transpose(1, 2)))
        out.index_add_(0, pair.second, torch.bmm(values.index_select(0, pair.first), pair.weights))
    return out


class _Far(NamedTuple):
    """The pairs of tiles of an image that need not be exact."""

    expansion: farfield.Expansion
    z: Tensor  # [T, T]
    expanded: Tensor  # [T, T], mask of the pairs that are expanded
    mean: Tensor  # [T, T]: the mean weight of negligible pairs, 0 for others

    def filtered(self, values: Tensor) -> Tensor:
        """What ``values [T, K, t]`` send by these pairs."""
        by_pixel = values.transpose(1, 2).contiguous()
        out = farfield.expanded_filter(by_pixel, self.expansion, self.z, self.expanded).transpose(1, 2)
        return out.contiguous().add_((self.mean @ values.sum(2))[:, :, None])


def _split(features: Tensor, real: Tensor, tolerance: float) -> tuple[_Far, Tensor]:
    """The pairs of tiles of an image that need not be exact, and a mask of those that do."""
    expansion = farfield.expand(features, real)
    first, second, z = farfield.sums(expansion)
    most, least = _bounds(features, real)
    upper = (2 * second).mul_(expansion.bound).add_(first).nan_to_num_(nan=math.inf, posinf=math.inf)
    most = torch.minimum(most, upper)
    known = expansion.bound.isfinite()
    least = torch.maximum(least, first.clamp(min=0).where(known, 0).sum(1))
    # Of negligible pairs only the sum over the two tiles is right, and then only within twice their weights.
    negligible = _cheapest(2 * most, tolerance * _NEGLIGIBLE * least)
    error = expansion.bound.mul(2).add_(1).mul_(second).nan_to_num_(nan=math.inf).masked_fill_(negligible, 0)
    expanded = _cheapest(error, tolerance * (1 - _NEGLIGIBLE) * least) & ~negligible
    pixels = real.sum(1).clamp(min=1)
    mean = first.add_(second).clamp_(min=0).minimum(most).where(negligible & known, 0) / pixels / pixels[:, None]
    return _Far(expansion, z, expanded, mean), ~(negligible | expanded)


def prepare(features: Tensor, tolerance: float) -> "Prepared":
    """:func:`gaussian_filter` for many values of the same ``features [B, D, N]``, N > 0."""
    tiles = cut(features)
    if tolerance == 0:
        return Prepared(tiles, [], *kept_pairs(tiles, 0))
    far, near = zip(*(_split(*image, tolerance) for image in _images(tiles)), strict=True)
    return Prepared(tiles, list(far), *_pairs(torch.stack(near)))


class Prepared(NamedTuple):
    """Tiles, and what to do with which pairs of them: all that the filter needs to know of the features."""

    tiles: Tiles
    far: list[_Far]  # one per image; none for tolerance 0
    first: Tensor  # [P]: numbers of the pairs of tiles that are exact
    second: Tensor

    def filtered(self, values: Tensor) -> Tensor:
        """:func:`gaussian_filter` of ``values [B, K, N]``."""
        v = self.tiles.gather(values)
        out = torch.zeros_like(v)
        if self.far:
            parts = v.unflatten(0, (self.tiles.batch, -1))
            out = torch.cat([far.filtered(part) for far, part in zip(self.far, parts, strict=True)])
        return self.tiles.scatter(_add_near(out, v, self.tiles, self.first, self.second))


def guide_gradient(grad: Tensor, values: Tensor, features: Tensor, tolerance: float) -> Tensor:
    """Gradient of ``(grad * gaussian_filter(values, features)).sum()`` with respect to ``features``, ``[B, D, N]``.

    For pixel p it is the sum over q of (g_p . v_q + v_p . g_q) W_pq (f_q - f_p), over the kept pairs.
    """
    if values.numel() == 0:
        return torch.zeros_like(features, memory_format=torch.contiguous_format)
    tiles = cut(features)
    gv, vg = tiles.gather(torch.cat([grad, values], 1)), tiles.gather(torch.cat([values, grad], 1))
    out = torch.zeros_like(tiles.features)
    for pair in _weighted(tiles, *kept_pairs(tiles, tolerance)):
        products = torch.bmm(gv.index_select(0, pair.first).transpose(1, 2), vg.index_select(0, pair.second))
        products.mul_(pair.weights)
        to_first = torch.bmm(pair.b, products.transpose(1, 2)) - pair.a * products.sum(2)[:, None]
        to_second = torch.bmm(pair.a, products) - pair.b * products.sum(1)[:, None]
        out.index_add_(0, pair.first, to_first).index_add_(0, pair.second, to_second)
    return tiles.scatter(out)
