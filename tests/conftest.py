"""Settings of the whole suite, and the golden arrays."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

# Deadlines measure the machine, not the code; the same examples on every run.
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Loads a golden case, ``"losses/size_kl"`` say, as tensors."""

    def load(case: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{case}.npz") as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays}

    return load


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """The same numbers for every test, whatever ran before; the examples' seeding sets the rest of it."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
                item.add_marker(skip)
