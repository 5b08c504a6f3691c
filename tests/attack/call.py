"""A valid call of a public function, which the attack spoils."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Call:
    """A public function with valid arguments, all of which are passed by name.

    ``shape`` gives the documented shape of the result from the arguments that were accepted, in the form of
    :func:`shape_of`; None where the result has none (a module, a figure). NaN and infinity are refused in all
    arguments, but for those named by ``infinite``, which are documented to take infinity, and ``any_value``, which take
    NaN too. ``fixed`` are those that are never spoilt: a user's network, callables; ``counts`` those that
    time or memory grows with, for which huge numbers are not tried. ``errors`` are documented errors besides TypeErrors
    and ValueErrors that name an argument. ``random`` functions draw from the global source of randomness; others may do
    so only where their ``generator`` is None.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    shape: Callable[[dict[str, Any]], Any] | None = None
    infinite: tuple[str, ...] = ("sigma_rgb", "sigma_xy", "smooth_sigma_xy")  # a kernel that is 1 everywhere
    any_value: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    errors: tuple[type[Exception], ...] = ()
    random: bool = False


# Fresh valid arguments by public name; a variant of a call has a word after the name: "segloss.potts_crf lowrank".
Calls = dict[str, Callable[[], Call]]


def module(kind: Callable[..., nn.Module]) -> Callable[..., Any]:
    """One function of a module: the arguments that its constructor knows go there, the others to ``forward``."""
    settings = inspect.signature(kind).parameters

    def call(**arguments: Any) -> Any:
        built = kind(**{name: value for name, value in arguments.items() if name in settings})
        return built(**{name: value for name, value in arguments.items() if name not in settings})

    return call


def shape_of(result: Any) -> Any:
    """The shape of a tensor as a tuple, () for a number, and a list of these for a list, tuple or dict of results."""
    if isinstance(result, Tensor):
        return tuple(result.shape)
    if isinstance(result, dict):
        return [shape_of(part) for part in result.values()]
    if isinstance(result, (list, tuple)):
        return [shape_of(part) for part in result]
    return ()
