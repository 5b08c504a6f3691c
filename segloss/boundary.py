"""Boundary loss: distances between outlines, as a weight for the probability of each pixel."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from segloss.common.checks import (
    check_finite,
    check_floating,
    check_has_values,
    check_label_maps,
    check_like,
    check_logits,
    check_spacing,
    check_valid,
)
from segloss.common.reduction import Reduction, check_reduction, reduce, wide_dtype, widen
from segloss.common.settings import LossModule


def boundary_loss(
    logits: Tensor, distances: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Distance between the outlines of a prediction and of full masks, as an integral over regions.

    .. math:: L = \frac{1}{K |\Omega|} \sum_k \sum_{p \in \Omega} \phi_p^k S_p^k

    with the softmax S of the logits and the signed distances :math:`\phi` to the outline of each class, negative
    inside. It is least where each pixel takes the class that it lies deepest in. Its gradient grows with the distance
    to the outline, whatever the size of the class. Add a region loss, such as cross-entropy or Dice.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        distances: :math:`\phi` as of :func:`signed_distances`, or computed beforehand by any other means,
            ``[B, K, *spatial]``, any finite values (beyond ±1e30 they count as that). 0 leaves a class at a pixel
            alone. Constants: no gradient flows into them.
        valid: pixels that count (:math:`\Omega`), bool, ``[B, *spatial]``; all of them if None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``, in the unit of ``distances``; float32 (float64 for float64 logits); below 0
        for good predictions. An image without valid pixels contributes 0.

    Raises:
        TypeError: ``logits`` or ``distances`` that are not floating point, ``valid`` that is not bool.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite logits or distances.

    Source:
        *Boundary loss for highly unbalanced segmentation*.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> distances = signed_distances(labels, 2)
        >>> boundary_loss(torch.zeros(1, 2, 1, 4), distances)
        tensor(0.)
        >>> boundary_loss(torch.tensor([[[[9.0, 9, 0, 0]], [[0, 0, 9, 9]]]]), distances)
        tensor(-0.7498)
    """
    check_logits(logits)
    check_floating("distances", distances)
    check_like("distances", distances, logits.shape, "logits", logits)
    check_valid(valid, logits)
    check_reduction(reduction)
    check_finite("distances", distances)
    softmax = torch.softmax(logits.to(wide_dtype(logits)), 1)
    cost = (softmax * widen(distances.detach()).to(softmax.dtype)).mean(1).flatten(1)
    if valid is None:
        return reduce(cost.sum(1) / max(cost.shape[1], 1), reduction)
    counted = valid.flatten(1)
    return reduce(torch.where(counted, cost, 0).sum(1) / counted.sum(1).clamp(min=1), reduction)


class BoundaryLoss(LossModule):
    """:func:`boundary_loss` as a module."""

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)

    def forward(self, logits: Tensor, distances: Tensor, valid: Tensor | None = None) -> Tensor:
        return boundary_loss(logits, distances, valid=valid, reduction=self.reduction)


def signed_distances(
    labels: Tensor, num_classes: int, *, spacing: Sequence[float] | None = None, ignore_index: int = 255
) -> Tensor:
    r"""Signed Euclidean distance of each pixel to the outline of each class, for :func:`boundary_loss`.

    .. math:: \phi_p^k = \begin{cases} -\min_{q: y_q \ne k} \|x_p - x_q\| & y_p = k \\
        \min_{q: y_q = k} \|x_p - x_q\| & y_p \ne k \end{cases}

    with the label :math:`y_p` and the position :math:`x_p` of a pixel: its index times the spacing. It is exact, and
    computed by scipy on the CPU: once for each image, in the data set rather than in the training step. The authors'
    code measures from the outermost pixels inside a class, which adds 1 there.

    Args:
        labels: class of each pixel, integers, ``[B, *spatial]``. A slice of a volume that is annotated on its own goes
            as an image of two dimensions: distances reach across the third one.
        num_classes: K, the number of classes.
        spacing: size of a pixel along each spatial dimension, above 0 and below 1e6; 1 if None.
        ignore_index: label of the pixels that are of no class: their own distances are 0, and no distance is measured
            to them.

    Returns:
        ``[B, K, *spatial]``, float32, in the unit of ``spacing``; 0 for a class that an image does not show, or that
        all of its labelled pixels are of. Labels that are not checked and are no class count as another one.

    Raises:
        TypeError: ``labels`` that are not integers, ``num_classes`` that is not an int, ``spacing`` that is no
            sequence.
        ValueError: ``labels`` without spatial dimensions, ``num_classes`` below 1 or beyond int32, a label that is
            neither a class nor ``ignore_index``, ``spacing`` that does not fit or is out of range.

    Source:
        *Boundary loss for highly unbalanced segmentation*.

    Example:
        >>> signed_distances(torch.tensor([[[0, 0, 1, 255]]]), 2, spacing=(1.0, 0.5))[0, 1]
        tensor([[ 1.0000,  0.5000, -0.5000,  0.0000]])
    """
    labels = check_label_maps(labels, num_classes, ignore_index)
    check_has_values("labels", labels)
    check_spacing(spacing, labels.dim() - 1, "labels", labels)
    from scipy.ndimage import distance_transform_edt

    distances = np.zeros((len(labels), num_classes, *labels.shape[1:]), np.float32)
    for image, maps in zip(labels.cpu().numpy(), distances, strict=True):
        labelled = image != ignore_index
        for k, into in enumerate(maps):
            inside = labelled & (image == k)
            outside = labelled & ~inside
            if inside.any() and outside.any():
                to_class = distance_transform_edt(~inside, spacing)
                to_others = distance_transform_edt(~outside, spacing)
                into[...] = np.where(labelled, to_class - to_others, 0)
    return torch.from_numpy(distances).to(labels.device)
