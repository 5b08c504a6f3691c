"""The soak test on a small budget; ``python -m tests.soak`` is the long one."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import segloss
from tests import soak
from tests.forked import ROOT, run


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    command = [sys.executable, "-m", "tests.soak", "--steps", "60"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step ") == 10
    assert done.stdout.endswith("no growth in 60 steps\n")


def test_no_loss_is_left_out() -> None:
    losses = {value for value in vars(segloss).values() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert losses <= {type(module) for module in soak.AllTogether().modules()}


class Leak(soak.AllTogether):
    """Keeps the graph of every step, as a running sum that nobody detached does."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[tuple[Tensor, Tensor]] = []

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        loss = super().forward(features, image)
        self.history += [(loss, torch.zeros(2**18)) for _ in range(10)]  # 10 MB that are in use
        return loss


@pytest.mark.slow
def test_a_leak_is_found() -> None:
    # In a process of its own: this one may have memory to reuse, of tests before.
    code = "from tests import soak, test_soak; print(*soak.soak(20, test_soak.Leak()), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    grown = [line.split(" grew ")[0] for line in done.stdout.splitlines() if " grew " in line]
    assert grown == ["resident memory", "the number of objects"], done.stderr


def test_too_few_steps_end_with_one_line() -> None:
    done = run("-m", "tests.soak", "--steps", 3)
    assert done.returncode == 2
    assert done.stderr.endswith("error: --steps: expected at least 10, got 3\n")
