"""BBAM: the smallest part of an image that an object detector needs to find an object."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from segattr.classifier import undisturbed
from segattr.lrp.trace import evaluating
from segloss._checks import (
    check_bool,
    check_finite,
    check_floating,
    check_generator,
    check_int,
    check_integer,
    check_like,
    check_number,
    check_real,
    require,
    shape_text,
)
from segloss._reduce import wide_dtype

Decode = Callable[[Tensor, Tensor], Tensor]


class Detector(Protocol):
    """What :func:`bbam` takes: any function or module with the two heads of an object detector.

    It is called with images ``[n, C, H, W]`` and, for each of them, boxes ``[P_i, 4]``: x1, y1, x2, y2 in pixels of
    the image. It gives, for all boxes in this order, class probabilities ``[P, K]`` and encoded box offsets
    ``[P, K, 4]``, or ``[P, 4]`` if they are the same for all classes. Autograd must be able to follow both to the
    images. Each image must be treated alone: no batch statistics. A two-stage detector pools the features of the
    boxes and applies its heads; a one-stage detector takes the outputs of the anchor or location that stands for
    each box.

    It may have two attributes, which are the defaults of the arguments of that name:

    - ``mean``: value of each channel, in the unit of the images, that hides what a mask leaves out;
    - ``decode(offsets, boxes)``: predicted boxes ``[P, 4]`` of offsets ``[P, 4]`` of one class and boxes ``[P, 4]``.
    """

    def __call__(self, images: Tensor, boxes: Sequence[Tensor], /) -> tuple[Tensor, Tensor]: ...


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
            that the detector does not have, settings out of range, a detector whose outputs have another shape or
            are detached.

    Source:
        *BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance Segmentation*; the
        dissertation's eq. (5.1) to (5.3) and sec. 5.4.1. The released code, besides what ``reference`` says, adds a
        small penalty of the variation between cells (weight 1e-4), and starts from the boxes predicted for the
        proposals, not the box itself.

    Example:
        >>> def detector(images, boxes):  # all that it looks at is how bright four columns are
        ...     bright = torch.stack([x[:, :, 8:12].mean() for x, own in zip(images, boxes) for _ in own])
        ...     return torch.stack([1 - bright, bright], 1), bright[:, None].expand(-1, 4)
        >>> box = torch.tensor([[0.0, 0, 20, 4]])
        >>> mask = bbam(detector, torch.ones(3, 4, 20), box, torch.tensor([1]), proposals=[box], stride=4)
        >>> mask[0, 0, [0, 9, 19]]
        tensor([0., 1., 0.])
    """
    _check_objects(detector, image, boxes, labels)
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
    if isinstance(proposals, int):
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
            if isinstance(proposals, int)
            else [own.detach().to(wide, copy=True) for own in proposals]
        )
        result = torch.zeros(len(boxes), *image.shape[1:], dtype=wide, device=image.device)
        work = [i for i, own in enumerate(kept) if len(own)]
        size = chunk or max(len(work), 1)
        for part in (work[start : start + size] for start in range(0, len(work), size)):
            result[part] = solve(boxes[part], labels[part], [kept[i] for i in part], cells[part])
        return result

    with torch.inference_mode(False), torch.enable_grad():
        return _undisturbed(detector, image, masks)


def positive_proposals(
    detector: Detector,
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    count: int = 1000,
    jitter: float = 0.3,
    min_iou: Sequence[float] = (0.9, 0.85, 0.8),
    keep: int = 100,
    decode: Decode | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    r"""Proposals near the box of an object from which a detector finds this object: its class, and nearly its box.

    Each coordinate of the box is moved at random by up to a share of the width or height of the box, within the image.
    A proposal is positive if the most probable class is that of the object, and if the intersection over union of the
    box that the detector predicts from it, within the image, and the box of the object is greater than a threshold.
    The highest threshold counts that at least ``keep`` proposals pass; if there is none, the last one.

    Args:
        detector: a :class:`Detector`.
        image: ``[C, H, W]``, as the detector expects it.
        boxes: of the objects, ``[n, 4]``: x1, y1, x2, y2 in pixels, within the image.
        labels: classes of the objects, int64, ``[n]``.
        count: of proposals that are tried for each object, at least 1.
        jitter: largest share, in [0, 0.5): a box never turns inside out.
        min_iou: thresholds, at least one, each in [0, 1); ``(0.8,)`` is what the text says, the default is the released
            code.
        keep: largest number of proposals for an object, at least 1: the first ones.
        decode: predicted boxes ``[P, 4]`` of offsets ``[P, 4]`` of one class and proposals ``[P, 4]``. If None, that of
            the detector; if it has none, offsets of the centre in widths and heights of the proposal, and
            logarithms of the ratios of widths and heights.
        generator: source of randomness, on any device; the global one of the device of the image if None.

    Returns:
        Proposals ``[P_i, 4]`` for each object, float32 (float64 for a float64 image); none where the detector does not
        find the object.

    Raises:
        TypeError: as :func:`bbam`.
        ValueError: as :func:`bbam`.

    Source:
        *BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance Segmentation*; the
        dissertation's sec. 5.3.3, *Creating masks*. The released code rounds boxes to whole pixels for the
        intersection, and does not clip them.

    Example:
        >>> def detector(images, boxes):  # always says class 1, and that the proposal is right
        ...     total = sum(map(len, boxes))
        ...     return torch.tensor([[0.1, 0.9]]).expand(total, 2), torch.zeros(total, 4)
        >>> box = torch.tensor([[2.0, 2, 10, 10]])
        >>> positive_proposals(detector, torch.zeros(3, 12, 12), box, torch.tensor([1]), jitter=0.01)[0].shape
        torch.Size([100, 4])
        >>> positive_proposals(detector, torch.zeros(3, 12, 12), box, torch.tensor([0]))[0].shape
        torch.Size([0, 4])
    """
    _check_objects(detector, image, boxes, labels)
    check_int("count", count)
    check_number("count", count, least=1)
    check_number("jitter", jitter, least=0, below=0.5)
    _check_thresholds(min_iou)
    check_int("keep", keep)
    check_number("keep", keep, least=1)
    check_generator(generator)
    decode = decode or getattr(detector, "decode", None) or _decode
    boxes, labels = boxes.to(wide_dtype(image)), labels.long()
    # Drawn at once: objects one after the other, with the same generator, get the same ones.
    device = image.device if generator is None else generator.device
    noise = torch.rand(len(boxes), count, 4, generator=generator, dtype=boxes.dtype, device=device).to(image.device)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[:, None]
    candidates = _clip(boxes[:, None] + jitter * (2 * noise - 1) * sides, image)

    def positives(proposals: Tensor, box: Tensor, label: Tensor) -> Tensor:
        probabilities, offsets = _predict(detector, image[None], [proposals])
        _check_labels(label, probabilities.shape[1])
        own = label.expand(len(proposals))
        overlap = _iou(_clip(decode(_of_class(offsets, own).to(proposals.dtype), proposals), image), box)
        for threshold in min_iou:
            positive = (probabilities.argmax(1) == label) & (overlap > threshold)
            if positive.sum() >= keep:
                break
        return proposals[positive][:keep]

    def every() -> list[Tensor]:
        # One object at a time: the features of so many proposals take more memory than those of the image.
        return [positives(*args) for args in zip(candidates, boxes, labels, strict=True)]

    with torch.no_grad():
        return _undisturbed(detector, image, every)


def detector_from_torchvision(model: nn.Module) -> Detector:
    """A Faster R-CNN of torchvision as a :class:`Detector`: its backbone, RoI pooling and both heads.

    The proposal network and the suppression of overlapping detections do not take part. The model resizes images and
    boxes as for detection, and is in evaluation mode for the time of a call. Its ``image_mean`` is the ``mean`` of
    the detector, and ``decode`` is its box coder. Mask and Keypoint R-CNN work as well; a one-stage model needs a
    function of its own.

    Args:
        model: ``torchvision.models.detection.FasterRCNN``, or another with the same parts. Images are
            ``[n, 3, H, W]`` with values in [0, 1]; class 0 is the background.

    Returns:
        The detector, a module around the model itself.

    Raises:
        TypeError: a ``model`` without these parts.

    Example:
        >>> detector = detector_from_torchvision(fasterrcnn_resnet50_fpn(weights="DEFAULT"))  # doctest: +SKIP
        >>> masks = bbam(detector, image, boxes, labels)  # doctest: +SKIP
    """
    return _RegionCNN(model)


class _RegionCNN(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        parts = ("transform", "backbone", "roi_heads")
        heads = ("box_roi_pool", "box_head", "box_predictor", "box_coder")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        missing = [part for part in parts if not hasattr(model, part)]
        missing = missing or [f"roi_heads.{part}" for part in heads if not hasattr(model.roi_heads, part)]
        if missing:
            raise TypeError(f"model: expected a Faster R-CNN, got a {type(model).__name__} without {missing[0]}")
        super().__init__()
        self.model: Any = model

    @property
    def mean(self) -> Sequence[float]:
        return self.model.transform.image_mean

    def decode(self, offsets: Tensor, boxes: Tensor) -> Tensor:
        # Offsets are relative to the boxes, so that it does not matter that the model saw them resized.
        return self.model.roi_heads.box_coder.decode_single(offsets, boxes)

    def forward(self, images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        pool = heads.box_roi_pool
        # RoI pooling remembers the scales of the first images that it sees.
        remembered = dict(vars(pool))
        with evaluating(self.model):
            try:
                resized, (height, width) = self._resize(images)
                features = self.model.backbone(resized)
                if isinstance(features, Tensor):
                    features = {"0": features}
                ratios = [width / images.shape[3], height / images.shape[2]]
                scale = images.new_tensor(ratios * 2)
                rois = [own.to(scale) * scale for own in boxes]
                pooled = pool(features, rois, [(height, width)] * len(images))
                logits, offsets = heads.box_predictor(heads.box_head(pooled))
            finally:
                vars(pool).update(remembered)
        return logits.softmax(1), offsets.unflatten(1, (-1, 4))

    def _resize(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images as the backbone takes them, and their height and width without the padding."""
        transform = self.model.transform
        # All at once: as one image with the channels of all.
        stacked, _ = transform.resize(transform.normalize(images).flatten(0, 1))
        padded = transform.batch_images([stacked], size_divisible=transform.size_divisible)[0]
        return padded.unflatten(0, images.shape[:2]), stacked.shape[1:]


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

        def predict(masks: Tensor) -> tuple[Tensor, Tensor]:
            covered = 1 - height @ masks @ width.mT
            images = (self.image + covered[:, None] * hidden).to(self.image.dtype)
            return _predict(self.detector, images, proposals)

        def kept(probabilities: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
            """What the mask must keep: offsets ``[P, 4]``, probabilities ``[P, K]`` or ``[P, 1]``."""
            if self.reference:
                probabilities = _of_class(probabilities, labels)[:, None]
            return _of_class(offsets, labels).to(wide), probabilities.to(wide)

        def terms(masks: Tensor) -> Tensor:
            """Of the loss: ``[n, 2]``, means over the proposals of an object."""
            box, cls = ((now - before).abs().sum(1) for now, before in zip(kept(*predict(masks)), whole, strict=True))
            both = torch.stack([box / 8, cls / 2] if self.reference else [box, cls], 1)
            return both.new_zeros(len(counts), 2).index_add(0, owners, both / counts[owners, None])

        masks = _touched(boxes.to(wide), cells, self.image.shape[1:])
        with torch.no_grad():
            probabilities, offsets = predict(torch.ones_like(masks))
            _check_labels(labels, probabilities.shape[1])
            whole = kept(probabilities, offsets)
        # Adam does not see a common factor of the loss: this one keeps squares of its gradient finite.
        factor = 1 / max(1.0, self.sparsity)
        weight = masks.new_tensor([factor * (head in self.heads) for head in ("box", "cls")])
        masks.requires_grad_()
        optimizer = torch.optim.Adam([masks], lr=self.lr)
        for step in range(self.steps):
            parts = terms(masks)
            loss = factor * self.sparsity * masks.abs().sum() + (parts * weight).sum()
            masks.grad = _gradient(loss, parts, masks)
            optimizer.step()
            with torch.no_grad():
                masks.clamp_(0, 1)
            if self.progress is not None:
                self.progress(step + 1, parts.detach())
        return (height @ masks.detach() @ width.mT).clamp(0, 1)


# --- the detector


def _undisturbed(detector: Detector, image: Tensor, function: Callable[[], Any]) -> Any:
    with torch.autocast(image.device.type, enabled=False):
        return undisturbed(detector, function, constant=True)


def _predict(detector: Detector, images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Probabilities ``[P, K]`` and offsets ``[P, K, 4]``."""
    outputs: Any = detector(images, boxes)
    if not (isinstance(outputs, tuple) and len(outputs) == 2 and all(isinstance(part, Tensor) for part in outputs)):
        raise TypeError(
            f"detector: expected class probabilities and box offsets, a pair of tensors, got {type(outputs).__name__}; "
            "detector_from_torchvision makes a detector of a Faster R-CNN"
        )
    probabilities, offsets = outputs
    total = sum(map(len, boxes))
    if offsets.shape == (total, 4) and probabilities.dim() == 2:
        offsets = offsets[:, None].expand(-1, probabilities.shape[1], 4)
    if probabilities.shape[:1] != (total,) or offsets.shape != (*probabilities.shape, 4):
        raise ValueError(
            f"detector: expected probabilities [{total}, K] and offsets [{total}, K, 4] or [{total}, 4], "
            f"got {shape_text(probabilities.shape)} and {shape_text(outputs[1].shape)}"
        )
    return probabilities, offsets


def _of_class(values: Tensor, labels: Tensor) -> Tensor:
    """``[P]`` or ``[P, 4]`` of values ``[P, K]`` or ``[P, K, 4]``."""
    return values[torch.arange(len(labels), device=values.device), labels]


def _gradient(loss: Tensor, parts: Tensor, masks: Tensor) -> Tensor:
    if not parts.requires_grad:
        raise ValueError("detector: expected outputs that autograd can follow to the images, got detached ones")
    return torch.autograd.grad(loss, masks)[0]


def _fill(detector: Detector, image: Tensor, mean: Sequence[float] | Tensor | None) -> Tensor:
    if mean is None:
        mean = getattr(detector, "mean", None)
    if mean is None:
        mean = [0.0] * len(image)
    fill = torch.as_tensor(mean, dtype=wide_dtype(image), device=image.device).detach()
    if fill.shape != image.shape[:1]:
        raise ValueError(f"mean: expected [{len(image)}], a value for each channel, got {shape_text(fill.shape)}")
    check_finite("mean", fill)
    return fill


# --- boxes


def _decode(offsets: Tensor, boxes: Tensor) -> Tensor:
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + offsets[:, :2] * sides
    half = sides * offsets[:, 2:].exp() / 2
    return torch.cat([centres - half, centres + half], 1)


def _clip(boxes: Tensor, image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def _iou(boxes: Tensor, box: Tensor) -> Tensor:
    """Of boxes ``[P, 4]`` and one ``[4]``."""
    common = (boxes[:, 2:].minimum(box[2:]) - boxes[:, :2].maximum(box[:2])).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return common / (areas - common)


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


def _check_objects(detector: object, image: object, boxes: object, labels: object) -> None:
    if not callable(detector):
        raise TypeError(f"detector: expected a function of images and boxes, got {type(detector).__name__}")
    check_floating("image", image)
    assert isinstance(image, Tensor)
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"image: expected [C, H, W] with at least one pixel, got {shape_text(image.shape)}")
    check_finite("image", image)
    _check_boxes("boxes", boxes, image)
    assert isinstance(boxes, Tensor)
    check_integer("labels", labels)
    assert isinstance(labels, Tensor)
    check_like("labels", labels, boxes.shape[:1], "boxes", boxes)


def _check_boxes(name: str, boxes: object, image: Tensor) -> None:
    check_real(name, boxes)
    assert isinstance(boxes, Tensor)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: expected [n, 4], got {shape_text(boxes.shape)}")
    if boxes.device != image.device:
        raise ValueError(f"{name}: expected device {image.device}, that of image, got {boxes.device}")
    height, width = image.shape[1:]
    boxes = boxes.detach().cpu()  # so that values are checked on any device: masks take long enough

    def fit() -> Tensor:
        x1, y1, x2, y2 = boxes.T
        return (x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2) & (x2 <= width) & (y2 <= height)

    require(
        name,
        boxes,
        lambda: fit().all(),
        lambda: (
            f"expected 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}, the size of image, "
            f"got {boxes[~fit()][0].tolist()}"
        ),
    )


def _check_labels(labels: Tensor, count: int) -> None:
    labels = labels.cpu()
    require(
        "labels",
        labels,
        lambda: ((labels >= 0) & (labels < count)).all(),
        lambda: f"expected classes 0 to {count - 1} of the detector, got {labels.unique().tolist()}",
    )


def _check_proposals(proposals: object, boxes: Tensor, image: Tensor) -> None:
    if not isinstance(proposals, (Sequence, Tensor)) or isinstance(proposals, str):
        raise TypeError(f"proposals: expected an int, or boxes for each object, got {type(proposals).__name__}")
    if len(proposals) != len(boxes):
        raise ValueError(f"proposals: expected boxes for each of {len(boxes)} objects, got {len(proposals)}")
    for i, own in enumerate(proposals):
        _check_boxes(f"proposals[{i}]", own, image)


def _check_heads(heads: object) -> None:
    if not isinstance(heads, Sequence) or isinstance(heads, str):
        raise TypeError(f'heads: expected a sequence of "box" and "cls", got {heads!r}')
    if not heads or any(head not in ("box", "cls") for head in heads):
        raise ValueError(f'heads: expected "box", "cls" or both, got {tuple(heads)}')


def _check_thresholds(min_iou: object) -> None:
    if not isinstance(min_iou, Sequence) or isinstance(min_iou, str):
        raise TypeError(f"min_iou: expected a sequence of numbers, got {type(min_iou).__name__}")
    if not min_iou:
        raise ValueError("min_iou: expected at least one threshold, got none")
    for threshold in min_iou:
        check_number("min_iou", threshold, least=0, below=1)
