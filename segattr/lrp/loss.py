"""The loss that trains a classifier through its heatmaps: segmentation where pixels are labelled, tags everywhere."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from segloss.common.checks import (
    check_finite,
    check_floating,
    check_ignore_index,
    check_integer,
    check_like,
    check_number,
    check_tags,
    check_two_classes,
    shape_text,
)
from segloss.common.reduction import LARGEST, widen
from segloss.common.settings import Settings
from segloss.seeds import partial_cross_entropy

Scale = float | Literal["pixels"]


def heatmap_loss(
    heatmaps: Tensor,
    scores: Tensor,
    labels: Tensor,
    tags: Tensor,
    *,
    scale: Scale = "pixels",
    weight: float = 1.0,
    background_weight: float = 0.0,
    ignore_index: int = 255,
) -> Tensor:
    r"""Softmax cross-entropy of the heatmaps at the labelled pixels, plus sigmoid cross-entropy of the scores.

    .. math::
        L = -\frac{1}{|\Omega|} \sum_{p \in \Omega} \ln \operatorname{softmax}(a R_p)_{y_p}
            - \frac{\lambda}{B K} \sum_{i=1}^B \sum_{c=0}^{K-1}
              w_c \bigl[ t_{ic} \ln \sigma(s_{ic}) + (1 - t_{ic}) \ln(1 - \sigma(s_{ic})) \bigr]

    with the labelled pixels :math:`\Omega` of all images of the batch. Images without pixel labels, whose labels are
    all ``ignore_index``, count in the second term only; the batch may consist of them, and then the first term is 0.

    The relevances of a class sum to its score, less what the shifts of the layers absorb, so that one pixel's is of the
    order of :math:`s / HW`. As they are, the softmax is next to uniform everywhere, and its gradient about HW times
    smaller than that of the second term. The default :math:`a = HW` makes :math:`a R_p` the score that the image would
    have if all of it were like the pixel: comparable to :math:`s`, which is its mean, whatever the size of the image.
    The paper and the authors' code have :math:`a = 1`. The segmentation, the class with the largest relevance, is the
    same for every :math:`a`.

    Both means are over the batch, and over that of each process under data parallelism: processes whose batches have
    few labelled pixels then count as much as the others. The second mean is over all K classes, so that a class of
    weight 0 still counts in the denominator, as in torch's losses with class weights and in the authors' code. That
    code multiplies the second term by the batch size, 10, where the paper says equal weights: ``weight=10`` is the
    code, the default is the paper.

    Args:
        heatmaps: relevance :math:`R` of each pixel for each class, ``[B, K, H, W]``, K >= 2, any finite values; of each
            voxel of volumes ``[B, K, D, H, W]``.
        scores: class scores :math:`s`, ``[B, K]``, any finite values.
        labels: class :math:`y` of each pixel or ``ignore_index``, integers, ``[B, H, W]`` or ``[B, D, H, W]``.
        tags: :math:`t`, 1 where a class is present in the image, 0 elsewhere, ``[B, K]``, any dtype.
        scale: :math:`a`, above 0 and at most 1e30, or ``"pixels"`` for the number of pixels HW of the heatmaps.
        weight: :math:`\lambda`, at least 0.
        background_weight: :math:`w_0`, at least 0; the other classes have weight 1.
        ignore_index: label of the pixels that do not count.

    Returns:
        A scalar; float32 (float64 if the heatmaps or the scores are); at least 0; 0 for an empty batch. Tags that are
        not checked (see :func:`~segloss.check_values`) and lie between 0 and 1 count as soft labels.

    Raises:
        TypeError: ``heatmaps`` or ``scores`` that are not floating point, ``labels`` that are not integers, ``tags``
            that are no tensor of real numbers, ``ignore_index`` that is no int, other settings that are no numbers.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite values, a label that
            is neither a class nor ``ignore_index``, tags other than 0 and 1, a ``scale`` that is not above 0 or above
            1e30, a negative weight.

    Source:
        *Model Guidance via Explanations Turns Image Classifiers into Segmentation Models*, sec. 2.3 and 3.

    Example:
        >>> import torch
        >>> heatmaps, scores = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3)
        >>> labels, tags = torch.full((2, 4, 4), 255), torch.tensor([[1, 1, 0], [1, 0, 1]])
        >>> labels[0, :2] = 1
        >>> heatmap_loss(heatmaps, scores, labels, tags)
        tensor(1.5607)
    """
    _check(heatmaps, scores, labels, tags)
    _check_settings(scale, weight, background_weight, ignore_index)
    factor = heatmaps.shape[2:].numel() if scale == "pixels" else scale
    maps = (widen(heatmaps) * factor).clamp(-LARGEST, LARGEST)
    segmentation = partial_cross_entropy(maps, labels, ignore_index=ignore_index)
    logits = widen(scores)
    per_class = F.binary_cross_entropy_with_logits(logits, tags.to(logits.dtype), reduction="none").sum(0)
    classification = (background_weight * per_class[0] + per_class[1:].sum()) / max(logits.numel(), 1)
    return segmentation + weight * classification


class HeatmapLoss(Settings):
    """:func:`heatmap_loss` as a module."""

    scale: Scale
    weight: float
    background_weight: float
    ignore_index: int

    def __init__(
        self,
        *,
        scale: Scale = "pixels",
        weight: float = 1.0,
        background_weight: float = 0.0,
        ignore_index: int = 255,
    ) -> None:
        _check_settings(scale, weight, background_weight, ignore_index)
        super().__init__(scale=scale, weight=weight, background_weight=background_weight, ignore_index=ignore_index)

    def forward(self, heatmaps: Tensor, scores: Tensor, labels: Tensor, tags: Tensor) -> Tensor:
        return heatmap_loss(
            heatmaps,
            scores,
            labels,
            tags,
            scale=self.scale,
            weight=self.weight,
            background_weight=self.background_weight,
            ignore_index=self.ignore_index,
        )


def _check(heatmaps: Tensor, scores: Tensor, labels: Tensor, tags: Tensor) -> None:
    check_floating("heatmaps", heatmaps)
    if heatmaps.dim() not in (4, 5):
        raise ValueError(f"heatmaps: expected [B, K, H, W] or [B, K, D, H, W], got {shape_text(heatmaps.shape)}")
    check_two_classes("heatmaps", heatmaps, "the softmax of a single class is constant", background=True)
    check_finite("heatmaps", heatmaps)
    check_floating("scores", scores)
    check_like("scores", scores, heatmaps.shape[:2], "heatmaps", heatmaps)
    check_finite("scores", scores)
    check_integer("labels", labels)
    check_like("labels", labels, (len(heatmaps), *heatmaps.shape[2:]), "heatmaps", heatmaps)
    check_tags(tags, heatmaps, "heatmaps")


def _check_settings(scale: Scale, weight: float, background_weight: float, ignore_index: int) -> None:
    if isinstance(scale, str):
        if scale != "pixels":
            raise ValueError(f"scale: expected a number or 'pixels', got {scale!r}")
    else:
        check_number("scale", scale, above=0, most=LARGEST)
    check_number("weight", weight, least=0, most=LARGEST)
    check_number("background_weight", background_weight, least=0, most=LARGEST)
    check_ignore_index(ignore_index)
