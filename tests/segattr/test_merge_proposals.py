"""Merging of proposals, against sets of pixels."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segattr.metrics.instances import intersections
from segattr.refine.merge_proposals import _CHUNK, merge_proposals


def pixels(mask: Tensor) -> set[tuple[int, ...]]:
    return {tuple(place) for place in mask.nonzero().tolist()}


def by_sets(mask: Tensor, proposals: Tensor) -> set[tuple[int, ...]]:
    """Equation (5.4), one object."""
    target, candidates = pixels(mask), [pixels(m) for m in proposals]
    if not any(target & m for m in candidates):
        return target
    overlaps = [Fraction(len(target & m), max(1, len(target | m))) for m in candidates]
    best = candidates[overlaps.index(max(overlaps))]
    return best.union(*(m for m in candidates if m <= target))


def test_golden(golden: Callable[[str], dict[str, Tensor]]) -> None:
    case = golden("attr/mcg")
    mask, proposals = case["T"], case["proposals"]
    assert torch.equal(merge_proposals(mask, proposals), case["Tr"])
    best, inside = int(case["best"]), case["inside"]
    assert torch.equal(merge_proposals(mask, proposals[inside]), proposals[inside].any(0))
    assert torch.equal(merge_proposals(mask, proposals[[best]]), proposals[best])
    shared = intersections(mask[None], proposals)[0]
    either = mask.sum() + proposals.sum((1, 2)) - shared
    torch.testing.assert_close(shared / either, case["iou"], rtol=0, atol=1e-9)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 999),
)
def test_equals_sets_of_pixels_for_each_object(shape: tuple[int, int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    objects, count, height, width = shape
    masks, proposals = torch.rand(objects, height, width) < 0.6, torch.rand(count, height, width) < 0.4
    merged = merge_proposals(masks, proposals)
    assert merged.dtype == torch.bool
    assert merged.shape == masks.shape
    for mask, result in zip(masks, merged, strict=True):
        assert pixels(result) == by_sets(mask, proposals)
        assert torch.equal(merge_proposals(mask, proposals), result)


def test_place_in_the_image_does_not_count() -> None:
    """The released code weighs pixels by their coordinates."""
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[2:8, 2:8] = True
    proposals = torch.zeros(2, 20, 20, dtype=torch.bool)
    proposals[0, 2:8, 2:7] = True  # 30 of 36
    proposals[1, 4:8, 2:8] = True  # 24 of 36, at the larger coordinates
    proposals[1, 8, 2] = True
    merged = merge_proposals(mask, proposals)
    for dims in ((0,), (1,), (0, 1)):
        turned = merge_proposals(mask.flip(dims), proposals.flip([d + 1 for d in dims]))
        assert torch.equal(turned.flip(dims), merged)
    assert torch.equal(merged, proposals[0])


def test_of_equally_good_proposals_the_first_counts() -> None:
    mask = torch.tensor([[True, True, False, False]])
    proposals = torch.tensor([[[False, True, True, False]], [[True, False, False, True]]])
    assert torch.equal(merge_proposals(mask, proposals), proposals[0])
    assert torch.equal(merge_proposals(mask, proposals.flip(0)), proposals[1])


@pytest.mark.parametrize("proposals", [torch.zeros(0, 2, 3), torch.zeros(2, 2, 3), torch.eye(3)[None, :2]])
def test_mask_that_no_proposal_touches_stays(proposals: Tensor) -> None:
    mask = torch.tensor([[False, True, True], [False, False, False]])
    merged = merge_proposals(mask, proposals.bool())
    assert torch.equal(merged, mask)
    assert merged.data_ptr() != mask.data_ptr()


def test_images_without_pixels() -> None:
    nothing = torch.zeros(2, 0, 3, dtype=torch.bool)
    assert merge_proposals(nothing, nothing).shape == (2, 0, 3)


def test_empty_mask_stays_empty() -> None:
    assert not merge_proposals(torch.zeros(2, 3, 3, dtype=torch.bool), torch.ones(4, 3, 3, dtype=torch.bool)).any()


def test_more_proposals_than_are_held_at_a_time() -> None:
    proposals = torch.rand(2 * _CHUNK + 7, 5, 5) < 0.1
    mask = torch.rand(5, 5) < 0.7
    assert pixels(merge_proposals(mask, proposals)) == by_sets(mask, proposals)


def test_autocast_does_not_round_the_counts() -> None:
    mask = torch.ones(64, 64, dtype=torch.bool)
    proposals = torch.ones(2, 64, 64, dtype=torch.bool)
    proposals[0, 0, 0] = False  # 4095 of 4096 pixels: the same in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert intersections(mask[None], proposals).tolist() == [[4095, 4096]]
        proposals[1] = False
        assert not merge_proposals(mask, proposals)[0, 0]


MASK, PROPOSALS = torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(5, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "proposals", "error", "message"),
    [
        (None, PROPOSALS, TypeError, "mask: expected a tensor, got NoneType"),
        (MASK.float(), PROPOSALS, TypeError, r"mask: expected a bool tensor .*, got torch.float32"),
        (MASK[0, 0], PROPOSALS, ValueError, r"mask: expected \[H, W\] or \[n, H, W\], got \[4\]"),
        (MASK, [PROPOSALS[0]], TypeError, "proposals: expected a tensor, got list"),
        (MASK, PROPOSALS.int(), TypeError, "proposals: expected a bool tensor"),
        (MASK, PROPOSALS[0], ValueError, r"proposals: expected \[P, H, W\], got \[3, 4\]"),
        (MASK, PROPOSALS.mT, ValueError, r"proposals: expected \[5, 3, 4\] to go with mask"),
        (MASK, PROPOSALS.to("meta"), ValueError, "proposals: expected device cpu"),
    ],
)
def test_errors(mask: Any, proposals: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merge_proposals(mask, proposals)


@pytest.mark.gpu
def test_cuda_equals_cpu_and_stays_there() -> None:
    masks, proposals = torch.rand(3, 40, 50) < 0.5, torch.rand(99, 40, 50) < 0.2
    there = merge_proposals(masks.cuda(), proposals.cuda())
    assert there.is_cuda
    assert torch.equal(there.cpu(), merge_proposals(masks, proposals))
