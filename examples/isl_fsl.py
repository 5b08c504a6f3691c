"""ISL and FSL as add-ons to a classifier's training step: what they do to its class activation maps (CAMs).

On scenes, with a small classifier that starts from nothing; on photographs, with the last layers of a pretrained one.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from data.sample import VOID, Batch
from data.source import Options
from data.stream import Prepared, loader
from engine import training
from engine.command import check_least, run
from engine.processes import pick_device, rank, say
from matplotlib.figure import Figure
from parts import deeplab, pretrained, tag_classifier
from parts.report import draw_rows
from parts.tag_classifier import TagClassifier, fit_head, present
from torch import Tensor, nn

import segloss
from segattr.metrics import contour_f, region_similarity
from segattr.networks import evaluating


@dataclass(frozen=True)
class Config(Options):
    """Goes on training one classifier with six losses; prints the quality of their CAMs, draws them.

    CAMs of the small network are half as large as the images; those of the first 200 images of the split are assessed.
    """

    PHOTOGRAPHS: ClassVar[dict[str, Any]] = {
        "network": "efficientnet_lite0",
        "weights": "imagenet",
        "size": 320,
        "steps": 1000,
        "pretrain_steps": 300,
    }
    QUICK: ClassVar[dict[str, Any]] = {"size": 224, "steps": 57, "save_every": 20}

    network: Literal["small", pretrained.Name] = "small"
    """The classifier: a small one, or, for photographs, a pretrained one."""
    weights: deeplab.Weights = "none"
    """Where a pretrained one starts: imagenet, none, or the path of a state dict."""
    steps: int = 200
    """Optimizer steps with each loss."""
    pretrain_steps: int = 300
    """Optimizer steps of the classifier from which all start, with average pooling (GAP); a pretrained one trains only
    its last layer in them."""
    out: Path = Path("runs/isl_fsl")
    """Folder of the picture and of the checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        deeplab.check(self.network, self.weights, self.batch_size)
        check_least(self, steps=1, pretrain_steps=0)


EVALUATED, SHOWN = 200, 6

Loss = Callable[[Tensor, Batch], Tensor]
average, maximum = segloss.ImportanceClassification(weight=0), segloss.ImportanceClassification(weight=0, pooling="max")
isl, average_and_isl = segloss.ImportanceClassification(weight=1), segloss.ImportanceClassification()
fsl = segloss.FeatureSimilarity()


# From the score maps of a batch, and the batch, to a scalar: the one line of a training step that changes.
LOSSES: dict[str, Loss] = {
    "GAP": lambda scores, batch: average(scores, present(batch)),
    "GMP": lambda scores, batch: maximum(scores, present(batch)),
    "ISL": lambda scores, batch: isl(scores, present(batch)),
    "GAP + ISL": lambda scores, batch: average_and_isl(scores, present(batch)),
    "GAP + FSL": lambda scores, batch: average(scores, present(batch)) + fsl(scores, batch["image"], present(batch)),
    "GAP + ISL + FSL": lambda scores, batch: (
        average_and_isl(scores, present(batch)) + fsl(scores, batch["image"], present(batch))
    ),
}


class Outcome(NamedTuple):
    threshold: float
    region: Tensor  # J of each class
    contour: Tensor  # F of each class
    masks: Tensor  # int64 [n, H, W], of the first images
    seconds: float


@torch.no_grad()
def assess(model: nn.Module, test: Batch, seconds: float) -> Outcome:
    """J and F over the data set of the CAMs of the classes present, at the background threshold of the best mean J."""
    with evaluating(model):
        scores = torch.cat([model(part)[1] for part in test["image"].split(50)])
    maps = segloss.max_normalize(F.interpolate(scores, size=test["labels"].shape[1:], mode="bilinear"))
    maps = maps * present(test)[:, :, None, None]
    classes = torch.arange(test["tags"].shape[1], device=maps.device).view(-1, 1, 1)
    truth, labelled = test["labels"][:, None] == classes, test["labels"] != VOID

    def masks(threshold: float) -> Tensor:
        return torch.cat([torch.full_like(maps[:, :1], threshold), maps], 1).argmax(1)

    def region(threshold: float) -> Tensor:
        return region_similarity(masks(threshold)[:, None] == classes, truth, valid=labelled, pooled=True)

    best = max((percent / 100 for percent in range(10, 95, 5)), key=lambda threshold: region(threshold).nanmean())
    contour = contour_f(masks(best)[:, None] == classes, truth, valid=labelled, pooled=True)
    return Outcome(best, region(best), contour, masks(best)[:SHOWN].cpu(), seconds)


def table(outcomes: dict[str, Outcome]) -> str:
    lines = [f"{'loss':<17}{'J':>8}{'F':>8}{'J&F':>8}{'threshold':>11}{'seconds':>9}"]
    for name, outcome in outcomes.items():
        j, f = outcome.region.nanmean().item(), outcome.contour[1:].nanmean().item()
        quality = "".join(f"{value:>8.3f}" for value in (j, f, (j + f) / 2))
        lines.append(f"{name:<17}{quality}{outcome.threshold:>11.2f}{outcome.seconds:>9.0f}")
    return "\n".join(lines)


def picture(test: Batch, outcomes: dict[str, Outcome], path: Path) -> None:
    rows = {"image": test["image"][:SHOWN].movedim(1, -1), "truth": test["labels"][:SHOWN]}
    valid = test["valid"][:SHOWN].cpu()
    rows |= {name.replace(" + ", "\n+ "): outcome.masks.where(valid, VOID) for name, outcome in outcomes.items()}
    figure = Figure(figsize=(9, 1.5 * len(rows)), layout="constrained")
    draw_rows(figure, rows)
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    folder = training.start(config, "pooled")
    device, images = pick_device(config.device), config.images("evaluate")
    keys = [(0, i) for i in range(min(EVALUATED, len(images)))]
    test = next(iter(loader(Prepared(images, config.fit()), [keys], config.workers)))
    test = {name: values.to(device) for name, values in test.items()}
    train = config.images("train")
    batches = config.stream(train, config.fit(mirror=True))

    def fit(model: TagClassifier, name: str, loss: Loss, steps: int, *, first: bool = False) -> Outcome:
        progress = training.train(
            model,
            lambda output, batch: loss(output[1], batch),
            batches,
            model.optimizer(first=first),
            steps=steps,
            name=name,
            options=config,
        )
        return assess(model, test, progress.seconds)

    start = tag_classifier.build(config.network, len(images.classes) - 1, config.weights).to(device)
    if start.settings.head_first:
        seconds = fit_head(start, train, folder / "pooled", config.pretrain_steps, config)
        outcomes = {"start": assess(start, test, seconds)}
    else:
        outcomes = {"start": fit(start, "pretraining", LOSSES["GAP"], config.pretrain_steps, first=True)}
    for name, loss in LOSSES.items():
        outcomes[name] = fit(copy.deepcopy(start), name, loss, config.steps)
    say(table(outcomes))
    if rank() == 0:
        picture(test, outcomes, folder / "isl_fsl.png")
    say(f"picture: {folder / 'isl_fsl.png'}")


if __name__ == "__main__":
    run(main, Config)
