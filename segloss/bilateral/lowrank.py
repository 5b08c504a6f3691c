"""A symmetric positive semi-definite kernel of low rank in place of the Gaussian one.

With colours x and positions y, W_pq = exp(-|x_p - x_q|^2 / 2) exp(-|y_p - y_q|^2 / 2) is replaced by

    W^ = A C A' + D,    A = P o B,    C = G x (K + ridge)^-1

where B_pm = exp(-|x_p - z_m|^2 / 2) for some landmark colours z (Nystroem's method) with K the same between landmarks,
P are the constant and the linear functions on blocks of pixels, and G is the spatial kernel projected onto them.
The work is one matrix product for each block on the way to the core, A' v, and one on the way back: linear in the
number of pixels. Blocks are large where the spatial kernel is smooth, which makes the products several times smaller
than with the eigenvectors of the spatial kernel. B holds exponentials, all in [0, 1], and the inverse is regularised:
so bfloat16 is accurate enough for the large products. The diagonal D gives pixels of rare colours, far from every
landmark, their own weight of 1 back; since A C A' is never above W, D is never below 0.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.bilateral.error import sample_pixels, sampled_error
from segloss.bilateral.gaussian import gaussian, is_compact, squared_distances
from segloss.bilateral.guide import MOST_AXES
from segloss.bilateral.landmarks import choose_landmarks

_SMALLEST_BLOCK, _LARGEST_BLOCK = 4, 32  # pixels a side, in "auto" and always
_CHUNK = {"cpu": 1 << 19}  # exponentials at a time: they stay in cache
_CHUNK_ELSEWHERE = 1 << 27
_LARGEST_CORE = 1 << 26  # numbers at a time on the way to the core
MOST_LANDMARKS = 512
_SAFE = 0.8  # of the tolerance, for what the estimate of the error may miss
_SHARES = (0.35, 0.04)  # error of filtered probabilities / squared residual and / residual, on photographs
_HOPELESS = 0.03  # error / residual is never less
# Residual / the one asked for, by spatial dimensions: that far below, landmarks are not what is missing. The kernels of
# volumes are narrow, and there rare colours count as much as others.
_EXHAUSTED = {1: 0.1, 2: 0.1, 3: 1e-3}
_PIXELS_A_LANDMARK = 64  # with fewer, visiting pairs of tiles is faster
_LEAST_FOR_BFLOAT16 = 5e-3  # tolerance
_RIDGES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-9, 1e-3)}  # least and largest; a tenth of the tolerance
_RARE = 0.5  # pixels with less weight to every landmark get the rest of their own weight back
_NARROW = 4096  # pixels beyond which blocks of a single pixel are refused
_MOST_FUNCTIONS = 0.3  # of space, to a pixel of a volume; with more, pairs of tiles are as fast


class Axis(NamedTuple):
    """The spatial kernel along one side of an image, cut into blocks: of each, a constant and a linear function."""

    functions: Tensor  # [degree, width of a block], orthonormal
    vectors: Tensor  # [blocks, degree, R]: their product with their transpose is the projected kernel


def _axis(length: int, side: float, step: float, cutoff: float) -> Axis:
    """``step``: between neighbours, in units of sigma; ``cutoff``: eigenvalues left out, as a share of the largest.

    Blocks are about ``side`` pixels wide, all alike; the last may reach beyond the image. The projection is
    orthogonal: the kernel stays positive semi-definite and is the best that the functions allow.
    """
    widest = int(1.1 * side)
    block = -(-length // -(-length // widest))  # narrower where that fits the image better
    blocks, degree = -(-length // block), min(2, block)
    place = torch.arange(blocks * block, dtype=torch.float64, device="cpu")
    kernel = torch.exp((place[:, None] - place).mul_(step).square_().div_(-2))
    powers = (place[:block, None] - (block - 1) / 2) ** torch.arange(degree, device="cpu")
    functions = torch.linalg.qr(powers)[0].t().contiguous()
    kernel = kernel.view(blocks, block, blocks, block)
    projected = torch.einsum("ip,apbq,jq->aibj", functions, kernel, functions)
    values, vectors = torch.linalg.eigh(projected.reshape(blocks * degree, -1))
    kept = values > cutoff * values[-1]
    return Axis(functions, (vectors[:, kept] * values[kept].sqrt()).view(blocks, degree, -1))


def block_side(step: float, tolerance: float) -> float:
    """Pixels a side; linear functions are off by about .03 (block / sigma)^2, which may be a third of the tolerance."""
    return max(1.0, min(_LARGEST_BLOCK, math.sqrt(10 * tolerance) / max(step, 1e-6)))


class LowRank:
    """W^ of one image; ``dtype`` is that of the large products."""

    def __init__(
        self, features: Tensor, size: tuple[int, ...], landmarks: Tensor, tolerance: float, dtype: torch.dtype
    ) -> None:
        """``features [C + d, N]`` are colour and position as of :func:`guide_features`, ``landmarks`` ``[M, C]``."""
        colour, self.size = features[: -len(size)], size
        self.landmarks, self.dtype = landmarks, dtype
        axes = [
            _axis(length, block_side(step, tolerance), step, tolerance / 10)
            for length, step in zip(size, _steps(features, size), strict=True)
        ]
        self.block = tuple(axis.functions.shape[1] for axis in axes)
        self.area = math.prod(self.block)  # of a block, in pixels
        self.grid = tuple(len(axis.vectors) for axis in axes)  # of blocks
        self.points, self.compact = colour, is_compact(colour)
        self.inverse = self._inverse(tolerance)
        self._set_functions(axes)
        self.colour = self._blocks(colour).movedim(0, -1).reshape(*self.grid, self.area, -1)
        self.near = torch.empty(self.colour.shape[:-1], dtype=dtype, device=colour.device)

    def _inverse(self, tolerance: float) -> Tensor:
        """(K + ridge)^-1 in float64."""
        least, largest = _RIDGES[self.landmarks.dtype]
        z = self.landmarks.double()
        kernel = squared_distances(z, z).div_(-2).exp_()
        kernel.diagonal().add_(min(max(least, tolerance / 10), largest))
        return torch.cholesky_inverse(torch.linalg.cholesky(kernel))

    def _set_functions(self, axes: list[Axis]) -> None:
        """The functions of a block are products of total degree below 2: constant, and linear in one direction."""
        self.powers = _powers(axes)
        products = []
        for powers in self.powers:
            product = axes[0].functions[powers[0]]
            for axis, power in zip(axes[1:], powers[1:], strict=True):
                product = torch.outer(product, axis.functions[power]).flatten()
            products.append(product)
        self.functions = torch.stack(products).to(self.landmarks)  # [F, area]
        self.vectors = [axis.vectors.to(self.landmarks) for axis in axes]  # [blocks, degree, R] of each axis
        # Of each axis: from the functions of blocks along it to R times the functions of the axes before it.
        self.across = []
        for a, axis in enumerate(axes):
            before, here = _powers(axes[:a]), _powers(axes[: a + 1])
            across = axis.vectors.new_zeros(self.grid[a], len(here), len(before), axis.vectors.shape[2])
            for f, powers in enumerate(here):
                across[:, f, before.index(powers[:-1])] = axis.vectors[:, powers[-1]]
            self.across.append(across.flatten(2).flatten(0, 1).to(self.landmarks))

    def _blocks(self, maps: Tensor) -> Tensor:
        """``[K, N]`` to ``[K, *grid, *block]``, with zeros beyond the image."""
        beyond = [n * b - side for n, b, side in zip(self.grid, self.block, self.size, strict=True)]
        image = maps.view(-1, *self.size)
        padded = F.pad(image, [pad for n in reversed(beyond) for pad in (0, n)]) if any(beyond) else image
        return self._cut(padded)

    def _cut(self, padded: Tensor) -> Tensor:
        """View of maps of whole blocks as ``[K, *grid, *block]``."""
        cut = padded.view(-1, *(n for pair in zip(self.grid, self.block, strict=True) for n in pair))
        return cut.permute(0, *range(1, cut.dim(), 2), *range(2, cut.dim(), 2))

    def _pixels(self, blocks: Tensor) -> Tensor:
        """``[K, *grid, *block]`` to ``[K, N]``, without what is beyond the image."""
        axes = len(self.size)
        whole = blocks.permute(0, *(i for a in range(1, axes + 1) for i in (a, a + axes)))
        image = whole.reshape(-1, *(n * b for n, b in zip(self.grid, self.block, strict=True)))
        return image[(slice(None), *map(slice, self.size))].flatten(1)

    def _place(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Numbers along each axis of the block of each pixel, and the place inside it."""
        blocks: list[Tensor] = []
        inside, area = torch.zeros_like(pixels), 1
        for n, block in zip(reversed(self.size), reversed(self.block), strict=True):
            place, pixels = pixels % n, pixels // n
            blocks.insert(0, place // block)
            inside = inside + area * (place % block)
            area *= block
        return blocks, inside

    def _space(self, pixels: Tensor) -> Tensor:
        """P of some pixels ``[P]`` in the eigenvectors of the spatial kernel, ``[P, R]``."""
        blocks, inside = self._place(pixels)
        space = self.points.new_zeros(len(pixels), math.prod(vectors.shape[2] for vectors in self.vectors))
        for function, powers in zip(self.functions, self.powers, strict=True):
            product = function[inside, None]
            for vectors, block, power in zip(self.vectors, blocks, powers, strict=True):
                product = (product[:, :, None] * vectors[block, power][:, None]).flatten(1)
            space += product
        return space

    def _spans(self, axis: int) -> list[slice]:
        """The blocks along an axis that are handled at a time: whole lines, planes and so on, where they are few."""
        chunk = _CHUNK.get(self.landmarks.device.type, _CHUNK_ELSEWHERE)
        blocks = max(1, chunk // (self.area * len(self.landmarks)))
        span = max(1, blocks // math.prod(self.grid[axis + 1 :]))
        whole = self.grid[axis]
        return [slice(first, min(first + span, whole)) for first in range(0, whole, span)]

    def _exponentials(self, blocks: tuple[slice, ...]) -> Tensor:
        """B of some blocks, ``[*blocks, area, M]``."""
        x = self.colour[blocks]
        weights = gaussian(x.flatten(0, -2), self.landmarks, compact=self.compact)
        return weights.view(*x.shape[:-1], -1).to(self.dtype)

    def missing(self) -> Tensor:
        """D, ``[N]``: 1 - W^_pp at pixels far from every landmark, 0 elsewhere. After :meth:`gather`."""
        near = self._pixels(self.near.unflatten(-1, self.block)[None])[0]
        rare = (near < _RARE).nonzero()[:, 0]
        blocks, inside = self._place(rare)
        squares = [vectors @ vectors.transpose(1, 2) for vectors in self.vectors]
        space = self.points.new_zeros(len(rare))
        for f, here in zip(self.functions, self.powers, strict=True):
            for g, there in zip(self.functions, self.powers, strict=True):
                product = f[inside] * g[inside]
                for square, block, i, j in zip(squares, blocks, here, there, strict=True):
                    product = product * square[block, i, j]
                space += product
        weights = gaussian(self.points[:, rare].t(), self.landmarks, compact=self.compact)
        colour = ((weights @ self.inverse.to(weights.dtype)) * weights).sum(1)
        return torch.zeros_like(self.points[0]).index_copy_(0, rare, (1 - space * colour).clamp_(0, 1))

    def parts(self, tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The channels that are handled at a time."""
        first, *others = self.vectors
        each = math.prod(first.shape[:2]) * math.prod(vectors.shape[2] for vectors in others) * len(self.landmarks)
        return tensor.split(max(1, _LARGEST_CORE // each), dim)

    def gather(self, values: Tensor) -> Tensor:
        """A' v, ``[K, N]`` to ``[R, K, M]``; notes how near each pixel is to a landmark."""
        core = values.new_empty((self.across[0].shape[1], self._beyond(0) * len(values) * len(self.landmarks)))
        self._gather(self._blocks(values), (), core)
        return core.view(-1, len(values), len(self.landmarks))

    def _gather(self, blocks: Tensor, lines: tuple[slice, ...], out: Tensor) -> None:
        """Sums over some lines of ``blocks [K, *grid, *block]``, along the axes beyond those of the lines."""
        axis, classes, most = len(lines), len(blocks), len(self.landmarks)
        lengths = out.shape[:-2]
        if axis == len(self.grid) - 1:
            products = []
            for part in self._spans(axis):
                v = blocks[(slice(None), *lines, part)].movedim(0, len(self.grid))
                v = v.reshape(*v.shape[: len(self.grid)], 1, classes, self.area) * self.functions[:, None]
                weights = self._exponentials((*lines, part))
                torch.amax(weights, -1, out=self.near[(*lines, part)])
                products.append(v.flatten(-3, -2).to(self.dtype) @ weights)
            along = torch.cat(products, axis).to(out.dtype)
        else:
            columns = self._beyond(axis + 1) * classes * most
            along = out.new_empty((*lengths, self.grid[axis], self.across[axis + 1].shape[1], columns))
            for span in self._spans(axis):
                self._gather(blocks, (*lines, span), along.narrow(axis, span.start, span.stop - span.start))
        torch.matmul(self.across[axis].t(), along.view(*lengths, len(self.across[axis]), -1), out=out)

    def _beyond(self, axis: int) -> int:
        """Number of eigenvectors of the axes after this one, taken together."""
        return math.prod(vectors.shape[2] for vectors in self.vectors[axis + 1 :])

    def solve(self, core: Tensor) -> Tensor:
        """(K + ridge)^-1 from the right, in float64."""
        return (core.double() @ self.inverse).to(core.dtype)

    def expand(self, core: Tensor) -> Tensor:
        """A c, ``[R, K, M]`` to ``[K, N]``."""
        sides = (n for pair in zip(self.grid, self.block, strict=True) for n in pair)
        out = self._cut(core.new_empty((core.shape[1], *sides)))
        self._expand(core.reshape(self.across[0].shape[1], -1), (), out)
        return self._pixels(out)

    def _expand(self, sums: Tensor, lines: tuple[slice, ...], out: Tensor) -> None:
        """The way back of :meth:`_gather`, to the blocks of ``out [K, *grid, *block]``."""
        axis, classes, most = len(lines), len(out), len(self.landmarks)
        along = self.across[axis] @ sums
        if axis < len(self.grid) - 1:
            along = along.view(*sums.shape[:-2], self.grid[axis], self.across[axis + 1].shape[1], -1)
            for span in self._spans(axis):
                self._expand(along.narrow(axis, span.start, span.stop - span.start), (*lines, span), out)
            return
        along = along.view(*sums.shape[:-2], self.grid[axis], len(self.functions) * classes, most)
        for part in self._spans(axis):
            blocks = (*lines, part)
            few = along.narrow(axis, part.start, part.stop - part.start).to(self.dtype)
            filtered = few @ self._exponentials(blocks).transpose(-2, -1)
            filtered = filtered.unflatten(-2, (-1, classes)) * self.functions[:, None]
            out[(slice(None), *blocks)] = filtered.sum(-3).movedim(-2, 0).unflatten(-1, self.block)

    def expand_at(self, core: Tensor, pixels: Tensor) -> Tensor:
        """The same at some pixels ``[P]`` only, ``[K, P]``."""
        products = (self._space(pixels) @ core.flatten(1)).view(len(pixels), *core.shape[1:])
        weights = gaussian(self.points[:, pixels].t(), self.landmarks, compact=self.compact)
        return torch.einsum("pkm,pm->kp", products, weights)


def _powers(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    """Degrees along each axis of the functions of a block."""
    degrees = itertools.product(*(range(len(axis.functions)) for axis in axes))
    return [powers for powers in degrees if sum(powers) < 2]


def _steps(features: Tensor, size: tuple[int, ...]) -> list[float]:
    """Distance between neighbouring pixels along each axis, in units of sigma_xy; 0 for axes of a single pixel."""
    steps = []
    for axis, places in enumerate(features[-len(size) :]):
        next_one = math.prod(size[axis + 1 :])
        steps.append((places[next_one] - places[0]).item() if size[axis] > 1 else 0.0)
    return steps


class Product(NamedTuple):
    """W^ v, on its way between core and pixels."""

    kernel: LowRank
    gathered: Tensor  # A' v, [R, K, M]
    solved: Tensor  # C A' v in the same basis
    own: Tensor  # D v, [K, N]

    def filtered(self) -> Tensor:
        """``[K, N]``."""
        return torch.cat([self.kernel.expand(part) for part in self.kernel.parts(self.solved, 1)]) + self.own

    def at(self, pixels: Tensor) -> Tensor:
        """``[K, P]``."""
        parts = self.kernel.parts(self.solved, 1)
        return torch.cat([self.kernel.expand_at(part, pixels) for part in parts]) + self.own[:, pixels]


def multiply(kernel: LowRank, values: Tensor) -> Product:
    """``values [K, N]`` times W^."""
    gathered = torch.cat([kernel.gather(part) for part in kernel.parts(values, 0)], 1)
    return Product(kernel, gathered, kernel.solve(gathered), kernel.missing() * values)


def choose(
    values: Tensor, features: Tensor, size: tuple[int, ...], tolerance: float, full: bool, *, quick: bool
) -> tuple[Product | None, float]:
    """``values [K, N]`` times W^, with as few landmarks as the tolerance allows.

    The residual of the colour kernel makes a first guess, and the error on some pixels (:func:`sampled_error`) the
    verdict: on failure the next try has more landmarks. ``quick`` gives up where the residual leaves no hope.

    Returns:
        The product, or None where it misses the tolerance; the error of the last try, with a margin for the estimate.
    """
    if not all(t.sum().isfinite() or t.isfinite().all() for t in (values, features)):  # sums are faster
        return None, math.inf
    most = min(MOST_LANDMARKS, features.shape[1] // _PIXELS_A_LANDMARK) if quick else MOST_LANDMARKS
    residual, dtype = _residual_for(_SAFE * tolerance), _product_dtype(values, tolerance, full)
    pixels = sample_pixels(features.shape[1]).to(features.device)
    while True:
        landmarks, left = choose_landmarks(features[: -len(size)], residual, most)
        reached = left[-1].item()
        if quick and (reached > residual or reached * _HOPELESS > tolerance):
            return None, math.inf
        product = multiply(LowRank(features, size, landmarks, tolerance, dtype), values)
        error = sampled_error(values, features, product.at(pixels), pixels)
        if error <= _SAFE * tolerance:
            return product, error
        if reached > residual or reached < _EXHAUSTED[len(size)] * residual or not math.isfinite(error):
            return None, error / _SAFE
        residual = min(residual, reached) * min(0.7, 0.7 * tolerance / error)


def _residual_for(error: float) -> float:
    """The residual at which the error is to be expected."""
    square, linear = _SHARES
    return (math.sqrt(linear**2 + 4 * square * error) - linear) / (2 * square)


def filter_with(
    values: Tensor, features: Tensor, size: tuple[int, ...], landmarks: Tensor, tolerance: float, full: bool
) -> Tensor:
    """``values [K, N]`` times the W^ of given landmarks."""
    dtype = _product_dtype(values, tolerance, full)
    return multiply(LowRank(features, size, landmarks, tolerance, dtype), values).filtered()


def is_worth_trying(features: Tensor, size: tuple[int, ...], tolerance: float) -> bool:
    """Whether the blocks are large enough to make the method faster than visiting pairs of pixels, or functions few."""
    steps = _steps(features, size)
    return block_side(max(steps), tolerance) >= _SMALLEST_BLOCK or _are_few(steps)


def is_too_narrow(features: Tensor, size: tuple[int, ...], tolerance: float) -> bool:
    """Whether there would be nearly as many spatial functions as pixels, in an image of some size."""
    steps = _steps(features, size)
    return features.shape[1] > _NARROW and block_side(max(steps), tolerance) < 2 and not _are_few(steps)


def _are_few(steps: list[float]) -> bool:
    """Whether a volume has few spatial functions for its pixels, and the kernel of each pixel many pixels."""
    return len(steps) == MOST_AXES and math.prod(min(1.0, step) for step in steps) <= _MOST_FUNCTIONS


def _product_dtype(values: Tensor, tolerance: float, full: bool) -> torch.dtype:
    """bfloat16 where it is fast and its error, about 2e-3, fits the tolerance."""
    if full or values.dtype != torch.float32 or tolerance < _LEAST_FOR_BFLOAT16 or not _fast_bfloat16(values.device):
        return values.dtype
    return torch.bfloat16


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private: older versions of torch lack it
    return device.type == "cpu" and has is not None and has()
