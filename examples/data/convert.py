"""Writes any data set in the layout of Pascal VOC 2012, image by image, so that a run goes on where one was stopped."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.files import ImageFiles
from data.sample import VOID, DataError, Sample, class_sizes, complete
from data.write_voc import annotation, indexed_png, jpeg, lines, partial, write_file, write_lists

RECORDS = "prepared.jsonl"  # the settings, and then what was found in each image that is done
UNWRITABLE = "[\0\ud800-\udfff]"  # the last are bytes of file names, and escapes of JSON, that are no text
AGAIN = "images that were no JPEG and became one, at quality 95"
DIFFERING = "images whose tags are not the classes of their masks"


class Record(NamedTuple):
    """What an image that is done holds."""

    name: str
    split: str
    height: int
    width: int
    tags: list[int]
    sizes: list[float] | None  # shares of the labelled pixels; zeros where all is void
    void: float  # share of all pixels
    boxes: int
    oddities: dict[str, int]


def convert(
    root: Path,
    splits: Mapping[str, ImageFiles],
    settings: Mapping[str, str],
    tags: Mapping[str, Tensor] | None = None,
) -> list[Record]:
    """Writes images, masks and boxes, then ``classes.txt``, ``sizes.csv``, ``tags.csv`` and, last and at once, lists.

    Images that are JPEG are copied as they are. Masks, boxes and tags are written where samples have them.

    Args:
        root: the folder that corresponds to ``VOC2012``; new, empty, or of an earlier run with the same settings, which
            goes on.
        splits: images by the name that their list gets, with masks, boxes or tags.
        settings: all that the images depend on.
        tags: of the images of each split, ``[N, K]``, in place of those that samples have or that follow from them.

    Raises:
        DataError: a folder in use or of other settings, splits that share an image or have other classes, a name that
            is more than a line; what the samples raise.
        OSError: a file cannot be written.
    """
    names = [name for data in splits.values() for name in data.names]
    (first, *_), classes = splits, next(iter(splits.values())).classes
    for split, data in splits.items():
        if data.classes != classes:
            wanted, got = (", ".join(own) for own in (classes, data.classes))
            raise DataError(f"{split}: expected the classes of {first}, {wanted}, got {got}")
    for name in (*classes, *names):
        if name != name.strip() or name.splitlines() != [name] or re.search(UNWRITABLE, name):
            raise DataError(f"{' and '.join(splits)}: expected names that a list can hold, got {name!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{' and '.join(splits)}: expected lists without a common image, got {twice} in both")
    done = _enter(root, settings, len(classes), set(splits))
    with (
        (root / RECORDS).open("a", encoding="utf-8") as file,
        tqdm(total=len(names), initial=sum(name in done for name in names), desc="images", unit="image") as bar,
    ):
        for record in _each(root, splits, tags or {}, done):
            file.write(json.dumps(record._asdict()) + "\n")
            file.flush()
            done[record.name] = record
            bar.update()
    records = [done[name] for name in names]
    if not (root / "ImageSets").is_dir():
        _finish(root, classes, records, list(splits))
    return records


def _enter(root: Path, settings: Mapping[str, str], classes: int, splits: Set[str]) -> dict[str, Record]:
    """Makes the folder ready; returns what is done, by name."""
    path, wanted = root / RECORDS, json.dumps(dict(settings))
    if not os.path.isfile(path):
        if root.exists() and not (root.is_dir() and {own.name for own in root.iterdir()} <= {partial(path).name}):
            raise DataError(f"{root}: expected a new or an empty folder, or one of an earlier run, got another")
        root.mkdir(parents=True, exist_ok=True)
        write_file(path, lines([wanted]))
        return {}
    try:
        first, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if json.loads(first) != dict(settings):
            raise DataError(f"{root}: expected the folder of a run with {wanted}, got one with {first.strip()}")
        whole = [row for row in rows if row.endswith("\n")]  # a killed run may leave half of one
        done = {record.name: record for record in (_record(row, classes, splits) for row in whole)}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected the file of an earlier run, got another: {error}") from None
    write_file(path, "".join([first, *whole]).encode())
    return done


def _record(row: str, classes: int, splits: Set[str]) -> Record:
    """What a line says; ``ValueError`` or ``TypeError`` where no run has written it."""
    record = Record(**json.loads(row))
    numbers = (record.height, record.width, record.boxes, *record.tags, *record.oddities.values())
    shares = (record.void, *(record.sizes or [0.0] * classes))
    right = (
        isinstance(record.name, str)
        and record.split in splits
        and all(type(number) is int and number >= 0 for number in numbers)
        and all(type(share) is float and 0 <= share <= 1 for share in shares)
        and len(record.tags) == len(shares) - 1 == classes
    )
    if not right:
        raise ValueError(f"line {row.strip()[:60]}...")
    return record


def _each(
    root: Path, splits: Mapping[str, ImageFiles], tags: Mapping[str, Tensor], done: Mapping[str, Record]
) -> Iterator[Record]:
    for split, data in splits.items():
        for index, name in enumerate(data.names):
            if name not in done:
                before = data.oddities.copy()
                sample = data[index] | ({"tags": tags[split][index]} if split in tags else {})
                found = data.oddities - before
                found[AGAIN] += _write(root, name, data.files[index], data.classes, sample)
                if "tags" in sample and "labels" in sample:
                    shown = class_sizes(sample["labels"], len(data.classes)) > 0
                    found[DIFFERING] += int(((sample["tags"] > 0) != shown)[1:].any())
                sample = complete(sample, len(data.classes))
                yield _describe(name, split, sample, {what: count for what, count in found.items() if count})


def _write(root: Path, name: str, file: Path, classes: tuple[str, ...], sample: Sample) -> bool:
    """Writes the files of an image; whether it had to be compressed again."""
    content = file.read_bytes()
    again = not content.startswith(b"\xff\xd8\xff")
    if again:
        pixels = (sample["image"].as_subclass(Tensor) * 255).round().byte()
        content = jpeg(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    _put(root / "JPEGImages" / f"{name}.jpg", content)
    if "labels" in sample:
        _put(root / "SegmentationClass" / f"{name}.png", indexed_png(sample["labels"].as_subclass(Tensor)))
    if "instances" in sample:
        labels, masks = sample["labels"].as_subclass(Tensor), sample["instances"].as_subclass(Tensor)
        if len(masks) >= VOID:
            raise DataError(f"{name}: expected at most {VOID - 1} objects in an image, got {len(masks)}")
        objects = torch.where(labels == VOID, VOID, 0)
        for number, mask in enumerate(masks, start=1):
            objects[mask] = number
        _put(root / "SegmentationObject" / f"{name}.png", indexed_png(objects))
    if "boxes" in sample:
        names = [classes[label] for label in sample["box_labels"].tolist()]
        size, boxes = sample["image"].shape[1:], sample["boxes"].tolist()
        content = annotation(root.resolve().name, name, size, boxes, names, "prepared")
        _put(root / "Annotations" / f"{name}.xml", content)
    return again


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    write_file(path, content)


def _describe(name: str, split: str, sample: Sample, oddities: dict[str, int]) -> Record:
    _, height, width = sample["image"].shape
    labels = sample.get("labels")
    return Record(
        name=name,
        split=split,
        height=height,
        width=width,
        tags=sample["tags"].tolist(),
        sizes=sample["sizes"].tolist() if "sizes" in sample else None,
        void=0.0 if labels is None else float((labels == VOID).float().mean()),
        boxes=len(sample.get("boxes", ())),
        oddities=oddities,
    )


def _finish(root: Path, classes: tuple[str, ...], records: list[Record], splits: list[str]) -> None:
    sizes = [(record.name, record.sizes) for record in records if record.sizes and sum(record.sizes)]
    tags = [(record.name, record.tags) for record in records]
    write_file(root / "classes.txt", lines(classes))
    for file, rows in (("sizes.csv", sizes), ("tags.csv", tags)):
        if rows:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["name", *classes])
            writer.writerows([name, *(f"{value:.9g}" for value in row)] for name, row in rows)
            write_file(root / file, text.getvalue().encode())
    by_split = {split: {record.name: record.tags for record in records if record.split == split} for split in splits}
    write_lists(root, classes, by_split)
