"""Lists of the images of a split, in the forms that lists of VOC and SBD are passed around in."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.files import ENDINGS, check_unique, read_list
from data.sample import DataError


class Entry(NamedTuple):
    """A line of a list."""

    name: str
    image: Path
    mask: Path | None


def read_entries(
    path: Path, root: Path, images: str = "JPEGImages", masks: Sequence[str] = (), *, mask_ending: str = ".png"
) -> list[Entry]:
    """The images and masks of a list.

    A line is a name, or the path of an image, alone or with that of its mask: with or without a leading slash, with or
    without the folders above. Numbers after a name, as in ``ImageSets/Main`` and in lists of tags, are not looked at.

    Args:
        path: of the list.
        root: of the data set, which paths in the list begin at.
        images: folder of the images that are called by a name.
        masks: folders of the masks, looked at in this order where a line has no mask or a mask that is not there;
            without any, masks are not looked for.
        mask_ending: of the masks that are called by a name.

    Raises:
        DataError: no list, an empty one, an empty line, a line of another form, an image or a mask that is not there,
            an image twice; each with the number of its line.
    """
    entries = []
    for number, line in enumerate(read_list(path), 1):
        where = f"{path}:{number}"
        image, mask = _words(line, root / images, where)
        image_file = _find(root, [images], image, ".jpg", f"{where}: expected an image")
        name = image_file.stem
        mask_file = None
        if masks:
            named = mask or f"{name}{mask_ending}"
            mask_file = _find(root, masks, named, mask_ending, f"{where}: expected a mask of {name}")
        entries.append(Entry(name, image_file, mask_file))
    check_unique(path, [entry.name for entry in entries])
    return entries


def _words(line: str, images: Path, where: str) -> tuple[str, str]:
    """The image of a line and its mask, which may be empty."""
    if os.path.isfile(images / f"{line}.jpg"):  # a name with spaces in it, too
        return line, ""
    image, *others = line.split()
    if all(re.fullmatch(r"-?\d{1,3}", word) for word in others):
        return image, ""
    if len(others) > 1:
        raise DataError(f"{where}: expected a name, an image, or an image and its mask, got {line!r}")
    return image, others[0]


def _find(root: Path, folders: Sequence[str], text: str, ending: str, wanted: str) -> Path:
    """The file of a word of a list: as it is written, without the first of its folders, or in one of these folders."""
    parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".")] or [""]
    parts[-1] = parts[-1] if PurePosixPath(parts[-1]).suffix.lower() in (*ENDINGS, ending) else f"{parts[-1]}{ending}"
    written = [root.joinpath(*parts[first:]) for first in range(len(parts) - 1)]
    usual = [root / folder / parts[-1] for folder in folders]
    for file in (*written, *usual):
        if os.path.isfile(file):
            return file
    raise DataError(f"{wanted}, found none at {' or '.join(map(str, dict.fromkeys([*written[:1], *usual])))}")
