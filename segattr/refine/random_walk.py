"""Random walk: carry the scores of maps to the pixels that belong with them."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segloss.common.checks import (
    check_finite,
    check_floating,
    check_fractions,
    check_has_values,
    check_int,
    check_like,
    check_number,
    check_tensor,
    require,
    shape_text,
)
from segloss.common.reduction import wide_dtype


def random_walk(
    maps: Tensor, affinity: Tensor, *, beta: float = 10.0, steps: int = 256, boundary: Tensor | None = None
) -> Tensor:
    r"""Propagate maps by a random walk: in each step a pixel takes the mean of its partners, weighted by affinity.

    .. math:: M' = T^t M, \quad T_{ij} = \frac{W_{ij}^\beta}{\sum_k W_{ik}^\beta}

    with the affinities W of pixels i and j. Scores stay between the least and the largest of their map, and a constant
    map stays as it is.

    The power :math:`T^t` is never formed: t products of a sparse matrix with the maps take a fraction of the time of
    squaring a dense one, and memory grows with the pairs of pixels, not with the square of the image.

    The authors' public codes divide by the sums of columns and multiply from the other side, which for symmetric
    affinities, such as theirs, is the same. AffinityNet's has ``beta=8``, and 2^8 steps as IRNet's, which walks on maps
    of a quarter of the image's resolution, passes its boundary, and divides the result by its largest score.

    Time grows with the maps: walk those of the classes that an image has.

    Args:
        maps: maps to propagate, ``[B, C, H, W]``, any finite values; there may be no image and no map.
        affinity: affinity of each pixel with each other, row by row, ``[B, H W, H W]``, sparse or dense, as
            :func:`segloss.path_affinity` and :func:`segloss.feature_affinity` give it; at least 0, some above 0 in each
            row. What is not stored is 0.
        beta: power :math:`\beta` of the affinities, at least 1; a larger one spares weak ties.
        steps: number of steps t, at least 1.
        boundary: how much of a boundary each pixel is, ``[B, 1, H, W]``, in [0, 1]: maps start as M (1 - B), so that
            pixels on a boundary have nothing to give; from M if None.

    Returns:
        ``[B, C, H, W]``; float32 (float64 for float64 maps or affinities). Differentiable once, with respect to maps,
        affinity and boundary; the gradient of the affinity keeps the maps of every step. Affinities that are not
        checked (see :func:`segloss.check_values`) and are negative or NaN, or a row of zeros, make scores meaningless.

    Raises:
        TypeError: arguments that are not floating-point tensors, ``steps`` that is no integer, ``beta`` that is no
            number.
        ValueError: shapes or devices that do not fit each other, no pixel, NaN or infinite maps or affinities, a
            negative affinity, a row without a positive one, ``boundary`` outside [0, 1], ``beta`` or ``steps`` below 1.

    Source:
        AffinityNet and IRNet, as in the dissertation's section 2.3.2, with eq. (2.5) and (2.6).

    Example:
        >>> from segloss import path_affinity
        >>> boundary = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)
        >>> maps = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
        >>> random_walk(maps, path_affinity(boundary, radius=2))
        tensor([[[[0.5000, 0.5000, 0.0000, 0.0000]]]])
    """
    _check_maps(maps)
    check_has_values("maps", maps)
    entries = _entries(affinity, maps)
    check_number("beta", beta, least=1)
    check_int("steps", steps)
    check_number("steps", steps, least=1)
    # In float64: over hundreds of steps the rounding of float32 adds up to a few parts in ten thousand. Autocast lets
    # doubles be.
    scores = maps.double()
    if boundary is not None:
        _check_boundary(boundary, maps)
        scores = scores * (1 - boundary.double())
    images, count, height, width = maps.shape
    _accept_beta()
    # One matrix for all images: their affinities are the blocks of its diagonal.
    image, row, column = entries.indices()
    row, column = (image * (height * width) + pixel for pixel in (row, column))
    weights = _transitions(entries.values().double(), row, images * height * width, beta)
    walked: Tensor = _Walk.apply(scores.permute(0, 2, 3, 1).flatten(0, 2), weights, row, column, steps)
    walked = _within(scores.detach(), walked.view(images, height, width, count).permute(0, 3, 1, 2))
    return walked.to(torch.promote_types(wide_dtype(maps), wide_dtype(affinity))).contiguous()


def _transitions(values: Tensor, row: Tensor, rows: int, beta: float) -> Tensor:
    """Powers of the values over their sum in each row."""
    # Relative to the largest of its row the power neither overflows nor leaves a row of zeros.
    largest = values.detach().new_zeros(rows).scatter_reduce(0, row, values.detach(), "amax")
    powers = (values / largest[row]) ** beta
    return powers / powers.new_zeros(rows).index_add(0, row, powers)[row]


def _within(scores: Tensor, walked: Tensor) -> Tensor:
    """Back in the range of the scores, which rounding in hundreds of steps may leave; gradients pass as they are."""
    least, largest = scores.amin((2, 3), keepdim=True), scores.amax((2, 3), keepdim=True)
    return walked + (walked.detach().clamp(least, largest) - walked.detach())


class _Walk(torch.autograd.Function):
    """``T^steps @ scores`` for the sparse matrix T of the weights at (row, column), sorted by row.

    Autograd through sparse products would give the same gradients in a hundred times the time of the walk.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weights: Tensor, row: Tensor, column: Tensor, steps: int) -> Tensor:
        matrix = _csr(weights, row, column, len(scores))
        ctx.steps, visited = steps, []
        for _ in range(steps):
            if ctx.needs_input_grad[1]:
                visited.append(scores)
            scores = matrix @ scores
        ctx.save_for_backward(weights, row, column, *visited)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        weights, row, column, *visited = ctx.saved_tensors
        order = column.argsort(stable=True)
        transposed = _csr(weights[order], column[order], row[order], len(grad))
        arrived = []
        for _ in range(ctx.steps):
            if visited:
                arrived.append(grad)
            grad = transposed @ grad
        if not visited:
            return grad, None, None, None, None
        # A weight takes the product of its pixel's gradient and its partner's score, summed over maps and steps.
        pairs = _csr(torch.zeros_like(weights), row, column, len(grad))
        product = torch.sparse.sampled_addmm(pairs, torch.cat(arrived[::-1], 1), torch.cat(visited, 1).T)
        return grad, product.values(), None, None, None


def _csr(weights: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    counts = torch.bincount(row, minlength=size)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # 32 bits, enough for 2^31 pairs: products on the CPU would convert wider indices in every step.
    parts, shape, device = (starts.int(), column.int(), weights), (size, size), weights.device
    return torch.sparse_csr_tensor(*parts, shape, device=device, check_invariants=False)


@cache
def _accept_beta() -> None:
    """Torch says once in a process that compressed sparse tensors are in beta: here, where nobody hears it.

    Not around each use: filters of warnings are global, and backward passes run in threads of their own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1, device="cpu").to_sparse_csr()


def _entries(affinity: object, maps: Tensor) -> Tensor:
    """Affinities that are stored, sorted by image, row and column, checked."""
    check_tensor("affinity", affinity)
    assert isinstance(affinity, Tensor)
    if not affinity.is_floating_point():
        raise TypeError(f"affinity: expected a floating-point tensor, got {affinity.dtype}")
    images, _, height, width = maps.shape
    pixels = height * width
    check_like("affinity", affinity, (images, pixels, pixels), "maps", maps)
    entries = affinity.to_sparse_coo()
    if entries.sparse_dim() != 3:
        raise ValueError(
            f"affinity: expected all 3 dimensions sparse or all dense, got {entries.sparse_dim()} sparse ones"
        )
    entries = entries.coalesce()
    values = entries.values()
    check_finite("affinity", values)
    require("affinity", values, lambda: (values >= 0).all(), lambda: f"expected at least 0, got {values.min():.6g}")

    def every_row() -> Tensor:
        image, row, _ = entries.indices()
        some = torch.zeros(images * pixels, dtype=torch.bool, device=values.device)
        some[(image * pixels + row)[values > 0]] = True
        return some.all()

    require("affinity", values, every_row, lambda: "expected a positive value in each row, got a row of zeros")
    return entries


def _check_maps(maps: object) -> None:
    check_floating("maps", maps)
    assert isinstance(maps, Tensor)
    if maps.dim() != 4 or 0 in maps.shape[2:]:
        raise ValueError(f"maps: expected [B, C, H, W] with at least one pixel, got {shape_text(maps.shape)}")
    check_finite("maps", maps)


def _check_boundary(boundary: object, maps: Tensor) -> None:
    check_floating("boundary", boundary)
    assert isinstance(boundary, Tensor)
    check_like("boundary", boundary, (len(maps), 1, *maps.shape[2:]), "maps", maps)
    check_fractions("boundary", boundary)
