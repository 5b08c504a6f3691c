"""Instance pseudo-masks and semantic labels, against a decision for each pixel."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segattr.refine import BBAM_CRF, IRN_CRF, dense_crf, grow_seeds
from segattr.refine.instance_masks import instance_masks, semantic_labels


def held(box: list[float], height: int, width: int) -> list[tuple[int, int]]:
    """Pixels whose centre a box holds."""
    x1, y1, x2, y2 = box
    return [(y, x) for y in range(height) for x in range(width) if x1 <= x + 0.5 < x2 and y1 <= y + 0.5 < y2]


def by_area(bbam: Tensor, box: list[float], foreground: float, background: float) -> Tensor:
    labels = torch.zeros(bbam.shape, dtype=torch.int64)
    places = held(box, *bbam.shape)
    values = sorted((bbam[place].item() for place in places), reverse=True)
    low, high = (values[min(int(len(values) * share), len(values) - 1)] for share in (foreground, background))
    for place in places:
        value = bbam[place].item()
        if max(values) == 0:
            labels[place] = 255
        elif value > 0 and value >= low:
            labels[place] = 1
        else:
            labels[place] = 0 if value == 0 or value < high else 255
    return labels


def by_value(bbam: Tensor, box: list[float], foreground: float, background: float) -> Tensor:
    labels = torch.zeros(bbam.shape, dtype=torch.int64)
    places = held(box, *bbam.shape)
    for place in places:
        value = bbam[place].item()
        labels[place] = 1 if value > foreground else 0 if value < background else 255
        if not any(bbam[other] for other in places):
            labels[place] = 255
    return labels


@given(
    count=st.integers(0, 3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rule=st.sampled_from(["area", "value"]),
    thresholds=st.sampled_from([(0.25, 0.75), (0.5, 0.5), (0.0, 1.0), (0.125, 0.625)]),
    seed=st.integers(0, 999),
)
def test_equals_a_decision_for_each_pixel(
    count: int, size: tuple[int, int], rule: str, thresholds: tuple[float, float], seed: int
) -> None:
    torch.manual_seed(seed)
    height, width = size
    bbams = torch.randint(0, 9, (count, height, width)) / 8  # many are equal, or lie on a threshold
    corners = torch.rand(count, 2) * torch.tensor([width - 0.5, height - 0.5])
    boxes = torch.cat([corners - torch.randint(0, 2, (count, 2)), corners + 1 + torch.rand(count, 2) * 3], 1)
    foreground, background = thresholds if rule == "area" else thresholds[::-1]
    labels = instance_masks(bbams, boxes, rule=rule, foreground=foreground, background=background)
    assert labels.dtype == torch.int64
    assert labels.shape == bbams.shape
    expected = by_area if rule == "area" else by_value
    for bbam, box, label in zip(bbams, boxes.double().tolist(), labels, strict=True):
        assert torch.equal(label, expected(bbam, box, foreground, background))


def test_shares_of_a_map_without_equal_values_are_those_of_the_box() -> None:
    bbams = (1 + torch.randperm(400)).view(1, 20, 20) / 401
    masks = instance_masks(bbams, torch.tensor([[5, 4, 15, 14]]))
    assert not masks[0, :4].any()
    assert not masks[0, :, 15:].any()
    box = masks[0, 4:14, 5:15]
    assert [(box == label).sum().item() for label in (1, 255, 0)] == [16, 65, 19]  # the rank itself counts
    inside = bbams[0, 4:14, 5:15]
    assert inside[box == 1].min() > inside[box == 255].max() > inside[box == 255].min() > inside[box == 0].max()


def test_area_rule_does_not_care_for_the_scale_of_the_map_and_the_value_rule_does() -> None:
    bbams, boxes = torch.rand(2, 9, 9, dtype=torch.float64), torch.tensor([[1, 1, 8, 9], [0, 0, 9, 9]])
    image = torch.rand(3, 9, 9)
    for guide in (None, image):
        strong, weak = (instance_masks(maps, boxes, guide) for maps in (bbams, bbams / 4))
        assert torch.equal(strong, weak)
        assert (weak == 1).flatten(1).any(1).all()
        assert not (instance_masks(bbams / 4, boxes, guide, rule="value") == 1).any()


def two_squares() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A picture of two squares; maps that know a corner of each, and reach beyond it."""
    truth = torch.zeros(2, 24, 24, dtype=torch.bool)
    truth[0, 3:11, 3:11] = truth[1, 12:21, 12:22] = True
    image = torch.full((3, 24, 24), 0.2)
    image[0, truth[0]] = image[1, truth[1]] = 0.9
    image += 0.01 * torch.rand_like(image)
    bbams = torch.zeros(2, 24, 24)
    bbams[0, 4:8, 4:8] = 0.9
    bbams[1, 13:18, 13:18] = 0.5
    bbams[1, 11:13, 14:18] = 0.1
    boxes = torch.tensor([[2.0, 2.0, 12.0, 12.0], [11.0, 11.0, 23.0, 22.0]])
    return bbams, boxes, image, truth


def test_crf_completes_the_object_and_keeps_to_the_box() -> None:
    bbams, boxes, image, truth = two_squares()
    masks = instance_masks(bbams, boxes, image)
    overlap = ((masks == 1) & truth).sum((1, 2)) / ((masks == 1) | truth).sum((1, 2))
    assert overlap.min() > 0.95
    alone = instance_masks(bbams, boxes)
    assert ((alone == 1) & truth).sum() < 0.6 * truth.sum()
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 0
        assert not mask.any()


@pytest.mark.parametrize("rule", ["area", "value"])
def test_all_objects_at_once_equal_one_at_a_time(rule: str) -> None:
    bbams, boxes, image, _ = two_squares()
    together = instance_masks(bbams.double(), boxes, image.double(), rule=rule)
    for i in range(2):
        assert torch.equal(instance_masks(bbams[[i]].double(), boxes[[i]], image.double(), rule=rule)[0], together[i])


def test_value_rule_thresholds_the_output_of_the_crf() -> None:
    bbams, boxes, image, _ = two_squares()
    boxes[:] = torch.tensor([0, 0, 24, 24])
    for settings in (BBAM_CRF, IRN_CRF):
        refined = dense_crf(torch.stack([1 - bbams, bbams], 1), image.expand(2, 3, 24, 24), **settings)[:, 1]
        expected = torch.full_like(bbams, 255, dtype=torch.int64)
        expected[refined > 0.8], expected[refined < 0.2] = 1, 0
        assert torch.equal(instance_masks(bbams, boxes, image, rule="value", crf=settings), expected)


def test_area_rule_refines_each_level_alone() -> None:
    bbams, boxes, image, _ = two_squares()
    bbams = (bbams + 0.05 * torch.rand_like(bbams)).double()[:1]
    inside = torch.zeros(24, 24, dtype=torch.bool)
    inside[2:12, 2:12] = True
    sigma = 2 * (16 + 48 * math.sqrt(100 / 24**2)) * math.sqrt(24 * 24 / (375 * 500))
    sure = []
    for rank in (15, 80):
        level = (bbams[0] * inside / bbams[0][inside].sort(descending=True).values[rank]).clamp(max=1)
        smooth = torch.zeros_like(level)
        for y in range(24):
            for x in range(24):
                rows, columns = torch.arange(24.0).double() - y, torch.arange(24.0).double() - x
                kernel = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * sigma**2))
                smooth[y, x] = (kernel * level).sum() / kernel.sum() * inside[y, x]
        p = smooth / smooth.max()
        refined = dense_crf(torch.stack([1 - p, p])[None], image[None].double(), **BBAM_CRF)[0, 1]
        sure.append((refined > 0.9) & inside)
    assert sure[1].sum() >= 20  # a fifth of the box
    expected = torch.where(sure[0], 1, torch.where(sure[1] | ~inside, 255, 0)).where(inside, 0)
    given = instance_masks(bbams, boxes[:1], image.double(), smoothing=sigma)
    assert torch.equal(given[0], expected)
    assert torch.equal(instance_masks(bbams, boxes[:1], image.double()), given)


def test_object_that_the_crf_loses_is_not_called_background() -> None:
    bbams, boxes, image, _ = two_squares()
    bbams[0] = 0
    bbams[0, 5, 5] = 1
    masks = instance_masks(bbams, boxes, image, smoothing=0)
    box = masks[0, 2:12, 2:12]
    assert (box == 1).sum() < 20
    assert not (box == 0).any()
    assert (masks[0] == 0).sum() == 24 * 24 - 100


@pytest.mark.parametrize("smoothing", [0, 1e-12, 1e12, 1e300])
def test_extreme_smoothing_stays_defined(smoothing: float) -> None:
    bbams, boxes, image, _ = two_squares()
    masks = instance_masks(bbams, boxes, image, smoothing=smoothing)
    assert (masks == 1).flatten(1).any(1).all()
    assert set(masks.unique().tolist()) <= {0, 1, 255}


@pytest.mark.parametrize("rule", ["area", "value"])
@pytest.mark.parametrize("guide", [None, torch.rand(3, 6, 6)])
def test_map_of_zeros_says_nothing(rule: str, guide: Tensor | None) -> None:
    bbams = torch.zeros(2, 6, 6)
    bbams[0, 0, 0] = 1  # outside its box
    masks = instance_masks(bbams, torch.tensor([[1, 1, 4, 5], [0, 0, 6, 6]]), guide, rule=rule)
    assert (masks[0, 1:5, 1:4] == 255).all()
    assert (masks[0] == 0).sum() == 36 - 12
    assert (masks[1] == 255).all()


@pytest.mark.parametrize("guide", [None, torch.rand(1, 4, 5)])
def test_box_with_a_part_outside_counts_where_it_is_inside(guide: Tensor | None) -> None:
    bbams = torch.rand(1, 4, 5)
    outside, inside = torch.tensor([[-7.0, 2.0, 3.0, 99.0]]), torch.tensor([[0, 2, 3, 4]])
    assert torch.equal(instance_masks(bbams, outside, guide), instance_masks(bbams, inside, guide))


@pytest.mark.parametrize("guide", [None, torch.rand(3, 4, 5)])
@pytest.mark.parametrize("rule", ["area", "value"])
def test_box_between_pixel_centres_gives_an_empty_mask(guide: Tensor | None, rule: str) -> None:
    assert not instance_masks(torch.rand(1, 4, 5), torch.tensor([[1.6, 1.0, 2.4, 3.0]]), guide, rule=rule).any()


@pytest.mark.parametrize("guide", [None, torch.rand(3, 4, 5)])
@pytest.mark.parametrize("rule", ["area", "value"])
def test_no_objects(guide: Tensor | None, rule: str) -> None:
    masks = instance_masks(torch.zeros(0, 4, 5), torch.zeros(0, 4), guide, rule=rule)
    assert masks.shape == (0, 4, 5)
    assert semantic_labels(masks, torch.zeros(0, dtype=torch.int64)).tolist() == [[0] * 5] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saturated_map_of_any_precision_is_foreground_where_it_is_full(dtype: torch.dtype) -> None:
    bbams = torch.zeros(1, 4, 10, dtype=dtype)
    bbams[0, :, :4] = 1  # more than 15% of the box share the largest value
    assert torch.equal(instance_masks(bbams, torch.tensor([[0, 0, 10, 4]])), bbams.long())


def test_arguments_are_left_alone_and_masks_have_no_gradient() -> None:
    bbams, boxes, image, _ = two_squares()
    bbams.requires_grad_()
    before = [t.detach().clone() for t in (bbams, boxes, image)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = instance_masks(bbams, boxes, image)
    assert not masks.requires_grad
    assert torch.equal(masks, instance_masks(bbams, boxes, image))
    assert all(torch.equal(a, b) for a, b in zip(before, (bbams, boxes, image), strict=True))


def test_masks_are_seeds_for_growing() -> None:
    bbams, boxes, _, truth = two_squares()
    masks = instance_masks(bbams, boxes)
    p = truth.float().unsqueeze(1) * 0.98 + 0.01
    grown = grow_seeds(masks, torch.cat([1 - p, p], 1), foreground=0.9, background=0.9)
    assert (grown != 255).sum() > (masks != 255).sum()


def test_another_ignore_index() -> None:
    bbams, boxes = torch.rand(2, 5, 5), torch.tensor([[0, 0, 5, 5], [1, 1, 4, 4]])
    usual, other = (instance_masks(bbams, boxes, ignore_index=i) for i in (255, -100))
    assert (usual == 255).any()
    assert torch.equal(usual.masked_fill(usual == 255, -100), other)
    labels = torch.tensor([255, 4])
    semantic = semantic_labels(other, labels, ignore_index=-100)
    assert set(semantic.unique().tolist()) <= {0, 4, 255, -100}
    assert (semantic == 255).any()


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from([torch.int64, torch.uint8, torch.bool]),
    seed=st.integers(0, 999),
)
def test_semantic_labels_equal_a_decision_for_each_pixel(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    masks = torch.tensor([0, 0, 1, 255])[torch.randint(0, 4, shape)].to(dtype)
    labels = torch.randint(1, 4, shape[:1])
    semantic = semantic_labels(masks, labels)
    assert semantic.dtype == torch.int64
    assert semantic.shape == shape[1:]
    for y in range(shape[1]):
        for x in range(shape[2]):
            marks = masks[:, y, x].int().tolist()
            claims = {c for c, mark in zip(labels.tolist(), marks, strict=True) if mark == 1}
            expected = 255 if len(claims) > 1 else claims.pop() if claims else 255 if 255 in marks else 0
            assert semantic[y, x] == expected


def test_pixels_of_two_objects_of_one_class_are_of_that_class() -> None:
    masks = torch.ones(3, 1, 2, dtype=torch.bool)
    masks[2, 0, 0] = False
    assert semantic_labels(masks, torch.tensor([5, 5, 6])).tolist() == [[5, 255]]


@pytest.mark.parametrize(("dtype", "value", "ignore"), [(torch.uint8, 255, -1), (torch.int8, -1, 255)])
def test_ignored_label_that_narrow_integers_do_not_hold(dtype: torch.dtype, value: int, ignore: int) -> None:
    """Of 8 bits, -1 and 255 would be equal."""
    masks = torch.tensor([[[0, 1, value]]]).to(dtype)
    with pytest.raises(ValueError, match=f"masks: expected 0, 1 or {ignore} to ignore, got {value} "):
        semantic_labels(masks, torch.tensor([3]), ignore_index=ignore)
    assert semantic_labels(masks, torch.tensor([3]), ignore_index=value).tolist() == [[0, 3, value]]


def test_order_of_objects_does_not_count() -> None:
    masks, labels = torch.tensor([0, 1, 255])[torch.randint(0, 3, (5, 8, 8))], torch.tensor([1, 2, 2, 3, 9])
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(semantic_labels(masks, labels), semantic_labels(masks[order], labels[order]))


MAPS, BOXES, IMAGE = torch.rand(2, 4, 5), torch.tensor([[0.0, 0, 3, 3], [1, 1, 5, 4]]), torch.rand(3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, BOXES), TypeError, "bbams: expected a tensor"),
        ((MAPS.long(), BOXES), TypeError, "bbams: expected a floating-point tensor"),
        ((MAPS[0], BOXES), ValueError, r"bbams: expected \[n, H, W\] with at least one pixel, got \[4, 5\]"),
        ((MAPS[:, :0], BOXES), ValueError, "bbams: .* at least one pixel"),
        ((MAPS + 1, BOXES), ValueError, "bbams: expected values from 0 to 1"),
        ((MAPS * math.nan, BOXES), ValueError, "bbams: expected values from 0 to 1, got values outside or NaN"),
        ((MAPS, BOXES.tolist()), TypeError, "boxes: expected a tensor, got list"),
        ((MAPS, BOXES[:1]), ValueError, r"boxes: expected \[2, 4\] to go with bbams \[2, 4, 5\], got \[1, 4\]"),
        ((MAPS, BOXES.to("meta")), ValueError, "boxes: expected device cpu"),
        ((MAPS, BOXES / 0), ValueError, "boxes: expected finite values"),
        (
            (MAPS, BOXES[:, [2, 1, 0, 3]]),
            ValueError,
            r"boxes: expected x1 < x2 and y1 < y2, got \[3.0, 0.0, 0.0, 3.0\]",
        ),
        ((MAPS, BOXES * torch.tensor([1, 1, 1, 0])), ValueError, "boxes: expected x1 < x2 and y1 < y2"),
        ((MAPS, BOXES + 4), ValueError, r"boxes: expected a part of the image of 4 x 5, got \[4.0, 4.0, 7.0, 7.0\]"),
        ((MAPS, BOXES - 5), ValueError, "boxes: expected a part of the image"),
        ((MAPS, BOXES, [IMAGE]), TypeError, "image: expected a tensor, got list"),
        ((MAPS, BOXES, torch.tensor([1, 2])), TypeError, "image: expected a floating-point tensor, got torch.int64"),
        ((MAPS, BOXES, IMAGE[None]), ValueError, r"image: expected \[C, H, W\] with C >= 1, got \[1, 3, 4, 5\]"),
        ((MAPS, BOXES, IMAGE[:0]), ValueError, r"image: expected \[C, H, W\] with C >= 1"),
        ((MAPS, BOXES, IMAGE.mT), ValueError, r"image: expected \[3, 4, 5\] to go with bbams"),
        ((MAPS, BOXES, IMAGE / 0), ValueError, "image: expected finite values"),
    ],
)
def test_errors_of_tensors(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        instance_masks(*arguments)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rule": "top"}, ValueError, "rule: expected one of 'area', 'value', got 'top'"),
        ({"foreground": 1.1}, ValueError, "foreground: expected a finite number of at least 0 and of at most 1"),
        ({"foreground": "0.5"}, TypeError, "foreground: expected a number"),
        ({"foreground": 0.9}, ValueError, "background: expected at least foreground, 0.9, got 0.8"),
        ({"background": 0.1}, ValueError, "background: expected at least foreground, 0.15, got 0.1"),
        ({"rule": "value", "background": 0.9}, ValueError, "background: expected at most foreground, 0.8, got 0.9"),
        ({"rule": "value", "foreground": 0.1}, ValueError, "background: expected at most foreground, 0.1, got 0.2"),
        ({"smoothing": -1}, ValueError, "smoothing: expected a finite number of at least 0"),
        ({"smoothing": torch.ones(2)}, TypeError, "smoothing: expected a number"),
        ({"crf": {**BBAM_CRF, "iterations": -1}}, ValueError, "iterations: expected"),
        ({"ignore_index": 1}, ValueError, "ignore_index: expected neither 0 nor 1, got 1"),
        ({"ignore_index": 0}, ValueError, "ignore_index: expected neither 0 nor 1, got 0"),
        ({"ignore_index": 2.0}, TypeError, "ignore_index: expected an int"),
    ],
)
def test_errors_of_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        instance_masks(MAPS, BOXES, IMAGE, **settings)


def test_boxes_of_another_format_are_refused() -> None:
    class Boxes(Tensor):
        """As those of torchvision."""

        format = SimpleNamespace(name="XYWH")

    with pytest.raises(
        ValueError, match="boxes: expected corners x1, y1, x2, y2, the format XYXY, got the format XYWH"
    ):
        instance_masks(MAPS, BOXES.as_subclass(Boxes), IMAGE)
    Boxes.format.name = "XYXY"
    assert instance_masks(MAPS, BOXES.as_subclass(Boxes), IMAGE).equal(instance_masks(MAPS, BOXES, IMAGE))


MASKS, LABELS = torch.ones(2, 4, 5, dtype=torch.int64), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, LABELS), TypeError, "masks: expected a tensor"),
        ((MASKS.float(), LABELS), TypeError, "masks: expected an integer tensor"),
        ((MASKS[0], LABELS), ValueError, r"masks: expected \[n, H, W\], got \[4, 5\]"),
        ((MASKS * 2, LABELS), ValueError, "masks: expected 0, 1 or 255 to ignore"),
        ((MASKS, LABELS.float()), TypeError, "labels: expected an integer tensor"),
        ((MASKS, LABELS[:1]), ValueError, r"labels: expected \[2\] to go with masks"),
        ((MASKS, LABELS - 1), ValueError, "labels: expected at least 1, got 0"),
        ((MASKS, LABELS + 253), ValueError, "labels: expected classes, got 255, which is ignored"),
        ((MASKS, LABELS, 1), ValueError, "ignore_index: expected neither 0 nor 1"),
        ((MASKS, LABELS, None), TypeError, "ignore_index: expected an int"),
    ],
)
def test_errors_of_semantic_labels(arguments: Any, error: type[Exception], message: str) -> None:
    tensors, ignore = arguments[:2], arguments[2:]
    with pytest.raises(error, match=message):
        semantic_labels(*tensors, **({"ignore_index": ignore[0]} if ignore else {}))


@pytest.mark.gpu
def test_cuda_equals_cpu_and_stays_there() -> None:
    bbams, boxes, image, _ = two_squares()
    for guide in (None, image):
        there = instance_masks(bbams.cuda(), boxes.cuda(), None if guide is None else guide.cuda())
        assert there.is_cuda
        here = instance_masks(bbams, boxes, guide)
        assert (there.cpu() == here).float().mean() > 0.99  # of the CRF, probabilities close to a threshold may differ
        labels = torch.tensor([3, 4])
        assert torch.equal(semantic_labels(there, labels.cuda()).cpu(), semantic_labels(there.cpu(), labels))


@pytest.mark.parametrize("crf", [{"weight": -1.0}, {"unknown": 1}])
def test_errors_of_the_crf_name_its_settings(crf: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^crf: "):
        instance_masks(MAPS, BOXES, IMAGE, crf=crf)
