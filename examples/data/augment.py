"""Random views of samples, of one size: resized, cut or padded, mirrored, with all that belongs to their pixels."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors

from data.sample import VOID, DataError, Sample

MEAN_COLOUR = (0.485, 0.456, 0.406)  # of ImageNet; what padding looks like


@dataclass(frozen=True)
class Fit:
    """Shows the whole image: resizes it to a longer side of ``size`` pixels and pads it to a square.

    Sizes, tags and whatever else is known of the whole image stay true. Images are interpolated bilinearly, with
    antialiasing; masks take the nearest pixel; what has the size already keeps its bits. Padding has the mean colour
    of ImageNet, VOID in maps of integers and 0 in other maps; ``"valid"``, bool [H, W], is False there.

    Args:
        size: height and width of the result, in pixels.
        mirror: whether half of the samples, at random, are mirrored.

    Raises:
        ValueError: a size below 1.
        DataError: when called, a mask that has not the size of the image.
    """

    size: int
    mirror: bool = True

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        sides = sample["image"].shape[1:]
        height, width = (max(1, round(side * self.size / max(sides))) for side in sides)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return _View(height, width, top, left, self.size, self.mirror and rng.random() < 0.5)(sample)


@dataclass(frozen=True)
class Crop:
    """Shows a random square of the image, resized at random; for samples whose annotation is all in maps and boxes.

    Resizing and padding are those of :class:`Fit`; where the resized image is smaller than the square it lies in it at
    random. Boxes are cut off at the border, and left out with their labels if less than a pixel of width or height
    remains. Tags that follow from boxes alone are then those that may be in the crop: what is left of a box need not
    show its object, and the background may be cut off.

    Args:
        size: height and width of the result, in pixels.
        scale: smallest and largest factor of height and width; drawn uniformly.
        mirror: whether half of the samples, at random, are mirrored.

    Raises:
        ValueError: a size below 1, factors that are not positive, finite and in order.
        DataError: when called, a sample with an entry that is known of the whole image only, such as sizes from a
            list; a mask that has not the size of the image.
    """

    size: int
    scale: tuple[float, float] = (0.5, 2.0)
    mirror: bool = True

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale: expected two finite numbers above 0, the smaller one first, got {self.scale}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        pixelwise = (tv_tensors.Image, tv_tensors.Mask, tv_tensors.BoundingBoxes)
        whole = [name for name, value in sample.items() if name != "box_labels" and not isinstance(value, pixelwise)]
        if whole:
            raise DataError(f"{', '.join(whole)}: known of the whole image only, not of a crop: use Fit, or masks")
        factor = rng.uniform(*self.scale)
        height, width = (max(1, round(side * factor)) for side in sample["image"].shape[1:])
        top, left = (
            int(rng.integers(min(side - self.size, 0), max(side - self.size, 0), endpoint=True))
            for side in (height, width)
        )
        crop = _View(height, width, top, left, self.size, self.mirror and rng.random() < 0.5)(sample)
        if "boxes" in crop:
            boxes = crop["boxes"].as_subclass(Tensor)
            seen = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
            crop["boxes"] = tv_tensors.wrap(boxes[seen], like=crop["boxes"])
            crop["box_labels"] = crop["box_labels"][seen]
        return crop


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")


@dataclass(frozen=True)
class _View:
    """A square window of a resized image."""

    height: int  # of the resized image
    width: int
    top: int  # of the window in it; negative where the window begins with padding
    left: int
    size: int  # of the window
    mirror: bool

    def __call__(self, sample: Sample) -> Sample:
        extent = sample["image"].shape[1:]
        valid = tv_tensors.Mask(torch.ones(extent, dtype=torch.bool))
        view: Sample = {}
        for name, value in {"valid": valid, **sample}.items():
            if isinstance(value, tv_tensors.Image):
                value = self._image(value)
            elif isinstance(value, tv_tensors.Mask):
                if value.shape[-2:] != extent:
                    raise DataError(f"{name}: expected {list(extent)} as the image, got {list(value.shape[-2:])}")
                value = self._mask(value)
            elif isinstance(value, tv_tensors.BoundingBoxes):
                value = self._boxes(value, *extent)
            view[name] = value
        return view

    def _image(self, image: tv_tensors.Image) -> tv_tensors.Image:
        pixels = image.as_subclass(Tensor)
        if pixels.shape[1:] != (self.height, self.width):
            pixels = interpolate(pixels[None], (self.height, self.width), mode="bilinear", antialias=True)[0]
            pixels = pixels.clamp(0, 1)  # rounding
        return tv_tensors.wrap(self._window(pixels, pixels.new_tensor(MEAN_COLOUR)[:, None, None]), like=image)

    def _mask(self, mask: tv_tensors.Mask) -> tv_tensors.Mask:
        values = mask.as_subclass(Tensor)
        integers = not (values.dtype.is_floating_point or values.dtype == torch.bool)
        if values.shape[-2:] != (self.height, self.width):
            rows, columns = _nearest(values.shape[-2], self.height), _nearest(values.shape[-1], self.width)
            values = values[..., rows[:, None], columns]
        return tv_tensors.wrap(self._window(values, VOID if integers else 0), like=mask)

    def _boxes(self, boxes: tv_tensors.BoundingBoxes, height: int, width: int) -> tv_tensors.BoundingBoxes:
        factors = boxes.new_tensor([self.width / width, self.height / height] * 2)
        corners = boxes.as_subclass(Tensor) * factors - boxes.new_tensor([self.left, self.top] * 2)
        x1, y1, x2, y2 = corners.clamp(0, self.size).unbind(1)
        if self.mirror:
            x1, x2 = self.size - x2, self.size - x1
        return tv_tensors.wrap(torch.stack([x1, y1, x2, y2], 1), like=boxes, canvas_size=(self.size, self.size))

    def _window(self, values: Tensor, padding: Tensor | int) -> Tensor:
        """What the window shows of a resized map, on its padding."""
        top, bottom = max(self.top, 0), min(self.top + self.size, self.height)
        left, right = max(self.left, 0), min(self.left + self.size, self.width)
        shown = values[..., top:bottom, left:right]
        if shown.shape[-2:] != (self.size, self.size):
            padded = shown.new_empty((*shown.shape[:-2], self.size, self.size))
            padded[:] = padding
            padded[..., top - self.top : bottom - self.top, left - self.left : right - self.left] = shown
            shown = padded
        return shown.flip(-1) if self.mirror else shown


def _nearest(count: int, resized: int) -> Tensor:
    """For each of the resized pixels the one that its centre falls into."""
    return (2 * torch.arange(resized) + 1) * count // (2 * resized)
