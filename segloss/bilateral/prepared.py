"""The filter of one image for many values: what depends on the image alone is done once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from segloss.bilateral.guide import check_channels, check_guide, colour_sigma, guide_features
from segloss.bilateral.operator import prepare
from segloss.bilateral.plan import make_plan
from segloss.common.checks import check_choice, check_has_values, check_like, check_spacing, shape_text

_METHODS = ("auto", "exact", "blocksparse", "lattice")  # those that know all of an image before they see values


class PreparedFilter:
    r""":func:`segloss.bilateral_filter` of one batch of images, for many values, which get gradients.

    Which pairs of pixels count, or the lattice, is found once, when it is made; iterations on the same images, as those
    of a dense CRF, and trainings that see them again, pay for the products only. The image and the sigmas are
    constants.

    Args:
        image: guide, ``[B, C, *spatial]``, at least one pixel, in the unit of ``sigma_rgb``; the results have its dtype
            (float32 for anything narrower).
        sigma_rgb, sigma_xy, spacing, tolerance, backend: as of :func:`segloss.bilateral_filter`.
        method: ``"exact"``, ``"blocksparse"``, ``"lattice"``, or ``"auto"``: exact below 2,500 pixels, then
            block-sparse.
        alternate: of the lattice, whose kernel is the mean of two that are not symmetric: take one of them in a call,
            and the other in the next, at nearly half the time. For iterations; without gradients.
        filled: of the lattice: with vertices that no pixel has, but two of their neighbours have. Nearer to the
            Gaussian, slower to make and to use.

    Raises:
        TypeError, ValueError: as :func:`segloss.bilateral_filter`.
        ValueError: an image without pixels or without values, on the device meta; ``method="lattice"`` and an image
            that it is not for.

    Source:
        The W of :func:`segloss.bilateral_filter`.

    Example:
        >>> run = PreparedFilter(torch.zeros(1, 3, 2, 2), sigma_xy=float("inf"))
        >>> run(torch.ones(1, 1, 2, 2))
        tensor([[[[4., 4.],
                  [4., 4.]]]])
    """

    def __init__(
        self,
        image: Tensor,
        *,
        sigma_rgb: float | Tensor | None = None,
        sigma_xy: float | Tensor = 100.0,
        spacing: Sequence[float] | None = None,
        method: str = "auto",
        tolerance: float = 1e-2,
        backend: str = "auto",
        alternate: bool = False,
        filled: bool = False,
    ) -> None:
        check_guide(image, image, "image")
        check_has_values("image", image)
        if image.numel() == 0:
            raise ValueError(f"image: expected at least one pixel, got {shape_text(image.shape)}")
        check_spacing(spacing, image.dim() - 2, "image", image)
        check_choice("method", method, _METHODS)
        sigma_rgb = colour_sigma(image, sigma_rgb)
        plan = make_plan(method, tolerance, backend, "float32", image)
        with torch.no_grad():
            features = guide_features(image, sigma_rgb, sigma_xy, spacing)
        self._image = image
        self._dtype = features.dtype
        self._alternate = alternate
        self._run = prepare(features, plan, alternate=alternate, filled=filled)

    def __call__(self, values: Tensor) -> Tensor:
        """``[B, K, *spatial]`` to the same shape, for any K, and for any B where there is one image.

        Raises:
            TypeError: ``values`` that are not floating point.
            ValueError: another shape or device than that of the image, NaN, infinity or values beyond ±1e30 (±1e130
                where both are float64); with ``alternate``, values that want a gradient.
        """
        check_channels(values, self._dtype)
        images, _, *size = self._image.shape
        batch = values.shape[0] if images == 1 else images
        check_like("values", values, (batch, values.shape[1], *size), "image", self._image)
        if self._alternate and values.requires_grad and torch.is_grad_enabled():
            raise ValueError("values: expected no gradient with alternate=True, got requires_grad; use torch.no_grad()")
        if values.numel() == 0:
            return values.to(self._dtype)
        return self._run(values.reshape(images, -1, values.shape[2:].numel()).to(self._dtype)).view(values.shape)
