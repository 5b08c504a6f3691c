"""What is particular to the affinities: pairs, lines, losses against all pairs by brute force, sparse matrices."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segloss._lines import line
from segloss._pairs import disc
from segloss.affinity import (
    AffinityLoss,
    PathAffinityLoss,
    affinity_loss,
    feature_affinity,
    path_affinity,
    path_affinity_loss,
)

seeds = st.integers(0, 2**16)
sides = st.integers(1, 6)
radii = st.integers(1, 20).map(lambda n: n / 2)
distances = st.sampled_from(["sum", "mean"])


@cache
def pairs(height: int, width: int, radius: float, crop: bool = False) -> list[tuple[int, int]]:
    """Flat indices of all pairs of pixels closer than ``radius``, a multiple of a half: the upper or left one first."""
    margin = math.ceil(radius) - 1 if crop else 0
    found = []
    for i in range(height * width):
        (y, x) = divmod(i, width)
        if y >= height - margin or not margin <= x < width - margin:
            continue
        for j in range(i + 1, height * width):
            (v, u) = divmod(j, width)
            if 4 * ((y - v) ** 2 + (x - u) ** 2) < int(2 * radius) ** 2:
                found.append((i, j))
    return found


@cache
def close_to_segment(down: int, right: int) -> list[tuple[int, int]]:
    """Points of the grid less than 1 from the segment from (0, 0) to (down, right), in exact arithmetic."""
    squared = down**2 + right**2
    found = []
    for i in range(-2, down + 3):
        for j in range(min(right, 0) - 2, max(right, 0) + 3):
            along = i * down + j * right
            if along <= 0:
                apart = Fraction(i**2 + j**2)
            elif along >= squared:
                apart = Fraction((i - down) ** 2 + (j - right) ** 2)
            else:
                apart = Fraction((i * right - j * down) ** 2, squared)
            if apart < 1:
                found.append((i, j))
    return found


def path(i: int, j: int, width: int) -> list[int]:
    """Flat indices of the pixels on the line from i to j > i."""
    (y, x), (v, u) = divmod(i, width), divmod(j, width)
    return [(y + a) * width + x + b for a, b in close_to_segment(v - y, u - x)]


def path_weights(boundary: Tensor, chosen: list[tuple[int, int]]) -> Tensor:
    flat = boundary.flatten(1)
    weights = [1 - flat[:, path(i, j, boundary.shape[-1])].amax(1) for i, j in chosen]
    return torch.stack(weights, 1) if weights else flat[:, :0]


def feature_distances(features: Tensor, chosen: list[tuple[int, int]], distance: str) -> Tensor:
    upper, lower = (features.flatten(2)[:, :, [pair[end] for pair in chosen]] for end in (0, 1))
    apart = (upper - lower).abs().sum(1)
    return apart / features.shape[1] if distance == "mean" else apart


def expected_loss(weights: Tensor, labels: Tensor, chosen: list[tuple[int, int]], balanced: bool) -> Tensor:
    upper, lower = (labels.flatten(1)[:, [pair[end] for pair in chosen]] for end in (0, 1))
    known = (upper != 255) & (lower != 255)

    def mean(costs: Tensor, group: Tensor) -> Tensor:
        return costs[group].mean() if group.any() else costs.sum() * 0

    same, negative = known & (upper == lower), mean(-torch.log(1 - weights), known & (upper != lower))
    if not balanced:
        return mean(-weights.log(), same) + negative
    background, foreground = (mean(-weights.log(), same & group) for group in (upper == 0, upper != 0))
    return background / 4 + foreground / 4 + negative / 2


def pseudo_labels(images: int, height: int, width: int) -> Tensor:
    labels = torch.randint(0, 3, (images, height, width))
    return labels.masked_fill(torch.rand(labels.shape) < 0.2, 255)


def compare(loss: Tensor, expected: Tensor, tensor: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    grads = (torch.autograd.grad(value, tensor, allow_unused=True)[0] for value in (loss, expected))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_a_line_has_the_pixels_less_than_one_from_the_segment() -> None:
    for offset in disc(10, 20, 20):
        assert line(offset) == close_to_segment(*offset)


@settings(max_examples=25)
@given(seed=seeds, height=sides, width=sides, radius=radii, distance=distances, crop=st.booleans())
def test_affinity_loss_is_that_of_all_pairs(
    seed: int, height: int, width: int, radius: float, distance: Any, crop: bool
) -> None:
    torch.manual_seed(seed)
    features = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    labels = pseudo_labels(2, height, width)
    chosen = pairs(height, width, radius, crop)
    weights = torch.exp(-feature_distances(features, chosen, distance))
    loss = affinity_loss(features, labels, radius=radius, distance=distance, crop=crop)
    compare(loss, expected_loss(weights, labels, chosen, balanced=distance == "mean"), features)


@settings(max_examples=25)
@given(seed=seeds, height=sides, width=sides, radius=radii, eps=st.sampled_from([0.0, 1e-5]), crop=st.booleans())
def test_path_affinity_loss_is_that_of_all_pairs(
    seed: int, height: int, width: int, radius: float, eps: float, crop: bool
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(2, 1, height, width, dtype=torch.float64, requires_grad=True)
    labels = pseudo_labels(2, height, width)
    chosen = pairs(height, width, radius, crop)
    upper, lower = (labels.flatten(1)[:, [pair[end] for pair in chosen]] for end in (0, 1))
    known, weights = (upper != 255) & (lower != 255), path_weights(torch.sigmoid(logits), chosen)
    groups = [(weights + eps, known & (upper == lower)), (1 - weights + eps, known & (upper != lower))]
    expected = sum((-value[group].log().mean() for value, group in groups if group.any()), 0 * logits.sum())
    loss = path_affinity_loss(logits, labels, radius=radius, eps=eps, crop=crop)
    compare(loss, expected, logits)


@settings(max_examples=12)
@given(seed=seeds, height=sides, width=sides, radius=radii, distance=distances)
def test_sparse_affinities_are_those_of_all_pairs(
    seed: int, height: int, width: int, radius: float, distance: Any
) -> None:
    torch.manual_seed(seed)
    boundary = torch.rand(2, 1, height, width, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    chosen = pairs(height, width, radius)
    for tensor, sparse, weights in (
        (boundary, path_affinity(boundary, radius=radius), path_weights(boundary, chosen)),
        (
            features,
            feature_affinity(features, radius=radius, distance=distance),
            torch.exp(-feature_distances(features, chosen, distance)),
        ),
    ):
        expected = torch.eye(height * width, dtype=torch.float64).repeat(2, 1, 1)
        for (i, j), weight in zip(chosen, weights.unbind(1), strict=True):
            expected[:, i, j] = expected[:, j, i] = weight
        assert sparse._nnz() == 2 * (height * width + 2 * len(chosen))
        dense, weight = sparse.to_dense(), torch.randn(expected.shape, dtype=torch.float64)
        torch.testing.assert_close(dense, expected)
        if chosen:
            compare((weight * dense).sum(), (weight * expected).sum(), tensor)


@pytest.mark.parametrize("affinity", [path_affinity, feature_affinity])
def test_affinities_are_ready_for_a_random_walk(affinity: Callable[..., Tensor]) -> None:
    matrix = affinity(torch.rand(2, 1, 4, 5), radius=3)
    assert matrix.layout == torch.sparse_coo
    assert matrix.shape == (2, 20, 20)
    assert matrix.is_coalesced()
    assert matrix.dtype == torch.float32
    sorted_again = torch.sparse_coo_tensor(matrix.indices(), matrix.values(), matrix.shape, check_invariants=True)
    assert torch.equal(matrix.indices(), sorted_again.coalesce().indices())
    dense = matrix.to_dense()
    assert torch.equal(dense, dense.mT)
    assert (dense.diagonal(dim1=1, dim2=2) == 1).all()
    assert ((dense >= 0) & (dense <= 1)).all()
    maps = torch.rand(2, 20, 3)
    torch.testing.assert_close(torch.bmm(matrix, maps), torch.bmm(dense, maps))
    torch.testing.assert_close(torch.sparse.mm(matrix[0], maps[0]), dense[0] @ maps[0])
    inputs = torch.rand(2, 1, 4, 5, requires_grad=True)
    walked = torch.bmm(affinity(inputs, radius=3), maps).square().sum()
    expected = torch.bmm(affinity(inputs, radius=3).to_dense(), maps).square().sum()
    torch.testing.assert_close(*(torch.autograd.grad(value, inputs)[0] for value in (walked, expected)))


@pytest.mark.parametrize("affinity", [path_affinity, feature_affinity])
def test_affinities_of_the_smallest_inputs(affinity: Callable[..., Tensor]) -> None:
    assert torch.equal(affinity(torch.rand(1, 1, 1, 1)).to_dense(), torch.ones(1, 1, 1))
    assert torch.equal(affinity(torch.rand(2, 1, 3, 2), radius=1).to_dense(), torch.eye(6).repeat(2, 1, 1))
    assert affinity(torch.rand(0, 1, 3, 2)).shape == (0, 6, 6)
    assert affinity(torch.rand(1, 1, 2, 2).half()).dtype == torch.float32


def test_a_wall_separates_its_sides_but_not_its_ends() -> None:
    boundary = torch.zeros(1, 1, 5, 3)
    boundary[..., :4, 1] = 1  # a gap in the last row
    matrix = path_affinity(boundary, radius=4).to_dense()[0].view(5, 3, 5, 3)
    assert matrix[0, 0, 0, 2] == 0
    assert matrix[0, 0, 4, 0] == 0  # not closer than 4
    assert matrix[0, 0, 3, 0] == 1
    assert matrix[4, 0, 4, 2] == 1
    assert matrix[0, 0, 0, 1] == 0  # the end of a line is part of it


@pytest.mark.parametrize(("function", "channels"), [(affinity_loss, 3), (path_affinity_loss, 1)])
def test_equal_labels_leave_the_positive_pairs_alone(function: Callable[..., Tensor], channels: int) -> None:
    maps = torch.randn(2, channels, 4, 5, dtype=torch.float64)
    labels = torch.full((2, 4, 5), 7)
    loss = function(maps, labels, radius=3)
    affinity = feature_affinity(maps, radius=3) if channels == 3 else path_affinity(torch.sigmoid(maps), radius=3)
    _, i, j = affinity.indices()
    torch.testing.assert_close(loss, -affinity.values()[i != j].log().mean())
    labels[:, 1:] = 255
    labels[:, 0, 1:] = 255  # one pixel is left of each image: no pair
    assert function(maps, labels, radius=3) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 3)])
@pytest.mark.parametrize("radius", [0.5, 1.0])
def test_no_pair_within_the_radius_gives_a_zero_on_the_graph(shape: tuple[int, int], radius: float) -> None:
    maps = torch.randn(2, 1, *shape, requires_grad=True)
    labels = torch.randint(0, 2, (2, *shape))
    for function in (affinity_loss, path_affinity_loss):
        for crop in (False, True):
            loss = function(maps, labels, radius=radius, crop=crop)
            assert loss == 0
            assert (torch.autograd.grad(loss, maps)[0] == 0).all()


def test_ignored_pixels_have_no_gradient_but_their_boundary_counts() -> None:
    labels = torch.tensor([[[0, 255, 1]]])
    features = torch.randn(1, 2, 1, 3, requires_grad=True)
    gradient = torch.autograd.grad(affinity_loss(features, labels), features)[0]
    assert (gradient[..., 1] == 0).all()
    assert (gradient[..., 0] != 0).all()
    wall = torch.tensor([-3.0, 1.0, -2.0], dtype=torch.float64).view(1, 1, 1, 3)
    torch.testing.assert_close(path_affinity_loss(wall, labels).item(), math.log1p(math.exp(-1)))


def test_means_are_over_the_pairs_of_the_batch() -> None:
    # One pair in the first image, two in the second.
    labels = torch.tensor([[[0, 0, 255]], [[1, 1, 1]]])
    features = torch.tensor([[0.0, 5.0, 9.0], [0.0, 1.0, 3.0]]).view(2, 1, 1, 3)
    torch.testing.assert_close(affinity_loss(features, labels, radius=2).item(), (5 + 1 + 2) / 3)


@settings(max_examples=15)
@given(logit=st.floats(-1e4, 1e4), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_costs_of_extreme_boundaries_are_exact(logit: float, dtype: torch.dtype) -> None:
    maps = torch.tensor([logit, logit - 1.0], dtype=dtype).view(1, 1, 1, 2)
    largest = maps.max().item()
    for labels, sign in (([0, 0], 1), ([0, 1], -1)):
        # softplus, written so that it neither overflows nor rounds to 0
        cost = max(sign * largest, 0) + math.log1p(math.exp(-abs(largest)))
        loss = path_affinity_loss(maps, torch.tensor([[labels]]))
        torch.testing.assert_close(
            loss, torch.tensor(cost, dtype=dtype), rtol=1e-14 if maps.dtype == torch.float64 else 1e-6, atol=0
        )


def test_equal_features_of_different_labels_cost_what_the_floor_says() -> None:
    features, labels = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])
    for floor in (1e-6, 1e-3, 0.5):
        expected = -math.log(-math.expm1(-floor))
        torch.testing.assert_close(affinity_loss(features, labels, floor=floor).item(), expected, rtol=1e-6, atol=0)
    features = torch.tensor([0.0, 1e-37]).view(1, 1, 1, 2).requires_grad_()
    loss = affinity_loss(features, labels, floor=1e-300)  # below what a float32 can hold
    assert loss.isfinite()
    assert torch.autograd.grad(loss, features)[0].isfinite().all()


@pytest.mark.parametrize("distance", ["sum", "mean"])
def test_the_largest_features_of_many_channels_and_pairs_stay_finite(distance: Any) -> None:
    features = torch.where(torch.rand(2, 64, 8, 8) < 0.5, 3e38, -3e38)
    features.requires_grad_()
    loss = affinity_loss(features, torch.zeros(2, 8, 8, dtype=torch.long), distance=distance)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, features)[0].isfinite().all()


def test_among_equal_boundaries_the_last_one_gets_the_gradient() -> None:
    logits = torch.zeros(1, 1, 1, 3, requires_grad=True)
    loss = path_affinity_loss(logits, torch.zeros(1, 1, 3, dtype=torch.long))
    # Of the three pairs, one ends at the middle pixel and two at the last one.
    expected = torch.tensor([0.0, 1 / 6, 2 / 6]).view(1, 1, 1, 3)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
def test_labels_may_have_any_integer_type(dtype: torch.dtype) -> None:
    maps, labels = torch.randn(2, 1, 4, 5), torch.randint(0, 3, (2, 4, 5))
    for function in (affinity_loss, path_affinity_loss):
        # 258 does not fit into a byte: it must not wrap around to a label.
        expected, loss = (function(maps, given, ignore_index=258) for given in (labels, labels.to(dtype)))
        assert torch.equal(loss, expected)
        assert not torch.equal(function(maps, labels.to(dtype), ignore_index=2), expected)


LABELS = torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: affinity_loss(x, LABELS.float()), TypeError, "labels: expected an integer tensor"),
        (lambda x: affinity_loss(x, LABELS - 9), ValueError, "labels: expected at least 0 or 255 to ignore, got -9"),
        (lambda x: affinity_loss(x, LABELS, ignore_index=2**63), ValueError, "ignore_index: expected .* 64 bits"),
        (lambda x: affinity_loss(x, LABELS, radius=0), ValueError, "radius: expected a finite number above 0, got 0"),
        (lambda x: affinity_loss(x, LABELS, radius="5"), TypeError, "radius: expected a number, got str"),
        (lambda x: affinity_loss(x, LABELS, floor=0), ValueError, "floor: expected a finite number above 0, got 0"),
        (lambda x: affinity_loss(x, LABELS, distance="l2"), ValueError, "distance: expected one of 'sum', 'mean', got"),
        (lambda x: affinity_loss(x, LABELS, crop=1), TypeError, "crop: expected a bool, got int"),
        (lambda x: affinity_loss(x, LABELS, ignore_index=2.0), TypeError, "ignore_index: expected an int, got float"),
        (lambda x: affinity_loss(x[:, :0], LABELS), ValueError, "features: expected at least one channel and one"),
        (lambda x: affinity_loss(x[..., :0], LABELS), ValueError, "features: expected at least one channel and one"),
        (lambda x: AffinityLoss(radius=-1), ValueError, "radius: expected a finite number above 0, got -1"),
        (lambda x: AffinityLoss(distance=None), ValueError, "distance: expected one of 'sum', 'mean', got None"),
        (lambda x: AffinityLoss(floor=-1), ValueError, "floor: expected a finite number above 0, got -1"),
        (lambda x: AffinityLoss(ignore_index=None), TypeError, "ignore_index: expected an int, got NoneType"),
        (lambda x: AffinityLoss(crop=None), TypeError, "crop: expected a bool, got NoneType"),
        (lambda x: path_affinity_loss(x, LABELS), ValueError, r"boundary_logits: expected \[B, 1, H, W\], got \[2, 3,"),
        (lambda x: path_affinity_loss(x[:, :1], LABELS.bool()), TypeError, "labels: expected an integer tensor"),
        (lambda x: path_affinity_loss(x[:, :1], LABELS, radius=math.inf), ValueError, "radius: expected a finite"),
        (lambda x: path_affinity_loss(x[:, :1], LABELS, eps=-1), ValueError, "eps: expected a finite number of at le"),
        (lambda x: path_affinity_loss(x[:, :1], LABELS, crop=None), TypeError, "crop: expected a bool, got NoneType"),
        (lambda x: path_affinity_loss(x[:, :1, :0], LABELS), ValueError, "boundary_logits: expected at least one"),
        (lambda x: PathAffinityLoss(radius=0), ValueError, "radius: expected a finite number above 0, got 0"),
        (lambda x: PathAffinityLoss(eps=-1), ValueError, "eps: expected a finite number of at least 0, got -1"),
        (lambda x: PathAffinityLoss(ignore_index=1.0), TypeError, "ignore_index: expected an int, got float"),
        (lambda x: PathAffinityLoss(crop=0), TypeError, "crop: expected a bool, got int"),
        (
            lambda x: path_affinity(x[:, :1] - 9),
            ValueError,
            "boundary: expected values from 0 to 1, got values outside",
        ),
        (
            lambda x: path_affinity(x[:, :1] + 9),
            ValueError,
            "boundary: expected values from 0 to 1, got values outside",
        ),
        (lambda x: path_affinity(x), ValueError, r"boundary: expected \[B, 1, H, W\], got \[2, 3, 4, 5\]"),
        (lambda x: path_affinity(x[:, 0]), ValueError, r"boundary: expected \[B, 1, H, W\], got \[2, 4, 5\]"),
        (lambda x: path_affinity(x[:, :1] * torch.nan), ValueError, "boundary: expected finite values, got NaN or inf"),
        (lambda x: path_affinity(LABELS), TypeError, "boundary: expected a floating-point tensor, got torch.int64"),
        (lambda x: path_affinity(x[:, :1].sigmoid(), radius=-2), ValueError, "radius: expected a finite number above"),
        (lambda x: feature_affinity(x[0]), ValueError, r"features: expected \[B, D, H, W\], got \[3, 4, 5\]"),
        (lambda x: feature_affinity(LABELS), TypeError, "features: expected a floating-point tensor, got torch.int64"),
        (lambda x: feature_affinity(x / 0), ValueError, "features: expected finite values, got NaN or infinity"),
        (lambda x: feature_affinity(x, radius=0), ValueError, "radius: expected a finite number above 0, got 0"),
        (
            lambda x: feature_affinity(x, distance="max"),
            ValueError,
            "distance: expected one of 'sum', 'mean', got 'max'",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4, 5))
