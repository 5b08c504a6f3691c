"""From boxes to masks: a detector, where its heads look (BBAM), instance masks, a segmentation network.

Chapter 5 of the dissertation on scenes. There is no ``--data voc``: on photographs, this needs a detector that was
trained for hours on a GPU.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from data.augment import Fit
from data.sample import VOID, Batch, Images, Stacked
from data.scenes import CLASSES, Scene, Scenes, stack
from data.source import EVALUATED
from engine import training
from engine.command import check_least, each_run, run
from engine.processes import count, pick_device
from parts.box_pictures import draw_objects, draw_positions, high_positions
from parts.detector import train_detector
from parts.network import EncoderDecoder
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from tqdm import tqdm

from segattr.bbam import adaptive_stride, bbam, detector_from_torchvision, positive_proposals
from segattr.metrics import average_best_overlap, average_precision
from segattr.refine import grow_seeds, instance_masks, semantic_labels
from segloss import partial_cross_entropy


@dataclasses.dataclass(frozen=True)
class Config(training.Options):
    """Trains a detector on boxes, makes masks of its BBAMs, and trains segmentation networks on these.

    Prints the quality of the masks of training scenes and of the networks, draws objects and where the heads look.
    """

    detector_steps: int = 1200
    """Optimizer steps of the detector."""
    labelled: int = 30
    """Training scenes that get masks, the first ones."""
    bbam_steps: int = 100
    """Steps of the optimisation of BBAMs."""
    steps: int = 250
    """Optimizer steps of each segmentation network."""
    scenes: int = 1500
    """Number of training scenes, with boxes."""
    size: int = 64
    """Height and width of the scenes in pixels."""
    split: Literal["val", "final"] = "val"
    """Scenes that networks are evaluated on: val, or final, kept for figures to report."""
    batch_size: int = 8
    """Images of an optimizer step."""
    repeats: int = 1
    """Number of runs; their seeds count up from --seed, and the table shows mean and standard deviation."""
    out: Path = Path("runs/boxes")
    """Folder of the pictures and of the checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, detector_steps=1, labelled=1, bbam_steps=0, steps=1, scenes=1, size=48, repeats=1)
        if count() > 1:
            raise ValueError(f"torchrun: expected one process, got {count()}: a detector's loss is not shared")
        if self.labelled > self.scenes:
            raise ValueError(f"--labelled: expected at most {self.scenes}, the number of --scenes, got {self.labelled}")


HEADS = {"box head": ("box",), "class head": ("cls",), "both heads": ("box", "cls")}
FILLED, CRF = "boxes filled", " + CRF"
NETWORKS = (FILLED, FILLED + CRF, "both heads" + CRF)  # what networks are trained on
GROWN = "both heads" + CRF  # what a network is also trained on with seed growing
SURE = 0.9  # probability from which pixels without a label take part in the training, if they touch one with it

# Chosen on training scenes of seed 0; fewer steps and proposals than the dissertation's, for speed.
BBAM_LR, SPARSITY = 0.05, 0.01
TRIED, PROPOSALS = 100, 16
WIDTH_OF_PHOTOGRAPHS = 800  # which the published strides are meant for
PLAIN: dict[str, Any] = {"rule": "value", "foreground": 0.2, "background": 0.2}
REFINED: dict[str, Any] = {"foreground": 0.4, "background": 0.6, "smoothing": 2.0}  # digits fill half of their boxes

LEARNING_RATE = 2e-3


def attribution(model: FasterRCNN, scenes: Sequence[Scene], config: Config) -> dict[str, list[Tensor]]:
    """BBAMs ``[n, H, W]`` of the annotated boxes of each scene, by the heads that they explain."""
    detector = detector_from_torchvision(model)
    device, generator = pick_device(config.device), torch.Generator().manual_seed(config.seed)

    def stride(area: float) -> float:
        return max(1.0, adaptive_stride(area) * config.size / WIDTH_OF_PHOTOGRAPHS)

    maps: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    for scene in tqdm(scenes, desc=f"BBAM, seed {config.seed}", unit="image"):
        objects = (scene.image.to(device), scene.boxes.to(device), scene.box_labels.to(device))
        positive = positive_proposals(detector, *objects, count=TRIED, keep=PROPOSALS, generator=generator)
        for name, heads in HEADS.items():
            found = bbam(
                detector,
                *objects,
                heads=heads,
                proposals=positive,
                stride=stride,
                steps=config.bbam_steps,
                lr=BBAM_LR,
                sparsity=SPARSITY,
            )
            maps[name].append(found.cpu())
    return maps


def make_masks(maps: dict[str, list[Tensor]], scenes: Sequence[Scene]) -> dict[str, list[Tensor]]:
    """Instance masks of each scene ``[n, H, W]``, by how they are made."""
    maps = {FILLED: [torch.ones(scene.instances.shape) for scene in scenes], **maps}
    masks: dict[str, list[Tensor]] = {}
    for ending, settings in (("", PLAIN), (CRF, REFINED)):
        for name, found in maps.items():
            masks[name + ending] = [
                instance_masks(own, scene.boxes, scene.image if ending else None, **settings)
                for own, scene in zip(found, scenes, strict=True)
            ]
    return masks


class Quality(NamedTuple):
    """In percent. AP50 and ABO count pixels that a mask leaves out as background; the mIoU does not count them."""

    ap50: float
    abo: float
    miou: float
    labelled: float  # share of the pixels that have a label
    network: float = math.nan  # mIoU of the network trained on these labels; NaN for none
    grown: float = math.nan  # the same with seed growing during training


def miou(found: Tensor, truth: Tensor) -> float:
    """Mean IoU of the classes of labels ``[N, H, W]``, of the pixels that have one in both."""
    known, k = (found != VOID) & (truth != VOID), len(CLASSES)
    pairs = torch.bincount(truth[known] * k + found[known], minlength=k * k).view(k, k).double()
    return float((pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())).nanmean())


def assess(masks: Sequence[Tensor], labels: Tensor, scores: Sequence[Tensor], scenes: Sequence[Scene]) -> Quality:
    """Quality of instance masks ``[n, H, W]`` of each scene and of the labels ``[N, H, W]`` made of them."""
    predictions = [
        {"masks": own == 1, "labels": scene.box_labels, "scores": score}
        for own, scene, score in zip(masks, scenes, scores, strict=True)
    ]
    truths = [{"masks": scene.instances, "labels": scene.box_labels} for scene in scenes]
    values = (
        average_precision(predictions, truths).mean,
        average_best_overlap(predictions, truths).mean,
        miou(labels, torch.stack([scene.labels for scene in scenes])),
        float((labels != VOID).double().mean()),
    )
    return Quality(*(100 * value for value in values))


@torch.no_grad()
def box_scores(model: FasterRCNN, scenes: Sequence[Scene], device: torch.device) -> list[Tensor]:
    """Probability that the detector gives to the class of each annotated box."""
    detector = detector_from_torchvision(model)
    return [
        detector(scene.image[None].to(device), [scene.boxes.to(device)])[0]
        .cpu()
        .gather(1, scene.box_labels[:, None])[:, 0]
        for scene in scenes
    ]


def train_network(images: Images, test: Images, name: str, config: Config, *, grow: bool = False) -> float:
    """mIoU, in percent, of a segmentation network trained on labelled images; pixels without a label are left out.

    With seed growing, more and more of these take part: those of which the network itself has become sure.
    """
    training.seed_everything(config.seed)  # the same start for all
    model = EncoderDecoder(len(CLASSES)).to(pick_device(config.device))

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        if not grow:
            return F.cross_entropy(logits, batch["labels"], ignore_index=VOID, reduction="sum") / batch["known"]
        sure = grow_seeds(batch["labels"], logits.detach().float().softmax(1), foreground=SURE, background=SURE)
        return partial_cross_entropy(logits, sure, ignore_index=VOID)

    training.train(
        model,
        loss,
        config.stream(images, Fit(config.size, mirror=True)),
        torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2),
        steps=config.steps,
        name=f"network on {name}{' with growing' * grow}, seed {config.seed}",
        options=config,
        counts={"known": lambda batch: (batch["labels"] != VOID).sum()},
    )
    return 100 * float(training.evaluate(model, test, workers=config.workers).nanmean())


class Outcome(NamedTuple):
    qualities: dict[str, Quality]
    maps: dict[str, list[Tensor]]
    masks: dict[str, list[Tensor]]
    scenes: list[Scene]


def experiment(config: Config, test: Images) -> Outcome:
    training.seed_everything(config.seed)
    annotated = Scenes("train", config.scenes, size=config.size, seed=config.seed)
    model = train_detector(annotated, config.detector_steps, config)
    scenes = [annotated[i] for i in range(config.labelled)]
    maps = attribution(model, scenes, config)
    masks = make_masks(maps, scenes)
    masks["true masks"] = [scene.instances.long() for scene in scenes]
    scores = box_scores(model, scenes, pick_device(config.device))
    image, qualities = torch.stack([scene.image for scene in scenes]), {}
    for name, found in masks.items():
        pairs = zip(found, scenes, strict=True)
        labels = torch.stack([semantic_labels(own, scene.box_labels, ignore_index=VOID) for own, scene in pairs])
        qualities[name] = assess(found, labels, scores, scenes)
        train = partial(train_network, Stacked(CLASSES, image, labels), test, name, config)
        if name in (*NETWORKS, "true masks"):
            qualities[name] = qualities[name]._replace(network=train())
        if name == GROWN:
            qualities[name] = qualities[name]._replace(grown=train(grow=True))
    return Outcome(qualities, maps, masks, scenes)


def table(runs: Sequence[dict[str, Quality]]) -> str:
    """Qualities in percent, means over runs, and standard deviations."""
    titles = ("AP50", "ABO", "mIoU", "labelled", "network", "grown")
    lines = [f"{'masks':<20}" + "".join(f"{title:>13}" for title in titles)]
    for name in runs[0]:
        values = torch.tensor([run[name] for run in runs])
        spread = [f" ±{value:.1f}" for value in values.std(0)] if len(runs) > 1 else [""] * len(titles)
        cells = [
            "-" if mean.isnan() else f"{mean:.1f}{more}" for mean, more in zip(values.mean(0), spread, strict=True)
        ]
        lines.append(f"{name:<20}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def main(config: Config) -> None:
    folder = training.start(config)
    scenes = stack(Scenes(config.split, EVALUATED, size=config.size))
    test = Stacked(CLASSES, scenes.image, scenes.labels)
    runs = [experiment(own, test) for own in each_run(config)]
    print(table([run.qualities for run in runs]))
    shown = runs[0]
    positions = high_positions(shown.maps, shown.scenes)
    means = ", ".join(f"{name} {points.norm(dim=1).mean():.2f}" for name, points in positions.items())
    print(f"mean distance from the centroid (0) to the contour (1): {means}")
    masks = {f"mask{ending}": shown.masks["both heads" + ending] for ending in ("", CRF)}
    draw_objects(shown.scenes, shown.maps | masks, folder / "boxes.png")
    draw_positions(positions, folder / "positions.png")
    print(f"pictures: {folder / 'boxes.png'}, {folder / 'positions.png'}")


if __name__ == "__main__":
    run(main, Config)
