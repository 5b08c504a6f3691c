"""Writes scenes as a folder in the layout of Pascal VOC 2012, so that whatever reads VOC can be tried without it."""

import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.scenes import CLASSES, VERSION, VOID, Scene, Scenes

FOLDERS = ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations")


def write_voc(root: Path, splits: Mapping[str, Scenes]) -> None:
    """Writes scenes, with a progress bar, in the layout of Pascal VOC 2012.

    Image ``i`` of a split is called ``{split}_{i:06d}``. Beside what VOC has there are two files: ``classes.txt``, the
    names of the classes in order, the background first, because they are not those of VOC; and ``sizes.csv``, the
    shares of the classes in the labelled pixels of every image. Files appear under their names when they are
    complete, and ``ImageSets`` appears last and at once: a folder that has it is complete.

    Args:
        root: the folder that corresponds to ``VOC2012``; new or empty.
        splits: the scenes of each split, by the name that its lists get.

    Raises:
        ValueError: ``root`` is there already and is not an empty folder.
        OSError: a file cannot be written.
    """
    if root.exists() and not (root.is_dir() and next(root.iterdir(), None) is None):
        found = "a folder with files" if root.is_dir() else "a file"
        raise ValueError(f"{root}: expected a new or an empty folder, got {found}")
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)

    tags: dict[str, dict[str, Tensor]] = {split: {} for split in splits}  # of the images, by split and name
    sizes = [",".join(["name", *CLASSES])]
    with tqdm(total=sum(map(len, splits.values())), desc="scenes", unit="image") as bar:
        for split, scenes in splits.items():
            for i, scene in enumerate(scenes):
                name = f"{split}_{i:06d}"
                _write_scene(root, name, scene)
                tags[split][name] = scene.tags
                sizes.append(",".join([name, *(f"{size:.9g}" for size in scene.sizes.tolist())]))  # all of float32
                bar.update()
    write_file(root / "classes.txt", lines(CLASSES))
    write_file(root / "sizes.csv", lines(sizes))
    write_lists(root, CLASSES, tags)


def write_lists(root: Path, classes: Sequence[str], tags: Mapping[str, Mapping[str, Sequence[int] | Tensor]]) -> None:
    """Writes ``ImageSets``, which appears at once.

    Args:
        root: of the data set.
        classes: names of the classes, the background first.
        tags: of the images, by split and name.
    """
    lists = root / "ImageSets.partial"
    shutil.rmtree(lists, ignore_errors=True)  # of a killed run
    (lists / "Segmentation").mkdir(parents=True)
    (lists / "Main").mkdir()
    for split, images in tags.items():
        for kind in ("Segmentation", "Main"):
            (lists / kind / f"{split}.txt").write_bytes(lines(images))
        for label, category in enumerate(classes[1:], start=1):
            rows = (f"{name} {1 if present[label] else -1:2d}" for name, present in images.items())
            (lists / "Main" / f"{category.replace('/', '_')}_{split}.txt").write_bytes(lines(rows))
    lists.rename(root / "ImageSets")


def _write_scene(root: Path, name: str, scene: Scene) -> None:
    """Writes the image, both masks and the annotation of a scene."""
    objects = torch.where(scene.labels == VOID, VOID, 0)
    for number, visible in enumerate(scene.instances, start=1):
        objects[visible] = number
    pixels = (scene.image * 255).round().byte().permute(1, 2, 0).numpy()
    labels = [CLASSES[label] for label in scene.box_labels.tolist()]
    database = f"synthetic scenes, version {VERSION}"

    write_file(root / "JPEGImages" / f"{name}.jpg", jpeg(Image.fromarray(pixels)))
    write_file(root / "SegmentationClass" / f"{name}.png", indexed_png(scene.labels))
    write_file(root / "SegmentationObject" / f"{name}.png", indexed_png(objects))
    write_file(
        root / "Annotations" / f"{name}.xml",
        annotation(root.resolve().name, name, scene.labels.shape, scene.boxes.tolist(), labels, database),
    )


def jpeg(image: Image.Image) -> bytes:
    """A JPEG with colours at full resolution."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def indexed_png(indices: Tensor) -> bytes:
    """A PNG of indices 0 to 255, ``[H, W]``, in the colours of VOC."""
    image = Image.fromarray(indices.byte().numpy())
    image.putpalette(palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def palette() -> NDArray[np.uint8]:
    """VOC's colours of the indices 0 to 255, ``[256, 3]``.

    The bits of an index are dealt to red, green and blue in turn, the lowest bits of the index giving the highest
    bits of the colours.
    """
    index, turn, channel = np.arange(256)[:, None, None], np.arange(3), np.arange(3)[:, None]
    bits = index >> (3 * turn + channel) & 1
    return (bits << (7 - turn)).sum(2).astype(np.uint8)


def annotation(
    folder: str,
    name: str,
    size: Sequence[int],
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str],
    database: str,
) -> bytes:
    """The objects of an image as XML; VOC counts pixels from 1, and a box ends with its last pixel.

    Args:
        folder: of the data set.
        name: of the image.
        size: height and width of the image.
        boxes: x1, y1, x2, y2 in pixels, far ends exclusive.
        labels: names of their classes.
        database: where the image is from.
    """
    height, width = size
    root = ElementTree.Element("annotation")
    _add(root, folder=folder, filename=f"{name}.jpg")
    _add(ElementTree.SubElement(root, "source"), database=database)
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=1)
    for label, (left, top, right, bottom) in zip(labels, boxes, strict=True):
        entry = ElementTree.SubElement(root, "object")
        _add(entry, name=label, pose="Unspecified", truncated=0, difficult=0)
        ends = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
        _add(ElementTree.SubElement(entry, "bndbox"), **{end: f"{value:.9g}" for end, value in ends.items()})
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, **texts: str | int) -> None:
    """Appends an element with a text for each argument."""
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def lines(rows: Iterable[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name only when it is complete."""
    partial(path).write_bytes(content)
    partial(path).replace(path)


def partial(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.with_name(f"{path.name}.partial")
