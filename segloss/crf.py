"""Potts CRF losses: segments that are smooth and align with the contrast edges of the image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss._checks import (
    check_bool,
    check_choice,
    check_floating,
    check_logits,
    check_number,
    check_valid,
    require,
    shape_text,
)
from segloss._module import LossModule
from segloss._pairs import neighbours
from segloss._reduce import Reduction, check_reduction, reduce, wide_dtype
from segloss.bilateral import check_guide, check_sigma, choose_tolerance, guide_colour, guide_features
from segloss.bilateral.operator import PairwiseEnergy

_FORMS = ("potts", "quadratic")
_NORMALIZATIONS = (None, "pixels", "pairs")
_OFFSETS = {4: [(0, 1), (1, 0)], 8: [(0, 1), (1, -1), (1, 0), (1, 1)]}


def potts_crf(
    logits: Tensor,
    image: Tensor,
    *,
    sigma_rgb: float | Tensor = 15 / 255,
    sigma_xy: float | Tensor = 100.0,
    valid: Tensor | None = None,
    from_logits: bool = True,
    form: str = "potts",
    scale_factor: float = 1.0,
    normalize: str | None = None,
    method: str = "auto",
    tolerance: float = 1e-2,
    backend: str = "auto",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Dense CRF loss: bilinear relaxation of the Potts model over all pairs of pixels.

    .. math:: L = \sum_k (m \circ (1 - S^k))^\top W (m \circ S^k)

    with the softmax S of the logits, the mask m of the valid pixels and the affinities W of
    :func:`~segloss.bilateral.bilateral_filter`, which are not normalised: the value grows with the number of pairs that
    W joins, and weights of the order of 1e-9 are usual. The gradient comes from the saved output of the filter, so that
    the backward pass costs next to nothing; the loss is differentiable with respect to image and sigmas as well.

    Args:
        logits: class logits, ``[B, K, H, W]``, K >= 2; probabilities in [0, 1], K >= 1, if ``from_logits`` is False.
        image: guide, ``[B, C, H, W]``: RGB in [0, 1] (see :func:`~segloss.images.denormalize`), or any C >= 1 channels
            in the unit of ``sigma_rgb``.
        sigma_rgb: width of the kernel in colour, above 0, in the unit of ``image``; a number or a scalar tensor.
        sigma_xy: width of the kernel in space, above 0, in pixels of ``image``, likewise.
        valid: pixels that count, bool, ``[B, H, W]``; all of them if None.
        from_logits: take the softmax of ``logits``; otherwise they are probabilities, which need not sum to 1.
        form: ``"potts"``, or ``"quadratic"`` for :math:`-\sum_k (m \circ S^k)^\top W (m \circ S^k)`: the value of the
            public rloss code, up to its weaker kernel. Where S sums to 1 both have the same logit gradient.
        scale_factor: in (0, 1]: the loss at this scale of the input (image and mask by the nearest pixel, S bilinear,
            ``sigma_xy`` times the factor), as rloss uses it with 0.5. The value shrinks with the fourth power. Ignored
            pixels next to a border of the mask then have a share in the S of their valid neighbours.
        normalize: divide each image's loss by its number of valid ``"pixels"`` or ``"pairs"`` (their square), at the
            scale of the computation; None for the formula.
        method, tolerance, backend: as in :func:`~segloss.bilateral.bilateral_filter`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 where logits or image are float64); at least 0 up to
        rounding for ``"potts"``, 0 for images without valid pixels. NaN and infinity that are not checked (see
        :func:`~segloss.check_values`) make the loss of their image NaN; other values that are not checked count as they
        are.

    Raises:
        TypeError: ``logits`` or ``image`` that are not floating point, ``valid`` that is not bool, sigmas that are not
            numbers.
        ValueError: shapes or devices that do not fit each other, a single class of logits, NaN or infinity,
            probabilities outside [0, 1] by more than 1e-3, sigmas that are not above 0, ``scale_factor`` outside (0, 1]
            or that leaves no pixel, ``tolerance`` outside (0, 1), an unknown ``form``, ``normalize``, ``method`` or
            ``backend``.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (3); *On Regularized Losses
        for Weakly-supervised CNN Segmentation*.

    Example:
        >>> image = torch.rand(2, 3, 32, 32)
        >>> logits = torch.zeros(2, 21, 32, 32)
        >>> logits[:, 0] = 1000  # one class everywhere: nothing to pay
        >>> potts_crf(logits, image)
        tensor(0.)
    """
    _check(logits, image, valid, from_logits, reduction)
    _check_settings(form, scale_factor, normalize)
    check_sigma("sigma_xy", sigma_xy, image)
    dtype = torch.promote_types(wide_dtype(logits), wide_dtype(image))
    probability = _probability(logits.to(dtype), from_logits)
    guide = image.to(dtype)
    mask = _mask(valid, probability)
    if scale_factor != 1:
        probability, guide, mask = _shrink(probability, guide, mask, scale_factor)
        sigma_xy = sigma_xy * scale_factor
    cutoff = choose_tolerance(method, tolerance, backend, guide.shape[2] * guide.shape[3])
    features = guide_features(guide, sigma_rgb, sigma_xy)
    energy = PairwiseEnergy.apply(
        (mask * probability).flatten(2), mask.flatten(2), features, cutoff, form == "quadratic", from_logits
    )[0]
    if normalize is not None:
        pixels = mask.sum((1, 2, 3)).clamp(min=1)
        energy = energy / (pixels if normalize == "pixels" else pixels**2)
    return reduce(energy, reduction)


class PottsCRF(LossModule):
    """:func:`potts_crf` as a module; a sigma may be a parameter and learnt."""

    sigma_rgb: float | Tensor
    sigma_xy: float | Tensor
    from_logits: bool
    form: str
    scale_factor: float
    normalize: str | None
    method: str
    tolerance: float
    backend: str

    def __init__(
        self,
        *,
        sigma_rgb: float | Tensor = 15 / 255,
        sigma_xy: float | Tensor = 100.0,
        from_logits: bool = True,
        form: str = "potts",
        scale_factor: float = 1.0,
        normalize: str | None = None,
        method: str = "auto",
        tolerance: float = 1e-2,
        backend: str = "auto",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            reduction,
            sigma_rgb=sigma_rgb,
            sigma_xy=sigma_xy,
            from_logits=from_logits,
            form=form,
            scale_factor=scale_factor,
            normalize=normalize,
            method=method,
            tolerance=tolerance,
            backend=backend,
        )
        _check_settings(form, scale_factor, normalize)
        check_sigma("sigma_rgb", sigma_rgb)
        check_sigma("sigma_xy", sigma_xy)
        check_bool("from_logits", from_logits)
        choose_tolerance(method, tolerance, backend, 0)

    def forward(self, logits: Tensor, image: Tensor, valid: Tensor | None = None) -> Tensor:
        return potts_crf(
            logits,
            image,
            sigma_rgb=self.sigma_rgb,
            sigma_xy=self.sigma_xy,
            valid=valid,
            from_logits=self.from_logits,
            form=self.form,
            scale_factor=self.scale_factor,
            normalize=self.normalize,
            method=self.method,
            tolerance=self.tolerance,
            backend=self.backend,
            reduction=self.reduction,
        )


def grid_potts(
    logits: Tensor,
    image: Tensor,
    *,
    sigma_rgb: float | Tensor = 15 / 255,
    connectivity: int = 4,
    valid: Tensor | None = None,
    from_logits: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Potts CRF loss over neighbouring pixels only.

    .. math:: L = \sum_k (m \circ (1 - S^k))^\top W (m \circ S^k), \qquad
        W_{pq} = \exp\Big(-\frac{\|I_p - I_q\|^2}{2 \sigma_{rgb}^2}\Big) \text{ for neighbours } p, q

    and 0 elsewhere; every pair of neighbours counts in both directions, as in :func:`potts_crf`. Linear in the number
    of pixels.

    Args:
        logits: class logits, ``[B, K, H, W]``, K >= 2; probabilities in [0, 1], K >= 1, if ``from_logits`` is False.
        image: guide, ``[B, C, H, W]``: RGB in [0, 1], or any C >= 1 channels in the unit of ``sigma_rgb``.
        sigma_rgb: width of the kernel in colour, above 0, in the unit of ``image``; a number or a scalar tensor.
        connectivity: 4 or 8 neighbours of each pixel; diagonal ones count like the others.
        valid: pixels that count, bool, ``[B, H, W]``; all of them if None.
        from_logits: take the softmax of ``logits``; otherwise they are probabilities, which need not sum to 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 where logits or image are float64); at least 0. Values
        that are not checked: as in :func:`potts_crf`.

    Raises:
        TypeError, ValueError: as :func:`potts_crf`, and for ``connectivity`` other than 4 and 8.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (3) with the sparse affinities
        of its sec. 1.1.

    Example:
        >>> halves = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> grid_potts(halves, torch.zeros(1, 3, 1, 2), from_logits=False)
        tensor(2.)
    """
    _check(logits, image, valid, from_logits, reduction)
    check_choice("connectivity", connectivity, tuple(_OFFSETS))
    dtype = torch.promote_types(wide_dtype(logits), wide_dtype(image))
    mask = _mask(valid, logits.to(dtype))
    inside = mask * _probability(logits.to(dtype), from_logits)
    outside = mask - inside
    guide = guide_colour(image.to(dtype), sigma_rgb)
    energy = inside.new_zeros(len(inside))
    for (i, j), (s, t), (not_s, not_t) in neighbours((guide, inside, outside), _OFFSETS[connectivity]):
        weight = torch.exp((i - j).square().sum(1) / -2)
        energy = energy + (weight * (not_s * t + s * not_t).sum(1)).sum((1, 2))
    return reduce(energy, reduction)


class GridPotts(LossModule):
    """:func:`grid_potts` as a module; the sigma may be a parameter and learnt."""

    sigma_rgb: float | Tensor
    connectivity: int
    from_logits: bool

    def __init__(
        self,
        *,
        sigma_rgb: float | Tensor = 15 / 255,
        connectivity: int = 4,
        from_logits: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction, sigma_rgb=sigma_rgb, connectivity=connectivity, from_logits=from_logits)
        check_sigma("sigma_rgb", sigma_rgb)
        check_choice("connectivity", connectivity, tuple(_OFFSETS))
        check_bool("from_logits", from_logits)

    def forward(self, logits: Tensor, image: Tensor, valid: Tensor | None = None) -> Tensor:
        return grid_potts(
            logits,
            image,
            sigma_rgb=self.sigma_rgb,
            connectivity=self.connectivity,
            valid=valid,
            from_logits=self.from_logits,
            reduction=self.reduction,
        )


def _check_settings(form: str, scale_factor: float, normalize: str | None) -> None:
    check_choice("form", form, _FORMS)
    check_choice("normalize", normalize, _NORMALIZATIONS)
    check_number("scale_factor", scale_factor, above=0, most=1)


def _check(logits: Tensor, image: Tensor, valid: Tensor | None, from_logits: bool, reduction: Reduction) -> None:
    check_bool("from_logits", from_logits)
    if from_logits:
        check_logits(logits, flat=True)
    else:
        check_floating("logits", logits)
        if logits.dim() != 4 or logits.shape[1] < 1:
            raise ValueError(f"logits: expected probabilities [B, K, H, W], got {shape_text(logits.shape)}")
        require(
            "logits",
            logits,
            lambda: ((logits >= -1e-3) & (logits <= 1 + 1e-3)).all(),
            lambda: "expected probabilities from 0 to 1 with from_logits=False, got values outside or NaN",
        )
    check_guide(image, logits, "logits")
    check_valid(valid, logits)
    check_reduction(reduction)


def _probability(logits: Tensor, from_logits: bool) -> Tensor:
    return torch.softmax(logits, 1) if from_logits else logits


def _mask(valid: Tensor | None, like: Tensor) -> Tensor:
    """1 at valid pixels, ``[B, 1, H, W]``."""
    return torch.ones_like(like[:, :1]) if valid is None else valid[:, None].to(like.dtype)


def _shrink(probability: Tensor, image: Tensor, mask: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    if min(image.shape[2:]) * factor < 1:
        raise ValueError(f"scale_factor: expected to leave at least 1 pixel of {shape_text(image.shape)}, got {factor}")
    smaller = F.interpolate(probability, scale_factor=factor, mode="bilinear", align_corners=False)
    return smaller, F.interpolate(image, scale_factor=factor), F.interpolate(mask, scale_factor=factor)
