"""The Gaussian kernel on a permutohedral lattice: a filter whose cost is linear in pixels, whatever the sigmas.

Features of D dimensions lie in the plane of D + 1 coordinates that sum to 0. Its lattice has a simplex of D + 1
vertices around each pixel: values are spread to them (S'), blurred along the D + 1 directions of the lattice with the
weights 1/2, 1, 1/2 (B_j), and gathered again:

    W~ = c S B S' + E,    B = (B_0 B_1 ... B_D + B_D ... B_1 B_0) / 2

Only vertices of simplices with pixels exist, and in a lattice that is filled those between two of them, with a step to
each; the others hold 0. Directions then do not commute, but the mean of both orders is symmetric. The constant c is
that of the continuum, with which W~ has the scale of the Gaussian, and the diagonal E gives each pixel its weight of 1
with itself: exactly for D <= 2, and nearly for others.

A vertex has the coordinates (D + 1) n_i + k with integers n_i, its cell, and the same remainder k for all i. Its key is
one integer: k + (D + 1) (n_1 + L_1 (n_2 + L_2 (n_3 ...))) with the extents L_i of an image. Vertices of a simplex are
numbered by their remainders. A step from one to the next, or from the last to the first, is one along a direction, and
those of the D + 1 steps are all different.
"""

import math
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

_SCALE, _FILLED_SCALE = 1.02, 1.06  # at 1 the variances of both kernels agree, a little above it their shapes do
_MARGIN = 3  # cells around an image: vertices lie up to 1 below it, those that fill 1 beyond, neighbours 1 more
_FLAT = 0.1  # sigmas: features that differ by less are the same, to .5% of a weight
_FARTHEST = {torch.float32: 2.0**15, torch.float64: 2.0**40}  # from 0, in sigmas; places are accurate to .01 there
_UP, _DOWN = 1, -1  # orders of the blurs
_PART = 2**15  # pixels that are looked at together, to save memory
_CHANNELS = 32  # that are filtered together; larger arrays come from the system, page by page, again for each sum
_MOST_KEYS, _MOST_NUMBERS = 2**62, 2**31


class LatticeError(ValueError):
    """``method="lattice"`` cannot number the vertices of an image; the message names it."""


class Lattice:
    """W~ of one image, ``features [D, N]``, N > 0: what depends on the image alone is found once, for all values."""

    def __init__(self, features: Tensor, image: int = 0, *, filled: bool = False) -> None:
        """``image`` is its number in errors."""
        scale = _FILLED_SCALE if filled else _SCALE
        plane = _embed(_checked(features, image), scale)
        count, pixels = plane.shape
        low, steps = _numbering(plane, image)
        narrow = steps[-1] < 2**31
        keys = plane.new_empty((pixels, count), dtype=torch.int32 if narrow else torch.int64)
        ranks = torch.empty_like(plane, dtype=torch.int8)
        self._weights = torch.empty_like(plane.t(), memory_format=torch.contiguous_format)  # of S, with the root of c
        parts = [slice(first, first + _PART) for first in range(0, pixels, _PART)]
        for part in parts:
            corners, places, ranks[:, part] = _simplices(plane[:, part])
            self._weights[part] = _barycentric(places).mul_(math.sqrt(_constant(count - 1, scale))).t()
            keys[part] = _keys(corners - low, ranks[:, part], steps, keys.dtype).t()
        del plane
        self._vertices, starts, order, vertices = _numbered(keys)
        del keys
        if filled:
            vertices, places = _filled(vertices, steps[:-1])
            self._vertices = places.index_select(0, self._vertices.view(-1)).view(pixels, count)
            bags = starts.new_zeros(len(vertices) + 1).index_copy_(0, places.long(), starts.diff())
            starts = F.pad(bags.cumsum(0, dtype=torch.int32)[:-1], (1, 0))
        self._spread = order.to(torch.int32).div_(count, rounding_mode="floor"), starts, self._weights.flatten()[order]
        del order
        self._neighbours = _neighbours(vertices, steps[:-1])
        after = torch.cat([F.pad(pair[:, 0], (0, 1), value=len(vertices)) for pair in self._neighbours])
        own = [_diagonal(self._weights[part], ranks[:, part], self._vertices[part], after) for part in parts]
        self._rest = 1 - torch.cat(own)[:, None]  # E

    def filtered(self, values: Tensor, order: int | None = None) -> Tensor:
        """``[K, N]`` to the same; with the mean of both orders of the blurs, or with one of them."""
        rows = values.t().contiguous()
        pixels, starts, weights = self._spread
        spread = F.embedding_bag(pixels, rows, starts, mode="sum", per_sample_weights=weights)
        if order is None:
            blurred = self._blur(spread.clone(), _UP).add_(self._blur(spread, _DOWN)).div_(2)
        else:
            blurred = self._blur(spread, order)
        gathered = F.embedding_bag(self._vertices, blurred, mode="sum", per_sample_weights=self._weights)
        return gathered.addcmul_(self._rest, rows).t()

    def _blur(self, values: Tensor, order: int) -> Tensor:
        """In place; the last of the vertices is that of all that do not exist."""
        for pair in self._neighbours[::order]:
            values[:-1].add_(F.embedding_bag(pair, values, mode="sum"), alpha=0.5)
        return values


class Lattices:
    """W~ of a batch of images, ``features [B, D, N]``, N > 0.

    ``alternate``: every call has one order of the blurs, and the next one the other. For iterations, where a kernel
    that is symmetric in the mean of two calls does. ``filled``: with the vertices between two with pixels.
    """

    def __init__(self, features: Tensor, *, alternate: bool = False, filled: bool = False) -> None:
        self._lattices = [Lattice(image, b, filled=filled) for b, image in enumerate(features)]
        self._orders = cycle([_UP, _DOWN] if alternate else [None])

    def filtered(self, values: Tensor) -> Tensor:
        """``[B, K, N]`` to the same."""
        order = next(self._orders)
        filtered = torch.empty_like(values, memory_format=torch.contiguous_format)
        for lattice, image, result in zip(self._lattices, values, filtered, strict=True):
            for some, found in zip(image.split(_CHANNELS), result.split(_CHANNELS), strict=True):
                found.copy_(lattice.filtered(some, order))
        return filtered


def gaussian_filter(values: Tensor, features: Tensor) -> Tensor:
    """``values [B, K, N]`` times W~ of ``features [B, D, N]``."""
    if values.numel() == 0:
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    return Lattices(features).filtered(values)


def _checked(features: Tensor, image: int) -> Tensor:
    """The features that tell pixels apart: of others, a lattice has only errors."""
    low, high = torch.aminmax(features, dim=1)
    extents, reach = (high - low).tolist(), torch.maximum(-low, high).max().item()
    if not reach <= _FARTHEST[features.dtype]:  # nor NaN
        raise LatticeError(
            f"method: 'lattice' is not accurate on image {image}, where colours or places are {2 * reach:.2g} sigmas "
            "apart; expected a larger sigma_rgb or sigma_xy, or another method"
        )
    if (len(features) + 1) ** 2 * features.shape[1] >= _MOST_NUMBERS:
        raise LatticeError(f"method: 'lattice' is for fewer than {features.shape[1]} pixels; expected another method")
    return features[[i for i, extent in enumerate(extents) if extent > _FLAT]]


def _embed(features: Tensor, scale: float) -> Tensor:
    """Coordinates in the plane, ``[D + 1, N]``, in cells; the last dimensions of the features have the last ones."""
    dims = len(features)
    plane = features.new_empty((dims + 1, features.shape[1]))
    total = features.new_zeros(features.shape[1])
    for i in range(dims, 0, -1):
        feature = features[i - 1] * (math.sqrt(2 / 3) * scale / math.sqrt(i * (i + 1)))
        plane[i] = total - i * feature
        total += feature
    plane[0] = total
    return plane


def _numbering(plane: Tensor, image: int) -> tuple[Tensor, list[int]]:
    """The cell from which an image is numbered, ``[D + 1, 1]``, and how much one more along each coordinate adds.

    The last of the steps is the number of keys.
    """
    low, high = torch.aminmax(plane, dim=1, keepdim=True)
    low, high = low.floor() - _MARGIN, high.ceil() + _MARGIN
    extents = [int(cells) for cells in (high.double() - low)[1:, 0].tolist()]
    steps = [0, len(plane)]
    for extent in extents:
        steps.append(steps[-1] * extent)
    if steps[-1] >= _MOST_KEYS:
        raise LatticeError(
            f"method: 'lattice' cannot number the vertices of image {image}, which is {' x '.join(map(str, extents))} "
            "cells large; expected a larger sigma_rgb or sigma_xy, or another method"
        )
    return low, steps


def _simplices(plane: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pixel the cell of the vertex with remainder 0, the place from there, and the ranks of its coordinates."""
    count = len(plane)
    cells = plane.round()
    places = plane - cells
    excess = cells.sum(0).to(torch.int8)
    ranks = torch.arange(count, dtype=torch.int8, device=plane.device)[:, None].repeat(1, plane.shape[1])
    for i in range(count):
        for j in range(i + 1, count):
            lower = (places[i] < places[j]).view(torch.int8)
            ranks[i] += lower
            ranks[j] -= lower
    ranks += excess
    turn = (ranks < 0).to(torch.int8) - (ranks >= count).to(torch.int8)
    ranks += turn * count
    return cells + turn, places - turn, ranks


def _barycentric(places: Tensor) -> Tensor:
    """Weights of the vertices with remainders 0 to D, ``[D + 1, N]``."""
    ordered = list(places)
    for last in range(len(ordered) - 1, 0, -1):
        for i in range(last):
            ordered[i], ordered[i + 1] = (
                torch.maximum(ordered[i], ordered[i + 1]),
                torch.minimum(ordered[i], ordered[i + 1]),
            )
    falling = torch.stack(ordered).diff(dim=0).neg_().flip(0)
    return torch.cat([1 - falling.sum(0, keepdim=True), falling])


def _keys(cells: Tensor, ranks: Tensor, steps: list[int], dtype: torch.dtype) -> Tensor:
    """Keys of the vertices, ``[D + 1, N]``, from the cells of those with remainder 0."""
    keys = torch.zeros_like(cells, dtype=dtype)
    for i in range(1, len(cells)):
        keys[0].add_(cells[i].to(dtype), alpha=steps[i])
    for k in range(1, len(cells)):
        torch.add(keys[k - 1], 1, out=keys[k])
        for i in range(1, len(cells)):
            keys[k].add_(ranks[i] == len(cells) - k, alpha=-steps[i])
    return keys


def _numbered(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers of the keys ``[N, D + 1]`` in rising order, and these keys.

    Between both: where those of each number start in the order, followed by its length, which starts an empty one that
    stands for all vertices that do not exist; and the order, of flat keys.
    """
    ordered, order = keys.flatten().sort()
    first = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    starts = first.nonzero()[:, 0]
    numbers = torch.empty_like(keys, dtype=torch.int32)
    numbers.view(-1).scatter_(0, order, first.cumsum(0, dtype=torch.int32).sub_(1))
    return numbers, F.pad(starts.to(torch.int32), (0, 1), value=len(order)), order, ordered[starts]


def _beside(vertices: Tensor, steps: list[int], away: int) -> list[Tensor]:
    """Along each direction, the keys after (1) or before (-1) those of some vertices."""
    last = len(steps) - 1
    turns = vertices % len(steps) == (last if away == 1 else 0)
    along = vertices + away * torch.where(turns, sum(steps) - last, 1).to(vertices.dtype)
    return [along - away * step for step in steps]


def _filled(vertices: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
    """Sorted keys of ``vertices`` and of those that have two of these as neighbours, and where the former are.

    Along the last four directions: of colour and position, the other two add a fourth of the vertices, and little.
    """
    keys = torch.cat([vertices, vertices, *_beside(vertices, steps, 1)[-4:], *_beside(vertices, steps, -1)[-4:]])
    keys, counts = keys.sort().values.unique_consecutive(return_counts=True)
    filled = keys[counts >= 2]
    return filled, torch.searchsorted(filled, vertices, out_int32=True)


def _neighbours(vertices: Tensor, steps: list[int]) -> list[Tensor]:
    """Along each direction, those after and before each of ``vertices [M]``, sorted keys: ``[M, 2]``, M for none."""
    count = len(vertices)
    numbers = torch.arange(count, dtype=torch.int32, device=vertices.device)
    pairs = []
    for wanted in _beside(vertices, steps, 1):
        after = torch.searchsorted(vertices, wanted, out_int32=True)
        found = vertices.index_select(0, after.clamp(max=count - 1))
        after.masked_fill_(found != wanted, count)
        before = numbers.new_full((count + 1,), count).scatter_(0, after.long(), numbers)[:-1]
        pairs.append(torch.stack([after, before], 1))
    return pairs


def _constant(dims: int, scale: float) -> float:
    """Of the continuum: the integral of the Gaussian by that of the lattice's kernel, of unit density of pixels."""
    volume = 1.5 ** (dims / 2) / math.sqrt(dims + 1) / scale**dims
    return (2 * math.pi) ** (dims / 2) / (2 ** (dims + 1) * volume)


def _diagonal(weights: Tensor, ranks: Tensor, vertices: Tensor, after: Tensor) -> Tensor:
    """Of c S B S', ``[N]``: from vertices back to vertices of the same simplex, by paths of vertices that exist.

    Blurs lead m steps ahead of a vertex with the weight 2^-m, on two paths: along the directions of these steps by
    their numbers, up for one order of the blurs and down for the other. What leads behind is the same the other way
    round. Paths of up to 3 steps are looked up; longer ones are taken to exist with the square of the share of these.
    """
    weights, vertices = weights.t().contiguous(), vertices.t().contiguous()
    count = len(weights)
    missing = len(after) // count - 1
    along = torch.zeros_like(ranks)  # [D + 1, N]: directions of the steps
    for direction in range(1, count):
        for t in range(count):
            along[t].add_(ranks[direction] == count - 1 - t, alpha=direction)

    def step(vertex: Tensor, direction: Tensor) -> Tensor:
        return after.index_select(0, torch.add(vertex, direction, alpha=missing + 1))

    # Steps along x, y, z from each vertex: what comes after x, and after x and y, exists; "yz" comes after y, then z.
    x, y, z = along, along.roll(-1, 0), along.roll(-2, 0)
    to_y = [step(vertex, direction) for vertex, direction in zip(vertices, y, strict=True)]
    to_z = [step(vertex, direction) for vertex, direction in zip(vertices, z, strict=True)]
    has_y, has_xz = (torch.stack(to) != missing for to in (to_y, to_y[1:] + to_y[:1]))
    has_yz, has_zy = (
        torch.stack([step(vertex, direction) for vertex, direction in zip(to, second, strict=True)]) != missing
        for to, second in ((to_y, z), (to_z, y))
    )
    has_z = torch.stack(to_z) != missing
    paths = torch.where(
        (x < y) == (y < z),
        1 + has_zy.to(torch.int8),  # xyz and zyx
        torch.where((y < x) == (x < z), has_y, has_yz).to(torch.int8)  # yxz, else yzx
        + torch.where((y < x) == (x < z), has_z & has_xz, has_xz),  # zxy, else xzy
    )
    both = paths / 2  # the share of paths of 3 steps
    shares = [torch.ones_like(both), (1 + has_y.to(both.dtype)) / 2, both] + [both.square()] * (count - 3)
    total = weights.square().sum(0)
    for m, share in enumerate(shares[:count], 1):
        total += (share * weights * weights.roll(-m, 0)).sum(0) * 2.0 ** (1 - m)
    return total
