"""Measures of masks, against counts made pixel by pixel."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from sklearn.metrics import jaccard_score
from torch import Tensor

from segattr import metrics

Pixels = set[tuple[int, int]]

tolerances = st.sampled_from([0, 0.05, 0.3, 1, 2, 2.5, 3, 100])


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
    first, second = (draw(hnp.arrays(bool, shape)) for _ in range(2))
    return torch.from_numpy(first), torch.from_numpy(second)


def pixels(mask: Tensor) -> Pixels:
    return {(row, column) for row, column in np.argwhere(mask.numpy()).tolist()}


def contour_pixels(mask: Tensor) -> Pixels:
    height, width = mask.shape
    inside, found = pixels(mask), set()
    for row, column in itertools.product(range(height), range(width)):
        for other in ((row, column + 1), (row + 1, column), (row + 1, column + 1)):
            in_image = other[0] < height and other[1] < width
            if in_image and ((row, column) in inside) != (other in inside):
                found.add((row, column))
    return found


def radius_of(tolerance: float, mask: Tensor) -> float:
    return math.ceil(tolerance * math.dist((0, 0), mask.shape)) if tolerance < 1 else tolerance


def f_measure(precision: float, recall: float) -> float:
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def f_by_pairs(prediction: Tensor, truth: Tensor, tolerance: float) -> float:
    found, wanted = contour_pixels(prediction), contour_pixels(truth)
    if not found or not wanted:
        return float(not found and not wanted) if pixels(prediction | truth) else math.nan
    radius = radius_of(tolerance, prediction)
    precision = sum(any(math.dist(a, b) <= radius for b in wanted) for a in found) / len(found)
    recall = sum(any(math.dist(a, b) <= radius for b in found) for a in wanted) / len(wanted)
    return f_measure(precision, recall)


def f_by_matching(prediction: Tensor, truth: Tensor, tolerance: float) -> float:
    """Each contour pixel is matched with at most one of the other contour, as many as possible."""
    found, wanted = sorted(contour_pixels(prediction)), sorted(contour_pixels(truth))
    if not found or not wanted:
        return float(not found and not wanted) if pixels(prediction | truth) else math.nan
    radius = radius_of(tolerance, prediction)
    near = csr_array([[math.dist(a, b) <= radius for b in wanted] for a in found])
    matched = int((maximum_bipartite_matching(near) >= 0).sum())
    return f_measure(matched / len(found), matched / len(wanted))


def random_masks(*shape: int) -> Tensor:
    """Blocks of 3 x 3 pixels: regions with contours of some length."""
    coarse = torch.rand(*shape[:-2], -(-shape[-2] // 3), -(-shape[-1] // 3)) < 0.4
    return coarse.repeat_interleave(3, -2).repeat_interleave(3, -1)[..., : shape[-2], : shape[-1]]


def rectangle(top: int, left: int, height: int, width: int, *, canvas: tuple[int, int] = (24, 24)) -> Tensor:
    mask = torch.zeros(canvas, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


@settings(max_examples=50)
@given(mask_pairs())
def test_region_similarity_is_intersection_over_union(pair: tuple[Tensor, Tensor]) -> None:
    first, second = map(pixels, pair)
    expected = len(first & second) / len(first | second) if first | second else math.nan
    assert metrics.region_similarity(*pair).item() == pytest.approx(expected, rel=1e-6, nan_ok=True)


@given(mask_pairs(), tolerances)
def test_contour_f_counts_contour_pixels_near_the_other_contour(pair: tuple[Tensor, Tensor], tolerance: float) -> None:
    # One pixel more or less changes F by far more than a millionth: contours have at most 80 pixels here.
    expected = f_by_pairs(*pair, tolerance)
    assert metrics.contour_f(*pair, tolerance=tolerance).item() == pytest.approx(expected, rel=1e-6, nan_ok=True)


@settings(max_examples=50)
@given(mask_pairs(), tolerances)
def test_contour_f_bounds_one_to_one_matching_from_above(pair: tuple[Tensor, Tensor], tolerance: float) -> None:
    assume((pair[0] | pair[1]).any())
    assert metrics.contour_f(*pair, tolerance=tolerance).item() >= f_by_matching(*pair, tolerance) - 1e-6


@settings(max_examples=50)
@given(mask_pairs())
def test_contour_f_is_one_to_one_matching_at_tolerance_0(pair: tuple[Tensor, Tensor]) -> None:
    expected = f_by_matching(*pair, 0)
    assert metrics.contour_f(*pair, tolerance=0).item() == pytest.approx(expected, rel=1e-6, nan_ok=True)


@settings(max_examples=50)
@given(mask_pairs(), st.tuples(st.integers(-3, 3), st.integers(-3, 3)))
def test_a_shape_moved_within_the_tolerance_matches_fully_and_one_to_one(
    pair: tuple[Tensor, Tensor], shift: tuple[int, int]
) -> None:
    assume(pair[0].any())
    shape = torch.nn.functional.pad(pair[0], (4, 4, 4, 4))
    moved = shape.roll(shift, (0, 1))
    tolerance = max(1.0, math.sqrt(shift[0] ** 2 + shift[1] ** 2))
    assert metrics.contour_f(moved, shape, tolerance=tolerance) == 1
    assert f_by_matching(moved, shape, tolerance) == 1


def test_contour_f_exceeds_one_to_one_matching_where_pixels_share_a_partner() -> None:
    # 10 contour pixels around 3 x 2 pixels, 4 around one of these; each is near one of the other contour.
    prediction, truth = rectangle(5, 5, 3, 2), rectangle(6, 5, 1, 1)
    assert metrics.contour_f(prediction, truth, tolerance=2) == 1
    assert f_by_matching(prediction, truth, 2) == pytest.approx(f_measure(4 / 10, 1))


def test_the_contour_lies_right_above_and_left_of_an_edge_and_not_on_the_border() -> None:
    # The lower right pixel has contour pixels above, to the left and above left; the upper left one only itself.
    first, last = rectangle(0, 0, 1, 1, canvas=(2, 2)), rectangle(1, 1, 1, 1, canvas=(2, 2))
    torch.testing.assert_close(metrics.contour_f(last, first, tolerance=0), torch.tensor(2 * 1 / 3 / (1 + 1 / 3)))


def test_contours_of_neighbouring_pixels_share_half_of_their_pixels() -> None:
    assert metrics.contour_f(rectangle(5, 5, 1, 1), rectangle(5, 6, 1, 1), tolerance=0) == 0.5


@pytest.mark.parametrize(("shift", "distance"), [((0, 2), 2), ((3, 0), 3), ((3, 4), 5), ((-2, 1), math.sqrt(5))])
def test_a_shift_beyond_the_tolerance_is_seen(shift: tuple[int, int], distance: float) -> None:
    truth = rectangle(8, 8, 6, 7)
    prediction = truth.roll(shift, (0, 1))
    assert metrics.contour_f(prediction, truth, tolerance=distance + 1e-6) == 1
    assert metrics.contour_f(prediction, truth, tolerance=distance - 1e-6) < 1


def test_masks_far_apart_score_0() -> None:
    masks = rectangle(2, 2, 4, 4), rectangle(16, 16, 4, 4)
    assert metrics.region_similarity(*masks) == 0
    assert metrics.contour_f(*masks) == 0
    assert metrics.j_and_f(*masks) == 0


@pytest.mark.parametrize(("tolerance", "pixels"), [(0.1, 5), (0.101, 6), (0.001, 1), (0.999, 50)])
def test_a_tolerance_below_1_is_a_share_of_the_diagonal_rounded_up(tolerance: float, pixels: int) -> None:
    truth = rectangle(10, 2, 5, 5, canvas=(30, 40))  # a diagonal of 50 pixels
    far, near = truth.roll(pixels + 1, 1), truth.roll(min(pixels, 30), 1)
    assert metrics.contour_f(near, truth, tolerance=tolerance) == 1
    assert metrics.contour_f(far, truth, tolerance=tolerance) == metrics.contour_f(far, truth, tolerance=pixels)
    if pixels < 30:
        assert metrics.contour_f(far, truth, tolerance=tolerance) < 1


def test_the_default_tolerance_is_5_pixels_in_an_image_of_500_x_375() -> None:
    truth = rectangle(100, 100, 60, 80, canvas=(375, 500))
    assert metrics.contour_f(truth.roll(5, 1), truth) == 1
    assert metrics.contour_f(truth.roll(6, 1), truth) < 1


@settings(max_examples=50)
@given(mask_pairs(), tolerances)
def test_all_measures_are_symmetric_within_0_and_1_and_1_for_equal_masks(
    pair: tuple[Tensor, Tensor], tolerance: float
) -> None:
    first, second = pair
    similarity = metrics.region_similarity(*pair, absent=1)
    quality = metrics.contour_f(*pair, tolerance=tolerance, absent=1)
    assert similarity == metrics.region_similarity(second, first, absent=1)
    assert quality == metrics.contour_f(second, first, tolerance=tolerance, absent=1)
    assert 0 <= similarity <= 1
    assert 0 <= quality <= 1
    assert metrics.j_and_f(*pair, tolerance=tolerance, absent=1) == (similarity + quality) / 2
    assert metrics.j_and_f(first, first, tolerance=tolerance, absent=1) == 1


def test_contour_f_grows_with_the_tolerance() -> None:
    masks = random_masks(2, 20, 30)
    qualities = torch.stack([metrics.contour_f(*masks, tolerance=tolerance) for tolerance in (0, *range(1, 8))])
    assert (qualities.diff() >= 0).all()
    assert qualities[0] < qualities[-1]


def test_empty_and_full_masks() -> None:
    empty, full, some = rectangle(0, 0, 0, 0), rectangle(0, 0, 24, 24), rectangle(5, 5, 4, 4)
    for measure in (metrics.region_similarity, metrics.contour_f, metrics.j_and_f):
        assert measure(empty, empty).isnan()
        assert measure(empty, empty, absent=1.0) == 1
        assert measure(empty, empty, absent=0.25) == 0.25
        assert measure(full, full) == 1
        assert measure(empty, some) == 0
        assert measure(some, empty) == 0
    assert metrics.region_similarity(full, empty) == 0
    assert metrics.contour_f(full, empty) == 1  # neither has a contour
    assert metrics.contour_f(full, some) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_images_of_one_pixel_row_or_column(shape: tuple[int, int]) -> None:
    some, empty = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    some[0, 0] = True
    assert metrics.j_and_f(some, some) == 1
    assert metrics.region_similarity(some, empty) == 0
    assert metrics.contour_f(some, empty) == float(shape == (1, 1))  # one pixel has no neighbour, so no contour


def test_empty_batches_and_images_are_allowed() -> None:
    assert metrics.j_and_f(*torch.zeros(2, 0, 3, 4, 5, dtype=torch.bool)).shape == (0, 3)
    for masks, pooled in ((torch.zeros(2, 0, 3, 4, 5), True), (torch.zeros(2, 3, 0, 5), False)):
        assert metrics.j_and_f(*masks.bool(), pooled=pooled).isnan().tolist() == [True] * 3
        assert metrics.j_and_f(*masks.bool(), pooled=pooled, absent=1).tolist() == [1, 1, 1]


def test_a_batch_gives_what_its_masks_give_one_by_one() -> None:
    masks, valid = random_masks(2, 3, 2, 13, 10), random_masks(3, 2, 13, 10)
    for measure in (metrics.region_similarity, metrics.contour_f, metrics.j_and_f):
        together = measure(*masks, valid=valid)
        assert together.shape == (3, 2)
        assert together.dtype == torch.float32
        for n, c in itertools.product(range(3), range(2)):
            assert together[n, c] == measure(*masks[:, n, c], valid=valid[n, c])


def test_memory_layout_does_not_matter() -> None:
    masks = random_masks(2, 3, 4, 13, 10)
    expected = metrics.j_and_f(*masks)
    transposed = masks.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(metrics.j_and_f(*transposed), expected)
    repeated = masks[0, :1].expand(3, 4, 13, 10)  # no memory of its own for two of its images
    assert torch.equal(metrics.j_and_f(repeated, masks[1]), metrics.j_and_f(repeated.clone(), masks[1]))


def test_arguments_stay_as_they_are() -> None:
    masks, valid = random_masks(2, 3, 4, 13, 10), random_masks(3, 13, 10)
    copies = masks.clone(), valid.clone()
    metrics.j_and_f(*masks, valid=valid, pooled=True)
    assert torch.equal(masks, copies[0])
    assert torch.equal(valid, copies[1])


def test_pooled_region_similarity_is_the_ratio_of_summed_counts() -> None:
    prediction, truth = random_masks(2, 4, 3, 11, 14)
    both, either = (prediction & truth).sum((0, 2, 3)), (prediction | truth).sum((0, 2, 3))
    pooled = metrics.region_similarity(prediction, truth, pooled=True)
    torch.testing.assert_close(pooled, both / either)
    assert not torch.allclose(pooled, metrics.region_similarity(prediction, truth).mean(0))


def test_pooled_contour_f_is_the_f_measure_of_summed_counts() -> None:
    # A pixel found, 4 contour pixels, and one missed beside a 3 x 2 rectangle, 10 contour pixels, that is found.
    truth = torch.stack([rectangle(5, 5, 1, 1), rectangle(5, 5, 1, 1), rectangle(5, 5, 3, 2)])
    prediction = torch.stack([truth[0], rectangle(15, 15, 1, 1), truth[2]])
    pooled = metrics.contour_f(prediction, truth, pooled=True)
    torch.testing.assert_close(pooled, torch.tensor(14 / 18))
    torch.testing.assert_close(metrics.contour_f(prediction, truth).mean(), torch.tensor(2 / 3))


def test_pooled_precision_and_recall_are_summed_apart() -> None:
    # Found 4 of 4 + 4 wanted pixels in two images, all of the 4 predicted: precision 1, recall 1/2.
    empty, pixel = rectangle(0, 0, 0, 0), rectangle(5, 5, 1, 1)
    prediction, truth = torch.stack([pixel, empty]), torch.stack([pixel, pixel])
    torch.testing.assert_close(metrics.contour_f(prediction, truth, pooled=True), torch.tensor(2 / 3))


def test_pooling_one_image_changes_nothing() -> None:
    masks = random_masks(2, 1, 3, 11, 14)
    assert torch.equal(metrics.j_and_f(*masks, pooled=True), metrics.j_and_f(*masks)[0])


def test_pooled_region_similarity_agrees_with_scikit_learn() -> None:
    masks, valid = random_masks(2, 4, 3, 11, 14), random_masks(4, 11, 14)
    prediction, truth = masks.movedim(2, -1)[:, valid].numpy()
    expected = torch.from_numpy(jaccard_score(truth, prediction, average=None)).float()
    torch.testing.assert_close(metrics.region_similarity(*masks, valid=valid, pooled=True), expected)


@pytest.mark.parametrize("pooled", [False, True])
def test_what_stands_at_pixels_that_are_not_valid_does_not_matter(pooled: bool) -> None:
    prediction, truth, valid = random_masks(3, 4, 3, 11, 14)
    expected = metrics.j_and_f(prediction, truth, valid=valid, pooled=pooled)
    noise = random_masks(2, 4, 3, 11, 14) & ~valid
    assert torch.equal(metrics.j_and_f(prediction ^ noise[0], truth ^ noise[1], valid=valid, pooled=pooled), expected)
    assert torch.equal(metrics.j_and_f(prediction & valid, truth & valid, pooled=pooled), expected)
    assert not torch.equal(metrics.j_and_f(prediction, truth, pooled=pooled), expected)


def test_contours_within_a_void_band_around_the_object_match_fully() -> None:
    truth, outer = rectangle(8, 8, 6, 6), rectangle(5, 5, 12, 12)
    valid = truth | ~outer
    for prediction in (truth, outer, rectangle(6, 7, 9, 8)):
        assert metrics.j_and_f(prediction, truth, valid=valid, tolerance=0) == 1
    assert metrics.contour_f(rectangle(9, 8, 5, 6), truth, valid=valid, tolerance=0) < 1


def test_valid_pixels_of_an_image_hold_for_all_of_its_classes() -> None:
    masks, valid = random_masks(2, 4, 3, 11, 14), random_masks(4, 11, 14)
    of_each_class = valid[:, None].expand(4, 3, 11, 14)
    for pooled in (False, True):
        expected = metrics.j_and_f(*masks, valid=of_each_class, pooled=pooled)
        assert torch.equal(metrics.j_and_f(*masks, valid=valid, pooled=pooled), expected)


def test_all_or_no_pixels_may_be_valid() -> None:
    masks = random_masks(2, 4, 3, 11, 14)
    everywhere = torch.ones(4, 11, 14, dtype=torch.bool)
    assert torch.equal(metrics.j_and_f(*masks, valid=everywhere), metrics.j_and_f(*masks))
    assert metrics.j_and_f(*masks, valid=~everywhere).isnan().all()
    assert (metrics.j_and_f(*masks, valid=~everywhere, absent=1) == 1).all()


def test_autocast_and_the_default_dtype_change_nothing() -> None:
    masks = random_masks(2, 3, 40, 50)
    expected = metrics.j_and_f(*masks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metrics.j_and_f(*masks), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(metrics.j_and_f(*masks), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives() -> None:
    masks, valid = random_masks(2, 4, 3, 120, 160), random_masks(4, 120, 160)
    for pooled in (False, True):
        expected = metrics.j_and_f(*masks, valid=valid, pooled=pooled)
        torch.testing.assert_close(
            metrics.j_and_f(*masks.cuda(), valid=valid.cuda(), pooled=pooled).cpu(), expected, rtol=1e-6, atol=0
        )


MASKS = torch.zeros(2, 3, 4, 5, dtype=torch.bool)


@pytest.mark.parametrize("measure", [metrics.region_similarity, metrics.contour_f, metrics.j_and_f])
@pytest.mark.parametrize(
    ("prediction", "truth", "options", "error", "message"),
    [
        (MASKS.float(), MASKS, {}, TypeError, r"prediction: expected a bool tensor \(.*\), got torch.float32"),
        (MASKS, MASKS.byte(), {}, TypeError, r"truth: expected a bool tensor \(.*\), got torch.uint8"),
        (MASKS, MASKS, {"valid": MASKS.long()}, TypeError, r"valid: expected a bool tensor \(.*\), got torch.int64"),
        (MASKS.numpy(), MASKS, {}, TypeError, "prediction: expected a tensor, got ndarray"),
        (MASKS, None, {}, TypeError, "truth: expected a tensor, got NoneType"),
        (MASKS, MASKS, {"pooled": 1}, TypeError, "pooled: expected a bool, got int"),
        (MASKS[0, 0, 0], MASKS[0, 0, 0], {}, ValueError, r"prediction: expected \[\.\.\., H, W\], got \[5\]"),
        (
            MASKS,
            MASKS[:, :1],
            {},
            ValueError,
            r"truth: expected \[2, 3, 4, 5\] to go with prediction \[2, 3, 4, 5\], got \[2, 1, 4, 5\]",
        ),
        (MASKS, MASKS.to("meta"), {}, ValueError, "truth: expected device cpu, that of prediction, got meta"),
        (MASKS, MASKS, {"valid": MASKS[:, :1]}, ValueError, r"valid: expected \[2, 3, 4, 5\] .* got \[2, 1, 4, 5\]"),
        (MASKS, MASKS, {"valid": MASKS[:1, 0]}, ValueError, r"valid: expected \[2, 4, 5\] .* got \[1, 4, 5\]"),
        (MASKS, MASKS, {"valid": MASKS[0, 0]}, ValueError, r"valid: expected \[2, 3, 4, 5\] .* got \[4, 5\]"),
        (MASKS[0], MASKS[0], {"valid": MASKS[0, 0]}, ValueError, r"valid: expected \[3, 4, 5\] .* got \[4, 5\]"),
        (MASKS, MASKS, {"valid": MASKS.to("meta")}, ValueError, "valid: expected device cpu"),
        (
            MASKS[0, 0],
            MASKS[0, 0],
            {"pooled": True},
            ValueError,
            r"prediction: expected \[N, \.\.\., H, W\] to pool over N, got \[4, 5\]",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    measure: Any, prediction: Any, truth: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure(prediction, truth, **options)


@pytest.mark.parametrize("measure", [metrics.contour_f, metrics.j_and_f])
@pytest.mark.parametrize(
    ("tolerance", "error"),
    [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError), (True, TypeError)],
)
def test_a_tolerance_that_is_no_distance_is_refused(measure: Any, tolerance: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="tolerance: expected a"):
        measure(MASKS, MASKS, tolerance=tolerance)


@pytest.mark.parametrize("measure", [metrics.region_similarity, metrics.contour_f, metrics.j_and_f])
@pytest.mark.parametrize(("absent", "error"), [(-0.1, ValueError), (math.inf, ValueError), (None, TypeError)])
def test_a_value_of_absent_classes_that_is_no_share_is_refused(
    measure: Any, absent: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="absent: expected a"):
        measure(MASKS, MASKS, absent=absent)


@given(st.lists(mask_pairs(), max_size=4), tolerances)
def test_j_and_f_of_images_of_different_sizes_pool_their_counts(pairs: list[Any], tolerance: float) -> None:
    quality = metrics.JAndF(1, tolerance=tolerance)
    both = either = 0
    found, predicted, met, true = 0, 0, 0, 0
    for prediction, truth in pairs:
        quality.update(prediction[None, None], truth[None, None])
        both += len(pixels(prediction) & pixels(truth))
        either += len(pixels(prediction) | pixels(truth))
        first, second, radius = contour_pixels(prediction), contour_pixels(truth), radius_of(tolerance, truth)
        found += sum(any(math.dist(a, b) <= radius for b in second) for a in first)
        met += sum(any(math.dist(a, b) <= radius for b in first) for a in second)
        predicted, true = predicted + len(first), true + len(second)
    region, contour = quality.compute()
    precision, recall = found / predicted if predicted else 1, met / true if true else 1
    expected = [both / either, f_measure(precision, recall)] if either else [math.nan] * 2
    assert [region.item(), contour.item()] == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("absent", [math.nan, 0.5])
def test_j_and_f_batch_by_batch_is_the_pooled_measure(absent: float) -> None:
    masks, valid = random_masks(2, 5, 3, 11, 14), random_masks(5, 11, 14)
    masks[:, :, 1] = False
    first, second = metrics.JAndF(3), metrics.JAndF(3, absent=absent)
    first.update(*masks[:, :2], valid=valid[:2])
    second.update(*masks[:, 2:], valid=valid[2:])
    second.counts += first.counts  # as the sum over processes does
    region, contour = second.compute()
    for found, measure in ((region, metrics.region_similarity), (contour, metrics.contour_f)):
        expected = measure(*masks, valid=valid, pooled=True, absent=absent)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert found.isnan().tolist() == [False, math.isnan(absent), False]


def test_j_and_f_refuses_what_makes_no_sense() -> None:
    for arguments, error in (((0,), ValueError), ((1.0,), TypeError), ((True,), TypeError)):
        with pytest.raises(error, match="classes: expected a"):
            metrics.JAndF(*arguments)  # type: ignore[arg-type]
    for tolerance, error in ((-1, ValueError), (math.inf, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="tolerance: expected a"):
            metrics.JAndF(3, tolerance=tolerance)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="absent: expected a finite number of at least 0 and of at most 1, got 2"):
        metrics.JAndF(3, absent=2)
    for masks, shape in ((MASKS[:, :1], r"\[2, 1, 4, 5\]"), (MASKS[0], r"\[3, 4, 5\]")):
        quality = metrics.JAndF(3)
        with pytest.raises(ValueError, match=rf"prediction: expected \[N, 3, H, W\], got {shape}"):
            quality.update(masks, masks)
        assert not quality.counts.any()


def test_counts_that_were_begun_in_inference_mode() -> None:
    mask = torch.eye(4, dtype=torch.bool)[None, None]
    with torch.inference_mode():
        quality = metrics.JAndF(1)
        quality.update(mask, mask)
    quality.update(mask, ~mask)
    assert quality.compute()[0] == torch.tensor([4 / 20])


def test_a_device_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="device: expected one that torch can use, got 'unknown'"):
        metrics.JAndF(1, device="unknown")


@pytest.mark.parametrize("name", ["prediction", "truth", "valid"])
def test_sparse_masks(name: str) -> None:
    masks = {key: torch.eye(4, dtype=torch.bool) for key in ("prediction", "truth", "valid")}
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor, got torch.sparse_coo"):
        metrics.j_and_f(**masks | {name: masks[name].to_sparse()})
