"""Seeded region growing, against a walk from pixel to pixel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segattr.refine.grow_seeds import grow_seeds

Golden = Callable[[str], dict[str, Tensor]]


def grow_by_walking(seeds: Tensor, probabilities: Tensor, thresholds: list[float]) -> Tensor:
    """Multi-hot seeds of one image: every seed visits its neighbours, and they theirs."""
    grown, (classes, height, width) = seeds.clone(), probabilities.shape
    queue = [tuple(place) for place in seeds.nonzero().tolist()]
    for c, i, j in queue:
        for y in range(max(i - 1, 0), min(i + 2, height)):
            for x in range(max(j - 1, 0), min(j + 2, width)):
                scores = probabilities[:, y, x].tolist()
                winner = min(k for k in range(classes) if scores[k] == max(scores))
                if winner == c and scores[c] > thresholds[c] and not grown[:, y, x].any():
                    grown[c, y, x] = 1
                    queue.append((c, y, x))
    return grown


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return labels.unsqueeze(1) == torch.arange(classes).view(-1, 1, 1)


def example() -> tuple[Tensor, Tensor]:
    return torch.full((2, 4, 5), 255), torch.rand(2, 3, 4, 5).softmax(1)


def test_golden_case(golden: Golden) -> None:
    case = golden("attr/refine")
    foreground, background = case["in/dsrg/theta"][1].item(), case["in/dsrg/theta"][0].item()
    grown = grow_seeds(
        case["in/dsrg/seed"][None],
        case["in/dsrg/probs"][None],
        foreground=foreground,
        background=background,
        ignore_index=-1,
    )
    assert torch.equal(grown[0], case["out/dsrg/grown"])


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(1, 9), st.integers(1, 9)),
    foreground=st.sampled_from([0.0, 0.4, 0.5]),
    background=st.sampled_from([0.3, 0.6]),
    share=st.sampled_from([0.0, 0.05, 0.3]),
    several=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_equals_a_walk_from_pixel_to_pixel(
    shape: tuple[int, int, int, int], foreground: float, background: float, share: float, several: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    # In tenths: many probabilities are equal, or lie on a threshold.
    probabilities = ((2 * torch.randn(shape, dtype=torch.float64)).softmax(1) * 10).round() / 10
    seeds = torch.rand(shape) < share
    if not several:
        seeds &= seeds.cumsum(1) == 1
    thresholds = [background] + [foreground] * (shape[1] - 1)
    expected = torch.stack([grow_by_walking(s, p, thresholds) for s, p in zip(seeds, probabilities, strict=True)])
    grown = grow_seeds(seeds, probabilities, foreground=foreground, background=background)
    assert grown.dtype == torch.bool
    assert torch.equal(grown, expected)
    if not several:
        labels = torch.where(seeds.any(1), seeds.int().argmax(1), 255)
        of_labels = grow_seeds(labels, probabilities, foreground=foreground, background=background)
        assert of_labels.dtype == torch.int64
        assert torch.equal(of_labels, torch.where(expected.any(1), expected.int().argmax(1), 255))


def test_grows_through_a_corridor_as_long_as_the_image_in_one_call() -> None:
    corridor = torch.zeros(41, 40, dtype=torch.bool)
    corridor[::2] = True
    corridor[1::4, -1] = corridor[3::4, 0] = True
    foreground = corridor.float()[None, None]
    seeds = torch.full((1, 41, 40), 255)
    seeds[0, 0, 0] = 1
    grown = grow_seeds(seeds, torch.cat([1 - foreground, foreground], 1))
    assert torch.equal(grown[0] == 1, corridor)
    assert not (grown == 0).any()


def test_growing_again_changes_nothing() -> None:
    _, probabilities = example()
    probabilities = (8 * torch.randn(2, 3, 12, 12)).softmax(1)
    seeds = torch.where(torch.rand(2, 12, 12) < 0.1, torch.randint(0, 3, (2, 12, 12)), 255)
    grown = grow_seeds(seeds, probabilities)
    assert (grown != seeds).any()
    assert torch.equal(grow_seeds(grown, probabilities), grown)


def test_seeds_keep_their_label_whatever_the_probabilities_say() -> None:
    probabilities = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    seeds = torch.tensor([[[0, 2], [1, 255]]])
    assert grow_seeds(seeds, probabilities).tolist() == [[[0, 2], [1, 1]]]


def test_diagonal_neighbours_are_connected_images_and_classes_are_not() -> None:
    probabilities = torch.zeros(2, 3, 3, 3)
    probabilities[:, 1] = torch.eye(3)
    probabilities[:, 2] = torch.eye(3).flip(1) * (1 - torch.eye(3))
    seeds = torch.full((2, 3, 3), 255)
    seeds[1, 0, 0] = 1
    grown = grow_seeds(seeds, probabilities)
    assert (grown[0] == 255).all()
    assert torch.equal(grown[1], torch.where(torch.eye(3) == 1, 1, 255))


def test_background_has_its_own_threshold() -> None:
    background = torch.tensor([0.5, 0.9, 0.995, 0.1, 0.05]).view(1, 1, 1, 5)
    probabilities = torch.cat([background, 1 - background], 1)
    seeds = torch.tensor([[[0, 0, 255, 255, 1]]])
    assert grow_seeds(seeds, probabilities).tolist() == [[[0, 0, 0, 1, 1]]]
    assert grow_seeds(seeds, probabilities, foreground=0.95, background=0.999).tolist() == [[[0, 0, 255, 255, 1]]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
def test_multi_hot_seeds_keep_their_dtype(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([0.1, 0.9]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    seeds = one_hot(torch.tensor([[[255, 1, 255]]]), 2).to(dtype)
    grown = grow_seeds(seeds, probabilities)
    assert grown.dtype == dtype
    assert grown.int().tolist() == [[[[0, 0, 0]], [[1, 1, 1]]]]
    assert seeds.sum() == 1


def test_no_image_no_seed_and_half_precision() -> None:
    labels, probabilities = example()
    assert grow_seeds(labels[:0], probabilities[:0]).shape == (0, 4, 5)
    assert torch.equal(grow_seeds(labels, probabilities), labels)
    assert torch.equal(grow_seeds(labels.int(), probabilities.bfloat16().requires_grad_()), labels)


def test_batch_equals_image_by_image() -> None:
    probabilities = (8 * torch.randn(3, 3, 12, 12)).softmax(1)
    seeds = torch.where(torch.rand(3, 12, 12) < 0.1, torch.randint(0, 3, (3, 12, 12)), 255)
    alone = [grow_seeds(s[None], p[None])[0] for s, p in zip(seeds, probabilities, strict=True)]
    assert torch.equal(grow_seeds(seeds, probabilities), torch.stack(alone))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"probabilities": None}, TypeError, "probabilities: expected a tensor"),
        ({"probabilities": torch.zeros(2, 3, 4, 5).long()}, TypeError, "probabilities: expected a floating-point"),
        ({"probabilities": torch.zeros(2, 1, 4, 5)}, ValueError, "probabilities: .* at least 2 classes"),
        ({"probabilities": torch.zeros(3, 4, 5)}, ValueError, r"probabilities: expected \[B, K, H, W\]"),
        ({"probabilities": torch.zeros(2, 3, 0, 5)}, ValueError, "probabilities: .* one pixel"),
        ({"probabilities": torch.full((2, 3, 4, 5), 2.0)}, ValueError, "probabilities: expected .* from 0 to 1"),
        ({"probabilities": torch.full((2, 3, 4, 5), torch.nan)}, ValueError, "probabilities: .* NaN"),
        ({"seeds": [[1]]}, TypeError, "seeds: expected a tensor"),
        ({"seeds": torch.zeros(2, 4, 5)}, TypeError, "seeds: expected an integer tensor"),
        ({"seeds": torch.zeros(2, 4, 4).long()}, ValueError, r"seeds: expected \[2, 4, 5\]"),
        ({"seeds": torch.full((2, 4, 5), 3)}, ValueError, "seeds: expected classes 0 to 2 or 255"),
        ({"seeds": torch.zeros(2, 2, 4, 5)}, ValueError, r"seeds: expected \[2, 3, 4, 5\]"),
        ({"seeds": torch.full((2, 3, 4, 5), 0.5)}, ValueError, "seeds: expected 0 or 1"),
        ({"seeds": torch.zeros(2, 4, 5, device="meta").long()}, ValueError, "seeds: expected device cpu"),
        ({"foreground": 1.5}, ValueError, "foreground: expected a finite number of at least 0 and of at most 1"),
        ({"background": "0.9"}, TypeError, "background: expected a number"),
        ({"ignore_index": 2.5}, TypeError, "ignore_index: expected an int"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    seeds, probabilities = example()
    with pytest.raises(error, match=message):
        grow_seeds(**{"seeds": seeds, "probabilities": probabilities, **change})


@pytest.mark.gpu
def test_cuda_equals_cpu_and_stays_there() -> None:
    probabilities = (8 * torch.randn(2, 3, 12, 12)).softmax(1)
    seeds = torch.where(torch.rand(2, 12, 12) < 0.1, torch.randint(0, 3, (2, 12, 12)), 255)
    there = grow_seeds(seeds.cuda(), probabilities.cuda())
    assert there.is_cuda
    assert torch.equal(there.cpu(), grow_seeds(seeds, probabilities))
