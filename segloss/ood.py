"""W-OoD: keep a classifier away from the background with images of background that it takes for objects."""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from segloss.common.checks import (
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_fractions,
    check_generator,
    check_has_values,
    check_image_logits,
    check_int,
    check_like,
    check_number,
    check_real,
    check_tags,
    shape_text,
)
from segloss.common.reduction import Reduction, check_reduction, reduce, wide_dtype, widen
from segloss.common.settings import LossModule

Scope = Literal["image", "batch"]

_STARTS = 3  # of k-means; the one with the lowest distortion is kept
_ITERATIONS = 300  # of k-means at most; it stops where nothing moves any more


def class_centres(features: Tensor, tags: Tensor) -> Tensor:
    r"""Mean feature of the images of each class: the clusters of the in-distribution images.

    .. math:: p_c = \frac{1}{|P_c|} \sum_{x \in P_c} z(x)

    An image with several classes belongs to the cluster of each of them.

    Args:
        features: penultimate features of all training images, averaged over the image, ``[N, D]``, any finite values;
            beyond ±1e30 they count as that.
        tags: 1 where a class is present in the image, 0 elsewhere, ``[N, C]``, any dtype.

    Returns:
        Centres ``[C, D]``, float32 (float64 for float64 features), constants: no gradient flows back. A class without
        images has the centre 0; its tag does not occur in the same data either.

    Raises:
        TypeError: ``features`` that are not floating point, ``tags`` that are no tensor of real numbers.
        ValueError: shapes or devices that do not fit each other, no feature, NaN or infinite features, tags other than
            0 and 1.

    Source:
        W-OoD, the dissertation's sec. 4.3.2.

    Example:
        >>> class_centres(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0], [1, 1]]))
        tensor([[2., 3.],
                [3., 4.]])
    """
    _check_rows("features", features, "N")
    check_real("tags", tags)
    if tags.dim() != 2:
        raise ValueError(f"tags: expected [N, C], got {shape_text(tags.shape)}")
    check_tags(tags, features, "features", tags.shape[1])
    # float64: precise for any number of images, and neither autocast nor TF32 lowers a product of doubles.
    member = (tags != 0).double()
    total = member.T @ widen(features.detach()).double()
    return (total / member.sum(0).clamp(min=1)[:, None]).to(wide_dtype(features))


def ood_centres(features: Tensor, clusters: int, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Clusters of the out-of-distribution (OoD) images by k-means: their centres, in no particular order.

    .. math:: p_k = \frac{1}{|P_k|} \sum_{x \in P_k} z(x)

    Lloyd's algorithm in float64 on the CPU, until nothing moves (at most 300 iterations), from three k-means++ starts,
    of which the lowest distortion is kept; no cluster stays empty. The authors' public code makes ten iterations from
    the first images.

    Args:
        features: penultimate features of all OoD images, averaged over the image, ``[N, D]``, any finite values; beyond
            ±1e30 they count as that, and rows whose squared distance underflows as equal.
        clusters: number of clusters :math:`K`, at least 1; 50 in the paper.
        generator: source of the starts, which are the same for the same state of it; the global one of the CPU if None.

    Returns:
        Centres ``[K, D]`` on the device of the features, float32 (float64 for float64 features), constants.

    Raises:
        TypeError: ``features`` that are not floating point, ``clusters`` that is no int, ``generator`` that is no
            generator.
        ValueError: ``features`` that are not ``[N, D]``, NaN or infinite, or have fewer distinct rows than there are
            clusters; ``clusters`` below 1.

    Source:
        W-OoD, the dissertation's sec. 4.3.2.

    Example:
        >>> centres = ood_centres(torch.tensor([[0.0, 1.0], [0.0, 3.0], [8.0, 8.0]]), 2)
        >>> sorted(centres.tolist())
        [[0.0, 2.0], [8.0, 8.0]]
    """
    return _kmeans("features", features, clusters, generator)


def _kmeans(name: str, features: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    """:func:`ood_centres` of the argument called ``name``."""
    _check_rows(name, features, "N")
    check_has_values(name, features)
    check_int("clusters", clusters)
    check_number("clusters", clusters, least=1)
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), device=device, generator=generator)))
    points = widen(features.detach()).to("cpu", torch.float64).numpy()
    offset = points.mean(0) if len(points) else 0.0
    points = points - offset  # scipy's vq loses small differences between large numbers
    runs = [_lloyd(points, _distant_points(name, points, clusters, rng)) for _ in range(_STARTS)]
    _, centres = min(runs, key=lambda run: run[0])
    return torch.from_numpy(centres + offset).to(features.device, wide_dtype(features))


def _distant_points(
    name: str, points: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """k-means++: each next point is drawn with its squared distance to the nearest one drawn so far as the weight.

    scipy's own k-means++ measures the distances to all points drawn so far again for each new one.
    """
    from scipy.spatial.distance import cdist

    squared = np.full(len(points), 1e300)  # farther than any, and the same for all
    drawn: list[int] = []
    while len(drawn) < count:
        if not squared.any():
            raise ValueError(f"{name}: expected at least {count} distinct rows for {count} clusters, got {len(drawn)}")
        drawn.append(int(rng.choice(len(points), p=squared / squared.sum())))
        squared = np.minimum(squared, cdist(points[drawn[-1:]], points, "sqeuclidean")[0])
    return points[drawn]


def _lloyd(points: NDArray[np.float64], centres: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Distortion and centres of k-means from these centres on.

    scipy's kmeans2 leaves the centre of a cluster that runs empty where it was, and its number of iterations is fixed;
    here such a centre moves to the point that is served worst.
    """
    from scipy.cluster.vq import vq

    for _ in range(_ITERATIONS):
        nearest, distance = vq(points, centres)
        members = [points[nearest == k] for k in range(len(centres))]
        previous, centres = centres, np.stack([m.mean(0) if len(m) else points[distance.argmax()] for m in members])
        if (centres == previous).all():
            break
    return float(distance @ distance), centres


def ood_distance(
    features: Tensor,
    tags: Tensor,
    centres: Tensor,
    ood: Tensor,
    *,
    top: float = 0.2,
    scope: Scope = "image",
    squared: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance to the centres of the image's own classes, minus the distance to the nearest OoD centres.

    .. math:: L_d = \sum_{c: y_c = 1} \lVert z - p_c \rVert_2 - \sum_{k \in K_\tau(z)} \lVert z - p_k \rVert_2

    where :math:`K_\tau(z)` are the nearest :math:`\tau` of the K OoD centres, their number rounded down and at least 1.

    ``scope="batch"`` is what the authors' public code trains with: the nearest :math:`\tau` among the B K distances of
    all images of the batch, so that one image may push off from many centres and another one from none, and everything
    divided by K. Their weight 0.007 belongs to that scale; for the same strength ``scope="image"``, which is the
    formula, wants 0.007 / K, that is 1.4e-4 for K = 50 (both with ``reduction="mean"``).

    The centres are constants, computed once from the features that the classifier has before this loss is added, on
    images without augmentation: see :func:`class_centres`, :func:`ood_centres` and :class:`OODClusters`.

    Args:
        features: penultimate features :math:`z`, averaged over the image, ``[B, D]``, any finite values.
        tags: :math:`y`, 1 where a class is present in the image, 0 elsewhere, ``[B, C]``, any dtype.
        centres: centres :math:`p_c` of the classes, ``[C, D]``.
        ood: centres :math:`p_k` of the OoD clusters, ``[K, D]``.
        top: :math:`\tau`, the fraction of the OoD centres to push off from, in (0, 1]; 0.2 in the paper.
        scope: ``"image"`` to choose them for each image, ``"batch"`` among all images of the batch (of each process,
            under data parallelism).
        squared: take squared distances instead of those of eq. (4.1); components further apart than 1e15 count as 1e15.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images, each with its own share of the distances.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; float32 (float64 for float64 features); may be negative. No gradient flows
        from a centre that an image lies on. Tags that are not checked (see :func:`~segloss.check_values`) and are
        neither 0 nor 1 count as 1 where they are not 0.

    Raises:
        TypeError: ``features``, ``centres`` or ``ood`` that are not floating point, ``tags`` that are no tensor of real
            numbers, ``top`` that is no number, ``squared`` that is no bool.
        ValueError: shapes or devices that do not fit each other, no feature, no centre, NaN or infinite values, tags
            other than 0 and 1, ``top`` outside (0, 1], an unknown ``scope``.

    Source:
        W-OoD, the dissertation's eq. (4.1) and (4.2).

    Example:
        >>> features, tags = torch.tensor([[3.0, 4.0]]), torch.tensor([[1, 0]])
        >>> centres, ood = torch.zeros(2, 2), torch.tensor([[3.0, 2.0], [9.0, 9.0]])
        >>> ood_distance(features, tags, centres, ood, top=0.5)
        tensor(3.)
    """
    _check_centres(centres, ood)
    _check_rows("features", features, "B")
    check_like("features", features, (len(features), centres.shape[1]), "centres", centres)
    check_real("tags", tags)
    if tags.shape[1:] != centres.shape[:1]:
        raise ValueError(
            f"tags: expected {shape_text((len(features), len(centres)))} to go with features "
            f"{shape_text(features.shape)} and centres {shape_text(centres.shape)}, got {shape_text(tags.shape)}"
        )
    check_tags(tags, features, "features", len(centres))
    _check_settings(top, scope, squared)
    check_reduction(reduction)
    own, far = (_distances(widen(features), rows.detach(), squared) for rows in (centres, ood))
    pool = far if scope == "image" else far.flatten()
    # The small number makes up for products such as 0.29 * 100 = 28.999...
    count = min(max(int(pool.shape[-1] * top + 1e-9), 1), pool.shape[-1])
    nearest = pool.detach().topk(count, largest=False).indices
    chosen = torch.zeros_like(pool, dtype=torch.bool).scatter(-1, nearest, True).view_as(far)
    per_image = torch.where(tags != 0, own, 0).sum(1) - torch.where(chosen, far, 0).sum(1)
    return reduce(per_image if scope == "image" else per_image / len(ood), reduction)


def _distances(points: Tensor, centres: Tensor, squared: bool) -> Tensor:
    """``[B, K]`` from ``[B, D]`` and ``[K, D]``; the gradient is 0 at distance 0."""
    difference = points[:, None] - widen(centres.to(points.dtype))
    if squared:
        return difference.clamp(-1e15, 1e15).square().sum(2)
    # In units of the largest component, a constant, squares do not overflow, nor vanish above 1e-30.
    scale = difference.detach().abs().amax(2, keepdim=True).clamp(min=1e-30)
    squares = (difference / scale).square().sum(2)
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt() * scale[:, :, 0], 0)


class OODClusters(LossModule):
    """:func:`ood_distance` as a module that holds the centres.

    They are buffers: they move and are saved with the module, and under DistributedDataParallel they are those of the
    first process if the module is part of the wrapped model. The authors compute them once, from the initial classifier
    and images without augmentation, with K = 50 OoD clusters, and keep them. :meth:`from_features` does that, and
    :meth:`refit` computes them anew in place. Both want the features of all images: under data parallelism gather those
    of all processes first.
    """

    centres: Tensor
    ood: Tensor
    top: float
    scope: Scope
    squared: bool

    def __init__(
        self,
        centres: Tensor,
        ood: Tensor,
        *,
        top: float = 0.2,
        scope: Scope = "image",
        squared: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        _check_centres(centres, ood)
        _check_settings(top, scope, squared)
        with torch.inference_mode(False):  # copies that refit can write into later, wherever this is called
            centres, ood = centres.detach().clone(), ood.detach().clone()
        super().__init__(reduction, centres=centres, ood=ood, top=top, scope=scope, squared=squared)

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        tags: Tensor,
        ood_features: Tensor,
        clusters: int = 50,
        *,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> "OODClusters":
        """With the :func:`class_centres` of ``features`` and the :func:`ood_centres` of ``ood_features``.

        The other settings are those of the class; errors are those of the two functions.
        """
        centres = class_centres(features, tags)
        if not len(centres):
            raise ValueError(f"tags: expected [N, C] with at least one class, got {shape_text(tags.shape)}")
        _check_rows("ood_features", ood_features, "N")
        check_like("ood_features", ood_features, (len(ood_features), features.shape[1]), "features", features)
        return cls(centres, _kmeans("ood_features", ood_features, clusters, generator), **settings)

    def refit(
        self, features: Tensor, tags: Tensor, ood_features: Tensor, *, generator: torch.Generator | None = None
    ) -> None:
        """Computes all centres anew, in place, with as many clusters as before; the features may lie on any device."""
        classes, width = self.centres.shape
        _check_rows("features", features, "N", width)
        check_tags(tags, features, "features", classes)
        _check_rows("ood_features", ood_features, "N", width)
        centres = class_centres(features, tags).to(self.centres.dtype)
        ood = _kmeans("ood_features", ood_features, len(self.ood), generator).to(self.ood.dtype)
        check_finite("features", centres)  # a module in half precision cannot hold everything
        check_finite("ood_features", ood)
        self.centres.copy_(centres)
        self.ood.copy_(ood)

    def forward(self, features: Tensor, tags: Tensor) -> Tensor:
        return ood_distance(
            features,
            tags,
            self.centres,
            self.ood,
            top=self.top,
            scope=self.scope,
            squared=self.squared,
            reduction=self.reduction,
        )


def ood_classification(logits: Tensor, tags: Tensor, ood_logits: Tensor, *, ood_weight: float = 1.0) -> Tensor:
    r"""Binary cross-entropy of the images against their tags, and of OoD images against no tags at all.

    .. math:: L = \frac{1}{C} \sum_c \left[ L_{BCE}(F_c(x_{in}), y_c) + w L_{BCE}(F_c(x_{ood}), 0) \right]

    Each term is the mean over its own images, of which there may be different numbers. The paper has w = 1; the
    authors' public code has 0.25, on OoD images that it first perturbs adversarially towards their top class.

    Args:
        logits: class logits of the images, ``[B, C]``, C >= 1, any finite values.
        tags: 1 where a class is present in the image, 0 elsewhere, ``[B, C]``, any dtype.
        ood_logits: class logits of OoD images, ``[M, C]``; M = 0 contributes 0.
        ood_weight: :math:`w`, at least 0 and below 1e6.

    Returns:
        A scalar; float32 (float64 if the logits of either are). Both means are over the images of each process, under
        data parallelism. Tags that are not checked (see :func:`~segloss.check_values`) and are neither 0 nor 1 count as
        1 where they are not 0.

    Raises:
        TypeError: ``logits`` or ``ood_logits`` that are not floating point, ``tags`` that are no tensor of real
            numbers, ``ood_weight`` that is no number.
        ValueError: shapes or devices that do not fit each other, no class, NaN or infinite logits, tags other than 0
            and 1, ``ood_weight`` out of range.

    Source:
        W-OoD, the dissertation's eq. (4.3).

    Example:
        >>> ood_classification(torch.zeros(2, 3), torch.tensor([[1, 0, 0], [0, 1, 1]]), torch.zeros(4, 3))
        tensor(1.3863)
    """
    check_image_logits(logits)
    check_tags(tags, logits)
    check_floating("ood_logits", ood_logits)
    check_like("ood_logits", ood_logits, (*ood_logits.shape[:1], logits.shape[1]), "logits", logits)
    check_finite("ood_logits", ood_logits)
    check_number("ood_weight", ood_weight, least=0, below=1e6)
    return _cross_entropy(logits, tags != 0) + ood_weight * _cross_entropy(ood_logits, torch.zeros_like(ood_logits))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    scores = widen(logits)
    total = F.binary_cross_entropy_with_logits(scores, target.to(scores.dtype), reduction="sum")
    return total / max(scores.numel(), 1)


def rank_hard_ood(probabilities: Tensor, *, threshold: float = 0.5) -> list[Tensor] | Tensor:
    """The candidate images that a classifier takes for objects, those it is surest of first.

    Candidates are images without the classes of interest, as far as is known; what is left after a person has removed
    those that do show them, see :func:`annotation_cost`, are the hard out-of-distribution images.

    Args:
        probabilities: what the classifier gives each candidate for each class, ``[N, C]``, or for one class, ``[N]``;
            from 0 to 1.
        threshold: the least probability to be kept, from 0 to 1.

    Returns:
        Indices of the candidates kept for each class, the highest probability first and the lower index among equals: a
        list of C int64 tensors, or one tensor for ``[N]``. NaN that is not checked (see :func:`~segloss.check_values`)
        is not kept.

    Raises:
        TypeError: ``probabilities`` that are not floating point, ``threshold`` that is no number.
        ValueError: ``probabilities`` that are neither ``[N]`` nor ``[N, C]``, or outside [0, 1]; ``threshold`` outside
            [0, 1].

    Source:
        W-OoD, the dissertation's sec. 4.3.1.

    Example:
        >>> rank_hard_ood(torch.tensor([[0.6, 0.1], [0.2, 0.5], [0.9, 0.4]]))
        [tensor([2, 0]), tensor([1])]
    """
    check_floating("probabilities", probabilities)
    if probabilities.dim() not in (1, 2):
        raise ValueError(f"probabilities: expected [N] or [N, C], got {shape_text(probabilities.shape)}")
    check_fractions("probabilities", probabilities)
    check_number("threshold", threshold, least=0, most=1)
    check_has_values("probabilities", probabilities)
    ranked, order = probabilities.sort(dim=0, descending=True, stable=True)
    kept = ranked >= threshold
    if probabilities.dim() == 1:
        return order[kept]
    return [indices[mask] for indices, mask in zip(order.T, kept.T, strict=True)]


def annotation_cost(images: int, positive_rate: float) -> float:
    r"""How many candidates a person must look at, on average, to find this many that show no class of interest.

    .. math:: \frac{n}{1 - r}

    Args:
        images: :math:`n`, the number of hard OoD images wanted.
        positive_rate: :math:`r`, the share of the ranked candidates that do show a class of interest, in [0, 1).

    Returns:
        The expected number of looks.

    Raises:
        TypeError: ``images`` that is no int, ``positive_rate`` that is no number.
        ValueError: ``images`` below 0, ``positive_rate`` outside [0, 1).

    Source:
        W-OoD, the dissertation's sec. 4.3.1.

    Example:
        >>> annotation_cost(100, 0.2)
        125.0
    """
    check_int("images", images)
    check_number("images", images, least=0)
    check_number("positive_rate", positive_rate, least=0, below=1)
    return images / (1 - positive_rate)


def _check_rows(name: str, rows: Tensor, letter: str, width: int | None = None) -> None:
    """Finite ``[letter, D]``, where D is at least 1, or ``width`` if it is known."""
    check_floating(name, rows)
    if rows.dim() != 2 or not (rows.shape[1] >= 1 if width is None else rows.shape[1] == width):
        expected = f"[{letter}, D] with D of at least 1" if width is None else f"[{letter}, {width}]"
        raise ValueError(f"{name}: expected {expected}, got {shape_text(rows.shape)}")
    check_finite(name, rows)


def _check_centres(centres: Tensor, ood: Tensor) -> None:
    for name, rows, letter in (("centres", centres, "C"), ("ood", ood, "K")):
        _check_rows(name, rows, letter)
        if len(rows) == 0:
            raise ValueError(f"{name}: expected at least one centre, got {shape_text(rows.shape)}")
    check_like("ood", ood, (len(ood), centres.shape[1]), "centres", centres)


def _check_settings(top: float, scope: Scope, squared: bool) -> None:
    check_number("top", top, above=0, most=1)
    check_choice("scope", scope, ("image", "batch"))
    check_bool("squared", squared)
