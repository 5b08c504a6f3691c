"""What is particular to the feature similarity loss and its max-normalised maps."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segloss import _dissimilarity
from segloss.similarity import FeatureSimilarity, feature_similarity, max_normalize

sides = st.integers(1, 7)


def reference(
    values: Tensor, image: Tensor, sigma: float | Tensor = 5.0, mu: float | Tensor = 2.5, keep: Any = None
) -> Tensor:
    """Eqs. (9) to (13) as they are printed, pair by pair; ``keep`` picks pairs from their distances (down, right)."""
    height, width = values.shape[2:]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).double()
    apart = (place[:, None] - place).abs()
    weight = torch.exp(-apart.square().sum(2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
    if keep is not None:
        weight = torch.where(keep(apart[..., 0], apart[..., 1]), weight, 0)
    y, x = values.flatten(2).mT, image.flatten(2).mT
    gate = (y[:, :, None] - y[:, None]).square().sum(3) / 2
    delta = (x[:, :, None] - x[:, None]).abs().sum(3) / 3
    unlike = torch.where(delta > 0, torch.tanh(mu + torch.log(delta / (1 - delta))), -1)
    return -(weight * gate * unlike).sum((1, 2)).mean() / (height * width)


@settings(max_examples=30)
@given(batch=st.integers(1, 2), classes=st.integers(1, 3), height=sides, width=sides, seed=st.integers(0, 2**16))
@pytest.mark.parametrize("gate", ["max", "sigmoid", "raw", "softmax"])
def test_value_and_gradient_are_those_of_the_printed_formula(
    gate: str, batch: int, classes: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(batch, classes, height, width, dtype=torch.float64, requires_grad=True)
    image = torch.rand(batch, 3, height, width, dtype=torch.float64)
    sigma, mu = (0.3 + 5 * torch.rand(1)).item(), torch.randn(1).item()
    values = {
        "max": max_normalize(scores),
        "sigmoid": scores.sigmoid(),
        "raw": scores,
        "softmax": scores.softmax(1),
    }[gate]
    expected = reference(values, image, sigma, mu)
    value = feature_similarity(scores, image, gate=gate, sigma=sigma, mu=mu)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    grad, expected_grad = (torch.autograd.grad(loss, scores)[0] for loss in (value, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@settings(max_examples=20)
@given(height=sides, width=st.integers(1, 40), window=st.integers(1, 6), shape=st.sampled_from(["square", "disc"]))
def test_a_window_leaves_out_just_the_pairs_beyond_it(height: int, width: int, window: int, shape: str) -> None:
    torch.manual_seed(height)
    scores = torch.randn(1, 2, height, width, dtype=torch.float64)
    image = torch.rand(1, 3, height, width, dtype=torch.float64)

    def keep(down: Tensor, right: Tensor) -> Tensor:
        return down**2 + right**2 <= window**2 if shape == "disc" else torch.maximum(down, right) <= window

    value = feature_similarity(scores, image, gate="raw", window=window, window_shape=shape)
    torch.testing.assert_close(value, reference(scores, image, keep=keep), rtol=1e-9, atol=1e-12)


def test_blocks_of_columns_and_far_rows_add_up_to_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(2, 2, 9, 53, dtype=torch.float64)
    image = torch.rand(2, 3, 9, 53, dtype=torch.float64)
    expected = reference(scores, image, 0.5)
    monkeypatch.setattr(_dissimilarity, "_ELEMENTS", 1)  # blocks as narrow as they get
    for sigma in (0.5, torch.tensor(0.5, dtype=torch.float64)):  # reach by the number; all pixels for the tensor
        value = feature_similarity(scores, image, gate="raw", sigma=sigma)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(
    window=st.integers(1, 12),
    sigma=st.floats(1, 6),
    classes=st.integers(1, 3),
    stripe=st.integers(1, 14),
    shape=st.sampled_from(["square", "disc"]),
    background=st.booleans(),
)
def test_a_window_differs_from_all_pairs_by_no_more_than_stated(
    window: int, sigma: float, classes: int, stripe: int, shape: str, background: bool
) -> None:
    stripes = (torch.arange(40) // stripe % 2).double()  # as far apart as gates can be
    scores = torch.stack([stripes.expand(40, 40), stripes[:, None].expand(40, 40), stripes * stripes[:, None]])[None]
    image = torch.zeros(1, 3, 40, 40, dtype=torch.float64)
    losses = [
        feature_similarity(scores[:, :classes], image, sigma=sigma, background=background, **options)
        for options in ({}, {"window": window, "window_shape": shape})
    ]
    side = window / math.sqrt(2) if shape == "disc" else window
    assert (losses[0] - losses[1]).abs() <= (classes + background) * math.erfc(side / (math.sqrt(2) * sigma))


def test_the_stated_errors_of_windows_at_the_default_sigma() -> None:
    # scores of one blob on a smooth image, at the size of the paper's maps
    place = torch.linspace(-1, 1, 56)
    scores = (0.5 - place[:, None] ** 2 - place**2).expand(1, 1, 56, 56).clone().requires_grad_()
    image = F.interpolate(torch.rand(1, 3, 9, 9), size=(56, 56), mode="bilinear")
    full, wide, narrow = (
        torch.autograd.grad(feature_similarity(scores, image, window=window), scores)[0] for window in (None, 15, 10)
    )
    assert (wide - full).norm() < 0.02 * full.norm()
    assert 0.02 * full.norm() < (narrow - full).norm() < 0.3 * full.norm()


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.5])
def test_the_sign_changes_at_the_threshold(mu: float) -> None:
    threshold = 1 / (1 + math.exp(mu))
    scores = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 1, 2)
    for factor, sign in ((0.99, 1), (1.01, -1)):
        image = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
        image[..., 1] = factor * threshold
        assert torch.sign(feature_similarity(scores, image, gate="raw", mu=mu)) == sign
    assert mu != 2.5 or round(threshold, 3) == 0.076


@pytest.mark.parametrize("gate", ["max", "sigmoid", "raw", "softmax"])
def test_constant_maps_cost_nothing(gate: str) -> None:
    level = torch.randn(2, 3, 1, 1)
    scores = level.expand(2, 3, 12, 9).clone().requires_grad_()
    loss = feature_similarity(scores, torch.rand(2, 3, 12, 9), gate=gate)
    assert loss.abs() < 1e-6
    assert torch.autograd.grad(loss, scores)[0].abs().max() < 1e-6


def test_a_small_amplitude_far_from_zero_keeps_its_gradient() -> None:
    # Squared distances by a product of matrices would lose it.
    scores = 10 + 1e-4 * torch.randn(1, 2, 12, 12, dtype=torch.float64)
    image = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = scores.float().to(dtype).requires_grad_()
        grads += torch.autograd.grad(feature_similarity(leaf, image.to(dtype), gate="raw"), leaf)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@pytest.mark.parametrize("gate", ["max", "sigmoid", "raw"])
def test_classes_do_not_see_each_other_unless_they_share_a_softmax(gate: str) -> None:
    scores, image = torch.randn(1, 3, 6, 6, dtype=torch.float64), torch.rand(1, 3, 6, 6, dtype=torch.float64)
    apart = sum(feature_similarity(scores[:, c : c + 1], image, gate=gate) for c in range(3))
    torch.testing.assert_close(feature_similarity(scores, image, gate=gate), apart)
    leaf = scores.requires_grad_()
    grad = torch.autograd.grad(feature_similarity(leaf, image, gate=gate), leaf)[0]
    changed = scores.detach().clone()
    changed[:, 0] += torch.randn(6, 6)
    changed.requires_grad_()
    other = torch.autograd.grad(feature_similarity(changed, image, gate=gate), changed)[0]
    torch.testing.assert_close(grad[:, 1:], other[:, 1:])
    joint = feature_similarity(scores, image, gate="softmax")
    alone = [feature_similarity(scores[:, c : c + 1], image, gate="softmax") for c in range(3)]
    assert (joint - sum(alone)).abs() > 1e-4


def test_only_classes_that_are_present_count() -> None:
    scores, image = torch.randn(2, 3, 6, 5, requires_grad=True), torch.rand(2, 3, 6, 5)
    tags = torch.tensor([[1, 0, 1], [0, 0, 0]])
    loss = feature_similarity(scores, image, tags, reduction="none")
    torch.testing.assert_close(loss[0], feature_similarity(scores[:1, ::2], image[:1]))
    assert loss[1] == 0
    grad = torch.autograd.grad(loss.sum(), scores)[0]
    assert (grad[tags == 0] == 0).all()
    assert (grad[0, ::2] != 0).any()
    torch.testing.assert_close(feature_similarity(scores, image, torch.ones(2, 3)), feature_similarity(scores, image))


def test_negative_scores_have_no_gradient_through_the_maximum_gate_but_do_through_the_sigmoid() -> None:
    scores, image = torch.randn(1, 2, 8, 8, requires_grad=True), torch.rand(1, 3, 8, 8)
    grad = torch.autograd.grad(feature_similarity(scores, image), scores)[0]
    assert (grad[scores < 0] == 0).all()
    assert (grad[scores > 0] != 0).all()
    assert (torch.autograd.grad(feature_similarity(scores, image, gate="sigmoid"), scores)[0] != 0).all()


def test_gradients_of_sigma_and_mu_are_right_and_that_of_mu_is_never_positive() -> None:
    scores, image = torch.randn(2, 2, 4, 5, dtype=torch.float64), torch.rand(2, 3, 4, 5, dtype=torch.float64)

    def loss(scores: Tensor, sigma: Tensor, mu: Tensor) -> Tensor:
        return feature_similarity(scores, image, gate="raw", sigma=sigma, mu=mu)

    sigma, mu = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, 0.8))
    assert torch.autograd.gradcheck(loss, (scores.requires_grad_(), sigma, mu))
    expected = torch.autograd.grad(reference(scores, image, sigma, mu), (sigma, mu))
    torch.testing.assert_close(torch.autograd.grad(loss(scores, sigma, mu), (sigma, mu)), expected)
    assert expected[1] < 0


def test_learned_sigma_and_mu_get_mixed_second_derivatives_and_no_others() -> None:
    scores = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    image = torch.rand(1, 3, 3, 4, dtype=torch.float64)
    mu = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = feature_similarity(scores, image, gate="raw", mu=mu)
    (slope,) = torch.autograd.grad(loss, scores, create_graph=True)
    expected = torch.autograd.grad(reference(scores, image, 5.0, mu), scores, create_graph=True)[0]
    weight = torch.randn_like(slope)
    mixed = [torch.autograd.grad((weight * s).sum(), mu, retain_graph=True)[0] for s in (slope, expected)]
    torch.testing.assert_close(*mixed)
    (by_mu,) = torch.autograd.grad(loss, mu, create_graph=True)
    with pytest.raises(NotImplementedError, match="sigma, mu: gradients with respect to them"):
        torch.autograd.grad(by_mu, mu)


def test_a_module_learns_its_parameters_and_saves_them() -> None:
    module = FeatureSimilarity(sigma=torch.nn.Parameter(torch.tensor(5.0)), mu=torch.nn.Parameter(torch.tensor(2.5)))
    module(torch.randn(1, 2, 8, 8), torch.rand(1, 3, 8, 8)).backward()
    assert {name: p.grad.isfinite() for name, p in module.named_parameters()} == {"sigma": True, "mu": True}
    assert set(module.state_dict()) == {"sigma", "mu"}
    assert "sigma=tensor(5.), mu=tensor(2.5000)" in repr(module)


@pytest.mark.parametrize(("sigma", "mu"), list(product([1e-9, 1e9, 1e30], [-1e9, 1e9])))
def test_extreme_settings_stay_finite(sigma: float, mu: float) -> None:
    scores = torch.randn(1, 2, 6, 6, requires_grad=True)
    image = torch.rand(1, 3, 6, 6).round()
    tensors = [torch.tensor(v, requires_grad=True) for v in (sigma, mu)]
    for settings_ in ((sigma, mu), tensors):
        loss = feature_similarity(scores, image, sigma=settings_[0], mu=settings_[1])
        grads = torch.autograd.grad(loss, [scores, *(s for s in settings_ if isinstance(s, Tensor))])
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)


def test_a_window_larger_than_the_image_is_all_pairs() -> None:
    scores, image = torch.randn(1, 2, 4, 5), torch.rand(1, 3, 4, 5)
    for shape in ("square", "disc"):
        windowed = feature_similarity(scores, image, window=2**70, window_shape=shape)
        torch.testing.assert_close(windowed, feature_similarity(scores, image))


def test_learned_parameters_are_precise_where_scores_have_a_large_offset() -> None:
    scores = 1e3 + torch.randn(1, 1, 12, 12, dtype=torch.float64)
    image = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        parameters = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (5.0, 2.5)]
        exact = scores.float().to(dtype), image.float().to(dtype)
        loss = feature_similarity(*exact, gate="raw", sigma=parameters[0], mu=parameters[1])
        found.append(torch.stack(torch.autograd.grad(loss, parameters)).double())
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_an_image_of_another_size_is_resized_to_the_maps() -> None:
    scores, image = torch.randn(1, 2, 6, 5), torch.rand(1, 3, 24, 15)
    resized = F.interpolate(image, size=(6, 5), mode="bilinear")
    torch.testing.assert_close(feature_similarity(scores, image), feature_similarity(scores, resized))


def test_the_image_is_a_constant() -> None:
    image = torch.rand(1, 3, 4, 4, requires_grad=True)
    feature_similarity(torch.randn(1, 2, 4, 4, requires_grad=True), image).backward()
    assert image.grad is None


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), scale=st.floats(1e-20, 1e28))
def test_normalised_maps_reach_one_where_a_score_is_positive(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    scores = scale * torch.randn(2, 3, 3, 3)
    maps = max_normalize(scores)
    assert ((maps >= 0) & (maps <= 1)).all()
    torch.testing.assert_close(maps.amax((2, 3)), (scores > 0).any(3).any(2).float())
    assert (maps[scores < 0] == 0).all()
    torch.testing.assert_close(maps, max_normalize(scores / scale))


@pytest.mark.parametrize(("key", "detach"), [("vjp", False), ("vjp_detached_max", True)])
def test_normalised_maps_and_their_gradients_are_the_golden_ones(
    golden: Callable[[str], dict[str, Tensor]], key: str, detach: bool
) -> None:
    arrays = golden("losses/max_norm_cam")
    scores = arrays["x"].requires_grad_()
    maps = max_normalize(scores, detach_maximum=detach)
    torch.testing.assert_close(maps, arrays["r"], rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(maps, scores, arrays["upstream"])
    torch.testing.assert_close(grad, arrays[key], rtol=1e-9, atol=1e-12)
    maps, expected = max_normalize(scores.float(), detach_maximum=detach), arrays["r"].float()
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-7)


def test_maps_with_a_constant_maximum_go_through_the_raw_gate(golden: Callable[[str], dict[str, Tensor]]) -> None:
    arrays = golden("losses/fsl")
    scores = arrays["x"].requires_grad_()
    maps = max_normalize(scores, detach_maximum=True)
    loss = feature_similarity(maps, arrays["image"], arrays["labels"], gate="raw")
    torch.testing.assert_close(loss, arrays["loss_r_detached_max"], rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(grad, arrays["grad_r_detached_max"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": torch.rand(2, 1, 4, 4)}, ValueError, r"image: expected \[2, 3, 4, 4\] to go with scores"),
        ({"image": torch.rand(2, 4, 4)}, ValueError, r"image: expected \[B, 3, h, w\] .*, got \[2, 4, 4\]"),
        ({"image": torch.rand(2, 3, 0, 4)}, ValueError, r"image: expected .* at least one pixel"),
        ({"image": 255 * torch.rand(2, 3, 4, 4)}, ValueError, r"image: expected RGB in \[0, 1\] \(see denormalize\)"),
        ({"image": torch.full((2, 3, 4, 4), torch.nan)}, ValueError, r"image: expected RGB in \[0, 1\]"),
        ({"tags": torch.full((2, 3), 2)}, ValueError, "tags: expected 0 or 1, got 2"),
        ({"tags": torch.ones(2, 4)}, ValueError, r"tags: expected \[2, 3\] to go with scores \[2, 3, 4, 4\]"),
        ({"gate": "relu"}, ValueError, "gate: expected one of 'max', 'sigmoid', 'raw', 'softmax', got 'relu'"),
        ({"sigma": 0}, ValueError, "sigma: expected a finite number above 0, got 0"),
        ({"sigma": torch.tensor(-1.0)}, ValueError, "sigma: expected a number above 0, got -1"),
        ({"sigma": torch.ones(2)}, ValueError, r"sigma: expected a number or a scalar tensor, got \[2\]"),
        ({"mu": "2.5"}, TypeError, "mu: expected a number, got str"),
        ({"mu": float("nan")}, ValueError, "mu: expected a finite number, got nan"),
        ({"window": 0}, ValueError, "window: expected a finite number of at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window: expected an int, got float"),
        ({"window_shape": "round"}, ValueError, "window_shape: expected one of 'square', 'disc', got 'round'"),
        ({"background": 1}, TypeError, "background: expected a bool, got int"),
        ({"background": True, "gate": "raw"}, ValueError, "background: expected gate 'max' or 'sigmoid'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        feature_similarity(torch.randn(2, 3, 4, 4), **{"image": torch.rand(2, 3, 4, 4), **arguments})
    if not {"image", "tags"} & set(arguments):
        with pytest.raises(error, match=message):
            FeatureSimilarity(**arguments)


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (2, 3, 0, 4)])
def test_maps_without_classes_or_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="scores: expected at least one class and one pixel"):
        max_normalize(torch.zeros(shape))


def test_mapping_over_parameters_is_refused_by_name() -> None:
    scores, image = torch.randn(1, 2, 4, 4), torch.rand(1, 3, 4, 4)
    with pytest.raises(NotImplementedError, match="sigma, mu: expected the same for all under vmap"):
        torch.func.vmap(lambda mu: feature_similarity(scores, image, mu=mu))(torch.rand(3))
