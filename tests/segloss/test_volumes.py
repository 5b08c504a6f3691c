"""Signals and volumes: what the bilateral filter and the CRF losses do in 1 to 3 dimensions, with a spacing."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segloss
from segloss import bilateral_error, bilateral_filter
from segloss.bilateral import LatticeError, PreparedFilter, ToleranceError, guide_features, lowrank
from segloss.bilateral.landmarks import choose_landmarks
from segloss.bilateral.lattice import gaussian_filter as lattice_filter
from tests.segloss.test_bilateral import relative_error

METHODS = ["exact", "blocksparse"]  # those that reach any tolerance
EVERY_SHAPE = [(9,), (4, 5), (3, 4, 2)]

seeds = st.integers(0, 2**16)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
spacings = st.lists(st.sampled_from([0.3, 1.0, 2.5]), min_size=3, max_size=3)
sigmas = st.sampled_from([0.2, 1.0, math.inf])
widths = st.sampled_from([0.7, 2.0, 40.0, math.inf])


def problem(shape: tuple[int, ...], *, channels: int = 2, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values or logits ``[B, 3, *shape]`` and a guide ``[B, C, *shape]``, in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, 3, *shape, generator=generator, dtype=torch.float64)
    return values, torch.rand(batch, channels, *shape, generator=generator, dtype=torch.float64)


def smooth_problem(shape: tuple[int, ...], *, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Probabilities and a guide that are smooth, as those of organs are, in float32."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    coarse = torch.rand(2, 1, max(4, channels), *(4 for _ in shape), generator=torch.Generator().manual_seed(0))
    probability, guide = (F.interpolate(maps, shape, mode=mode) for maps in coarse)
    return (5 * probability).softmax(1), guide[:, :channels]


def kernel(image: Tensor, spacing: Any, sigma_rgb: Any = 1.0, sigma_xy: Any = 2.0) -> Tensor:
    """W ``[B, N, N]``, written out from the places of the pixels."""
    size = image.shape[2:]
    steps = (1.0,) * len(size) if spacing is None else spacing
    axes = [step * torch.arange(length, dtype=image.dtype) for length, step in zip(size, steps, strict=True)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    colours = image.flatten(2)
    apart = (places[:, :, None] - places[:, None]).square().sum(0)
    differ = (colours[:, :, :, None] - colours[:, :, None]).square().sum(1)
    return torch.exp(-differ / (2 * sigma_rgb**2) - apart / (2 * sigma_xy**2))


def energy(probability: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """The Potts energy of each image, from ``[B, N, N]`` and a mask ``[B, 1, N]``."""
    flat = probability.flatten(2)
    return torch.einsum("bkp,bpq,bkq->b", mask * (1 - flat), weights, mask * flat)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30)
@given(shape=shapes, spacing=spacings, given_spacing=st.booleans(), sigma_rgb=sigmas, sigma_xy=widths, seed=seeds)
def test_the_filter_is_the_matrix_of_all_pairs(
    method: str,
    shape: tuple[int, ...],
    spacing: list[float],
    given_spacing: bool,
    sigma_rgb: float,
    sigma_xy: float,
    seed: int,
) -> None:
    values, image = problem(shape, seed=seed)
    steps = tuple(spacing[: len(shape)]) if given_spacing else None
    expected = (values.flatten(2) @ kernel(image, steps, sigma_rgb, sigma_xy)).view_as(values)
    options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy, "spacing": steps}
    filtered = bilateral_filter(values, image, method=method, tolerance=1e-9, **options)
    torch.testing.assert_close(filtered, expected, rtol=1e-7, atol=1e-9)
    assert bilateral_error(values, image, expected, **options).max() < 1e-9
    prepared = PreparedFilter(image, method=method, tolerance=1e-9, **options)
    torch.testing.assert_close(prepared(values), filtered)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(shape=shapes, spacing=spacings, seed=seeds, from_logits=st.booleans())
def test_the_dense_loss_and_its_gradients_are_those_of_the_formula(
    method: str, shape: tuple[int, ...], spacing: list[float], seed: int, from_logits: bool
) -> None:
    logits, image = problem(shape, seed=seed)
    logits = logits if from_logits else logits.sigmoid()
    valid = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    steps = tuple(spacing[: len(shape)])
    inputs = [logits, image, torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)]
    logits, image, sigma_rgb, sigma_xy = (t.requires_grad_() for t in inputs)
    loss = segloss.potts_crf(
        logits,
        image,
        sigma_rgb=sigma_rgb,
        sigma_xy=sigma_xy,
        spacing=steps,
        valid=valid,
        from_logits=from_logits,
        method=method,
        tolerance=1e-9,
        reduction="none",
    )
    probability = logits.softmax(1) if from_logits else logits
    mask = valid.flatten(1)[:, None].double()
    expected = energy(probability, kernel(image, steps, sigma_rgb, sigma_xy), mask)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-8)
    found, wanted = (torch.autograd.grad(value.sum(), inputs) for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@settings(max_examples=20)
@given(shape=shapes, spacing=spacings, seed=seeds, radius=st.integers(0, 5))
@pytest.mark.parametrize("normalize", [None, "pixels", "pairs"])
def test_the_windowed_loss_is_the_dense_one_near_the_diagonal(
    normalize: str | None, shape: tuple[int, ...], spacing: list[float], seed: int, radius: int
) -> None:
    logits, image = (t.requires_grad_() for t in problem(shape, seed=seed))
    valid = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    steps = tuple(spacing[: len(shape)])
    places = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).flatten(1)
    near = ((places[:, :, None] - places[:, None]).abs().amax(0) <= radius).double()
    mask = valid.flatten(1)[:, None].double()
    expected = energy(logits.softmax(1), kernel(image, steps) * near, mask)
    counts = {"pixels": mask.sum((1, 2)), "pairs": (mask @ near * mask).sum((1, 2))}
    if normalize is not None:
        expected = expected / counts[normalize].clamp(min=1)
    options = {"sigma_rgb": 1.0, "sigma_xy": 2.0, "spacing": steps, "radius": radius, "normalize": normalize}
    loss = segloss.windowed_potts(logits, image, valid=valid, reduction="none", **options)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value.sum(), (logits, image)) for value in (loss, expected))
    torch.testing.assert_close(found, wanted)
    share = segloss.window_mass(image, sigma_rgb=1.0, sigma_xy=2.0, spacing=steps, radius=radius)
    weights = kernel(image, steps).detach()
    torch.testing.assert_close(share, (weights * near).sum((1, 2)) / weights.sum((1, 2)), rtol=1e-5, atol=0)


NEIGHBOURS = [(1, 2, 1), (2, 4, 1), (2, 8, 2), (3, 6, 1), (3, 18, 2), (3, 26, 3)]  # dimensions, count, steps


@pytest.mark.parametrize(("axes", "connectivity", "most"), NEIGHBOURS)
@pytest.mark.parametrize("spacing", [None, (3.0, 0.5, 1.0)])
def test_the_grid_loss_weighs_neighbours_by_their_distance(
    axes: int, connectivity: int, most: int, spacing: tuple[float, ...] | None
) -> None:
    shape = (4, 5, 3)[:axes]
    spacing = spacing and spacing[:axes]
    logits, image = problem(shape)
    valid = torch.rand(2, *shape) < 0.8
    places = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).flatten(1).double()
    steps = (places[:, :, None] - places[:, None]).abs()
    near = (steps.amax(0) == 1) & (steps.sum(0) <= most)
    middle = near[:, (shape[0] // 2) * math.prod(shape[1:]) + math.prod(shape[1:]) // 2]
    assert middle.sum() == connectivity
    weights = kernel(image, None, 0.5, math.inf) * near
    if spacing is not None:
        lengths = (steps * torch.tensor(spacing, dtype=torch.float64)[:, None, None]).square().sum(0).sqrt()
        weights = weights * min(spacing) / lengths.where(near, 1)
    expected = energy(logits.softmax(1), weights, valid.flatten(1)[:, None].double())
    options = {"sigma_rgb": 0.5, "valid": valid, "reduction": "none", "spacing": spacing}
    loss = segloss.grid_potts(logits, image, connectivity=connectivity, **options)
    torch.testing.assert_close(loss, expected)
    if most == 1:
        assert segloss.grid_potts(logits, image, **options).equal(loss)


def test_a_boundary_costs_the_same_for_its_area_across_any_axis() -> None:
    spacing, image = (2.0, 1.0, 0.5), torch.zeros(1, 1, 8, 8, 8)
    costs = []
    for axis, step in enumerate(spacing):
        half = (torch.arange(8) < 4).float().view(*(-1 if a == axis else 1 for a in range(3))).expand(1, 1, 8, 8, 8)
        area = 8 * 8 * math.prod(spacing) / step
        loss = segloss.grid_potts(torch.cat([half, 1 - half], 1), image, spacing=spacing, from_logits=False)
        costs.append(loss.item() / area)
    assert costs == pytest.approx([costs[0]] * 3)


FUNCTIONS: list[tuple[str, Callable[..., Tensor]]] = [
    ("filter", lambda values, image, **o: bilateral_filter(values, image, sigma_xy=3.0, **o)),
    ("dense", lambda values, image, **o: segloss.potts_crf(values, image, sigma_xy=3.0, **o)),
    ("windowed", lambda values, image, **o: segloss.windowed_potts(values, image, sigma_xy=3.0, radius=2, **o)),
]


@pytest.mark.parametrize("function", [f for _, f in FUNCTIONS], ids=[name for name, _ in FUNCTIONS])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_an_axis_of_one_pixel_does_not_matter(function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    if len(shape) == 3:
        shape = shape[1:]
    values, image = problem(shape)
    spacing = (0.5, 2.0)[: len(shape)]
    flat = function(values, image, sigma_rgb=0.5, spacing=spacing)
    thick = function(values[:, :, None], image[:, :, None], sigma_rgb=0.5, spacing=(7.0, *spacing))
    torch.testing.assert_close(thick.view_as(flat), flat)


@pytest.mark.parametrize("method", [*METHODS, "lowrank"])
@pytest.mark.parametrize("shape", [(60,), (12, 11), (7, 8, 6)])
def test_spacing_scales_the_places(method: str, shape: tuple[int, ...]) -> None:
    """A spacing of whole numbers is a larger image, of which only every so many pixels have values."""
    values, image = problem(shape, channels=1)
    spacing = (2, 3, 1)[: len(shape)]
    inside = tuple(slice(None, None, step) for step in spacing)
    larger = [length * step for length, step in zip(shape, spacing, strict=True)]
    wide_values, wide_image = (t.new_zeros(2, t.shape[1], *larger) for t in (values, image))
    wide_values[(..., *inside)], wide_image[(..., *inside)] = values, image
    options: dict[str, Any] = {"sigma_rgb": 2.0, "sigma_xy": 6.0, "tolerance": 1e-3}
    exact = bilateral_filter(wide_values, wide_image, method="exact", **options)[(..., *inside)]
    filtered = bilateral_filter(values, image, method=method, spacing=spacing, **options)
    assert relative_error(filtered, exact) < (1e-12 if method == "exact" else 1e-3)


def test_the_lattice_sees_places_in_units_of_the_spacing() -> None:
    values, image = smooth_problem((6, 7, 8))
    features = guide_features(image, 0.5, 6.0, (2.0, 1.0, 3.0))
    places = torch.stack(torch.meshgrid(*map(torch.arange, (6, 7, 8)), indexing="ij")).flatten(1)
    torch.testing.assert_close(features[0, 1:], places * torch.tensor([2.0, 1.0, 3.0])[:, None] / 6)
    options: dict[str, Any] = {"sigma_rgb": 0.5, "sigma_xy": 6.0, "spacing": (2.0, 1.0, 3.0)}
    filtered = bilateral_filter(values, image, method="lattice", **options)
    torch.testing.assert_close(filtered.flatten(2), lattice_filter(values.flatten(2), features))


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_units_do_not_matter(unit: float) -> None:
    values, image = problem((3, 4, 5))
    spacing = (2.0, 0.7, 0.7)
    expected = bilateral_filter(values, image, sigma_rgb=0.5, sigma_xy=1.5, spacing=spacing)
    scaled = tuple(unit * step for step in spacing)
    found = bilateral_filter(values, image, sigma_rgb=0.5, sigma_xy=unit * 1.5, spacing=scaled)
    torch.testing.assert_close(found, expected)
    grids = [segloss.grid_potts(values, image, sigma_rgb=0.5, connectivity=26, spacing=s) for s in (spacing, scaled)]
    torch.testing.assert_close(*grids)


def test_a_spacing_of_ones_is_none() -> None:
    values, image = problem((3, 4, 5))
    for spacing in ((1, 1, 1), [1.0, 1.0, 1.0], tuple(np.ones(3, dtype=np.float32))):
        options: dict[str, Any] = {"sigma_rgb": 0.5, "sigma_xy": 1.5}
        expected = bilateral_filter(values, image, **options)
        assert bilateral_filter(values, image, spacing=spacing, **options).equal(expected)


@pytest.mark.parametrize("shape", [(500,), (24, 22), (9, 10, 8)])
@pytest.mark.parametrize("method", [*METHODS, "lowrank", "lattice"])
def test_every_method_is_symmetric(method: str, shape: tuple[int, ...]) -> None:
    _, image = smooth_problem(shape)
    u, v = torch.rand(2, 1, 1, *shape, dtype=torch.float64)
    options = {"sigma_rgb": 0.5, "sigma_xy": 6.0, "spacing": (2.0, 1.0, 1.0)[-len(shape) :], "method": method}
    left, right = (bilateral_filter(w, image.double(), tolerance=0.05, **options) for w in (u, v))
    torch.testing.assert_close((left * v).sum(), (right * u).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "spacing", "sigma_xy"),
    [
        ((3000,), None, 100.0),
        ((60, 50), (2.0, 1.0), 20.0),
        ((16, 24, 20), None, 3.0),
        ((16, 24, 20), (2.0, 1.0, 1.0), 4.0),
        ((10, 30, 30), (5.0, 1.0, 1.0), 4.0),
        ((1, 40, 40), None, 10.0),
        ((40, 1, 40), None, 10.0),
        ((24, 24, 24), None, 40.0),
    ],
)
@pytest.mark.parametrize("tolerance", [2e-2, 1e-2, 3e-3])
def test_low_rank_keeps_the_tolerance(
    shape: tuple[int, ...], spacing: tuple[float, ...] | None, sigma_xy: float, tolerance: float
) -> None:
    values, image = smooth_problem(shape)
    options: dict[str, Any] = {"sigma_rgb": 0.15, "sigma_xy": sigma_xy, "spacing": spacing}
    filtered = bilateral_filter(values, image, method="lowrank", tolerance=tolerance, **options)
    exact = bilateral_filter(values.double(), image.double(), method="exact", **options)
    assert relative_error(filtered, exact) <= tolerance


@pytest.mark.parametrize("shape", [(41,), (13, 10), (6, 7, 5), (5, 1, 9)])
@pytest.mark.parametrize("step", [1.0, 0.2, 0.01])
def test_low_rank_is_the_product_of_its_parts_in_chunks_of_any_size(
    shape: tuple[int, ...], step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, image = smooth_problem(shape, channels=2)
    features = guide_features(image.double(), 0.2, 1 / step)[0]
    landmarks, _ = choose_landmarks(features[:2], 1e-3, 32)
    part = lowrank.LowRank(features, shape, landmarks, 1e-2, torch.float64)
    pixels = math.prod(shape)
    matrix = lowrank.multiply(part, torch.eye(pixels, dtype=torch.float64)).filtered()
    torch.testing.assert_close(matrix, matrix.t())
    assert torch.linalg.eigvalsh(matrix).min() > -1e-6
    some = torch.arange(0, pixels, 3)
    product = lowrank.multiply(part, torch.randn(3, pixels, dtype=torch.float64))
    torch.testing.assert_close(product.at(some), product.filtered()[:, some])
    values = torch.randn(3, pixels, dtype=torch.float64)
    for chunk in (1, 3 * part.area * len(landmarks), 2 * part.area * len(landmarks) * part.grid[-1]):
        monkeypatch.setitem(lowrank._CHUNK, "cpu", chunk)
        torch.testing.assert_close(lowrank.multiply(part, values).filtered(), values @ matrix)


def test_narrow_kernels_of_volumes_are_refused_by_name_or_fall_back() -> None:
    values, image = smooth_problem((26, 26, 26))
    options: dict[str, Any] = {"sigma_rgb": 0.2, "sigma_xy": 0.6}
    with pytest.raises(ToleranceError, match="sigma_xy: expected a wider kernel for method='lowrank'"):
        bilateral_filter(values, image, method="lowrank", **options)
    auto = bilateral_filter(values, image, **options)
    assert auto.equal(bilateral_filter(values, image, method="blocksparse", **options))


@pytest.mark.parametrize(("sigma_xy", "method"), [(3.0, "lowrank"), (1.0, "blocksparse")])
def test_auto_takes_low_rank_for_volumes_if_functions_of_space_are_few(sigma_xy: float, method: str) -> None:
    values, image = smooth_problem((22, 24, 26))
    auto = bilateral_filter(values, image, sigma_rgb=0.3, sigma_xy=sigma_xy)
    assert auto.equal(bilateral_filter(values, image, sigma_rgb=0.3, sigma_xy=sigma_xy, method=method))


def test_auto_leaves_noise_of_many_channels_to_pairs_of_tiles() -> None:
    values, image = torch.rand(1, 2, 22, 24, 20), torch.rand(1, 3, 22, 24, 20)
    auto = bilateral_filter(values, image, sigma_xy=4.0)
    assert auto.equal(bilateral_filter(values, image, sigma_xy=4.0, method="blocksparse"))


@pytest.mark.parametrize(("shape", "channels"), [((400,), 7), ((20, 20), 6), ((8, 8, 7), 1), ((8, 8, 7), 5)])
def test_the_lattice_takes_up_to_8_features(shape: tuple[int, ...], channels: int) -> None:
    _, image = smooth_problem(shape, channels=channels)
    values = torch.rand(1, 2, *shape, dtype=torch.float64)
    options: dict[str, Any] = {"sigma_rgb": 0.5, "sigma_xy": 4.0, "method": "lattice"}
    filtered = bilateral_filter(values, image.double(), **options)
    exact = bilateral_filter(values, image.double(), **options | {"method": "exact"})
    assert relative_error(filtered, exact) < 0.6
    with pytest.raises(LatticeError, match="method: 'lattice'"):
        bilateral_filter(values, image.double(), **options | {"sigma_xy": 1e-12})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_gradients_of_values_image_and_sigmas(method: str, shape: tuple[int, ...]) -> None:
    values, image = problem(shape, batch=1)
    sigma_rgb, sigma_xy = (torch.tensor(s, dtype=torch.float64) for s in (0.6, 3.0))
    arguments = tuple(t.requires_grad_() for t in (values, image, sigma_rgb, sigma_xy))
    spacing = (2.0, 1.0, 0.5)[: len(shape)]

    def filtered(values: Tensor, image: Tensor, sigma_rgb: Tensor, sigma_xy: Tensor) -> Tensor:
        options = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy, "method": method, "tolerance": 1e-9}
        return bilateral_filter(values, image, spacing=spacing, **options)

    assert torch.autograd.gradcheck(filtered, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(filtered, arguments, fast_mode=True)


LOSSES: list[tuple[str, Callable[..., Tensor]]] = [
    ("dense", lambda logits, image, **o: segloss.potts_crf(logits, image, sigma_rgb=0.5, sigma_xy=3.0, **o)),
    (
        "windowed",
        lambda logits, image, **o: segloss.windowed_potts(logits, image, sigma_rgb=0.5, sigma_xy=3.0, radius=2, **o),
    ),
    ("grid", lambda logits, image, **o: segloss.grid_potts(logits, image, sigma_rgb=0.5, **o)),
    (
        "filter",
        lambda logits, image, **o: bilateral_filter(logits, image, sigma_rgb=0.5, sigma_xy=3.0, **o).square().mean(),
    ),
]
losses = pytest.mark.parametrize("loss", [loss for _, loss in LOSSES], ids=[name for name, _ in LOSSES])


@losses
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_losses_have_first_and_second_derivatives(loss: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    logits, image = (t.requires_grad_() for t in problem(shape, batch=1))
    spacing = (2.0, 1.0, 0.5)[: len(shape)]
    assert torch.autograd.gradcheck(lambda *a: loss(*a, spacing=spacing), (logits, image), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *a: loss(*a, spacing=spacing), (logits, image), fast_mode=True)


@losses
@pytest.mark.parametrize("shape", [(6,), pytest.param((3, 4, 2), marks=pytest.mark.slow)])
def test_losses_compile_into_one_graph_and_map(loss: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    logits, image = (t.float() for t in problem(shape))
    spacing = (2.0, 1.0, 0.5)[: len(shape)]

    def value(logits: Tensor, image: Tensor) -> Tensor:
        return loss(logits, image, spacing=spacing)

    inputs = (logits.requires_grad_(), image.requires_grad_())
    expected = torch.autograd.grad(value(*inputs), inputs)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)
    stack = tuple(torch.stack([t.detach(), t.detach().flip(0)]) for t in inputs)
    both = torch.func.vmap(torch.func.grad(value, argnums=(0, 1)))(*stack)
    for mapped, alone in zip(both, expected, strict=True):
        torch.testing.assert_close(mapped[0], alone)
        torch.testing.assert_close(mapped[1], alone.flip(0))


@pytest.mark.parametrize("shape", [(40,), (16, 12), (8, 12, 16)])
@pytest.mark.parametrize("centred", [False, True])
def test_scaling_shrinks_every_axis(shape: tuple[int, ...], centred: bool) -> None:
    logits, image = problem(shape)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    small = F.interpolate(logits.softmax(1), scale_factor=0.5, mode=mode)
    guide = (
        F.interpolate(image, scale_factor=0.5, mode=mode)
        if centred
        else image[(..., *[slice(None, None, 2)] * len(shape))]
    )
    options: dict[str, Any] = {"sigma_rgb": 0.5, "spacing": (3.0, 1.0, 1.0)[: len(shape)]}
    expected = segloss.potts_crf(small, guide, sigma_xy=4.0, from_logits=False, **options)
    scaled = segloss.potts_crf(logits, image, sigma_xy=8.0, scale_factor=0.5, centred=centred, **options)
    torch.testing.assert_close(scaled, expected)


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_gates_and_normalisation_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    logits, image = problem(shape)
    gate = segloss.confidence_gate(logits, torch.randint(0, 3, (2, *shape)))
    assert gate.shape == (2, *shape)
    weights, flat = kernel(image, None, 0.5), logits.softmax(1).flatten(2)
    expected = torch.einsum("bkp,bpq,bkq->b", gate.flatten(1)[:, None] * (1 - flat), weights, flat)
    options: dict[str, Any] = {"sigma_rgb": 0.5, "sigma_xy": 2.0, "reduction": "none"}
    torch.testing.assert_close(segloss.potts_crf(logits, image, gate=gate, **options), expected)
    divided = segloss.potts_crf(logits, image, gate=gate, normalize="pairs", **options)
    torch.testing.assert_close(divided, expected / math.prod(shape) ** 2)


BAD: list[tuple[Any, type[Exception], str]] = [
    (
        (1.0, 1.0),
        ValueError,
        r"spacing: expected 3 numbers to go with image \[2, 2, 3, 4, 2\], got 2",
    ),
    ((1.0, 1.0, 1.0, 1.0), ValueError, r"spacing: expected 3 numbers to go with image .*, got 4"),
    ((1.0, 0.0, 1.0), ValueError, "spacing: expected a finite number .*, got 0.0"),
    ((1.0, -2.0, 1.0), ValueError, "spacing: expected a finite number .*, got -2.0"),
    ((1.0, math.nan, 1.0), ValueError, "spacing: expected a finite number .*, got nan"),
    ((1.0, math.inf, 1.0), ValueError, "spacing: expected a finite number .*, got inf"),
    (2.0, TypeError, "spacing: expected a sequence of numbers, got float"),
    ("111", TypeError, "spacing: expected a sequence of numbers, got str"),
    ((1.0, "1", 1.0), TypeError, "spacing: expected a number, got str"),
    ((1.0, True, 1.0), TypeError, "spacing: expected a number, got bool"),
]
PUBLIC: dict[str, Callable[..., Any]] = {
    "filter": bilateral_filter,
    "error": lambda values, image, **o: bilateral_error(values, image, values, **o),
    "potts": segloss.potts_crf,
    "windowed": segloss.windowed_potts,
    "grid": segloss.grid_potts,
    "mass": lambda values, image, **o: segloss.window_mass(image, **o),
    "prepared": lambda values, image, **o: PreparedFilter(image, **o),
}


@pytest.mark.parametrize("function", PUBLIC.values(), ids=PUBLIC)
@pytest.mark.parametrize(("spacing", "error", "message"), BAD)
def test_spacings_that_make_no_sense_are_refused(
    function: Callable[..., Any], spacing: Any, error: type[Exception], message: str
) -> None:
    values, image = problem((3, 4, 2))
    with pytest.raises(error, match=message):
        function(values, image, sigma_rgb=0.5, spacing=spacing)


@pytest.mark.parametrize("make", [segloss.PottsCRF, segloss.WindowedPotts, segloss.GridPotts])
def test_modules_hold_a_spacing_and_refuse_bad_ones(make: Callable[..., Any]) -> None:
    logits, image = problem((3, 4, 2))
    module = make(sigma_rgb=0.5, spacing=(2.0, 1.0, 1.0))
    assert "spacing=(2.0, 1.0, 1.0)" in repr(module)
    assert module(logits, image) != make(sigma_rgb=0.5)(logits, image)
    with pytest.raises(ValueError, match=r"spacing: expected 2 numbers to go with image .*, got 3"):
        module(logits[:, :, 0], image[:, :, 0])
    with pytest.raises(ValueError, match="spacing: expected a finite number"):
        make(spacing=(2.0, 0.0, 1.0))


@pytest.mark.parametrize("shape", [(), (2, 2, 2, 2)])
def test_other_numbers_of_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    values, image = torch.rand(1, 2, *shape), torch.rand(1, 1, *shape)
    for function in (bilateral_filter, lambda v, i: bilateral_error(v, i, v)):
        with pytest.raises(ValueError, match=r"values: expected \[B, K, \*spatial\] of 1 to 3 dimensions, got \["):
            function(values, image)
    for loss in (segloss.potts_crf, segloss.windowed_potts, segloss.grid_potts):
        with pytest.raises(ValueError, match=r"logits: expected \[B, K, \*spatial\]"):
            loss(values, image)
        with pytest.raises(ValueError, match=r"logits: expected probabilities \[B, K, \*spatial\] of 1 to 3"):
            loss(values, image, from_logits=False)


@pytest.mark.parametrize(
    ("shape", "connectivity", "choices"),
    [((4,), 4, "2"), ((4, 4), 6, "4, 8"), ((4, 4, 4), 8, "6, 18, 26")],
)
def test_a_connectivity_is_one_of_the_dimensions(shape: tuple[int, ...], connectivity: int, choices: str) -> None:
    with pytest.raises(ValueError, match=f"connectivity: expected one of {choices}, got {connectivity}"):
        segloss.grid_potts(*problem(shape), connectivity=connectivity)


@pytest.mark.parametrize("spacing", [(1e-300, 1.0, 1.0), (9e5, 1.0, 1.0), (1e-300, 9e5, 9e5)])
def test_extreme_spacings_keep_values_and_gradients_finite(spacing: tuple[float, ...]) -> None:
    logits, image = (t.float().requires_grad_() for t in problem((3, 4, 2)))
    sigma_rgb, sigma_xy = (torch.tensor(0.5, requires_grad=True) for _ in range(2))
    for sigmas in ({"sigma_rgb": 0.5}, {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy}):
        loss = segloss.potts_crf(logits, image, spacing=spacing, **sigmas)
        inputs = [logits, image, *(s for s in sigmas.values() if isinstance(s, Tensor))]
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, inputs))
    assert segloss.grid_potts(logits, image, sigma_rgb=0.5, spacing=spacing, connectivity=26).isfinite()


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_nothing_to_filter(shape: tuple[int, ...]) -> None:
    values, image = problem(shape)
    assert bilateral_filter(values, image, sigma_rgb=0.5).shape == values.shape
    for _, loss in LOSSES[:-1]:
        assert loss(values, image).item() == 0
