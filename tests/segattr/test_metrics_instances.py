"""AP and ABO of instance masks, against exact fractions over sets of pixels."""

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segattr.metrics.instances import average_best_overlap, average_precision

Image = dict[str, Tensor]


def instances(masks: Any, labels: list[int], scores: list[float] | None = None) -> Image:
    """Of masks as rows of 0 and 1."""
    image = {"masks": torch.tensor(masks).bool().unsqueeze(1), "labels": torch.tensor(labels)}
    return image if scores is None else {**image, "scores": torch.tensor(scores)}


def images(count: int, seed: int, distinct: bool) -> tuple[list[Image], list[Image]]:
    """Small masks of two classes that overlap a lot."""
    rng = torch.Generator().manual_seed(seed)
    predictions, truths = [], []
    for _ in range(count):
        n, m = torch.randint(0, 5, (2,), generator=rng).tolist()
        truth = torch.rand(m, 2, 3, generator=rng) < 0.5
        truth[:, 0, 0] |= ~truth.flatten(1).any(1)
        scores = torch.rand(n, generator=rng) if distinct else torch.randint(0, 3, (n,), generator=rng) / 2
        predictions.append(
            {
                "masks": torch.rand(n, 2, 3, generator=rng) < 0.5,
                "labels": torch.randint(1, 4, (n,), generator=rng),
                "scores": scores,
            }
        )
        truths.append({"masks": truth, "labels": torch.randint(1, 3, (m,), generator=rng)})
    return predictions, truths


def objects(image: Image) -> list[tuple[int, set[int]]]:
    return [
        (int(c), set(mask.flatten().nonzero().flatten().tolist()))
        for c, mask in zip(image["labels"], image["masks"], strict=True)
    ]


def iou(first: set[int], second: set[int]) -> Fraction:
    return Fraction(len(first & second), len(first | second))


def ap_by_sets(predictions: list[Image], truths: list[Image], label: int, threshold: Fraction) -> Fraction:
    ranked: list[tuple[float, bool]] = []
    total = 0
    for prediction, truth in zip(predictions, truths, strict=True):
        free = [pixels for c, pixels in objects(truth) if c == label]
        total += len(free)
        scored = zip(prediction["scores"].tolist(), objects(prediction), strict=True)
        mine = [(score, pixels) for score, (c, pixels) in scored if c == label]
        for score, pixels in sorted(mine, key=lambda pair: -pair[0]):
            best = max(free, key=lambda other: iou(pixels, other), default=None)
            right = best is not None and iou(pixels, best) >= threshold
            if best is not None and right:
                free.remove(best)
            ranked.append((score, right))
    curve = []  # of recall and precision
    for level in sorted({score for score, _ in ranked}, reverse=True):
        kept = [right for score, right in ranked if score >= level]
        curve.append((Fraction(sum(kept), total), Fraction(sum(kept), len(kept))))
    area, before = Fraction(0), Fraction(0)
    for index, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[index:])
        before = recall
    return area


@given(count=st.integers(0, 4), seed=st.integers(0, 999), distinct=st.booleans(), threshold=st.integers(1, 6))
def test_ap_equals_exact_fractions(count: int, seed: int, distinct: bool, threshold: int) -> None:
    predictions, truths = images(count, seed, distinct)
    result = average_precision(predictions, truths, threshold=threshold / 6)
    labels = sorted({int(c) for truth in truths for c in truth["labels"]})
    assert result.classes.tolist() == labels
    expected = [float(ap_by_sets(predictions, truths, c, Fraction(threshold, 6))) for c in labels]
    assert result.values.tolist() == pytest.approx(expected, abs=1e-6)
    assert result.mean == pytest.approx(sum(expected) / len(labels) if labels else math.nan, abs=1e-12, nan_ok=True)


@given(count=st.integers(0, 4), seed=st.integers(0, 999))
def test_abo_equals_exact_fractions(count: int, seed: int) -> None:
    predictions, truths = images(count, seed, distinct=True)
    best: dict[int, list[Fraction]] = {}
    for prediction, truth in zip(predictions, truths, strict=True):
        for label, pixels in objects(truth):
            rivals = [iou(pixels, other) for c, other in objects(prediction) if c == label]
            best.setdefault(label, []).append(max(rivals, default=Fraction(0)))
    result = average_best_overlap(predictions, truths)
    assert result.classes.tolist() == sorted(best)
    expected = [float(sum(best[c], Fraction(0)) / len(best[c])) for c in sorted(best)]
    assert result.values.tolist() == pytest.approx(expected, abs=1e-6)
    assert result.mean == pytest.approx(sum(expected) / len(expected) if best else math.nan, abs=1e-12, nan_ok=True)


@given(seed=st.integers(0, 999))
def test_order_does_not_count_even_with_equal_scores(seed: int) -> None:
    predictions, truths = images(4, seed, distinct=False)
    for truth in truths:  # one instance of a class at most: no choice between instances
        first = [truth["labels"].tolist().index(c) for c in set(truth["labels"].tolist())]
        truth.update({key: value[first] for key, value in truth.items()})
    before = average_precision(predictions, truths)
    order = random.Random(seed).sample(range(4), 4)
    shuffled = [{key: value.flip(0) for key, value in predictions[i].items()} for i in order]
    after = average_precision(shuffled, [truths[i] for i in order])
    assert torch.equal(before.values, after.values)


@given(seed=st.integers(0, 999))
def test_the_truth_itself_scores_one(seed: int) -> None:
    _, truths = images(3, seed, distinct=True)
    exact = [{**truth, "scores": torch.rand(len(truth["labels"]))} for truth in truths]
    if any(len(truth["labels"]) for truth in truths):
        assert average_precision(exact, truths, threshold=1).values.eq(1).all()
        assert average_best_overlap(exact, truths).values.eq(1).all()


def test_duplicate_is_wrong_even_with_a_better_mask() -> None:
    truth = instances([[1, 1, 1, 0]], [1])
    found = instances([[1, 1, 0, 0], [1, 1, 1, 0]], [1, 1], [0.9, 0.8])
    assert average_precision([found], [truth]).mean == 1  # nothing is lost after full recall
    two = instances([[1, 1, 1, 0], [0, 0, 0, 1]], [1, 1])
    found = instances([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]], [1, 1, 1], [0.9, 0.8, 0.7])
    assert average_precision([found], [two]).mean == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_prediction_takes_the_second_best_where_the_best_is_taken() -> None:
    truth = instances([[1, 1, 0, 0], [0, 1, 1, 1]], [1, 1])
    found = instances([[1, 1, 0, 0], [1, 1, 1, 1]], [1, 1], [0.9, 0.8])
    assert average_precision([found], [truth], threshold=0.5).mean == 1
    stacked = instances([[1, 1, 1, 0], [1, 1, 0, 0]], [1, 1])
    found = instances([[1, 1, 1, 0], [1, 1, 1, 1]], [1, 1], [0.9, 0.8])  # 3 / 4, taken, and 2 / 4
    assert average_precision([found], [stacked]).mean == 1


def test_overlap_equal_to_the_threshold_is_enough() -> None:
    truth, found = instances([[1] * 7 + [0] * 3], [1]), instances([[1] * 10], [1], [1.0])
    assert average_precision([found], [truth], threshold=0.7).mean == 1
    assert average_precision([found], [truth], threshold=math.nextafter(0.7, 1)).mean == 0
    half = instances([[1] * 5 + [0] * 5], [1])
    assert average_precision([found], [half]).mean == 1  # AP50 is the default


def test_false_alarm_before_the_hit_halves_the_precision() -> None:
    truth = instances([[1, 0]], [1])
    for scores, expected in (([0.2, 0.9], 1.0), ([0.9, 0.2], 0.5), ([0.5, 0.5], 0.5)):
        assert average_precision([instances([[0, 1], [1, 0]], [1, 1], scores)], [truth]).mean == expected


def test_other_classes_neither_match_nor_count() -> None:
    truth = instances([[1, 0], [0, 1]], [1, 2])
    found = instances([[1, 0], [0, 1]], [2, 9], [0.9, 0.8])
    precision, overlap = average_precision([found], [truth]), average_best_overlap([found], [truth])
    for result in (precision, overlap):
        assert result.classes.tolist() == [1, 2]
        assert result.values.tolist() == [0, 0]
        assert result.values.dtype == torch.float32
        assert result.mean == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint64])
def test_labels_of_any_integers(dtype: torch.dtype) -> None:
    predictions, truths = images(3, 1, distinct=True)
    other = [{**image, "labels": image["labels"].to(dtype)} for image in predictions]
    for measure in (average_precision, average_best_overlap):
        result = measure(other, truths)
        assert result.classes.dtype == torch.int64
        assert torch.equal(result.values, measure(predictions, truths).values)


def test_one_prediction_may_be_the_best_of_several_instances() -> None:
    truth = instances([[1, 1, 0, 0], [0, 0, 1, 0]], [1, 1])
    found = instances([[1, 1, 1, 1], [1, 0, 0, 0]], [1, 1])
    assert average_best_overlap([found], [truth]).mean == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_classes_weigh_the_same_however_many_instances_they_have() -> None:
    truths = [instances([[1, 0], [0, 1]], [1, 1]), instances([[1, 1]], [5])]
    found = [instances([[1, 0], [0, 1]], [1, 1], [0.5, 0.5]), instances([[1, 0]], [1], [0.1])]
    result = average_best_overlap(found, truths)
    assert (result.classes.tolist(), result.values.tolist(), result.mean) == ([1, 5], [1, 0], 0.5)
    assert average_precision(found, truths).mean == 0.5


@pytest.mark.parametrize("measure", [average_precision, average_best_overlap])
def test_no_images_and_no_instances(measure: Any) -> None:
    nothing = {"masks": torch.zeros(0, 4, 5, dtype=torch.bool), "labels": torch.zeros(0, dtype=torch.int64)}
    empty = {**nothing, "scores": torch.zeros(0)}
    found = {"masks": torch.ones(1, 4, 5, dtype=torch.bool), "labels": torch.ones(1).long(), "scores": torch.ones(1)}
    for predictions, truths in (([], []), ([empty], [nothing]), ([found], [nothing])):
        result = measure(predictions, truths)
        assert math.isnan(result.mean)
        assert len(result.classes) == len(result.values) == 0
        assert result.classes.dtype == torch.int64
    assert measure([empty], [found]).values.tolist() == [0]


def test_prediction_without_pixels_is_wrong() -> None:
    found = instances([[0, 0], [1, 0]], [1, 1], [0.9, 0.8])
    truth = instances([[1, 0]], [1])
    assert average_precision([found], [truth], threshold=1e-9).mean == 0.5
    assert average_best_overlap([found], [truth]).mean == 1


def test_iterators_are_held_one_image_at_a_time() -> None:
    predictions, truths = images(5, 3, distinct=True)
    seen: list[str] = []

    def tell(name: str, images: list[Image]) -> Iterator[Image]:
        for image in images:
            seen.append(name)
            yield image

    lazily = average_precision(tell("p", predictions), tell("t", truths))
    assert torch.equal(lazily.values, average_precision(predictions, truths).values)
    assert seen == ["p", "t"] * 5


def test_autocast_and_grad_mode_change_nothing() -> None:
    predictions, truths = images(6, 1, distinct=True)
    big = [{**image, "masks": image["masks"].repeat_interleave(40, 1)} for image in predictions]
    true = [{**image, "masks": image["masks"].repeat_interleave(40, 1)} for image in truths]
    big = [{**image, "scores": image["scores"].requires_grad_()} for image in big]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        precision, overlap = average_precision(big, true), average_best_overlap(big, true)
    assert torch.equal(precision.values, average_precision(predictions, truths).values)
    assert torch.equal(overlap.values, average_best_overlap(predictions, truths).values)


FOUND = instances([[1, 0, 0], [1, 1, 0]], [1, 2], [0.5, 0.6])
TRUTH = instances([[1, 0, 1]], [1])


def without(image: Image, key: str) -> Image:
    return {k: v for k, v in image.items() if k != key}


@pytest.mark.parametrize(
    ("predictions", "truths", "error", "message"),
    [
        (FOUND, [TRUTH], TypeError, "predictions: expected the instances of each image, a list say, got dict"),
        ([FOUND], TRUTH, TypeError, "truths: expected the instances of each image, a list say, got dict"),
        (None, [TRUTH], TypeError, "predictions: expected the instances .*, got NoneType"),
        ([FOUND["masks"]], [TRUTH], TypeError, r'predictions\[0\]: expected a mapping with "masks" .*, got Tensor'),
        ([FOUND, FOUND], [TRUTH], ValueError, "truths: expected as many images as predictions has, got 1"),
        ([FOUND], [TRUTH, TRUTH], ValueError, "predictions: expected as many images as truths has, got 1"),
        ([without(FOUND, "masks")], [TRUTH], ValueError, r'predictions\[0\]: expected "masks", got \'labels\''),
        ([FOUND], [{}], ValueError, r'truths\[0\]: expected "masks", got nothing'),
        ([FOUND], [without(TRUTH, "labels")], ValueError, r'truths\[0\]: expected "labels"'),
        ([without(FOUND, "scores")], [TRUTH], ValueError, r'predictions\[0\]: expected "scores"'),
        ([FOUND | {"masks": [1]}], [TRUTH], TypeError, r'predictions\[0\]\["masks"\]: expected a tensor, got list'),
        ([FOUND | {"masks": FOUND["masks"].float()}], [TRUTH], TypeError, r"\[\"masks\"\]: expected a bool tensor"),
        (
            [FOUND | {"masks": FOUND["masks"][:, None]}],
            [TRUTH],
            ValueError,
            r"expected \[n, H, W\], got \[2, 1, 1, 3\]",
        ),
        ([FOUND | {"labels": torch.ones(2)}], [TRUTH], TypeError, r'\["labels"\]: expected an integer tensor'),
        ([FOUND | {"labels": torch.ones(3).long()}], [TRUTH], ValueError, r'\["labels"\]: expected \[2\] to go with'),
        ([FOUND | {"scores": torch.ones(3)}], [TRUTH], ValueError, r'\["scores"\]: expected \[2\] to go with'),
        ([FOUND | {"scores": [1, 1]}], [TRUTH], TypeError, r'\["scores"\]: expected a tensor, got list'),
        ([FOUND | {"scores": torch.tensor([1, math.nan])}], [TRUTH], ValueError, r'\["scores"\]: expected finite'),
        ([FOUND], [instances([[1, 0]], [1])], ValueError, r'truths\[0\]\["masks"\]: expected \[1, 1, 3\] to go with'),
        ([FOUND], [instances([[0, 0, 0]], [1])], ValueError, r'truths\[0\]\["masks"\]: expected at least one pixel'),
        ([FOUND], [TRUTH | {"labels": torch.ones(1)}], TypeError, r'truths\[0\]\["labels"\]: expected an integer'),
    ],
)
def test_errors(predictions: Any, truths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        average_precision(predictions, truths)
    if "scores" not in message:
        with pytest.raises(error, match=message):
            average_best_overlap(predictions, truths)


@pytest.mark.parametrize(
    ("threshold", "error"), [(0, ValueError), (1.01, ValueError), (math.nan, ValueError), ("0.5", TypeError)]
)
def test_errors_of_the_threshold(threshold: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="threshold: expected"):
        average_precision([FOUND], [TRUTH], threshold=threshold)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    predictions, truths = images(5, 7, distinct=False)
    there = [[{key: value.cuda() for key, value in image.items()} for image in side] for side in (predictions, truths)]
    assert torch.equal(average_precision(*there).values, average_precision(predictions, truths).values)
    assert torch.equal(average_best_overlap(*there).values, average_best_overlap(predictions, truths).values)
