"""The rules of zennit and captum, run by themselves, where they are right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision.models import VGG, get_model

from segattr.lrp import composites, unroll
from segattr.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, WSquare, ZPlus
from tests.segattr.lrp_nets import error

zennit = pytest.importorskip("zennit")
NETWORKS = {
    **dict.fromkeys(("vgg11", "vgg13", "vgg11_bn", "vgg16_bn"), ("VGGCanonizer", 32)),
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnext50_32x4d"), ("ResNetCanonizer", 48)),
}
COMPOSITES = {
    "epsilon_plus": "EpsilonPlus",
    "epsilon_plus_flat": "EpsilonPlusFlat",
    "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1",
    "epsilon_alpha2_beta1_flat": "EpsilonAlpha2Beta1Flat",
    "epsilon_gamma_box": "EpsilonGammaBox",
}
CLASSES = [0, 2]


def classifier(name: str) -> nn.Module:
    """With shaken normalisation, whose eps is 0: zennit merges it and leaves its eps, which changes the scores."""
    torch.manual_seed(0)
    model = get_model(name, num_classes=3)
    if isinstance(model, VGG):  # whose layers of 4096 take most of the time
        model.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def by_zennit(model: nn.Module, composite: Any, x: Tensor) -> Tensor:
    from zennit.attribution import Gradient

    heat = []
    with Gradient(model, composite) as attributor:
        for c in CLASSES:
            _, relevance = attributor(x, lambda scores, c=c: scores * torch.eye(3, dtype=x.dtype)[c])
            heat.append(relevance.sum(1))
    return torch.stack(heat, 1)


def both(name: str, composite: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from zennit import composites as theirs
    from zennit import torchvision as canonizers

    model = classifier(name).to(dtype)
    kind, size = NETWORKS[name]
    x = torch.randn(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.clamp(-2, 2).to(dtype)
    bounds = {"low": -2.0, "high": 2.0} if composite == "epsilon_gamma_box" else {}
    own = getattr(composites, composite)(**bounds)
    with torch.no_grad():
        found = unroll(model, rule=own)(x, CLASSES)[1]
    canonizer = getattr(canonizers, kind)()
    return found, by_zennit(model, getattr(theirs, COMPOSITES[composite])(**bounds, canonizers=[canonizer]), x)


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon_gamma_box"])
def test_composites_are_those_of_zennit(composite: str) -> None:
    assert error(*both("resnet18", composite, torch.float64)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", NETWORKS)
def test_composites_are_those_of_zennit_on_more_networks(name: str, composite: str) -> None:
    assert error(*both(name, composite, torch.float64)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet50"])
def test_single_precision_is_no_worse_than_that_of_zennit(name: str, composite: str) -> None:
    exact = both(name, composite, torch.float64)[1]
    own, theirs = (heat.double() for heat in both(name, composite, torch.float32))
    assert error(own, exact) <= 2 * error(theirs, exact) + 1e-7


def small() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU()]
    model = nn.Sequential(*body, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)).double().eval()
    return model, torch.randn(2, 3, 12, 12, dtype=torch.float64)


@pytest.mark.parametrize(
    ("own", "make"),
    [
        (Epsilon(0.25), lambda rules: rules.Epsilon(0.25)),
        (Gamma(0.5), lambda rules: rules.Gamma(0.5)),
        (ZPlus(1e-3), lambda rules: rules.ZPlus(1e-3)),
        (AlphaBeta(3.0, 2.0), lambda rules: rules.AlphaBeta(3.0, 2.0)),
        (Flat(), lambda rules: rules.Flat()),
        (WSquare(), lambda rules: rules.WSquare()),
    ],
)
def test_a_rule_everywhere_is_that_of_zennit(own: Any, make: Callable[[Any], Any]) -> None:
    from zennit import composites as theirs
    from zennit import rules, types

    model, x = small()
    layer_map = [*theirs.layer_map_base(), (types.Linear, make(rules))]
    found = unroll(model, rule=composites.everywhere(own))(x, CLASSES)[1]
    assert error(found, by_zennit(model, theirs.LayerMapComposite(layer_map), x)) < 1e-8


class Flattening(nn.Module):
    """The same with a function in place of the module nn.Flatten, which captum refuses."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        layers[2] = nn.AvgPool2d(2)  # captum divides by the result of a maximum as well
        self.body, self.head = layers[:-2], layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def test_epsilon_is_that_of_captum_where_that_conserves() -> None:
    attr = pytest.importorskip("captum.attr")
    layers, x = small()
    model = Flattening(layers)
    composite = [(composites.single, Pass()), (composites.anything, Epsilon(1e-9))]
    found = unroll(model, rule=composite)(x, CLASSES)[1]
    method = attr.LRP(model)
    for place, c in enumerate(CLASSES):
        relevance = method.attribute(x.clone().requires_grad_(), target=c)
        assert error(found[:, place], relevance.sum(1).detach()) < 1e-7
