"""What is particular to the centroid loss and its targets."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import segloss
from segloss._penalty import penalty

seeds = st.integers(0, 2**16)
OBJECT = torch.tensor([[False, True]])  # the second of two classes

spatial_shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def descriptors(weights: Tensor, spacing: list[float]) -> tuple[Tensor, Tensor]:
    """The definition, for the weights ``[*spatial]`` of one class."""
    points = np.stack(
        np.meshgrid(*(size * np.arange(n) for size, n in zip(spacing, weights.shape, strict=True)), indexing="ij"), -1
    )
    mass = weights.numpy()[..., None] / weights.sum().item()
    axes = tuple(range(weights.dim()))
    centroid = (mass * points).sum(axes)
    return torch.tensor(centroid), torch.tensor((mass * (points - centroid) ** 2).sum(axes)).sqrt()


@pytest.mark.parametrize("descriptor", ["centroid", "distance"])
@pytest.mark.parametrize("t", [None, 2.0])
@given(seed=seeds, classes=st.integers(2, 4), spatial=spatial_shapes, masked=st.booleans())
def test_loss_is_its_definition(
    descriptor: str, t: float | None, seed: int, classes: int, spatial: list[int], masked: bool
) -> None:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(2, classes, *spatial, dtype=torch.float64)
    targets = 4 * torch.rand(2, classes, len(spatial), dtype=torch.float64)
    known = torch.rand(2, classes) < 0.7
    valid = torch.rand(2, *spatial) < 0.7
    valid[0] = True
    tolerance = torch.rand(classes, len(spatial), dtype=torch.float64)
    spacing = (0.5 + torch.rand(len(spatial))).tolist()
    expected = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        counted = valid[b].double() if masked else torch.ones(spatial, dtype=torch.float64)
        for k in range(classes):
            if known[b, k] and counted.any():
                found = descriptors(logits[b].softmax(0)[k] * counted, spacing)[descriptor == "distance"]
                beyond = [found - targets[b, k] - tolerance[k], targets[b, k] - tolerance[k] - found]
                expected[b] += sum(penalty(z, t).sum() for z in beyond)
    loss = segloss.centroid_loss(
        logits,
        targets,
        descriptor=descriptor,
        tolerance=tolerance,
        t=t,
        spacing=spacing,
        known=known,
        valid=valid if masked else None,
        reduction="none",
    )
    # The mean distance of a class within one pixel is 0 up to the square root of rounding.
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-6 if descriptor == "distance" else 1e-10)


@given(seed=seeds, spatial=spatial_shapes)
def test_a_prediction_that_equals_its_labels_has_their_descriptors(seed: int, spatial: list[int]) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, 3, (2, *spatial))
    spacing = (0.5 + torch.rand(len(spatial))).tolist()
    logits = 1e4 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
    centroids, distances = segloss.centroids_from_labels(labels, 3, spacing=spacing)
    known = centroids.isfinite().all(2)
    assert torch.equal(known, torch.stack([(labels == k).flatten(1).any(1) for k in range(3)], 1))
    for descriptor, targets in (("centroid", centroids), ("distance", distances)):
        options = {"descriptor": descriptor, "known": known, "spacing": spacing}
        assert segloss.centroid_loss(logits, targets, **options) < 1e-10


@given(seed=seeds, spatial=spatial_shapes, classes=st.integers(1, 4))
def test_targets_of_labels_are_their_definition(seed: int, spatial: list[int], classes: int) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, classes, (2, *spatial)).masked_fill(torch.rand(2, *spatial) < 0.3, 255)
    spacing = (0.5 + torch.rand(len(spatial))).tolist()
    found = segloss.centroids_from_labels(labels.to(torch.uint8), classes, spacing=spacing)
    assert [part.dtype for part in found] == [torch.float32] * 2
    for b in range(2):
        for k in range(classes):
            mask = (labels[b] == k).double()
            expected = descriptors(mask, spacing) if mask.any() else [torch.full((len(spatial),), torch.nan)] * 2
            for part, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(part[b, k].double(), exact.double(), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_spacing_scales_positions() -> None:
    logits = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    targets = 3 * torch.rand(2, 3, 3, dtype=torch.float64)
    for descriptor in ("centroid", "distance"):
        plain = segloss.centroid_loss(logits, targets, descriptor=descriptor)
        scaled = segloss.centroid_loss(logits, 2.5 * targets, descriptor=descriptor, spacing=(2.5, 2.5, 2.5))
        torch.testing.assert_close(scaled, 2.5**2 * plain)


@pytest.mark.parametrize("gap", [50.0, 1e4, 1e38])
def test_a_class_without_mass_has_a_finite_gradient(gap: float) -> None:
    logits = torch.stack([torch.zeros(5, 5), torch.linspace(-3, 0, 25).view(5, 5) - gap])[None].requires_grad_()
    for descriptor in ("centroid", "distance"):
        loss = segloss.centroid_loss(logits, torch.zeros(1, 2, 2), descriptor=descriptor)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_a_class_that_has_vanished_is_still_moved() -> None:
    logits = torch.stack([torch.zeros(5, 5), torch.randn(5, 5) - 300])[None].double().requires_grad_()
    loss = segloss.centroid_loss(logits, torch.zeros(1, 2, 2), known=OBJECT)
    gradient = torch.autograd.grad(loss, logits)[0][0, 1]
    assert gradient[0, 0] < -0.01
    assert gradient[4, 4] > 0.01


@pytest.mark.parametrize("descriptor", ["centroid", "distance"])
def test_a_class_of_one_pixel_has_a_finite_gradient(descriptor: str) -> None:
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 1, 1, 2] = 1e4
    logits[0, 0] = 5e3
    logits.requires_grad_()
    loss = segloss.centroid_loss(logits, torch.ones(1, 2, 2), descriptor=descriptor)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_descent_brings_centroid_and_distances_to_their_targets() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 12, 10, requires_grad=True)
    centres, distances = torch.tensor([[[0.0, 0], [4, 6]]]), torch.tensor([[[0.0, 0], [2, 1]]])
    optimizer = torch.optim.Adam([logits], lr=0.1)
    losses = []
    for _ in range(300):
        loss = segloss.centroid_loss(logits, centres, known=OBJECT)
        loss = loss + segloss.centroid_loss(logits, distances, descriptor="distance", known=OBJECT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_within_the_tolerance_nothing_is_asked() -> None:
    logits = torch.zeros(1, 2, 5, 5, requires_grad=True)  # centred at (2, 2)
    targets = torch.tensor([[[2.4, 1.6], [1.5, 2.0]]])
    assert segloss.centroid_loss(logits, targets, tolerance=0.5) == 0
    per_class = torch.tensor([[0.4, 0.4], [0.1, 0.0]])
    assert segloss.centroid_loss(logits, targets, tolerance=per_class).item() == pytest.approx(0.16, rel=1e-5)
    per_image = per_class[None] + 0.4
    assert segloss.centroid_loss(logits, targets, tolerance=per_image) == 0
    module = segloss.CentroidLoss(tolerance=per_class)
    assert "tolerance" in module.state_dict()


def test_log_barrier_extension_of_an_interval() -> None:
    logits = torch.zeros(1, 2, 5)  # centred at 2
    loss = segloss.centroid_loss(logits, torch.tensor([[[2.0], [1.0]]]), tolerance=0.5, t=4.0)
    within, beyond = -2 * math.log(0.5) / 4, 4 * 0.5 + (2 * math.log(4) + 1) / 4 - math.log(1.5) / 4
    assert loss.item() == pytest.approx(within + beyond, rel=1e-6)


def test_log_barrier_extension_without_tolerance_is_flat_around_the_target_only() -> None:
    logits = torch.zeros(1, 2, 5, requires_grad=True)  # centred at 2
    for offset, pulled in ((0.2, False), (0.3, True)):
        loss = segloss.centroid_loss(logits, torch.full((1, 2, 1), 2 + offset), t=2.0, known=OBJECT)
        assert (torch.autograd.grad(loss, logits)[0].abs().max() > 1e-3) == pulled


@pytest.mark.parametrize("descriptor", ["centroid", "distance"])
@pytest.mark.parametrize("spatial", [(4,), (2, 3, 2)])
def test_gradients_are_right_of_signals_and_volumes(descriptor: str, spatial: tuple[int, ...]) -> None:
    logits = torch.randn(2, 3, *spatial, dtype=torch.float64, requires_grad=True)
    targets = 3 * torch.rand(2, 3, len(spatial))
    options = {"descriptor": descriptor, "tolerance": 0.2, "spacing": tuple(1 + torch.rand(len(spatial)).numpy())}
    for t in (None, 3.0):
        assert torch.autograd.gradcheck(lambda x, t=t: segloss.centroid_loss(x, targets, t=t, **options), logits)


def test_an_image_without_pixels_costs_nothing() -> None:
    logits = torch.randn(2, 3, 0, 4, requires_grad=True)
    loss = segloss.centroid_loss(logits, torch.ones(2, 3, 2))
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == logits.shape


def test_absent_classes_may_have_targets_of_nan() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    targets = torch.tensor([[[1.0, 2.0], [torch.nan, torch.nan], [3.0, 3.0]]])
    loss = segloss.centroid_loss(logits, targets, known=torch.tensor([[True, False, True]]))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"targets": torch.ones(2, 3)},
            ValueError,
            r"targets: expected \[2, 3, 2\] to go with logits .*, got \[2, 3\]",
        ),
        ({"targets": torch.ones(2, 3, 2).long()}, TypeError, "targets: expected a floating-point tensor"),
        ({"targets": torch.full((2, 3, 2), torch.nan)}, ValueError, "targets: expected finite values"),
        ({"targets": torch.full((2, 3, 2), 1e13)}, ValueError, r"targets: expected .* within ±1e\+12, got 1e\+13"),
        ({"descriptor": "size"}, ValueError, "descriptor: expected one of 'centroid', 'distance', got 'size'"),
        ({"tolerance": -1.0}, ValueError, "tolerance: expected a finite number of at least 0"),
        ({"tolerance": torch.ones(2)}, ValueError, r"tolerance: expected \[2, 3, 2\] to go with targets"),
        ({"tolerance": torch.ones(2, 3)}, ValueError, r"tolerance: expected \[3, 2\] to go with targets"),
        ({"tolerance": -torch.ones(3, 2)}, ValueError, r"tolerance: expected numbers from 0 to 1e\+12"),
        ({"t": 1e7, "tolerance": 1.0}, ValueError, r"t: expected .* of at most 1e\+06"),
        (
            {"spacing": (1.0, 2.0, 3.0)},
            ValueError,
            r"spacing: expected 2 numbers to go with logits \[2, 3, 4, 5\], got 3",
        ),
        ({"spacing": (1.0, 0.0)}, ValueError, "spacing: expected a finite number above 0"),
        ({"spacing": 2.0}, TypeError, "spacing: expected a sequence of numbers, got float"),
        ({"known": torch.ones(2, 3)}, TypeError, "known: expected a bool tensor"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        segloss.centroid_loss(torch.randn(2, 3, 4, 5), **{"targets": torch.ones(2, 3, 2), **options})


def test_a_module_refuses_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="descriptor: expected one of"):
        segloss.CentroidLoss(descriptor="mean")
    with pytest.raises(ValueError, match="tolerance: expected a finite number of at least 0"):
        segloss.CentroidLoss(tolerance=-1.0)
    with pytest.raises(TypeError, match="t: expected a number, got str"):
        segloss.CentroidLoss(t="5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: segloss.centroids_from_labels(torch.zeros(3).long(), 2),
            ValueError,
            r"labels: expected \[B, \*spatial",
        ),
        (lambda: segloss.centroids_from_labels(torch.zeros(2, 3), 2), TypeError, "labels: expected an integer tensor"),
        (
            lambda: segloss.centroids_from_labels(torch.full((2, 3), 2), 2),
            ValueError,
            "labels: expected classes 0 to 1",
        ),
        (lambda: segloss.centroids_from_labels(torch.ones(2, 3).long(), 0), ValueError, "num_classes: expected"),
        (
            lambda: segloss.centroids_from_labels(torch.ones(2, 3).long(), 2, spacing=(1.0, 1.0)),
            ValueError,
            r"spacing: expected 1 numbers to go with labels \[2, 3\], got 2",
        ),
    ],
)
def test_labels_that_make_no_sense_are_refused(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
