"""What the bilateral filter is measured on: photographs that packages ship, and what is exact for them."""

from functools import cache

import numpy as np
import torch
from skimage import data, transform
from torch import Tensor

from segloss.bilateral import guide_features

TUNED = ["astronaut", "chelsea", "coffee", "rocket"]  # the library's choices were made by looking at these
HELD_OUT = ["china", "flower", "motorcycle", "retina", "immunohistochemistry", "noise"]
SIGMA_RGB = 15 / 255


def sigma_xy(side: int) -> float:
    """50 pixels at 256 pixels a side, in proportion at other sizes."""
    return 50 * side / 256


@cache
def photo(name: str, side: int) -> Tensor:
    """The central square of a bundled photograph, or uniform noise: ``[1, 3, side, side]`` in [0, 1]."""
    if name == "noise":
        return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    image = bundled(name)
    square = min(image.shape[:2])
    top, left = (image.shape[0] - square) // 2, (image.shape[1] - square) // 2
    image = image[top : top + square, left : left + square]
    small = transform.resize(image, (side, side), anti_aliasing=True)
    return torch.from_numpy(small.astype(np.float32)).permute(2, 0, 1)[None]


def probabilities(classes: int, side: int) -> Tensor:
    """Random class probabilities, ``[1, classes, side, side]``; of a single class, those of a sigmoid."""
    logits = 2 * torch.randn(1, classes, side, side, generator=torch.Generator().manual_seed(0))
    return torch.softmax(logits, 1) if classes > 1 else torch.sigmoid(logits)


def truth(image: Tensor, values: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Exact filtered values at some pixels, ``[len(pixels), K]``, and their sums of weights, in float64.

    ``image`` is ``[1, 3, side, side]`` and ``values`` are ``[1, K, side, side]``.
    """
    features = guide_features(image.double(), SIGMA_RGB, sigma_xy(image.shape[2]))[0]
    columns = values[0].flatten(1).double().t()
    filtered, sums = [], []
    for pixel in pixels:
        weights = (features - features[:, pixel, None]).square_().sum(0).mul_(-0.5).exp_()
        filtered.append(weights @ columns)
        sums.append(weights.sum())
    return torch.stack(filtered), torch.stack(sums)


def bundled(name: str) -> np.ndarray:
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    if name == "motorcycle":
        return data.stereo_motorcycle()[0]
    return getattr(data, name)()
