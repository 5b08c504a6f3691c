"""All methods together: from image tags to a segmentation network, and what each step of the way adds.

On scenes, by small networks that start from nothing; on photographs, by a pretrained one.
"""

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pseudo_labels
import torch
from data.sample import Annotated, Batch, Images, first
from engine import training
from engine.command import run
from engine.per_image import read
from engine.processes import pick_device
from parts import deeplab, supervisions, tag_classifier
from parts.localise import Located, Method
from parts.network import tag_loss
from parts.pretrained import Segmenter
from parts.tag_classifier import Part, train_classifiers
from pseudo_labels import (
    CRF_MASKS,
    LABELS,
    Quality,
    Relabelled,
    Stages,
    assess,
    best_thresholds,
    build_network,
    cell,
    compare,
    entries,
    make_maps,
    make_masks,
    overlays,
    predict,
    threshold_maps,
)
from torch import Tensor, nn

from segattr.networks import evaluating


@dataclasses.dataclass(frozen=True)
class Config(pseudo_labels.Config):
    """Trains classifiers on tags, makes maps, masks and pseudo-labels of training images, trains networks on these.

    Prints what each stage adds, in percent. The background score of a stage's maps is that of the best mIoU on the
    training images: the one number that is chosen by their true masks.
    """

    PHOTOGRAPHS: ClassVar[dict[str, Any]] = pseudo_labels.Config.PHOTOGRAPHS
    QUICK: ClassVar[dict[str, Any]] = pseudo_labels.Config.QUICK | {"steps": 80, "crf_scale": 0.25}

    pretrain_steps: int = 600
    """Optimizer steps on tags of the classifier, and of the network, that all start from; of pretrained ones only the
    classifier has them, and trains only its last layer in them."""
    maps: int = 160
    """Training images that get maps and pseudo-labels, the first ones; 0 for all."""
    steps: int = 200
    """Optimizer steps of each segmentation network."""
    crf_scale: float = supervisions.SCALE
    """Resolution of the Potts loss, as a share of that of the images."""
    out: Path = Path("runs/everything")
    """Folder of the picture, the maps and the checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crf_scale <= 1:
            raise ValueError(f"--crf-scale: expected above 0 and at most 1, got {self.crf_scale}")


CRF_WEIGHT = (
    5.0  # per pair of pixels, about that of the paper for photographs; on val, ten times as much costs 4 points
)
SHOWN = 6


def tags(logits: Tensor, batch: Batch) -> Tensor:
    """Which classes the image has, to begin with."""
    return tag_loss(logits, batch["tags"])


def edges(logits: Tensor, batch: Batch, scale: float = supervisions.SCALE) -> Tensor:
    """The Potts loss: segments end where colours change."""
    return CRF_WEIGHT * supervisions.crf(logits, batch, scale)


# A name that begins with a plus is the row above with one thing more.
WALK, CRF = "+ random walk", "+ dense CRF"


class Training(NamedTuple):
    losses: tuple[str, ...]
    labels: str = WALK + LABELS
    sizes: str = WALK + CRF_MASKS  # from which the targets are


NETWORKS = {
    "cross-entropy": Training(("masks",)),
    "+ size targets": Training(("masks", "size")),
    "+ Potts": Training(("masks", "size", "edges")),
    "with true sizes": Training(("masks", "size", "edges"), sizes="truth"),
    "size targets + Potts": Training(("size", "edges")),
    "true masks": Training(("masks",), "truth", "truth"),
    "true sizes + Potts": Training(("size", "edges"), "truth", "truth"),
}


def methods(classifiers: Collection[str]) -> dict[str, Method]:
    """Maps of the stages, one method more in each; without W-OoD where no classifier has it."""
    stages = {"CAM": Method("GAP", ("CAM",)), "+ ISL and FSL": Method("ISL + FSL", ("CAM",))}
    if "W-OoD + ISL + FSL" in classifiers:
        stages["+ W-OoD"] = Method("W-OoD + ISL + FSL", ("CAM",))
    *_, last = stages.values()
    stages["+ AdvCAM and RIB"] = Method(last.classifier, ("AdvCAM", "RIB"))
    stages[WALK] = stages["+ AdvCAM and RIB"].walked()
    return stages


def train_networks(
    images: Images, data: Mapping[str, Images], test: Images, folder: Path, config: Config
) -> Iterator[tuple[str, nn.Module]]:
    """Segmentation networks that go on from the same one with different losses, one after the other, by their names.

    Args:
        images: for the tags that all of them know first, but for those with pretrained encoders.
        data: of each of ``NETWORKS``, with labels and with targets of the sizes.
        test: images to evaluate, made to fit.
        folder: of features, if the encoder is frozen.
        config: of the command line.
    """
    terms: dict[str, training.Loss] = {
        "masks": supervisions.masks,
        "size": supervisions.size,
        "edges": partial(edges, scale=config.crf_scale),
    }

    def fit(model: nn.Module, name: str, own: Images, losses: Sequence[training.Loss], steps: int) -> nn.Module:
        training.train(
            model,
            lambda logits, batch: torch.stack([loss(logits, batch) for loss in losses]).sum(),
            config.stream(own, config.fit(mirror=True)),
            deeplab.optimizer(model, config.weights),
            steps=steps,
            name=f"network, {name}, seed {config.seed}",
            options=config,
            counts=supervisions.counts(("masks",)),
        )
        return model

    training.seed_everything(config.seed)
    start = build_network([next(iter(data.values())), test], folder, config)
    if not isinstance(start, Segmenter):
        fit(start, "start", images, [tags], config.pretrain_steps)
    for name, recipe in NETWORKS.items():
        yield name, fit(copy.deepcopy(start), name, data[name], [terms[loss] for loss in recipe.losses], config.steps)


def experiment(config: Config, folder: Path) -> tuple[Stages, dict[str, Tensor]]:
    """Qualities by stage, and the rows of the picture."""
    training.seed_everything(config.seed)
    images, test, candidates = config.images("train"), config.images("evaluate"), config.out_of_distribution()
    test = config.whole(test)
    new = tag_classifier.build(config.network, len(images.classes) - 1, config.weights).to(pick_device(config.device))
    steps = (config.pretrain_steps, config.classifier_steps)
    classifiers = train_classifiers(new, images, candidates, *steps, folder, config, without=("W-OoD + GAP",))

    whole = config.whole(Part(images, range(min(config.maps or len(images), len(images)))))
    stages = methods(classifiers)
    make_maps(classifiers, stages, whole, folder, config)
    located = Located(whole, folder, stages)
    thresholds = best_thresholds(located, stages, config)
    maps = assess(located, thresholds, partial(threshold_maps, thresholds=thresholds), config)

    masks, labels = WALK + CRF_MASKS, WALK + LABELS
    refined = make_masks(classifiers, located, {WALK: thresholds[WALK]}, folder, config)
    found = assess(refined, dict.fromkeys((masks, labels), math.nan), partial(entries, names=(masks, labels)), config)
    maps |= {CRF: found[masks], "pseudo-labels": found[labels]}

    shown = first(refined, SHOWN)
    rows = {"image": shown["image"].movedim(1, -1), "truth": shown["labels"]}
    rows |= {name: overlays(shown, name) for name in stages} | {CRF: shown[masks], "pseudo-labels": shown[labels]}
    made = [read(folder / "refined", image) for image in whole.names]
    known = {key: Relabelled(whole, [own[key] for own in made]) for key in (labels, masks)}
    known["truth"] = Relabelled(whole, [whole.labels(i).as_subclass(Tensor).byte() for i in range(len(whole))])
    data = {
        name: Annotated(known[recipe.labels], targets=known[recipe.sizes].sizes()) for name, recipe in NETWORKS.items()
    }
    networks: dict[str, Quality] = {}
    for name, model in train_networks(images, data, test, folder, config):
        with evaluating(model), torch.no_grad():
            networks |= assess(test, {name: math.nan}, partial(predict, model=model, name=name), config)
            rows |= predict(shown, model, name)
    return {"masks of training images": maps, "networks": networks}, rows


def table(runs: Sequence[Stages]) -> str:
    """Quality by stage, and what a stage adds to the mIoU of the one above; means over runs, standard deviations."""
    width = 10 if len(runs) == 1 else 13
    lines = []
    for stage in runs[0]:
        titles = ("mIoU", "adds", "J", "F", "labels")
        lines.append(f"{stage:<32}" + "".join(f"{title:>{width}}" for title in titles))
        above: list[float] = []
        for name in runs[0][stage]:
            own = [run[stage][name] for run in runs]
            miou = [quality.miou for quality in own]
            adds = [new - old for new, old in zip(miou, above, strict=True)] if name.startswith("+") else [math.nan]
            columns = (miou, adds, *([getattr(q, field) for q in own] for field in ("region", "contour", "labelled")))
            lines.append(f"{name:<32}" + "".join(f"{cell(values, 1):>{width}}" for values in columns))
            above = miou
    return "\n".join(lines)


def main(config: Config) -> None:
    compare(config, experiment, table, "everything.png")


if __name__ == "__main__":
    run(main, Config)
