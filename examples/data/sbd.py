"""The Semantic Boundaries Dataset (SBD) as it is distributed: masks in MATLAB's files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torchvision import tv_tensors

from data.files import ImageFiles, check_file, check_folder, check_labels, one_line
from data.lists import read_entries
from data.sample import DataError
from data.voc import CLASSES


class SBD(ImageFiles):
    """The images of a list of SBD, with masks of the 20 classes of VOC; samples have ``"image"`` and ``"labels"``.

    Args:
        root: the folder ``benchmark_RELEASE``, or ``dataset`` in it, with ``img/``, ``cls/`` and the lists.
        split: name of a list: ``"train"``, ``"val"``; or the path of a list elsewhere, which ends in ``.txt``.

    Raises:
        DataError: something is missing, a name is in the list twice; when a sample is read, a file that cannot be read
            or a mask that does not fit.
    """

    def __init__(self, root: Path, split: str) -> None:
        check_folder(root)
        root = next((folder for folder in (root, root / "dataset") if os.path.isdir(folder / "img")), root)
        for folder in ("img", "cls"):
            check_folder(root / folder)
        path = Path(split) if split.endswith(".txt") else root / f"{split}.txt"
        check_file(path, "the list of the images of a split")
        entries = read_entries(path, root, "img", ["cls"], mask_ending=".mat")
        super().__init__(
            CLASSES,
            [entry.name for entry in entries],
            [entry.image for entry in entries],
            masks=[entry.mask for entry in entries if entry.mask],
            read_mask=read_mat,
        )


def read_mat(path: Path, classes: int, *, size: Sequence[int] | None = None) -> tv_tensors.Mask:
    """The classes of an image, int64 ``[H, W]``, from a file of SBD's ``cls/``.

    Args:
        path: a MATLAB file with a struct ``GTcls`` that has a matrix ``Segmentation``.
        classes: number of classes.
        size: height and width of the image that the mask belongs to; not checked if None.

    Raises:
        DataError: no file, a damaged one, one of another content, another size, an unknown label.
    """
    check_file(path, "a MATLAB file")
    try:
        labels = np.asarray(scipy.io.loadmat(str(path), appendmat=False)["GTcls"]["Segmentation"].item())
    except Exception as error:  # damaged files get nearly anything out of SciPy
        reason = f"{type(error).__name__} {one_line(error)}"
        raise DataError(f"{path}: expected GTcls with its Segmentation, got: {reason}") from None
    if labels.ndim != 2 or labels.dtype != np.uint8 or not labels.size:
        raise DataError(f"{path}: expected a Segmentation of bytes, got {labels.dtype} {list(labels.shape)}")
    return check_labels(path, labels, classes, size)
