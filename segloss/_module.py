"""What all loss modules share."""

from torch import nn

from segloss._reduce import Reduction, check_reduction


class LossModule(nn.Module):
    """A loss function with its settings remembered; its public attributes are the settings."""

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def extra_repr(self) -> str:
        settings = {
            name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"
        }
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())
