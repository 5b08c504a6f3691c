"""Claim 4: with masks of a few images, a classifier that trains through its heatmaps beats networks with a decoder.

The claims of *Model Guidance via Explanations Turns Image Classifiers into Segmentation Models*, table 1, in the short
training of the example: its figures have no interval over images, and a spread over seeds.
"""

import dataclasses
from functools import cache, partial

import torch
from data.sample import Images
from engine import training
from few_shot_lrp import METHODS, Config, Normalised, experiment, f1, pretrain
from parts.tag_classifier import plain
from torch import Tensor

from benchmarks.claims.shared import Outcome, Verdict, Work, digest, of_seeds

PER_CLASS = (1, 5)
OURS = "unrolled LRP"
PAPER = {1: "39.8", 5: "43.4 to 50.3"}
SCENES, F1_SCENES = {1: "-17.3", 5: "-22.5"}, {1: "94.4 to 85.9", 5: "94.4 to 87.9"}


def config_of(work: Work, seed: int) -> Config:
    preset = Config.PHOTOGRAPHS | Config.QUICK | {"labelled": PER_CLASS, "save_every": 10}
    config = Config(data="voc", root=work.data, seed=seed, quick=True, resume=True, **preset)
    return dataclasses.replace(config, out=work.folder / f"few_masks-{digest(plain(config))}")


def train(work: Work, seed: int) -> dict[str, Tensor]:
    """mIoU and F1 in percent on val by method and number of masks, and F1 of the classifier before."""
    config = config_of(work, seed)

    @cache
    def images() -> tuple[Images, Images]:
        return config.whole(work.part("fit")), config.whole(work.part("val"))

    @cache
    def start() -> Normalised:
        training.seed_everything(seed)
        return pretrain(config, images()[0])

    def one(name: str, per_class: int) -> dict[str, Tensor]:
        fit, val = images()
        tags, classifier = (fit.sizes() > 0).long(), start()
        training.seed_everything(seed)  # new weights are the same whatever was trained before, in this run or another
        outcome = experiment(config, name, per_class, classifier, fit, tags, val)
        return {"mIoU": torch.tensor(100 * outcome.iou), "F1": torch.tensor(100 * outcome.f1)}

    settings = plain(config)
    before = work.once(
        f"few masks, classifier, seed {seed}",
        settings,
        lambda: {"F1": torch.tensor(100 * f1(start(), images()[1], config))},
    )
    found = {"F1 before": before["F1"]}
    for per_class in PER_CLASS:
        for name in METHODS:
            made = work.once(f"few masks, {name}, {per_class}, seed {seed}", settings, partial(one, name, per_class))
            found |= {f"{measure}, {name}, {per_class}": value for measure, value in made.items()}
    return found


def run(work: Work) -> Outcome:
    trained = [train(work, seed) for seed in range(work.seeds)]
    figures = {name: of_seeds([float(own[name]) for own in trained]) for name in trained[0]}
    verdicts = []
    for per_class in PER_CLASS:
        others = [name for name in METHODS if name != OURS]
        best = max(others, key=lambda name: figures[f"mIoU, {name}, {per_class}"].value)
        gain = [float(own[f"mIoU, {OURS}, {per_class}"] - own[f"mIoU, {best}, {per_class}"]) for own in trained]
        lost = [float(own["F1 before"] - own[f"F1, {OURS}, {per_class}"]) for own in trained]
        better = f"better than the best of the others ({best}), {per_class} a class"
        verdicts += [
            Verdict(better, PAPER[per_class], of_seeds(gain), 0.0, scenes=SCENES[per_class]),
            Verdict(
                f"F1 falls by at most 2 points, {per_class} a class",
                "81.6 to 80.8, 5 a class",
                of_seeds(lost),
                scenes=F1_SCENES[per_class],
                most=2.0,
            ),
        ]
    config = config_of(work, 0)
    about = f"{config.size} pixels, {config.steps} steps, {work.repeats}"
    return Outcome(figures, verdicts, about)
