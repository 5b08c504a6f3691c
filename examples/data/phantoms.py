"""Phantoms: volumes drawn from ellipsoids and tubes with textures, under noise and a bias field, as MRI has it.

A phantom depends on (version, split, seed, index) and its shape only, never on the order of access. It is drawn in
integers, and in floating-point sums, products and quotients of single voxels, with numpy's frozen ``RandomState``
streams: the same phantom has the same bits everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

VERSION = 1
CLASSES = ("background", "organ", "lesion", "vessel")
SPACING = (3.0, 1.0, 1.0)  # mm; slices are thick
SHAPE = (16, 40, 40)

Split = Literal["train", "val", "final"]
SPLITS: tuple[Split, ...] = ("train", "val", "final")

Voxels = NDArray[np.int64]
Mask = NDArray[np.bool_]
Positions = NDArray[np.float64]

# Brightness of 255: organs are grainy, lesions blotched, vessels plain. Bias field and noise hide the differences of
# the means from any threshold, and a decoy, a plain ellipsoid that is background, is about as bright as an organ.
LEVELS = {"background": 92, "organ": 126, "lesion": 168, "vessel": 52, "decoy": 112}
SPREAD = 10  # of the brightness of each object, to both sides
GRAIN, BLOTCHES, NOISE = 40, 22, 8  # standard deviations
BIAS = 25  # percent to both sides, at most


@dataclass(frozen=True)
class Phantom:
    """A volume of D x H x W voxels."""

    image: Tensor  # float32 [1, D, H, W], in [0, 1], multiples of 1/255
    labels: Tensor  # int64 [D, H, W], classes


class Phantoms(Dataset[Phantom]):
    """Volumes with up to one organ, three lesions, two vessels and one decoy, which is background.

    Args:
        split: ``"train"``, ``"val"`` or ``"final"``.
        count: number of phantoms.
        shape: depth, height and width in voxels of :data:`SPACING`, at least 8 each.
        seed: another seed gives other phantoms of the same split.
    """

    def __init__(self, split: Split, count: int, *, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if count < 0 or min(shape) < 8:
            raise ValueError(f"expected count >= 0 and a shape of at least 8, got count={count}, shape={shape}")
        self.split: Split = split
        self.count, self.shape, self.seed = count, shape, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Phantom]:
        return (self[i] for i in range(self.count))

    def __getitem__(self, index: int) -> Phantom:
        if not 0 <= index < self.count:
            raise IndexError(f"phantom {index} of {self.count}")
        entropy = [VERSION, SPLITS.index(self.split), self.seed, index]
        rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))
        steps = (np.arange(length, dtype=np.float64) * step for length, step in zip(self.shape, SPACING, strict=True))
        positions = np.stack(np.meshgrid(*steps, indexing="ij"))
        extent = np.array(self.shape) * SPACING
        image = _level(rng, "background") + _smooth(_noise(rng, self.shape, BLOTCHES), 2)
        labels = np.zeros(self.shape, np.int64)

        decoys = [_ellipsoid(rng, positions, extent, (15, 25)) for _ in range(rng.randint(2))]
        organs = [_ellipsoid(rng, positions, extent, (25, 38)) for _ in range(rng.randint(5) > 1)]
        lesions = [_ellipsoid(rng, positions, extent, (14, 22)) for _ in range(max(0, rng.randint(5) - 1))]
        vessels = [_tube(rng, positions, extent, (7, 11)) for _ in range(rng.randint(3))]
        for name, shapes in (("decoy", decoys), ("organ", organs), ("lesion", lesions), ("vessel", vessels)):
            for shape in shapes:
                image[shape] = _texture(rng, name, self.shape)[shape]
                labels[shape] = CLASSES.index(name) if name in CLASSES else 0

        image = _smooth(image, 1)  # voxels at an outline show both sides
        image = _bias(rng, positions, extent, image) + _noise(rng, self.shape, NOISE)
        return Phantom(image=torch.from_numpy(image.clip(0, 255)).float()[None] / 255, labels=torch.from_numpy(labels))


def _level(rng: np.random.RandomState, name: str) -> int:
    return LEVELS[name] + rng.randint(-SPREAD, SPREAD + 1)


def _texture(rng: np.random.RandomState, name: str, shape: tuple[int, ...]) -> Voxels:
    if name == "organ":
        return _level(rng, name) + _noise(rng, shape, GRAIN)
    if name == "lesion":
        return _level(rng, name) + _smooth(_noise(rng, shape, 4 * BLOTCHES), 1)
    return np.full(shape, _level(rng, name))


def _noise(rng: np.random.RandomState, shape: tuple[int, ...], deviation: int) -> Voxels:
    """Nearly normal numbers: sums of four uniform ones, whose bits do not depend on a logarithm."""
    width = 1000  # of uniform numbers, whose sum has a standard deviation of 1000 / sqrt(3)
    total = rng.randint(-width, width + 1, (4, *shape)).sum(0)
    return total * deviation * 866 // (width * 1000)


def _smooth(values: Voxels, radius: int) -> Voxels:
    """Means over a square of each slice, which go on at the other side."""
    for axis in (1, 2):
        shifted = [np.roll(values, step, axis) for step in range(-radius, radius + 1)]
        values = np.stack(shifted).sum(0) // len(shifted)
    return values


def _ellipsoid(
    rng: np.random.RandomState, positions: Positions, extent: NDArray[np.float64], percent: tuple[int, int]
) -> Mask:
    """An ellipsoid, turned at random, whose half axes are that many percent of the height of the volume."""
    centre = extent * rng.randint(20, 81, 3) / 100
    axes = extent[1] * rng.randint(percent[0], percent[1] + 1, 3) / 100
    offsets = positions - centre[:, None, None, None]
    return (
        sum(
            (sum(r * offset for r, offset in zip(row, offsets, strict=True)) / axis) ** 2
            for row, axis in zip(_rotation(rng), axes, strict=True)
        )
        <= 1
    )


def _rotation(rng: np.random.RandomState) -> NDArray[np.float64]:
    """The rotation of a random quaternion of integers, whose entries are fractions."""
    a, b, c, d = (int(value) for value in rng.randint(1, 20, 4) * (2 * rng.randint(2, size=4) - 1))
    rows = (
        (a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)),
        (2 * (b * c + a * d), a * a - b * b + c * c - d * d, 2 * (c * d - a * b)),
        (2 * (b * d - a * c), 2 * (c * d + a * b), a * a - b * b - c * c + d * d),
    )
    return np.array(rows) / (a * a + b * b + c * c + d * d)


def _tube(
    rng: np.random.RandomState, positions: Positions, extent: NDArray[np.float64], percent: tuple[int, int]
) -> Mask:
    """A tube along a parabola from one side of the volume to the other, its radius in percent of the height."""
    start, middle, end = (extent * rng.randint(0, 101, 3) / 100 for _ in range(3))
    axis = rng.randint(3)
    start[axis], end[axis] = 0, extent[axis]
    radius = extent[1] * rng.randint(percent[0], percent[1] + 1) / 100
    tube = np.zeros(positions.shape[1:], bool)
    for t in np.arange(65) / 64:
        point = (1 - t) * (1 - t) * start + 2 * t * (1 - t) * middle + t * t * end
        tube |= sum((place - own) ** 2 for place, own in zip(positions, point, strict=True)) <= radius * radius
    return tube


def _bias(rng: np.random.RandomState, positions: Positions, extent: NDArray[np.float64], image: Voxels) -> Voxels:
    """The image under a smooth field: brighter on one side, and in the middle or at the border."""
    places = 2 * positions / extent[:, None, None, None] - 1
    slopes, bow = rng.randint(-100, 101, 3), rng.randint(-100, 101)
    field = sum(slope * place for slope, place in zip(slopes, places, strict=True)) / 3
    field = field + bow * (sum(place * place for place in places) / 3 - 0.5)
    return (image * (100 + BIAS * field / 100) / 100).astype(np.int64)
