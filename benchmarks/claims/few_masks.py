"""Claim 4: with masks of a few images, a classifier that trains through its heatmaps beats networks with a decoder.

The claims of *Model Guidance via Explanations Turns Image Classifiers into Segmentation Models*, table 1: its figures
have no interval over images, and a spread over seeds. All networks start from one classifier and train equally long.
"""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import torch
from engine import training
from few_shot_lrp import METHODS, Config, Normalised, experiment, f1, pretrain
from parts.tag_classifier import plain
from torch import Tensor

from benchmarks.claims.shared import Outcome, Verdict, Work, digest, of_seeds

PER_CLASS = (1, 5)
SETTINGS = {"labelled": PER_CLASS, "pretrain_steps": 400, "steps": 80, "save_every": 10}
# Learning rates of new weights, the better of 3e-3 and 1e-2 on images held out with 5 masks a class: of WS-AE before
# its maps were scaled to scores; the multi-task U-Net has that of the U-Net.
RATES = {"unrolled LRP": 1e-2, "WS-AE": 1e-2, "FCN": 1e-2, "U-Net": 3e-3, "multi-task U-Net": 3e-3}
OURS = "unrolled LRP"
PAPER = {1: "39.8", 5: "43.4 to 50.3"}
SCENES, F1_SCENES = {1: "-17.3", 5: "-22.5"}, {1: "94.4 to 85.9", 5: "94.4 to 87.9"}


class Found(NamedTuple):
    """In percent."""

    miou: float
    f1: float


@dataclasses.dataclass(frozen=True)
class Trials:
    """Trainings from one classifier; results are kept on disk."""

    work: Work
    seed: int

    @property
    def config(self) -> Config:
        preset = Config.PHOTOGRAPHS | Config.QUICK | SETTINGS
        return self._placed(Config(data="voc", root=self.work.data, seed=self.seed, quick=True, resume=True, **preset))

    def _placed(self, config: Config) -> Config:
        """With a folder of its own."""
        return dataclasses.replace(config, out=self.work.folder / f"few_masks-{digest(plain(config))}")

    @cached_property
    def start(self) -> Normalised:
        """The classifier."""
        training.seed_everything(self.seed)
        return pretrain(self.config, self.config.whole(self.work.part("fit")))

    def before(self) -> float:
        """F1 of the classifier, in percent."""

        def make() -> dict[str, Tensor]:
            return {"F1": torch.tensor(100 * f1(self.start, self.config.whole(self.work.part("val")), self.config))}

        return float(self.work.once(f"few masks, classifier, seed {self.seed}", plain(self.config), make)["F1"])

    def found(self, name: str, per_class: int) -> Found:
        """How good the network of a method is on val."""
        config = self._placed(dataclasses.replace(self.config, rate=RATES[name]))

        def make() -> dict[str, Tensor]:
            fit, val = (config.whole(self.work.part(split)) for split in ("fit", "val"))
            tags, start = (fit.sizes() > 0).long(), self.start
            training.seed_everything(self.seed)  # new weights are the same whatever was trained before
            outcome = experiment(config, name, per_class, start, fit, tags, val)
            return {"mIoU": torch.tensor(100 * outcome.iou), "F1": torch.tensor(100 * outcome.f1)}

        made = self.work.once(f"few masks, {name}, {per_class}, seed {self.seed}", plain(config), make)
        return Found(float(made["mIoU"]), float(made["F1"]))


def run(work: Work) -> Outcome:
    trials = [Trials(work, seed) for seed in range(work.seeds)]
    before = [own.before() for own in trials]
    made = {
        (name, per_class): [own.found(name, per_class) for own in trials] for per_class in PER_CLASS for name in METHODS
    }
    figures = {"F1 before": of_seeds(before)}
    for (name, per_class), found in made.items():
        figures[f"mIoU, {name}, {per_class}"] = of_seeds([own.miou for own in found])
        figures[f"F1, {name}, {per_class}"] = of_seeds([own.f1 for own in found])
    verdicts = []
    for per_class in PER_CLASS:
        others = [name for name in METHODS if name != OURS]
        best = max(others, key=lambda name: figures[f"mIoU, {name}, {per_class}"].value)
        ours, best_of_others = made[OURS, per_class], made[best, per_class]
        gain = [own.miou - other.miou for own, other in zip(ours, best_of_others, strict=True)]
        lost = [earlier - own.f1 for earlier, own in zip(before, ours, strict=True)]
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
    config = trials[0].config
    about = f"{config.size} pixels, classifier of {config.pretrain_steps} steps, {config.steps} steps, {work.repeats}"
    return Outcome(figures, verdicts, about)
