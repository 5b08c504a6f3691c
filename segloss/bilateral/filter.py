"""The bilateral filter: a Gaussian kernel of colour and position, applied to any number of channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from segloss.bilateral.guide import check_channels, check_guide, colour_sigma, guide_features
from segloss.bilateral.operator import Bilateral
from segloss.bilateral.plan import make_plan
from segloss.common.checks import (
    check_finite,
    check_floating,
    check_like,
    check_spacing,
)
from segloss.common.reduction import wide_dtype


def bilateral_filter(
    values: Tensor,
    image: Tensor,
    *,
    sigma_rgb: float | Tensor | None = None,
    sigma_xy: float | Tensor = 100.0,
    spacing: Sequence[float] | None = None,
    method: str = "auto",
    tolerance: float = 1e-2,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    r"""Product of the bilateral affinity matrix of an image with any number of channels.

    .. math:: (W v)_p = \sum_q W_{pq} v_q, \qquad
        W_{pq} = \exp\Big(-\frac{\|I_p - I_q\|^2}{2 \sigma_{rgb}^2} - \frac{\|x_p - x_q\|^2}{2 \sigma_{xy}^2}\Big)

    over all pairs of pixels of a signal, an image or a volume, p = q included, not normalised. Differentiable with
    respect to the values, the image and both sigmas; twice in eager mode (with respect to image and sigmas by dense
    matrices, quadratic in the pixels). Forward mode (``jvp``, ``torch.func.hessian``) is not supported.

    Args:
        values: channels to filter, ``[B, K, *spatial]`` of 1 to 3 spatial dimensions, within ±1e30 (float64: ±1e130).
        image: guide, ``[B, C, *spatial]``: RGB in [0, 1], or any C >= 1 channels in the unit of ``sigma_rgb``.
        sigma_rgb: width of the kernel in colour, above 0, in the unit of ``image``; a number or a scalar tensor.
            Infinite: colour does not count. None: 15/255, for RGB in [0, 1]; three channels beyond that are refused.
        sigma_xy: width of the kernel in space, in pixels or the unit of ``spacing``, likewise.
        spacing: physical size of a pixel or voxel along each spatial axis, (y, x) or (z, y, x), above 0; ``sigma_xy``
            is in that unit then. None: pixels.
        method: ``"exact"`` visits all pairs of pixels; ``"blocksparse"`` leaves out pairs of pixel tiles that do not
            count, and expands the weights of others; ``"lowrank"`` replaces W by a symmetric positive semi-definite
            matrix of low rank, far faster on photographs and wide kernels; ``"lattice"`` replaces it by a symmetric one
            on a permutohedral lattice, in which colours and places are rounded to a grid of simplices: linear in pixels
            for narrow kernels too, but to no tolerance, and not positive semi-definite: on photographs its error is 9
            to 19%, of which 5 to 8% are no common factor, elsewhere up to 60%. A pixel has its weight of 1 with itself
            to 5% on photographs, 12% in general. Channels of the image and spatial axes may be 8 together, more are not
            tested. ``"auto"`` is exact below 2,500 pixels, block-sparse below 10,000 and with Triton, and else takes
            low rank where that is fast and reaches the tolerance, and block-sparse where it is not or does not; it
            never takes the lattice.
        tolerance: the error that is allowed, in (0, 1). Block-sparse: the errors of the weights, in absolute terms,
            sum to at most this share of all weights in every tile of pixels: a guarantee for every region. Errors of
            filtered probabilities are usually 10 to 100 times smaller; values that cancel may have larger ones. Low
            rank: the relative error of the whole result in the Euclidean norm, as measured on some pixels (see
            :func:`bilateral_error`); it decides on the rank. It is not an error per pixel: where colours are rare, and
            sums of weights small, relative errors are larger. Choose block-sparse where those pixels matter. The
            lattice has none, but image and sigmas get gradients by pairs of tiles, to this tolerance.
        backend: ``"torch"`` runs on any device, ``"triton"`` on CUDA devices (low rank is plain torch there too);
            ``"auto"`` takes Triton where it can. In float32 the kernels take distances from products of 16 columns for
            up to 5 features, which are channels of the image and spatial axes, of 32 for up to 10 and of 64 for up to
            21, which are slower; of more features, from differences. Devices of compute capability below 8.0 run plain
            torch in any case.
        precision: ``"auto"`` lets the low-rank method multiply in bfloat16 where the processor is fast at it and the
            tolerance is 5e-3 or more; ``"float32"`` does not.

    Returns:
        ``[B, K, *spatial]``, float32 (float64 where values or image are float64); :func:`bilateral_error` tells its
        error. Gradients of the values are those of the approximate W, the gradients of image and sigmas those of the
        exact one up to the tolerance, by pairs of tiles: with the lattice they take most of the time of a training
        step. Where values are not checked, on CUDA and under ``torch.compile`` (see :func:`~segloss.check_values`),
        NaN, infinity and values beyond the limit may give NaN and infinity anywhere in their image.

    Raises:
        TypeError: ``values`` or ``image`` that are not floating point, sigmas that are not numbers.
        ValueError: shapes or devices that do not fit each other, NaN, infinity or values beyond their limit, sigmas
            that are not above 0, a ``spacing`` of another length or not above 0, an image of three channels outside [0,
            1] by more than 0.01 without a ``sigma_rgb``, ``tolerance`` outside (0, 1), an unknown ``method``,
            ``backend`` or ``precision``, a ``backend`` that cannot run.
        ToleranceError: a ValueError; ``method="lowrank"`` and an image on which its error is above the tolerance, as
            on noise and strongly textured images.
        ValueError: ``method="lattice"`` and sigmas that are too small for it, with
            colours or places more than 65,000 of them apart (float64: 2e12) or more vertices than 62 bits can number;
            more than 60 million pixels.

    Source:
        The affinities of *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (3), with
        the kernel of *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*. The lattice:
        *Fast High-Dimensional Filtering Using the Permutohedral Lattice*.

    Example:
        >>> image = torch.zeros(1, 3, 2, 2)
        >>> bilateral_filter(torch.ones(1, 1, 2, 2), image, sigma_xy=float("inf"))
        tensor([[[[4., 4.],
                  [4., 4.]]]])
    """
    check_channels(values)
    check_guide(image, values, "values")
    check_spacing(spacing, image.dim() - 2, "image", image)
    sigma_rgb = colour_sigma(image, sigma_rgb)
    plan = make_plan(method, tolerance, backend, precision, image)
    dtype = torch.promote_types(wide_dtype(values), wide_dtype(image))
    features = guide_features(image.to(dtype), sigma_rgb, sigma_xy, spacing)
    filtered = Bilateral.apply(values.flatten(2).to(dtype), features, plan)[0]
    return filtered.view_as(values)


def bilateral_error(
    values: Tensor,
    image: Tensor,
    filtered: Tensor,
    *,
    sigma_rgb: float | Tensor | None = None,
    sigma_xy: float | Tensor = 100.0,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    r"""Relative error of filtered values, measured on some pixels of each image.

    .. math:: \frac{\|\tilde v - W v\|}{\|W v\|}

    in the Euclidean norm over the channels of 64 pixels (up to 256 in images below 256 x 256), which are the same in
    every call and spread evenly. The error of all pixels is usually within 30% of the result; not so for errors near
    the rounding of float32, and for values that are 0 at most pixels.

    Args:
        values: channels that were filtered, ``[B, K, *spatial]``.
        image, sigma_rgb, sigma_xy, spacing: as in :func:`bilateral_filter`.
        filtered: what came out, ``[B, K, *spatial]``, by whatever method.

    Returns:
        ``[B]``, a constant, at most 1e30; float32 (float64 where values or image are float64).

    Raises:
        TypeError, ValueError: as :func:`bilateral_filter`.

    Source:
        The W of :func:`bilateral_filter`, computed exactly for the pixels that are looked at.

    Example:
        >>> values, image = torch.rand(1, 2, 64, 64), torch.rand(1, 1, 64, 64)
        >>> bool(bilateral_error(values, image, bilateral_filter(values, image, tolerance=1e-2)) < 1e-2)
        True
    """
    check_channels(values)
    check_floating("filtered", filtered)
    check_like("filtered", filtered, values.shape, "values", values)
    check_finite("filtered", filtered)
    check_guide(image, values, "values")
    check_spacing(spacing, image.dim() - 2, "image", image)
    sigma_rgb = colour_sigma(image, sigma_rgb)
    dtype = torch.promote_types(wide_dtype(values), wide_dtype(image))
    features = guide_features(image.to(dtype), sigma_rgb, sigma_xy, spacing).detach()
    flat, result = (t.detach().flatten(2).to(dtype) for t in (values, filtered))
    return torch.ops.segloss.bilateral_error(flat, features, result)
