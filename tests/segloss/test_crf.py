"""What is particular to the Potts losses."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segloss
from segloss.bilateral import blocksparse, guide_features, operator
from segloss.bilateral.reference import gaussian_filter_reference
from tests.segloss.test_bilateral import CASES, METHODS, images, picture, sigmas, widths

seeds = st.integers(0, 2**16)


def one_hot(batch: int, classes: int, height: int, width: int, *, constant: bool = False) -> Tensor:
    labels = torch.randint(0, classes, (batch, 1, 1) if constant else (batch, height, width))
    labels = labels.expand(batch, height, width)
    return torch.nn.functional.one_hot(labels, classes).movedim(3, 1).double()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_energies_and_gradients_are_the_golden_ones(golden: Any, case: str, method: str) -> None:
    arrays = golden(f"crf/{case}")
    probability = arrays["S"].double().requires_grad_()
    image = arrays["image"].double().requires_grad_()
    sigma_rgb, sigma_xy = (arrays[name].clone().requires_grad_() for name in ("sigma_rgb", "sigma_xy"))
    options = {
        "sigma_rgb": sigma_rgb,
        "sigma_xy": sigma_xy,
        "valid": arrays["mask"] > 0 if "mask" in arrays else None,
        "from_logits": False,
        "method": method,
        "tolerance": 1e-7,
        "reduction": "none",
    }
    energy = segloss.potts_crf(probability, image, **options)
    quadratic = segloss.potts_crf(probability, image, form="quadratic", **options)
    grads = torch.autograd.grad(energy.sum(), (probability, image, sigma_rgb, sigma_xy))
    close = {"rtol": 1e-9, "atol": 1e-12} if method == "exact" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(energy, arrays["potts"], **close)
    torch.testing.assert_close(quadratic, arrays["neg_quad"], **close)
    for grad, name in zip(grads, ("grad_S", "grad_image", "grad_sigma_rgb", "grad_sigma_xy"), strict=True):
        torch.testing.assert_close(grad, arrays[name], **close)


@pytest.mark.parametrize("scale", ["0.5", "1.0"])
def test_quadratic_form_is_the_exact_value_of_rloss(golden: Any, scale: str) -> None:
    arrays = golden(f"crf/r_rloss_64x64_k5_b2_scale{scale}")
    loss = segloss.potts_crf(
        arrays["S"].double(),
        arrays["image"].double(),
        sigma_rgb=arrays["sigma_rgb"].item(),
        sigma_xy=arrays["sigma_xy"].item(),
        scale_factor=arrays["scale_factor"].item(),
        valid=arrays["roi"] > 0,
        from_logits=False,
        form="quadratic",
        method="exact",
    )
    torch.testing.assert_close(arrays["weight"] * loss, arrays["exact_neg_quad_value"], rtol=1e-9, atol=0)
    # rloss filters with a lattice that is not this kernel: the same sign, about half the size.
    assert 1.5 < (arrays["exact_neg_quad_value"] / arrays["rloss_value"]).item() < 2.5


@settings(max_examples=30)
@given(seed=seeds, kind=images, sigma_rgb=sigmas, sigma_xy=widths, classes=st.integers(2, 5))
def test_a_constant_segmentation_costs_nothing(
    seed: int, kind: str, sigma_rgb: float, sigma_xy: float, classes: int
) -> None:
    torch.manual_seed(seed)
    image = picture(kind, 8, 9, batch=2, seed=seed)
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy, "from_logits": False}
    constant = one_hot(2, classes, 8, 9, constant=True)
    assert segloss.potts_crf(constant, image, **options).item() == 0
    assert segloss.grid_potts(constant, image, sigma_rgb=sigma_rgb, from_logits=False).item() == 0


@settings(max_examples=30)
@given(seed=seeds, kind=images, classes=st.integers(2, 5))
def test_any_other_segmentation_costs_something_and_classes_have_no_order(seed: int, kind: str, classes: int) -> None:
    torch.manual_seed(seed)
    image = picture(kind, 8, 9, batch=2, seed=seed)
    logits = torch.randn(2, classes, 8, 9, dtype=torch.float64)
    order = torch.randperm(classes)
    for loss in (segloss.potts_crf, segloss.grid_potts):
        energy = loss(logits, image, sigma_rgb=0.3, reduction="none")
        assert (energy > 0).all()
        torch.testing.assert_close(loss(logits[:, order], image, sigma_rgb=0.3, reduction="none"), energy)


def test_one_hot_segments_pay_the_weights_between_them() -> None:
    image = picture("noise", 6, 5)
    segments = one_hot(1, 3, 6, 5)
    weights = gaussian_filter_reference(torch.eye(30, dtype=torch.float64)[None], guide_features(image, 0.5, 3.0))[0]
    labels = segments.argmax(1).flatten()
    expected = weights[labels[:, None] != labels].sum()
    options = {"sigma_rgb": 0.5, "from_logits": False}
    torch.testing.assert_close(segloss.potts_crf(segments, image, sigma_xy=3.0, **options), expected)


def test_the_connectivity_may_be_of_numpy() -> None:
    logits, image = torch.randn(1, 2, 4, 5), torch.rand(1, 3, 4, 5)
    expected = segloss.grid_potts(logits, image, connectivity=8)
    assert segloss.grid_potts(logits, image, connectivity=np.uint8(8)).equal(expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="connectivity: expected one of 4, 8, got 5"):
        segloss.grid_potts(logits, image, connectivity=np.uint8(5))  # type: ignore[arg-type]


@pytest.mark.parametrize("connectivity", [4, 8])
def test_grid_potts_is_the_dense_loss_with_a_sparse_matrix(connectivity: int) -> None:
    height, width = 5, 6
    image = picture("noise", height, width, batch=2)
    logits = torch.randn(2, 3, height, width, dtype=torch.float64)
    valid = torch.rand(2, height, width) < 0.7
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down = (rows.flatten()[:, None] - rows.flatten()).abs()
    right = (columns.flatten()[:, None] - columns.flatten()).abs()
    near = (down + right == 1) if connectivity == 4 else (torch.maximum(down, right) == 1)
    expected = []
    for colour, segment, mask in zip(image.flatten(2), logits.softmax(1).flatten(2), valid.flatten(1), strict=True):
        weights = torch.exp(-(colour[:, :, None] - colour[:, None]).square().sum(0) / (2 * 0.5**2)) * near
        expected.append(((mask * (1 - segment)) @ weights * (mask * segment)).sum())
    energy = segloss.grid_potts(logits, image, sigma_rgb=0.5, connectivity=connectivity, valid=valid, reduction="none")
    torch.testing.assert_close(energy, torch.stack(expected))


def test_both_forms_have_the_same_logit_gradient() -> None:
    image, logits = picture("smooth", 9, 8), torch.randn(1, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    potts, quadratic = (
        torch.autograd.grad(segloss.potts_crf(logits, image, sigma_xy=4.0, form=form), logits)[0]
        for form in ("potts", "quadratic")
    )
    torch.testing.assert_close(potts, quadratic)


@pytest.mark.parametrize("from_logits", [True, False])
def test_the_filter_runs_once_for_value_and_gradient(monkeypatch: pytest.MonkeyPatch, from_logits: bool) -> None:
    runs = []
    run = blocksparse.gaussian_filter
    monkeypatch.setattr(operator.blocksparse, "gaussian_filter", lambda *a: runs.append(a[0].shape) or run(*a))
    logits = torch.rand(1, 3, 8, 8, requires_grad=True)
    segloss.potts_crf(logits, torch.rand(1, 3, 8, 8), from_logits=from_logits).backward()
    assert len(runs) == 1
    assert runs[0][1] == (3 if from_logits else 4)


def test_normalisation_divides_by_valid_pixels_or_pairs() -> None:
    logits, image = torch.randn(2, 3, 8, 10), torch.rand(2, 3, 8, 10)
    valid = torch.zeros(2, 8, 10, dtype=torch.bool)
    valid[0, :4] = True
    valid[1, :, :2] = True
    plain = segloss.potts_crf(logits, image, valid=valid, reduction="none")
    counts = torch.tensor([40.0, 16.0])
    for normalize, divisor in (("pixels", counts), ("pairs", counts**2)):
        divided = segloss.potts_crf(logits, image, valid=valid, normalize=normalize, reduction="none")
        torch.testing.assert_close(divided, plain / divisor)


@pytest.mark.parametrize("spatial", [(12, 16), (6, 8, 8)])
def test_only_the_loss_per_pair_is_the_same_at_twice_the_resolution(spatial: tuple[int, ...]) -> None:
    """A pixel has 2 neighbours along each axis where it had 1."""
    coarse = torch.rand(1, 3, *spatial, dtype=torch.float64), torch.rand(1, 3, *spatial, dtype=torch.float64)
    fine = tuple(torch.nn.functional.interpolate(own, scale_factor=2) for own in coarse)
    settings = {"sigma_rgb": 0.3, "sigma_xy": 4.0, "method": "exact"}
    for normalize, factor in (("pixels", 2 ** len(spatial)), ("pairs", 1)):
        low, high = (
            segloss.potts_crf(*pair, spacing=(step,) * len(spatial), normalize=normalize, **settings)
            for pair, step in ((coarse, 1.0), (fine, 0.5))
        )
        assert float(high / low) == pytest.approx(factor, rel=0.02)


def test_scaling_shrinks_the_problem() -> None:
    image = picture("smooth", 16, 24)
    logits = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    small = torch.nn.functional.interpolate(logits.softmax(1), scale_factor=0.5, mode="bilinear")
    expected = segloss.potts_crf(small, image[:, :, ::2, ::2], sigma_xy=4.0, from_logits=False)
    torch.testing.assert_close(segloss.potts_crf(logits, image, sigma_xy=8.0, scale_factor=0.5), expected)
    width = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    scaled = segloss.potts_crf(logits, image, sigma_xy=width, scale_factor=0.5)
    torch.testing.assert_close(scaled, expected)
    assert torch.autograd.grad(scaled, width)[0] > 0


@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_the_centred_form_takes_all_at_the_same_places(factor: float) -> None:
    image, gate = picture("smooth", 16, 24), torch.rand(1, 16, 24, dtype=torch.float64)
    logits, valid = torch.randn(1, 3, 16, 24, dtype=torch.float64), torch.rand(1, 16, 24) < 0.9

    def middle(maps: Tensor) -> Tensor:
        """Means of the 2 x 2 pixels around the middle of each cell."""
        cell = round(1 / factor)
        cells = maps.unfold(2, cell, cell).unfold(3, cell, cell)[..., cell // 2 - 1 :, cell // 2 - 1 :]
        return cells[..., :2, :2].mean((-2, -1))

    whole = middle(valid[:, None].double())[:, 0] == 1
    options = {"gate": middle(gate[:, None])[:, 0], "valid": whole, "sigma_xy": 2.0, "from_logits": False}
    expected = segloss.potts_crf(middle(logits.softmax(1)), middle(image), **options)
    settings = {"sigma_xy": 2.0 / factor, "scale_factor": factor, "gate": gate}
    found = segloss.potts_crf(logits, image, valid=valid, centred=True, **settings)
    torch.testing.assert_close(found, expected)
    changed = torch.where(valid[:, None], logits, 5), torch.where(valid[:, None], image, 0.5)
    torch.testing.assert_close(segloss.potts_crf(*changed, valid=valid, centred=True, **settings), expected)
    assert segloss.potts_crf(logits, image, valid=valid, **settings) != expected


def test_the_centred_form_is_as_good_mirrored() -> None:
    """The guide of the other form lies above and to the left."""
    image, logits = picture("smooth", 16, 24), torch.randn(1, 3, 16, 24, dtype=torch.float64)
    settings = {"sigma_xy": 4.0, "scale_factor": 0.25}
    mirrored = logits.flip(2, 3), image.flip(2, 3)
    centred = segloss.potts_crf(logits, image, centred=True, **settings)
    torch.testing.assert_close(segloss.potts_crf(*mirrored, centred=True, **settings), centred)
    assert abs(segloss.potts_crf(*mirrored, **settings) / segloss.potts_crf(logits, image, **settings) - 1) > 1e-3


@pytest.mark.parametrize(("edge", "corner"), [(32, 0), (33, 6.14), (35, 0)])
def test_the_centred_form_charges_nothing_for_an_edge_of_the_image(edge: int, corner: float) -> None:
    object_ = (torch.arange(64) >= edge).float().expand(1, 1, 64, 64)
    arguments = torch.cat([1 - object_, object_], 1), object_.expand(-1, 3, -1, -1)
    settings = {"from_logits": False, "sigma_xy": 20, "scale_factor": 0.25, "normalize": "pixels"}
    assert float(segloss.potts_crf(*arguments, **settings)) == pytest.approx(corner, abs=5e-3)
    assert float(segloss.potts_crf(*arguments, centred=True, **settings)) == pytest.approx(0, abs=5e-3)


def test_a_probability_of_a_single_class_is_accepted() -> None:
    foreground, image = torch.rand(2, 1, 6, 6), torch.rand(2, 3, 6, 6)
    weights = gaussian_filter_reference(torch.eye(36)[None].expand(2, -1, -1), guide_features(image, 0.3, 5.0))
    flat = foreground.flatten(1)
    expected = torch.einsum("bp,bpq,bq->b", 1 - flat, weights, flat)
    energy = segloss.potts_crf(foreground, image, sigma_rgb=0.3, sigma_xy=5.0, from_logits=False, reduction="none")
    torch.testing.assert_close(energy, expected)


def test_masks_reach_the_gradient_of_the_image() -> None:
    image = picture("noise", 7, 6).requires_grad_()
    logits = torch.randn(1, 2, 7, 6, dtype=torch.float64)
    valid = torch.rand(1, 7, 6) < 0.6
    options = {"sigma_rgb": 0.5, "sigma_xy": 3.0, "valid": valid}
    assert torch.autograd.gradcheck(lambda x: segloss.potts_crf(logits, x, **options), image)
    assert torch.autograd.gradgradcheck(lambda x: segloss.potts_crf(logits, x, **options), image, fast_mode=True)
    gradient = torch.autograd.grad(segloss.potts_crf(logits, image, **options), image)[0]
    assert (gradient.abs().sum(1)[~valid] == 0).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": torch.zeros(2, 3, 8, 8)}, ValueError, r"image: expected \[2, 3, 6, 5\] to go with logits \[2, 3, 6"),
        (
            {"image": torch.zeros(2, 6, 5)},
            ValueError,
            r"image: expected \[2, 6, 6, 5\] to go with logits \[2, 3, 6, 5\]",
        ),
        ({"from_logits": False}, ValueError, "logits: expected probabilities from 0 to 1 with from_logits=False"),
        ({"form": "cubic"}, ValueError, "form: expected one of 'potts', 'quadratic', got 'cubic'"),
        ({"normalize": "images"}, ValueError, "normalize: expected one of None, 'pixels', 'pairs', got 'images'"),
        ({"scale_factor": 2}, ValueError, "scale_factor: expected a finite number above 0 and of at most 1, got 2"),
        ({"scale_factor": 0.0}, ValueError, "scale_factor: expected a finite number above 0 .*, got 0.0"),
        ({"sigma_xy": -1, "scale_factor": 0.5}, ValueError, "sigma_xy: expected a number above 0, got -1$"),
        ({"sigma_xy": None, "scale_factor": 0.5}, TypeError, "sigma_xy: expected a number, got NoneType"),
        ({"from_logits": "no"}, TypeError, "from_logits: expected a bool, got str"),
        ({"from_logits": np.bool_(True)}, TypeError, "from_logits: expected a bool, got numpy.bool"),
        ({"scale_factor": 0.1}, ValueError, "scale_factor: expected to leave at least 1 pixel of .* got 0.1"),
        ({"sigma_rgb": -1}, ValueError, "sigma_rgb: expected a number above 0, got -1"),
        ({"sigma_xy": math.nan}, ValueError, "sigma_xy: expected a number above 0, got nan"),
        ({"method": "fast"}, ValueError, "method: expected one of"),
        ({"backend": "numpy"}, ValueError, "backend: expected one of"),
        ({"tolerance": 1.0}, ValueError, "tolerance: expected a finite number above 0 and below 1, got 1.0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: dict[str, Any], error: type, message: str) -> None:
    arguments = {"image": torch.zeros(2, 3, 6, 5), **changes}
    with pytest.raises(error, match=message):
        segloss.potts_crf(torch.randn(2, 3, 6, 5), **arguments)


def test_modules_refuse_their_settings_when_they_are_made() -> None:
    for make in (
        lambda: segloss.PottsCRF(form="cubic"),
        lambda: segloss.PottsCRF(method="fast"),
        lambda: segloss.PottsCRF(normalize="images"),
        lambda: segloss.PottsCRF(tolerance=0.0),
        lambda: segloss.PottsCRF(scale_factor=7),
        lambda: segloss.PottsCRF(sigma_rgb=-1),
        lambda: segloss.GridPotts(connectivity=5),
        lambda: segloss.GridPotts(sigma_rgb=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


@pytest.mark.parametrize("make", [segloss.PottsCRF, segloss.GridPotts])
def test_sigmas_that_are_tensors_move_and_learn_with_the_module(make: Any) -> None:
    buffer = make(sigma_rgb=torch.tensor(0.25))
    assert buffer.state_dict()["sigma_rgb"] == 0.25
    assert buffer.to("meta").sigma_rgb.device.type == "meta"
    learnt = make(sigma_rgb=torch.nn.Parameter(torch.tensor(0.25)))
    learnt(torch.randn(1, 2, 6, 6), torch.rand(1, 3, 6, 6)).backward()
    assert learnt.sigma_rgb.grad.abs() > 0
    assert "sigma_rgb=" in repr(buffer)


def test_numbers_may_come_from_numpy() -> None:
    logits, image = torch.randn(1, 2, 6, 6), torch.rand(1, 3, 6, 6)
    plain = segloss.potts_crf(logits, image, sigma_xy=3.0)
    torch.testing.assert_close(segloss.potts_crf(logits, image, sigma_xy=np.float32(3)), plain)
    torch.testing.assert_close(segloss.potts_crf(logits, image, sigma_xy=np.int64(3)), plain)


@pytest.mark.parametrize("loss", [segloss.potts_crf, segloss.grid_potts])
def test_settings_may_change_under_compile(loss: Any) -> None:
    logits, image = torch.randn(1, 2, 6, 6), torch.rand(1, 3, 6, 6)
    compiled = torch.compile(lambda s: loss(logits, image, sigma_rgb=s), fullgraph=True, backend="aot_eager")
    for sigma in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(sigma), loss(logits, image, sigma_rgb=sigma))


@pytest.mark.parametrize(("scale", "sigma"), [(1.0, 1e-40), (3e38, 0.1), (1e20, 1e-20)])
@pytest.mark.parametrize("loss", [segloss.potts_crf, segloss.grid_potts])
def test_extreme_guides_keep_value_and_gradients_finite(loss: Any, scale: float, sigma: float) -> None:
    logits = torch.randn(1, 2, 6, 6, requires_grad=True)
    image = (torch.rand(1, 3, 6, 6) * scale).requires_grad_()
    value = loss(logits, image, sigma_rgb=sigma)
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, (logits, image)))


def test_the_filter_runs_once_under_functional_transforms_too(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = blocksparse.gaussian_filter
    monkeypatch.setattr(operator.blocksparse, "gaussian_filter", lambda *a: runs.append(1) or run(*a))
    image = torch.rand(1, 3, 8, 8)
    torch.func.grad(lambda x: segloss.potts_crf(x, image))(torch.randn(1, 2, 8, 8))
    assert len(runs) == 1


def gated_reference(
    probability: Tensor, image: Tensor, valid: Tensor, gate: Tensor, form: str, sigma_rgb: float, sigma_xy: float
) -> tuple[Tensor, Tensor]:
    """Energies by dense matrices, and the matrices."""
    height, width = image.shape[2:]
    pixels = torch.eye(height * width, dtype=torch.float64).expand(len(image), -1, -1)
    weights = gaussian_filter_reference(pixels, guide_features(image, sigma_rgb, sigma_xy))
    mask = valid.flatten(1)[:, None].double()
    inside = mask * probability.flatten(2)
    partner = -inside if form == "quadratic" else mask - inside
    return torch.einsum("bp,bkp,bpq,bkq->b", gate.flatten(1), partner, weights, inside), weights


@settings(max_examples=30)
@given(seed=seeds, kind=images, sigma_rgb=sigmas, sigma_xy=widths, classes=st.integers(1, 4))
@pytest.mark.parametrize("form", ["potts", "quadratic"])
@pytest.mark.parametrize("method", METHODS)
def test_gated_value_and_gradients_are_those_of_the_dense_formula(
    method: str, form: str, seed: int, kind: str, sigma_rgb: float, sigma_xy: float, classes: int
) -> None:
    torch.manual_seed(seed)
    image = picture(kind, 7, 8, batch=2, seed=seed).requires_grad_()
    probability = torch.rand(2, classes, 7, 8, dtype=torch.float64, requires_grad=True)
    valid, gate = torch.rand(2, 7, 8) < 0.8, torch.rand(2, 7, 8, dtype=torch.float64)
    energy = segloss.potts_crf(
        probability,
        image,
        sigma_rgb=sigma_rgb,
        sigma_xy=sigma_xy,
        valid=valid,
        gate=gate,
        from_logits=False,
        form=form,
        method=method,
        tolerance=1e-9,
        reduction="none",
    )
    expected, _ = gated_reference(probability, image, valid, gate, form, sigma_rgb, sigma_xy)
    torch.testing.assert_close(energy, expected, rtol=1e-6, atol=1e-9)
    weight = torch.randn(2, dtype=torch.float64)
    inputs = (probability, image)
    found, wanted = (torch.autograd.grad((value * weight).sum(), inputs) for value in (energy, expected))
    for grad, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["potts", "quadratic"])
def test_an_open_gate_changes_nothing_a_closed_one_ends_all(form: str) -> None:
    image, logits = picture("smooth", 9, 8), torch.randn(1, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    options = {"sigma_xy": 4.0, "form": form, "valid": torch.rand(1, 9, 8) < 0.8, "normalize": "pixels"}
    plain = segloss.potts_crf(logits, image, **options)
    opened, closed = (segloss.potts_crf(logits, image, gate=torch.full((1, 9, 8), g), **options) for g in (1.0, 0.0))
    torch.testing.assert_close(opened, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (opened, plain)))
    assert closed == 0
    assert (torch.autograd.grad(closed, logits)[0] == 0).all()


def test_dense_energy_loss_has_the_gated_value_but_not_its_gradient() -> None:
    image, logits = picture("noise", 6, 7, batch=2), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 6, 7)).masked_fill(torch.rand(2, 6, 7) < 0.5, 255)
    probability = logits.softmax(1).requires_grad_()
    gate = segloss.confidence_gate(probability, labels, from_logits=False)
    sigma = {"sigma_rgb": 0.5, "sigma_xy": 3.0}
    everything = torch.ones(2, 6, 7, dtype=torch.bool)
    _, weights = gated_reference(probability, image, everything, gate, "quadratic", **sigma)
    # What the public code computes: AS is gated once, and gives value and gradient.
    gated = gate[:, None].flatten(2) * (probability.detach().flatten(2) @ weights)
    public_value, public_slope = -(probability.detach().flatten(2) * gated).sum() / 2, -2 * gated.view_as(logits) / 2
    loss = segloss.potts_crf(probability, image, gate=gate, from_logits=False, form="quadratic", **sigma)
    torch.testing.assert_close(loss, public_value)
    slope = torch.autograd.grad(loss, probability)[0]
    other_half = -((gate[:, None] * probability.detach()).flatten(2) @ weights).view_as(logits) / 2
    torch.testing.assert_close(slope, public_slope / 2 + other_half)
    # A step against the slope lowers the value by what the slope says; one against the public slope does not.
    for direction, true in ((slope, True), (public_slope, False)):
        moved = (probability - 1e-6 * direction).detach()
        change = segloss.potts_crf(moved, image, gate=gate, from_logits=False, form="quadratic", **sigma) - loss
        expected = -1e-6 * direction.square().sum()
        assert (abs(change / expected - 1) < 1e-3) == true


def test_the_gated_potts_form_adds_a_part_without_a_gradient_that_sure_predictions_shrink() -> None:
    image, logits = picture("noise", 6, 7, batch=2), torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(2, 6, 7) < 0.8
    sigma = {"sigma_rgb": 0.5, "sigma_xy": 3.0}
    added = []
    for sureness in (1.0, 5.0):
        sure = sureness * logits
        gate = segloss.confidence_gate(sure)
        options = {"valid": valid, "gate": gate, "reduction": "none", "method": "exact", **sigma}
        potts, quadratic = (segloss.potts_crf(sure, image, form=form, **options) for form in ("potts", "quadratic"))
        _, weights = gated_reference(sure.softmax(1), image, valid, gate, "potts", **sigma)
        inside = valid.flatten(1).double()
        added.append(torch.einsum("bp,bp,bpq,bq->b", gate.flatten(1), inside, weights, inside))
        torch.testing.assert_close(potts - quadratic, added[-1])
        slopes = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (potts, quadratic)]
        torch.testing.assert_close(*slopes)
    assert (added[1] < added[0]).all()


def test_a_gate_is_a_constant() -> None:
    image, logits = picture("noise", 5, 6), torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    gate = (1 - logits.softmax(1).amax(1)).requires_grad_()
    through, constant = (segloss.potts_crf(logits, image, sigma_rgb=0.5, gate=g) for g in (gate, gate.detach()))
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (through, constant)))
    made = segloss.confidence_gate(logits)
    assert not made.requires_grad
    torch.testing.assert_close(made, gate)


def test_a_gate_is_scaled_like_the_mask() -> None:
    image, gate = picture("smooth", 16, 24), torch.rand(1, 16, 24, dtype=torch.float64)
    logits, valid = torch.randn(1, 3, 16, 24, dtype=torch.float64), torch.rand(1, 16, 24) < 0.8
    small = torch.nn.functional.interpolate(logits.softmax(1), scale_factor=0.5, mode="bilinear")
    expected = segloss.potts_crf(
        small,
        image[:, :, ::2, ::2],
        sigma_xy=4.0,
        gate=gate[:, ::2, ::2],
        valid=valid[:, ::2, ::2],
        from_logits=False,
    )
    scaled = segloss.potts_crf(logits, image, sigma_xy=8.0, gate=gate, valid=valid, scale_factor=0.5)
    torch.testing.assert_close(scaled, expected)


def test_confidence_gate_spares_labelled_pixels_that_are_sure() -> None:
    probability = torch.tensor([[[0.75, 0.5, 1.0005, 0.2]], [[0.25, 0.5, 0.0, 0.3]]])[None]
    labels = torch.tensor([[[0, 9, 1, 1]]], dtype=torch.uint8)
    gate = segloss.confidence_gate(probability, labels, ignore_index=9, from_logits=False)
    torch.testing.assert_close(gate, torch.tensor([[[0.25, 1.0, 0.0, 0.7]]]))
    logits = torch.randn(2, 3, 4, 5)
    everywhere = segloss.confidence_gate(logits)
    torch.testing.assert_close(everywhere, 1 - logits.softmax(1).amax(1))
    assert (segloss.confidence_gate(logits, torch.full((2, 4, 5), 255)) == 1).all()
    assert segloss.confidence_gate(logits.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (torch.full((2, 6, 5), 1.5), ValueError, "gate: expected weights from 0 to 1, got values outside or NaN"),
        (torch.full((2, 6, 5), -0.1), ValueError, "gate: expected weights from 0 to 1"),
        (torch.full((2, 6, 5), math.nan), ValueError, "gate: expected weights from 0 to 1"),
        (torch.ones(2, 6, 5, dtype=torch.bool), TypeError, r"gate: expected a floating-point tensor, got torch\.bool"),
        (
            torch.ones(2, 1, 6, 5),
            ValueError,
            r"gate: expected \[2, 6, 5\] to go with logits \[2, 3, 6, 5\], got \[2, 1",
        ),
    ],
)
def test_gates_that_make_no_sense_are_refused(gate: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        segloss.potts_crf(torch.randn(2, 3, 6, 5), torch.zeros(2, 3, 6, 5), gate=gate)


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (torch.zeros(2, 6, 5), {}, TypeError, r"labels: expected an integer tensor, got torch\.float32"),
        (torch.full((2, 6, 5), 3), {}, ValueError, "labels: expected classes 0 to 2 or 255 to ignore, got 3"),
        (torch.zeros(1, 6, 5).long(), {}, ValueError, r"labels: expected \[2, 6, 5\] to go with logits"),
        (None, {"ignore_index": 1.0}, TypeError, "ignore_index: expected an int, got float"),
        (None, {"from_logits": False}, ValueError, "logits: expected probabilities from 0 to 1 with from_logits=False"),
    ],
)
def test_confidence_gate_refuses_what_makes_no_sense(
    labels: Tensor | None, options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        segloss.confidence_gate(torch.randn(2, 3, 6, 5), labels, **options)
