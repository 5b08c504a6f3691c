"""``potts_crf`` of a volume beside brute force: time, error, memory and growth, on one core.

A drawn scan of 48 x 96 x 96 voxels, one channel, 4 classes, sigma 0.1 and 5 voxels: bodies of several brightnesses, a
bias field and noise. Brute force multiplies by all rows of W, in chunks that stay in cache, once for value and
gradient; its time is that of some rows, extrapolated to all of them. Errors are relative, of W S and of the gradient of
the softmax, on these rows. Times are the medians of rounds in turns, in seconds of the processor; memory is the peak
beyond the inputs and the gradient, in bytes a voxel and class. MONAI has a CRF and a bilateral filter, but its wheel
lacks the compiled extension that they need: they cannot run here. Writes volumes.json and volumes.md.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from benchmarks.__main__ import HERE, environment, store
from benchmarks.frontier import Parser, count, one_thread
from benchmarks.memory import peak_bytes
from segloss.bilateral import guide_features
from segloss.bilateral.gaussian import gaussian

Size = tuple[int, int, int]

SIZE, CLASSES = (48, 96, 96), 4
SIZES: list[Size] = [(24, 48, 48), (24, 96, 96), SIZE, (96, 96, 96), (96, 128, 128)]
SIGMAS: dict[str, Any] = {"sigma_rgb": 0.1, "sigma_xy": 5.0}
METHODS: dict[str, dict[str, Any]] = {
    "auto": {},
    "lowrank, tolerance 2e-2": {"method": "lowrank", "tolerance": 2e-2},
    "blocksparse": {"method": "blocksparse"},
}
GROWN = "auto"
ROWS, COLUMNS = 64, 4096  # of W that are computed, at a time
SAMPLED = 256  # rows
BODIES = [  # half axes, centre, brightness
    ((0.8, 0.7, 0.6), (0.0, 0.0, 0.0), 0.5),
    ((0.3, 0.3, 0.3), (0.2, 0.2, -0.2), 0.8),
    ((0.25, 0.4, 0.2), (-0.2, -0.3, 0.2), 0.35),
]


def scan(size: Size) -> Tensor:
    """``[1, 1, *size]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    places = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, length) for length in size), indexing="ij"))
    image = torch.full(size, 0.2)
    for half_axes, centre, brightness in BODIES:
        away = (places - torch.tensor(centre).view(3, 1, 1, 1)) / torch.tensor(half_axes).view(3, 1, 1, 1)
        image[away.square().sum(0) < 1] = brightness
    bias = F.interpolate(torch.randn(1, 1, 3, 4, 4, generator=generator), size, mode="trilinear")
    noise = torch.randn(size, generator=generator)
    return (image + 0.1 * bias + 0.03 * noise).clamp(0, 1)


def logits_of(size: Size) -> Tensor:
    coarse = 2 * torch.randn(1, CLASSES, 6, 12, 12, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size, mode="trilinear").requires_grad_()


def step(size: Size, method: str) -> Callable[[], Tensor]:
    """Value and gradient; the latter lies in ``grad`` of what is returned."""
    torch.set_num_threads(1)
    image, logits = scan(size), logits_of(size)
    few, small = (t[..., :24, :24, :24].detach().contiguous() for t in (logits, image))
    segloss.potts_crf(few, small, **SIGMAS, **METHODS[method])  # loads what there is to load

    def run() -> Tensor:
        logits.grad = None
        segloss.potts_crf(logits, image, **SIGMAS, **METHODS[method]).backward()
        return logits

    return run


def exact_rows(values: Tensor, features: Tensor, rows: Tensor) -> Tensor:
    """W values at some voxels, from ``[K, N]`` and ``[D, N]``: ``[K, P]``."""
    points = features.t().contiguous()
    found = values.new_zeros(len(rows), len(values))
    for some, part in zip(rows.split(ROWS), found.split(ROWS), strict=True):
        for others, channels in zip(points.split(COLUMNS), values.split(COLUMNS, 1), strict=True):
            part += gaussian(points[some], others, compact=True) @ channels.t()
    return found.t()


def sampled(values: Tensor) -> Tensor:
    """Numbers of voxels all over the volume."""
    return torch.arange(SAMPLED) * values.shape[1] // SAMPLED


def brute_force_seconds(size: Size) -> float:
    """Of all rows, from those of some: enough for W S, from which value and gradient follow."""
    features, values = guide_features(scan(size), **SIGMAS)[0], logits_of(size).detach().softmax(1).flatten(2)[0]
    rows = sampled(values)
    exact_rows(values, features, rows[:ROWS])
    start = time.process_time()
    exact_rows(values, features, rows)
    return (time.process_time() - start) / len(rows) * values.shape[1]


def errors(size: Size, method: str) -> dict[str, float]:
    image, logits = scan(size), logits_of(size)
    probability = logits.detach().softmax(1).requires_grad_()
    options = {**SIGMAS, **METHODS[method]}
    filtered = segloss.bilateral_filter(probability.detach(), image, **options)
    segloss.potts_crf(probability, image, from_logits=False, **options).backward()
    assert probability.grad is not None
    flat = probability.detach().flatten(2)[0].double()
    rows = sampled(flat)
    exact = exact_rows(flat, guide_features(image.double(), **SIGMAS)[0], rows)
    slope = exact.sum(0) - 2 * exact  # W 1 - 2 W S
    found, pulled = (t.flatten(2)[0, :, rows].double() for t in (filtered, probability.grad))
    return {
        "error": ((found - exact).norm() / exact.norm()).item(),
        "gradient_error": ((pulled - slope).norm() / slope.norm()).item(),
    }


def compare(rounds: int) -> list[dict[str, Any]]:
    runs = {method: step(SIZE, method) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in ("brute force", *METHODS)}
    for _ in range(rounds):
        seconds["brute force"].append(brute_force_seconds(SIZE))
        for method, run in runs.items():
            start = time.process_time()
            run()
            seconds[method].append(time.process_time() - start)
    whole = median(seconds["brute force"])
    rows: list[dict[str, Any]] = [{"method": "brute force, extrapolated", "seconds": whole, "ratio": 1.0}]
    for method in METHODS:
        taken = median(seconds[method])
        row = {"method": method, "seconds": taken, "ratio": whole / taken} | errors(SIZE, method)
        rows.append(row | {"bytes": extra_bytes(SIZE, method)})
    return rows


def extra_bytes(size: Size, method: str) -> float:
    """Beyond inputs and the gradient, for each voxel and class."""
    numbers = math.prod(size) * CLASSES
    return peak_bytes(step, size, method) / numbers - torch.float32.itemsize


def growth(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        run, seconds = step(size, GROWN), []
        for _ in range(rounds):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        rows.append({"size": size, "seconds": median(seconds), "bytes": extra_bytes(size, GROWN)})
    return rows


def markdown(rows: list[dict[str, Any]], grown: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        "# Volumes",
        "",
        f"{where['date']}, {where['processor']} ({where['instructions']}), 1 thread, load {where['load']:.1f}, torch "
        f"{where['torch']}. `potts_crf` of 48 x 96 x 96 voxels, {CLASSES} classes, one channel, sigma 0.1 and 5 "
        "voxels: value and gradient. Errors of W S and of the gradient of S; peak memory beyond inputs and gradient.",
        "",
        "| method | time | faster | error | of the gradient | bytes a voxel and class |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        line = f"| {row['method']} | {row['seconds']:.3g} s | {row['ratio']:.0f} x |"
        if "error" in row:
            line += f" {row['error']:.1e} | {row['gradient_error']:.1e} | {row['bytes']:.0f} |"
        lines.append(line if "error" in row else line + " 0 | 0 | |")
    lines += [
        "",
        "MONAI's CRF and bilateral filter need a compiled extension that its wheel lacks, and do not run.",
        "",
        f'Growth, `method="{GROWN}"`:',
        "",
        "| voxels | time | time a million voxels | bytes a voxel and class |",
        "|---|---|---|---|",
    ]
    for row in grown:
        millions = math.prod(row["size"]) / 1e6
        size = " x ".join(map(str, row["size"]))
        lines.append(f"| {size} | {row['seconds']:.3f} s | {row['seconds'] / millions:.2f} s | {row['bytes']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = Parser(prog="python -m benchmarks.volumes", description=__doc__)
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for volumes.json and volumes.md")
    options = parser.parse_args()
    parser.folder(options.out)
    with one_thread():
        where = environment()
        rows = compare(options.rounds)
        grown = growth(options.rounds)
    report = {"environment": where, "results": rows, "growth": grown}
    print(store(options.out / "volumes", report, markdown(rows, grown, where)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
