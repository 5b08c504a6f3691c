"""Ways to spoil an argument: what a tired user passes, what an unlucky one computes, and what a hostile one tries."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Mutations = dict[str, Callable[[], Any]]  # by what they do

_DTYPES = (torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.uint8)
_NUMBERS = {"NaN": np.nan, "infinite": np.inf, "minus infinite": -np.inf, "1e38": 1e38, "-1e38": -1e38, "1e-40": 1e-40}
_INDICES = {"-1": -1, "1000": 1000, "2^62": 2**62}
_OTHER_TYPES = {"None": None, "a string": "text", "an empty list": [], "a list": [1.5, 2.5], "an object": object()}


def mutations(value: Any) -> Mutations:
    """All that can be done to a value of this type."""
    ways = {label: partial(_same, other) for label, other in _OTHER_TYPES.items() if other is not value}
    if isinstance(value, Tensor):
        return ways | _of_tensor(value)
    numbers: dict[str, Any] = {}
    if isinstance(value, bool):
        numbers = {"1": 1, "0.0": 0.0, "a NumPy bool": np.bool_(value), "the other one": not value}
    elif isinstance(value, int):
        numbers = {f"{n}": n for n in (-(2**70), -1, 0, 1, 2, 2**62, 2**70, 0.5, 2.5, np.nan, True)}
        numbers |= {
            "a NumPy int": np.int64(value),
            "2^64-1 of NumPy": np.uint64(2**64 - 1),
            "a tensor": torch.tensor(value),
        }
    elif isinstance(value, float):
        numbers = _NUMBERS | {f"{n}": n for n in (-1.0, 0.0, -0.0, 0, 1, 2**70, 1e-300, 1e300, 5e-324, True, 1j)}
        numbers |= {"a NumPy float": np.float32(value), "a tensor": torch.tensor(value), "a vector": torch.ones(2)}
    elif isinstance(value, str):
        numbers = {"unknown": "unknown", "empty": "", "3": 3, "bytes": value.encode(), "upper case": value.upper()}
    elif value is None or isinstance(value, torch.Generator):
        numbers = {"3": 3, "-1.5": -1.5, "a tensor": torch.zeros(1, 1, 1, 1, 1), "True": True}
    elif isinstance(value, (list, tuple)):
        return ways | _of_sequence(value)
    elif isinstance(value, Mapping):
        numbers = {"empty": {}, "3": 3, "a key of a number": {3: next(iter(value.values()), None)}}
    return ways | {label: partial(_same, other) for label, other in numbers.items()}


def _same(value: Any) -> Any:
    return value


def _of_tensor(tensor: Tensor) -> Mutations:
    ways: Mutations = {
        "one dimension more": lambda: tensor[None],
        "meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse(),
        "a NumPy array": lambda: tensor.numpy(),
        "a number": lambda: 2.0,
    }
    ways |= {f"{dtype}": partial(tensor.to, dtype) for dtype in _DTYPES if dtype != tensor.dtype}
    if tensor.dim() and len(tensor):
        ways["one dimension less"] = lambda: tensor[0]
    if tensor.dim():
        ways["every other one of twice as many"] = lambda: tensor.repeat_interleave(2, -1)[..., ::2]
    if tensor.dim() > 1:
        ways["transposed memory"] = lambda: tensor.mT.contiguous().mT
    for d in range(tensor.dim()):
        ways[f"larger in dimension {d}"] = partial(_longer, tensor, d)
        ways[f"smaller in dimension {d}"] = partial(tensor.narrow, d, 0, max(tensor.shape[d] - 1, 0))
        ways[f"1 in dimension {d}"] = partial(tensor.narrow, d, 0, min(tensor.shape[d], 1))
        ways[f"empty in dimension {d}"] = partial(tensor.narrow, d, 0, 0)
        ways[f"stride 0 in dimension {d}"] = partial(_stride_zero, tensor, d)
    if tensor.is_floating_point():
        ways["requires grad"] = lambda: tensor.clone().requires_grad_()
        entries: Mapping[str, float] = _NUMBERS | {"-1": -1.0}
    else:
        entries = _INDICES if tensor.dtype == torch.int64 else {}
    for label, entry in entries.items():
        ways[f"one entry {label}"] = partial(_with_entry, tensor, entry)
        ways[f"all entries {label}"] = partial(torch.full_like, tensor, entry)
    return ways


def _longer(tensor: Tensor, dimension: int) -> Tensor:
    return torch.cat([tensor, tensor.narrow(dimension, 0, 1)], dimension)


def _stride_zero(tensor: Tensor, dimension: int) -> Tensor:
    return tensor.narrow(dimension, 0, 1).expand_as(tensor)


def _with_entry(tensor: Tensor, entry: float) -> Tensor:
    spoilt = tensor.clone()
    spoilt.view(-1)[0] = entry
    return spoilt


def _of_sequence(values: list[Any] | tuple[Any, ...]) -> Mutations:
    kind = type(values)
    ways: Mutations = {
        "empty": lambda: kind(),
        "nested": lambda: kind([values]),
        "one less": lambda: kind(values[:-1]),
        "one more": lambda: kind([*values, *values[:1]]),
        "3": lambda: 3,
    }
    if values:
        inner = mutations(values[0])
        ways |= {f"[0]: {label}": lambda make=make: kind([make(), *values[1:]]) for label, make in inner.items()}
    return ways
