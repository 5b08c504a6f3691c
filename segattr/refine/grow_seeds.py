"""Seeded region growing: spread labels over the pixels around them that a network is sure of."""

import numpy as np
import torch
from torch import Tensor

from segloss.common.checks import (
    check_floating,
    check_fractions,
    check_has_values,
    check_ignore_index,
    check_integer,
    check_like,
    check_number,
    check_real,
    check_tensor,
    require,
    shape_text,
    values_text,
)

_EIGHT = np.zeros((3, 3, 3), dtype=bool)  # the neighbours of a pixel within its own plane
_EIGHT[1] = True


def grow_seeds(
    seeds: Tensor,
    probabilities: Tensor,
    *,
    foreground: float = 0.85,
    background: float = 0.99,
    ignore_index: int = 255,
) -> Tensor:
    r"""Grow seeds over the confident pixels that are connected to them.

    A pixel without a label takes class c if c is its most probable class, the probability :math:`H_c` is above the
    threshold :math:`\theta_c`, and one of its 8 neighbours has class c; this is repeated until no pixel changes. Seeds
    keep their label. Of equally probable classes the lowest counts.

    All at once: a region that is connected, of seeds and of confident pixels of one class, is taken as a whole if a
    seed is in it. This runs on the CPU, wherever the tensors are.

    Masks of boxes, which have one object and its background, are grown with 0.9 for both: with ``probabilities`` of
    1 - p and p, pixels below 0.1 join the background and those above 0.9 the object.

    Args:
        seeds: labels, integers, ``[B, H, W]``, classes below K or ``ignore_index`` where there is none; or 1 where a
            pixel is a seed of a class and 0 elsewhere, ``[B, K, H, W]``, any dtype: a pixel may then be a seed of
            several classes, and all of them grow from it.
        probabilities: class probabilities H, ``[B, K, H, W]``, K >= 2, in [0, 1]; class 0 is the background.
        foreground: threshold of all classes but the background, in [0, 1].
        background: threshold of the background, in [0, 1].
        ignore_index: label of the pixels that are no seeds, in seeds ``[B, H, W]`` and the result.

    Returns:
        The grown seeds in the form and on the device of ``seeds``: labels int64, or 0 and 1 in the dtype of ``seeds``.
        No gradient.

    Raises:
        TypeError: ``probabilities`` that are not floating point, ``seeds`` that are no tensor, labels that are not
            integers, thresholds that are no numbers, ``ignore_index`` that is no integer.
        ValueError: shapes or devices that do not fit each other, a single class, no pixel, probabilities outside
            [0, 1] or NaN, a label that is neither a class nor ``ignore_index``, seeds other than 0 and 1, thresholds
            outside [0, 1].

    Source:
        Deep seeded region growing, as in the dissertation's section 2.3.2; for boxes, section 5.3.

    Example:
        >>> inside = torch.tensor([0.1, 0.9, 0.9, 0.3, 0.9]).view(1, 1, 1, 5)
        >>> seeds = torch.tensor([[[255, 1, 255, 255, 255]]])
        >>> grow_seeds(seeds, torch.cat([1 - inside, inside], 1))
        tensor([[[255,   1,   1, 255, 255]]])
    """
    _check_probabilities(probabilities)
    check_has_values("probabilities", probabilities)
    check_number("foreground", foreground, least=0, most=1)
    check_number("background", background, least=0, most=1)
    sown = _planes(seeds, probabilities, ignore_index)
    largest, best = probabilities.detach().max(1)
    threshold = torch.where(best == 0, largest.new_tensor(background), largest.new_tensor(foreground))
    fertile = (largest > threshold) & ~sown.any(1)
    classes = torch.arange(sown.shape[1], device=best.device).view(-1, 1, 1)
    grown = _reached(sown, sown | (fertile.unsqueeze(1) & (best.unsqueeze(1) == classes)))
    if seeds.dim() == 4:
        return seeds.detach().masked_fill(grown, 1)
    return torch.where(fertile & grown.any(1), best, seeds.long())


def _reached(start: Tensor, open_: Tensor) -> Tensor:
    """Pixels of the 8-connected regions of each plane of ``open_ [B, K, H, W]`` that hold a pixel of ``start``."""
    from scipy import ndimage

    regions, count = ndimage.label(open_.flatten(0, 1).cpu().numpy(), _EIGHT)
    held = np.zeros(count + 1, dtype=bool)
    held[regions[start.flatten(0, 1).cpu().numpy()]] = True
    return torch.from_numpy(held[regions]).view(start.shape).to(start.device)


def _planes(seeds: object, probabilities: Tensor, ignore_index: int) -> Tensor:
    """Checked seeds as bool ``[B, K, H, W]``."""
    check_tensor("seeds", seeds)
    assert isinstance(seeds, Tensor)
    check_ignore_index(ignore_index)
    images, count, height, width = probabilities.shape
    if seeds.dim() == 3:
        check_integer("seeds", seeds)
        check_like("seeds", seeds, (images, height, width), "probabilities", probabilities)
        labels = seeds.long()
        chosen = labels != ignore_index

        def wrong() -> Tensor:
            return chosen & ((labels < 0) | (labels >= count))

        require(
            "seeds",
            seeds,
            lambda: ~wrong().any(),
            lambda: (
                f"expected classes 0 to {count - 1} or {ignore_index} where there is none, "
                f"got {values_text(labels[wrong()])} (see probabilities and ignore_index)"
            ),
        )
        classes = torch.arange(count, device=labels.device).view(-1, 1, 1)
        return (labels.unsqueeze(1) == classes) & chosen.unsqueeze(1)
    check_real("seeds", seeds)
    check_like("seeds", seeds, probabilities.shape, "probabilities", probabilities)
    require("seeds", seeds, lambda: ((seeds == 0) | (seeds == 1)).all(), lambda: "expected 0 or 1, got other values")
    return seeds != 0


def _check_probabilities(probabilities: object) -> None:
    check_floating("probabilities", probabilities)
    assert isinstance(probabilities, Tensor)
    if probabilities.dim() != 4 or probabilities.shape[1] < 2 or 0 in probabilities.shape[2:]:
        raise ValueError(
            "probabilities: expected [B, K, H, W] with at least 2 classes, background first, and one pixel, "
            f"got {shape_text(probabilities.shape)}"
        )
    check_fractions("probabilities", probabilities, "probabilities", 1e-3)
