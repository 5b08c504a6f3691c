"""The claims that every loss makes, for each one registered in ``loss_suite.py``."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.loss_suite import LOSSES, Inputs, Loss, loss_id

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
per_image_loss = pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.per_image], ids=loss_id)
differentiated_loss = pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.detached], ids=loss_id)
masked_loss = pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.masked], ids=loss_id)
golden_cases = pytest.mark.parametrize(
    ("loss", "case"),
    [(loss, case) for loss in LOSSES for case in loss.golden],
    ids=lambda value: loss_id(value) if isinstance(value, Loss) else f"{value.loss}-{value.case.split('/')[1]}",
)


def value_and_grad(loss: Loss, logits: Tensor, inputs: Inputs, **settings: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, inputs, **settings)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


@golden_cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_value_and_gradient_are_the_golden_ones(
    loss: Loss, case: Any, dtype: torch.dtype, tolerance: float, golden: Any
) -> None:
    arrays = {name: a.to(dtype) if a.dtype == torch.float64 else a for name, a in golden(case.case).items()}
    arguments = {**loss.settings, **case.inputs(arrays), **case.settings}
    logits = arrays["x"].requires_grad_()
    value = loss.function(logits, **arguments)
    torch.testing.assert_close(value, arrays[case.loss], rtol=tolerance, atol=1e-12)
    expected = arrays[case.grad]
    atol = 1e-12 if dtype == torch.float64 else tolerance * expected.abs().max().item()
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], expected, rtol=tolerance, atol=atol)


@differentiated_loss
@settings(max_examples=5)
@given(batch=st.integers(1, 3), sides=st.tuples(*[st.integers(2, 4)] * 3))
def test_gradients_are_right_in_float64(loss: Loss, batch: int, sides: tuple[int, int, int]) -> None:
    shape = loss.shape[1:] if loss.fixed_sides else sides[: len(loss.shape) - 1]
    logits = torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True)
    inputs = loss.inputs(logits)
    assert torch.autograd.gradcheck(lambda x: loss(x, inputs), logits)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, inputs), logits, fast_mode=True)


@per_image_loss
def test_reductions_agree_with_each_other_and_with_single_images(loss: Loss) -> None:
    logits = loss.example(3)
    inputs = loss.inputs(logits)
    per_image = loss(logits, inputs, reduction="none")
    alone = torch.stack(
        [loss(logits[i : i + 1], {k: v[i : i + 1] for k, v in inputs.items()}, reduction="none")[0] for i in range(3)]
    )
    assert per_image.shape == (3,)
    torch.testing.assert_close(per_image, alone)
    torch.testing.assert_close(loss(logits, inputs, reduction="sum"), per_image.sum())
    if loss.function.__name__ != "partial_cross_entropy":  # its mean is over seeds
        torch.testing.assert_close(loss(logits, inputs), per_image.mean())


@every_loss
def test_the_module_is_the_function_with_its_settings(loss: Loss) -> None:
    logits = loss.example()
    inputs = loss.inputs(logits)
    reduction = {"reduction": "sum"} if loss.per_image else {}
    module = loss.module(**loss.settings, **reduction)
    torch.testing.assert_close(module(logits, **inputs), loss(logits, inputs, **reduction), rtol=0, atol=0)
    for name, value in {**loss.settings, **reduction}.items():
        shown = f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        assert f"{name}={shown}" in repr(module)


@masked_loss
def test_ignored_pixels_do_not_matter(loss: Loss) -> None:
    logits = loss.example()
    inputs = loss.inputs(logits)
    valid = torch.rand(2, 5, 4) < 0.6
    if "scale_factor" in loss.settings:
        valid = torch.ones(2, 5, 4, dtype=torch.bool)
        valid[:, :, 2:] = False
    changed = torch.where(valid[:, None] | (loss.settings.get("scale_factor", 1) != 1), logits, logits + 3)
    value, grad = value_and_grad(loss, logits, inputs, valid=valid)
    torch.testing.assert_close(loss(changed, inputs, valid=valid), value)
    if "scale_factor" not in loss.settings:
        assert (grad.abs().sum(1)[~valid] == 0).all()
    everything = torch.ones_like(valid)
    torch.testing.assert_close(loss(logits, inputs, valid=everything), loss(logits, inputs))


@masked_loss
def test_an_image_without_valid_pixels_costs_nothing(loss: Loss) -> None:
    logits = loss.example()
    inputs = loss.inputs(logits)
    valid = torch.ones(2, 5, 4, dtype=torch.bool)
    valid[1] = False
    value, grad = value_and_grad(loss, logits, inputs, valid=valid, reduction="none")
    assert value[1] == 0
    assert (grad[1] == 0).all()
    assert grad[0].abs().sum() > 0


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.ignorable], ids=loss_id)
def test_nothing_labelled_gives_a_zero_on_the_graph(loss: Loss) -> None:
    logits = loss.example()
    assert loss.ignorable is not None
    value, grad = value_and_grad(loss, logits, loss.ignorable(loss.inputs(logits)))
    assert value == 0
    assert (grad == 0).all()


@every_loss
def test_an_empty_batch_gives_zero(loss: Loss) -> None:
    logits = loss.example(0)
    value, grad = value_and_grad(loss, logits, loss.inputs(logits))
    assert value == 0
    assert grad.shape == logits.shape
    if loss.per_image:
        assert loss(logits, loss.inputs(logits), reduction="none").shape == (0,)


@every_loss
@settings(max_examples=20)
@given(scale=st.floats(0, 1e4), seed=st.integers(0, 2**16), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_extreme_logits_keep_value_and_gradient_finite(loss: Loss, scale: float, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    logits = (loss.example(dtype=dtype) * scale).clamp(-1e4, 1e4)
    value, grad = value_and_grad(loss, logits, loss.inputs(logits))
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


@every_loss
@pytest.mark.parametrize("largest", [1e30, torch.finfo(torch.float32).max])
def test_the_largest_logits_keep_value_and_gradient_finite(loss: Loss, largest: float) -> None:
    logits = torch.where(torch.rand(loss.shape) < 0.5, largest, -largest)
    value, grad = value_and_grad(loss, logits, loss.inputs(logits))
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    logits = loss.example().to(dtype)
    inputs = loss.inputs(logits)
    value, grad = value_and_grad(loss, logits, inputs)
    exact, exact_grad = value_and_grad(loss, logits.float(), inputs)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(grad.float(), exact_grad, rtol=2e-2, atol=1e-3)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(loss: Loss, dtype: torch.dtype, logits_dtype: torch.dtype) -> None:
    logits = loss.example(dtype=logits_dtype)
    inputs = loss.inputs(logits)
    exact, exact_grad = value_and_grad(loss, logits, inputs)
    with torch.autocast("cpu", dtype=dtype):
        value, grad = value_and_grad(loss, logits, inputs)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0, atol=0)
    torch.testing.assert_close(grad, exact_grad, rtol=0, atol=0)


@every_loss
def test_compiles_into_one_graph(loss: Loss) -> None:
    logits = loss.example(requires_grad=True)
    inputs = loss.inputs(logits)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: loss(x, inputs), fullgraph=True, backend="aot_eager")
    value = compiled(logits)
    expected, expected_grad = value_and_grad(loss, logits, inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], expected_grad)


@every_loss
def test_functional_transforms(loss: Loss) -> None:
    stack = torch.randn(3, *loss.shape)
    inputs = loss.inputs(stack[0])
    each = torch.stack([value_and_grad(loss, logits, inputs)[1] for logits in stack])
    torch.testing.assert_close(torch.func.vmap(lambda x: loss(x, inputs))(stack)[1], loss(stack[1], inputs))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda x: loss(x, inputs)))(stack), each)


@every_loss
def test_memory_layout_does_not_matter(loss: Loss) -> None:
    logits = loss.example()
    inputs = loss.inputs(logits)
    value, grad = value_and_grad(loss, logits, inputs)
    wide = torch.randn(*loss.shape, 2)
    wide[..., 0] = logits
    others = [wide[..., 0], logits.movedim(1, -1).contiguous().movedim(-1, 1)]
    for other in others:
        other_value, other_grad = value_and_grad(loss, other, inputs)
        torch.testing.assert_close(other_value, value)
        torch.testing.assert_close(other_grad, grad)


@per_image_loss
def test_gradients_that_arrive_strided_are_handled(loss: Loss) -> None:
    logits = loss.example(2, requires_grad=True)
    inputs = loss.inputs(logits)
    weight = torch.randn(4)
    both = torch.cat([loss(logits, inputs, reduction="none")] * 2) @ weight
    apart = loss(logits, inputs, reduction="none") @ (weight[:2] + weight[2:])
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (both, apart)))


@every_loss
def test_meta_tensors_give_the_shape(loss: Loss) -> None:
    logits = loss.example()
    arguments = {**loss.inputs(logits), **loss.settings}
    arguments = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}
    assert loss.function(logits.to("meta"), **arguments).shape == ()
    if loss.per_image:
        assert loss.function(logits.to("meta"), **arguments, reduction="none").shape == (2,)


@every_loss
@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda x: x.tolist(), TypeError, "expected a tensor, got list"),
        (lambda x: x.long(), TypeError, "expected a floating-point tensor, got torch.int64"),
        (lambda x: x * torch.nan, ValueError, "expected finite values, got NaN or infinity"),
        (lambda x: x * torch.inf, ValueError, "expected finite values, got NaN or infinity"),
        (lambda x: x[(slice(None), *[0] * (x.dim() - 2))], ValueError, r"expected {layout}, got \[2, \d\]"),
        (lambda x: x.flatten(), ValueError, "expected {layout}, got "),
    ],
)
def test_first_arguments_that_make_no_sense_are_refused(loss: Loss, broken: Any, error: type, message: str) -> None:
    logits = loss.example()
    first = broken(logits)
    if isinstance(first, Tensor) and first.shape == logits.shape[:2]:
        return  # [B, C] already
    with pytest.raises(error, match=f"{loss.argument}: {message.format(layout=loss.layout)}"):
        loss(first, loss.inputs(logits))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.softmax], ids=loss_id)
def test_the_softmax_of_a_single_class_is_refused(loss: Loss) -> None:
    logits = loss.example()
    with pytest.raises(ValueError, match=f"{loss.argument}: expected at least 2 classes"):
        loss(logits[:, :1], loss.inputs(logits))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.softmax], ids=loss_id)
def test_the_smallest_input_gives_finite_results(loss: Loss) -> None:
    logits = torch.randn(1, *(loss.shape[1:] if loss.fixed_sides else [1] * (len(loss.shape) - 1)))
    value, grad = value_and_grad(loss, logits, loss.inputs(logits))
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


@every_loss
def test_inputs_that_do_not_fit_are_refused_by_name(loss: Loss) -> None:
    logits = loss.example()
    for name, value in loss.inputs(logits).items():
        inputs = {**loss.inputs(logits), name: torch.cat([value, value[:1]])}
        with pytest.raises(ValueError, match=rf"{name}: expected \[2.* to go with {loss.argument} \[2, .*\], got \[3"):
            loss(logits, inputs)
        with pytest.raises(ValueError, match=f"{name}: expected device cpu, that of {loss.argument}, got meta"):
            loss(logits, {**inputs, name: value.to("meta")})
        with pytest.raises(TypeError, match=f"{name}: expected a tensor, got list"):
            loss(logits, {**inputs, name: value.tolist()})
        with pytest.raises(TypeError, match=rf"{name}: expected a dense tensor, got torch\.sparse_coo"):
            loss(logits, {**inputs, name: value.to_sparse()})


@per_image_loss
def test_an_unknown_reduction_is_refused(loss: Loss) -> None:
    logits = loss.example()
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', 'none', got 'average'"):
        loss(logits, loss.inputs(logits), reduction="average")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        loss.module(**loss.settings, reduction="average")


@masked_loss
def test_a_mask_that_does_not_fit_is_refused(loss: Loss) -> None:
    logits = loss.example()
    inputs = loss.inputs(logits)
    with pytest.raises(TypeError, match=r"valid: expected a bool tensor, got torch\.float32"):
        loss(logits, inputs, valid=torch.ones(2, 5, 4))
    with pytest.raises(
        ValueError, match=r"valid: expected \[2, 5, 4\] to go with logits \[2, 3, 5, 4\], got \[2, 1, 5"
    ):
        loss(logits, inputs, valid=torch.ones(2, 1, 5, 4, dtype=torch.bool))


@every_loss
def test_values_are_not_checked_under_compile(loss: Loss) -> None:
    logits = loss.example() * torch.nan
    inputs = loss.inputs(logits.nan_to_num())
    torch.compiler.reset()
    reduction = {"reduction": "none"} if loss.per_image else {}
    compiled = torch.compile(lambda x: loss(x, inputs, **reduction), fullgraph=True, backend="aot_eager")
    assert compiled(logits).shape == (2,) * loss.per_image
