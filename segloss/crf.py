"""Potts CRF losses: segments that are smooth and align with the contrast edges of the image."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss._pairs import Offset, cube, neighbours
from segloss._window import WindowedEnergy
from segloss.bilateral import (
    bilateral_filter,
    check_guide,
    check_plan,
    check_sigma,
    check_space,
    colour_sigma,
    guide_colour,
    guide_features,
    make_plan,
)
from segloss.bilateral.operator import Bilateral, PairwiseEnergy
from segloss.common.checks import (
    check_bool,
    check_choice,
    check_floating,
    check_fractions,
    check_ignore_index,
    check_int,
    check_integer,
    check_labels,
    check_like,
    check_logits,
    check_number,
    check_spacing,
    check_valid,
    require,
    shape_text,
)
from segloss.common.reduction import Reduction, check_reduction, reduce, wide_dtype
from segloss.common.resizing import resize_linear
from segloss.common.settings import LossModule

_FORMS = ("potts", "quadratic")
_NORMALIZATIONS = (None, "pixels", "pairs")
_WHOLE = 0.999  # share of valid pixels in a pixel of a lower resolution that is made of nothing else, but for rounding
# Of each number of neighbours: the spatial dimensions, and along how many of them a neighbour may be one step away.
_CONNECTIVITIES = {2: (1, 1), 4: (2, 1), 8: (2, 2), 6: (3, 1), 18: (3, 2), 26: (3, 3)}


def potts_crf(
    logits: Tensor,
    image: Tensor,
    *,
    sigma_rgb: float | Tensor | None = None,
    sigma_xy: float | Tensor = 100.0,
    spacing: Sequence[float] | None = None,
    valid: Tensor | None = None,
    gate: Tensor | None = None,
    from_logits: bool = True,
    form: str = "potts",
    scale_factor: float = 1.0,
    centred: bool = False,
    normalize: str | None = None,
    method: str = "auto",
    tolerance: float = 1e-2,
    backend: str = "auto",
    precision: str = "auto",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Dense CRF loss: bilinear relaxation of the Potts model over all pairs of pixels.

    .. math:: L = \sum_k (m \circ (1 - S^k))^\top W (m \circ S^k)

    with the softmax S of the logits, the mask m of the valid pixels and the affinities W of
    :func:`~segloss.bilateral_filter`, which are not normalised: the value grows with the number of pairs that
    W joins, and weights of the order of 1e-9 are usual. The gradient comes from the saved output of the filter, so that
    the backward pass costs next to nothing; the loss is differentiable with respect to image and sigmas as well.

    A gate g weights what each pixel pays:

    .. math:: L = \sum_k (g \circ m \circ (1 - S^k))^\top W (m \circ S^k)

    It is a constant, and :func:`confidence_gate` makes the usual one. The public DenseEnergyLoss code has this value in
    its quadratic form, but returns :math:`-2 g \circ W(m \circ S)` as the gradient of S, which is the gradient of no
    function unless g is the same everywhere. Here it is that of the value,
    :math:`-g \circ W(m \circ S) - W(g \circ m \circ S)`: a pixel that pays little is still pulled by those that pay. A
    gated backward pass filters once more.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2; probabilities in [0, 1], K >= 1, if ``from_logits`` is
            False.
        image: guide, ``[B, C, *spatial]``: RGB in [0, 1] (see :func:`~segloss.denormalize`), or any C >= 1 channels
            in the unit of ``sigma_rgb``.
        sigma_rgb: width of the kernel in colour, above 0, in the unit of ``image``; a number or a scalar tensor. None:
            15/255, for RGB in [0, 1]; three channels beyond that are refused.
        sigma_xy: width of the kernel in space, above 0, in pixels of ``image`` or the unit of ``spacing``, likewise.
        spacing: physical size of a pixel or voxel along each spatial axis, (y, x) or (z, y, x), above 0; ``sigma_xy``
            is in that unit then. None: pixels.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        gate: weight of what each pixel pays, in [0, 1], ``[B, *spatial]``, a constant; 1 everywhere if None.
        from_logits: take the softmax of ``logits``; otherwise they are probabilities, which need not sum to 1.
        form: ``"potts"``, or ``"quadratic"`` for :math:`-\sum_k (m \circ S^k)^\top W (m \circ S^k)`: the value of the
            public rloss code, up to its weaker kernel. Where S sums to 1 both have the same logit gradient.
        scale_factor: in (0, 1]: the loss at this scale of the input (S linear along each axis, image, mask and gate by
            the nearest pixel, ``sigma_xy`` times the factor), as rloss uses it with 0.5. The value shrinks with the
            fourth power, that of volumes with the sixth. The nearest pixel is torch's, the top left one of its cell,
            and S that of the middle: at the factor s colours are taken :math:`(1 / s - 1) / 2` pixels above and to the
            left of S, 0.5 at 0.5 and 1.5 at 0.25. Ignored pixels next to a border of the mask then have a share in the
            S of their valid neighbours.
        centred: with ``scale_factor``, take image and gate where S is taken, linear as S, and count the pixels that
            are made of valid ones alone.
        normalize: divide each image's loss by its number of valid ``"pixels"`` or ``"pairs"`` (their square), at the
            scale of the computation; None for the formula. ``"pixels"`` makes a weight fit images of any size, but of
            one resolution: at half of it, or half the ``scale_factor``, a pixel has a quarter of its neighbours, a
            voxel an eighth, and the value shrinks by as much. ``"pairs"`` makes it fit another resolution, not another
            size.
        method, tolerance, backend, precision: as in :func:`~segloss.bilateral_filter`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 where logits or image are float64); at least 0 for
        ``"potts"`` up to the tolerance times the quadratic form, of which the value is a difference; 0 for images
        without valid pixels. NaN and infinity that are not checked (see :func:`~segloss.check_values`) make the loss of
        their image NaN; other values that are not checked count as they are.

    Raises:
        TypeError: ``logits``, ``image`` or ``gate`` that are not floating point, ``valid`` that is not bool, sigmas
            or ``spacing`` that are not numbers, ``from_logits`` or ``centred`` that are no bools.
        ValueError: shapes or devices that do not fit each other, a single class of logits, NaN or infinity,
            probabilities outside [0, 1] by more than 1e-3, ``gate`` outside [0, 1], sigmas that are not above 0, a
            ``spacing`` of another length or not above 0, an image of three channels outside [0, 1] by more than 0.01
            without a ``sigma_rgb``, ``scale_factor`` outside (0, 1] or that leaves no pixel, ``tolerance`` outside (0,
            1), an unknown ``form``, ``normalize``, ``method``, ``backend`` or ``precision``; a ``backend`` that cannot
            run, and with ``method="lowrank"`` a ``tolerance`` that it cannot reach.

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
    _check(logits, image, spacing, valid, from_logits, reduction)
    _check_gate(gate, logits)
    _check_settings(form, scale_factor, centred, normalize)
    check_sigma("sigma_xy", sigma_xy, image)
    sigma_rgb = colour_sigma(image, sigma_rgb)
    probability, guide, mask = _prepare(logits, image, valid, from_logits)
    if scale_factor != 1:
        probability, guide, mask, gate = _shrink(probability, guide, mask, gate, scale_factor, centred)
        sigma_xy = sigma_xy * scale_factor
    plan = make_plan(method, tolerance, backend, precision, guide)
    features = guide_features(guide, sigma_rgb, sigma_xy, spacing)
    values, flat_mask = (mask * probability).flatten(2), mask.flatten(2)
    if gate is None:
        value_only = not (torch.is_grad_enabled() and (values.requires_grad or features.requires_grad))
        quadratic = form == "quadratic"
        energy = PairwiseEnergy.apply(values, flat_mask, features, plan, quadratic, from_logits, value_only)[0]
    else:
        partner = -values if form == "quadratic" else flat_mask - values
        weighted = gate.detach().to(values.dtype).flatten(1)[:, None] * partner
        energy = (weighted * Bilateral.apply(values, features, plan)[0]).sum((1, 2))
    if normalize is not None:
        pixels = flat_mask.sum((1, 2)).clamp(min=1)
        energy = energy / (pixels if normalize == "pixels" else pixels**2)
    return reduce(energy, reduction)


class PottsCRF(LossModule):
    """:func:`potts_crf` as a module; a sigma may be a parameter and learnt."""

    sigma_rgb: float | Tensor | None
    sigma_xy: float | Tensor
    spacing: Sequence[float] | None
    from_logits: bool
    form: str
    scale_factor: float
    centred: bool
    normalize: str | None
    method: str
    tolerance: float
    backend: str
    precision: str

    def __init__(
        self,
        *,
        sigma_rgb: float | Tensor | None = None,
        sigma_xy: float | Tensor = 100.0,
        spacing: Sequence[float] | None = None,
        from_logits: bool = True,
        form: str = "potts",
        scale_factor: float = 1.0,
        centred: bool = False,
        normalize: str | None = None,
        method: str = "auto",
        tolerance: float = 1e-2,
        backend: str = "auto",
        precision: str = "auto",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            reduction,
            sigma_rgb=sigma_rgb,
            sigma_xy=sigma_xy,
            spacing=spacing,
            from_logits=from_logits,
            form=form,
            scale_factor=scale_factor,
            centred=centred,
            normalize=normalize,
            method=method,
            tolerance=tolerance,
            backend=backend,
            precision=precision,
        )
        _check_settings(form, scale_factor, centred, normalize)
        if sigma_rgb is not None:
            check_sigma("sigma_rgb", sigma_rgb)
        check_sigma("sigma_xy", sigma_xy)
        check_spacing(spacing)
        check_bool("from_logits", from_logits)
        check_plan(method, tolerance, backend, precision)

    def forward(self, logits: Tensor, image: Tensor, valid: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        return potts_crf(
            logits,
            image,
            sigma_rgb=self.sigma_rgb,
            sigma_xy=self.sigma_xy,
            spacing=self.spacing,
            valid=valid,
            gate=gate,
            from_logits=self.from_logits,
            form=self.form,
            scale_factor=self.scale_factor,
            centred=self.centred,
            normalize=self.normalize,
            method=self.method,
            tolerance=self.tolerance,
            backend=self.backend,
            precision=self.precision,
            reduction=self.reduction,
        )


def confidence_gate(
    logits: Tensor, labels: Tensor | None = None, *, ignore_index: int = 255, from_logits: bool = True
) -> Tensor:
    r"""Gate of :func:`potts_crf` that spares labelled pixels as far as the prediction is sure of itself.

    .. math:: g_p = 1 - \max_k S_p^k \text{ where p is labelled, } 1 \text{ elsewhere}

    as the public DenseEnergyLoss code has it. With ``scale_factor`` that code takes the maximum of the shrunken S; here
    the gate is made first and shrunk as the mask is.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2; probabilities in [0, 1], K >= 1, if ``from_logits`` is
            False.
        labels: class of each pixel or ``ignore_index``, integers, ``[B, *spatial]``: seeds or pseudo-labels. None: all
            pixels are labelled.
        ignore_index: label of the pixels without a label.
        from_logits: take the softmax of ``logits``; otherwise they are probabilities.

    Returns:
        ``[B, *spatial]`` in [0, 1], a constant; float32 (float64 for float64 logits).

    Raises:
        TypeError: ``logits`` that are not floating point, ``labels`` that are not integers.
        ValueError: shapes or devices that do not fit each other, a single class of logits, NaN or infinity,
            probabilities outside [0, 1] by more than 1e-3, a label that is neither a class nor ``ignore_index``.

    Source:
        The public code of the DenseEnergyLoss of weakly supervised methods.

    Example:
        >>> probability = torch.tensor([[0.75, 0.5], [0.25, 0.5]]).view(1, 2, 1, 2)
        >>> confidence_gate(probability, torch.tensor([[[0, 255]]]), from_logits=False)
        tensor([[[0.2500, 1.0000]]])
    """
    _check_probability(logits, from_logits)
    check_ignore_index(ignore_index)
    if labels is not None:
        check_integer("labels", labels)
        check_like("labels", labels, (logits.shape[0], *logits.shape[2:]), "logits", logits)
        check_labels(labels.long(), logits.shape[1], ignore_index, "logits")
    with torch.no_grad():
        gate = 1 - _probability(logits.to(wide_dtype(logits)), from_logits).amax(1).clamp(0, 1)
        return gate if labels is None else gate.masked_fill(labels.long() == ignore_index, 1)


def grid_potts(
    logits: Tensor,
    image: Tensor,
    *,
    sigma_rgb: float | Tensor | None = None,
    connectivity: int | None = None,
    spacing: Sequence[float] | None = None,
    valid: Tensor | None = None,
    from_logits: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Potts CRF loss over neighbouring pixels only.

    .. math:: L = \sum_k (m \circ (1 - S^k))^\top W (m \circ S^k), \qquad
        W_{pq} = \exp\Big(-\frac{\|I_p - I_q\|^2}{2 \sigma_{rgb}^2}\Big) \text{ for neighbours } p, q

    and 0 elsewhere; every pair of neighbours counts in both directions, as in :func:`potts_crf`. Linear in the number
    of pixels. With a ``spacing`` the weights are divided by the distance of the neighbours, in units of the smallest
    spacing,

    .. math:: W_{pq} = \frac{\min_a s_a}{\|x_p - x_q\|}
        \exp\Big(-\frac{\|I_p - I_q\|^2}{2 \sigma_{rgb}^2}\Big),

    so that a boundary costs the same for its area whichever axis it lies across: pairs across the wide axis of a voxel
    stand for less of it.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2; probabilities in [0, 1], K >= 1, if ``from_logits`` is
            False.
        image: guide, ``[B, C, *spatial]``: RGB in [0, 1], or any C >= 1 channels in the unit of ``sigma_rgb``.
        sigma_rgb: width of the kernel in colour, above 0, in the unit of ``image``; a number or a scalar tensor. None:
            15/255, for RGB in [0, 1]; three channels beyond that are refused.
        connectivity: number of neighbours of each pixel: 2 in signals, 4 or 8 in images, 6, 18 or 26 in volumes;
            without a ``spacing`` diagonal ones count like the others. None: the least, those along the axes.
        spacing: physical size of a pixel or voxel along each spatial axis, (y, x) or (z, y, x), above 0. None: all
            neighbours have the same distance.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        from_logits: take the softmax of ``logits``; otherwise they are probabilities, which need not sum to 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 where logits or image are float64); at least 0. Values
        that are not checked: as in :func:`potts_crf`.

    Raises:
        TypeError, ValueError: as :func:`potts_crf`, and for a ``connectivity`` that is not one of these.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (3) with the sparse affinities
        of its sec. 1.1.

    Example:
        >>> halves = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> grid_potts(halves, torch.zeros(1, 3, 1, 2), from_logits=False)
        tensor(2.)
    """
    _check(logits, image, spacing, valid, from_logits, reduction)
    offsets = _neighbourhood(connectivity, image.dim() - 2)
    sigma_rgb = colour_sigma(image, sigma_rgb)
    probability, guide, mask = _prepare(logits, image, valid, from_logits)
    inside = probability if valid is None else mask * probability
    outside = mask - inside
    colour = guide_colour(guide, sigma_rgb)
    energy = inside.new_zeros(len(inside))
    axes = tuple(range(1, image.dim() - 1))
    for offset in offsets:
        share = 1.0 if spacing is None else min(map(float, spacing)) / _length(offset, spacing)
        for (i, j), (s, t), (not_s, not_t) in neighbours((colour, inside, outside), [offset]):
            weight = torch.exp((i - j).square().sum(1) / -2)
            # Of probabilities that sum to 1, both terms of a pair are the same.
            differ = 2 * share * (s * not_t).sum(1) if from_logits else share * (not_s * t + s * not_t).sum(1)
            energy = energy + (weight * differ).sum(axes)
    return reduce(energy, reduction)


class GridPotts(LossModule):
    """:func:`grid_potts` as a module; the sigma may be a parameter and learnt."""

    sigma_rgb: float | Tensor | None
    connectivity: int | None
    spacing: Sequence[float] | None
    from_logits: bool

    def __init__(
        self,
        *,
        sigma_rgb: float | Tensor | None = None,
        connectivity: int | None = None,
        spacing: Sequence[float] | None = None,
        from_logits: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            reduction, sigma_rgb=sigma_rgb, connectivity=connectivity, spacing=spacing, from_logits=from_logits
        )
        if sigma_rgb is not None:
            check_sigma("sigma_rgb", sigma_rgb)
        if connectivity is not None:
            check_choice("connectivity", connectivity, tuple(_CONNECTIVITIES))
        check_spacing(spacing)
        check_bool("from_logits", from_logits)

    def forward(self, logits: Tensor, image: Tensor, valid: Tensor | None = None) -> Tensor:
        return grid_potts(
            logits,
            image,
            sigma_rgb=self.sigma_rgb,
            connectivity=self.connectivity,
            spacing=self.spacing,
            valid=valid,
            from_logits=self.from_logits,
            reduction=self.reduction,
        )


def windowed_potts(
    logits: Tensor,
    image: Tensor,
    *,
    sigma_rgb: float | Tensor | None = None,
    sigma_xy: float | Tensor = 100.0,
    spacing: Sequence[float] | None = None,
    radius: int = 5,
    valid: Tensor | None = None,
    from_logits: bool = True,
    normalize: str | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Dense CRF loss over the pairs of pixels within a window only: a square, or a cube in volumes.

    .. math:: L = \sum_k (m \circ (1 - S^k))^\top W (m \circ S^k)

    with the W of :func:`potts_crf` where two pixels are at most ``radius`` pixels apart along every axis, and 0
    elsewhere. As there, p = q counts (its weight is 1, and it asks each pixel for a hard decision); from a radius of
    the longest side minus 1 on, both losses are equal. Time is linear in pixels and window; memory is linear in the
    pixels alone, and the gradient comes from the saved output of the filter.

    A window sees a small share of the kernel, :func:`window_mass`. Radius 5 at these sigmas: 1% to 3% on four
    photographs of 256 x 256 pixels; at ``sigma_rgb=0.1, sigma_xy=6``, the usual ones of the gated CRF loss: 44% to 50%,
    and 90% to 93% with radius 11.

    The public gated CRF code leaves p = q out, divides by the number of pixels and counts black pixels around the image
    in a constant. Up to that constant, its value with one kernel is ``windowed_potts(..., radius=r) -
    windowed_potts(..., radius=0)`` with ``normalize="pixels"``, and the logit gradients are equal.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2; probabilities in [0, 1], K >= 1, if ``from_logits`` is
            False.
        image: guide, ``[B, C, *spatial]``: RGB in [0, 1], or any C >= 1 channels in the unit of ``sigma_rgb``.
        sigma_rgb: width of the kernel in colour, above 0, in the unit of ``image``; a number or a scalar tensor. None:
            15/255, for RGB in [0, 1]; three channels beyond that are refused.
        sigma_xy: width of the kernel in space, above 0, in pixels or the unit of ``spacing``, likewise.
        spacing: physical size of a pixel or voxel along each spatial axis, (y, x) or (z, y, x), above 0; ``sigma_xy``
            is in that unit then. None: pixels.
        radius: pixels that two pixels may be apart along an axis, at least 0; 0 leaves each pixel with itself.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        from_logits: take the softmax of ``logits``; otherwise they are probabilities, which need not sum to 1.
        normalize: divide each image's loss by its number of valid ``"pixels"``, or of ordered ``"pairs"`` of them
            within the window, p = q included; None for the formula.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 where logits or image are float64); at least 0 up to
        rounding, 0 for images without valid pixels. A second derivative keeps maps of every offset. Values that are not
        checked: as in :func:`potts_crf`.

    Raises:
        TypeError, ValueError: as :func:`potts_crf`, and for ``radius`` that is not an int or negative.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (3); the window as in *Gated
        CRF Loss for Weakly Supervised Semantic Image Segmentation*.

    Example:
        >>> halves = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]).view(1, 2, 1, 3)
        >>> black = torch.zeros(1, 3, 1, 3)
        >>> windowed_potts(halves, black, sigma_xy=float("inf"), radius=1, from_logits=False)
        tensor(2.)
    """
    _check(logits, image, spacing, valid, from_logits, reduction)
    _check_radius(radius)
    check_choice("normalize", normalize, _NORMALIZATIONS)
    sigma_rgb = colour_sigma(image, sigma_rgb)
    probability, guide, mask = _prepare(logits, image, valid, from_logits)
    features = guide_features(guide, sigma_rgb, sigma_xy, spacing).unflatten(2, image.shape[2:])
    radius = min(int(radius), max(image.shape[2:]))
    energy = WindowedEnergy.apply(mask * probability, mask, features, radius)[0]
    if normalize is not None:
        counted = mask
        if normalize == "pairs" and mask.numel():
            counted = mask * _window_sums(mask, radius)
        energy = energy / counted.flatten(1).sum(1).clamp(min=1)
    return reduce(energy, reduction)


class WindowedPotts(LossModule):
    """:func:`windowed_potts` as a module; a sigma may be a parameter and learnt."""

    sigma_rgb: float | Tensor | None
    sigma_xy: float | Tensor
    spacing: Sequence[float] | None
    radius: int
    from_logits: bool
    normalize: str | None

    def __init__(
        self,
        *,
        sigma_rgb: float | Tensor | None = None,
        sigma_xy: float | Tensor = 100.0,
        spacing: Sequence[float] | None = None,
        radius: int = 5,
        from_logits: bool = True,
        normalize: str | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            reduction,
            sigma_rgb=sigma_rgb,
            sigma_xy=sigma_xy,
            spacing=spacing,
            radius=radius,
            from_logits=from_logits,
            normalize=normalize,
        )
        if sigma_rgb is not None:
            check_sigma("sigma_rgb", sigma_rgb)
        check_sigma("sigma_xy", sigma_xy)
        check_spacing(spacing)
        _check_radius(radius)
        check_bool("from_logits", from_logits)
        check_choice("normalize", normalize, _NORMALIZATIONS)

    def forward(self, logits: Tensor, image: Tensor, valid: Tensor | None = None) -> Tensor:
        return windowed_potts(
            logits,
            image,
            sigma_rgb=self.sigma_rgb,
            sigma_xy=self.sigma_xy,
            spacing=self.spacing,
            radius=self.radius,
            valid=valid,
            from_logits=self.from_logits,
            normalize=self.normalize,
            reduction=self.reduction,
        )


def window_mass(
    image: Tensor,
    *,
    sigma_rgb: float | Tensor | None = None,
    sigma_xy: float | Tensor = 100.0,
    spacing: Sequence[float] | None = None,
    radius: int = 5,
) -> Tensor:
    r"""Share of the kernel's mass that a square window keeps: what :func:`windowed_potts` sees of :func:`potts_crf`.

    .. math:: \frac{\sum_{p, q \text{ within the window}} W_{pq}}{\sum_{p, q} W_{pq}}

    over ordered pairs of pixels, p = q included as in both losses. The denominator takes a run of
    :func:`~segloss.bilateral_filter`, far more than the windowed loss itself: for choosing a radius, not for
    every step.

    Args:
        image: guide, ``[B, C, *spatial]``: RGB in [0, 1], or any C >= 1 channels in the unit of ``sigma_rgb``.
        sigma_rgb: width of the kernel in colour, above 0, in the unit of ``image``; a number or a scalar tensor. None:
            15/255, for RGB in [0, 1]; three channels beyond that are refused.
        sigma_xy: width of the kernel in space, above 0, in pixels or the unit of ``spacing``, likewise.
        spacing: physical size of a pixel or voxel along each spatial axis, (y, x) or (z, y, x), above 0; ``sigma_xy``
            is in that unit then. None: pixels.
        radius: pixels that two pixels may be apart along an axis, at least 0.

    Returns:
        ``[B]`` in (0, 1], 1 for images without pixels, a constant, exact to a relative 1e-6 (float64 images) or 1e-4
        (others).

    Raises:
        TypeError: ``image`` that is not floating point, sigmas that are not numbers, ``radius`` that is not an int.
        ValueError: ``image`` that is not ``[B, C, *spatial]``, NaN or infinity, sigmas that are not above 0, an image
            of three channels outside [0, 1] by more than 0.01 without a ``sigma_rgb``, a negative ``radius``.

    Source:
        The W of *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (3).

    Example:
        >>> window_mass(torch.zeros(1, 3, 8, 8), sigma_xy=float("inf"), radius=1)
        tensor([0.1182])
    """
    check_guide(image, image, "image")
    check_spacing(spacing, image.dim() - 2, "image", image)
    _check_radius(radius)
    sigma_rgb = colour_sigma(image, sigma_rgb)
    with torch.no_grad():
        features = guide_features(image, sigma_rgb, sigma_xy, spacing).unflatten(2, image.shape[2:])
        ones = torch.ones_like(features[:, :1])
        near = torch.ops.segloss.window(ones, features, min(int(radius), max(image.shape[2:])))
        everything = bilateral_filter(
            ones, image, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, spacing=spacing, method="blocksparse", tolerance=1e-6
        )
        whole = everything.flatten(1).sum(1)
        return torch.where(whole > 0, near.flatten(1).sum(1) / whole, 1).clamp(max=1)


def _neighbourhood(connectivity: int | None, axes: int) -> list[Offset]:
    """One of each two opposite steps to the neighbours of a pixel."""
    choices = {count: steps for count, (dimensions, steps) in _CONNECTIVITIES.items() if dimensions == axes}
    if connectivity is None:
        connectivity = min(choices)
    check_choice("connectivity", connectivity, tuple(choices))
    return [offset for offset in cube([1] * axes) if sum(map(abs, offset)) <= choices[connectivity]]


def _length(offset: Offset, spacing: Sequence[float]) -> float:
    return math.hypot(*(step * float(side) for step, side in zip(offset, spacing, strict=True)))


def _window_sums(maps: Tensor, radius: int) -> Tensor:
    """Sums of ``maps [B, 1, *spatial]`` over the window of each pixel."""
    for axis in range(2, maps.dim()):
        place = torch.arange(maps.shape[axis], device=maps.device)
        total = F.pad(maps.movedim(axis, -1).cumsum(-1), (1, 0))
        ends = (place + radius + 1).clamp(max=len(place)), (place - radius).clamp(min=0)
        after, before = (total.index_select(-1, end) for end in ends)
        maps = (after - before).movedim(-1, axis)
    return maps


def _check_radius(radius: int) -> None:
    check_int("radius", radius)
    check_number("radius", radius, least=0)


def _check_gate(gate: Tensor | None, logits: Tensor) -> None:
    if gate is None:
        return
    check_floating("gate", gate)
    check_like("gate", gate, (logits.shape[0], *logits.shape[2:]), "logits", logits)
    check_fractions("gate", gate, "weights")


def _check_settings(form: str, scale_factor: float, centred: bool, normalize: str | None) -> None:
    check_choice("form", form, _FORMS)
    check_choice("normalize", normalize, _NORMALIZATIONS)
    check_number("scale_factor", scale_factor, above=0, most=1)
    check_bool("centred", centred)


def _check(
    logits: Tensor,
    image: Tensor,
    spacing: Sequence[float] | None,
    valid: Tensor | None,
    from_logits: bool,
    reduction: Reduction,
) -> None:
    _check_probability(logits, from_logits)
    check_guide(image, logits, "logits")
    check_spacing(spacing, image.dim() - 2, "image", image)
    check_valid(valid, logits)
    check_reduction(reduction)


def _check_probability(logits: Tensor, from_logits: bool) -> None:
    check_bool("from_logits", from_logits)
    if from_logits:
        check_logits(logits)
        check_space("logits", logits, "[B, K, *spatial]")
    else:
        check_floating("logits", logits)
        check_space("logits", logits, "probabilities [B, K, *spatial]")
        if logits.shape[1] < 1:
            raise ValueError(f"logits: expected at least one class, got {shape_text(logits.shape)}")
        require(
            "logits",
            logits,
            lambda: ((logits >= -1e-3) & (logits <= 1 + 1e-3)).all(),
            lambda: "expected probabilities from 0 to 1 with from_logits=False, got values outside or NaN",
        )


def _probability(logits: Tensor, from_logits: bool) -> Tensor:
    return torch.softmax(logits, 1) if from_logits else logits


def _prepare(logits: Tensor, image: Tensor, valid: Tensor | None, from_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, image and mask ``[B, 1, *spatial]``, 1 at valid pixels, in the dtype of the computation."""
    dtype = torch.promote_types(wide_dtype(logits), wide_dtype(image))
    probability = _probability(logits.to(dtype), from_logits)
    mask = torch.ones_like(probability[:, :1]) if valid is None else valid[:, None].to(dtype)
    return probability, image.to(dtype), mask


def _shrink(
    probability: Tensor, image: Tensor, mask: Tensor, gate: Tensor | None, factor: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if min(image.shape[2:]) * factor < 1:
        raise ValueError(f"scale_factor: expected to leave at least 1 pixel of {shape_text(image.shape)}, got {factor}")

    def linear(maps: Tensor) -> Tensor:
        return resize_linear(maps, scale_factor=factor)

    def nearest(maps: Tensor) -> Tensor:
        return F.interpolate(maps, scale_factor=factor)

    take = linear if centred else nearest
    mask = (take(mask) > _WHOLE).to(mask.dtype)
    return linear(probability), take(image), mask, None if gate is None else take(gate[:, None])[:, 0]
