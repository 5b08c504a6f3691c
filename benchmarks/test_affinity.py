"""``path_affinity_loss`` against gathering every line, left to autograd: time and memory of forward and backward.

128 x 128 pixels and radius 10 are what IRNet trains on: images of 512 pixels, boundaries of a quarter of that.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import naive_path_affinity_loss
from benchmarks.memory import peak_bytes
from segloss import path_affinity_loss

SHAPES = [(1, 1, 64, 64), (4, 1, 128, 128)]
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "naive gather": naive_path_affinity_loss,
    "path_affinity_loss": path_affinity_loss,
}


def step(method: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """One forward and backward pass on random boundaries and square regions, as a call that returns the gradient."""
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    regions = torch.randint(0, 5, (shape[0], shape[2] // 16, shape[3] // 16))
    labels = regions.repeat_interleave(16, 1).repeat_interleave(16, 2)

    def run() -> Tensor:
        return torch.autograd.grad(METHODS[method](logits, labels), logits)[0]

    METHODS[method](torch.randn(1, 1, 8, 8, requires_grad=True), labels[:1, :8, :8]).backward()  # loads code
    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_path_affinity_loss(benchmark, method: str, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    run = step(method, shape)
    grad, expected = run(), step("naive gather", shape)()
    error = ((grad - expected).norm() / expected.norm()).item()
    assert error < 1e-4
    benchmark.group = "path_affinity_loss " + "x".join(map(str, shape))
    benchmark.extra_info.update(method=method, rival="naive gather", error=error)
    gradient = 4 * torch.Size(shape).numel()
    benchmark.extra_info["extra_bytes"] = max(0, peak_bytes(step, method, shape) - gradient)
    benchmark.pedantic(run, rounds=3 if method == "naive gather" else 10, warmup_rounds=1)
