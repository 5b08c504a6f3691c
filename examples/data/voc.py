"""Pascal VOC 2012, with the masks of SBD where they are there, and other data sets in its layout."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import torch
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor
from torchvision import tv_tensors

from data.files import ImageFiles, check_file, check_folder, check_unique, read_classes, read_list
from data.sample import DataError, Sample

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

# A line of the list of SBD as it is often distributed: the image and its mask instead of a name.
PAIR = re.compile(r"/JPEGImages/(\S+)\.jpg\s+/SegmentationClassAug/\1\.png")


class VOC(ImageFiles):
    """The images of a split of Pascal VOC 2012, or of another data set in its layout.

    Samples have ``"image"``; ``"labels"`` with ``masks``; ``"boxes"`` and ``"box_labels"`` with ``boxes``; ``"sizes"``
    with ``sizes``.

    Args:
        root: the folder ``VOC2012``, or one that holds ``VOC2012`` or ``VOCdevkit/VOC2012``. The classes are those of
            VOC unless it has a file ``classes.txt`` with other names, one in a line, the background first.
        split: name of a list in ``ImageSets/Segmentation``: ``"train"``, ``"val"``, ``"trainval"``; or ``"trainaug"``,
            the training images of VOC and SBD together (``trainaug.txt`` or ``train_aug.txt``), whose masks are in
            ``SegmentationClassAug`` or, where they are not there, in ``SegmentationClass``.
        masks: whether samples have labels; there need not be any masks otherwise.
        boxes: whether samples have the boxes of ``Annotations``, those of difficult and truncated objects included.
        sizes: CSV file of the sizes of the classes, see :func:`data.files.read_sizes`.

    Raises:
        DataError: something is missing, a name is in the list twice, sizes are wrong; when a sample is read, a file
            that cannot be read or a mask or box that does not fit.
    """

    def __init__(
        self, root: Path, split: str, *, masks: bool = True, boxes: bool = False, sizes: Path | None = None
    ) -> None:
        root = _find(root)
        names = _names(root, split)
        folders = ["SegmentationClassAug", "SegmentationClass"] if split == "trainaug" else ["SegmentationClass"]
        super().__init__(
            classes=read_classes(root / "classes.txt") if (root / "classes.txt").is_file() else CLASSES,
            names=names,
            images=[root / "JPEGImages" / f"{name}.jpg" for name in names],
            masks=[_first_file([root / folder / f"{name}.png" for folder in folders]) for name in names],
            with_masks=masks,
            sizes=sizes,
        )
        self._annotations = [root / "Annotations" / f"{name}.xml" for name in names] if boxes else None
        for path in self._annotations or ():
            check_file(path, "an annotation")

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if self._annotations:
            _, height, width = sample["image"].shape
            boxes, labels = read_boxes(self._annotations[index], self.classes, height, width)
            sample["boxes"], sample["box_labels"] = boxes, labels
        return sample


def read_boxes(
    path: Path, classes: tuple[str, ...], height: int, width: int
) -> tuple[tv_tensors.BoundingBoxes, Tensor]:
    """Boxes of all objects of an image, and their classes, from an annotation of VOC.

    VOC counts pixels from 1, far ends inclusive: ``xmin`` 1 and ``xmax`` 500 are the whole width of an image of 500
    pixels, here 0 and 500. A few of its coordinates are fractions.

    Args:
        path: an XML file; parts of objects, which have boxes of their own, are left out.
        classes: names of the classes, the background first.
        height: of the image.
        width: of the image.

    Returns:
        ``[n, 4]``, float32, x1, y1, x2, y2, far ends exclusive, and ``[n]``, int64.

    Raises:
        DataError: no XML, an object without name or box, an unknown name, a coordinate that is no number, an empty
            box, one beyond the image.
    """
    try:
        annotation = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:  # the last two: unknown encodings
        raise DataError(f"{path}: expected an XML file that can be read, got: {error}") from None
    boxes, labels = [], []
    for item in annotation.iterfind("object"):
        name = item.findtext("name", "").strip()
        if name not in classes[1:]:
            raise DataError(f"{path}: expected objects called {', '.join(classes[1:])}, got {name!r}")
        x1, y1, x2, y2 = (_coordinate(item.findtext(f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax"))
        if not (1 <= x1 < x2 + 1 <= width + 1 and 1 <= y1 < y2 + 1 <= height + 1):
            raise DataError(
                f"{path}: expected a box within x 1 to {width} and y 1 to {height} for {name}, "
                f"got xmin {x1:g}, ymin {y1:g}, xmax {x2:g}, ymax {y2:g}"
            )
        boxes.append([x1 - 1, y1 - 1, x2, y2])
        labels.append(classes.index(name))
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return (
        tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        torch.tensor(labels, dtype=torch.int64),
    )


def _find(root: Path) -> Path:
    check_folder(root)
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise DataError(f"{root}: expected JPEGImages in it, or in VOC2012 or VOCdevkit/VOC2012 below it, found none")


def _names(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "Segmentation"
    check_folder(folder)
    path = folder / f"{split}.txt"
    if split == "trainaug":
        path = _first_file([path, folder / "train_aug.txt"])
    check_file(path, "the list of the images of a split")
    pairs = [(line, PAIR.fullmatch(line)) for line in read_list(path)]
    names = [pair[1] if pair else line for line, pair in pairs]
    check_unique(path, names)
    return names


def _first_file(paths: list[Path]) -> Path:
    """The first that is there, or else the first."""
    return next((path for path in paths if path.is_file()), paths[0])


def _coordinate(text: str | None) -> float:
    """NaN for what is missing or no number."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
