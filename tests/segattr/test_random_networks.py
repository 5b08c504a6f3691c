"""Networks under attack: random classifiers of the kinds that users have, in any mode and layout of memory.

A call gives what its definition says or an error that names an argument, the same twice, and leaves all else as it was.
"""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrize

from segattr import advcam, cam, grad_cam, rib, split
from segattr.lrp import unroll
from segattr.networks import evaluating
from tests.segattr.lrp_nets import conservation_error, error, input_times_gradient
from tests.segattr.random_networks import Drawn, Net, networks, numbers, state

# What a user does on purpose is no fault of a network.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

NAMED = re.compile(r"(model|images|x|clf|example): ")
# Networks that no gradient can be had of, and those without a parameter that their maps depend on.
HOPELESS = ("in place that overwrites", "expected parameters to train")


# --- one call


def attempt(drawn: Drawn, call: Callable[[], Any], *, draws: bool = True) -> Any:
    """What a call gives, or its error.

    Args:
        drawn: the network and images that it is given.
        call: takes no arguments.
        draws: whether it may draw random numbers where the network does.
    """
    results = [_attempt(drawn, call, draws and drawn.draws) for _ in range(2)]
    assert_same(*results)
    return results[0]


def _attempt(drawn: Drawn, call: Callable[[], Any], draws: bool) -> Any:
    torch.manual_seed(0)
    before, drawn_before, pixels = state(drawn.model), numbers(), drawn.images.detach().clone()
    try:
        result = call()
    except (TypeError, ValueError) as problem:
        result = problem
    after = state(drawn.model)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"changed: {', '.join(changed)}"
    assert draws or numbers() == drawn_before, "random numbers were drawn"
    assert torch.equal(drawn.images, pixels), "images were written into"
    assert drawn.images.grad is None, "images got a gradient"
    if isinstance(result, Exception):
        assert NAMED.match(str(result)), f"names no argument: {result}"
        assert "\n" not in str(result)
    return result


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, dict):
        assert_same([*found.items()], [*expected.items()])
    else:
        assert type(found) is type(expected)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * max(float(expected.detach().abs().max()), 1e-9))


def seeded(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Without gradients, and with the same random numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return function(x)


def plain(images: Tensor) -> Tensor:
    """A copy that a network may overwrite."""
    return images.detach().clone()


# --- unrolled


def check_unrolled(drawn: Drawn) -> None:
    x = drawn.images
    unrolled = attempt(drawn, lambda: unroll(drawn.model, example=drawn.example), draws=False)
    refused = isinstance(unrolled, Exception)
    result = unrolled if refused else attempt(drawn, lambda: seeded(unrolled, x))
    if isinstance(result, Exception):
        assert drawn.refused, result
        return
    scores, heat = result
    if x.dtype == torch.float64:
        assert conservation_error(scores, heat, attempt(drawn, lambda: seeded(unrolled.ledger, x))) < 1e-9
        check_gradients(drawn, scores, heat)
    copies = [copy.deepcopy(unrolled)]
    if not any(map(parametrize.is_parametrized, drawn.model.modules())):  # which torch does not pickle
        copies.append(pickle.loads(pickle.dumps(unrolled)))
    for other in copies:
        assert_same(seeded(other, x), result)
    attempt(drawn, lambda: unrolled(x)[1].detach())  # with gradients


def check_gradients(drawn: Drawn, scores: Tensor, heat: Tensor) -> None:
    """Where no random numbers are drawn, and the network has a gradient of its own."""
    if drawn.draws:
        return
    with evaluating(drawn.model):
        try:
            expected, product = input_times_gradient(drawn.logits, plain(drawn.images))
        except RuntimeError:  # it overwrites what its gradient needs, or was made in inference mode
            return
        finally:
            seeded(drawn.logits, plain(drawn.images))  # so that copies can be made of weights that hooks compute
    assert error(scores, expected) < 1e-9
    if not drawn.gated:
        assert error(heat, product) < 1e-9


# --- split


def check_split(drawn: Drawn) -> None:
    x = drawn.images
    clf = attempt(drawn, lambda: split(drawn.model, example=drawn.example), draws=False)
    try:
        expected = seeded(copy.deepcopy(drawn).logits, plain(x))
    except ValueError:  # batch normalisation of single numbers, in training
        return
    if isinstance(clf, Exception):
        assert drawn.is_tuple, clf
        return
    found = seeded(copy.deepcopy(clf), x)
    if x.dtype == torch.float64:
        assert_close(found, expected)
        check_trunk(drawn)
    maps = attempt(drawn, lambda: cam(clf, x))
    if isinstance(maps, Exception):
        assert not drawn.average or drawn.names[-5].endswith("of the head"), maps
    elif x.dtype == torch.float64 and "evaluation" in drawn.names:
        bias = getattr(clf.linear, "bias", None)
        assert_close(maps.mean((2, 3)) + (0 if bias is None else bias), expected)
    tags = torch.ones(len(x), expected.shape[1])
    for method in (
        lambda: grad_cam(clf, x, weighting="gradcam++"),
        lambda: advcam(clf, x, [0], steps=1),
        lambda: rib(clf, x, tags, companions=[(x[:1], tags[:1])], steps=1),
    ):
        result = attempt(drawn, method)
        assert not isinstance(result, Exception) or any(word in str(result) for word in HOPELESS), result


def check_trunk(drawn: Drawn) -> None:
    """Grad-CAM at the last layer of the trunk, by its definition."""
    trunk = net_in(drawn.model).trunk
    found = attempt(drawn, lambda: grad_cam(drawn.model, drawn.images, layer=trunk, norm="raw"))
    own, seen = copy.deepcopy(drawn), []
    net_in(own.model).trunk.register_forward_hook(lambda module, images, maps: seen.append(maps) or maps.clone())
    torch.manual_seed(0)
    try:
        logits = own.logits(plain(own.images).requires_grad_())
        each = [torch.autograd.grad(s.sum(), seen[0], retain_graph=True, materialize_grads=True)[0] for s in logits.T]
    except RuntimeError:  # as above
        return
    expected = [(gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1) for gradient in each]
    assert_close(found, torch.stack(expected, 1))


def net_in(model: nn.Module) -> Net:
    return next(module for module in model.modules() if isinstance(module, Net))


# --- tests


@settings(max_examples=10)
@given(networks())
def test_unrolled_networks(drawn: Drawn) -> None:
    check_unrolled(drawn)


@settings(max_examples=8)
@given(networks())
def test_split_networks(drawn: Drawn) -> None:
    check_split(drawn)
