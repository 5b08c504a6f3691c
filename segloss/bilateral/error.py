"""The error of a filtered image, measured on some of its pixels."""

import torch
from torch import Tensor

from segloss.bilateral.gaussian import gaussian, is_compact
from segloss.common.reduction import LARGEST

_FEWEST, _MOST, _PAIRS = 64, 256, 1 << 22  # pixels to look at, and how many pairs with all others they may make
_COLUMNS = 4096  # pixels at a time: their weights stay in cache
_GOLDEN = 0.6180339887498949  # multiples of it are spread evenly over the unit interval


def sample_pixels(count: int) -> Tensor:
    """Numbers of the pixels to look at, the same for all images of ``count`` pixels.

    One of each of as many stretches of the image, so that they are everywhere, at places that no pattern repeats.
    """
    pixels = min(count, max(_FEWEST, min(_MOST, _PAIRS // max(count, 1))))
    bounds = torch.arange(pixels + 1, device="cpu") * count // max(pixels, 1)
    within = torch.arange(pixels, dtype=torch.float64, device="cpu") * _GOLDEN % 1
    return bounds[:-1] + (within * bounds.diff()).long()


def sampled_error(values: Tensor, features: Tensor, filtered: Tensor, pixels: Tensor) -> float:
    """|filtered - W values| / |W values| over the pixels ``[P]``, in the Euclidean norm.

    ``values [K, N]`` and ``features [D, N]`` are of all pixels, ``filtered [K, P]`` of those to look at.
    """
    compact = is_compact(features)
    points = features.t()
    exact = torch.zeros_like(filtered)
    for first in range(0, features.shape[1], _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        exact += values[:, columns] @ gaussian(points[pixels], points[columns], compact=compact).t()
    error, size = (filtered.double() - exact).norm(), exact.double().norm()
    return min((error / size.clamp(min=torch.finfo(exact.dtype).tiny)).item(), LARGEST)
