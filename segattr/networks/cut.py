"""Where the code of a classifier can be cut in two, followed by torch.fx from the logits back to the feature map."""

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from segloss.common.checks import shape_text

# What a head is made of, by type of module, function, or name of a method.
_SHAPES = (nn.Flatten, torch.flatten, torch.reshape, torch.squeeze, "flatten", "view", "reshape", "squeeze")
_POOLS = (
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d),
    *(F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d),
)
_REDUCTIONS = (torch.mean, torch.amax, torch.logsumexp, "mean", "amax", "logsumexp")  # pools, over height and width
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d, "contiguous")
_BODIES = (nn.MaxPool2d, nn.Conv2d, F.max_pool2d, F.conv2d)  # ... and what it is not

_REMEDY = "name the layer whose output is the feature map, or build Classifier(features, head) from two parts"


@dataclass
class _Parts:
    """What a cut gives in one mode.

    Args:
        features: takes the root and images.
        head: takes the root and feature maps.
        linear: name of the layer with the weights of class activation maps, if there is one.
        last: name of the last linear layer or convolution.
    """

    features: Callable[[nn.Module, Tensor], Tensor]
    head: Callable[[nn.Module, Tensor], Tensor]
    linear: str | None
    last: str | None


class _Root(nn.Module):
    """Calls the model as a user does; constants that torch.fx finds in its code are stored here, not in the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class Cut:
    """The two parts of a model as functions, for each mode that it is called in."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        self.root, self.layer = _Root(model), layer
        self.opened = {"model"}  # modules whose code is followed
        if layer is not None:
            names = f"model.{layer}".split(".")
            self.opened.update(".".join(names[:i]) for i in range(1, len(names)))
        self.cached: dict[tuple[bool, ...], _Parts] = {}

    def __reduce__(self) -> Any:  # the functions are made again in a copy or another process
        return Cut, (self.root.model, self.layer)

    def features(self, images: Tensor) -> Tensor:
        maps = self.parts().features(self.root, images)
        if not isinstance(maps, Tensor) or maps.dim() != 4:
            got = shape_text(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(f"layer: expected one that gives a feature map [B, D, h, w], got {got}: {_REMEDY}")
        return maps

    def head(self, features: Tensor) -> Tensor:
        # What follows may overwrite its input, as the activation after a convolution often does.
        return self.parts().head(self.root, features.clone())

    def parts(self) -> _Parts:
        mode = self._mode()
        if mode not in self.cached:
            parts = self._make()
            self.cached[self._mode()] = parts  # more modules may have been opened
            return parts
        return self.cached[mode]

    def _mode(self) -> tuple[bool, ...]:
        return tuple(self.root.get_submodule(name).training for name in sorted(self.opened))

    def _make(self) -> _Parts:
        nodes, cut = _find_cut(self.root, self.opened, self.layer)
        output = _output(nodes)
        return _Parts(
            _compile(_features_graph(nodes, cut)),
            _compile(_head_graph(nodes, cut, output, self.layer)),
            _linear(self.root, cut, output),
            _last(self.root, cut, output),
        )


def weights_of(head: nn.Module) -> tuple[str | None, str | None]:
    """Names of the weights of class activation maps and of the last layer in the head of a user."""
    root = _Root(head)
    try:
        nodes, cut = _find_cut(root, {"model"}, "")
    except TypeError:  # code that cannot be followed
        return None, None
    names = _linear(root, cut, _output(nodes)), _last(root, cut, _output(nodes))
    linear, last = (None if name is None else "head" + name.removeprefix("model") for name in names)
    return linear, last


# --- following the code


class _Proxy(fx.Proxy):
    """Keeps ``+=`` apart from ``+``, which overwrites nothing."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Follows the code of the opened modules only."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.opened = opened | {""}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """A tensor that is used directly is found by its name, also where it stands in for a parameter."""
        if isinstance(a, Tensor):
            for name, own in (*self.root.named_parameters(), *self.root.named_buffers()):
                if own is a:
                    return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)


def _trace(root: nn.Module, opened: set[str]) -> list[fx.Node]:
    """The operations of the opened modules in their order, the input first, the output last."""
    with _attributes_kept(root, opened):
        try:
            return list(_Tracer(opened).trace(root).nodes)
        except Exception as error:  # whatever the code of the model does with a stand-in for an image
            raise TypeError(f"model: torch.fx cannot trace it: {error}: {_REMEDY}") from error


@contextmanager
def _attributes_kept(root: nn.Module, opened: set[str]) -> Iterator[None]:
    """Forward code may store results in its module: stand-ins for images do not stay there."""
    modules = [root.get_submodule(name) for name in opened]
    attributes = [dict(module.__dict__) for module in modules]
    try:
        yield
    finally:
        for module, before in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(before)


def _output(nodes: list[fx.Node]) -> fx.Node:
    """The logits: the output of the model, or what it calls so."""
    output: Any = nodes[-1].args[0]
    if isinstance(output, fx.Node) and isinstance(output.target, type):  # a dataclass or named tuple
        output = inspect.signature(output.target).bind(*output.args, **output.kwargs).arguments
    output = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(output, fx.Node):
        raise TypeError(f"model: expected logits as its output, or an object with logits, got {nodes[-1].args[0]}")
    return output


def _find_cut(root: nn.Module, opened: set[str], layer: str | None) -> tuple[list[fx.Node], fx.Node]:
    """The operations, and the one that gives the feature map: that of a layer, or the input for ``""``.

    Opens the modules that must be looked into to find it.
    """
    while True:
        nodes = _trace(root, opened)
        cut, container = _search(root, _output(nodes), _call(nodes, layer))
        if container is not None:
            try:
                _trace(root, opened | {container})
            except TypeError:
                if cut is None:
                    raise
            else:
                opened.add(container)
                continue
        if cut is None:
            raise TypeError(f"model: expected logits made from pooled or flattened feature maps, got others: {_REMEDY}")
        return nodes, cut


def _call(nodes: list[fx.Node], layer: str | None) -> fx.Node | None:
    if not layer:
        return None if layer is None else nodes[0]
    calls = [node for node in nodes if node.op == "call_module" and node.target == f"model.{layer}"]
    if len(calls) != 1:
        raise ValueError(f"layer: expected a module that is called once, got {layer}, called {len(calls)} times")
    return calls[0]


def _search(root: nn.Module, output: fx.Node, wanted: fx.Node | None) -> tuple[fx.Node | None, str | None]:
    """Follows the logits back to the feature map, the wanted one or the last one.

    Gives the feature map as far as it is known, and the name of a module that must be looked into to be sure.
    """
    cut, node = wanted, output
    pooled = weighted = False
    while node is not wanted:
        kind, source = _kind(root, node), _source(node)
        if source is not None and _is_of_vectors(root, node):
            source = _source(source)
        complete = pooled and weighted
        if source is None or kind == "body" or (complete and kind != "pool"):
            break
        if kind == "container":
            while node.op != "call_module":
                node = node.all_input_nodes[0]
            return cut, str(node.target)
        if wanted is None and (kind in ("shape", "pool") or (kind == "linear" and pooled)):
            cut = source
        pooled, weighted = pooled or kind == "pool", weighted or kind == "linear"
        node = source
    return cut, None


def _kind(root: nn.Module, node: fx.Node) -> str:
    """What an operation is in a head: shape, pool, identity, linear, other; or body, or a container of operations."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None:
        if isinstance(module, nn.Sequential) or not type(module).forward.__module__.startswith("torch.nn"):
            return "container"
        if isinstance(module, nn.Linear) or _is_pointwise(module):
            return "linear"
    elif node.target in (operator.getitem, getattr):
        inner = node.all_input_nodes[0]
        return "container" if inner.op == "call_module" and _kind(root, inner) == "container" else "other"
    elif node.target is F.linear:
        return "linear"
    elif node.target in _REDUCTIONS:
        return "pool" if _reduced(node) in ({2, 3}, {2}, {3}) else "other"
    elif node.target is F.max_pool2d and len(node.all_input_nodes) > 1:  # a window of the size of the map
        return "pool"
    for kind, table in (("shape", _SHAPES), ("pool", _POOLS), ("identity", _IDENTITIES), ("body", _BODIES)):
        types = tuple(entry for entry in table if isinstance(entry, type))
        if node.target in table or isinstance(module, types):
            return kind
    return "other"


def _reduced(node: fx.Node) -> set[int]:
    """The dimensions of a map ``[B, D, h, w]`` that an operation such as the mean takes away."""
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", ()))
    return {d % 4 for d in ([dims] if isinstance(dims, int) else dims or ())}


def _is_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
        and module.padding in ((0, 0), "valid", "same")
    )


def _source(node: fx.Node) -> fx.Node | None:
    """The one result that an operation works on; None if there are several, or none."""
    sources = [n for n in node.all_input_nodes if n.op != "get_attr" and not _is_size(n)]
    return sources[0] if len(sources) == 1 else None


def _is_size(node: fx.Node) -> bool:
    """Whether a result is made of sizes of tensors, not of their values."""
    if (node.op == "call_method" and node.target in ("size", "dim")) or (
        node.target is getattr and node.args[1] in ("shape", "ndim")
    ):
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_size, node.all_input_nodes))


def _between(cut: fx.Node, output: fx.Node) -> list[fx.Node]:
    """The operations from the logits back to the feature map; without the latter if they are not a chain."""
    chain: list[fx.Node] = []
    node: fx.Node | None = output
    while node is not None and node is not cut:
        chain.append(node)
        node = _source(node)
    return chain if node is None else [*chain, cut]


def _linear(root: nn.Module, cut: fx.Node, output: fx.Node) -> str | None:
    """The name of the layer that is all of the head together with global average pooling."""
    *chain, end = [*_between(cut, output)]
    steps = [(node, _kind(root, node)) for node in chain]
    essential = [(node, kind) for node, kind in steps if kind not in ("shape", "identity")]
    if end is not cut or sorted(kind for _, kind in essential) != ["linear", "pool"]:
        return None
    named = {kind: node for node, kind in essential}
    if named["linear"].op != "call_module" or not _is_global_average(root, named["pool"]):
        return None
    return str(named["linear"].target)


def _is_global_average(root: nn.Module, node: fx.Node) -> bool:
    source = _source(node)
    assert source is not None
    first = node.args[1] if len(node.args) > 1 else None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1])
    if node.target is F.adaptive_avg_pool2d:
        return node.kwargs.get("output_size", first) in (1, (1, 1), [1, 1])
    if node.target is F.avg_pool2d:
        window = node.kwargs.get("kernel_size", first)
        unpadded = len(node.args) < 4 and node.kwargs.get("padding", 0) in (0, (0, 0))
        return unpadded and _spatial(window, source)
    if node.target in (torch.mean, "mean"):
        return _reduced(node) == {2, 3} or _is_of_vectors(root, node)
    return False


def _is_of_vectors(root: nn.Module, node: fx.Node) -> bool:
    """Whether pooling works on the last dimension of a map ``[B, D, hw]`` whose locations have been made one."""
    source = _source(node)
    if node.target not in _REDUCTIONS or source is None:
        return False
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dims in (2, -1, (2,), (-1,), [2], [-1]) and _kind(root, source) == "shape"


def _spatial(window: Any, source: fx.Node) -> bool:
    """Whether a window is height and width of a map."""

    def index(size: Any) -> Any:
        if not isinstance(size, fx.Node) or size.all_input_nodes == []:
            return None
        if size.op == "call_method" and size.target == "size" and size.args[0] is source and len(size.args) == 2:
            return size.args[1]
        shape = size.args[0]
        if size.target is operator.getitem and isinstance(shape, fx.Node) and shape.args[0] is source:
            return size.args[1] if _is_size(shape) and (shape.target is getattr or len(shape.args) == 1) else None
        return None

    if isinstance(window, (tuple, list)):
        return [index(size) for size in window] in ([2, 3], [-2, -1])
    return index(window) in (slice(2, None), slice(-2, None), slice(2, 4))


def _last(root: nn.Module, cut: fx.Node, output: fx.Node) -> str | None:
    """The name of the last linear layer or convolution of the head, unless other operations than pooling follow."""
    for node in _between(cut, output):
        kind = _kind(root, node)
        if kind == "linear" and node.op == "call_module":
            return str(node.target)
        if kind not in ("shape", "pool", "identity"):
            return None
    return None


# --- making functions of the operations


def _features_graph(nodes: list[fx.Node], cut: fx.Node) -> fx.Graph:
    """All operations up to the feature map."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[: nodes.index(cut) + 1]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[cut])
    return graph


def _head_graph(nodes: list[fx.Node], cut: fx.Node, output: fx.Node, layer: str | None) -> fx.Graph:
    """The operations on the feature map, in their order, with the constants that they need.

    Where they take the batch size from an earlier result, it becomes that of the feature map.
    """
    graph = fx.Graph()
    copies = {cut: graph.placeholder("features")}
    constants: set[fx.Node] = set()

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            batch = _is_batch_size(node)
            copies[node] = graph.call_method("size", (copies[cut], 0)) if batch else graph.node_copy(node, copy)
        return copies[node]

    for node in nodes[:-1]:
        if node.op != "placeholder" and constants.issuperset(node.all_input_nodes):
            constants.add(node)
    dependents, bypass = {cut}, None
    for node in nodes[nodes.index(cut) + 1 : -1]:
        others = set(node.all_input_nodes) - dependents - constants
        if dependents.isdisjoint(node.all_input_nodes):
            continue
        if all(map(_is_batch_size, others)):
            copy(node)
            dependents.add(node)
        else:
            bypass = bypass or (node, others.pop())
    if output not in dependents:
        problem = f"{bypass[0]} also takes {bypass[1]}" if bypass else "they do not depend on it"
        raise ValueError(f"layer: expected one that the logits depend on alone, got {layer or cut}: {problem}")
    graph.output(copies[output])
    return graph


def _is_batch_size(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _is_size(node) and node.args[1:] == (0,)
    return node.op == "call_method" and node.target == "size" and node.args[1:] == (0,)


def _compile(graph: fx.Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    """A function of the root and one result. It finds modules and parameters in the root each time that it runs."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"]
