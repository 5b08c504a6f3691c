"""What is particular to the boundary loss and its distances."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import segloss

seeds = st.integers(0, 2**16)
spatial_shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def random_labels(seed: int, spatial: list[int], classes: int = 3, ignored: float = 0.2) -> Tensor:
    torch.manual_seed(seed)
    labels = torch.randint(0, classes, (2, *spatial))
    return labels.masked_fill(torch.rand(labels.shape) < ignored, 255)


@given(seed=seeds, spatial=spatial_shapes)
def test_distances_are_their_definition(seed: int, spatial: list[int]) -> None:
    labels = random_labels(seed, spatial)
    spacing = (0.5 + torch.rand(len(spatial))).tolist()
    found = segloss.signed_distances(labels.to(torch.uint8), 3, spacing=spacing)
    assert found.dtype == torch.float32
    points = list(itertools.product(*map(range, spatial)))
    for b, k in itertools.product(range(2), range(3)):
        inside, outside = (
            [p for p in points if labels[(b, *p)] == k],
            [p for p in points if labels[(b, *p)] not in (k, 255)],
        )
        for p in points:
            ends, sign = (outside, -1) if p in inside else (inside, 1)
            steps = [np.linalg.norm(np.subtract(p, q) * spacing) for q in ends]
            expected = sign * min(steps) if inside and outside and p in inside + outside else 0.0
            assert found[(b, k, *p)].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_classes_that_are_absent_or_fill_the_image_have_no_distances() -> None:
    labels = torch.tensor([[[1, 1, 255, 1]], [[0, 0, 1, 1]]])
    distances = segloss.signed_distances(labels, 3)
    assert (distances[0] == 0).all()
    assert (distances[1, 2] == 0).all()
    assert torch.equal(distances[1, 1], torch.tensor([[2.0, 1, -1, -2]]))


def test_of_two_classes_the_distances_are_opposite() -> None:
    distances = segloss.signed_distances(random_labels(0, [6, 7], classes=2), 2, spacing=(1.0, 0.7))
    assert torch.equal(distances[:, 0], -distances[:, 1])


def test_spacing_scales_distances() -> None:
    labels = random_labels(0, [4, 5, 6])
    plain, scaled = (segloss.signed_distances(labels, 3, spacing=spacing) for spacing in (None, (2.5, 2.5, 2.5)))
    torch.testing.assert_close(scaled, 2.5 * plain)


@given(seed=seeds, spatial=spatial_shapes, masked=st.booleans())
def test_loss_is_its_definition(seed: int, spatial: list[int], masked: bool) -> None:
    torch.manual_seed(seed)
    logits, distances = (torch.randn(2, 3, *spatial, dtype=torch.float64) for _ in range(2))
    valid = torch.rand(2, *spatial) < 0.6 if masked else torch.ones(2, *spatial, dtype=torch.bool)
    expected = []
    for b in range(2):
        products = (logits[b].softmax(0) * distances[b])[:, valid[b]]
        expected.append(products.mean() if valid[b].any() else products.sum())
    loss = segloss.boundary_loss(logits, distances, valid=valid if masked else None, reduction="none")
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spatial", [(4,), (2, 3, 2)])
def test_gradients_are_right_of_signals_and_volumes(spatial: tuple[int, ...]) -> None:
    logits, distances = (torch.randn(2, 3, *spatial, dtype=torch.float64) for _ in range(2))
    valid = torch.rand(2, *spatial) < 0.7
    assert torch.autograd.gradcheck(lambda x: segloss.boundary_loss(x, distances, valid=valid), logits.requires_grad_())


@given(seed=seeds)
def test_the_labels_themselves_cost_least(seed: int) -> None:
    labels = random_labels(seed, [5, 6], ignored=0)
    distances = segloss.signed_distances(labels, 3)

    def cost(prediction: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(prediction, 3).movedim(-1, 1).float()
        return segloss.boundary_loss(1e3 * one_hot, distances, reduction="none")

    assert (cost(labels) <= cost(random_labels(seed + 1, [5, 6], ignored=0)) + 1e-6).all()


@pytest.mark.parametrize("spatial", [[6, 7], [4, 5, 6]])
def test_monai_adds_one_inside(spatial: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        losses = pytest.importorskip("monai.losses")
    if not hasattr(losses, "BoundaryLoss"):
        pytest.skip("monai has it from 1.6 on")
    labels = random_labels(0, spatial, ignored=0)
    logits = torch.randn(2, 3, *spatial)
    released = losses.BoundaryLoss(softmax=True, to_onehot_y=True)(logits, labels[:, None])
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    distances = segloss.signed_distances(labels, 3) + one_hot
    torch.testing.assert_close(segloss.boundary_loss(logits, distances), released)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: segloss.boundary_loss(x, x[:, :2]),
            ValueError,
            r"distances: expected \[2, 3, 4, 4\] to go with logits",
        ),
        (lambda x: segloss.boundary_loss(x, x * torch.nan), ValueError, "distances: expected finite values"),
        (lambda x: segloss.boundary_loss(x, x.long()), TypeError, "distances: expected a floating-point tensor"),
        (lambda x: segloss.signed_distances(x, 3), TypeError, "labels: expected an integer tensor"),
        (
            lambda x: segloss.signed_distances(torch.zeros(3).long(), 3),
            ValueError,
            r"labels: expected \[B, \*spatial\]",
        ),
        (lambda x: segloss.signed_distances(torch.full((1, 3), 3), 3), ValueError, "labels: expected classes 0 to 2"),
        (lambda x: segloss.signed_distances(torch.zeros(1, 3).long(), 2.0), TypeError, "num_classes: expected an int"),
        (
            lambda x: segloss.signed_distances(torch.zeros(1, 3).long(), 2, spacing=(1.0, 2.0)),
            ValueError,
            r"spacing: expected 1 numbers to go with labels \[1, 3\], got 2",
        ),
        (
            lambda x: segloss.signed_distances(torch.zeros(1, 3, dtype=torch.int64, device="meta"), 2),
            ValueError,
            "labels: expected a tensor with values",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4, 4))
