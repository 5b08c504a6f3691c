"""Size targets: supervise a segmentation network with the approximate sizes of its classes in each image."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segloss._average import log_average
from segloss._penalty import check_t, penalty
from segloss.common.checks import (
    check_choice,
    check_floating,
    check_fractions,
    check_generator,
    check_has_values,
    check_known,
    check_label_maps,
    check_like,
    check_logits,
    check_number,
    check_real,
    check_sizes,
    check_tags,
    check_valid,
    require,
    shape_text,
)
from segloss.common.reduction import LOG_FLOOR, Reduction, check_reduction, reduce, wide_dtype
from segloss.common.settings import LossModule


def average_prediction(logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    r"""Average softmax prediction over the pixels of each image.

    .. math:: \bar S^k = \frac{1}{|\Omega|} \sum_{p \in \Omega} S_p^k, \qquad S_p = \operatorname{softmax}(x_p)

    Args:
        logits: class logits :math:`x`, ``[B, K, *spatial]``, K >= 2, any finite values.
        valid: pixels that count (:math:`\Omega`), bool, ``[B, *spatial]``; all of them if None.

    Returns:
        Fractions of the image, ``[B, K]``, float32 (float64 for float64 logits); each row sums to 1, or is 0 for an
        image without valid pixels.

    Raises:
        TypeError: ``logits`` that are not floating point, ``valid`` that is not bool.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite logits.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (1).

    Example:
        >>> average_prediction(torch.zeros(1, 4, 8, 8))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    check_logits(logits)
    check_valid(valid, logits)
    average, seen = log_average(logits, valid)
    return average.exp() if seen is None else average.exp() * seen[:, None]


def size_kl(
    logits: Tensor,
    sizes: Tensor,
    *,
    known: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Size-target loss: forward KL divergence between given sizes and the average prediction.

    .. math:: L = KL(v \,\|\, \bar S) = \sum_k v_k \ln \frac{v_k}{\bar S^k}

    with the average prediction :math:`\bar S` of :func:`average_prediction` and :math:`0 \ln 0 = 0`. The forward
    divergence is zero-avoiding: a class with a target cannot vanish, and classes without one are suppressed without
    further terms. Value and gradient are formed in log space and stay finite for any finite logits. On the CPU the
    backward pass recomputes the softmax block by block, so that no full-size tensor is kept but the gradient.

    Where the sizes of some classes only are known, the classes F of which they are not count as one class. The loss is
    the divergence of the distributions that this leaves, the least one for any sizes that the free classes may have:

    .. math:: L = \sum_{k \notin F} v_k \ln \frac{v_k}{\bar S^k} + r \ln \frac{r}{\sum_{k \in F} \bar S^k},
        \qquad r = 1 - \sum_{k \notin F} v_k

    A single free class has the size that the others leave. Without a known class the loss is 0.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        sizes: size targets :math:`v`, ``[B, K]``, fractions that sum to 1 in each row (to 1e-4; float16 1e-3,
            bfloat16 1e-2), or to at most 1 over the known classes of a row that has free ones. Divide by the row sums
            what does not. Constants: no gradient flows into them.
        known: classes whose size is known, bool, ``[B, K]``; all of them if None. The sizes of the others are not
            looked at: they may be NaN.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits); at least 0 up to rounding. An image
        without valid pixels contributes 0. Of sizes that are not checked (see :func:`check_values`) those that do not
        sum to 1 shift the value, those below 0 make it infinite.

    Raises:
        TypeError: ``logits`` or ``sizes`` that are not floating point, ``known`` or ``valid`` that are not bool.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite logits, sizes below 0
            or rows that do not sum to 1.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (2); free classes are not
        in the paper.

    Example:
        >>> logits = torch.zeros(1, 2, 8, 8, requires_grad=True)
        >>> size_kl(logits, torch.tensor([[0.75, 0.25]]))
        tensor(0.1308, grad_fn=<MeanBackward0>)

        The size of the first of three classes is known:

        >>> sizes = torch.tensor([[0.5, torch.nan, torch.nan]])
        >>> size_kl(torch.zeros(1, 3, 8, 8), sizes, known=sizes.isfinite())
        tensor(0.0589)
    """
    _check_targets(logits, sizes, known, valid, reduction)
    average, seen = log_average(logits, valid)
    target = sizes.detach().to(average.dtype)
    if known is not None:
        average, target = _merge_free(average, target, known)
    return reduce(-(torch.special.entr(target) + target * average).sum(1), reduction, seen)


class SizeKL(LossModule):
    """:func:`size_kl` as a module."""

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)

    def forward(
        self, logits: Tensor, sizes: Tensor, valid: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        return size_kl(logits, sizes, known=known, valid=valid, reduction=self.reduction)


def reverse_size_kl(
    logits: Tensor,
    sizes: Tensor,
    *,
    floor: float = 1e-8,
    known: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Reverse KL divergence between the average prediction and given sizes, per image.

    .. math:: L = KL(\bar S \,\|\, \max(v, \epsilon)) = \sum_k \bar S^k \ln \frac{\bar S^k}{\max(v_k, \epsilon)}

    The variant that the paper argues against: it is mode-seeking, stays finite when a class vanishes, and trains to
    the trivial all-background solution. Here for comparison and for balancing with a known prior.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        sizes: size targets :math:`v`, ``[B, K]``, fractions that sum to 1 in each row, as of :func:`size_kl`.
        floor: smallest target, :math:`\epsilon`, in (0, 1): keeps classes of size 0 finite (sizes below 0 that are not
            checked count as NaN). The loss can be negative by at most K times the floor.
        known: classes whose size is known, bool, ``[B, K]``; all of them if None. The others count as one class, as
            in :func:`size_kl`.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: as :func:`size_kl`, and for ``floor`` outside (0, 1).

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (7) per image, Fig. 3.

    Example:
        >>> reverse_size_kl(torch.zeros(1, 2, 8, 8), torch.tensor([[0.75, 0.25]]))
        tensor(0.1438)
    """
    _check_targets(logits, sizes, known, valid, reduction)
    check_number("floor", floor, above=0, below=1)
    average, seen = log_average(logits, valid)
    target = sizes.detach().to(average.dtype)
    if known is not None:
        average, target = _merge_free(average, target, known)
    log_target = target.log().clamp(min=math.log(floor))
    return reduce((average.exp() * (average - log_target)).sum(1), reduction, seen)


class ReverseSizeKL(LossModule):
    """:func:`reverse_size_kl` as a module."""

    floor: float

    def __init__(self, *, floor: float = 1e-8, reduction: Reduction = "mean") -> None:
        super().__init__(reduction, floor=floor)
        check_number("floor", floor, above=0, below=1)

    def forward(
        self, logits: Tensor, sizes: Tensor, valid: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        return reverse_size_kl(logits, sizes, floor=self.floor, known=known, valid=valid, reduction=self.reduction)


def log_barrier(logits: Tensor, tags: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Log barrier that keeps the tagged classes of an image from vanishing ("expansion" loss).

    .. math:: L = -\sum_{k \in T} \ln \bar S^k

    Up to scale and a constant this is :func:`size_kl` with equal sizes for all tagged classes, eq. (10): its bias to
    equal segments is why sizes are better targets than tags.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        tags: 1 where a class is present in the image (the background too), 0 elsewhere, ``[B, K]``, any dtype.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits). Tags that are not checked and are
        neither 0 nor 1 count as present where they are not 0.

    Raises:
        TypeError: ``logits`` that are not floating point, ``valid`` that is not bool.
        ValueError: shapes or devices that do not fit each other, a single class, NaN or infinite logits, tags other
            than 0 and 1.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (9).

    Example:
        >>> log_barrier(torch.zeros(1, 4, 8, 8), torch.tensor([[1, 1, 0, 0]]))
        tensor(2.7726)
    """
    _check(logits, valid, reduction)
    check_tags(tags, logits)
    average, seen = log_average(logits, valid)
    return reduce(-torch.where(tags != 0, average, 0.0).sum(1), reduction, seen)


class LogBarrier(LossModule):
    """:func:`log_barrier` as a module."""

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)

    def forward(self, logits: Tensor, tags: Tensor, valid: Tensor | None = None) -> Tensor:
        return log_barrier(logits, tags, valid=valid, reduction=self.reduction)


def suppression(logits: Tensor, tags: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Log barrier that suppresses the classes that are not tagged.

    .. math:: L = -\sum_{k \notin T} \ln (1 - \bar S^k)

    The logarithm is taken of the sum of the other classes, never of a difference from 1.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        tags: 1 where a class is present in the image (the background too), 0 elsewhere, ``[B, K]``, any dtype.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: as :func:`log_barrier`.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (8).

    Example:
        >>> suppression(torch.zeros(1, 4, 8, 8), torch.tensor([[1, 1, 0, 0]]))
        tensor(0.5754)
    """
    _check(logits, valid, reduction)
    check_tags(tags, logits)
    average, seen = log_average(logits, valid)
    own = torch.eye(average.shape[1], dtype=torch.bool, device=average.device)
    others = torch.logsumexp(average[:, None].masked_fill(own, -torch.inf), 2)
    return reduce(-torch.where(tags != 0, 0.0, others).sum(1), reduction, seen)


class Suppression(LossModule):
    """:func:`suppression` as a module."""

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)

    def forward(self, logits: Tensor, tags: Tensor, valid: Tensor | None = None) -> Tensor:
        return suppression(logits, tags, valid=valid, reduction=self.reduction)


def flat_barrier(
    logits: Tensor,
    tags: Tensor,
    *,
    floor: float,
    flat: str = "below",
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Log barrier on the tagged classes with a flat part.

    .. math:: L = -\sum_{k \in T} \ln \max(\bar S^k, \epsilon)

    This is eq. (11) as printed, and as printed it is flat *below* the floor: a class that has become smaller than
    :math:`\epsilon` gets no gradient and does not come back. The text asks for a barrier with a flat bottom instead,
    one that no longer acts on a class that is large enough; that is ``flat="above"``, with min in place of max.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        tags: 1 where a class is present in the image (the background too), 0 elsewhere, ``[B, K]``, any dtype.
        floor: where the flat part begins, :math:`\epsilon`, a fraction of the image in (0, 1).
        flat: ``"below"`` the floor (the printed formula) or ``"above"`` it (the described barrier).
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: as :func:`log_barrier`, and for ``floor`` outside (0, 1) or an unknown ``flat``.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (11).

    Example:
        >>> flat_barrier(torch.zeros(1, 4, 8, 8), torch.tensor([[1, 1, 0, 0]]), floor=0.25)
        tensor(2.7726)
    """
    _check(logits, valid, reduction)
    check_tags(tags, logits)
    check_number("floor", floor, above=0, below=1)
    check_choice("flat", flat, ("below", "above"))
    average, seen = log_average(logits, valid)
    edge = math.log(floor)
    # A comparison, not maximum(): at the edge itself the flat part counts.
    active = average > edge if flat == "below" else average < edge
    return reduce(-torch.where(tags != 0, torch.where(active, average, edge), 0.0).sum(1), reduction, seen)


class FlatBarrier(LossModule):
    """:func:`flat_barrier` as a module."""

    floor: float
    flat: str

    def __init__(self, *, floor: float, flat: str = "below", reduction: Reduction = "mean") -> None:
        super().__init__(reduction, floor=floor, flat=flat)
        check_number("floor", floor, above=0, below=1)
        check_choice("flat", flat, ("below", "above"))

    def forward(self, logits: Tensor, tags: Tensor, valid: Tensor | None = None) -> Tensor:
        return flat_barrier(logits, tags, floor=self.floor, flat=self.flat, valid=valid, reduction=self.reduction)


def size_barrier(
    logits: Tensor,
    *,
    lower: float | Tensor | None = None,
    upper: float | Tensor | None = None,
    t: float | None = None,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared penalty, or log-barrier extension, on classes outside their size bounds.

    .. math:: L = \sum_k \max(a_k - \bar S^k, 0)^2 + \max(\bar S^k - b_k, 0)^2

    The paper has the lower bounds :math:`a`; the upper ones :math:`b` are those of Kervadec et al., whose public code
    bounds pixel counts instead of fractions and divides by their number N: that is N times this penalty.

    With a number ``t`` the penalty gives way to the log-barrier extension

    .. math:: L = \sum_k \psi_t(a_k - \bar S^k) + \psi_t(\bar S^k - b_k), \qquad \psi_t(z) = \begin{cases}
        -\frac 1 t \ln(-z) & z \le -\frac 1 {t^2} \\
        t z - \frac 1 t \ln \frac 1 {t^2} + \frac 1 t & \text{otherwise} \end{cases}

    which also acts within the bounds, the less the larger t, and outside them with a slope up to t. Around bounds that
    are closer to each other than :math:`2 / t^2` the two sides cancel: begin with a t above
    :math:`\sqrt{2 / (b_k - a_k)}`. The authors, whose sizes are numbers of pixels, begin with 5 and multiply it by 1.1
    in each epoch. Bounds that hold of any size, 0 below and 1 above, cost nothing.

    Args:
        logits: class logits, ``[B, K, *spatial]``, K >= 2, any finite values.
        lower: :math:`a`, fractions of the image in [0, 1]: a number, ``[K]`` or ``[B, K]``; no lower bound if None.
        upper: :math:`b`, likewise. At least one of the two must be given.
        t: of the log-barrier extension, from 1e-3 to 1e6; the squared penalty if None.
        valid: pixels that count, bool, ``[B, *spatial]``; all of them if None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 logits); in [0, 2K] without ``t``.

    Raises:
        TypeError: ``logits`` or bounds that are not floating point, ``valid`` that is not bool.
        ValueError: no bound, shapes or devices that do not fit each other, a single class, bounds outside [0, 1], ``t``
            out of range, NaN or infinite logits.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (17); *Constrained-CNN losses
        for weakly supervised segmentation* for the upper bounds; *Constrained Deep Networks: Lagrangian Optimization
        via Log-Barrier Extensions* for :math:`\psi_t`.

    Example:
        >>> size_barrier(torch.zeros(1, 2, 8, 8), lower=torch.tensor([0.1, 0.7]))
        tensor(0.0400)
    """
    _check(logits, valid, reduction)
    _check_bounds(lower, upper, logits)
    check_t(t)
    log_mean, seen = log_average(logits, valid)
    average = log_mean.exp()
    cost = average.new_zeros(())
    if lower is not None:
        cost = cost + _outside(lower - average, lower, 0, t)
    if upper is not None:
        cost = cost + _outside(average - upper, upper, 1, t)
    return reduce(cost.to(average.dtype).sum(1), reduction, seen)


def _outside(excess: Tensor, bound: float | Tensor, loosest: int, t: float | None) -> Tensor:
    """The penalty on a bound. The log-barrier extension acts within it too, but not where it holds of any size."""
    cost = penalty(excess, t)
    return cost if t is None else cost * (bound != loosest)


class SizeBarrier(LossModule):
    """:func:`size_barrier` as a module."""

    lower: float | Tensor | None
    upper: float | Tensor | None
    t: float | None

    def __init__(
        self,
        *,
        lower: float | Tensor | None = None,
        upper: float | Tensor | None = None,
        t: float | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction, lower=lower, upper=upper, t=t)
        _check_bounds(lower, upper, None)
        check_t(t)

    def forward(self, logits: Tensor, valid: Tensor | None = None) -> Tensor:
        return size_barrier(logits, lower=self.lower, upper=self.upper, t=self.t, valid=valid, reduction=self.reduction)


def balance_kl(logits: Tensor, prior: Tensor | None = None) -> Tensor:
    r"""KL divergence between the average prediction over a batch and a prior: fairness, or balance with a known prior.

    .. math:: L = KL(\hat S \,\|\, v) = \sum_k \hat S^k \ln \frac{\hat S^k}{v_k}, \qquad
        \hat S = \frac 1 N \sum_i \operatorname{softmax}(x_i)

    With a uniform prior this is the fairness loss (6) up to the constant ln K that makes it 0 at its minimum. The
    average is a statistic of the batch: under data parallelism each process balances its own part.

    Args:
        logits: one row of class logits for each image or pixel, ``[N, K]``, K >= 2, any finite values.
        prior: :math:`v`, positive fractions that sum to 1, ``[K]``; uniform if None.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 for N = 0.

    Raises:
        TypeError: ``logits`` or ``prior`` that are not floating point.
        ValueError: other shapes or devices, a single class, NaN or infinite logits, a prior that is not positive or
            does not sum to 1.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (6) and (7).

    Example:
        >>> balance_kl(torch.zeros(8, 4), torch.tensor([0.4, 0.3, 0.2, 0.1]))
        tensor(0.1218)
    """
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [N, K], got {shape_text(logits.shape)}")
    check_logits(logits[None].transpose(1, 2))
    if prior is not None:
        check_floating("prior", prior)
        check_like("prior", prior, logits.shape[1:], "logits", logits)
        check_sizes("prior", prior[None])
        require("prior", prior, lambda: (prior > 0).all(), lambda: "expected positive fractions, got 0")
    average, seen = log_average(logits.t()[None], None)
    target = -average.new_tensor(logits.shape[1]).log() if prior is None else prior.to(average.dtype).log()
    return reduce((average.exp() * (average - target)).sum(1), "sum", seen)


class BalanceKL(nn.Module):
    """:func:`balance_kl` as a module; the prior is a buffer."""

    __call__: Callable[..., Tensor]  # for type checkers: torch says Any
    prior: Tensor | None

    def __init__(self, prior: Tensor | None = None) -> None:
        super().__init__()
        if prior is not None:
            check_floating("prior", prior)
        self.register_buffer("prior", prior)

    def forward(self, logits: Tensor) -> Tensor:
        return balance_kl(logits, self.prior)


def class_balanced_weights(counts: Tensor, beta: float, *, normalize: bool = True) -> Tensor:
    r"""Class weights from the effective number of samples, for the ``weight`` of a cross-entropy.

    .. math:: w_k \propto \frac{1}{1 - \beta^{n_k}}

    Args:
        counts: number of samples of each class, :math:`n`, ``[K]``, at least 1 (any numeric dtype); may be infinite.
        beta: :math:`\beta` in [0, 1): 0 weights all classes equally, towards 1 by inverse frequency.
        normalize: scale the weights to sum to K, as is common; otherwise the formula with "=".

    Returns:
        Weights ``[K]``, float32 (float64 for float64 counts).

    Raises:
        TypeError: ``counts`` that is not a tensor of numbers.
        ValueError: ``counts`` that are not ``[K]`` or below 1, ``beta`` outside [0, 1).

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (5); *Class-Balanced Loss
        Based on Effective Number of Samples*.

    Example:
        >>> class_balanced_weights(torch.tensor([1000, 10]), 0.99)
        tensor([0.1746, 1.8254])
    """
    check_real("counts", counts)
    if counts.dim() != 1:
        raise ValueError(f"counts: expected [K], got {shape_text(counts.shape)}")
    check_number("beta", beta, least=0, below=1)
    require(
        "counts",
        counts,
        lambda: (counts >= 1).all(),
        lambda: f"expected at least 1 for each class, got {counts.min().item():.6g}",
    )
    # 1 - beta^n without cancellation for beta close to 1.
    exact = counts.double()
    weights = -1 / torch.expm1(exact * exact.new_tensor(beta).log())
    if normalize:
        weights = weights * (counts.numel() / weights.sum())
    return weights.to(wide_dtype(counts))


def sizes_from_labels(labels: Tensor, num_classes: int, *, ignore_index: int = 255) -> Tensor:
    """Exact sizes of the classes in label maps, as fractions of the labelled pixels.

    Args:
        labels: class of each pixel, integers, ``[B, *spatial]``.
        num_classes: K, the number of classes.
        ignore_index: label of the pixels that do not count.

    Returns:
        ``[B, K]``, float32; each row sums to 1, or is 0 for an image without labelled pixels. The size losses refuse
        such a row: leave the image out, or give it any sizes and ignore its pixels by ``valid``, which costs nothing.

    Raises:
        TypeError: ``labels`` that are not integers, ``num_classes`` that is not an int.
        ValueError: ``labels`` without spatial dimensions, ``num_classes`` below 1 or beyond int32, a label that
            is neither a class nor ``ignore_index``.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, sec. 3.1.

    Example:
        >>> sizes_from_labels(torch.tensor([[[0, 0, 1, 255]]]), 2)
        tensor([[0.6667, 0.3333]])
    """
    labels = check_label_maps(labels, num_classes, ignore_index).flatten(1)
    counted = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    counts = torch.zeros(len(labels), num_classes + 1, dtype=torch.float64, device=labels.device)
    counts.scatter_add_(1, torch.where(counted, labels, num_classes), torch.ones_like(labels, dtype=torch.float64))
    counts = counts[:, :-1]
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).float()


def corrupt_sizes(sizes: Tensor, sigma: float, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Size targets with relative errors, as an annotator would make them.

    .. math:: v_k \longleftarrow (1 + \epsilon_k) \hat v_k, \qquad \epsilon_k \sim \mathcal N(0, \sigma)

    where the arrow renormalises to a sum of 1. Sizes that become negative (from about :math:`\sigma = .3` on) are set
    to 0, and an image in which all do is drawn again. A nominal mean relative error m, eq. (16), is
    :math:`\sigma = m \sqrt{\pi / 2}`; renormalisation makes the real one smaller, the more the fewer classes an image
    has: :func:`mean_relative_error` measures it.

    Args:
        sizes: exact sizes :math:`\hat v`, ``[B, K]``, fractions that sum to 1 in each row.
        sigma: standard deviation of the relative error, at least 0 and below 1e6.
        generator: source of randomness; the global one of the device if None.

    Returns:
        ``[B, K]``, float32 (float64 for float64 sizes), each row sums to 1. A row that is not checked (see
        :func:`~segloss.check_values`) and is all 0 gives NaN.

    Raises:
        TypeError: ``sizes`` that are not floating point, ``generator`` that is no generator.
        ValueError: ``sizes`` that are not ``[B, K]``, below 0 or do not sum to 1; ``sigma`` out of range.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (15) and (16).

    Example:
        >>> corrupt_sizes(torch.tensor([[0.75, 0.25]]), 0.0)
        tensor([[0.7500, 0.2500]])
    """
    check_sizes("sizes", sizes)
    check_has_values("sizes", sizes)
    check_number("sigma", sigma, least=0, below=1e6)
    check_generator(generator)
    exact = sizes.to(wide_dtype(sizes))
    device = exact.device if generator is None else generator.device

    def draw() -> Tensor:
        noise = torch.randn(exact.shape, dtype=exact.dtype, device=device, generator=generator).to(exact.device)
        return (exact * (1 + sigma * noise)).clamp(min=0)

    corrupted = draw()
    while (empty := (corrupted.sum(1) == 0) & (exact.sum(1) > 0)).any():
        corrupted = torch.where(empty[:, None], draw(), corrupted)
    return corrupted / corrupted.sum(1, keepdim=True)


def mean_relative_error(sizes: Tensor, exact: Tensor) -> Tensor:
    r"""Mean relative error of size targets, over all images and the classes present in them.

    .. math:: mRE = \operatorname{mean}_{\hat v_k > 0} \frac{|v_k - \hat v_k|}{\hat v_k}

    Args:
        sizes: size targets :math:`v`, ``[B, K]``.
        exact: exact sizes :math:`\hat v`, ``[B, K]``, fractions that sum to 1 in each row.

    Returns:
        A scalar of at least 0, float32 (float64 for float64 sizes); 0 for an empty batch.

    Raises:
        TypeError: sizes that are not floating point.
        ValueError: shapes or devices that do not fit each other, sizes below 0 or rows that do not sum to 1.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, eq. (14).

    Example:
        >>> mean_relative_error(torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.5]]))
        tensor(0.2000)
    """
    check_sizes("exact", exact)
    check_floating("sizes", sizes)
    check_like("sizes", sizes, exact.shape, "exact", exact)
    check_sizes("sizes", sizes)
    present = exact > 0
    error = (sizes - exact).abs() / torch.where(present, exact, 1)
    total = torch.where(present, error, 0).to(wide_dtype(error)).sum()
    return total / present.sum().clamp(min=1)


def _check(logits: Tensor, valid: Tensor | None, reduction: Reduction) -> None:
    check_logits(logits)
    check_valid(valid, logits)
    check_reduction(reduction)


def _check_targets(
    logits: Tensor, sizes: Tensor, known: Tensor | None, valid: Tensor | None, reduction: Reduction
) -> None:
    _check(logits, valid, reduction)
    check_known(known, logits)
    check_sizes("sizes", sizes, logits, known)


def _merge_free(average: Tensor, sizes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Log averages and sizes ``[B, K]`` in which the first free class of an image stands for all of its free ones.

    The others are left without size and average.
    """
    sizes = torch.where(known, sizes, 0)
    left = torch.where(known, LOG_FLOOR, average).logsumexp(1, keepdim=True)
    first = ~known & ((~known).cumsum(1) == 1)
    average = torch.where(known, average, torch.where(first, left, LOG_FLOOR))
    return average, torch.where(first, (1 - sizes.sum(1, keepdim=True)).clamp(min=0), sizes)


def _check_bounds(lower: float | Tensor | None, upper: float | Tensor | None, logits: Tensor | None) -> None:
    if lower is None and upper is None:
        raise ValueError("lower, upper: expected at least one bound, got None for both")
    for name, bound in (("lower", lower), ("upper", upper)):
        if isinstance(bound, Tensor):
            check_floating(name, bound)
            if logits is not None and bound.dim() > 0:
                check_like(name, bound, logits.shape[1:2] if bound.dim() == 1 else logits.shape[:2], "logits", logits)
            check_fractions(name, bound, "fractions")
        elif bound is not None:
            check_number(name, bound, least=0, most=1)
