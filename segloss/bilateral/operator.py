"""The filter as an operator with gradients: what ``torch.compile``, ``vmap`` and autograd see of it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from segloss.bilateral import blocksparse, lattice, lowrank
from segloss.bilateral.error import sample_pixels, sampled_error
from segloss.bilateral.plan import Plan
from segloss.bilateral.reference import guide_gradient_reference
from segloss.common.precision import full_precision
from segloss.common.registration import fold, known, register

_LOW_RANK = ("auto", "lowrank")  # methods that choose landmarks


class ToleranceError(ValueError):
    """``method="lowrank"`` cannot reach the tolerance on an image; the message names image and error."""


def _bilateral(values: Tensor, features: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    plan = Plan(*settings)
    landmarks = _no_landmarks(features, plan)
    with torch.autocast(values.device.type, enabled=False), full_precision():
        if plan.method in _LOW_RANK and values.numel() > 0:
            return _choose(values, features, landmarks, plan)
        return _directly(values, features, plan), landmarks


def _bilateral_with(values: Tensor, features: Tensor, landmarks: Tensor, *settings: Any) -> Tensor:
    plan = Plan(*settings)
    with torch.autocast(values.device.type, enabled=False), full_precision():
        if plan.method in _LOW_RANK and values.numel() > 0:
            return _filter(values, features, landmarks, plan)
        return _directly(values, features, plan)


def _no_landmarks(features: Tensor, plan: Plan) -> Tensor:
    batch, dims = features.shape[:2]
    return features.new_full((batch, lowrank.MOST_LANDMARKS, dims - len(plan.size)), torch.inf)


def _choose(values: Tensor, features: Tensor, landmarks: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Filter each image by low rank, or else by tiles; its landmarks become the first of the ``landmarks`` given."""
    filtered = torch.empty_like(values, memory_format=torch.contiguous_format)
    for b in range(len(values)):
        product = _low_rank(values, features, b, plan)
        if product is None:
            filtered[b] = _by_tiles(values[b : b + 1], features[b : b + 1], plan)[0]
        else:
            filtered[b] = product.filtered()
            landmarks[b, : len(product.kernel.landmarks)] = product.kernel.landmarks
    return filtered, landmarks


def _low_rank(values: Tensor, features: Tensor, b: int, plan: Plan) -> lowrank.Product | None:
    """The product for image b, or None where pairs of tiles should do: in ``"auto"``, and for values not finite."""
    asked = plan.method == "lowrank"
    if not asked and not lowrank.is_worth_trying(features[b], plan.size, plan.tolerance):
        return None
    if asked and lowrank.is_too_narrow(features[b], plan.size, plan.tolerance):
        raise ToleranceError(
            f"sigma_xy: expected a wider kernel for method='lowrank' and tolerance={plan.tolerance:g} on image {b}, "
            "or another method: there would be as many spatial functions as pixels"
        )
    product, reached = lowrank.choose(values[b], features[b], plan.size, plan.tolerance, plan.full, quick=not asked)
    if product is None and asked and math.isfinite(reached):
        raise ToleranceError(
            f"method: 'lowrank' cannot reach tolerance={plan.tolerance:g} on image {b}, its error is about "
            f"{reached:.2g}; expected a larger tolerance, or another method"
        )
    return product


def _bilateral_energy(
    values: Tensor, mask: Tensor, features: Tensor, quadratic: bool, complete: bool, *settings: Any
) -> Tensor:
    """The energy of :class:`PairwiseEnergy` alone: by low rank from the core, at half the cost of filtering."""
    plan = Plan(*settings)
    with torch.autocast(values.device.type, enabled=False), full_precision():
        if plan.method not in _LOW_RANK or values.numel() == 0:
            return (_partner(values, mask, quadratic) * _directly(values, features, plan)).sum((1, 2))
        inputs = values if quadratic or complete else torch.cat([values, mask], 1)
        energies = []
        for b in range(len(values)):
            product, one = _low_rank(inputs, features, b, plan), slice(b, b + 1)
            partner = _partner(values[b], mask[b], quadratic)
            if product is None:
                energies.append((partner * _by_tiles(values[one], features[one], plan)).sum())
                continue
            classes = values.shape[1]
            v, solved = product.gathered[:, :classes], product.solved[:, :classes]
            m = v.sum(1, keepdim=True) if complete else product.gathered[:, classes:]
            energies.append((_partner(v, m, quadratic) * solved).sum() + (partner * product.own[:classes]).sum())
        return torch.stack(energies)


def _partner(values: Tensor, mask: Tensor, quadratic: bool) -> Tensor:
    """What the filtered values are multiplied with."""
    return -values if quadratic else mask - values


def _filter(values: Tensor, features: Tensor, landmarks: Tensor, plan: Plan) -> Tensor:
    """Filter with given landmarks, by tiles where there are none."""
    filtered = torch.empty_like(values, memory_format=torch.contiguous_format)
    for b, image in enumerate(features):
        one, chosen = slice(b, b + 1), landmarks[b][landmarks[b, :, 0].isfinite()]
        if len(chosen):
            filtered[b] = lowrank.filter_with(values[b], image, plan.size, chosen, plan.tolerance, plan.full)
        else:
            filtered[b] = _by_tiles(values[one], features[one], plan)[0]
    return filtered


def _directly(values: Tensor, features: Tensor, plan: Plan) -> Tensor:
    """By the methods without landmarks."""
    if plan.method == "lattice":
        return lattice.gaussian_filter(values, features)
    return _by_tiles(values, features, plan)


def _by_tiles(values: Tensor, features: Tensor, plan: Plan) -> Tensor:
    run = _kernels().gaussian_filter if _on_triton(plan, values) else blocksparse.gaussian_filter
    return run(values, features, _cutoff(plan))


def prepare(
    features: Tensor, plan: Plan, *, alternate: bool = False, filled: bool = False
) -> Callable[[Tensor], Tensor]:
    """What :class:`Bilateral` makes of ``values [B, K, N]``, N > 0, by lattice or else by tiles.

    For many values of the same features: the lattice, and which pairs of tiles count, are found once. Triton finds
    pairs in next to no time, again for each of the values. ``alternate`` and ``filled`` are for the lattice. Values get
    gradients, but not where orders alternate: that of one is the other.
    """
    device = features.device.type
    run: Callable[[Tensor], Tensor]
    with torch.no_grad(), torch.autocast(device, enabled=False), full_precision():
        if plan.method == "lattice":
            run = lattice.Lattices(features, alternate=alternate, filled=filled).filtered
        elif _on_triton(plan, features):
            run = partial(_kernels().gaussian_filter, features=features, tolerance=_cutoff(plan))
        else:
            run = blocksparse.prepare(features, _cutoff(plan)).filtered

    def filtered(values: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device, enabled=False), full_precision():
            return run(values)

    return filtered if alternate else partial(_Symmetric.apply, filtered)


class _Symmetric(torch.autograd.Function):
    """A linear map of values that is its own transpose: so is its gradient."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        ctx.run = run
        return run(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Symmetric.apply(ctx.run, grad)


def _bilateral_guide(grad: Tensor, values: Tensor, features: Tensor, *settings: Any) -> Tensor:
    plan = Plan(*settings)
    run = _kernels().guide_gradient if _on_triton(plan, values) else blocksparse.guide_gradient
    with torch.autocast(values.device.type, enabled=False), full_precision():
        return run(grad, values, features, _cutoff(plan))


def _cutoff(plan: Plan) -> float:
    """The share of the weights that may be left out."""
    return 0.0 if plan.method == "exact" else plan.tolerance


def _on_triton(plan: Plan, values: Tensor) -> bool:
    """Older devices lack the tensor cores that the kernels are made for."""
    return plan.triton and torch.cuda.get_device_capability(values.device) >= (8, 0)


def _kernels() -> Any:
    from segloss.bilateral import kernels  # needs triton

    return kernels


def _bilateral_error(values: Tensor, features: Tensor, filtered: Tensor) -> Tensor:
    pixels = sample_pixels(features.shape[2]).to(features.device)
    images = zip(values, features, filtered[:, :, pixels], strict=True)
    with torch.autocast(values.device.type, enabled=False), full_precision():
        return values.new_tensor([sampled_error(v, f, at_pixels, pixels) for v, f, at_pixels in images])


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


_PLAN = "SymInt[] size, str method, float tolerance, bool full, bool triton"
register(
    f"bilateral(Tensor values, Tensor features, {_PLAN}) -> (Tensor, Tensor)",
    _bilateral,
    fake=lambda values, features, *plan: (_like(values), torch.empty_like(_no_landmarks(features, Plan(*plan)))),
)
register(
    f"bilateral_with(Tensor values, Tensor features, Tensor landmarks, {_PLAN}) -> Tensor",
    _bilateral_with,
    fake=lambda values, features, landmarks, *_: _like(values),
)
register(
    f"bilateral_energy(Tensor values, Tensor mask, Tensor features, bool quadratic, bool complete, {_PLAN}) -> Tensor",
    _bilateral_energy,
    fake=lambda values, *_: values.new_empty((len(values),)),
)
register(
    f"bilateral_guide(Tensor grad, Tensor values, Tensor features, {_PLAN}) -> Tensor",
    _bilateral_guide,
    fake=lambda grad, values, features, *_: _like(features),
)
register(
    "bilateral_error(Tensor values, Tensor features, Tensor filtered) -> Tensor",
    _bilateral_error,
    fake=lambda values, features, filtered: values.new_empty((len(values),)),
)


def _guide_gradient(grad: Tensor, values: Tensor, features: Tensor, plan: Plan) -> Tensor:
    def fast(grad: Tensor, values: Tensor, features: Tensor) -> Tensor:
        return torch.ops.segloss.bilateral_guide(grad.contiguous(), values, features, *plan)

    return known(fast, guide_gradient_reference, (grad, values, features))


class Bilateral(torch.autograd.Function):
    """``values [B, K, N]`` filtered by the Gaussian kernel of ``features [B, D, N]``, both of one dtype.

    Returns the filtered values, and the landmarks for :class:`BilateralWith`. The kernel is symmetric: the gradient of
    the values is the same filter with the same landmarks. The gradient of the features is that of the exact kernel up
    to the tolerance, whatever the method. Differentiable twice with respect to the values at the same cost; with
    respect to the features by dense matrices, quadratic in N.
    """

    @staticmethod
    def forward(values: Tensor, features: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        return torch.ops.segloss.bilateral(values, features, *plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Plan], output: tuple[Tensor, Tensor]) -> None:
        values, features, ctx.plan = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(values, features, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *_gradients(ctx, grad), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, features: Tensor, plan: Plan
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        size = info.batch_size
        filtered, landmarks = Bilateral.apply(fold(values, in_dims[0], size), fold(features, in_dims[1], size), plan)
        return (filtered.unflatten(0, (size, -1)), landmarks.unflatten(0, (size, -1))), (0, 0)


class BilateralWith(torch.autograd.Function):
    """:class:`Bilateral` with landmarks that were chosen before, and only the filtered values as result."""

    @staticmethod
    def forward(values: Tensor, features: Tensor, landmarks: Tensor, plan: Plan) -> Tensor:
        return torch.ops.segloss.bilateral_with(values, features, landmarks, *plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Plan], output: Tensor) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return *_gradients(ctx, grad), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, features: Tensor, landmarks: Tensor, plan: Plan
    ) -> tuple[Tensor, int]:
        tensors = zip((values, features, landmarks), in_dims[:3], strict=True)
        filtered = BilateralWith.apply(*(fold(t, d, info.batch_size) for t, d in tensors), plan)
        return filtered.unflatten(0, (info.batch_size, -1)), 0


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of values and features."""
    values, features, landmarks = ctx.saved_tensors
    to_values = to_features = None
    if ctx.needs_input_grad[0]:
        to_values = BilateralWith.apply(grad.contiguous(), features, landmarks, ctx.plan)
    if ctx.needs_input_grad[1]:
        to_features = _guide_gradient(grad, values, features, ctx.plan)
    return to_values, to_features


class PairwiseEnergy(torch.autograd.Function):
    """Potts energy of each image from one run of the filter; the gradient comes from its saved output.

    ``values [B, K, N]`` are the probabilities times the mask ``mask [B, 1, N]``. The Potts form is
    sum_k (m - v_k)' W v_k, the quadratic one -sum_k v_k' W v_k. ``complete`` says that the values sum to the mask, so
    that W m is the sum of the filtered values and need not be computed. Returns the energies ``[B]`` and, for the
    backward pass, the filtered values and the landmarks: nothing of them if there will be none, ``value_only``.
    """

    @staticmethod
    def forward(
        values: Tensor, mask: Tensor, features: Tensor, plan: Plan, quadratic: bool, complete: bool, value_only: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if value_only:
            energy = torch.ops.segloss.bilateral_energy(values, mask, features, quadratic, complete, *plan)
            return energy, values.new_empty((len(values), 0)), values.new_empty((len(values), 0))
        inputs = values if quadratic or complete else torch.cat([values, mask], 1)
        filtered, landmarks = torch.ops.segloss.bilateral(inputs.contiguous(), features, *plan)
        partner = _partner(values, mask, quadratic)
        return (partner * filtered[:, : values.shape[1]]).sum((1, 2)), filtered, landmarks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, mask, features, ctx.plan, ctx.quadratic, ctx.complete, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(values, mask, features, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        values, mask, features, filtered, landmarks = ctx.saved_tensors
        grad = grad[:, None, None]
        to_values = to_features = None
        if ctx.needs_input_grad[0]:
            fast = partial(_slope_of_filtered, ctx.quadratic, ctx.complete)
            slow = partial(_slope, ctx.plan, ctx.quadratic)
            to_values = grad * known(fast, slow, (values, features), (mask, filtered, landmarks))
        if ctx.needs_input_grad[2]:
            partner = _partner(values, mask, ctx.quadratic)
            to_features = _guide_gradient(grad * partner, values, features, ctx.plan)
        return to_values, None, to_features, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, mask: Tensor, features: Tensor, *settings: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        tensors = (fold(t, d, info.batch_size) for t, d in zip((values, mask, features), in_dims[:3], strict=True))
        outputs = PairwiseEnergy.apply(*tensors, *settings)
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in outputs), (0, 0, 0)


def _slope(
    plan: Plan,
    quadratic: bool,
    values: Tensor,
    features: Tensor,
    mask: Tensor,
    filtered: Tensor,
    landmarks: Tensor,
) -> Tensor:
    """Derivative of the energy with respect to the values: W m - 2 W v, or -2 W v."""
    slope = -2 * BilateralWith.apply(values, features, landmarks, plan)
    return slope if quadratic else slope + BilateralWith.apply(mask, features, landmarks, plan)


def _slope_of_filtered(
    quadratic: bool,
    complete: bool,
    values: Tensor,
    features: Tensor,
    mask: Tensor,
    filtered: Tensor,
    landmarks: Tensor,
) -> Tensor:
    """The same from the saved output of the filter."""
    slope = -2 * filtered[:, : values.shape[1]]
    if quadratic:
        return slope
    return slope + (filtered.sum(1, keepdim=True) if complete else filtered[:, -1:])
