"""Random classifiers out of what users' networks are made of, and all of a network that a call must leave as it is."""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

Code = Callable[..., Tensor]


class Apply(nn.Module):
    """Code of a network, with layers of its own. Copies and pickles know the code by its name."""

    known: ClassVar[dict[str, Code]] = {}

    def __init__(self, name: str, code: Code, **layers: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.known[name] = code
        for key, layer in layers.items():
            self.add_module(key, layer)

    def forward(self, *x: Tensor) -> Tensor:
        return self.known[self.name](self, *x)

    def extra_repr(self) -> str:
        return self.name


@dataclass
class Part:
    """A module and what is known of it, as of :class:`Drawn`."""

    module: nn.Module
    gated: bool = False
    draws: bool = False
    refused: bool = False


# --- activations


def _own_name(x: Tensor) -> Tensor:
    y = x
    y += 0.1
    return x.relu()


ACTIVATIONS: dict[str, Callable[[int], Part]] = {
    "ReLU": lambda c: Part(nn.ReLU()),
    "ReLU in place": lambda c: Part(nn.ReLU(inplace=True)),
    "F.relu": lambda c: Part(Apply("F.relu", lambda _, x: F.relu(x))),
    "F.relu_": lambda c: Part(Apply("F.relu_", lambda _, x: F.relu_(x))),
    "LeakyReLU": lambda c: Part(nn.LeakyReLU(0.1)),
    "LeakyReLU in place": lambda c: Part(nn.LeakyReLU(0.2, inplace=True)),
    "PReLU": lambda c: Part(nn.PReLU()),
    "PReLU of channels": lambda c: Part(nn.PReLU(c)),
    "RReLU": lambda c: Part(nn.RReLU(), draws=True),
    "ReLU6": lambda c: Part(nn.ReLU6(inplace=True)),
    "Hardtanh": lambda c: Part(nn.Hardtanh(-0.7, 0.9)),
    "Threshold": lambda c: Part(nn.Threshold(0.2, -0.1)),
    "clamp": lambda c: Part(Apply("clamp", lambda _, x: x.clamp(-0.5, 1.5))),
    "maximum": lambda c: Part(Apply("maximum", lambda _, x: torch.maximum(x, 0.3 * x))),
    "abs": lambda c: Part(Apply("abs", lambda _, x: x.abs())),
    "another name": lambda c: Part(Apply("another name", lambda _, x: _own_name(x.clone()))),
    "where": lambda c: Part(Apply("where", lambda _, x: torch.where(x > 0, x, 0.1 * x))),
    "masked in place": lambda c: Part(Apply("masked in place", lambda _, x: _masked(x))),
    "Dropout": lambda c: Part(nn.Dropout(0.3), draws=True),
    "Dropout in place": lambda c: Part(nn.Dropout(0.3, inplace=True), draws=True),
    "Dropout2d": lambda c: Part(nn.Dropout2d(0.3), draws=True),
    "AlphaDropout": lambda c: Part(nn.AlphaDropout(0.3), draws=True),
    "Identity": lambda c: Part(nn.Identity()),
    "SiLU": lambda c: Part(nn.SiLU(inplace=True), gated=True),
    "GELU": lambda c: Part(nn.GELU(), gated=True),
    "GELU tanh": lambda c: Part(nn.GELU("tanh"), gated=True),
    "Hardswish": lambda c: Part(nn.Hardswish(inplace=True), gated=True),
    "Mish": lambda c: Part(nn.Mish(), gated=True),
    "ELU": lambda c: Part(nn.ELU(0.7), gated=True),
    "CELU": lambda c: Part(nn.CELU(), gated=True),
    "SELU": lambda c: Part(nn.SELU(), gated=True),
    "Softplus": lambda c: Part(nn.Softplus(2.0), gated=True),
    "LogSigmoid": lambda c: Part(nn.LogSigmoid(), gated=True),
    "Softsign": lambda c: Part(nn.Softsign(), gated=True),
    "Tanh": lambda c: Part(nn.Tanh(), gated=True),
    "Tanhshrink": lambda c: Part(nn.Tanhshrink(), gated=True),
    "Hardshrink": lambda c: Part(nn.Hardshrink(0.2), gated=True),
    "Softshrink": lambda c: Part(nn.Softshrink(0.1), gated=True),
    "x sigmoid(x)": lambda c: Part(Apply("x sigmoid(x)", lambda _, x: x * torch.sigmoid(x)), gated=True),
    "Hardsigmoid gate": lambda c: Part(Apply("Hardsigmoid gate", lambda m, x: m.g(x) * x, g=nn.Hardsigmoid()), True),
    "square": lambda c: Part(Apply("square", lambda _, x: x.pow(2)), gated=True),
}


def _masked(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


# --- normalisation


def _running(norm: nn.Module) -> nn.Module:
    for name, buffer in norm.named_buffers():
        if name == "running_mean":
            buffer.normal_(0, 0.3)
        elif name == "running_var":
            buffer.uniform_(0.3, 2)
    return norm


class FrozenBatchNorm2d(nn.Module):
    """As that of detectors: all of it buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class LayerNorm2d(nn.Module):
    """As that of ConvNeXt: over the channels of a map."""

    def __init__(self, channels: int, by_function: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))
        self.by_function = by_function

    def forward(self, x: Tensor) -> Tensor:
        if self.by_function:
            return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)
        mean = x.mean(1, keepdim=True)
        deviation = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(deviation + 1e-6)) + self.bias[:, None, None]


NORMALISATIONS: dict[str, Callable[[int], Part]] = {
    "BatchNorm2d": lambda c: Part(_running(nn.BatchNorm2d(c))),
    "BatchNorm2d of a momentum": lambda c: Part(_running(nn.BatchNorm2d(c, momentum=None, eps=1e-3))),
    "BatchNorm2d not affine": lambda c: Part(_running(nn.BatchNorm2d(c, affine=False))),
    "BatchNorm2d without statistics": lambda c: Part(nn.BatchNorm2d(c, track_running_stats=False), refused=True),
    "FrozenBatchNorm2d": lambda c: Part(FrozenBatchNorm2d(c)),
    "GroupNorm": lambda c: Part(nn.GroupNorm(2 if c % 2 == 0 else 1, c), gated=True),
    "GroupNorm not affine": lambda c: Part(nn.GroupNorm(1, c, affine=False), gated=True),
    "InstanceNorm2d": lambda c: Part(nn.InstanceNorm2d(c), gated=True),
    "InstanceNorm2d affine": lambda c: Part(nn.InstanceNorm2d(c, affine=True), gated=True),
    "InstanceNorm2d with statistics": lambda c: Part(_running(nn.InstanceNorm2d(c, track_running_stats=True)), True),
    "LayerNorm2d": lambda c: Part(LayerNorm2d(c, True), gated=True),
    "LayerNorm2d of sums": lambda c: Part(LayerNorm2d(c, False), gated=True),
    "LocalResponseNorm": lambda c: Part(nn.LocalResponseNorm(3), gated=True),
    "F.normalize": lambda c: Part(Apply("F.normalize", lambda _, x: F.normalize(x, dim=1)), gated=True),
    "RMSNorm": lambda c: Part(
        Apply("RMSNorm", lambda m, x: m.norm(x.movedim(1, -1)).movedim(-1, 1), norm=nn.RMSNorm(c)), gated=True
    ),
}


# --- blocks of code around layers; each keeps the size and the channels of a map


class Excitation(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, hard: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.gate = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Attention(nn.Module):
    """Of all locations to a few regions; by torch's module, its function, or by products."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(channels)
        if kind == "module":
            self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)
        else:
            self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y, regions = self.norm(tokens), self.norm(F.adaptive_avg_pool2d(x, 2).flatten(2).mT)
        if self.kind == "module":
            y = self.attention(y, regions, regions, need_weights=False)[0]
        else:
            q, (k, v) = self.q(y), self.kv(regions).chunk(2, -1)
            if self.kind == "function":
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = (q @ k.mT * x.shape[1] ** -0.5).softmax(-1) @ v
        return (tokens + self.out(y)).transpose(1, 2).reshape(x.shape)


class Twice(nn.Module):
    """One module in two places, under two names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = self.second = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class InTraining(nn.Module):
    """Code that depends on its mode, and keeps what it saw."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.calls, self.seen = nn.Conv2d(channels, channels, 1), 0, []
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.shape)
        self.last = x
        if self.training:
            self.count += 1
            return self.conv(x) + x
        return self.conv(x)


class Noise(nn.Module):
    """Adds random numbers in training mode, those of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.7)
        return x * keep.div_(0.7)


class LayerDrop(nn.Module):
    """As of speech networks: a layer is left out, as Python's random numbers say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.5 else x + self.conv(x)


class DropOfNumPy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.binomial(1, 0.7)) if self.training else x  # noqa: NPY002


class Scale(nn.Module):
    """LayerScale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _conv(c: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, c, kernel, padding=kernel // 2, **options)


def _chunks(_: Any, x: Tensor) -> Tensor:
    a, b = x.tensor_split(2, 1)
    return torch.cat([b, a.relu()], 1)


def _halves(m: Any, x: Tensor) -> Tensor:
    sizes = [1, x.shape[1] - 1]
    a, b = x.split(sizes, 1)
    return torch.cat([a, m.conv(x)[:, :1], b], 1)[:, 1:]


def _shuffled(_: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, 1, c, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


def _grown(m: Any, x: Tensor) -> Tensor:
    y = F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(m.conv(y), 2)


def _resized(mode: str) -> Code:
    return lambda m, x: F.interpolate(m.conv(F.avg_pool2d(x, 2, ceil_mode=True)), x.shape[2:], mode=mode)


def _into(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :, 1:] += x[:, :, :-1]
    y[:, 0].relu_()
    return y


def _stacked(m: Any, x: Tensor) -> Tensor:
    return torch.stack([x, m.conv(x), x.flip(3)], 0).sum(0)


def _maxout(m: Any, x: Tensor) -> Tensor:
    return torch.stack([x, m.conv(x)], 1).max(1).values


BLOCKS: dict[str, Callable[[int], Part]] = {
    "residual": lambda c: Part(Apply("residual", lambda m, x: x + m.b(F.relu(m.a(x))), a=_conv(c), b=_conv(c, 1))),
    "residual in place": lambda c: Part(Apply("residual in place", lambda m, x: m.a(x).add_(x), a=_conv(c))),
    "pre-activation": lambda c: Part(
        Apply(
            "pre-activation",
            lambda m, x: x + m.a(m.r(m.n(x))),
            a=_conv(c),
            n=_running(nn.BatchNorm2d(c)),
            r=nn.ReLU(True),
        )
    ),
    "concatenation": lambda c: Part(
        Apply("concatenation", lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=_conv(c), b=nn.Conv2d(2 * c, c, 1))
    ),
    "NHWC": lambda c: Part(
        Apply(
            "NHWC",
            lambda m, x: m.b(m.a(x.permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2),
            a=nn.Linear(c, 5),
            b=nn.Linear(5, c),
        )
    ),
    "chunks": lambda c: Part(Apply("chunks", _chunks)),
    "halves": lambda c: Part(Apply("halves", _halves, conv=_conv(c))),
    "shuffled": lambda c: Part(Apply("shuffled", _shuffled)),
    "pixels": lambda c: Part(
        Apply(
            "pixels",
            lambda m, x: F.pixel_unshuffle(m.a(F.pixel_shuffle(m.u(x), 2)), 2)[:, : x.shape[1]],
            u=nn.Conv2d(c, 4 * c, 1),
            a=_conv(c),
        )
    ),
    "grown": lambda c: Part(Apply("grown", _grown, conv=_conv(c))),
    "nearest": lambda c: Part(Apply("nearest", _resized("nearest"), conv=_conv(c))),
    "bilinear": lambda c: Part(Apply("bilinear", _resized("bilinear"), conv=_conv(c))),
    "bicubic": lambda c: Part(Apply("bicubic", _resized("bicubic"), conv=_conv(c))),
    "into": lambda c: Part(Apply("into", _into, conv=_conv(c, 1))),
    "stacked": lambda c: Part(Apply("stacked", _stacked, conv=_conv(c))),
    "maxout": lambda c: Part(Apply("maxout", _maxout, conv=_conv(c))),
    "rolled": lambda c: Part(Apply("rolled", lambda m, x: m.a(x.roll((1, -1), (2, 3))), a=_conv(c, 1))),
    "twice": lambda c: Part(Twice(_conv(c))),
    "tied": lambda c: Part(Tied(c)),
    "in training": lambda c: Part(InTraining(c)),
    "noise": lambda c: Part(Noise(), draws=True),
    "drop path": lambda c: Part(nn.Sequential(_conv(c, 1), DropPath()), draws=True),
    "layer drop": lambda c: Part(LayerDrop(c), draws=True),
    "drop of numpy": lambda c: Part(DropOfNumPy(), draws=True),
    "scale": lambda c: Part(Scale(c)),
    "normalised image": lambda c: Part(Apply("arithmetic", lambda _, x: (x - 0.4) / 0.2 * 0.5 + 1)),
    "dense": lambda c: Part(
        Apply("dense", lambda m, x: torch.einsum("oc,bchw->bohw", m.a.weight, x), a=nn.Linear(c, c, bias=False))
    ),
    "excitation": lambda c: Part(Excitation(c, False), gated=True),
    "hard excitation": lambda c: Part(Excitation(c, True), gated=True),
    "attention": lambda c: Part(Attention(c, "module"), gated=True),
    "attention by function": lambda c: Part(Attention(c, "function"), gated=True),
    "attention by products": lambda c: Part(Attention(c, "products"), gated=True),
    "glu": lambda c: Part(Apply("glu", lambda m, x: F.glu(m.a(x), 1), a=nn.Conv2d(c, 2 * c, 1)), gated=True),
    "spatial gate": lambda c: Part(
        Apply(
            "spatial gate",
            lambda m, x: x * m.a(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid(),
            a=nn.Conv2d(2, 1, 3, padding=1),
        ),
        gated=True,
    ),
}


# --- pooling, which keeps the channels

POOLS: dict[str, Callable[[], Part]] = {
    "MaxPool2d": lambda: Part(nn.MaxPool2d(2)),
    "MaxPool2d overlapping": lambda: Part(nn.MaxPool2d(3, 2, 1)),
    "MaxPool2d partly outside": lambda: Part(nn.MaxPool2d(3, 2, ceil_mode=True)),
    "MaxPool2d dilated": lambda: Part(nn.MaxPool2d(2, 1, 1, dilation=2)),
    "MaxPool2d with indices": lambda: Part(
        Apply("MaxPool2d with indices", lambda _, x: F.max_pool2d(x, 2, return_indices=True)[0])
    ),
    "MaxPool2d and indices": lambda: Part(
        Apply("MaxPool2d and indices", lambda m, x: m.pool(x)[0], pool=nn.MaxPool2d(2, return_indices=True))
    ),
    "AvgPool2d": lambda: Part(nn.AvgPool2d(2, ceil_mode=True)),
    "AvgPool2d without padding": lambda: Part(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "AdaptiveAvgPool2d": lambda: Part(nn.AdaptiveAvgPool2d((3, 2))),
    "AdaptiveMaxPool2d": lambda: Part(nn.AdaptiveMaxPool2d((2, 3))),
    "AdaptiveAvgPool2d None": lambda: Part(nn.AdaptiveAvgPool2d((None, 2))),
    "LPPool2d": lambda: Part(nn.LPPool2d(2, 2, ceil_mode=True), gated=True),
    "strided slices": lambda: Part(Apply("strided slices", lambda _, x: x[:, :, ::2, 1::2])),
    "minimum": lambda: Part(Apply("minimum", lambda _, x: -F.max_pool2d(-x, 2))),
    "unpooled": lambda: Part(Apply("unpooled", lambda _, x: _unpooled(x))),
}


def _unpooled(x: Tensor) -> Tensor:
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y.relu(), places, 2, output_size=x.shape[2:])


# --- layers with weights, and what may be done to them


@st.composite
def convolutions(draw: Any, channels: int) -> Part:
    groups = draw(st.sampled_from([g for g in (1, 1, 1, 2, 3, channels) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 2)) if groups > 1 else draw(st.integers(2, 5))
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    if draw(st.integers(0, 5)) == 0:
        stride = draw(st.integers(1, 2))
        return Part(nn.ConvTranspose2d(channels, outputs, 3, stride, 1, stride - 1, **options))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    kernel = draw(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 3])))
    stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    padding: Any = tuple(d * (k // 2) for d, k in zip(dilation, kernel, strict=True))
    if draw(st.booleans()) and mode == "zeros":
        padding = tuple(p + draw(st.integers(0, 1)) for p in padding)
    elif stride == (1, 1) and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"])) if kernel[0] != 2 else "valid"
    return Part(nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, padding_mode=mode, **options))


def _weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def _spectral_norm(layer: nn.Module) -> None:
    parametrizations.spectral_norm(layer)


def _old_weight_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)


def _old_spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


def _pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


def _pruned_in_structure(layer: nn.Module) -> None:
    prune.ln_structured(layer, "weight", 0.4, 2, 0)


def _hooked(layer: nn.Module) -> None:
    layer.register_forward_hook(_twice)


def _watched(layer: nn.Module) -> None:
    layer.register_forward_hook(_nothing)
    layer.register_full_backward_hook(_nothing_back)


def _pre_hooked(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(_shifted)


def _pre_hooked_by_name(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(_shifted_by_name, with_kwargs=True)


def _twice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def _nothing(module: nn.Module, inputs: Any, output: Tensor) -> None:
    pass


def _nothing_back(module: nn.Module, gradient: Any, output: Any) -> None:
    pass


def _shifted(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 0.1,)


def _shifted_by_name(module: nn.Module, inputs: Any, options: Any) -> Any:
    return (0.5 * inputs[0],), options


_HOOKS: list[Callable[[nn.Module], None]] = [_hooked, _watched, _pre_hooked]
_CHANGES: list[Callable[[nn.Module], None]] = [
    *(_weight_norm, _spectral_norm, _old_weight_norm, _old_spectral_norm, _pruned, _pruned_in_structure),
    *(_hooked, _watched, _pre_hooked, _pre_hooked_by_name),
]


# --- heads


def _linear(channels: int, classes: int) -> nn.Linear:
    return nn.Linear(channels, classes)


def _gem(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.avg_pool2d(x.clamp(min=1e-3).pow(3), x.shape[2:]).pow(1 / 3).flatten(1))


def _logsumexp(m: Any, x: Tensor) -> Tensor:
    return m.conv(x).flatten(2).logsumexp(2)


def _attended(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT
    return m.fc((m.a(tokens).softmax(1) * tokens).sum(1))


@dataclass
class Head:
    """The end of a network.

    Args:
        make: from the channels, the number of classes and the pixels of the last map.
        average: whether it is the average and one linear layer, ``fc``.
        gated: as of a part.
        sized: whether it takes maps of one size alone.
    """

    make: Callable[[int, int, int], nn.Module]
    average: bool = False
    gated: bool = False
    sized: bool = False
    draws: bool = False
    refused: bool = False


HEADS: dict[str, Head] = {
    "layers": Head(
        lambda c, k, n: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(c, k)),
        True,
        draws=True,
    ),
    "mean": Head(lambda c, k, n: Apply("mean", lambda m, x: m.fc(x.mean((2, 3))), fc=_linear(c, k)), True),
    "mean twice": Head(
        lambda c, k, n: Apply("mean twice", lambda m, x: m.fc(x.mean(3).mean(2)), fc=_linear(c, k)), True
    ),
    "flat mean": Head(
        lambda c, k, n: Apply("flat mean", lambda m, x: m.fc(x.flatten(2).mean(-1)), fc=_linear(c, k)), True
    ),
    "view": Head(
        lambda c, k, n: Apply(
            "view", lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)), fc=_linear(c, k)
        ),
        True,
    ),
    "squeezed": Head(
        lambda c, k, n: Apply(
            "squeezed", lambda m, x: m.fc(F.avg_pool2d(x, x.shape[2:]).squeeze(-1).squeeze(-1)), fc=_linear(c, k)
        ),
        True,
    ),
    "convolution then pool": Head(
        lambda c, k, n: Apply("convolution then pool", lambda m, x: m.fc(x).mean((2, 3)), fc=nn.Conv2d(c, k, 1)), True
    ),
    "pool then convolution": Head(
        lambda c, k, n: Apply(
            "pool then convolution", lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 1)).flatten(1), fc=nn.Conv2d(c, k, 1)
        ),
        True,
    ),
    "channels last": Head(
        lambda c, k, n: Apply("channels last", lambda m, x: m.fc(x.permute(0, 2, 3, 1).mean((1, 2))), fc=_linear(c, k)),
        True,
    ),
    "tokens": Head(
        lambda c, k, n: Apply("tokens", lambda m, x: m.fc(x.flatten(2).transpose(1, 2)).mean(1), fc=_linear(c, k))
    ),
    "sum": Head(lambda c, k, n: Apply("sum", lambda m, x: m.fc(x.sum((2, 3))), fc=_linear(c, k))),
    "flatten": Head(lambda c, k, n: nn.Sequential(nn.Flatten(), nn.Linear(c * n, k)), sized=True),
    "convolution before pool": Head(
        lambda c, k, n: nn.Sequential(
            nn.Conv2d(c, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, k)
        )
    ),
    "convolution 3x3 of classes": Head(
        lambda c, k, n: nn.Sequential(nn.Conv2d(c, k, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ),
    "two layers": Head(
        lambda c, k, n: nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5), nn.ReLU(True), nn.Linear(5, k)
        )
    ),
    "two layers, nothing between": Head(
        lambda c, k, n: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5), nn.Linear(5, k))
    ),
    "larger pool": Head(lambda c, k, n: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, k))),
    "normalised": Head(
        lambda c, k, n: nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), _running(nn.BatchNorm1d(c)), nn.Linear(c, k)
        )
    ),
    "maximum": Head(lambda c, k, n: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(c, k))),
    "amax": Head(lambda c, k, n: Apply("amax", lambda m, x: m.fc(x.amax((2, 3))), fc=_linear(c, k))),
    "both": Head(
        lambda c, k, n: Apply(
            "both", lambda m, x: m.fc(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)), fc=_linear(2 * c, k)
        )
    ),
    "scaled": Head(lambda c, k, n: Apply("scaled", lambda m, x: m.fc(x.mean((2, 3))) / 0.1, fc=_linear(c, k))),
    "a loop of classes": Head(
        lambda c, k, n: Apply(
            "a loop of classes",
            lambda m, x: torch.cat([fc(x.mean((2, 3))) for fc in m.fcs], 1),
            fcs=nn.ModuleList([_linear(c, 1) for _ in range(k)]),
        )
    ),
    "layer norm": Head(
        lambda c, k, n: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(c), nn.Linear(c, k)),
        gated=True,
    ),
    "generalised mean": Head(lambda c, k, n: Apply("generalised mean", _gem, fc=_linear(c, k)), gated=True),
    "LP": Head(
        lambda c, k, n: Apply("LP", lambda m, x: m.fc(F.lp_pool2d(x, 2, x.shape[2:]).flatten(1)), fc=_linear(c, k)),
        gated=True,
    ),
    "logsumexp": Head(
        lambda c, k, n: Apply("logsumexp", _logsumexp, conv=nn.Conv2d(c, k, 1)), gated=True, refused=True
    ),
    "attended": Head(lambda c, k, n: Apply("attended", _attended, a=nn.Linear(c, 1), fc=_linear(c, k)), gated=True),
    "cosine": Head(
        lambda c, k, n: Apply(
            "cosine",
            lambda m, x: F.linear(F.normalize(x.mean((2, 3))), F.normalize(m.classes.weight)),
            classes=_linear(c, k),
        ),
        gated=True,
    ),
}


# --- whole networks


class Output(dict):  # as the outputs of transformers: by key and by name
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Record:
    logits: Tensor
    maps: Tensor | None = None


class Net(nn.Module):
    """A trunk, whose result is the feature map, and a head."""

    def __init__(self, trunk: nn.Module, head: nn.Module, result: str) -> None:
        super().__init__()
        self.trunk, self.head, self.result = trunk, head, result

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        maps = self.trunk(x)
        logits = self.head(maps)
        if self.result == "dictionary":
            return {"logits": logits, "maps": maps}
        if self.result == "object":
            return SimpleNamespace(logits=logits)
        if self.result == "record":
            return Record(logits, maps)
        if self.result == "output":
            return Output(logits=logits)
        if self.result == "tuple":
            return logits, maps
        return logits


class Normalised(nn.Module):
    """A network behind the normalisation of its images."""

    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.rand(channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.inner((x - self.mean) / self.std)


@dataclass
class Drawn:
    """A network as its user has it, and what is known of it.

    Args:
        model: the network, in what it may be wrapped in.
        images: that it is called with.
        names: of what it is made of.
        gated: whether it has gates, so that heatmaps are not input times gradient.
        refused: whether unroll refuses it, as it documents.
        draws: whether it draws random numbers in its mode.
        average: whether its head is the average and one linear layer.
        is_tuple: whether its result is one, which is refused.
        read_first: whether it is read on an example, which is faster.
    """

    model: nn.Module
    images: Tensor
    names: list[str]
    gated: bool
    refused: bool
    draws: bool
    average: bool
    is_tuple: bool
    read_first: bool

    @property
    def example(self) -> Tensor | None:
        return self.images.detach() if self.read_first else None

    @property
    def inner(self) -> nn.Module:
        """The network itself, not compiled."""
        return getattr(self.model, "_orig_mod", self.model)

    def logits(self, images: Tensor) -> Tensor:
        output = self.inner(images)
        return output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)

    def __repr__(self) -> str:
        modes = "".join("te"[not m.training] for m in self.model.modules())
        x = self.images
        return f"{self.names} {modes} {tuple(x.shape)} {x.dtype} {x.stride()}\n{self.model}"


@st.composite
def networks(draw: Any, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> Drawn:
    """A random network of one of these precisions, in a random mode, and images for it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    shape = [2, draw(st.sampled_from([3, 3, 1, 4])), draw(st.integers(7, 13)), draw(st.integers(7, 13))]
    size = draw(st.sampled_from([2, 1, 3])), *shape[1:]
    parts = _parts(draw, shape)
    trunk = _nested([part.module for _, part in parts], draw(st.booleans()))
    name = draw(st.sampled_from(sorted(HEADS)))
    head = HEADS[name]
    end = head.make(shape[1], draw(st.sampled_from([3, 2, 1])), shape[2] * shape[3])
    names = [key for key, _ in parts] + [name]
    if draw(st.integers(0, 9)) == 0:
        names.append(f"{_changed(draw, trunk, _HOOKS)} of all")
    if draw(st.integers(0, 5)) == 0 and hasattr(end, "fc"):
        names.append(f"{_changed(draw, end.fc, _CHANGES)} of the head")
    result = draw(st.sampled_from(["tensor"] * 6 + ["dictionary", "object", "record", "output", "tuple"]))
    dtype = draw(st.sampled_from(dtypes))
    model, wrapper = _wrapped(draw, Net(trunk, end, result).eval(), size[1])
    model.to(dtype)
    mode = _set_mode(draw, model)
    for parameter in model.parameters():
        if draw(st.integers(0, 5)) == 0:
            parameter.requires_grad_(False)
    if draw(st.integers(0, 14)) == 0:
        _make_inference(model)
        names.append("of inference mode")
    layouts = ["", "", "channels last", "strided", "flipped", "expanded", "requires grad", "inference"]
    if any(isinstance(m, nn.GroupNorm) for m in model.modules()):
        layouts.remove("channels last")  # torch's backward pass of a first GroupNorm ends the process
    layout = draw(st.sampled_from(layouts))
    return Drawn(
        model=model,
        images=_laid_out(torch.randn(size).to(dtype), layout),
        names=[*names, result, wrapper, mode, layout],
        gated=head.gated or any(part.gated for _, part in parts),
        refused=head.refused or result == "tuple" or any(part.refused for _, part in parts),
        draws=any(m.training for m in model.modules()) and (head.draws or any(part.draws for _, part in parts)),
        average=head.average,
        is_tuple=result == "tuple",
        read_first=draw(st.integers(0, 4)) > 0,
    )


def _parts(draw: Any, shape: list[int]) -> list[tuple[str, Part]]:
    """Named parts of a trunk; the shape of its map comes in place of that of images."""
    parts: list[tuple[str, Part]] = []

    def append(name: str, part: Part) -> None:
        after = _shape_of(part.module.eval(), shape)
        if len(after) == 4 and min(after[2:]) > 1 and after[2] * after[3] <= 400 and after[1] <= 12:
            shape[:] = after
            parts.append((name, part))

    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "block", "block", "norm", "pool", "again"]))
        fitting = [part for _, part in parts if _shape_of(part.module, shape) == shape]
        if kind == "again" and fitting:
            append("again", draw(st.sampled_from(fitting)))
        elif kind in ("conv", "again"):
            part = draw(convolutions(shape[1]))
            append(f"conv {_changed(draw, part.module, _CHANGES) if draw(st.integers(0, 4)) == 0 else ''}", part)
        else:
            table: Any = {"block": BLOCKS, "norm": NORMALISATIONS, "pool": POOLS}[kind]
            name = draw(st.sampled_from(sorted(table)))
            append(name, table[name]() if kind == "pool" else table[name](shape[1]))
        if draw(st.booleans()):
            name = draw(st.sampled_from(sorted(ACTIVATIONS)))
            append(name, ACTIVATIONS[name](shape[1]))
    if not parts:
        append("conv", Part(nn.Conv2d(shape[1], 3, 3, padding=1)))
    return parts


@torch.no_grad()
def _shape_of(module: nn.Module, shape: list[int]) -> list[int]:
    """Of what it gives for images of a shape; nothing where it does not take them."""
    try:
        return list(module(torch.zeros(shape)).shape)
    except (RuntimeError, ValueError, AssertionError):
        return []


def _changed(draw: Any, module: nn.Module, changes: list[Callable[[nn.Module], Any]]) -> str:
    change = draw(st.sampled_from(changes))
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
    ):  # weights that hooks compute are leaves, so that copies can be made
        warnings.simplefilter("ignore", FutureWarning)
        change(module)
    return change.__name__.strip("_")


def _nested(layers: list[nn.Module], nested: bool) -> nn.Module:
    if not nested or len(layers) < 2:
        return nn.Sequential(*layers)
    return nn.Sequential(nn.Sequential(*layers[:1]), nn.Sequential(nn.Sequential(*layers[1:])))


def _wrapped(draw: Any, net: nn.Module, channels: int) -> tuple[nn.Module, str]:
    kind = draw(st.sampled_from([""] * 20 + ["DataParallel", "AveragedModel", "compiled", "Normalised", "Sequential"]))
    if kind == "compiled":
        return torch.compile(net, backend="eager"), kind  # type: ignore[return-value]
    if kind == "Normalised":
        return Normalised(net, channels).eval(), kind
    wrappers = {
        "DataParallel": nn.DataParallel,
        "AveragedModel": torch.optim.swa_utils.AveragedModel,
        "Sequential": nn.Sequential,
    }
    return wrappers[kind](net).eval() if kind else net, kind


def _set_mode(draw: Any, model: nn.Module) -> str:
    mode = draw(st.sampled_from(["evaluation", "evaluation", "training", "mixed"]))
    for module in model.modules():
        module.training = mode == "training" or (mode == "mixed" and draw(st.booleans()))
    return mode


def _make_inference(model: nn.Module) -> None:
    """Parameters and buffers as of a network that was made or loaded in inference mode."""
    made: dict[Tensor, Tensor] = {}
    with torch.inference_mode():
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter not in made:
                    made[parameter] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[key] = None if parameter is None else made[parameter]
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.clone()


def _laid_out(images: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([images, images], -1)[..., 0]
    if layout == "flipped":
        return images.mT.contiguous().mT
    if layout == "expanded":
        return images[:1].expand_as(images)
    if layout == "requires grad":
        return images.requires_grad_()
    if layout == "inference":
        with torch.inference_mode():
            return images.clone()
    return images


# --- what a call must leave as it is


def state(model: nn.Module) -> dict[str, Any]:
    """All of a network and of torch that a call could change, by what it is."""
    found: dict[str, Any] = {
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "call of modules": nn.Module.__call__,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = _contents(value)
    return found


def numbers() -> tuple[Any, ...]:
    """Of the generators of random numbers."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


def _contents(value: Any) -> Any:
    if isinstance(value, Tensor):
        version = -1 if value.is_inference() else value._version
        grad = None if value.grad_fn is not None or value.grad is None else value.grad.clone()
        return id(value), version, value.requires_grad, grad, value.detach().clone().double().nan_to_num().tolist()
    if isinstance(value, dict):
        return id(value), [(key, _contents(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), [_contents(entry) for entry in value]
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype)):
        return value
    return id(value)
