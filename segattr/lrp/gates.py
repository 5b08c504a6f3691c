"""Operations that are a factor times their input: the factor is a gate, held constant."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segattr.lrp.adjoints import Linearised, adjoint, channels, last_axis
from segattr.lrp.call import Call
from segattr.lrp.products import attention, glu, scaled

# --- activations


@adjoint(
    *("silu", "gelu", "hardswish", "mish", "tanh", "elu", "celu", "selu", "softplus", "logsigmoid", "softsign"),
    *("hardshrink", "softshrink", "tanhshrink", "log_sigmoid"),
)
def activation(x: Tensor, *args: Any, call: Call, **kwargs: Any) -> Linearised:
    r"""f(x) as x g(x) + f(0), with the slope of the line from 0 as gate, :math:`g(x) = (f(x) - f(0)) / x`."""
    output = call(x, *args, **kwargs)
    with torch.no_grad():
        at_zero = call(x.new_zeros(()), *args, **kwargs)
        step = torch.finfo(x.dtype).eps ** 0.5
        somewhere = torch.where(x == 0, step, x)  # at 0 the slope of the function itself
        gate = (call(somewhere, *args, **kwargs) - at_zero) / somewhere
    shifts = {"at_zero": at_zero.reshape([1] * x.dim())} if call.kind in _NOT_ZERO else {}
    return Linearised(output, scaled(gate, x), shifts)


_NOT_ZERO = ("softplus", "logsigmoid", "log_sigmoid")


@adjoint("pow", "float_power", "square")
def power(x: Tensor, exponent: Any = 2, *, call: Call, roles: Any) -> Linearised:
    r"""x times :math:`x^{p - 1}`."""
    output = call(x, exponent) if len(roles) > 1 else call(x)
    gate = torch.where(x == 0, 0, output / torch.where(x == 0, 1, x)).detach()
    return Linearised(output, scaled(gate, x))


# --- normalisation by statistics of the input: the mean carries relevance, the deviation is a gate


@adjoint("layer_norm")
def layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Linearised:
    axes = tuple(range(-len(normalized_shape), 0))
    gate = (x.detach().var(axes, correction=0, keepdim=True) + eps).rsqrt().unsqueeze(1)

    def back(gradient: Tensor) -> Tensor:
        gradient = gradient * gate if weight is None else gradient * weight * gate
        return gradient - gradient.mean(axes, keepdim=True)

    output = F.layer_norm(x, normalized_shape, weight, bias, eps)
    return Linearised(output, back, {} if bias is None else {"bias": last_axis(bias, output)})


@adjoint("rms_norm")
def rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Linearised:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    gate = (x.detach().square().mean(axes, keepdim=True) + eps).rsqrt().unsqueeze(1)
    output = F.rms_norm(x, normalized_shape, weight, eps)
    return Linearised(output, lambda gradient: (gradient if weight is None else gradient * weight) * gate)


@adjoint("group_norm")
def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Linearised:
    grouped = x.detach().reshape(len(x), num_groups, -1)
    gate = (grouped.var(2, correction=0, keepdim=True) + eps).rsqrt().unsqueeze(1)

    def back(gradient: Tensor) -> Tensor:
        if weight is not None:
            gradient = gradient * channels(weight, gradient)
        groups = gradient.reshape(*gradient.shape[:2], num_groups, -1) * gate
        return (groups - groups.mean(3, keepdim=True)).reshape(gradient.shape)

    # Torch's backward pass of a few channels that lie last in memory ends the process.
    output = F.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    return Linearised(output, back, {} if bias is None else {"bias": bias})


@adjoint("instance_norm")
def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Linearised:
    if not use_input_stats:
        return functional_batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    return group_norm(x, x.shape[1], weight, bias, eps)


@adjoint("batch_norm")
def functional_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Linearised:
    if training or running_mean is None or running_var is None:
        raise ValueError("expected running statistics, got those of the batch")
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    output = F.batch_norm(x, running_mean, running_var, weight, bias, training=False, eps=eps)
    shifts = {"mean_shift": -running_mean * scale} | ({} if bias is None else {"bias": bias})
    return Linearised(output, lambda gradient: gradient * channels(scale, gradient), shifts, scale, weighted=True)


GATED = (activation, power, layer_norm, rms_norm, group_norm, attention, glu)  # rules with a gate made of the input
