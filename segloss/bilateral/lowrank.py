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

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.bilateral.error import sample_pixels, sampled_error
from segloss.bilateral.gaussian import gaussian, is_compact, squared_distances
from segloss.bilateral.landmarks import choose_landmarks

_SMALLEST_BLOCK, _LARGEST_BLOCK = 4, 32  # pixels a side, in "auto" and always
_CHUNK = {"cpu": 1 << 19}  # exponentials at a time: they stay in cache
_CHUNK_ELSEWHERE = 1 << 27
_LARGEST_CORE = 1 << 26  # numbers at a time on the way to the core
MOST_LANDMARKS = 512
_SAFE = 0.8  # of the tolerance, for what the estimate of the error may miss
_SHARES = (0.35, 0.04)  # error of filtered probabilities / squared residual and / residual, on photographs
_HOPELESS = 0.03  # error / residual is never less
_EXHAUSTED = 0.1  # residual / the one asked for: that far below, landmarks are not what is missing
_PIXELS_A_LANDMARK = 64  # with fewer, visiting pairs of tiles is faster
_LEAST_FOR_BFLOAT16 = 5e-3  # tolerance
_RIDGES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-9, 1e-3)}  # least and largest; a tenth of the tolerance
_RARE = 0.5  # pixels with less weight to every landmark get the rest of their own weight back
_NARROW = 4096  # pixels beyond which blocks of a single pixel are refused


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

    def __init__(self, features: Tensor, width: int, landmarks: Tensor, tolerance: float, dtype: torch.dtype) -> None:
        """``features [C + 2, N]`` are colour and position as of :func:`guide_features`, ``landmarks`` ``[M, C]``."""
        colour, self.width, self.height = features[:-2], width, features.shape[1] // width
        self.landmarks, self.dtype = landmarks, dtype
        step = spacing(features, width)
        side = block_side(step, tolerance)
        down, right = (_axis(n, side, step, tolerance / 10) for n in (self.height, self.width))
        self.block = down.functions.shape[1], right.functions.shape[1]
        self.area = math.prod(self.block)  # of a block, in pixels
        self.rows, self.columns = len(down.vectors), len(right.vectors)
        self.points, self.compact = colour, is_compact(colour)
        self.inverse = self._inverse(tolerance)
        self._set_functions(down, right)
        self.colour = self._blocks(colour).permute(1, 3, 2, 4, 0).reshape(self.rows, self.columns, self.area, -1)
        self.near = torch.empty(self.colour.shape[:3], dtype=dtype, device=colour.device)

    def _inverse(self, tolerance: float) -> Tensor:
        """(K + ridge)^-1 in float64."""
        least, largest = _RIDGES[self.landmarks.dtype]
        z = self.landmarks.double()
        kernel = squared_distances(z, z).div_(-2).exp_()
        kernel.diagonal().add_(min(max(least, tolerance / 10), largest))
        return torch.cholesky_inverse(torch.linalg.cholesky(kernel))

    def _set_functions(self, down: Axis, right: Axis) -> None:
        """The functions of a block are products of total degree below 2: constant, and linear in one direction."""
        degree = len(down.functions)
        self.powers = [(i, j) for i in range(degree) for j in range(len(right.functions)) if i + j < 2]
        products = [torch.outer(down.functions[i], right.functions[j]).flatten() for i, j in self.powers]
        self.functions = torch.stack(products).to(self.landmarks)  # [F, area]
        across = right.vectors.new_zeros(self.columns, len(self.powers), degree, right.vectors.shape[2])
        for f, (i, j) in enumerate(self.powers):
            across[:, f, i] = right.vectors[:, j]
        self.across = across.flatten(2).flatten(0, 1).to(self.landmarks)  # [columns F, degree R_x]
        self.down = down.vectors.to(self.landmarks)  # [rows, degree, R_y]
        self.right = right.vectors.to(self.landmarks)

    def _blocks(self, maps: Tensor) -> Tensor:
        """``[K, N]`` to ``[K, rows, height, columns, width]`` of blocks, with zeros beyond the image."""
        down, right = self.block
        beyond = (0, self.columns * right - self.width, 0, self.rows * down - self.height)
        image = maps.view(len(maps), self.height, self.width)
        padded = F.pad(image, beyond) if any(beyond) else image
        return padded.view(len(maps), self.rows, down, self.columns, right)

    def _place(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of the block of each pixel, and the place inside it."""
        (y, x), (down, right) = (pixels // self.width, pixels % self.width), self.block
        return y // down, x // right, y % down * right + x % right

    def _chunks(self) -> list[tuple[slice, list[slice]]]:
        """Rows of blocks that are handled at a time, and blocks of each of them."""
        chunk = _CHUNK.get(self.landmarks.device.type, _CHUNK_ELSEWHERE)
        blocks = max(1, chunk // (self.area * len(self.landmarks)))
        rows = max(1, blocks // self.columns)
        parts = [slice(first, first + blocks) for first in range(0, self.columns, blocks)]
        return [(slice(first, first + rows), parts) for first in range(0, self.rows, rows)]

    def _exponentials(self, rows: slice, part: slice) -> Tensor:
        """B of some blocks, ``[rows, blocks, area, M]``."""
        x = self.colour[rows, part]
        weights = gaussian(x.flatten(0, 2), self.landmarks, compact=self.compact)
        return weights.view(*x.shape[:3], -1).to(self.dtype)

    def missing(self) -> Tensor:
        """D, ``[N]``: 1 - W^_pp at pixels far from every landmark, 0 elsewhere. After :meth:`gather`."""
        blocks = self.near.unflatten(2, self.block).transpose(1, 2).flatten(2).flatten(0, 1)
        rare = (blocks[: self.height, : self.width] < _RARE).flatten().nonzero()[:, 0]
        row, column, inside = self._place(rare)
        squares_down, squares_right = self.down @ self.down.transpose(1, 2), self.right @ self.right.transpose(1, 2)
        space = self.points.new_zeros(len(rare))
        for f, (i, j) in zip(self.functions, self.powers, strict=True):
            for g, (k, m) in zip(self.functions, self.powers, strict=True):
                space += f[inside] * g[inside] * squares_down[row, i, k] * squares_right[column, j, m]
        weights = gaussian(self.points[:, rare].t(), self.landmarks, compact=self.compact)
        colour = ((weights @ self.inverse.to(weights.dtype)) * weights).sum(1)
        return torch.zeros_like(self.points[0]).index_copy_(0, rare, (1 - space * colour).clamp_(0, 1))

    def parts(self, tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The channels that are handled at a time."""
        each = self.rows * self.across.shape[1] * len(self.landmarks)
        return tensor.split(max(1, _LARGEST_CORE // each), dim)

    def gather(self, values: Tensor) -> Tensor:
        """A' v, ``[K, N]`` to ``[R_y, R_x, K, M]``; notes how near each pixel is to a landmark."""
        classes, most = len(values), len(self.landmarks)
        blocks = self._blocks(values)
        sums = values.new_empty(self.rows, self.across.shape[1], classes * most)
        for rows, parts in self._chunks():
            products = []
            for part in parts:
                v = blocks[:, rows, :, part].permute(1, 3, 0, 2, 4)
                v = v.reshape(*v.shape[:2], 1, classes, self.area) * self.functions[:, None]
                weights = self._exponentials(rows, part)
                torch.amax(weights, 3, out=self.near[rows, part])
                products.append(v.flatten(2, 3).to(self.dtype) @ weights)
            along = torch.cat(products, 1).to(sums.dtype).view(-1, len(self.across), classes * most)
            torch.matmul(self.across.t(), along, out=sums[rows])
        core = self.down.flatten(0, 1).t() @ sums.view(self.rows * self.down.shape[1], -1)
        return core.view(len(core), -1, classes, most)

    def solve(self, core: Tensor) -> Tensor:
        """(K + ridge)^-1 from the right, in float64."""
        return (core.double() @ self.inverse).to(core.dtype)

    def expand(self, core: Tensor) -> Tensor:
        """A c, ``[R_y, R_x, K, M]`` to ``[K, N]``."""
        classes, most = core.shape[2:]
        down, right = self.block
        sums = (self.down.flatten(0, 1) @ core.flatten(1)).view(self.rows, -1, classes * most)
        out = core.new_empty(classes, self.rows, down, self.columns, right)
        for rows, parts in self._chunks():
            along = (self.across @ sums[rows]).view(-1, self.columns, len(self.functions) * classes, most)
            for part in parts:
                filtered = along[:, part].to(self.dtype) @ self._exponentials(rows, part).transpose(2, 3)
                filtered = filtered.unflatten(2, (-1, classes)) * self.functions[:, None]
                out[:, rows, :, part] = filtered.sum(2).unflatten(3, self.block).permute(2, 0, 3, 1, 4)
        image = out.view(classes, self.rows * down, -1)[:, : self.height, : self.width]
        return image.reshape(classes, -1)

    def expand_at(self, core: Tensor, pixels: Tensor) -> Tensor:
        """The same at some pixels ``[P]`` only, ``[K, P]``."""
        row, column, inside = self._place(pixels)
        space = core.new_zeros(len(pixels), core.shape[0], core.shape[1])
        for function, (i, j) in zip(self.functions, self.powers, strict=True):
            space += function[inside, None, None] * self.down[row, i, :, None] * self.right[column, j, None]
        weights = gaussian(self.colour[row, column, inside], self.landmarks, compact=self.compact)
        products = (space.flatten(1) @ core.flatten(2).flatten(0, 1)).view(len(pixels), *core.shape[2:])
        return torch.einsum("pkm,pm->kp", products, weights)


def spacing(features: Tensor, width: int) -> float:
    """Distance between neighbouring pixels in units of sigma_xy; 0 for a single pixel."""
    if features.shape[1] == 1:
        return 0.0
    return (features[-1, 1] - features[-1, 0] if width > 1 else features[-2, 1] - features[-2, 0]).item()


class Product(NamedTuple):
    """W^ v, on its way between core and pixels."""

    kernel: LowRank
    gathered: Tensor  # A' v, [R_y, R_x, K, M]
    solved: Tensor  # C A' v in the same basis
    own: Tensor  # D v, [K, N]

    def filtered(self) -> Tensor:
        """``[K, N]``."""
        return torch.cat([self.kernel.expand(part) for part in self.kernel.parts(self.solved, 2)]) + self.own

    def at(self, pixels: Tensor) -> Tensor:
        """``[K, P]``."""
        parts = self.kernel.parts(self.solved, 2)
        return torch.cat([self.kernel.expand_at(part, pixels) for part in parts]) + self.own[:, pixels]


def multiply(kernel: LowRank, values: Tensor) -> Product:
    """``values [K, N]`` times W^."""
    gathered = torch.cat([kernel.gather(part) for part in kernel.parts(values, 0)], 2)
    return Product(kernel, gathered, kernel.solve(gathered), kernel.missing() * values)


def choose(
    values: Tensor, features: Tensor, width: int, tolerance: float, full: bool, *, quick: bool
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
        landmarks, left = choose_landmarks(features[:-2], residual, most)
        reached = left[-1].item()
        if quick and (reached > residual or reached * _HOPELESS > tolerance):
            return None, math.inf
        product = multiply(LowRank(features, width, landmarks, tolerance, dtype), values)
        error = sampled_error(values, features, product.at(pixels), pixels)
        if error <= _SAFE * tolerance:
            return product, error
        if reached > residual or reached < _EXHAUSTED * residual or not math.isfinite(error):
            return None, error / _SAFE
        residual = min(residual, reached) * min(0.7, 0.7 * tolerance / error)


def _residual_for(error: float) -> float:
    """The residual at which the error is to be expected."""
    square, linear = _SHARES
    return (math.sqrt(linear**2 + 4 * square * error) - linear) / (2 * square)


def filter_with(
    values: Tensor, features: Tensor, width: int, landmarks: Tensor, tolerance: float, full: bool
) -> Tensor:
    """``values [K, N]`` times the W^ of given landmarks."""
    dtype = _product_dtype(values, tolerance, full)
    return multiply(LowRank(features, width, landmarks, tolerance, dtype), values).filtered()


def is_worth_trying(features: Tensor, width: int, tolerance: float) -> bool:
    """Whether the blocks are large enough to make the method faster than visiting pairs of pixels."""
    return block_side(spacing(features, width), tolerance) >= _SMALLEST_BLOCK


def is_too_narrow(features: Tensor, width: int, tolerance: float) -> bool:
    """Whether there would be nearly as many spatial functions as pixels, in an image of some size."""
    return features.shape[1] > _NARROW and block_side(spacing(features, width), tolerance) < 2


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
