"""The random walk, against powers of a dense matrix."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segloss
from segattr.refine.random_walk import random_walk

Golden = Callable[[str], dict[str, Tensor]]


def dense_walk(maps: Tensor, affinity: Tensor, beta: float, steps: int) -> Tensor:
    """The definition: a power of the row-normalised matrix, image by image."""
    walked = []
    for image, weights in zip(maps, affinity.to_dense(), strict=True):
        powers = weights**beta
        transition = torch.linalg.matrix_power(powers / powers.sum(1, keepdim=True), steps)
        walked.append((transition @ image.flatten(1).T).T.view_as(image))
    return torch.stack(walked)


def sparse(values: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(like.indices(), values, like.shape, is_coalesced=True, check_invariants=False)


def example(images: int = 2, maps: int = 3, height: int = 4, width: int = 5) -> tuple[Tensor, Tensor]:
    boundary = torch.rand(images, 1, height, width, dtype=torch.float64)
    return torch.randn(images, maps, height, width, dtype=torch.float64), segloss.path_affinity(boundary, radius=2.5)


def test_affinitynet_walk_of_the_golden_case(golden: Golden) -> None:
    case = golden("attr/refine")
    affinity = segloss.feature_affinity(case["in/rw/feat"][None], radius=case["in/rw/radius"].item())
    maps = case["in/rw/cam"][None]
    walked = random_walk(maps, affinity, beta=case["in/rw/beta"].item(), steps=int(case["in/rw/steps"]))
    assert (affinity.to_dense()[0] - case["out/rw/W"]).abs().max() < 1e-9
    assert (walked[0] - case["out/rw/cam"]).abs().max() < 1e-9


def test_irnet_walk_of_the_golden_case(golden: Golden) -> None:
    case = golden("attr/refine")
    boundary = case["in/irn/boundary"][None, None]
    affinity = segloss.path_affinity(boundary, radius=case["in/irn/radius"].item())
    assert (affinity.to_dense()[0] - case["out/irn/W"]).abs().max() < 1e-9
    beta, steps = case["in/irn/beta"].item(), int(case["in/irn/steps"])
    walked = random_walk(case["in/rw/cam"][None], affinity, beta=beta, steps=steps, boundary=boundary)
    assert (walked[0] - case["out/irn/cam"]).abs().max() < 1e-9


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    radius=st.sampled_from([1, 1.5, 2.5, 10]),
    steps=st.sampled_from([1, 2, 7, 64, 256]),
    beta=st.sampled_from([1, 2.5, 10]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_equals_a_power_of_the_dense_matrix(
    shape: tuple[int, int, int, int], radius: float, steps: int, beta: float, symmetric: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    maps = torch.randn(shape, dtype=torch.float64)
    affinity = segloss.path_affinity(torch.rand(shape[0], 1, *shape[2:], dtype=torch.float64), radius=radius)
    if not symmetric:
        affinity = sparse(torch.rand_like(affinity.values()) + 0.01, affinity)
    walked = random_walk(maps, affinity, beta=beta, steps=steps)
    assert walked.shape == shape
    assert (walked - dense_walk(maps, affinity, beta, steps)).abs().max() < 1e-10


@pytest.mark.parametrize(
    "form",
    [
        Tensor.to_dense,
        lambda a: a.to_dense().to_sparse_csr(),
        lambda a: sparse(a.values(), a) + 0 * a,
        lambda a: a.to_dense().to_sparse().transpose(1, 2),
    ],
    ids=["dense", "csr", "sum", "uncoalesced"],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_layout_of_the_affinity_does_not_matter(form: Callable[[Tensor], Tensor]) -> None:
    maps, affinity = example()
    assert (random_walk(maps, form(affinity), steps=5) - random_walk(maps, affinity, steps=5)).abs().max() < 1e-13


def test_constant_maps_stay_and_scores_keep_their_range() -> None:
    maps, affinity = example()
    walked = random_walk(maps, affinity)
    assert (random_walk(torch.full_like(maps, -3.5), affinity) == -3.5).all()
    assert (walked.amax((2, 3)) <= maps.amax((2, 3))).all()
    assert (walked.amin((2, 3)) >= maps.amin((2, 3))).all()


def test_symmetric_affinities_keep_the_sum_weighted_by_the_degrees() -> None:
    maps, affinity = example()
    degrees = (affinity.to_dense() ** 10).sum(2).view(2, 1, 4, 5)
    before, after = ((degrees * m).sum((2, 3)) for m in (maps, random_walk(maps, affinity, steps=100)))
    assert (before - after).abs().max() < 1e-11


def test_columns_from_the_other_side_are_the_same() -> None:
    maps, affinity = example(images=1)
    powers = affinity.to_dense()[0] ** 8
    columns = torch.linalg.matrix_power(powers / powers.sum(0, keepdim=True), 16)
    expected = (maps.flatten(2)[0] @ columns).view_as(maps)
    assert (random_walk(maps, affinity, beta=8, steps=16) - expected).abs().max() < 1e-12


def test_nothing_crosses_a_closed_boundary() -> None:
    boundary = torch.zeros(1, 1, 5, 7)
    boundary[..., 3] = 1
    maps = torch.zeros(1, 1, 5, 7)
    maps[..., 2, 0] = 1
    walked = random_walk(maps, segloss.path_affinity(boundary, radius=5), boundary=boundary)
    assert torch.allclose(walked[..., :3], torch.tensor(1 / 15))
    assert not walked[..., 3:].any()


def test_boundary_takes_the_scores_on_it_first() -> None:
    maps, affinity = example()
    boundary = torch.rand(2, 1, 4, 5, dtype=torch.float64)
    expected = random_walk(maps * (1 - boundary), affinity, steps=3)
    assert torch.equal(random_walk(maps, affinity, steps=3, boundary=boundary), expected)


def test_batch_equals_image_by_image_and_map_by_map() -> None:
    maps, affinity = example()
    batch = random_walk(maps, affinity, steps=20)
    for image in range(2):
        for index in range(3):
            weights = affinity.to_dense()[image : image + 1]
            alone = random_walk(maps[image : image + 1, index : index + 1], weights, steps=20)
            assert (alone[0, 0] - batch[image, index]).abs().max() < 1e-13


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (0, 0, 3, 4), (1, 1, 1, 1)], ids=str)
def test_no_image_no_map_one_pixel(shape: tuple[int, int, int, int]) -> None:
    affinity = segloss.path_affinity(torch.rand(shape[0], 1, *shape[2:]), radius=3).requires_grad_()
    maps = torch.rand(shape, requires_grad=True)
    walked = random_walk(maps, affinity, steps=3)
    walked.sum().backward()
    assert walked.shape == shape
    assert maps.grad is not None
    assert maps.grad.shape == shape


def test_float32_is_as_exact_as_its_input_after_many_steps() -> None:
    maps, affinity = example(1, 2, 24, 24)
    walked = random_walk(maps.float(), affinity.float())
    assert walked.dtype == torch.float32
    assert (walked - dense_walk(maps, affinity, 10, 256)).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_the_precision_of_the_input(dtype: torch.dtype) -> None:
    maps, affinity = example()
    maps, affinity = maps.to(dtype), affinity.to(dtype)
    with torch.autocast("cpu"):
        walked = random_walk(maps, affinity, steps=50)
    assert walked.dtype == torch.float32
    assert (walked - dense_walk(maps.double(), affinity.double(), 10, 50)).abs().max() < 1e-6


def test_float64_of_either_gives_float64() -> None:
    maps, affinity = example()
    assert random_walk(maps.float(), affinity, steps=1).dtype == torch.float64
    assert random_walk(maps, affinity.float(), steps=1).dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_affinities_of_any_scale_stay_finite(scale: float) -> None:
    maps, affinity = example()
    walked = random_walk(maps, affinity * scale, beta=50, steps=30)
    assert (walked - random_walk(maps, affinity, beta=50, steps=30)).abs().max() < 1e-10


def test_gradients() -> None:
    maps, affinity = example(height=3, width=2)
    boundary = torch.rand(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    values = affinity.values().requires_grad_()

    def walk(maps: Tensor, values: Tensor, boundary: Tensor) -> Tensor:
        return random_walk(maps, sparse(values, affinity), beta=2, steps=4, boundary=boundary)

    assert torch.autograd.gradcheck(walk, (maps.requires_grad_(), values, boundary))
    assert torch.autograd.gradcheck(lambda m: walk(m, values.detach(), boundary.detach()), (maps,))
    assert torch.autograd.gradcheck(lambda v: walk(maps.detach(), v, boundary.detach()), (values,))


def test_gradient_reaches_the_boundary_through_the_affinities() -> None:
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    random_walk(torch.rand(1, 2, 4, 4), segloss.path_affinity(logits.sigmoid()), steps=8).square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


def test_inputs_are_left_alone() -> None:
    maps, affinity = example()
    before = maps.clone(), affinity.values().clone()
    random_walk(maps, affinity, steps=3)
    assert torch.equal(maps, before[0])
    assert torch.equal(affinity.values(), before[1])


def with_entry(affinity: Tensor, row: int, value: float) -> Tensor:
    dense = affinity.to_dense()
    dense[0, row] = value
    return dense


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": [1]}, TypeError, "maps: expected a tensor, got list"),
        ({"maps": torch.zeros(2, 3, 4, 5, dtype=torch.long)}, TypeError, "maps: expected a floating-point tensor"),
        ({"maps": torch.zeros(3, 4, 5)}, ValueError, r"maps: expected \[B, C, H, W\]"),
        ({"maps": torch.zeros(2, 3, 0, 5)}, ValueError, "at least one pixel"),
        ({"maps": torch.full((2, 3, 4, 5), torch.nan)}, ValueError, "maps: expected finite"),
        ({"affinity": None}, TypeError, "affinity: expected a tensor"),
        ({"affinity": torch.ones(2, 20, 20, dtype=torch.long)}, TypeError, "affinity: expected a floating-point"),
        ({"affinity": torch.ones(20, 20)}, ValueError, r"affinity: expected \[2, 20, 20\] to go with maps"),
        ({"affinity": torch.ones(2, 20, 20, device="meta")}, ValueError, "affinity: expected device"),
        ({"affinity": lambda a: a.to_dense().to_sparse(2)}, ValueError, "affinity: expected all 3 dimensions sparse"),
        ({"affinity": lambda a: with_entry(a, 3, -1)}, ValueError, "affinity: expected at least 0, got -1"),
        ({"affinity": lambda a: with_entry(a, 3, 0)}, ValueError, "affinity: .* row of zeros"),
        ({"affinity": lambda a: with_entry(a, 3, torch.inf)}, ValueError, "affinity: expected finite"),
        ({"beta": 0.5}, ValueError, "beta: expected a finite number of at least 1"),
        ({"beta": "10"}, TypeError, "beta: expected a number"),
        ({"steps": 0}, ValueError, "steps: expected a finite number of at least 1"),
        ({"steps": 2.0}, TypeError, "steps: expected an int"),
        ({"boundary": 0.5}, TypeError, "boundary: expected a tensor"),
        ({"boundary": torch.zeros(2, 4, 5)}, ValueError, r"boundary: expected \[2, 1, 4, 5\]"),
        ({"boundary": torch.full((2, 1, 4, 5), 1.5)}, ValueError, "boundary: expected values from 0 to 1"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    maps, affinity = example()
    change = {key: value(affinity) if callable(value) else value for key, value in change.items()}
    with pytest.raises(error, match=message):
        random_walk(**{"maps": maps, "affinity": affinity, **change})


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    maps, affinity = example()
    results = []
    for device in ("cpu", "cuda"):
        inputs = maps.to(device).requires_grad_(), affinity.to(device).requires_grad_()
        walked = random_walk(*inputs, steps=20)
        results.append((walked, *torch.autograd.grad(walked.square().sum(), inputs)))
    for here, there in zip(*results, strict=True):
        assert (here.to_dense() - there.to_dense().cpu()).abs().max() < 1e-12


def test_filters_of_warnings_stay_as_they_are_and_nothing_is_heard() -> None:
    code = """if True:
        import torch, warnings
        from segattr.refine import random_walk
        before = list(warnings.filters)
        affinity = torch.rand(1, 4, 4, requires_grad=True)
        random_walk(torch.rand(1, 1, 2, 2), affinity).sum().backward()
        assert warnings.filters == before
    """
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
