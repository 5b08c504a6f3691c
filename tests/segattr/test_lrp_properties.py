"""What holds for unrolled LRP of any classifier of convolutions, ReLU and pooling: random ones and known ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision.models import get_model

from segattr.lrp import unroll
from tests.segattr.lrp_nets import (
    classifiers,
    conservation_error,
    convolutions,
    error,
    gradients,
    input_times_gradient,
    pools,
    randomise,
)

Drawn = tuple[nn.Module, Tensor]


def check(model: nn.Module, x: Tensor) -> None:
    """Scores are those of the model, heatmaps are input times gradient, relevance is conserved."""
    unrolled = unroll(model)
    with torch.no_grad():
        found, heat = unrolled(x)
        ledger = unrolled.ledger(x)
    scores, expected = input_times_gradient(model, x)
    assert error(found, scores) < 1e-9
    assert error(heat, expected) < 1e-9
    assert conservation_error(found, heat, ledger) < 1e-9


# --- random architectures


@settings(max_examples=25)
@given(classifiers())
def test_relevance_is_conserved_and_heatmaps_are_input_times_gradient(drawn: Drawn) -> None:
    check(*drawn)


@pytest.mark.slow
@settings(max_examples=60)
@given(classifiers())
def test_relevance_is_conserved_in_many_classifiers(drawn: Drawn) -> None:
    check(*drawn)


@settings(max_examples=40)
@given(st.data())
def test_every_pooling_has_its_adjoint(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    x = torch.randn(2, 2, *data.draw(st.tuples(st.integers(3, 9), st.integers(3, 9))), dtype=torch.float64)
    pool = data.draw(pools(list(x.shape[2:])))()
    check(nn.Sequential(pool, nn.Flatten(), nn.Linear(pool(x)[0].numel(), 2)).double(), x)


@settings(max_examples=20)
@given(st.data())
def test_every_convolution_has_its_adjoint(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    x = torch.randn(2, 4, *data.draw(st.tuples(st.integers(3, 9), st.integers(3, 9))), dtype=torch.float64)
    conv = data.draw(convolutions(4, list(x.shape[2:]), same=data.draw(st.booleans())))().double()
    layers = [conv, nn.BatchNorm2d(conv.weight.shape[0])] if data.draw(st.booleans()) else [conv]
    count = conv(x)[0].numel()
    check(randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(count, 2))), x)


@settings(max_examples=15)
@given(classifiers(), st.integers(0, 100))
def test_gradients_of_parameters_equal_those_by_double_backpropagation(drawn: Drawn, seed: int) -> None:
    model, x = drawn
    scores, heat = unroll(model)(x)
    reference_scores, reference = input_times_gradient(model, x, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(heat.shape, generator=generator, dtype=x.dtype) / reference.detach().abs().max().clamp(
        min=1e-30
    )
    for found, expected in (
        ((heat * weights).sum(), (reference * weights).sum()),
        (
            (heat * weights).sin().sum() + scores.square().sum(),
            (reference * weights).sin().sum() + reference_scores.square().sum(),
        ),
    ):
        own, other = gradients(found, model), gradients(expected, model)
        scale = max(float(g.abs().max()) for g in other.values())
        for name, gradient in other.items():
            torch.testing.assert_close(own[name], gradient, rtol=0, atol=1e-9 * scale, msg=lambda m: f"{name}: {m}")  # noqa: B023


@settings(max_examples=8)
@given(classifiers())
def test_a_loss_of_the_heatmaps_gives_no_gradient_to_shifts(drawn: Drawn) -> None:
    model, x = drawn
    unroll(model)(x)[1].square().sum().backward()
    biases = {name: p.grad for name, p in model.named_parameters() if name.endswith("bias")}
    assert biases
    for name, gradient in biases.items():
        assert gradient is None or not gradient.any(), name


@settings(max_examples=10)
@given(classifiers())
def test_a_scale_has_the_gradient_of_the_convolution_before_it(drawn: Drawn) -> None:
    """Times the parameter, per channel: both scale the same weights."""
    model, x = drawn
    found = gradients(unroll(model)(x)[1].square().sum(), model)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            conv = name.removesuffix("1") + "0"  # it comes next in its path
            weight = model.get_parameter(f"{conv}.weight")
            by_weight = (weight * found[f"{conv}.weight"]).sum((1, 2, 3))
            by_scale = module.weight * found[f"{name}.weight"]
            torch.testing.assert_close(by_scale, by_weight, rtol=0, atol=1e-9 * float(by_weight.abs().max()))


@settings(max_examples=8)
@given(classifiers(shifts=False), st.floats(0.01, 100))
def test_without_shifts_heatmaps_grow_with_the_image_and_hold_the_whole_score(drawn: Drawn, factor: float) -> None:
    model, x = drawn
    with torch.no_grad():
        scores, heat = unroll(model)(x)
        scaled_scores, scaled = unroll(model)(factor * x)
    assert error(scaled, factor * heat) < 1e-9
    assert error(scaled_scores, factor * scores) < 1e-9
    assert conservation_error(scores, heat, {}) < 1e-9


@settings(max_examples=8)
@given(classifiers(), st.data())
def test_chosen_classes_are_slices_of_all(drawn: Drawn, data: st.DataObject) -> None:
    model, x = drawn
    unrolled = unroll(model, chunk=data.draw(st.sampled_from([None, 1, 2])))
    with torch.no_grad():
        scores, heat = unroll(model)(x)
        classes = st.lists(st.integers(0, scores.shape[1] - 1), max_size=5)
        same = data.draw(classes)
        own = data.draw(st.lists(classes, min_size=2, max_size=2))
        some_scores, some = unrolled(x, same)
        _, maps = unrolled(x, own)
    tolerance = 1e-12 * max(float(heat.abs().max()), 1e-30)
    torch.testing.assert_close(some_scores, scores, rtol=1e-12, atol=0)
    torch.testing.assert_close(some, heat[:, same], rtol=0, atol=tolerance)
    assert len(maps) == 2
    for found, whole, numbers in zip(maps, heat, own, strict=True):
        torch.testing.assert_close(found, whole[numbers], rtol=0, atol=tolerance)


@settings(max_examples=8)
@given(classifiers(), st.sampled_from([1, 2]))
def test_chunks_of_classes_change_nothing(drawn: Drawn, chunk: int) -> None:
    model, x = drawn
    results = []
    for size in (None, chunk):
        scores, heat = unroll(model, chunk=size)(x)
        results.append((heat, gradients(heat.square().sum() + scores.sum(), model)))
    (heat, whole), (by_chunks, parts) = results
    heat, by_chunks = heat.detach(), by_chunks.detach()
    torch.testing.assert_close(by_chunks, heat, rtol=1e-12, atol=1e-12 * float(heat.abs().max()))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-10 * float(gradient.abs().max()))


# --- known architectures


def stock(name: str, **options: Any) -> nn.Module:
    """A classifier of torchvision with three classes; a large head of linear layers is replaced by a small one."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # whose widths are computed with tensors
        model = get_model(name, weights=None, num_classes=3, **options)
        if name.startswith("vgg"):
            model.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3))
        elif name == "alexnet":
            model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 36, 8), nn.ReLU(True), nn.Linear(8, 3))
    return randomise(model.to_empty(device="cpu"))


def check_stock(name: str, size: tuple[int, int], **options: Any) -> None:
    """Conservation for all classes; input times gradient for one."""
    model = stock(name, **options)
    x = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=True)
    unrolled = unroll(model)
    with torch.no_grad():
        scores, heat = unrolled(x)
        ledger = unrolled.ledger(x)
    assert conservation_error(scores, heat, ledger) < 1e-9
    assert ((heat.sum((2, 3)) + sum(ledger.values()) - scores).abs().max() / scores.abs().max()) < 1e-9
    score = model(x)[0, 1]
    assert error(scores[0, 1], score) < 1e-9
    (gradient,) = torch.autograd.grad(score, x)
    assert error(heat[0, 1], (x * gradient).sum(1)[0]) < 1e-9


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", (45, 53)),
        ("squeezenet1_0", (47, 37)),
        ("alexnet", (67, 75)),
        ("regnet_x_400mf", (37, 45)),
        ("mnasnet0_5", (37, 51)),
        pytest.param("vgg11_bn", (35, 41), marks=pytest.mark.slow),
    ],
)
def test_relevance_is_conserved_in(name: str, size: tuple[int, int]) -> None:
    check_stock(name, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet"]
)
def test_relevance_is_conserved_in_larger(name: str) -> None:
    options = {"googlenet": {"aux_logits": False, "init_weights": False}}
    check_stock(name, (45, 37), **options.get(name, {}))


@pytest.mark.slow
def test_relevance_is_conserved_in_dilated_resnets() -> None:
    check_stock("resnet50", (33, 39), replace_stride_with_dilation=[False, True, True])


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["", "_bn"])
@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_relevance_is_conserved_in_vgg(depth: int, norm: str) -> None:
    check_stock(f"vgg{depth}{norm}", (35, 49))


# --- code of models


class OwnBlock(nn.Module):
    def __init__(self, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.normalise_first = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, outputs, 3, stride, 1)
        self.normalise_second = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.project = nn.Conv2d(width, outputs, 1, stride)
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activate(self.normalise_first(x))
        z = self.second(self.activate(self.normalise_second(self.first(y))))
        z += self.project(y)
        return z


class OwnResNet(nn.Module):
    """Pre-activation; none of the names of torchvision; the same activation everywhere; ends as ``head`` says."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 5, 2, 2)
        self.shrink = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList([OwnBlock(6, 6, 1), OwnBlock(6, 8, 2)])
        self.head, self.predict = head, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(self.embed(x))
        for stage in self.stages:
            x = stage(x)
        return self.predict(self.head(F.relu(x)))


@pytest.mark.parametrize(
    "head",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, (2, 3)),
        lambda x: x.mean(dim=[2, 3], keepdim=True).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1),
        lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
        lambda x: torch.flatten(F.adaptive_max_pool2d(x, 1), start_dim=1),
        lambda x: F.avg_pool2d(x, x.shape[2:]).reshape(x.shape[0], -1),
        lambda x: F.max_pool2d(x, x.size()[2:]).squeeze(3).squeeze(2),
        lambda x: torch.squeeze(torch.squeeze(F.adaptive_avg_pool2d(x, 1), dim=3), dim=2),
    ],
    ids=["x.mean", "torch.mean", "keepdim", "view", "torch.flatten", "max", "avg_pool2d", "max_pool2d", "squeeze"],
)
def test_a_network_of_own_code(head: Callable[[Tensor], Tensor]) -> None:
    check(randomise(OwnResNet(head)), torch.randn(2, 3, 33, 27).double())


class Model(nn.Module):
    """Two convolutions and a linear layer; what happens between them is the test's."""

    def __init__(self, code: Callable[["Model", Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.code = code
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=bias)
        self.other = nn.Conv2d(3, 3, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(3)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.identity, self.dropout, self.maxima = nn.Identity(), nn.Dropout(), nn.MaxPool2d(2, return_indices=True)
        self.fc = nn.Linear(3, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.code(self, x).mean((2, 3)))


def in_place_sum(m: Model, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.other(x)
    z += y
    return m.relu(z) + z


def other_name(m: Model, x: Tensor) -> Tensor:
    y = m.conv(x)
    kept = y
    y += m.other(x)
    return m.relu(y) + kept


def kept_input(m: Model, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = y.relu_()
    return m.other(z) + y


CODE: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "the input of an in-place ReLU is used afterwards": kept_input,
    "the input of an in-place ReLU module is used afterwards": lambda m, x: (lambda y: m.other(m.relu_(y)) + y)(
        m.conv(x)
    ),
    "the result of an in-place sum is used twice": in_place_sum,
    "another name of what an in-place sum overwrites is used": other_name,
    "one ReLU twice": lambda m, x: m.relu(m.other(m.relu(m.conv(x)))),
    "one convolution twice": lambda m, x: m.conv(m.relu(m.conv(x))),
    "one convolution and normalisation twice": lambda m, x: m.norm(m.conv(m.relu(m.norm(m.conv(x))))),
    "one convolution beside itself": lambda m, x: m.relu(m.conv(x)) + m.conv(m.relu(m.other(x))),
    "a sum with itself": lambda m, x: (lambda y: y + y)(m.relu(m.conv(x))),
    "normalisation of a convolution that is used twice": lambda m, x: (lambda y: m.relu(m.norm(y)) + y)(m.conv(x)),
    "normalisation of the image": lambda m, x: m.relu(m.conv(m.norm(x))),
    "a convolution by function with a bias, then normalisation": lambda m, x: m.relu(
        m.norm(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1))
    ),
    "maxima with their indices": lambda m, x: F.max_pool2d(m.conv(x), 3, 2, 1, return_indices=True)[0],
    "maxima with their indices, by a module": lambda m, x: m.maxima(m.conv(x))[0],
    "adaptive maxima with their indices": lambda m, x: F.adaptive_max_pool2d(m.conv(x), 3, return_indices=True)[0],
    "maxima put back where they were": lambda m, x: (
        lambda y: F.max_unpool2d(m.relu(y[0]), y[1], 2, output_size=x.shape[2:])
    )(F.max_pool2d(m.conv(x), 2, return_indices=True)),
    "an unused result": lambda m, x: (m.other(x), m.relu(m.conv(x)))[1],
}


@pytest.mark.parametrize("code", CODE.values(), ids=CODE.keys())
def test_the_code_of_a_model_means_what_it_does_in_it(code: Callable[[Model, Tensor], Tensor]) -> None:
    check(randomise(Model(code)), torch.randn(2, 3, 8, 7).double())


def test_a_bias_of_a_convolution_used_twice_absorbs_both_parts() -> None:
    model = randomise(Model(CODE["one convolution twice"]))
    x = torch.randn(2, 3, 8, 7).double()
    scores = model(x)
    ledger = unroll(model).ledger(x)
    for c in range(2):
        for image in range(2):
            (gradient,) = torch.autograd.grad(scores[image, c], model.conv.bias, retain_graph=True)
            found = sum(value[image, c] for name, value in ledger.items() if name.startswith("conv"))
            torch.testing.assert_close(found, (gradient * model.conv.bias).sum().detach())


def test_a_zero_image_has_no_heat_and_the_ledger_gives_the_score() -> None:
    model = randomise(OwnResNet(lambda x: x.mean((2, 3))))
    unrolled = unroll(model)
    x = torch.zeros(2, 3, 33, 27).double()
    scores, heat = unrolled(x)
    assert not heat.any()
    assert scores.abs().min() > 1e-3
    torch.testing.assert_close(sum(unrolled.ledger(x).values()), scores)


OVERWRITTEN = {
    "in place on the identity of a tensor": lambda m, x: (lambda y: m.relu_(m.identity(y)) + y)(m.conv(x)),
    "in place on the dropout of a tensor": lambda m, x: (lambda y: m.relu_(m.dropout(y)) + y)(m.conv(x)),
    "in place on a view of a tensor": lambda m, x: (lambda y: m.relu_(y.view(y.shape)) + y)(m.conv(x)),
}


@pytest.mark.parametrize("code", OVERWRITTEN.values(), ids=OVERWRITTEN.keys())
def test_what_overwrites_a_view_overwrites_what_it_is_a_view_of(code: Callable[[Model, Tensor], Tensor]) -> None:
    check(randomise(Model(code)), torch.randn(2, 3, 8, 7).double())


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True)])
def test_normalisation_of_channels_that_lie_last_in_memory(norm: nn.Module) -> None:
    model = nn.Sequential(norm, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(3, 3, 12, 13).double()
    own, other = (
        gradients(scores.sum() + heat.square().sum(), model)
        for scores, heat in (unroll(model)(x), unroll(model)(x.contiguous(memory_format=torch.channels_last)))
    )
    for name, gradient in own.items():
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-9)
