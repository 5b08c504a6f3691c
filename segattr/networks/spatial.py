"""The spatial dimensions of tensors: height and width of images, depth too of volumes."""

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def axes(tensor: Tensor, first: int = 2) -> tuple[int, ...]:
    """The spatial axes, from the first one on."""
    return tuple(range(first, tensor.dim()))


def size_text(dims: int) -> str:
    """How the size of maps is written, of batches of so many dimensions.

    Example:
        >>> size_text(4), size_text(5)
        ('h, w', 'd, h, w')
    """
    return ", ".join("dhw"[5 - dims :])


def layout_text(dims: int) -> str:
    """How a batch of images of so many dimensions is written.

    Example:
        >>> layout_text(4), layout_text(5)
        ('[B, C, H, W]', '[B, C, D, H, W]')
    """
    return f"[B, C, {size_text(dims).upper()}]"
