"""The trainings behind the table and each plot of the paper, and what a table and a plot show of them."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

ERRORS = (0.0, 0.04, 0.08, 0.16, 0.32)  # mean relative errors of size targets
LENGTHS = (0.0, 0.25, 0.5, 1.0)  # of scribbles
ERROR, LENGTH = 0.08, 0.0  # where they are not swept


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        curve: name of the row of a table, or of the curve of a plot.
        terms: of the loss, see :mod:`parts.supervisions`.
        error: nominal mean relative error of the size targets; None for sizes that a person has typed.
        length: share of the scribbles that is there.
    """

    curve: str
    terms: tuple[str, ...]
    error: float | None = ERROR
    length: float = LENGTH

    @property
    def sized(self) -> bool:
        """Whether the error of the size targets matters."""
        return bool({"size", "reverse"} & {*self.terms})

    @property
    def seeded(self) -> bool:
        """Whether the length of the scribbles matters."""
        return "seeds" in self.terms

    @property
    def name(self) -> str:
        """Of the progress bar and the checkpoint."""
        error = f", error {self.error:.0%}" if self.sized and self.error is not None else ""
        return self.curve + error + (f", length {self.length:.0%}" if self.seeded else "")


FULL = Trial("full masks", ("masks",))

TABLE = (
    FULL,
    Trial("size", ("size", "crf")),
    Trial("size, no CRF", ("size",)),
    Trial("reverse KL", ("reverse", "crf")),
    Trial("size + seeds", ("size", "seeds", "crf")),
    Trial("seeds", ("seeds", "crf")),
    Trial("tags, log barrier", ("log barrier", "crf")),
    Trial("tags, flat barrier", ("flat barrier", "crf")),
    Trial("squared barrier", ("squared barrier", "crf")),
    Trial("average size", ("average", "crf")),
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Trainings, and how their scores are plotted; those with the same score all along have a line across.

    Attributes:
        axis: what varies.
        score: mIoU, or the mean Dice coefficient of the only foreground class over the images that have it.
        trials: the first one is what the others are compared with.
        lines: names of curves that are lines.
        on_training: whether the training images are evaluated, too.
        classes: number of foreground classes that are kept; None for all.
        empty: whether images without any of these classes are kept.
    """

    axis: Literal["error", "length"]
    trials: tuple[Trial, ...]
    lines: tuple[str, ...] = (FULL.curve,)
    score: Literal["mIoU", "DSC"] = "mIoU"
    on_training: bool = False
    classes: int | None = None
    empty: bool = False


SWEEPS = {
    "errors": Sweep(  # Fig. 4, left
        "error",
        (
            FULL,
            *(Trial("size, no CRF", ("size",), error=error) for error in ERRORS),
            *(Trial("size", ("size", "crf"), error=error) for error in ERRORS),
        ),
        on_training=True,
    ),
    "seeds": Sweep(  # Fig. 4, right
        "length",
        (
            FULL,
            *(Trial("seeds", ("seeds", "crf"), length=length) for length in LENGTHS),
            *(
                Trial(f"size {error:.0%} + seeds", ("size", "seeds", "crf"), error, length)
                for error in (0.0, 0.08, 0.16)
                for length in LENGTHS
            ),
        ),
    ),
    "classes": Sweep(  # Fig. 5, right
        "error", (FULL, *(Trial("size", ("size", "crf"), error=error) for error in ERRORS)), classes=3
    ),
    "barrier": Sweep(  # Fig. 6, all but the first with seeds and without CRF
        "error",
        (
            FULL,
            Trial("squared barrier", ("light squared barrier", "seeds")),
            Trial("average size", ("average", "seeds")),
            *(Trial("size", ("size", "seeds"), error=error) for error in ERRORS),
        ),
        lines=(FULL.curve, "squared barrier", "average size"),
        score="DSC",
        classes=1,
        empty=True,
    ),
}


class Result(NamedTuple):
    iou: Tensor  # [K]
    on_training: Tensor  # [K], of the training images; NaN where they are not evaluated
    dice: float  # of class 1, mean over the images that have it
    background: float  # share of the pixels that are predicted as background
    error: float  # measured mean relative error of the sizes of objects; NaN for trainings without sizes
    seconds: float  # of the training
    predictions: Tensor  # int64 [n, H, W], of the first n images

    def score(self, kind: Literal["mIoU", "DSC"]) -> float:
        return float(self.iou.nanmean()) if kind == "mIoU" else self.dice


FOUND = 0.1  # IoU from which on a class is found


def table(trials: Sequence[Trial], runs: Sequence[Sequence[Result]], kind: Literal["mIoU", "DSC"]) -> str:
    """A row for each training; means over runs, and standard deviations."""
    width = 12 if len(runs) == 1 else 16
    titles = ("object mRE", "seeds", kind, "of full", "training", "background", "found", "seconds")
    lines = [f"{'supervision':<26}" + "".join(f"{title:>{width}}" for title in titles)]
    full = [run[0].score(kind) for run in runs]
    for trial, *results in zip(trials, *runs, strict=True):
        scores = [result.score(kind) for result in results]
        cells = [
            cell([100 * result.error for result in results], "%", 1),
            f"{trial.length:g}" if trial.seeded else "-",
            cell(scores, "", 3),
            cell([100 * score / best for score, best in zip(scores, full, strict=True)], "%", 1),
            cell([float(result.on_training.nanmean()) for result in results], "", 3),
            cell([100 * result.background for result in results], "%", 1),
            cell([float((result.iou >= FOUND).sum()) for result in results], "", 0 if len(runs) == 1 else 1),
            f"{statistics.mean(result.seconds for result in results):.0f}",
        ]
        lines.append(f"{trial.curve:<26}" + "".join(f"{text:>{width}}" for text in cells))
    return "\n".join(lines)


def cell(values: Sequence[float], unit: str, digits: int) -> str:
    if any(math.isnan(value) for value in values):
        return "-"
    spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{unit}{spread}"


def plot(sweep: Sweep, trials: Sequence[Trial], runs: Sequence[Sequence[Result]], path: Path) -> None:
    """Draws the scores of a sweep: means over runs, bars for standard deviations, a star for sizes of a person."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, curve in enumerate(dict.fromkeys(trial.curve for trial in trials)):
        rows = [(trial, results) for trial, *results in zip(trials, *runs, strict=True) if trial.curve == curve]
        colour = f"C{number}"
        scores = [[result.score(sweep.score) for result in results] for _, results in rows]
        if curve in sweep.lines:
            axis.axhline(statistics.mean(scores[0]), color=colour, linestyle="--", label=curve)
            continue
        places = [_place(sweep, trial, results) for trial, results in rows]
        marker = "*" if rows[0][0].error is None else "o"
        error = statistics.mean(result.error for result in rows[0][1])
        nominal = sweep.axis == "length" and rows[0][0].sized
        label = f"{curve} (measured: {error:.1%})" if nominal else curve
        axis.errorbar(places, *_spread(scores), color=colour, marker=marker, capsize=3, label=label)
        if sweep.on_training:
            means, _ = _spread([[float(result.on_training.nanmean()) for result in results] for _, results in rows])
            axis.plot(places, means, color=colour, marker=".", linestyle=":", label=f"{curve}, on training images")
    axes = {
        "error": "measured mean relative error of the sizes of objects, %",
        "length": "length of the seeds, 1 for all",
    }
    axis.set(xlabel=axes[sweep.axis], ylabel=sweep.score)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def _place(sweep: Sweep, trial: Trial, results: Sequence[Result]) -> float:
    return trial.length if sweep.axis == "length" else 100 * statistics.mean(result.error for result in results)


def _spread(scores: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means, and standard deviations of more than one."""
    means = [statistics.mean(values) for values in scores]
    return means, [statistics.stdev(values) if len(values) > 1 else 0.0 for values in scores]
