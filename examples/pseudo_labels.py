"""From image tags to a segmentation network: a classifier, maps of where it looks, refined masks, pseudo-labels.

On scenes, by small networks that start from nothing; on photographs, by a pretrained one.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from data.sample import VOID, Batch, Images, Sample, Stacked, collate, first
from data.scenes import CLASSES, Scenes, stack
from data.source import EVALUATED, Options
from data.stream import Whole
from engine import processes, training
from engine.command import check_least, each_run, run
from engine.per_image import each_image, read
from engine.processes import pick_device, rank, say, total
from matplotlib.figure import Figure
from parts import deeplab, supervisions, tag_classifier
from parts.frozen import Kept, freeze
from parts.localise import METHODS, WALKED, Located, Method, attribute
from parts.report import draw_rows
from parts.settings import Settings
from parts.tag_classifier import Part, TagClassifier, digest, plain, present, train_classifiers
from torch import Tensor, nn
from torchvision import tv_tensors

from segattr.metrics import JAndF, ThresholdSweep
from segattr.networks import evaluating
from segattr.plot import overlay
from segattr.refine import dense_crf, pseudo_labels


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Trains classifiers on tags, makes maps and pseudo-labels of training images, and networks that train on these.

    Prints the quality of each stage, in percent. As the field does it, the background score of a method's maps is that
    of the best mIoU on the training images: the one number that is chosen by their true masks.
    """

    PHOTOGRAPHS: ClassVar[dict[str, Any]] = {
        "network": "efficientnet_lite0",
        "weights": "imagenet",
        "size": 320,
        "pretrain_steps": 300,
        "classifier_steps": 1000,
        "maps": 0,
        "steps": 10000,
    }
    QUICK: ClassVar[dict[str, Any]] = {
        "frozen": True,
        "size": 224,
        "classifier_steps": 57,
        "maps": 80,
        "steps": 100,
        "save_every": 20,
    }

    network: deeplab.Name = "small"
    """Classifiers and segmentation networks: small ones; pretrained ones, for photographs; or DeepLabV3 with small
    classifiers."""
    weights: deeplab.Weights = "none"
    """Where networks start: ImageNet's weights (imagenet), nothing (none), or the path of a state dict. DeepLabV3 also
    has those of coco, which have seen masks of VOC's classes. Those of torchvision are downloaded."""
    frozen: bool = False
    """Train only the light decoder of a pretrained segmentation network, on features that are made once."""
    pretrain_steps: int = 600
    """Optimizer steps of the classifier that all start from; a pretrained one trains only its last layer in them."""
    classifier_steps: int = 300
    """Optimizer steps of each classifier."""
    maps: int = 120
    """Training images that get maps and pseudo-labels, the first ones; 0 for all."""
    steps: int = 300
    """Optimizer steps of each segmentation network."""
    plain: float = 0.7
    """For scenes, how much of an object, but for its most telling part, is a plain fill that all classes share."""
    cooccurrence: float = 0.9
    """For scenes, probability that an object stands on the ground that goes with its class."""
    ood: int = 400
    """For scenes, number of scenes with such grounds and without objects, of which W-OoD takes half."""
    repeats: int = 1
    """Number of runs; their seeds count up from --seed, and the tables show mean and standard deviation."""
    out: Path = Path("runs/pseudo_labels")
    """Folder of the picture, the maps and the checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, pretrain_steps=0, classifier_steps=1, maps=0, steps=1, ood=40, repeats=1)
        deeplab.check(self.network, self.weights, self.batch_size // (processes.count() * self.accumulate), self.frozen)
        for name in ("plain", "cooccurrence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}: expected a number from 0 to 1, got {getattr(self, name)}")

    def images(self, purpose: Literal["train", "evaluate"]) -> Images:
        if self.data != "scenes":
            return super().images(purpose)
        kind: dict[str, Any] = {"size": self.size, "plain": self.plain, "cooccurrence": self.cooccurrence}
        if purpose == "train":
            return stacked(Scenes("train", self.scenes, seed=self.seed, **kind))
        return stacked(Scenes(self.split, EVALUATED, **kind))

    def whole(self, images: Images) -> Images:
        """Images as the networks see them, of one size; in memory where reading takes as long as a training step."""
        fitted = Whole(images, self.fit())
        return Kept(fitted) if self.frozen else fitted

    def out_of_distribution(self) -> Images | None:
        """Scenes without objects; no other data has such images."""
        if self.data != "scenes":
            return None
        return stacked(Scenes("train", self.ood, size=self.size, seed=self.seed, out_of_distribution=True))


def stacked(scenes: Scenes) -> Images:
    drawn = stack(scenes)
    return Stacked(CLASSES, drawn.image, drawn.labels)


SURE = (0.3, 0.7)  # probabilities of a class: up to the first one background, pixels in between are left out
SHOWN = 6
CRF_MASKS, LABELS = " + CRF", ", pseudo-labels"  # what the names of masks end in


def scores(batch: Batch, name: str, threshold: float) -> Tensor:
    """Scores ``[B, K, H, W]``: the background's, which is the threshold, and the maps of a method."""
    return F.pad(batch[name], (0, 0, 0, 0, 1, 0), value=threshold)


def refine(
    sample: Sample, thresholds: Mapping[str, float], settings: Settings, device: torch.device
) -> dict[str, Tensor]:
    """Masks by a dense CRF, and pseudo-labels that leave out what it is not sure of; both leave out padding."""
    batch = {name: values.to(device) for name, values in collate([sample]).items()}
    image, inside, found = batch["image"], batch["valid"], {}
    widths = {name: share * image.shape[-1] for name, share in settings.crf_widths.items()}
    for name, threshold in thresholds.items():
        refined = dense_crf(scores(batch, name, threshold), image, valid=inside, **widths, **settings.crf)
        labels = pseudo_labels(refined[:, 1:], present(batch), foreground=SURE[1], background=SURE[0])
        found[name + CRF_MASKS] = refined.argmax(1).masked_fill(~inside, VOID)[0].byte()
        found[name + LABELS] = labels.masked_fill(~inside, VOID)[0].byte()
    return found


class Stored(Images):
    """Images with results that :func:`each_image` has written, under their names.

    Args:
        images: the images.
        folder: of the results.
        names: of those that become entries of the samples.
    """

    def __init__(self, images: Images, folder: Path, names: Sequence[str]) -> None:
        self.names, self.classes = images.names, images.classes
        self._images, self._folder, self._keys = images, folder, names

    def __getitem__(self, index: int) -> Sample:
        found = read(self._folder, self.names[index])
        return self._images[index] | {key: tv_tensors.Mask(found[key].long()) for key in self._keys}


class Relabelled(Images):
    """Images with other labels, bytes that lie in memory; padding has none, and tags and sizes are the new ones."""

    def __init__(self, images: Images, labels: Sequence[Tensor]) -> None:
        self.names, self.classes = images.names, images.classes
        self._images, self._labels = images, labels

    def __getitem__(self, index: int) -> Sample:
        sample = self._images[index]
        labels = self._labels[index].long().masked_fill(~sample["valid"].as_subclass(Tensor), VOID)
        return {"image": sample["image"], "valid": sample["valid"], "labels": tv_tensors.Mask(labels)}


class Quality(NamedTuple):
    """Of masks, in percent; the mIoU counts the background, the others are means over the foreground classes."""

    miou: float
    precision: float
    recall: float
    region: float
    contour: float
    labelled: float  # share of the pixels that have a label; only these count
    threshold: float  # background score of the maps, NaN for other masks


@torch.no_grad()
def assess(
    data: Images, thresholds: Mapping[str, float], predict: Callable[[Batch], Mapping[str, Tensor]], config: Config
) -> dict[str, Quality]:
    """Quality of several kinds of masks, int64 ``[B, H, W]`` each, by all processes together.

    Args:
        data: images with their true labels.
        thresholds: what masks were made with, or NaN, by their names.
        predict: masks of a batch by these names.
        config: of the command line.
    """
    device, count = pick_device(config.device), len(data.classes)
    sweeps = {name: ThresholdSweep(count - 1, thresholds=[0.5], device=device) for name in thresholds}
    contours = {name: JAndF(count - 1, device=device) for name in thresholds}
    pixels = {name: torch.zeros(2, dtype=torch.int64, device=device) for name in thresholds}
    for batch in training.share(data, config.fit(), 50, config.workers):
        labels, classes = batch["labels"].to(device), torch.arange(1, count, device=device).view(-1, 1, 1)
        for name, masks in predict(batch).items():
            masks = masks.to(device)
            valid, found = (labels != VOID) & (masks != VOID), masks[:, None] == classes
            sweeps[name].update(found.float(), labels.masked_fill(~valid, VOID))
            contours[name].update(found, labels[:, None] == classes, valid=valid)
            pixels[name] += torch.stack([valid.sum(), (labels != VOID).sum()])
    qualities = {}
    for name, threshold in thresholds.items():
        sweeps[name].counts, contours[name].counts = total(sweeps[name].counts), total(contours[name].counts)
        best, (region, contour), (counted, every) = (
            sweeps[name].compute(),
            contours[name].compute(),
            total(pixels[name]),
        )
        qualities[name] = Quality(
            miou=100 * best.miou,
            precision=100 * float(best.precision[1:].nanmean()),
            recall=100 * float(best.recall[1:].nanmean()),
            region=100 * float(region.nanmean()),
            contour=100 * float(contour.nanmean()),
            labelled=100 * float(counted / every),
            threshold=threshold,
        )
    return qualities


def best_thresholds(data: Images, names: Iterable[str], config: Config) -> dict[str, float]:
    """Background score of the best mIoU of each method's maps."""
    device = pick_device(config.device)
    sweeps = {name: ThresholdSweep(len(data.classes) - 1, device=device) for name in names}
    for batch in training.share(data, config.fit(), 50, config.workers):
        for name, sweep in sweeps.items():
            sweep.update(batch[name].to(device), batch["labels"].to(device), tags=present(batch).to(device))
    for sweep in sweeps.values():
        sweep.counts = total(sweep.counts)
    return {name: sweep.compute().threshold for name, sweep in sweeps.items()}


def build_network(images: Sequence[Images], folder: Path, config: Config) -> nn.Module:
    """A segmentation network for images made to fit; of a frozen encoder there are features of these, in a folder."""
    model = deeplab.build(config.network, len(images[0].classes), config.weights).to(pick_device(config.device))
    if config.frozen:
        freeze(model, images, folder / "features")
    return model


def train_network(images: Images, test: Images, name: str, folder: Path, config: Config) -> nn.Module:
    """A segmentation network trained on the labels of images; what has none is left out."""
    training.seed_everything(config.seed)  # the same start for all
    model = build_network([images, test], folder, config)
    training.train(
        model,
        supervisions.masks,
        config.stream(images, config.fit(mirror=True)),
        deeplab.optimizer(model, config.weights),
        steps=config.steps,
        name=f"network on {name}, seed {config.seed}",
        options=config,
        counts=supervisions.counts(("masks",)),
    )
    return model


def settings_of(config: Config, classifiers: Mapping[str, TagClassifier]) -> dict[str, str]:
    """What maps and masks depend on, for :func:`each_image`."""
    return plain(config) | {name: digest(model) for name, model in classifiers.items()}


def make_maps(
    classifiers: Mapping[str, TagClassifier],
    methods: Mapping[str, Method],
    images: Images,
    folder: Path,
    config: Config,
) -> None:
    """Writes the maps that methods need, with and without a random walk, to a folder for each classifier."""
    settings = settings_of(config, classifiers)
    for name, model in classifiers.items():
        needed = [kind for method in methods.values() if method.classifier == name for kind in method.maps]
        if kinds := list(dict.fromkeys(kind.removesuffix(WALKED) for kind in needed)):
            with evaluating(model):
                work = attribute(model, kinds, images, config.seed)
                each_image(work, images, folder / name, settings=settings, name=f"maps of {name}")


def make_masks(
    classifiers: Mapping[str, TagClassifier],
    located: Images,
    thresholds: Mapping[str, float],
    folder: Path,
    config: Config,
) -> Stored:
    """Images with the masks and pseudo-labels that :func:`refine` makes of their maps."""
    model = next(iter(classifiers.values()))
    work = partial(refine, thresholds=thresholds, settings=model.settings, device=pick_device(config.device))
    settings = settings_of(config, classifiers) | {"from": thresholds}
    each_image(work, located, folder / "refined", settings=settings, name="refinement")
    return Stored(located, folder / "refined", [name + end for name in thresholds for end in (CRF_MASKS, LABELS)])


Stages = dict[str, dict[str, Quality]]


def experiment(config: Config, folder: Path) -> tuple[Stages, dict[str, Tensor]]:
    """Qualities by stage and method, and the rows of the picture."""
    training.seed_everything(config.seed)
    images, test, candidates = config.images("train"), config.images("evaluate"), config.out_of_distribution()
    test = config.whole(test)
    start = tag_classifier.build(config.network, len(images.classes) - 1, config.weights)
    steps = (config.pretrain_steps, config.classifier_steps)
    classifiers = train_classifiers(start.to(pick_device(config.device)), images, candidates, *steps, folder, config)
    whole = config.whole(Part(images, range(min(config.maps or len(images), len(images)))))

    methods = {name: method for name, method in METHODS.items() if method.classifier in classifiers}
    make_maps(classifiers, methods, whole, folder, config)
    compared = list(methods)
    ends = ("CAM", next(name for name in reversed(compared) if name.endswith("AdvCAM + RIB")))
    methods |= {name + WALKED: methods[name].walked() for name in ends}
    located = Located(whole, folder, methods)
    thresholds = best_thresholds(located, methods, config)
    stages = {"maps": assess(located, thresholds, partial(threshold_maps, thresholds=thresholds), config)}

    starts = {name + walked: thresholds[name + walked] for name in ends for walked in ("", WALKED)}
    refined = make_masks(classifiers, located, starts, folder, config)
    masks, labels = ([name + ending for name in starts] for ending in (CRF_MASKS, LABELS))
    stages["refinement"] = {name: stages["maps"][name] for name in starts}
    stages["maps"] = {name: stages["maps"][name] for name in compared}
    for stage, names in (("refinement", masks), ("pseudo-labels", labels)):
        found = assess(refined, dict.fromkeys(names, math.nan), partial(entries, names=names), config)
        stages.setdefault(stage, {}).update({name.removesuffix(LABELS): value for name, value in found.items()})

    trained_on = {name: [read(folder / "refined", image)[name + LABELS] for image in whole.names] for name in starts}
    trained_on["true masks"] = [whole.labels(i).as_subclass(Tensor).byte() for i in range(len(whole))]
    stages["networks"] = {}
    for name, targets in trained_on.items():
        network = train_network(Relabelled(whole, targets), test, name, folder, config)
        with evaluating(network):
            stages["networks"] |= assess(test, {name: math.nan}, partial(predict, model=network, name=name), config)

    shown = first(refined, SHOWN)
    rows = {"image": shown["image"].movedim(1, -1), "truth": shown["labels"]}
    rows |= {name: overlays(shown, name) for name in compared} | {name: shown[name] for name in masks}
    return stages, rows


def threshold_maps(batch: Batch, thresholds: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: scores(batch, name, threshold).argmax(1) for name, threshold in thresholds.items()}


def entries(batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: batch[name] for name in names}


def predict(batch: Batch, model: nn.Module, name: str) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    found = model(batch["image"].to(device)).argmax(1)
    return {name: found.masked_fill(~batch["valid"].to(device), VOID)}


def overlays(batch: Batch, name: str) -> Tensor:
    """Images under the largest map of any class, ``[n, H, W, 3]``."""
    pairs = zip(batch["image"], batch[name].amax(1).clamp(0, 1), strict=True)
    return torch.stack([overlay(image, values).movedim(0, -1) for image, values in pairs])


def table(runs: Sequence[Stages]) -> str:
    """A table for each stage; means over runs, and standard deviations."""
    lines = []
    for stage, qualities in runs[0].items():
        width = 10 if len(runs) == 1 else 13
        titles = ("mIoU", "prec.", "recall", "J", "F", "labels", "threshold")
        lines.append(f"{stage:<41}" + "".join(f"{title:>{width}}" for title in titles))
        for name in qualities:
            values = {field: [getattr(run[stage][name], field) for run in runs] for field in Quality._fields}
            cells = [cell(own, digits=2 if field == "threshold" else 1) for field, own in values.items()]
            lines.append(f"{name:<41}" + "".join(f"{cell:>{width}}" for cell in cells).rstrip())
    return "\n".join(lines)


def cell(values: Sequence[float], digits: int) -> str:
    if any(math.isnan(value) for value in values):
        return ""
    spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def compare(
    config: Config,
    experiment: Callable[[Any, Path], tuple[Stages, dict[str, Tensor]]],
    table: Callable[[Sequence[Stages]], str],
    picture: str,
) -> None:
    """Runs an experiment once with each seed, prints a table of all, draws the rows of the first.

    Args:
        config: of the command line.
        experiment: from a configuration and a folder for its maps to the qualities by stage and the rows of a picture.
        table: of the qualities of the runs.
        picture: file name, in the folder of the results.
    """
    folder = training.start(config, "maps")
    if config.data != "scenes":
        say("without W-OoD: only scenes have out-of-distribution images")
    runs = [experiment(own, folder / "maps" / f"seed {own.seed}") for own in each_run(config)]
    say(table([stages for stages, _ in runs]))
    if rank() == 0:
        rows = runs[0][1]
        figure = Figure(figsize=(9, 1.5 * len(rows)), layout="constrained")
        draw_rows(figure, {name.replace(" + ", "\n+ "): row for name, row in rows.items()})
        figure.savefig(folder / picture, dpi=80)
    say(f"picture: {folder / picture}")


def main(config: Config) -> None:
    compare(config, experiment, table, "pseudo_labels.png")


if __name__ == "__main__":
    run(main, Config)
