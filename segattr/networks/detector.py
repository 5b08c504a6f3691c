"""What BBAM asks of an object detector, and a Faster R-CNN of torchvision that gives it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from segattr.networks.classifier import taking, undisturbed
from segattr.networks.modes import evaluating
from segloss.common.checks import (
    check_finite,
    check_floating,
    check_has_values,
    check_integer,
    check_like,
    check_real,
    require,
    shape_text,
)


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


def without_trace(detector: Detector, image: Tensor, function: Callable[[], Any]) -> Any:
    """The result of a function that calls a detector, whose parameters are constants in it, without autocast."""
    with torch.autocast(image.device.type, enabled=False):
        return undisturbed(detector, function, constant=True)


def predict(detector: Detector, images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Probabilities ``[P, K]`` and offsets ``[P, K, 4]``."""
    with taking("image", images):
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


def of_class(values: Tensor, labels: Tensor) -> Tensor:
    """``[P]`` or ``[P, 4]`` of values ``[P, K]`` or ``[P, K, 4]``."""
    return values[torch.arange(len(labels), device=values.device), labels]


def check_objects(detector: object, image: object, boxes: object, labels: object) -> None:
    if not callable(detector):
        raise TypeError(f"detector: expected a function of images and boxes, got {type(detector).__name__}")
    check_floating("image", image)
    assert isinstance(image, Tensor)
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"image: expected [C, H, W] with at least one pixel, got {shape_text(image.shape)}")
    check_has_values("image", image)
    check_finite("image", image)
    check_boxes("boxes", boxes, image)
    assert isinstance(boxes, Tensor)
    check_integer("labels", labels)
    assert isinstance(labels, Tensor)
    check_like("labels", labels, boxes.shape[:1], "boxes", boxes)


def check_boxes(name: str, boxes: object, image: Tensor) -> None:
    check_real(name, boxes)
    assert isinstance(boxes, Tensor)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: expected [n, 4], got {shape_text(boxes.shape)}")
    check_corners(name, boxes)
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


def check_corners(name: str, boxes: Tensor) -> None:
    """Boxes of torchvision's tv_tensors say what their numbers are; plain tensors do not."""
    meaning = getattr(boxes, "format", None)
    meaning = getattr(meaning, "name", meaning)
    if meaning not in (None, "XYXY"):
        raise ValueError(f"{name}: expected corners x1, y1, x2, y2, the format XYXY, got the format {meaning}")


def check_outputs(labels: Tensor, probabilities: Tensor, offsets: Tensor) -> None:
    """Values on any device: this is for the image, not for each step."""
    labels, count = labels.cpu(), probabilities.shape[1]
    require(
        "labels",
        labels,
        lambda: ((labels >= 0) & (labels < count)).all(),
        lambda: f"expected classes 0 to {count - 1} of the detector, got {labels.unique().tolist()}",
    )
    for values in (probabilities.cpu(), offsets.cpu()):
        require(
            "detector",
            values,
            lambda values=values: values.isfinite().all(),  # type: ignore[misc]
            lambda: "expected finite values, got NaN or infinity (see image)",
        )
