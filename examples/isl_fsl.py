"""ISL and FSL as add-ons to a classifier's training step: what they do to its class activation maps (CAMs)."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import engine
import torch
import torch.nn.functional as F
from data.scenes import CLASSES, Scenes, Split, stack
from engine import Batch
from matplotlib.figure import Figure
from network import block
from torch import Tensor, nn

import segloss
from segattr.metrics import contour_f, region_similarity


@dataclass(frozen=True)
class Config:
    """Goes on training one small classifier with six losses; prints the quality of their CAMs, draws them."""

    steps: int = 200
    """Optimizer steps with each loss."""
    pretrain_steps: int = 300
    """Optimizer steps of the classifier from which all start, with average pooling (GAP)."""
    scenes: int = 1500
    """Number of training scenes."""
    size: int = 48
    """Height and width of the scenes in pixels; CAMs are half as large."""
    split: Literal["val", "final"] = "val"
    """Scenes that are evaluated: val, on which the settings were chosen, or final, kept for figures to report."""
    seed: int = 0
    """Seed of the training scenes, of the weights and of the batches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto is the GPU when there is one."""
    out: Path = Path("runs/isl_fsl")
    """Folder of the picture."""

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "pretrain_steps": 0, "scenes": 1, "size": 32, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}")


BATCH_SIZE, LEARNING_RATES, EVALUATED, SHOWN = 16, (2e-3, 1e-3), 200, 6

fsl = segloss.FeatureSimilarity()


def with_pooling(scores: Tensor, batch: Batch) -> Tensor:
    return segloss.importance_classification(scores, batch["tags"], weight=0)


def with_max_pooling(scores: Tensor, batch: Batch) -> Tensor:
    return segloss.importance_classification(scores, batch["tags"], weight=0, pooling="max")


def with_sampling_alone(scores: Tensor, batch: Batch) -> Tensor:
    return segloss.importance_classification(scores, batch["tags"], weight=1)


def with_fsl(scores: Tensor, batch: Batch) -> Tensor:
    return with_pooling(scores, batch) + fsl(scores, batch["image"], batch["tags"])


def with_isl(scores: Tensor, batch: Batch) -> Tensor:
    return segloss.importance_classification(scores, batch["tags"])


def with_isl_and_fsl(scores: Tensor, batch: Batch) -> Tensor:
    return with_isl(scores, batch) + fsl(scores, batch["image"], batch["tags"])


LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "GAP": with_pooling,
    "GMP": with_max_pooling,
    "ISL": with_sampling_alone,
    "GAP + ISL": with_isl,
    "GAP + FSL": with_fsl,
    "GAP + ISL + FSL": with_isl_and_fsl,
}


class Classifier(nn.Module):
    """Score maps ``[B, C, H / 2, W / 2]`` of images ``[B, 3, H, W]``: a linear classifier before global pooling."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, width, stride=2), block(width, 2 * width), block(2 * width, 2 * width))
        self.head = nn.Conv2d(2 * width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features((4 * image - 2).contiguous(memory_format=torch.channels_last)))
        return scores


class Outcome(NamedTuple):
    threshold: float
    region: Tensor  # J of each class
    contour: Tensor  # F of each class
    masks: Tensor  # int64 [n, H, W], of the first images
    seconds: float


def load(split: Split, count: int, seed: int, config: Config) -> Batch:
    scenes = stack(Scenes(split, count, size=config.size, seed=seed))
    data = {"image": scenes.image, "labels": scenes.labels, "tags": scenes.tags[:, 1:]}
    return {name: values.to(engine.pick_device(config.device)) for name, values in data.items()}


@torch.no_grad()
def assess(model: nn.Module, test: Batch, seconds: float) -> Outcome:
    """J and F over the data set of the CAMs of the classes present, at the background threshold of the best mean J."""
    model.eval()
    scores = torch.cat([model(part) for part in test["image"].split(50)])
    maps = segloss.max_normalize(F.interpolate(scores, size=test["labels"].shape[1:], mode="bilinear"))
    maps = maps * test["tags"][:, :, None, None]
    classes = torch.arange(len(CLASSES), device=maps.device).view(-1, 1, 1)
    truth = test["labels"][:, None] == classes
    outcomes = []
    for percent in range(10, 95, 5):
        masks = torch.cat([torch.full_like(maps[:, :1], percent / 100), maps], 1).argmax(1)
        found = masks[:, None] == classes
        region = region_similarity(found, truth, pooled=True)
        outcomes.append((region.mean(), percent / 100, region, found, masks))
    _, threshold, region, found, masks = max(outcomes, key=lambda outcome: outcome[0])
    return Outcome(threshold, region, contour_f(found, truth, pooled=True), masks[:SHOWN].cpu(), seconds)


def table(outcomes: dict[str, Outcome]) -> str:
    lines = [f"{'loss':<17}{'J':>8}{'F':>8}{'J&F':>8}{'threshold':>11}{'seconds':>9}"]
    for name, outcome in outcomes.items():
        j, f = outcome.region.mean().item(), outcome.contour[1:].mean().item()
        quality = "".join(f"{value:>8.3f}" for value in (j, f, (j + f) / 2))
        lines.append(f"{name:<17}{quality}{outcome.threshold:>11.2f}{outcome.seconds:>9.0f}")
    return "\n".join(lines)


def picture(test: Batch, outcomes: dict[str, Outcome], path: Path) -> None:
    rows = {"image": test["image"][:SHOWN].movedim(1, -1), "truth": test["labels"][:SHOWN]}
    rows |= {name: outcome.masks for name, outcome in outcomes.items()}
    figure = Figure(figsize=(9, 1.5 * len(rows)), layout="constrained")
    for axes, (name, maps) in zip(figure.subplots(len(rows), SHOWN), rows.items(), strict=True):
        axes[0].set_ylabel(name.replace(" + ", "\n+ "))
        for axis, values in zip(axes, maps.cpu(), strict=True):
            axis.imshow(values, cmap="Set1_r", vmin=0, vmax=8, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    folder = engine.output_folder(config.out)
    engine.seed_everything(config.seed)
    train, test = load("train", config.scenes, config.seed, config), load(config.split, EVALUATED, 0, config)

    def fit(model: nn.Module, name: str, loss: Callable[[Tensor, Batch], Tensor], steps: int, lr: float) -> Outcome:
        began = time.perf_counter()
        batches = engine.draw_batches(train, BATCH_SIZE, torch.Generator().manual_seed(config.seed))
        engine.train(model, loss, batches, steps=steps, lr=lr, name=name)
        return assess(model, test, time.perf_counter() - began)

    start = Classifier(len(CLASSES) - 1).to(train["image"].device)
    outcomes = {"start": fit(start, "pretraining", with_pooling, config.pretrain_steps, LEARNING_RATES[0])}
    for name, loss in LOSSES.items():
        outcomes[name] = fit(copy.deepcopy(start), name, loss, config.steps, LEARNING_RATES[1])
    print(table(outcomes))
    picture(test, outcomes, folder / "isl_fsl.png")
    print(f"picture: {folder / 'isl_fsl.png'}")


if __name__ == "__main__":
    main(engine.parse(Config))
