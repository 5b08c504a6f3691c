"""What is particular to W-OoD: centres, clusters, distances, classification, collection."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segloss import ood as module_under_test
from segloss.ood import (
    OODClusters,
    annotation_cost,
    class_centres,
    ood_centres,
    ood_classification,
    ood_distance,
    rank_hard_ood,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ordered(rows: Tensor) -> list[list[float]]:
    return sorted(rows.tolist())


def distortion(points: Tensor, centres: Tensor) -> float:
    return torch.cdist(points.double(), centres.double()).amin(1).square().sum().item()


# Class centres


def test_a_class_centre_is_the_mean_of_the_images_with_its_tag() -> None:
    features, tags = torch.randn(9, 4, dtype=torch.float64), torch.rand(9, 3) < 0.5
    expected = torch.stack([features[tags[:, c]].mean(0) for c in range(3)])
    torch.testing.assert_close(class_centres(features, tags), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(class_centres(features, tags.int()), expected, rtol=1e-12, atol=1e-14)


def test_a_class_without_images_has_the_centre_zero() -> None:
    tags = torch.tensor([[1, 0], [1, 0]])
    assert class_centres(torch.tensor([[1.0], [3.0]]), tags).tolist() == [[2], [0]]
    assert class_centres(torch.zeros(0, 3), torch.zeros(0, 2)).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_centres_are_float32_constants_whatever_autocast_says(dtype: torch.dtype) -> None:
    features, tags = torch.randn(50, 4).to(dtype).requires_grad_(), torch.ones(50, 1)
    expected = features.detach().double().mean(0).float()
    with torch.autocast("cpu", dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16):
        of_classes, of_clusters = class_centres(features, tags), ood_centres(features, 1)
    for centre in (of_classes, of_clusters):
        torch.testing.assert_close(centre[0], expected)
        assert not centre.requires_grad


# Clusters


def blobs(seed: int, count: int = 5) -> tuple[Tensor, Tensor]:
    """Points around corners far from each other, and the means of the points of each corner."""
    points = torch.eye(count, 8, dtype=torch.float64)[:, None] * 100
    points = points + torch.rand(count, 6, 8, dtype=torch.float64, generator=seeded(seed))
    return points.flatten(0, 1)[torch.randperm(count * 6, generator=seeded(seed))], points.mean(1)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_that_lie_apart_are_found(seed: int) -> None:
    points, means = blobs(seed)
    found = torch.tensor(ordered(ood_centres(points, 5, generator=seeded(seed))), dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(ordered(means), dtype=torch.float64))


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=1, max_size=14), data=st.data())
def test_each_centre_is_the_mean_of_the_points_nearest_to_it(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, len(set(rows))))
    points = torch.tensor(rows, dtype=torch.float64)
    centres = ood_centres(points, clusters, generator=seeded(data.draw(st.integers(0, 99))))
    assert centres.shape == (clusters, 2)
    distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
    tied = ((distances - distances.amin(1, keepdim=True)).abs() < 1e-9).sum(1) > 1
    if not tied.any():
        means = [points[distances.argmin(1) == k].mean(0) for k in range(clusters)]
        torch.testing.assert_close(centres, torch.stack(means))
    assert distortion(points, centres) <= distortion(points, points.mean(0, keepdim=True)) + 1e-9


def test_as_many_clusters_as_distinct_points_are_these_points() -> None:
    points = torch.tensor([[0.0, 1.0], [2.0, 2.0], [0.0, 1.0], [-0.0, 5.0], [2.0, 2.0]])
    assert ordered(ood_centres(points, 3)) == [[0, 1], [0, 5], [2, 2]]
    with pytest.raises(ValueError, match="features: expected at least 4 distinct rows for 4 clusters, got 3"):
        ood_centres(points, 4)
    with pytest.raises(ValueError, match="features: expected at least 1 distinct rows for 1 clusters, got 0"):
        ood_centres(points[:0], 1)


def test_a_large_part_that_all_features_share_does_not_blur_the_clusters() -> None:
    corners = torch.eye(6, 16, dtype=torch.float64) * 1e-3
    points = torch.cat([torch.full((60, 1), 1e6), corners.repeat(10, 1)], 1)
    centres = ood_centres(points, 6, generator=seeded(0))
    assert (torch.cdist(corners, centres[:, 1:]).amin(1) < 1e-9).all()


def test_clusters_that_run_empty_are_put_to_use() -> None:
    points = np.array([[0.0], [1.0], [10.0], [11.0], [20.0]])
    starts = np.array([[8.4], [500.0], [600.0]])
    error, centres = module_under_test._lloyd(points, starts)
    assert sorted(centres.ravel()) == [0.5, 10.5, 20]
    assert error == pytest.approx(1)


def test_the_best_of_several_starts_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.rand(40, 2)
    best = [distortion(points, ood_centres(points, 8, generator=seeded(seed))) for seed in range(10)]
    monkeypatch.setattr(module_under_test, "_STARTS", 1)
    first = [distortion(points, ood_centres(points, 8, generator=seeded(seed))) for seed in range(10)]
    assert all(several <= single for several, single in zip(best, first, strict=True))
    assert any(several < 0.9 * single for several, single in zip(best, first, strict=True))


def test_a_generator_decides_on_the_clusters_and_nothing_else_is_drawn_from() -> None:
    points = torch.rand(40, 3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    generator = seeded(3)
    first, again = (ood_centres(points, 6, generator=g) for g in (generator, seeded(3)))
    others = [ood_centres(points, 6, generator=generator) for _ in range(3)]
    assert torch.equal(first, again)
    assert any(ordered(other) != ordered(first) for other in others)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_without_a_generator_the_global_one_of_torch_decides() -> None:
    points = torch.rand(40, 3)
    torch.manual_seed(5)
    first = ood_centres(points, 6)
    torch.manual_seed(5)
    assert torch.equal(ood_centres(points, 6), first)
    assert any(ordered(ood_centres(points, 6)) != ordered(first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["max", "tiny"])
def test_centres_of_features_of_any_size_are_finite(dtype: torch.dtype, scale: str) -> None:
    size = torch.finfo(dtype).max if scale == "max" else 1e-38
    features = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], dtype=dtype) * size
    assert ood_centres(features, 3).unique(dim=0).shape == (3, 2)
    assert ood_centres(features, 2).isfinite().all()
    assert class_centres(features, torch.ones(4, 1)).isfinite().all()


# Distance


def by_hand(
    features: Tensor, tags: Tensor, centres: Tensor, ood: Tensor, count: int, scope: str, power: int
) -> list[float]:
    """The loss of each image, in plain Python."""
    rows, classes, clusters = features.tolist(), centres.tolist(), ood.tolist()
    own = [
        sum(math.dist(z, p) ** power for p, tagged in zip(classes, present, strict=True) if tagged)
        for z, present in zip(rows, tags.tolist(), strict=True)
    ]
    pairs = sorted((math.dist(z, p) ** power, i) for i, z in enumerate(rows) for p in clusters)
    if scope == "batch":
        return [(own[i] - sum(d for d, j in pairs[:count] if j == i)) / len(clusters) for i in range(len(rows))]
    return [own[i] - sum([d for d, j in pairs if j == i][:count]) for i in range(len(rows))]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    sides=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6)),
    top=st.sampled_from([0.01, 0.2, 0.5, 0.99, 1.0]),
    scope=st.sampled_from(["image", "batch"]),
    squared=st.booleans(),
)
def test_the_distance_is_that_of_the_formula(
    seed: int, sides: tuple[int, int, int, int], top: float, scope: Any, squared: bool
) -> None:
    torch.manual_seed(seed)
    batch, classes, width, clusters = sides
    features, centres, ood = (torch.randn(n, width, dtype=torch.float64) for n in (batch, classes, clusters))
    tags = torch.rand(batch, classes) < 0.5
    pool = clusters * (batch if scope == "batch" else 1)
    count = max(math.floor(pool * round(top * 100) / 100), 1)
    expected = by_hand(features, tags, centres, ood, count, scope, 1 + squared)
    loss = ood_distance(features, tags, centres, ood, top=top, scope=scope, squared=squared, reduction="none")
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    for reduction in ("mean", "sum"):
        whole = ood_distance(features, tags, centres, ood, top=top, scope=scope, squared=squared, reduction=reduction)
        torch.testing.assert_close(whole, getattr(loss, reduction)())


@pytest.mark.parametrize(("clusters", "top", "count"), [(10, 0.2, 2), (100, 0.29, 29), (50, 0.2, 10), (3, 0.2, 1)])
def test_the_number_of_centres_is_rounded_down_to_at_least_one(clusters: int, top: float, count: int) -> None:
    ood = torch.arange(1.0, clusters + 1)[:, None]
    loss = ood_distance(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), ood, top=top)
    assert loss == -sum(range(1, count + 1))


def test_the_gradient_pulls_to_the_own_class_and_pushes_off_from_the_nearest_cluster_only() -> None:
    features = torch.tensor([[0.0, 0.0]], requires_grad=True)
    centres, ood = torch.tensor([[0.0, 7.0], [5.0, 5.0]]), torch.tensor([[3.0, 4.0], [60.0, 0.0]])
    tags = torch.tensor([[1, 0]])
    ood_distance(features, tags, centres, ood, top=0.5).backward()
    torch.testing.assert_close(features.grad, torch.tensor([[0.6, -1 + 0.8]]))
    moved = ood_distance(features, tags, centres, ood + torch.tensor([[0.0, 0.0], [9.0, 30.0]]), top=0.5)
    torch.testing.assert_close(moved, torch.tensor(7.0 - 5.0), rtol=0, atol=0)


def test_among_a_batch_an_image_far_from_every_cluster_is_not_pushed() -> None:
    features = torch.tensor([[0.0], [100.0]], requires_grad=True)
    ood = torch.tensor([[1.0], [-2.0]])
    loss = ood_distance(features, torch.zeros(2, 1), torch.zeros(1, 1), ood, top=0.5, scope="batch")
    loss.backward()
    assert loss == -(1 + 2) / (2 * 2)
    assert features.grad is not None
    assert features.grad[1] == 0
    one_each = ood_distance(features, torch.zeros(2, 1), torch.zeros(1, 1), ood, top=0.5)
    assert one_each == -(1 + 99) / 2


def test_for_a_single_image_the_two_scopes_differ_by_the_number_of_clusters() -> None:
    features, centres, ood = torch.randn(1, 6), torch.randn(3, 6), torch.randn(10, 6)
    tags = torch.tensor([[1, 0, 1]])
    image, batch = (ood_distance(features, tags, centres, ood, scope=scope) for scope in ("image", "batch"))
    torch.testing.assert_close(batch, image / 10)


def test_the_order_of_the_clusters_does_not_matter() -> None:
    features, centres, ood = torch.randn(3, 6), torch.randn(2, 6), torch.randn(10, 6)
    tags = torch.ones(3, 2)
    loss = ood_distance(features, tags, centres, ood)
    torch.testing.assert_close(ood_distance(features, tags, centres, ood[torch.randperm(10)]), loss)


def test_no_gradient_flows_into_the_centres() -> None:
    features, centres, ood = (torch.randn(n, 3, requires_grad=True) for n in (2, 2, 5))
    ood_distance(features, torch.ones(2, 2), centres, ood).backward()
    assert features.grad is not None
    assert centres.grad is None
    assert ood.grad is None


@pytest.mark.parametrize("squared", [False, True])
def test_on_a_centre_the_gradient_is_zero(squared: bool) -> None:
    features = torch.ones(1, 3, requires_grad=True)
    loss = ood_distance(features, torch.ones(1, 1), torch.ones(1, 3), torch.ones(2, 3), squared=squared)
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    assert loss == 0
    assert (gradient == 0).all()
    (second,) = torch.autograd.grad(gradient.sum(), features)
    # One class pulls, one cluster pushes: as parabolas they cancel, as cones they have no curvature at the tip.
    assert (second == 0).all()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e25])
def test_distances_whose_squares_no_float32_holds_are_right(size: float) -> None:
    features = torch.tensor([[3.0, 4.0]]) * size
    features.requires_grad_()
    loss = ood_distance(features, torch.ones(1, 1), torch.zeros(1, 2), torch.zeros(1, 2) + features.detach())
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(5 * size), rtol=1e-2 if size < 1e-38 else 1e-6, atol=0)
    torch.testing.assert_close(features.grad, torch.tensor([[0.6, 0.8]]), rtol=1e-2, atol=0)


# The module


def data_for_clusters(seed: int = 0, images: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(images, 6), torch.rand(images, 3) < 0.5, torch.randn(images, 6)


def fitted(**options: Any) -> OODClusters:
    return OODClusters.from_features(*data_for_clusters(), 4, generator=seeded(0), **options)


def test_a_module_from_features_holds_their_centres() -> None:
    features, tags, ood_features = data_for_clusters()
    module = fitted(top=0.5, scope="batch", reduction="sum")
    assert torch.equal(module.centres, class_centres(features, tags))
    assert torch.equal(module.ood, ood_centres(ood_features, 4, generator=seeded(0)))
    assert (module.top, module.scope, module.reduction) == (0.5, "batch", "sum")
    assert len(OODClusters.from_features(features, tags, torch.randn(60, 6)).ood) == 50


def test_the_centres_are_saved_moved_and_copied_with_the_module() -> None:
    features, tags, _ = data_for_clusters(1)
    module, other = fitted(), OODClusters(torch.zeros(3, 6), torch.zeros(4, 6))
    expected = module(features, tags)
    assert set(module.state_dict()) == {"centres", "ood"}
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(features, tags), expected)
    twin = copy.deepcopy(module)
    module.to(torch.float64).to("meta")
    assert module.centres.dtype == module.ood.dtype == torch.float64
    assert module.centres.is_meta
    assert module.ood.is_meta
    assert torch.equal(twin(features, tags), expected)
    # Wider centres do not make the loss of float32 features wider.
    assert twin.double()(features, tags).dtype == torch.float32


def test_refitting_computes_both_anew_in_place() -> None:
    module = fitted()
    places = module.centres.data_ptr(), module.ood.data_ptr()
    fresh = data_for_clusters(2, images=30)
    module.refit(*fresh, generator=seeded(7))
    expected = OODClusters.from_features(*fresh, 4, generator=seeded(7))
    assert torch.equal(module.centres, expected.centres)
    assert torch.equal(module.ood, expected.ood)
    assert (module.centres.data_ptr(), module.ood.data_ptr()) == places


def test_errors_of_the_features_name_the_argument() -> None:
    features, tags, ood_features = data_for_clusters()
    for broken, message in (
        (ood_features * torch.nan, "ood_features: expected finite values"),
        (ood_features[:, :1], r"ood_features: expected \[.*, 6\] to go with features .*, got"),
        (ood_features[:3], "ood_features: expected at least 4 distinct rows for 4 clusters, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            OODClusters.from_features(features, tags, broken, 4)
    half = fitted().half()
    with pytest.raises(ValueError, match="features: expected finite values"):
        half.refit(features + 1e6, tags, ood_features)


def test_a_module_made_in_inference_mode_can_be_refitted_and_trained_with() -> None:
    with torch.inference_mode():
        module = OODClusters.from_features(*data_for_clusters(), 4)
    module.refit(*data_for_clusters(2))
    features = torch.randn(2, 6, requires_grad=True)
    module(features, torch.ones(2, 3)).backward()
    assert features.grad is not None


def test_refitting_leaves_the_tensors_of_the_caller_alone() -> None:
    centres, ood = torch.nn.Parameter(torch.zeros(3, 6)), torch.zeros(4, 6)
    module = OODClusters(centres, ood)
    module.refit(*data_for_clusters())
    assert (centres == 0).all()
    assert (ood == 0).all()
    assert not list(module.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t, o: (f[:, :5], t, o), r"features: expected \[N, 6\], got \[20, 5\]"),
        (lambda f, t, o: (f, t[:, :1], o), r"tags: expected \[20, 3\] to go with features \[20, 6\], got \[20, 1\]"),
        (lambda f, t, o: (f, t, o[:, :1]), r"ood_features: expected \[N, 6\], got \[20, 1\]"),
        (lambda f, t, o: (f, t, o[:3]), "ood_features: expected at least 4 distinct rows for 4 clusters, got 3"),
    ],
)
def test_refitting_with_other_shapes_is_refused_and_changes_nothing(change: Callable[..., Any], message: str) -> None:
    module = fitted()
    with pytest.raises(ValueError, match=message):
        module.refit(*change(*data_for_clusters(2)))
    assert torch.equal(module.centres, fitted().centres)
    assert torch.equal(module.ood, fitted().ood)


# Classification


def test_the_classification_loss_and_its_gradient_are_the_golden_ones(golden: Any) -> None:
    arrays = golden("losses/wood_lcls")
    both = arrays["x"].requires_grad_()
    loss = ood_classification(both[:2], arrays["labels"], both[2:])
    torch.testing.assert_close(loss, arrays["loss"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, both)[0], arrays["grad"], rtol=1e-9, atol=1e-12)


def test_each_batch_counts_by_its_own_mean() -> None:
    logits, tags, ood_logits = torch.randn(3, 4), torch.rand(3, 4) < 0.5, torch.randn(7, 4)
    inside = F.binary_cross_entropy_with_logits(logits, tags.float())
    outside = F.binary_cross_entropy_with_logits(ood_logits, torch.zeros(7, 4))
    torch.testing.assert_close(ood_classification(logits, tags, ood_logits), inside + outside)
    torch.testing.assert_close(ood_classification(logits, tags, ood_logits, ood_weight=0.25), inside + outside / 4)
    torch.testing.assert_close(ood_classification(logits, tags, ood_logits[:0]), inside)
    torch.testing.assert_close(ood_classification(logits[:0], tags[:0], ood_logits), outside)


def test_two_empty_batches_give_a_zero_on_the_graph() -> None:
    logits, ood_logits = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    loss = ood_classification(logits, torch.zeros(0, 3), ood_logits)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert ood_logits.grad is not None


@pytest.mark.parametrize("largest", [1e4, torch.finfo(torch.float32).max])
def test_the_largest_logits_keep_the_classification_finite(largest: float) -> None:
    logits = torch.tensor([[largest, -largest], [-largest, largest]], requires_grad=True)
    loss = ood_classification(logits, torch.tensor([[1, 1], [0, 0]]), logits)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_classification_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, tags = torch.randn(2, 3).to(dtype), torch.eye(2, 3)
    expected = ood_classification(logits.float(), tags, logits.float())
    with torch.autocast("cpu", dtype=dtype):
        loss = ood_classification(logits, tags, logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_the_classification_compiles_vectorises_and_has_a_second_derivative() -> None:
    logits, tags = torch.randn(3, 2, 4, dtype=torch.float64), torch.eye(2, 4)
    each = torch.stack([ood_classification(x, tags, x * 2) for x in logits])
    torch.testing.assert_close(torch.func.vmap(lambda x: ood_classification(x, tags, x * 2))(logits), each)
    torch.compiler.reset()
    compiled = torch.compile(ood_classification, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits[0], tags, logits[0] * 2), each[0])
    one = logits[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ood_classification(x, tags, x * 2), one)
    assert torch.autograd.gradgradcheck(lambda x: ood_classification(x, tags, x * 2), one)


# Collection


@given(
    rows=st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.625, 1.0])] * 3), max_size=12),
    threshold=st.sampled_from([0, 0.25, 0.5, 0.9, 1]),
)
def test_candidates_are_pruned_and_ranked(rows: list[tuple[float, ...]], threshold: float) -> None:
    probabilities = torch.tensor(rows).reshape(-1, 3)
    expected = [
        sorted((i for i, row in enumerate(rows) if row[c] >= threshold), key=lambda i, c=c: (-rows[i][c], i))
        for c in range(3)
    ]
    ranked = rank_hard_ood(probabilities, threshold=threshold)
    assert [indices.tolist() for indices in ranked] == expected
    assert all(indices.dtype == torch.int64 for indices in ranked)
    alone = rank_hard_ood(probabilities[:, 1], threshold=threshold)
    assert isinstance(alone, Tensor)
    assert alone.tolist() == expected[1]


@pytest.mark.parametrize(("images", "rate", "looks"), [(100, 0.2, 125), (7, 0, 7), (0, 0.5, 0), (3, 0.75, 12)])
def test_the_cost_of_annotation_is_the_number_of_looks(images: int, rate: float, looks: float) -> None:
    assert annotation_cost(images, rate) == pytest.approx(looks)


# Errors

X = torch.full((2, 4), 0.5)
TAGS = torch.eye(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: class_centres(X.long(), TAGS), TypeError, "features: expected a floating-point tensor"),
        (lambda: class_centres(X[:, :0], TAGS), ValueError, r"features: expected \[N, D\] with D of at least 1, got"),
        (lambda: ood_centres(X.to("meta"), 1), ValueError, "features: expected a tensor with values, got one on the"),
        (lambda: rank_hard_ood(X.to("meta")), ValueError, "probabilities: expected a tensor with values"),
        (lambda: ood_classification(X, X > 0, X, ood_weight=1e300), ValueError, "ood_weight: expected .* below 1e"),
        (
            lambda: ood_distance(X, TAGS, torch.zeros(5, 4), X),
            ValueError,
            r"tags: expected \[2, 5\] to go with features \[2, 4\] and centres \[5, 4\], got \[2, 3\]",
        ),
        (
            lambda: OODClusters.from_features(X, TAGS, torch.zeros(9, 3), 1),
            ValueError,
            r"ood_features: expected \[9, 4\] to go with features \[2, 4\], got \[9, 3\]",
        ),
        (
            lambda: OODClusters.from_features(X, TAGS[:, :0], torch.zeros(9, 4), 1),
            ValueError,
            "tags: expected .* at least one class",
        ),
        (lambda: class_centres(X / 0, TAGS), ValueError, "features: expected finite values"),
        (lambda: class_centres(X, [1]), TypeError, "tags: expected a tensor, got list"),
        (lambda: class_centres(X, TAGS * 1j), TypeError, "tags: expected a tensor of real numbers"),
        (lambda: class_centres(X, TAGS[0]), ValueError, r"tags: expected \[N, C\], got \[3\]"),
        (lambda: class_centres(X, TAGS[:1]), ValueError, r"tags: expected \[2, 3\] to go with features \[2, 4\], got"),
        (lambda: class_centres(X, TAGS / 2), ValueError, "tags: expected 0 or 1, got 0.5"),
        (lambda: class_centres(X, TAGS.to("meta")), ValueError, "tags: expected device cpu, that of features, got me"),
        (lambda: ood_centres(X.long(), 1), TypeError, "features: expected a floating-point tensor"),
        (lambda: ood_centres(X[0], 1), ValueError, r"features: expected \[N, D\] with D of at least 1, got \[4\]"),
        (lambda: ood_centres(X / 0, 1), ValueError, "features: expected finite values"),
        (lambda: ood_centres(X, 2.0), TypeError, "clusters: expected an int, got float"),
        (lambda: ood_centres(X, 0), ValueError, "clusters: expected a finite number of at least 1, got 0"),
        (lambda: ood_centres(X, 1, generator=3), TypeError, "generator: expected a torch.Generator, got int"),
        (lambda: ood_distance(X, TAGS, X, X), ValueError, r"tags: expected \[2, 2\] to go with features \[2, 4\]"),
        (lambda: ood_distance(X, X, X, X), ValueError, r"tags: expected \[2, 2\]"),
        (lambda: ood_distance(X, X[:, :2], X, X), ValueError, "tags: expected 0 or 1, got 0.5"),
        (lambda: ood_distance(X, TAGS, X.long(), X), TypeError, "centres: expected a floating-point tensor"),
        (lambda: ood_distance(X, TAGS, X, X.long()), TypeError, "ood: expected a floating-point tensor"),
        (lambda: ood_distance(X, TAGS, X[0], X), ValueError, r"centres: expected \[C, D\] with D of at least 1, got"),
        (lambda: ood_distance(X, TAGS, X, X[:0]), ValueError, r"ood: expected at least one centre, got \[0, 4\]"),
        (lambda: ood_distance(X, TAGS, X[:0], X), ValueError, r"centres: expected at least one centre, got \[0, 4\]"),
        (lambda: ood_distance(X, TAGS, X, X[:, :3]), ValueError, r"ood: expected \[2, 4\] to go with centres \[2, 4\]"),
        (lambda: ood_distance(X[:, :3], TAGS, X, X), ValueError, r"features: expected \[2, 4\] to go with centres \[2"),
        (lambda: ood_distance(X, TAGS, X / 0, X), ValueError, "centres: expected finite values"),
        (lambda: ood_distance(X, TAGS, X, X / 0), ValueError, "ood: expected finite values"),
        (lambda: ood_distance(X, TAGS, X.to("meta"), X), ValueError, "ood: expected device meta, that of centres"),
        (lambda: ood_distance(X, TAGS[:, :2], X, X, top=0), ValueError, "top: expected .* above 0 and of at most 1"),
        (lambda: ood_distance(X, TAGS[:, :2], X, X, top=20), ValueError, "top: expected .* of at most 1, got 20"),
        (lambda: ood_distance(X, TAGS[:, :2], X, X, top="a"), TypeError, "top: expected a number, got str"),
        (
            lambda: ood_distance(X, TAGS[:, :2], X, X, scope="all"),
            ValueError,
            "scope: expected one of 'image', 'batch'",
        ),
        (lambda: ood_distance(X, TAGS[:, :2], X, X, squared=1), TypeError, "squared: expected a bool, got int"),
        (
            lambda: OODClusters(X, X[:, :2]),
            ValueError,
            r"ood: expected \[2, 4\] to go with centres \[2, 4\], got \[2, 2",
        ),
        (lambda: OODClusters(X, X.tolist()), TypeError, "ood: expected a tensor, got list"),
        (lambda: OODClusters(X, X, top=1.5), ValueError, "top: expected .* of at most 1, got 1.5"),
        (lambda: OODClusters(X, X, scope="all"), ValueError, "scope: expected one of 'image', 'batch', got 'all'"),
        (lambda: ood_classification(X.long(), X, X), TypeError, "logits: expected a floating-point tensor"),
        (lambda: ood_classification(X[0], X, X), ValueError, r"logits: expected \[B, C\] with at least one class, got"),
        (lambda: ood_classification(X[:, :0], X, X), ValueError, r"logits: .* at least one class, got \[2, 0\]"),
        (lambda: ood_classification(X / 0, X, X), ValueError, "logits: expected finite values"),
        (lambda: ood_classification(X, X, X), ValueError, "tags: expected 0 or 1, got 0.5"),
        (
            lambda: ood_classification(X, TAGS, X),
            ValueError,
            r"tags: expected \[2, 4\] to go with logits \[2, 4\], got",
        ),
        (lambda: ood_classification(X, X > 0, X.long()), TypeError, "ood_logits: expected a floating-point tensor"),
        (
            lambda: ood_classification(X, X > 0, X[:, :3]),
            ValueError,
            r"ood_logits: expected \[2, 4\] to go with logits",
        ),
        (lambda: ood_classification(X, X > 0, X[0]), ValueError, "ood_logits: expected .* to go with logits"),
        (lambda: ood_classification(X, X > 0, X / 0), ValueError, "ood_logits: expected finite values"),
        (
            lambda: ood_classification(X, X > 0, X, ood_weight=-1),
            ValueError,
            "ood_weight: expected .* at least 0 and below 1e.*, got -1",
        ),
        (lambda: ood_classification(X, X > 0, X, ood_weight="1"), TypeError, "ood_weight: expected a number, got str"),
        (lambda: rank_hard_ood(X.long()), TypeError, "probabilities: expected a floating-point tensor"),
        (lambda: rank_hard_ood(X[None]), ValueError, r"probabilities: expected \[N\] or \[N, C\], got \[1, 2, 4\]"),
        (lambda: rank_hard_ood(X * 3), ValueError, "probabilities: expected values from 0 to 1"),
        (lambda: rank_hard_ood(X * torch.nan), ValueError, "probabilities: expected values from 0 to 1"),
        (lambda: rank_hard_ood(X, threshold=1.1), ValueError, "threshold: expected .* of at most 1, got 1.1"),
        (lambda: rank_hard_ood(X, threshold=None), TypeError, "threshold: expected a number, got NoneType"),
        (lambda: annotation_cost(2.5, 0.2), TypeError, "images: expected an int, got float"),
        (lambda: annotation_cost(-1, 0.2), ValueError, "images: expected .* of at least 0, got -1"),
        (lambda: annotation_cost(3, 1), ValueError, "positive_rate: expected .* below 1, got 1"),
        (lambda: annotation_cost(3, "0"), TypeError, "positive_rate: expected a number, got str"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
