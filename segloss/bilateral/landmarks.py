"""Landmark colours for the low-rank kernel: few colours that stand for all those of an image."""

import torch
from torch import Tensor

from segloss.bilateral.gaussian import gaussian, squared_distances

_SAMPLE = 2048  # pixels that landmarks are chosen among
_ROUND = 16  # landmarks chosen at a time
_REFINEMENTS = 4  # steps of k-means
_JITTER = 1e-5  # of the trace, so that equal colours chosen in one round do no harm


def choose_landmarks(colour: Tensor, residual: float, most: int) -> tuple[Tensor, Tensor]:
    """Up to ``most`` of the colours ``[C, N]``, in units of sigma, and the residuals ``[rounds]`` on the way.

    Pivots of a Cholesky decomposition of the colour kernel are drawn in rounds, with odds in proportion to what is left
    of its diagonal, until the mean of that is at most ``residual``: randomly pivoted Cholesky, which is close to the
    best Nystroem approximation. A few steps of k-means improve them. The same colours give the same landmarks.

    Returns:
        The landmarks ``[M, C]``, and the mean residual of the diagonal after each round, before k-means.

    Source:
        *Randomly pivoted Cholesky: practical approximation of a kernel matrix with few entry evaluations*.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    count = min(_SAMPLE, colour.shape[1])
    order = torch.randperm(colour.shape[1], generator=generator, device="cpu")[:count]
    x = colour[:, order.to(colour.device)].t().contiguous()
    left = torch.ones(count, dtype=x.dtype, device=x.device)
    factor = x.new_empty((min(most, count), count))
    pivots: list[Tensor] = []
    residuals: list[Tensor] = []
    done = 0
    while done < len(factor) and (not residuals or residuals[-1] > residual):
        odds = left.cpu().clamp(min=1e-12)
        new = torch.multinomial(odds, min(_ROUND, len(factor) - done), generator=generator).to(x.device)
        known = factor[:done]
        rows = gaussian(x[new], x, compact=False).addmm_(known[:, new].t(), known, alpha=-1)
        core = rows[:, new]
        core.diagonal().add_(_JITTER * core.diagonal().sum().clamp(min=1e-6))
        root = torch.linalg.cholesky_ex(core)[0]
        added = torch.linalg.solve_triangular(root, rows, upper=False)
        factor[done : done + len(new)] = added
        left = (left - added.square().sum(0)).clamp_(min=0)
        pivots.append(new)
        residuals.append(left.mean())
        done += len(new)
    return _refine(x, x[torch.cat(pivots)]), torch.stack(residuals)


def _refine(x: Tensor, centres: Tensor) -> Tensor:
    """k-means from good centres; those that are nearest to no colour, copies of others above all, are dropped."""
    ones = x.new_ones(len(x))
    for _ in range(_REFINEMENTS):
        nearest = squared_distances(x, centres).argmin(1)
        members = ones.new_zeros(len(centres)).index_add_(0, nearest, ones)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = (sums / members[:, None])[members > 0]
    return centres
