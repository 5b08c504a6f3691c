"""Feature similarity: score maps whose contours follow the colour edges of the image."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss._dissimilarity import PairwiseEnergy, reach_of
from segloss.common.checks import (
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_int,
    check_like,
    check_number,
    check_scores,
    check_tags,
    require,
    shape_text,
)
from segloss.common.reduction import Reduction, check_reduction, reduce, wide_dtype, widen
from segloss.common.settings import LossModule

_GATES = ("max", "sigmoid", "raw", "softmax")
_WINDOW_SHAPES = ("square", "disc")
_SMALLEST_MAXIMUM = 1e-30  # the gradient of maps divided by less would leave float32
_LARGEST_RAW = 1e15  # the squares of raw scores, and sums of them, stay within float32


def max_normalize(scores: Tensor, *, detach_maximum: bool = False) -> Tensor:
    r"""Class score maps brought to [0, 1], each by its own maximum.

    .. math:: r_c(i,j) = \frac{\mathrm{ReLU}(s_c(i,j))}{\max_{m,n} \mathrm{ReLU}(s_c(m,n))}

    A map without a positive score gives 0, with gradient 0 where a score is negative; a maximum below 1e-30 counts as
    that. The authors' public code stretches each map from its minimum to its maximum instead, which differs where all
    scores are positive.

    Args:
        scores: class score maps, ``[B, C, H, W]``, any finite values.
        detach_maximum: take the maximum as a constant, as eq. (22) does; otherwise the gradient flows through it, in
            equal parts where several pixels have it.

    Returns:
        ``[B, C, H, W]`` in [0, 1]; float32 (float64 for float64 scores).

    Raises:
        TypeError: ``scores`` that are not floating point, ``detach_maximum`` that is not a bool.
        ValueError: ``scores`` that are not ``[B, C, H, W]`` with at least one class and pixel, NaN or infinite scores.

    Source:
        *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, eq. (4).

    Example:
        >>> max_normalize(torch.tensor([[[[-1.0, 2.0], [4.0, 0.0]]]]))
        tensor([[[[0.0000, 0.5000],
                  [1.0000, 0.0000]]]])
    """
    check_scores(scores)
    check_bool("detach_maximum", detach_maximum)
    positive = widen(scores).relu()
    maximum = positive.amax((2, 3), keepdim=True)
    if detach_maximum:
        maximum = maximum.detach()
    return positive / maximum.clamp(min=_SMALLEST_MAXIMUM)


def feature_similarity(
    scores: Tensor,
    image: Tensor,
    tags: Tensor | None = None,
    *,
    gate: str = "max",
    sigma: float | Tensor = 5.0,
    mu: float | Tensor = 2.5,
    window: int | None = None,
    window_shape: str = "square",
    background: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Feature similarity loss (FSL): pixels of similar colour get similar scores, others are pushed apart.

    .. math::
        L = -\frac{1}{HW} \sum_{i,j} w_{ij}\, g(y_i, y_j)\, f(\delta_{ij}), \qquad
        w_{ij} = \frac{1}{2 \pi \sigma^2} e^{-\|p_i - p_j\|^2 / 2 \sigma^2}, \quad
        g(y_i, y_j) = \tfrac12 \|y_i - y_j\|^2, \quad
        f(\delta) = \tanh\Bigl(\mu + \ln \frac{\delta}{1 - \delta}\Bigr), \quad
        \delta_{ij} = \tfrac13 \|x_i - x_j\|_1

    over all ordered pairs of pixels, with colours x in [0, 1]. A pair counts as similar below the threshold
    :math:`\delta = 1 / (1 + e^\mu)`, 0.076 for the default :math:`\mu`. The y of a pixel depend on the gate:

    - ``"max"``: the maps of :func:`max_normalize` (what the paper recommends). Negative scores have no gradient.
    - ``"sigmoid"``: :math:`1 / (1 + e^{-s})`. Moves scores both ways, with no lower bound.
    - ``"raw"``: the scores themselves; diverges where contours are sharpened without end.
    - ``"softmax"``: the softmax over all channels, the older form with classes that exclude each other. ``tags`` play
      no part in it.

    The sum runs over all pairs whose spatial weight is more than a rounding error, in memory linear in the pixels; the
    backward pass costs next to nothing. The formula is evaluated as it stands, without the 1e-5 which the authors' code
    adds within the logarithm; that shifts their loss by about 1e-4.

    Args:
        scores: class score maps, ``[B, C, H, W]``, any finite values.
        image: RGB in [0, 1] at any resolution, ``[B, 3, h, w]`` (see :func:`~segloss.denormalize`); resized
            bilinearly to the maps where its size differs. A constant: no gradient flows into it.
        tags: 1 for the classes that count, those present in the image, ``[B, C]``; all of them if None.
        gate: ``"max"``, ``"sigmoid"``, ``"raw"`` or ``"softmax"``.
        sigma: width of the neighbourhood in pixels of the maps, above 0; a number, or a scalar tensor to learn, whose
            value is not looked at: without a window every pair is then evaluated, in memory of H W max(H, W).
        mu: where similar ends, see above; a number, or a scalar tensor to learn; beyond ±30 it counts as that. Its
            gradient is never positive, so that learning makes it drift up, and the paper keeps both fixed.
        window: only pairs at most so many rows and columns apart, n. What is left out changes the loss by at most
            :math:`C \operatorname{erfc}(n / \sqrt2 \sigma)` for sigma of at least 1, gates in [0, 1] and C classes
            present, a background included: 0.0027 C at 15 pixels and sigma 5 (0.5% of the gradient, measured), but
            0.046 C at 10 pixels (11% of the gradient).
        window_shape: ``"square"``, or ``"disc"`` for pairs at most ``window`` pixels apart, which leaves out those of a
            square of half the diagonal at most: the bound with :math:`n / \sqrt2` in place of n holds.
        background: add the channel :math:`1 - \max_c y_c`, as the authors' code can; for ``"max"`` and ``"sigmoid"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 where scores or image are float64); of either sign. Raw
        scores beyond ±1e15 count as that. Values that are not checked (see :func:`~segloss.check_values`): colours
        outside [0, 1] count as they are, tags where they are not 0, and a ``sigma`` below 0.001 as that, with loss and
        gradient 0.

    Raises:
        TypeError: ``scores`` or ``image`` that are not floating point, numbers that are none, ``window`` that is not an
            int, ``background`` that is not a bool.
        ValueError: shapes or devices that do not fit each other, NaN or infinite scores, colours outside [0, 1], tags
            other than 0 and 1, an unknown gate or window shape, ``sigma`` or ``window`` below their range, a
            background for another gate.
        NotImplementedError: the gradient with respect to ``sigma`` or ``mu`` is differentiated once more, or ``vmap``
            maps over them.

    Source:
        *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, eqs. (9) to (13), sec. 4.3.

    Example:
        >>> image = torch.zeros(1, 3, 8, 8)
        >>> image[..., 4:] = 1  # black and white halves
        >>> step = (torch.arange(8.0) - 3.5).expand(1, 1, 8, 8)
        >>> feature_similarity(step, image) < feature_similarity(step.mT, image)
        tensor(True)
    """
    check_scores(scores)
    _check_image(image, scores)
    if tags is not None:
        check_tags(tags, scores, "scores")
    _check_settings(gate, sigma, mu, window, window_shape, background)
    check_reduction(reduction)
    dtype = torch.promote_types(wide_dtype(scores), wide_dtype(image))
    values = _gate(scores, tags, gate, background).to(dtype)
    guide = image.detach().to(dtype)
    if guide.shape[2:] != scores.shape[2:]:
        guide = F.interpolate(guide, size=scores.shape[2:], mode="bilinear")
    reach = _reach(sigma, window, max(scores.shape[2:]), dtype)
    width, level = _scalar_like("sigma", sigma, guide), _scalar_like("mu", mu, guide)
    energy, _ = PairwiseEnergy.apply(values, guide, width, level, reach, window is not None and window_shape == "disc")
    return reduce(-energy / scores[0, 0].numel() if len(scores) else -energy, reduction)


class FeatureSimilarity(LossModule):
    """:func:`feature_similarity` as a module; an ``nn.Parameter`` for ``sigma`` or ``mu`` is learned."""

    gate: str
    sigma: float | Tensor
    mu: float | Tensor
    window: int | None
    window_shape: str
    background: bool

    def __init__(
        self,
        *,
        gate: str = "max",
        sigma: float | Tensor = 5.0,
        mu: float | Tensor = 2.5,
        window: int | None = None,
        window_shape: str = "square",
        background: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            reduction,
            gate=gate,
            sigma=sigma,
            mu=mu,
            window=window,
            window_shape=window_shape,
            background=background,
        )
        _check_settings(gate, sigma, mu, window, window_shape, background)

    def forward(self, scores: Tensor, image: Tensor, tags: Tensor | None = None) -> Tensor:
        return feature_similarity(
            scores,
            image,
            tags,
            gate=self.gate,
            sigma=self.sigma,
            mu=self.mu,
            window=self.window,
            window_shape=self.window_shape,
            background=self.background,
            reduction=self.reduction,
        )


def _gate(scores: Tensor, tags: Tensor | None, gate: str, background: bool) -> Tensor:
    """The values y ``[B, C, H, W]`` of the pixels, in which the differences are taken."""
    if gate == "softmax":
        return torch.softmax(widen(scores), 1)
    if gate == "max":
        values = max_normalize(scores)
    else:
        values = widen(scores).sigmoid() if gate == "sigmoid" else widen(scores).clamp(-_LARGEST_RAW, _LARGEST_RAW)
    if tags is not None:
        values = torch.where((tags != 0)[:, :, None, None], values, 0)
    return torch.cat([values, 1 - values.amax(1, keepdim=True)], 1) if background else values


def _scalar_like(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor) and value.is_meta and not like.is_meta:
        raise ValueError(f"{name}: expected device {like.device}, that of scores, got {value.device}")
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _reach(sigma: float | Tensor, window: int | None, side: int, dtype: torch.dtype) -> int:
    """Rows and columns between the pixels of a pair, at most; a tensor's value is not looked at."""
    if window is not None:
        return min(window, 2 * side)  # no disc is larger
    if isinstance(sigma, Tensor) or sigma > side:
        return side
    return min(side, math.ceil(reach_of(sigma, dtype)))


def _check_image(image: Tensor, scores: Tensor) -> None:
    check_floating("image", image)
    if image.dim() != 4 or 0 in image.shape[2:]:
        raise ValueError(f"image: expected [B, 3, h, w] with at least one pixel, got {shape_text(image.shape)}")
    check_like("image", image, (len(scores), 3, *image.shape[2:]), "scores", scores)

    def within() -> Tensor:
        return ((image >= -1e-3) & (image <= 1 + 1e-3)).all()

    require("image", image, within, lambda: "expected RGB in [0, 1] (see denormalize), got values outside or NaN")


def _check_settings(
    gate: str, sigma: float | Tensor, mu: float | Tensor, window: int | None, window_shape: str, background: bool
) -> None:
    check_choice("gate", gate, _GATES)
    check_choice("window_shape", window_shape, _WINDOW_SHAPES)
    check_bool("background", background)
    if background and gate not in ("max", "sigmoid"):
        raise ValueError(f"background: expected gate 'max' or 'sigmoid' to go with it, got {gate!r}")
    if window is not None:
        check_int("window", window)
        check_number("window", min(window, 2**31), least=1)  # beyond the image it is all pairs, however large
    _check_scalar("sigma", sigma, above=0)
    _check_scalar("mu", mu)


def _check_scalar(name: str, value: float | Tensor, above: float = -math.inf) -> None:
    if not isinstance(value, Tensor):
        check_number(name, value, above=above)
        return
    check_floating(name, value)
    if value.dim() != 0:
        raise ValueError(f"{name}: expected a number or a scalar tensor, got {shape_text(value.shape)}")
    check_finite(name, value)
    require(name, value, lambda: value > above, lambda: f"expected a number above {above:g}, got {value.item():g}")
