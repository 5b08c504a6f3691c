"""Kinds of heads and networks: where they are split, and what their maps are, each computed without the library."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from segattr.advcam import advcam
from segattr.bottleneck import rib
from segattr.cam import cam, normalize
from segattr.gradients import grad_cam
from segattr.lrp import unroll
from segattr.networks.classifier import split

CHANNELS, CLASSES = 6, 4
IMAGES = torch.randn(2, 3, 24, 18, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SQUARES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def ready(model: nn.Module) -> Any:
    """In float64 and evaluation mode, with the same random parameters each time."""
    generator = torch.Generator().manual_seed(5)
    for tensor in model.double().eval().parameters():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return model


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def trunk(channels: int = CHANNELS) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, channels, 3, 1, 1))


# --- heads behind a trunk, whose result is the map


class Headed(nn.Module):
    """A trunk, and a head that is a function of its map with layers of the network."""

    def __init__(self, head: Callable[["Headed", Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk(), head
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.head(self, self.trunk(x))


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


def linear(inputs: int = CHANNELS) -> nn.Linear:
    return nn.Linear(inputs, CLASSES)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


HEADS: dict[str, tuple[Callable[..., Any], dict[str, Callable[[], nn.Module]]]] = {
    "mean": (lambda net, x: net.fc(pooled(x)), {"fc": linear}),
    "sum": (lambda net, x: net.fc(x.sum((2, 3))), {"fc": linear}),
    "maximum": (lambda net, x: net.fc(x.amax((2, 3))), {"fc": linear}),
    "maximum and average": (
        lambda net, x: net.fc((F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1)).flatten(1) / 2),
        {"fc": linear},
    ),
    "concatenated": (
        lambda net, x: net.fc(torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1)),
        {"fc": lambda: linear(2 * CHANNELS)},
    ),
    "generalised mean": (
        lambda net, x: net.fc(F.adaptive_avg_pool2d(x.clamp(min=1e-6).pow(3), 1).pow(1 / 3).flatten(1)),
        {"fc": linear},
    ),
    "LP": (lambda net, x: net.fc(F.lp_pool2d(x, 2, tuple(x.shape[2:])).flatten(1)), {"fc": linear}),
    "convolution behind pooling": (
        lambda net, x: net.fc(net.conv(F.adaptive_avg_pool2d(x, 1)).relu().flatten(1)),
        {"conv": lambda: nn.Conv2d(CHANNELS, 5, 1), "fc": lambda: linear(5)},
    ),
    "convolution that makes classes": (
        lambda net, x: F.adaptive_avg_pool2d(net.fc(x), 1).flatten(1),
        {"fc": lambda: nn.Conv2d(CHANNELS, CLASSES, 1)},
    ),
    "average of two": (
        lambda net, x: (net.one(pooled(x)) + net.two(pooled(x))) / 2,
        {"one": linear, "two": linear},
    ),
    "normalised": (
        lambda net, x: net.fc(net.norm(pooled(x))),
        {"norm": lambda: nn.LayerNorm(CHANNELS), "fc": linear},
    ),
    "hidden layer": (
        lambda net, x: net.fc(net.hidden(x.flatten(2).mean(2)).tanh()),
        {"hidden": lambda: nn.Linear(CHANNELS, 5), "fc": lambda: linear(5)},
    ),
    "cosine": (lambda net, x: F.linear(F.normalize(pooled(x)), F.normalize(net.fc.weight)), {"fc": linear}),
    "channels last": (lambda net, x: net.fc(x.permute(0, 2, 3, 1).mean((1, 2))), {"fc": linear}),
    "tokens": (lambda net, x: net.fc(x.flatten(2).transpose(1, 2).mean(1)), {"fc": linear}),
    "dataclass": (lambda net, x: Output(None, net.fc(pooled(x))), {"fc": linear}),
    "dictionary": (lambda net, x: {"logits": net.fc(pooled(x)), "maps": x}, {"fc": linear}),
    "single logit": (lambda net, x: net.fc(pooled(x)).squeeze(1), {"fc": lambda: nn.Linear(CHANNELS, 1)}),
}
MEANS = ("mean", "convolution that makes classes", "channels last", "tokens", "dataclass", "dictionary", "single logit")


def headed(name: str) -> Any:
    head, layers = HEADS[name]
    return ready(Headed(head, **{key: make() for key, make in layers.items()}))


def logits_of(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)


@pytest.mark.parametrize("name", HEADS)
def test_the_map_of_a_head_is_what_its_trunk_gives(name: str) -> None:
    net = headed(name)
    clf = split(net)
    for images in (IMAGES, SQUARES[:1]):
        assert_close(clf.features(images), net.trunk(images))
        assert_close(clf(images), logits_of(net(images)))


@pytest.mark.parametrize("name", HEADS)
def test_grad_cam_of_a_head_is_that_of_autograd(name: str) -> None:
    net = headed(name)
    maps = net.trunk(IMAGES).detach().requires_grad_()
    logits = logits_of(net.head(net, maps)).view(2, -1)
    each = [torch.autograd.grad(logits[:, c].sum(), maps, retain_graph=True)[0] for c in range(logits.shape[1])]
    expected = [(gradient.mean((2, 3), keepdim=True) * maps).sum(1) for gradient in each]
    assert_close(grad_cam(net, IMAGES, norm="raw"), torch.stack(expected, 1))


@pytest.mark.parametrize("name", HEADS)
def test_cam_is_for_linear_layers_of_averages_alone(name: str) -> None:
    net = headed(name)
    if name in MEANS:
        assert_close(cam(net, IMAGES), torch.einsum("kd,bdhw->bkhw", net.fc.weight.flatten(1), net.trunk(IMAGES)))
    else:
        with pytest.raises(ValueError, match="use grad_cam"):
            cam(net, IMAGES)


@pytest.mark.parametrize("name", HEADS)
def test_advcam_and_rib_of_a_head_are_maps(name: str) -> None:
    net = headed(name)
    companions = [(IMAGES[1:], torch.ones(1, split(net)(IMAGES).view(2, -1).shape[1]))]
    for maps in (
        advcam(net, IMAGES, [0], steps=1),
        rib(net, IMAGES, companions[0][1].expand(2, -1), companions=companions, steps=1, norm="raw"),
    ):
        assert maps.shape[2:] == net.trunk(IMAGES).shape[2:]
        assert maps.any()


def test_the_map_of_attention_is_what_it_adds_up() -> None:
    def weighted(net: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return net.score(tokens).softmax(1) * tokens

    net = ready(
        Headed(lambda net, x: net.fc(weighted(net, x).sum(1)), score=nn.Linear(CHANNELS, 1), fc=nn.Linear(CHANNELS, 2))
    )
    maps = weighted(net, net.trunk(IMAGES)).mT.unflatten(2, (12, 9))
    assert_close(split(net).features(IMAGES), maps)
    assert_close(grad_cam(net, IMAGES, norm="raw"), torch.einsum("kd,bdhw->bkhw", net.fc.weight, maps))


# --- networks


class Same(nn.Module):
    """Padding computed from the size of the image; arguments after it; numbers of the batch and size in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.fc = nn.Conv2d(3, 5, 3, 2), nn.Conv2d(5, CHANNELS, 3, padding=1), linear()

    def maps(self, x: Tensor) -> Tensor:
        height, width = (-n % 2 + 1 for n in x.shape[2:])
        x = self.conv(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))
        if x.shape[2] > 8:
            x = x.relu()
        return self.last(x)

    def forward(self, x: Tensor, scale: float = 1.0, labels: Tensor | None = None) -> Tensor:
        return self.fc(self.maps(x).mean((2, 3)).view(len(x), -1) * scale)


def test_code_that_depends_on_the_size() -> None:
    net = ready(Same())
    clf = split(net)
    for size in ((24, 18), (9, 11), (32, 32), (12, 13)):
        images = torch.randn(3, 3, *size, dtype=torch.float64)
        assert_close(clf.features(images), net.maps(images))
        assert_close(clf(images), net(images))


class Mixer(nn.Module):
    """Tokens mixed by a layer as wide as there are, so that one size of images fits."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 8, 8)
        self.mix, self.norm, self.fc = nn.Linear((size // 8) ** 2, (size // 8) ** 2), nn.LayerNorm(CHANNELS), linear()

    def tokens(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.norm(x + self.mix(x.transpose(1, 2)).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tokens(x).mean(1))


def test_the_map_of_a_mixer_is_its_tokens() -> None:
    net = ready(Mixer())
    expected = net.tokens(SQUARES).mT.unflatten(2, (4, 4))
    assert_close(split(net).features(SQUARES), expected)
    assert_close(cam(net, SQUARES), torch.einsum("kd,bdhw->bkhw", net.fc.weight, expected))


def test_an_example_tells_a_size_that_is_not_usual() -> None:
    net, images = ready(Mixer(40)), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    for clf in (split(net), split(net, example=images[:1])):
        assert_close(clf(images), net(images))
        assert_close(clf.features(images), net.tokens(images).mT.unflatten(2, (5, 5)))


class Shrinking(nn.Module):
    """Patches cut by reshaping, attention whose queries are every fourth token, and windows, which hide the map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.values, self.last, self.fc = nn.Linear(48, 8), nn.Linear(8, 8), nn.Linear(8, CHANNELS), linear()

    def tokens(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 16, 48)
        x = self.stem(x)
        queries = x.view(b, h // 4, w // 4, 8)[:, ::2, ::2].reshape(b, h * w // 64, 8)
        heads = [y.view(b, -1, 2, 4).transpose(1, 2) for y in (queries, x, self.values(x))]
        weights = (heads[0] @ heads[1].transpose(-2, -1)).softmax(-1)
        return self.last((weights @ heads[2]).transpose(1, 2).reshape(b, -1, 8))

    def maps(self, x: Tensor) -> Tensor:
        b, h, w = len(x), x.shape[2] // 8, x.shape[3] // 8
        x = self.tokens(x).view(b, h // 2, 2, w // 2, 2, CHANNELS).transpose(2, 3).flatten(1, 2).tanh()
        return x.view(b, h // 2, w // 2, 2, 2, CHANNELS).permute(0, 5, 1, 3, 2, 4).reshape(b, CHANNELS, h, w)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.maps(x), 1).flatten(1))


class ShrinkingTokens(Shrinking):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tokens(x).mean(1))


@pytest.mark.parametrize("kind", [Shrinking, ShrinkingTokens])
def test_tokens_of_patches_attention_and_windows(kind: type[nn.Module]) -> None:
    net = ready(kind())
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    expected = net.maps(images) if kind is Shrinking else net.tokens(images).mT.unflatten(2, (4, 6))
    clf = split(net)
    assert_close(clf.features(images), expected)
    assert_close(clf(images), net(images))
    assert_close(cam(net, images), torch.einsum("kd,bdhw->bkhw", net.fc.weight, expected))


class Passing(nn.Module):
    """A block behind the feature map takes another map too, which it does not need."""

    class Both(nn.Module):
        def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            return x.tanh().mean((2, 3)), other + 1

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.both, self.fc = trunk(), self.Both(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.both(self.trunk(x), x)[0])


def test_a_block_behind_the_map_may_take_what_it_does_not_need() -> None:
    net = ready(Passing())
    clf = split(net, "trunk")
    assert_close(clf.features(IMAGES), net.trunk(IMAGES))
    assert_close(clf(IMAGES), net(IMAGES))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class ViT(nn.Module):
    """A class token, registers, and logits of the class token or of the average of the others."""

    def __init__(self, registers: int = 2, average: bool = False) -> None:
        super().__init__()
        self.average, self.before = average, 1 + registers
        self.stem, self.token = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.zeros(1, 1, 8))
        self.registers, self.place = nn.Parameter(torch.zeros(1, registers, 8)), nn.Parameter(torch.zeros(1, 16, 8))
        self.blocks, self.norm, self.fc = nn.ModuleList([Block(8), Block(8)]), nn.LayerNorm(8), linear(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.place
        x = torch.cat([self.token.expand(len(x), -1, -1), self.registers.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.fc(x[:, self.before :].mean(1) if self.average else x[:, 0])


def of_tokens(tokens: Tensor, before: int) -> Tensor:
    return tokens[:, before:].mT.unflatten(2, (4, 4))


@pytest.mark.parametrize("registers", [0, 2])
def test_the_map_of_a_class_token_is_the_input_of_the_last_block(registers: int) -> None:
    net = ready(ViT(registers))
    seen: list[Tensor] = []
    hook = net.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = net(SQUARES)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), seen[0])
    tokens, clf = seen[0].detach(), split(net)
    maps, others = clf.features(SQUARES)
    assert_close(maps, of_tokens(tokens, 1 + registers))
    assert_close(others, tokens[:, : 1 + registers])
    assert_close(clf(SQUARES), logits)
    weights = of_tokens(gradient, 1 + registers).mean((2, 3), keepdim=True)
    assert_close(grad_cam(clf, SQUARES, [1], norm="raw")[:, 0], (weights * of_tokens(tokens, 1 + registers)).sum(1))


def test_the_map_of_averaged_tokens_is_what_is_averaged() -> None:
    net = ready(ViT(average=True))
    seen: list[Tensor] = []
    net.norm.register_forward_hook(lambda _, inputs, result: seen.append(result))
    logits = net(SQUARES)
    clf = split(net)
    maps = clf.features(SQUARES)
    maps = maps[0] if isinstance(maps, tuple) else maps
    assert_close(maps, of_tokens(seen[0], 3))
    assert_close(clf(SQUARES), logits)
    expected = torch.einsum("kd,bdhw->bkhw", net.fc.weight, of_tokens(seen[0], 3)) / 16
    assert_close(grad_cam(net, SQUARES, norm="raw"), expected)


@pytest.mark.parametrize("average", [False, True])
def test_maps_of_a_transformer_are_not_zero(average: bool) -> None:
    net, tags = ready(ViT(average=average)), torch.tensor([[1.0, 0, 1, 0]])
    assert advcam(net, SQUARES, steps=2).flatten(1).any(1).all()
    maps = rib(net, SQUARES[:1], tags, companions=[(SQUARES[1:], 1 - tags)], steps=1, lr=1e-3)
    assert maps.shape == (1, CLASSES, 4, 4)
    assert maps.any()


class Windows(nn.Module):
    """Maps that are channels last throughout, merged in squares of four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.merge = nn.Conv2d(3, 4, 4, 4), nn.Linear(16, CHANNELS)
        self.norm, self.fc = nn.LayerNorm(CHANNELS), linear()

    def maps(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + x.roll((1, 1), (1, 2)).tanh()
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.norm(self.merge(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.maps(x).permute(0, 3, 1, 2), 1).flatten(1))


def test_maps_that_are_channels_last_are_turned() -> None:
    net = ready(Windows())
    images = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    expected = net.maps(images).permute(0, 3, 1, 2)
    for layer in (None, "norm"):
        clf = split(net, layer)
        assert_close(clf.features(images), expected)
        assert_close(clf(images), net(images))
    assert_close(cam(net, images), torch.einsum("kd,bdhw->bkhw", net.fc.weight, expected))


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.classify = trunk(), nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.classify(self.trunk(x)), x.shape[2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("chosen", [False, True])
def test_grad_cam_of_segmentation_is_of_the_sum_over_pixels(chosen: bool) -> None:
    net = ready(Segmenter())
    pixels = torch.rand(2, 24, 18, generator=torch.Generator().manual_seed(6)) > 0.7
    maps = net.trunk(IMAGES).detach().requires_grad_()
    logits = F.interpolate(net.classify(maps), (24, 18), mode="bilinear", align_corners=False)
    where = pixels if chosen else logits.argmax(1) == 2
    (gradient,) = torch.autograd.grad((logits[:, 2] * where).sum(), maps)
    expected = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).detach()
    assert_close(grad_cam(net, IMAGES, [2], pixels=pixels if chosen else None, norm="raw")[:, 0], expected)


# --- Grad-CAM's variants


def gradient_at(net: Any, maps: Tensor, c: int) -> Tensor:
    return torch.autograd.grad(net.head(net, maps)[:, c].sum(), maps)[0]


def plus_plus(gradient: Tensor, maps: Tensor) -> Tensor:
    """Eqs. (5) and (19), location by location."""
    weights = torch.zeros(maps.shape[:2], dtype=maps.dtype)
    for b, d, i, j in torch.cartesian_prod(*map(torch.arange, maps.shape)).tolist():
        g = gradient[b, d, i, j]
        if g > 0:
            weights[b, d] += g**2 / (2 * g**2 + maps[b, d].sum() * g**3) * g
    return torch.einsum("bd,bdij->bij", weights, maps)


@pytest.mark.parametrize("name", ["hidden layer", "generalised mean", "mean"])
@pytest.mark.parametrize("weighting", ["gradcam++", "layercam"])
def test_other_weightings_by_their_formulas(name: str, weighting: Any) -> None:
    net = headed(name)
    maps = net.trunk(IMAGES).detach().requires_grad_()
    gradient = gradient_at(net, maps, 3)
    with torch.no_grad():
        expected = plus_plus(gradient, maps) if weighting == "gradcam++" else (gradient.relu() * maps).sum(1)
        assert_close(grad_cam(net, IMAGES, [3], weighting=weighting, norm="raw")[:, 0], expected)
        assert_close(grad_cam(net, IMAGES, [3], weighting=weighting)[:, 0], expected.relu())


def test_several_layers_are_averaged_at_the_size_of_the_largest() -> None:
    layers = [trunk(), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(CHANNELS, 5, 1), nn.Flatten(2), Averaged()]
    net = ready(nn.Sequential(*layers))
    layers = [net[0], "2"]
    large, small = (normalize(grad_cam(net, IMAGES, [1], layer=layer), "minmax") for layer in layers)
    assert large.shape[2:] == (12, 9)
    assert small.shape[2:] == (6, 4)
    resized = F.interpolate(small, (12, 9), mode="bilinear", align_corners=False)
    assert_close(grad_cam(net, IMAGES, [1], layer=layers), (large + resized) / 2)


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.tanh().mean(2))


@pytest.mark.parametrize("method", [cam, grad_cam, lambda net, x, c: advcam(net, x, c, steps=1)])
def test_classes_as_tensors(method: Callable[..., Any]) -> None:
    net = headed("mean")
    every = method(net, IMAGES, None)
    assert_close(method(net, IMAGES, torch.tensor([2, 0])), every[:, [2, 0]])
    each = method(net, IMAGES, torch.tensor([[1, 3], [0, 2]]))
    for found, expected in zip(each, (every[0, [1, 3]], every[1, [0, 2]]), strict=True):
        assert_close(found, expected)


def test_a_single_logit_and_the_map_of_its_absence() -> None:
    net = headed("single logit")
    raw = grad_cam(net, IMAGES, norm="raw")
    maps = net.trunk(IMAGES)
    expected = torch.einsum("d,bdhw->bhw", net.fc.weight[0], maps)[:, None] / maps[0, 0].numel()
    assert_close(raw, expected)
    assert_close(normalize(-raw, "relu"), (-expected).relu())


# --- layers whose weight is computed in each call; hooks, aliases and views


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.4)


def weight_normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def spectral_normed(layer: nn.Module) -> None:
    parametrizations.spectral_norm(layer)


@pytest.mark.parametrize("change", [pruned, weight_normed, spectral_normed])
def test_a_layer_whose_weight_is_computed(change: Callable[[nn.Module], None]) -> None:
    net = headed("mean")
    change(net.fc)
    clf = split(net)
    with torch.no_grad():
        for parameter in net.fc.parameters():
            parameter.mul_(1.5)
    maps = net.trunk(IMAGES)
    units = torch.eye(CHANNELS, dtype=maps.dtype)
    weight = (net.fc(units) - net.fc(torch.zeros_like(units))).T
    expected = torch.einsum("kd,bdhw->bkhw", weight, maps)
    assert_close(cam(clf, IMAGES), expected)
    tags = torch.ones(2, CLASSES)
    assert_close(rib(clf, IMAGES, tags, companions=[], steps=0, norm="raw"), expected)


class Aliases(nn.Module):
    """A layer under two names, called twice; a view of a map that is overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.fc = trunk(), linear()
        self.mix = self.again = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.seen: list[Any] = []
        self.last: Any = None

    def maps(self, x: Tensor) -> Tensor:
        x = self.again(self.mix(self.trunk(x)))
        x[:, :2].relu_()
        x[:, :, 0] += 1
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x)
        self.seen.append(x.shape)
        self.last = x
        return self.fc(x.mean((2, 3)))


def test_aliases_and_views_that_are_overwritten() -> None:
    net = ready(Aliases())
    clf = split(net)
    assert_close(clf.features(IMAGES), net.maps(IMAGES))
    assert_close(clf(IMAGES), net(IMAGES))
    assert_close(cam(net, IMAGES), torch.einsum("kd,bdhw->bkhw", net.fc.weight, net.maps(IMAGES)))


def test_what_a_network_keeps_of_its_calls_is_as_before() -> None:
    net = ready(Aliases())
    last, seen = net.last, net.seen
    state = copy.deepcopy(net.state_dict())
    numbers = torch.get_rng_state()
    split(net)
    for method in (cam, grad_cam, advcam):
        method(net, IMAGES, [0])
    rib(net, IMAGES, torch.ones(2, CLASSES), companions=[], steps=0)
    assert net.last is last
    assert net.seen is seen
    assert not seen
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_hooks_run_and_change_what_is_split() -> None:
    net = headed("mean")
    net.trunk.register_forward_hook(lambda module, inputs, result: 2 * result)
    net.fc.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.5,))
    clf = split(net)
    assert_close(clf(IMAGES), net(IMAGES))
    assert_close(
        grad_cam(net, IMAGES, norm="raw"), torch.einsum("kd,bdhw->bkhw", net.fc.weight, net.trunk(IMAGES)) / 108
    )


def shuffled(x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


ENDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels shuffled": shuffled,
    "maxima of branches": lambda x: torch.stack([x, -x], 1).max(1).values,
    "sum of branches": lambda x: torch.stack([x, x.tanh()]).sum(0),
    "means of pairs of channels": lambda x: x.unflatten(1, (-1, 2)).mean(2),
    "maxima with their indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "pixels to channels and back": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x[:, :, :8, :8], 2), 2),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_the_map_of_a_trunk_whose_code_ends_in(ending: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.end, self.fc = trunk(), Ending(), linear(ending(torch.ones(2, CHANNELS, 8, 8)).shape[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(pooled(self.end(self.trunk(x))))

    class Ending(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ending(x)

    net = ready(Net())
    expected = ending(net.trunk(IMAGES))
    for layer in (None, "end"):
        assert_close(split(net, layer).features(IMAGES), expected)
    assert_close(cam(net, IMAGES), torch.einsum("kd,bdhw->bkhw", net.fc.weight, expected))


class Raised(nn.Module):
    """A map that is resized to another one: of images 7 and 11 pixels high to 8 and 12, as 2 images are to 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.fc = nn.Conv2d(3, 4, (2, 1), padding=(1, 0)), nn.Conv2d(4, 4, 1), linear(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(pooled(F.interpolate(self.other(F.avg_pool2d(x, (2, 1))), x.shape[2:]).relu()))


def test_a_size_that_grows_as_the_number_of_images_is_none() -> None:
    net = ready(Raised())
    images = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    for method in (split, unroll):
        network = method(net, example=images[:1, :, :7, :7])
        for count in (1, 2, 5):
            found = network(images[:count])
            assert_close(found if method is split else found[0], net(images[:count]))


class Overwriting(nn.Module):
    """Overwrites its images, and in one of its kinds also what a gradient needs."""

    def __init__(self, needed: bool = False) -> None:
        super().__init__()
        self.needed, self.trunk, self.fc = needed, trunk(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x[:, :, 1::2].mul_(-0.5)
        x = self.trunk(x)
        if self.needed:
            x = x.sigmoid()
            x *= 2
        return self.fc(x.amax((2, 3)))


def test_images_that_a_network_overwrites_are_left_as_they_are() -> None:
    net, images = ready(Overwriting()), IMAGES.clone()
    expected = net(IMAGES.clone())
    for method in (split(net), lambda x: unroll(net)(x)[0]):
        assert_close(method(images), expected)
        assert torch.equal(images, IMAGES)


@pytest.mark.parametrize("method", [advcam, rib])
def test_a_network_that_overwrites_what_its_gradient_needs(method: Callable[..., Any]) -> None:
    net = ready(Overwriting(needed=True))
    options = (
        {"tags": torch.ones(2, CLASSES), "companions": [(IMAGES, torch.ones(2, CLASSES))]} if method is rib else {}
    )
    with pytest.raises(ValueError, match=r"^clf: expected a network that autograd can follow.* set its inplace=False"):
        method(net, IMAGES, **options, steps=1)


@pytest.mark.parametrize("method", [cam, grad_cam, lambda net, x: unroll(net)(x)[1]])
def test_images_of_inference_mode_are_as_others(method: Callable[..., Tensor]) -> None:
    net = headed("mean")
    with torch.inference_mode():
        images = IMAGES.clone()
    found = method(net, images)
    assert found.requires_grad
    assert_close(found, method(net, IMAGES))


@pytest.mark.parametrize(
    "method", [cam, grad_cam, lambda net, x: rib(net, x, torch.ones(2, 4), companions=[], steps=0)]
)
def test_networks_of_inference_mode_are_as_others(method: Callable[..., Tensor]) -> None:
    expected = method(headed("mean"), IMAGES)
    torch.manual_seed(0)
    with torch.inference_mode():
        net = headed("mean")
    assert_close(method(net, IMAGES), expected)


@pytest.mark.parametrize("inside", [True, False])
def test_a_network_of_tokens_that_was_made_in_inference_mode(inside: bool) -> None:
    with torch.inference_mode():
        net = ready(ViT())
    with torch.inference_mode(inside), torch.no_grad():
        assert_close(split(net)(SQUARES), net(SQUARES))


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * np.random.uniform() if self.training else x  # noqa: NPY002


def test_random_numbers_of_numpy_are_as_before() -> None:
    net = ready(nn.Sequential(trunk(), Drawing(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear())).train()
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.uniform()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    unroll(net)(IMAGES)
    assert np.random.uniform() == expected  # noqa: NPY002


# --- RIB


def test_rib_leaves_no_trace_where_only_logits_tell_the_number_of_classes() -> None:
    net = headed("cosine")
    net.trunk.register_forward_hook(lambda trunk, inputs, result: setattr(trunk, "last", result))
    rib(net, IMAGES, torch.ones(2, CLASSES), companions=[], steps=0)
    assert not hasattr(net.trunk, "last")


def test_rib_of_maps_that_no_parameter_makes() -> None:
    net = ready(nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)))
    tags = torch.ones(2, CLASSES)
    with pytest.raises(ValueError, match=r"^clf: expected parameters to train that the maps depend on, got none"):
        rib(net, IMAGES, tags, companions=[(IMAGES, tags)], steps=1)


def test_rib_of_a_head_that_is_linear_in_effect_is_that_of_the_layer() -> None:
    """The layer fixed, as the weights of other heads are constants."""
    plain, hidden = Headed(HEADS["mean"][0], fc=nn.Linear(CHANNELS, CLASSES, bias=False)), headed("mean")
    plain = ready(plain)
    hidden = copy.deepcopy(plain)
    hidden.head = lambda net, x: -net.fc(-pooled(x))
    assert split(hidden).linear is None
    tags = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    companions = [(IMAGES.flip(0), tags.flip(0))] * 3
    one, other = (
        rib(net, IMAGES, tags, companions=companions, steps=3, lr=1e-3, norm="raw", frozen=[net.fc])
        for net in (plain, hidden)
    )
    assert_close(other, one)
    assert not torch.allclose(one, 4 * cam(plain, IMAGES))
