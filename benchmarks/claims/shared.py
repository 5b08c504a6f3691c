"""What the claims share: photographs and their parts, results that stay on disk, measures with intervals, verdicts."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from data.sample import VOID, DataError, Images
from data.voc import VOC
from engine import storage
from numpy.typing import NDArray
from parts.tag_classifier import Part
from scipy.stats import bootstrap
from torch import Tensor

from segattr.metrics import JAndF, ThresholdSweep
from segattr.metrics.maps import BestThreshold

NETWORK: Literal["efficientnet_lite0"] = "efficientnet_lite0"  # with ImageNet's weights
EACH = 5  # of the training images every fifth is held out
RESAMPLES = 1000

Split = Literal["fit", "held out", "val"]
Measure = Literal["mIoU", "F"]


@dataclass(frozen=True)
class Work:
    """Photographs in the layout of VOC, and a folder in which every finished stage stays.

    Args:
        data: folder of the photographs.
        folder: of what is computed.
        seeds: trainings of each kind.
        images: images of val, and of ``train`` where they get maps, the first ones; 0 for all.
    """

    data: Path
    folder: Path
    seeds: int = 3
    images: int = 0
    began: float = field(default_factory=time.monotonic, compare=False)

    @cached_property
    def _lists(self) -> dict[str, VOC]:
        return {name: VOC(self.data, name) for name in ("train", "val")}

    @property
    def repeats(self) -> str:
        """How often trainings are repeated, in words."""
        return f"{self.seeds} seeds" if self.seeds > 1 else "one seed so far"

    def check(self) -> None:
        """Raises DataError for a folder that has not what is needed."""
        train = self._lists["train"]
        if len(train) <= EACH:
            raise DataError(f"{self.data}: expected more than {EACH} images in the list train, got {len(train)}")

    def part(self, split: Split) -> Images:
        """Settings are chosen on the images held out of ``train``, figures are those of ``val``."""
        if split == "val":
            val = self._lists["val"]
            return Part(val, range(min(self.images or len(val), len(val))))
        train = self._lists["train"]
        return Part(train, [i for i in range(len(train)) if (i % EACH == 0) == (split == "held out")])

    def once(
        self, name: str, settings: Mapping[str, object], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What ``make`` returns; from the disk, if it was made before with these settings.

        Args:
            name: of the stage.
            settings: all that the result depends on, beside the photographs, which are added.
            make: computes the result; what it keeps on disk itself goes on after a stop.
        """
        path = self.folder / "done" / f"{name}-{digest({**settings, 'data': str(self.data), 'images': self.images})}.pt"
        if os.path.lexists(path):
            return storage.load(path)
        made = make()
        storage.save(path, made)
        print(f"{name}: done, {(time.monotonic() - self.began) / 60:.0f} minutes after the start", flush=True)
        return made


def digest(settings: Mapping[str, object]) -> str:
    """A short text that other settings have another one of."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def counts(masks: Tensor, labels: Tensor, classes: int) -> Tensor:
    """What mIoU and F are made of, for one image, ``[6, K]``; see :class:`segattr.metrics.JAndF`.

    Args:
        masks: the classes that were found, ``[H, W]``, 255 where nothing counts.
        labels: the true ones, ``[H, W]``, 255 where they are not known.
        classes: K, with the background.
    """
    quality, each = JAndF(classes), torch.arange(classes).view(-1, 1, 1)
    valid = (labels != VOID) & (masks != VOID)
    quality.update((masks == each)[None], (labels == each)[None], valid=valid[None])
    return quality.counts.int()


def scores(of_images: Tensor, measure: Measure = "mIoU") -> NDArray[np.float64]:
    """In percent, of counts ``[..., N, 6, K]`` of N images each: the mIoU of all classes, F of the foreground's."""
    quality = JAndF(of_images.shape[-1])
    quality.counts = of_images.sum(-3, dtype=torch.int64).movedim(-2, 0)
    region, contour = quality.compute()
    return 100 * (region if measure == "mIoU" else contour[..., 1:]).nanmean(-1).double().numpy()


def score(of_images: Tensor, measure: Measure = "mIoU") -> float:
    """The same of one set of images, ``[N, 6, K]``."""
    return float(scores(of_images, measure))


def best_threshold(sweeps: Tensor) -> BestThreshold:
    """Of the counts ``[N, C + 1, C, T + 1]`` of some images, see :class:`segattr.metrics.ThresholdSweep`."""
    sweep = ThresholdSweep(sweeps.shape[2])
    sweep.counts = sweeps.sum(0, dtype=torch.int64)
    return sweep.compute()


class Estimate(NamedTuple):
    """A figure, its standard deviation over seeds (NaN for one), and a 95% interval over images."""

    value: float
    spread: float
    low: float
    high: float


def of_seeds(values: Sequence[float]) -> Estimate:
    """Of figures that have no parts by image: an interval of two standard errors over seeds, NaN for one."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    mean, error = float(np.mean(values)), 2 * spread / len(values) ** 0.5
    return Estimate(mean, spread, mean - error, mean + error)


Runs = Sequence[Tensor]  # counts [N, 6, K] of each seed, of the same images


def estimate(runs: Runs, measure: Measure = "mIoU") -> Estimate:
    return _interval([runs], lambda own: own, measure)


def difference(runs: Runs, others: Runs, measure: Measure = "mIoU") -> Estimate:
    """Of two methods on the same images, which are drawn in pairs; of seeds, too, where both have as many."""
    return _interval([runs, others], lambda own, other: own - other, measure)


def share(runs: Runs, others: Runs) -> Estimate:
    """Of the mIoU of others, in percent; pairs as in :func:`difference`."""
    return _interval([runs, others], lambda own, other: 100 * own / other, "mIoU")


def _interval(methods: Sequence[Runs], combine: Callable[..., NDArray[np.float64]], measure: Measure) -> Estimate:
    """The mean over seeds of what a combination gives, over images that are drawn with replacement."""
    count = max(map(len, methods))
    paired = [[runs[i % len(runs)] for i in range(count)] for runs in methods]  # maps have no seeds

    def each(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        index = torch.from_numpy(drawn)
        return np.stack([combine(*(scores(runs[i][index], measure) for runs in paired)) for i in range(count)])

    images = np.arange(len(paired[0][0]))
    found = bootstrap(
        (images,),
        lambda drawn, axis: each(drawn).mean(0),
        n_resamples=RESAMPLES,
        batch=50,
        method="percentile",
        random_state=np.random.default_rng(0),  # rng of newer versions of scipy
    ).confidence_interval
    values = each(images)
    spread = float(np.std(values, ddof=1)) if count > 1 else float("nan")
    return Estimate(float(np.mean(values)), spread, float(found.low), float(found.high))


class Verdict(NamedTuple):
    """Of one statement.

    Attributes:
        statement: what the paper says, as it was tested.
        paper: its figures.
        found: ours.
        least: what the figure must reach; None where the figure must be at most ``most``.
        unit: of the figure.
        scenes: what it is on scenes, from docs/results.md.
        most: what it must not exceed.
    """

    statement: str
    paper: str
    found: Estimate | None
    least: float | None = None
    unit: str = "points"
    scenes: str = ""
    most: float | None = None

    @property
    def holds(self) -> str:
        """A statement holds if its figure does, and a difference if its interval leaves out 0 besides."""
        if self.found is None:
            return "not testable"
        if self.most is not None:
            return "holds" if self.found.value <= self.most else "does not hold"
        assert self.least is not None
        if self.found.value < self.least:
            return "does not hold"
        return "holds" if self.unit != "points" or self.found.low > 0 else "in the mean only"


class Outcome(NamedTuple):
    """What a claim's module returns: figures of each method, and what they say."""

    figures: dict[str, Estimate]
    verdicts: list[Verdict]
    about: str  # what was measured, on how many images, with how many seeds
