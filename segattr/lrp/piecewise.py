"""Operations that are linear on each side of a bound: gradients pass by the side that the input is on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segattr.lrp.adjoints import Linearised, adjoint
from segattr.lrp.call import Call
from segattr.lrp.products import scaled, shifts, summed
from segattr.lrp.structure import local_map


@adjoint("leaky_relu")
def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Linearised:
    factor = torch.ones_like(x).masked_fill(x <= 0, negative_slope)
    return Linearised(F.leaky_relu(x, negative_slope), scaled(factor, x))


@adjoint("rrelu")
def rrelu(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Linearised:
    return leaky_relu(x, (lower + upper) / 2)


@adjoint("prelu")
def prelu(x: Tensor, weight: Tensor) -> Linearised:
    slope = weight if x.dim() < 2 else weight.view(-1, *[1] * (x.dim() - 2))
    return Linearised(F.prelu(x, weight), scaled(torch.where(x > 0, torch.ones_like(x), slope), x))


@adjoint("abs", "absolute")
def absolute(x: Tensor) -> Linearised:
    return Linearised(x.abs(), scaled(x.sign().detach(), x))


@adjoint("threshold")
def threshold(x: Tensor, threshold: float, value: float, inplace: bool = False) -> Linearised:
    return clipped(x, F.threshold(x, threshold, value), x > threshold)


# --- bounds


def clipped(x: Tensor, output: Tensor, inside: Tensor) -> Linearised:
    """An operation that passes numbers inside of its bounds, and gives constants outside."""
    saturation = output.masked_fill(inside, 0)
    return Linearised(output, scaled(inside, x), {"saturation": saturation})


@adjoint("relu6")
def relu6(x: Tensor, inplace: bool = False) -> Linearised:
    return hardtanh(x, 0.0, 6.0)


@adjoint("hardtanh")
def hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Linearised:
    return clipped(x, F.hardtanh(x, min_val, max_val), (x > min_val) & (x < max_val))


@adjoint("clamp", "clip")
def clamp(x: Tensor, min: Any = None, max: Any = None) -> Linearised:
    inside = torch.ones_like(x, dtype=torch.bool)
    if min is not None:
        inside = inside & (x >= min)
    if max is not None:
        inside = inside & (x <= max)
    return clipped(x, x.clamp(min, max), inside)


@adjoint("clamp_min")
def clamp_min(x: Tensor, min: Any) -> Linearised:
    return clamp(x, min)


@adjoint("clamp_max")
def clamp_max(x: Tensor, max: Any) -> Linearised:
    return clamp(x, None, max)


# --- the larger and the smaller one


@adjoint("maximum", "minimum", "fmax", "fmin")
def larger(x: Tensor, y: Tensor, *, call: Call, roles: Any) -> Linearised:
    """Each number goes back to the one that it is of, to both in equal parts if they are equal."""
    output = call(x, y)
    first = ((output == x).to(output.dtype) + 1 - (output == y).to(output.dtype)) / 2
    shares = [(x, first, roles[0]), (y, 1 - first, roles[1])]
    carried = [(v.shape, share) for v, share, role in shares if role == "signal"]
    constants = [share * v for v, share, role in shares if role != "signal"]

    def back(gradient: Tensor) -> list[Tensor]:
        return [summed(gradient * share.unsqueeze(1), shape) for shape, share in carried]

    return Linearised(output, back, shifts(constants, output))


@adjoint("max", "min")
def extreme(x: Tensor, *args: Any, call: Call, roles: Any, **kwargs: Any) -> Linearised:
    """Over an axis, or of two tensors."""
    if len(args) == 1 and isinstance(args[0], Tensor):
        return larger(x, *args, call=call, roles=roles)
    return local_map(x, *args, call=call, roles=roles, **kwargs)


@adjoint("amax", "amin")
def extremes(x: Tensor, *args: Any, call: Call, roles: Any, **kwargs: Any) -> Linearised:
    return local_map(x, *args, call=call, roles=roles, **kwargs)
