"""Samples and batches: what follows from the annotations of an image, and what stays as it was known."""

import itertools
import math

import pytest
import torch
from data.sample import (
    VOID,
    Annotated,
    DataError,
    Images,
    Sample,
    Stacked,
    class_sizes,
    collate,
    complete,
    first,
    object_error,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

CLASSES = ("background", "cat", "dog", "cow")
K = len(CLASSES)


def draw(height: int = 2, width: int = 4, **entries: Tensor) -> Sample:
    return {"image": tv_tensors.Image(torch.rand(3, height, width)), **entries}


def mask(*rows: list[int]) -> Tensor:
    return tv_tensors.Mask(torch.tensor(rows))


def boxes(*labels: int) -> Sample:
    corners = torch.tensor([[0.0, 0, 1, 1]]).repeat(len(labels), 1)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(2, 4)),  # type: ignore[call-overload]
        "box_labels": torch.tensor(labels, dtype=torch.int64),
    }


def test_labels_give_tags_and_sizes_void_aside() -> None:
    sample = complete(draw(labels=mask([0, 0, 0, 2], [2, VOID, VOID, VOID])), K)
    assert sample["tags"].tolist() == [1, 0, 1, 0]
    assert sample["tags"].dtype == torch.int64
    assert sample["sizes"].dtype == torch.float32
    torch.testing.assert_close(sample["sizes"], torch.tensor([3 / 5, 0, 2 / 5, 0]))


def test_an_image_without_labelled_pixels_has_no_class() -> None:
    sample = complete(draw(labels=mask([VOID] * 4, [VOID] * 4)), K)
    assert sample["tags"].tolist() == [0, 0, 0, 0]
    assert sample["sizes"].tolist() == [0, 0, 0, 0]


def test_boxes_give_the_tags_of_their_classes_and_of_the_background() -> None:
    sample = complete(draw(**boxes(3, 1, 3)), K)
    assert sample["tags"].tolist() == [1, 1, 0, 1]
    assert sample["tags"].dtype == torch.int64
    assert "sizes" not in sample


def test_no_boxes_are_background_only() -> None:
    assert complete(draw(**boxes()), K)["tags"].tolist() == [1, 0, 0, 0]


def test_sizes_give_the_tags_of_what_has_a_size() -> None:
    sample = complete(draw(sizes=torch.tensor([0.5, 0, 0, 0.5])), K)
    assert sample["tags"].tolist() == [1, 0, 0, 1]


def test_labels_come_before_boxes_and_boxes_before_sizes() -> None:
    sizes = torch.tensor([0.5, 0, 0, 0.5])
    assert complete(draw(labels=mask([0, 2]), **boxes(1)), K)["tags"].tolist() == [1, 0, 1, 0]
    assert complete(draw(sizes=sizes, **boxes(1)), K)["tags"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("annotations", [{"labels": mask([0, 2])}, boxes(1), {}])
def test_what_is_known_of_the_whole_image_stays(annotations: Sample) -> None:
    known = {"tags": torch.tensor([0, 0, 0, 1]), "sizes": torch.tensor([0.25, 0.75, 0, 0]), "targets": torch.ones(7)}
    sample = complete(draw(**annotations, **known), K)
    for name, value in known.items():
        assert sample[name] is value


def test_an_image_alone_gets_neither_tags_nor_sizes() -> None:
    assert complete(draw(), K).keys() == {"image", "valid"}


def test_all_pixels_are_valid_unless_padding_says_otherwise() -> None:
    valid = complete(draw(height=3, width=5), K)["valid"]
    assert (valid.dtype, valid.shape) == (torch.bool, (3, 5))
    assert valid.all()
    padded = tv_tensors.Mask(torch.tensor([[True, False]]))
    assert complete(draw(valid=padded), K)["valid"] is padded


def test_a_sample_that_is_completed_is_not_changed_itself() -> None:
    sample = draw(labels=mask([0, 2]))
    complete(sample, K)
    assert sample.keys() == {"image", "labels"}


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^labels: "):
        complete(draw(labels=mask([0, K])), K)


@given(st.lists(st.sampled_from([*range(K), VOID]), min_size=1, max_size=40))
def test_sizes_are_counts_over_labelled_pixels(labels: list[int]) -> None:
    counts = [labels.count(k) for k in range(K)]
    expected = [count / max(sum(counts), 1) for count in counts]
    torch.testing.assert_close(class_sizes(mask(labels), K), torch.tensor(expected))


def test_sizes_of_a_data_set_are_those_of_its_images() -> None:
    labels = torch.tensor([[[0, 0], [1, VOID]], [[3, 3], [3, 3]], [[0, 1], [2, 3]]])
    data = Stacked(CLASSES, torch.rand(3, 3, 2, 2), labels)
    expected = torch.tensor([[2 / 3, 1 / 3, 0, 0], [0, 0, 0, 1], [1 / 4] * 4])
    torch.testing.assert_close(data.sizes(), expected)
    torch.testing.assert_close(Annotated(data, targets=torch.zeros(3, K)).sizes(), expected)


def test_the_error_of_objects_leaves_out_the_background_and_classes_that_are_not_there() -> None:
    exact = torch.tensor([[0.5, 0.5, 0, 0], [0.2, 0.4, 0.4, 0], [1, 0, 0, 0]])
    told = torch.tensor([[0.4, 0.6, 0, 0], [0.3, 0.4, 0.1, 0.2], [0.5, 0.5, 0, 0]])
    assert object_error(told, exact) == pytest.approx((0.2 + 0 + 0.75) / 3)
    assert math.isnan(object_error(told[2:], exact[2:]))


def test_names_can_have_a_prefix() -> None:
    assert Stacked(CLASSES, torch.rand(2, 3, 2, 2), torch.zeros(2, 2, 2), prefix="a_").names == ["a_000000", "a_000001"]


def test_stacked_images_keep_their_rows_together() -> None:
    image, labels, targets = torch.rand(5, 3, 2, 2), torch.randint(K, (5, 2, 2)), torch.rand(5, K)
    data = Stacked(CLASSES, image, labels, targets=targets)
    assert len(data) == len(set(data.names)) == 5
    assert data.classes == CLASSES
    for i, sample in enumerate(itertools.islice(data, 5)):
        assert isinstance(sample["image"], tv_tensors.Image)
        assert isinstance(sample["labels"], tv_tensors.Mask)
        for name, rows in {"image": image, "labels": labels, "targets": targets}.items():
            assert torch.equal(sample[name], rows[i])
        assert torch.equal(data.labels(i), labels[i])


class Counting(Stacked):
    """Knows its labels without reading the images."""

    read = 0

    def __getitem__(self, index: int) -> Sample:
        self.read += 1
        return super().__getitem__(index)

    def labels(self, index: int) -> Tensor:
        return self._labels[index]


def test_annotated_images_are_those_of_the_data_set_with_further_entries() -> None:
    data = Counting(CLASSES, torch.rand(3, 3, 2, 2), torch.randint(K, (3, 2, 2)), tags=torch.zeros(3, K))
    known = {"targets": torch.rand(3, K), "tags": torch.ones(3, K)}
    annotated = Annotated(data, **known)
    assert (annotated.classes, annotated.names, len(annotated)) == (data.classes, data.names, 3)
    for i in range(3):
        expected = data[i] | {name: rows[i] for name, rows in known.items()}
        assert annotated[i].keys() == expected.keys()
        assert all(torch.equal(annotated[i][name], value) for name, value in expected.items())
    data.read = 0
    assert torch.equal(annotated.sizes(), data.sizes())
    assert data.read == 0, "labels are read in the way of the data set"


def test_images_have_to_say_how_they_are_read() -> None:
    with pytest.raises(NotImplementedError):
        Images()[0]


def test_data_errors_are_value_errors() -> None:
    assert issubclass(DataError, ValueError)


def test_a_batch_stacks_what_has_one_size_and_lists_what_varies_in_number() -> None:
    samples = [complete(draw(labels=mask([0, 1, 2, 3], [0, 0, 0, 0]), **boxes(*labels)), K) for labels in ([1], [2, 3])]
    batch = collate(samples)
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
    assert shapes == {
        "image": (2, 3, 2, 4),
        "labels": (2, 2, 4),
        "valid": (2, 2, 4),
        "tags": (2, K),
        "sizes": (2, K),
    }
    assert [tuple(values.shape) for values in batch["boxes"]] == [(1, 4), (2, 4)]
    assert [values.tolist() for values in batch["box_labels"]] == [[1], [2, 3]]
    for i, sample in enumerate(samples):
        assert all(torch.equal(values[i], sample[name]) for name, values in batch.items())


def test_batches_hold_plain_tensors() -> None:
    """Losses are not run through the dispatch of tv_tensors, nor are they compiled with it."""
    batch = collate([complete(draw(labels=mask([0]), **boxes(1)), K)])
    assert {type(value) for value in batch.values()} == {Tensor, list}
    assert {type(value) for name in ("boxes", "box_labels") for value in batch[name]} == {Tensor}


@pytest.mark.parametrize(("count", "taken"), [(1, 1), (3, 3), (4, 3)])
def test_the_first_images_are_a_batch_of_at_most_all(count: int, taken: int) -> None:
    image = torch.rand(3, 3, 2, 2)
    batch = first(Stacked(("a", "b"), image, torch.zeros(3, 2, 2, dtype=torch.int64)), count)
    assert torch.equal(batch["image"], image[:taken])
