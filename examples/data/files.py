"""Reading what lies on disk. Whatever is wrong with a file is a :class:`DataError` of one line that names it."""

import contextlib
import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from PIL import ExifTags, Image
from torch import Tensor
from torchvision import tv_tensors

from data.boxes import read_boxes
from data.sample import VOID, DataError, Images, Sample

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")  # of images, in small letters
CUT = "boxes that were cut off at the border of their image"
FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
LONGEST = 1000  # characters of a line of a list; other files have longer ones


class ReadMask(Protocol):
    """Reads a mask of class indices as :func:`read_labels` does."""

    def __call__(self, path: Path, classes: int, *, size: Sequence[int] | None = None) -> tv_tensors.Mask: ...


class ImageFiles(Images):
    """Images and what is known about them in files. All are looked for at once, and read when needed.

    Args:
        classes: names of the classes.
        names: of the images.
        files: JPEG, PNG, BMP or TIFF images.
        masks: files of class indices, one per image; None where there are none.
        annotations: files of boxes, see :func:`data.boxes.read_boxes`, one per image; None where there are none.
        sizes: CSV file of the sizes, see :func:`read_sizes`; samples have ``"sizes"``, float32 ``[K]``, if given.
        read_mask: what the masks are read with.
        first: number of the first row and column where boxes are given by pixels, 0 or 1.
        slack: how far boxes may be beyond the image, in pixels; they are cut off there.

    Attributes:
        files: as given.
        oddities: how often what was read was put right.

    Raises:
        DataError: a file is missing, or the sizes are wrong; from ``[index]`` and ``labels``, a file that cannot be
            read or that contradicts another.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        names: Sequence[str],
        files: Sequence[Path],
        *,
        masks: Sequence[Path] | None = None,
        annotations: Sequence[Path] | None = None,
        sizes: Path | None = None,
        read_mask: ReadMask | None = None,
        first: int = 1,
        slack: float = 0,
    ) -> None:
        for paths, what in ((files, "an image"), (masks, "a mask"), (annotations, "an annotation")):
            for path in paths or ():
                check_file(path, what)
        self.classes, self.names, self.files = classes, names, files
        self.oddities: Counter[str] = Counter()
        self._masks, self._read_mask = masks, read_mask or read_labels
        self._annotations, self._first, self._slack = annotations, first, slack
        self._sizes = None if sizes is None else read_sizes(sizes, names, classes)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.files[index])
        _, height, width = image.shape
        sample: Sample = {"image": image}
        if self._masks is not None:
            sample["labels"] = self._read_mask(self._masks[index], len(self.classes), size=(height, width))
        if self._annotations is not None:
            sample["boxes"], sample["box_labels"], cut = read_boxes(
                self._annotations[index],
                self.classes,
                height,
                width,
                image=self.files[index].name,
                first=self._first,
                slack=self._slack,
            )
            self.oddities[CUT] += cut
        if self._sizes is not None:
            sample["sizes"] = self._sizes[index]
        return sample

    def labels(self, index: int) -> Tensor:
        """Labels of an image, int64 ``[H, W]``; only the mask is read."""
        if self._masks is None:
            raise ValueError("labels: expected images with masks, got images without")
        return self._read_mask(self._masks[index], len(self.classes))


def check_folder(path: Path) -> None:
    """Raises :class:`DataError` if there is no such folder."""
    if not os.path.isdir(path):  # unlike Path.is_dir, False as well for one that may not be looked at
        raise DataError(f"{path}: expected a folder, found none")


def check_file(path: Path, what: str) -> None:
    """Raises :class:`DataError` if there is no such file, saying what it should be."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: expected {what}, found no file")


def read_image(path: Path) -> tv_tensors.Image:
    """A JPEG, PNG, BMP or TIFF image, float32 ``[3, H, W]``, RGB in [0, 1]; transparency is left out.

    Raises:
        DataError: no file, no image, a damaged one, several pages, more than 8 bits of grey, or one that viewers turn
            or mirror, with which a mask would not agree if it was drawn in such a viewer.
    """
    with opened(path, "a JPEG, PNG, BMP or TIFF image", FORMATS) as image:
        if image.format == "TIFF" and image.n_frames > 1:  # type: ignore[attr-defined]
            raise DataError(f"{path}: expected one image, got a file of {image.n_frames} pages")  # type: ignore[attr-defined]
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # before Pillow turns a TIFF
        if orientation not in (0, 1):
            raise DataError(f"{path}: expected an upright image, got EXIF orientation {orientation}: save it turned")
        image.load()
        if image.mode.startswith(("I", "F")):  # Pillow would cut the values off at 255
            raise DataError(f"{path}: expected 8 bits for each channel, got an image of mode {image.mode}")
        image.info.pop("transparency", None)  # of a palette; Pillow warns of leaving it out
        pixels = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))
    return tv_tensors.Image(pixels.permute(2, 0, 1).contiguous().float().div_(255))


def read_labels(path: Path, classes: int, *, size: Sequence[int] | None = None) -> tv_tensors.Mask:
    """A mask whose pixel values are class indices, or 255 where the class is not known: int64 ``[H, W]``.

    Args:
        path: an indexed PNG, or one in greys of 8 bits.
        classes: number of classes.
        size: height and width of the image that the mask belongs to; not checked if None.

    Raises:
        DataError: no file, no PNG, a damaged one, colours instead of indices, another size, an unknown label.
    """
    with opened(path, "a PNG mask", ("PNG",)) as image:
        tile = getattr(image, "tile", None)
        layout = tile[0][3] if tile else None  # Pillow's name for the pixels in the file
        if image.mode != "P" and layout != "L":  # greys of fewer bits are not indices: Pillow stretches them to 0..255
            raise DataError(f"{path}: expected class indices (an indexed PNG, or greys of 8 bits), got mode {layout}")
        labels = np.array(image)
    return check_labels(path, labels, classes, size)


def check_labels(path: Path, labels: NDArray[np.uint8], classes: int, size: Sequence[int] | None) -> tv_tensors.Mask:
    """Labels ``[H, W]`` that were read from a file, as int64; :class:`DataError` where one is unknown, or for another
    size than the image's.
    """
    height, width = labels.shape
    if size is not None and (height, width) != tuple(size):
        raise DataError(f"{path}: expected {size[1]}x{size[0]} (width x height) as the image, got {width}x{height}")
    unknown = labels[(labels >= classes) & (labels != VOID)]
    if len(unknown):
        raise DataError(f"{path}: expected labels from 0 to {classes - 1} and {VOID} (void), got {unknown[0]}")
    return tv_tensors.Mask(torch.from_numpy(labels).long())


def read_list(path: Path) -> list[str]:
    """Names, one in a line.

    Raises:
        DataError: no file, not UTF-8, no names, an empty line between names, a name twice, a line too long for names.
    """
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not names:
        raise DataError(f"{path}: expected at least one name, got an empty file")
    if max(map(len, names)) > LONGEST:
        raise DataError(f"{path}: expected names, got a line of {max(map(len, names))} characters")
    if "" in names:
        raise DataError(f"{path}:{names.index('') + 1}: expected a name, got an empty line")
    check_unique(path, names)
    return names


def check_unique(path: Path, names: Sequence[str]) -> None:
    """Raises :class:`DataError` if a name occurs twice in a list."""
    lines: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if lines.setdefault(name, line) != line:
            raise DataError(f"{path}:{line}: expected every name once, got {name} again (first in line {lines[name]})")


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of the classes, one in a line, the background first.

    Raises:
        DataError: as :func:`read_list`; fewer than 2 classes, or more than 255.
    """
    classes = tuple(read_list(path))
    if not 2 <= len(classes) <= VOID:
        raise DataError(f"{path}: expected 2 to {VOID} classes, the background first, got {len(classes)}")
    return classes


def read_sizes(path: Path, names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Sizes of the classes in each image, as shares of its labelled pixels, from a CSV file.

    Args:
        path: its header is ``name`` and names of classes, in any order; a class without a column has size 0.
        names: of the images; rows of further images are not looked at.
        classes: names of the classes.

    Returns:
        ``[N, K]``, float32; each row, which may be rounded in the file, is divided by its sum.

    Raises:
        DataError: no file, not UTF-8, no CSV; a header without ``name``, with an unknown class or with a column
            twice; an image without a row or with two; a row with too few or too many fields, with something other
            than numbers of at least 0, or whose sum is not 1 within 1e-3.
    """
    sizes, problems = check_sizes(path, names, classes)
    if problems:
        raise DataError(problems[0])
    check_complete(path, names, sizes)
    return torch.tensor([sizes[name] for name in names], dtype=torch.float32)


def check_sizes(
    path: Path, names: Sequence[str], classes: Sequence[str], *, others: bool = True
) -> tuple[dict[str, list[float]], list[str]]:
    """The right rows of a file for :func:`read_sizes`, which may lack images, and what is wrong with each other row.

    Args:
        path: of the CSV file.
        names: of the images.
        classes: names of the classes.
        others: whether the file may have rows of other images, which are not looked at then.

    Returns:
        Sizes by image, in the order of the file, and messages of one line, each with the line of the file.

    Raises:
        DataError: no file, not UTF-8, no CSV, a wrong header.
    """
    rows = csv.reader(io.StringIO(read_text(path)), skipinitialspace=True, strict=True)
    try:
        lines = [(rows.line_num, row) for row in rows if row]
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: expected comma-separated values, got: {error}") from None
    header = lines[0][1] if lines else []
    _check_header(path, header, classes)
    wanted = set(names)
    sizes: dict[str, list[float]] = {}
    problems = []
    for line, row in lines[1:]:
        where = f"{path}:{line}"
        if len(row) != len(header):
            problems.append(f"{where}: expected {len(header)} fields as in the header, got {len(row)}")
            continue
        fields = dict(zip(header, row, strict=True))
        name = fields["name"]
        if name in sizes:
            problems.append(f"{where}: expected one row for each image, got another for {name}")
        elif name in wanted:
            try:
                sizes[name] = _shares(f"{where}: {name}", [fields.get(label, "0") for label in classes])
            except DataError as error:
                problems.append(str(error))
        elif not others:
            problems.append(f"{where}: expected the name of an image, got {name!r}")
    return sizes, problems


def check_complete(path: Path, names: Sequence[str], sizes: Mapping[str, object]) -> None:
    """Raises :class:`DataError` if an image has no sizes."""
    missing = [name for name in names if name not in sizes]
    if missing:
        raise DataError(f"{path}: expected a row for each image, got none for {missing[0]} ({len(missing)} missing)")


def _check_header(path: Path, header: Sequence[str], classes: Sequence[str]) -> None:
    if "name" not in header:
        raise DataError(f"{path}:1: expected a header name,<class>,<class>,..., got {','.join(header)!r}")
    for column in header:
        if column != "name" and column not in classes:
            raise DataError(f"{path}:1: expected columns called name or {', '.join(classes)}, got {column!r}")
        if header.count(column) > 1:
            raise DataError(f"{path}:1: expected every column once, got {column} twice")


def _shares(where: str, texts: Sequence[str]) -> list[float]:
    """The numbers of a row, in double precision."""
    values = []
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not value >= 0:
            raise DataError(f"{where}: expected numbers of at least 0, got {text!r}")
        values.append(value)
    total = sum(values)
    if not abs(total - 1) <= 1e-3:
        raise DataError(f"{where}: expected sizes that sum to 1 within 0.001, got a sum of {total:.6g}")
    return [value / total for value in values]


def read_text(path: Path) -> str:
    """The text of a file; :class:`DataError` if there is none, or if it is not UTF-8."""
    check_file(path, "a text file")
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that spreadsheets put first
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read, got: {error.strerror}") from None


@contextlib.contextmanager
def opened(path: Path, what: str, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An image file while it is read; what is wrong with it is a :class:`DataError` that says what it should be."""
    check_file(path, what)
    try:
        with Image.open(path, formats=formats) as image:
            if image.format == "PNG":  # Pillow looks at the checksums of pixels here and nowhere else
                with Image.open(path, formats=("PNG",)) as again:
                    again.verify()
            yield image
    except DataError:
        raise
    except Exception as error:  # damaged files get nearly anything out of Pillow
        raise DataError(f"{path}: expected {what} that can be read, got: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """What another library says, in a line."""
    return " ".join(str(error).split()) or type(error).__name__
