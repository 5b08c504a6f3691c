"""Seeds: supervise a segmentation network with a few labelled pixels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.common.checks import (
    check_floating,
    check_fractions,
    check_ignore_index,
    check_int,
    check_integer,
    check_labels,
    check_like,
    check_logits,
    check_number,
    check_real,
    require,
)
from segloss.common.reduction import LOG_FLOOR, Reduction, check_reduction, reduce, wide_dtype
from segloss.common.settings import LossModule

_ABSENT = 1e-30  # probability of what is not there: its logarithm is finite, its share in a sum nothing


def partial_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy on the labelled pixels only.

    .. math:: L = -\sum_{p \in \text{Seeds}} \ln S_p^{y_p}

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        labels: class of each pixel or ``ignore_index``, integers, ``[B, *spatial]``.
        ignore_index: label of the pixels that are not seeds.
        reduction: ``"sum"`` is the formula; ``"mean"`` divides it by the number of seeds in the batch (of each process,
            under data parallelism); ``"none"`` gives the sum over the seeds of each image.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits); 0 where there is no seed. Labels
        that are not checked and are no class (see :func:`check_values`) fail inside torch's cross-entropy.

    Raises:
        TypeError: ``logits`` that are not floating point, ``labels`` that are not integers.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite logits, a label that
            is neither a class nor ``ignore_index``.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (4).

    Example:
        >>> labels = torch.tensor([[[1, 255], [255, 255]]])
        >>> partial_cross_entropy(torch.zeros(1, 2, 2, 2), labels)
        tensor(0.6931)
    """
    check_logits(logits)
    check_integer("labels", labels)
    check_like("labels", labels, (logits.shape[0], *logits.shape[2:]), "logits", logits)
    check_reduction(reduction)
    check_ignore_index(ignore_index)
    target = labels.flatten(1).long()
    check_labels(target, logits.shape[1], ignore_index, "logits")
    log_probability = torch.log_softmax(logits.to(wide_dtype(logits)).flatten(2), 1)
    if reduction == "none":
        per_pixel = F.nll_loss(log_probability, target, ignore_index=ignore_index, reduction="none")
        return per_pixel.clamp(max=-LOG_FLOOR).sum(1)
    total = F.nll_loss(log_probability, target, ignore_index=ignore_index, reduction="sum").clamp(max=-LOG_FLOOR)
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)


class PartialCrossEntropy(LossModule):
    """:func:`partial_cross_entropy` as a module."""

    ignore_index: int

    def __init__(self, *, ignore_index: int = 255, reduction: Reduction = "mean") -> None:
        super().__init__(reduction, ignore_index=ignore_index)
        check_ignore_index(ignore_index)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return partial_cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction=self.reduction)


def balanced_seeding(
    logits: Tensor, seeds: Tensor, *, background: int = 0, floor: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy on seeds with foreground and background weighted by their own counts.

    .. math::
        L = -\frac{1}{\sum_{c \in C} |S_c|} \sum_{c \in C} \sum_{u \in S_c} \ln H_{u,c}
            -\frac{1}{|S_{bg}|} \sum_{u \in S_{bg}} \ln H_{u,bg}

    with the softmax H of the logits. A group without seeds contributes 0.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        seeds: 1 where a pixel is a seed of a class, 0 elsewhere, ``[B, K, *spatial]``, any dtype; a pixel may be a
            seed of none, one or several classes.
        background: index of the background class.
        floor: added to the probabilities before they are renormalised; 1e-4 in the authors' public code.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits); at least 0. Seeds that are not
        checked and are neither 0 nor 1 count where they are not 0.

    Raises:
        TypeError: ``logits`` that are not floating point, ``seeds`` that are not a tensor.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite logits, seeds other
            than 0 and 1, ``background`` that is no class, a negative ``floor``.

    Source:
        Deep seeded region growing, as in the dissertation's eq. (2.3).

    Example:
        >>> balanced_seeding(torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2))
        tensor(1.3863)
    """
    check_logits(logits)
    _check_seeds(seeds, logits)
    check_int("background", background)
    check_number("background", background, least=0, most=logits.shape[1] - 1)
    check_number("floor", floor, least=0)
    check_reduction(reduction)
    log_probability = _log_softmax(logits, floor).flatten(2)
    picked = seeds.bool().flatten(2)
    per_class = log_probability.masked_fill(~picked, 0).sum(2).clamp(min=LOG_FLOOR)
    count = picked.sum(2, dtype=torch.int32)
    of_background = torch.arange(logits.shape[1], device=logits.device) == background
    groups = [
        torch.where(group, per_class, 0).sum(1) / torch.where(group, count, 0).sum(1).clamp(min=1)
        for group in (~of_background, of_background)
    ]
    return reduce(-(groups[0] + groups[1]), reduction)


class BalancedSeeding(LossModule):
    """:func:`balanced_seeding` as a module."""

    background: int
    floor: float

    def __init__(self, *, background: int = 0, floor: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction, background=background, floor=floor)
        check_int("background", background)
        check_number("floor", floor, least=0)

    def forward(self, logits: Tensor, seeds: Tensor) -> Tensor:
        return balanced_seeding(logits, seeds, background=self.background, floor=self.floor, reduction=self.reduction)


def boundary_constraint(
    logits: Tensor,
    refined: Tensor,
    *,
    seeds: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL divergence from the prediction to its own refinement by a CRF, averaged over the pixels.

    .. math:: L = \frac{1}{|\Omega|} \sum_u \sum_c Q_{u,c} \ln \frac{Q_{u,c}}{H_{u,c}}

    with the softmax H of the logits; the refinement Q is a constant, no gradient flows into it. The dissertation's
    text sums over the seed pixels of each class, see ``seeds``; averaging over all pixels is what the authors' code
    trains with.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        refined: refined class probabilities :math:`Q`, ``[B, K, *spatial]``, in [0, 1].
        seeds: 1 where a pixel is a seed of a class, 0 elsewhere, ``[B, K, *spatial]``, any dtype: sum over these
            instead of averaging over all pixels. Values that are not checked count where they are not 0.
        clip: bounds of the ratio Q/H, outside of which no gradient flows; the authors' code has (0.05, 20), the
            formula none.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits). Probabilities that are not checked
        and below 0 count as 0.

    Raises:
        TypeError: ``logits`` or ``refined`` that are not floating point, ``seeds`` that are not a tensor.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite logits,
            probabilities outside [0, 1], seeds other than 0 and 1, ``clip`` that is not an increasing
            pair of positive numbers.

    Source:
        Deep seeded region growing, as in the dissertation's eq. (2.4).

    Example:
        >>> refined = torch.tensor([0.75, 0.25]).view(1, 2, 1, 1)
        >>> boundary_constraint(torch.zeros(1, 2, 1, 1), refined)
        tensor(0.1308)
    """
    check_logits(logits)
    check_floating("refined", refined)
    check_like("refined", refined, logits.shape, "logits", logits)
    if seeds is not None:
        _check_seeds(seeds, logits)
    check_reduction(reduction)
    _check_clip(clip)
    check_fractions("refined", refined, "probabilities", 1e-3)
    log_prediction = torch.log_softmax(logits.to(wide_dtype(logits)), 1)
    target = refined.detach().to(log_prediction.dtype).clamp(min=_ABSENT)
    log_ratio = log_prediction - target.log()
    if clip is not None:
        log_ratio = log_ratio.clamp(-math.log(clip[1]), -math.log(clip[0]))
    negative = target * log_ratio
    if seeds is not None:
        negative = torch.where(seeds != 0, negative, 0)
    total = negative.flatten(1).sum(1).clamp(min=LOG_FLOOR)
    pixels = logits[0, 0].numel() if seeds is None and len(logits) else 1
    return reduce(total / -max(pixels, 1), reduction)


class BoundaryConstraint(LossModule):
    """:func:`boundary_constraint` as a module."""

    clip: tuple[float, float] | None

    def __init__(self, *, clip: tuple[float, float] | None = None, reduction: Reduction = "mean") -> None:
        super().__init__(reduction, clip=clip)
        _check_clip(clip)

    def forward(self, logits: Tensor, refined: Tensor, seeds: Tensor | None = None) -> Tensor:
        return boundary_constraint(logits, refined, seeds=seeds, clip=self.clip, reduction=self.reduction)


def _log_softmax(logits: Tensor, floor: float) -> Tensor:
    log_softmax = torch.log_softmax(logits.to(wide_dtype(logits)), 1)
    if floor == 0:
        return log_softmax
    raised = torch.logaddexp(log_softmax, log_softmax.new_tensor(math.log(floor)))
    return raised - math.log1p(floor * logits.shape[1])


def _check_seeds(seeds: Tensor, logits: Tensor) -> None:
    check_real("seeds", seeds)
    check_like("seeds", seeds, logits.shape, "logits", logits)

    def likely() -> Tensor:
        """Of values from 0 to 1 as many are not 0 as they sum to: quicker than to compare each."""
        least, largest = torch.aminmax(seeds)
        return (least >= 0) & (largest <= 1) & (seeds.sum() == seeds.bool().sum())

    def fits() -> Tensor:
        return ((seeds == 0) | (seeds == 1)).all()

    if seeds.numel():
        require("seeds", seeds, fits, lambda: "expected 0 or 1, got other values", likely)


def _check_clip(clip: tuple[float, float] | None) -> None:
    if clip is None:
        return
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip: expected a pair of numbers, got {clip!r}")
    for bound in clip:
        check_number("clip", bound, above=0)
    if clip[0] >= clip[1]:
        raise ValueError(f"clip: expected an increasing pair, got {clip}")
