"""Quality of masks: region similarity J, contour quality F, and their mean J&F."""

import math
from typing import Any

import torch
from torch import Tensor

from segloss.common.checks import (
    check_bool,
    check_choice,
    check_has_values,
    check_int,
    check_like,
    check_number,
    check_real,
    shape_text,
)


def region_similarity(
    prediction: Tensor,
    truth: Tensor,
    *,
    valid: Tensor | None = None,
    pooled: bool = False,
    absent: float = math.nan,
    dims: int = 2,
) -> Tensor:
    r"""Region similarity J: the Jaccard index, or intersection over union, of two masks.

    .. math:: J = \frac{|P \cap T|}{|P \cup T|}

    and ``absent`` where both masks are empty.

    Args:
        prediction: predicted masks :math:`P`, bool, ``[..., H, W]``.
        truth: true masks :math:`T`, bool, ``[..., H, W]``.
        valid: pixels that count, bool, the shape of the masks, or ``[N, H, W]`` for masks ``[N, C, H, W]``; all of
            them if None. The others belong to neither mask.
        pooled: sum the counts over the first dimension before the ratio, as the intersection over union of a data set
            is computed: masks ``[N, C, H, W]`` give ``[C]``, whose ``nanmean`` is the mIoU.
        absent: value of a class that is in neither mask, over all images if ``pooled``: NaN, which ``nanmean`` leaves
            out of a mean over classes, or a number from 0 to 1. 1 is DAVIS's way: what is not there and not found is
            right.
        dims: number of spatial dimensions, 2, or 3 for masks ``[..., D, H, W]`` of volumes.

    Returns:
        ``[...]``, without the first dimension if ``pooled``; float32: the counts are exact integers, only the ratio
        is rounded. No gradient.

    Raises:
        TypeError: masks or ``valid`` that are not bool tensors, ``pooled`` that is no bool, ``absent`` that is no
            number, ``dims`` that is no int.
        ValueError: shapes or devices that do not fit each other, masks without a first dimension to pool over,
            ``absent`` outside [0, 1] and not NaN, other ``dims``.

    Source:
        *A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation* (DAVIS);
        *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, section 5.1.

    Example:
        >>> labels, predicted = torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 2]]])
        >>> classes = torch.arange(3).view(3, 1, 1)
        >>> region_similarity(predicted[:, None] == classes, labels[:, None] == classes, pooled=True)
        tensor([1.0000, 0.5000, 0.5000])
    """
    _check_absent(absent)
    check_int("dims", dims)
    check_choice("dims", dims, (2, 3))
    both, either = _region_counts(*_without_void(prediction, truth, valid, pooled, dims), pooled, dims)
    return _of_present(_share(both, either), either, absent)


def contour_f(
    prediction: Tensor,
    truth: Tensor,
    *,
    tolerance: float = 0.008,
    valid: Tensor | None = None,
    pooled: bool = False,
    absent: float = math.nan,
) -> Tensor:
    r"""Contour quality F: how well the contours of two masks lie on each other, within a tolerance.

    .. math::
        F = \frac{2 \, p \, r}{p + r}, \quad
        p = \frac{|\{x \in \partial P : d(x, \partial T) \le \rho\}|}{|\partial P|}, \quad
        r = \frac{|\{x \in \partial T : d(x, \partial P) \le \rho\}|}{|\partial T|}

    with the contours :math:`\partial P, \partial T` and the distance d between pixel centres. A contour consists of
    the pixels that differ from their right, lower or lower right neighbour inside the image; where the mask ends at
    the border of the image there is none. Two empty masks give ``absent``, other masks without contours 1, and one
    contour 0: a mask that fills the image has no contour and equals an empty one here.

    Each pixel looks for its own nearest partner, which several may share. This bounds the one-to-one matching of
    contour pixels, which it replaces, from above, and equals it at tolerance 0.

    Args:
        prediction: predicted masks :math:`P`, bool, ``[..., H, W]``.
        truth: true masks :math:`T`, bool, ``[..., H, W]``.
        tolerance: largest distance :math:`\rho` of contour pixels that match: below 1 a fraction of the diagonal of
            the image, rounded up to whole pixels, from 1 on a number of pixels; at least 0.
        valid: pixels that count, bool, the shape of the masks, or ``[N, H, W]`` for masks ``[N, C, H, W]``; all of
            them if None. The others belong to neither mask, so the contour of a mask that reaches them runs along
            their edge, as in DAVIS. The second source's released code takes them as background of the truth only: leave
            ``valid`` None for its numbers.
        pooled: sum the counts over the first dimension before p, r and F: masks ``[N, C, H, W]`` give ``[C]``. The
            second source's released code does so over a data set, and reports the mean over the foreground classes.
            Images of different sizes go through :class:`JAndF`: padding would move their borders and widen the
            tolerance.
        absent: value of a class that is in neither mask, as in :func:`region_similarity`.

    Returns:
        ``[...]``, without the first dimension if ``pooled``; float32: the counts are exact integers, only the ratios
        are rounded. No gradient.

    Raises:
        TypeError: masks or ``valid`` that are not bool tensors, ``tolerance`` or ``absent`` that is no number,
            ``pooled`` that is no bool.
        ValueError: shapes or devices that do not fit each other, masks without a first dimension to pool over, a
            negative or infinite ``tolerance``, ``absent`` outside [0, 1] and not NaN.

    Source:
        *A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation* (DAVIS);
        *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, section 5.1.

    Example:
        >>> truth = torch.zeros(16, 16, dtype=torch.bool)
        >>> truth[4:10, 4:10] = True
        >>> prediction = truth.roll(2, 1)
        >>> contour_f(prediction, truth, tolerance=1), contour_f(prediction, truth, tolerance=2)
        (tensor(0.5833), tensor(1.))
    """
    check_number("tolerance", tolerance, least=0)
    _check_absent(absent)
    prediction, truth = _without_void(prediction, truth, valid, pooled)
    quality = _f_measure(*_contour_counts(prediction, truth, tolerance, pooled))
    return _of_present(quality, _count(prediction | truth, pooled), absent)


def j_and_f(
    prediction: Tensor,
    truth: Tensor,
    *,
    tolerance: float = 0.008,
    valid: Tensor | None = None,
    pooled: bool = False,
    absent: float = math.nan,
) -> Tensor:
    r"""J&F: the mean of :func:`region_similarity` and :func:`contour_f`.

    Args:
        prediction: predicted masks, bool, ``[..., H, W]``.
        truth: true masks, bool, ``[..., H, W]``.
        tolerance: largest distance of contour pixels that match, see :func:`contour_f`.
        valid: pixels that count, bool, the shape of the masks, or ``[N, H, W]`` for masks ``[N, C, H, W]``; all of
            them if None.
        pooled: sum the counts over the first dimension before the ratios: masks ``[N, C, H, W]`` give ``[C]``.
        absent: value of a class that is in neither mask, as in :func:`region_similarity`.

    Returns:
        ``[...]``, without the first dimension if ``pooled``; float32. No gradient.

    Raises:
        TypeError, ValueError: as :func:`contour_f`.

    Source:
        *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, section 5.1.

    Example:
        >>> mask = torch.tensor([[True, False], [False, False]])
        >>> j_and_f(mask, mask), j_and_f(mask, ~mask)
        (tensor(1.), tensor(0.5000))
    """
    region = region_similarity(prediction, truth, valid=valid, pooled=pooled, absent=absent)
    contour = contour_f(prediction, truth, tolerance=tolerance, valid=valid, pooled=pooled, absent=absent)
    return (region + contour) / 2


class JAndF:
    r"""J and F of a data set whose images differ in size: the counts behind ``pooled=True``, summed image by image.

    .. math:: J_c = \frac{\sum_n |P_{nc} \cap T_{nc}|}{\sum_n |P_{nc} \cup T_{nc}|}

    and F from precision and recall of the contour pixels of all images, as :func:`contour_f` defines them.

    ``counts``, int64 ``[6, C]``, is all that an evaluation needs to go on: save it to resume, sum it over processes.

    Args:
        classes: number of classes C, at least 1.
        tolerance: largest distance of contour pixels that match, see :func:`contour_f`; below 1 a fraction of the
            diagonal of each image.
        absent: J and F of a class that is in neither mask of any image, as in :func:`region_similarity`.
        device: where the counts are kept.

    Raises:
        TypeError: ``classes`` that is no int, ``tolerance`` or ``absent`` that is no number.
        ValueError: ``classes`` below 1, a negative or infinite ``tolerance``, ``absent`` outside [0, 1] and not NaN.

    Source:
        As :func:`contour_f`.

    Example:
        >>> quality, mask = JAndF(classes=1), torch.tensor([[[[True, False]]]])
        >>> quality.update(mask, mask)
        >>> quality.update(mask.mT, ~mask.mT)
        >>> quality.compute()  # 1 of 3 pixels; each edge between the two pixels is found
        (tensor([0.3333]), tensor([1.]))
    """

    def __init__(
        self,
        classes: int,
        *,
        tolerance: float = 0.008,
        absent: float = math.nan,
        device: torch.device | str | None = None,
    ) -> None:
        check_int("classes", classes)
        check_number("classes", classes, least=1)
        check_number("tolerance", tolerance, least=0)
        _check_absent(absent)
        check_device(device)
        self.tolerance = tolerance
        self.absent = absent
        self.counts = torch.zeros(6, classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, truth: Tensor, *, valid: Tensor | None = None) -> None:
        """Count a batch of images of one size.

        Args:
            prediction: predicted masks, bool, ``[N, C, H, W]``.
            truth: true masks, bool, ``[N, C, H, W]``.
            valid: pixels that count, bool, ``[N, C, H, W]`` or ``[N, H, W]``; all of them if None.

        Raises:
            TypeError: masks or ``valid`` that are not bool tensors.
            ValueError: shapes or devices that do not fit each other, another number of classes.
        """
        masks = _without_void(prediction, truth, valid, True)
        check_has_values("prediction", prediction)
        classes = self.counts.shape[1]
        if prediction.dim() != 4 or prediction.shape[1] != classes:
            got = shape_text(prediction.shape)
            raise ValueError(f"prediction: expected [N, {classes}, H, W], got {got} (see classes)")
        counts = _region_counts(*masks, True) + _contour_counts(*masks, self.tolerance, True)
        # Not in place: the counts may have been made in inference mode.
        self.counts = self.counts + torch.stack(counts).to(self.counts.device)

    def compute(self) -> tuple[Tensor, Tensor]:
        """J and F of each class, ``[C]`` both, float32; ``absent`` where nothing was there and nothing found.

        Their means over classes are ``nanmean``.
        """
        both, either, *contours = self.counts
        measures = _share(both, either), _f_measure(*contours)
        region, contour = (_of_present(measure, either, self.absent) for measure in measures)
        return region, contour


def _without_void(
    prediction: object, truth: object, valid: object, pooled: bool, dims: int = 2
) -> tuple[Tensor, Tensor]:
    """The checked masks, empty at the pixels that are not valid."""
    prediction, truth = check_mask("prediction", prediction), check_mask("truth", truth)
    check_like("truth", truth, prediction.shape, "prediction", prediction)
    check_bool("pooled", pooled)
    size = "H, W" if dims == 2 else "D, H, W"
    if prediction.dim() < dims:
        raise ValueError(f"prediction: expected [..., {size}], got {shape_text(prediction.shape)}")
    if pooled and prediction.dim() < dims + 1:
        raise ValueError(f"prediction: expected [N, ..., {size}] to pool over N, got {shape_text(prediction.shape)}")
    if valid is None:
        return prediction, truth
    valid = check_mask("valid", valid)
    if prediction.dim() == dims + 2 and valid.dim() == dims + 1:
        check_like("valid", valid, (len(prediction), *prediction.shape[2:]), "prediction", prediction)
        valid = valid.unsqueeze(1)
    else:
        check_like("valid", valid, prediction.shape, "prediction", prediction)
    return prediction & valid, truth & valid


def check_mask(name: str, value: object) -> Tensor:
    check_real(name, value)
    assert isinstance(value, Tensor)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor (labels == k or scores > threshold), got {value.dtype}")
    if value.dim() < 2:
        raise ValueError(f"{name}: expected [..., H, W], got {shape_text(value.shape)}")
    return value


def check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        problem = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one that torch can use, got {device!r}: {problem}") from error


def _check_absent(absent: float) -> None:
    if not (isinstance(absent, float) and math.isnan(absent)):
        check_number("absent", absent, least=0, most=1)


def _region_counts(prediction: Tensor, truth: Tensor, pooled: bool, dims: int = 2) -> tuple[Tensor, ...]:
    """Pixels of both masks and of either."""
    return _count(prediction & truth, pooled, dims), _count(prediction | truth, pooled, dims)


def _contour_counts(prediction: Tensor, truth: Tensor, tolerance: float, pooled: bool) -> tuple[Tensor, ...]:
    """Contour pixels: the predicted ones that are near true ones, all predicted; the true ones near, all true."""
    radius = _radius(tolerance, *prediction.shape[-2:])
    predicted, true = _contour(prediction), _contour(truth)
    masks = predicted & _dilate(true, radius), predicted, true & _dilate(predicted, radius), true
    return tuple(_count(mask, pooled) for mask in masks)


def _f_measure(found: Tensor, predicted: Tensor, met: Tensor, true: Tensor) -> Tensor:
    precision, recall = _share(found, predicted), _share(met, true)
    # The smallest normal number stands for 0 in 0 / 0; a sum above 0 is at least one pixel's share, far larger.
    return 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float32).tiny)


def _count(mask: Tensor, pooled: bool, dims: int = 2) -> Tensor:
    per_mask = mask.sum(tuple(range(-dims, 0)))
    return per_mask.sum(0) if pooled else per_mask


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``; all of it where there is nothing to count."""
    return torch.where(whole > 0, (part.double() / whole.clamp(min=1)).float(), 1.0)


def _of_present(measure: Tensor, either: Tensor, absent: float) -> Tensor:
    """The measure where ``either`` mask has a pixel, and ``absent`` elsewhere."""
    return measure.masked_fill(either == 0, float(absent))


def _radius(tolerance: float, height: int, width: int) -> float:
    diagonal = math.sqrt(height * height + width * width)
    # No two pixels are farther apart than the diagonal: the cap only saves steps.
    return math.ceil(tolerance * diagonal) if tolerance < 1 else min(tolerance, diagonal)


def _contour(mask: Tensor) -> Tensor:
    """The pixels that differ from their right, lower or lower right neighbour; beyond the border nothing differs."""
    contour = torch.zeros_like(mask)
    contour[..., :, :-1] |= mask[..., :, :-1] ^ mask[..., :, 1:]
    contour[..., :-1, :] |= mask[..., :-1, :] ^ mask[..., 1:, :]
    contour[..., :-1, :-1] |= mask[..., :-1, :-1] ^ mask[..., 1:, 1:]
    return contour


def _dilate(mask: Tensor, radius: float) -> Tensor:
    """The pixels within ``radius`` of a pixel of the mask.

    A disc is a stack of row spans. From its top row to its middle they only grow, so one map of spans, widened by a
    pixel when a row needs it, serves all rows: a few byte operations per pixel and row of the disc. For 8 masks of
    500 x 375 and radius 5 on a CPU this is tens of times faster than a distance transform of each mask or a
    convolution with the disc.
    """
    near = torch.zeros_like(mask)
    span, half = mask.clone(), 0
    for row in range(math.floor(radius), -1, -1):
        while math.sqrt((half + 1) ** 2 + row**2) <= radius:
            half += 1
            _spread(span, mask, half, -1)
        _spread(near, span, row, -2)
    return near


def _spread(target: Tensor, mask: Tensor, step: int, dim: int) -> None:
    """Add the mask, moved by ``step`` pixels to either side, to ``target``."""
    size = mask.shape[dim]
    if step < size:
        target.narrow(dim, step, size - step).logical_or_(mask.narrow(dim, 0, size - step))
        target.narrow(dim, 0, size - step).logical_or_(mask.narrow(dim, step, size - step))
