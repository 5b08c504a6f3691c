"""What a data set gives: samples, one image each with what is known about it, and batches of them."""

from collections.abc import Sequence
from typing import Any

import torch
from engine import processes
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

import segloss

VOID = 255  # label of the pixels whose class is not known

# "image" (tv_tensors.Image, float32 [3, H, W], RGB in [0, 1]); maps of its pixels, such as "labels", int64 [H, W]
# (tv_tensors.Mask); "boxes", float32 [n, 4], x1, y1, x2, y2 in pixels, far ends exclusive (tv_tensors.BoundingBoxes)
# with "box_labels", int64 [n]. Any other entry, such as sizes from a list, is known of the whole image only.
Sample = dict[str, Tensor]

Batch = dict[str, Any]  # the entries of B samples, stacked; boxes and box labels, which vary in number, are lists
RAGGED = ("boxes", "box_labels")


class DataError(ValueError):
    """A file of a data set that is missing, cannot be read or contradicts another; the message is one line."""


class Images(Dataset[Sample]):
    """Images with annotations.

    Attributes:
        names: of the images, without file endings; no two are the same.
        classes: names of the classes, the background being class 0.
    """

    names: Sequence[str]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def labels(self, index: int) -> Tensor:
        """Labels of an image, int64 ``[H, W]``."""
        return self[index]["labels"]

    def sizes(self) -> Tensor:
        """Shares of the classes in the labelled pixels of each whole image, ``[N, K]``."""
        rows = [
            class_sizes(self.labels(i), len(self.classes))
            for i in tqdm(range(len(self)), "sizes", delay=2, disable=processes.rank() > 0)
        ]
        return torch.stack(rows)


class Stacked(Images):
    """Images of one size that lie in memory, and what is known about them.

    Args:
        classes: names of the classes.
        image: ``[N, 3, H, W]``, RGB in [0, 1].
        labels: ``[N, H, W]``.
        prefix: of the names, which are numbers otherwise.
        known: further entries of the samples, one row per image.
    """

    def __init__(
        self, classes: tuple[str, ...], image: Tensor, labels: Tensor, prefix: str = "", **known: Tensor
    ) -> None:
        self.classes = classes
        self.names = [f"{prefix}{i:06d}" for i in range(len(image))]
        self._image, self._labels, self._known = image, labels, known

    def __getitem__(self, index: int) -> Sample:
        return {
            "image": tv_tensors.Image(self._image[index]),
            "labels": tv_tensors.Mask(self._labels[index]),
            **{name: values[index] for name, values in self._known.items()},
        }


class Annotated(Images):
    """A data set whose samples get further entries, known of the whole image.

    Args:
        data: the data set.
        known: the entries, one row per image.
    """

    def __init__(self, data: Images, **known: Tensor) -> None:
        for name, rows in known.items():
            if len(rows) != len(data):
                raise ValueError(f"{name}: expected a row for each of {len(data)} images, got {len(rows)}")
        self.classes, self.names = data.classes, data.names
        self.labels = data.labels  # type: ignore[method-assign]
        self._data, self._known = data, known

    def __getitem__(self, index: int) -> Sample:
        return self._data[index] | {name: values[index] for name, values in self._known.items()}


def class_sizes(labels: Tensor, classes: int) -> Tensor:
    """Shares of the classes in the labelled pixels of one image, ``[K]``; zeros if all of them are void."""
    sizes: Tensor = segloss.sizes_from_labels(labels.as_subclass(Tensor)[None], classes, ignore_index=VOID)[0]
    return sizes


def object_error(sizes: Tensor, exact: Tensor) -> float:
    """Mean relative error of the sizes of objects, over all images and the classes there, without the background.

    The background, large and so easily told, would hide the errors of the objects. NaN without objects.

    Args:
        sizes: of the classes as they are told, ``[N, K]``.
        exact: those of the masks, ``[N, K]``.
    """
    sizes, exact = sizes[:, 1:], exact[:, 1:]
    present = exact > 0
    return float(((sizes - exact).abs()[present] / exact[present]).mean())


def complete(sample: Sample, classes: int) -> Sample:
    """Adds what follows from the maps and boxes of a sample, after it was cropped.

    ``"valid"``, bool [H, W], is False on padding. ``"tags"``, int64 [K], are the classes of the labels, void aside; for
    want of labels those of the boxes and the background, which a crop may have left without a pixel; for want of boxes
    those with a size. ``"sizes"``, float32 [K], are shares of the labelled pixels. Tags and sizes from lists of whole
    images, which a sample has already, stay.
    """
    sample = dict(sample)
    if "valid" not in sample:
        sample["valid"] = tv_tensors.Mask(torch.ones(sample["image"].shape[1:], dtype=torch.bool))
    if "labels" in sample:
        sizes = class_sizes(sample["labels"], classes)
        sample.setdefault("sizes", sizes)
        sample.setdefault("tags", (sizes > 0).long())
    elif "box_labels" in sample and "tags" not in sample:
        sample["tags"] = torch.zeros(classes, dtype=torch.int64)
        sample["tags"][torch.cat([torch.zeros(1, dtype=torch.int64), sample["box_labels"]])] = 1
    elif "sizes" in sample:
        sample.setdefault("tags", (sample["sizes"] > 0).long())
    return sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks samples of one size; what varies in number stays a list."""
    return {
        name: [sample[name].as_subclass(Tensor) for sample in samples]
        if name in RAGGED
        else torch.stack([sample[name].as_subclass(Tensor) for sample in samples])
        for name in samples[0]
    }


def first(images: Images, count: int) -> Batch:
    """The first images of a data set, or all of fewer, in a batch."""
    return collate([images[i] for i in range(min(count, len(images)))])
