"""Pseudo-labels: localisation maps to labels that a segmentation network can be trained on."""

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.common.checks import (
    check_finite,
    check_floating,
    check_ignore_index,
    check_int,
    check_number,
    check_tags,
    shape_text,
)
from segloss.common.reduction import wide_dtype


@overload
def pseudo_labels(
    maps: Tensor,
    tags: Tensor,
    *,
    foreground: float = ...,
    background: float = ...,
    size: Sequence[int] | None = ...,
    ignore_index: int = ...,
) -> Tensor: ...
@overload
def pseudo_labels(
    maps: Sequence[Tensor],
    tags: Sequence[Sequence[int]],
    *,
    foreground: float = ...,
    background: float = ...,
    size: Sequence[int] | None = ...,
    ignore_index: int = ...,
) -> list[Tensor]: ...
def pseudo_labels(
    maps: Tensor | Sequence[Tensor],
    tags: Tensor | Sequence[Sequence[int]],
    *,
    foreground: float = 0.30,
    background: float = 0.05,
    size: Sequence[int] | None = None,
    ignore_index: int = 255,
) -> Tensor | list[Tensor]:
    r"""Labels by two thresholds, with pixels between them left out.

    .. math::
        y = \begin{cases}
            1 + \arg\max_c M_c & \max_c M_c > \theta_{fg} \\
            0 & \max_c M_c \le \theta_{bg} \\
            \text{ignored} & \text{otherwise}
        \end{cases}

    over the classes c that the image has. Of equal maps the lowest class counts; an image without classes is all
    background. Equal thresholds leave no pixel out.

    The maps are classes of the foreground only, as a classifier has them: **class c of the maps gets label c + 1**
    and 0 is the background.

    IRNet's public code refines the labels of each threshold alone by a dense CRF, before it takes the foreground of one
    and the background of the other. Thresholds are meant for normalised maps: a pixel of 1 is the strongest of its
    class, see :func:`segloss.max_normalize`.

    Args:
        maps: localisation maps, ``[B, C, h, w]``, any finite values; or one tensor ``[len_i, h, w]`` for each image, of
            any extent, whose classes ``tags`` lists.
        tags: 1 where an image has a class, ``[B, C]``, without the background; for a sequence of maps the classes of
            each image's maps, such as ``classes`` of the method that gave them.
        foreground: threshold :math:`\theta_{fg}`, at least ``background``.
        background: threshold :math:`\theta_{bg}`.
        size: height and width of the labels; maps are brought there first, bilinearly. Those of the maps if None.
        ignore_index: label of the pixels that are left out; no label of a class.

    Returns:
        int64, ``[B, H, W]``; or a list with ``[H, W]`` for each image. No gradient.

    Raises:
        TypeError: maps that are not floating-point tensors, ``tags`` that do not go with the kind of maps, thresholds
            that are no numbers, ``size`` that is no pair, classes, sides or ``ignore_index`` that are no integers.
        ValueError: shapes or devices that do not fit each other, no pixel, NaN or infinite maps, tags other than 0 and
            1, more or fewer classes than maps, negative classes, ``foreground`` below ``background``, ``size`` that is
            not two numbers above 0, ``ignore_index`` that is the label of a class.

    Source:
        IRNet's public code for the thresholds; the dissertation's section 5.3 for ignoring what lies between.

    Example:
        >>> maps = torch.tensor([[0.9, 0.2, 0.1, 0.0], [0.0, 0.0, 1.0, 0.0]]).view(1, 2, 1, 4)
        >>> pseudo_labels(maps, torch.tensor([[1, 1]]))
        tensor([[[  1, 255,   2,   0]]])
        >>> pseudo_labels([maps[0]], [[4, 7]], foreground=0.1)
        [tensor([[5, 5, 8, 0]])]
    """
    check_number("background", background)
    check_number("foreground", foreground)
    if foreground < background:
        raise ValueError(f"foreground: expected at least background, {background:g}, got {foreground:g}")
    _check_size(size)
    check_ignore_index(ignore_index)
    if isinstance(maps, Tensor):
        _check_maps("maps", maps, "[B, C, h, w]")
        check_tags(tags, maps, "maps")
        assert isinstance(tags, Tensor)
        _check_ignored(ignore_index, range(maps.shape[1] + 1))
        winners, unsure = _thresholds(maps, tags != 0, foreground, background, size)
        return winners.masked_fill(unsure, ignore_index)
    _check_lists(maps, tags, ignore_index)
    labels = []
    for of_image, classes in zip(maps, tags, strict=True):
        present = torch.ones(1, len(classes), dtype=torch.bool, device=of_image.device)
        (winners,), (unsure,) = _thresholds(of_image[None], present, foreground, background, size)
        names = torch.tensor(_names(classes), device=of_image.device)
        labels.append(names[winners].masked_fill(unsure, ignore_index))
    return labels


def _thresholds(
    maps: Tensor, present: Tensor, foreground: float, background: float, size: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The strongest map of each pixel, counted from 1, or 0 for none above ``foreground``; where that 0 is unsure."""
    planes = F.pad(maps.detach().to(wide_dtype(maps)), (0, 0, 0, 0, 1, 0))
    if size is not None:
        planes = F.interpolate(planes, size, mode="bilinear", align_corners=False)
    planes[:, 0] = planes.new_tensor(foreground)
    planes[:, 1:].masked_fill_(~present[:, :, None, None], -torch.inf)
    winners = planes.argmax(1)
    return winners, (winners == 0) & (planes[:, 1:] > planes.new_tensor(background)).any(1)


def _names(classes: Sequence[int]) -> list[int]:
    """Labels of the background and of these classes."""
    return [0, *(c + 1 for c in classes)]


def _check_lists(maps: object, tags: object, ignore_index: int) -> None:
    if not isinstance(maps, Sequence):
        raise TypeError(f"maps: expected a tensor, or a sequence of them, got {type(maps).__name__}")
    if not isinstance(tags, Sequence):
        raise TypeError(
            f"tags: expected the classes of each image to go with a sequence of maps, got {type(tags).__name__}"
        )
    if len(tags) != len(maps):
        raise ValueError(f"tags: expected the classes of {len(maps)} images to go with maps, got {len(tags)}")
    for index, (of_image, classes) in enumerate(zip(maps, tags, strict=True)):
        _check_maps(f"maps[{index}]", of_image, "[C, h, w]")
        if not isinstance(classes, Sequence):
            raise TypeError(f"tags[{index}]: expected a sequence of classes, got {type(classes).__name__}")
        if len(classes) != len(of_image):
            raise ValueError(f"tags[{index}]: expected the classes of {len(of_image)} maps, got {len(classes)}")
        for c in classes:
            check_int(f"tags[{index}]", c)
            check_number(f"tags[{index}]", c, least=0)
        _check_ignored(ignore_index, _names(classes))


def _check_maps(name: str, maps: object, form: str) -> None:
    check_floating(name, maps)
    assert isinstance(maps, Tensor)
    if maps.dim() != form.count(",") + 1 or 0 in maps.shape[-2:]:
        raise ValueError(f"{name}: expected {form} with at least one pixel, got {shape_text(maps.shape)}")
    check_finite(name, maps)


def _check_ignored(ignore_index: int, labels: Sequence[int]) -> None:
    if ignore_index in labels:
        raise ValueError(f"ignore_index: expected what is no label of a class, got {ignore_index}")


def _check_size(size: object) -> None:
    if size is None:
        return
    if not isinstance(size, Sequence):
        raise TypeError(f"size: expected a height and a width, got {size!r}")
    if len(size) != 2:
        raise ValueError(f"size: expected a height and a width, got {size!r}")
    for side in size:
        check_int("size", side)
        check_number("size", side, least=1)
