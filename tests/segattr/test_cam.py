"""CAM and Grad-CAM against stored maps and their definitions; normalisation; averages over scales."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from segattr.advcam import advcam
from segattr.cam import cam, multiscale, normalize
from segattr.gradients import grad_cam
from segattr.networks.classifier import Classifier, split
from segloss import max_normalize
from tests.segattr.lrp_nets import randomise, resnet_basic, vgg_bn

Golden = Callable[[str], dict[str, Tensor]]
NORMS = ["raw", "relu", "relu_max", "minmax", "max"]


def net(case: dict[str, Tensor]) -> nn.Module:
    """The network of the stored cases."""
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False)).double()
    names = {"0": "conv1", "2": "conv2", "6": "fc"}
    layers = {name: f"net/{names[name.split('.')[0]]}.{name.split('.')[1]}" for name in model.state_dict()}
    model.load_state_dict({name: case[stored] for name, stored in layers.items()})
    return model


@pytest.fixture
def case(golden: Golden) -> dict[str, Tensor]:
    return golden("attr/cam")


def deep_head() -> nn.Module:
    """Two linear layers behind pooling to 2 x 2, and an activation in place behind the first convolution."""
    layers = [
        nn.Conv2d(3, 5, 3, 2),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 3),
        nn.ReLU(inplace=True),
    ]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 4)]
    return randomise(nn.Sequential(*layers, *head))


def resnet() -> nn.Module:
    return randomise(resnet_basic())


# --- maps


def test_stored_cams(case: dict[str, Tensor]) -> None:
    model = net(case)
    for norm, name in (("raw", "raw"), ("max", "maxnorm"), ("relu_max", "relu_maxnorm")):
        torch.testing.assert_close(cam(model, case["x"], norm=norm), case[f"cam/{name}"], rtol=0, atol=1e-9)
    torch.testing.assert_close(split(model)(case["x"]), case["cam/logits"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("layer", [1, 2])
def test_stored_grad_cams(case: dict[str, Tensor], layer: int, pool: bool) -> None:
    model = net(case)
    expected = case[f"gradcam/layer{layer}_{'pooled' if pool else 'elementwise'}"]
    found = grad_cam(model, case["x"], layer={1: "1", 2: "3"}[layer], pool=pool)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    if layer == 2:
        torch.testing.assert_close(grad_cam(model, case["x"], pool=pool), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [resnet, lambda: net_with_bias(nn.Linear), lambda: net_with_bias(nn.Conv2d)])
def test_the_mean_of_a_cam_is_the_logit_without_its_bias(make: Callable[[], nn.Module]) -> None:
    clf = split(make())
    x = torch.randn(3, 3, 40, 33, dtype=torch.float64)
    assert clf.linear is not None
    assert clf.linear.bias is not None
    torch.testing.assert_close(cam(clf, x).mean((2, 3)) + clf.linear.bias, clf(x))


def net_with_bias(kind: type[nn.Module]) -> nn.Module:
    head = [nn.Flatten(), nn.Linear(5, 4)] if kind is nn.Linear else [nn.Conv2d(5, 4, 1), nn.Flatten()]
    return randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), *head))


def test_grad_cam_of_a_linear_head_is_the_cam_over_the_locations() -> None:
    model, x = resnet(), torch.randn(2, 3, 65, 65, dtype=torch.float64)
    maps = cam(model, x)
    for pool in (True, False):
        torch.testing.assert_close(grad_cam(model, x, pool=pool, norm="raw"), maps / maps[0, 0].numel())


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(
    ("make", "layer"),
    [(deep_head, None), (deep_head, "0"), (deep_head, "1"), (resnet, "layer2"), (lambda: randomise(vgg_bn()), None)],
)
def test_grad_cam_of_one_class_at_a_time(make: Callable[[], nn.Module], layer: str | None, pool: bool) -> None:
    """By the gradient that a hook on the model itself would see."""
    model, x = make(), torch.randn(2, 3, 33, 30, dtype=torch.float64)
    clf = split(model, layer)
    found = grad_cam(model, x, layer=layer, pool=pool, norm="raw")
    for image in range(2):
        for c in range(4):
            features = clf.features(x[image : image + 1]).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(clf.head(features)[0, c], features)
            weight = gradient.mean((2, 3), keepdim=True) if pool else gradient
            torch.testing.assert_close(found[image, c], (weight * features)[0].sum(0))


@pytest.mark.parametrize("method", [cam, grad_cam])
def test_requested_classes(method: Callable[..., Any]) -> None:
    model, x = resnet(), torch.randn(3, 3, 65, 49, dtype=torch.float64)
    every = method(model, x)
    assert every.shape[:2] == (3, 4)
    torch.testing.assert_close(method(model, x, [3, 1, 3]), every[:, [3, 1, 3]])
    ragged = method(model, x, [[2], [], (3, 0)])
    assert [own.shape for own in ragged] == [(n, *every.shape[2:]) for n in (1, 0, 2)]
    torch.testing.assert_close(ragged[0], every[0, [2]])
    torch.testing.assert_close(ragged[2], every[2, [3, 0]])
    assert method(model, x, []).shape == (3, 0, *every.shape[2:])
    assert [own.shape[0] for own in method(model, x, [[], [], []])] == [0, 0, 0]
    assert method(model, x[:0]).shape == (0, 4, *every.shape[2:])
    assert method(model, x[:0], [[1]][:0]).shape == (0, 0, *every.shape[2:])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", [cam, grad_cam])
def test_norm_is_that_of_normalize(method: Callable[..., Any], norm: str) -> None:
    model, x = resnet(), torch.randn(2, 3, 65, 49, dtype=torch.float64)
    torch.testing.assert_close(method(model, x, norm=norm), normalize(method(model, x, norm="raw"), norm))


def smooth(hidden: bool) -> nn.Module:
    head = [nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4)] if hidden else [nn.Linear(5, 4)]
    return randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head))


@pytest.mark.parametrize(
    ("method", "hidden", "settings"),
    [
        (cam, False, {}),
        (grad_cam, False, {"norm": "raw"}),
        (grad_cam, True, {"norm": "raw"}),
        (grad_cam, True, {"norm": "raw", "pool": False, "layer": "0"}),
    ],
)
def test_gradients_of_maps(method: Callable[..., Any], hidden: bool, settings: dict[str, Any]) -> None:
    """With respect to the image and to weights of the head, which in Grad-CAM go through the gradients too."""
    model, x = smooth(hidden), torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = model.get_submodule("4").weight
    assert torch.autograd.gradcheck(
        lambda x, _: torch.cat(method(model, x, [[0, 2], [1]], **settings)), (x, weight), fast_mode=True
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_maps_have_no_graph_without_autograd(mode: Callable[[], Any]) -> None:
    model, x = deep_head(), torch.randn(2, 3, 20, 20, dtype=torch.float64)
    expected, expected_cam = grad_cam(model, x), cam(smooth(False), x)
    assert expected.requires_grad
    torch.manual_seed(0)
    with mode():
        found, found_cam = grad_cam(model, x.clone()), cam(smooth(False), x.clone())
        assert not torch.is_grad_enabled()
    for own, other in ((found, expected), (found_cam, expected_cam)):
        assert isinstance(own, Tensor)
        assert not own.requires_grad
        assert own.shape == other.shape
    assert torch.equal(found, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [cam, grad_cam])
def test_the_model_is_untouched(method: Callable[..., Any], training: bool) -> None:
    model = resnet().train(training)
    model.get_submodule("bn1").eval()
    model.get_submodule("conv1").requires_grad_(False)
    x = torch.randn(3, 3, 65, 65, dtype=torch.float64)
    before = snapshot(model)
    method(model, x)
    assert_untouched(model, before)

    def fail(*args: Any) -> None:
        raise RuntimeError("in the model")

    handle = model.get_submodule("layer3").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the model"):
        method(model, x)
    handle.remove()
    assert_untouched(model, before)


def snapshot(model: nn.Module) -> list[Any]:
    state = copy.deepcopy(model.state_dict())
    flags = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    buffers = {name: id(b) for name, b in model.named_buffers()}
    modes = [(m.training, list(m._forward_hooks), list(m._backward_hooks)) for m in model.modules()]
    return [state, flags, buffers, modes, torch.is_grad_enabled(), torch.get_rng_state()]


def assert_untouched(model: nn.Module, before: list[Any]) -> None:
    after = snapshot(model)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert after[1:4] == before[1:4]
    assert after[4] == before[4]
    assert torch.equal(after[5], before[5])


def test_precision_is_that_of_the_network() -> None:
    model, x = resnet(), torch.randn(2, 3, 65, 65)
    exact = cam(model, x.double())
    single = model.float()
    expected, expected_grad = cam(single, x), grad_cam(single, x)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected.double(), exact, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cam(single, x), expected)
        assert torch.equal(grad_cam(single, x), expected_grad)
    half = cam(single.bfloat16(), x.bfloat16())
    assert half.dtype == torch.float32
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    model, x = deep_head(), torch.randn(2, 3, 20, 20, dtype=torch.float64)
    split_once = split(model, "2")

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    grad_cam(split_once, x)
    before = count()
    for _ in range(50):
        grad_cam(split_once, x)
    assert count() <= before


def test_a_pair_of_functions() -> None:
    model, x = resnet(), torch.randn(2, 3, 65, 65, dtype=torch.float64)
    clf = split(model)
    pair = Classifier(lambda x: clf.features(x), lambda f: clf.head(f))
    torch.testing.assert_close(grad_cam(pair, x), grad_cam(clf, x))
    with pytest.raises(ValueError, match=r"clf: expected global average pooling .*: use grad_cam"):
        cam(pair, x)


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_that_overwrites_its_input(trained: bool) -> None:
    features, x = randomise(nn.Conv2d(3, 6, 3)).requires_grad_(trained), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    expected = grad_cam(Classifier(features, nn.Sequential(nn.ReLU(), *layers).double()), x)
    assert expected.any()
    torch.testing.assert_close(grad_cam(Classifier(features, nn.Sequential(nn.ReLU(True), *layers)), x), expected)


def test_maps_of_a_frozen_network_have_no_graph() -> None:
    model, x = deep_head().requires_grad_(False), torch.randn(1, 3, 20, 20, dtype=torch.float64)
    assert not grad_cam(model, x).requires_grad
    assert grad_cam(model, x.requires_grad_()).requires_grad
    model.get_submodule("7").requires_grad_(True)
    assert grad_cam(model, x.detach()).requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [cam, grad_cam])
def test_broken_images_are_refused(method: Callable[..., Any], value: float) -> None:
    with pytest.raises(ValueError, match="images: expected finite values, got NaN or infinity"):
        method(resnet(), torch.full((1, 3, 33, 33), value, dtype=torch.float64))
    diverged = resnet()
    nn.init.constant_(diverged.get_submodule("fc").weight, torch.nan)
    with pytest.raises(ValueError, match=r"clf: expected finite maps, got NaN or infinity \(see images\)"):
        method(diverged, torch.ones(1, 3, 33, 33, dtype=torch.float64))


@pytest.mark.parametrize("method", [cam, grad_cam, advcam])
def test_images_that_the_network_does_not_take(method: Callable[..., Any]) -> None:
    """They are named; what the code of a network raises itself stays as it is."""
    model = resnet()
    for images, problem in (
        (torch.ones(1, 4, 33, 33, dtype=torch.float64), r"\[1, 4, 33, 33\], torch.float64 on cpu: .* channels"),
        (torch.ones(1, 3, 33, 33), "torch.float32 on cpu: .* should be the same"),
    ):
        with pytest.raises(ValueError, match=f"images: expected what the network can take, got .*{problem}"):
            method(model, images, [0])
    with pytest.raises(ValueError, match=r"images: expected .* on (the device )?meta"):
        method(model, torch.ones(1, 3, 33, 33, dtype=torch.float64, device="meta"), [0])


class Hungry(nn.Module):
    """Asks for 80 petabytes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=1e7)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.new_ones(1, 1, 50, 50)


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self(x)


def out_of_memory(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("method", [cam, grad_cam, advcam])
@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (Hungry(), RuntimeError, "allocate memory"),
        (Shifted(), RuntimeError, "must match the size"),
        (Endless(), RecursionError, "recursion"),
        (nn.Module(), NotImplementedError, "forward"),
        (out_of_memory, torch.OutOfMemoryError, "no memory"),
    ],
)
def test_other_errors_of_a_network_stay_what_they_are(
    method: Callable[..., Any], part: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(error, match=message) as caught:
        method(Classifier(part, head), torch.ones(1, 3, 9, 9))
    assert type(caught.value) is error


@pytest.mark.parametrize("method", [grad_cam, advcam])
@pytest.mark.parametrize("trained", [True, False])
def test_detached_logits_are_refused(method: Callable[..., Any], trained: bool) -> None:
    layer = nn.Linear(3, 2).requires_grad_(trained)
    clf = Classifier(nn.ReLU(), lambda features: layer(features.detach().mean((2, 3))))
    with pytest.raises(ValueError, match="clf: expected logits that autograd can follow to the features, got detached"):
        method(clf, torch.ones(2, 3, 9, 9))


@pytest.mark.parametrize("method", [grad_cam, advcam])
def test_a_head_that_autograd_cannot_follow_back_is_not_blamed_on_the_images(method: Callable[..., Any]) -> None:
    def head(features: Tensor) -> Tensor:
        large = features.exp()
        logits = large.mean((2, 3)) * large.amax((2, 3))
        large.add_(1)
        return logits

    with pytest.raises(ValueError, match=r"clf: .* in place that overwrites what a gradient needs"):
        method(Classifier(nn.ReLU(), head), torch.ones(2, 3, 9, 9))


@pytest.mark.parametrize("method", [cam, grad_cam, advcam])
def test_parts_that_do_not_fit_each_other(method: Callable[..., Any]) -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"clf: expected features of 5 channels, got \[\d, 3, 9, 9\]"):
        method(Classifier(nn.ReLU(), head), torch.ones(2, 3, 9, 9))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: cam(deep_head(), x),
            ValueError,
            "clf: expected global average pooling .*: use grad_cam",
        ),
        (
            lambda x: cam(resnet(), x[0]),
            ValueError,
            r"images: expected \[B, C, H, W\] or \[B, C, D, H, W\], got \[3, 33, 33\]",
        ),
        (lambda x: cam(resnet(), x.int()), TypeError, "images: expected a floating-point tensor, got torch.int32"),
        (lambda x: cam(resnet(), x, [4]), ValueError, "classes: expected integers from 0 to 3, got 4"),
        (lambda x: cam(resnet(), x, [[1]]), ValueError, "classes: expected a sequence for each of 2 images, got 1"),
        (lambda x: cam(resnet(), x, 1), TypeError, "classes: expected a sequence of integers"),
        (lambda x: cam(resnet(), x, norm="softmax"), ValueError, "norm: expected one of 'raw', .* got 'softmax'"),
        (
            lambda x: cam("resnet", x),
            TypeError,
            "clf: expected a Classifier, .* got str",
        ),
        (lambda x: grad_cam(resnet(), x, [-1]), ValueError, "classes: expected integers from 0 to 3, got -1"),
        (lambda x: grad_cam(resnet(), x, pool="mean"), TypeError, "pool: expected a bool, got str"),
        (lambda x: grad_cam(resnet(), x, norm=None), ValueError, "norm: expected one of"),
        (lambda x: grad_cam(resnet(), x, layer="conv7"), ValueError, "layer: expected a submodule such as conv1"),
        (
            lambda x: grad_cam(Classifier(nn.Identity(), nn.Flatten(2)), x),
            ValueError,
            r"clf: expected logits \[2, K\] from its head, got \[2, 3, 1089\]",
        ),
        (
            lambda x: grad_cam(Classifier(nn.Identity(), lambda f: {"out": f}), x),
            TypeError,
            "clf: expected a tensor of logits from its head, got dict",
        ),
        (
            lambda x: grad_cam(Classifier(lambda x: (x, x, x), nn.Flatten()), x),
            TypeError,
            "clf: expected a tensor of features, got tuple",
        ),
        (
            lambda x: grad_cam(Classifier(nn.Flatten(), nn.Identity()), x),
            ValueError,
            r"clf: expected features \[B, D, h, w\], got \[2, 3267\]",
        ),
    ],
)
def test_errors_of_maps(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 33, 33, dtype=torch.float64))


# --- normalisation


finite_maps = hnp.arrays(
    "float64", hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=st.floats(-3e38, 3e38)
).map(torch.from_numpy)


@given(maps=finite_maps, single=st.booleans())
def test_normalised_maps(maps: Tensor, single: bool) -> None:
    maps = maps.float() if single else maps
    found: dict[str, Tensor] = {mode: normalize(maps, mode) for mode in NORMS}
    for mode, own in found.items():
        assert own.shape == maps.shape
        assert own.dtype == maps.dtype
        assert own.isfinite().all(), mode
    maximum = maps.amax((-2, -1))
    for mode in ("relu_max", "minmax", "max"):
        assert (found[mode] <= 1).all()
        assert (found[mode][maximum <= 0] == 0).all()
    for mode in ("relu_max", "max"):
        assert (found[mode].amax((-2, -1))[maximum > 1e-29] == 1).all()
    for mode in ("relu_max", "minmax"):
        assert (found[mode] >= 0).all()


@given(maps=finite_maps, factor=st.floats(1e-3, 1e3))
def test_normalised_maps_have_no_scale(maps: Tensor, factor: float) -> None:
    maps = maps.sign() * maps.abs().clamp(1e-3, 1e3)
    for mode in ("relu_max", "minmax", "max"):
        torch.testing.assert_close(normalize(maps * factor, mode), normalize(maps, mode))


def test_normalisation_by_definition() -> None:
    maps = torch.randn(2, 3, 4, 5)
    least, largest = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    torch.testing.assert_close(normalize(maps, "minmax"), (maps - least) / (largest - least))
    torch.testing.assert_close(normalize(maps, "max"), maps / largest)
    assert torch.equal(normalize(maps, "relu"), maps.clamp(min=0))
    assert torch.equal(normalize(maps, "relu_max"), max_normalize(maps))
    assert normalize(maps, "raw") is maps
    assert [own.shape for own in normalize([maps[0], maps[1, :0]], "max")] == [(3, 4, 5), (0, 4, 5)]


@pytest.mark.parametrize("mode", NORMS)
def test_maps_without_a_positive_score(mode: str) -> None:
    """Give 0, and a finite gradient, as do constant ones for minmax."""
    maps = torch.stack([torch.zeros(3, 3), -torch.rand(3, 3), torch.full((3, 3), 2.0)]).requires_grad_()
    found = normalize(maps, mode)
    assert isinstance(found, Tensor)
    if mode != "raw":
        assert not found[:2].any()
    assert (found[2] == {"raw": 2, "relu": 2, "minmax": 0}.get(mode, 1)).all()
    assert torch.autograd.grad(found.sum(), maps)[0].isfinite().all()


@pytest.mark.parametrize(
    ("maps", "mode", "error", "message"),
    [
        (torch.zeros(2, 2), "mean", ValueError, "mode: expected one of 'raw', 'relu', .*got 'mean'"),
        (torch.zeros(2), "max", ValueError, r"maps: expected \[..., h, w\], got \[2\]"),
        (torch.zeros(2, 2).int(), "max", TypeError, "maps: expected a floating-point tensor"),
        (torch.full((2, 2), torch.nan), "relu", ValueError, "maps: expected finite values, got NaN or infinity"),
        ([torch.zeros(2)], "raw", ValueError, r"maps: expected \[..., h, w\], got \[2\]"),
    ],
)
def test_errors_of_normalisation(maps: Any, mode: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalize(maps, mode)


# --- scales


def brightness(images: Tensor) -> Tensor:
    """A method whose maps are known at every scale."""
    return torch.stack([images.sum(1), images.amax(1)], 1)


def test_scales_by_definition() -> None:
    images = torch.rand(2, 3, 12, 9, dtype=torch.float64)

    def resize(x: Tensor, *size: int) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    def lopsided(x: Tensor) -> Tensor:
        return brightness(x).cumsum(3)

    half, double = resize(images, 6, 4), resize(images, 24, 18)
    terms = [resize(lopsided(half), 12, 9), lopsided(images), resize(lopsided(double), 12, 9)]
    mirrored = [resize(lopsided(x.flip(-1)).flip(-1), 12, 9) for x in (half, images, double)]
    found = multiscale(lopsided, images, (0.5, 1.0, 2), flip=False)
    torch.testing.assert_close(found, sum(terms) / 3)
    found = multiscale(lopsided, images, (0.5, 1.0, 2))
    torch.testing.assert_close(found, (sum(terms) + sum(mirrored)) / 6)


def test_flipping_commutes() -> None:
    images = torch.rand(2, 3, 12, 9)
    found, mirrored = multiscale(brightness, images), multiscale(brightness, images.flip(-1))
    assert isinstance(mirrored, Tensor)
    torch.testing.assert_close(found, mirrored.flip(-1))
    assert torch.equal(multiscale(brightness, images, [1], flip=False), brightness(images))


def test_scales_of_a_network_and_ragged_classes() -> None:
    model, x = resnet(), torch.randn(2, 3, 65, 49, dtype=torch.float64)
    clf = split(model)
    every = multiscale(lambda x: cam(clf, x), x)
    ragged = multiscale(lambda x: cam(clf, x, [[], [3, 1]]), x)
    assert [own.shape for own in ragged] == [(0, 65, 49), (2, 65, 49)]
    torch.testing.assert_close(ragged[1], every[1][[3, 1]])
    assert multiscale(lambda x: cam(clf, x), x[:0]).shape == (0, 4, 65, 49)
    assert torch.autograd.grad(every[0].sum(), clf.linear.weight)[0].any()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scales": ()}, ValueError, r"scales: expected a sequence of at least one number, got \(\)"),
        ({"scales": 1.0}, ValueError, "scales: expected a sequence of at least one number, got 1.0"),
        ({"scales": [0.5, 0]}, ValueError, "scales: expected a finite number above 0 and of at most 100, got 0"),
        ({"scales": ["1"]}, TypeError, "scales: expected a number, got str"),
        ({"flip": 1}, TypeError, "flip: expected a bool, got int"),
        ({"images": torch.zeros(3, 4, 4)}, ValueError, r"images: expected \[B, C, H, W\]"),
    ],
)
def test_errors_of_scales(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        multiscale(brightness, **{"images": torch.zeros(1, 3, 4, 4), **settings})


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("cam", TypeError, "method: expected a function of images, got str"),
        (lambda x: None, TypeError, "method: expected maps, a tensor or a list of tensors, got NoneType"),
        (lambda x: x[0], ValueError, r"method: expected maps \[B, K, h, w\] or a list of \[K, h, w\], got \[3, 5, 4\]"),
        (lambda x: x[:1], ValueError, "method: expected maps of 2 images, got those of 1"),
    ],
)
def test_errors_of_a_method_at_scales(method: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        multiscale(method, torch.rand(2, 3, 5, 4), (1.0,))
