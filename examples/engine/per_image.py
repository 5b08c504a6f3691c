"""Results of each image of a data set, such as attribution maps: made once, by all processes, over several runs."""

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data.sample import DataError, Images, Sample
from torch import Tensor
from tqdm import tqdm

from engine import processes, storage
from engine.storage import PARTIAL, StorageError

SETTINGS = "settings.json"


def each_image(
    work: Callable[[Sample], Mapping[str, Tensor]],
    data: Images,
    folder: Path,
    *,
    settings: Mapping[str, object],
    name: str,
) -> None:
    """Writes the results of every image that has none yet to ``folder``, for :func:`read`.

    Started by ``torchrun``, the processes share these images evenly, in a folder that all of them see, and each
    returns when all results are there. A result appears at once, when it is complete, and is never touched again:
    whenever a run is stopped, the next one goes on, with any number of processes.

    Args:
        work: from the sample of an image to its results, tensors on any device, by name. To be the same after a stop
            they must depend on the sample alone; for random numbers, on a generator that every call makes anew.
        data: the images.
        folder: of the results; made if it is missing. Nothing else writes to it meanwhile.
        settings: all that results depend on, the data set included: numbers, text, paths, lists and dicts of them,
            kept in ``settings.json``. Results of other settings need another folder.
        name: of the progress bar.

    Raises:
        TypeError: settings of other types.
        DataError: a name of an image that is not a file name; one of ``work`` or ``data`` stays as it is.
        StorageError: a folder or file that cannot be written, a folder with results of other settings; one of
            ``work`` stays as it is.
        RuntimeError: any other error of ``work``, with the name of the image; results that are no tensors of a type
            that NumPy has, such as bfloat16.
    """
    for image in data.names:
        if Path(image).name != image or "\0" in image or not image.strip("."):
            raise DataError(f"names of the images: expected file names, got {image!r}")
    wanted = _plain(settings)
    _enter(folder, wanted)  # each process by itself, so that all of them stop
    missing = processes.gather(_start(folder, data.names, wanted) if processes.rank() == 0 else [])[0]
    done = len(data) - len(missing)
    bar = tqdm(total=len(data), initial=done, desc=f"{name:>13}", unit="image", disable=processes.rank() > 0)
    with bar:
        for begin in range(0, len(missing), processes.count()):
            turn = missing[begin : begin + processes.count()]  # one for each process
            if processes.rank() < len(turn):
                index = turn[processes.rank()]
                storage.write(_path(folder, data.names[index]), _content(work, data, index))
            bar.update(len(turn))
    processes.gather(None)  # waits for the others


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The results of the image ``name`` in a folder of :func:`each_image`, on the CPU.

    Raises:
        StorageError: a file that is missing or damaged.
    """
    path = _path(folder, name)
    try:
        with zipfile.ZipFile(path), np.load(path) as arrays:  # np.load alone takes other formats, too
            return {key: torch.from_numpy(arrays[key]) for key in arrays}
    except Exception as error:  # damaged files get nearly anything out of NumPy
        raise StorageError(f"cannot read {path}: {_reason(error)}") from error


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npz"


def _plain(settings: Mapping[str, object]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    plain = {}
    for key, value in settings.items():
        try:
            plain[key] = json.loads(json.dumps(value, default=os.fspath))
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise TypeError(f"settings: expected {key} to be made of numbers, text and paths, got {kind}") from error
    return plain


def _enter(folder: Path, wanted: dict[str, Any]) -> None:
    """Makes the folder; refuses one whose results are of other settings, or of unknown ones."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}") from error
    if os.path.lexists(folder / SETTINGS):
        found = _read_settings(folder / SETTINGS)
        for key in {**found, **wanted}:
            old, new = (_text(values[key]) if key in values else "unset" for values in (found, wanted))
            if old != new:
                raise StorageError(f"cannot go on in {folder}: its results are of {key} {old}, not {new}")
    elif any(folder.glob("*.npz")):
        raise StorageError(f"cannot go on in {folder}: it has results, but no {SETTINGS}")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"cannot read {path}: {_reason(error)}") from error


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _start(folder: Path, names: Sequence[str], wanted: dict[str, Any]) -> list[int]:
    """Makes the folder ready; returns which images have no results yet, by index."""
    try:
        for partial in folder.glob(f"*.npz{PARTIAL}"):  # of a killed run
            partial.unlink()
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}") from error
    if SETTINGS not in present:
        storage.write(folder / SETTINGS, json.dumps(wanted, indent=2).encode())
    return [index for index, name in enumerate(names) if _path(folder, name).name not in present]


def _content(work: Callable[[Sample], Mapping[str, Tensor]], data: Images, index: int) -> bytes:
    """The file of the results of an image."""
    file = io.BytesIO()
    try:
        arrays = {key: _array(key, value) for key, value in work(data[index]).items()}
        if taken := {"file", "allow_pickle"} & arrays.keys():
            raise ValueError(f"expected other names of results than NumPy's own {sorted(taken)}")
        np.savez_compressed(file, **arrays)
    except (DataError, StorageError):  # name their file
        raise
    except Exception as error:
        raise RuntimeError(f"{data.names[index]}: {type(error).__name__}: {error}") from error
    return file.getvalue()


def _array(key: str, value: Tensor) -> Any:
    try:
        return value.numpy(force=True)
    except TypeError as error:
        got = f"{value.dtype}, {value.layout}"
        raise TypeError(f"{key}: expected a type and a layout that NumPy has, got {got}") from error


def _reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__
