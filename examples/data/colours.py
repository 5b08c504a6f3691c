"""Masks of VOC that were saved as colours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torchvision import tv_tensors

from data.files import check_labels, opened
from data.sample import DataError
from data.write_voc import palette


def is_coloured(path: Path) -> bool:
    """Whether a mask is a PNG of colours rather than of indices."""
    with opened(path, "a PNG mask", ("PNG",)) as image:
        return image.mode in ("RGB", "RGBA")


def read_colours(path: Path, classes: int, *, size: Sequence[int] | None = None) -> tv_tensors.Mask:
    """The indices of a mask whose pixels have VOC's colours of the classes, int64 ``[H, W]``.

    Args:
        path: a PNG of RGB, or of RGBA without transparency.
        classes: number of classes.
        size: height and width of the image that the mask belongs to; not checked if None.

    Raises:
        DataError: no file, no PNG of colours, a damaged one, a colour that VOC does not have, such as those between two
            classes in a mask that was resized or saved as JPEG; a class beyond ``classes``, another size.
    """
    with opened(path, "a PNG mask", ("PNG",)) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise DataError(f"{path}: expected a mask of colours, got mode {image.mode}")
        if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
            raise DataError(f"{path}: expected a mask of colours, got one with transparent pixels")
        pixels = np.asarray(image.convert("RGB"), np.int64)
    colours, numbers = _number(palette().astype(np.int64)), _number(pixels)
    order = colours.argsort()
    labels = order[np.searchsorted(colours, numbers, sorter=order).clip(max=255)]
    unknown = np.argwhere(colours[labels] != numbers)
    if len(unknown):
        row, column = unknown[0]
        colour = tuple(pixels[row, column].tolist())
        raise DataError(f"{path}: expected colours of VOC, got {colour} in row {row}, column {column}")
    return check_labels(path, labels.astype(np.uint8), classes, size)


def _number(colours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Red, green and blue, ``[..., 3]``, in a number."""
    return colours @ np.array([1 << 16, 1 << 8, 1])
