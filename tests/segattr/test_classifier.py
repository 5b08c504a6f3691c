"""Splitting classifiers: both parts together are the classifier, whatever code it has, and nothing of it changes."""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torch.func import functional_call
from torchvision import models

from segattr.networks.classifier import Classifier, as_classifier, split, undisturbed
from tests.segattr.lrp_nets import resnet_basic, vgg_bn


def body(channels: int = 6) -> nn.Sequential:
    layers = [nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, channels, 1), nn.ReLU()]
    return nn.Sequential(*layers)


class Fc8(nn.Module):
    """A last convolution 1x1 whose maps are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.drop, self.fc8 = body(), nn.Dropout2d(), nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.fc8(self.drop(self.trunk(x))), 1).view(x.size(0), -1)


class PooledByWindow(Fc8):
    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.trunk(x))
        x = F.avg_pool2d(x, kernel_size=(x.size(2), x.size(3)), padding=0)
        return self.fc8(x).view(x.size(0), -1)


class PooledByView(Fc8):
    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.trunk(x))
        x = x.view(x.size(0), x.size(1), -1).mean(-1)
        return self.fc8(x.view(x.size(0), x.size(1), 1, 1)).view(-1, 4)


class Mean(nn.Module):
    """Functional dropout, sizes of the image used behind the feature map, results stored in the module."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.out = body(), nn.Linear(6, 4)

    def forward(self, image: Tensor, labels: Tensor | None = None) -> Tensor:
        batch, _, _, _ = image.shape
        self.maps = self.trunk(image)
        pooled = self.maps.mean(dim=(-2, -1)).reshape(batch, 6)
        logits = self.out(F.dropout(pooled, 0.4, training=self.training))
        return logits if labels is None else F.cross_entropy(logits, labels)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Backbone(nn.Module):
    """Code that depends on values of the image, inside."""

    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = body()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 3 or bool(x.isnan().any()):
                raise ValueError("broken image")
            return self.layers(x)

    def __init__(self) -> None:
        super().__init__()
        self.embedder, self.pooler = self.Guarded(), nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, pixels: Tensor, return_dict: bool = True) -> tuple[Tensor, Tensor]:
        hidden = self.embedder(pixels)
        return hidden, self.pooler(hidden)


class Transformers(nn.Module):
    """An object with logits, keyword arguments, an outer and an inner model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.classifier = Backbone(), nn.Sequential(nn.Flatten(), nn.Linear(6, 4))

    def forward(self, pixels: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Output:
        outputs = self.inner(pixels, return_dict=kwargs.get("return_dict", True))
        return Output(loss=None, logits=self.classifier(outputs[1]))


class FunctionalHead(nn.Module):
    """Overwrites the feature map; weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.last = body(), nn.Conv2d(6, 6, 3)
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.trunk(x))
        x += 0.1
        F.relu(x, inplace=True)
        return F.linear(x.mean((2, 3)) * self.scale, self.weight)


def named(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"part{i}", layer) for i, layer in enumerate(layers)))


# The network, the shape of its features of an image 17 x 13, the name of the layer that makes maps
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str | None]] = {
    "sequential": (
        lambda: nn.Sequential(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 4)),
        (6, 9, 7),
        "8",
    ),
    "nested": (
        lambda: named(named(body(), nn.AdaptiveAvgPool2d(1)), nn.Flatten(), nn.Linear(6, 4)),
        (6, 9, 7),
        "part2",
    ),
    "resnet": (resnet_basic, (8, 2, 1), "fc"),
    "vgg": (vgg_bn, (6, 4, 3), None),
    "flattened": (lambda: nn.Sequential(body(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)), (6, 4, 3), None),
    "two layers": (
        lambda: nn.Sequential(
            body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)
        ),
        (6, 9, 7),
        None,
    ),
    "maximum": (lambda: nn.Sequential(body(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 4)), (6, 9, 7), None),
    "fc8": (Fc8, (6, 9, 7), "fc8"),
    "pooled by window": (PooledByWindow, (6, 9, 7), "fc8"),
    "pooled by view": (PooledByView, (6, 9, 7), "fc8"),
    "mean": (Mean, (6, 9, 7), "out"),
    "transformers": (Transformers, (6, 9, 7), "classifier.1"),
    "functional": (FunctionalHead, (6, 7, 5), None),
    "channels last": (lambda: ChannelsLast(), (6, 9, 7), "out"),
    "one location": (lambda: OneLocation(), (6, 9, 7), None),
    "all convolutions": (body, (5, 9, 7), None),
}
TORCHVISION = {
    "resnet18": "fc",
    "mobilenet_v2": "classifier.1",
    "googlenet": "fc",
    "shufflenet_v2_x0_5": "fc",
    "mobilenet_v3_small": None,
    "squeezenet1_1": None,
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "regnet_y_400mf": "fc",
    "resnext50_32x4d": "fc",
    "inception_v3": "fc",
    "convnext_tiny": None,
    "swin_t": "head",
    "vgg11_bn": None,
}


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def assert_same(model: nn.Module, clf: Classifier, x: Tensor) -> None:
    """Logits, and in training mode the running statistics and the random numbers drawn."""
    for training in (True, False, True):
        model.train(training)
        start = copy.deepcopy(model.state_dict())
        torch.manual_seed(1)
        expected, drawn = logits(model(x)), torch.rand(())
        state = copy.deepcopy(model.state_dict())
        for name, value in model.state_dict().items():
            value.copy_(start[name])
        torch.manual_seed(1)
        assert torch.equal(clf(x), expected)
        assert torch.equal(torch.rand(()), drawn)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_both_parts_are_the_model_in_both_modes(name: str) -> None:
    make, shape, linear = NETS[name]
    model, x = make(), torch.randn(2, 3, 17, 13)
    clf = split(model)
    assert_same(model, clf, x)
    assert clf.features(x).shape == (2, *shape)
    assert clf.linear is (None if linear is None else model.get_submodule(linear))
    if name not in ("functional", "one location", "all convolutions"):
        assert clf.num_classes == 4


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i > 3 else ()) for i, name in enumerate(TORCHVISION)]
)
def test_networks_of_torchvision(name: str) -> None:
    settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(models, name)(weights=None, num_classes=7, **settings)
    clf = split(model)
    side = 299 if name == "inception_v3" else 64
    with torch.no_grad():
        assert_same(model, clf, torch.randn(2, 3, side, side))
        assert min(clf.eval().features(torch.zeros(1, 3, 2 * side, 2 * side)).shape[2:]) > 1
    linear = TORCHVISION[name]
    assert clf.linear is (None if linear is None else model.get_submodule(linear))
    assert name == "squeezenet1_1" or clf.num_classes == 7


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("layer", ["layer1", "layer2.0", "layer3.0.relu", "maxpool", "conv1"])
def test_a_layer(layer: str, as_module: bool) -> None:
    model = resnet_basic()
    wanted: Any = model.get_submodule(layer) if as_module else layer
    x = torch.randn(2, 3, 33, 29)
    if layer == "layer3.0.relu":  # used twice
        with pytest.raises(ValueError, match=r"layer: expected a module that is called once, got layer3\.0\.relu"):
            split(model, wanted)
        return
    clf = split(model, wanted)
    outputs: list[Tensor] = []
    model.eval()
    handle = model.get_submodule(layer).register_forward_hook(lambda *args: outputs.append(args[-1].clone()))
    expected = model(x)
    handle.remove()
    features = clf.features(x)
    before = features.clone()
    assert torch.equal(features, outputs[0])
    assert torch.equal(clf.head(features), expected)
    assert torch.equal(features, before)  # though an activation in place may follow


def test_a_layer_with_a_linear_head() -> None:
    model = resnet_basic()
    assert split(model, "layer4").linear is model.get_submodule("fc")
    assert split(model, "layer3").linear is None


def test_parameters_are_those_of_the_model() -> None:
    model = resnet_basic()
    clf = split(model)
    assert [(f"model.{name}", p) for name, p in model.named_parameters()] == list(clf.named_parameters())
    x = torch.randn(2, 3, 33, 33)
    model.fc = nn.Linear(8, 9)
    assert clf.num_classes == 9
    assert clf.linear is model.fc
    assert torch.equal(clf(x), model(x))
    assert clf.double()(x.double()).dtype == next(model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("name", ["resnet", "functional", "mean"])
def test_copies_are_independent(name: str) -> None:
    model, x = NETS[name][0](), torch.randn(2, 3, 17, 13)
    clf = split(model.eval())
    expected = clf(x)
    file = io.BytesIO()
    torch.save(clf, file)
    file.seek(0)
    for other in (copy.deepcopy(clf), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other(x).any()
        assert torch.equal(clf(x), expected)


@pytest.mark.parametrize("name", ["resnet", "functional", "transformers"])
def test_parameters_can_be_replaced_for_a_call(name: str) -> None:
    model, x = NETS[name][0](), torch.randn(2, 3, 17, 13)
    clf = split(model)
    model.eval()  # the parts for this mode are made within the call
    zeros = {name: torch.zeros_like(p) for name, p in clf.named_parameters()}
    assert not functional_call(clf, zeros, (x,)).any()
    assert clf(x).any()
    assert torch.equal(clf(x), logits(model(x)))


class Grid(nn.Module):
    """A function of torch that a helper of it reports, and a cache filled in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.out = body(), nn.Linear(6, 4)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        maps = self.trunk(x)
        grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in maps.shape[2:]), indexing="ij")).sum(0)
        self.cache["grid"] = grid
        return self.out((maps + grid).mean((2, 3)))


def test_a_function_that_a_helper_reports_is_one_operation_and_caches_stay_empty() -> None:
    model, x = Grid().eval(), torch.randn(2, 3, 17, 13)
    clf = split(model)
    assert not model.cache
    assert torch.equal(undisturbed(clf, lambda: clf(x)), model(x))
    model.cache.clear()
    undisturbed(clf, lambda: clf(x))
    assert not model.cache


def test_splitting_leaves_no_trace() -> None:
    model = Mean().eval()
    model.out.requires_grad_(False)
    model.trunk.train()
    model(torch.zeros(1, 3, 9, 9))
    before = dict(model.__dict__), model.maps, [m.training for m in model.modules()], list(model.modules())
    split(model)(torch.zeros(2, 3, 9, 9))
    assert dict(model.__dict__) == before[0]
    assert model.maps is before[1]
    assert [m.training for m in model.modules()] == before[2]
    assert list(model.modules()) == before[3]
    assert not model.out.weight.requires_grad


def test_calls_of_modules_are_those_of_torch_after_a_network_that_cannot_be_followed() -> None:
    call = nn.Module.__call__
    with pytest.raises(TypeError, match="its code cannot be followed"):
        split(Branches())
    assert nn.Module.__call__ is call


def test_hooks_of_layers_run() -> None:
    model = resnet_basic().eval()
    clf = split(model)
    calls: list[str] = []
    for name in ("conv1", "layer4", "fc"):
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: calls.append(name))
    clf(torch.zeros(1, 3, 33, 33))
    assert calls == ["conv1", "layer4", "fc"]


def test_a_pair_of_parts() -> None:
    features, last = body().eval(), nn.Linear(6, 4)
    x = torch.randn(2, 3, 9, 9)
    clf = Classifier(features, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(nn.Dropout(0), last)))
    assert clf.linear is last
    assert clf.num_classes == 4
    assert torch.equal(clf(x), last(features(x).mean((2, 3))))
    assert len(list(clf.parameters())) == len([*features.parameters(), *last.parameters()])

    functions = Classifier(lambda x: features(x), lambda f: last(f.mean((2, 3))))
    assert functions.linear is None
    assert torch.equal(functions(x), clf(x))
    with pytest.raises(ValueError, match="num_classes: expected a head that ends in a linear layer or convolution"):
        _ = functions.num_classes


def test_undisturbed_keeps_batch_statistics() -> None:
    model = resnet_basic().train()
    clf = split(model)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 65, 65)
    result = undisturbed(clf, lambda: clf(x), constant=True)
    assert not result.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(result, model(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        undisturbed(clf, lambda: clf.head(torch.zeros(1, 7, 1, 1)), constant=True)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


def distributed(model: nn.Module) -> nn.Module:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [nn.DataParallel, distributed, lambda model: torch.compile(model, backend="eager")])
def test_the_network_in_a_wrapper_is_split(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, x = resnet_basic().eval(), torch.randn(2, 3, 33, 33)
    wrapped = wrap(model)
    assert split(wrapped).model is model
    assert torch.equal(split(wrapped, "layer3")(x), model(x))
    clf = split(model)
    assert as_classifier(wrap(clf), x) is clf


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.out = body(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return self.out(self.trunk(x).mean((2, 3)))


class Small(nn.Module):
    """Its last map has one pixel, and the one before is the image."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.stack([x.amax((2, 3)), x.amin((2, 3))]).sum(0))


class ChannelsLast(nn.Module):
    """Its maps are ``[B, h, w, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.out = body(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.trunk(x).permute(0, 2, 3, 1).mean((1, 2)))


class TwoOutputs(Branches):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        maps = self.trunk(x)
        return self.out(maps.mean((2, 3))), maps


class Constant(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.out.weight @ self.out.weight.T


class OneLocation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.out = body(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.trunk(x) + self.trunk(x))[:, :, 0, 0])


@pytest.mark.parametrize(
    ("model", "layer", "error", "message"),
    [
        ("resnet18", None, TypeError, "model: expected a torch.nn.Module, got str"),
        (Branches(), None, TypeError, "model: its code cannot be followed"),
        (TwoOutputs(), None, TypeError, "model: expected logits as its output, or an object with logits, got a tuple"),
        (Constant(), None, TypeError, "model: expected logits as its output, .*, got a constant"),
        (Small(), None, TypeError, "model: expected logits made from a feature map .*name the layer"),
        (resnet_basic(), 4, TypeError, "layer: expected the name of a submodule or a module, got int"),
        (resnet_basic(), "layer9", ValueError, "layer: expected a submodule such as conv1, bn1, .*got layer9"),
        (resnet_basic(), "", ValueError, "layer: expected a submodule such as conv1"),
        (resnet_basic(), nn.Linear(2, 2), ValueError, "layer: .*got a Linear that is not in the model"),
        (
            resnet_basic(),
            "layer4.0.conv1",
            ValueError,
            "layer: expected one that the logits depend on alone, got layer4",
        ),
    ],
)
def test_what_cannot_be_split(model: Any, layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split(model, layer)


def test_a_class_of_no_module_is_split() -> None:
    names: dict[str, Any] = {"Mean": Mean}
    exec("class Own(Mean):\n    def forward(self, x):\n        return Mean.forward(self, x)", names)
    model, x = names["Own"]().eval(), torch.randn(2, 3, 17, 13)
    assert model.forward.__module__ is None
    assert torch.equal(split(model)(x), model(x))


def test_a_layer_that_gives_no_map() -> None:
    with pytest.raises(ValueError, match=r"layer: expected one that gives a feature map \[B, D, h, w\], got \[2, 8\]"):
        split(resnet_basic().eval(), "flatten").features(torch.zeros(2, 3, 33, 33))


def test_parts_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="features: expected a module or function, got int"):
        Classifier(3, nn.Identity())
    with pytest.raises(TypeError, match="head: expected a module or function, got NoneType"):
        Classifier(nn.Identity(), None)
