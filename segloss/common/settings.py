"""What all loss modules share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from segloss.common.reduction import Reduction, check_reduction


class Settings(nn.Module):
    """A function with its settings remembered, in the order in which they are given.

    Settings that are tensors are buffers, and parameters stay parameters: they move and are saved with the module.
    """

    __call__: Callable[..., Tensor]  # for type checkers: torch says Any

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._names = tuple(settings)

    def extra_repr(self) -> str:
        def show(value: Any) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            return f"tensor{tuple(value.shape)}" if value.dim() else repr(value.detach())

        return ", ".join(f"{name}={show(getattr(self, name))}" for name in self._names)


class LossModule(Settings):
    """A loss that is reduced over images."""

    reduction: Reduction

    def __init__(self, reduction: Reduction = "mean", **settings: Any) -> None:
        check_reduction(reduction)
        super().__init__(**settings, reduction=reduction)
