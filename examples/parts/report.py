"""What a comparison of trainings prints and draws."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from data.write_voc import palette
from matplotlib.figure import Figure, FigureBase
from torch import Tensor


class Outcome(NamedTuple):
    iou: Tensor  # [K]
    seconds: float
    curve: list[tuple[int, float]]  # step, mIoU
    predictions: Tensor  # int64 [n, H, W], of the first n images


def table(classes: Sequence[str], runs: Sequence[Mapping[str, Outcome]]) -> str:
    """IoU per class, mean over the classes that occur, its share of the first row's, seconds.

    Means over runs; standard deviations below.
    """
    reference, *_ = runs[0]
    width = max(11, *(len(name) + 1 for name in classes))
    lines = [f"{'IoU':<13}" + "".join(f"{name:>{width}}" for name in (*classes, "mean", "of full", "seconds"))]
    for name in runs[0]:
        iou = torch.stack([run[name].iou for run in runs])
        share = [float(run[name].iou.nanmean() / run[reference].iou.nanmean()) for run in runs]
        seconds = statistics.mean(run[name].seconds for run in runs)
        cells = [
            *(f"{value:.3f}" for value in (*iou.mean(0), iou.nanmean())),
            f"{statistics.mean(share):.1%}",
            f"{seconds:.0f}",
        ]
        lines.append(f"{name:<13}" + "".join(f"{cell:>{width}}" for cell in cells))
        if len(runs) > 1:
            spread = [
                *(f"±{value:.3f}" for value in (*iou.std(0), iou.nanmean(1).std())),
                f"±{statistics.stdev(share):.1%}",
            ]
            lines.append(" " * 13 + "".join(f"{cell:>{width}}" for cell in spread) + f"   least share {min(share):.1%}")
    return "\n".join(lines)


def draw_rows(figure: FigureBase, rows: Mapping[str, Tensor]) -> None:
    """Draws images ``[n, H, W, 3]`` and label maps ``[n, H, W]``, in VOC's colours, n in a row for each name."""
    columns, colours = len(next(iter(rows.values()))), palette()
    for axes, (name, maps) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for axis, values in zip(axes, maps.cpu().numpy(), strict=True):
            axis.imshow(values if values.ndim == 3 else colours[values], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name)


def picture(image: Tensor, labels: Tensor, outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Draws images, truth and predictions above, training curves below.

    Args:
        image: ``[N, 3, H, W]``; as many are shown as there are predictions.
        labels: ``[N, H, W]``.
        outcomes: by the name of their row.
        path: of the PNG file.
    """
    shown = len(next(iter(outcomes.values())).predictions)
    figure = Figure(figsize=(9, 11), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 2), squeeze=False)[:, 0]
    rows = {"image": image[:shown].movedim(1, -1), "truth": labels[:shown]}
    rows |= {name: outcome.predictions for name, outcome in outcomes.items()}
    draw_rows(above, rows)
    axis = below.subplots()
    for name, outcome in outcomes.items():
        axis.plot(*zip(*outcome.curve, strict=True), marker="o", label=name)
    axis.set(xlabel="step", ylabel="mIoU", ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=100)
