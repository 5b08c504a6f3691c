"""What all loss modules share."""

from typing import Any

from torch import Tensor, nn

from segloss._reduce import Reduction, check_reduction


class LossModule(nn.Module):
    """A loss function with its settings remembered, in the order in which they are given.

    Settings that are tensors are buffers, and parameters stay parameters: they move and are saved with the module.
    """

    def __init__(self, reduction: Reduction = "mean", **settings: Any) -> None:
        super().__init__()
        check_reduction(reduction)
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.reduction: Reduction = reduction
        self._names = (*settings, "reduction")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)
