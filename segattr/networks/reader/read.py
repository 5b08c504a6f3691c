"""Reads the code of a network: one graph for images of any size where it can be, else one for each size."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from segattr.networks.modes import evaluating
from segattr.networks.reader.graph import Different, Graph, common, counts_images
from segattr.networks.reader.record import IMAGES, Recording, logits_of, record, untouched
from segattr.networks.spatial import layout_text
from segloss.common.checks import shape_text

# Sides of images that most networks take, and of volumes.
_SIDES = (128, 224, 32, 28, 64, 256, 299, 384, 448, 512)
_VOLUMES = ((32, 64, 64), (64, 64, 64), (16, 112, 112), (28, 28, 28), (32, 32, 32), (16, 16, 16), (96, 96, 96))
_SIZE_HINTS = ("pretrained_cfg.input_size", "config.image_size", "image_size", "img_size", "patch_embed.img_size")
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of the largest output; lower precision: .1


class OtherDimensions(ValueError):
    """Images have another number of dimensions than those that a network takes."""

    def __init__(self, images: Tensor, dims: int) -> None:
        super().__init__(f"images: expected {layout_text(dims)}, got {shape_text(images.shape)}")
        self.dims = dims


class Reader:
    """The graphs of a network, kept for as long as its modules are what they were.

    Args:
        model: takes images ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``.
        leaf: modules that are one operation each.
        atomic: names of functions that are one operation each though written in Python.
        replay: gives the logits of images by a graph, which are compared with those of the network.
        example: images that the network takes; None to try some sizes, and to wait for the first images otherwise.
        evaluate: read it in evaluation mode, whatever mode it is in.
        compare: compare a graph with the network for each size of images, not only for those that it was read with.

    Raises:
        TypeError: a network whose code cannot be followed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        leaf: Callable[[nn.Module], bool],
        atomic: Callable[[str], bool],
        replay: Callable[[Graph, Tensor], Tensor],
        example: Tensor | None = None,
        evaluate: bool = False,
        compare: bool = False,
    ) -> None:
        self.model, self.leaf, self.atomic = model, leaf, atomic
        self.replay, self.evaluate, self.compare = replay, evaluate, compare
        self.graphs: list[Graph] = []
        self.shape: tuple[int, ...] = ()  # of the images that were read first, without that of the batch
        self.whole: set[str] = set()  # modules whose code cannot be followed
        self._first(example)

    @property
    def dims(self) -> int | None:
        """Number of dimensions of a batch of images, once it is known."""
        return len(self.shape) + 1 if self.shape else None

    def graph(self, images: Tensor) -> Graph:
        """The graph for images. Under ``torch.compile`` one that was read before.

        Raises:
            TypeError: a network whose code cannot be followed.
            OtherDimensions: images for a network of volumes, or volumes for one of images.
        """
        self._check_dims(images)
        if torch.compiler.is_compiling():
            for graph in self.graphs:
                if self._fits(graph, images, graph.modes):
                    return graph
            raise RuntimeError(f"x: expected a size that was run before compilation, got {shape_text(images.shape)}")
        modules = list(self.model.modules())
        modes = [module.training for module in modules]
        self.graphs = [graph for graph in self.graphs if graph.modules == modules]  # else of modules that were replaced
        for graph in self.graphs:
            if self._fits(graph, images, modes) and self._verified(graph, images):
                return graph
        return self._read(tuple(images.shape[1:]), images, any_size=not self.graphs)

    def again(self) -> Graph:
        """The graph for images as those that were read last, in the mode that the network is in now."""
        if not self.graphs:
            raise ValueError("example: expected an image, as none of the usual sizes is one that the network takes")
        last = self.graphs[0]
        return self.graph(_noise(1, last.shapes[IMAGES][1:], torch.empty(0, dtype=last.dtype, device=last.device)))

    def _check_dims(self, images: Tensor) -> None:
        """Layers of volumes would take a batch of images for a single volume."""
        dims = self.dims or (5 if _of_volumes(self.model) else images.dim())
        if images.dim() != dims:
            raise OtherDimensions(images, dims)

    def _fits(self, graph: Graph, images: Tensor, modes: list[bool]) -> bool:
        kinds = (graph.dtype, graph.device) == (images.dtype, images.device)
        return kinds and (self.evaluate or graph.modes == modes) and graph.size in (None, tuple(images.shape[2:]))

    def _first(self, example: Tensor | None) -> None:
        """Reads the network on the example, or on the first size that it takes."""
        if example is not None:
            self._check_dims(example)
            self._read(tuple(example.shape[1:]), example)
            return
        tensors = (t for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point())
        tensor = next(tensors, torch.empty(0, device="cpu"))
        for shape in _shapes(self.model):
            try:
                one = self._record(2, shape, tensor)
            except Exception:  # whatever the network says to images that it does not take
                continue
            self._read(shape, tensor, one=one)
            return

    def _read(self, shape: tuple[int, ...], like: Tensor, any_size: bool = True, one: Recording | None = None) -> Graph:
        """The graph of images of this shape, of which there is a recording; of any size where two sizes give one."""
        other = (shape[0], *_odd(shape[1:])) if any_size else shape
        while True:
            one = one or self._record(2, shape, like)
            try:
                two = self._record(3, other, like)
                graph = common(one, two, self.model)
            except Exception as error:  # also whatever the network says to a size that it does not take
                if other == shape:
                    if not isinstance(error, Different):
                        raise
                    if not self._take_whole(error):
                        raise TypeError(f"model: its code cannot be followed, runs of it differ: {error}") from None
                    one = None
                other = shape
                continue
            if self._counted(graph, two.images) and self._equal(graph, two.images, two.values):
                self.graphs.insert(0, graph)
                self.shape = self.shape or shape
                return graph
            if other == shape:
                raise TypeError("model: its code cannot be followed: what was seen of it gives other logits")
            other = shape

    def _take_whole(self, different: Different) -> bool:
        """A module whose code depends on the images becomes one operation: the innermost that is none yet."""
        for path in different.within[::-1]:
            if path and path not in self.whole:
                self.whole.add(path)
                return True
        return False

    def _record(self, count: int, shape: tuple[int, ...], like: Tensor) -> Recording:
        images = _noise(count, shape, like)
        whole = {self.model.get_submodule(path) for path in self.whole}
        with self._mode():
            return record(self.model, images, leaf=lambda m: m in whole or self.leaf(m), atomic=self.atomic)

    def _verified(self, graph: Graph, images: Tensor) -> bool:
        """Whether the graph gives the logits of the network, for images of this size."""
        size = tuple(images.shape[2:])
        if not self.compare or size in graph.verified:
            return True
        return self._as_network(graph, images[:1].detach() if len(images) else _noise(1, images.shape[1:], images))

    def _counted(self, graph: Graph, images: Tensor) -> bool:
        """Whether what grew as the number of images did was not the size of a map, where both were others."""
        return graph.size is not None or not counts_images(graph.nodes) or self._as_network(graph, images[:-1])

    def _as_network(self, graph: Graph, images: Tensor) -> bool:
        with self._mode(), torch.no_grad():
            with untouched(self.model):
                values = logits_of(self.model(images.clone()))
            return self._equal(graph, images, values)

    def _equal(self, graph: Graph, images: Tensor, values: Tensor) -> bool:
        with torch.no_grad(), untouched(self.model):
            try:
                found = self.replay(graph, images)
            except RuntimeError:  # of operations for other sizes
                return False
        if not isinstance(values, Tensor) or found.shape != values.shape:
            return False
        near = _TOLERANCE.get(values.dtype, 0.1) * float(values.abs().nan_to_num().max()) if values.numel() else 0
        equal = torch.allclose(found, values, rtol=0, atol=near, equal_nan=True)
        if equal:
            graph.verified.add(tuple(images.shape[2:]))
        return equal

    def _mode(self) -> contextlib.AbstractContextManager[None]:
        return evaluating(self.model) if self.evaluate else contextlib.nullcontext()


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside what torch.compile, averaging of weights, or use of several devices, wraps it in."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrapped(compiled) if isinstance(compiled, nn.Module) else model


def _noise(count: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Images of the type and on the device of another tensor."""
    generator = torch.Generator("cpu").manual_seed(count)
    return torch.randn(count, *shape, generator=generator, device="cpu").to(like)


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """``(C, H, W)`` or ``(C, D, H, W)`` that the network may take: sizes that it names, and usual ones."""
    first = _first_convolution(model)
    channels = 3 if first is None else first.in_channels
    usual = _VOLUMES if isinstance(first, nn.Conv3d) else tuple((side, side) for side in _SIDES)
    count = len(usual[0])
    yield (channels, *usual[0])
    for hint in _SIZE_HINTS:
        value: Any = model
        for name in hint.split("."):
            value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        if isinstance(value, int):
            value = (value,) * count
        sized = isinstance(value, (tuple, list)) and len(value) in (count, count + 1)
        if sized and all(isinstance(n, int) for n in value):
            yield (channels, *value[-count:])
    for size in usual:
        yield (channels, *size)


def _of_volumes(model: nn.Module) -> bool:
    return isinstance(_first_convolution(model), nn.Conv3d)


def _first_convolution(model: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    return next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)


def _odd(size: tuple[int, ...]) -> tuple[int, ...]:
    """Another size, odd, whose halves, quarters, ... are not those of the first: which tells what depends on it."""
    if len(size) == 3:
        shares: tuple[float, ...] = (2.05, 0.53, 1.53) if min(size) <= 64 else (0.77, 0.53, 1.34)
    else:
        shares = (1.59, 1.34) if min(size) <= 128 else (0.77, 0.62)
    return tuple(int(n * share) | 1 for n, share in zip(size, shares, strict=True))
