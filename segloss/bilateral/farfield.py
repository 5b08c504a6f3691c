r"""Sums over pairs of small tiles by expansion about their centres: a few numbers per pixel and tile, none per pair.

For pixels c + a and e + b of two tiles with centres c and e, and d = c - e, the Gaussian kernel is

.. math:: W = E(a) E'(b) \exp(a \cdot b), \quad E(a) = \exp(-|d|^2/4 - d \cdot a - |a|^2/2), \quad
          E'(b) = \exp(-|d|^2/4 + d \cdot b - |b|^2/2)

and only exp(a.b) has to be expanded: to 1 + a.b + z s(a) s(b), where s is a quadratic form and the number z makes the
sum over the two tiles right to third order. What is left out is at most g(X) (a.b)^2 if abs(a.b) <= X, with
g(X) = (exp(X) - 1 - X) / X^2. The sums of E E', E E' a.b and E E' (a.b)^2 over all pixels of two tiles follow from the
moments of E over one tile and of E' over the other, so the bounds are sums over all pixels, not samples.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from segloss.bilateral.gaussian import LOG2E, UNDERFLOW

_LARGEST = 4.0  # radius of a tile that is expanded, in units of sigma
_MOST_DIMS = 8  # with more the second moments cost more than they save
_FAR = 1e4  # centres that are this far apart may as well be nearer: their weights underflow
_ROWS, _COLUMNS = 32, 64  # tiles, and partners of theirs, at a time: what they need stays in cache
_CHANNELS = 32  # of the values at a time: each takes the memory of D + 2


class Expansion(NamedTuple):
    """The T tiles of an image about their centres; 0 takes the place of a and s in tiles that are too large."""

    centre: Tensor  # [T, D]
    exponent: Tensor  # [T, t, D + 2]: times (d, 1, |d|^2) it is log2 E
    moments: Tensor  # [T, 1 + D + D (D + 1) / 2, t]: 1, a, and a a^T so that the product of two is (a.b)^2
    form: Tensor  # [D (D + 1) / 2]: s as a sum over a a^T
    basis: Tensor  # [T, t, D + 2]: 1, a, s
    bound: Tensor  # [T, T]: g(X), infinite if either tile is too large

    def factors(self, tiles: Tensor, partners: Tensor) -> Tensor:
        """E of every pixel of n tiles for each of m partners, ``[n, t, m]``."""
        d = self.centre.index_select(0, tiles)[:, :, None] - self.centre.index_select(0, partners).t()
        d.clamp_(-_FAR, _FAR)
        right = torch.cat([d, torch.ones_like(d[:, :1]), d.square().sum(1, keepdim=True)], 1)
        return torch.bmm(self.exponent.index_select(0, tiles), right).clamp_(min=UNDERFLOW).exp2_()


def expand(features: Tensor, real: Tensor) -> Expansion:
    """Expansion of tiles ``[T, D, t]``; ``real [T, t]`` is 0 for pixels that do not count."""
    dims = features.shape[1]
    centre = (features * (real / real.sum(1, keepdim=True).clamp(min=1))[:, None]).sum(2)
    a = features - centre[:, :, None]
    radius = a.square().sum(1).amax(1).sqrt()
    small = radius <= (_LARGEST if dims <= _MOST_DIMS else -1)
    a, radius = a.where(small[:, None, None], 0), radius.where(small, 0)
    ones, square = torch.ones_like(a[:, :1]), a.square().sum(1, keepdim=True)
    fall = (square / 2).where(real[:, None] > 0, _FAR)
    exponent = torch.cat([-a, -fall, -ones / 4], 1).transpose(1, 2).contiguous() * LOG2E
    i, j = torch.triu_indices(dims, dims, device=a.device)
    products = a[:, i] * a[:, j] * torch.where(i == j, 1.0, math.sqrt(2)).to(a)[:, None]
    # s(a) is a^T C a for the mean covariance C of the tiles: exact where all tiles are equally spread.
    form = products.mean((0, 2))
    form = form / (form @ form).clamp(min=torch.finfo(a.dtype).tiny)
    s = (products * form[:, None]).sum(1, keepdim=True)
    extent = a.abs().amax(2)
    largest = torch.minimum(extent @ extent.t(), torch.outer(radius, radius)).clamp_(min=1e-2)
    bound = ((largest.expm1() - largest) / largest.square()).where(small & small[:, None], math.inf)
    moments, basis = torch.cat([ones, a, products], 1), torch.cat([ones, a, s], 1).transpose(1, 2).contiguous()
    return Expansion(centre, exponent, moments, form, basis, bound)


def sums(tiles: Expansion) -> tuple[Tensor, Tensor, Tensor]:
    """Of each two tiles: the sum of E E' (1 + a.b), of E E' (a.b)^2 / 2, and z, each ``[T, T]``.

    The first is a lower bound of the sum of the weights, and this plus 2 g(X) times the second an upper one.
    """
    count, dims = tiles.centre.shape
    tables = [tiles.centre.new_empty((count, count)) for _ in range(3)]
    for start in range(0, count, _COLUMNS):
        for other in range(start, count, _COLUMNS):
            rows, columns = slice(start, start + _COLUMNS), slice(other, other + _COLUMNS)
            every = torch.arange(count, device=tiles.centre.device)
            here = torch.bmm(tiles.moments[rows], tiles.factors(every[rows], every[columns]))
            there = torch.bmm(tiles.moments[columns], tiles.factors(every[columns], every[rows]))
            product = here * there.permute(2, 1, 0)
            first, second = product[:, : 1 + dims].sum(1), product[:, 1 + dims :].sum(1) / 2
            s = torch.matmul(tiles.form, here[:, 1 + dims :]) * torch.matmul(tiles.form, there[:, 1 + dims :]).t()
            z = second / s.clamp_(min=torch.finfo(s.dtype).tiny)
            for table, block in zip(tables, (first, second, z), strict=True):
                table[rows, columns] = block
                table[columns, rows] = block.t()
    first, second, z = tables
    return first, second, z


def expanded_filter(values: Tensor, tiles: Expansion, z: Tensor, pairs: Tensor) -> Tensor:
    """``values [T, t, K]`` times the expanded weights of all tile pairs in the symmetric mask ``pairs [T, T]``."""
    parts = [_expanded_filter(part, tiles, z, pairs) for part in values.split(_CHANNELS, 2)]
    return torch.cat(parts, 2)


def _expanded_filter(values: Tensor, tiles: Expansion, z: Tensor, pairs: Tensor) -> Tensor:
    count, size, channels = values.shape
    terms = tiles.basis.shape[2]
    basis = tiles.basis[:, :, :, None]
    moments = (basis * values[:, :, None]).flatten(2)
    out = torch.empty_like(values)
    gathered = values.new_empty((_COLUMNS, size, terms * channels))
    for rows in torch.arange(count, device=values.device).split(_ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        received = moments.new_zeros(len(rows), size, terms * channels)
        for partners in pairs[part].any(0).nonzero()[:, 0].split(_COLUMNS):
            theirs = torch.index_select(moments, 0, partners, out=gathered[: len(partners)])
            sent = torch.bmm(tiles.factors(partners, rows).transpose(1, 2), theirs)
            sent[:, :, -channels:] *= z[part].index_select(1, partners).t()[:, :, None]
            factors = tiles.factors(rows, partners).mul_(pairs[part].index_select(1, partners)[:, None])
            received.baddbmm_(factors, sent.transpose(0, 1))
        out[part] = (received.unflatten(2, (terms, channels)) * basis[part]).sum(2)
    return out
