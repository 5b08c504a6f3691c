"""Quality of maps: the pointing game, and mIoU at the best threshold."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segattr.metrics.masks import check_device, check_mask
from segattr.networks.spatial import axes, layout_text
from segloss.common.checks import (
    check_finite,
    check_floating,
    check_has_values,
    check_ignore_index,
    check_int,
    check_integer,
    check_labels,
    check_like,
    check_number,
    check_tags,
    shape_text,
)
from segloss.common.reduction import wide_dtype

# Of the background score: 0, 0.01, ..., 1.
_THRESHOLDS = tuple(step / 100 for step in range(101))


def pointing_game(maps: Tensor, masks: Tensor, *, tolerance: float = 15.0) -> Tensor:
    r"""Pointing game: does the maximum of a map lie on an object of its class, or near one?

    A hit is a pixel of the object at a distance :math:`d < \tau` from the maximum, or the maximum itself.

    The accuracy of a class is the mean over the images of a data set, ``hits.nanmean(0)``, and that of the data set the
    mean over classes. Images of different sizes come one by one; ``torch.cat`` joins their hits.

    Args:
        maps: map of each class, at the resolution of the masks, ``[B, C, H, W]``, or ``[B, C, D, H, W]`` of volumes,
            any finite values. Of several maxima the first counts, row by row; a constant map points to the first pixel.
        masks: pixels of the objects of each class, bool, the shape of the maps: segments, or filled boxes as in the
            source. Leave those empty that are not to count: the source leaves out a class whose objects are all marked
            as difficult.
        tolerance: :math:`\tau`, a distance in pixels (voxels) between their centres, at least 0; 15 in the source. Up
            to 1, only the object itself is hit.

    Returns:
        ``[B, C]``: 1 for a hit, 0 for a miss, NaN where the class has no object in the image; float32. No gradient. The
        source's released code reports 0, not NaN, for a class that is in no image.

    Raises:
        TypeError: ``maps`` that are not floating point, ``masks`` that are not bool, ``tolerance`` that is no number.
        ValueError: shapes or devices that do not fit each other, NaN or infinite maps, no class or no pixel, a negative
            or infinite ``tolerance``.

    Source:
        *Top-down Neural Attention by Excitation Backprop*; TorchRay's benchmark for the rule :math:`d < \tau`.

    Example:
        >>> maps = torch.tensor([[[[0.1, 0.9, 0.3, 0.2]], [[0.6, 0.2, 0.1, 0.0]]]])
        >>> labels = torch.tensor([[[1, 0, 0, 2]]])
        >>> masks = labels[:, None] == torch.tensor([1, 2]).view(2, 1, 1)
        >>> pointing_game(maps, masks, tolerance=2)
        tensor([[1., 0.]])
    """
    _check_maps(maps)
    masks = check_mask("masks", masks)
    check_like("masks", masks, maps.shape, "maps", maps)
    check_number("tolerance", tolerance, least=0)
    size, spatial = maps.shape[2:], axes(maps)
    # Squared distances are integers: below a number is below its ceiling. 1 is the pixel itself.
    limit = max(1, math.ceil(min(tolerance, sum(size)) ** 2))
    first = maps.flatten(2).argmax(2)[..., None]
    distance = torch.zeros((), dtype=torch.int64, device=maps.device)
    for after, length in enumerate(reversed(size)):
        offset = torch.arange(length, device=maps.device) - first % length
        distance = distance + offset.square().view(
            *maps.shape[:2], *[1] * (len(size) - 1 - after), length, *[1] * after
        )
        first = first // length
    return (masks & (distance < limit)).any(spatial).float().masked_fill(~masks.any(spatial), math.nan)


class BestThreshold(NamedTuple):
    """What :func:`best_threshold_miou` finds; NaN for classes, the background is the first, without any pixel."""

    threshold: float  # the background score of the highest mIoU, the lowest of several
    miou: float  # at this threshold: the mean of ``iou`` over the classes that are there or were predicted
    iou: Tensor  # [C + 1], at this threshold, float32
    precision: Tensor  # [C + 1]
    recall: Tensor  # [C + 1]
    curve: Tensor  # [T], mIoU at each threshold


def best_threshold_miou(
    maps: Tensor,
    labels: Tensor,
    *,
    tags: Tensor | None = None,
    thresholds: Sequence[float] | Tensor = _THRESHOLDS,
    ignore_index: int = 255,
) -> BestThreshold:
    r"""Quality of class maps as masks: mIoU at the background score at which it is highest.

    .. math::
        \hat y(x) = \begin{cases} \arg\max_{c \in T} m_c(x) & \text{if } \max_{c \in T} m_c(x) > t \\
        0 & \text{otherwise} \end{cases}
        \qquad \max_t \frac{1}{C + 1} \sum_{c = 0}^{C} \mathrm{IoU}_c(\hat y_t)

    with the classes T that are tagged in the image. IoU is that of the whole data set: its counts are summed over the
    images, so the best threshold of a data set is not the mean of those of its batches. :class:`ThresholdSweep` takes
    one batch after another.

    Args:
        maps: map of each class, without the background, ``[B, C, H, W]``, or ``[B, C, D, H, W]`` of volumes, at the
            resolution of the labels and normalised, usually to [0, 1].
        labels: 0 for the background, c + 1 for the class of map c, or ``ignore_index``, integers, ``[B, H, W]`` or
            ``[B, D, H, W]``.
        tags: 1 where a class is present in the image, ``[B, C]``, as the field evaluates maps of training images: the
            maps of other classes do not count. All of them count if None.
        thresholds: increasing background scores t to try. Compared in the precision of the maps.
        ignore_index: label of the pixels that do not count.

    Returns:
        A :class:`BestThreshold`: the threshold, mIoU, IoU, precision and recall of each class at it, and mIoU at each
        threshold. A class that is neither there nor predicted has no IoU and does not count in the mean; one that is
        there and never predicted has precision 0, one that is predicted and not there recall 0. Without any pixel that
        counts, all is NaN.

    Raises:
        TypeError: ``maps`` that are not floating point, ``labels`` that are not integers, ``tags`` that are no tensor
            of real numbers, ``thresholds`` that are not numbers, ``ignore_index`` that is no int.
        ValueError: shapes or devices that do not fit each other, NaN or infinite maps, no class or no pixel, labels of
            no class, tags other than 0 and 1, ``thresholds`` that are none or not finite and increasing.

    Source:
        The dissertation's sec. 3.4.4, *Quality of the initial seed*, which follows *Self-supervised Equivariant
        Attention Mechanism* (SEAM); its released code tries 0 to 0.59, and counts 0 where a class has no IoU.

    Example:
        >>> maps = torch.tensor([[[[0.9, 0.6, 0.3, 0.2]]]])
        >>> best = best_threshold_miou(maps, torch.tensor([[[1, 1, 0, 0]]]))
        >>> best.threshold, best.miou
        (0.3, 1.0)
    """
    _check_maps(maps)
    sweep = ThresholdSweep(maps.shape[1], thresholds=thresholds, ignore_index=ignore_index, device=maps.device)
    sweep.update(maps, labels, tags=tags)
    return sweep.compute()


class ThresholdSweep:
    """:func:`best_threshold_miou` over a data set, batch by batch, with images of any sizes.

    One pass over the pixels serves all thresholds: where the background takes over from a pixel's best class depends on
    that class's score alone, so a histogram of these scores between the thresholds, for each true and best class,
    holds the confusion matrix of each threshold.

    ``counts``, int64 ``[C + 1, C, T + 1]`` (true class, best class, number of thresholds below its score), is all that
    an evaluation needs to go on: save it to resume, sum it over processes.

    Args:
        classes: number of classes C without the background, at least 1.
        thresholds, ignore_index: as in :func:`best_threshold_miou`.
        device: where the counts are kept.

    Raises:
        TypeError, ValueError: as :func:`best_threshold_miou`; ``classes`` that is no int or below 1.

    Example:
        >>> sweep = ThresholdSweep(classes=1)
        >>> sweep.update(torch.tensor([[[[0.9, 0.6, 0.3]]]]), torch.tensor([[[1, 1, 0]]]))
        >>> sweep.update(torch.tensor([[[[0.2], [0.5]]]]), torch.tensor([[[0], [0]]]))
        >>> best = sweep.compute()
        >>> best.threshold, best.miou
        (0.5, 1.0)
    """

    def __init__(
        self,
        classes: int,
        *,
        thresholds: Sequence[float] | Tensor = _THRESHOLDS,
        ignore_index: int = 255,
        device: torch.device | str | None = None,
    ) -> None:
        check_int("classes", classes)
        check_number("classes", classes, least=1)
        check_ignore_index(ignore_index)
        check_device(device)
        self.thresholds = _check_thresholds(thresholds)
        self.ignore_index = ignore_index
        self.counts = torch.zeros(classes + 1, classes, len(self.thresholds) + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, maps: Tensor, labels: Tensor, *, tags: Tensor | None = None) -> None:
        """Count a batch of images of one size; arguments and errors as in :func:`best_threshold_miou`."""
        _check_maps(maps)
        check_has_values("maps", maps)
        classes = self.counts.shape[1]
        if maps.shape[1] != classes:
            expected = layout_text(maps.dim()).replace("C", str(classes))
            raise ValueError(f"maps: expected {expected}, got {shape_text(maps.shape)} (see classes)")
        check_integer("labels", labels)
        check_like("labels", labels, (len(maps), *maps.shape[2:]), "maps", maps)
        labels = labels.long()
        check_labels(labels, classes + 1, self.ignore_index, "maps")
        if tags is not None:
            check_tags(tags, maps, "maps")
            absent = (tags == 0).view(*tags.shape, *[1] * (maps.dim() - 2))
            maps = maps.masked_fill(absent, -math.inf)
        score, best = maps.to(wide_dtype(maps)).max(1)
        below = torch.bucketize(score, self.thresholds.to(score))
        cell = (labels * classes + best) * (len(self.thresholds) + 1) + below
        counts = torch.bincount(cell[labels != self.ignore_index], minlength=self.counts.numel())
        # Not in place: the counts may have been made in inference mode.
        self.counts = self.counts + counts.view_as(self.counts).to(self.counts.device)

    def compute(self) -> BestThreshold:
        """The best threshold for all that was counted so far."""
        # The best class stands where more thresholds lie below its score than this one's index.
        foreground = self.counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        background = self.counts.sum((1, 2))[:, None] - foreground.sum(1)
        confusion = torch.cat([background[:, None], foreground], 1)  # true, predicted, threshold
        hits = confusion.diagonal().double()  # [T, C + 1], as the others
        predicted, true = confusion.sum(0).T, confusion.sum(1).T
        either = predicted + true - hits
        iou, precision, recall = (
            torch.where(either > 0, hits / whole.clamp(min=1), math.nan) for whole in (either, predicted, true)
        )
        curve = iou.nanmean(1)
        best = int(curve.argmax())
        return BestThreshold(
            threshold=self.thresholds[best].item(),
            miou=curve[best].item(),
            iou=iou[best].float(),
            precision=precision[best].float(),
            recall=recall[best].float(),
            curve=curve.float(),
        )


def _check_maps(maps: object) -> None:
    check_floating("maps", maps)
    assert isinstance(maps, Tensor)
    if maps.dim() not in (4, 5) or 0 in maps.shape[1:]:
        kinds = f"{layout_text(4)} or {layout_text(5)}"
        raise ValueError(f"maps: expected {kinds} with a class and a pixel, got {shape_text(maps.shape)}")
    check_finite("maps", maps)


def _check_thresholds(thresholds: Sequence[float] | Tensor) -> Tensor:
    try:
        values = torch.as_tensor(thresholds, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"thresholds: expected numbers, got {type(thresholds).__name__}: {error}") from error
    if values.dim() != 1 or not len(values) or not values.isfinite().all() or not (values.diff() > 0).all():
        raise ValueError(f"thresholds: expected one or more finite numbers that increase, got {values.tolist()}")
    return values.clone()
