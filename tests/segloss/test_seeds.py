"""What is particular to the losses on seeds."""

import pytest
import torch

import segloss


def test_partial_cross_entropy_is_cross_entropy_where_all_pixels_are_labelled() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(segloss.partial_cross_entropy(logits, labels), expected)


def test_another_label_may_stand_for_ignored_pixels() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(-1, 3, (2, 4, 5))
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1)
    torch.testing.assert_close(segloss.PartialCrossEntropy(ignore_index=-1)(logits, labels), expected)


def test_groups_of_seeds_weigh_the_same_whatever_their_counts() -> None:
    logits = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    seeds = torch.zeros(1, 3, 6, 6)
    seeds[0, 1, 0, 0] = 1
    seeds[0, 0, 2:] = 1
    log_probability = logits.log_softmax(1)[0]
    expected = -log_probability[1, 0, 0] - log_probability[0, 2:].mean()
    torch.testing.assert_close(segloss.balanced_seeding(logits, seeds), expected)


def test_the_background_may_be_any_class() -> None:
    logits, seeds = torch.randn(2, 3, 4, 4), (torch.rand(2, 3, 4, 4) < 0.4).float()
    order = [2, 0, 1]
    moved = segloss.balanced_seeding(logits[:, order], seeds[:, order], background=1)
    torch.testing.assert_close(moved, segloss.balanced_seeding(logits, seeds))


def test_a_prediction_equal_to_its_refinement_costs_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert segloss.boundary_constraint(logits, logits.softmax(1)).abs() < 1e-12


def test_no_gradient_flows_into_the_refinement() -> None:
    refined = torch.rand(1, 3, 2, 2).softmax(1).requires_grad_()
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    segloss.boundary_constraint(logits, refined).backward()
    assert refined.grad is None
    assert logits.grad is not None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: segloss.partial_cross_entropy(x, torch.zeros(2, 4, 4)), TypeError, "labels: expected an integer"),
        (
            lambda x: segloss.partial_cross_entropy(x, torch.full((2, 4, 4), 3)),
            ValueError,
            "labels: expected classes 0 to 2 or 255 to ignore, got 3",
        ),
        (lambda x: segloss.balanced_seeding(x, x), ValueError, "seeds: expected 0 or 1"),
        (
            lambda x: segloss.balanced_seeding(x, x > 0, background=3),
            ValueError,
            "background: expected .* of at most 2, got 3",
        ),
        (lambda x: segloss.balanced_seeding(x, x > 0, floor=-1), ValueError, "floor: expected"),
        (lambda x: segloss.boundary_constraint(x, x), ValueError, "refined: expected probabilities from 0 to 1"),
        (lambda x: segloss.boundary_constraint(x, x.softmax(1), clip=(1, 0.5)), ValueError, "clip: expected an inc"),
        (
            lambda x: segloss.BoundaryConstraint(clip=(0, 1)),
            ValueError,
            "clip: expected a finite number above 0, got 0",
        ),
        (lambda x: segloss.BoundaryConstraint(clip=3), TypeError, "clip: expected a pair of numbers, got 3"),
        (
            lambda x: segloss.balanced_seeding(x, x > 0, background=1.0),
            TypeError,
            "background: expected an int, got fl",
        ),
        (lambda x: segloss.balanced_seeding(x, x * 1j), TypeError, "seeds: expected a tensor of real numbers"),
        (
            lambda x: segloss.PartialCrossEntropy(ignore_index=None),
            TypeError,
            "ignore_index: expected an int, got None",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int64])
def test_labels_may_have_any_integer_type(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    expected = segloss.partial_cross_entropy(logits, labels)
    # 300 does not fit into a byte: it must not wrap around to a class.
    loss = segloss.partial_cross_entropy(logits, labels.to(dtype), ignore_index=300)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(segloss.sizes_from_labels(labels.to(dtype), 3), segloss.sizes_from_labels(labels, 3))


@pytest.mark.parametrize(("dtype", "label"), [(torch.uint8, 255), (torch.int8, -1), (torch.uint16, 7)])
def test_a_label_that_is_no_class_is_refused_in_any_integer_type(dtype: torch.dtype, label: int) -> None:
    labels = torch.full((1, 2, 2), label, dtype=dtype)
    for ignore_index in (-2, 300):
        with pytest.raises(
            ValueError, match=f"labels: expected classes 0 to 2 or {ignore_index} to ignore, got {label}"
        ):
            segloss.partial_cross_entropy(torch.zeros(1, 3, 2, 2), labels, ignore_index=ignore_index)
        with pytest.raises(
            ValueError, match=f"labels: expected classes 0 to 2 or {ignore_index} to ignore, got {label}"
        ):
            segloss.sizes_from_labels(labels, 3, ignore_index=ignore_index)


def test_a_tiny_floor_keeps_the_gradient_finite() -> None:
    logits = torch.tensor([0.0, 1e3]).view(1, 2, 1, 1).requires_grad_()
    seeds = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    loss = segloss.balanced_seeding(logits, seeds, floor=1e-40)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("ignore_index", [2**63, -(2**70)])
def test_an_ignore_index_that_no_label_can_hold_is_refused(ignore_index: int) -> None:
    logits, labels = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    for call in (
        lambda: segloss.partial_cross_entropy(logits, labels, ignore_index=ignore_index),
        lambda: segloss.PartialCrossEntropy(ignore_index=ignore_index),
        lambda: segloss.confidence_gate(logits, labels, ignore_index=ignore_index),
        lambda: segloss.sizes_from_labels(labels, 3, ignore_index=ignore_index),
    ):
        with pytest.raises(ValueError, match="ignore_index: expected a number, or an int of 64 bits"):
            call()
