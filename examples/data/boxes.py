"""Boxes as the tools that people draw them with write them: VOC, labelImg and VoTT (XML), LabelMe and VoTT (JSON)."""

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor
from torchvision import tv_tensors

from data.sample import DataError

ENDS = ("xmin", "ymin", "xmax", "ymax")


class Annotation(NamedTuple):
    """What a file says about an image."""

    size: list[float]  # width and height; NaN where it does not say them
    boxes: list[tuple[str, list[float]]]  # names of objects and their ends: left, top, right, bottom
    pixels: bool  # whether ends are numbers of pixels, far ends inclusive, rather than distances from the corner


def read_boxes(
    path: Path, classes: tuple[str, ...], height: int, width: int, *, image: str = "", first: int = 1, slack: float = 0
) -> tuple[tv_tensors.BoundingBoxes, Tensor, int]:
    """Boxes of all objects of an image, and their classes, from an annotation.

    VOC counts pixels from 1, far ends inclusive: ``xmin`` 1 and ``xmax`` 500 are the whole width of an image of 500
    pixels, here 0 and 500; a few of its coordinates are fractions. Other tools write the same XML and count from 0, or
    draw a pixel beyond the border. LabelMe's JSON and VoTT's have distances from the corner of the image instead.

    Args:
        path: an XML file, whose parts of objects, which have boxes of their own, are left out; a JSON file of LabelMe,
            or VoTT's export of all images.
        classes: names of the classes, the background first.
        height: of the image.
        width: of the image.
        image: its file name, for VoTT's export.
        first: number of the first row and column in XML files, 0 or 1.
        slack: how far a box may be beyond the image, in pixels; it is cut off there.

    Returns:
        ``[n, 4]``, float32, x1, y1, x2, y2, far ends exclusive; ``[n]``, int64; how many boxes were cut off.

    Raises:
        DataError: no such file, an object without name or box, an unknown name, a coordinate that is no number, an
            empty box, one beyond the image, an annotation of an image of another size.
    """
    annotation = _read_json(path, image) if path.suffix.lower() == ".json" else _read_xml(path)
    return check_boxes(path, annotation, classes, height, width, first=first, slack=slack)


def check_boxes(
    path: Path, annotation: Annotation, classes: tuple[str, ...], height: int, width: int, *, first: int, slack: float
) -> tuple[tv_tensors.BoundingBoxes, Tensor, int]:
    """What :func:`read_boxes` returns, from what a file says; it raises the same errors."""
    for side, said, found in zip(("width", "height"), annotation.size, (width, height), strict=True):
        if said > 0 and said != found:  # labelImg writes 0 where it does not know the size
            raise DataError(f"{path}: expected boxes in an image of {side} {found}, got {side} {said:g}")
    near, far = (first, first - 1) if annotation.pixels else (0, 0)  # what is subtracted from near and from far ends
    boxes, labels, cut = [], [], 0
    for name, ends in annotation.boxes:
        if name not in classes[1:]:
            raise DataError(f"{path}: expected objects called {', '.join(classes[1:])}, got {name!r}")
        exact = [ends[0] - near, ends[1] - near, ends[2] - far, ends[3] - far]
        box = [min(max(end, 0), side) for end, side in zip(exact, (width, height) * 2, strict=True)]
        within = all(abs(end - inside) <= slack for end, inside in zip(exact, box, strict=True))  # not for NaN
        if not (within and box[0] < box[2] and box[1] < box[3]):
            got = ", ".join(f"{end} {value:g}" for end, value in zip(ENDS, ends, strict=True))
            limits = f"x {near} to {width + far} and y {near} to {height + far}"
            raise DataError(f"{path}: expected a box within {limits} for {name}, got {got}")
        boxes.append(box)
        labels.append(classes.index(name))
        cut += box != exact
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return (
        tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        torch.tensor(labels, dtype=torch.int64),
        cut,
    )


def _read_xml(path: Path) -> Annotation:
    try:
        annotation = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:  # the last two: unknown encodings
        raise DataError(f"{path}: expected an XML file that can be read, got: {error}") from None
    if annotation.tag != "annotation":  # another tool's file would be one without objects
        raise DataError(f"{path}: expected XML as VOC has it, in <annotation>, got <{annotation.tag}>")
    return Annotation(
        size=[_number(annotation.findtext(f"size/{side}")) for side in ("width", "height")],
        boxes=[
            (item.findtext("name", "").strip(), [_number(item.findtext(f"bndbox/{end}")) for end in ENDS])
            for item in annotation.iterfind("object")
        ],
        pixels=True,
    )


def _read_json(path: Path, image: str) -> Annotation:
    content = _load(path, path.stat().st_mtime_ns if os.path.isfile(path) else 0)
    try:
        if "assets" in content:
            return _vott(path, content, image)
        shapes = content["shapes"]
        for shape in shapes:
            if (kind := shape.get("shape_type", "polygon")) not in ("rectangle", "polygon"):
                raise DataError(f"{path}: expected shapes that are rectangles or polygons, got {kind!r}")
        return Annotation(
            size=[_number(content.get(f"image{side}")) for side in ("Width", "Height")],
            boxes=[(str(shape["label"]), _around(shape["points"])) for shape in shapes],
            pixels=False,
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected what LabelMe or VoTT writes, got: {type(error).__name__} {error}") from None


@lru_cache(maxsize=2)
def _load(path: Path, _: int) -> Any:
    """What a JSON file holds; VoTT's export, which is asked for every image, is read once."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON file that can be read, got: {error}") from None


def _vott(path: Path, content: Any, image: str) -> Annotation:
    found = [entry for entry in content["assets"].values() if entry["asset"]["name"] == image]
    if len(found) != 1:
        raise DataError(f"{path}: expected one asset called {image}, got {len(found)}")
    size = found[0]["asset"].get("size", {})
    boxes = []
    for region in found[0]["regions"]:
        if len(region["tags"]) != 1:
            raise DataError(f"{path}: expected one tag for each region of {image}, got {region['tags']}")
        around = _around([[point["x"], point["y"]] for point in region["points"]])
        boxes.append((str(region["tags"][0]), around))
    return Annotation([_number(size.get(side)) for side in ("width", "height")], boxes, pixels=False)


def _around(points: Any) -> list[float]:
    """Ends of the box around points, which tools write in the order in which they were drawn."""
    columns, rows = zip(*([_number(value) for value in point] for point in points), strict=True)
    return [min(columns), min(rows), max(columns), max(rows)]


def _number(value: Any) -> float:
    """NaN for what is missing or no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
