"""The batches of a training: every image once an epoch, the same whatever the number of processes and workers."""

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from data.sample import Batch, Sample, Stacked
from data.stream import Key, Prepared, Stream
from hypothesis import given
from hypothesis import strategies as st

CLASSES = ("background", "thing")
FEW = st.integers(1, 4)


def images(count: int) -> Stacked:
    """Images that say which one they are."""
    image = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)
    return Stacked(CLASSES, image, torch.zeros(count, 2, 2, dtype=torch.int64), index=torch.arange(count))


def shaken(sample: Sample, rng: np.random.Generator) -> Sample:
    return sample | {"noise": torch.from_numpy(rng.standard_normal(3))}


def equal(one: list[list[Batch]], other: list[list[Batch]]) -> bool:
    """Equality bit by bit of the batches of some steps."""
    if [len(parts) for parts in one] != [len(parts) for parts in other]:
        return False
    pairs = [(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def epochs(stream: Stream, count: int) -> list[list[int]]:
    """The images of each epoch, in their order."""
    found: list[list[int]] = [[] for _ in range(count)]
    for step in range(-(-count * len(stream.data) // stream.batch_size)):
        for epoch, index in stream.keys(step):
            if epoch < count:
                found[epoch].append(index)
    return found


@given(count=st.integers(1, 12), batch_size=st.integers(1, 15), seed=st.integers(0, 2**31))
def test_every_image_comes_once_an_epoch(count: int, batch_size: int, seed: int) -> None:
    for epoch in epochs(Stream(images(count), batch_size=batch_size, seed=seed), 3):
        assert sorted(epoch) == list(range(count))


def test_the_order_is_another_one_in_each_epoch_and_for_each_seed() -> None:
    orders = [order for seed in range(3) for order in epochs(Stream(images(20), batch_size=4, seed=seed), 3)]
    assert len({tuple(order) for order in orders}) == 9


def test_the_order_is_random() -> None:
    """Each image is first in its share of the epochs: 5 standard deviations are 0.07."""
    first = Counter(order[0] for order in epochs(Stream(images(4), batch_size=4), 1000))
    assert all(abs(first[index] / 1000 - 1 / 4) < 0.07 for index in range(4))


def test_same_seed_same_order() -> None:
    assert epochs(Stream(images(9), batch_size=4, seed=5), 3) == epochs(Stream(images(9), batch_size=4, seed=5), 3)


@given(
    count=st.integers(1, 12), share=FEW, processes=FEW, accumulate=FEW, step=st.integers(0, 5), seed=st.integers(0, 99)
)
def test_processes_and_accumulated_batches_share_a_step_without_overlap(
    count: int, share: int, processes: int, accumulate: int, step: int, seed: int
) -> None:
    batch_size = share * processes * accumulate
    keys = [index for _, index in Stream(images(count), batch_size=batch_size, seed=seed).keys(step)]
    shared: list[int] = []
    for rank in range(processes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(processes))
            stream = Stream(images(count), None, batch_size, seed, accumulate)
            [parts] = stream.steps(step, step + 1)
        assert [len(part["index"]) for part in parts] == [share] * accumulate
        shared += [int(index) for part in parts for index in part["index"]]
    assert Counter(shared) == Counter(keys)


def test_an_image_is_augmented_in_the_same_way_whoever_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven images and batches of four: the third one holds images of two epochs, and all images come twice."""

    def noise(rank: int, processes: int, accumulate: int) -> Iterator[tuple[int, int, list[float]]]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        stream = Stream(images(7), shaken, 4, 0, accumulate)
        for step, parts in enumerate(stream.steps(0, 4)):
            for part in parts:
                for index, values in zip(part["index"], part["noise"], strict=True):
                    yield step, int(index), values.tolist()

    alone = sorted(noise(0, 1, 1))
    assert len({tuple(values) for _, _, values in alone}) == 16, "and in another way each time"
    assert sorted(noise(0, 1, 4)) == alone
    assert sorted([*noise(0, 2, 1), *noise(1, 2, 1)]) == alone
    assert sorted([*noise(0, 2, 2), *noise(1, 2, 2)]) == alone


@given(start=st.integers(0, 8), count=st.integers(1, 9), accumulate=st.sampled_from([1, 2, 4]))
def test_a_stream_that_starts_in_the_middle_goes_on_as_one_from_the_beginning(
    start: int, count: int, accumulate: int
) -> None:
    stream = Stream(images(count), shaken, 4, 0, accumulate)
    whole = list(stream.steps(0, 8))
    assert len(whole) == 8
    assert equal(list(stream.steps(start, 8)), whole[start:])


def test_worker_processes_read_the_same_batches() -> None:
    expected = list(Stream(images(7), shaken, 4, accumulate=2).steps(1, 5))
    for workers in (1, 2):
        assert equal(list(Stream(images(7), shaken, 4, accumulate=2, workers=workers).steps(1, 5)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_numbers_of_the_training_are_not_touched(workers: int) -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    list(Stream(images(7), shaken, 4, workers=workers).steps(0, 3))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == before


def test_samples_are_augmented_before_they_are_completed() -> None:
    def cropped(sample: Sample, rng: np.random.Generator) -> Sample:
        return {name: value[..., :1] if name in ("image", "labels") else value for name, value in sample.items()}

    labels = torch.tensor([[[0, 1], [0, 1]]])
    data = Stacked(CLASSES, torch.zeros(1, 3, 2, 2), labels)
    assert Prepared(data)[0, 0]["tags"].tolist() == [1, 1]
    sample = Prepared(data, cropped)[0, 0]
    assert sample["tags"].tolist() == [1, 0]
    assert sample["sizes"].tolist() == [1, 0]
    assert sample["valid"].shape == (2, 1)


def test_augmentation_depends_on_epoch_index_and_seed_alone() -> None:
    def noise(seed: int, key: Key) -> tuple[float, ...]:
        return tuple(Prepared(images(3), shaken, seed)[key]["noise"].tolist())

    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = [noise(seed, key) for seed in (0, 1) for key in keys]
    assert len(set(drawn)) == 8
    assert [noise(seed, key) for seed in (0, 1) for key in keys] == drawn


def test_order_and_augmentation_have_random_numbers_of_their_own() -> None:
    """Were the generators of the two the same for some epoch and image, order and augmentation would depend."""
    first: list[list[int]] = []

    def spy(sample: Sample, rng: np.random.Generator) -> Sample:
        first.append(rng.permutation(20).tolist())
        return sample

    stream = Stream(images(20), spy, 20)
    list(stream.steps(0, 3))
    orders = epochs(stream, 3)
    assert len(first) == 60
    assert not [order for order in orders if order in first]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(0, 1), (-4, 1), (6, 4), (2, 4)])
def test_a_batch_size_that_cannot_be_shared_is_refused(
    batch_size: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"^batch_size: expected a multiple of {accumulate} .*, got {batch_size}$"):
        Stream(images(3), batch_size=batch_size, accumulate=accumulate)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=rf"^batch_size: expected a multiple of {3 * accumulate} "):
        Stream(images(3), batch_size=4, accumulate=accumulate)


def test_data_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data: expected at least one image, got none$"):
        Stream(images(0))
