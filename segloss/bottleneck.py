"""RIB: fine-tune a classifier without the saturating end that squeezes information out of its last layer."""

import torch
from torch import Tensor

from segloss.common.checks import check_image_logits, check_number, check_tags
from segloss.common.reduction import LARGEST, Reduction, check_reduction, reduce, widen
from segloss.common.settings import LossModule


def rib_margin(logits: Tensor, tags: Tensor, *, margin: float = 600.0, reduction: Reduction = "mean") -> Tensor:
    r"""Raises the logits of the tagged classes up to a margin; no sigmoid, so nothing saturates before it.

    .. math:: L = -\sum_c t_c \min(m, y_c)

    A tagged logit below the margin has the gradient -1 (-1/B for the mean), one that has reached it 0, and classes
    without a tag have none. The loss is made for a few steps from a classifier that is already trained; from scratch it
    is unstable. The authors' public code sums over the batch (``reduction="sum"``), leaves the minimum out
    (``margin=1e9`` comes to the same), and instead ends the fine-tuning of an image once its target logits, summed over
    its scales and flips, exceed m.

    Args:
        logits: class logits :math:`y`, ``[B, C]``, C >= 1, any finite values.
        tags: 1 where a class is present in the image, 0 elsewhere, ``[B, C]``, any dtype.
        margin: :math:`m`, in the unit of the logits, from -1e30 to 1e30; 600 in the paper.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits); 0 where nothing is tagged. Tags that
        are not checked (see :func:`check_values`) and are neither 0 nor 1 count as 1 where they are not 0.

    Raises:
        TypeError: ``logits`` that are not floating point, ``tags`` that are no tensor of real numbers, ``margin`` that
            is no number.
        ValueError: shapes or devices that do not fit each other, no class, NaN or infinite logits, tags other than 0
            and 1, a ``margin`` outside ±1e30.

    Source:
        Reducing the information bottleneck, the dissertation's sec. 3.4.3.

    Example:
        >>> rib_margin(torch.tensor([[2.0, 700.0, 5.0]]), torch.tensor([[1, 1, 0]]))
        tensor(-602.)
    """
    check_image_logits(logits)
    check_tags(tags, logits)
    check_number("margin", margin, least=-LARGEST, most=LARGEST)
    check_reduction(reduction)
    scores = widen(logits)
    # A comparison, not minimum(): at the margin itself no gradient is left.
    capped = torch.where(scores < margin, scores, margin)
    return reduce(torch.where(tags != 0, -capped, 0).sum(1), reduction)


class RIBMargin(LossModule):
    """:func:`rib_margin` as a module."""

    margin: float

    def __init__(self, *, margin: float = 600.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction, margin=margin)
        check_number("margin", margin, least=-LARGEST, most=LARGEST)

    def forward(self, logits: Tensor, tags: Tensor) -> Tensor:
        return rib_margin(logits, tags, margin=self.margin, reduction=self.reduction)
