"""Importance sampling: classify images by pixels drawn from the prediction itself, in place of global pooling."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.common.checks import (
    check_choice,
    check_generator,
    check_int,
    check_integer,
    check_like,
    check_number,
    check_scores,
    check_tags,
    check_two_classes,
    require,
    shape_text,
)
from segloss.common.reduction import Reduction, check_reduction, reduce, wide_dtype, widen
from segloss.common.settings import LossModule

Mode = Literal["sample", "expected"]
Pooling = Literal["average", "max", "sum"]
Posterior = Literal["binomial", "multinomial"]

_MANY_PIXELS = 1 << 14  # each with a probability of about 6e-5, a thousand times the rounding of float32 sums


def sample_pixels(
    scores: Tensor, samples: int, *, posterior: Posterior = "binomial", generator: torch.Generator | None = None
) -> Tensor:
    r"""Pixels drawn with replacement in proportion to the posterior of each class.

    .. math:: p_c(i, j) = \frac{q_c(i, j)}{\sum_{m, n} q_c(m, n)}

    with :math:`q_c` the sigmoid of the scores, or their softmax over the classes. The logarithm of the pmf is formed
    first, so that classes with vanishing probabilities everywhere still tell their pixels apart: the 1e-5 that the
    authors' code adds to the sigmoid, which makes such classes uniform, is not needed. No gradient flows.

    Args:
        scores: class score maps, ``[B, C, H, W]``, any finite values.
        samples: pixels to draw for each image and class, at least 1.
        posterior: ``"binomial"``, the sigmoid (14), or ``"multinomial"``, the softmax (5), for which the scores
            include the background and C >= 2.
        generator: source of randomness, on any device; the global one of the device of the scores (of each process,
            under data parallelism) if None. ``torch.compile(fullgraph=True)`` cannot trace a generator, only its
            absence; ``vmap`` needs ``randomness="different"``.

    Returns:
        Flat pixel indices :math:`iW + j`, int64, ``[B, C, samples]``. NaN scores that are not checked (see
        :func:`~segloss.check_values`) still give indices of pixels.

    Raises:
        TypeError: ``scores`` that are not floating point, ``samples`` that is no int, ``generator`` that is no
            generator.
        ValueError: ``scores`` that are not ``[B, C, H, W]`` or not finite, a single class for ``"multinomial"``,
            ``samples`` below 1, an unknown ``posterior``.

    Source:
        *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, eq. (15); eq. (6) for the
        multinomial.

    Example:
        >>> scores = torch.full((1, 1, 2, 3), -300.0)
        >>> scores[0, 0, 1, 0] = -200.0
        >>> sample_pixels(scores, 4)
        tensor([[[3, 3, 3, 3]]])
    """
    check_scores(scores)
    _check_settings(samples, posterior)
    _check_classes(posterior, scores)
    check_generator(generator)
    return _draw(_log_odds(scores.detach(), posterior), samples, generator)


def importance_sampling(
    scores: Tensor,
    tags: Tensor,
    *,
    samples: int = 10,
    indices: Tensor | None = None,
    mode: Mode = "sample",
    posterior: Posterior = "binomial",
    floor: float = 0.0,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Binary cross-entropy of the image's tags at pixels that are drawn from the prediction, for each class.

    .. math::
        L = -\frac{1}{NC} \sum_{n=1}^N \sum_{c=1}^C
            y_c \ln q_c(\hat p_{nc}) + (1 - y_c) \ln\bigl(1 - q_c(\hat p_{nc})\bigr), \qquad \hat p_{nc} \sim p_c

    with the posterior :math:`q` and the pmf :math:`p_c` of :func:`sample_pixels`. The gradient flows through the
    scores at the drawn pixels only; the pmf is a constant. Classes absent from the image are drawn for and count too.

    Args:
        scores: class score maps, ``[B, C, H, W]``, any finite values.
        tags: 1 where a class is present in the image, 0 elsewhere, ``[B, C]``, any dtype.
        samples: pixels drawn for each image and class, N, at least 1; not used where nothing is drawn.
        indices: flat pixel indices :math:`iW + j` to take instead of drawing, integers, ``[B, C, N]``, N >= 1.
        mode: ``"sample"``, or ``"expected"`` for the exact expectation :math:`\sum_p p_c(p) \, \mathrm{BCE}_c(p)` of
            the sampled loss, without randomness. Its gradient is the expectation of the sampled loss's: the pmf is a
            constant here too, so that finite differences of the value give something else.
        posterior: ``"binomial"``, independent classes by the sigmoid (14), or ``"multinomial"``, the softmax (5):
            scores and tags then include the background, C >= 2. It counts as one of the C classes; the authors' code
            leaves it out of the average over classes.
        floor: the cross-entropy sees :math:`(q + \epsilon - \epsilon q) / (1 + \epsilon)` in place of :math:`q`, with
            this :math:`\epsilon` in [0, 1); the authors' older, multinomial code has 1e-3.
        generator: as in :func:`sample_pixels`; not used where nothing is drawn.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 scores); at least 0. Tags that are not
        checked (see :func:`~segloss.check_values`) and lie between 0 and 1 count as soft labels; indices that are not
        checked and are no pixels fail inside torch's ``gather``.

    Raises:
        TypeError: ``scores`` that are not floating point, ``tags`` that are no tensor of real numbers, ``indices``
            that are no tensor of integers, ``samples`` that is no int, ``floor`` that is no number, ``generator`` that
            is no generator.
        ValueError: shapes or devices that do not fit each other, NaN or infinite scores, a single class for
            ``"multinomial"``, tags other than 0 and 1, indices that are no pixels or come with ``mode="expected"``,
            ``samples`` below 1, ``floor`` outside [0, 1), an unknown ``mode`` or ``posterior``.

    Source:
        *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, eq. (8), (15) and (18); eq. (5) to
        (7) for the multinomial.

    Example:
        >>> scores, tags = torch.zeros(1, 2, 4, 4), torch.tensor([[1, 0]])
        >>> importance_sampling(scores, tags, samples=3)
        tensor(0.6931)
    """
    _check(scores, tags, samples, indices, mode, posterior, generator)
    check_number("floor", floor, least=0, below=1)
    check_reduction(reduction)
    return reduce(_importance(_log_odds(scores, posterior), tags, samples, indices, mode, floor, generator), reduction)


class ImportanceSampling(LossModule):
    """:func:`importance_sampling` as a module."""

    samples: int
    mode: Mode
    posterior: Posterior
    floor: float

    def __init__(
        self,
        *,
        samples: int = 10,
        mode: Mode = "sample",
        posterior: Posterior = "binomial",
        floor: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction, samples=samples, mode=mode, posterior=posterior, floor=floor)
        _check_settings(samples, posterior, mode)
        check_number("floor", floor, least=0, below=1)

    def forward(
        self, scores: Tensor, tags: Tensor, *, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return importance_sampling(
            scores,
            tags,
            samples=self.samples,
            indices=indices,
            mode=self.mode,
            posterior=self.posterior,
            floor=self.floor,
            generator=generator,
            reduction=self.reduction,
        )


def importance_classification(
    scores: Tensor,
    tags: Tensor,
    *,
    weight: float = 0.2,
    samples: int = 10,
    indices: Tensor | None = None,
    mode: Mode = "sample",
    posterior: Posterior = "binomial",
    pooling: Pooling = "average",
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Classification loss of pooled scores, mixed with the importance sampling loss.

    .. math:: L = (1 - \lambda) L_\text{ce} + \lambda L_\text{is}

    with :math:`L_\text{is}` of :func:`importance_sampling` and :math:`L_\text{ce}`, eq. (17), the binary cross-entropy
    of the sigmoid of the pooled scores, averaged over the classes. The paper's comparison of average pooling, max
    pooling and importance sampling is a change of settings::

        importance_classification(scores, tags, weight=0)                 # GAP
        importance_classification(scores, tags, weight=0, pooling="max")  # GMP
        importance_classification(scores, tags, weight=1)                 # ISL

    Args:
        scores: class score maps, ``[B, C, H, W]``, any finite values.
        tags: 1 where a class is present in the image, 0 elsewhere, ``[B, C]``, any dtype.
        weight: :math:`\lambda`, in [0, 1]. With 0, nothing is drawn and the random state stays as it is. The paper
            finds 0.2 best for the binomial posterior and 0.6 for the multinomial one.
        samples: as in :func:`importance_sampling`.
        indices: as in :func:`importance_sampling`.
        mode: as in :func:`importance_sampling`.
        posterior: as in :func:`importance_sampling`.
        pooling: ``"average"`` over the pixels, which is what trains; ``"sum"``, eq. (3) to the letter; or ``"max"``,
            the pixel with the largest posterior; pixels that share the maximum share its gradient evenly. For the
            multinomial posterior, average and sum still pool the scores and :math:`L_\text{ce}` is eq. (17) as it
            stands, but the maximum is taken of the softmax, as the authors' older code does.
        generator: as in :func:`importance_sampling`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 scores); at least 0. Values that are not
        checked count as in :func:`importance_sampling`.

    Raises:
        TypeError: as in :func:`importance_sampling`, and for ``weight`` that is no number.
        ValueError: as in :func:`importance_sampling`, and for ``weight`` outside [0, 1] or an unknown ``pooling``.

    Source:
        *High-fidelity Pseudo-labels for Boosting Weakly-Supervised Segmentation*, eq. (16) and (17).

    Example:
        >>> scores, tags = torch.zeros(1, 2, 4, 4), torch.tensor([[1, 0]])
        >>> importance_classification(scores, tags)
        tensor(0.6931)
    """
    _check(scores, tags, samples, indices, mode, posterior, generator)
    check_number("weight", weight, least=0, most=1)
    check_choice("pooling", pooling, ("average", "max", "sum"))
    check_reduction(reduction)
    log_odds = _log_odds(scores, posterior)
    if pooling == "max":
        pooled = log_odds.amax(2, keepdim=True)
    else:
        maps = widen(scores).flatten(2)
        pooled = maps.mean(2, keepdim=True) if pooling == "average" else maps.sum(2, keepdim=True)
    per_image = _cross_entropy(pooled, tags).mean((1, 2))
    if weight > 0:
        sampled = _importance(log_odds, tags, samples, indices, mode, 0.0, generator)
        per_image = (1 - weight) * per_image + weight * sampled
    return reduce(per_image, reduction)


class ImportanceClassification(LossModule):
    """:func:`importance_classification` as a module."""

    weight: float
    samples: int
    mode: Mode
    posterior: Posterior
    pooling: Pooling

    def __init__(
        self,
        *,
        weight: float = 0.2,
        samples: int = 10,
        mode: Mode = "sample",
        posterior: Posterior = "binomial",
        pooling: Pooling = "average",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction, weight=weight, samples=samples, mode=mode, posterior=posterior, pooling=pooling)
        check_number("weight", weight, least=0, most=1)
        check_choice("pooling", pooling, ("average", "max", "sum"))
        _check_settings(samples, posterior, mode)

    def forward(
        self, scores: Tensor, tags: Tensor, *, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return importance_classification(
            scores,
            tags,
            weight=self.weight,
            samples=self.samples,
            indices=indices,
            mode=self.mode,
            posterior=self.posterior,
            pooling=self.pooling,
            generator=generator,
            reduction=self.reduction,
        )


def _log_odds(scores: Tensor, posterior: Posterior) -> Tensor:
    """``[B, C, HW]``, the sigmoid of which is the posterior of either kind."""
    if posterior == "binomial":
        return scores.to(wide_dtype(scores)).flatten(2)
    log_q = torch.log_softmax(widen(scores).flatten(2), 1)
    # 1 - q cancels for a class that holds most of a pixel, of which there is one at most: sum the other classes there.
    most = log_q > -0.5
    of_others = log_q.masked_fill(most, -torch.inf).logsumexp(1, keepdim=True)
    log_not_q = torch.where(most, of_others, torch.log1p(-log_q.masked_fill(most, -1).exp()))
    return log_q - log_not_q


def _weights(log_odds: Tensor) -> Tensor:
    """The posterior up to a factor for each class, such that its largest value does not underflow; a constant."""
    log_odds = log_odds.detach()
    largest = log_odds.amax(2, keepdim=True).clamp(max=30)  # e^30 is still far from overflow
    return (largest - log_odds).exp_().add_(largest.exp()).reciprocal_()


def _draw(log_odds: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    # Inverse of the cumulative pmf, since torch.multinomial stops at 2^24 pixels.
    weights = _weights(log_odds)
    cumulative = weights.cumsum(2, dtype=torch.float64 if weights.shape[2] > _MANY_PIXELS else weights.dtype)
    device = log_odds.device if generator is None else generator.device
    # Dynamic shapes cannot be traced with this keyword, not even with None.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    uniform = torch.rand(*log_odds.shape[:2], samples, dtype=cumulative.dtype, device=device, **source)
    # The first pixel strictly above, so that a pixel of probability 0 is never drawn.
    drawn = torch.searchsorted(cumulative, uniform.to(log_odds.device) * cumulative[..., -1:], right=True)
    return drawn.clamp(max=log_odds.shape[2] - 1)


def _importance(
    log_odds: Tensor,
    tags: Tensor,
    samples: int,
    indices: Tensor | None,
    mode: Mode,
    floor: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The importance sampling loss of each image."""
    if mode == "expected":
        weights = _weights(log_odds)
        return (weights * _cross_entropy(log_odds, tags, floor)).sum(2).div(weights.sum(2)).mean(1)
    picked = _draw(log_odds, samples, generator) if indices is None else indices.long()
    return _cross_entropy(log_odds.gather(2, picked), tags, floor).mean((1, 2))


def _cross_entropy(log_odds: Tensor, tags: Tensor, floor: float = 0.0) -> Tensor:
    """``[B, C, N]``; unlike torch's, without cancellation where the posterior is right."""
    log_odds = widen(log_odds)
    log_q, log_not_q = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
    if floor > 0:
        log_q, log_not_q = _raise(log_q, floor), _raise(log_not_q, floor)
    present = tags.to(log_odds.dtype).unsqueeze(2)
    return -(present * log_q + (1 - present) * log_not_q)


def _raise(log_q: Tensor, floor: float) -> Tensor:
    log_floor = log_q.new_tensor(math.log(floor))
    return torch.logaddexp(log_q + math.log1p(-floor), log_floor) - math.log1p(floor)


def _check(
    scores: Tensor,
    tags: Tensor,
    samples: int,
    indices: Tensor | None,
    mode: Mode,
    posterior: Posterior,
    generator: torch.Generator | None,
) -> None:
    check_scores(scores)
    _check_settings(samples, posterior, mode)
    _check_classes(posterior, scores)
    check_tags(tags, scores, "scores")
    check_generator(generator)
    if indices is not None:
        if mode == "expected":
            raise ValueError('indices: expected None to go with mode="expected", which picks no pixels, got a tensor')
        _check_indices(indices, scores)


def _check_settings(samples: int, posterior: Posterior, mode: Mode = "sample") -> None:
    check_int("samples", samples)
    check_number("samples", samples, least=1, most=2**31 - 1)
    check_choice("posterior", posterior, ("binomial", "multinomial"))
    check_choice("mode", mode, ("sample", "expected"))


def _check_classes(posterior: Posterior, scores: Tensor) -> None:
    if posterior == "multinomial":
        check_two_classes("scores", scores, "the softmax of a single class is constant", background=True)


def _check_indices(indices: Tensor, scores: Tensor) -> None:
    check_integer("indices", indices)
    if indices.dim() != 3 or indices.shape[2] == 0:
        raise ValueError(f"indices: expected [B, C, N] with at least one pixel, got {shape_text(indices.shape)}")
    check_like("indices", indices, (*scores.shape[:2], indices.shape[2]), "scores", scores)
    pixels = scores.shape[2] * scores.shape[3]

    def inside() -> Tensor:
        return (indices.long() >= 0) & (indices.long() < pixels)

    require(
        "indices",
        indices,
        lambda: inside().all(),
        lambda: f"expected pixels 0 to {pixels - 1} of the scores, got {indices[~inside()][0].item()}",
    )
