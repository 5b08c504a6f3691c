"""Quality of instance masks: average precision and average best overlap."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segloss.common.checks import (
    check_finite,
    check_integer,
    check_like,
    check_number,
    check_real,
    require,
    shape_text,
)

Instances = Mapping[str, Tensor]  # of one image: "masks", "labels", "scores"

_CHUNK = 64  # masks that are held as floating point at a time


class PerClass(NamedTuple):
    """A measure of each class that has an instance, and its mean over these classes."""

    mean: float  # NaN without any instance
    classes: Tensor  # [C], int64, the labels, increasing
    values: Tensor  # [C], float32


def average_precision(
    predictions: Iterable[Instances], truths: Iterable[Instances], *, threshold: float = 0.5
) -> PerClass:
    r"""Average precision (AP) of instance masks at a threshold of the intersection over union; AP50 by default.

    The predictions of an image choose by falling score, of equal scores the earlier first: each takes the instance of
    its class that it overlaps most among those not yet taken, if :math:`\mathrm{IoU} \ge \tau`. Those that take one are
    right, all others, duplicates too, are wrong. With precision :math:`p_i` and recall :math:`r_i` of the predictions
    of all images down to the i-th highest score of the class,

    .. math:: \mathrm{AP} = \sum_i (r_i - r_{i - 1}) \max_{j \ge i} p_j, \qquad r_0 = 0,

    the area under the precision that is made to fall, at all points. Equal scores are one point of the curve, so the
    order of images and of predictions that do not compete for an instance does not count. A class counts if it has an
    instance; predictions of others do not.

    Args:
        predictions: one mapping for each image, or an iterator over them, of which one is held at a time, with
            ``"masks"``, bool, ``[n, H, W]``; ``"labels"``, integers, ``[n]``; ``"scores"``, higher is surer, ``[n]``.
            What else they hold does not count, so a torchvision model's output serves, once its masks are
            ``masks[:, 0] > 0.5``.
        truths: the same without scores, for the same images; masks with at least one pixel.
        threshold: :math:`\tau`, in (0, 1].

    Returns:
        A :class:`PerClass`: AP of each class in [0, 1] and the mean over classes. On the CPU.

    Raises:
        TypeError: images that are no mappings, masks that are not bool tensors, labels that are not integers, scores
            that are no real numbers, a threshold that is no number.
        ValueError: a missing key, shapes or devices that do not fit each other, an instance without pixels, NaN or
            infinite scores, more images on one side, a threshold outside (0, 1].

    Source:
        *The PASCAL Visual Object Classes Challenge: A Retrospective* for the area at all points (VOC since 2010);
        *Microsoft COCO: Common Objects in Context*, its evaluation code, for the choice among instances not yet taken
        (VOC lets a prediction look at its best instance only, taken or not). COCO's code samples the curve at 101
        recalls and looks at the 100 surest predictions of an image, and both let the order of input decide between
        equal scores. There are no crowds and no difficult instances here: leave them out of both sides.

    Example:
        >>> truth = {"masks": torch.eye(3, dtype=torch.bool)[:2, None], "labels": torch.tensor([1, 1])}
        >>> found = {"masks": torch.eye(3, dtype=torch.bool)[[0, 2, 1], None], "labels": torch.tensor([1, 1, 1])}
        >>> found["scores"] = torch.tensor([0.9, 0.8, 0.7])
        >>> round(average_precision([found], [truth]).mean, 4)  # 1 / 2 + 1 / 2 * 2 / 3
        0.8333
    """
    check_number("threshold", threshold, above=0, most=1)
    scores, found, predicted, true = [], [], [], []
    for prediction, truth in _images(predictions, truths, scored=True):
        of_image = prediction["scores"].detach().double().cpu().numpy()
        scores.append(of_image)
        found.append(_takes(_overlaps(prediction, truth), of_image, threshold))
        predicted.append(prediction["labels"].long().cpu().numpy())
        true.append(truth["labels"].long().cpu().numpy())
    classes, counts = np.unique(_joined(true, np.int64), return_counts=True)
    all_scores, all_found, of_class = (
        _joined(scores, np.float64),
        _joined(found, np.bool_),
        _joined(predicted, np.int64),
    )
    areas = [
        _area(all_scores[of_class == c], all_found[of_class == c], count)
        for c, count in zip(classes, counts, strict=True)
    ]
    return _per_class(classes, areas)


def average_best_overlap(predictions: Iterable[Instances], truths: Iterable[Instances]) -> PerClass:
    r"""Average best overlap (ABO): how well the best prediction covers each instance.

    .. math:: \mathrm{ABO}_c = \frac{1}{|G_c|} \sum_{g \in G_c} \max_{p \in P_c} \mathrm{IoU}(p, g)

    over the instances :math:`G_c` of a class in all images, each with the predictions :math:`P_c` of this class in its
    image; 0 where there is none. Scores do not count, and a prediction may serve several instances.

    Args:
        predictions: one mapping for each image, or an iterator over them, of which one is held at a time, with
            ``"masks"``, bool, ``[n, H, W]``, and ``"labels"``, integers, ``[n]``; what else they hold does not count.
        truths: the same for the same images; masks with at least one pixel.

    Returns:
        A :class:`PerClass`: ABO of each class in [0, 1] and the mean over classes (MABO). On the CPU.

    Raises:
        TypeError: images that are no mappings, masks that are not bool tensors, labels that are not integers.
        ValueError: a missing key, shapes or devices that do not fit each other, an instance without pixels, more
            images on one side.

    Source:
        *Selective Search for Object Recognition*, section 5, with masks for boxes, whose locations have no class.

    Example:
        >>> truth = {"masks": torch.tensor([[[True, True, False]]]), "labels": torch.tensor([1])}
        >>> found = {"masks": torch.tensor([[[True, False, False]], [[True, True, True]]])}
        >>> found["labels"] = torch.tensor([1, 1])
        >>> round(average_best_overlap([found], [truth]).mean, 4)
        0.6667
    """
    best, true = [], []
    for prediction, truth in _images(predictions, truths, scored=False):
        best.append(_overlaps(prediction, truth).max(0, initial=0))
        true.append(truth["labels"].long().cpu().numpy())
    labels, values = _joined(true, np.int64), _joined(best, np.float64)
    classes = np.unique(labels)
    return _per_class(classes, [values[labels == c].mean() for c in classes])


def intersections(first: Tensor, second: Tensor) -> Tensor:
    """Pixels that each mask of ``first [n, H, W]`` shares with each of ``second [m, H, W]``, float64 ``[n, m]``."""
    # Sums of zeros and ones: float32 is exact up to 2 ** 24 of them.
    dtype = torch.float32 if first.shape[1:].numel() <= 2**24 else torch.float64
    with torch.autocast(first.device.type, enabled=False):
        rows = first.flatten(1).to(dtype)
        parts = [rows @ part.flatten(1).to(dtype).T for part in second.split(_CHUNK)]
    return torch.cat(parts, 1).double()


def _overlaps(prediction: Instances, truth: Instances) -> NDArray[np.float64]:
    """Intersection over union of the predicted with the true masks, ``[n, m]``; 0 for different classes."""
    shared = intersections(prediction["masks"], truth["masks"])
    predicted, true = (instances["masks"].sum((1, 2)) for instances in (prediction, truth))
    either = predicted[:, None] + true - shared
    same = prediction["labels"].long()[:, None] == truth["labels"].long()
    return (shared / either.clamp(min=1)).where(same, 0).cpu().numpy()


def _takes(overlaps: NDArray[np.float64], scores: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Which predictions take an instance."""
    takes = np.zeros(len(scores), dtype=np.bool_)
    free = overlaps.copy()
    for p in np.argsort(-scores, kind="stable") if free.size else ():
        best = free[p].argmax()
        if free[p, best] >= threshold:
            takes[p] = True
            free[:, best] = 0
    return takes


def _area(scores: NDArray[np.float64], found: NDArray[np.bool_], count: int) -> float:
    """Area under precision over recall of one class with ``count`` instances."""
    if not len(scores):
        return 0.0
    order = np.argsort(-scores)
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of the predictions of equal score
    hits = found[order].cumsum()[last]
    precision = np.maximum.accumulate((hits / (last + 1))[::-1])[::-1]
    return float(np.diff(hits / count, prepend=0) @ precision)


def _per_class(classes: NDArray[np.int64], values: list[float]) -> PerClass:
    mean = float(np.mean(values)) if values else float("nan")
    return PerClass(mean, torch.from_numpy(classes), torch.tensor(values, dtype=torch.float32, device="cpu"))


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    """All parts in a row, of which there may be none."""
    return np.concatenate([np.zeros(0, dtype), *parts])


def _images(
    predictions: Iterable[Instances], truths: Iterable[Instances], *, scored: bool
) -> Iterator[tuple[Instances, Instances]]:
    """The checked instances of one image after the other."""
    for name, value in (("predictions", predictions), ("truths", truths)):
        if isinstance(value, (Mapping, Tensor)) or not isinstance(value, Iterable):
            raise TypeError(f"{name}: expected the instances of each image, a list say, got {type(value).__name__}")
    end: Instances = {}  # by identity: no image of the caller's
    for index, (prediction, truth) in enumerate(zip_longest(predictions, truths, fillvalue=end)):
        if prediction is end or truth is end:
            longer, shorter = ("truths", "predictions") if prediction is end else ("predictions", "truths")
            raise ValueError(f"{shorter}: expected as many images as {longer} has, got {index}")
        _check_instances(f"predictions[{index}]", prediction)
        _check_instances(f"truths[{index}]", truth)
        masks, true = prediction["masks"], truth["masks"]
        check_like(f'truths[{index}]["masks"]', true, (len(true), *masks.shape[1:]), "predictions", masks)
        require(
            f'truths[{index}]["masks"]',
            true,
            lambda true=true: true.flatten(1).any(1).all(),  # type: ignore[misc]
            lambda: "expected at least one pixel in each",
        )
        if scored:
            name, scores = f'predictions[{index}]["scores"]', _value(f"predictions[{index}]", prediction, "scores")
            check_real(name, scores)
            check_like(name, scores, masks.shape[:1], "masks", masks)
            check_finite(name, scores)
        yield prediction, truth


def _check_instances(name: str, instances: object) -> None:
    if not isinstance(instances, Mapping):
        raise TypeError(f'{name}: expected a mapping with "masks" and "labels", got {type(instances).__name__}')
    masks, labels = (_value(name, instances, key) for key in ("masks", "labels"))
    check_real(f'{name}["masks"]', masks)
    if masks.dtype != torch.bool:
        raise TypeError(f'{name}["masks"]: expected a bool tensor (masks > threshold), got {masks.dtype}')
    if masks.dim() != 3:
        raise ValueError(f'{name}["masks"]: expected [n, H, W], got {shape_text(masks.shape)}')
    check_integer(f'{name}["labels"]', labels)
    check_like(f'{name}["labels"]', labels, masks.shape[:1], "masks", masks)


def _value(name: str, instances: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in instances:
        raise ValueError(f'{name}: expected "{key}", got {", ".join(map(repr, instances)) or "nothing"}')
    return instances[key]
