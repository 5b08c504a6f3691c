"""The classes that maps are wanted for."""

from collections.abc import Sequence
from typing import Any

from segloss.common.checks import check_int

Classes = Sequence[int] | Sequence[Sequence[int]]


def check_classes(classes: Any, images: int, count: int) -> list[int] | list[list[int]]:
    """Numbers of classes, for all images or a list for each.

    Raises:
        TypeError: what is not a sequence of integers, or of sequences of them.
        ValueError: a class that is not among ``count``, sequences for more or fewer than ``images``.
    """
    if not isinstance(classes, Sequence):
        raise TypeError(f"classes: expected integers, or a sequence of them for each image, got {classes!r}")
    if not any(isinstance(c, Sequence) for c in classes):
        return _numbers(classes, count)
    if len(classes) != images:
        raise ValueError(f"classes: expected a sequence for each of {images} images, got {len(classes)}")
    return [_numbers(c, count) for c in classes]


def _numbers(classes: Any, count: int) -> list[int]:
    if not isinstance(classes, Sequence):
        raise TypeError(f"classes: expected a sequence of integers for each image, got {classes!r}")
    for c in classes:
        check_int("classes", c)
        if not 0 <= c < count:
            raise ValueError(f"classes: expected integers from 0 to {count - 1}, got {c}")
    return list(classes)
