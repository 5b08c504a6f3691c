"""The guide of a bilateral kernel: an image and its widths, checked, as features of unit width."""

from collections.abc import Sequence

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
from segloss.common.reduction import LARGEST, wide_dtype

SIGMA_RGB = 15 / 255  # of the filter and its losses, for RGB in [0, 1]
MOST_AXES = 3  # of space: signals, images and volumes

_NARROWEST = 1e-10  # smaller sigmas give the same kernel: no two different pixels meet
_LARGEST_WIDE = 1e130  # of float64: squares of sums over an image are finite
_FARTHEST = 1e14  # sigmas from the middle of an image: squares of what is beyond would overflow


def guide_features(
    image: Tensor, sigma_rgb: float | Tensor, sigma_xy: float | Tensor, spacing: Sequence[float] | None = None
) -> Tensor:
    """Colour and position in units of their sigmas, ``[B, C + d, N]``: there W is exp(-|f - f'|^2 / 2).

    The image has d spatial dimensions and N pixels.
    """
    check_sigma("sigma_xy", sigma_xy, image)
    colour = guide_colour(image, sigma_rgb)
    size = image.shape[2:]
    parts = [colour.flatten(2)]
    for axis, (length, step) in enumerate(zip(size, (1.0,) * len(size) if spacing is None else spacing, strict=True)):
        place = torch.arange(length, dtype=colour.dtype, device=image.device) / _in_steps(sigma_xy, step, colour.dtype)
        along = place.view(-1, *(1,) * (len(size) - 1 - axis))
        parts.append(along.expand(image.shape[0], 1, *size).flatten(2))
    return torch.cat(parts, 1)


def guide_colour(image: Tensor, sigma_rgb: float | Tensor) -> Tensor:
    """Colour in units of its sigma, as ``image``, around 0: only differences count, near 0 they are accurate."""
    check_sigma("sigma_rgb", sigma_rgb, image)
    image = image.to(wide_dtype(image))
    sigma = _at_least(sigma_rgb, image.dtype)
    if image.numel() == 0:
        return image / sigma
    with torch.no_grad():
        low, high = torch.aminmax(image.flatten(2), dim=2)
        flat = (1,) * (image.dim() - 2)
        middle = (low / 2 + high / 2).unflatten(1, (-1, *flat))
        # Where squares would overflow, smaller colours give the same weights: 1 for equal ones and 0 for others.
        reach = (high / 2 - low / 2).amax(1).unflatten(0, (-1, 1, *flat))
        shrink = (_FARTHEST * sigma / reach).clamp(max=1)
    return (image - middle) * shrink / sigma


def check_channels(values: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """What is to be filtered, in ``dtype`` at most: ``[B, K, *spatial]``, no NaN, nothing whose sums could overflow."""
    check_floating("values", values)
    check_space("values", values, "[B, K, *spatial]")
    check_finite("values", values, _LARGEST_WIDE if values.dtype == dtype == torch.float64 else LARGEST)


def check_guide(image: Tensor, anchor: Tensor, name: str) -> None:
    """``image`` must be ``[B, C, *spatial]`` with the batch and size of the argument called ``name``."""
    check_floating("image", image)
    check_space("image", image, "[B, C, *spatial]")
    if image.shape[1] < 1:
        raise ValueError(f"image: expected [B, C, *spatial] with C >= 1, got {shape_text(image.shape)}")
    expected = (anchor.shape[0], image.shape[1], *anchor.shape[2:])
    check_like("image", image, expected, name, anchor)
    check_finite("image", image)


def check_space(name: str, maps: Tensor, form: str) -> None:
    """``maps`` must have the ``form`` of 1 to 3 spatial dimensions."""
    if not 1 <= maps.dim() - 2 <= MOST_AXES:
        raise ValueError(f"{name}: expected {form} of 1 to {MOST_AXES} dimensions, got {shape_text(maps.shape)}")


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


def _in_steps(sigma: float | Tensor, step: float, dtype: torch.dtype) -> float | Tensor:
    """The width in steps from one pixel to the next, which may not be too small."""
    in_dtype = sigma.to(dtype) if isinstance(sigma, Tensor) else float(sigma)
    return _at_least(in_dtype / max(float(step), 1 / LARGEST), dtype)


def _at_least(sigma: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return sigma.to(dtype).clamp(min=_NARROWEST) if isinstance(sigma, Tensor) else max(float(sigma), _NARROWEST)
