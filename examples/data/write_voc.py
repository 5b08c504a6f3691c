"""Writes scenes as a folder in the layout of Pascal VOC 2012, so that whatever reads VOC can be tried without it."""

import io
from collections.abc import Iterable, Mapping
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
    _write(root / "classes.txt", _lines(CLASSES))
    _write(root / "sizes.csv", _lines(sizes))

    lists = root / "ImageSets.partial"
    (lists / "Segmentation").mkdir(parents=True)
    (lists / "Main").mkdir()
    for split, images in tags.items():
        for kind in ("Segmentation", "Main"):
            (lists / kind / f"{split}.txt").write_bytes(_lines(images))
        for label, category in enumerate(CLASSES[1:], start=1):
            rows = (f"{name} {1 if present[label] else -1:2d}" for name, present in images.items())
            (lists / "Main" / f"{category}_{split}.txt").write_bytes(_lines(rows))
    lists.rename(root / "ImageSets")


def _write_scene(root: Path, name: str, scene: Scene) -> None:
    """Writes the image, both masks and the annotation of a scene."""
    objects = torch.where(scene.labels == VOID, VOID, 0)
    for number, visible in enumerate(scene.instances, start=1):
        objects[visible] = number
    pixels = (scene.image * 255).round().byte().permute(1, 2, 0).numpy()
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "JPEG", quality=95, subsampling=0)

    _write(root / "JPEGImages" / f"{name}.jpg", image.getvalue())
    _write(root / "SegmentationClass" / f"{name}.png", _indexed_png(scene.labels))
    _write(root / "SegmentationObject" / f"{name}.png", _indexed_png(objects))
    _write(root / "Annotations" / f"{name}.xml", _annotation(root.resolve().name, name, scene))


def _indexed_png(indices: Tensor) -> bytes:
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


def _annotation(folder: str, name: str, scene: Scene) -> bytes:
    """The objects of a scene as XML; VOC counts pixels from 1, and a box ends with its last pixel."""
    height, width = scene.labels.shape
    root = ElementTree.Element("annotation")
    _add(root, folder=folder, filename=f"{name}.jpg")
    _add(ElementTree.SubElement(root, "source"), database=f"synthetic scenes, version {VERSION}")
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=1)
    for label, box in zip(scene.box_labels.tolist(), scene.boxes.int().tolist(), strict=True):
        entry = ElementTree.SubElement(root, "object")
        _add(entry, name=CLASSES[label], pose="Unspecified", truncated=0, difficult=0)
        left, top, right, bottom = box
        _add(ElementTree.SubElement(entry, "bndbox"), xmin=left + 1, ymin=top + 1, xmax=right, ymax=bottom)
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, **texts: str | int) -> None:
    """Appends an element with a text for each argument."""
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def _lines(rows: Iterable[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def _write(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name only when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
