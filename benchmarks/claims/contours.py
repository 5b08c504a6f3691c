"""Claim 5: the losses ISL and FSL improve the maps of a classifier that trains on with them.

The claims of *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, table 6, for the last layers of
a pretrained network; what the layers before make of an image is computed once.
"""

import copy
import dataclasses
from functools import cache
from typing import NamedTuple

import torch
from data.sample import Batch, Images
from data.stream import Whole
from engine import training
from isl_fsl import Config, average, fsl, isl
from parts.frozen import Kept, freeze
from parts.pretrained import Segmenter
from parts.tag_classifier import Output, TagClassifier, plain, present
from torch import Tensor, nn

from benchmarks.claims import maps
from benchmarks.claims.shared import (
    Measure,
    Outcome,
    Runs,
    Split,
    Verdict,
    Work,
    best_threshold,
    difference,
    digest,
    estimate,
)

STEPS = 60  # four epochs
STRIDE = 16  # of the features that stay as they are


class Weights(NamedTuple):
    """Of the two losses beside the classification of average pooling."""

    isl: float
    fsl: float


ISL_WEIGHT = 0.2
MEASURES: tuple[Measure, ...] = ("mIoU", "F")
FSL_WEIGHTS = (1.5, 5.0)  # one is chosen on the images held out


class Tail(nn.Module):
    """The layers of a classifier that train, on features of known images.

    Args:
        model: the classifier.
        images: all that it will see, made to fit.
        work: has the folder of the features.
    """

    def __init__(self, model: TagClassifier, images: list[Images], work: Work) -> None:
        super().__init__()
        frozen = Segmenter(model.encoder, len(images[0].classes), strides=(STRIDE,))
        freeze(frozen, images, work.folder / f"features-{STRIDE}")
        self.before = frozen.encoder
        self.layers = copy.deepcopy(model.encoder.features[model.fixed :])
        self.head: nn.Module = copy.deepcopy(model.head)

    def forward(self, image: Tensor) -> Output:
        features = self.layers(self.before.pyramid(image)[STRIDE].contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


def loss_of(weights: Weights) -> training.Loss:
    def loss(output: Output, batch: Batch) -> Tensor:
        scores, tags = output[1], present(batch)
        value = average(scores, tags)
        if weights.isl:
            value = value + weights.isl * isl(scores, tags)
        if weights.fsl:
            value = value + weights.fsl * fsl(scores, batch["image"], tags)
        return value

    return loss


def train(work: Work, seed: int, weights: Weights | None) -> dict[str, Tensor]:
    """What :func:`benchmarks.claims.maps.assess` finds for the CAMs of a classifier, with the split before its names.

    Args:
        work: the photographs and the folder.
        seed: of the order of the images.
        weights: of the losses; None for the classifier before the training.
    """

    def make() -> dict[str, Tensor]:
        images, model = kept(work), trained(work, seed, weights)
        return {
            f"{split}, {name}": values
            for split in ("held out", "val")
            for name, values in maps.assess(maps.Mapped(images[split], model), ["CAM"]).items()
        }

    settings = plain(config_of(work, seed)) | {"weights": weights}
    return work.once(f"contours, {weights}, seed {seed}", settings, make)


def trained(work: Work, seed: int, weights: Weights | None) -> Tail:
    """The classifier itself; a training that was finished before is not repeated."""
    config, images = config_of(work, seed), kept(work)
    model = Tail(maps.classifier(work), list(images.values()), work).eval()
    if weights:
        training.seed_everything(seed)
        training.train(
            model,
            loss_of(weights),
            config.stream(images["fit"], config.fit(mirror=True)),
            torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-2),
            steps=STEPS,
            name=f"ISL {weights.isl}, FSL {weights.fsl}, seed {seed}",
            options=config,
        )
    return model


def config_of(work: Work, seed: int) -> Config:
    preset = Config.PHOTOGRAPHS | {"steps": STEPS, "save_every": 20}
    config = Config(data="voc", root=work.data, seed=seed, resume=True, **preset)
    return dataclasses.replace(config, out=work.folder / f"contours-{digest(plain(config))}")


@cache
def kept(work: Work) -> dict[Split, Images]:
    """The images of each split, made to fit, in memory."""
    splits: tuple[Split, ...] = ("fit", "held out", "val")
    return {split: Kept(Whole(work.part(split), config_of(work, 0).fit())) for split in splits}


def run(work: Work) -> Outcome:
    ahead = {weight: train(work, 0, Weights(0, weight)) for weight in FSL_WEIGHTS}
    best = max(FSL_WEIGHTS, key=lambda weight: best_threshold(ahead[weight]["held out, sweep, CAM"]).miou)
    rows = {
        "average pooling": Weights(0, 0),
        "ISL": Weights(ISL_WEIGHT, 0),
        "FSL": Weights(0, best),
        "ISL + FSL": Weights(ISL_WEIGHT, best),
    }
    runs: dict[str, Runs] = {"before": [train(work, 0, None)["val, CAM"]]}
    for seed in range(work.seeds):
        for name, weights in rows.items():
            runs[name] = [*runs.get(name, []), train(work, seed, weights)["val, CAM"]]
    figures = {f"{name}, {measure}": estimate(own, measure) for measure in MEASURES for name, own in runs.items()}
    statements: tuple[tuple[str, Measure, str, float, str], ...] = (
        ("ISL", "mIoU", "+0.3 (J)", 0.0, "-1.2"),
        ("ISL", "F", "+1.0", 0.0, "-1.8"),
        ("FSL", "mIoU", "+1.1 (J)", 0.0, "+12.3"),
        ("FSL", "F", "+1.8", 0.0, "+14.5"),
        ("ISL + FSL", "mIoU", "63.9 to 66.7 (SEAM, J)", 2.0, "+7.6"),
        ("ISL + FSL", "F", "39.9 to 44.7 (SEAM)", 2.0, "+8.3"),
    )
    verdicts = [
        Verdict(
            f"{name} adds{f' {least:g} or more' if least else ''} to {measure} of CAM, beside average pooling alone",
            paper,
            difference(runs[name], runs["average pooling"], measure),
            least,
            scenes=scenes,
        )
        for name, measure, paper, least, scenes in statements
    ]
    verdicts += [
        Verdict(
            f"ISL + FSL adds 2 or more to {measure} of CAM, beside the classifier before",
            "",
            difference(runs["ISL + FSL"], runs["before"], measure),
            2.0,
        )
        for measure in MEASURES
    ]
    about = (
        f"{len(kept(work)['val'])} images, {work.repeats}, {STEPS} steps; weight of FSL {best:g}, "
        f"of {' and '.join(f'{weight:g}' for weight in FSL_WEIGHTS)} the better on the images held out"
    )
    return Outcome(figures, verdicts, about)
