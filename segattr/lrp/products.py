"""Sums and products: a summand that is no signal is a shift, and so is a factor that is no signal a constant."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segattr.lrp.adjoints import Adjoint, Linearised, adjoint, held
from segattr.lrp.call import Call


def scaled(factor: Tensor, x: Tensor) -> Adjoint:
    """The adjoint of a product with a factor that broadcasts against the signal, or the signal against it."""

    shape = x.shape

    def back(gradient: Tensor) -> Tensor:
        per_class = factor.unsqueeze(1) if factor.dim() + 1 == gradient.dim() else factor
        return summed(gradient * per_class, shape)

    return back


def summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Summed over the axes along which the signal, of this shape, was repeated."""
    if gradient.shape[:1] + gradient.shape[2:] == shape:
        return gradient
    first = gradient.movedim(1, 0)
    missing = first.dim() - 1 - len(shape)
    total = first.sum_to_size(len(first), *[1] * missing, *shape)
    return total.reshape(len(first), *shape).movedim(0, 1)


# --- sums


@adjoint("add", "sub", "subtract", "rsub")
def add(x: Any, y: Any, *, alpha: float = 1, call: Call, roles: Any) -> Linearised:
    output = call(x, y) if alpha == 1 else call(x, y, alpha=alpha)
    signs = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[call.kind]
    carried = [(v.shape, sign) for v, sign, role in zip((x, y), signs, roles, strict=True) if role == "signal"]
    others = [sign * v for v, sign, role in zip((x, y), signs, roles, strict=True) if role != "signal"]

    def back(gradient: Tensor) -> list[Tensor]:
        return [summed(gradient if sign == 1 else sign * gradient, shape) for shape, sign in carried]

    return Linearised(output, back, shifts(others, output))


def shifts(values: list[Any], output: Tensor) -> dict[str, Tensor]:
    """Of a number or tensor that is added to an output, with as many axes as that; none of a 0."""
    found = {}
    for value in values:
        if isinstance(value, Tensor) or value != 0:
            value = torch.as_tensor(value, dtype=output.dtype, device=output.device)
            found["constant"] = value.reshape(*[1] * (output.dim() - value.dim()), *value.shape)
    return found


# --- products


@adjoint("mul", "multiply")
def mul(x: Any, y: Any, *, roles: Any) -> Linearised:
    signal, factor, role = (x, y, roles[1]) if roles[0] == "signal" else (y, x, roles[0])
    factor = held(factor, role)
    if not isinstance(factor, Tensor):
        return Linearised(x * y, lambda gradient: gradient * factor)
    return Linearised(x * y, scaled(factor, signal))


@adjoint("div", "divide", "truediv", "true_divide")
def div(x: Tensor, y: Any, *, rounding_mode: None = None, roles: Any) -> Linearised:
    divisor = held(y, roles[1])
    if not isinstance(divisor, Tensor):
        return Linearised(x / y, lambda gradient: gradient / divisor)
    return Linearised(x / y, scaled(1 / divisor, x))


@adjoint("scaled_dot_product_attention")
def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Linearised:
    """Of values; the weights are those that it gives to unit vectors."""
    output = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    with torch.no_grad():
        units = torch.eye(value.shape[-2], dtype=value.dtype, device=value.device)
        units = units.expand(*value.shape[:-2], -1, -1)
        weights = F.scaled_dot_product_attention(query, key, units, *args, **kwargs)
    transposed = weights.transpose(-2, -1).unsqueeze(1)
    if weights.shape[:-2] == value.shape[:-2]:
        return Linearised(output, lambda gradient: transposed @ gradient)
    return Linearised(output, lambda gradient: _grouped(transposed @ gradient, value))


def _grouped(gradient: Tensor, value: Tensor) -> Tensor:
    """Of heads that share their values."""
    heads = value.shape[-3]
    return gradient.unflatten(-3, (heads, -1)).sum(-3)


@adjoint("glu")
def glu(x: Tensor, dim: int = -1) -> Linearised:
    """The first half carries, the sigmoid of the second one is its gate."""
    axis = dim % x.dim()
    gate = x.chunk(2, axis)[1].detach().sigmoid().unsqueeze(1)

    def back(gradient: Tensor) -> Tensor:
        carried = gradient * gate
        return torch.cat([carried, torch.zeros_like(carried)], axis + (axis > 0))

    return Linearised(F.glu(x, dim), back)
