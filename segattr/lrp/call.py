"""What an operation of a classifier calls, for its rule."""

from typing import Any

import torch
from torch import Tensor, nn

from segattr.networks.reader.graph import call
from segattr.networks.reader.record import Node


class Call:
    """What an operation calls, with its own arguments or others, and never in place.

    Args:
        node: the operation.
        model: that it is part of.
        overwrites: whether it may overwrite its first argument.
    """

    def __init__(self, node: Node, model: nn.Module, overwrites: bool) -> None:
        self.node, self.model, self.kind, self.overwrites = node, model, node.kind, overwrites

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.overwrites and isinstance(args[0], Tensor):
            args = (args[0].clone(), *args[1:])
        if self.kind == "view" and not isinstance(args[1], torch.dtype):  # a rule may order memory in another way
            return args[0].reshape(*args[1:], **kwargs)
        return call(self.node, self.model, args, kwargs)


def overwrites(node: Node) -> bool:
    """Whether an operation may overwrite its first argument."""
    named = str(getattr(node.target, "__name__", node.target))
    in_place = named.endswith("_") and not named.endswith("__")
    return node.kind == "setitem" or in_place or bool(node.kwargs.get("inplace")) or any(a is True for a in node.args)
