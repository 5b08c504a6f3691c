"""The bilateral filter: a Gaussian kernel of colour and position, applied to any number of channels."""

import torch
from torch import Tensor

from segloss._checks import check_choice, check_finite, check_floating, check_like, check_number, require, shape_text
from segloss._reduce import wide_dtype
from segloss.bilateral.operator import Bilateral

_METHODS = ("auto", "exact", "blocksparse")
_BACKENDS = ("auto", "torch")
_WORTH_SORTING = 2048  # pixels; below, leaving out pairs saves less than finding them costs
_NARROWEST = 1e-10  # smaller sigmas give the same kernel: no two different pixels meet
_FARTHEST = 1e14  # sigmas from the middle of an image: squares of what is beyond would overflow


def bilateral_filter(
    values: Tensor,
    image: Tensor,
    *,
    sigma_rgb: float | Tensor = 15 / 255,
    sigma_xy: float | Tensor = 100.0,
    method: str = "auto",
    tolerance: float = 1e-2,
    backend: str = "auto",
) -> Tensor:
    r"""Product of the bilateral affinity matrix of an image with any number of channels.

    .. math:: (W v)_p = \sum_q W_{pq} v_q, \qquad
        W_{pq} = \exp\Big(-\frac{\|I_p - I_q\|^2}{2 \sigma_{rgb}^2} - \frac{\|x_p - x_q\|^2}{2 \sigma_{xy}^2}\Big)

    over all pairs of pixels, p = q included, not normalised. Differentiable with respect to the values, the image and
    both sigmas; twice in eager mode (with respect to image and sigmas by dense matrices, quadratic in the pixels).
    Forward mode (``jvp``, ``torch.func.hessian``) is not supported.

    Args:
        values: channels to filter, ``[B, K, H, W]``, any finite values.
        image: guide, ``[B, C, H, W]``: RGB in [0, 1], or any C >= 1 channels in the unit of ``sigma_rgb``.
        sigma_rgb: width of the kernel in colour, above 0, in the unit of ``image``; a number or a scalar tensor.
            Infinite: colour does not count.
        sigma_xy: width of the kernel in space, in pixels, likewise.
        method: ``"exact"`` visits all pairs of pixels; ``"blocksparse"`` leaves out pairs of pixel tiles that do not
            count; ``"auto"`` is block-sparse from 2,048 pixels on, where it begins to pay.
        tolerance: for ``"blocksparse"``, in (0, 1): the weights left out sum to at most this share of all weights, in
            every tile of about 64 pixels. Errors of filtered probabilities are usually 10 to 100 times smaller.
        backend: ``"torch"``, which runs on any device, or ``"auto"``.

    Returns:
        ``[B, K, H, W]``, float32 (float64 where values or image are float64). NaN and infinity that are not checked
        (see :func:`~segloss.check_values`) may spread over their image.

    Raises:
        TypeError: ``values`` or ``image`` that are not floating point, sigmas that are not numbers.
        ValueError: shapes or devices that do not fit each other, NaN or infinity, sigmas that are not above 0,
            ``tolerance`` outside (0, 1), an unknown ``method`` or ``backend``.

    Source:
        The affinities of *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (3), with
        the kernel of *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*.

    Example:
        >>> image = torch.zeros(1, 3, 2, 2)
        >>> bilateral_filter(torch.ones(1, 1, 2, 2), image, sigma_xy=float("inf"))
        tensor([[[[4., 4.],
                  [4., 4.]]]])
    """
    check_floating("values", values)
    if values.dim() != 4:
        raise ValueError(f"values: expected [B, K, H, W], got {shape_text(values.shape)}")
    check_finite("values", values)
    check_guide(image, values, "values")
    cutoff = choose_tolerance(method, tolerance, backend, values.shape[2] * values.shape[3])
    features = guide_features(image, sigma_rgb, sigma_xy)
    dtype = torch.promote_types(wide_dtype(values), features.dtype)
    filtered = Bilateral.apply(values.flatten(2).to(dtype), features.to(dtype), cutoff)
    return filtered.view_as(values)


def guide_features(image: Tensor, sigma_rgb: float | Tensor, sigma_xy: float | Tensor) -> Tensor:
    """Colour and position in units of their sigmas, ``[B, C + 2, H W]``: there W is exp(-|f - f'|^2 / 2)."""
    check_sigma("sigma_xy", sigma_xy, image)
    colour = guide_colour(image, sigma_rgb)
    height, width = image.shape[2:]
    rows = torch.arange(height, dtype=colour.dtype, device=image.device)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=colour.dtype, device=image.device).expand(height, width)
    place = torch.stack([rows, columns]).flatten(1) / _at_least(sigma_xy, _NARROWEST)
    return torch.cat([colour.flatten(2), place.expand(image.shape[0], -1, -1)], 1)


def guide_colour(image: Tensor, sigma_rgb: float | Tensor) -> Tensor:
    """Colour in units of its sigma, ``[B, C, H, W]``, around 0: only differences count, near 0 they are accurate."""
    check_sigma("sigma_rgb", sigma_rgb, image)
    image = image.to(wide_dtype(image))
    sigma = _at_least(sigma_rgb, _NARROWEST)
    if image.numel() == 0:
        return image / sigma
    with torch.no_grad():
        low, high = torch.aminmax(image.flatten(2), dim=2)
        middle = (low / 2 + high / 2)[:, :, None, None]
        # Where squares would overflow, smaller colours give the same weights: 1 for equal ones and 0 for others.
        reach = (high / 2 - low / 2).amax(1)[:, None, None, None]
        shrink = (_FARTHEST * sigma / reach).clamp(max=1)
    return (image - middle) * shrink / sigma


def choose_tolerance(method: str, tolerance: float, backend: str, pixels: int) -> float:
    """The share of the weights that may be left out: 0 visits all pairs."""
    check_choice("method", method, _METHODS)
    check_choice("backend", backend, _BACKENDS)
    check_number("tolerance", tolerance, above=0, below=1)
    if method == "exact" or (method == "auto" and pixels < _WORTH_SORTING):
        return 0.0
    return float(tolerance)


def check_guide(image: Tensor, anchor: Tensor, name: str) -> None:
    """``image`` must be ``[B, C, H, W]`` with the batch and size of the argument called ``name``."""
    check_floating("image", image)
    if image.dim() != 4 or image.shape[1] < 1:
        raise ValueError(f"image: expected [B, C, H, W] with C >= 1, got {shape_text(image.shape)}")
    expected = (anchor.shape[0], image.shape[1], *anchor.shape[2:])
    check_like("image", image, expected, name, anchor)
    check_finite("image", image)


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


def _at_least(sigma: float | Tensor, least: float) -> float | Tensor:
    return sigma.clamp(min=least) if isinstance(sigma, Tensor) else max(float(sigma), least)
