"""Affinities: learn which neighbouring pixels belong together, and hand that to a random walk."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss._distances import PairDistances
from segloss._lines import inner, line_maxima
from segloss._pairs import Offset, beside, disc
from segloss.common.checks import (
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_fractions,
    check_has_values,
    check_ignore_index,
    check_integer,
    check_like,
    check_number,
    require,
    shape_text,
)
from segloss.common.reduction import LARGEST, widen
from segloss.common.settings import Settings

Distance = Literal["sum", "mean"]


def affinity_loss(
    features: Tensor,
    labels: Tensor,
    *,
    radius: float = 5.0,
    ignore_index: int = 255,
    distance: Distance = "sum",
    crop: bool = False,
    floor: float = 1e-6,
) -> Tensor:
    r"""AffinityNet's loss: features of neighbouring pixels alike where the labels are, and different where they are.

    .. math:: W_{ij} = e^{-d_{ij}}, \quad d_{ij} = \|f_i - f_j\|_1, \qquad
        L = -\frac{1}{|P^+|} \sum_{P^+} \ln W_{ij} - \frac{1}{|P^-|} \sum_{P^-} \ln (1 - W_{ij})

    over the pairs of labelled pixels closer than the radius, :math:`P^+` of the same label and :math:`P^-` of different
    ones. The authors' public code has ``distance="mean"`` and ``crop=True``, and adds 1e-5 within both logarithms, of
    which ``floor=1e-5`` is nearly the second.

    The means are over the pairs of the whole batch, and of each process under data parallelism: images with few pairs
    count for little. A group without pairs contributes 0. A few maps of one channel are kept for each offset within the
    radius, none of D channels; a second derivative keeps those.

    Args:
        features: feature maps, ``[B, D, H, W]``, any finite values.
        labels: pseudo-label of each pixel, at least 0, or ``ignore_index``, integers, ``[B, H, W]``.
        radius: distance in pixels that pairs stay below, above 0.
        ignore_index: label of the pixels that are in no pair.
        distance: ``"sum"`` is the formula. ``"mean"`` divides d by D and, with it, weights three groups of pairs: 1/4
            for those within the background, which is label 0, 1/4 for those within the same other class, 1/2 for
            :math:`P^-`.
        crop: leave out pairs whose upper pixel (the left one, in the same row) is fewer than ``ceil(radius) - 1``
            pixels from the left, right or bottom border.
        floor: least d in :math:`\ln (1 - W)`, above 0; no gradient flows where d is below.

    Returns:
        A scalar; float32 (float64 for float64 features); at least 0. Features that are not checked (see
        :func:`~segloss.check_values`) and are NaN make it NaN.

    Raises:
        TypeError: ``features`` that are not floating point, ``labels`` that are not integers, ``crop`` that is not a
            bool.
        ValueError: shapes or devices that do not fit each other, no feature or no pixel, NaN or infinite features,
            negative labels other than ``ignore_index``, ``radius`` or ``floor`` that are not above 0, an unknown
            ``distance``.

    Source:
        AffinityNet, as in the dissertation's eq. (2.5) and the loss below it.

    Example:
        >>> features = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 1, 3)
        >>> affinity_loss(features, torch.tensor([[[0, 0, 255]]]))
        tensor(1.)
    """
    _check_map("features", features, "D")
    _check_labels(labels, ignore_index, "features", features)
    _check_distance(radius, distance)
    _check_floor(floor)
    check_bool("crop", crop)
    distances = _distances(features, radius, distance)
    upper, same, different = _pairs(labels.long(), radius, ignore_index, _margin(radius, crop, labels))
    lowest = min(max(floor, torch.finfo(distances.dtype).tiny), LARGEST)
    negative = _pair_mean(-torch.log(-torch.expm1(-distances.clamp(min=lowest))), different)
    if distance == "sum":
        return _pair_mean(distances, same) + negative
    background = _pair_mean(distances, same & (upper == 0))
    foreground = _pair_mean(distances, same & (upper != 0))
    return (background + foreground) / 4 + negative / 2


class AffinityLoss(Settings):
    """:func:`affinity_loss` as a module."""

    radius: float
    ignore_index: int
    distance: Distance
    crop: bool
    floor: float

    def __init__(
        self,
        *,
        radius: float = 5.0,
        ignore_index: int = 255,
        distance: Distance = "sum",
        crop: bool = False,
        floor: float = 1e-6,
    ) -> None:
        super().__init__(radius=radius, ignore_index=ignore_index, distance=distance, crop=crop, floor=floor)
        _check_distance(radius, distance)
        _check_floor(floor)
        check_ignore_index(ignore_index)
        check_bool("crop", crop)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return affinity_loss(
            features,
            labels,
            radius=self.radius,
            ignore_index=self.ignore_index,
            distance=self.distance,
            crop=self.crop,
            floor=self.floor,
        )


def feature_affinity(features: Tensor, *, radius: float = 5.0, distance: Distance = "sum") -> Tensor:
    r"""Affinities of neighbouring pixels by their features, as :func:`affinity_loss` learns them: for a random walk.

    .. math:: W_{ij} = \exp(-\|f_i - f_j\|_1)

    for pixels closer than the radius, and 0 elsewhere.

    Args:
        features: feature maps, ``[B, D, H, W]``, any finite values.
        radius: distance in pixels that pairs stay below, above 0.
        distance: ``"sum"`` is the formula; ``"mean"`` divides the norm by D, as the authors' public code does.

    Returns:
        Sparse COO, coalesced, ``[B, H W, H W]``, pixels row by row; float32 (float64 for float64 features); symmetric,
        in [0, 1], and 1 on the diagonal, where a pixel belongs with itself. Differentiable once, through ``torch.bmm``
        or ``values()``; in eager mode only, not under ``torch.compile`` or ``vmap``. Features that are not checked and
        are NaN make their pairs NaN.

    Raises:
        TypeError: ``features`` that are not floating point.
        ValueError: ``features`` that are not ``[B, D, H, W]``, have no feature or no pixel, NaN or infinite features,
            ``radius`` that is not above 0, an unknown ``distance``.

    Source:
        AffinityNet, as in the dissertation's eq. (2.5).

    Example:
        >>> features = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 1, 3)
        >>> feature_affinity(features, radius=2).to_dense()
        tensor([[[1.0000, 0.3679, 0.0000],
                 [0.3679, 1.0000, 0.1353],
                 [0.0000, 0.1353, 1.0000]]])
    """
    _check_map("features", features, "D")
    check_has_values("features", features)
    _check_distance(radius, distance)
    return _sparse(torch.exp(-_distances(features, radius, distance)), radius)


def path_affinity_loss(
    boundary_logits: Tensor,
    labels: Tensor,
    *,
    radius: float = 10,
    ignore_index: int = 255,
    crop: bool = False,
    eps: float = 0.0,
) -> Tensor:
    r"""IRNet's loss: a boundary between neighbouring pixels where their labels differ, and none where they do not.

    .. math:: W_{ij} = 1 - \max_{k \in \Pi_{ij}} \sigma(b_k), \qquad
        L = -\frac{1}{|P^+|} \sum_{P^+} \ln W_{ij} - \frac{1}{|P^-|} \sum_{P^-} \ln (1 - W_{ij})

    with the line :math:`\Pi_{ij}` of :func:`path_affinity` and the pairs and means of :func:`affinity_loss`: of the
    batch, and of each process under data parallelism. The gradient of a pair flows to the largest logit on its line,
    and to the last one, row by row, where several are equal. The loss is a sum over pixels, each weighted by the number
    of pairs in which it is the largest, so that memory grows with the radius only, not with the number of pairs.

    The authors' public code has ``crop=True`` and ``eps=1e-5``, and another balance: it averages :math:`P^+` within the
    background and within the other classes apart, and trains on half of half their sum plus the mean over :math:`P^-`.

    Args:
        boundary_logits: logits b of the boundary, ``[B, 1, H, W]``, any finite values.
        labels: pseudo-label of each pixel, at least 0, or ``ignore_index``, integers, ``[B, H, W]``.
        radius: distance in pixels that pairs stay below, above 0; 10 is meant for maps of a quarter of the image's
            resolution.
        ignore_index: label of the pixels that are in no pair; they are part of the lines.
        crop: leave out pairs whose upper pixel (the left one, in the same row) is fewer than ``ceil(radius) - 1``
            pixels from the left, right or bottom border, as the authors' public code does.
        eps: added to W and 1 - W inside the logarithms, at least 0; 1e-5 in the authors' public code.

    Returns:
        A scalar; float32 (float64 for float64 logits). Logits that are not checked (see
        :func:`~segloss.check_values`) and are NaN make it NaN.

    Raises:
        TypeError: ``boundary_logits`` that are not floating point, ``labels`` that are not integers, ``crop`` that is
            not a bool.
        ValueError: shapes or devices that do not fit each other, no pixel, NaN or infinite logits, negative labels
            other than ``ignore_index``, ``radius`` that is not above 0, a negative ``eps``.

    Source:
        IRNet, as in the dissertation's eq. (2.6), with the loss below eq. (2.5).

    Example:
        >>> wall = torch.tensor([-9.0, 0.0, -9.0]).view(1, 1, 1, 3)  # a probability of 1/2 in the middle
        >>> path_affinity_loss(wall, torch.tensor([[[0, 255, 1]]]))
        tensor(0.6931)
    """
    _check_boundary("boundary_logits", boundary_logits)
    _check_labels(labels, ignore_index, "boundary_logits", boundary_logits)
    _check_radius(radius)
    _check_eps(eps)
    check_bool("crop", crop)
    logits, ranks = _ranked(boundary_logits)
    counts = torch.ops.segloss.line_votes(
        ranks, labels.long(), float(radius), int(ignore_index), _margin(radius, crop, labels)
    )
    shares = counts.to(logits.dtype) / counts.sum((0, 2)).clamp(min=1)[:, None]
    logarithms = F.logsigmoid(torch.stack([-logits, logits], 1))  # of W and 1 - W, exact for any logit
    if eps > 0:
        logarithms = torch.logaddexp(logarithms, logarithms.new_tensor(math.log(eps)))
    return (shares * -logarithms).sum()


class PathAffinityLoss(Settings):
    """:func:`path_affinity_loss` as a module."""

    radius: float
    ignore_index: int
    crop: bool
    eps: float

    def __init__(self, *, radius: float = 10, ignore_index: int = 255, crop: bool = False, eps: float = 0.0) -> None:
        super().__init__(radius=radius, ignore_index=ignore_index, crop=crop, eps=eps)
        _check_radius(radius)
        _check_eps(eps)
        check_ignore_index(ignore_index)
        check_bool("crop", crop)

    def forward(self, boundary_logits: Tensor, labels: Tensor) -> Tensor:
        return path_affinity_loss(
            boundary_logits,
            labels,
            radius=self.radius,
            ignore_index=self.ignore_index,
            crop=self.crop,
            eps=self.eps,
        )


def path_affinity(boundary: Tensor, *, radius: float = 10) -> Tensor:
    r"""Affinities of neighbouring pixels by the boundaries between them: for a random walk.

    .. math:: W_{ij} = 1 - \max_{k \in \Pi_{ij}} B_k

    for pixels closer than the radius, and 0 elsewhere. The line :math:`\Pi_{ij}` has the pixels of the bounding box of
    i and j whose centre is less than 1 pixel from the straight line through both; i and j are among them.

    Args:
        boundary: how much of a boundary each pixel is, ``[B, 1, H, W]``, in [0, 1].
        radius: distance in pixels that pairs stay below, above 0.

    Returns:
        Sparse COO, coalesced, ``[B, H W, H W]``, pixels row by row; float32 (float64 for a float64 boundary);
        symmetric, in [0, 1], and 1 on the diagonal, where a pixel belongs with itself whatever its boundary.
        Differentiable as :func:`feature_affinity`; the gradient of a pair flows to the largest value on its line, and
        to the last one, row by row, where several are equal. Values that are not checked (see
        :func:`~segloss.check_values`) count as they are.

    Raises:
        TypeError: ``boundary`` that is not floating point.
        ValueError: ``boundary`` that is not ``[B, 1, H, W]``, has no pixel or values outside [0, 1]; ``radius`` that is
            not above 0.

    Source:
        IRNet, as in the dissertation's eq. (2.6).

    Example:
        >>> boundary = torch.tensor([0.0, 0.75, 0.0]).view(1, 1, 1, 3)
        >>> path_affinity(boundary).to_dense()
        tensor([[[1.0000, 0.2500, 0.2500],
                 [0.2500, 1.0000, 0.2500],
                 [0.2500, 0.2500, 1.0000]]])
    """
    _check_boundary("boundary", boundary)
    check_has_values("boundary", boundary)
    check_fractions("boundary", boundary)
    _check_radius(radius)
    values, ranks = _ranked(boundary)
    offsets = disc(radius, *boundary.shape[2:])
    largest = ranks.new_zeros(len(ranks), len(offsets), *ranks.shape[1:])
    for index, maxima in enumerate(line_maxima(ranks, offsets)):
        beside(largest[:, index], offsets[index], (0, 0)).copy_(maxima)
    return _sparse(1 - values.gather(1, largest.flatten(1)).view(largest.shape), radius)


def _ranked(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Values of each image in rising order ``[B, H W]``, and the place of each pixel's value there ``[B, H, W]``."""
    values, order = widen(maps).flatten(1).sort(dim=1, stable=True)
    return values, order.argsort(1).unflatten(1, maps.shape[2:])


def _distances(features: Tensor, radius: float, distance: Distance) -> Tensor:
    sums: Tensor = PairDistances.apply(widen(features), radius)
    return sums / features.shape[1] if distance == "mean" else sums


def _pairs(labels: Tensor, radius: float, ignore_index: int, margin: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels ``[B, 1, H, W]`` of the upper pixels; which pairs ``[B, N, H, W]`` have the same or different labels."""
    height, width = labels.shape[1:]
    inside, strides = _inside(disc(radius, height, width), height, width, labels.device)
    pixels = torch.arange(height * width, device=labels.device).view(height, width)
    partners = torch.where(inside, pixels + strides[:, None, None], 0)
    upper = labels[:, None]
    lower = labels.flatten(1)[:, partners.flatten()].unflatten(1, partners.shape)
    known = inside & inner(height, width, margin, labels.device) & (upper != ignore_index) & (lower != ignore_index)
    return upper, known & (upper == lower), known & (upper != lower)


def _inside(offsets: list[Offset], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the partner at each offset is inside the image ``[N, H, W]``, and how far that is in a flat map ``[N]``."""
    down, right = torch.tensor(offsets, dtype=torch.long, device=device).view(-1, 2).unbind(1)
    rows = torch.arange(height, device=device) + down[:, None]
    columns = torch.arange(width, device=device) + right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    return inside, down * width + right


def _pair_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean over a group of pairs, 0 for none; divided first, so that the sum of large values stays finite."""
    return torch.where(group, values / group.sum().clamp(min=1), 0).sum()


def _sparse(values: Tensor, radius: float) -> Tensor:
    """Symmetric sparse matrices of values ``[B, N, H, W]`` that stand at the upper pixel of each pair, diagonal 1."""
    images, count, height, width = values.shape
    offsets = disc(radius, height, width)
    both = [(-i, -j) for i, j in reversed(offsets)] + [(0, 0)] + offsets
    inside, strides = _inside(both, height, width, values.device)
    # Pixel by pixel, with its partners in rising order, as the offsets are: coalesced without sorting.
    pixel, which = inside.flatten(1).T.nonzero().unbind(1)
    other = pixel + strides[which]
    place = (which - count).abs() * (height * width) + torch.minimum(pixel, other)
    entries = torch.cat([values.new_ones(images, 1, height, width), values], 1).flatten(1).index_select(1, place)
    image = torch.arange(images, device=values.device)[:, None]
    indices = torch.stack(torch.broadcast_tensors(image, pixel, other)).flatten(1)
    size = (images, height * width, height * width)
    entries, device = entries.flatten(), values.device
    return torch.sparse_coo_tensor(indices, entries, size, device=device, is_coalesced=True, check_invariants=False)


def _margin(radius: float, crop: bool, labels: Tensor) -> int:
    return min(math.ceil(radius) - 1, max(labels.shape[1:])) if crop else 0


def _check_boundary(name: str, value: object) -> None:
    _check_map(name, value, "1")
    assert isinstance(value, Tensor)
    if value.shape[1] != 1:
        raise ValueError(f"{name}: expected [B, 1, H, W], got {shape_text(value.shape)}")


def _check_map(name: str, value: object, channels: str) -> None:
    check_floating(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 4:
        raise ValueError(f"{name}: expected [B, {channels}, H, W], got {shape_text(value.shape)}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name}: expected at least one channel and one pixel, got {shape_text(value.shape)}")
    check_finite(name, value)


def _check_labels(labels: object, ignore_index: int, anchor: str, like: Tensor) -> None:
    check_integer("labels", labels)
    assert isinstance(labels, Tensor)
    check_like("labels", labels, (len(like), *like.shape[2:]), anchor, like)
    check_ignore_index(ignore_index)
    require(
        "labels",
        labels,
        lambda: ((labels.long() >= 0) | (labels.long() == ignore_index)).all(),
        lambda: f"expected at least 0 or {ignore_index} to ignore, got {labels.long().min().item()}",
    )


def _check_distance(radius: float, distance: Distance) -> None:
    _check_radius(radius)
    check_choice("distance", distance, ("sum", "mean"))


def _check_radius(radius: float) -> None:
    check_number("radius", radius, above=0)


def _check_floor(floor: float) -> None:
    check_number("floor", floor, above=0)


def _check_eps(eps: float) -> None:
    check_number("eps", eps, least=0)
