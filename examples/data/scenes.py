"""Scenes drawn from real pixels: photographs behind, handwritten digits as shapes, textures as what a class looks like.

Everything comes from files inside the scikit-image and scikit-learn wheels, so nothing is downloaded, and every
kind of annotation is exact. A scene depends on (version, split, seed, index) and the options only, never on the order
of access. All drawing is done in 8-bit integers with numpy's frozen ``RandomState`` streams, so that the same scene
has the same bits everywhere, but for Pillow: since release 13 it rounds some pixels of resized pictures otherwise, by 1
or 2 of 255.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation
from torch import Tensor
from torch.utils.data import Dataset

VERSION = 1
VOID = 255
CLASSES = ("background", "brick", "grass", "gravel", "tissue")
NUM_CLASSES = len(CLASSES)

Split = Literal["train", "val", "final"]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

# Shares of every picture (along its longer side) and of the digit samples that belong to each split.
SPLITS: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "val": (0.6, 0.8), "final": (0.8, 1.0)}

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "china.jpg",
    "flower.jpg",
)
TEXTURES = ("brick.png", "grass.png", "gravel.png", "ihc.png")
TINTS = ((250, 130, 95), (130, 225, 80), (150, 190, 240), (256, 170, 256))  # RGB gains of the classes, of 256
COMPANIONS = ("coins.png", "retina.jpg", "hubble_deep_field.jpg", "page.png")  # the ground that goes with each class
PLAIN = "moon.png"  # the fill that classes can share

SHAPE_THRESHOLD = 45  # ink of a digit, 0 to 240, that counts as inside
PART_SHARE = 0.3  # of an object's pixels, at one of its four ends
MIN_VISIBLE = 0.5  # of an object's own pixels; what is hidden more is left out of the scene


@dataclass(frozen=True)
class Scene:
    """One image of H x W pixels with n visible objects and K classes, class 0 being the background."""

    image: Tensor  # float32 [3, H, W], RGB in [0, 1]
    labels: Tensor  # int64 [H, W], classes, 255 on void borders
    tags: Tensor  # int64 [K], 1 where the class is present
    sizes: Tensor  # float32 [K], share of the pixels that are not void; sums to 1
    boxes: Tensor  # float32 [n, 4], x1, y1, x2, y2 in pixels, tight around the visible pixels, far ends exclusive
    box_labels: Tensor  # int64 [n], classes of the boxes
    instances: Tensor  # bool [n, H, W], visible pixels
    parts: Tensor  # int64 [H, W], 1 on the discriminative part of an object, 2 on its remainder, 0 elsewhere
    companions: Tensor  # int64 [H, W], c where the background is the ground that goes with class c, 0 elsewhere


@dataclass(frozen=True)
class Batch:
    """Scenes of one size, stacked; what varies in number stays a list."""

    image: Tensor
    labels: Tensor
    tags: Tensor
    sizes: Tensor
    boxes: list[Tensor]
    box_labels: list[Tensor]
    instances: list[Tensor]
    parts: Tensor
    companions: Tensor


def stack(scenes: Iterable[Scene]) -> Batch:
    """Stacks scenes, a whole :class:`Scenes` included; the ``collate_fn`` of a data loader."""
    scenes = list(scenes)
    return Batch(
        image=torch.stack([s.image for s in scenes]),
        labels=torch.stack([s.labels for s in scenes]),
        tags=torch.stack([s.tags for s in scenes]),
        sizes=torch.stack([s.sizes for s in scenes]),
        boxes=[s.boxes for s in scenes],
        box_labels=[s.box_labels for s in scenes],
        instances=[s.instances for s in scenes],
        parts=torch.stack([s.parts for s in scenes]),
        companions=torch.stack([s.companions for s in scenes]),
    )


class Scenes(Dataset[Scene]):
    """Scenes of one to three objects on photographs.

    Args:
        split: ``"train"``, ``"val"`` or ``"final"``; they share no digit sample and no region of any picture.
        count: number of scenes.
        size: height and width in pixels, at least 32.
        seed: another seed gives other scenes of the same split.
        plain: how much of the remainder of an object, outside its discriminative part, is a plain fill shared by
            all classes: 0 leaves the class's texture everywhere, 1 leaves it in the part only.
        cooccurrence: probability that an object stands on the ground that goes with its class. The ground is
            background, but easily taken for the class.
        out_of_distribution: scenes without objects, each with the ground of a random class.
        void_width: pixels of background around objects that are labelled 255.
    """

    def __init__(
        self,
        split: Split,
        count: int,
        *,
        size: int = 64,
        seed: int = 0,
        plain: float = 0.0,
        cooccurrence: float = 0.0,
        out_of_distribution: bool = False,
        void_width: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if count < 0 or size < 32 or void_width < 0:
            raise ValueError(
                "expected count >= 0, size >= 32 and void_width >= 0, "
                f"got count={count}, size={size}, void_width={void_width}"
            )
        if not (0 <= plain <= 1 and 0 <= cooccurrence <= 1):
            raise ValueError(f"expected shares in [0, 1], got plain={plain}, cooccurrence={cooccurrence}")
        self.split: Split = split
        self.count = count
        self.size = size
        self.seed = seed
        self.plain = plain
        self.cooccurrence = cooccurrence
        self.out_of_distribution = out_of_distribution
        self.void_width = void_width

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(self.count))

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        size = self.size
        # What an option adds has its own stream, so that the rest of the scene is the same with and without it.
        rng, extra = (self._stream(index, purpose) for purpose in (0, 1))
        image = _window(rng, PHOTOGRAPHS[rng.randint(len(PHOTOGRAPHS))], self.split, size, size, zoom=(40, 100))
        labels = np.zeros((size, size), np.uint8)
        parts = np.zeros((size, size), np.uint8)
        companions = np.zeros((size, size), np.uint8)
        masks: list[Mask] = []
        classes: list[int] = []

        if self.out_of_distribution:
            self._lay_ground(extra, image, companions, extra.randint(1, NUM_CLASSES), top=extra.randint(size // 2))
        count = 0 if self.out_of_distribution else rng.randint(1, 4)
        objects = [self._object(rng, extra) for _ in range(count)]
        for label, shape, _, _ in objects:
            if extra.random_sample() < self.cooccurrence:
                self._lay_ground(extra, image, companions, label, top=int(np.flatnonzero(shape.any(1)).mean()))
        for label, shape, part, fill in objects:  # from front to back
            visible = shape & (labels == 0)
            if visible.sum() < MIN_VISIBLE * shape.sum():
                continue
            image[visible] = fill[visible]
            labels[visible] = label
            parts[visible] = np.where(part, 1, 2)[visible]
            companions[visible] = 0
            masks.append(visible)
            classes.append(label)

        counts = np.bincount(labels.ravel(), minlength=NUM_CLASSES)
        if self.void_width:
            ring = binary_dilation(labels > 0, np.ones((3, 3)), iterations=self.void_width) & (labels == 0)
            counts[0] -= ring.sum()
            labels[ring] = VOID
        instances = np.stack(masks) if masks else np.zeros((0, size, size), bool)
        return Scene(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous().float() / 255,
            labels=torch.from_numpy(labels).long(),
            tags=torch.from_numpy(counts > 0).long(),
            sizes=torch.from_numpy(counts / counts.sum()).float(),
            boxes=torch.tensor([_box(mask) for mask in masks], dtype=torch.float32).reshape(-1, 4),
            box_labels=torch.tensor(classes, dtype=torch.int64),
            instances=torch.from_numpy(instances),
            parts=torch.from_numpy(parts).long(),
            companions=torch.from_numpy(companions).long(),
        )

    def _stream(self, index: int, purpose: int) -> np.random.RandomState:
        entropy = [VERSION, list(SPLITS).index(self.split), self.seed, index, purpose]
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))

    def _object(self, rng: np.random.RandomState, extra: np.random.RandomState) -> tuple[int, Mask, Mask, Pixels]:
        """A class, the pixels of the object, those of its discriminative part, and its colours [H, W, 3]."""
        size = self.size
        label = rng.randint(1, NUM_CLASSES)
        digits = _digits(self.split)
        height, width = rng.randint(size // 2, size * 4 // 5, 2)
        ink = np.asarray(Image.fromarray(digits[rng.randint(len(digits))]).resize((width, height), _BICUBIC))
        top, left = rng.randint(size - height + 1), rng.randint(size - width + 1)
        box = np.s_[top : top + height, left : left + width]
        shape = np.zeros((size, size), bool)
        shape[box] = ink >= SHAPE_THRESHOLD

        part = np.zeros_like(shape)
        part[box] = _end(shape[box], rng.randint(4))
        fill = np.zeros((size, size, 3), np.uint8)
        fill[box] = self._texture(rng, label, height, width)
        if self.plain:
            weight = round(self.plain * 256)
            shared = _window(extra, PLAIN, self.split, height, width, zoom=(30, 70)).astype(np.int32)
            mixed = (fill[box] * (256 - weight) + shared * weight) // 256
            fill[box] = np.where(part[box][..., None], fill[box], mixed)
        return label, shape, part, fill

    def _texture(self, rng: np.random.RandomState, label: int, height: int, width: int) -> Pixels:
        """The class's texture, with its tint, under a brightness and a tint of the object's own."""
        texture = _window(rng, TEXTURES[label - 1], self.split, height, width, zoom=(60, 100))
        gains = np.array(TINTS[label - 1]) * rng.randint(230, 283, 3) // 256 * rng.randint(205, 320) // 256
        return np.minimum(texture * gains // 256, 255).astype(np.uint8)

    def _lay_ground(self, rng: np.random.RandomState, image: Pixels, companions: Pixels, label: int, top: int) -> None:
        """Covers a band across the image, from row ``top`` down, with the ground that goes with a class."""
        rows = np.s_[top : top + rng.randint(self.size // 4, self.size // 2)]
        height = image[rows].shape[0]
        image[rows] = _window(rng, COMPANIONS[label - 1], self.split, height, self.size, zoom=(60, 100))
        companions[rows] = label


_BICUBIC = Image.Resampling.BICUBIC


def bundled_file(name: str) -> Path:
    """Path of a picture that scikit-image or scikit-learn brings along."""
    folders = (_package("skimage") / "data", _package("sklearn") / "datasets" / "images")
    return next(folder / name for folder in folders if (folder / name).is_file())


def _package(name: str) -> Path:
    """Folder of a package that is read, but not imported: scikit-learn takes as long to import as half of torch."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.origin).parent


@cache
def _digits(split: Split) -> Pixels:
    """Handwritten digits cropped to 8 x 8, 0 to 240."""
    start, stop = SPLITS[split]
    images = np.loadtxt(_package("sklearn") / "datasets/data/digits.csv.gz", delimiter=",")[:, :-1].reshape(-1, 8, 8)
    return (images[int(start * len(images)) : int(stop * len(images))] * 15).astype(np.uint8)


@cache
def _region(name: str, split: Split) -> Image.Image:
    """The part of a bundled picture that belongs to a split, RGB."""
    with Image.open(bundled_file(name)) as file:
        picture = file.convert("RGB")
    if name == "retina.jpg":  # without its black corners
        picture = picture.crop((300, 300, 1100, 1100))
    start, stop = SPLITS[split]
    width, height = picture.size
    if width >= height:
        return picture.crop((int(start * width), 0, int(stop * width), height))
    return picture.crop((0, int(start * height), width, int(stop * height)))


def _window(
    rng: np.random.RandomState, name: str, split: Split, height: int, width: int, zoom: tuple[int, int]
) -> Pixels:
    """A random window of a picture [height, width, 3], ``zoom`` percent of the picture large."""
    region = _region(name, split)
    longer = min(region.size) * rng.randint(zoom[0], zoom[1] + 1) // 100
    w, h = longer * width // max(height, width), longer * height // max(height, width)
    x, y = rng.randint(region.width - w + 1), rng.randint(region.height - h + 1)
    window = region.resize((width, height), Image.Resampling.BOX, box=(x, y, x + w, y + h))
    return np.array(window if rng.randint(2) else window.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def _end(shape: Mask, side: int) -> Mask:
    """The pixels of a shape next to its top, right, bottom or left end, about PART_SHARE of them."""
    turned = np.rot90(shape, side)
    rows = turned.sum(1).cumsum()
    part = turned & (rows <= max(rows[-1] * PART_SHARE, rows[rows > 0][0]))[:, None]
    return np.rot90(part, -side)


def _box(mask: Mask) -> tuple[int, int, int, int]:
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return x[0], y[0], x[-1] + 1, y[-1] + 1
