"""Pseudo-labels, against a decision for each pixel."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segattr.refine.pseudo_labels import pseudo_labels


def decide(scores: dict[int, float], foreground: float, background: float) -> int:
    """The label of a pixel from the scores of the classes that the image has."""
    best = max(scores.values(), default=-float("inf"))
    if best > foreground:
        return 1 + min(c for c, score in scores.items() if score == best)
    return 0 if best <= background else 255


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 4), st.integers(1, 4)),
    thresholds=st.sampled_from([(0.5, 0.25), (0.5, 0.5), (0.0, -0.25), (2.0, -2.0), (-0.5, -1.0)]),
    ragged=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_a_decision_for_each_pixel(
    shape: tuple[int, int, int, int], thresholds: tuple[float, float], ragged: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    foreground, background = thresholds
    maps = torch.randint(-4, 5, shape) / 4  # many are equal, or lie on a threshold
    tags = torch.randint(0, 2, shape[:2])
    if ragged:
        classes = [row.nonzero().flatten().tolist() for row in tags]
        parts = [m[c] for m, c in zip(maps, classes, strict=True)]
        labels: Any = pseudo_labels(parts, classes, foreground=foreground, background=background)
        assert isinstance(labels, list)
    else:
        labels = pseudo_labels(maps, tags, foreground=foreground, background=background)
        assert labels.shape == (shape[0], *shape[2:])
    for image, present, label in zip(maps, tags, labels, strict=True):
        assert label.dtype == torch.int64
        for y in range(shape[2]):
            for x in range(shape[3]):
                scores = {c: image[c, y, x].item() for c in range(shape[1]) if present[c]}
                assert label[y, x] == decide(scores, foreground, background)


def test_absent_classes_are_never_labels_however_strong() -> None:
    maps = torch.tensor([[0.4, 0.1], [99.0, 99.0]]).view(1, 2, 1, 2)
    assert pseudo_labels(maps, torch.tensor([[1, 0]])).tolist() == [[[1, 255]]]


def test_image_without_classes_is_background_even_below_a_negative_threshold() -> None:
    labels = pseudo_labels(torch.rand(1, 2, 3, 3), torch.zeros(1, 2), foreground=-1, background=-2)
    assert not labels.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_score_equal_to_a_threshold_is_below_it(dtype: torch.dtype) -> None:
    maps = torch.tensor([0.3, 0.05], dtype=torch.float32).to(dtype).view(1, 1, 1, 2)
    foreground, background = maps.flatten().tolist()
    one = torch.ones(1, 1)
    assert pseudo_labels(maps, one, foreground=foreground, background=background).tolist() == [[[255, 0]]]
    assert pseudo_labels(maps, one, foreground=foreground, background=foreground).tolist() == [[[0, 0]]]


def test_float32_score_of_the_default_threshold_is_below_it() -> None:
    maps = torch.tensor([0.3, 0.05]).view(1, 1, 1, 2)
    assert pseudo_labels(maps, torch.ones(1, 1)).tolist() == [[[255, 0]]]
    assert pseudo_labels(maps, torch.ones(1, 1), foreground=0.3, background=0.3).tolist() == [[[0, 0]]]


def test_size_interpolates_the_maps_not_the_labels() -> None:
    maps, tags = torch.rand(2, 3, 4, 5), torch.tensor([[1, 0, 1], [1, 1, 1]])
    larger = F.interpolate(maps, (9, 13), mode="bilinear", align_corners=False)
    labels = pseudo_labels(maps, tags, foreground=0.6, background=0.4, size=(9, 13))
    assert isinstance(labels, Tensor)
    assert torch.equal(labels, pseudo_labels(larger, tags, foreground=0.6, background=0.4))
    assert torch.equal(pseudo_labels(maps, tags, size=maps.shape[2:]), pseudo_labels(maps, tags))


def test_lists_of_different_extents_and_classes() -> None:
    maps = [torch.full((2, 3, 4), 0.5), torch.zeros(0, 5, 2), torch.ones(1, 1, 1)]
    maps[0][0, 0] = 0.9
    labels = pseudo_labels(maps, [[19, 4], [], [0]])
    assert [label.shape for label in labels] == [(3, 4), (5, 2), (1, 1)]
    assert labels[0].tolist() == [[20] * 4] * 3
    assert not labels[1].any()
    assert labels[2].item() == 1
    resized = pseudo_labels(maps, [[19, 4], [], [0]], size=(6, 6))
    assert [label.shape for label in resized] == [(6, 6)] * 3


def test_no_images() -> None:
    assert pseudo_labels([], []) == []
    assert pseudo_labels(torch.zeros(0, 3, 4, 5), torch.zeros(0, 3), size=(8, 8)).shape == (0, 8, 8)


def test_maps_are_left_alone_and_labels_have_no_gradient() -> None:
    maps = torch.rand(1, 2, 3, 3, requires_grad=True)
    before = maps.detach().clone()
    labels = pseudo_labels(maps, torch.tensor([[1, 0]]))
    assert isinstance(labels, Tensor)
    assert not labels.requires_grad
    assert torch.equal(maps, before)


MAPS, TAGS = torch.rand(2, 3, 4, 5), torch.ones(2, 3)
LIST = [torch.rand(2, 4, 5), torch.rand(1, 4, 5)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((MAPS.long(), TAGS), TypeError, "maps: expected a floating-point tensor"),
        ((MAPS[0], TAGS), ValueError, r"maps: expected \[B, C, h, w\]"),
        ((MAPS[..., :0], TAGS), ValueError, "maps: .* at least one pixel"),
        ((MAPS / 0, TAGS), ValueError, "maps: expected finite"),
        ((MAPS, [[0], [1]]), TypeError, "tags: expected a tensor, got list"),
        ((MAPS, torch.ones(2, 4)), ValueError, r"tags: expected \[2, 3\] to go with maps"),
        ((MAPS, TAGS * 2), ValueError, "tags: expected 0 or 1"),
        ((MAPS, TAGS.to("meta")), ValueError, "tags: expected device cpu"),
        ((None, TAGS), TypeError, "maps: expected a tensor, or a sequence of them, got NoneType"),
        ((LIST, TAGS), TypeError, "tags: expected the classes of each image"),
        ((LIST, [[0, 1]]), ValueError, "tags: expected the classes of 2 images to go with maps, got 1"),
        ((LIST, [[0, 1], [0, 1]]), ValueError, r"tags\[1\]: expected the classes of 1 maps, got 2"),
        ((LIST, [[0, 1], 0]), TypeError, r"tags\[1\]: expected a sequence of classes, got int"),
        ((LIST, [[0, 1.0], [0]]), TypeError, r"tags\[0\]: expected an int, got float"),
        ((LIST, [[0, -1], [0]]), ValueError, r"tags\[0\]: expected a finite number of at least 0, got -1"),
        (([LIST[0], MAPS], [[0, 1], [0]]), ValueError, r"maps\[1\]: expected \[C, h, w\]"),
        (([LIST[0], None], [[0, 1], [0]]), TypeError, r"maps\[1\]: expected a tensor"),
        ((LIST, [[0, 254], [0]]), ValueError, "ignore_index: expected what is no label of a class, got 255"),
        ((torch.rand(1, 255, 1, 1), torch.ones(1, 255)), ValueError, "ignore_index: .* got 255"),
    ],
)
def test_errors_of_maps_and_tags(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pseudo_labels(*arguments)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"foreground": 0.01}, ValueError, "foreground: expected at least background, 0.05, got 0.01"),
        ({"foreground": torch.tensor(0.3)}, TypeError, "foreground: expected a number"),
        ({"background": float("nan")}, ValueError, "background: expected a finite number"),
        ({"size": 7}, TypeError, "size: expected a height and a width"),
        ({"size": (7,)}, ValueError, "size: expected a height and a width"),
        ({"size": (7, 0)}, ValueError, "size: expected a finite number of at least 1"),
        ({"size": (7, 1.5)}, TypeError, "size: expected an int"),
        ({"ignore_index": 3}, ValueError, "ignore_index: .* got 3"),
        ({"ignore_index": 0}, ValueError, "ignore_index: .* got 0"),
        ({"ignore_index": 2.0}, TypeError, "ignore_index: expected an int"),
    ],
)
def test_errors_of_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pseudo_labels(MAPS, TAGS, **settings)


@pytest.mark.gpu
def test_cuda_equals_cpu_and_stays_there() -> None:
    there = pseudo_labels(MAPS.cuda(), TAGS.cuda(), size=(9, 9))
    assert isinstance(there, Tensor)
    assert there.is_cuda
    assert torch.equal(there.cpu(), pseudo_labels(MAPS, TAGS, size=(9, 9)))
    assert pseudo_labels([m.cuda() for m in LIST], [[0, 1], [2]])[0].is_cuda


def test_thresholds_of_numpy_and_beyond_single_precision() -> None:
    maps, tags = torch.tensor([[[[0.9, 0.3, 0.0]]]]), torch.ones(1, 1)
    expected = torch.tensor([[[1, 255, 0]]])
    assert torch.equal(pseudo_labels(maps, tags, foreground=np.float32(0.5), background=np.float32(0.1)), expected)
    assert torch.equal(pseudo_labels(maps, tags, foreground=1e308, background=0.5), torch.tensor([[[255, 0, 0]]]))
    with pytest.raises(ValueError, match=r"foreground: expected at least background, 0\.6, got 0.3"):
        pseudo_labels(maps, tags, background=0.6)
