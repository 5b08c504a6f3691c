"""How the methods of segattr fare on a network: each against what is computed of the network itself by other means."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from segattr import advcam, cam, grad_cam, lrp, split
from segattr.networks.classifier import Classifier

METHODS = ("split", "cam", "grad_cam", "advcam", "unroll")
CLASSES = [0, 3]  # that maps are made of
TOLERANCE = 1e-9  # of the largest value: rounding errors of float64
_STEP = 0.08  # of AdvCAM, its default
_GATES = frozenset(
    ("silu", "gelu", "hardswish", "mish", "sigmoid", "hardsigmoid", "softmax", "tanh", "elu", "softplus", "exp")
    + ("layer_norm", "group_norm", "rms_norm", "normalize", "norm", "var", "var_mean", "std", "rsqrt", "sqrt", "pow")
    + ("square", "reciprocal", "log", "scaled_dot_product_attention", "multi_head_attention_forward")
)
_PRODUCTS = frozenset(("mul", "matmul", "bmm", "div", "truediv", "einsum", "baddbmm", "mm", "addcmul"))


class Wrong(Exception):
    """What a method gave is not what the network says."""


class Refused(Exception):
    """A method says, later, why it cannot be done."""


class Unknown(Exception):
    """The network cannot be asked."""


def judge(model: nn.Module, images: Tensor, methods: list[str]) -> dict[str, str]:
    """``"right"``, or what is wrong or why it was refused, by method."""
    found = {}
    clf = None
    if methods != ["unroll"]:
        found["split"], clf = _verdict(model, lambda: split(model), lambda clf: _check_split(model, images, clf))
    for name in methods:
        if name == "unroll":
            found[name], _ = _verdict(
                model, lambda: _unrolled(model, images), lambda r: _check_unroll(model, images, r)
            )
        elif name != "split":
            found[name] = found["split"] if clf is None else _of_classifier(name, model, images, clf)
    return found


def _of_classifier(name: str, model: nn.Module, images: Tensor, clf: Classifier) -> str:
    call, check = _MAPS[name]
    return _verdict(model, lambda: call(clf, images, CLASSES), lambda maps: check(model, images, clf, maps))[0]


def _verdict(model: nn.Module, call: Callable[[], Any], check: Callable[[Any], None]) -> tuple[str, Any]:
    """Whether a call is refused, what it gave is wrong, or the network is another afterwards; and what it gave."""
    before = dict(_state(model))
    try:
        result = call()
    except (TypeError, ValueError) as error:
        return f"refused: {error}", None
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}", None
    after = dict(_state(model))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        return f"wrong: leaves {', '.join(changed[:4])}", result
    try:
        check(result)
    except Refused as error:
        return f"refused: {error}", None
    except Wrong as error:
        return f"wrong: {error}", result
    except Unknown as error:
        return f"unknown: {error}", result
    return "right", result


def _state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that a call could change: tensors, modes, attributes and what is in their containers, random numbers."""
    yield "random numbers", (random.getstate(), torch.get_rng_state().tolist())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, (id(tensor), float(tensor.detach().double().sum()), tensor.requires_grad, tensor.grad is None)
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, set)) else ()
            yield f"{path}.{name}", (id(value), [id(entry) for entry in inner])


# --- what the network itself says


class _Watch(TorchFunctionMode):
    """Finds the result of a function of torch that is a given feature map, in any layout, while a network runs."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps
        self.found: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None
        self.given: Tensor | None = None  # to the network in its place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.found and args and args[0] is self.given and "relu" in str(getattr(func, "__name__", func)):
            self.found = result, self.found[1]  # of numbers that were positive: the map is behind it
        if not isinstance(result, Tensor) or not result.is_floating_point() or self.found:
            return result
        with torch._C.DisableTorchFunction():
            turn = next((turn for turn in _layouts(self.maps.shape) if self._is_it(result, turn)), None)
            if turn is None:
                return result
            self.found, self.given = (result, turn), result.clone()  # which the network may overwrite
            return self.given

    def _is_it(self, result: Tensor, turn: Callable[[Tensor], Tensor]) -> bool:
        try:
            maps = turn(result)
        except (RuntimeError, IndexError):
            return False
        same = maps.shape == self.maps.shape and maps.dtype == self.maps.dtype
        return same and _near(maps.detach(), self.maps)


def _layouts(shape: tuple[int, ...]) -> Iterator[Callable[[Tensor], Tensor]]:
    """From what may hold a map to the map: channels first or last, tokens in either order, others before them."""
    h, w = shape[2:]
    yield lambda x: x
    yield lambda x: x.permute(0, 3, 1, 2)
    yield lambda x: x[:, -h * w :].mT.unflatten(2, (h, w))
    yield lambda x: x[..., -h * w :].unflatten(2, (h, w))


def _gradients(model: nn.Module, images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The feature map in a run of the network, autograd's gradients of the logits there, ``[n, B, D, h, w]``, logits.

    Of the logits whose numbers are in ``CLASSES``.
    """
    with torch.enable_grad(), _Watch(maps) as watch:
        output = logits(model(images))
    if watch.found is None:
        raise Unknown("its feature map is the result of no function of the network")
    tensor, turn = watch.found
    each = [torch.autograd.grad(output[:, c].sum(), tensor, retain_graph=True)[0] for c in CLASSES]
    return turn(tensor).detach(), torch.stack([turn(gradient) for gradient in each]), output.detach()


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _near(one: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> bool:
    return torch.allclose(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    if found.shape != expected.shape:
        raise Wrong(f"{what}: {list(found.shape)}, expected {list(expected.shape)}")
    if not _near(found, expected, tolerance):
        error = float((found - expected).abs().max() / expected.abs().max())
        raise Wrong(f"{what}: relative error {error:.1e}")


# --- the methods


def _check_split(model: nn.Module, images: Tensor, clf: Classifier) -> None:
    try:
        maps = _maps(clf, images)  # some networks are read only when the first images come
    except (TypeError, ValueError) as error:
        raise Refused(str(error)) from error
    with torch.no_grad():
        _compare("logits", clf(images), logits(model(images)))
    (height, width), (h, w) = images.shape[2:], maps.shape[2:]
    if h * w < 2:
        raise Wrong(f"maps of {h} x {w}")
    if abs(h - w * height / width) > 1 and h != w:  # some networks bring maps to a square
        raise Wrong(f"maps of {h} x {w} of images of {height} x {width}")


def _maps(clf: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        features = clf.features(images)
    return features[0] if isinstance(features, tuple) else features


def _check_cam(model: nn.Module, images: Tensor, clf: Classifier, found: Tensor) -> None:
    """The head is the last layer of the network that gives as many results as there are logits."""
    layers: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda layer, _, result: layers.append((layer, result)))
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    features, _, output = _gradients(model, images, _maps(clf, images))
    for hook in hooks:
        hook.remove()
    layer = next(layer for layer, result in layers[::-1] if result.shape[1] == output.shape[1])
    weight, bias = layer.weight.flatten(1), layer.bias
    maps = torch.einsum("kd,bdhw->bkhw", weight, features).detach()
    _compare("logits as means of maps", maps.mean((2, 3)) + (0 if bias is None else bias.detach()), output)
    _compare("maps", found.detach(), maps[:, CLASSES])


def _check_grad_cam(model: nn.Module, images: Tensor, clf: Classifier, found: Tensor) -> None:
    _compare("maps", found.detach(), _by_autograd(model, images, clf))
    if not found.any():
        raise Wrong("maps are 0")


def _by_autograd(model: nn.Module, images: Tensor, clf: Classifier) -> Tensor:
    """Grad-CAM, raw."""
    features, gradients, _ = _gradients(model, images, _maps(clf, images))
    return torch.einsum("nbd,bdhw->bnhw", gradients.mean((3, 4)), features)


def _check_advcam(model: nn.Module, images: Tensor, clf: Classifier, found: Tensor) -> None:
    """With one step: the sum of the maps of the images and of those after it."""
    first = _by_autograd(model, images, clf)
    expected = []
    for place, c in enumerate(CLASSES):
        x = images.clone().requires_grad_()
        output = logits(model(x))
        (gradient,) = torch.autograd.grad((2 * output[:, c] - output.sum(1)).sum(), x)
        size = (1, 2, 3)
        step = _STEP * gradient / gradient.abs().amax(size, keepdim=True)
        moved = (images + step).clamp(images.amin(size, keepdim=True), images.amax(size, keepdim=True))
        second = _by_autograd(model, moved, clf)
        expected.append(first[:, place].relu() + second[:, place].relu())
    maps = torch.stack(expected, 1)
    # Of the gradient at the images the rounding errors are those of the whole network.
    _compare("maps", found, maps * maps.shape[2] * maps.shape[3], 1e3 * TOLERANCE)


def _unrolled(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    unrolled: Any = lrp.unroll(model)
    with torch.no_grad():
        scores, heat = unrolled(images, CLASSES)
        return scores, heat, unrolled.ledger(images)


def _check_unroll(model: nn.Module, images: Tensor, found: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    scores, heat, ledger = found
    x = images.clone().requires_grad_()
    with _Gates() as gates:
        constants = {name: parameter.detach() for name, parameter in model.named_parameters()}
        output = logits(functional_call(model, constants, (x,)))
    _compare("scores", scores, output.detach())
    absorbed = [entry[:, CLASSES] for entry in ledger.values()]
    terms = torch.stack([heat.sum((2, 3)), *absorbed, -scores[:, CLASSES]])
    tolerance = 1e-6 if gates.single else TOLERANCE
    if float(terms.sum(0).abs().max()) > tolerance * float(terms.abs().max()):
        raise Wrong(f"score - heat - ledger: {float(terms.sum(0).abs().max() / terms.abs().max()):.1e} of the largest")
    if not gates.found:
        each = [torch.autograd.grad(output[:, c].sum(), x, retain_graph=True)[0] for c in CLASSES]
        _compare("gradient x input", heat, torch.stack([(images * gradient).sum(1) for gradient in each], 1))


class _Gates(TorchFunctionMode):
    """Whether a network is not piecewise linear: a gate, a norm, or a product of two results that depend on images.

    And whether it computes some of them in single precision, whatever that of the images is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = self.single = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = str(getattr(func, "__name__", func)).strip("_").removeprefix("i")
        factors = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        self.single |= kind == "float"
        self.found |= kind in _GATES or (kind in _PRODUCTS and len(factors) > 1)
        return func(*args, **(kwargs or {}))


_MAPS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "cam": (cam, _check_cam),
    "grad_cam": (lambda clf, images, classes: grad_cam(clf, images, classes, norm="raw"), _check_grad_cam),
    "advcam": (lambda clf, images, classes: advcam(clf, images, classes, steps=1), _check_advcam),
}
