"""``bilateral_filter``, exact and block-sparse, against brute force in torch: time, memory and error on photographs.

21 channels (VOC), sigma 15/255 and 50 pixels at 256 pixels a side, in proportion at other sizes. The error is that of
256 random pixels against float64 brute force, relative in the Euclidean norm.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from skimage import data, transform
from torch import Tensor

from benchmarks.baselines import dense_filter
from benchmarks.memory import peak_bytes
from segloss import bilateral_filter
from segloss.bilateral import guide_features

PHOTOS = ["astronaut", "chelsea", "coffee", "rocket"]
SIDES = [64, 128, 256]
METHODS = ["brute force", "exact", "blocksparse 5e-2", "blocksparse 1e-2", "blocksparse 1e-3"]
CLASSES = 21


@cache
def photo(name: str, side: int) -> Tensor:
    """The central square of a bundled photograph, ``[1, 3, side, side]`` in [0, 1]."""
    image = getattr(data, name)()
    square = min(image.shape[:2])
    top, left = (image.shape[0] - square) // 2, (image.shape[1] - square) // 2
    image = image[top : top + square, left : left + square]
    small = transform.resize(image, (side, side), anti_aliasing=True)
    return torch.from_numpy(small.astype(np.float32)).permute(2, 0, 1)[None]


def filtering(method: str, name: str, side: int) -> Callable[[], Tensor]:
    """A call that returns the filtered probabilities, ``[N, K]``, from the image on."""
    torch.manual_seed(0)
    image = photo(name, side)
    values = torch.softmax(2 * torch.randn(1, CLASSES, side, side), 1)
    sigma_xy = 50 * side / 256
    if method == "brute force":
        columns = values[0].flatten(1).t().contiguous()
        return lambda: dense_filter(columns, guide_features(image, 15 / 255, sigma_xy)[0].t().contiguous())
    kind, *tolerance = method.split()
    options = {"sigma_rgb": 15 / 255, "sigma_xy": sigma_xy, "method": kind}
    if tolerance:
        options["tolerance"] = float(tolerance[0])
    return lambda: bilateral_filter(values, image, **options)[0].flatten(1).t()  # type: ignore[arg-type]


def truth(name: str, side: int) -> tuple[Tensor, Tensor]:
    """Some pixels and their exact filtered values, in float64."""
    torch.manual_seed(0)
    values = torch.softmax(2 * torch.randn(1, CLASSES, side, side), 1)[0].flatten(1).double()
    features = guide_features(photo(name, side).double(), 15 / 255, 50 * side / 256)[0].t()
    pixels = torch.randperm(side**2)[:256]
    weights = torch.exp(-(features[pixels, None] - features).square().sum(2) / 2)
    return pixels, weights @ values.t()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("side", SIDES)
def test_bilateral(benchmark, method: str, name: str, side: int) -> None:  # type: ignore[no-untyped-def]
    run = filtering(method, name, side)
    pixels, exact = truth(name, side)
    error = ((run()[pixels] - exact).norm() / exact.norm()).item()
    assert error < (float(method.split()[1]) if method.startswith("blocksparse") else 1e-4)
    benchmark.group = f"bilateral_filter {side}x{side} {name}"
    benchmark.extra_info.update(method=method, rival="brute force", error=error)
    benchmark.extra_info["extra_bytes"] = peak_bytes(filtering, method, name, side)
    benchmark.pedantic(run, rounds=1 if (side, method) == (256, "brute force") else 3)
