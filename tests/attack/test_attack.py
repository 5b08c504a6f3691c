"""Every public name under attack."""

import time
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segattr
import segattr.plot
import segloss
from tests.attack.attack import Spoil, attack, spoils
from tests.attack.call import Call, Calls
from tests.attack.calls_segattr import CALLS as CALLS_SEGATTR
from tests.attack.calls_segloss import CALLS as CALLS_SEGLOSS

CALLS: Calls = CALLS_SEGLOSS | CALLS_SEGATTR
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


def attack_by_chance(name: str, data: st.DataObject) -> None:
    """Spoils one or two arguments, where there are any that may be."""
    if every := spoils_of(name):
        choice = st.lists(st.sampled_from(every), min_size=1, max_size=2, unique_by=lambda spoil: spoil[0])
        attack(fresh(name), data.draw(choice))


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=20)
@given(data=st.data())
def test_spoilt_arguments_are_refused_by_name_or_give_a_sound_result(name: str, data: st.DataObject) -> None:
    attack_by_chance(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=60)
@given(data=st.data())
def test_more_spoilt_arguments(name: str, data: st.DataObject) -> None:
    attack_by_chance(name, data)


@pytest.mark.parametrize("name", CALLS)
def test_valid_arguments_are_accepted(name: str) -> None:
    call = fresh(name)
    if name == "segloss.ToleranceError":
        with pytest.raises(call.errors):
            call.function(**call.arguments)
    else:
        call.function(**call.arguments)
    attack(fresh(name), [])


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
        time.sleep(0.01)


def leave_grad_off(x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    return x


def root(x: Tensor) -> Tensor:
    return x.abs().sqrt()


@pytest.mark.parametrize(
    ("function", "way", "problem"),
    [
        (keep, "one dimension more", "instead of"),
        (keep, "one entry NaN", "NaN or infinity was accepted in"),
        (lambda x: x / 0, "torch.float64", "result that is not finite"),
        (root, "requires grad", "gradient that is not finite"),
        (write, "torch.float64", "was written into"),
        (draw, "torch.float64", "changed: random state of torch"),
        (leave_grad_off, "torch.float64", "changed: grad mode"),
        (warn, "torch.float64", "UserWarning: old"),
        (refuse, "torch.float64", "names none of"),
        (fail, "torch.float64", "RuntimeError: x: deep inside"),
        (hang, "torch.float64", "no result after 0.2 seconds"),
    ],
)
def test_the_attack_finds_what_is_wrong(function: Callable[..., Any], way: str, problem: str) -> None:
    call = Call(function, {"x": torch.zeros(2, 3)}, lambda _: (2, 3), finite=("x",))
    with torch.random.fork_rng(), pytest.raises(AssertionError, match=problem):
        attack(call, [("x", way)], seconds=0.2)
    torch.set_grad_enabled(True)


def test_every_tensor_is_spoilt_at_once() -> None:
    call = Call(lambda x, y: x + y, {"x": torch.zeros(2), "y": torch.zeros(2)}, lambda arguments: (2,))
    with pytest.raises(AssertionError, match="RuntimeError"):
        attack(call, [("x", "meta")])
    attack(call, [("every tensor", "meta")])


def test_the_attack_passes_what_is_right() -> None:
    def function(x: Tensor) -> Tensor:
        if x.shape != (2, 3):
            raise ValueError(f"x: expected [2, 3], got {list(x.shape)}")
        return x.exp()

    call = Call(function, {"x": torch.zeros(2, 3)}, lambda _: (2, 3))
    for way in ("torch.float64", "requires grad", "one dimension more", "one entry NaN"):
        attack(call, [("x", way)])
