"""What a network does with an image, as a list of operations: recorded while it runs on one.

Functions and methods of tensors are seen by a mode of torch, calls of modules by a stand-in for their ``__call__``.
Everything runs for real, so that sizes, branches on them and functions of any library are what they are.
"""

import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Result(NamedTuple):  # as keys of dictionaries, torch.compile takes no other ones
    """Stands for a result among the arguments of an operation: that of another, or one of its several."""

    name: str
    part: int | None = None


@dataclass(frozen=True)
class Attribute:
    """Stands for a parameter or buffer of the network among the arguments of an operation."""

    path: str


@dataclass
class Node:
    """One operation.

    Args:
        name: of its result, unique.
        kind: what it is called: the type of the module, or the name of the function or method without underscores.
        target: what runs: the path of a module, a function, or the name of a method or property of the first argument.
        how: ``"module"``, ``"function"``, ``"method"``, ``"property"``; ``"value"`` reads numbers out of a tensor.
        args: positional arguments, with stand-ins for tensors.
        kwargs: further arguments, likewise.
        within: paths of the modules around it, the innermost last.
        shapes: of its results.
    """

    name: str
    kind: str
    target: Any
    how: str
    args: Any
    kwargs: Any
    within: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    single: bool  # a tensor, not a sequence of them

    @property
    def path(self) -> str | None:
        """Of the module, or of the one that does nothing else."""
        return str(self.target) if self.how == "module" else None

    @property
    def label(self) -> str:
        return self.path or self.name

    @property
    def place(self) -> str:
        """Where it is in the network, for messages."""
        if self.path:
            return f"{self.path} ({self.kind}, node {self.name})"
        return f"{self.kind} (node {self.name}{f', in {self.within[-1]}' if self.within[-1:] > ('',) else ''})"

    def results(self) -> list[Result]:
        return [Result(self.name)] if self.single else [Result(self.name, i) for i in range(len(self.shapes))]


@dataclass
class Call:
    """A call of a module whose code was followed.

    Args:
        path: of the module.
        args: with stand-ins for tensors.
        kwargs: likewise.
        start: number of the first operation within it.
        stop: number of the one after its last.
        outputs: stand-ins for the tensors in what it gave, in order.
    """

    path: str
    args: Any
    kwargs: Any
    start: int
    stop: int
    outputs: list[Any]


@dataclass
class Recording:
    """The operations of one run, the calls around them, and what came out."""

    nodes: list[Node]
    calls: list[Call]
    outputs: Any  # of the network, with stand-ins for tensors
    images: Tensor
    values: Any  # what it gave, with the tensors


IMAGES = Result("images")

# Properties of tensors that are no numbers of it; with methods they need no record.
_VALUES = frozenset(
    ("__bool__", "__int__", "__float__", "__index__", "__array__", "item", "tolist", "numpy", "equal", "allclose")
)
_ACTIVE = threading.local()


def record(
    model: nn.Module, images: Tensor, *, leaf: Callable[[nn.Module], bool], atomic: Callable[[str], bool]
) -> Recording:
    """Runs a network and lists what it does; afterwards the network is as it was before.

    Args:
        model: called with the images.
        images: ``[B, C, H, W]``.
        leaf: modules that are one operation each; the code of others is followed.
        atomic: names of operations that are not followed into functions of torch that are written in Python.
    """
    with torch.inference_mode(False), torch.no_grad(), untouched(model):
        given = images.clone()  # which it may overwrite
        recorder = _Recorder(model, given, leaf, atomic)
        with recorder, _calls_seen(recorder):
            logits = logits_of(model(given))
        return Recording(recorder.nodes, recorder.calls, recorder.stand_in(logits), images, logits)


def logits_of(output: Any) -> Any:
    """The logits: the output of a network, or what it calls so."""
    return output.get("logits", output) if isinstance(output, dict) else getattr(output, "logits", output)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Attributes, containers and buffers of the modules, and random numbers, are afterwards as they were before.

    Within it there is no autocast, and random numbers of torch are those of seed 0.
    """
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    numbers, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what users' code may draw from)
    try:
        with (
            attributes_kept(list(model.modules())),
            torch.random.fork_rng([device.index for device in devices]),
            _full_precision(),
        ):
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.clone()
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(of_numpy)  # noqa: NPY002


@contextmanager
def _full_precision() -> Iterator[None]:
    device = torch.accelerator.current_accelerator()
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type if device else "cpu", enabled=False):
        yield


@contextmanager
def attributes_kept(modules: list[nn.Module]) -> Iterator[None]:
    """What forward code and hooks store in modules, or append to a container in them, does not stay there."""
    attributes = [dict(module.__dict__) for module in modules]
    containers = [v for own in attributes for v in own.values() if isinstance(v, (list, dict, set))]
    contents = [(container, container.copy()) for container in containers]
    try:
        yield
    finally:
        for container, before in contents:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        for module, own in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(own)


@contextmanager
def _calls_seen(recorder: "_Recorder") -> Iterator[None]:
    """Calls of modules go through the recorder of this thread."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        active = getattr(_ACTIVE, "recorder", None)
        run = original if active is None else active.call
        return run(module, *args, **kwargs) if active is None else run(original, module, args, kwargs)

    _ACTIVE.recorder = recorder
    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
        _ACTIVE.recorder = None


class _Recorder(TorchFunctionMode):
    def __init__(
        self, model: nn.Module, images: Tensor, leaf: Callable[[nn.Module], bool], atomic: Callable[[str], bool]
    ) -> None:
        super().__init__()
        self.leaf, self.atomic = leaf, atomic
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.within: list[str] = []
        self.opening: list[Any] = []  # functions that are being followed
        self.used: dict[str, int] = {IMAGES.name: 1}
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
        # Weak: activations go as they do without a recorder.
        self.known: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        for path, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            self._learn(tensor, Attribute(path))
        self._learn(images, IMAGES)

    # --- functions and methods of tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind, how, target = _named(func)
        # One that a helper of it reports once more, as torch.meshgrid is, cannot be followed.
        if how == "function" and func not in self.opening and not self.atomic(kind) and (opened := _opened(func)):
            self.opening.append(func)
            try:
                with self:
                    return opened(*args, **kwargs)
            finally:
                self.opening.pop()
        stand_ins, result, changed = self._watched(func, args, kwargs)
        # Numbers that are read out of a tensor are listed too: what depends on them cannot be followed.
        if changed or next(tensors_in((args, kwargs) if how == "value" else result), None) is not None:
            self._add(kind, how, target, stand_ins, result, changed)
        return result

    def _watched(self, run: Any, args: Any, kwargs: Any) -> tuple[Any, Any, list[Tensor]]:
        """Stand-ins for the arguments of a function, what it gives, and the tensors that it overwrites."""
        given, stand_ins = [*tensors_in((args, kwargs))], self.stand_in((args, kwargs))
        versions = [_version(tensor) for tensor in given]
        result = run(*args, **kwargs)
        return stand_ins, result, [t for t, version in zip(given, versions, strict=True) if _version(t) != version]

    # --- calls of modules

    def call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        compiled = getattr(module, "_orig_mod", None)
        if isinstance(compiled, nn.Module):  # by torch.compile
            return compiled(*args, **kwargs)
        path = self.paths.get(id(module))
        if path is not None and self.leaf(module):
            with torch._C.DisableTorchFunction():
                _ACTIVE.recorder = None
                try:
                    stand_ins, result, changed = self._watched(partial(original, module), args, kwargs)
                finally:
                    _ACTIVE.recorder = self
            self._add(_kind(module), "module", path, stand_ins, result, changed)
            return result
        if path is None:  # no part of the network: what it does is done by the module around it
            return original(module, *args, **kwargs)
        start, (args_in, kwargs_in) = len(self.nodes), self.stand_in((args, kwargs))
        self.within.append(path)
        try:
            result = original(module, *args, **kwargs)
        finally:
            self.within.pop()
        outputs = [self.stand_in(tensor) for tensor in tensors_in(result)]
        self.calls.append(Call(path, args_in, kwargs_in, start, len(self.nodes), outputs))
        return result

    # --- tensors and what stands for them

    def stand_in(self, value: Any) -> Any:
        """The value with a stand-in for each tensor in it; tensors that nothing made are constants, themselves."""
        if isinstance(value, Tensor):
            entry = self.known.get(id(value))
            return entry[1] if entry is not None and entry[0]() is value else value
        return mapped(self.stand_in, value)

    def _learn(self, tensor: Tensor, stand_in: Any) -> None:
        self.known[id(tensor)] = weakref.ref(tensor), stand_in

    def _add(self, kind: str, how: str, target: Any, arguments: Any, result: Any, changed: list[Tensor]) -> None:
        name = self._fresh(str(target).replace(".", "_") if how == "module" else kind)
        made = [*tensors_in(result)]
        if changed and not any(tensor is changed[0] for tensor in made):
            made = [changed[0]]  # of an assignment, which gives nothing
        single = isinstance(result, Tensor) or bool(changed)
        shapes = tuple(tuple(tensor.shape) for tensor in made)
        args, kwargs = arguments
        node = Node(name, kind, target, how, args, kwargs, tuple(self.within), shapes, single)
        self.nodes.append(node)
        old = {id(tensor): self.stand_in(tensor) for tensor in changed}
        for tensor, stand_in in zip(made, node.results(), strict=True):
            if id(tensor) in old or self.stand_in(tensor) is tensor or not changed:
                self._learn(tensor, stand_in)
        for tensor in changed:
            self._update_aliases(tensor)

    def _update_aliases(self, changed: Tensor) -> None:
        """What shares memory with an overwritten tensor is another value from now on."""
        storage, new = changed.untyped_storage().data_ptr(), self.stand_in(changed)
        if not storage:
            return
        for reference, stand_in in list(self.known.values()):
            other = reference()
            if other is None or other is changed or stand_in == new or isinstance(stand_in, Attribute):
                continue
            if other.untyped_storage().data_ptr() != storage:
                continue
            if _geometry(other) == _geometry(changed):
                self._learn(other, new)
            elif _overlap(other, changed):
                views = (stand_in, new, _geometry(other), _geometry(changed))
                self._add("overwritten", "function", overwritten, (views, {}), other, [])

    def _fresh(self, base: str) -> str:
        count = self.used.get(base, 0)
        self.used[base] = count + 1
        name = f"{base}_{count}" if count else base
        return self._fresh(base) if count and name in self.used else name


def _kind(module: nn.Module) -> str:
    """What a layer is called: by torch, if it is one of torch, or of a class that has all its code from one."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.modules") and kind is not nn.Module:
            return kind.__name__
    return type(module).__name__


def overwritten(old: Tensor, new: Tensor, place: Any, new_place: Any) -> Tensor:
    """What a view of memory holds after another view of the same memory has been overwritten, by their places in it."""
    ends = [offset + sum((n - 1) * s for n, s in zip(*view, strict=True)) for *view, offset in (place, new_place)]
    memory = old.new_zeros(1 + max(ends)).as_strided_scatter(old, *place)
    return memory.as_strided_scatter(new, *new_place).as_strided(*place)


def _geometry(tensor: Tensor) -> tuple[Any, Any, int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two views of the same memory share any of it."""
    places = []
    for tensor in (one, other):
        size, stride, offset = _geometry(tensor)
        place = torch.tensor(offset, device="cpu")
        for n, s in zip(size, stride, strict=True):
            place = place[..., None] + torch.arange(n, device="cpu") * s
        places.append(place.flatten())
    return bool(torch.isin(*places).any())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _named(func: Any) -> tuple[str, str, Any]:
    """Kind, way and target of a function that torch reports."""
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__"):  # of a property
        name = str(func.__self__.__name__)
        return name, "property", name
    kind = name.strip("_")
    if name in _VALUES:
        return kind, "value", name
    if isinstance(func, FunctionType) and func.__module__ != "torch._tensor":
        return kind, "function", name if "<locals>" in func.__qualname__ and hasattr(F, name) else func
    of_tensor = str(getattr(func, "__qualname__", "")).partition(".")[0] in ("TensorBase", "Tensor", "_TensorBase")
    return kind, ("method", name)[0] if of_tensor else "function", name if of_tensor else func


def _opened(function: Any) -> Callable[..., Any] | None:
    """A function of torch that is written in Python, without the part of it that hands over to modes."""
    if not isinstance(function, FunctionType) or not function.__module__.startswith("torch."):
        return None
    scope = dict(function.__globals__)
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        scope[name] = lambda *_: False
    opened = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A structure of tuples, lists, dictionaries and slices with a function applied to what is in it."""
    if isinstance(value, Result):
        return value
    if isinstance(value, tuple):
        return tuple(function(entry) for entry in value)
    if isinstance(value, list):
        return [function(entry) for entry in value]
    if isinstance(value, dict):
        return {key: function(entry) for key, entry in value.items()}
    if isinstance(value, slice):
        return slice(function(value.start), function(value.stop), function(value.step))
    return value
