"""A data set of one's own: a folder of images, a folder of masks, and the names of the classes."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from data.files import ENDINGS, ImageFiles, ReadMask, check_folder, read_classes
from data.sample import DataError

UNREAD = (".avif", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".pgm", ".ppm", ".raw", ".tga", ".webp")


class Folder(ImageFiles):
    """The images of a folder, in the order of their names.

    Samples have ``"image"``; ``"labels"`` with ``masks``; ``"boxes"`` and ``"box_labels"`` with ``boxes``; ``"sizes"``
    with ``sizes``.

    Args:
        root: holds ``images/`` (.jpg, .jpeg, .png, .bmp, .tif or .tiff; what lies in folders below is left out, and so
            are hidden files and those that macOS calls ``._*``), ``masks/`` (for every image a PNG of the same name
            whose pixel values are class indices, 255 being void), ``annotations/`` (for every image a file of boxes of
            the same name, XML or JSON, or VoTT's export ``*-export.json`` of all) and ``classes.txt`` (names, one in a
            line, the background first).
        masks: whether samples have labels; there need not be any masks otherwise.
        boxes: whether samples have boxes; there need not be any annotations otherwise.
        sizes: CSV file of the sizes of the classes, see :func:`data.files.read_sizes`.
        read_mask: what the masks are read with; None for indices.
        first: number of the first row and column in XML annotations.
        slack: how far boxes may be beyond the image, in pixels; they are cut off there.

    Raises:
        DataError: something is missing, an image in a format that is not read, two images that differ in their endings
            only, sizes are wrong; when a sample is read, a file that cannot be read or a mask or box that does not fit.
    """

    def __init__(
        self,
        root: Path,
        *,
        masks: bool = True,
        boxes: bool = False,
        sizes: Path | None = None,
        read_mask: ReadMask | None = None,
        first: int = 1,
        slack: float = 0,
    ) -> None:
        check_folder(root)
        check_folder(root / "images")
        images, hidden = _images(root / "images")
        if masks:
            check_folder(root / "masks")
        super().__init__(
            read_classes(root / "classes.txt"),
            [path.stem for path in images],
            images,
            masks=[root / "masks" / f"{path.stem}.png" for path in images] if masks else None,
            annotations=_annotations(root / "annotations", images) if boxes else None,
            sizes=sizes,
            read_mask=read_mask,
            first=first,
            slack=slack,
        )
        self.oddities["hidden files that were passed over"] += hidden


def _images(folder: Path) -> tuple[list[Path], int]:
    """The images in the order of their names, and how many hidden files there are."""
    try:
        everything = [path for path in folder.iterdir() if not os.path.isdir(path)]
    except OSError as error:
        raise DataError(f"{folder}: expected a folder that can be read, got: {error.strerror}") from None
    files = [path for path in everything if not path.name.startswith(".")]
    images = sorted(
        (path for path in files if path.suffix.lower() in ENDINGS + UNREAD),
        key=lambda path: (path.stem, path.name),
    )
    if not images:
        raise DataError(f"{folder}: expected images ({', '.join(ENDINGS)}), found none")
    for image in images:
        if image.suffix.lower() not in ENDINGS:
            raise DataError(f"{image}: expected images ({', '.join(ENDINGS)}), got another format: save it as PNG")
    for one, other in pairwise(images):
        if one.stem == other.stem:
            raise DataError(f"{folder}: expected one image for each name, got {one.name} and {other.name}")
    return images, len(everything) - len(files)


def _annotations(folder: Path, images: Sequence[Path]) -> list[Path]:
    check_folder(folder)
    exports = sorted(folder.glob("*-export.json"))
    if exports:
        if len(exports) > 1:
            raise DataError(f"{folder}: expected one export of VoTT, found {exports[0].name} and {exports[1].name}")
        return exports * len(images)
    kind = ".json" if any(folder.glob("*.json")) else ".xml"
    return [folder / f"{image.stem}{kind}" for image in images]
