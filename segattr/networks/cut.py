"""Where a network can be cut in two: from the logits back to the last feature map that they are made of alone."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from segattr.networks.backward import followed
from segattr.networks.layout import SPATIAL, Layout, layouts
from segattr.networks.modes import evaluating
from segattr.networks.reader.graph import Different, Graph, Size, common, dependents, needed, results_in, run, store
from segattr.networks.reader.read import Reader
from segattr.networks.reader.record import IMAGES, Node, Result, mapped, record, untouched
from segattr.networks.spatial import CONVOLUTIONS
from segloss.common.checks import shape_text

Maps = Tensor | tuple[Tensor, Tensor]  # maps, and tokens that come before them

_SHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "permute", "transpose", "clone")
_IDENTITIES = ("identity", "dropout", "dropout2d", "dropout3d", "feature_dropout")
_POOLS = (
    *(f"{average}{count}d" for average in ("adaptiveavgpool", "adaptive_avg_pool") for count in (1, 2, 3)),
    *(f"{maximum}{count}d" for maximum in ("adaptivemaxpool", "adaptive_max_pool") for count in (2, 3)),
    *(f"adaptive_max_pool{count}d_with_indices" for count in (2, 3)),
    *(f"{window}{count}d" for window in ("avgpool", "avg_pool") for count in (2, 3)),
)
_POWERS = ("clamp", "clamp_min", "pow", "square", "abs")  # what generalised means do before they average
_WEIGHTED = ("linear", "conv1d", "conv2d", "conv3d")

_REMEDY = "name the layer whose output is the feature map, or build Classifier(features, head) from two parts"


@dataclass
class Parts:
    """A network in two parts, for the images that its graph is for.

    Args:
        graph: what was cut.
        cut: the feature map.
        layout: of it.
        size: of it, for the size of images that was recorded.
        before: operations up to it.
        after: operations on it.
        output: the logits.
    """

    graph: Graph
    cut: Result
    layout: Layout
    size: tuple[int, ...]
    before: list[Node]
    after: list[Node]
    output: Result = IMAGES
    place: Result = IMAGES  # the feature map, in the graph

    def fits(self, features: Tensor) -> bool:
        """Whether features are of the images that the graph is for."""
        return self.graph.size is None or tuple(features.shape[2:]) == self.size


class Cut:
    """The two parts of a model as functions, for each kind of images and each mode that it is called in."""

    def __init__(self, model: nn.Module, layer: str | None, example: Tensor | None) -> None:
        self.model, self.layer, self.example = model, layer, example
        self.reader = Reader(model, leaf=is_leaf, atomic=_is_atomic, replay=self._replayed, example=example)

    def __reduce__(self) -> Any:  # read again in a copy or another process
        return Cut, (self.model, self.layer, self.example)

    def features(self, images: Tensor) -> Maps:
        parts = self._parts(self.reader.graph(images))
        results = {IMAGES: images.clone()}  # which the network may overwrite
        _run(parts.before, self.model, results, len(images))
        return _maps(results[parts.cut], parts.layout)

    def head(self, features: Tensor, tokens: Tensor | None = None) -> Tensor:
        parts = self._for_head(features)
        # What follows may overwrite its input, as the activation after a convolution often does.
        value = _value(features, tokens, parts.layout).clone()
        results = {parts.cut: value}
        _run(parts.after, self.model, results, len(features))
        return results[parts.output]

    def weights(self) -> tuple[str | None, str | None]:
        """Names of the layer whose weights give class activation maps, and of the last layer with weights."""
        with evaluating(self.model):
            parts = self._parts(self.reader.again())
        return weights(parts.graph, self.model, parts.place, parts.layout)

    def _parts(self, graph: Graph) -> Parts:
        if graph.plan is None:
            graph.plan = _cut(graph, self.model, self.layer)
        return graph.plan

    def _for_head(self, features: Tensor) -> Parts:
        modes = [module.training for module in self.model.modules()]
        graphs = [g for g in self.reader.graphs if (g.dtype, g.device) == (features.dtype, features.device)]
        if not any(g.modes == modes for g in graphs):
            graphs.insert(0, self.reader.again())
        for graph in sorted(graphs, key=lambda g: g.modes != modes):
            parts = self._parts(graph)
            if parts.fits(features):
                return parts
        raise ValueError(f"features: expected those of images that were seen before, got {shape_text(features.shape)}")

    def _replayed(self, graph: Graph, images: Tensor) -> Tensor:
        parts = self._parts(graph)
        results = {IMAGES: images.clone()}
        _run(parts.before, self.model, results, len(images))
        _run(parts.after, self.model, results, len(images))
        return results[parts.output]


# --- finding the feature map


def _cut(graph: Graph, model: nn.Module, layer: str | None) -> Parts:
    if not isinstance(graph.outputs, Result) or graph.outputs not in graph.dependent:
        one = isinstance(graph.outputs, (Result, Tensor))
        got = "a constant" if one else f"a {type(graph.outputs).__name__}"
        raise TypeError(f"model: expected logits as its output, or an object with logits, got {got}")
    points = _bottlenecks(graph)
    known = layouts(graph)
    if layer is not None:
        cut = _named(graph, layer, points, known)
    elif known[graph.outputs].is_map:
        cut = _before_classes(graph, points, known)
    else:
        cut = _last_map(graph, model, points, known)
    if known[cut].is_tokens and graph.size is None:  # the shape of their map is that of this size
        graph.size = graph.shapes[IMAGES][2:]
    parts = _parts(graph, cut, known[cut])
    for node in (*parts.before, *parts.after):
        if node.how == "value" or (node.kind == "nonzero" and node.how != "module"):
            raise TypeError(f"model: its code cannot be followed: {node.place} reads numbers of the image: {_REMEDY}")
    return parts


def _parts(graph: Graph, cut: Result, layout: Layout) -> Parts:
    shape = graph.shapes[cut]
    size = layout.grid if layout.is_tokens else tuple(shape[layout.axes.index(a)] for a in layout.spatial)
    nodes, renamed = _collapsed(graph, cut)
    inner, output = renamed.get(cut, cut), renamed.get(graph.outputs, graph.outputs)
    place = next((i for i, node in enumerate(nodes) if inner in node.results()), -1)
    of_images = dependents(nodes)
    before = nodes[: place + 1]  # also what the feature map does not need, which may draw random numbers
    after = needed([node for node in before if of_images.isdisjoint(node.results())], _constants_of(nodes[place + 1 :]))
    made = {inner}.union(*(node.results() for node in after))
    for node in nodes[place + 1 :]:
        if made.issuperset(results_in((node.args, node.kwargs))):
            after.append(node)
            made.update(node.results())
    parts = Parts(graph, inner, layout, size, before, after)
    return replace(parts, output=output, place=cut)


def _constants_of(nodes: list[Node]) -> set[Result]:
    return {result for node in nodes for result in results_in((node.args, node.kwargs))}


def _bottlenecks(graph: Graph) -> list[Result]:
    """The results that the logits depend on alone, from the logits back to the images."""
    points: list[Result] = []
    live = {graph.outputs}
    for node in reversed(needed(graph.nodes, live)):
        if graph.dependent.isdisjoint(node.results()):
            continue
        if len(live) == 1:
            points += live
        live = live.difference(node.results()) | graph.dependent.intersection(results_in((node.args, node.kwargs)))
    return [*points, IMAGES]


def _last_map(graph: Graph, model: nn.Module, points: list[Result], known: dict[Result, Layout]) -> Result:
    for point in points[:-1]:
        layout = known[point]
        if _pixels(graph.shapes[point], layout) < 2:
            continue
        if layout.is_map:
            return _before_head(graph, model, point, known)
        reshaped = graph.made[point].kind in _SHAPES and layout.prefix == 0
        if not reshaped and _is_felt(graph, model, point, layout):
            return point
    raise TypeError(f"model: expected logits made from a feature map of more than one pixel, got none: {_REMEDY}")


def _before_classes(graph: Graph, points: list[Result], known: dict[Result, Layout]) -> Result:
    """Of a network whose output is a map: what the last layer with weights takes, which makes classes of it."""
    weighted = [
        n for n in needed(graph.nodes, {graph.outputs}) if n.kind.lower() in _WEIGHTED and _is_of_images(n, graph)
    ]
    place = graph.nodes.index(weighted[-1]) if weighted else 0
    for point in points[:-1]:
        if graph.nodes.index(graph.made[point]) < place and known[point].is_map:
            return point
    raise TypeError(f"model: expected class maps that a layer makes of a feature map, got others: {_REMEDY}")


def _is_of_images(node: Node, graph: Graph) -> bool:
    return not graph.dependent.isdisjoint(node.results())


def _pixels(shape: tuple[int, ...], layout: Layout) -> int:
    if layout.is_tokens:
        return math.prod(layout.grid)
    return math.prod(shape[layout.axes.index(axis)] for axis in layout.spatial) if layout.is_map else 0


def _is_felt(graph: Graph, model: nn.Module, point: Result, layout: Layout) -> bool:
    """Whether the logits depend on tokens of the map, and not only on those before it."""
    parts = _parts(graph, point, layout)
    images = torch.randn(graph.shapes[IMAGES], generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(
        graph.device, graph.dtype
    )
    with torch.inference_mode(False), untouched(model), evaluating(model):
        _make_felt(model)
        results = {IMAGES: images}
        with torch.no_grad():
            _run(parts.before, model, results, len(images))
        maps = _maps(results[parts.cut], layout)
        maps, tokens = maps if isinstance(maps, tuple) else (maps, None)
        with torch.enable_grad():
            leaf = maps.detach().clone().requires_grad_()
            results = {parts.cut: _value(leaf, tokens, layout)}
            _run(parts.after, model, results, len(images))
            with followed("model"):
                (gradient,) = torch.autograd.grad(results[parts.output].sum(), leaf, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def _make_felt(model: nn.Module) -> None:
    """Puts other weights in place of those that are all zero, as heads and scales of branches often are at first.

    And copies in place of those that were made in inference mode, which autograd cannot use.
    """
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and (weight.is_inference() or not weight.any()):
                module._parameters[name] = nn.Parameter(weight.clone() if weight.any() else torch.rand_like(weight))


def _before_head(graph: Graph, model: nn.Module, last: Result, known: dict[Result, Layout]) -> Result:
    """Back from the last map over what belongs to the head: pooling, powers, and a last convolution 1x1."""
    node = graph.made[last]
    after = graph.nodes[graph.nodes.index(node) + 1 :]
    weighted = any(n.kind.lower() in _WEIGHTED for n in after if _is_of_images(n, graph))
    cut = place = last
    while place != IMAGES:
        node = graph.made[place]
        sources = graph.dependent.intersection(results_in((node.args, node.kwargs)))
        kind = node.kind.lower()
        if len(sources) != 1:
            break
        (source,) = sources
        if not known[source].is_map or known[source].axes != known[place].axes:
            break
        if kind in _POOLS or (kind in _POWERS and cut == place):
            cut = source
        elif weighted:
            break
        elif kind in _WEIGHTED:
            if not _is_pointwise(graph, model, node):
                break
            cut, weighted = source, True
        elif graph.shapes[source] != graph.shapes[place] or "pool" in kind:
            break
        place = source
    return cut


def _is_pointwise(graph: Graph, model: nn.Module, node: Node) -> bool:
    module = model.get_submodule(_module(node) or "")
    if not isinstance(module, CONVOLUTIONS):
        return isinstance(module, nn.Linear)
    moves = set(module.kernel_size) | set(module.stride) != {1} or module.groups != 1
    return not moves and (isinstance(module.padding, str) or not any(module.padding))


def _module(node: Node) -> str | None:
    """The path of the module that an operation is all of, or part of."""
    return node.path or (node.within[-1] if node.within else None)


def _named(graph: Graph, layer: str, points: list[Result], known: dict[Result, Layout]) -> Result:
    """The output of the module of this name."""
    outputs: list[list[Any]] = [node.results() for node in graph.nodes if node.path == layer]
    outputs += [call.outputs for call in graph.calls if call.path == layer]
    if len(outputs) != 1:
        raise ValueError(f"layer: expected a module that is called once, got {layer}, called {len(outputs)} times")
    found = outputs[0][0] if len(outputs[0]) == 1 else None
    if not isinstance(found, Result):
        raise ValueError(f"layer: expected one that gives a feature map, got {len(outputs[0])} tensors: {_REMEDY}")
    if found not in points:
        problem = _bypass(graph, found)
        raise ValueError(f"layer: expected one that the logits depend on alone, got {layer}: {problem}")
    layout = known[found]
    if not layout.is_map and not layout.is_tokens:
        got = shape_text(graph.shapes[found])
        raise ValueError(f"layer: expected one that gives a feature map [B, D, h, w], got {got}: {_REMEDY}")
    return found


def _bypass(graph: Graph, cut: Result) -> str:
    dependents = {cut}
    for node in needed(graph.nodes, {graph.outputs}):
        inputs = set(results_in((node.args, node.kwargs)))
        others = (inputs & graph.dependent) - dependents
        if not dependents.isdisjoint(inputs) and cut not in node.results():
            if others:
                return f"{node.name} also takes {sorted(r.name for r in others)[0]}"
            dependents.update(node.results())
    return "they do not depend on it"


# --- the two parts


def _collapsed(graph: Graph, cut: Result) -> tuple[list[Node], dict[Result, Result]]:
    """The operations with the calls of modules that are on one side of the cut as one each; new names of results."""
    place = graph.nodes.index(graph.made[cut]) if cut in graph.made else -1
    users: dict[Result, list[int]] = {cut: [-1], graph.outputs: [-1]}
    for i, node in enumerate(graph.nodes):
        for result in results_in((node.args, node.kwargs)):
            users.setdefault(result, []).append(i)
    alone = {cut}  # made of the feature map and of no other result that depends on the images
    for node in graph.nodes[place + 1 :]:
        if alone.issuperset(graph.dependent.intersection(results_in((node.args, node.kwargs)))):
            alone.update(node.results())
    chosen, end = {}, -1
    calls = sorted(enumerate(graph.calls), key=lambda entry: (entry[1].start, -entry[0]))  # the outermost first
    for _, call in calls:
        takes = graph.dependent.intersection(results_in((call.args, call.kwargs)))
        one_side = call.stop <= place + 1 or (call.start > place and alone.issuperset(takes))
        if call.path and call.start >= end and call.stop > call.start and one_side:
            inner = {r for node in graph.nodes[call.start : call.stop] for r in node.results()}
            used = {r for r in inner if any(not call.start <= i < call.stop for i in users.get(r, []))}
            if used.issubset(r for r in call.outputs if isinstance(r, Result)):
                chosen[call.start], end = call, call.stop
    nodes: list[Node] = []
    renamed: dict[Result, Result] = {}
    i = 0

    def rename(value: Any) -> Any:
        if isinstance(value, Size):
            return replace(value, result=rename(value.result))
        return renamed.get(value, value) if isinstance(value, Result) else mapped(rename, value)

    while i < len(graph.nodes):
        node = graph.nodes[i]
        if i in chosen:
            call = chosen[i]
            name = f"{call.path} called at {i}"
            shapes = tuple(graph.shapes.get(r, ()) if isinstance(r, Result) else () for r in call.outputs)
            args, kwargs = rename((call.args, call.kwargs))
            nodes.append(Node(name, "call", call.path, "module", args, kwargs, (), shapes, False))
            for j, result in enumerate(call.outputs):
                if isinstance(result, Result) and result.name in {n.name for n in graph.nodes[i : call.stop]}:
                    renamed.setdefault(result, Result(name, j))
            i = call.stop
        else:
            args, kwargs = rename((node.args, node.kwargs))
            nodes.append(replace(node, args=args, kwargs=kwargs))
            i += 1
    return nodes, renamed


def _run(nodes: list[Node], model: nn.Module, results: dict[Result, Any], images: int) -> None:
    for node in nodes:
        store(node, run(node, model, results, images), results)


def _maps(value: Tensor, layout: Layout) -> Maps:
    """``[B, D, *spatial]`` of a map of either layout, or of tokens, with those before the map ``[B, P, D]``."""
    if layout.is_map:
        return value.permute([layout.axes.index(axis) for axis in ("B", "C", *layout.spatial)])
    tokens = value.permute([layout.axes.index(axis) for axis in "BNC"])
    maps = tokens[:, layout.prefix :].mT.unflatten(2, layout.grid)
    return (maps, tokens[:, : layout.prefix]) if layout.prefix else maps


def _value(maps: Tensor, tokens: Tensor | None, layout: Layout) -> Tensor:
    """The inverse of :func:`_maps`."""
    if layout.is_map:
        return maps.permute([("B", "C", *layout.spatial).index(axis) for axis in layout.axes])
    value = maps.flatten(2).mT
    if tokens is not None:
        value = torch.cat([tokens, value], 1)
    return value.permute(["BNC".index(axis) for axis in layout.axes])


# --- the layers with weights


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: a layer of torch, not a container, whose call is its code alone."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    own = str(type(module).forward.__module__).startswith("torch.nn.modules")  # None in code of exec
    return own and not hooked and not module._modules


@cache
def _is_atomic(kind: str) -> bool:
    """Functions that are followed are those that hold others with weights of their own."""
    return kind != "multi_head_attention_forward"


def weights(graph: Graph, model: nn.Module, cut: Result, layout: Layout) -> tuple[str | None, str | None]:
    """Names of the layer whose weights give class activation maps, and of the last layer with weights."""
    after = [n for n in needed(graph.nodes, {graph.outputs}) if _is_of_images(n, graph)]
    if cut in graph.made:
        after = after[after.index(graph.made[cut]) + 1 :]
    kinds = [node.kind.lower() for node in after]
    last = None
    for node, kind in zip(after[::-1], kinds[::-1], strict=True):
        if kind in _WEIGHTED:
            last = _module(node) if _layer(model, node) else None
            break
        if kind not in (*_SHAPES, *_IDENTITIES, *_POOLS, "mean"):
            break
    weighted = [node for node, kind in zip(after, kinds, strict=True) if kind in _WEIGHTED]
    plain = all(kind in (*_SHAPES, *_IDENTITIES, *_POOLS, *_WEIGHTED, "mean") for kind in kinds)
    if not plain or len(weighted) != 1 or layout.prefix:
        return None, last
    return (_module(weighted[0]) if _is_average(graph, model, cut, layout, weighted[0]) else None), last


def _layer(model: nn.Module, node: Node) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | None:
    """The layer of torch that an operation is of; None where it is other code that has the weight."""
    module = model.get_submodule(_module(node) or "")
    return module if isinstance(module, (nn.Linear, *CONVOLUTIONS)) else None


def _is_average(graph: Graph, model: nn.Module, cut: Result, layout: Layout, layer: Node) -> bool:
    """Whether logits are the average of a linear layer's map, tried out on a map."""
    module = _layer(model, layer)
    if module is None:
        return False
    parts = _parts(graph, cut, layout)
    shape = graph.shapes[cut]
    maps = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(
        graph.device, graph.dtype
    )
    with torch.no_grad(), untouched(model), evaluating(model):
        results = {parts.cut: maps}
        _run(parts.after, model, results, len(maps))
        logits = results[parts.output].reshape(len(maps), -1)  # also of a single class
        averages = _maps(maps, layout).flatten(2).mean(2)  # type: ignore[union-attr]
        weight = module.weight.flatten(1)
        if weight.shape != (logits.shape[1], averages.shape[1]):
            return False
        expected = averages @ weight.mT + (0 if module.bias is None else module.bias)
    near = 1e-2 * float(expected.abs().nan_to_num().max())
    return torch.allclose(logits, expected, rtol=0, atol=near, equal_nan=True)


def weights_of(head: nn.Module) -> tuple[str | None, str | None]:
    """The same of the head of a user."""
    layers = (m for m in head.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)))
    first = next(layers, None)
    if first is None:
        return None, None
    channels = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    for size in ((5, 4), (5, 4, 3)):  # of images, and of volumes where it takes no images
        generator = torch.Generator("cpu").manual_seed(0)
        features = torch.randn(3, channels, *size, generator=generator, device="cpu").to(first.weight)
        try:
            with evaluating(head):
                one, two = (record(head, f, leaf=is_leaf, atomic=_is_atomic) for f in (features, features.clone()))
                graph = common(one, two, head)
            return weights(graph, head, IMAGES, Layout(("B", "C", *SPATIAL[len(size)])))
        except (TypeError, ValueError, IndexError, RuntimeError, Different):  # code that cannot be followed
            continue
    return None, None
