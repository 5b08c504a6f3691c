"""The operations of a network for batches of any size: what two recordings of it have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segattr.networks.reader.record import IMAGES, Attribute, Call, Node, Recording, Result, mapped, tensors_in

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Batch:
    """Stands for a multiple of the number of images among the arguments of an operation."""

    factor: int


@dataclass(frozen=True)
class Size:
    """Stands for the size of a result of its operation along some axes among the other arguments."""

    result: Result
    axes: tuple[int, ...]


class Different(Exception):
    """Two recordings are not the same operations with the same arguments, or multiples of the number of images.

    Args:
        problem: what differs.
        within: paths of the modules around the first difference, the innermost last.
    """

    def __init__(self, problem: str, within: tuple[str, ...] = ()) -> None:
        super().__init__(problem)
        self.within = within


@dataclass
class Graph:
    """The operations of a network, in the order in which they run.

    Args:
        nodes: the operations.
        calls: of modules whose code was followed.
        outputs: of the network, with stand-ins for tensors.
        axes: for each result, the axis along which images lie.
        dependent: results that depend on the images.
        size: of the images, if another size would mean other operations.
        dtype, device: of the images.
        modules: of the network, when it was read.
        modes: training or evaluation, of each of them.
        verified: sizes of images for which the operations have been compared with the network itself.
        plan: what is made of it, once.
    """

    nodes: list[Node]
    calls: list[Call]
    outputs: Any
    axes: dict[Result, int | None]
    dependent: set[Result]
    size: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    modules: list[nn.Module]
    modes: list[bool]
    verified: set[tuple[int, ...]] = field(default_factory=set)
    plan: Any = None

    def __post_init__(self) -> None:
        self.made = {result: node for node in self.nodes for result in node.results()}
        # Of the results, for two images of the size that was recorded.
        self.shapes = {r: node.shapes[r.part or 0] for r, node in self.made.items()}


def common(one: Recording, two: Recording, model: nn.Module) -> Graph:
    """The graph of which both are recordings, of two and of three images.

    Raises:
        Different: there is none.
        TypeError: something in it is made of the images by other means than functions of torch.
    """
    counts = len(one.images), len(two.images)
    nodes: list[Node] = []
    axes: dict[Result, int | None] = {IMAGES: 0}
    sizes = {IMAGES: (tuple(one.images.shape), tuple(two.images.shape))}  # of each result in both
    for a, b in zip(one.nodes, two.nodes, strict=False):
        if (a.name, a.how, len(a.shapes), a.within) != (b.name, b.how, len(b.shapes), b.within):
            shared = tuple(m for m, other in zip(a.within, b.within, strict=False) if m == other)
            raise Different(f"{a.place} and {b.place}", shared)
        try:
            known = {result: sizes[result] for result in results_in((a.args, a.kwargs))}
            args, kwargs = _merged((a.args, a.kwargs), (b.args, b.kwargs), counts, known)
        except Different as different:
            raise Different(f"{a.place}: {different}", a.within) from None
        except TypeError as error:
            raise TypeError(f"model: {a.place} {error}") from None
        nodes.append(Node(a.name, a.kind, a.target, a.how, args, kwargs, a.within, a.shapes, a.single))
        for result, shape, other in zip(a.results(), a.shapes, b.shapes, strict=True):
            axes[result] = _axis(shape, other, counts)
            sizes[result] = shape, other
    if len(one.nodes) != len(two.nodes):
        raise Different("the number of operations")
    calls = []
    for call, again in zip(one.calls, two.calls, strict=True):
        args, kwargs = _merged((call.args, call.kwargs), (again.args, again.kwargs), counts, {})
        calls.append(Call(call.path, args, kwargs, call.start, call.stop, call.outputs))
    images, modules = one.images, list(model.modules())
    size = tuple(images.shape[2:]) if images.shape[2:] == two.images.shape[2:] else None
    modes = [module.training for module in modules]
    parts = (nodes, calls, one.outputs, axes, dependents(nodes), size, images.dtype, images.device, modules, modes)
    graph = Graph(*parts)
    graph.shapes[IMAGES] = tuple(images.shape)
    return graph


def run(node: Node, model: nn.Module, results: Mapping[Result, Any], images: int) -> Any:
    """Runs an operation as the network does."""
    return call(node, model, *filled((node.args, node.kwargs), model, results, images))


def call(node: Node, model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Runs what an operation of the network calls with other arguments."""
    if node.how == "module":
        return model.get_submodule(node.target)(*args, **kwargs)
    if node.how == "property":
        return getattr(args[0], node.target)
    if node.how == "method":
        if node.kind == "setitem":
            args[0][args[1]] = args[2]
            return args[0]
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    function = getattr(F, node.target) if isinstance(node.target, str) else node.target
    return function(*args, **kwargs)


def filled(arguments: Any, model: nn.Module, results: Mapping[Result, Any], images: int) -> Any:
    """Arguments with what their stand-ins stand for."""

    def fill(value: Any) -> Any:
        if isinstance(value, Result):
            return results[value]
        if isinstance(value, Attribute):
            module, _, name = value.path.rpartition(".")
            return getattr(model.get_submodule(module), name)
        if isinstance(value, Batch):
            return value.factor * images
        if isinstance(value, Size):
            return _along(results[value.result].shape, value.axes)
        return mapped(fill, value)

    return fill(arguments)


def store(node: Node, output: Any, results: dict[Result, Any]) -> None:
    """Keeps what an operation gave under the names of its results."""
    if node.single:
        results[Result(node.name)] = output
    else:
        for i, tensor in enumerate(tensors_in(output)):
            results[Result(node.name, i)] = tensor


def results_in(arguments: Any) -> list[Result]:
    """The results among arguments, in order."""
    return _of_kind(Result, arguments)


def counts_images(nodes: list[Node]) -> bool:
    """Whether numbers among the arguments of operations are multiples of the number of images."""
    return any(_of_kind(Batch, (node.args, node.kwargs)) for node in nodes)


def _of_kind(kind: type[_Kind], arguments: Any) -> list[_Kind]:
    found: list[_Kind] = []

    def look(value: Any) -> Any:
        if isinstance(value, kind):
            found.append(value)
        return mapped(look, value)

    look(arguments)
    return found


def needed(nodes: list[Node], wanted: set[Result]) -> list[Node]:
    """The operations that results depend on, in order."""
    wanted, kept = set(wanted), []
    for node in reversed(nodes):
        if wanted.intersection(node.results()):
            wanted.update(results_in((node.args, node.kwargs)))
            kept.append(node)
    return kept[::-1]


def dependents(nodes: list[Node]) -> set[Result]:
    """The results that depend on the images."""
    dependent = {IMAGES}
    for node in nodes:
        if not dependent.isdisjoint(results_in((node.args, node.kwargs))):
            dependent.update(node.results() or [Result(node.name)])
    return dependent


def _axis(shape: tuple[int, ...], other: tuple[int, ...], counts: tuple[int, int]) -> int | None:
    """The axis along which images lie; smaller images have fewer pixels, so that no other axis grows."""
    few, many = counts
    if len(shape) == len(other):
        for axis, (a, b) in enumerate(zip(shape, other, strict=True)):
            if a and a % few == 0 and a // few * many == b:
                return axis
    return None


Sizes = Mapping[Result, tuple[tuple[int, ...], tuple[int, ...]]]


def _merged(one: Any, two: Any, counts: tuple[int, int], sizes: Sizes) -> Any:
    """Arguments of both recordings as one, with :class:`Batch` and :class:`Size` for numbers that differ."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or not torch.equal(one, two):
            raise TypeError("takes a tensor that no function of torch made of the images, and another for other images")
        return one
    sequences = isinstance(one, (tuple, list)) and not isinstance(one, Result)
    keys = len if sequences else dict.keys if isinstance(one, dict) else type
    if type(one) is not type(two) or keys(one) != keys(two):
        raise Different(f"{one} and {two}")
    if sequences:
        merged: Any = [_merged(a, b, counts, sizes) for a, b in zip(one, two, strict=True)]
        return merged if isinstance(one, list) else tuple(merged)
    if isinstance(one, dict):
        return {key: _merged(value, two[key], counts, sizes) for key, value in one.items()}
    if isinstance(one, slice):
        return slice(*_merged((one.start, one.stop, one.step), (two.start, two.stop, two.step), counts, sizes))
    if _same(one, two):
        return one
    found = None
    if isinstance(one, int):
        several = (_size(one, two, sizes, count) for count in (2, 3))
        found = _size(one, two, sizes, 1) or _batch(one, two, counts) or next(filter(None, several), None)
    if found is None:
        raise Different(f"{one} and {two}")
    return found


def _size(one: int, two: int, sizes: Sizes, count: int) -> Size | None:
    """An axis, or several beside each other, of what an operation takes, with these sizes in the two recordings."""
    for result, (before, after) in sizes.items():
        for first in range(len(before) - count + 1):
            axes = tuple(range(first, first + count))
            if len(before) == len(after) and (_along(before, axes), _along(after, axes)) == (one, two):
                return Size(result, axes)
    return None


def _batch(one: int, two: int, counts: tuple[int, int]) -> Batch | None:
    return Batch(one // counts[0]) if one % counts[0] == 0 and one // counts[0] * counts[1] == two else None


def _along(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    along = 1
    for axis in axes:  # what torch.compile can follow
        along = along * shape[axis]
    return along


def _same(one: Any, two: Any) -> bool:
    try:
        return one is two or bool(one == two) or (one != one and two != two)
    except (ValueError, TypeError, RuntimeError):  # arrays
        return False
