"""Operations that are linear maps without numbers of their own: they move, add up or repeat what they get."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segattr.lrp.adjoints import Linearised, adjoint, held
from segattr.lrp.call import Call

# --- any linear map, by what autograd knows of it


@adjoint(
    *(
        "avg_pool1d",
        "adaptive_avg_pool1d",
        "broadcast_to",
        "channel_shuffle",
        "native_channel_shuffle",
        "chunk",
        "cumsum",
        "diagonal",
        "diff",
        "dsplit",
    ),
    *("expand", "expand_as", "flip", "fliplr", "flipud", "fold", "gather", "getitem", "grid_sample", "hsplit"),
    *(
        "index_select",
        "interpolate",
        "upsample",
        "upsample_nearest",
        "upsample_bilinear",
        "kron",
        "masked_select",
        "max_unpool1d",
        "max_unpool2d",
        "max_unpool3d",
        "narrow",
    ),
    *("pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave", "roll", "rot90", "select"),
    *("split", "split_with_sizes", "sum", "take_along_dim", "tensor_split", "tile", "trace", "tril", "triu", "unbind"),
    *(
        "movedim",
        "moveaxis",
        "vsplit",
        "einsum",
        "matmul",
        "bmm",
        "mm",
        "mv",
        "inner",
        "outer",
        "tensordot",
        "bilinear",
    ),
)
def linear_map(*args: Any, call: Callable[..., Any], roles: Any, **kwargs: Any) -> Linearised:
    """The transposed map of an operation that is linear in each of its arguments that relevance goes to."""
    return Linearised(call(*args, **kwargs), _transposed(call, args, kwargs, roles, torch.zeros_like))


@adjoint(
    *("addbmm", "addcdiv", "addcmul", "addmm", "addmv", "addr", "baddbmm", "copy", "hstack", "index_add"),
    *("index_copy", "index_fill", "index_put", "lerp", "masked_fill", "masked_scatter", "scatter"),
    *("scatter_add", "select_scatter", "setitem", "slice_scatter", "stack", "vstack", "dstack", "where", "fill"),
)
def affine_map(*args: Any, call: Callable[..., Any], roles: Any, **kwargs: Any) -> Linearised:
    """Also with a constant part, which is what the operation gives for zeros."""
    constant = call(*_with(args, roles, iter([torch.zeros_like(x) for x in signals(args, roles)])), **kwargs)
    back = _transposed(call, args, kwargs, roles, torch.zeros_like)
    return Linearised(call(*args, **kwargs), back, {"constant": constant})


@adjoint("cummax", "kthvalue", "median", "sort", "topk", "msort")
def local_map(*args: Any, call: Callable[..., Any], roles: Any, **kwargs: Any) -> Linearised:
    """The linear map that an operation is around its arguments, of which it chooses some."""
    return Linearised(call(*args, **kwargs), _transposed(call, args, kwargs, roles, Tensor.detach))


def signals(args: Any, roles: Any) -> list[Tensor]:
    """The arguments that relevance goes to."""
    if isinstance(roles, (tuple, list)):
        return [signal for arg, role in zip(args, roles, strict=True) for signal in signals(arg, role)]
    return [args] if roles == "signal" else []


def _with(args: Any, roles: Any, tensors: Iterator[Tensor]) -> Any:
    """Arguments with other signals."""
    if isinstance(roles, (tuple, list)):
        return type(roles)(_with(arg, role, tensors) for arg, role in zip(args, roles, strict=True))
    return next(tensors) if roles == "signal" else held(args, roles)


def _transposed(
    call: Callable[..., Any], args: Any, kwargs: Any, roles: Any, at: Callable[[Tensor], Tensor]
) -> Callable[[Any], Any]:
    """The vector-Jacobian product, for all classes at once."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = call(*_with(args, roles, iter(tensors)), **kwargs)
        return tuple(t for t in ((result,) if isinstance(result, Tensor) else result) if t.is_floating_point())

    def back(gradient: Any) -> Sequence[Tensor]:
        pull = torch.func.vjp(function, *(at(x) for x in signals(args, roles)))[1]
        gradients = (gradient,) if isinstance(gradient, Tensor) else tuple(gradient)
        found: Sequence[Tensor] = torch.vmap(pull, in_dims=1, out_dims=1)(gradients)
        return found

    return back


# --- maps of single numbers, which batches of the vector-Jacobian product of torch get wrong or do slowly


@adjoint("as_strided", "unfold")
def moved(x: Tensor, *args: Any, call: Callable[..., Any], **kwargs: Any) -> Linearised:
    """Each number of the output is one of the input: which one, the operation says if it is given their places."""
    if getattr(call, "kind", "") == "unfold" and len(args) < 3:  # of torch.nn.functional, where nothing is missing
        return linear_map(x, *args, call=call, roles=("signal", *["free"] * len(args)), **kwargs)
    source = call(torch.arange(x.numel(), device=x.device).view(x.shape), *args, **kwargs)
    return Linearised(call(x, *args, **kwargs), lambda gradient: _brought(gradient, source, x.shape))


@adjoint("overwritten")
def overwritten_view(old: Tensor, new: Tensor, *geometry: Any, call: Callable[..., Tensor], roles: Any) -> Linearised:
    """What comes from the new numbers, and what is left of the old ones."""
    output = call(old, new, *geometry)
    places = torch.arange(new.numel(), device=new.device).view(new.shape)
    source = call(torch.full_like(old, -1, dtype=torch.int64), places, *geometry)
    kept = (source < 0).unsqueeze(1)

    def back(gradient: Tensor) -> list[Tensor]:
        parts = gradient * kept, _brought(gradient * ~kept, source.clamp(min=0), new.shape)
        return [part for part, role in zip(parts, roles[: len(parts)], strict=True) if role == "signal"]

    if roles[:2] == ("signal", "signal"):
        return Linearised(output, back)
    zeros = _with((old, new), roles[:2], iter([torch.zeros_like(x) for x in signals((old, new), roles[:2])]))
    return Linearised(output, back, {"constant": call(*zeros, *geometry)})


def _brought(gradient: Tensor, source: Tensor, shape: torch.Size) -> Tensor:
    """Gradients summed at the places of an input of some shape, from those of an output made of numbers there."""
    first = gradient.movedim(1, 0).flatten(1)
    summed = first.new_zeros(len(first), shape.numel()).index_add(1, source.flatten(), first)
    return summed.unflatten(1, shape).movedim(0, 1)


# --- frequent ones


@adjoint("flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "reshape_as", "view_as")
def reshape(x: Tensor, *args: Any, call: Callable[..., Any], **kwargs: Any) -> Linearised:
    """Another shape of the same numbers in the same order."""
    output = call(x, *args, **kwargs)
    if output.shape[:1] == x.shape[:1]:
        return Linearised(output, lambda gradient: gradient.reshape(*gradient.shape[:2], *x.shape[1:]))
    classes_first = lambda gradient: gradient.movedim(1, 0).reshape(gradient.shape[1], *x.shape)  # noqa: E731
    return Linearised(output, lambda gradient: classes_first(gradient).movedim(0, 1))


@adjoint(nn.Flatten)
def _flatten(module: nn.Flatten, x: Tensor) -> Linearised:
    return reshape(x, module.start_dim, module.end_dim, call=torch.flatten)


@adjoint("permute", "transpose", "swapaxes", "swapdims", "t", "T", "mT", "adjoint")
def permute(x: Tensor, *args: Any, call: Call, **kwargs: Any) -> Linearised:
    """Another order of the axes."""
    if kwargs:
        return linear_map(x, *args, call=call, roles=("signal", *["free"] * len(args)), **kwargs)
    order = _order(call.kind, x.dim(), args)
    back = [0, *(order.index(axis) + 1 for axis in range(x.dim()))]
    return Linearised(call(x, *args), lambda gradient: gradient.movedim(1, 0).permute(back).movedim(0, 1))


def _order(kind: str, count: int, args: Any) -> list[int]:
    axes = list(range(count))
    if kind == "permute":
        return [axes[axis] for axis in (args[0] if isinstance(args[0], (tuple, list)) else args)]
    if kind == "T":
        return axes[::-1]
    one, other = args or (-2, -1)
    axes[one], axes[other] = axes[other], axes[one]
    return axes


@adjoint("cat", "concat", "concatenate")
def cat(tensors: Sequence[Tensor], dim: int = 0, *, roles: Any) -> Linearised:
    axis = dim % tensors[0].dim()
    output = torch.cat(list(tensors), axis)
    sizes = [tensor.shape[axis] for tensor in tensors]
    carry = [role == "signal" for role in roles[0]]

    def split(gradient: Tensor) -> list[Tensor]:
        parts = gradient.split(sizes, axis + (axis > 0))  # the axis of the classes is the second one
        return [part for part, carries in zip(parts, carry, strict=True) if carries]

    if all(carry):
        return Linearised(output, split)
    others = [torch.zeros_like(t) if carries else t for t, carries in zip(tensors, carry, strict=True)]
    return Linearised(output, split, {"constant": torch.cat(others, axis)})


@adjoint("mean")
def mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, call: Callable[..., Any]) -> Linearised:
    axes = sorted(d % x.dim() for d in (dim if isinstance(dim, (tuple, list)) else (dim,)) if d is not None)
    if not axes or 0 in axes:
        return linear_map(x, dim, keepdim, call=call, roles=("signal", "free", "free"))
    count = 1
    for axis in axes:
        count *= x.shape[axis]

    def back(gradient: Tensor) -> Tensor:
        if not keepdim:
            for axis in axes:
                gradient = gradient.unsqueeze(axis + 1)  # after the axis of the classes
        return (gradient / count).expand(*gradient.shape[:2], *x.shape[1:])

    return Linearised(x.mean(dim, keepdim), back)


@adjoint("contiguous", "clone", "positive")
def same(x: Tensor, *args: Any, call: Callable[..., Any], **kwargs: Any) -> Linearised:
    """The same numbers in other memory."""
    return Linearised(call(x, *args, **kwargs), lambda gradient: gradient)


@adjoint("neg", "negative")
def neg(x: Tensor) -> Linearised:
    return Linearised(-x, lambda gradient: -gradient)


@adjoint("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda")
def cast(x: Tensor, *args: Any, call: Callable[..., Any], **kwargs: Any) -> Linearised:
    """Another precision or device."""
    return Linearised(call(x, *args, **kwargs), lambda gradient: gradient.to(x.device, x.dtype))


@adjoint("pad", "constant_pad_nd")
def pad(x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Linearised:
    """Zeros are cut off again; other values are constants."""
    if mode != "constant":
        return linear_map(x, pad, mode, call=F.pad, roles=("signal", "free", "free"))
    cut = [-n for n in pad]
    output = F.pad(x, pad, mode, value)
    shifts = {"value": F.pad(torch.zeros_like(x), pad, mode, value)} if value else {}
    if len(pad) < 2 * x.dim():  # not along the images
        return Linearised(output, lambda gradient: F.pad(gradient, cut), shifts)
    return Linearised(output, linear_map(x, pad, call=F.pad, roles=("signal", "free")).adjoint, shifts)
