"""Subsets with pixel labels: what every draw keeps, and what holds on average."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segattr.lrp.subset import labelled_subset

# Images of each class among the 1464 of PASCAL VOC 2012's segmentation training set, roughly: one class is common.
COMMON = 14
IMAGES = torch.tensor([88, 65, 105, 78, 87, 78, 128, 131, 148, 64, 82, 121, 68, 81, 442, 82, 63, 93, 83, 84])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voc_like(images: int = 1464) -> Tensor:
    """A class in every image, and a second one, often the common one, in some."""
    source = seeded(0)
    frequency = IMAGES.double()
    tags = torch.zeros(images, len(frequency), dtype=torch.int64)
    tags[torch.arange(images), torch.multinomial(frequency, images, replacement=True, generator=source)] = 1
    frequency[COMMON] *= 3
    second = torch.rand(images, generator=source) < 0.45
    tags[second, torch.multinomial(frequency, int(second.sum()), replacement=True, generator=source)] = 1
    return tags


def average_share(tags: Tensor) -> Tensor:
    counts = tags.sum(0).double()
    return (1 / len(counts) + counts / counts.sum()) / 2


@st.composite
def tagged_images(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Images of 1 to 5 classes, some of which may not occur, and how many to draw."""
    classes = draw(st.integers(1, 5))
    images = st.lists(st.booleans(), min_size=classes, max_size=classes).filter(any)
    tags = torch.tensor(draw(st.lists(images, min_size=1, max_size=40)))
    return tags, draw(st.integers(1, len(tags)))


either_kind_of_shares = st.sampled_from([0, 500])


@given(tagged_images(), either_kind_of_shares, st.integers(0, 99))
def test_the_subset_is_of_the_size_asked_for_and_repeats_no_image(
    case: tuple[Tensor, int], uniform_below: int, seed: int
) -> None:
    tags, count = case
    subset = labelled_subset(tags, count, uniform_below=uniform_below, generator=seeded(seed))
    assert subset.dtype == torch.int64
    assert subset.shape == (count,)
    assert len(subset.unique()) == count
    assert subset.min() >= 0
    assert subset.max() < len(tags)


@given(tagged_images(), either_kind_of_shares, st.integers(0, 99))
def test_every_class_that_occurs_is_drawn_once_there_is_an_image_for_each(
    case: tuple[Tensor, int], uniform_below: int, seed: int
) -> None:
    tags, count = case
    subset = labelled_subset(tags, count, uniform_below=uniform_below, generator=seeded(seed))
    occurring = tags.any(0)
    assert tags[subset].any(0).sum() >= min(count, int(occurring.sum()))


@given(tagged_images(), st.integers(0, 99))
def test_with_uniform_shares_every_class_gets_its_part_or_all_that_there_is(
    case: tuple[Tensor, int], seed: int
) -> None:
    tags, count = case
    drawn = tags[labelled_subset(tags, count, generator=seeded(seed))].sum(0)
    part = count // int(tags.any(0).sum())
    assert (drawn >= tags.sum(0).clamp(max=part)).all()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data(), st.integers(0, 99))
def test_images_of_one_class_each_are_spread_as_evenly_as_they_can_be(
    classes: list[int], data: st.DataObject, seed: int
) -> None:
    tags = torch.eye(5)[torch.tensor(classes)]
    count = data.draw(st.integers(1, len(tags)))
    drawn, total = tags[labelled_subset(tags, count, generator=seeded(seed))].sum(0), tags.sum(0)
    unfinished = drawn[drawn < total]
    if len(unfinished):
        assert drawn.max() <= unfinished.min() + 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [20, 100])
def test_few_images_of_many_classes_are_spread_evenly_although_a_class_is_common(count: int, seed: int) -> None:
    tags = voc_like()
    drawn = tags[labelled_subset(tags, count, generator=seeded(seed))].sum(0)
    assert drawn.min() >= count // 20
    assert drawn.max() - drawn.min() <= 2
    at_random = tags[torch.randperm(len(tags), generator=seeded(seed))[:count]].sum(0)
    assert at_random.max() - at_random.min() >= 3 * (drawn.max() - drawn.min())


@pytest.mark.parametrize("seed", range(5))
def test_from_500_images_on_shares_are_the_average_of_uniform_and_those_of_the_set(seed: int) -> None:
    tags = voc_like()
    drawn = tags[labelled_subset(tags, 500, generator=seeded(seed))].sum(0).double()
    expected = average_share(tags)
    error = (drawn / drawn.sum() - expected).abs()
    assert error.max() < 3 / 500  # about 700 tags: a handful of images of the common class, one or two of the others
    of_the_set = tags.sum(0) / tags.sum()
    for other in (of_the_set, torch.full((20,), 1 / 20)):  # what it would be without the average
        assert (drawn / drawn.sum() - other).abs().max() > 0.05


def test_the_average_begins_at_uniform_below() -> None:
    tags = voc_like()
    uniform = tags[labelled_subset(tags, 499, generator=seeded())].sum(0)
    average = tags[labelled_subset(tags, 500, generator=seeded())].sum(0)
    assert average[COMMON] > 2 * uniform[COMMON]
    later = labelled_subset(tags, 500, uniform_below=501, generator=seeded())
    assert torch.equal(later[:499], labelled_subset(tags, 499, generator=seeded()))


def test_images_with_several_classes_are_drawn_about_as_often_as_they_occur() -> None:
    tags = voc_like()
    per_image = tags.sum().item() / len(tags)
    for count in (100, 500):
        drawn = torch.stack([tags[labelled_subset(tags, count, generator=seeded(s))].sum() for s in range(5)])
        assert drawn.double().mean() / count == pytest.approx(per_image, rel=0.1)


def test_a_common_class_does_not_come_along_with_rare_ones() -> None:
    # Each class has 10 images of its own, and 90 together with the first one.
    alone = torch.eye(5, dtype=torch.int64).repeat_interleave(10, 0)
    together = torch.eye(5, dtype=torch.int64)[1:].repeat_interleave(90, 0)
    together[:, 0] = 1
    tags = torch.cat([alone, together])
    for seed in range(5):
        drawn = tags[labelled_subset(tags, 25, generator=seeded(seed))].sum(0)
        assert drawn.max() - drawn.min() <= 1


def test_images_that_serve_equally_well_are_equally_likely() -> None:
    tags = torch.eye(3)[torch.tensor([0] * 4 + [1] * 8 + [2] * 2)]
    draws = 3000
    subsets = torch.stack([labelled_subset(tags, 6, generator=seeded(s)) for s in range(draws)])
    rate = torch.bincount(subsets.flatten(), minlength=len(tags)).double() / draws
    expected = torch.tensor([2 / 4] * 4 + [2 / 8] * 8 + [1.0] * 2, dtype=torch.float64)
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((rate - expected).abs() <= 4 * error).all()
    # Which two images of a class are together is random too.
    pairs = {tuple(sorted(row[row < 4].tolist())) for row in subsets}
    assert len(pairs) == 6


def test_classes_that_are_equally_far_behind_are_equally_likely() -> None:
    tags = torch.eye(4).repeat(5, 1)
    draws = 3000
    first = torch.stack([tags[labelled_subset(tags, 1, generator=seeded(s))[0]] for s in range(draws)]).mean(0)
    assert ((first - 0.25).abs() <= 4 * (0.25 * 0.75 / draws) ** 0.5).all()


def test_a_generator_makes_subsets_repeatable_and_leaves_the_global_state_alone() -> None:
    tags = voc_like()
    state = torch.random.get_rng_state()
    first, again, other = (labelled_subset(tags, 100, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first.sort().values, other.sort().values)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_a_generator_torchs_seed_decides() -> None:
    tags = voc_like()
    torch.manual_seed(3)
    first, second = labelled_subset(tags, 50), labelled_subset(tags, 50)
    torch.manual_seed(3)
    assert torch.equal(labelled_subset(tags, 50), first)
    assert not torch.equal(second, first)


def test_smaller_subsets_are_the_beginnings_of_larger_ones() -> None:
    tags = voc_like()
    subsets = [labelled_subset(tags, count, generator=seeded()) for count in (20, 100, 499)]
    assert torch.equal(subsets[0], subsets[1][:20])
    assert torch.equal(subsets[1], subsets[2][:100])
    larger = [labelled_subset(tags, count, generator=seeded()) for count in (500, 1464)]
    assert torch.equal(larger[0], larger[1][:500])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_the_type_of_the_tags_and_classes_that_do_not_occur_do_not_matter(dtype: torch.dtype) -> None:
    tags = voc_like(300)
    expected = labelled_subset(tags, 40, generator=seeded())
    assert torch.equal(labelled_subset(tags.to(dtype), 40, generator=seeded()), expected)
    padded = torch.cat([torch.zeros(300, 2), tags, torch.zeros(300, 1)], 1).to(dtype)
    assert torch.equal(labelled_subset(padded, 40, generator=seeded()), expected)


@pytest.mark.parametrize("uniform_below", [0, 500])
def test_all_images_are_drawn_if_asked_for(uniform_below: int) -> None:
    tags = voc_like(200)
    subset = labelled_subset(tags, 200, uniform_below=uniform_below)
    assert subset.sort().values.tolist() == list(range(200))


def test_the_tags_stay_as_they_are() -> None:
    tags = voc_like(100)
    before = tags.clone()
    labelled_subset(tags, 30)
    assert torch.equal(tags, before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tags": [[1, 0]]}, TypeError, "tags: expected a tensor, got list"),
        ({"tags": torch.eye(2, dtype=torch.complex64)}, TypeError, "tags: expected a tensor of real numbers, got"),
        ({"tags": torch.ones(4)}, ValueError, r"tags: expected \[N, C\] with at least one class, got \[4\]"),
        ({"tags": torch.ones(4, 0)}, ValueError, r"tags: expected \[N, C\] with at least one class, got \[4, 0\]"),
        ({"tags": torch.tensor([[1.0, 0.5]] * 4)}, ValueError, "tags: expected 0 or 1, got 0.5"),
        ({"tags": torch.tensor([[1, 255]] * 4)}, ValueError, "tags: expected 0 or 1, got 255"),
        ({"tags": torch.full((4, 1), torch.nan)}, ValueError, "tags: expected 0 or 1, got nan"),
        (
            {"tags": torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0]])},
            ValueError,
            "tags: expected at least one class in each image, got none in image 2",
        ),
        ({"tags": torch.ones(0, 3)}, ValueError, "count: expected 1 to 0, the number of images, got 2"),
        ({"count": 0}, ValueError, "count: expected 1 to 4, the number of images, got 0"),
        ({"count": 5}, ValueError, "count: expected 1 to 4, the number of images, got 5"),
        ({"count": 2.0}, TypeError, "count: expected an int, got float"),
        ({"uniform_below": -1}, ValueError, "uniform_below: expected a finite number of at least 0, got -1"),
        ({"uniform_below": 1.5}, TypeError, "uniform_below: expected an int, got float"),
        ({"generator": 7}, TypeError, r"generator: expected a torch\.Generator, got int"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change: dict[str, Any], error: type, message: str) -> None:
    arguments = {"tags": torch.eye(2).repeat(2, 1), "count": 2, **change}
    with pytest.raises(error, match=f"^{message}"):
        labelled_subset(**arguments)
