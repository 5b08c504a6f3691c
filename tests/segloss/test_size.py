"""What is particular to the size losses and the target tools."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import segloss
from segloss import _average
from segloss._penalty import penalty
from segloss.common import checks

seeds = st.integers(0, 2**16)


def logits_with_average(sizes: Tensor, height: int = 6, width: int = 5) -> Tensor:
    """Logits whose softmax is ``sizes`` at every pixel."""
    return sizes.log().clamp(min=-200)[:, :, None, None].expand(-1, -1, height, width).contiguous()


def random_sizes(seed: int, batch: int = 3, classes: int = 4) -> Tensor:
    torch.manual_seed(seed)
    return torch.distributions.Dirichlet(torch.ones(classes, dtype=torch.float64)).sample((batch,))


@given(seed=seeds)
def test_forward_kl_is_zero_exactly_at_the_target(seed: int) -> None:
    sizes = random_sizes(seed)
    logits = logits_with_average(sizes).requires_grad_()
    loss = segloss.size_kl(logits, sizes)
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12


@given(seed=seeds)
def test_forward_kl_is_positive_elsewhere(seed: int) -> None:
    sizes = random_sizes(seed)
    logits = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    gap = (segloss.average_prediction(logits) - sizes).abs().sum(1)
    assert (segloss.size_kl(logits, sizes, reduction="none") >= gap**2 / 2 - 1e-12).all()  # Pinsker's inequality


@given(seed=seeds)
def test_size_kl_ignores_the_order_of_pixels(seed: int) -> None:
    sizes = random_sizes(seed)
    logits = torch.randn(3, 4, 30, dtype=torch.float64)
    shuffled = logits[:, :, torch.randperm(30)]
    torch.testing.assert_close(segloss.size_kl(shuffled, sizes), segloss.size_kl(logits, sizes), rtol=1e-12, atol=0)


def test_a_class_that_has_vanished_still_gets_its_gradient() -> None:
    logits = torch.tensor([0.0, -200.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4).contiguous().requires_grad_()
    loss = segloss.size_kl(logits, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(loss.item(), 0.5 * math.log(0.5) * 2 + 0.5 * 200, rtol=1e-6, atol=0)
    gradient = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(gradient[0, 1].sum(), torch.tensor(-0.5), rtol=1e-5, atol=0)


def test_average_prediction_is_a_mean_of_softmax() -> None:
    logits = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    valid = torch.rand(2, 4, 5, 6) < 0.5
    softmax = logits.softmax(1)
    expected = torch.stack([s[:, v].mean(1) for s, v in zip(softmax, valid, strict=True)])
    torch.testing.assert_close(segloss.average_prediction(logits), softmax.mean((2, 3, 4)))
    torch.testing.assert_close(segloss.average_prediction(logits, valid=valid), expected)


def test_average_prediction_of_nothing_is_zero() -> None:
    valid = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert (segloss.average_prediction(torch.randn(1, 3, 2, 2), valid=valid) == 0).all()
    assert (segloss.average_prediction(torch.randn(1, 3, 0, 2)) == 0).all()


def pixels_to_average(
    batch: int, classes: int, pixels: int, masked: bool, seed: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits ``[B, K, N]``, a mask that leaves some of each image, weights of the averages ``[B, K]``."""
    torch.manual_seed(seed)
    logits = (torch.randn(batch, classes, pixels, dtype=torch.float64) * 30).requires_grad_()
    valid = torch.rand(batch, pixels) < 0.7 if masked else None
    weight = torch.randn(batch, classes, dtype=torch.float64)
    if valid is not None:
        valid[:, 0] = True
    return logits, valid, weight


@given(
    batch=st.integers(1, 3),
    classes=st.integers(2, 5),
    pixels=st.integers(1, 40),
    block=st.integers(1, 64),
    masked=st.booleans(),
    seed=seeds,
)
def test_blocked_average_equals_its_definition_for_any_block_size(
    batch: int, classes: int, pixels: int, block: int, masked: bool, seed: int
) -> None:
    logits, valid, weight = pixels_to_average(batch, classes, pixels, masked, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_average, "_BLOCK", block)
        fast = _average.LogSum.apply(logits, valid)[0]
        fast_grad = torch.autograd.grad((fast * weight).sum(), logits)[0]
    plain = _average.log_sum_reference(logits, valid)
    plain_grad = torch.autograd.grad((plain * weight).sum(), logits)[0]
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast_grad, plain_grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("tiny", "small"), [(1 << 30, 1 << 30), (0, 1 << 30), (0, 0)], ids=["steps", "kept", "blocks"])
@given(batch=st.integers(1, 3), classes=st.integers(2, 5), pixels=st.integers(1, 30), masked=st.booleans(), seed=seeds)
def test_inputs_of_every_size_have_the_same_average(
    tiny: int, small: int, batch: int, classes: int, pixels: int, masked: bool, seed: int
) -> None:
    logits, valid, weight = pixels_to_average(batch, classes, pixels, masked, seed)

    def derivatives(log_average: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (first,) = torch.autograd.grad((log_average * weight).sum(), logits, create_graph=True)
        return log_average, first, torch.autograd.grad(first.square().sum(), logits)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_average, "_TINY", tiny)
        patch.setattr(_average, "_SMALL", small)
        found = derivatives(_average.log_average(logits, valid)[0])
    count = torch.tensor(pixels) if valid is None else valid.sum(1, keepdim=True)
    expected = derivatives(_average.log_sum_reference(logits, valid) - count.double().log())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_operators_are_registered_correctly(masked: bool, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 7).to(dtype)
    valid = torch.rand(2, 7) < 0.5 if masked else None
    saved = torch.ops.segloss.log_sum(logits, valid)
    torch.library.opcheck(torch.ops.segloss.log_sum.default, (logits, valid))
    torch.library.opcheck(torch.ops.segloss.log_sum_backward.default, (torch.randn_like(saved[0]), logits, *saved))
    assert saved[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_every_device_gets_the_same_numbers_as_the_cpu_kernel() -> None:
    logits = torch.randn(2, 3, 50, dtype=torch.float64)
    valid = torch.rand(2, 50) < 0.5
    saved = torch.ops.segloss.log_sum(logits, valid)
    torch.testing.assert_close(_average._log_sum(logits, valid), saved)
    grad = torch.randn(2, 3, dtype=torch.float64)
    elsewhere = _average._log_sum_backward(grad, logits, *saved)
    torch.testing.assert_close(elsewhere, torch.ops.segloss.log_sum_backward(grad, logits, *saved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1.0, 1e2, 1e4, 1e6, 1e8, 1e12, 1e20, 1e29])
def test_a_class_that_loses_everywhere_gets_its_whole_target_as_gradient(gap: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 3, 4, 4, dtype=dtype)
    logits[:, 2] = -gap
    logits[0, :, 0, 0] += gap / 2  # the level of a pixel does not count
    logits.requires_grad_()
    loss = segloss.size_kl(logits, torch.tensor([[0.4, 0.3, 0.3]]))
    gradient = torch.autograd.grad(loss, logits)[0]
    win, lose = math.exp(-gap), 2 + math.exp(-gap)
    expected = 0.3 * (math.log(0.3) + gap + math.log(lose))
    expected += 0.4 * math.log(0.4 * lose) + 0.3 * math.log(0.3 * lose)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=dtype), rtol=1e-5, atol=0)
    target = torch.tensor([1 / lose - 0.4, 1 / lose - 0.3, win / lose - 0.3], dtype=dtype)
    torch.testing.assert_close(gradient.sum((0, 2, 3)), target, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_size_kl_compiles_once_for_changing_shapes() -> None:
    compiled = torch.compile(segloss.size_kl, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 5, 9):
        logits = torch.randn(2, 3, size, size)
        sizes = torch.full((2, 3), 1 / 3)
        torch.testing.assert_close(compiled(logits, sizes), segloss.size_kl(logits, sizes))


def test_reverse_kl_stays_finite_where_forward_kl_grows() -> None:
    sizes = torch.tensor([[0.5, 0.5]])
    gone = torch.tensor([0.0, -1e3]).view(1, 2, 1, 1)
    assert segloss.reverse_size_kl(gone, sizes).item() == pytest.approx(math.log(2))
    assert segloss.size_kl(gone, sizes).item() > 400


def test_log_barrier_is_size_kl_with_equal_sizes() -> None:
    logits = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    tags = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]])
    count = tags.sum(1)
    equal = (tags / count[:, None]).double()
    kl = segloss.size_kl(logits, equal, reduction="none")
    torch.testing.assert_close(segloss.log_barrier(logits, tags, reduction="none") / count - count.log(), kl)


def test_flat_barrier_is_flat_where_it_says() -> None:
    tags = torch.tensor([[0, 1]])
    for flat, small_moves, large_moves in (("below", False, True), ("above", True, False)):
        for size, moves in ((0.1, small_moves), (0.6, large_moves)):
            logits = logits_with_average(torch.tensor([[1 - size, size]])).requires_grad_()
            loss = segloss.flat_barrier(logits, tags, floor=0.3, flat=flat)
            assert (torch.autograd.grad(loss, logits)[0].abs().sum() > 0).item() == moves


def test_suppression_is_accurate_where_a_class_fills_the_image() -> None:
    logits = torch.tensor([0.0, 60.0], dtype=torch.float64).view(1, 2, 1, 1)
    loss = segloss.suppression(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(loss, torch.tensor(60.0, dtype=torch.float64))


def test_bounds_may_be_a_number_per_class_or_per_image() -> None:
    logits = torch.randn(2, 3, 4, 4)
    for bound in (0.4, torch.tensor(0.4), torch.full((3,), 0.4), torch.full((2, 3), 0.4)):
        torch.testing.assert_close(segloss.size_barrier(logits, lower=bound), segloss.size_barrier(logits, lower=0.4))
    module = segloss.SizeBarrier(lower=torch.full((3,), 0.4), upper=0.9)
    assert "lower" in module.state_dict()
    torch.testing.assert_close(module(logits), segloss.size_barrier(logits, lower=0.4, upper=0.9))


spatial_shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def known_classes(batch: int, classes: int) -> Tensor:
    return torch.rand(batch, classes) < 0.5


@given(seed=seeds, batch=st.integers(1, 3), classes=st.integers(2, 5), spatial=spatial_shapes)
def test_free_classes_count_as_one(seed: int, batch: int, classes: int, spatial: list[int]) -> None:
    sizes = random_sizes(seed, batch, classes)
    known = known_classes(batch, classes)
    logits = 3 * torch.randn(batch, classes, *spatial, dtype=torch.float64)
    average = logits.softmax(1).flatten(2).mean(2)
    forward, reverse = [], []
    for mean, size, is_known in zip(average, sizes, known, strict=True):
        v = torch.cat([size[is_known], 1 - size[is_known].sum(0, keepdim=True)])
        merged = torch.cat([mean[is_known], mean[~is_known].sum(0, keepdim=True)])
        if is_known.all():
            v, merged = size, mean
        forward.append((v * (v / merged).log()).sum())
        reverse.append((merged * (merged / v).log()).sum())
    options = {"known": known, "reduction": "none"}
    torch.testing.assert_close(segloss.size_kl(logits, sizes, **options), torch.stack(forward), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        segloss.reverse_size_kl(logits, sizes, floor=1e-300, **options), torch.stack(reverse), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("function", [segloss.size_kl, segloss.reverse_size_kl])
def test_all_classes_known_is_no_change_to_the_last_bit(function) -> None:  # type: ignore[no-untyped-def]
    logits = torch.randn(3, 4, 6, 5, requires_grad=True)
    sizes = random_sizes(0).float()
    losses = [function(logits, sizes, known=known) for known in (None, torch.ones(3, 4, dtype=torch.bool))]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_a_single_free_class_has_the_size_that_the_others_leave() -> None:
    logits = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    sizes = random_sizes(1)
    known = torch.tensor([True, True, False, True]).expand(3, 4)
    unsaid = sizes.masked_fill(~known, torch.nan)
    torch.testing.assert_close(segloss.size_kl(logits, unsaid, known=known), segloss.size_kl(logits, sizes))


@given(seed=seeds)
def test_free_classes_have_the_sizes_that_cost_least(seed: int) -> None:
    sizes, other = random_sizes(seed), random_sizes(seed + 1)
    known = torch.tensor([True, False, False, True]).expand(3, 4)
    logits = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    loss = segloss.size_kl(logits, sizes, known=known, reduction="none")
    left = 1 - sizes.masked_fill(~known, 0).sum(1, keepdim=True)

    def cost(shares: Tensor) -> Tensor:
        free = shares.masked_fill(known, 0)
        filled = torch.where(known, sizes, left * free / free.sum(1, keepdim=True))
        return segloss.size_kl(logits, filled, reduction="none")

    torch.testing.assert_close(cost(segloss.average_prediction(logits)), loss)
    assert (cost(other) >= loss - 1e-12).all()


def test_nothing_known_costs_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss = segloss.size_kl(logits, torch.full((2, 3), torch.nan), known=nothing)
    assert abs(loss.item()) < 1e-6
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-7


@pytest.mark.parametrize("function", [segloss.size_kl, segloss.reverse_size_kl])
def test_free_classes_that_have_vanished_keep_a_finite_gradient(function) -> None:  # type: ignore[no-untyped-def]
    for gone in (-200.0, -1e38):
        logits = torch.tensor([0.0, gone, gone]).view(1, 3, 1, 1).expand(1, 3, 4, 4).contiguous().requires_grad_()
        loss = function(logits, torch.tensor([[0.5, 0.5, 0]]), known=torch.tensor([[True, False, False]]))
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_known_sizes_that_fill_the_image_may_be_off_by_their_rounding() -> None:
    known = torch.tensor([[True, True, False]])
    logits = torch.randn(1, 3, 4, 4)
    above, exact = (segloss.size_kl(logits, torch.tensor([[0.3, 0.7 + off, 0]]), known=known) for off in (5e-5, 0.0))
    torch.testing.assert_close(above, exact, rtol=0, atol=2e-4)


def extended_log_barrier(z: float, t: float) -> float:
    return -math.log(-z) / t if z <= -1 / t**2 else t * z - math.log(1 / t**2) / t + 1 / t


@given(seed=seeds, t=st.floats(0.5, 50), spatial=spatial_shapes)
def test_log_barrier_extension_is_its_formula(seed: int, t: float, spatial: list[int]) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(2, 3, *spatial, dtype=torch.float64)
    lower, upper = (torch.rand(2, 3, dtype=torch.float64) for _ in range(2))
    average = logits.softmax(1).flatten(2).mean(2)
    expected = [
        sum(
            extended_log_barrier((a - s).item(), t) + extended_log_barrier((s - b).item(), t)
            for s, a, b in zip(*rows, strict=True)
        )
        for rows in zip(average, lower, upper, strict=True)
    ]
    loss = segloss.size_barrier(logits, lower=lower, upper=upper, t=t, reduction="none")
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [1.0, 5.0, 300.0])
def test_log_barrier_extension_is_smooth_where_its_parts_meet(t: float) -> None:
    edge = torch.tensor([-(1 + 1e-9), -(1 - 1e-9)], dtype=torch.float64).div(t**2).requires_grad_()
    value = penalty(edge, t)
    torch.testing.assert_close(value[0], value[1], rtol=1e-6, atol=1e-7)
    slope = torch.autograd.grad(value.sum(), edge)[0]
    torch.testing.assert_close(slope, torch.full_like(slope, t), rtol=1e-6, atol=0)


def test_log_barrier_extension_of_narrow_bounds_is_flat_below_the_t_of_its_docs() -> None:
    logits = logits_with_average(torch.tensor([[0.897, 0.103]]).double()).requires_grad_()
    lower, upper = torch.tensor([0.0, 0.09]), torch.tensor([1.0, 0.11])
    for t, pulled in ((5.0, False), (14.0, True)):  # the square root of 2 / 0.02 is 10
        loss = segloss.size_barrier(logits, lower=lower, upper=upper, t=t)
        assert (torch.autograd.grad(loss, logits)[0].abs().max() > 1e-5) == pulled


def test_a_growing_t_does_not_compile_again_and_again() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    barrier, logits = segloss.SizeBarrier(lower=0.2, upper=0.5, t=5.0), torch.randn(2, 3, 4, 4)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: barrier(x), fullgraph=True, backend=backend)
    for _ in range(12):
        torch.testing.assert_close(compiled(logits), barrier(logits))
        assert barrier.t is not None
        barrier.t *= 1.1
    assert len(graphs) <= 2


def test_bounds_that_hold_of_any_size_cost_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    lower, upper = torch.tensor([[0.2, 0, 0], [0, 0, 0]]), torch.tensor([[0.6, 1, 1], [1, 1, 1]])
    loss = segloss.size_barrier(logits, lower=lower, upper=upper, t=5.0, reduction="none")
    assert loss[1] == 0
    assert (torch.autograd.grad(loss.sum(), logits)[0][1] == 0).all()
    assert segloss.size_barrier(logits, lower=0.0, upper=1.0, t=5.0) == 0


def test_squared_barrier_is_the_penalty_on_pixel_counts() -> None:
    logits = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    count = logits.softmax(1).sum((2, 3))
    lower, upper = torch.tensor([10.0, 12.0, 0.0]).double(), torch.tensor([30.0, 15.0, 5.0]).double()
    released = ((lower - count).relu() ** 2 + (count - upper).relu() ** 2).sum(1) / 30
    barrier = segloss.size_barrier(logits, lower=lower / 30, upper=upper / 30, reduction="none")
    torch.testing.assert_close(30 * barrier, released)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: segloss.size_barrier(x), ValueError, "lower, upper: expected at least one bound"),
        (
            lambda x: segloss.size_barrier(x, lower=torch.ones(4)),
            ValueError,
            r"lower: expected \[3\] to go with logits",
        ),
        (lambda x: segloss.size_barrier(x, lower=1.5), ValueError, "lower: expected .* of at most 1, got 1.5"),
        (lambda x: segloss.size_barrier(x, lower=-torch.ones(3)), ValueError, "lower: expected fractions from 0 to 1"),
        (
            lambda x: segloss.size_barrier(x, lower=0.1, t=0.0),
            ValueError,
            r"t: expected .* of at least 0\.001 .* got 0",
        ),
        (lambda x: segloss.SizeBarrier(lower=0.1, t="5"), TypeError, "t: expected a number, got str"),
        (
            lambda x: segloss.size_kl(x, torch.eye(3)[:2], known=torch.ones(2, 3)),
            TypeError,
            r"known: expected a bool tensor, got torch\.float32",
        ),
        (
            lambda x: segloss.size_kl(x, torch.eye(3)[:2], known=torch.ones(3, dtype=torch.bool)),
            ValueError,
            r"known: expected \[2, 3\] to go with logits \[2, 3, 4, 4\], got \[3\]",
        ),
        (
            lambda x: segloss.size_kl(x, torch.full((2, 3), 0.6), known=torch.tensor([[True, True, False]] * 2)),
            ValueError,
            "sizes: expected the known ones of each row to sum to at most 1, got 1.2 in row 0",
        ),
        (
            lambda x: segloss.size_kl(x, torch.full((2, 3), 0.2), known=torch.ones(2, 3, dtype=torch.bool)),
            ValueError,
            "sizes: expected each row to sum to 1, got 0.6 in row 0",
        ),
        (
            lambda x: segloss.size_kl(x, torch.full((2, 3), torch.nan), known=torch.tensor([[True, False, False]] * 2)),
            ValueError,
            "sizes: expected fractions of at least 0, got nan",
        ),
        (lambda x: segloss.SizeBarrier(), ValueError, "lower, upper: expected at least one bound"),
        (lambda x: segloss.corrupt_sizes(torch.eye(3), 0.1, generator=3), TypeError, "generator: expected a torch.Gen"),
        (lambda x: segloss.BalanceKL([0.5, 0.5]), TypeError, "prior: expected a tensor, got list"),
        (
            lambda x: segloss.sizes_from_labels(x.long()[:, 0], 3, ignore_index=None),
            TypeError,
            "ignore_index: expected",
        ),
        (lambda x: segloss.size_kl(x.to_sparse(), torch.eye(3)[:2]), TypeError, "logits: expected a dense tensor"),
        (lambda x: segloss.size_barrier(x, upper="all"), TypeError, "upper: expected a number, got str"),
        (lambda x: segloss.size_kl(x, torch.ones(2, 3)), ValueError, "row to sum to 1, got 3 in row 0"),
        (lambda x: segloss.size_kl(x, torch.tensor([[1.0, 0, 0], [0.7, 0.2, 0]])), ValueError, "got 0.9 in row 1"),
        (lambda x: segloss.size_kl(x, torch.tensor([[1.5, -0.5, 0]] * 2)), ValueError, "at least 0, got -0.5"),
        (lambda x: segloss.size_kl(x, torch.full((2, 3), torch.nan)), ValueError, "sizes: expected"),
        (lambda x: segloss.size_kl(x, torch.ones(2, 3).int()), TypeError, "sizes: expected a floating-point tensor"),
        (lambda x: segloss.log_barrier(x, torch.full((2, 3), 2)), ValueError, "tags: expected 0 or 1, got 2"),
        (lambda x: segloss.flat_barrier(x, torch.ones(2, 3), floor=1.0), ValueError, "floor: expected a finite number"),
        (
            lambda x: segloss.flat_barrier(x, torch.ones(2, 3), floor=0.1, flat="up"),
            ValueError,
            "flat: expected one of",
        ),
        (lambda x: segloss.FlatBarrier(floor=0), ValueError, "floor: expected a finite number above 0 and below 1"),
        (lambda x: segloss.ReverseSizeKL(floor=2), ValueError, "floor: expected"),
        (
            lambda x: segloss.reverse_size_kl(x, torch.eye(3)[:2], floor=None),
            TypeError,
            "floor: expected a number, got None",
        ),
        (lambda x: segloss.balance_kl(x), ValueError, r"logits: expected \[N, K\], got \[2, 3, 4, 4\]"),
        (
            lambda x: segloss.balance_kl(x[:, :, 0, 0], torch.ones(3)),
            ValueError,
            "prior: expected each row to sum to 1",
        ),
        (
            lambda x: segloss.balance_kl(x[:, :, 0, 0], torch.eye(3)[0]),
            ValueError,
            "prior: expected positive fractions",
        ),
        (lambda x: segloss.class_balanced_weights(torch.zeros(3), 0.9), ValueError, "counts: expected at least 1"),
        (lambda x: segloss.class_balanced_weights(torch.ones(2, 3), 0.9), ValueError, r"counts: expected \[K\]"),
        (lambda x: segloss.class_balanced_weights(torch.ones(3), 1.0), ValueError, "beta: expected"),
        (lambda x: segloss.sizes_from_labels(torch.zeros(2, 3), 2), TypeError, "labels: expected an integer tensor"),
        (
            lambda x: segloss.sizes_from_labels(torch.tensor([[0, 7]]), 2),
            ValueError,
            "expected classes 0 to 1 .* got 7",
        ),
        (
            lambda x: segloss.sizes_from_labels(torch.tensor([0, 1]), 2),
            ValueError,
            r"labels: expected \[B, \*spatial\]",
        ),
        (lambda x: segloss.sizes_from_labels(torch.tensor([[0, 1]]), 2.0), TypeError, "num_classes: expected an int"),
        (lambda x: segloss.corrupt_sizes(torch.ones(2, 3), 0.1), ValueError, "sizes: expected each row to sum to 1"),
        (lambda x: segloss.corrupt_sizes(torch.eye(3), -0.1), ValueError, "sigma: expected"),
        (lambda x: segloss.mean_relative_error(torch.eye(3), torch.eye(2)), ValueError, "sizes: expected"),
        (lambda x: segloss.check_values(1), TypeError, "enabled: expected a bool, got int"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.float16, 4e-4), (torch.bfloat16, 4e-3)])
def test_sizes_may_be_off_by_their_own_rounding(dtype: torch.dtype, off: float) -> None:
    sizes = torch.tensor([[0.3 + off, 0.7]]).to(dtype)
    assert torch.isfinite(segloss.size_kl(torch.zeros(1, 2, 2, 2), sizes))


def test_balance_is_fairness_plus_ln_k(golden) -> None:  # type: ignore[no-untyped-def]
    arrays = golden("losses/fairness_balance")
    for prior, loss, grad in ((None, "loss_kl_uniform", "grad_kl_uniform"), ("prior", "loss_balance", "grad_balance")):
        logits = arrays["x"].clone().requires_grad_()
        value = segloss.BalanceKL(None if prior is None else arrays[prior])(logits)
        torch.testing.assert_close(value, arrays[loss], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(value, logits)[0], arrays[grad], rtol=1e-9, atol=1e-12)
    fairness = segloss.balance_kl(arrays["x"]) - math.log(arrays["x"].shape[1])
    torch.testing.assert_close(fairness, arrays["loss"], rtol=1e-9, atol=1e-12)


def test_balance_of_an_empty_batch_is_zero() -> None:
    assert segloss.balance_kl(torch.zeros(0, 4, requires_grad=True)).item() == 0


def test_class_weights_are_the_golden_ones(golden) -> None:  # type: ignore[no-untyped-def]
    arrays = golden("losses/class_balanced_ce")
    beta = arrays["beta"].item()
    weights = segloss.class_balanced_weights(arrays["counts"].double(), beta)
    torch.testing.assert_close(weights, arrays["weight_normalized"], rtol=1e-10, atol=0)
    plain = segloss.class_balanced_weights(arrays["counts"].double(), beta, normalize=False)
    torch.testing.assert_close(plain, arrays["weight"], rtol=1e-10, atol=0)
    loss = torch.nn.functional.cross_entropy(arrays["x"], arrays["target"].long(), weight=weights, reduction="none")
    torch.testing.assert_close(loss.sum(), arrays["loss_normalized"], rtol=1e-10, atol=0)


def test_class_weights_at_the_ends_of_beta() -> None:
    counts = torch.tensor([1, 10, 1000])
    assert segloss.class_balanced_weights(counts, 0.0).tolist() == [1, 1, 1]
    nearly = segloss.class_balanced_weights(counts, 1 - 1e-12)
    torch.testing.assert_close(nearly[0] / nearly[2], torch.tensor(1000.0), rtol=1e-3, atol=0)


@given(seed=seeds, classes=st.integers(1, 6))
def test_sizes_are_fractions_of_the_labelled_pixels(seed: int, classes: int) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, classes, (3, 5, 7))
    labels[torch.rand(labels.shape) < 0.3] = 255
    labels[2] = 255
    sizes = segloss.sizes_from_labels(labels.to(torch.uint8), classes)
    for image, row in zip(labels[:2], sizes, strict=False):
        counts = torch.bincount(image[image != 255], minlength=classes)
        torch.testing.assert_close(row, (counts / counts.sum()))
    assert (sizes[2] == 0).all()


def test_an_ignored_class_does_not_count() -> None:
    assert segloss.sizes_from_labels(torch.tensor([[0, 0, 1, 1]]), 2, ignore_index=0).tolist() == [[0, 1]]


def test_errors_of_corrupted_targets_are_the_golden_ones(golden) -> None:  # type: ignore[no-untyped-def]
    arrays = golden("losses/corrupted_targets")
    generator = torch.Generator().manual_seed(1)
    for case in ("k2", "k3", "k5"):
        exact = arrays[f"{case}_vhat"].float().expand(40_000, -1)
        for sigma, expected in zip(arrays["sigma"], arrays[f"{case}_mre_after_renorm"], strict=True):
            corrupted = segloss.corrupt_sizes(exact, sigma.item(), generator=generator)
            assert (corrupted >= 0).all()
            torch.testing.assert_close(corrupted.sum(1), torch.ones(40_000))
            measured = segloss.mean_relative_error(corrupted, exact).item()
            assert measured == pytest.approx(expected.item(), rel=0.03, abs=1e-3)


def test_corrupted_targets_come_from_the_generator_alone() -> None:
    exact = torch.tensor([[0.5, 0.3, 0.2]] * 10)
    before = torch.get_rng_state()
    first, second = (segloss.corrupt_sizes(exact, 0.2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_corruption_that_leaves_nothing_is_drawn_again() -> None:
    sizes = segloss.corrupt_sizes(torch.eye(2).repeat(200, 1), 10.0)
    assert torch.equal(sizes, torch.eye(2).repeat(200, 1))


def test_only_classes_that_are_present_count_in_the_error() -> None:
    exact = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    sizes = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    assert segloss.mean_relative_error(sizes, exact).item() == pytest.approx((0.1 + 0.2 + 0.2) / 3)


def test_values_are_checked_on_accelerators_only_on_request() -> None:
    accelerator = SimpleNamespace(device=SimpleNamespace(type="cuda"), is_meta=False)

    def look() -> None:
        checks.require("x", accelerator, lambda: torch.tensor(False), lambda: "was looked at")

    look()
    segloss.check_values(True)
    try:
        with pytest.raises(ValueError, match="x: was looked at"):
            look()
    finally:
        segloss.check_values(False)
    look()


@pytest.mark.parametrize("flat", ["below", "above"])
def test_a_tiny_floor_keeps_value_and_gradient_finite(flat: str) -> None:
    logits = torch.tensor([0.0, -1e3]).view(1, 2, 1, 1).requires_grad_()
    losses = (
        segloss.flat_barrier(logits, torch.tensor([[1, 1]]), floor=1e-46, flat=flat),
        segloss.reverse_size_kl(logits, torch.tensor([[0.0, 1.0]]), floor=1e-46),
    )
    for loss in losses:
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_size_kl_and_potts_compile_with_inductor() -> None:
    def loss(logits: Tensor, sizes: Tensor, image: Tensor) -> Tensor:
        return segloss.size_kl(logits, sizes) + 1e-3 * segloss.potts_crf(logits, image)

    arguments = torch.randn(2, 3, 8, 8, requires_grad=True), torch.full((2, 3), 1 / 3), torch.rand(2, 3, 8, 8)
    expected, value = loss(*arguments), torch.compile(loss, fullgraph=True)(*arguments)
    torch.testing.assert_close(value, expected)
    grads = [torch.autograd.grad(v, arguments[0])[0] for v in (value, expected)]
    torch.testing.assert_close(*grads)


def test_a_sparse_mask_is_refused() -> None:
    with pytest.raises(TypeError, match="valid: expected a dense tensor, got"):
        segloss.average_prediction(torch.zeros(1, 2, 3, 3), valid=torch.ones(1, 3, 3, dtype=torch.bool).to_sparse())


def test_more_classes_than_memory_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_classes: expected .* of at most 2\.1"):
        segloss.sizes_from_labels(torch.zeros(1, 2, dtype=torch.int64), 2**62)


def test_sizes_without_values_cannot_be_corrupted() -> None:
    with pytest.raises(ValueError, match="sizes: expected a tensor with values, got one on the device meta"):
        segloss.corrupt_sizes(torch.full((1, 2), 0.5, device="meta"), 0.1)


def test_modules_refuse_no_reduction() -> None:
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', 'none', got None"):
        segloss.SizeKL(reduction=None)  # type: ignore[arg-type]
