"""Time and error of bilateral filters, this library's and others', against brute force, on one core.

Writes frontier.json, a table frontier.md and a picture frontier.png. Every photograph is filtered at one size and
number of channels; the first photograph also at the other sizes and numbers of channels.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from tqdm import tqdm

from benchmarks.__main__ import HERE, environment, store
from benchmarks.baselines import dense_filter
from benchmarks.memory import peak_bytes
from benchmarks.peers import PEERS, UNUSABLE, Filter
from benchmarks.photos import HELD_OUT, SIGMA_RGB, TUNED, photo, probabilities, sigma_xy, truth
from segloss import bilateral_filter
from segloss.bilateral import ToleranceError, guide_features

Row = dict[str, Any]

BRUTE_FORCE = "brute force"
EXACT = (BRUTE_FORCE, "exact")
LATTICE = "lattice"  # has no tolerance
PIXELS = 256  # at which the error is taken
SHARE = 2048  # rows that methods over all pairs are timed on: rows are independent, all of them cost in proportion
PATIENCE = 3.0  # seconds after which a method has no further round on a problem
LONGEST = 60.0  # seconds; a call that is expected to take longer is not made,
LONGEST_AGAIN = 10.0  # nor one longer than this on photographs after the first
LONGEST_FOR_MEMORY = 20.0
DEFAULT = {"photos": TUNED + HELD_OUT, "sides": [128, 256, 512], "classes": [1, 21, 81], "rounds": 3}
QUICK = {"photos": ["astronaut", "china", "noise"], "sides": [48, 64], "classes": [3], "rounds": 1}


@dataclass(frozen=True)
class Problem:
    photo: str
    side: int
    classes: int

    def __str__(self) -> str:
        return f"{self.photo} {self.side}x{self.side}, K={self.classes}"


class Wrong(Exception):
    """An exact method is not: nothing that was measured can be believed."""


def brute_force(
    values: Tensor, image: Tensor, sigma_rgb: float, sigma_xy: float, pixels: Tensor | None = None
) -> Tensor:
    """The filter of an image, ``[K, H, W]``, or only some rows of it, ``[len(pixels), K]``."""
    features = guide_features(image[None], sigma_rgb, sigma_xy)[0].t().contiguous()
    columns = values.flatten(1).t().contiguous()
    if pixels is None:
        return dense_filter(columns, features).t().reshape(values.shape)
    return dense_filter(columns, features, queries=features[pixels])


def ours(values: Tensor, image: Tensor, sigma_rgb: float, sigma_xy: float, **options: Any) -> Tensor:
    return bilateral_filter(values[None], image[None], sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, **options)[0]


METHODS: dict[str, Filter] = {BRUTE_FORCE: brute_force, "exact": partial(ours, method="exact")}
METHODS[LATTICE] = partial(ours, method="lattice")
METHODS |= {
    f"blocksparse {tolerance}": partial(ours, method="blocksparse", tolerance=float(tolerance))
    for tolerance in ("1e-1", "1e-2", "1e-3")
}
METHODS |= {
    f"{name} {tolerance}": partial(ours, method="lowrank", tolerance=float(tolerance), precision=precision)
    for name, precision in (("lowrank", "auto"), ("lowrank float32", "float32"))
    for tolerance in ("1e-1", "4e-2", "2e-2", "1e-2", "5e-3")
}


def family(method: str) -> str:
    """The method without its tolerance."""
    return method if method in (*PEERS, *EXACT, LATTICE) else method.rsplit(" ", 1)[0]


def allowed(method: str) -> float | None:
    """The largest error that a method may have: its tolerance, or rounding errors; None for peers and the lattice."""
    if method in EXACT:
        return 1e-4
    return None if method in (*PEERS, LATTICE) else float(method.rsplit(" ", 1)[1])


def by_rows(method: str) -> bool:
    return method == BRUTE_FORCE or (method in PEERS and PEERS[method].by_rows)


def normalised(method: str) -> bool:
    return method in PEERS and PEERS[method].normalised


def usual(choices: list[int], preferred: int) -> int:
    """What stays when something else is varied."""
    return preferred if preferred in choices else sorted(choices)[len(choices) // 2]


def problems(photos: list[str], sides: list[int], classes: list[int]) -> list[Problem]:
    """The first photograph at all sizes, the others at the usual one, the first with all numbers of channels."""
    side, channels = usual(sides, 256), usual(classes, 21)
    growing = [Problem(photos[0], s, channels) for s in sorted(sides)]
    others = [Problem(name, side, channels) for name in photos[1:]]
    return [*growing, *others, *(Problem(photos[0], side, k) for k in sorted(classes) if k != channels)]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and, by the environment, for the OpenMP that peers bring along and for child processes."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("OMP_NUM_THREADS")
        if variable is not None:
            os.environ["OMP_NUM_THREADS"] = variable


def arguments(problem: Problem) -> tuple[Tensor, Tensor, float, float]:
    image, values = photo(problem.photo, problem.side)[0], probabilities(problem.classes, problem.side)[0]
    return values, image, SIGMA_RGB, sigma_xy(problem.side)


def warm_up(run: Filter, classes: int) -> None:
    """A small image first: it loads and compiles all code, for this number of channels."""
    with redirect_stdout(StringIO()), suppress(ToleranceError):
        run(*arguments(Problem(TUNED[0], 32, classes)))


def load(method: str, classes: int) -> Filter:
    with redirect_stdout(StringIO()):
        run = METHODS[method] if method in METHODS else PEERS[method].load()
    warm_up(run, classes)
    return run


def calling(method: str, problem: Problem) -> Callable[[], Tensor]:
    """A method on all of a problem, as a call; for the process that measures memory."""
    return partial(load(method, problem.classes), *arguments(problem))


def reason_not_to_run(method: str, problem: Problem, known: list[Row]) -> str:
    """Why a call would take too long, judged by the last one on a smaller or equal image; empty if it would not."""
    before = [row for row in known if row["method"] == method and row["seconds"] and row["side"] <= problem.side]
    if not before:
        return ""
    last = before[-1]
    seconds = last["seconds"] * (problem.side / last["side"]) ** 4 * max(1, problem.classes / last["classes"])
    if by_rows(method):
        seconds *= min(1, SHARE / problem.side**2)
    limit = LONGEST if problem.photo == known[0]["photo"] else LONGEST_AGAIN
    return f"would take about {seconds:.0f} s" if seconds > limit else ""


def measure(
    problem: Problem, filters: dict[str, Filter], rounds: int, known: list[Row], tick: Callable[[str], None]
) -> list[Row]:
    """One row for each method; rounds are interleaved."""
    inputs = arguments(problem)
    pixels = torch.randperm(problem.side**2, generator=torch.Generator().manual_seed(1))[:SHARE]
    exact, sums = truth(inputs[1][None], inputs[0][None], pixels[:PIXELS])
    times: dict[str, list[float]] = {method: [] for method in filters}
    rows = {method: new_row(method, problem, reason_not_to_run(method, problem, known)) for method in filters}
    for turn in range(rounds):
        for method, run in filters.items():
            if turn == 0:
                tick(f"{problem}: {method}")
            row, share = rows[method], len(pixels) / problem.side**2 if by_rows(method) else 1
            if row["status"] != "measured" or share * sum(times[method]) > PATIENCE:
                continue
            start = time.perf_counter()
            try:
                output = run(*inputs, pixels) if by_rows(method) else run(*inputs)
            except ToleranceError as error:
                row.update(status="refused", note=str(error))
                continue
            times[method].append((time.perf_counter() - start) / share)
            found = output[:PIXELS] if by_rows(method) else output.flatten(1).t()[pixels[:PIXELS]]
            expected = exact / sums[:, None] if normalised(method) else exact
            row["error"], row["error_scaled"] = errors(found.double(), expected)
    for method, row in rows.items():
        if row["status"] == "measured":
            finish(row, times[method], median(times[BRUTE_FORCE]))
    return list(rows.values())


def new_row(method: str, problem: Problem, reason: str) -> Row:
    numbers = dict.fromkeys(["seconds", "spread", "rounds", "time_ratio", "error", "error_scaled", "megabytes"])
    state = {"status": "not run" if reason else "measured", "note": reason, "normalised": normalised(method)}
    tuned = problem.photo in TUNED
    return {**asdict(problem), "tuned": tuned, "method": method, **state, "within": None, **numbers}


def finish(row: Row, times: list[float], brute_force_seconds: float) -> None:
    """Fills in the times, and whether the error is within the tolerance."""
    seconds, limit = median(times), allowed(row["method"])
    row.update(seconds=seconds, spread=(max(times) - min(times)) / seconds, rounds=len(times))
    row["time_ratio"] = seconds / brute_force_seconds
    row["within"] = None if limit is None else bool(row["error"] <= limit)
    if row["within"] is False and row["method"] in EXACT:
        raise Wrong(f"{row['method']}: expected an error of at most {limit:.0e}, got {row['error']:.1e}")


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative error in the Euclidean norm, as it is and after the best constant factor."""
    factor = (found * exact).sum() / found.square().sum()
    plain, scaled = (found - exact).norm(), (factor * found - exact).norm()
    return (plain / exact.norm()).item(), (scaled / exact.norm()).item()


def growth(rows: list[Row]) -> dict[str, float]:
    """Exponent of the time as a power of the number of pixels, for methods measured at two sizes or more."""
    exponents = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        first = next(row for row in rows if row["method"] == method)
        same = [r for r in rows if all(r[key] == first[key] for key in ("method", "photo", "classes")) and r["seconds"]]
        if len(same) > 1:
            pixels, seconds = np.log([r["side"] ** 2 for r in same]), np.log([r["seconds"] for r in same])
            exponents[method] = float(np.polyfit(pixels, seconds, 1)[0])
    return exponents


def ready(classes: list[int]) -> tuple[dict[str, Filter], dict[str, str], dict[str, float]]:
    """Filters that work, why the others do not, and the seconds to load each and to call it for the first time."""
    filters: dict[str, Filter] = {}
    missing: dict[str, str] = {}
    first: dict[str, float] = {}
    photo(TUNED[0], 32)  # loaded once, in nobody's time
    for method in tqdm([*METHODS, *PEERS], desc="loading", unit="method"):
        start = time.perf_counter()
        try:
            filters[method] = load(method, classes[0])
        except Exception as error:  # not installed, no compiler, ...
            if method in METHODS:
                raise
            missing[method] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        first[method] = time.perf_counter() - start
        for count in classes[1:]:
            warm_up(filters[method], count)
    return filters, missing, first


def run(photos: list[str], sides: list[int], classes: list[int], rounds: int, with_memory: bool) -> dict[str, Any]:
    """Everything that is written, as one dictionary."""
    todo = problems(photos, sides, classes)
    rows: list[Row] = []
    filters, missing, first = ready(classes)
    with tqdm(total=len(todo) * len(filters), unit="method") as bar:

        def tick(what: str) -> None:
            bar.set_description(what)
            bar.update()

        for problem in todo:
            rows += measure(problem, filters, rounds, rows, tick)
    side, channels = usual(sides, 256), usual(classes, 21)
    if with_memory:
        measure_memory(rows, Problem(photos[0], side, channels))
    peers = {
        name: {"package": peer.package, "version": version(peer.package), "note": peer.note}
        for name, peer in PEERS.items()
        if name in filters
    }
    return {
        "environment": environment(),
        "settings": {"rounds": rounds, "share": SHARE, "shared_side": side, "shared_classes": channels},
        "results": rows,
        "growth": growth(rows),
        "peers": peers,
        "skipped": missing | UNUSABLE,
        "first_call_seconds": first,
    }


def measure_memory(rows: list[Row], problem: Problem) -> None:
    here = [row for row in rows if asdict(problem).items() <= row.items() and row["seconds"]]
    for row in tqdm(here, desc=f"memory, {problem}", unit="method"):
        if row["seconds"] < LONGEST_FOR_MEMORY:
            row["megabytes"] = peak_bytes(calling, row["method"], problem) / 2**20


def markdown(report: dict[str, Any]) -> str:
    where, settings, rows = report["environment"], report["settings"], report["results"]
    lines = [
        "# Bilateral filters: time and error",
        "",
        f"{where['date']}, {where['processor']} ({where['instructions']}), 1 thread, torch {where['torch']}. "
        "Written by `python -m benchmarks.frontier`.",
        "",
        "Time: median of the rounds, from the image to the filtered channels, as a share of that of brute force in "
        f"torch, which is timed, as KeOps is, on {settings['share']} rows and scaled to all. Spread: range over "
        f"median. Error: against float64 at {PIXELS} random pixels, relative in the Euclidean norm; also after the "
        "best constant factor, which a user would not know. A method marked * gives (W v) / (W 1) only, and its error "
        "is with respect to that. Memory: peak beyond the inputs. Sigmas: 15/255 and 50 pixels at 256 pixels a side, "
        "in proportion at other sizes.",
        *summary(rows, settings["shared_side"], settings["shared_classes"]),
        *problem_tables(rows),
        *growth_table(report["growth"], report["first_call_seconds"]),
        "",
        "## Peers",
        "",
    ]
    lines += [f"- {name} ({p['package']} {p['version']}): {p['note']}." for name, p in report["peers"].items()]
    lines += [f"- {name}, not compared: {reason}." for name, reason in report["skipped"].items()]
    return "\n".join(lines) + "\n"


def summary(rows: list[Row], side: int, classes: int) -> list[str]:
    """All photographs at the size and number of channels that they share."""
    lines = [
        "",
        f"## All photographs, {side}x{side}, K={classes}",
        "",
        f"Tuned: {', '.join(TUNED)}, which the library's choices were made on. Held out: the others, noise too. "
        "Above: photographs on which the error is larger than the tolerance.",
        "",
        "| method | of brute force, median | largest | largest error, tuned | held out | above | refused | not run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shared = [row for row in rows if (row["side"], row["classes"]) == (side, classes)]
    for method in dict.fromkeys(row["method"] for row in shared):
        mine = [row for row in shared if row["method"] == method]
        measured = [row for row in mine if row["status"] == "measured"]
        ratios = [row["time_ratio"] for row in measured]
        times = f"{median(ratios):.2g} | {max(ratios):.2g}" if ratios else "- | -"
        tuned, held_out = (
            max((f"{row['error']:.1e}" for row in measured if row["tuned"] == kind), key=float, default="-")
            for kind in (True, False)
        )
        above = sum(row["within"] is False for row in mine)
        refused, absent = (sum(row["status"] == status for row in mine) for status in ("refused", "not run"))
        lines.append(f"| {label(mine[0])} | {times} | {tuned} | {held_out} | {above} | {refused} | {absent} |")
    return lines


def problem_tables(rows: list[Row]) -> list[str]:
    lines = []
    for problem in dict.fromkeys(Problem(row["photo"], row["side"], row["classes"]) for row in rows):
        header = "| method | time | spread | of brute force | error | with the best constant | memory |"
        lines += ["", f"## {problem}", "", header, "|---|---|---|---|---|---|---|"]
        for row in (row for row in rows if asdict(problem).items() <= row.items()):
            if row["status"] == "measured":
                above = " above its tolerance" if row["within"] is False else ""
                time = f"{1e3 * row['seconds']:.3g} ms | {100 * row['spread']:.0f}% | {row['time_ratio']:.2g}"
                memory = "-" if row["megabytes"] is None else f"{row['megabytes']:.0f} MB"
                cells = f"{time} | {row['error']:.1e}{above} | {row['error_scaled']:.1e} | {memory}"
            else:
                cells = f"{row['status']}: {row['note']} | | | | |"
            lines.append(f"| {label(row)} | {cells} |")
    return lines


def growth_table(exponents: dict[str, float], first_call: dict[str, float]) -> list[str]:
    lines = [
        "",
        "## Growth and first call",
        "",
        "Time as a power of the number of pixels, on the first photograph; seconds to load and to call for the first "
        "time, in which some compile (once, unless the compiled code is kept from before).",
        "",
        "| method | exponent | first call |",
        "|---|---|---|",
    ]
    for method, seconds in first_call.items():
        exponent = f"{exponents[method]:.2f}" if method in exponents else "-"
        lines.append(f"| {method} | {exponent} | {seconds:.2g} s |")
    return lines


def label(row: Row) -> str:
    return row["method"] + ("*" if row["normalised"] else "")


def picture(rows: list[Row], side: int, path: Path) -> None:
    """One panel for each photograph and number of channels at the shared size; one line for each family of methods."""
    at = list(dict.fromkeys((row["photo"], row["classes"]) for row in rows if row["side"] == side))
    families = list(dict.fromkeys(family(row["method"]) for row in rows))
    across = min(4, len(at))
    down = -(-len(at) // across)
    figure = Figure(figsize=(3.4 * across, 2.9 * down + 1.2), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (name, classes) in zip(axes, at, strict=False):
        here = [r for r in rows if (r["photo"], r["side"], r["classes"]) == (name, side, classes)]
        for index, kind in enumerate(families):
            points = [r for r in here if family(r["method"]) == kind and r["status"] == "measured"]
            panel.loglog(
                [r["time_ratio"] for r in points],
                [r["error"] for r in points],
                color=f"C{index}",
                marker=Line2D.filled_markers[index],
                markerfacecolor="none" if normalised(kind) else None,
                linewidth=1,
                label=kind + (" (normalised)" if normalised(kind) else ""),
            )
        refused = sum(row["status"] == "refused" for row in here)
        title = f"{name} ({'tuned' if here[0]['tuned'] else 'held out'}), K={classes}"
        panel.set_title(title + (f", {refused} refused" if refused else ""), fontsize=9)
        panel.grid(alpha=0.3)
        panel.tick_params(labelbottom=True)
    for panel in axes[len(at) :]:
        panel.remove()
    figure.supxlabel("time / time of brute force, one core; a line joins the tolerances of a method")
    figure.supylabel(f"relative error, {side}x{side} pixels")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), fontsize=9)
    figure.savefig(path, dpi=110)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}\n")

    def folder(self, path: Path, option: str = "--out") -> Path:
        """Of results: made before anything is measured."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            self.error(f"{option}: expected a folder that can be written, got {path} ({error.strerror})")
        return path


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)


def main() -> int:
    parser = Parser(prog="python -m benchmarks.frontier", description=__doc__)
    parser.add_argument("--photos", nargs="+", choices=TUNED + HELD_OUT, metavar="NAME", help="default: all of them")
    parser.add_argument("--sides", nargs="+", type=count, metavar="PIXELS", help="default: 128 256 512")
    parser.add_argument("--classes", nargs="+", type=count, metavar="K", help="numbers of channels; default: 1 21 81")
    parser.add_argument("--rounds", type=count, help="calls that a median is taken of, at most; default: 3")
    parser.add_argument("--quick", action="store_true", help="small images, one round, no memory: to see that it works")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the three files")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in DEFAULT if getattr(options, name) is not None}
    parser.folder(options.out)
    with one_thread():
        try:
            report = run(**{**(QUICK if options.quick else DEFAULT), **given}, with_memory=not options.quick)
        except Wrong as error:
            parser.exit(1, f"{error}\n")
    table = store(options.out / "frontier", report, markdown(report))
    picture(report["results"], report["settings"]["shared_side"], options.out / "frontier.png")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
