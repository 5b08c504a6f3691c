"""Centroid targets: supervise a segmentation network with where its classes are and how far they spread."""

from collections.abc import Sequence

import torch
from torch import Tensor

from segloss._penalty import check_t, penalty
from segloss.common.checks import (
    check_choice,
    check_finite,
    check_floating,
    check_known,
    check_label_maps,
    check_like,
    check_logits,
    check_number,
    check_spacing,
    check_valid,
    require,
)
from segloss.common.reduction import LOG_FLOOR, Reduction, check_reduction, reduce, wide_dtype
from segloss.common.settings import LossModule

_FARTHEST = 1e12  # its square, summed over classes, still fits into float32


def centroid_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    descriptor: str = "centroid",
    tolerance: float | Tensor = 0.0,
    t: float | None = None,
    spacing: Sequence[float] | None = None,
    known: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Penalty on the centroids of the predicted classes, or on their mean distances to them, off their targets.

    .. math:: L = \sum_k \sum_d \max(|\mu_d^k - c_d^k| - \tau, 0)^2, \qquad
        \mu^k = \frac{\sum_p S_p^k x_p}{\sum_p S_p^k}

    over the known classes k and the spatial dimensions d, with the softmax S of the logits and the positions
    :math:`x_p` of the pixels: their index times the spacing, 0 at the first one. ``descriptor="distance"`` puts the
    mean distance to the centroid, the root mean square along each dimension, in the place of :math:`\mu`:

    .. math:: \sigma_d^k = \sqrt{\frac{\sum_p S_p^k (x_{p,d} - \mu_d^k)^2}{\sum_p S_p^k}}

    With a number ``t``, as in the paper, the log-barrier extension of :func:`~segloss.size_barrier` takes the place of
    the squared penalty, :math:`\psi_t(\mu - c - \tau) + \psi_t(c - \tau - \mu)`; it is flat within
    :math:`1 / t^2 - \tau` of a target. Both descriptors are relative to the mass of the class and formed in log space:
    a class that has vanished still has them, and a finite gradient.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        targets: :math:`c` along each of the D spatial dimensions, ``[B, K, D]``, in the unit of ``spacing``, within
            ±1e12. Constants: no gradient flows into them.
        descriptor: ``"centroid"`` or ``"distance"``: which one the targets are of.
        tolerance: :math:`\tau`, how far off costs nothing, at least 0: a number, ``[K, D]`` or ``[B, K, D]``. Bounds
            are (lower + upper) / 2 as ``targets`` and (upper - lower) / 2 as ``tolerance``.
        t: of the log-barrier extension, from 1e-3 to 1e6; the squared penalty if None.
        spacing: size of a pixel along each spatial dimension, as in (3.0, 0.8, 0.8) mm, above 0 and below 1e6; 1, that
            is pixels, if None.
        known: classes with a target, bool, ``[B, K]``; all of them if None. The targets of the others, such as those
            that are absent, are not looked at: they may be NaN.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``, in the unit of ``spacing`` squared; float32 (float64 for float64 logits);
        at least 0 without ``t``. An image without valid pixels contributes 0.

    Raises:
        TypeError: ``logits``, ``targets`` or ``tolerance`` that are not floating point, ``known`` or ``valid`` that are
            not bool, ``spacing`` that is no sequence.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite logits or targets of
            known classes, an unknown ``descriptor``, ``tolerance``, ``t`` or ``spacing`` out of range.

    Source:
        *Beyond pixel-wise supervision for segmentation: A few global shape descriptors might be surprisingly good!*,
        whose public code divides by the number of pixels. There the tolerance is 20 pixels and t grows from 1.

    Example:
        >>> logits = torch.zeros(1, 2, 5, 5)  # both classes are centred at (2, 2)
        >>> centroid_loss(logits, torch.tensor([[[2.0, 2.0], [2.0, 2.5]]]))
        tensor(0.2500)
        >>> centroid_loss(logits, torch.full((1, 2, 2), 1.5), descriptor="distance", tolerance=0.1)
        tensor(0.)
    """
    check_logits(logits)
    check_valid(valid, logits)
    check_known(known, logits)
    check_reduction(reduction)
    check_choice("descriptor", descriptor, ("centroid", "distance"))
    check_t(t)
    spatial = logits.shape[2:]
    check_spacing(spacing, len(spatial), "logits", logits)
    check_floating("targets", targets)
    check_like("targets", targets, (*logits.shape[:2], len(spatial)), "logits", logits)
    _check_tolerance(tolerance, targets)
    targets = targets.detach().to(wide_dtype(logits))
    if known is not None:
        targets = targets.masked_fill(~known[:, :, None], 0)
    check_finite("targets", targets, _FARTHEST)
    if valid is None and 0 in spatial:
        valid = torch.ones_like(logits[:, 0], dtype=torch.bool)  # no pixels, no valid ones
    centroids, distances = _moments(_marginals(logits, valid), spacing)
    offset = (centroids if descriptor == "centroid" else distances) - targets
    cost = penalty(offset - tolerance, t) + penalty(-offset - tolerance, t)
    if known is not None:
        cost = cost.masked_fill(~known[:, :, None], 0)
    seen = None if valid is None else valid.flatten(1).any(1)
    return reduce(cost.to(offset.dtype).sum((1, 2)), reduction, seen)


class CentroidLoss(LossModule):
    """:func:`centroid_loss` as a module."""

    descriptor: str
    tolerance: float | Tensor
    t: float | None
    spacing: Sequence[float] | None

    def __init__(
        self,
        *,
        descriptor: str = "centroid",
        tolerance: float | Tensor = 0.0,
        t: float | None = None,
        spacing: Sequence[float] | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction, descriptor=descriptor, tolerance=tolerance, t=t, spacing=spacing)
        check_choice("descriptor", descriptor, ("centroid", "distance"))
        check_t(t)
        _check_tolerance(tolerance, None)

    def forward(
        self, logits: Tensor, targets: Tensor, valid: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        return centroid_loss(
            logits,
            targets,
            descriptor=self.descriptor,
            tolerance=self.tolerance,
            t=self.t,
            spacing=self.spacing,
            known=known,
            valid=valid,
            reduction=self.reduction,
        )


def centroids_from_labels(
    labels: Tensor, num_classes: int, *, spacing: Sequence[float] | None = None, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Exact targets of :func:`centroid_loss` from label maps: centroids of the classes, and mean distances to them.

    Args:
        labels: class of each pixel, integers, ``[B, *spatial]``.
        num_classes: K, the number of classes.
        spacing: size of a pixel along each of the D spatial dimensions, above 0 and below 1e6; 1 if None.
        ignore_index: label of the pixels that do not count.

    Returns:
        Centroids and root mean square distances to them along each dimension, ``[B, K, D]`` each, float32, in the unit
        of ``spacing``; NaN for classes that an image does not show: ``known=centroids.isfinite().all(2)`` leaves them
        out of the loss.

    Raises:
        TypeError: ``labels`` that are not integers, ``num_classes`` that is not an int, ``spacing`` that is no
            sequence.
        ValueError: ``labels`` without spatial dimensions, ``num_classes`` below 1 or beyond int32, a label that is
            neither a class nor ``ignore_index``, ``spacing`` that does not fit or is out of range.

    Source:
        *Beyond pixel-wise supervision for segmentation: A few global shape descriptors might be surprisingly good!*

    Example:
        >>> centroids, distances = centroids_from_labels(torch.tensor([[[0, 1, 1, 1]]]), 2, spacing=(1.0, 2.0))
        >>> centroids
        tensor([[[0., 0.],
                 [0., 4.]]])
        >>> distances[0, 1]
        tensor([0.0000, 1.6330])
    """
    labels = check_label_maps(labels, num_classes, ignore_index)
    check_spacing(spacing, labels.dim() - 1, "labels", labels)
    counted = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    labels = torch.where(counted, labels, num_classes)[..., None]
    marginals = []
    for dimension, length in enumerate(labels.shape[1:-1], start=1):
        lines = labels.movedim(dimension, 1).flatten(2)
        counts = torch.zeros(len(lines), length, num_classes + 1, dtype=torch.float64, device=labels.device)
        counts.scatter_add_(2, lines, torch.ones_like(lines, dtype=torch.float64))
        marginals.append(counts[:, :, :-1].mT)
    total = marginals[0].sum(2, keepdim=True)
    present = (total > 0).expand(-1, -1, len(marginals))
    moments = _moments([marginal / total.clamp(min=1) for marginal in marginals], spacing)
    centroids, distances = (torch.where(present, moment, torch.nan).float() for moment in moments)
    return centroids, distances


def _marginals(logits: Tensor, valid: Tensor | None) -> list[Tensor]:
    """How each class is spread along each spatial dimension: weights ``[B, K, length]`` that sum to 1."""
    log_softmax = torch.log_softmax(logits.to(wide_dtype(logits)), 1).clamp(min=LOG_FLOOR).flatten(2)
    if valid is not None:
        # Below all others, and finite, for images without valid pixels.
        log_softmax = log_softmax.masked_fill(~valid.flatten(1)[:, None], 2 * LOG_FLOOR)
    weights = torch.softmax(log_softmax, 2).unflatten(2, logits.shape[2:])
    if weights.dim() == 3:
        return [weights]
    dimensions = range(2, weights.dim())
    return [weights.sum([other for other in dimensions if other != dimension]) for dimension in dimensions]


def _moments(marginals: list[Tensor], spacing: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation along each dimension, ``[B, K, D]`` each."""
    centroids, variances = [], []
    for marginal, size in zip(marginals, spacing or [1.0] * len(marginals), strict=True):
        position = torch.arange(marginal.shape[2], dtype=marginal.dtype, device=marginal.device) * size
        centroid = (marginal * position).sum(2)
        centroids.append(centroid)
        variances.append((marginal * (position - centroid[:, :, None]) ** 2).sum(2))
    variance = torch.stack(variances, 2)
    spread = variance > 0
    # The square root has no gradient at 0, where all of a class is one pixel.
    return torch.stack(centroids, 2), torch.where(spread, torch.where(spread, variance, 1).sqrt(), 0)


def _check_tolerance(tolerance: float | Tensor, targets: Tensor | None) -> None:
    if not isinstance(tolerance, Tensor):
        check_number("tolerance", tolerance, least=0, most=_FARTHEST)
        return
    check_floating("tolerance", tolerance)
    if targets is not None:
        check_like(
            "tolerance", tolerance, targets.shape[1:] if tolerance.dim() == 2 else targets.shape, "targets", targets
        )
    require(
        "tolerance",
        tolerance,
        lambda: ((tolerance >= 0) & (tolerance <= _FARTHEST)).all(),
        lambda: f"expected numbers from 0 to {_FARTHEST:g}, got values outside or NaN",
    )
