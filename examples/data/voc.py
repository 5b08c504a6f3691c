"""Pascal VOC 2012, with the masks of SBD where they are there, and other data sets in its layout."""

import os
from pathlib import Path

from data.files import ImageFiles, ReadMask, check_file, check_folder, read_classes
from data.lists import read_entries
from data.sample import DataError

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


class VOC(ImageFiles):
    """The images of a split of Pascal VOC 2012, or of another data set in its layout.

    Samples have ``"image"``; ``"labels"`` with ``masks``; ``"boxes"`` and ``"box_labels"`` with ``boxes``; ``"sizes"``
    with ``sizes``.

    Args:
        root: the folder ``VOC2012``, or one that holds ``VOC2012`` or ``VOCdevkit/VOC2012``. The classes are those of
            VOC unless it has a file ``classes.txt`` with other names, one in a line, the background first.
        split: name of a list in ``ImageSets/Segmentation`` or ``ImageSets/Main``: ``"train"``, ``"val"``; or
            ``"trainaug"``, the training images of VOC and SBD together, whatever the list with ``aug`` in its name is
            called; or the path of a list elsewhere, which ends in ``.txt``. For the forms of its lines see
            :func:`data.lists.read_entries`. Where a line has no mask, it is in ``SegmentationClass`` or, where it is
            not there, in ``SegmentationClassAug``; the other way round for lists with ``aug`` in their names.
        masks: whether samples have labels; there need not be any masks otherwise.
        boxes: whether samples have the boxes of ``Annotations``, those of difficult and truncated objects included.
        sizes: CSV file of the sizes of the classes, see :func:`data.files.read_sizes`.
        read_mask: what the masks are read with; None for indices.
        first: number of the first row and column in ``Annotations``.
        slack: how far boxes may be beyond the image, in pixels; they are cut off there.

    Raises:
        DataError: something is missing, a name is in the list twice, sizes are wrong; when a sample is read, a file
            that cannot be read or a mask or box that does not fit.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        masks: bool = True,
        boxes: bool = False,
        sizes: Path | None = None,
        read_mask: ReadMask | None = None,
        first: int = 1,
        slack: float = 0,
    ) -> None:
        root = _find(root)
        path = _list(root, split)
        folders = ["SegmentationClass", "SegmentationClassAug"]
        if "aug" in path.stem.lower():
            folders.reverse()
        entries = read_entries(path, root, masks=folders if masks else ())
        super().__init__(
            read_classes(root / "classes.txt") if os.path.lexists(root / "classes.txt") else CLASSES,
            [entry.name for entry in entries],
            [entry.image for entry in entries],
            masks=[entry.mask for entry in entries if entry.mask] if masks else None,
            annotations=[root / "Annotations" / f"{entry.name}.xml" for entry in entries] if boxes else None,
            sizes=sizes,
            read_mask=read_mask,
            first=first,
            slack=slack,
        )


def _find(root: Path) -> Path:
    check_folder(root)
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if os.path.isdir(folder / "JPEGImages"):
            return folder
    raise DataError(f"{root}: expected JPEGImages in it, or in VOC2012 or VOCdevkit/VOC2012 below it, found none")


def _list(root: Path, split: str) -> Path:
    if split.endswith(".txt"):
        check_file(Path(split), "the list of the images of a split")
        return Path(split)
    folder = root / "ImageSets" / "Segmentation"
    check_folder(folder)
    path = folder / f"{split}.txt"
    for other in (path, root / "ImageSets" / "Main" / f"{split}.txt"):
        if os.path.isfile(other):
            return other
    named = sorted(folder.glob("*[aA][uU][gG]*.txt")) if "aug" in split.lower() else []
    if len(named) > 1:
        raise DataError(f"{path}: expected the list of a split, found {', '.join(file.name for file in named)}")
    for other in named:
        return other
    check_file(path, "the list of the images of a split")
    return path
