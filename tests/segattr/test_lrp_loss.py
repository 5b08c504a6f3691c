"""The loss on heatmaps and scores, against torch's own losses and the golden numbers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segloss
from segattr.lrp.loss import HeatmapLoss, heatmap_loss

Batch = tuple[Tensor, Tensor, Tensor, Tensor]

GOLDEN = Path(__file__).parents[1] / "golden" / "lrp" / "golden.npz"
NETS = ["resnet_basic", "resnet_basic_pool22", "resnet_bottleneck", "vgg_bn", "ceil_mode", "stride_gt_kernel"]


def random_batch(size: int = 2, classes: int = 3, sides: tuple[int, int] = (5, 4), **options: Any) -> Batch:
    labels = torch.randint(0, classes, (size, *sides))
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.4, 255)
    heatmaps = torch.randn(size, classes, *sides, **options)
    return heatmaps, torch.randn(size, classes, **options), labels, torch.rand(size, classes) < 0.5


def value_and_grads(batch: Batch, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    heatmaps, scores = (x.detach().requires_grad_() for x in batch[:2])
    value = heatmap_loss(heatmaps, scores, *batch[2:], **options)
    return value.detach(), *torch.autograd.grad(value, (heatmaps, scores))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_both_terms_are_the_golden_ones(net: str, dtype: torch.dtype, tolerance: float) -> None:
    with np.load(GOLDEN) as golden:
        arrays = {key: torch.from_numpy(golden[f"{net}/{key}"]) for key in ("heat", "scores", "y", "t", "ce", "bce")}
    batch = arrays["heat"].to(dtype), arrays["scores"].to(dtype), arrays["y"], arrays["t"]
    options: dict[str, Any] = {"scale": 30.0, "background_weight": 1.0, "ignore_index": -1}
    segmentation = heatmap_loss(*batch, weight=0.0, **options)
    torch.testing.assert_close(segmentation, arrays["ce"].to(dtype), rtol=tolerance, atol=0)
    for weight in (1.0, 2.5):
        expected = (arrays["ce"] + weight * arrays["bce"]).to(dtype)
        loss = heatmap_loss(*batch, weight=weight, **options)
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)


def test_the_classification_term_is_torchs_with_class_weights() -> None:
    heatmaps, scores, labels, tags = random_batch(4, 5, dtype=torch.float64)
    for background in (0.0, 0.3):
        weights = torch.tensor([background, 1, 1, 1, 1], dtype=torch.float64)
        expected = F.multilabel_soft_margin_loss(scores, tags.double(), weight=weights)
        loss = heatmap_loss(
            heatmaps, scores, torch.full_like(labels, 255), tags, weight=10.0, background_weight=background
        )
        torch.testing.assert_close(loss, 10 * expected)


def test_the_background_score_is_free_and_its_heatmap_is_not() -> None:
    batch = random_batch()
    _, heat_grad, score_grad = value_and_grads(batch, scale=1.0)
    assert (score_grad[:, 0] == 0).all()
    assert (score_grad[:, 1:] != 0).all()
    assert (heat_grad[:, 0][batch[2] != 255] != 0).all()


def test_each_term_reaches_its_own_input_only() -> None:
    batch = random_batch()
    segmentation, heat_grad, score_grad = value_and_grads(batch, weight=0.0)
    assert (score_grad == 0).all()
    assert heat_grad.abs().sum() > 0
    both, both_heat_grad, _ = value_and_grads(batch)
    torch.testing.assert_close(both_heat_grad, heat_grad)
    assert both > segmentation


@pytest.mark.parametrize("sides", [(1, 1), (3, 7), (16, 16)])
def test_the_scale_in_pixels_is_their_number(sides: tuple[int, int]) -> None:
    batch = random_batch(sides=sides)
    assert heatmap_loss(*batch, scale="pixels") == heatmap_loss(*batch, scale=sides[0] * sides[1])


def test_in_pixels_the_loss_stays_when_every_pixel_is_split_and_shares_its_relevance() -> None:
    heatmaps, scores, labels, tags = random_batch(dtype=torch.float64)
    finer = heatmaps.repeat_interleave(2, 2).repeat_interleave(3, 3) / 6
    finer_labels = labels.repeat_interleave(2, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(finer.sum((2, 3)), heatmaps.sum((2, 3)))  # the same score
    coarse, fine = (
        [heatmap_loss(h, scores, y, tags, scale=scale) for scale in ("pixels", 30.0)]
        for h, y in ((heatmaps, labels), (finer, finer_labels))
    )
    torch.testing.assert_close(coarse[0], fine[0])
    assert not torch.allclose(coarse[1], fine[1])


def test_a_larger_scale_makes_the_right_heatmap_cheaper_and_a_wrong_one_dearer() -> None:
    labels = torch.randint(0, 3, (1, 4, 4))
    right = F.one_hot(labels, 3).movedim(3, 1).float() / 16
    scores, tags = torch.zeros(1, 3), torch.ones(1, 3)
    for heatmaps, sign in ((right, -1), (-right, 1)):
        losses = [heatmap_loss(heatmaps, scores, labels, tags, scale=s).item() for s in (1.0, 4.0, 16.0, 64.0)]
        assert losses == sorted(losses, reverse=sign < 0)
        assert len(set(losses)) == 4


def test_pixels_without_a_label_do_not_matter() -> None:
    heatmaps, scores, labels, tags = random_batch()
    changed = torch.where((labels != 255)[:, None], heatmaps, heatmaps + torch.randn_like(heatmaps))
    value, grad, _ = value_and_grads((heatmaps, scores, labels, tags))
    assert heatmap_loss(changed, scores, labels, tags) == value
    assert (grad.movedim(1, -1)[labels == 255] == 0).all()


def test_images_without_pixel_labels_count_in_the_classification_only() -> None:
    heatmaps, scores, labels, tags = random_batch(4)
    labels[2:] = 255
    value, heat_grad, score_grad = value_and_grads((heatmaps, scores, labels, tags))
    assert (heat_grad[2:] == 0).all()
    assert (score_grad[2:, 1:] != 0).all()
    segmentation = heatmap_loss(heatmaps[:2], scores[:2], labels[:2], tags[:2], weight=0.0)
    classification = heatmap_loss(heatmaps, scores, torch.full_like(labels, 255), tags)
    torch.testing.assert_close(value, segmentation + classification)


@pytest.mark.parametrize("scale", ["pixels", 1e30])
def test_a_batch_without_any_label_leaves_a_zero_on_the_graph(scale: Any) -> None:
    heatmaps, scores, labels, tags = random_batch()
    batch = heatmaps, scores, torch.full_like(labels, 255), tags
    value, heat_grad, _ = value_and_grads(batch, weight=0.0, scale=scale)
    assert value == 0
    assert (heat_grad == 0).all()
    value, heat_grad, score_grad = value_and_grads(batch, scale=scale)
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(scores[:, 1:], tags[:, 1:].float()) * 2 / 3)
    assert (heat_grad == 0).all()
    assert score_grad[:, 1:].abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 3, 0, 4)])
def test_an_empty_batch_and_empty_images_give_zero(shape: tuple[int, ...]) -> None:
    heatmaps, scores = torch.randn(shape), torch.zeros(shape[:2])
    labels, tags = torch.zeros(shape[0], *shape[2:], dtype=torch.int64), torch.zeros(shape[:2])
    value, heat_grad, score_grad = value_and_grads((heatmaps, scores, labels, tags), weight=float(not shape[0]))
    assert value == 0
    assert heat_grad.shape == shape
    assert (score_grad == 0).all()


def test_the_module_is_the_function_with_its_settings() -> None:
    batch = random_batch()
    chosen = {"scale": 12.5, "weight": 2.0, "background_weight": 0.25, "ignore_index": -7}
    labels = batch[2].masked_fill(batch[2] == 255, -7)
    module = HeatmapLoss(**chosen)
    assert module(*batch[:2], labels, batch[3]) == heatmap_loss(*batch[:2], labels, batch[3], **chosen)
    assert HeatmapLoss()(*batch) == heatmap_loss(*batch)
    assert copy.deepcopy(module)(*batch[:2], labels, batch[3]) == module(*batch[:2], labels, batch[3])
    assert repr(module) == "HeatmapLoss(scale=12.5, weight=2.0, background_weight=0.25, ignore_index=-7)"


@settings(max_examples=5)
@given(sides=st.tuples(*[st.integers(1, 4)] * 2), size=st.integers(1, 3), scale=st.sampled_from(["pixels", 3.0]))
def test_gradients_are_right_in_float64(sides: tuple[int, int], size: int, scale: Any) -> None:
    heatmaps, scores, labels, tags = random_batch(size, sides=sides, dtype=torch.float64)

    def loss(heatmaps: Tensor, scores: Tensor) -> Tensor:
        return heatmap_loss(heatmaps, scores, labels, tags, scale=scale, weight=2.0, background_weight=0.5)

    inputs = heatmaps.requires_grad_(), scores.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [1e4, 1e30, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("scale", ["pixels", 1e-30, 1e30])
def test_the_largest_inputs_keep_value_and_gradients_finite(dtype: torch.dtype, largest: float, scale: Any) -> None:
    heatmaps, scores, labels, tags = random_batch(dtype=dtype)
    heatmaps, scores = (torch.where(x < 0, -largest, largest).to(dtype) for x in (heatmaps, scores))
    heatmaps[:, :, 0, 0] = 0
    for tensor in value_and_grads((heatmaps, scores, labels, tags), scale=scale):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_even_under_autocast(dtype: torch.dtype) -> None:
    heatmaps, scores, labels, tags = random_batch()
    halves = heatmaps.to(dtype), scores.to(dtype), labels, tags
    exact = value_and_grads((halves[0].float(), halves[1].float(), labels, tags))
    plain = value_and_grads(halves)
    with torch.autocast("cpu", dtype=dtype):
        cast = value_and_grads(halves)
    assert plain[0].dtype == torch.float32
    for one, other, expected in zip(plain, cast, exact, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.float(), expected, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(plain[0], exact[0], rtol=0, atol=0)


def test_either_input_in_float64_keeps_float64() -> None:
    heatmaps, scores, labels, tags = random_batch()
    for batch in ((heatmaps.double(), scores), (heatmaps, scores.double())):
        assert heatmap_loss(*batch, labels, tags).dtype == torch.float64
    assert heatmap_loss(heatmaps, scores, labels, tags).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type_and_tags_of_any_type_are_the_same(dtype: torch.dtype) -> None:
    heatmaps, scores, labels, tags = random_batch()
    expected = heatmap_loss(heatmaps, scores, labels, tags)
    assert heatmap_loss(heatmaps, scores, labels.to(dtype), tags.to(dtype)) == expected
    assert heatmap_loss(heatmaps, scores, labels, tags.double()) == expected


def test_compiles_into_one_graph() -> None:
    batch = random_batch()
    torch.compiler.reset()
    compiled = torch.compile(heatmap_loss, fullgraph=True, backend="aot_eager")
    heatmaps, scores = (x.detach().requires_grad_() for x in batch[:2])
    value = compiled(heatmaps, scores, *batch[2:])
    expected = value_and_grads(batch)
    torch.testing.assert_close(value, expected[0])
    for grad, wanted in zip(torch.autograd.grad(value, (heatmaps, scores)), expected[1:], strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.slow
def test_the_number_of_pixels_may_be_dynamic_in_a_compiled_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(heatmap_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for sides in ((5, 4), (6, 7)):
        batch = random_batch(3, sides=sides)
        torch.testing.assert_close(compiled(*batch), heatmap_loss(*batch))


def test_functional_transforms() -> None:
    heatmaps, scores, labels, tags = random_batch()
    heat_stack, score_stack = torch.randn(3, *heatmaps.shape), torch.randn(3, *scores.shape)

    def loss(h: Tensor, s: Tensor) -> Tensor:
        return heatmap_loss(h, s, labels, tags)

    each = [value_and_grads((h, s, labels, tags)) for h, s in zip(heat_stack, score_stack, strict=True)]
    torch.testing.assert_close(torch.func.vmap(loss)(heat_stack, score_stack), torch.stack([v for v, _, _ in each]))
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)))(heat_stack, score_stack)
    for grad, wanted in zip(grads, list(zip(*each, strict=True))[1:], strict=True):
        torch.testing.assert_close(grad, torch.stack(wanted))


def test_memory_layout_does_not_matter_and_arguments_stay_as_they_are() -> None:
    batch = random_batch()
    before = [x.clone() for x in batch]
    value = heatmap_loss(*batch)
    channels_last = batch[0].to(memory_format=torch.channels_last), batch[1].T.contiguous().T, *batch[2:]
    torch.testing.assert_close(heatmap_loss(*channels_last), value)
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))


def test_meta_tensors_give_a_scalar() -> None:
    assert heatmap_loss(*(x.to("meta") for x in random_batch())).shape == ()


@pytest.mark.parametrize(
    ("index", "broken", "error", "message"),
    [
        (0, lambda x: x.tolist(), TypeError, "heatmaps: expected a tensor, got list"),
        (0, lambda x: x.long(), TypeError, r"heatmaps: expected a floating-point tensor, got torch\.int64"),
        (0, lambda x: x[0], ValueError, r"heatmaps: expected \[B, K, H, W\] or \[B, K, D, H, W\], got \[3, 5, 4\]"),
        (0, lambda x: x[:, :1], ValueError, "heatmaps: expected at least 2 classes, the background among them"),
        (0, lambda x: x * torch.nan, ValueError, "heatmaps: expected finite values, got NaN or infinity"),
        (1, lambda x: x.int(), TypeError, r"scores: expected a floating-point tensor, got torch\.int32"),
        (
            1,
            lambda x: x[:, 1:],
            ValueError,
            r"scores: expected \[2, 3\] to go with heatmaps \[2, 3, 5, 4\], got",
        ),
        (1, lambda x: x / 0, ValueError, "scores: expected finite values, got NaN or infinity"),
        (2, lambda x: x.float(), TypeError, r"labels: expected an integer tensor, got torch\.float32"),
        (2, lambda x: x[:, None], ValueError, r"labels: expected \[2, 5, 4\] to go with heatmaps \[2, 3, 5, 4\], got"),
        (2, lambda x: x.clamp(max=3), ValueError, "labels: expected classes 0 to 2 or 255 to ignore, got 3"),
        (2, lambda x: x.to("meta"), ValueError, "labels: expected device cpu, that of heatmaps, got meta"),
        (3, lambda x: x[:1], ValueError, r"tags: expected \[2, 3\] to go with heatmaps \[2, 3, 5, 4\], got \[1, 3\]"),
        (3, lambda x: x + 0.5, ValueError, r"tags: expected 0 or 1, got (0|1)\.5"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(index: int, broken: Any, error: type, message: str) -> None:
    batch: list[Any] = list(random_batch())
    batch[2][0, 0, 0] = 255
    batch[index] = broken(batch[index])
    with pytest.raises(error, match=f"^{message}"):
        heatmap_loss(*batch)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"scale": "image"}, ValueError, "scale: expected a number or 'pixels', got 'image'"),
        ({"scale": 0.0}, ValueError, "scale: expected a finite number above 0 and of at most 1e[+]30, got 0.0"),
        ({"scale": None}, TypeError, "scale: expected a number, got NoneType"),
        ({"weight": -1.0}, ValueError, "weight: expected a finite number of at least 0 and .*, got -1.0"),
        ({"weight": torch.nan}, ValueError, "weight: expected a finite number of at least 0 and .*, got nan"),
        ({"background_weight": -0.5}, ValueError, "background_weight: expected a finite number of at least 0"),
        ({"ignore_index": 2.0}, TypeError, "ignore_index: expected an int, got float"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        heatmap_loss(*random_batch(), **setting)
    with pytest.raises(error, match=f"^{message}"):
        HeatmapLoss(**setting)


def test_the_first_term_is_partial_cross_entropy_on_scaled_heatmaps() -> None:
    heatmaps, scores, labels, tags = random_batch()
    expected = segloss.partial_cross_entropy(7 * heatmaps, labels)
    torch.testing.assert_close(heatmap_loss(heatmaps, scores, labels, tags, scale=7.0, weight=0.0), expected)
