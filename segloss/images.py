"""Images as the losses want them: RGB in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from segloss.common.checks import check_finite, check_floating, shape_text

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def denormalize(
    image: Tensor, mean: Sequence[float] | Tensor = IMAGENET_MEAN, std: Sequence[float] | Tensor = IMAGENET_STD
) -> Tensor:
    """Undo the normalisation of a network's input: back to RGB in [0, 1], as the CRF and similarity losses expect it.

    ``image * std + mean`` for each channel.

    Args:
        image: normalised image, ``[B, C, H, W]``.
        mean: mean of each channel that was subtracted, C numbers; ImageNet's by default.
        std: standard deviation of each channel that was divided by, C numbers; ImageNet's by default.

    Returns:
        The image before normalisation, ``[B, C, H, W]``, in the dtype of ``image``.

    Raises:
        TypeError: ``image`` that is not floating point, ``mean`` or ``std`` that are not numbers.
        ValueError: ``image`` that is not ``[B, C, H, W]``, ``mean`` or ``std`` without one finite number for each
            channel.

    Example:
        >>> denormalize(torch.zeros(1, 3, 1, 1)).flatten()
        tensor([0.4850, 0.4560, 0.4060])
    """
    check_floating("image", image)
    if image.dim() != 4:
        raise ValueError(f"image: expected [B, C, H, W], got {shape_text(image.shape)}")

    def per_channel(name: str, values: Sequence[float] | Tensor) -> Tensor:
        try:
            # Checked before it goes to the device of the image: no waiting.
            device = values.device if isinstance(values, Tensor) else "cpu"
            tensor = torch.as_tensor(values, dtype=image.dtype, device=device)
            moved = tensor.to(image.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"{name}: expected numbers, got {values!r}") from error
        if tensor.shape != image.shape[1:2]:
            raise ValueError(
                f"{name}: expected [{image.shape[1]}] to go with image {shape_text(image.shape)}, "
                f"got {shape_text(tensor.shape)}"
            )
        check_finite(name, tensor)
        return moved.view(-1, 1, 1)

    return image * per_channel("std", std) + per_channel("mean", mean)
