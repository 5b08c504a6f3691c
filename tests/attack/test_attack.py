"""Every public name under attack."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import segattr
import segattr.plot
import segloss
from segloss.common.precision import _get, _set
from tests.attack.attack import Spoil, _equal, _tensors, assert_withstands, spoils
from tests.attack.call import Call, Calls
from tests.attack.calls_segattr import CALLS as CALLS_SEGATTR
from tests.attack.calls_segloss import CALLS as CALLS_SEGLOSS

CALLS: Calls = CALLS_SEGLOSS | CALLS_SEGATTR
# All else runs with what the library requires.
FIGURES = {f"segattr.plot.{name}" for name in segattr.plot.__all__} - {"segattr.plot.overlay"}
DRAWS = pytest.mark.skipif(find_spec("matplotlib") is None, reason="figures need matplotlib")
EVERY = [pytest.param(name, marks=DRAWS) if name in FIGURES else name for name in CALLS]
PACKAGES = (segloss, segattr, segattr.lrp, segattr.metrics, segattr.plot, segattr.refine)
PUBLIC = [
    f"{package.__name__}.{name}"
    for package in PACKAGES
    for name in package.__all__
    if not isinstance(getattr(package, name), ModuleType)
]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_call(name: str) -> None:
    # A class may have calls of its methods instead, and a name may have variants.
    assert any(key == name or key.startswith((f"{name}.", f"{name} ")) for key in CALLS)


@pytest.mark.parametrize("key", CALLS)
def test_every_call_is_of_a_public_name(key: str) -> None:
    name = key.split()[0]
    assert any(name == public or name.startswith(f"{public}.") for public in PUBLIC)


def fresh(name: str) -> Call:
    torch.manual_seed(0)
    return CALLS[name]()


@cache
def spoils_of(name: str) -> list[Spoil]:
    return spoils(fresh(name))


@pytest.mark.parametrize("name", EVERY)
def test_a_spoilt_argument_is_refused_by_name_or_gives_a_sound_result(name: str) -> None:
    """A sample, another one for each call."""
    every = spoils_of(name)
    for spoil in random.Random(name).sample(every, min(len(every), 15)):
        assert_withstands(fresh(name), [spoil])


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_all_ways_to_spoil_an_argument(name: str) -> None:
    for spoil in spoils_of(name):
        assert_withstands(fresh(name), [spoil])


def assert_two_withstand(name: str, data: st.DataObject) -> None:
    """Spoils two arguments, where there are as many that may be."""
    every = spoils_of(name)
    if len({target for target, _ in every}) > 1:
        choice = st.lists(st.sampled_from(every), min_size=2, max_size=2, unique_by=lambda spoil: spoil[0])
        assert_withstands(fresh(name), data.draw(choice))


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=10)
@given(data=st.data())
def test_two_spoilt_arguments(name: str, data: st.DataObject) -> None:
    assert_two_withstand(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=60)
@given(data=st.data())
def test_more_of_two_spoilt_arguments(name: str, data: st.DataObject) -> None:
    assert_two_withstand(name, data)


@pytest.mark.parametrize("name", EVERY)
def test_valid_arguments_are_accepted(name: str) -> None:
    call = fresh(name)
    if name == "segloss.ToleranceError":
        with pytest.raises(call.errors):
            call.function(**call.arguments)
    else:
        call.function(**call.arguments)
    assert_withstands(fresh(name), [])


def keep(x: Tensor) -> Tensor:
    return x


def write(x: Tensor) -> Tensor:
    return x.add_(1)


def draw(x: Tensor) -> Tensor:
    return x + torch.rand(1)


def warn(x: Tensor) -> Tensor:
    warnings.warn("old", stacklevel=1)
    return x


def refuse(x: Tensor) -> Tensor:
    raise ValueError("expected something else")


def fail(x: Tensor) -> Tensor:
    raise RuntimeError("x: deep inside")


def hang(x: Tensor) -> Tensor:
    while True:
        x = x + 1


def leave_grad_off(x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    return x


def leave_precision_low(x: Tensor) -> Tensor:
    torch.set_float32_matmul_precision("medium")
    return x


def leave_values_checked(x: Tensor) -> Tensor:
    segloss.check_values(True)
    return x


def leave_another_device(x: Tensor) -> Tensor:
    torch.set_default_device("meta")
    return x


def silence(x: Tensor) -> Tensor:
    warnings.simplefilter("ignore")
    return x


def root(x: Tensor) -> Tensor:
    return x.abs().sqrt()


@pytest.mark.parametrize(
    ("function", "way", "problem"),
    [
        (keep, "one dimension more", "instead of"),
        (keep, "one entry NaN", "NaN or infinity was accepted in"),
        (keep, "all entries infinite", "NaN or infinity was accepted in"),
        (lambda x: x.to("meta"), "requires grad", "a result on meta"),
        (lambda x: x.double(), "requires grad", "a float64 result of narrower arguments"),
        (lambda x: x / 0, "torch.float64", "result that is not finite"),
        (root, "requires grad", "gradient that is not finite"),
        (write, "torch.float64", "was written into"),
        (draw, "torch.float64", "changed: random state of torch"),
        (leave_grad_off, "torch.float64", "changed: grad mode"),
        (leave_precision_low, "torch.float64", "changed: precision of products"),
        (leave_values_checked, "torch.float64", "changed: check_values"),
        (leave_another_device, "torch.float64", "changed: default device"),
        (silence, "torch.float64", "changed: warning filters"),
        (warn, "torch.float64", "UserWarning: old"),
        (refuse, "torch.float64", "names none of"),
        (fail, "torch.float64", "RuntimeError: x: deep inside"),
        (hang, "torch.float64", "no result after 0.2 seconds"),
    ],
)
def test_the_attack_finds_what_is_wrong(function: Callable[..., Any], way: str, problem: str) -> None:
    call = Call(function, {"x": torch.zeros(2, 3)}, lambda _: (2, 3))
    with torch.random.fork_rng(), as_before(), pytest.raises(AssertionError, match=problem):
        assert_withstands(call, [("x", way)], **({"seconds": 0.2} if function is hang else {}))


@contextmanager
def as_before() -> Iterator[None]:
    """Sets back what the functions above change."""
    precision = _get()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_device(None)
        _set(precision)
        segloss.check_values(False)


def learn(x: Tensor, net: nn.Linear) -> Tensor:
    net.weight.data.zero_()
    return x


def freeze(x: Tensor, net: nn.Linear) -> Tensor:
    net.requires_grad_(False)
    return x


def leave_gradients(x: Tensor, net: nn.Linear) -> Tensor:
    net(torch.ones(1, 3)).sum().backward()
    return x


def evaluate(x: Tensor, net: nn.Linear) -> Tensor:
    net.eval()
    return x


def hook(x: Tensor, net: nn.Linear) -> Tensor:
    net.register_forward_hook(lambda *_: None)
    return x


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (learn, "parameters or buffers"),
        (freeze, "requires_grad"),
        (leave_gradients, "gradients"),
        (evaluate, "training modes"),
        (hook, "hooks"),
    ],
)
def test_the_attack_finds_a_changed_network(function: Callable[..., Any], problem: str) -> None:
    call = Call(function, {"x": torch.zeros(2, 3), "net": nn.Linear(3, 3)}, fixed=("net",))
    with pytest.raises(AssertionError, match=f"{problem} of a network changed"):
        assert_withstands(call, [("x", "torch.float64")])


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("image: expected [2]", True),
        ("image[0]: expected [2]", True),
        ("image.shape: expected [2]", True),
        ("values: expected [2] to go with image [3]", True),
        ("values: expected device cpu, that of image, got meta", True),
        ("values: expected finite maps (see image)", True),
        ("values: expected fewer (see values and image)", True),
        ("values: expected one for each image, got 3", False),
        ("values: expected what an image has", False),
        ("images: expected [2]", False),
    ],
)
def test_an_error_names_an_argument_at_its_place(message: str, named: bool) -> None:
    def function(image: Tensor) -> Tensor:
        raise ValueError(message)

    call = Call(function, {"image": torch.zeros(2)})
    if named:
        assert_withstands(call, [("image", "torch.float64")])
    else:
        with pytest.raises(AssertionError, match="names none of"):
            assert_withstands(call, [("image", "torch.float64")])


@pytest.mark.parametrize("name", EVERY)
def test_a_default_device_changes_nothing(name: str) -> None:
    """Results are where the arguments are; the device meta stands for an accelerator."""
    if name in ("segattr.StochasticConv2d", "segloss.OODClusters.refit", "segloss.ToleranceError"):
        pytest.skip("makes parameters, which are where the user asks for, or no result")
    expected = fresh(name)
    torch.manual_seed(0)
    results = _tensors(expected.function(**expected.arguments))
    call = fresh(name)
    torch.manual_seed(0)
    with torch.device("meta"):
        elsewhere = _tensors(call.function(**call.arguments))
    for result, other in zip(results, elsewhere, strict=True):
        assert other.device == result.device
        assert _equal(other.detach(), result.detach())


def test_every_tensor_is_spoilt_at_once() -> None:
    call = Call(lambda x, y: x + y, {"x": torch.zeros(2), "y": torch.zeros(2)}, lambda arguments: (2,))
    with pytest.raises(AssertionError, match="RuntimeError"):
        assert_withstands(call, [("x", "meta")])
    assert_withstands(call, [("every tensor", "meta")])


def test_the_attack_passes_what_is_right() -> None:
    def function(x: Tensor) -> Tensor:
        if x.shape != (2, 3):
            raise ValueError(f"x: expected [2, 3], got {list(x.shape)}")
        return x.exp()

    call = Call(function, {"x": torch.zeros(2, 3)}, lambda _: (2, 3))
    for way in ("torch.float64", "requires grad", "one dimension more", "one entry -1"):
        assert_withstands(call, [("x", way)])
    assert_withstands(Call(function, call.arguments, any_value=("x",)), [("x", "one entry NaN")])
    assert_withstands(Call(function, call.arguments, infinite=("x",)), [("x", "one entry infinite")])
