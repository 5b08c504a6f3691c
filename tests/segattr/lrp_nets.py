"""Classifiers for the tests of unrolled LRP: those of the golden suite, random ones, and what to compare with."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

# --- the golden architectures; names of layers are those of the stored parameters


class Residual(nn.Module):
    """Convolutions with batch normalisation and a shortcut; the first 3x3 one has the stride, groups and dilation."""

    def __init__(self, channels: list[int], kernels: list[int], stride: int = 1, groups: int = 1, dilation: int = 1):
        super().__init__()
        self.depth = len(kernels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels[0] != channels[-1]:
            shortcut = nn.Conv2d(channels[0], channels[-1], 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels[-1]))
        for i, kernel in enumerate(kernels):
            s, g, d = (stride, groups, dilation) if i == kernels.index(3) else (1, 1, 1)
            conv = nn.Conv2d(channels[i], channels[i + 1], kernel, s, d * (kernel // 2), d, g, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.depth:
                y = self.relu(y)
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def basic(inputs: int, outputs: int, stride: int = 1) -> Residual:
    return Residual([inputs, outputs, outputs], [3, 3], stride)


def bottleneck(inputs: int, width: int, outputs: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> Residual:
    return Residual([inputs, width, width, outputs], [1, 3, 1], stride, groups, dilation)


def resnet(maxpool: nn.Module, layers: list[list[Residual]], features: int) -> nn.Module:
    stages = {f"layer{i}": nn.Sequential(*blocks) for i, blocks in enumerate(layers, 1)}
    stem = {"conv1": nn.Conv2d(3, 4, 7, 2, 3, bias=False), "bn1": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True)}
    head = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(features, 4)}
    return nn.Sequential(OrderedDict(stem | {"maxpool": maxpool} | stages | head))


def vgg(features: list[nn.Module], avgpool: nn.Module, classifier: list[nn.Module]) -> nn.Module:
    parts = {"features": nn.Sequential(*features), "avgpool": avgpool, "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts | {"classifier": nn.Sequential(*classifier)}))


def normalised(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)]


def resnet_basic(maxpool: nn.Module | None = None) -> nn.Module:
    layers = [[basic(4, 4)], [basic(4, 6, 2), basic(6, 6)], [basic(6, 6)], [basic(6, 8, 2)]]
    return resnet(maxpool or nn.MaxPool2d(3, 2, 1), layers, 8)


def resnet_bottleneck() -> nn.Module:
    layers = [
        [bottleneck(4, 4, 8, groups=2)],
        [bottleneck(8, 4, 8, 2, groups=4), bottleneck(8, 4, 8)],
        [bottleneck(8, 4, 8, dilation=2)],
        [bottleneck(8, 4, 12, groups=2, dilation=2)],
    ]
    return resnet(nn.MaxPool2d(3, 2, 1), layers, 12)


def vgg_bn() -> nn.Module:
    """Three linear layers after an adaptive pool whose windows overlap."""
    convolutions = [normalised(nn.Conv2d(i, o, 3, padding=1)) for i, o in ((3, 4), (4, 6), (6, 6))]
    features = [*convolutions[0], nn.MaxPool2d(2, 2), *convolutions[1], *convolutions[2], nn.MaxPool2d(2, 2)]
    hidden = [[nn.Linear(i, o), nn.ReLU(inplace=True), nn.Dropout()] for i, o in ((54, 10), (10, 8))]
    return vgg(features, nn.AdaptiveAvgPool2d(3), [*hidden[0], *hidden[1], nn.Linear(8, 4)])


def ceil_mode() -> nn.Module:
    """Pools whose last windows are partly outside the map; biases, no batch normalisation."""
    features = [
        *(nn.Conv2d(3, 5, 4, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(5, 6, 3, padding=2, dilation=2), nn.ReLU()),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        *(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.MaxPool2d(2, 2, ceil_mode=True)),
    ]
    return vgg(features, nn.AdaptiveAvgPool2d(1), [nn.Linear(6, 4)])


def stride_gt_kernel() -> nn.Module:
    """Windows with gaps between them; convolutions with a bias before batch normalisation."""
    features = [
        *normalised(nn.Conv2d(3, 5, 3)),
        *(nn.Conv2d(5, 6, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2, 3)),
        *normalised(nn.Conv2d(6, 6, 1, 2)),
    ]
    return vgg(features, nn.AdaptiveAvgPool2d(1), [nn.Linear(6, 4)])


GOLDEN: dict[str, Callable[[], nn.Module]] = {
    "resnet_basic": resnet_basic,
    "resnet_basic_pool22": lambda: resnet_basic(nn.MaxPool2d(2, 2)),
    "resnet_bottleneck": resnet_bottleneck,
    "vgg_bn": vgg_bn,
    "ceil_mode": ceil_mode,
    "stride_gt_kernel": stride_gt_kernel,
}


# --- what to compare with


def input_times_gradient(model: nn.Module, x: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """Scores and heatmaps by automatic differentiation, one class at a time."""
    x = x.detach().requires_grad_()
    scores = model(x)
    gradients = [torch.autograd.grad(s.sum(), x, create_graph=create_graph, retain_graph=True)[0] for s in scores.T]
    return scores, torch.stack([(x * gradient).sum(1) for gradient in gradients], 1)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """By name of the parameter; zeros where there is none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected value."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def conservation_error(scores: Tensor, heat: Tensor, ledger: dict[str, Tensor]) -> float:
    """Of score = relevance of the pixels + relevance in the ledger, relative to the largest of the three."""
    absorbed = torch.stack([torch.zeros_like(scores), *ledger.values()]).detach()
    terms = torch.stack([scores, heat.flatten(2).sum(2), absorbed.abs().sum(0)]).detach()
    return float((terms[1] + absorbed.sum(0) - terms[0]).abs().max() / terms.abs().max().clamp(min=1e-30))


@torch.no_grad()
def randomise(model: nn.Module, shifts: bool = True) -> nn.Module:
    """Random weights that keep the size of signals, and random statistics, scales and shifts of normalisation."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3 * shifts)
            module.running_var.uniform_(0.3, 2)
            module.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(module.num_features) < 0.2, -1, 1))
            module.bias.normal_(0, 0.3 * shifts)
            module.num_batches_tracked.zero_()
        else:
            for name, parameter in own.items():
                fan = parameter[0].numel()
                parameter.normal_(0, (2 / fan) ** 0.5 if name == "weight" else 0.1 * shifts)
    return model.double().eval()


# --- random architectures


class Apply(nn.Module):
    """A function or method in the code of a model."""

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)

    def extra_repr(self) -> str:
        return self.name


class FunctionalConv2d(nn.Module):
    """A convolution by its function, with parameters of the model."""

    def __init__(self, inputs: int, outputs: int, kernel: Any, **settings: Any) -> None:
        super().__init__()
        plain = nn.Conv2d(inputs, outputs, kernel, groups=settings["groups"], bias=settings.pop("bias"))
        self.weight, self.bias, self.settings = plain.weight, plain.bias, settings

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, **self.settings)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.settings}"


class Block(nn.Module):
    """A path and what comes in beside it: nothing, a shortcut that is added, or the input concatenated."""

    def __init__(self, path: nn.Module, shortcut: nn.Module | None, join: nn.Module | None) -> None:
        super().__init__()
        self.path, self.shortcut, self.join = path, shortcut, join

    def forward(self, x: Tensor) -> Tensor:
        y = self.path(x)
        if self.join is None:
            return y
        return self.join(y, x if self.shortcut is None else self.shortcut(x))


def _add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "x + y": lambda x, y: x + y,
    "x += y": _add_in_place,
    "torch.add": torch.add,
    "x.add": lambda x, y: x.add(y),
    "x.add_": lambda x, y: x.add_(y),
    "torch.cat": lambda x, y: torch.cat([x, y], 1),
    "torch.cat of three": lambda x, y: torch.cat((y, x, y), dim=-3),
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "x.flatten": lambda x: x.flatten(start_dim=1),
    "x.view of a size": lambda x: x.view(x.size(0), -1),
    "x.reshape of a shape": lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    "x.mean": lambda x: x.mean((2, 3)),
    "torch.mean": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True).squeeze(-1).squeeze(-1),
    "x.mean twice": lambda x: x.mean(3).mean(2),
    "F.adaptive_avg_pool2d": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "F.dropout": lambda x: F.dropout(x, 0.5, training=False),
}


def apply(name: str) -> Apply:
    return Apply(name, FUNCTIONS[name])


def activations() -> st.SearchStrategy[Callable[[], nn.Module]]:
    names = [name for name in FUNCTIONS if "relu" in name]
    named = st.sampled_from(names).map(lambda name: lambda: apply(name))
    return named | st.booleans().map(lambda inplace: lambda: nn.ReLU(inplace=inplace))


@st.composite
def pools(draw: Any, size: list[int]) -> Callable[[], nn.Module]:
    """Maximum, average and adaptive, windows with overlap or gaps, partly outside the map."""
    adaptive = draw(st.booleans())
    maximum = draw(st.booleans())
    functional = draw(st.booleans())
    if adaptive:
        target = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
        if functional:
            function = F.adaptive_max_pool2d if maximum else F.adaptive_avg_pool2d
            return lambda: Apply(f"{function.__name__} to {target}", lambda x: function(x, target))
        return lambda: (nn.AdaptiveMaxPool2d if maximum else nn.AdaptiveAvgPool2d)(target)
    kernel = [draw(st.integers(1, min(4, n))) for n in size]
    settings: dict[str, Any] = {
        "stride": [draw(st.integers(1, 4)) for _ in size],
        "padding": [draw(st.integers(0, k // 2)) for k in kernel],
        "ceil_mode": draw(st.booleans()),
    }
    if maximum:
        settings["dilation"] = [
            1 if k == 1 or d * (k - 1) >= n else d for k, n, d in zip(kernel, size, (2, 1), strict=True)
        ]
    else:
        settings["count_include_pad"] = draw(st.booleans())
        settings["divisor_override"] = draw(st.none() | st.integers(1, 7))
    if functional:
        function = F.max_pool2d if maximum else F.avg_pool2d
        return lambda: Apply(f"{function.__name__}, {kernel}, {settings}", lambda x: function(x, kernel, **settings))
    return lambda: (nn.MaxPool2d if maximum else nn.AvgPool2d)(tuple(kernel), **settings)


@st.composite
def convolutions(
    draw: Any, channels: int, size: list[int], same: bool = False, shifts: bool = True
) -> Callable[[], nn.Module]:
    """Any stride, padding, dilation and groups, as a module or function; ``same``: pads to the size over the stride."""
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if channels % g == 0]))
    outputs = groups * draw(st.integers(1 if groups > 1 else 2, 3))
    stride = [draw(st.integers(1, 3)) for _ in size]
    dilation = [draw(st.integers(1, 2)) for _ in size]
    if same:
        kernel = [draw(st.sampled_from([1, 3])) for _ in size]
        padding: Any = [d * (k // 2) for d, k in zip(dilation, kernel, strict=True)]
        if stride == [1, 1] and draw(st.booleans()):
            padding = "same"
    else:
        padding = [draw(st.integers(0, 3)) for _ in size]
        most = [(n + 2 * p - 1) // d + 1 for n, p, d in zip(size, padding, dilation, strict=True)]
        kernel = [draw(st.integers(1, min(4, m))) for m in most]
    bias = shifts and draw(st.booleans())
    kind = draw(st.sampled_from([nn.Conv2d, FunctionalConv2d]))
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    settings |= {name: tuple(v) for name, v in settings.items() if isinstance(v, list)}
    return lambda: kind(channels, outputs, tuple(kernel), **settings)


@st.composite
def classifiers(draw: Any, shifts: bool = True) -> tuple[nn.Module, Tensor]:
    """A random classifier in float64, in evaluation mode, and two images.

    Args:
        draw: by hypothesis.
        shifts: whether it has biases and shifts of normalisation.
    """
    torch.manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(2, draw(st.integers(1, 3)), draw(st.integers(7, 15)), draw(st.integers(7, 15)), dtype=torch.float64)
    layers: list[nn.Module] = []
    shape = list(x.shape)

    def append(layer: nn.Module) -> None:
        layers.append(layer)
        shape[:] = layer.double().eval()(torch.zeros(shape, dtype=torch.float64)).shape

    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["plain", "residual", "concatenating"]))
        conv = draw(convolutions(shape[1], shape[2:], same=kind != "plain", shifts=shifts))()
        path = [conv]
        outputs = conv.weight.shape[0]
        if draw(st.booleans()):
            path.append(nn.BatchNorm2d(outputs))
        if kind != "plain" and draw(st.booleans()):
            path += [draw(activations())(), nn.Conv2d(outputs, outputs, 3, padding=1, bias=shifts)]
        if draw(st.booleans()):
            path.append(draw(st.sampled_from([nn.Dropout(), nn.Dropout2d(), nn.Identity(), apply("F.dropout")])))
        stride = conv.stride if isinstance(conv, nn.Conv2d) else conv.settings["stride"]
        shortcut = None
        if kind != "plain" and (outputs != shape[1] or tuple(stride) != (1, 1)):
            shortcut = nn.Conv2d(shape[1], outputs, 1, stride, bias=shifts)
        names = [n for n in FUNCTIONS if ("cat" if kind == "concatenating" else "add") in n or "x +" in n]
        join = None if kind == "plain" else apply(draw(st.sampled_from(names)))
        append(Block(nn.Sequential(*path), shortcut, join))
        append(draw(activations())())
        if draw(st.booleans()):
            append(draw(pools(shape[2:]))())
    heads = [n for n in FUNCTIONS if any(word in n for word in ("flatten", "view", "reshape", "mean", "adaptive"))]
    append(apply(draw(st.sampled_from(heads))))
    if draw(st.booleans()):
        append(nn.Linear(shape[1], 5, bias=shifts))
        append(draw(activations())())
    append(nn.Linear(shape[1], draw(st.integers(1, 4)), bias=shifts))
    return randomise(nn.Sequential(*layers), shifts), x
