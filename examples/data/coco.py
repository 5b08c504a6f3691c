"""MS COCO, and other data sets in its format: classes, boxes, instances and semantic masks from one JSON file."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor
from torchvision import tv_tensors

from data.boxes import Annotation, check_boxes
from data.files import CUT, ImageFiles, check_folder, one_line, read_image, read_text
from data.sample import VOID, DataError, Sample

try:
    from pycocotools import mask as pycoco
except ModuleNotFoundError:  # an extra that only COCO needs
    pycoco = None

CROWDS, EMPTY = "crowds that became void", "objects without extent, which have no box"

Mask = NDArray[np.bool_]


class Region(NamedTuple):
    """An object, or a crowd of them."""

    label: int
    box: list[float]  # left, top, width, height
    crowd: bool
    mask: Mask


class Catalogue(NamedTuple):
    """What a JSON file of COCO says about all images."""

    classes: tuple[str, ...]  # the background first
    label_of: dict[int, int]  # of the categories
    images: list[dict[str, Any]]
    annotations: list[list[dict[str, Any]]]  # of each image
    categories: list[dict[str, Any]]


class COCO(ImageFiles):
    """The images of a split of COCO, in the order of their file names; needs pycocotools.

    Samples have ``"image"``; ``"labels"``, where smaller objects lie on larger ones, and void where only a crowd is;
    ``"instances"``, bool ``[n, H, W]``, ``"boxes"`` and ``"box_labels"`` without crowds; ``"tags"`` with them.

    Args:
        root: has ``annotations/instances_{split}.json`` and a folder of images that is called as the split. The classes
            are the background and the categories in the order of their numbers.
        split: such as ``"train2017"``.

    Raises:
        DataError: something is missing, the JSON file contradicts itself; when a sample is read, an image that cannot
            be read, or that has another size than the JSON file says, polygons or runs that are none.
    """

    def __init__(self, root: Path, split: str) -> None:
        if pycoco is None:
            raise DataError("pycocotools: expected it for COCO, found none: pip install pycocotools")
        for folder in (root, root / "annotations"):
            check_folder(folder)
        self._path = root / "annotations" / f"instances_{split}.json"
        self._catalogue = read_catalogue(self._path)
        check_folder(root / split)
        files = [root / split / entry["file_name"] for entry in self._catalogue.images]
        super().__init__(self._catalogue.classes, [file.stem for file in files], files)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.files[index])
        height, width = self._size(index)
        if image.shape[1:] != (height, width):
            got = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(f"{self.files[index]}: expected {width}x{height} as {self._path.name} says, got {got}")
        regions = self._regions(index)
        return {"image": image, **describe(self._path, self.classes, regions, height, width, self.oddities)} | {
            "labels": paint(regions, height, width)
        }

    def labels(self, index: int) -> Tensor:
        return paint(self._regions(index), *self._size(index))

    def _size(self, index: int) -> tuple[int, int]:
        entry = self._catalogue.images[index]
        return entry["height"], entry["width"]

    def _regions(self, index: int) -> list[Region]:
        regions = []
        for entry in self._catalogue.annotations[index]:
            where = f"{self._path}: annotation {entry.get('id')!r}"
            label = self._catalogue.label_of[entry["category_id"]]
            mask = rasterise(where, entry.get("segmentation"), *self._size(index))
            regions.append(Region(label, entry["bbox"], bool(entry.get("iscrowd", 0)), mask))
        return regions


def read_catalogue(path: Path) -> Catalogue:
    """What a JSON file says about the images, which it may have in any order.

    Raises:
        DataError: no file, no JSON, something is missing in it, a number or a file name of images twice, an annotation
            of an unknown image or category.
    """
    try:
        content = json.loads(read_text(path))
        categories = sorted(content["categories"], key=lambda entry: entry["id"])
        images = sorted(content["images"], key=lambda entry: entry["file_name"])
        for entry in images:
            if not all(type(entry[side]) is int and 0 < entry[side] < 1 << 16 for side in ("height", "width")):
                raise DataError(f"{path}: expected height and width of {entry['file_name']!r} in pixels")
        annotations: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in images}
        label_of = {entry["id"]: label for label, entry in enumerate(categories, 1)}
        classes = ("background", *(entry["name"] for entry in categories))
        if not all(isinstance(name, str) for name in classes):
            raise DataError(f"{path}: expected names of categories, got {classes}")
        _check_once(path, "category", [entry["id"] for entry in categories])
        _check_once(path, "category", classes)
        _check_once(path, "image", [entry["id"] for entry in images])
        _check_once(path, "image", [Path(entry["file_name"]).stem for entry in images])
        if not images or not 2 <= len(classes) <= VOID:
            got = f"{len(images)} images, {len(categories)} categories"
            raise DataError(f"{path}: expected images, and 1 to {VOID - 1} categories, got {got}")
        for entry in content["annotations"]:
            if entry["image_id"] not in annotations:
                raise DataError(f"{path}: annotation {entry.get('id')!r}: expected an image, got {entry['image_id']!r}")
            for part in entry.get("segments_info", [entry]):
                if part["id"] is None or part["category_id"] not in label_of:
                    raise DataError(f"{path}: expected a category, got {part['category_id']!r} in {entry['image_id']}")
                if not (len(part["bbox"]) == 4 and all(isinstance(value, int | float) for value in part["bbox"])):
                    raise DataError(f"{path}: expected a box of four numbers, got {part['bbox']!r}")
            annotations[entry["image_id"]].append(entry)
        return Catalogue(classes, label_of, images, [annotations[entry["id"]] for entry in images], categories)
    except DataError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__} {one_line(error)}"
        raise DataError(f"{path}: expected what COCO's JSON files hold, got: {reason}") from None


def rasterise(where: str, segmentation: Any, height: int, width: int) -> Mask:
    """The pixels of polygons or runs (RLE), as pycocotools draws them, ``[H, W]``.

    Raises:
        DataError: polygons of less than three points or of other things than numbers, runs that have not the size of
            the image.
    """
    try:
        if isinstance(segmentation, list):
            for polygon in segmentation:
                if len(polygon) < 6 or len(polygon) % 2 or not all(map(math.isfinite, polygon)):
                    raise DataError(f"{where}: expected polygons of three points or more, got {str(polygon)[:60]}")
            segmentation = pycoco.merge(pycoco.frPyObjects(segmentation, height, width))
        counts = segmentation["counts"]
        counts = counts if isinstance(counts, list) else _runs(counts)
        # pycocotools.mask.decode reads memory beyond runs that are too short, and NumPy 2 warns of it.
        if segmentation["size"] != [height, width] or min(counts) < 0 or sum(counts) != height * width:
            raise DataError(f"{where}: expected runs over {height}x{width} pixels, got {sum(counts)} pixels")
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: expected polygons or runs, got: {type(error).__name__} {one_line(error)}") from None


def _runs(text: str | bytes) -> list[int]:
    """Lengths of runs from COCO's letters, which hold five bits each of the difference to the last run but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in text.encode() if isinstance(text, str) else text:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs


def paint(regions: Sequence[Region], height: int, width: int) -> tv_tensors.Mask:
    """Labels ``[H, W]``: crowds are void, and smaller objects lie on larger ones."""
    labels = np.zeros((height, width), np.int64)
    for region in ordered(regions):
        labels[region.mask] = VOID if region.crowd else region.label
    return tv_tensors.Mask(torch.from_numpy(labels))


def ordered(regions: Sequence[Region]) -> list[Region]:
    """From the bottom to the top."""
    return sorted(regions, key=lambda region: (not region.crowd, -int(region.mask.sum())))


def describe(
    path: Path, classes: tuple[str, ...], regions: Sequence[Region], height: int, width: int, oddities: Counter[str]
) -> Sample:
    """Instances, boxes and tags of the regions of an image; what is odd is counted."""
    objects = [region for region in ordered(regions) if not region.crowd]
    masks = np.stack([region.mask for region in objects]) if objects else np.zeros((0, height, width), bool)
    extended = [region for region in objects if min(region.box[2:]) > 0]
    ends = [[left, top, left + wide, top + high] for left, top, wide, high in (region.box for region in extended)]
    named = [(classes[region.label], end) for region, end in zip(extended, ends, strict=True)]
    annotation = Annotation([math.nan] * 2, named, pixels=False)
    boxes, box_labels, cut = check_boxes(path, annotation, classes, height, width, first=0, slack=1)
    tags = torch.zeros(len(classes), dtype=torch.int64)
    tags[[0, *(region.label for region in regions)]] = 1
    oddities.update({CUT: cut, CROWDS: len(regions) - len(objects), EMPTY: len(objects) - len(extended)})
    instances = tv_tensors.Mask(torch.from_numpy(masks))
    return {"instances": instances, "boxes": boxes, "box_labels": box_labels, "tags": tags}


def _check_once(path: Path, what: str, values: Sequence[object]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise DataError(f"{path}: expected every {what} once, got {value!r} {count} times")
