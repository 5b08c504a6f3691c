"""Pointing game and mIoU at the best threshold, against a look at each pixel."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from segattr import metrics

MASKS = torch.zeros(2, 3, 4, 5, dtype=torch.bool)


# Pointing game


def pixels(mask: Tensor) -> set[tuple[int, int]]:
    return {(row, column) for row, column in np.argwhere(mask.numpy()).tolist()}


def spot(row: int, column: int) -> Tensor:
    """An object of one pixel."""
    mask = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    mask[..., row, column] = True
    return mask


@st.composite
def maps_and_masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 8), st.integers(1, 8)))
    maps = draw(hnp.arrays(np.float32, shape, elements=st.integers(-3, 3).map(float)))
    return torch.from_numpy(maps), torch.from_numpy(draw(hnp.arrays(bool, shape)))


@given(maps_and_masks(), st.sampled_from([0, 1, 1.2, 2, 2.5, 5, 15, 1e200]))
def test_pointing_game_looks_for_the_object_around_the_maximum(pair: tuple[Tensor, Tensor], tolerance: float) -> None:
    maps, masks = pair
    hits = metrics.pointing_game(maps, masks, tolerance=tolerance)
    assert hits.shape == maps.shape[:2]
    for n, c in np.ndindex(*hits.shape):
        point = np.unravel_index(maps[n, c].numpy().argmax(), maps.shape[2:])
        distances = [math.dist(point, x) for x in pixels(masks[n, c])]
        expected = float(any(d == 0 or d < tolerance for d in distances)) if distances else math.nan
        assert hits[n, c].item() == pytest.approx(expected, nan_ok=True)


def test_pointing_game_hits_closer_than_the_tolerance() -> None:
    maps = torch.zeros(1, 1, 40, 40)
    maps[0, 0, 20, 20] = 1
    for distance, hit in ((0, 1), (14, 1), (15, 0)):
        assert metrics.pointing_game(maps, spot(20, 20 + distance)) == hit
    # 9 down and 12 to the left are 15, 8 and 12 are less
    assert metrics.pointing_game(maps, spot(29, 8)) == 0
    assert metrics.pointing_game(maps, spot(28, 8)) == 1


def test_accuracies_of_classes_are_means_over_the_images_that_have_them() -> None:
    maps = torch.zeros(3, 3, 1, 4)
    maps[..., 3] = 1
    masks = torch.zeros(3, 3, 1, 4, dtype=torch.bool)
    masks[0, 0, 0, 3] = masks[1, 0, 0, 0] = masks[2, 1, 0, 3] = True
    accuracy = metrics.pointing_game(maps, masks, tolerance=0).nanmean(0)
    assert accuracy[:2].tolist() == [0.5, 1]
    assert accuracy[2].isnan()


MAPS = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("maps", "masks", "options", "error", "message"),
    [
        (MASKS, MASKS, {}, TypeError, "maps: expected a floating-point tensor, got torch.bool"),
        (MAPS[0], MASKS[0], {}, ValueError, r"maps: .* or \[B, C, D, H, W\] with a class and a pixel, got \[3, 4, 5\]"),
        (MAPS[:, :0], MASKS[:, :0], {}, ValueError, r"maps: expected .* got \[2, 0, 4, 5\]"),
        (MAPS[..., :0], MASKS[..., :0], {}, ValueError, r"maps: expected .* got \[2, 3, 4, 0\]"),
        (MAPS + math.nan, MASKS, {}, ValueError, "maps: expected finite values"),
        (MAPS, MASKS.long(), {}, TypeError, "masks: expected a bool tensor"),
        (MAPS, MASKS[:, :1], {}, ValueError, r"masks: expected \[2, 3, 4, 5\] .* got \[2, 1, 4, 5\]"),
        (MAPS, MASKS.to("meta"), {}, ValueError, "masks: expected device cpu"),
        (MAPS, MASKS, {"tolerance": -1}, ValueError, "tolerance: expected a"),
        (MAPS, MASKS, {"tolerance": math.inf}, ValueError, "tolerance: expected a"),
        (MAPS, MASKS, {"tolerance": "15"}, TypeError, "tolerance: expected a number, got str"),
    ],
)
def test_pointing_game_refuses_what_makes_no_sense(
    maps: Any, masks: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metrics.pointing_game(maps, masks, **options)


# mIoU at the best threshold

Batch = tuple[Tensor, Tensor, Tensor | None]


@st.composite
def batches(draw: st.DrawFn, classes: int, dtype: torch.dtype) -> Batch:
    """Few values, of which many are thresholds or equal each other; labels with some to ignore."""
    n, height, width = draw(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)))
    steps = draw(hnp.arrays(np.int64, (n, classes, height, width), elements=st.integers(-2, 12)))
    labels = draw(hnp.arrays(np.int64, (n, height, width), elements=st.sampled_from([*range(classes + 1), 255])))
    tags = draw(st.none() | hnp.arrays(bool, (n, classes)))
    maps = torch.tensor([step / 10 for step in range(-2, 13)], dtype=dtype)[torch.from_numpy(steps) + 2]
    return maps, torch.from_numpy(labels), tags if tags is None else torch.from_numpy(tags)


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[int, list[Batch]]:
    classes, dtype = draw(st.integers(1, 4)), draw(st.sampled_from([torch.float32, torch.float64]))
    return classes, draw(st.lists(batches(classes, dtype), max_size=3))


def confusions(classes: int, data: list[Batch], threshold: float) -> Tensor:
    """Pixels of each true (row) and predicted class: the background is a map of its own, and the highest one wins."""
    confusion = torch.zeros(classes + 1, classes + 1, dtype=torch.float64)
    for maps, labels, tags in data:
        for n in range(len(maps)):
            keys = [c for c in range(classes) if tags is None or tags[n, c]]
            scores = np.stack([np.full(labels.shape[1:], threshold, maps.numpy().dtype), *maps[n, keys].numpy()])
            predicted = np.array([0, *(c + 1 for c in keys)])[scores.argmax(0)]
            for true, found in zip(labels[n].flatten().tolist(), predicted.flatten().tolist(), strict=True):
                if true != 255:
                    confusion[true, found] += 1
    return confusion


def shares(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, precision and recall."""
    hits, predicted, true = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    either = predicted + true - hits
    return tuple(torch.where(either > 0, hits / w.clamp(min=1), math.nan) for w in (either, predicted, true))  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(data_sets(), st.sampled_from([(0.0, 0.1, 0.3, 0.7, 1.0), (0.5,), (-1.0, 0.2, 0.65, 2.0)]))
def test_a_sweep_is_the_argmax_with_each_background_score(
    data_set: tuple[int, list[Batch]], thresholds: tuple[float, ...]
) -> None:
    classes, data = data_set
    sweep = metrics.ThresholdSweep(classes, thresholds=thresholds)
    for maps, labels, tags in data:
        sweep.update(maps, labels, tags=tags)
    found = sweep.compute()
    at_each = [shares(confusions(classes, data, t)) for t in thresholds]
    curve = torch.stack([iou.nanmean() for iou, _, _ in at_each])
    torch.testing.assert_close(found.curve, curve.float(), equal_nan=True)
    best = int(curve.argmax())
    assert found.miou == pytest.approx(curve[best].item(), rel=1e-12, nan_ok=True)
    index = thresholds.index(found.threshold)
    assert index <= best
    assert curve[index].item() == pytest.approx(curve[best].item(), rel=1e-12, nan_ok=True)
    for value, expected in zip(found[2:5], at_each[index], strict=True):
        torch.testing.assert_close(value, expected.float(), equal_nan=True)


def test_best_threshold_by_hand() -> None:
    # Class 1 lies at .9 and .6, class 2 at .5; a background pixel at .55 wants a threshold between it and .6.
    maps = torch.tensor([[[[0.9, 0.6, 0.1, 0.55]], [[0.2, 0.1, 0.5, 0.0]]]])
    labels = torch.tensor([[[1, 1, 2, 0]]])
    best = metrics.best_threshold_miou(maps, labels, thresholds=(0.0, 0.55, 0.9))
    # 0: background nowhere, 2/3 and 1. .55: class 1 right, class 2 lost: 1/2, 1 and 0. .9: all are background: 1/4.
    torch.testing.assert_close(best.curve, torch.tensor([(0 + 2 / 3 + 1) / 3, (1 / 2 + 1 + 0) / 3, (1 / 4) / 3]))
    assert best.threshold == 0
    assert best.miou == pytest.approx(5 / 9)
    torch.testing.assert_close(best.precision, torch.tensor([0, 2 / 3, 1]))
    torch.testing.assert_close(best.recall, torch.tensor([0.0, 1, 1]))


def test_the_background_wins_ties_and_the_lowest_of_equal_thresholds_is_given() -> None:
    maps, labels = torch.tensor([[[[0.5, 0.3]]]]), torch.tensor([[[1, 0]]])
    best = metrics.best_threshold_miou(maps, labels)
    assert (best.threshold, best.miou) == (0.3, 1)  # as good as all up to .49
    assert best.curve[29] < 1
    assert best.curve[50] < 1
    assert len(best.curve) == 101


def test_maps_of_absent_classes_do_not_count() -> None:
    maps, labels = torch.tensor([[[[0.5, 0.1]], [[0.9, 0.8]]]]), torch.tensor([[[1, 0]]])
    assert metrics.best_threshold_miou(maps, labels).miou < 0.5
    tagged = metrics.best_threshold_miou(maps, labels, tags=torch.tensor([[1, 0]]))
    assert tagged.miou == 1
    assert tagged.iou[:2].tolist() == [1, 1]
    assert tagged.iou[2].isnan()
    without = metrics.best_threshold_miou(maps, labels, tags=torch.zeros(1, 2), thresholds=(-5.0,))
    assert without.iou[:2].tolist() == [0.5, 0]  # background everywhere, however low its score


def test_classes_that_are_missed_or_invented_count_as_0() -> None:
    maps, labels = torch.tensor([[[[0.9, 0.9]], [[0.0, 0.0]], [[0.0, 0.0]]]]), torch.tensor([[[2, 2]]])
    best = metrics.best_threshold_miou(maps, labels, thresholds=(0.5,))
    for share in (best.iou, best.precision, best.recall):
        assert share[1:3].tolist() == [0, 0]
        assert share[[0, 3]].isnan().all()
    assert best.miou == 0


def test_without_pixels_that_count_nothing_is_known() -> None:
    sweep = metrics.ThresholdSweep(2)
    for maps in (torch.zeros(0, 2, 3, 3), torch.rand(1, 2, 3, 3)):
        sweep.update(maps, torch.full((len(maps), 3, 3), 255))
        best = sweep.compute()
        assert math.isnan(best.miou)
        assert best.curve.isnan().all()
        assert best.iou.isnan().all()


@pytest.mark.parametrize("maps", [torch.zeros(1, 2, 3, 3), -torch.ones(1, 2, 3, 3)], ids=["zero", "negative"])
def test_maps_that_show_nothing_are_background(maps: Tensor) -> None:
    labels = torch.tensor([[[0, 1, 2]] * 3])
    best = metrics.best_threshold_miou(maps, labels)
    torch.testing.assert_close(best.iou, torch.tensor([1 / 3, 0, 0]))


def test_counts_of_processes_add_up() -> None:
    maps, labels, tags = torch.rand(6, 3, 7, 5), torch.randint(0, 4, (6, 7, 5)), torch.randint(0, 2, (6, 3))
    parts = [metrics.ThresholdSweep(3) for _ in range(3)]
    for n, part in enumerate(parts):
        part.update(maps[2 * n : 2 * n + 2], labels[2 * n : 2 * n + 2], tags=tags[2 * n : 2 * n + 2])
    parts[0].counts += parts[1].counts + parts[2].counts
    together = metrics.best_threshold_miou(maps, labels, tags=tags)
    for value, expected in zip(parts[0].compute(), together, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def test_best_threshold_agrees_with_pooled_region_similarity() -> None:
    maps, labels = torch.rand(4, 3, 12, 9), torch.randint(0, 4, (4, 12, 9))
    labels[torch.rand(4, 12, 9) < 0.2] = 255
    best = metrics.best_threshold_miou(maps, labels)
    predicted = F.pad(maps, (0, 0, 0, 0, 1, 0), value=best.threshold).argmax(1)
    classes = torch.arange(4).view(4, 1, 1)
    masks = predicted[:, None] == classes, labels[:, None] == classes
    torch.testing.assert_close(
        best.iou, metrics.region_similarity(*masks, valid=labels != 255, pooled=True), rtol=0, atol=0
    )


def test_maps_and_labels_stay_as_they_are_and_no_graph_is_kept() -> None:
    maps, labels, tags = torch.rand(2, 3, 4, 5, requires_grad=True), torch.randint(0, 4, (2, 4, 5)), torch.eye(3)[:2]
    copies = maps.detach().clone(), labels.clone(), tags.clone()
    best = metrics.best_threshold_miou(maps, labels, tags=tags)
    assert not best.iou.requires_grad
    for value, copy in zip((maps, labels, tags), copies, strict=True):
        assert torch.equal(value, copy)
    with torch.autocast("cpu", torch.bfloat16):
        assert metrics.best_threshold_miou(maps, labels, tags=tags).miou == best.miou


def test_labels_of_any_integer_type_and_another_label_to_ignore() -> None:
    maps, labels = torch.rand(2, 3, 8, 9), torch.randint(0, 4, (2, 8, 9))
    expected = metrics.best_threshold_miou(maps, labels)
    for dtype in (torch.uint8, torch.int32):
        assert metrics.best_threshold_miou(maps, labels.to(dtype)).miou == expected.miou
    ignored = labels.masked_fill(labels == 0, 255)
    found = metrics.best_threshold_miou(maps, labels, ignore_index=0)
    torch.testing.assert_close(found.curve, metrics.best_threshold_miou(maps, ignored).curve)
    negative = ignored.masked_fill(ignored == 255, -1)
    torch.testing.assert_close(found.curve, metrics.best_threshold_miou(maps, negative, ignore_index=-1).curve)


def test_thresholds_may_be_an_array_or_a_tensor() -> None:
    maps, labels = torch.rand(2, 3, 8, 9), torch.randint(0, 4, (2, 8, 9))
    expected = metrics.best_threshold_miou(maps, labels, thresholds=(0.25, 0.5, 0.75))
    values = torch.tensor([0.25, 0.5, 0.75])
    for thresholds in (values, values.numpy(), values.tolist()):
        assert metrics.best_threshold_miou(maps, labels, thresholds=thresholds).miou == expected.miou
    sweep = metrics.ThresholdSweep(3, thresholds=values)
    values += 7  # the caller's own
    assert sweep.thresholds.max() == 0.75


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives() -> None:
    maps, labels, tags = torch.rand(4, 3, 60, 80), torch.randint(0, 4, (4, 60, 80)), torch.randint(0, 2, (4, 3))
    on_gpu, on_cpu = metrics.ThresholdSweep(3, device="cuda"), metrics.ThresholdSweep(3)
    for sweep in (on_gpu, on_cpu):
        sweep.update(maps.cuda(), labels.cuda(), tags=tags.cuda())
    expected = metrics.best_threshold_miou(maps, labels, tags=tags)
    for sweep in (on_gpu, on_cpu):
        torch.testing.assert_close(sweep.compute().curve.cpu(), expected.curve)
    masks = torch.rand(4, 3, 60, 80) < 0.1
    hits = metrics.pointing_game(maps.cuda(), masks.cuda(), tolerance=3).cpu()
    torch.testing.assert_close(hits, metrics.pointing_game(maps, masks, tolerance=3), equal_nan=True)


LABELS = torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("maps", "labels", "options", "error", "message"),
    [
        (MASKS, LABELS, {}, TypeError, "maps: expected a floating-point tensor, got torch.bool"),
        (MAPS[0], LABELS, {}, ValueError, r"maps: .* or \[B, C, D, H, W\] with a class and a pixel, got \[3, 4, 5\]"),
        (MAPS[:, :0], LABELS, {}, ValueError, r"maps: expected .* got \[2, 0, 4, 5\]"),
        (MAPS - math.inf, LABELS, {}, ValueError, "maps: expected finite values"),
        (MAPS, LABELS.float(), {}, TypeError, "labels: expected an integer tensor, got torch.float32"),
        (MAPS, LABELS[:1], {}, ValueError, r"labels: expected \[2, 4, 5\] .* got \[1, 4, 5\]"),
        (MAPS, LABELS.to("meta"), {}, ValueError, "labels: expected device cpu"),
        (MAPS, LABELS + 4, {}, ValueError, "labels: expected classes 0 to 3 or 255 to ignore, got 4"),
        (MAPS, LABELS - 1, {}, ValueError, "labels: expected classes 0 to 3 or 255 to ignore, got -1"),
        (MAPS, LABELS, {"tags": torch.ones(2, 4)}, ValueError, r"tags: expected \[2, 3\] .* got \[2, 4\]"),
        (MAPS, LABELS, {"tags": torch.full((2, 3), 0.5)}, ValueError, "tags: expected 0 or 1, got 0.5"),
        (MAPS, LABELS, {"tags": [[1, 0, 0]] * 2}, TypeError, "tags: expected a tensor, got list"),
        (MAPS, LABELS, {"thresholds": ()}, ValueError, r"thresholds: expected one or more .* got \[\]"),
        (MAPS, LABELS, {"thresholds": 0.5}, ValueError, r"thresholds: expected one or more .* got 0.5"),
        (MAPS, LABELS, {"thresholds": (0.5, 0.2)}, ValueError, r"thresholds: expected .* increase, got \[0.5, 0.2\]"),
        (MAPS, LABELS, {"thresholds": (0.5, 0.5)}, ValueError, r"thresholds: expected .* increase"),
        (MAPS, LABELS, {"thresholds": (0.5, math.inf)}, ValueError, r"thresholds: expected .* increase"),
        (MAPS, LABELS, {"thresholds": "all"}, TypeError, "thresholds: expected numbers, got str"),
        (MAPS, LABELS, {"thresholds": [None]}, TypeError, "thresholds: expected numbers, got list"),
        (MAPS, LABELS, {"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType"),
    ],
)
def test_best_threshold_refuses_what_makes_no_sense(
    maps: Any, labels: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metrics.best_threshold_miou(maps, labels, **options)


def test_a_sweep_refuses_another_number_of_classes_and_stays_as_it_is() -> None:
    for classes, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="classes: expected a"):
            metrics.ThresholdSweep(classes)  # type: ignore[arg-type]
    sweep = metrics.ThresholdSweep(2)
    with pytest.raises(ValueError, match=r"maps: expected \[B, 2, H, W\], got \[2, 3, 4, 5\]"):
        sweep.update(MAPS, LABELS)
    assert not sweep.counts.any()


def test_counts_that_were_begun_in_inference_mode() -> None:
    maps, labels = torch.tensor([[[[0.9, 0.1]]]]), torch.tensor([[[1, 0]]])
    with torch.inference_mode():
        sweep = metrics.ThresholdSweep(1)
        sweep.update(maps, labels)
    sweep.update(maps, labels)
    assert sweep.compute().miou == 1


def test_a_device_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="device: expected one that torch can use, got -1"):
        metrics.ThresholdSweep(1, device=-1)  # type: ignore[arg-type]
