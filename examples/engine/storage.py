"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import io
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError)
PARTIAL = ".partial"  # ending of a file that is being written


class StorageError(OSError):
    """A file that cannot be written or read; the message is one line."""


def write(path: Path, content: bytes) -> None:
    """Replaces a file at once: readers, and whoever comes after a crash, find the old content or the new.

    Its folder is made if it is missing.

    Raises:
        StorageError: a full disk, a folder that cannot be written to; the old content is still there.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror}; what was there is unchanged") from error
    with contextlib.suppress(OSError):  # lets the new name survive a power cut, where that is possible
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values by :func:`torch.save`, at once."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Reads what :func:`save` wrote, onto the CPU.

    Raises:
        StorageError: a file that is missing, damaged, or not of that kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums, and leaves out what is marked as a folder.
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise zipfile.BadZipFile("it is damaged")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__} instead of values by name")
    except pickle.UnpicklingError as error:  # PyTorch's message says how to load it nevertheless
        raise StorageError(f"cannot read {path}: it holds more than tensors and plain values") from error
    except (OSError, RuntimeError, LookupError, EOFError, TypeError, ValueError, *ZIP_ERRORS) as error:
        raise StorageError(f"cannot read {path}: {reason(error)}") from error
    return state


def reason(error: Exception) -> str:
    """The first line of an error, without the escape codes of a terminal."""
    first = re.sub(r"\x1b\[\d*m", "", str(error)).strip().partition("\n")[0]
    return first or type(error).__name__
