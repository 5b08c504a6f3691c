"""Signals, images and volumes at another resolution."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resize_linear(maps: Tensor, size: Sequence[int] | None = None, *, scale_factor: float | None = None) -> Tensor:
    """``maps [B, K, *spatial]`` of 1 to 3 dimensions, interpolated along each of them between the centres of pixels."""
    mode = _MODES[maps.dim() - 2]
    return F.interpolate(maps, size, scale_factor, mode=mode, align_corners=False)
