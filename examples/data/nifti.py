"""A folder of NIfTI files, in the layout of the Medical Segmentation Decathlon, as volumes of one shape and spacing."""

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from engine import processes
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data.files import check_file, check_folder, one_line, read_text
from data.sample import DataError
from segloss.common.resizing import resize_linear

Split = Literal["train", "val", "final"]
FOLDS = 5  # of the volumes in the order of their names; the last two are val and final
DARK, BRIGHT = 0.5, 99.5  # percentiles of the intensities of a volume that become 0 and 1
LARGEST = 1 << 30  # voxels, 4 GB
SAME_PLACE = 1e-2  # how far matrices of an image and its labels may differ, in mm


Spacing = tuple[float, float, float]  # of voxels: z, y, x, in mm


class Volume(NamedTuple):
    """Of one patient, from foot to head, from back to front and from left to right."""

    image: Tensor  # float32 [D, H, W], in [0, 1]
    labels: Tensor  # int64 [D, H, W], classes
    spacing: Spacing
    file: Path = Path("volume")  # of the image


def read_volume(image: Path, labels: Path, classes: int) -> Volume:
    """An image and its labels, whatever their orientation in the files.

    Args:
        image: NIfTI file of three dimensions; 0.5% of its intensities at either end are cut off.
        labels: NIfTI file of class indices, in the same place.
        classes: number of classes.

    Raises:
        DataError: no file, one that cannot be read, that is not of three dimensions or whose spacing is not above 0;
            intensities that are not finite, or all the same; labels that are no class indices, or in another place.
    """
    intensities, matrix, spacing = _read(image, "an image")
    if not np.isfinite(intensities).all():
        raise DataError(f"{image}: expected finite intensities, got NaN or infinity")
    dark, bright = np.percentile(intensities, (DARK, BRIGHT))
    if dark == bright:
        raise DataError(f"{image}: expected intensities that differ, got {dark:g} nearly everywhere")
    indices, place, _ = _read(labels, "labels")
    if indices.shape != intensities.shape:
        raise DataError(f"{labels}: expected {intensities.shape} voxels (z, y, x) as the image, got {indices.shape}")
    if not np.allclose(place, matrix, rtol=0, atol=SAME_PLACE):
        raise DataError(f"{labels}: expected the place of the image in space, got another matrix in the header")
    unknown = indices[~np.isin(indices, np.arange(classes))]
    if len(unknown):
        raise DataError(f"{labels}: expected labels from 0 to {classes - 1}, got {unknown[0]:g}")
    scaled = ((intensities - dark) / (bright - dark)).clip(0, 1)
    return Volume(torch.from_numpy(scaled).float(), torch.from_numpy(indices).long(), spacing, image)


def _read(path: Path, what: str) -> tuple[NDArray[np.float64], NDArray[np.float64], Spacing]:
    """Values ``[D, H, W]`` in canonical orientation, the matrix from voxels to space, and the spacing."""
    import nibabel

    check_file(path, what)
    try:
        if path.suffix.lower() == ".gz":
            _check_gzip(path)
        file: Any = nibabel.as_closest_canonical(nibabel.load(path))
        values = np.asarray(file.dataobj, np.float64)
    except Exception as error:  # damaged files get nearly anything out of nibabel
        raise DataError(f"{path}: expected a NIfTI file that can be read, got: {one_line(error)}") from None
    if values.ndim != 3 or not values.size:
        raise DataError(f"{path}: expected a volume of three dimensions, got {list(values.shape)}")
    width, height, depth = (float(step) for step in file.header.get_zooms())
    spacing = (depth, height, width)
    if not all(0 < step < np.inf for step in spacing):
        raise DataError(f"{path}: expected a spacing above 0, got {spacing}")
    return np.ascontiguousarray(values.transpose()), file.affine, spacing


def _check_gzip(path: Path) -> None:
    """Raises an error for a damaged file: nibabel stops reading before the checksum, which is at the end."""
    with gzip.open(path) as file:
        while file.read(1 << 20):
            pass


def read_classes(root: Path) -> tuple[str, ...]:
    """Names of the classes of a folder, from the ``labels`` of its ``dataset.json``.

    Raises:
        DataError: no folder, no file, no JSON, or no names of the indices from 0.
    """
    check_folder(root)
    path = root / "dataset.json"
    try:
        labels = json.loads(read_text(path))["labels"]
        return tuple(str(labels[str(index)]) for index in range(max(2, len(labels))))
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f'{path}: expected "labels": {{"0": "background", "1": ...}}, got no such names') from None


def list_pairs(root: Path, split: Split) -> list[tuple[Path, Path]]:
    """Image and labels of every volume of a split.

    Args:
        root: holds ``imagesTr/`` and ``labelsTr/`` with files of the same names.
        split: of five volumes in the order of their names, three are for training; then come val and final.

    Raises:
        DataError: a folder or the image of some labels is missing; fewer than five volumes.
    """
    check_folder(root)
    for name in ("imagesTr", "labelsTr"):
        check_folder(root / name)
    files = sorted(path for path in (root / "labelsTr").glob("*.nii*") if not path.name.startswith("."))
    if len(files) < FOLDS:
        raise DataError(f"{root / 'labelsTr'}: expected at least {FOLDS} files (.nii or .nii.gz), found {len(files)}")
    for path in files:
        check_file(root / "imagesTr" / path.name, f"the image of {path}")
    folds = {"val": (FOLDS - 2,), "final": (FOLDS - 1,)}.get(split, range(FOLDS - 2))
    return [(root / "imagesTr" / path.name, path) for i, path in enumerate(files) if i % FOLDS in folds]


def read_volumes(pairs: Sequence[tuple[Path, Path]], classes: int) -> list[Volume]:
    """Reads all volumes into memory."""
    return [
        read_volume(image, labels, classes)
        for image, labels in tqdm(pairs, "volumes", delay=2, disable=processes.rank() > 0)
    ]


def filling(volumes: Sequence[Volume], shape: tuple[int, int, int]) -> Spacing:
    """The spacing at which a volume of median extent has this shape."""
    extents = torch.tensor([[n * step for n, step in zip(v.image.shape, v.spacing, strict=True)] for v in volumes])
    deep, high, wide = (extents.median(0).values / torch.tensor(shape)).tolist()
    return deep, high, wide


def fit(volume: Volume, shape: tuple[int, int, int], spacing: Spacing) -> tuple[Tensor, Tensor]:
    """Image ``[1, D, H, W]`` and labels ``[D, H, W]`` at another spacing, cut or padded to a shape about their centre.

    Intensities are means over what coarser voxels hold, and interpolated between finer ones; labels are those of the
    nearest voxel. Padding is dark background.

    Raises:
        DataError: a volume that would have more than 2^30 voxels, as with a spacing in other units.
    """
    size = [
        max(1, round(n * own / step)) for n, own, step in zip(volume.image.shape, volume.spacing, spacing, strict=True)
    ]
    if math.prod(size) > LARGEST:
        raise DataError(f"{volume.file}: expected voxels of about {spacing} mm (z, y, x), got {volume.spacing}")
    image, labels = volume.image[None, None], volume.labels[None, None]
    coarse = [min(n, m) for n, m in zip(image.shape[2:], size, strict=True)]
    image = resize_linear(F.interpolate(image, coarse, mode="area"), size)
    labels = F.interpolate(labels.float(), size, mode="nearest-exact").long()
    pads: list[int] = []
    for n, wanted in zip(reversed(size), reversed(shape), strict=True):
        before = (wanted - n) // 2  # negative: cut off
        pads += [before, wanted - n - before]
    return F.pad(image, pads)[0], F.pad(labels, pads)[0, 0]
