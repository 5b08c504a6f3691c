"""What is particular to the importance sampling loss."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segloss.importance import (
    ImportanceClassification,
    ImportanceSampling,
    importance_classification,
    importance_sampling,
    sample_pixels,
)

Golden = Callable[[str], dict[str, Tensor]]

posteriors = pytest.mark.parametrize("posterior", ["binomial", "multinomial"])


def batch(batch_size: int = 2, classes: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    tags = torch.zeros(batch_size, classes)
    tags[:, 0] = 1
    return 3 * torch.randn(batch_size, classes, 5, 4, dtype=dtype), tags


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@posteriors
def test_pixels_are_drawn_as_often_as_the_golden_pmf_says(posterior: str, golden: Golden) -> None:
    arrays, samples = golden("losses/isl"), 20_000
    drawn = sample_pixels(arrays["x"], samples, posterior=posterior)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (2, 4, samples)
    expected = arrays[f"p_{posterior}"]
    share = F.one_hot(drawn, 30).double().mean(2)
    error = (expected * (1 - expected) / samples).sqrt()
    assert ((share - expected).abs() <= 5 * error + 1 / samples).all()


@posteriors
def test_expected_mode_weighs_every_pixel_by_the_golden_pmf_as_a_constant(posterior: str, golden: Golden) -> None:
    arrays = golden("losses/isl")
    scores, tags = arrays["x"].requires_grad_(), arrays["labels"]
    probability = (scores.sigmoid() if posterior == "binomial" else scores.softmax(1)).flatten(2)
    entropy = F.binary_cross_entropy(probability, tags[..., None].expand_as(probability), reduction="none")
    expected = (arrays[f"p_{posterior}"] * entropy).sum(2).mean()
    value = importance_sampling(scores, tags, mode="expected", posterior=posterior)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    grads = [torch.autograd.grad(loss, scores)[0] for loss in (value, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@posteriors
def test_expected_mode_is_the_mean_of_many_samples(posterior: str) -> None:
    scores, tags = batch(1)
    many, tags_of_many = scores.expand(4000, -1, -1, -1), tags.expand(4000, -1)
    losses = importance_sampling(many, tags_of_many, samples=1, posterior=posterior, reduction="none")
    expected = importance_sampling(scores, tags, mode="expected", posterior=posterior)
    assert losses.std() > 0.1
    assert (losses.mean() - expected).abs() < 4 * losses.std() / len(losses) ** 0.5


def test_the_binomial_loss_is_the_cross_entropy_of_the_sigmoid_at_the_pixels() -> None:
    scores, tags = batch(dtype=torch.float64)
    indices = torch.randint(20, (2, 3, 7))
    probability = scores.sigmoid().flatten(2).gather(2, indices)
    expected = F.binary_cross_entropy(probability, tags.double()[..., None].expand_as(probability))
    torch.testing.assert_close(importance_sampling(scores, tags, indices=indices), expected)


def test_the_gradient_is_non_zero_exactly_at_the_drawn_pixels() -> None:
    scores, tags = batch()
    scores.requires_grad_()
    indices = sample_pixels(scores, 3)
    (grad,) = torch.autograd.grad(importance_sampling(scores, tags, indices=indices), scores)
    drawn = torch.zeros(2, 3, 20, dtype=torch.bool).scatter(2, indices, True)
    assert torch.equal(grad.flatten(2) != 0, drawn)


def test_in_multinomial_mode_the_gradient_is_non_zero_at_pixels_that_any_class_drew() -> None:
    scores, tags = batch()
    scores.requires_grad_()
    indices = sample_pixels(scores, 3, posterior="multinomial")
    loss = importance_sampling(scores, tags, indices=indices, posterior="multinomial")
    drawn = torch.zeros(2, 3, 20, dtype=torch.bool).scatter(2, indices, True)
    touched = torch.autograd.grad(loss, scores)[0].flatten(2) != 0
    assert torch.equal(touched, drawn.any(1, keepdim=True).expand_as(touched))


@posteriors
def test_samples_are_averaged(posterior: str) -> None:
    scores, tags = batch()
    indices = torch.randint(20, (2, 3, 4))
    apart = [importance_sampling(scores, tags, indices=indices[..., n : n + 1], posterior=posterior) for n in range(4)]
    together = importance_sampling(scores, tags, indices=indices, posterior=posterior)
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_binomial_classes_are_independent_of_each_other() -> None:
    scores, tags = batch()
    indices = torch.randint(20, (2, 3, 4))
    alone = [
        importance_sampling(scores[:, [c]], tags[:, [c]], indices=indices[:, [c]], reduction="none") for c in range(3)
    ]
    together = importance_sampling(scores, tags, indices=indices, reduction="none")
    torch.testing.assert_close(together, torch.stack(alone).mean(0))


def test_absent_classes_are_drawn_for_and_count() -> None:
    scores, tags = batch()
    loss = importance_sampling(scores, torch.zeros_like(tags), mode="expected")
    pmf = scores.sigmoid().flatten(2) / scores.sigmoid().flatten(2).sum(2, keepdim=True)
    torch.testing.assert_close(loss, (pmf * F.softplus(scores).flatten(2)).sum(2).mean())


def test_two_multinomial_classes_are_one_binomial_class_of_their_difference() -> None:
    scores, tags = torch.randn(2, 2, 5, 4), torch.tensor([[0, 1], [1, 0]])
    difference = scores[:, [1]] - scores[:, [0]]
    mirrored = torch.cat([-difference, difference], 1)
    torch.testing.assert_close(
        importance_sampling(scores, tags, mode="expected", posterior="multinomial"),
        importance_sampling(mirrored, tags, mode="expected"),
    )


@settings(max_examples=20)
@given(
    sides=st.tuples(*[st.integers(1, 4)] * 4),
    scale=st.sampled_from([1.0, 1e3, 1e30, 3e38]),
    seed=st.integers(0, 2**16),
)
def test_expected_loss_of_a_class_lies_between_its_best_and_its_worst_pixel(
    sides: tuple[int, int, int, int], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    scores, tags = torch.randn(sides).clamp(-1, 1) * scale, torch.randint(0, 2, sides[:2])
    loss = importance_sampling(scores, tags, mode="expected", reduction="none")
    sign = 1 - 2 * tags[..., None]
    entropy = F.softplus(sign * scores.clamp(-1e30, 1e30).flatten(2))
    assert (loss >= entropy.amin(2).mean(1) * (1 - 1e-5)).all()
    assert (loss <= entropy.amax(2).mean(1) * (1 + 1e-5)).all()
    drawn = sample_pixels(scores, 3)
    assert drawn.min() >= 0
    assert drawn.max() < sides[2] * sides[3]


@posteriors
def test_probabilities_that_underflow_still_tell_pixels_apart(posterior: str) -> None:
    scores = torch.full((1, 2, 3, 3), -300.0)
    scores[0, 0] = 0  # the background, next to which the other class has a softmax of exp(-300)
    scores[0, 1, 1, 2] = -250
    assert (scores.sigmoid()[0, 1] == 0).all()
    assert (sample_pixels(scores, 50, posterior=posterior)[0, 1] == 5).all()


@pytest.mark.parametrize("pixel", [0, 7, 19])
def test_a_pixel_of_probability_zero_is_never_drawn(pixel: int) -> None:
    scores = torch.full((1, 1, 20), -1e4)
    scores[..., pixel] = 0
    assert (sample_pixels(scores.view(1, 1, 5, 4), 1000) == pixel).all()


def test_maps_of_more_than_2_to_the_24_pixels_are_sampled_evenly() -> None:
    share = sample_pixels(torch.zeros(1, 1, 4097, 4096), 10_000) / (4097 * 4096)
    quarters = torch.histc(share, 4, 0, 1) / 10_000
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), rtol=0, atol=0.02)
    assert share.max() > 0.99


def test_a_softmax_close_to_one_keeps_its_complement() -> None:
    scores = torch.tensor([60.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    wrong = importance_sampling(scores, torch.tensor([[0, 0]]), posterior="multinomial")
    right = importance_sampling(scores, torch.tensor([[1, 0]]), posterior="multinomial")
    torch.testing.assert_close(wrong, torch.tensor(30.0))
    torch.testing.assert_close(right / torch.tensor(-60.0).exp(), torch.tensor(1.0))
    torch.testing.assert_close(torch.autograd.grad(wrong, scores)[0].flatten(), torch.tensor([0.5, -0.5]))


@posteriors
@pytest.mark.parametrize("floor", [1e-3, 0.25])
def test_the_floor_keeps_the_posterior_away_from_zero_and_one(posterior: str, floor: float) -> None:
    scores, tags = batch(dtype=torch.float64)
    indices = torch.randint(20, (2, 3, 7))
    probability = (scores.sigmoid() if posterior == "binomial" else scores.softmax(1)).flatten(2).gather(2, indices)
    raised = (probability * (1 - floor) + floor) / (1 + floor)
    expected = F.binary_cross_entropy(raised, tags.double()[..., None].expand_as(raised))
    loss = importance_sampling(scores, tags, indices=indices, posterior=posterior, floor=floor)
    torch.testing.assert_close(loss, expected)


def test_a_tiny_floor_keeps_the_gradient_finite() -> None:
    scores = torch.tensor([1e30, -1e30, 90.0, -200.0]).view(1, 1, 2, 2).requires_grad_()
    loss = importance_sampling(scores, torch.ones(1, 1), indices=torch.arange(4).view(1, 1, 4), floor=1e-40)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_without_weight_the_loss_is_torchs_cross_entropy_of_pooled_scores(pooling: str) -> None:
    scores, tags = batch()
    pooled = scores.mean((2, 3)) if pooling == "average" else scores.amax((2, 3))
    expected = F.binary_cross_entropy_with_logits(pooled, tags)
    torch.testing.assert_close(importance_classification(scores, tags, weight=0, pooling=pooling), expected)


def test_multinomial_average_pools_scores_and_maximum_pools_the_softmax() -> None:
    scores, tags = batch(dtype=torch.float64)
    average = F.binary_cross_entropy_with_logits(scores.mean((2, 3)), tags.double())
    largest = F.binary_cross_entropy(scores.softmax(1).amax((2, 3)), tags.double())
    for pooling, expected in {"average": average, "max": largest}.items():
        loss = importance_classification(scores, tags, weight=0, posterior="multinomial", pooling=pooling)
        torch.testing.assert_close(loss, expected)


@posteriors
def test_with_full_weight_the_loss_is_importance_sampling_alone(posterior: str) -> None:
    scores, tags = batch()
    loss = importance_classification(scores, tags, weight=1, posterior=posterior, generator=generator())
    expected = importance_sampling(scores, tags, posterior=posterior, generator=generator())
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_in_between_the_loss_is_a_convex_combination() -> None:
    scores, tags = batch()
    pooled, sampled = (importance_classification(scores, tags, weight=w, mode="expected") for w in (0, 1))
    loss = importance_classification(scores, tags, weight=0.3, mode="expected")
    torch.testing.assert_close(loss, 0.7 * pooled + 0.3 * sampled)


def test_on_one_pixel_every_form_is_the_same() -> None:
    scores, tags = torch.randn(2, 1, 1, 1), torch.tensor([[1.0], [0.0]])
    expected = F.binary_cross_entropy_with_logits(scores.view(2, 1), tags)
    torch.testing.assert_close(importance_sampling(scores, tags), expected)
    torch.testing.assert_close(importance_sampling(scores, tags, mode="expected"), expected)
    for pooling in ("average", "max", "sum"):
        torch.testing.assert_close(importance_classification(scores, tags, pooling=pooling), expected)


def test_pixels_that_share_the_maximum_share_its_gradient_evenly() -> None:
    scores = torch.tensor([2.0, 2.0, 1.0, 0.0]).view(1, 1, 2, 2).requires_grad_()
    loss = importance_classification(scores, torch.zeros(1, 1), weight=0, pooling="max")
    half = torch.tensor(2.0).sigmoid() / 2
    torch.testing.assert_close(
        torch.autograd.grad(loss, scores)[0].flatten(), torch.stack([half, half, half * 0, half * 0])
    )


def test_a_generator_makes_draws_repeatable_and_leaves_the_global_state_alone() -> None:
    scores, tags = batch()
    state = torch.random.get_rng_state()
    first, again, other = (sample_pixels(scores, 10, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for module in (ImportanceSampling(), ImportanceClassification(weight=1)):
        drawn = module(scores, tags, generator=generator(1))
        torch.testing.assert_close(drawn, module(scores, tags, indices=first), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_is_drawn_where_nothing_is_sampled() -> None:
    scores, tags = batch()
    state = torch.random.get_rng_state()
    importance_classification(scores, tags, weight=0)
    importance_classification(scores, tags, mode="expected")
    importance_sampling(scores, tags, indices=torch.zeros(2, 3, 1, dtype=torch.long))
    assert torch.equal(torch.random.get_rng_state(), state)
    importance_classification(scores, tags)
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_draws_do_not_depend_on_memory_layout_gradients_or_autocast() -> None:
    scores, _ = batch()
    expected = sample_pixels(scores, 1, generator=generator())
    others = [scores.to(memory_format=torch.channels_last), scores.mT.contiguous().mT, scores.requires_grad_()]
    for other in others:
        assert torch.equal(sample_pixels(other, 1, generator=generator()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sample_pixels(scores, 1, generator=generator()), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_indices_may_have_any_integer_type(dtype: torch.dtype) -> None:
    scores, tags = batch()
    indices = torch.randint(20, (2, 3, 4))
    expected = importance_sampling(scores, tags, indices=indices)
    torch.testing.assert_close(importance_sampling(scores, tags, indices=indices.to(dtype)), expected, rtol=0, atol=0)


@posteriors
def test_sampling_compiles_into_one_graph(posterior: str) -> None:
    scores, tags = batch()
    module = ImportanceClassification(posterior=posterior)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = module(scores, tags)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(scores, tags), expected)
    for count in (5, 4):  # as at the end of an epoch: the second size makes shapes dynamic
        assert compiled(scores[:1].repeat(count, 1, 1, 1), tags[:1].repeat(count, 1)).isfinite()


def test_sampling_under_vmap_asks_for_different_randomness() -> None:
    scores, tags = batch()
    stack = scores.expand(5, *scores.shape)

    def draw(scores: Tensor) -> Tensor:
        return importance_sampling(scores, tags, samples=1)

    losses = torch.func.vmap(draw, randomness="different")(stack)
    assert len(losses.unique()) > 1
    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(draw)(stack)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples: expected a finite number of at least 1 and .*, got 0"),
        ({"samples": 2.0}, TypeError, "samples: expected an int, got float"),
        ({"mode": "expectation"}, ValueError, "mode: expected one of 'sample', 'expected', got 'expectation'"),
        ({"posterior": "softmax"}, ValueError, "posterior: expected one of 'binomial', 'multinomial', got 'softmax'"),
        ({"generator": 0}, TypeError, r"generator: expected a torch\.Generator, got int"),
        ({"tags": torch.full((2, 3), 2)}, ValueError, "tags: expected 0 or 1, got 2"),
        ({"tags": torch.ones(2, 3, 1)}, ValueError, r"tags: expected \[2, 3\] to go with scores \[2, 3, 5, 4\], got"),
        ({"indices": torch.zeros(2, 3, 1)}, TypeError, r"indices: expected an integer tensor, got torch\.float32"),
        ({"indices": torch.zeros(2, 3).long()}, ValueError, r"indices: expected \[B, C, N\] with at .*, got \[2, 3\]"),
        (
            {"indices": torch.zeros(2, 3, 0).long()},
            ValueError,
            r"indices: expected .* at least one pixel, got \[2, 3, 0",
        ),
        ({"indices": torch.full((2, 3, 1), 20)}, ValueError, "indices: expected pixels 0 to 19 of the scores, got 20"),
        ({"indices": torch.full((2, 3, 1), -1)}, ValueError, "indices: expected pixels 0 to 19 of the scores, got -1"),
        (
            {"indices": torch.zeros(2, 3, 1).long(), "mode": "expected"},
            ValueError,
            'indices: expected None to go with mode="expected"',
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, message) -> None:  # type: ignore[no-untyped-def]
    scores, tags = batch()
    for weight in (0, 0.2):
        with pytest.raises(error, match=message):
            importance_classification(scores, **{"tags": tags, "weight": weight, **arguments})
    with pytest.raises(error, match=message):
        importance_sampling(scores, **{"tags": tags, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: sample_pixels(x[0], 1), ValueError, r"scores: expected \[B, C, H, W\], got \[3, 5, 4\]"),
        (lambda x, y: sample_pixels(x.long(), 1), TypeError, "scores: expected a floating-point tensor"),
        (lambda x, y: sample_pixels(x * torch.nan, 1), ValueError, "scores: expected finite values"),
        (
            lambda x, y: sample_pixels(x, -1),
            ValueError,
            "samples: expected a finite number of at least 1 and .*, got -1",
        ),
        (lambda x, y: sample_pixels(x, True), TypeError, "samples: expected an int, got bool"),
        (lambda x, y: sample_pixels(x, 1, posterior=None), ValueError, "posterior: expected one of .*, got None"),
        (lambda x, y: sample_pixels(x, 1, generator="cpu"), TypeError, r"generator: expected a torch\.Generator"),
        (
            lambda x, y: sample_pixels(x[:, :1], 1, posterior="multinomial"),
            ValueError,
            r"scores: expected at least 2 classes, the background among them, got \[2, 1, 5, 4\]",
        ),
        (lambda x, y: importance_sampling(x, y, floor=1), ValueError, "floor: expected a finite number of at least 0"),
        (lambda x, y: importance_sampling(x, y, floor=None), TypeError, "floor: expected a number, got NoneType"),
        (lambda x, y: ImportanceSampling(floor=-0.1), ValueError, "floor: expected .* below 1, got -0.1"),
        (lambda x, y: ImportanceSampling(samples=0), ValueError, "samples: expected"),
        (lambda x, y: ImportanceSampling(mode=None), ValueError, "mode: expected one of"),
        (lambda x, y: importance_classification(x, y, weight=1.5), ValueError, "weight: expected .* most 1, got 1.5"),
        (lambda x, y: importance_classification(x, y, weight="1"), TypeError, "weight: expected a number, got str"),
        (lambda x, y: importance_classification(x, y, pooling="gap"), ValueError, "pooling: expected one of 'average"),
        (lambda x, y: ImportanceClassification(weight=-1), ValueError, "weight: expected"),
        (lambda x, y: ImportanceClassification(pooling="gmp"), ValueError, "pooling: expected one of 'average', 'max'"),
        (lambda x, y: ImportanceClassification(posterior="sigmoid"), ValueError, "posterior: expected one of"),
    ],
)
def test_calls_that_make_no_sense_are_refused(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(*batch())
