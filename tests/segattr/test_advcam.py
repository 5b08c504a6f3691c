"""AdvCAM against stored cases, against one image and class at a time, and without a trace in the network."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segattr.advcam import advcam
from segattr.cam import cam, multiscale, normalize
from segattr.gradients import grad_cam
from segattr.networks.classifier import Classifier, split
from tests.segattr.lrp_nets import randomise, resnet_basic
from tests.segattr.test_cam import assert_untouched, deep_head, net, snapshot

Golden = Callable[[str], dict[str, Tensor]]

VARIANTS: dict[str, dict[str, Any]] = {
    "paper_noreg": {"literal": True, "step_size": 0.5, "suppress": False, "penalty": 0},
    "paper_reg": {"literal": True, "step_size": 0.5, "penalty": 0.05},
    "default_noreg": {"suppress": False, "penalty": 0},
    "default_reg": {},
    "ref_reg": {"reference": True, "penalty": 7},
}


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3, 1, 1), nn.ReLU()]
    return randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 4)))


def resnet() -> nn.Module:
    return randomise(resnet_basic())


def images(count: int = 2, *size: int) -> Tensor:
    return torch.randn(count, 3, *(size or (14, 12)), dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_stored_cases(golden: Golden, name: str) -> None:
    case = golden("attr/advcam")
    model, maps = net(case), case[f"{name}/cams"]
    for steps in (1, 2, 3):
        found = advcam(model, case["image"], [1], steps=steps, **VARIANTS[name])
        assert isinstance(found, Tensor)
        expected = maps[: steps + (name != "ref_reg")].sum(0)
        torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-9)
    stored = case[f"{name}/{'A_without_last' if name == 'ref_reg' else 'A'}"]
    torch.testing.assert_close(normalize(found, "max")[0, 0], stored, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", ["default_reg", "paper_reg", "ref_reg"])
@pytest.mark.parametrize("make", [small, resnet])
def test_batched_is_one_at_a_time(make: Callable[[], nn.Module], variant: str) -> None:
    model, x = make(), images(3, 33, 29)
    settings = VARIANTS[variant] | {"steps": 3}
    every = advcam(model, x, **settings)
    ragged = advcam(model, x, [[3, 0], [], [2]], **settings)
    assert isinstance(every, Tensor)
    assert [own.shape for own in ragged] == [(n, *every.shape[2:]) for n in (2, 0, 1)]
    for image, classes in ((0, [3, 0]), (2, [2])):
        torch.testing.assert_close(ragged[image], every[image, classes], rtol=1e-7, atol=1e-7)
        for c in classes:
            alone = advcam(model, x[image : image + 1], [c], **settings)
            torch.testing.assert_close(every[image : image + 1, c : c + 1], alone, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(advcam(model, x, chunk=5, **settings), every, rtol=1e-7, atol=1e-7)


def test_no_steps_give_the_cam() -> None:
    model, x = small(), images()
    torch.testing.assert_close(advcam(model, x, steps=0), cam(model, x, norm="relu"))
    torch.testing.assert_close(advcam(model, x, steps=0, literal=True), cam(model, x, norm="max"))


def test_one_step_of_any_head() -> None:
    """The definition, with Grad-CAM as map, summed over locations."""
    model, x, c = deep_head(), images(1, 20, 20), 2
    clf = split(model)

    def weighted(x: Tensor, weight: Tensor) -> Tensor:
        return (clf.features(x) * weight).sum(1).relu()

    def weight_of(x: Tensor) -> Tensor:
        f = clf.features(x)
        return torch.autograd.grad(clf.head(f)[0, c], f)[0].sum((2, 3), keepdim=True)

    start = x.clone().requires_grad_()
    logits = model(start)[0]
    (gradient,) = torch.autograd.grad(2 * logits[c] - logits.sum(), start)
    second = (x + 0.3 * gradient / gradient.abs().max()).clamp(x.min(), x.max())
    expected = weighted(x, weight_of(x)) + weighted(second, weight_of(second))
    torch.testing.assert_close(advcam(model, x, [c], steps=1, step_size=0.3)[0], expected)
    maps = grad_cam(model, x, [c])
    torch.testing.assert_close(advcam(model, x, [c], steps=0), maps * maps[0, 0].numel())


@given(seed=st.integers(0, 99), factor=st.floats(0.1, 10))
@settings(max_examples=15)
def test_the_scale_of_the_logits_does_not_matter(seed: int, factor: float) -> None:
    """Steps are normalised; the penalty grows with the logits."""
    model, x = small(seed), images(1)
    expected = advcam(model, x, [1], steps=2)
    with torch.no_grad():
        model.get_submodule("8").weight.mul_(factor)
    torch.testing.assert_close(advcam(model, x, [1], steps=2) / factor, expected, rtol=1e-6, atol=1e-6)


def test_climbing_raises_the_target() -> None:
    """Each map has more in it than the one before, without the penalty."""
    model, x = small(), images(1)
    raised = torch.stack([advcam(model, x, [1], steps=n, penalty=0, suppress=False).sum() for n in range(4)])
    growth = raised.diff()
    assert (growth.diff() > 0).all()


def test_zero_images_and_no_classes() -> None:
    model, x = resnet(), images(2, 33, 33)
    assert advcam(model, x, [], steps=2).shape == (2, 0, 3, 3)
    assert advcam(model, x[:0], steps=2).shape == (0, 4, 3, 3)
    assert [own.shape[0] for own in advcam(model, x, [[], []], steps=2)] == [0, 0]
    assert advcam(model, x, [], steps=2, reference=True).shape == (2, 0, 3, 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sign", [0, -1])
def test_maps_of_zeros_and_without_a_positive_score(variant: str, sign: int) -> None:
    model = small()
    with torch.no_grad():
        weight = model.get_submodule("8").weight
        weight.copy_(sign * weight.abs())
    found = advcam(model, images(), steps=2, **VARIANTS[variant])
    assert isinstance(found, Tensor)
    assert not found.any()
    constant = advcam(model, torch.zeros(1, 3, 14, 12, dtype=torch.float64), steps=2, **VARIANTS[variant])
    assert constant.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["default_reg", "ref_reg"])
def test_the_model_is_untouched(variant: str, training: bool) -> None:
    model = resnet().train(training)
    model.get_submodule("conv1").requires_grad_(False)
    x = images(2, 65, 65).requires_grad_()
    before, start = snapshot(model), x.detach().clone()
    found = advcam(model, x, [[0], [1, 2]], steps=2, **VARIANTS[variant])
    assert not found[0].requires_grad
    assert_untouched(model, before)
    assert torch.equal(x, start)
    assert x.grad is None

    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # in the middle of the climb
            raise RuntimeError("in the model")

    clf = split(model)
    assert clf.linear is model.get_submodule("fc")
    handle = model.get_submodule("layer3").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the model"):
        advcam(clf, x, steps=2, **VARIANTS[variant])
    handle.remove()
    assert_untouched(model, before)


def test_passes_through_the_network() -> None:
    """One forward for each map; no gradient of a parameter, no backward after the last map."""
    model, forward, backward = small(), [0], [0]
    clf = split(model)
    assert clf.linear is not None
    model.get_submodule("0").register_forward_hook(lambda *args: forward.__setitem__(0, forward[0] + 1))

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            backward[0] += 1
            return gradient

    model.get_submodule("1").register_forward_hook(lambda module, args, output: Count.apply(output))
    weights: list[bool] = []
    model.get_submodule("3").register_forward_pre_hook(lambda module, args: weights.append(module.weight.requires_grad))
    advcam(clf, images(), steps=5)
    assert (forward[0], backward[0]) == (6, 5)
    assert not any(weights)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode(mode: Callable[[], Any]) -> None:
    model, x = small(), images()
    expected = advcam(model, x, steps=2)
    with mode():
        assert torch.equal(advcam(model, x.clone(), steps=2), expected)


def test_precision_is_that_of_the_network() -> None:
    model, x = small(), images()
    exact = advcam(model, x, steps=3)
    single = copy.deepcopy(model).float()
    expected = advcam(single, x.float(), steps=3)
    assert isinstance(expected, Tensor)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected.double(), exact, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(advcam(single, x.float(), steps=3), expected)
    half = advcam(single.bfloat16(), x.bfloat16(), steps=3)
    assert isinstance(half, Tensor)
    assert half.dtype == torch.float32
    assert (half - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    clf, x = split(small()), images()

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    advcam(clf, x, steps=1)
    before = count()
    for _ in range(50):
        advcam(clf, x, steps=1)
    assert count() <= before


def test_a_pair_of_functions() -> None:
    model, x = small(), images()
    clf = split(model)
    pair = Classifier(lambda x: clf.features(x), lambda f: clf.head(f))
    torch.testing.assert_close(advcam(pair, x, steps=2), advcam(clf, x, steps=2))
    with pytest.raises(ValueError, match="classes: expected integers from 0 to 3, got 4"):
        advcam(pair, x, [4])


def test_scales() -> None:
    model, x = small(), images()
    maps = multiscale(lambda x: advcam(model, x, [[1], [0, 2]], steps=1), x, (0.5, 1.0))
    assert [own.shape for own in maps] == [(1, 14, 12), (2, 14, 12)]


def test_a_head_that_overwrites_its_input() -> None:
    model, x = small(), images()
    overwriting = [nn.ReLU(inplace=True) if isinstance(layer, nn.ReLU) else layer for layer in model.children()]
    pair = Classifier(nn.Sequential(*overwriting[:4]), nn.Sequential(*overwriting[4:]))
    torch.testing.assert_close(advcam(pair, x, steps=2), advcam(split(model, "3"), x, steps=2))


def test_broken_images_are_refused() -> None:
    with pytest.raises(ValueError, match="expected finite"):
        advcam(small(), images() * torch.nan, steps=1)


def test_detached_features_are_refused() -> None:
    clf = split(small())
    with pytest.raises(ValueError, match="clf: expected features that autograd can follow to the image, got detached"):
        advcam(Classifier(lambda x: clf.features(x).detach(), lambda f: clf.head(f)), images())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: expected a finite number of at least 0, got -1"),
        ({"steps": 0, "reference": True}, ValueError, "steps: expected a finite number of at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps: expected an int, got float"),
        ({"step_size": -0.1}, ValueError, "step_size: expected a finite number of at least 0"),
        ({"step_size": "a"}, TypeError, "step_size: expected a number, got str"),
        ({"threshold": 1.5}, ValueError, "threshold: expected a finite number of at least 0 and of at most 1, got 1.5"),
        ({"penalty": -1}, ValueError, "penalty: expected a finite number of at least 0"),
        ({"suppress": 1}, TypeError, "suppress: expected a bool, got int"),
        ({"literal": None}, TypeError, "literal: expected a bool, got NoneType"),
        ({"reference": "yes"}, TypeError, "reference: expected a bool, got str"),
        ({"literal": True, "reference": True}, ValueError, "literal: expected False with reference=True, got True"),
        ({"chunk": 0}, ValueError, "chunk: expected a finite number of at least 1, got 0"),
        ({"chunk": 1.5}, TypeError, "chunk: expected an int, got float"),
        ({"classes": [[1]]}, ValueError, "classes: expected a sequence for each of 2 images, got 1"),
        (
            {"images": torch.zeros(3, 9, 9)},
            ValueError,
            r"images: expected \[B, C, H, W\] or \[B, C, D, H, W\], got \[3, 9, 9\]",
        ),
        ({"images": torch.zeros(1, 3, 9, 9).int()}, TypeError, "images: expected a floating-point tensor"),
        ({"clf": deep_head, "reference": True}, ValueError, "reference: expected False for a head other than global"),
        ({"clf": lambda: "net"}, TypeError, "clf: expected a Classifier, or a network that split understands, got str"),
    ],
)
def test_errors(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"images": images(), **settings, "clf": settings.get("clf", small)()}
    with pytest.raises(error, match=message):
        advcam(**arguments)
