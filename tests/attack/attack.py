"""One attack: a call with spoilt arguments, and what is wrong with its outcome."""

import faulthandler
import math
import random
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

import numpy as np
import scipy.sparse
import scipy.special  # noqa: F401 - these three add filters of warnings when they are imported
import sympy  # noqa: F401
import torch
from torch import Tensor, nn

from segloss.common import checks, precision
from tests.attack.call import Call, shape_of
from tests.attack.mutations import mutations

EVERY_TENSOR = "every tensor"
_TOGETHER = ("meta", "torch.float64", "torch.float16", "sparse", "requires grad")
_HUGE = str(2**62)
_DRAWN = "random state of torch"
_RELATIONS = r"to go with|that of|size of|sequence of|of the|as of|as|at least|(of|for) \d+"
_NAMED = (
    r"^NAME[:[.]",
    r'^\w+\[\d+\]\["NAME"\]',  # in a list of predictions
    rf"\b({_RELATIONS}) NAME\b",
    r"\] and NAME\b",
    r"\bNAME=",
    r"\(see [\w ]*\bNAME\b",
)
_TO_EXIT = 120.0  # seconds at least: other work of the machine must not end the process

_T = TypeVar("_T")

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


def assert_withstands(call: Call, spoilt: list[Spoil], seconds: float = 10.0) -> None:
    """Raises AssertionError where the call neither gives a documented result nor an error that names an argument."""
    try:
        _attack(call, spoilt, seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}; spoilt: {spoilt}") from error


def _attack(call: Call, spoilt: list[Spoil], seconds: float) -> None:
    arguments, names = _spoil(call, spoilt)
    networks = _modules([call.function, getattr(call.function, "__self__", None), arguments])
    remembered = [_contents(network) for network in networks]
    copies = [(tensor, tensor.detach().clone(), tensor._version) for tensor in _tensors(arguments)]
    draws = call.random or ("generator" in arguments and arguments["generator"] is None)
    before = _state()
    try:
        with _time_limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("error")
            filters = list(warnings.filters)
            try:
                result = call.function(**arguments)
            finally:
                changed = ["warning filters"] * (warnings.filters != filters)
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
    changed += [what for what, value in _state().items() if value != before[what] and not (draws and what == _DRAWN)]
    assert not changed, f"changed: {', '.join(changed)}"
    for network, contents in zip(networks, remembered, strict=True):
        for what, value in _contents(network).items():
            assert _same(value, contents[what]), f"{what} of a network changed"
    for tensor, copy, version in copies:
        assert tensor._version == version, "an argument was written into"
        assert _equal(tensor.detach(), copy), "an argument was written into"
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
    return arguments, names


def _names_one(names: set[str], message: str) -> bool:
    """At its beginning, or as what the argument there does not fit."""
    return any(re.search(way.replace("NAME", re.escape(name)), message) for name in names for way in _NAMED)


def _check_result(call: Call, arguments: dict[str, Any], result: Any) -> None:
    accepted = [name for name, value in arguments.items() if not _allowed(call, name, value)]
    assert not accepted, f"NaN or infinity was accepted in {accepted}"
    devices, dtypes = ({getattr(t, what) for t in _tensors(arguments)} for what in ("device", "dtype"))
    for tensor in _tensors(result):
        assert not devices or tensor.device in devices, f"a result on {tensor.device} of arguments on {devices}"
        wide = tensor.dtype == torch.float64 and torch.float64 not in dtypes
        assert not wide, "a float64 result of narrower arguments"
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
    return _found(value, Tensor)


def _modules(value: Any) -> list[nn.Module]:
    return _found(value, nn.Module)


def _found(value: Any, kind: type[_T]) -> list[_T]:
    """All of this kind in nested sequences and mappings."""
    if isinstance(value, kind):
        return [value]
    return [found for part in _parts(value) for found in _found(part, kind)]


def _parts(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []


def _allowed(call: Call, name: str, value: Any) -> bool:
    """Whether an argument may be accepted as far as NaN and infinity go."""
    if name in call.infinite:
        value = _without_infinity(value)
    return name in call.any_value or _finite(value)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.masked_fill(value == torch.inf, 0)
    return 0 if isinstance(value, (float, np.floating)) and value == math.inf else value


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta or bool(value.detach().to_dense().isfinite().all())
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "fc" or bool(np.isfinite(value).all())
    if isinstance(value, (float, complex, np.floating)):
        return math.isfinite(abs(value))
    return all(_finite(part) for part in _parts(value))


def _contents(network: nn.Module) -> dict[str, Any]:
    """All that a call may not change in the network of a user."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    return {
        "parameters or buffers": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "gradients": {
            name: None if (grad := tensor.grad) is None else grad.clone() for name, tensor in tensors.items()
        },
        "training modes": [module.training for module in network.modules()],
        "hooks": [
            len(hooks)
            for module in network.modules()
            for name, hooks in vars(module).items()
            if name.endswith("_hooks")
        ],
    }


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_same(part, other[name]) for name, part in value.items())
    return _equal(value, other) if isinstance(value, Tensor) and isinstance(other, Tensor) else value == other


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    if tensor.shape != copy.shape or tensor.is_meta:
        return tensor.shape == copy.shape
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
        "default device": torch.empty(0).device,  # what torch 2.7 tells of it fails after it was set to None
        "precision of products": precision._get(),
        "check_values": checks._always,
        _DRAWN: torch.get_rng_state().numpy().tobytes(),
        "random state of NumPy": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "random state of Python": random.getstate(),
    }


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends a call that computes too long in Python; one that hangs otherwise ends the process, with a traceback."""

    def give_up(signum: int, frame: FrameType | None) -> NoReturn:
        raise AssertionError(f"no result after {seconds:g} seconds")

    previous = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(max(_TO_EXIT, 6 * seconds), exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
