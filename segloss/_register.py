"""Registration of the library's operators with PyTorch's dispatcher.

An operator is opaque to ``torch.compile`` and fake tensors, and its gradient is an ``autograd.Function`` around it:
that combination is what ``fullgraph=True``, ``vmap``, ``torch.func.grad`` and double backward all accept. The plain
``Library`` interface adds less than half of what a call through ``torch.library.custom_op`` costs.
"""

from collections.abc import Callable
from typing import Any

import torch

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
