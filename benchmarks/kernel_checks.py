"""Every Triton kernel of ``segloss``, forward and backward, against its definition in float64.

On a GPU for ``benchmarks.gpu``; in Triton's interpreter the same cases run on the CPU.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import segloss
from segloss._average import log_sum_reference
from segloss.bilateral.reference import gaussian_filter_reference, guide_gradient_reference
from segloss.common.reduction import LOG_FLOOR, wide_dtype

# Relative errors, in the norm.
_FILTER = {torch.float32: 5e-4, torch.float64: 1e-12}
_GUIDE = {torch.float32: 1e-3, torch.float64: 1e-12}
_LOG_SUM = {torch.float32: 1e-5, torch.float64: 1e-12}

Errors = dict[str, tuple[float, float]]  # error and bound


class Filter(NamedTuple):
    """A case of the bilateral kernels: ``[batch, channels, pixels]`` values, ``dims`` features."""

    batch: int
    channels: int
    dims: int
    pixels: int
    dtype: torch.dtype = torch.float32
    tolerance: float = 0.0  # above 0: block-sparse
    spread: float = 8.0  # of the features, in sigmas

    def __str__(self) -> str:
        method = f"block-sparse {self.tolerance:g}" if self.tolerance else "dense"
        where = f"{self.dims} features of spread {self.spread:g}"
        return f"bilateral {method}, {self.batch}x{self.channels}x{self.pixels} {_name(self.dtype)}, {where}"


class LogSum(NamedTuple):
    """A case of the kernels of the average prediction: logits ``[batch, classes, pixels]``."""

    batch: int
    classes: int
    pixels: int
    dtype: torch.dtype = torch.float32
    masked: bool = False
    last: bool = False  # channels last
    gap: float = 0.0  # how far a class is below the others

    def __str__(self) -> str:
        marks = {"masked": self.masked, "channels last": self.last, f"a class {self.gap:g} below": self.gap}
        what = f"log_sum, {self.batch}x{self.classes}x{self.pixels} {_name(self.dtype)}"
        return ", ".join([what, *(mark for mark, given in marks.items() if given)])


# The most usual first; then what takes another path or another build: blocks of channels, 32 and 64 columns, no product
# for the distances, pixels too far out for it, a last tile of one pixel, a single pixel.
FILTERS = (
    Filter(2, 21, 5, 320),
    Filter(1, 21, 5, 641, tolerance=1e-4),
    Filter(1, 21, 5, 333, tolerance=1e-4, spread=1e4),
    Filter(1, 81, 5, 193),
    Filter(2, 1, 3, 257, tolerance=1e-4),
    Filter(1, 3, 10, 257, tolerance=1e-4),
    Filter(1, 3, 21, 130),
    Filter(1, 3, 25, 130),
    Filter(1, 1, 5, 1),
    Filter(2, 5, 5, 130, torch.float64),
    Filter(1, 5, 5, 257, torch.float64, tolerance=1e-4),
)
LOG_SUMS = (
    LogSum(2, 21, 4096),
    LogSum(2, 21, 3015, torch.bfloat16, masked=True, last=True),
    LogSum(3, 2, 3015, torch.float16),
    LogSum(2, 150, 1001, torch.bfloat16),
    LogSum(2, 21, 3015, torch.float32, masked=True, gap=200.0),
    LogSum(1, 256, 301, torch.float32, last=True),
    LogSum(1, 3, 1),
    LogSum(2, 33, 301, torch.float64, masked=True),
)


def relative(result: Tensor, exact: Tensor) -> float:
    return ((result - exact).norm() / exact.norm()).item()


def cases() -> list[tuple[str, Callable[[str], Errors]]]:
    """Name and check of each, from a device to the errors."""
    named: list[tuple[str, Callable[[str], Errors]]] = [(str(case), partial(check_log_sum, case)) for case in LOG_SUMS]
    return named + [(str(case), partial(check_filter, case)) for case in FILTERS]


def check_filter(case: Filter, device: str) -> Errors:
    """Filtered values, which are their gradient too, and the gradient of the features."""
    from segloss.bilateral import kernels

    values, grad, features = (t.to(device) for t in filter_inputs(case))
    exact = [t.double() for t in (grad, values, features)]
    filtered = kernels.gaussian_filter(values, features, case.tolerance)
    gradient = kernels.guide_gradient(grad, values, features, case.tolerance)
    slack = case.tolerance  # what may be left out
    errors = {"error": (relative(filtered, gaussian_filter_reference(*exact[1:])), _FILTER[case.dtype] + slack)}
    if case.pixels > 1:  # a single one has no slope
        wanted = guide_gradient_reference(*exact)
        errors["gradient error"] = (relative(gradient, wanted), _GUIDE[case.dtype] + slack)
    return errors


def filter_inputs(case: Filter) -> tuple[Tensor, Tensor, Tensor]:
    """Values, a gradient, and features in clusters whose pixels are in random places."""
    random = torch.Generator().manual_seed(0)
    shape = (case.batch, case.channels, case.pixels)
    values, grad = torch.rand(shape, generator=random), torch.randn(shape, generator=random)
    centres = case.spread * (2 * torch.rand(case.batch, case.dims, 4, generator=random) - 1)
    features = centres[:, :, torch.randint(4, (case.pixels,), generator=random)]
    features += torch.rand(features.shape, generator=random)
    return values.to(case.dtype), grad.to(case.dtype), features.to(case.dtype)


def check_log_sum(case: LogSum, device: str) -> Errors:
    from segloss import _average_kernels as kernels

    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(case.batch, case.classes, case.pixels, generator=random)
    logits[0, 1] -= case.gap
    grad = torch.randn(case.batch, case.classes, generator=random).to(device, wide_dtype(logits.to(case.dtype)))
    valid = (torch.rand(case.batch, case.pixels, generator=random) < 0.7).to(device) if case.masked else None
    logits = logits.to(device, case.dtype)
    if case.last:
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    top, total, *saved = kernels.log_sum(logits, valid)
    gradient = kernels.log_sum_backward(grad, logits, top, total, *saved)
    double = logits.double().requires_grad_()
    exact = log_sum_reference(double, valid)
    wanted = torch.autograd.grad(exact, double, grad.double())[0]
    bound = _LOG_SUM[top.dtype]
    return {
        "error": (relative((top + total.log()).clamp(min=LOG_FLOOR), exact.detach()), bound),
        "gradient error": (relative(gradient, wanted), max(bound, torch.finfo(case.dtype).eps)),
    }


def functions() -> dict[str, Any]:
    """The Triton functions of ``segloss`` by name, read from its modules: a new one is not forgotten."""
    modules = [importlib.import_module(module.name) for module in pkgutil.walk_packages(segloss.__path__, "segloss.")]
    found = [thing for module in modules for thing in vars(module).values() if _is_triton(thing)]
    return {_full_name(function): function for function in found}


@contextmanager
def watched() -> Iterator[set[str]]:
    """The names of the kernels that are launched within it."""
    launched, known = set[str](), functions()
    for name, function in known.items():
        function.add_pre_run_hook(partial(_note, launched, name))
    try:
        yield launched
    finally:
        for function in known.values():
            function.pre_run_hooks.pop()


def unreached(launched: set[str]) -> list[str]:
    """The Triton functions that are neither among those launched nor called by them."""
    known = functions()
    reached, waiting = set[str](), list(launched)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            body = known[name].fn
            called = [body.__globals__.get(word) for word in body.__code__.co_names]
            waiting += [_full_name(thing) for thing in called if _is_triton(thing)]
    return sorted(known.keys() - reached)


def _note(launched: set[str], name: str, *_: Any, **__: Any) -> None:
    launched.add(name)


def _is_triton(thing: object) -> bool:
    from triton.runtime.jit import KernelInterface

    return isinstance(thing, KernelInterface)


def _full_name(function: Any) -> str:
    return f"{function.fn.__module__}.{function.fn.__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[1]
