"""A classifier in two parts: the network up to its last feature map, and the head that makes logits of it."""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from segattr.networks.cut import Cut, weights_of
from segattr.networks.reader.read import OtherDimensions, unwrapped
from segattr.networks.reader.record import attributes_kept
from segattr.networks.spatial import layout_text
from segloss.common.checks import check_finite, check_floating, shape_text

ClassWeights: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Features: TypeAlias = Callable[[Tensor], Any]
Head: TypeAlias = Callable[..., Tensor]

# Errors of the machine that are no class of their own.
_OF_MACHINE = re.compile("allocate|out of memory|CUDA error|CUDA driver|cuDNN error|CUBLAS_STATUS|CUSOLVER|NCCL")


class Classifier(nn.Module):
    r"""An image classifier in two parts, ``head(features(image))``, of which attribution maps are made.

    :func:`split` makes one of most networks. Any other network can be used by giving the two parts; what is no module
    is called as it is. Parameters and buffers are those of the parts themselves, nothing is copied, so that they
    may be trained, frozen or loaded before and after. The parts run in the mode, training or evaluation, that they
    are in.

    Args:
        features: takes images ``[B, C, H, W]``, gives the last feature maps ``[B, D, h, w]``, or volumes
            ``[B, C, D, H, W]`` and those of theirs; or a pair of them and of what else the head needs, such as the
            tokens ``[B, P, D]`` that a transformer has beside those of the map.
        head: takes feature maps, and the second of the pair if there is one; gives logits ``[B, K]``, or ``[B]`` of a
            single class, or ``[B, K, H', W']`` of a segmentation network.

    Raises:
        TypeError: parts that cannot be called.

    Example:
        >>> features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> clf = Classifier(features, head)
        >>> clf(torch.zeros(2, 3, 5, 6)).shape, clf.num_classes, clf.linear
        (torch.Size([2, 4]), 4, Linear(in_features=8, out_features=4, bias=True))
    """

    __call__: Callable[..., Tensor]  # for type checkers: torch says Any

    def __init__(self, features: Features, head: Head) -> None:
        for name, part in (("features", features), ("head", head)):
            if not callable(part):
                raise TypeError(f"{name}: expected a module or function, got {type(part).__name__}")
        super().__init__()
        self.model: nn.Module | None = None  # what it was split from
        self.features, self.head = features, head
        self._cut: Cut | None = None
        self._weights: tuple[str | None, str | None] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` or volumes ``[B, C, D, H, W]``."""
        features = self.features(images)
        return self.head(*features) if isinstance(features, tuple) else self.head(features)

    @property
    def linear(self) -> ClassWeights | None:
        """The layer whose ``weight.flatten(1)``, ``[K, D]``, gives class activation maps.

        A linear layer, or convolution 1x1, that together with global average pooling is all of the head, apart from
        dropout. None if the head is something else, or a function.
        """
        path = self._paths()[0]
        return None if path is None else self.get_submodule(path)  # type: ignore[return-value]

    def class_weight(self) -> Tensor:
        """The weight of :attr:`linear`, ``[K, D]``, as the layer computes it in each call: pruned or normalised, say.

        Raises:
            ValueError: the head is not global average pooling and one linear layer.
        """
        linear = self.linear
        if linear is None:
            raise ValueError("linear: expected a head of global average pooling and one linear layer, got another one")
        if linear._forward_pre_hooks:  # which may make it of other parameters
            width = linear.in_features if isinstance(linear, nn.Linear) else linear.in_channels
            ones = [1] * (0 if isinstance(linear, nn.Linear) else len(linear.kernel_size))
            linear(next(linear.parameters()).new_zeros(1, width, *ones))
        return linear.weight.flatten(1)

    @property
    def num_classes(self) -> int:
        """Number of classes K.

        Raises:
            ValueError: the head does not end in a linear layer or convolution: only its logits tell.
        """
        path = self._paths()[1]
        if path is None:
            raise ValueError("num_classes: expected a head that ends in a linear layer or convolution, got another one")
        last = self.get_submodule(path)
        return last.out_features if isinstance(last, nn.Linear) else last.out_channels  # type: ignore[return-value]

    def _paths(self) -> tuple[str | None, str | None]:
        """Of :attr:`linear` and of the last layer: names, as the modules may be replaced by others."""
        if self._weights is None:
            if self._cut is not None:
                linear, last = self._cut.weights()
                prefix = "model."
            else:
                linear, last = weights_of(self.head) if isinstance(self.head, nn.Module) else (None, None)
                prefix = "head."
            linear, last = (None if n is None else f"{prefix}{n}".rstrip(".") for n in (linear, last))
            self._weights = linear, last
        return self._weights


def split(model: nn.Module, layer: str | nn.Module | None = None, *, example: Tensor | None = None) -> Classifier:
    r"""Splits a classifier at its last feature map, without copying or changing it.

    The model runs on a few random images while its operations are recorded, and is followed from the logits back to
    the last map of more than one pixel that they are made of alone: through linear layers and pooling of any kind.
    Modules on either side of the cut are called as they are, with their hooks, and may hold any code. A last
    convolution 1x1 before or after global pooling belongs to the head, and so do the powers of a generalised mean.
    Maps that the network keeps channels-last are turned. Of transformers that read a class token the map is the input
    of the last block, behind which the logits do not depend on it; the tokens before it travel as the second part of
    a pair. Of segmentation networks it is the input of the last layer, which makes classes of it. What the code does
    for the mode of the model, training or evaluation, and for the size of the images, is what it does at each call.

    Args:
        model: takes images ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``, and gives logits ``[B, K]``, or an object
            with ``logits``. Further arguments must have defaults. Of a network compiled by ``torch.compile``, or
            wrapped in ``DataParallel``, ``DistributedDataParallel`` or ``AveragedModel``, the network inside is split;
            names of layers are those in it.
        layer: name of the submodule, or the submodule itself, whose output is the feature map; the last one if None.
            Everything behind it must depend on that output alone: the end of a residual block, not its middle.
        example: images or volumes that the model takes: for networks that take none of the usual sizes. Without
            it such a network is read when the first images come.

    Returns:
        A :class:`Classifier` with ``model`` as submodule; ``split(model)(x)`` equals ``model(x)``, or its logits.

    Raises:
        TypeError: a ``model`` that is no module or whose code cannot be followed, whose logits are not made from one
            feature map; a ``layer`` of another type, an ``example`` that is not floating point.
        ValueError: a ``layer`` that is not in the model, is not called once, is bypassed by something, or gives no map;
            an ``example`` of another shape.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> clf = split(net)
        >>> clf.features(torch.zeros(2, 3, 9, 9)).shape, clf.linear is net[-1]
        (torch.Size([2, 8, 7, 7]), True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if example is not None:
        check_images(example, "example")
    model = unwrapped(model)
    with nullcontext() if example is None else taking("example", example):
        return _split(model, layer, example)


def _split(model: nn.Module, layer: str | nn.Module | None, example: Tensor | None) -> Classifier:
    cut = Cut(model, None if layer is None else _path(model, layer), example)
    clf = Classifier(cut.features, cut.head)
    clf.model = model
    clf.training = model.training
    clf._cut = cut
    return clf


def as_classifier(clf: nn.Module, images: Tensor, layer: str | nn.Module | None = None) -> Classifier:
    """A classifier as it is, any other network split at its last feature map; both split at a layer if there is one."""
    if not isinstance(clf, nn.Module):
        raise TypeError(f"clf: expected a Classifier, or a network that split understands, got {type(clf).__name__}")
    clf = unwrapped(clf)
    if isinstance(clf, Classifier):
        if layer is None:
            return clf
        clf = clf.model or clf
    found = _split(clf, layer, None)
    # In a network that takes none of the usual sizes, it is these images that tell.
    if found._cut is None or found._cut.reader.graphs:
        return found
    with taking("images", images):
        return _split(clf, layer, images)


def undisturbed(network: Callable[..., Any], function: Callable[[], Any], *, constant: bool = False) -> Any:
    """The result of a function that calls a network, which leaves no trace in it and runs as without autocast.

    Args:
        network: what it calls, a module or a function.
        function: takes no arguments.
        constant: whether parameters are constants, so that autograd does not keep what their gradients would need.
    """
    caller = _Caller(network)
    state = {name: buffer.clone() for name, buffer in caller.named_buffers()}  # batch statistics go to the copies
    for name, parameter in caller.named_parameters():
        if constant or parameter.is_inference():
            state[name] = tracked(parameter.detach())
    elsewhere = torch.accelerator.current_accelerator() or torch.device("cpu")  # functions do not tell
    device = next((tensor.device for tensor in state.values()), elsewhere)
    with torch.autocast(device.type, enabled=False), attributes_kept(list(caller.modules())):
        return functional_call(caller, state, (function,))


def tracked(tensor: Tensor) -> Tensor:
    """Itself; of one that was made in inference mode a copy, as autograd can use no such tensor."""
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


@contextmanager
def taking(name: str, value: Tensor) -> Iterator[None]:
    """Around the call of a network: what its layers cannot take is an error of the argument of this name.

    That is a plain RuntimeError out of the code of torch, torchvision, MONAI or this package: a size, a dtype or a
    device; and images for a network of volumes. All else stays what it is: RuntimeErrors out of a line of the user's
    own code, whether raised there or by an operation in that line; subclasses of RuntimeError, such as a lack of memory
    on an accelerator or endless recursion; a lack of memory on the CPU, and failures of the libraries of an
    accelerator.
    """
    try:
        yield
    except OtherDimensions as error:
        raise ValueError(f"{name}: expected {layout_text(error.dims)}, got {shape_text(value.shape)}") from None
    except RuntimeError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        source = str(frame.f_globals.get("__name__")).partition(".")[0]
        ours = source in ("torch", "torchvision", "monai", "segattr")
        if not ours or type(error) is not RuntimeError or _OF_MACHINE.search(str(error)):
            raise
        got = f"{shape_text(value.shape)}, {value.dtype} on {value.device}"
        first = str(error).partition("\n")[0]
        raise ValueError(f"{name}: expected what the network can take, got {got}: {first}") from error


class _Caller(nn.Module):
    """Calls a function while the parameters and buffers of a network are replaced."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def check_images(images: object, name: str = "images") -> None:
    check_floating(name, images)
    assert isinstance(images, Tensor)
    check_layout(name, images)
    if 0 in images.shape[1:]:
        raise ValueError(f"{name}: expected at least one channel and one pixel, got {shape_text(images.shape)}")
    check_finite(name, images)


def check_layout(name: str, images: Tensor) -> None:
    """Images or volumes; which of them the network takes, it says itself."""
    if images.dim() not in (4, 5):
        kinds = f"{layout_text(4)} or {layout_text(5)}"
        raise ValueError(f"{name}: expected {kinds}, got {shape_text(images.shape)}")


def _path(model: nn.Module, layer: str | nn.Module) -> str:
    """The name of a submodule by which the reader knows it: the first one, where it has several."""
    if not isinstance(layer, (str, nn.Module)):
        raise TypeError(f"layer: expected the name of a submodule or a module, got {type(layer).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    module = modules.get(layer) if isinstance(layer, str) else layer
    for name, other in modules.items():
        if other is module and name:
            return name
    names = ", ".join(name for name, _ in model.named_children())
    got = layer if isinstance(layer, str) else f"a {type(layer).__name__} that is not in the model"
    raise ValueError(f"layer: expected a submodule such as {names or 'none'}, got {got}")
