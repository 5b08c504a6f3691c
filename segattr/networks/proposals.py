"""Proposals from which a detector finds an object that it is given the box of."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from segattr.networks.detector import Detector, check_objects, check_outputs, of_class, predict, without_trace
from segloss.common.checks import check_generator, check_int, check_number, shape_text
from segloss.common.reduction import wide_dtype

Decode = Callable[[Tensor, Tensor], Tensor]


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
    check_objects(detector, image, boxes, labels)
    check_int("count", count)
    check_number("count", count, least=1)
    check_number("jitter", jitter, least=0, below=0.5)
    _check_thresholds(min_iou)
    check_int("keep", keep)
    check_number("keep", keep, least=1)
    check_generator(generator)
    if decode is None:
        decode = getattr(detector, "decode", None) or _decode
    if not callable(decode):
        raise TypeError(f"decode: expected a function of offsets and boxes, got {type(decode).__name__}")
    boxes, labels = boxes.to(wide_dtype(image)), labels.long()
    # Drawn at once: objects one after the other, with the same generator, get the same ones.
    device = image.device if generator is None else generator.device
    noise = torch.rand(len(boxes), count, 4, generator=generator, dtype=boxes.dtype, device=device).to(image.device)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[:, None]
    candidates = _clip(boxes[:, None] + jitter * (2 * noise - 1) * sides, image)

    def positives(proposals: Tensor, box: Tensor, label: Tensor) -> Tensor:
        probabilities, offsets = predict(detector, image[None], [proposals])
        check_outputs(label, probabilities, offsets)
        own = label.expand(len(proposals))
        found = decode(of_class(offsets, own).to(proposals.dtype), proposals)
        if found.shape != proposals.shape:
            raise ValueError(f"decode: expected boxes {shape_text(proposals.shape)}, got {shape_text(found.shape)}")
        overlap = _iou(_clip(found, image), box)
        for threshold in min_iou:
            positive = (probabilities.argmax(1) == label) & (overlap > threshold)
            if positive.sum() >= keep:
                break
        return proposals[positive][:keep]

    def every() -> list[Tensor]:
        # One object at a time: the features of so many proposals take more memory than those of the image.
        return [positives(*args) for args in zip(candidates, boxes, labels, strict=True)]

    with torch.no_grad():
        return without_trace(detector, image, every)


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


def _check_thresholds(min_iou: object) -> None:
    if not isinstance(min_iou, Sequence) or isinstance(min_iou, str):
        raise TypeError(f"min_iou: expected a sequence of numbers, got {type(min_iou).__name__}")
    if not min_iou:
        raise ValueError("min_iou: expected at least one threshold, got none")
    for threshold in min_iou:
        check_number("min_iou", threshold, least=0, below=1)
