"""A segmentation network trained with size targets, seeds, tags or masks; robustness to errors of the sizes.

Plots of the paper, from trainings on scenes, VOC or a folder of one's own: ``--sweep errors`` (Fig. 4, left), ``seeds``
(Fig. 4, right), ``classes`` (Fig. 5, right) and ``barrier`` (Fig. 6).

The paper's networks start from ImageNet. From scratch a DeepLabV3 learns too little in minutes on a CPU: with
MobileNetV3, on full masks of scenes of 64 pixels, it sees nothing but background after 60 steps of 0.7 seconds on one
core. So the small network is the default for scenes. For photographs it is EfficientNet-Lite0 with a light decoder, in
settings close to the paper's, for a GPU; with ``--quick`` only the decoder trains, on features that are made once. For
VOC, ``--data voc --train-split trainaug --network deeplabv3_resnet101`` is closest to the paper: about 60 epochs. Other
than there, the network is DeepLabV3 instead of DeepLabV3+, augmentation mirrors but leaves colours as they are, and
scores are of masks resized and padded as the images are.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from data.files import read_sizes
from data.sample import VOID, Annotated, Batch, DataError, Images, first, object_error
from data.source import Options
from data.stream import Whole
from engine import processes, training
from engine.command import check_least, each_run, run
from engine.processes import pick_device, rank, say
from matplotlib.figure import Figure
from parts import deeplab, supervisions
from parts.frozen import Kept, freeze
from parts.network import tag_loss
from parts.report import draw_rows
from parts.scribbles import Scribbled, all_scribbles
from parts.sizes import exact_sizes, noisy_sizes
from parts.subset import Subset
from parts.supervisions import counts, total_loss
from parts.sweeps import SWEEPS, TABLE, Result, Sweep, Trial, plot, table
from torch import Tensor, nn

from segattr.networks import evaluating

ANIMALS = ("cat", "dog", "bird")  # the classes of the paper's sizes that people have told


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Trains a network with each kind of supervision, all from the same weights; prints a table and draws a picture."""

    PHOTOGRAPHS: ClassVar[dict[str, Any]] = {
        "network": "efficientnet_lite0",
        "weights": "imagenet",
        "size": 512,
        "steps": 39700,
        "pretrain_steps": 0,
        "crf_weight": 5.0,
    }
    # Chosen on a fifth of the training images. Without the pretraining, tags alone leave nothing but background.
    QUICK: ClassVar[dict[str, Any]] = {
        "frozen": True,
        "size": 160,
        "steps": 150,
        "pretrain_steps": 100,
        "crf_scale": 0.25,
    }

    network: deeplab.Name = "small"
    """The network: a small one for images of about 48 pixels, torchvision's DeepLabV3 as it is, or another network with
    a light decoder, for photographs."""
    weights: deeplab.Weights = "none"
    """Where a network other than the small one starts: imagenet, for all but a decoder; the path of a state dict; or,
    for DeepLabV3, coco, from a training on masks of VOC's classes, so that no supervision is weak any more. Those of
    efficientnet_lite0 are a package, others are downloaded."""
    frozen: bool = False
    """Train only the light decoder. The features that it reads are made once for each image, and kept in --out."""
    sweep: Literal["none", "errors", "seeds", "classes", "barrier"] = "none"
    """Instead of the table, a plot over errors of the sizes, over lengths of the seeds, over errors with three classes,
    or over errors with one class beside the squared barrier."""
    classes: tuple[str, ...] = ()
    """Foreground classes of the sweeps classes (three) and barrier (one), the others count as background; without it,
    the first of cat, dog and bird if all of them are there, or else the first ones."""
    steps: int = 400
    """Optimizer steps of each training."""
    pretrain_steps: int = 300
    """Optimizer steps of the pretraining on image tags from which all start; 0 is the paper's, for --weights."""
    crf_weight: float = 60.0
    """Weight of the CRF loss per pair of pixels; 5 is about that of the paper for photographs of 512 pixels."""
    crf_scale: float = supervisions.SCALE
    """Resolution of the CRF loss, as a share of that of the images."""
    sizes: Path | None = None
    """CSV of size targets: a header of name and classes, a row for each image (its name without ending) that sums to 1.
    Without it, the sizes of the masks with an error of 8%. Sweeps draw it as stars. Average sizes, lower bounds and the
    errors in table and plot come from the masks all the same."""
    repeats: int = 1
    """Number of runs; their seeds count up from --seed, and tables and plots show mean and standard deviation."""
    out: Path = Path("runs/size_supervision")
    """Folder of the picture or plot and of the checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, steps=1, pretrain_steps=0, repeats=1, crf_weight=0)
        if not 0 < self.crf_scale <= 1:
            raise ValueError(f"--crf-scale: expected above 0 and at most 1, got {self.crf_scale}")
        if self.sizes and self.data == "scenes" and self.repeats > 1:
            raise ValueError(f"--repeats: expected 1 with --sizes: other seeds draw other scenes, got {self.repeats}")
        deeplab.check(self.network, self.weights, self.batch_size // (processes.count() * self.accumulate), self.frozen)
        count = self.plan.classes if self.plan else None
        if self.classes and not len(self.classes) == len({*self.classes}) == count:
            expected = f"{count} different for --sweep {self.sweep}" if count else "--sweep classes or barrier with it"
            raise ValueError(f"--classes: expected {expected}, got {' '.join(self.classes)}")

    @property
    def plan(self) -> Sweep | None:
        return SWEEPS.get(self.sweep)

    @property
    def trials(self) -> Sequence[Trial]:
        """Those of the table, or of the sweep. The sizes of a file are those of the table, or one more curve."""
        trials = self.plan.trials if self.plan else TABLE
        if not self.sizes:
            return trials
        if not self.plan:
            return [dataclasses.replace(trial, error=None) for trial in trials]
        last = [trial for trial in trials if trial.curve == trials[-1].curve]
        given = [dataclasses.replace(trial, curve="sizes of --sizes", error=None) for trial in last]
        return (*trials, *dict.fromkeys(given))  # one for each length of the seeds, not for each error

    def whole(self, images: Images) -> Images:
        """Images as the networks see them, of one size; in memory where reading takes as long as a training step."""
        fitted = Whole(images, self.fit())
        return Kept(fitted) if self.frozen else fitted

    def images(self, purpose: Literal["train", "evaluate"]) -> Images:
        images = super().images(purpose)
        if not self.plan or not self.plan.classes:
            return images
        objects = images.classes[1:]
        if len(objects) < self.plan.classes:
            wanted = f"at least {self.plan.classes} classes beside the background"
            raise DataError(f"--sweep {self.sweep}: expected {wanted}, got {len(objects)}")
        usual = ANIMALS if {*ANIMALS} <= {*objects} else objects
        names = self.classes or usual[: self.plan.classes]
        for name in names:
            if name not in objects:
                raise DataError(f"--classes: expected classes among {', '.join(objects)}, got {name}")
        return Subset(images, names, empty=self.plan.empty)


SHOWN = 6


class Annotator:
    """What annotators would tell of training images, made from their masks.

    Args:
        images: with masks.
        config: of the command line.
    """

    def __init__(self, images: Images, config: Config) -> None:
        self.exact = exact_sizes(images)
        self._typed = None
        if config.sizes:
            typed = images.read_sizes if isinstance(images, Subset) else None
            self._typed = typed(config.sizes) if typed else read_sizes(config.sizes, images.names, images.classes)
        self._seed, self.images = config.seed, config.whole(images)

    @cached_property
    def _strokes(self) -> list[list[Tensor]]:
        return all_scribbles(self.images, self._seed)

    def targets(self, error: float | None) -> Tensor:
        """Sizes with a nominal mean relative error; None: typed ones."""
        if error is None:
            assert self._typed is not None
            return self._typed
        return noisy_sizes(self.exact, error, self._seed)

    def annotate(self, trial: Trial) -> Images:
        """Images with ``targets``, ``average`` sizes and ``lower`` bounds, with ``seeds`` if they are asked for.

        The bound is 0.9 times the smallest size of a class where it occurs.
        """
        present = self.exact > 0
        smallest = self.exact.where(present, torch.inf).amin(0)
        return Annotated(
            Scribbled(self.images, self._strokes, trial.length) if trial.seeded else self.images,
            tags=present.long(),  # of the whole mask, as the sizes are: small objects may vanish when it is resized
            targets=self.targets(trial.error),
            average=self.average(),
            lower=torch.where(present, 0.9 * smallest, 0.0),
        )

    def average(self) -> Tensor:
        """For each class of an image its mean size over the images in which it occurs; the background is the rest."""
        present = self.exact > 0
        means = present * (self.exact.sum(0) / present.sum(0).clamp(min=1))
        rest = 1 - means[:, 1:].sum(1)
        means[:, 0] = torch.where(rest > 0, rest, means[:, 0]) * present[:, 0]
        return means / means.sum(1, keepdim=True)

    def error(self, trial: Trial) -> float:
        """Mean relative error of the sizes of objects that a training is told; NaN if it is told none."""
        if "average" in trial.terms:
            return object_error(self.average(), self.exact)
        return object_error(self.targets(trial.error), self.exact) if trial.sized else math.nan


@torch.no_grad()
def background_and_dice(model: nn.Module, data: Images, config: Config) -> tuple[float, float]:
    """Share of the labelled pixels that a network takes for background, which is 1 for the trivial solution; mean Dice
    coefficient of class 1 over the images that have it, NaN without any.
    """
    device = pick_device(config.device)
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    with evaluating(model):
        for batch in training.share(data, config.fit(), 50, config.workers):
            found, labels = model(batch["image"].to(device)).argmax(1), batch["labels"].to(device)
            known, truth = labels != VOID, labels == 1
            found = found.where(known, VOID)
            both, either = ((found == 1) & truth).sum((1, 2)), (found == 1).sum((1, 2)) + truth.sum((1, 2))
            there = truth.any(2).any(1)
            dice = 2 * both[there] / either[there]
            sums += torch.stack([(found == 0).sum(), known.sum(), dice.sum(), there.sum()])
    background, pixels, dice, images = processes.total(sums)
    return float(background / pixels), float(dice / images)


def experiment(config: Config, test: Images, shown: Batch) -> list[Result]:
    """Pretrains on tags, then trains with each supervision: the same weights to begin with, the same batches."""
    training.seed_everything(config.seed)
    device, images = pick_device(config.device), config.images("train")
    annotator = Annotator(images, config)
    fit = partial(training.train, options=config)
    evaluate = partial(training.evaluate, augment=config.fit(), workers=config.workers)

    pretrained = deeplab.build(config.network, len(images.classes), config.weights).to(device)
    if config.frozen:
        freeze(pretrained, [annotator.images, test], config.out / "features")
    if config.pretrain_steps:
        fit(
            pretrained,
            lambda logits, batch: tag_loss(logits, batch["tags"]),
            config.stream(annotator.images, config.fit(mirror=True)),
            deeplab.optimizer(pretrained, config.weights),
            steps=config.pretrain_steps,
            name=f"pretraining, seed {config.seed}",
        )
    results = []
    for trial in config.trials:
        model = copy.deepcopy(pretrained)
        progress = fit(
            model,
            total_loss(trial.terms, config.crf_weight, config.crf_scale),
            config.stream(annotator.annotate(trial), config.fit(mirror=True)),
            deeplab.optimizer(model, config.weights),
            steps=config.steps,
            name=f"{trial.name}, seed {config.seed}",
            counts=counts(trial.terms),
        )
        with torch.no_grad(), evaluating(model):
            predictions = model(shown["image"].to(device)).argmax(1).cpu().where(shown["valid"], VOID)
        on_training = bool(config.plan and config.plan.on_training)
        background, dice = background_and_dice(model, test, config)
        result = Result(
            iou=evaluate(model, test).cpu(),
            on_training=evaluate(model, annotator.images).cpu() if on_training else torch.full((1,), torch.nan),
            dice=dice,
            background=background,
            error=annotator.error(trial),
            seconds=progress.seconds,
            predictions=predictions,
        )
        results.append(result)
    return results


def main(config: Config) -> None:
    folder = training.start(config)
    test = config.images("evaluate")
    fitted = config.whole(test)
    shown = first(fitted, SHOWN)
    runs = [experiment(own, fitted, shown) for own in each_run(config)]
    say(table(config.trials, runs, config.plan.score if config.plan else "mIoU"))
    say(f"masks: background {test.sizes()[:, 0].mean():.1%}, {len(test.classes)} classes")
    path = folder / (f"{config.sweep}.png" if config.plan else "size_supervision.png")
    if rank() == 0 and config.plan:
        plot(config.plan, config.trials, runs, path)
    elif rank() == 0:
        rows = {"image": shown["image"].movedim(1, -1), "truth": shown["labels"]}
        rows |= {trial.curve: result.predictions for trial, result in zip(config.trials, runs[0], strict=True)}
        figure = Figure(figsize=(8, 1.25 * len(rows)), layout="constrained")
        draw_rows(figure, {name.replace(", ", ",\n").replace(" + ", "\n+ "): row for name, row in rows.items()})
        figure.savefig(path, dpi=80)
    say(f"picture: {path}")


if __name__ == "__main__":
    run(main, Config)
