"""Brings a data set, in whatever form people have it, into the layout of Pascal VOC 2012, for ``--data voc``."""

import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from data.coco import COCO
from data.colours import is_coloured, read_colours
from data.convert import Record, convert
from data.files import ImageFiles, check_folder, read_labels
from data.folder import Folder
from data.panoptic import Panoptic
from data.sample import DataError
from data.sbd import SBD
from data.tags import read_tags
from data.voc import VOC
from data.write_voc import palette
from engine.command import output_folder, parse
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision import tv_tensors

COLOURED = "masks of VOC's colours that became indices"
SHOWN = 9


@dataclass(frozen=True)
class Config:
    """Writes a data set in the layout of Pascal VOC 2012: images, masks, boxes, lists, sizes, tags.

    Nothing of the data set is touched. A run that was stopped goes on when it is started again. The summary says what
    was odd, and samples.png shows nine images.
    """

    out: Path
    """Folder that is written, the counterpart of VOC2012; new or empty, or that of a run that was stopped."""
    data: Literal["voc", "sbd", "coco", "panoptic", "folder"] = "voc"
    """Form of the data set: voc, the layout of VOC 2012, masks as indices or in VOC's colours; sbd, benchmark_RELEASE;
    coco, instances_*.json; panoptic, panoptic_*.json, stuff being background; folder, with images/, masks/ (PNG) or
    annotations/ (XML of labelImg or VoTT, JSON of LabelMe or VoTT) and classes.txt, or with train/ and val/ that have
    these."""
    root: Path = Path("VOCdevkit")
    """Folder of the data set."""
    train: str = "train"
    """Training images: the name of their list, such as train2017, or of their folder, which is . for --root itself; for
    voc and sbd also the path of a list, which ends in .txt. It becomes the list train."""
    val: str = "val"
    """Images to evaluate on, likewise; they become the list val. The word none leaves them out."""
    masks: bool = True
    """Whether voc and folder have masks."""
    boxes: bool = False
    """Whether voc and folder have boxes."""
    first: Literal[0, 1] = 1
    """Number of the first row and column in boxes of XML files: 1 for VOC, 0 for most others. Boxes at most a pixel
    beyond the image are cut off there, and counted; beyond that they are refused."""
    tags: Path | None = None
    """File of tags, in place of the classes of masks or boxes: cls_labels.npy, .csv or .json; compared with masks."""

    def __post_init__(self) -> None:
        if not (self.masks or self.boxes or self.tags):
            raise ValueError("--no-masks: expected --boxes or --tags with it, got neither")

    def images(self, split: str) -> ImageFiles:
        """The images of a list or folder, whose masks are counted where they have colours."""

        def read_mask(path: Path, classes: int, *, size: Sequence[int] | None = None) -> tv_tensors.Mask:
            if not is_coloured(path):
                return read_labels(path, classes, size=size)
            data.oddities[COLOURED] += 1
            return read_colours(path, classes, size=size)

        known: dict[str, Any] = {"masks": self.masks, "boxes": self.boxes, "first": self.first, "slack": 1}
        forms: dict[str, Callable[[], ImageFiles]] = {
            "voc": lambda: VOC(self.root, split, read_mask=read_mask, **known),
            "sbd": lambda: SBD(self.root, split),
            "coco": lambda: COCO(self.root, split),
            "panoptic": lambda: Panoptic(self.root, split),
            "folder": lambda: Folder(self.root / split, read_mask=read_mask, **known),
        }
        data = forms[self.data]()
        return data

    def settings(self) -> dict[str, str]:
        """All that what is written depends on."""
        paths = {"root": self.root.resolve(), "tags": self.tags and self.tags.resolve()}
        return {name: str(value) for name, value in (vars(self) | paths).items() if name != "out"}


def summary(classes: Sequence[str], records: Sequence[Record], oddities: Counter[str]) -> str:
    """Images of the lists and of the classes, void pixels, sizes of the images, and what was odd."""
    lists = Counter(record.split for record in records)
    lines = [f"{count:>8} images in {name}" for name, count in lists.items()]
    for label, name in enumerate(classes):
        count = sum(record.tags[label] for record in records)
        shares = [record.sizes[label] for record in records if record.sizes and record.sizes[label]]
        covered = f", {statistics.mean(shares):.1%} of each on average" if shares else ""
        lines.append(f"{count:>8} images with {name}{covered}")
    if any(record.sizes for record in records):
        area = [record.height * record.width for record in records]
        void = sum(record.void * pixels for record, pixels in zip(records, area, strict=True)) / sum(area)
        lines.append(f"{void:>8.1%} of the pixels are void")
    if count := sum(record.boxes for record in records):
        lines.append(f"{count:>8} boxes")
    for side, extents in (("width", [record.width for record in records]), ("height", [r.height for r in records])):
        lines.append(f"{statistics.median(extents):>8g} pixels of {side}, {min(extents)} to {max(extents)}")
    for record in records:
        oddities.update(record.oddities)
        oddities["images without an object"] += not any(record.tags[1:])
        oddities["masks that are all void"] += bool(record.sizes and not any(record.sizes))
    lines += [f"{count:>8} {what}" for what, count in oddities.items() if count]
    return "\n".join(lines)


def draw(root: Path, records: Sequence[Record], path: Path) -> None:
    """Draws nine images of the first list, as they were written, under their masks and boxes."""
    split, boxes = records[0].split, (root / "Annotations").is_dir()
    data = VOC(root, split, masks=records[0].sizes is not None, boxes=boxes)
    tags = {record.name: record.tags for record in records}
    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplots(3, 3).ravel()
    for axis in axes:
        axis.set_axis_off()
    shown = torch.linspace(0, len(data) - 1, min(SHOWN, len(data))).long().tolist()
    for axis, index in zip(axes, shown, strict=False):
        sample, name = data[index], data.names[index]
        pixels = sample["image"].movedim(0, -1).numpy()
        if "labels" in sample:
            labels = sample["labels"].numpy()
            pixels = np.where((labels > 0)[..., None], (pixels + palette()[labels] / 255) / 2, pixels)
        axis.imshow(pixels, interpolation="nearest")
        for left, top, right, bottom in sample["boxes"].tolist() if boxes else ():
            axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color="yellow"))
        there = [label for label, tag in zip(data.classes[1:], tags[name][1:], strict=True) if tag]
        axis.set_title(f"{name}\n{', '.join(there)}", fontsize="small", wrap=True)
    figure.savefig(path, dpi=80)


def main(config: Config) -> None:
    if config.out.resolve() == config.root.resolve():
        raise DataError(f"{config.out}: expected another folder than the data set's own")
    output_folder(config.out)
    check_folder(config.root)
    lists = {"train": config.train, "val": config.val}
    splits = {name: config.images(split) for name, split in lists.items() if split != "none"}
    if not splits:
        raise DataError("--train and --val: expected a list, got none twice")
    tags = {name: read_tags(config.tags, data.names, data.classes) for name, data in splits.items() if config.tags}
    oddities = sum((data.oddities for data in splits.values()), Counter[str]())
    records = convert(config.out, splits, config.settings(), tags)
    print(summary(next(iter(splits.values())).classes, records, oddities))
    draw(config.out, records, config.out / "samples.png")
    print(f"picture: {config.out / 'samples.png'}")
    print(f"to use them: python examples/pseudo_labels.py --data voc --root {shlex.quote(str(config.out))}")


if __name__ == "__main__":
    try:
        main(parse(Config))
    except DataError as problem:
        raise SystemExit(f"error: {problem}") from None
    except OSError as problem:
        raise SystemExit(f"error: {problem.filename}: {problem.strerror}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: start it again to go on") from None
