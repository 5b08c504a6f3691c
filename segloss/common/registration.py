"""Registration of the library's operators with PyTorch's dispatcher.

An operator is opaque to ``torch.compile`` and fake tensors, and its gradient is an ``autograd.Function`` around it:
that combination is what ``fullgraph=True``, ``vmap``, ``torch.func.grad`` and double backward all accept. The plain
``Library`` interface adds less than half of what a call through ``torch.library.custom_op`` costs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("segloss", "FRAGMENT")


def register(
    schema: str, default: Callable[..., Any], *, fake: Callable[..., Any], **kernels: Callable[..., Any]
) -> None:
    """Define ``segloss::name`` with a default implementation, a shape function and kernels by device type."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    for device, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, device.upper())
    torch.library.register_fake(f"segloss::{name}", fake, lib=_LIBRARY)


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge a dimension mapped by ``vmap``, or repeat an unmapped tensor, into the batch: images are independent.

    An unmapped scalar, which all images share, stays as it is.
    """
    if dim is None and tensor.dim() == 0:
        return tensor
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def known(
    fast: Callable[..., Tensor],
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    constants: tuple[Tensor | None, ...] = (),
) -> Tensor:
    """``function(*inputs, *constants)``, its value by ``fast`` of the same arguments, its derivatives by autograd.

    For backward passes that may be differentiated once more: the fast form, an operator, cannot be.
    """
    if torch.is_grad_enabled():
        return _Known.apply(fast, function, len(inputs), *inputs, *constants)
    return fast(*inputs, *constants)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(
        fast: Callable[..., Tensor], function: Callable[..., Tensor], count: int, *tensors: Tensor | None
    ) -> Tensor:
        return fast(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.function, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, constants = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = [i for i in range(ctx.count) if ctx.needs_input_grad[3 + i]]

        def function(*chosen: Tensor) -> Tensor:
            arguments = list(inputs)
            for i, tensor in zip(wanted, chosen, strict=True):
                arguments[i] = tensor
            return ctx.function(*arguments, *constants)

        pulled = torch.func.vjp(function, *(inputs[i] for i in wanted))[1](grad)
        grads: dict[int, Tensor] = dict(zip(wanted, pulled, strict=True))
        return None, None, None, *(grads.get(i) for i in range(ctx.count)), *(None for _ in constants)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], fast: Any, function: Any, count: int, *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        folded = (None if t is None else fold(t, d, size) for t, d in zip(tensors, in_dims[3:], strict=True))
        return _Known.apply(fast, function, count, *folded).unflatten(0, (size, -1)), 0
