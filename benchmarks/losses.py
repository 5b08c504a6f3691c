"""Every loss that is a formula beside the plainest code for it: time of a forward and a backward pass, on the CPU.

The plain codes are what one writes for a training: they need no care for vanishing classes, ignored pixels or wrong
values. Both run in turns, in random order; the ratio is the median over the rounds, in seconds of the processor on one
thread, of the clock on more. "Unchecked" is without a look at the values. Writes losses.json and losses.md.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from benchmarks.__main__ import HERE, environment, store
from benchmarks.baselines import naive_size_kl
from benchmarks.frontier import Parser, count
from segloss.common import checks

Step = Callable[[], Tensor]
Pair = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]  # ours, plain, arguments

SIZES = [(2, 64), (4, 64), (16, 64), (4, 128), (16, 128), (4, 256), (8, 256), (4, 512)]
QUICK = [(2, 64), (4, 128)]
CLASSES = 21
_LIBRARY = [module for name, module in sys.modules.items() if name.startswith("segloss")]
MANY = 1 << 22  # elements from which on a few rounds tell enough


def plain_barrier(logits: Tensor, tags: Tensor) -> Tensor:
    return -(tags * logits.softmax(1).mean((2, 3)).log()).sum(1).mean()


def plain_suppression(logits: Tensor, tags: Tensor) -> Tensor:
    return -((1 - tags) * (1 - logits.softmax(1).mean((2, 3))).log()).sum(1).mean()


def plain_reverse(logits: Tensor, sizes: Tensor) -> Tensor:
    average = logits.softmax(1).mean((2, 3))
    return (average * (average / sizes).log()).sum(1).mean()


def plain_seeding(logits: Tensor, seeds: Tensor) -> Tensor:
    found = seeds * logits.log_softmax(1)
    back = -found[:, 0].sum((1, 2)) / seeds[:, 0].sum((1, 2)).clamp(min=1)
    front = -found[:, 1:].sum((1, 2, 3)) / seeds[:, 1:].sum((1, 2, 3)).clamp(min=1)
    return (back + front).mean()


def plain_boundary(logits: Tensor, refined: Tensor) -> Tensor:
    return (refined * (refined.log() - logits.log_softmax(1))).sum(1).mean()


def plain_sampling(scores: Tensor, tags: Tensor) -> Tensor:
    """As the authors draw: the sigmoid and a small number are the weights."""
    posterior = scores.sigmoid().flatten(2)
    drawn = torch.multinomial(posterior.detach().flatten(0, 1) + 1e-5, 10, replacement=True)
    picked = posterior.gather(2, drawn.view(*posterior.shape[:2], -1))
    return F.binary_cross_entropy(picked, tags[:, :, None].expand_as(picked))


def plain_grid(logits: Tensor, image: Tensor, sigma: float = 0.15) -> Tensor:
    share, energy = logits.softmax(1), torch.zeros(())
    for dim in (2, 3):
        length = share.shape[dim] - 1
        (one, two), (colour, other) = ((x.narrow(dim, 0, length), x.narrow(dim, 1, length)) for x in (share, image))
        weight = torch.exp((colour - other).square().sum(1) / (-2 * sigma**2))
        energy = energy + 2 * (weight * (1 - (one * two).sum(1))).sum()
    return energy / len(logits)


def plain_margin(logits: Tensor, tags: Tensor) -> Tensor:
    return -(tags * logits.clamp(max=600)).sum(1).mean()


def pairs(batch: int, side: int) -> Iterator[tuple[str, Pair]]:
    """A loss of the library, the plain code, and arguments of which the first gets a gradient."""
    torch.manual_seed(0)
    logits = torch.randn(batch, CLASSES, side, side)
    sizes = torch.rand(batch, CLASSES).softmax(1)
    tags = (torch.rand(batch, CLASSES) < 0.3).float()
    labels = torch.randint(CLASSES, (batch, side, side))
    labels[torch.rand(labels.shape) < 0.9] = 255
    seeds = F.one_hot(torch.randint(CLASSES, (batch, side, side)), CLASSES).movedim(-1, 1).float()
    refined = torch.randn(batch, CLASSES, side, side).softmax(1)
    image = torch.rand(batch, 3, side, side)
    yield "size_kl", (segloss.size_kl, naive_size_kl, (logits, sizes))
    yield "reverse_size_kl", (segloss.reverse_size_kl, plain_reverse, (logits, sizes))
    yield "log_barrier", (segloss.log_barrier, plain_barrier, (logits, tags))
    yield "suppression", (segloss.suppression, plain_suppression, (logits, tags))
    ignoring: Callable[..., Tensor] = lambda x, y: F.cross_entropy(x, y, ignore_index=255)  # noqa: E731
    yield "partial_cross_entropy", (segloss.partial_cross_entropy, ignoring, (logits, labels))
    yield "balanced_seeding", (segloss.balanced_seeding, plain_seeding, (logits, seeds))
    yield "boundary_constraint", (segloss.boundary_constraint, plain_boundary, (logits, refined))
    yield "importance_sampling", (segloss.importance_sampling, plain_sampling, (logits, tags))
    yield "grid_potts", (partial(segloss.grid_potts, sigma_rgb=0.15), plain_grid, (logits, image))
    yield "rib_margin", (segloss.rib_margin, plain_margin, (logits[:, :, 0, 0].contiguous(), tags))


@contextmanager
def unchecked() -> Iterator[None]:
    """Without checks of values: what a compiled training, or an accelerator, has."""
    kept = checks.require
    users = [module for module in _LIBRARY if getattr(module, "require", None) is kept]
    for module in users:
        module.require = lambda *_: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.require = kept  # type: ignore[attr-defined]


def measure(pair: Pair, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    ours, plain, (first, *rest) = pair
    first = first.clone().requires_grad_()

    methods = {"plain": plain, "ours": ours, "unchecked": ours}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    order = random.Random(0)
    for turn in range(-2, rounds):  # the first two warm up
        for name in order.sample(list(methods), len(methods)):
            with unchecked() if name == "unchecked" else nullcontext():
                begin = clock()
                torch.autograd.grad(methods[name](first, *rest), first)
                elapsed = clock() - begin
            if turn >= 0:
                seconds[name].append(elapsed)

    def ratio(name: str) -> float:
        return median(own / other for own, other in zip(seconds[name], seconds["plain"], strict=True))

    return {"milliseconds": 1e3 * median(seconds["plain"]), "ratio": ratio("ours"), "unchecked": ratio("unchecked")}


def markdown(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """Rows are losses, columns sizes; ratios to the plain code, checks of values included and left out."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lines = [
        f"# Losses beside plain code\n\n{where['date']}, {where['processor']}, {where['threads']} thread(s), load "
        f"{where['load']}, torch {where['torch']}. Forward and backward, share of the plain code's time; in brackets "
        f"without a look at the values. {CLASSES} classes; sizes are images x pixels of a side.\n",
        "| loss | " + " | ".join(shapes) + " |",
        "|---" * (len(shapes) + 1) + "|",
    ]
    for loss in dict.fromkeys(row["loss"] for row in rows):
        own = {row["shape"]: f"{row['ratio']:.2f} ({row['unchecked']:.2f})" for row in rows if row["loss"] == loss}
        lines.append(f"| `{loss}` | " + " | ".join(own.get(shape, "") for shape in shapes) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser(prog="python -m benchmarks.losses", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--rounds", type=count, default=50, help="runs of each code at a size")
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--loss", nargs="+", choices=[name for name, _ in pairs(1, 4)], help="only these")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    options = parser.parse_args()
    parser.folder(options.out)
    torch.set_num_threads(options.threads)
    rows = []
    for batch, side in QUICK if options.quick else SIZES:
        for loss, pair in pairs(batch, side):
            if options.loss and loss not in options.loss:
                continue
            few = options.quick or pair[2][0].numel() > MANY
            rounds = min(options.rounds, 7) if few else options.rounds
            clock = time.process_time if options.threads == 1 else time.perf_counter
            rows.append({"loss": loss, "shape": f"{batch} x {side}"} | measure(pair, rounds, clock))
            print(f"{batch:>3} x {side:<4}{loss:<24}{rows[-1]['ratio']:>6.2f}{rows[-1]['unchecked']:>6.2f}", flush=True)
    where = environment()
    store(options.out / "losses", {"environment": where, "results": rows}, markdown(rows, where))


if __name__ == "__main__":
    main()
