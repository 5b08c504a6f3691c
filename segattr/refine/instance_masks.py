"""Instance pseudo-masks: attribution maps of boxes to masks that a network can be trained on."""

import math

import torch
from torch import Tensor

from segattr.networks.detector import check_corners
from segattr.refine.dense_crf import BBAM_CRF, CRFSettings, dense_crf
from segloss.common.checks import (
    check_choice,
    check_colours,
    check_finite,
    check_floating,
    check_fractions,
    check_has_values,
    check_ignore_index,
    check_integer,
    check_like,
    check_number,
    check_real,
    require,
    shape_text,
    values_text,
)
from segloss.common.reduction import wide_dtype

_DEFAULTS = {"area": (0.15, 0.8), "value": (0.8, 0.2)}  # foreground, background
_SURE = 0.9  # probability from which the dense CRF's foreground counts, as in the released code
_PIXELS = 375 * 500  # of the images of VOC, for which the released code's smoothing is meant
_LEAST = 0.2  # of the box: what the dense CRF leaves below is no mask of an object


def instance_masks(
    bbams: Tensor,
    boxes: Tensor,
    image: Tensor | None = None,
    *,
    rule: str = "area",
    foreground: float | None = None,
    background: float | None = None,
    smoothing: float | None = None,
    crf: CRFSettings = BBAM_CRF,
    ignore_index: int = 255,
) -> Tensor:
    r"""Instance pseudo-masks of the objects of one image, with pixels of which one cannot be sure left out.

    Each object is treated alone, within its box; outside, all is background. ``rule`` says what the thresholds are.

    ``"area"``, the default: **shares of the box**. :math:`t_\rho` is the value at the rank
    :math:`\lfloor \rho \cdot \text{area} \rfloor` of the map's values in the box, the largest being at rank 0.

    .. math::
        y = \begin{cases}
            1 & M \ge t_{fg} \text{ and } M > 0 \\
            0 & M < t_{bg} \text{ or } M = 0 \\
            \text{ignored} & \text{otherwise}
        \end{cases}

    With an image, each of the two levels is refined alone: :math:`\min(M / t_\rho, 1)` is smoothed by a Gaussian within
    the box, brought to a maximum of 1 and refined by :func:`dense_crf`. The foreground is what is above 0.9 for
    :math:`t_{fg}`, the background what is not for :math:`t_{bg}`. If the latter leaves less than a fifth of the box to
    the object, the CRF has lost it, and nothing in the box is called background.

    ``"value"``, as the paper has it: 1 for :math:`M > \theta_{fg}`, 0 for :math:`M < \theta_{bg}`, ignored between;
    with an image, for the output of :func:`dense_crf` in place of M.

    The area rule is the default because a BBAM is sparse and covers its object in part, and its values depend on the
    weight of its sparsity: no fixed value suits many objects. Those whose maximum is below :math:`\theta_{fg}` get no
    mask from the value rule, with or without CRF. A map that is 0 all over its box says nothing: the box is ignored.

    Masks go on to :func:`semantic_labels`, to :func:`grow_seeds` as they are (with probabilities of 1 - p and p), and
    to :func:`merge_proposals` as ``masks == 1``.

    Args:
        bbams: attribution map M of each object, ``[n, H, W]``, in [0, 1], at the resolution of the image.
        boxes: x1, y1, x2, y2 in pixels, far ends exclusive, ``[n, 4]``. The pixels of a box are those whose centres it
            holds; what lies outside the image does not count. A box that holds no pixel's centre gives an empty mask.
        image: RGB in [0, 1], ``[3, H, W]``, or any C >= 1 channels in the unit of the CRF's ``sigma_rgb``; no CRF if
            None.
        rule: ``"area"`` or ``"value"``.
        foreground: share :math:`\rho_{fg}` or value :math:`\theta_{fg}`, in [0, 1]; 0.15 or 0.8 if None.
        background: share :math:`\rho_{bg}`, at least ``foreground``, or value :math:`\theta_{bg}`, at most
            ``foreground``; 0.8 or 0.2 if None.
        smoothing: standard deviation of the Gaussian in pixels, at least 0; only the area rule with an image uses it.
            If None, :math:`2 (16 + 48 \sqrt a) \sqrt{HW / (375 \cdot 500)}` with the share a of the image that the box
            has. More of it finds more of objects of which the map knows a part, and less precisely.
        crf: settings of :func:`dense_crf`.
        ignore_index: label of the pixels that are left out; neither 0 nor 1.

    Returns:
        int64, ``[n, H, W]``: 1 on the object, 0 on the background, or ``ignore_index``. No gradient.

    Raises:
        TypeError: ``bbams`` or ``image`` that are not floating point, ``boxes`` that are no real numbers, settings of
            the wrong type.
        ValueError: shapes or devices that do not fit each other, no pixel, maps outside [0, 1], NaN or infinity, boxes
            without an area or wholly outside the image, an unknown ``rule``, thresholds outside [0, 1] or in the wrong
            order, an ``ignore_index`` of 0 or 1, an image of three channels outside [0, 1] by more than 0.01 with the
            default ``crf``.

    Source:
        *BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance Segmentation*, the
        dissertation's section 5.3.3. The area rule is that of the authors' released code, with these differences: its
        Gaussian has :math:`16 + 48 \sqrt a` pixels whatever the size of the image, and is cut off at one standard
        deviation; and where a mask has less than a fifth of a box that is below a tenth of the image, or the map is 0,
        it starts again from the filled box, where this leaves pixels out.

    Example:
        >>> bbams = torch.tensor([[[0.0, 0.1, 0.4, 0.6, 0.3, 0.9]]])
        >>> boxes = torch.tensor([[0, 0, 5, 1]])
        >>> instance_masks(bbams, boxes, foreground=0.2, background=0.4)
        tensor([[[  0,   0,   1,   1, 255,   0]]])
        >>> instance_masks(bbams, boxes, rule="value", foreground=0.5)
        tensor([[[  0,   0, 255,   1, 255,   0]]])
    """
    check_choice("rule", rule, tuple(_DEFAULTS))
    _check_maps(bbams)
    check_has_values("bbams", bbams)
    inside = _inside(boxes, bbams)
    _check_image(image, bbams)
    if image is not None and crf is BBAM_CRF:
        check_colours(image[None], crf["sigma_rgb"])
    foreground, background = _thresholds(rule, foreground, background)
    if smoothing is not None:
        check_number("smoothing", smoothing, least=0)
    _check_ignored(ignore_index)
    with torch.no_grad(), torch.autocast(bbams.device.type, enabled=False):
        maps = bbams.to(wide_dtype(bbams)) * inside
        known = (maps > 0).flatten(1).any(1)[:, None, None]
        if rule == "value":
            if image is not None:
                maps = _refine(maps, image, crf)
            is_object, is_background = maps > foreground, maps < background
        else:
            low, high = (_at_rank(maps, inside, share) for share in (foreground, background))
            if image is None:
                is_object, is_background = (maps >= low) & (maps > 0), (maps < high) | (maps == 0)
            else:
                levels = torch.cat([_levelled(maps, low), _levelled(maps, high)])
                twice = torch.cat([inside, inside])
                is_object, not_background = (
                    (_refine(_smooth(levels, twice, smoothing), image, crf) > _SURE).logical_and(twice).chunk(2)
                )
                shares = not_background.flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
                is_background = ~not_background & (shares >= _LEAST)[:, None, None]
        labels = torch.where(is_object, 1, torch.where(is_background, 0, ignore_index))
        return torch.where(known, labels, ignore_index).where(inside, 0)


def semantic_labels(masks: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    r"""Semantic labels of an image from the masks of its objects.

    .. math::
        y = \begin{cases}
            c & \text{all objects with the pixel are of class } c \\
            \text{ignored} & \text{objects of several classes have it} \\
            \text{ignored} & \text{none has it and one ignores it} \\
            0 & \text{otherwise}
        \end{cases}

    Args:
        masks: 1 on the object, 0 on the background, ``ignore_index`` where it is not known, integers, ``[n, H, W]``,
            as of :func:`instance_masks`; or bool.
        labels: class of each object, integers of at least 1, ``[n]``; 0 is the background.
        ignore_index: label of the pixels that are left out, in ``masks`` and in the result; no class.

    Returns:
        int64, ``[H, W]``; all background without objects.

    Raises:
        TypeError: ``masks`` that are neither integers nor bool, ``labels`` that are not integers, ``ignore_index`` that
            is no integer.
        ValueError: shapes or devices that do not fit each other, masks of other values, labels below 1,
            ``ignore_index`` that is the label of a class or 0 or 1.

    Source:
        *BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance Segmentation*, the
        dissertation's section 5.3.3. In the authors' released code a pixel that one object ignores is ignored whatever
        the others say, and an object whose box lies in another one wins its pixels.

    Example:
        >>> masks = torch.tensor([[[1, 1, 1, 255, 0]], [[0, 1, 255, 255, 0]]])
        >>> semantic_labels(masks, torch.tensor([3, 7]))
        tensor([[  3, 255,   3, 255,   0]])
    """
    _check_ignored(ignore_index)
    masks = _checked_masks(masks, ignore_index)
    _check_labels(labels, masks, ignore_index)
    nothing = masks.new_zeros(1, *masks.shape[1:])
    claims = torch.cat([nothing, (masks == 1) * labels.long()[:, None, None]])
    largest = claims.amax(0)
    least = claims.where(claims > 0, largest).amin(0)
    claimed = largest > 0
    unsure = torch.where(claimed, largest != least, (masks == ignore_index).any(0))
    return largest.masked_fill(unsure, ignore_index)


def _at_rank(maps: Tensor, inside: Tensor, share: float) -> Tensor:
    """The value of each map at a share of its box, from the largest on, ``[n, 1, 1]``."""
    area = inside.flatten(1).sum(1)
    rank = (share * area.double()).long().minimum(area - 1).clamp(min=0)
    falling = maps.masked_fill(~inside, -1).flatten(1).sort(1, descending=True).values
    return falling.gather(1, rank[:, None])[:, :, None].clamp(min=0)


def _levelled(maps: Tensor, level: Tensor) -> Tensor:
    """Maps in units of the level, at most 1; where the level is 0, all that is above it."""
    return torch.where(level > 0, maps / level, (maps > 0).to(maps.dtype)).clamp(max=1)


def _smooth(maps: Tensor, inside: Tensor, sigma: float | None) -> Tensor:
    """Maps under a Gaussian, 0 outside the boxes, with a maximum of 1; as many sigmas as maps if None."""
    height, width = maps.shape[1:]
    if sigma is None:
        share = inside.to(maps.dtype).mean((1, 2))
        sigmas = 2 * (16 + 48 * share.sqrt()) * math.sqrt(height * width / _PIXELS)
    else:
        sigmas = maps.new_full((len(maps),), sigma, dtype=torch.float64).to(maps.dtype)  # infinite is fine

    def gaussian(length: int) -> Tensor:
        place = torch.arange(length, dtype=maps.dtype, device=maps.device)
        apart = (place[:, None] - place) / sigmas.clamp(min=1e-3)[:, None, None]
        kernel = (apart.square() / -2).exp()
        return kernel / kernel.sum(2, keepdim=True)  # at the border of the image, of what is there

    smooth = gaussian(height) @ maps @ gaussian(width).mT * inside
    return smooth / smooth.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def _refine(maps: Tensor, image: Tensor, crf: CRFSettings) -> Tensor:
    """Probability of the foreground after the dense CRF of each object against its background."""
    maps = maps.clamp(max=1)
    try:
        return dense_crf(torch.stack([1 - maps, maps], 1), image.expand(len(maps), *image.shape), **crf)[:, 1]
    except (TypeError, ValueError) as error:  # all else has been checked
        raise type(error)(f"crf: {error}") from error


def _inside(boxes: object, bbams: Tensor) -> Tensor:
    """Pixels of the checked boxes, ``[n, H, W]``."""
    check_real("boxes", boxes)
    assert isinstance(boxes, Tensor)
    check_like("boxes", boxes, (len(bbams), 4), "bbams", bbams)
    check_corners("boxes", boxes)
    check_finite("boxes", boxes)
    height, width = bbams.shape[1:]
    x1, y1, x2, y2 = boxes.detach().double().unbind(1)
    for problem, fits in (
        ("expected x1 < x2 and y1 < y2", (x1 < x2) & (y1 < y2)),
        (f"expected a part of the image of {height} x {width}", (x2 > 0) & (x1 < width) & (y2 > 0) & (y1 < height)),
    ):
        require(
            "boxes",
            boxes,
            lambda fits=fits: fits.all(),  # type: ignore[misc]
            lambda fits=fits, problem=problem: f"{problem}, got {boxes[~fits][0].tolist()} (see bbams)",  # type: ignore[misc]
        )
    y, x = (torch.arange(length, device=boxes.device) + 0.5 for length in (height, width))
    rows = (y >= y1[:, None]) & (y < y2[:, None])
    columns = (x >= x1[:, None]) & (x < x2[:, None])
    return rows[:, :, None] & columns[:, None]


def _thresholds(rule: str, foreground: float | None, background: float | None) -> tuple[float, float]:
    usual = _DEFAULTS[rule]
    foreground = usual[0] if foreground is None else foreground
    background = usual[1] if background is None else background
    check_number("foreground", foreground, least=0, most=1)
    check_number("background", background, least=0, most=1)
    if background < foreground if rule == "area" else background > foreground:
        order = "least" if rule == "area" else "most"
        raise ValueError(f"background: expected at {order} foreground, {foreground:g}, got {background:g}")
    return foreground, background


def _check_maps(bbams: object) -> None:
    check_floating("bbams", bbams)
    assert isinstance(bbams, Tensor)
    if bbams.dim() != 3 or 0 in bbams.shape[1:]:
        raise ValueError(f"bbams: expected [n, H, W] with at least one pixel, got {shape_text(bbams.shape)}")
    check_fractions("bbams", bbams)


def _check_image(image: object, bbams: Tensor) -> None:
    if image is None:
        return
    check_floating("image", image)
    assert isinstance(image, Tensor)
    if image.dim() != 3 or image.shape[0] == 0:
        raise ValueError(f"image: expected [C, H, W] with C >= 1, got {shape_text(image.shape)}")
    check_like("image", image, (len(image), *bbams.shape[1:]), "bbams", bbams)
    check_finite("image", image)


def _checked_masks(masks: object, ignore_index: int) -> Tensor:
    check_real("masks", masks)
    assert isinstance(masks, Tensor)
    if masks.dtype != torch.bool:
        check_integer("masks", masks)
    if masks.dim() != 3:
        raise ValueError(f"masks: expected [n, H, W], got {shape_text(masks.shape)}")
    masks = masks.long()  # first: of narrower integers, 255 equals -1

    def known() -> Tensor:
        return (masks == 0) | (masks == 1) | (masks == ignore_index)

    require(
        "masks",
        masks,
        lambda: known().all(),
        lambda: f"expected 0, 1 or {ignore_index} to ignore, got {values_text(masks[~known()])} (see ignore_index)",
    )
    return masks


def _check_labels(labels: object, masks: Tensor, ignore_index: int) -> None:
    check_integer("labels", labels)
    assert isinstance(labels, Tensor)
    check_like("labels", labels, masks.shape[:1], "masks", masks)
    labels = labels.long()
    require("labels", labels, lambda: (labels >= 1).all(), lambda: f"expected at least 1, got {labels.min().item()}")
    require(
        "labels",
        labels,
        lambda: (labels != ignore_index).all(),
        lambda: f"expected classes, got {ignore_index}, which is ignored (see ignore_index)",
    )


def _check_ignored(ignore_index: object) -> None:
    check_ignore_index(ignore_index)
    if ignore_index in (0, 1):
        raise ValueError(f"ignore_index: expected neither 0 nor 1, got {ignore_index}")
