"""Where the spatial axes of an image are in the results of a network: maps of either layout, and tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from segattr.networks.reader.graph import Graph, results_in
from segattr.networks.reader.record import IMAGES, Node, Result, mapped

Axes = tuple[str, ...]  # "B" images, "C" channels, "c" some of them, spatial ones, "N" tokens, "?" unknown

# Spatial axes of images and of volumes, under other names, so that what is left of a volume is no map.
SPATIAL: dict[int, Axes] = {2: ("H", "W"), 3: ("Z", "Y", "X")}
# Operations that read as many dimensions as images have as images, channels, (depth,) height and width.
_OF_MAPS = frozenset(
    (
        *("interpolate", "upsample", "pixelshuffle", "pixel_shuffle", "pixelunshuffle", "pixel_unshuffle"),
        *(
            f"{kind}{count}d"
            for kind in ("conv", "convtranspose", "conv_transpose", "batchnorm", "maxpool", "max_pool", "avgpool")
            + ("avg_pool", "adaptiveavgpool", "adaptive_avg_pool", "adaptivemaxpool", "adaptive_max_pool", "lppool")
            + ("lp_pool", "maxunpool", "max_unpool")
            for count in (2, 3)
        ),
        *(f"{kind}max_pool{count}d_with_indices" for kind in ("", "adaptive_") for count in (2, 3)),
    )
)
_MOVES = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "T", "mT")
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
# Products, by the place of the factor that has the last axis of the result; the first one has the others.
_PRODUCTS = {"matmul": 1, "bmm": 1, "scaled_dot_product_attention": 2}
_REDUCTIONS = ("mean", "sum", "amax", "amin", "max", "min", "logsumexp", "norm", "vector_norm", "std", "var")
_PRIMES = (31, 37, 41, 43, 47, 53, 59, 61)  # no numbers of tensors that are stacked


@dataclass(frozen=True)
class Layout:
    """Axes of a result; of tokens, the size of the map that they are, and how many come before those."""

    axes: Axes
    grid: tuple[int, ...] = (0, 0)
    prefix: int = 0

    @property
    def spatial(self) -> Axes:
        """Of a map, in their order in images."""
        return SPATIAL[len(self.axes) - 2]

    @property
    def is_map(self) -> bool:
        return len(self.axes) in (4, 5) and sorted(self.axes) == sorted(("B", "C", *self.spatial))

    @property
    def is_tokens(self) -> bool:
        return sorted(self.axes) == ["B", "C", "N"] and math.prod(self.grid) > 0


def layouts(graph: Graph) -> dict[Result, Layout]:
    """The layouts of the results that depend on the images, as far as they can be told."""
    channels_first = Layout(("B", "C", *SPATIAL[len(graph.shapes[IMAGES]) - 2]))
    known: dict[Result, Layout] = {IMAGES: channels_first}
    for node in graph.nodes:
        source = next((r for r in results_in(node.args) if r in known), None)
        if source is not None and "?" in known[source].axes and _is_of_maps(node, graph, graph.shapes[source]):
            known[source] = channels_first  # or it could not be read so
        for result in node.results():
            if result in graph.dependent:
                known[result] = _layout(node, graph, graph.shapes[result], known)
    return known


def _is_of_maps(node: Node, graph: Graph, shape: tuple[int, ...]) -> bool:
    images = graph.shapes[IMAGES]
    return node.kind.lower() in _OF_MAPS and len(shape) == len(images) and shape[0] == images[0]


def _layout(node: Node, graph: Graph, shape: tuple[int, ...], known: dict[Result, Layout]) -> Layout:
    sources = [r for r in results_in((node.args, node.kwargs)) if r in known]
    if _is_of_maps(node, graph, shape):
        return known[IMAGES]
    if len(sources) > _PRODUCTS.get(node.kind, len(sources)):
        return _product(known[sources[0]], known[sources[_PRODUCTS[node.kind]]], shape)
    if len(sources) == 1:
        found = _of_one(node, known[sources[0]], graph.shapes[sources[0]], shape)
        if found is not None:
            return found
    if node.kind == "stack" and len({known[source] for source in sources}) == 1:
        return replace(known[sources[0]], axes=_left(node, known[sources[0]].axes))
    if node.kind == "cat":
        return _joined(node, graph, known, shape)
    for source in sources:
        if graph.shapes[source] == shape and "?" not in known[source].axes:
            return known[source]
    return Layout(("?",) * len(shape))


def _product(one: Layout, other: Layout, shape: tuple[int, ...]) -> Layout:
    if len(one.axes) != len(shape):
        return Layout(("?",) * len(shape))
    tokens = one if "N" in one.axes[:-1] else other
    return Layout((*one.axes[:-1], other.axes[-1]), tokens.grid, tokens.prefix)


def _of_one(node: Node, source: Layout, before: tuple[int, ...], shape: tuple[int, ...]) -> Layout | None:
    kind = node.kind.lower()
    if node.kind in _MOVES and len(before) == len(shape):
        return Layout(tuple(source.axes[i] for i in _order(node, len(before))), source.grid, source.prefix)
    if kind in _RESHAPES:
        return _reshaped(source, before, shape)
    if kind == "linear" and before[:-1] == shape[:-1]:
        return Layout((*source.axes[:-1], "C"), source.grid, source.prefix)
    if kind == "getitem":
        return _indexed(source, node.args[1], before, shape)
    if kind in _REDUCTIONS and before != shape:
        return Layout(_left(node, source.axes), source.grid, source.prefix)
    return source if before == shape else None


def _order(node: Node, dims: int) -> list[int]:
    """Where each axis of the result of a permutation was before."""
    return [_PRIMES.index(n) for n in _tried(node, dims)]


def _left(node: Node, axes: Axes) -> Axes:
    """The axes that a reduction leaves, or that tensors have which are stacked."""
    sizes = _tried(node, len(axes))
    kept = axes if len(axes) == len(sizes) else ("?",) * len(sizes)  # in their places, of size 1
    left = tuple(axes[_PRIMES.index(n)] if n in _PRIMES else name for n, name in zip(sizes, kept, strict=True))
    return tuple("C" if name == "c" and left.count("c") == 1 else name for name in left)


def _tried(node: Node, dims: int) -> tuple[int, ...]:
    """The shape that an operation makes of axes that are told apart by their sizes."""
    stand_in = torch.empty(_PRIMES[:dims], device="meta")

    def fill(value: Any) -> Any:
        return stand_in if isinstance(value, Result) else mapped(fill, value)

    args, kwargs = fill((node.args, node.kwargs))
    if node.how == "property":
        moved = getattr(stand_in, node.target)
    elif node.how == "method":
        moved = getattr(stand_in, node.target)(*args[1:], **kwargs)
    else:
        moved = node.target(*args, **kwargs)
    return tuple((moved if isinstance(moved, Tensor) else moved[0]).shape)


def _reshaped(source: Layout, before: Sequence[int], shape: Sequence[int]) -> Layout:
    """Axes that keep their size keep their name; all spatial ones together are tokens, and back."""
    axes: list[str] = []
    grid, i, j = source.grid, 0, 0
    while i < len(before) or j < len(shape):
        a, b = i, j
        left, right = (before[i] if i < len(before) else 1), (shape[j] if j < len(shape) else 1)
        i, j = min(i + 1, len(before)), min(j + 1, len(shape))
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif j < len(shape):
                right, j = right * shape[j], j + 1
            else:
                return Layout(("?",) * len(shape))
        names, count = source.axes[a:i], j - b
        real = [name for name, n in zip(names, before[a:i], strict=True) if n > 1 or len(names) == 1]
        if count == len(names):
            axes += names
        elif count == 1 and len(real) == 1:
            axes += real
        elif names in SPATIAL.values() and count == 1:
            axes, grid = [*axes, "N"], tuple(before[a:i])
        elif names == ("C",) and count > 1:  # groups of channels, and channels in each
            axes += ["c"] * count
        elif count == 1 and len(names) > 1 and set(real) == {"c"}:
            axes += ["C"]
        elif names == ("N",) and source.prefix == 0 and tuple(shape[b:j]) == grid:
            axes += SPATIAL[count]
        elif count == 2 and len(names) == 1 and names[0] in "HWZYX":  # patches, and pixels in each
            axes += [*names, "?"]
        else:
            axes += ["?"] * count
    return Layout(tuple(axes), grid, source.prefix)


def _indexed(source: Layout, index: Any, before: Sequence[int], shape: Sequence[int]) -> Layout | None:
    """Slices keep axes, numbers take them away."""
    entries = list(index) if isinstance(index, tuple) and not isinstance(index, Result) else [index]
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [slice(None)] * (len(before) - len(entries) + 1)
    entries += [slice(None)] * (len(before) - len(entries))
    axes, prefix = [], source.prefix
    for name, entry, length in zip(source.axes, entries, before, strict=False):
        if isinstance(entry, slice):
            axes.append(name)
            if name == "N":
                start, stop, step = entry.indices(length)
                if step != 1 or stop != length:  # only what comes before the map
                    return Layout(("?",) * len(shape))
                prefix = prefix - start
        elif not isinstance(entry, int):
            return None
    if len(axes) != len(shape) or prefix < 0:
        return None
    return Layout(tuple(axes), source.grid, prefix)


def _joined(node: Node, graph: Graph, known: dict[Result, Layout], shape: tuple[int, ...]) -> Layout:
    """Tokens with others before them."""
    parts = node.args[0]
    prefix = 0
    for part in parts:
        layout = known.get(part) if isinstance(part, Result) else None
        if layout is not None and (layout.is_map or layout.is_tokens):
            axis = layout.axes.index("N") if layout.is_tokens else -1
            along = next((i for i, n in enumerate(shape) if n != graph.shapes[part][i]), axis)
            if along == axis and part is parts[-1]:
                return Layout(layout.axes, layout.grid, layout.prefix + prefix)
            return layout if along != axis else Layout(("?",) * len(shape))
        if isinstance(part, Result):
            prefix += graph.shapes[part][1] if len(graph.shapes[part]) > 1 else 0
    return Layout(("?",) * len(shape))
