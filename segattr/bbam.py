"""BBAM: the smallest part of an image that an object detector needs to find an object."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from segattr.networks.backward import followed
from segattr.networks.detector import (
    Detector,
    check_boxes,
    check_objects,
    check_outputs,
    detector_from_torchvision,
    of_class,
    predict,
    without_trace,
)
from segattr.networks.proposals import Decode, positive_proposals
from segloss.common.checks import (
    check_bool,
    check_finite,
    check_generator,
    check_int,
    check_number,
    shape_text,
)
from segloss.common.reduction import wide_dtype

__all__ = ["Detector", "adaptive_stride", "bbam", "detector_from_torchvision", "positive_proposals"]


def adaptive_stride(area: float) -> float:
    r"""Side of a cell of the mask in pixels, :math:`s(a) = 16 + 48 \sqrt a`: fine for small objects, coarse for large.

    Args:
        area: area of the box as a share of the image, a, at least 0.

    Returns:
        The side, at least 16.

    Raises:
        TypeError: an area that is no number.
        ValueError: one below 0.

    Source:
        The dissertation's sec. 5.4.1, *Reproducibility*.

    Example:
        >>> adaptive_stride(0.25)
        40.0
    """
    check_number("area", area, least=0)
    return 16 + 48 * math.sqrt(area)


def bbam(
    detector: Detector,
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    steps: int = 300,
    lr: float = 0.02,
    sparsity: float = 0.007,
    heads: Sequence[str] = ("box", "cls"),
    proposals: int | Sequence[Tensor] | Tensor = 1000,
    stride: float | Callable[[float], float] = adaptive_stride,
    mean: Sequence[float] | Tensor | None = None,
    decode: Decode | None = None,
    reference: bool = False,
    chunk: int | None = None,
    progress: Callable[[int, Tensor], object] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Bounding box attribution maps (BBAM): where a detector looks to find and to name the object in a box.

    .. math::
        M^* &= \arg\min_{M \in [0, 1]^\Omega} \lambda \|M\|_1 + \frac{1}{|O^+|} \sum_{o \in O^+} \bigl(
            1_{box} \|t^c - f^{box}(\Phi(I, M), o)\|_1 + 1_{cls} \|p - f^{cls}(\Phi(I, M), o)\|_1 \bigr) \\
        \Phi(I, M) &= I \circ \hat M + \mu \circ (1 - \hat M)

    for the four offsets :math:`t^c` of the object's class c and the probabilities p of all classes that the detector
    gives for a proposal o on the whole image. M is a grid of cells, :math:`\hat M` is M at the resolution of the image
    (bilinear), :math:`\|M\|_1` is a sum over cells. M starts as 1 in all cells that the box touches, 0 elsewhere, and
    is optimised by Adam, brought back to [0, 1] after each step.

    The masks of all objects are optimised at once, whatever their grids: each step is one pass through the network for
    as many images as objects, with all of their proposals. Together and one at a time are the same up to rounding.

    The detector runs without autocast; for speed at some loss use a network and an image in half precision. If it is a
    module, its parameters are constants here, and they, their gradients and its buffers stay as they are; it
    runs in the mode that it is in, but for :func:`detector_from_torchvision`, which evaluates.

    Args:
        detector: a :class:`Detector`: :func:`detector_from_torchvision`, or any function of images and boxes.
        image: ``[C, H, W]``, as the detector expects it.
        boxes: of the objects, ``[n, 4]``: x1, y1, x2, y2 in pixels, within the image.
        labels: classes of the objects, int64, ``[n]``, as the detector numbers its probabilities: where class 0 is the
            background, objects start at 1.
        steps: of the optimisation, at least 0.
        lr: learning rate of Adam, above 0.
        sparsity: :math:`\lambda`, at least 0.
        heads: which predictions a mask must keep: ``"box"``, ``"cls"`` or both.
        proposals: :math:`O^+`, for each object boxes ``[P_i, 4]``, used as they are; or how many jittered ones
            :func:`positive_proposals` draws, at least 1, of which 100 or fewer are kept. Draw them once to compare
            heads with each other.
        stride: side of a cell in pixels, at least 1, or a function that gives it for the share of the image that the
            box takes. The published numbers are meant for images whose short side has about 800 pixels.
        mean: :math:`\mu`, of the training data, one value for each channel; that of the detector if None, or 0 if it
            has none, as for normalised images.
        decode: as for :func:`positive_proposals`; not used where ``proposals`` are given.
        reference: the released code: differences of offsets are averaged, of probabilities only that of class c counts,
            and both are halved, so that cells are dearer; the number of cells is rounded down, not up; up-sampling
            aligns the corners.
        chunk: objects in the network at once, to save memory; all if None.
        progress: called after each step with the number of steps done, and the terms ``[m, 2]`` of the loss before it,
            box and class, used or not, of the m objects at work: those of the chunk that have proposals.
        generator: source of randomness for proposals; the global one if None.

    Returns:
        Masks :math:`\hat M`, ``[n, H, W]``, in [0, 1], without gradient; float32 (float64 for a float64 image). **A
        mask is 0 everywhere where an object has no positive proposal.**

    Raises:
        TypeError: an ``image`` that is not floating point, boxes or labels that are no tensors of numbers and integers,
            settings of another type, a detector that is no function or gives no pair of tensors.
        ValueError: shapes or devices that do not fit each other, boxes without area or not within the image, labels
            that the detector does not have, settings out of range, a detector whose outputs have another shape, are
            not finite, or are detached, all that ``heads`` asks for, or that overwrites in place what
            its gradient needs.

    Source:
        *BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance Segmentation*; the
        dissertation's eq. (5.1) to (5.3) and sec. 5.4.1. The norm of the class head is read as that of the
        probabilities of all classes, although the text writes :math:`p^c`. The released code, besides what
        ``reference`` says, adds a small penalty of the variation between cells (weight 1e-4), and starts from the
        boxes predicted for the proposals, not the box itself.

    Example:
        >>> def detector(images, boxes):  # all that it looks at is how bright four columns are
        ...     bright = torch.stack([x[:, :, 8:12].mean() for x, own in zip(images, boxes) for _ in own])
        ...     return torch.stack([1 - bright, bright], 1), bright[:, None].expand(-1, 4)
        >>> box = torch.tensor([[0.0, 0, 20, 4]])
        >>> mask = bbam(detector, torch.ones(3, 4, 20), box, torch.tensor([1]), proposals=[box], stride=4)
        >>> mask[0, 0, [0, 9, 19]]
        tensor([0., 1., 0.])
    """
    check_objects(detector, image, boxes, labels)
    check_int("steps", steps)
    check_number("steps", steps, least=0)
    check_number("lr", lr, above=0)
    check_number("sparsity", sparsity, least=0)
    _check_heads(heads)
    if not callable(stride):
        check_number("stride", stride, least=1)
    check_bool("reference", reference)
    if chunk is not None:
        check_int("chunk", chunk)
        check_number("chunk", chunk, least=1)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function, got {type(progress).__name__}")
    check_generator(generator)
    if isinstance(proposals, (int, np.integer)):
        check_int("proposals", proposals)
        check_number("proposals", proposals, least=1)
    else:
        _check_proposals(proposals, boxes, image)
    image, labels, wide = image.detach(), labels.long(), wide_dtype(image)
    cells = _cells(boxes, image, stride, floor=reference)
    solve = _Solve(detector, image, _fill(detector, image, mean), steps, lr, sparsity, heads, reference, progress)

    def masks() -> Tensor:
        kept = (
            positive_proposals(detector, image, boxes, labels, count=proposals, decode=decode, generator=generator)
            if isinstance(proposals, (int, np.integer))
            else [own.detach().to(wide, copy=True) for own in proposals]
        )
        result = torch.zeros(len(boxes), *image.shape[1:], dtype=wide, device=image.device)
        work = [i for i, own in enumerate(kept) if len(own)]
        size = chunk or max(len(work), 1)
        for part in (work[start : start + size] for start in range(0, len(work), size)):
            result[part] = solve(boxes[part], labels[part], [kept[i] for i in part], cells[part])
        return result

    with torch.inference_mode(False), torch.enable_grad():
        return without_trace(detector, image, masks)


@dataclass(frozen=True)
class _Solve:
    """The settings of :func:`bbam`, and the optimisation for some objects, each with at least one proposal."""

    detector: Detector
    image: Tensor
    mean: Tensor
    steps: int
    lr: float
    sparsity: float
    heads: Sequence[str]
    reference: bool
    progress: Callable[[int, Tensor], object] | None

    def __call__(self, boxes: Tensor, labels: Tensor, proposals: list[Tensor], cells: Tensor) -> Tensor:
        """Masks ``[n, H, W]`` for boxes ``[n, 4]``, labels ``[n]``, and numbers of cells ``[n, 2]``."""
        counts = torch.tensor([len(own) for own in proposals], device=labels.device)
        owners = torch.arange(len(labels), device=labels.device).repeat_interleave(counts)
        labels = labels[owners]
        wide = wide_dtype(self.image)
        height, width = (
            _interpolation(number, side, self.reference, wide)
            for number, side in zip(cells.T, self.image.shape[1:], strict=True)
        )
        # With the image first, a mask of ones shows exactly the image.
        hidden = self.mean[:, None, None] - self.image.to(wide)

        def shown(masks: Tensor) -> tuple[Tensor, Tensor]:
            covered = 1 - height @ masks @ width.mT
            images = (self.image + covered[:, None] * hidden).to(self.image.dtype)
            return predict(self.detector, images, proposals)

        def kept(probabilities: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
            """What the mask must keep: offsets ``[P, 4]``, probabilities ``[P, K]`` or ``[P, 1]``."""
            if self.reference:
                probabilities = of_class(probabilities, labels)[:, None]
            return of_class(offsets, labels).to(wide), probabilities.to(wide)

        def terms(masks: Tensor) -> Tensor:
            """Of the loss: ``[n, 2]``, means over the proposals of an object, without gradient if not used."""
            box, cls = (
                (now if head in self.heads else now.detach()).sub(before).abs().sum(1)
                for head, now, before in zip(("box", "cls"), kept(*shown(masks)), whole, strict=True)
            )
            both = torch.stack([box / 8, cls / 2] if self.reference else [box, cls], 1)
            return both.new_zeros(len(counts), 2).index_add(0, owners, both / counts[owners, None])

        masks = _touched(boxes.to(wide), cells, self.image.shape[1:])
        with torch.no_grad():
            probabilities, offsets = shown(torch.ones_like(masks))
            check_outputs(labels, probabilities, offsets)
            whole = kept(probabilities, offsets)
        # Adam does not see a common factor of the loss: this one keeps squares of its gradient finite.
        factor = 1 / max(1.0, self.sparsity)
        masks.requires_grad_()
        optimizer = torch.optim.Adam([masks], lr=self.lr)
        for step in range(self.steps):
            parts = terms(masks)
            if not parts.requires_grad:
                raise ValueError("detector: expected outputs that autograd can follow to the images, got detached ones")
            loss = factor * self.sparsity * masks.abs().sum() + factor * parts.sum()
            with followed("detector"):
                masks.grad = torch.autograd.grad(loss, masks)[0]
            with torch.device("cpu"):  # where Adam counts its steps: torch 2.7 would do it on the default device
                optimizer.step()
            with torch.no_grad():
                masks.clamp_(0, 1)
            if self.progress is not None:
                self.progress(step + 1, parts.detach())
        if not masks.isfinite().all():  # on any device: once for all steps
            raise ValueError("detector: expected finite outputs and gradients, got NaN or infinity")
        return (height @ masks.detach() @ width.mT).clamp(0, 1)


def _fill(detector: Detector, image: Tensor, mean: Sequence[float] | Tensor | None) -> Tensor:
    if mean is None:
        mean = getattr(detector, "mean", None)
    if mean is None:
        mean = [0.0] * len(image)
    try:
        fill = torch.as_tensor(mean, dtype=wide_dtype(image), device=image.device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"mean: expected a number for each channel, got {type(mean).__name__}") from None
    if fill.shape != image.shape[:1]:
        raise ValueError(
            f"mean: expected [{len(image)}], a value for each channel, got {shape_text(fill.shape)} (see image)"
        )
    check_finite("mean", fill)
    return fill


# --- cells of the masks


def _cells(boxes: Tensor, image: Tensor, stride: float | Callable[[float], float], *, floor: bool) -> Tensor:
    """Rows and columns of the grid of each object, int64 ``[n, 2]``."""
    height, width = image.shape[1:]
    cells = []
    for x1, y1, x2, y2 in boxes.tolist():
        side = stride((x2 - x1) * (y2 - y1) / (height * width)) if callable(stride) else stride
        check_number("stride", side, least=1)
        cells.append([max(1, math.floor(n / side) if floor else math.ceil(n / side)) for n in (height, width)])
    return torch.tensor(cells, dtype=torch.int64, device=image.device).view(-1, 2)


def _touched(boxes: Tensor, cells: Tensor, size: Sequence[int]) -> Tensor:
    """1 in the cells that a box touches: ``[n, h, w]`` for the largest grid; smaller ones lie in its corner."""

    def along(start: Tensor, end: Tensor, number: Tensor, side: int) -> Tensor:
        index = torch.arange(int(number.max()), device=boxes.device)
        start, end = (value * number / side for value in (start, end))
        return (index + 1 > start[:, None]) & (index < end[:, None])

    x1, y1, x2, y2 = boxes.T
    rows = along(y1, y2, cells[:, 0], size[0])
    columns = along(x1, x2, cells[:, 1], size[1])
    return (rows[:, :, None] & columns[:, None]).to(boxes.dtype)


def _interpolation(number: Tensor, side: int, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """Linear up-sampling from ``number [n]`` cells to pixels as matrices ``[n, side, most cells]``.

    Cells beyond those of an object have no weight, so that they change nothing in its image, and stay 0.
    """
    pixels = torch.arange(side, dtype=dtype, device=number.device)[:, None]
    cells = number[:, None, None].to(dtype)
    place = pixels * (cells - 1) / max(side - 1, 1) if align_corners else (pixels + 0.5) * cells / side - 0.5
    place = place.clamp(min=0).minimum(cells - 1)
    index = torch.arange(int(number.max()), dtype=dtype, device=number.device)
    return (1 - (place - index).abs()).clamp(min=0)


# --- arguments


def _check_proposals(proposals: object, boxes: Tensor, image: Tensor) -> None:
    if not isinstance(proposals, (Sequence, Tensor)) or isinstance(proposals, str) or _is_scalar(proposals):
        raise TypeError(f"proposals: expected an int, or boxes for each object, got {type(proposals).__name__}")
    if len(proposals) != len(boxes):
        raise ValueError(f"proposals: expected boxes for each of {len(boxes)} objects, got {len(proposals)}")
    for i, own in enumerate(proposals):
        check_boxes(f"proposals[{i}]", own, image)


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _check_heads(heads: object) -> None:
    if not isinstance(heads, Sequence) or isinstance(heads, str):
        raise TypeError(f'heads: expected a sequence of "box" and "cls", got {heads!r}')
    if not heads or any(head not in ("box", "cls") for head in heads):
        raise ValueError(f'heads: expected "box", "cls" or both, got {tuple(heads)}')
