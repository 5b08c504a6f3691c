"""``feature_similarity`` against matrices of all pairs left to autograd: time and memory of forward and backward.

[4, 20, 56, 56] is what the paper trains on: VOC's classes, images of 448 pixels, maps of an eighth of that. Half as
large and half as large again show the growth. One thread, since that is how data-parallel training shares out cores.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import naive_feature_similarity
from benchmarks.memory import peak_bytes
from segloss import feature_similarity, max_normalize

SHAPES = [(4, 20, 28, 28), (4, 20, 56, 56), (1, 20, 84, 84)]
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "naive all pairs": lambda scores, image: naive_feature_similarity(max_normalize(scores), image),
    "feature_similarity": feature_similarity,
    "feature_similarity, window 15": lambda scores, image: feature_similarity(scores, image, window=15),
    "feature_similarity, window 10": lambda scores, image: feature_similarity(scores, image, window=10),
}
ERRORS = {"feature_similarity": 1e-4, "feature_similarity, window 15": 2e-2, "feature_similarity, window 10": 0.2}


def step(method: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """One forward and backward pass on smooth scores and images, as a call that returns the gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scores, image = (
        F.interpolate(torch.randn(shape[0], channels, 14, 14), size=shape[2:], mode="bicubic")
        for channels in (shape[1], 3)
    )
    image = image.sigmoid()
    scores.requires_grad_()

    def run() -> Tensor:
        return torch.autograd.grad(METHODS[method](scores, image), scores)[0]

    small = torch.randn(1, 2, 8, 8, requires_grad=True)  # the first call of any kind loads code
    METHODS[method](small, torch.rand(1, 3, 8, 8)).backward()
    return run


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_feature_similarity(benchmark, method: str, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    run = step(method, shape)
    grad, expected = run(), step("naive all pairs", shape)()
    error = ((grad - expected).norm() / expected.norm()).item()
    assert error < ERRORS.get(method, 1e-9)
    benchmark.group = "feature_similarity " + "x".join(map(str, shape))
    benchmark.extra_info.update(method=method, rival="naive all pairs", error=error)
    gradient = 4 * torch.Size(shape).numel()
    benchmark.extra_info["extra_bytes"] = max(0, peak_bytes(step, method, shape) - gradient)
    benchmark.pedantic(run, rounds=2 if method == "naive all pairs" else 7, warmup_rounds=1)
