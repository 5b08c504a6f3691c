"""High gradient ratio: how much of a region of the image a feature or a score looks at."""

from torch import Tensor

from segattr.metrics.masks import check_mask
from segloss.common.checks import (
    check_finite,
    check_floating,
    check_like,
    check_number,
    require,
    shape_text,
)
from segloss.common.reduction import wide_dtype


def high_gradient_ratio(
    gradients: Tensor, regions: Tensor, *, threshold: float = 0.3, scale: float | Tensor | None = None
) -> Tensor:
    r"""High gradient ratio (HGR): how much of a region of the image a feature or a score looks at.

    .. math:: \mathrm{HGR}(R) = \frac{|\{x \in R : g(x) > \theta s\}|}{|R|}, \qquad g = \max_c |\nabla_c|

    where :math:`\nabla` is the gradient of the feature, summed over its units, or of the score with respect to the
    image. The paper says no more than "above 0.3". That says little without a unit: here it is the largest gradient of
    the image, :math:`s = \max_x g(x)`. To follow one image while its model changes, pass the first of these
    as ``scale``, or a rise of all gradients alike will not show.

    Args:
        gradients: gradients with respect to the images, ``[B, C, H, W]``, or their magnitude g, ``[B, H, W]``; with
            respect to volumes, ``[B, C, D, H, W]``.
        regions: region of each image, bool, ``[B, H, W]``, or R regions of each, ``[B, R, H, W]``; of volumes with
            their depth.
        threshold: :math:`\theta`, at least 0.
        scale: :math:`s`, at least 0: the same for all images or one for each, ``[B]``. 1 makes the threshold absolute.
            The maximum of each image if None.

    Returns:
        ``[B]`` or ``[B, R]`` in [0, 1], NaN for a region without pixels, which ``nanmean`` leaves out; float32 (float64
        for float64 gradients). No gradient.

    Raises:
        TypeError: ``gradients`` that are not floating point, ``regions`` that are not bool, ``threshold`` that is no
            number, ``scale`` that is neither a number nor a floating-point tensor.
        ValueError: shapes or devices that do not fit each other, NaN or infinite gradients, a negative or infinite
            ``threshold`` or ``scale``.

    Source:
        Reducing Information Bottleneck (RIB), the dissertation's sec. 3.4.2.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[[1.0, 0.4], [-0.2, 0.0]]])
        >>> left, right = torch.tensor([[[True, False]] * 2]), torch.tensor([[[False, True]] * 2])
        >>> high_gradient_ratio(gradients, torch.stack([left, right], 1))
        tensor([[0.5000, 0.5000]])
        >>> high_gradient_ratio(gradients, left | right, scale=2.0)
        tensor([0.2500])
    """
    check_floating("gradients", gradients)
    if gradients.dim() not in (3, 4, 5):
        kinds = "[B, C, H, W] or [B, H, W], or [B, C, D, H, W] of volumes"
        raise ValueError(f"gradients: expected {kinds}, got {shape_text(gradients.shape)}")
    if gradients.dim() > 3 and gradients.shape[1] == 0:
        raise ValueError(f"gradients: expected at least one channel, got {shape_text(gradients.shape)}")
    check_finite("gradients", gradients)
    regions = check_mask("regions", regions)
    images, size = len(gradients), gradients.shape[1 if gradients.dim() == 3 else 2 :]
    several = regions.dim() == 2 + len(size)
    of_each = (images, regions.shape[1], *size) if several else (images, *size)
    check_like("regions", regions, of_each, "gradients", gradients)
    check_number("threshold", threshold, least=0)
    magnitude = gradients.detach().to(wide_dtype(gradients)).abs()
    if magnitude.dim() > 3:
        magnitude = magnitude.amax(1)
    high = magnitude > threshold * _scale(scale, magnitude).view(-1, *[1] * len(size))
    if several:
        high = high.unsqueeze(1)
    spatial = tuple(range(-len(size), 0))
    share = (high & regions).sum(spatial).double() / regions.sum(spatial)
    return share.to(magnitude.dtype)


def _scale(scale: float | Tensor | None, magnitude: Tensor) -> Tensor:
    """A number for each image ``[B]``, or one for all ``[1]``; the maximum of each image if None."""
    if scale is None:
        return magnitude.flatten(1).amax(1) if magnitude.numel() else magnitude.new_zeros(len(magnitude))
    if not isinstance(scale, Tensor):
        check_number("scale", scale, least=0)
        return magnitude.new_tensor([scale])
    check_floating("scale", scale)
    check_like("scale", scale, magnitude.shape[:1], "gradients", magnitude)
    check_finite("scale", scale)
    require("scale", scale, lambda: (scale >= 0).all(), lambda: f"expected at least 0, got {scale.min().item():.6g}")
    return scale.detach().to(magnitude.dtype)
