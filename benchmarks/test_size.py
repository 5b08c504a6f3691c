"""``size_kl`` against softmax -> mean -> log left to autograd: time and memory of forward and backward.

[16, 21, 512, 512] is a training batch of the size-target paper, [4, 21, 256, 256] a small one; [2, 21, 64, 64] shows
the cost of the calls themselves.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import segloss
from benchmarks.baselines import log_space_size_kl, naive_size_kl
from benchmarks.memory import peak_bytes

SHAPES = [(2, 21, 64, 64), (4, 21, 256, 256), (16, 21, 512, 512)]
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "naive autograd": naive_size_kl,
    "log-space autograd": log_space_size_kl,
    "segloss.size_kl": segloss.size_kl,
}


def step(method: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """One forward and backward pass on random logits, as a call that returns the gradient."""
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    sizes = torch.rand(shape[:2]).softmax(1)

    def run() -> Tensor:
        return torch.autograd.grad(METHODS[method](logits, sizes), logits)[0]

    # The first call of any kind loads code and starts threads; only the second is worth measuring.
    small = torch.randn(1, 2, 8, 8, requires_grad=True)
    METHODS[method](small, torch.tensor([[0.5, 0.5]])).backward()
    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_size_kl(benchmark, method: str, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    run = step(method, shape)
    grad = run()
    expected = step("log-space autograd", shape)()
    error = ((grad - expected).norm() / expected.norm()).item()
    assert error < 1e-4
    del grad, expected
    large = shape[0] * shape[2] > 4096
    benchmark.group = "size_kl " + "x".join(map(str, shape))
    benchmark.extra_info.update(method=method, rival="naive autograd", error=error)
    gradient = 4 * torch.Size(shape).numel()
    benchmark.extra_info["extra_bytes"] = max(0, peak_bytes(step, method, shape) - gradient)
    benchmark.pedantic(run, rounds=7 if large else 100, warmup_rounds=2)
