"""Checkpoints: all that a training needs to go on as if it had not been stopped."""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import processes, storage
from engine.storage import StorageError


@dataclass(frozen=True)
class Checkpoint:
    """A file with the state of a training.

    Args:
        path: of the file; every process reads it, the first one writes it.
        settings: what the training depends on, by name; it cannot go on with other ones.
        parts: what has a state of its own, by name: model, optimizer, ...
    """

    path: Path
    settings: Mapping[str, str]
    parts: Mapping[str, Any]

    def save(self, progress: dict[str, Any]) -> None:
        """Replaces the file at once: with the parts, how far the training is, and each process's random numbers."""
        states = processes.gather(random_state())
        if processes.rank() == 0:
            state = {"settings": dict(self.settings), "progress": progress, "random": states}
            storage.save(self.path, _plain(state | {name: part.state_dict() for name, part in self.parts.items()}))

    def restore(self) -> dict[str, Any] | None:
        """Puts parts and random numbers back to where they were; returns the progress, or None without a file.

        Raises:
            StorageError: a file that cannot be read, or that was written with other settings or for another model.
        """
        if not os.path.lexists(self.path):
            return None
        state = storage.load(self.path)
        try:
            for name, value in self.settings.items():
                if state["settings"].get(name) != value:
                    found = state["settings"].get(name)
                    raise StorageError(f"cannot resume: {self.path} was written with {name} {found}, not {value}")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            if processes.rank() < len(state["random"]):  # further processes keep their own
                restore_random_state(state["random"][processes.rank()])
            return state["progress"]
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise StorageError(f"cannot resume: {self.path} is of something else: {storage.reason(error)}") from error


def _plain(state: Any) -> Any:
    """NumPy's numbers, such as a learning rate, as Python's: others would need trust when they are loaded."""
    if type(state) is dict:  # an OrderedDict of weights has attributes, and no numbers
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_plain, state))
    return state.item() if isinstance(state, np.generic) else state


def random_state() -> dict[str, Any]:
    """State of the random number generators of this process: Python's, NumPy's, PyTorch's on CPU and its GPU."""
    numpy: Any = np.random.get_state()  # noqa: NPY002  (the global one, for the user's code)
    state = {
        "python": random.getstate(),
        "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts the generators back to a :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
