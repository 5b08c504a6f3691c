"""The guide of a bilateral kernel: an image and its widths, checked, as features of unit width."""

import torch
from torch import Tensor

from segloss.common.checks import (
    check_colours,
    check_finite,
    check_floating,
    check_like,
    check_number,
    require,
    shape_text,
)
from segloss.common.reduction import wide_dtype

SIGMA_RGB = 15 / 255  # of the filter and its losses, for RGB in [0, 1]

_NARROWEST = 1e-10  # smaller sigmas give the same kernel: no two different pixels meet
_FARTHEST = 1e14  # sigmas from the middle of an image: squares of what is beyond would overflow


def guide_features(image: Tensor, sigma_rgb: float | Tensor, sigma_xy: float | Tensor) -> Tensor:
    """Colour and position in units of their sigmas, ``[B, C + 2, H W]``: there W is exp(-|f - f'|^2 / 2)."""
    check_sigma("sigma_xy", sigma_xy, image)
    colour = guide_colour(image, sigma_rgb)
    height, width = image.shape[2:]
    rows = torch.arange(height, dtype=colour.dtype, device=image.device)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=colour.dtype, device=image.device).expand(height, width)
    place = torch.stack([rows, columns]).flatten(1) / _at_least(sigma_xy, colour.dtype)
    return torch.cat([colour.flatten(2), place.expand(image.shape[0], -1, -1)], 1)


def guide_colour(image: Tensor, sigma_rgb: float | Tensor) -> Tensor:
    """Colour in units of its sigma, ``[B, C, H, W]``, around 0: only differences count, near 0 they are accurate."""
    check_sigma("sigma_rgb", sigma_rgb, image)
    image = image.to(wide_dtype(image))
    sigma = _at_least(sigma_rgb, image.dtype)
    if image.numel() == 0:
        return image / sigma
    with torch.no_grad():
        low, high = torch.aminmax(image.flatten(2), dim=2)
        middle = (low / 2 + high / 2)[:, :, None, None]
        # Where squares would overflow, smaller colours give the same weights: 1 for equal ones and 0 for others.
        reach = (high / 2 - low / 2).amax(1)[:, None, None, None]
        shrink = (_FARTHEST * sigma / reach).clamp(max=1)
    return (image - middle) * shrink / sigma


def check_guide(image: Tensor, anchor: Tensor, name: str) -> None:
    """``image`` must be ``[B, C, H, W]`` with the batch and size of the argument called ``name``."""
    check_floating("image", image)
    if image.dim() != 4 or image.shape[1] < 1:
        raise ValueError(f"image: expected [B, C, H, W] with C >= 1, got {shape_text(image.shape)}")
    expected = (anchor.shape[0], image.shape[1], *anchor.shape[2:])
    check_like("image", image, expected, name, anchor)
    check_finite("image", image)


def colour_sigma(image: Tensor, sigma_rgb: float | Tensor | None) -> float | Tensor:
    """``sigma_rgb``, or the default if None, which is for RGB in [0, 1] and refuses another unit."""
    if sigma_rgb is None:
        check_colours(image, SIGMA_RGB)
        return SIGMA_RGB
    return sigma_rgb


def check_sigma(name: str, sigma: float | Tensor, image: Tensor | None = None) -> None:
    """A number above 0, or a scalar tensor of it on the device of ``image``."""
    if not isinstance(sigma, Tensor):
        check_number(name, sigma, above=0, finite=False)
        return
    check_floating(name, sigma)
    if sigma.dim() != 0:
        raise ValueError(f"{name}: expected a number or a scalar tensor, got {shape_text(sigma.shape)}")
    if image is not None:
        check_like(name, sigma, (), "image", image)
    require(name, sigma, lambda: sigma > 0, lambda: f"expected a number above 0, got {sigma.item():.6g}")


def _at_least(sigma: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return sigma.to(dtype).clamp(min=_NARROWEST) if isinstance(sigma, Tensor) else max(float(sigma), _NARROWEST)
