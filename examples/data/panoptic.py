"""The panoptic masks of MS COCO: segments by number in the colours of a PNG, things and stuff."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from data.coco import Mask, Region, describe, read_catalogue
from data.files import ImageFiles, check_file, check_folder, opened, read_image
from data.sample import VOID, DataError, Sample


class Panoptic(ImageFiles):
    """The images of a split of COCO with panoptic masks. Things are the classes, and stuff is the background.

    Samples are those of :class:`data.coco.COCO`; pixels without a segment are void.

    Args:
        root: has ``annotations/panoptic_{split}.json``, a folder of masks ``annotations/panoptic_{split}`` or
            ``panoptic_{split}``, and a folder of images that is called as the split.
        split: such as ``"train2017"``.

    Raises:
        DataError: something is missing, the JSON file contradicts itself, an image without mask; when a sample is read,
            a file that cannot be read, another size than the JSON file says, a segment without pixels, a pixel of an
            unknown segment.
    """

    def __init__(self, root: Path, split: str) -> None:
        for folder in (root, root / "annotations"):
            check_folder(folder)
        self._path = root / "annotations" / f"panoptic_{split}.json"
        catalogue = read_catalogue(self._path)
        things = [entry for entry in catalogue.categories if entry.get("isthing", 1)]
        if not things:
            raise DataError(f"{self._path}: expected categories that are things, got none")
        self._label_of = {entry["id"]: label for label, entry in enumerate(things, 1)}
        masks = next(
            (folder for folder in (root / "annotations", root) if os.path.isdir(folder / f"panoptic_{split}")), root
        )
        for folder in (root / split, masks / f"panoptic_{split}"):
            check_folder(folder)
        files = [root / split / entry["file_name"] for entry in catalogue.images]
        for file, found in zip(files, catalogue.annotations, strict=True):
            if len(found) != 1 or not isinstance(found[0].get("file_name"), str):
                raise DataError(f"{self._path}: expected one annotation with a mask of {file.name}, got {len(found)}")
        self._segments: list[list[dict[str, Any]]] = [
            found[0].get("segments_info", []) for found in catalogue.annotations
        ]
        for segment in itertools.chain(*self._segments):
            if type(segment["id"]) is not int:
                raise DataError(f"{self._path}: expected numbers of segments, got {segment['id']!r}")
        self._extents = [(entry["height"], entry["width"]) for entry in catalogue.images]
        super().__init__(
            ("background", *(entry["name"] for entry in things)),
            [file.stem for file in files],
            files,
        )
        self._maps = [masks / f"panoptic_{split}" / found[0]["file_name"] for found in catalogue.annotations]
        for mask in self._maps:
            check_file(mask, "a mask")

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.files[index])
        labels, regions = self._read(index)
        if image.shape[1:] != labels.shape:
            got = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(f"{self.files[index]}: expected the size of its mask, {list(labels.shape)}, got {got}")
        height, width = labels.shape
        known = describe(self._path, self.classes, regions, height, width, self.oddities)
        return {"image": image, "labels": labels, **known}

    def labels(self, index: int) -> Tensor:
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[tv_tensors.Mask, list[Region]]:
        """Labels, and the regions of things."""
        path = self._maps[index]
        with opened(path, "a PNG mask", ("PNG",)) as image:
            if image.mode != "RGB":
                raise DataError(f"{path}: expected the numbers of segments in RGB, got mode {image.mode}")
            numbers = np.asarray(image, np.int64) @ np.array([1, 1 << 8, 1 << 16])
        if numbers.shape != self._extents[index]:
            raise DataError(
                f"{path}: expected {list(self._extents[index])} as {self._path.name}, got {list(numbers.shape)}"
            )
        labels = np.full(numbers.shape, VOID)
        free: Mask = numbers != 0
        regions = []
        for segment in self._segments[index]:
            mask = numbers == segment["id"]
            if not mask.any():
                raise DataError(f"{path}: expected pixels of segment {segment['id']}, found none")
            label, crowd = self._label_of.get(segment["category_id"], 0), bool(segment.get("iscrowd", 0))
            labels[mask] = VOID if crowd else label
            free &= ~mask
            if label:
                regions.append(Region(label, segment["bbox"], crowd, mask))
        if free.any():
            raise DataError(f"{path}: expected segments that {self._path.name} names, got {numbers[free][0]}")
        return tv_tensors.Mask(torch.from_numpy(labels)), regions
