"""One adjoint per operation of a classifier: how gradients of all class scores pass through it, in one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple

from segattr.lrp.subpixel import SubPixel

Adjoint = Callable[[Any], Tensor | Sequence[Tensor]]


@dataclass
class Layer:
    """A layer with weights, as a rule of LRP sees it.

    Args:
        x: its input.
        unscaled: its weight.
        shifts: what it adds to its output, as in :class:`Linearised`.
        output: what it gives.
        linear: from an input and a weight to the output without a bias.
        back: the transposed map, from ``[B, K, *out]`` and a weight to ``[B, K, *in]``.
        scale: of a batch normalisation that comes next, for each channel of the output.
        nonnegative: whether no input is below 0.
    """

    x: Tensor
    unscaled: Tensor
    shifts: dict[str, Tensor]
    output: Tensor
    linear: Callable[[Tensor, Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    scale: Tensor | None = None
    nonnegative: bool = False

    @property
    def weight(self) -> Tensor:
        """With the scale."""
        if self.scale is None:
            return self.unscaled
        return self.unscaled * self.scale.view(-1, *[1] * (self.unscaled.dim() - 1))

    @property
    def bias(self) -> Tensor | None:
        """All that it adds, as it broadcasts against the output."""
        if not self.shifts:
            return None
        total = torch.stack([*self.shifts.values()]).sum(0)
        return total.view(-1, *[1] * (self.output.dim() - 2)) if total.dim() == 1 else total

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With another input, weight and bias."""
        output = self.linear(x, weight)
        return output if bias is None else output + bias


@dataclass
class Linearised:
    """The output of an operation, and the linear map that the operation is at its inputs.

    Args:
        output: ``[B, *out]``, or a sequence of such tensors.
        adjoint: from the gradients of the scores at the output, ``[B, K, *out]``, or a sequence of them, to those at
            the inputs that relevance goes to, ``[B, K, *in]``; one, or a tuple of as many as there are such inputs.
        shifts: what the operation adds to its output whatever its input is, by name: per channel, ``[C]``, or of
            another shape that broadcasts against the output.
        scale: of an operation that only scales and shifts channels, ``[C]``.
        weighted: whether it is a layer in the sense of LRP-epsilon, weighted sums of its input.
        layer: what rules of LRP other than epsilon need of it; None for an operation without weights.
    """

    output: Any
    adjoint: Adjoint
    shifts: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None
    weighted: bool = False
    layer: Layer | None = None


Rule = Callable[..., Linearised]
RULES: dict[type | str, Rule] = {}  # by type of a module, or by what a function or method is called


def adjoint(*operations: Any) -> Callable[[Rule], Rule]:
    """Registers the rule of operations: types of modules, functions of torch, or names of these.

    A rule is called with the arguments of the operation, after the module itself if that is what it is. It runs the
    operation, not in place, and returns a :class:`Linearised`. What it saves for the adjoint, such as masks and the
    indices of a maximum, is constant: the operation must be linear around its input, up to a constant shift. A module
    with a rule is not looked into.

    Args:
        operations: types of modules, functions such as ``torch.relu``, or names such as ``"relu"``, which stands for
            the function, the method and ``relu_``; a later rule of the same operation takes the place of the earlier
            one.

    Returns:
        The decorator, which gives back the rule.

    Raises:
        TypeError: no operation, or one that is neither callable nor a name.

    Example:
        >>> class Scale(nn.Module):
        ...     def forward(self, x):
        ...         return 3 * x
        >>> @adjoint(Scale)
        ... def scale(module, x):
        ...     return Linearised(module(x), lambda gradient: 3 * gradient)
    """
    if not operations or not all(callable(operation) or isinstance(operation, str) for operation in operations):
        raise TypeError(f"operations: expected types of modules, functions or names of methods, got {operations}")

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(map(_key, operations), rule))
        return rule

    return register


def _key(operation: Any) -> type | str:
    if isinstance(operation, type):
        return operation
    return str(operation if isinstance(operation, str) else operation.__name__).strip("_")


def held(value: Any, role: str) -> Any:
    """What an adjoint may use of an argument: as it is if it is free of the image, as a constant otherwise."""
    return value.detach() if isinstance(value, Tensor) and role == "gate" else value


def images(function: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
    """Applies a function of batches ``[N, ...]`` to ``[B, K, ...]``."""
    return function(gradient.flatten(0, 1)).unflatten(0, gradient.shape[:2])


# --- affine operations


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@adjoint(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    norm: Callable[[Tensor], Linearised] | None = None,
    roles: Any = (),
) -> Linearised:
    """The transposed convolution with the same weight; output padding brings back the size of the input.

    ``norm``, a batch normalisation that comes next, is folded into the adjoint.
    """
    count = weight.dim() - 2
    stride, dilation = _ntuple(count)(stride), _ntuple(count)(dilation)
    padding = _explicit_padding(padding, weight.shape[2:], dilation)
    output = _CONVOLUTIONS[count](x, weight, bias, stride, padding, dilation, groups)
    smallest = [
        (o - 1) * s - 2 * p + d * (k - 1) + 1
        for o, s, p, d, k in zip(output.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    ]
    size = tuple(x.shape[2:])  # not the input, which adjoints would keep
    rest = [n - least for n, least in zip(size, smallest, strict=True)]
    weight = held(weight, *roles[1:2] or ("free",))
    shifts = {} if bias is None else {"bias": bias}
    scale = None
    if norm is not None:
        normalised = norm(output)
        assert normalised.scale is not None
        output, scale = normalised.output, normalised.scale
        shifts = {name: scale * shift for name, shift in shifts.items()}
        shifts.update({f"norm.{name}": shift for name, shift in normalised.shifts.items()})

    to_image = count > 1 and x.shape[1] <= 4 and min(stride) > 1 and groups == 1 and max(dilation) == 1

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return _CONVOLUTIONS[count](x, weight, None, stride, padding, dilation, groups)

    # The same numbers: by products of matrices, which torch is up to twice as fast at.
    of_pixels = count > 1 and weight.shape[2:].numel() == 1 and groups == 1 and not any(padding)

    def transposed(gradient: Tensor, weight: Tensor) -> Tensor:
        if to_image:
            return SubPixel.apply(gradient, weight, stride, padding, size)
        if of_pixels:
            return spread((weight.flatten(1).mT @ gradient.flatten(2)).unflatten(2, gradient.shape[2:]), stride, rest)
        return _TRANSPOSED[count](gradient, weight, None, stride, padding, rest, groups, dilation)

    return _layer(x, weight, output, shifts, linear, transposed, scale)


def spread(low: Tensor, stride: Sequence[int], rest: Sequence[int]) -> Tensor:
    """Pixels with zeros between and after them, as a transposed convolution with a stride leaves them."""
    if all(s == 1 for s in stride):
        return low
    places = low.reshape(*low.shape[:2], *(n for size in low.shape[2:] for n in (size, 1)))
    wide = F.pad(places, [n for s in reversed(stride) for n in (0, s - 1, 0, 0)])
    full = wide.reshape(*low.shape[:2], *(size * s for size, s in zip(low.shape[2:], stride, strict=True)))
    return F.pad(full, [n for s, r in zip(reversed(stride), reversed(rest), strict=True) for n in (0, r + 1 - s)])


def _layer(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    shifts: dict[str, Tensor],
    linear: Callable[[Tensor, Tensor], Tensor],
    transposed: Callable[[Tensor, Tensor], Tensor],
    scale: Tensor | None = None,
) -> Linearised:
    """A convolution, by its map of batches and the transposed one.

    A scale is made part of the weight, or of the gradients where these are small enough: scaled weights of deep layers
    would take most of the memory.
    """

    def back(gradient: Tensor, weight: Tensor) -> Tensor:
        return images(lambda g: transposed(g, weight), gradient)

    layer = Layer(x, weight, shifts, output, linear, back, scale)
    if scale is None or weight.numel() <= 8 * output.numel():
        weight, scale = layer.weight, None

    def adjoint(gradient: Tensor) -> Tensor:
        return back(gradient if scale is None else gradient * channels(scale, gradient), weight)

    return Linearised(output, adjoint, shifts, weighted=True, layer=layer)


@adjoint(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution_module(module: nn.Conv2d, x: Tensor, **norm: Any) -> Linearised:
    settings = module.stride, module.padding, module.dilation, module.groups
    return convolution(x, module.weight, module.bias, *settings, **norm)


def _explicit_padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError("expected padding='same' with odd kernels, as other padding is not symmetric")
        return tuple(t // 2 for t in total)
    return _ntuple(len(kernel))(0 if padding == "valid" else padding)


@adjoint(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    roles: Any = (),
) -> Linearised:
    """The convolution with the same weight."""
    count = weight.dim() - 2
    output = _TRANSPOSED[count](x, weight, bias, stride, padding, output_padding, groups, dilation)
    weight = held(weight, *roles[1:2] or ("free",))

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return _TRANSPOSED[count](x, weight, None, stride, padding, output_padding, groups, dilation)

    def convolved(gradient: Tensor, weight: Tensor) -> Tensor:
        return _CONVOLUTIONS[count](gradient, weight, None, stride, padding, dilation, groups)

    return _layer(x, weight, output, {} if bias is None else {"bias": bias}, linear, convolved)


@adjoint(F.linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, roles: Any = ()) -> Linearised:
    output = F.linear(x, weight, bias)
    weight = held(weight, *roles[1:2] or ("free",))
    shifts = {} if bias is None else {"bias": last_axis(bias, output)}
    layer = Layer(x, weight, shifts, output, F.linear, lambda gradient, weight: gradient @ weight)
    return Linearised(output, lambda gradient: gradient @ weight, shifts, weighted=True, layer=layer)


@adjoint(nn.Linear)
def _linear(module: nn.Linear, x: Tensor) -> Linearised:
    return linear(x, module.weight, module.bias)


def last_axis(values: Tensor, output: Tensor) -> Tensor:
    """Values along the last axes of an output, with as many axes as it has."""
    return values if output.dim() == 2 else values.view(*[1] * (output.dim() - values.dim()), *values.shape)


@adjoint(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm(module: nn.BatchNorm2d, x: Tensor) -> Linearised:
    """With running statistics, whatever the mode of the module."""
    if module.running_mean is None or module.running_var is None:
        raise ValueError("expected running statistics, got track_running_stats=False")
    return normalise(module, x, module.running_mean, module.running_var)


def normalise(module: nn.BatchNorm2d, x: Tensor, mean: Tensor, variance: Tensor) -> Linearised:
    """Batch normalisation by constant statistics: a scale and shifts per channel."""
    scale = (variance + module.eps).rsqrt()
    if module.affine:
        scale = scale * module.weight
    output = F.batch_norm(x, mean, variance, module.weight, module.bias, training=False, eps=module.eps)
    shifts = {"mean_shift": -mean * scale, **({"bias": module.bias} if module.affine else {})}
    return Linearised(output, lambda gradient: gradient * channels(scale, gradient), shifts, scale, weighted=True)


def batch_statistics(module: nn.BatchNorm2d, x: Tensor) -> Linearised:
    """With the statistics of the batch, as constants, in training mode, where running statistics follow them once."""
    if not module.training:
        return batch_norm(module, x)
    with torch.no_grad():
        axes = [axis for axis in range(x.dim()) if axis != 1]
        half = x.dtype in (torch.float16, torch.bfloat16)
        variance, mean = torch.var_mean(x.float() if half else x, axes, correction=0)
        if (
            module.running_mean is not None
            and module.running_var is not None
            and module.num_batches_tracked is not None
        ):
            module.num_batches_tracked += 1
            momentum = 1 / module.num_batches_tracked if module.momentum is None else module.momentum
            count = x.numel() // x.shape[1]
            module.running_mean.lerp_(mean, momentum)
            module.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
    return normalise(module, x, mean, variance)


def channels(values: Tensor, gradient: Tensor) -> Tensor:
    """Values per channel ``[C]`` that broadcast against ``[B, K, C, *spatial]``."""
    return values.view(-1, *[1] * (gradient.dim() - 3))


# --- activations


@adjoint(F.relu)
def relu(x: Tensor, inplace: bool = False) -> Linearised:
    """Gradients pass where the output is positive: the Heaviside function of the input."""
    output = F.relu(x)
    mask = (output > 0).unsqueeze(1)
    return Linearised(output, lambda gradient: gradient * mask)


@adjoint(nn.ReLU)
def relu_module(module: nn.ReLU, x: Tensor) -> Linearised:
    return relu(x)


def untied_relu(*args: Any, **kwargs: Any) -> Linearised:
    """The activation of a decoder that is not tied in it: ReLU of the gradients themselves."""
    (x,) = (argument for argument in args if isinstance(argument, Tensor))
    return Linearised(F.relu(x), F.relu)


@adjoint(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
def dropout(module: nn.Dropout, x: Tensor) -> Linearised:
    """The mask that was drawn, and its scale."""
    if not module.training:
        return identity(x)
    mask = module(torch.ones_like(x))
    return Linearised(x * mask, lambda gradient: gradient * mask.unsqueeze(1))


@adjoint("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def functional_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Linearised:
    if training:
        raise ValueError("expected dropout in training mode to be a module, got F.dropout, whose mask cannot be had")
    return identity(x)


def identity(x: Tensor) -> Linearised:
    return Linearised(x, lambda gradient: gradient)


@adjoint(nn.Identity)
def identity_module(module: nn.Identity, x: Tensor) -> Linearised:
    return identity(x)


# --- pooling


@adjoint(F.max_pool1d, F.max_pool2d, F.max_pool3d)
def max_pool(x: Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> Linearised:
    """Gradients go back to where the maxima were; those of windows that overlap add up."""
    pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.dim()]
    return _maximum(x, *pool(x, kernel_size, *args, **{**kwargs, "return_indices": True}))


@adjoint(*(f"{kind}max_pool{d}d_with_indices" for kind in ("", "adaptive_") for d in (1, 2, 3)))
def max_pool_with_indices(x: Tensor, *args: Any, call: Callable[..., Any], **kwargs: Any) -> Linearised:
    return _with_indices(x, *call(x, *args, **kwargs))


@adjoint(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _max_pool(module: nn.MaxPool2d, x: Tensor) -> Linearised:
    if module.return_indices:
        return _with_indices(x, *module(x))
    return max_pool(x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)


@adjoint(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
def adaptive_max_pool(x: Tensor, output_size: Any, return_indices: bool = False) -> Linearised:
    pool = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}[x.dim()]
    return _maximum(x, *pool(x, output_size, return_indices=True))


@adjoint(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _adaptive_max_pool(module: nn.AdaptiveMaxPool2d, x: Tensor) -> Linearised:
    if module.return_indices:
        return _with_indices(x, *module(x))
    return adaptive_max_pool(x, module.output_size)


def _maximum(x: Tensor, output: Tensor, indices: Tensor) -> Linearised:
    size = x.shape[2:]

    def back(gradient: Tensor) -> Tensor:
        values = gradient.flatten(3)
        places = indices.flatten(2).unsqueeze(1).expand_as(values)
        return values.new_zeros(*values.shape[:3], size.numel()).scatter_add(3, places, values).unflatten(3, size)

    return Linearised(output, back)


def _with_indices(x: Tensor, output: Tensor, indices: Tensor) -> Linearised:
    """Of an operation that also gives the indices of the maxima, which carry nothing."""
    back = _maximum(x, output, indices).adjoint
    return Linearised((output, indices), lambda gradients: back(gradients[0]))


@adjoint(F.avg_pool2d, F.avg_pool3d)
def avg_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Linearised:
    """Average pooling is separable: pooling of unit vectors gives the matrix of each axis, and so the adjoint."""
    pool, each = {4: F.avg_pool2d, 5: F.avg_pool3d}[x.dim()], _ntuple(x.dim() - 2)
    kernel, stride, padding = each(kernel_size), each(stride or kernel_size), each(padding)
    output = pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    matrices = [
        F.avg_pool1d(_units(x, n), k, s, p, ceil_mode, count_include_pad)[0]
        for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)
    ]
    if divisor_override:  # of sums
        matrices = [(matrix > 0).to(matrix) for matrix in matrices]
        matrices[0] = matrices[0] / divisor_override
    return Linearised(output, lambda gradient: _separable(gradient, matrices))


@adjoint(nn.AvgPool2d, nn.AvgPool3d)
def _avg_pool(module: nn.AvgPool2d, x: Tensor) -> Linearised:
    return avg_pool(
        x,
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


@adjoint(F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def adaptive_avg_pool(x: Tensor, output_size: Any) -> Linearised:
    output = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[x.dim()](x, output_size)
    sizes = zip(x.shape[2:], output.shape[2:], strict=True)
    matrices = [F.adaptive_avg_pool1d(_units(x, n), m)[0] for n, m in sizes]
    return Linearised(output, lambda gradient: _separable(gradient, matrices))


@adjoint(nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_avg_pool(module: nn.AdaptiveAvgPool2d, x: Tensor) -> Linearised:
    return adaptive_avg_pool(x, module.output_size)


def _separable(gradient: Tensor, matrices: list[Tensor]) -> Tensor:
    """Each of the last axes by a matrix of its own."""
    for axis, matrix in enumerate(matrices[:-1], -len(matrices)):
        inner = gradient.shape[axis + 1 :]
        gradient = (matrix @ gradient.flatten(axis + 1)).unflatten(-1, inner)
    return gradient @ matrices[-1].T


def _units(x: Tensor, count: int) -> Tensor:
    return torch.eye(count, dtype=x.dtype, device=x.device)[None]
