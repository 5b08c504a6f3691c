"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

PARTIAL = ".partial"  # ending of a file that is being written


class StorageError(OSError):
    """A file that cannot be written or read; the message is one line."""


def write(path: Path, content: bytes) -> None:
    """Replaces a file at once: readers, and whoever comes after a crash, find the old content or the new.

    Raises:
        StorageError: a full disk, a folder that cannot be written to; the old content is still there.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name survives a power cut, too
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror}; what was there is unchanged") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values by :func:`torch.save`, at once."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Reads what :func:`save` wrote, onto the CPU."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StorageError(f"cannot read {path}: {reason or type(error).__name__}") from error
    return state
