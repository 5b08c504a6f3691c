"""``bilateral_filter`` and ``potts_crf`` against brute force in torch: time, memory and error on photographs.

21 channels (VOC), sigma 15/255 and 50 pixels at 256 pixels a side, in proportion at other sizes. The error is that of
256 random pixels against float64 brute force, relative in the Euclidean norm. ``python -m benchmarks.frontier`` has
more methods, sizes and photographs, and other libraries.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import dense_filter
from benchmarks.memory import peak_bytes
from benchmarks.photos import SIGMA_RGB, TUNED, photo, probabilities, sigma_xy, truth
from segloss import bilateral_filter, potts_crf
from segloss.bilateral import guide_features

SIDES = [64, 128, 256]
METHODS = ["brute force", "exact", "blocksparse 1e-1", "blocksparse 1e-2", "blocksparse 1e-3"]
METHODS += ["lowrank 4e-2", "lowrank 2e-2", "lowrank 1e-2", "lowrank 4e-3"]
STEPS = ["brute force", "value", "value and gradient"]
CLASSES = 21


def filtering(method: str, name: str, side: int) -> Callable[[], Tensor]:
    """A call that returns the filtered probabilities, ``[N, K]``, from the image on."""
    image, values = photo(name, side), probabilities(CLASSES, side)
    if method == "brute force":
        columns = values[0].flatten(1).t().contiguous()
        return lambda: dense_filter(columns, guide_features(image, SIGMA_RGB, sigma_xy(side))[0].t().contiguous())
    kind, *tolerance = method.split()
    options = {"sigma_rgb": SIGMA_RGB, "sigma_xy": sigma_xy(side), "method": kind}
    if tolerance:
        options["tolerance"] = float(tolerance[0])
    return lambda: bilateral_filter(values, image, **options)[0].flatten(1).t()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("side", SIDES)
def test_bilateral(benchmark, method: str, name: str, side: int) -> None:  # type: ignore[no-untyped-def]
    run = filtering(method, name, side)
    pixels = torch.randperm(side**2, generator=torch.Generator().manual_seed(1))[:256]
    exact = truth(photo(name, side), probabilities(CLASSES, side), pixels)[0]
    error = ((run()[pixels] - exact).norm() / exact.norm()).item()
    assert error < (1e-4 if method in ("brute force", "exact") else float(method.split()[1]))
    benchmark.group = f"bilateral_filter {side}x{side} {name}"
    benchmark.extra_info.update(method=method, rival="brute force", error=error)
    benchmark.extra_info["extra_bytes"] = peak_bytes(filtering, method, name, side)
    benchmark.pedantic(run, rounds=1 if (side, method) == (256, "brute force") else 3)


def training(step: str, name: str, side: int) -> Callable[[], object]:
    """``potts_crf`` with and without its gradient, beside the brute-force filter that both replace."""
    if step == "brute force":
        return filtering(step, name, side)
    image, logits = photo(name, side), torch.randn(1, CLASSES, side, side, requires_grad=True)
    options = {"sigma_rgb": SIGMA_RGB, "sigma_xy": sigma_xy(side)}
    if step == "value":
        return torch.no_grad()(lambda: potts_crf(logits, image, **options))  # type: ignore[arg-type]
    return lambda: torch.autograd.grad(potts_crf(logits, image, **options), logits)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", TUNED)
def test_potts(benchmark, step: str, name: str) -> None:  # type: ignore[no-untyped-def]
    side = 256
    logits = torch.randn(1, CLASSES, 64, 64)
    options = {"sigma_rgb": SIGMA_RGB, "sigma_xy": sigma_xy(64)}
    value, exact = (potts_crf(logits, photo(name, 64), method=m, **options) for m in ("lowrank", "exact"))  # type: ignore[arg-type]
    error = abs(value / exact - 1).item()
    assert error < 2e-2
    benchmark.group = f"potts_crf {side}x{side} {name}"
    benchmark.extra_info.update(method=step, rival="brute force", error=error)
    benchmark.extra_info["extra_bytes"] = peak_bytes(training, step, name, side)
    benchmark.pedantic(training(step, name, side), rounds=1 if step == "brute force" else 5)
