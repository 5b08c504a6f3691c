"""Dense CRF inference: class probabilities that follow the edges of an image."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.bilateral import LatticeError, PreparedFilter, check_guide, check_space, make_plan
from segloss.common.checks import (
    check_bool,
    check_choice,
    check_colours,
    check_floating,
    check_fractions,
    check_has_values,
    check_ignore_index,
    check_int,
    check_integer,
    check_labels,
    check_like,
    check_number,
    check_real,
    check_spacing,
    check_tags,
    check_two_classes,
    require,
    shape_text,
)
from segloss.common.precision import full_precision
from segloss.common.reduction import LARGEST, wide_dtype, widen
from segloss.common.resizing import resize_linear

_METHODS = ("auto", "exact", "blocksparse", "lattice")
_WORTH_A_LATTICE = 10000  # pixels; below, pairs of tiles are cheap enough
_FLOOR = 1e-5  # of the probabilities in the unary term, as pydensecrf clips them
_ROUNDING = 1e-3  # above 1, of probabilities that come from half precision or an interpolation
_NARROWEST = 1e-10  # smaller sigmas give the same kernel: no two different pixels meet
_BLOCK = 32  # rows or columns of a band that are computed at a time

Filter = Callable[[Tensor], Tensor]  # [B, K, *spatial] to the same


class CRFSettings(TypedDict):
    """Keyword arguments of :func:`dense_crf` that make up a published setting: ``dense_crf(p, image, **IRN_CRF)``."""

    iterations: int
    weight: float
    sigma_rgb: float
    sigma_xy: float
    smooth_weight: float
    smooth_sigma_xy: float


IRN_CRF: CRFSettings = {
    "iterations": 10,
    "weight": 10.0,
    "sigma_rgb": 5 / 255,
    "sigma_xy": 50.0,
    "smooth_weight": 3.0,
    "smooth_sigma_xy": 3.0,
}

BBAM_CRF: CRFSettings = {
    "iterations": 10,
    "weight": 4.0,
    "sigma_rgb": 3 / 255,
    "sigma_xy": 80.0,
    "smooth_weight": 3.0,
    "smooth_sigma_xy": 1.0,
}

DEEPLAB_CRF: CRFSettings = {
    "iterations": 10,
    "weight": 4.0,
    "sigma_rgb": 3 / 255,
    "sigma_xy": 67.0,
    "smooth_weight": 3.0,
    "smooth_sigma_xy": 1.0,
}


def dense_crf(
    probabilities: Tensor,
    image: Tensor,
    *,
    iterations: int = 10,
    weight: float = 10.0,
    sigma_rgb: float | None = None,
    sigma_xy: float = 50.0,
    smooth_weight: float = 3.0,
    smooth_sigma_xy: float = 3.0,
    spacing: Sequence[float] | None = None,
    own: bool = False,
    filled: bool = False,
    valid: Tensor | None = None,
    scale_factor: float = 1.0,
    method: str = "auto",
    tolerance: float = 1e-2,
    backend: str = "auto",
) -> Tensor:
    r"""Mean-field inference of the fully connected CRF: a Potts model over all pairs of pixels of an image.

    .. math:: Q^k_p \leftarrow \frac{1}{Z_p} \exp\Big(\ln P^k_p
        + \sum_m w_m \sum_{q \ne p} \frac{K^m_{pq}}{\sqrt{D^m_p D^m_q}} Q^k_q\Big), \qquad D^m_p = \sum_q K^m_{pq}

    at all pixels at once, starting from Q = P, with two kernels: the bilateral one of
    :func:`~segloss.bilateral_filter`, of ``weight``, ``sigma_rgb`` and ``sigma_xy``, and a Gaussian of
    position alone, of ``smooth_weight`` and ``smooth_sigma_xy``. The kernels are normalised symmetrically. A pixel
    counts in its own D, which is at least 1 therefore, but sends no message to itself.

    Only the classes that are present in an image are carried: those with a probability above 0 at some valid pixel.
    Others stay 0. So to refine the softmax of a network among the tagged classes, background included, pass
    ``probabilities * tags[:, :, None, None]``. For labels, see :func:`label_probabilities`.

    The defaults are those of IRN's label CRF, ``IRN_CRF``; ``dense_crf(probabilities, image, **BBAM_CRF)`` takes those
    of BBAM, and ``**DEEPLAB_CRF`` is for the softmax of a segmentation network. The lattice, or which pairs of pixels
    count, is found once for all iterations.

    Args:
        probabilities: P, ``[B, K, *spatial]`` of 1 to 3 spatial dimensions, in [0, 1], K >= 2. Only their ratios count:
            they need not sum to 1. In :math:`\ln P` the share of a class is at least 1e-5. A pixel where all are 0 does
            not know its class.
        image: guide, ``[B, C, *spatial]``: RGB in [0, 1] (see :func:`~segloss.denormalize`), or any C >= 1 channels
            in the unit of ``sigma_rgb``. One that is expanded along B, as by ``image.expand(B, -1, -1, -1)``, is looked
            at once for all.
        iterations: number of updates, at least 0.
        weight: of the bilateral kernel, at least 0; 0 leaves it out. What pydensecrf calls ``compat``.
        sigma_rgb: width of the bilateral kernel in colour, above 0, in the unit of ``image``; infinite: colour does not
            count. What pydensecrf calls ``srgb`` is 255 times as much. None: 5/255, for RGB in [0, 1]; three channels
            beyond that are refused.
        sigma_xy: width of the bilateral kernel in space, above 0, in pixels of ``image`` or the unit of ``spacing``.
        smooth_weight: of the kernel of position alone, at least 0; 0 leaves it out.
        smooth_sigma_xy: its width, above 0, in pixels or the unit of ``spacing``.
        spacing: physical size of a pixel or voxel along each spatial axis, (y, x) or (z, y, x), above 0. None: pixels.
        own: keep the message of a pixel to itself, q = p, as pydensecrf and the authors' released code do.
        filled: of the lattice: with vertices that no pixel has, but two of their neighbours have. On the photographs
            below, .5 to .8 times as many labels are wrong, in 1.1 to 1.9 times the time.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None. The others send and receive no messages.
        scale_factor: in (0, 1]: resolution of the bilateral kernel, image and messages averaged over cells, and results
            interpolated. It loses detail; the kernel of position alone and :math:`\ln P` keep their resolution.
        method: ``"exact"`` visits all pairs of pixels, ``"blocksparse"`` leaves out or approximates those that count
            little, ``"lattice"`` replaces the bilateral kernel by one on a permutohedral lattice, far faster: on
            photographs it gave 1 to 2.6% of the pixels another label than the block-sparse kernel at a tolerance of
            2e-2 does (4 classes, ``IRN_CRF`` and ``BBAM_CRF``). ``"auto"`` is exact below 2,500 pixels, block-sparse
            below 10,000, and from there takes the lattice, or block-sparse for sigmas so small that a lattice cannot
            tell its vertices apart. There is no low rank: its error is small in proportion to the whole image, not to
            the small D of rare colours, and narrow kernels need too many landmarks.
        tolerance: of the block-sparse method, as in :func:`~segloss.bilateral_filter`; the lattice has none.
        backend: as in :func:`~segloss.bilateral_filter`.

    Returns:
        Q, ``[B, K, *spatial]``, a constant: no gradient flows. It sums to 1 over the classes, or is 0 for images in
        which no class is present; P, made to sum to 1, at pixels that are not valid. float32 (float64 where
        probabilities or image are float64). Of values that are not checked (see :func:`segloss.check_values`), negative
        ones count as 0, and NaN and infinity may spread over their image.

    Raises:
        TypeError: ``probabilities`` or ``image`` that are not floating point, ``valid`` that is not bool, settings of
            the wrong type.
        ValueError: shapes or devices that do not fit each other, fewer than 2 classes, probabilities outside [0, 1],
            NaN or infinity in ``image``, three channels of it outside [0, 1] by more than 0.01 without a
            ``sigma_rgb``, settings outside their range, a ``scale_factor`` that leaves no pixel, an unknown ``method``
            or ``backend``, a ``backend`` that cannot run; ``method="lattice"`` and sigmas that are too small for it.

    Source:
        *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*, eq. (3) and algorithm 1, where
        messages come from all other pixels. The authors' released code, and pydensecrf, which is built on it, keep the
        pixel itself, a further :math:`w_m Q^k_p / D^m_p`, and approximate K by a lattice. IRN_CRF: the released code of
        *Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations*; BBAM_CRF: that of *BBAM:
        Bounding Box Attribution Map for Weakly Supervised Semantic and Instance Segmentation*; DEEPLAB_CRF: that of
        *DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully Connected
        CRFs*, for ResNet-101. The lattice: *Fast High-Dimensional Filtering Using the Permutohedral Lattice*.

    Example:
        A pixel of unknown class takes that of the pixels of its colour:

        >>> image = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 3, 1, 4)
        >>> left = torch.tensor([0.9, 0.5, 0.1, 0.1])
        >>> dense_crf(torch.stack([left, 1 - left])[None, :, None], image, weight=2, smooth_weight=0)[0, 0]
        tensor([[0.9311, 0.7031, 0.0426, 0.0426]])
    """
    _check_probabilities(probabilities)
    check_has_values("probabilities", probabilities)
    check_guide(image, probabilities, "probabilities")
    check_spacing(spacing, image.dim() - 2, "image", image)
    _check_valid(valid, probabilities)
    check_int("iterations", iterations)
    check_number("iterations", iterations, least=0)
    check_number("weight", weight, least=0)
    check_number("smooth_weight", smooth_weight, least=0)
    if sigma_rgb is None:
        sigma_rgb = IRN_CRF["sigma_rgb"]
        check_colours(image, sigma_rgb)
    for name, sigma in (("sigma_rgb", sigma_rgb), ("sigma_xy", sigma_xy), ("smooth_sigma_xy", smooth_sigma_xy)):
        check_number(name, sigma, above=0, finite=False)
    check_bool("own", own)
    check_bool("filled", filled)
    check_number("scale_factor", scale_factor, above=0, most=1)
    check_choice("method", method, _METHODS)
    planned = make_plan(method, tolerance, backend, "float32", image).method
    dtype = torch.promote_types(wide_dtype(probabilities), wide_dtype(image))
    if probabilities.numel() == 0:
        return torch.zeros_like(probabilities, dtype=dtype)
    if min(image.shape[2:]) * scale_factor < 1:
        raise ValueError(
            f"scale_factor: expected to leave at least 1 pixel of {shape_text(image.shape)}, got {scale_factor}"
        )
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False), full_precision():
        if valid is None and image.stride(0) == 0:
            image = image[:1]  # expanded: one kernel for all
        image = widen(image).to(dtype)
        mask = torch.ones_like(image[:, :1]) if valid is None else valid[:, None].to(dtype)
        slots, present = _present_classes(probabilities, mask)
        kernels = []
        if slots.shape[1] > 1:  # a single class has no other to compete with
            if weight > 0:
                settings = {"tolerance": tolerance, "backend": backend, "filled": filled}
                settings["method"] = method if planned == "auto" else planned
                settings |= {"sigma_rgb": sigma_rgb, "spacing": spacing}
                bilateral = _bilateral(image, mask, sigma_xy, scale_factor, settings)
                kernels.append((min(weight, LARGEST), _symmetric(bilateral, mask), bilateral))
            if smooth_weight > 0:
                smooth = _smooth(mask, smooth_sigma_xy, spacing)
                kernels.append((min(smooth_weight, LARGEST), _symmetric(smooth, mask), smooth))
        index = _over(slots, probabilities).expand(-1, -1, *image.shape[2:])
        chosen = probabilities.gather(1, index).to(dtype)
        refined = _mean_field(chosen, present, kernels, iterations, own)
        return torch.zeros_like(probabilities, dtype=dtype).scatter_(1, index, refined)


def label_probabilities(labels: Tensor, tags: Tensor, *, confidence: float = 0.7, ignore_index: int = 255) -> Tensor:
    r"""Probabilities for :func:`dense_crf` from labels that are right with a given confidence.

    The label of a pixel has the probability ``confidence``, and the other classes of its image share the rest equally.
    Where there is no label, all classes of the image have the same.

    Args:
        labels: class of each pixel, integer, ``[B, *spatial]``.
        tags: 1 where a class may occur in the image, ``[B, K]``; the background is a class like others.
        confidence: in (0, 1).
        ignore_index: label of pixels without one.

    Returns:
        ``[B, K, *spatial]``, summing to 1 over the classes (0 in images without tags); 0 for classes without a tag. A
        class that is alone in its image has 1. float32 (float64 for float64 tags).

    Raises:
        TypeError: ``labels`` that are no integers, ``tags`` that are no real numbers, settings of the wrong type.
        ValueError: shapes or devices that do not fit each other, tags other than 0 and 1, labels that are neither a
            tagged class of their image nor ``ignore_index``, ``confidence`` outside (0, 1).

    Source:
        The released code of *Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations*, which
        refines seeds so, with ``IRN_CRF``.

    Example:
        >>> labels = torch.tensor([[[0, 2, 255]]])
        >>> label_probabilities(labels, torch.tensor([[1, 0, 1]]))[0, :, 0]
        tensor([[0.7000, 0.3000, 0.5000],
                [0.0000, 0.0000, 0.0000],
                [0.3000, 0.7000, 0.5000]])
    """
    check_integer("labels", labels)
    if labels.dim() < 2:
        raise ValueError(f"labels: expected [B, *spatial], got {shape_text(labels.shape)}")
    check_real("tags", tags)
    if tags.dim() != 2:
        raise ValueError(f"tags: expected [B, K], got {shape_text(tags.shape)}")
    check_tags(tags, labels, "labels", tags.shape[1])
    check_number("confidence", confidence, above=0, below=1)
    check_ignore_index(ignore_index)
    labels = labels.long()
    check_labels(labels, tags.shape[1], ignore_index, "tags")
    dtype = wide_dtype(tags)
    known = (labels != ignore_index)[:, None]
    tagged = _over(tags != 0, known)
    chosen = known & (labels[:, None] == _over(torch.arange(tags.shape[1], device=labels.device)[None], known))
    require(
        "labels",
        labels,
        lambda: (tagged | ~chosen).all(),
        lambda: f"expected classes with a tag, got {labels[(chosen & ~tagged).any(1)][0].item()} without one in tags",
    )
    count = tagged.sum(1, keepdim=True).to(dtype)
    right = torch.where(count == 1, torch.ones_like(count), confidence)
    wrong = (1 - right) / (count - 1).clamp(min=1)
    unlabelled = torch.where(known, wrong, 1 / count.clamp(min=1))
    return torch.where(chosen, right, unlabelled).where(tagged, 0)


def _present_classes(probabilities: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the classes to carry, ``[B, C]``, and which of them the image has, ``[B, C, *(1, ...)]``."""
    present = ((probabilities > 0) & (mask > 0)).flatten(2).any(2)
    most = max(1, int(present.sum(1).max()))
    slots = present.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    return slots, _over(present.gather(1, slots), probabilities)


def _over(per_class: Tensor, maps: Tensor) -> Tensor:
    """``[B, C]`` as maps of a single pixel, of as many dimensions as ``maps``."""
    return per_class.unflatten(1, (-1, *(1,) * (maps.dim() - 2)))


def _mean_field(
    probabilities: Tensor, present: Tensor, kernels: list[tuple[float, Tensor, Filter]], iterations: int, own: bool
) -> Tensor:
    """``kernels``: weights, scales before and after the filters, and these. Overwrites ``probabilities``."""
    q = probabilities.clamp_(min=0)
    q /= q.sum(1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
    absent = present.logical_not() & present.any(1, keepdim=True)  # an image without classes would have NaN
    unary = q.clamp(min=_FLOOR).log_().masked_fill_(absent, -torch.inf)
    torch.softmax(unary, 1, out=q)
    scaled, summed = torch.empty_like(unary), torch.empty_like(unary)
    for _ in range(iterations):
        logits = unary
        for weight, scale, kernel in kernels:
            message = kernel(torch.mul(scale, q, out=scaled))
            if not own:
                message -= scaled
            logits = torch.addcmul(logits, scale, message, value=weight, out=summed)
        torch.softmax(logits, 1, out=q)
    return q.masked_fill_(~present, 0)


def _symmetric(kernel: Filter, mask: Tensor) -> Tensor:
    """What divides K by the roots of its row and column sums, where it stands before and after; 0 at invalid pixels."""
    # A pixel has weight 1 with itself, so that sums below 1 are errors of the approximation.
    return mask * kernel(mask).clamp(min=1).rsqrt()


def _smooth(mask: Tensor, sigma: float, spacing: Sequence[float] | None) -> Filter:
    """The Gaussian kernel of position: a product of one for each axis."""

    def bands(length: int, step: float) -> list[tuple[slice, slice, Tensor]]:
        """Stretches of an axis, the stretches that they reach, and the weights between both."""
        narrow = max(sigma / step, _NARROWEST)
        reach = math.sqrt(-2 * math.log(torch.finfo(mask.dtype).eps)) * narrow  # beyond are less than rounding errors
        place = torch.arange(length, dtype=mask.dtype, device=mask.device) / narrow
        found = []
        for first in range(0, length, _BLOCK):
            inside = slice(first, min(first + _BLOCK, length))
            near = slice(int(max(0, first - reach)), int(min(length, inside.stop + reach)))
            found.append((inside, near, ((place[inside, None] - place[near]).square() / -2).exp()))
        return found

    size = mask.shape[2:]
    steps = (1.0,) * len(size) if spacing is None else map(float, spacing)
    *lead, last = (bands(length, step) for length, step in zip(size, steps, strict=True))

    def smooth(values: Tensor) -> Tensor:
        maps = values.reshape(-1, *size[-2:])
        smoothed = torch.empty_like(maps)
        for inside, near, weights in last:
            torch.matmul(maps[..., near], weights.t(), out=smoothed[..., inside])
        for axis in reversed(range(len(lead))):
            across = smoothed.view(-1, size[axis], math.prod(size[axis + 1 :]))
            smoothed = torch.empty_like(across)
            for inside, near, weights in lead[axis]:
                torch.matmul(weights, across[:, near], out=smoothed[:, inside])
        return smoothed.view_as(values)

    return smooth


def _bilateral(image: Tensor, mask: Tensor, sigma_xy: float, scale_factor: float, settings: dict[str, Any]) -> Filter:
    """The kernel of colour and position; at a lower resolution, values are averaged over cells before it."""
    size = image.shape[2:]
    small = [round(length * scale_factor) for length in size]

    def down(values: Tensor) -> Tensor:
        return F.interpolate(values, small, mode="area")

    def up(values: Tensor) -> Tensor:
        return resize_linear(values, size)

    if small == list(size):
        return _prepared(image, sigma_xy, settings)
    cell = math.prod(size) / math.prod(small)  # pixels
    colour = down(image * mask) / down(mask).clamp(min=torch.finfo(mask.dtype).tiny)
    kernel = _prepared(colour, sigma_xy / cell ** (1 / len(size)), settings)
    return lambda values: up(kernel(down(values)) * cell)


def _prepared(image: Tensor, sigma_xy: float, settings: dict[str, Any]) -> Filter:
    def prepared(method: str) -> Filter:
        options = {**settings, "method": method, "alternate": True}
        return PreparedFilter(image, sigma_xy=sigma_xy, **options)

    if settings["method"] != "auto":
        return prepared(settings["method"])
    try:
        return prepared("lattice")
    except LatticeError:
        return prepared("blocksparse")


def _check_probabilities(probabilities: Tensor) -> None:
    check_floating("probabilities", probabilities)
    check_space("probabilities", probabilities, "[B, K, *spatial]")
    problem = "a single class is certain everywhere; add a background class"
    check_two_classes("probabilities", probabilities, problem)
    check_fractions("probabilities", probabilities, "probabilities", _ROUNDING)


def _check_valid(valid: Tensor | None, probabilities: Tensor) -> None:
    if valid is None:
        return
    check_real("valid", valid)
    if valid.dtype != torch.bool:
        raise TypeError(f"valid: expected a bool tensor, got {valid.dtype}")
    expected = (probabilities.shape[0], *probabilities.shape[2:])
    check_like("valid", valid, expected, "probabilities", probabilities)
