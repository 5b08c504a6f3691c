"""One attack: a call with spoilt arguments, and what is wrong with its outcome."""

import faulthandler
import math
import random
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from tests.attack.call import Call, shape_of
from tests.attack.mutations import mutations

EVERY_TENSOR = "every tensor"
_TOGETHER = ("meta", "torch.float64", "torch.float16", "sparse", "requires grad")
_HUGE = str(2**62)
_DRAWN = "random state of torch"

Spoil = tuple[str, str]  # the name of an argument and what is done to it


def spoils(call: Call) -> list[Spoil]:
    """All that can be done to a single argument, and some of it to all tensors at once."""
    open_to_attack = {name: value for name, value in call.arguments.items() if name not in call.fixed}
    single = [
        (name, way)
        for name, value in open_to_attack.items()
        for way in mutations(value)
        if not (name in call.counts and way.endswith(_HUGE))
    ]
    return single + [
        (EVERY_TENSOR, way) for way in _TOGETHER if any(isinstance(v, Tensor) for v in open_to_attack.values())
    ]


def attack(call: Call, spoilt: list[Spoil], seconds: float = 10.0) -> None:
    """Raises AssertionError where the call neither gives a documented result nor an error that names an argument."""
    arguments, names = _spoil(call, spoilt)
    copies = [(tensor, tensor.detach().clone(), tensor._version) for tensor in _tensors(arguments)]
    draws = call.random or ("generator" in arguments and arguments["generator"] is None)
    before = _state()
    try:
        with _time_limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("error")
            result = call.function(**arguments)
            _check_result(call, arguments, result)
    except call.errors:
        pass
    except (TypeError, ValueError) as error:
        if not _names_one(names, str(error)):
            raise AssertionError(f"the error names none of {sorted(names)}: {error}") from error
        if "\n" in str(error):
            raise AssertionError(f"the error has several lines: {error}") from error
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    changed = [what for what, value in _state().items() if value != before[what] and not (draws and what == _DRAWN)]
    assert not changed, f"changed: {', '.join(changed)}"
    for tensor, copy, version in copies:
        assert tensor._version == version, "an argument was written into"
        assert tensor.is_meta or _equal(tensor.detach(), copy), "an argument was written into"
        assert not tensor.is_leaf or tensor.grad is None, "an argument got a gradient"


def _spoil(call: Call, spoilt: list[Spoil]) -> tuple[dict[str, Any], set[str]]:
    """The arguments, and the names of which an error must have one."""
    arguments, names = dict(call.arguments), set[str]()
    for target, way in spoilt:
        for name, value in call.arguments.items():
            together = target == EVERY_TENSOR and isinstance(value, Tensor) and name not in call.fixed
            if (name == target or together) and (make := mutations(value).get(way)):
                arguments[name] = make()
                names.add(name)
        if way == "meta":
            names.update(("device", "meta"))
    return arguments, names


def _names_one(names: set[str], message: str) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", message) for name in names)


def _check_result(call: Call, arguments: dict[str, Any], result: Any) -> None:
    accepted = [name for name in call.finite if not _finite(arguments[name])]
    assert not accepted, f"NaN or infinity was accepted in {accepted}"
    if call.shape is not None:
        assert shape_of(result) == (expected := call.shape(arguments)), f"{shape_of(result)} instead of {expected}"
    if not all(_finite(value) for value in arguments.values()):
        return
    assert _finite(result), "finite arguments gave a result that is not finite"
    inputs = [tensor for tensor in _tensors(arguments) if tensor.requires_grad]
    outputs = [tensor.to_dense().sum() for tensor in _tensors(result) if tensor.requires_grad]
    if inputs and outputs:
        gradients = torch.autograd.grad(torch.stack(outputs).sum(), inputs, allow_unused=True)
        assert _finite(gradients), "finite arguments gave a gradient that is not finite"


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested sequences and mappings."""
    if isinstance(value, Tensor):
        return [value]
    parts = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta or bool(value.detach().to_dense().isfinite().all())
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "fc" or bool(np.isfinite(value).all())
    if isinstance(value, (float, complex, np.floating)):
        return math.isfinite(abs(value))
    parts = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    return all(_finite(part) for part in parts)


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    if tensor.is_sparse:
        tensor, copy = tensor.to_dense(), copy.to_dense()
    return bool(((tensor == copy) | ((tensor != tensor) & (copy != copy))).all())  # NaN is in its place


def _state() -> dict[str, Any]:
    """What belongs to the whole process, and no function may change."""
    return {
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "warning filters": list(warnings.filters),
        _DRAWN: torch.get_rng_state().numpy().tobytes(),
        "random state of NumPy": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "random state of Python": random.getstate(),
    }


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends a call that hangs in Python; one that hangs in C ends the process, with a traceback."""

    def give_up(signum: int, frame: FrameType | None) -> NoReturn:
        raise AssertionError(f"no result after {seconds:g} seconds")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
