r"""Sums over all pairs of pixels, weighted by how far apart they are and how much their colours differ.

The weights :math:`K_{ij} = w_{ij} f(\delta_{ij})` of the feature similarity loss are symmetric, so that

.. math:: \sum_{ij} K_{ij} \tfrac12 \|y_i - y_j\|^2 = y^\top (D - K) y, \qquad D_{ii} = \sum_j K_{ij},

whose gradient is :math:`2 (D - K) y`: once the product is there, the backward pass costs nothing. The product is
formed from blocks of one row of pixels against the rows below it, each pair once, in two buffers that stay in cache.
No tanh and no logarithm is needed: with :math:`q = \delta / (1 - \delta)`,

.. math:: f(\delta) = \tanh(\mu + \ln q) = 1 - \frac{2 e^{-2 \mu}}{e^{-2 \mu} + q^2}.
"""

import math
from typing import Any

import torch
from torch import Tensor

from segloss.common.precision import full_precision
from segloss.common.registration import fold, known, register

WEIGHT, BY_SIGMA, BY_MU = 0, 1, 2  # the weights K and their derivatives

_ELEMENTS = 1 << 19  # of a block, at most: 2 MB of float32
_CACHED = 1 << 17  # of all blocks of a thread, unless a single one is larger
_LARGEST_MU = 30.0  # f is a step there, at delta = 1e-13, and products with e^(-2 mu) are far from denormal
_LEAST_SIGMA = 1e-3  # pixels


def reach_of(sigma: float, dtype: torch.dtype) -> float:
    """Distance in pixels beyond which a Gaussian's whole mass is a quarter of the rounding error of a sum of it."""
    return sigma * math.sqrt(-2 * math.log(torch.finfo(dtype).eps / 4))


def _product(values: Tensor, image: Tensor, sigma: Tensor, mu: Tensor, reach: int, disc: bool, part: int) -> Tensor:
    """(D - K) y for ``values [B, C, H, W]``, or the same with a derivative of K in its place."""
    with torch.autocast(values.device.type, enabled=False), full_precision():
        size = _together(values, reach)
        groups = zip(values.split(size), image.to(values.dtype).split(size), strict=True)
        parts = [_group(y, x, sigma.to(values.dtype), mu.to(values.dtype), reach, disc, part) for y, x in groups]
        return torch.cat(parts) if parts else torch.zeros_like(values, memory_format=torch.contiguous_format)


def _together(values: Tensor, reach: int) -> int:
    """Images at a time: all of them on a GPU; on a CPU one for each thread, or more if they are small."""
    if values.device.type != "cpu":
        return max(len(values), 1)
    height, width = values.shape[2:]
    return torch.get_num_threads() * max(1, _CACHED // (width**2 * min(reach + 1, height)))


def _group(values: Tensor, image: Tensor, sigma: Tensor, mu: Tensor, reach: int, disc: bool, part: int) -> Tensor:
    count, _, height, width = values.shape
    y = torch.cat([_centred(values), torch.ones_like(values[:, :1])], 1).contiguous()  # 1 sums up the degrees
    sums = torch.zeros_like(y)
    down = min(reach, height - 1)
    columns = _columns(width, min(reach, width - 1), down + 1)
    unlike = values.new_tensor(float(image.shape[1]))  # 3: the L1 distance of black and white
    inverse = torch.exp(-2 * mu.clamp(-_LARGEST_MU, _LARGEST_MU))
    tables = [_spatial(query, key, sigma, down, reach, disc, part) for query, key in columns]
    scaled = [table * inverse for table in tables]
    buffers = [values.new_empty((count * max(table.numel() for table in tables),)) for _ in range(2)]
    for top in range(height):
        rows = slice(top, min(top + down, height - 1) + 1)
        for spans, *spatial in zip(columns, tables, scaled, strict=True):
            own, other = (slice(span.start, span.stop) for span in spans)
            x, z = image[:, :, top, own], image[:, :, rows, other].flatten(2)
            weights = _weights(x, z, spatial, unlike, inverse, buffers, part)
            y_own, y_other = y[:, :, top, own], y[:, :, rows, other]
            sums[:, :, top, own] += torch.bmm(y_other.flatten(2), weights.mT)
            sums[:, :, rows, other] += torch.bmm(y_own, weights).view_as(y_other)
    return sums[:, -1:] * y[:, :-1] - sums[:, :-1]


def _centred(values: Tensor) -> Tensor:
    """D - K does not see constants, so the mean is taken off before rounding errors can grow with it."""
    return values - values.mean((2, 3), keepdim=True)


def _columns(width: int, reach: int, rows: int) -> list[tuple[range, range]]:
    """Spans of columns, and for each the columns within reach: blocks of ``rows`` rows are not too large to cache."""
    step = max(16, min(width, _ELEMENTS // (rows * min(width, 2 * reach + 16))))
    spans = (range(start, min(start + step, width)) for start in range(0, width, step))
    return [(span, range(max(0, span.start - reach), min(width, span.stop + reach))) for span in spans]


def _spatial(query: range, key: range, sigma: Tensor, down: int, reach: int, disc: bool, part: int) -> Tensor:
    """Spatial weights of a block ``[len(query), (down + 1) * len(key)]``, 0 for pairs that another block has."""

    def positions(span: range) -> Tensor:
        return torch.arange(span.start, span.stop, device=sigma.device)

    across = positions(key) - positions(query)[:, None, None]
    below = positions(range(down + 1))[:, None]
    square = across.square() + below.square()
    within = square <= reach**2 if disc else across.abs() <= reach
    sigma = sigma.clamp(min=_LEAST_SIGMA)
    variance = sigma.square()
    weight = torch.exp(-square / (2 * variance)) / (2 * math.pi * variance)
    if part == BY_SIGMA:
        weight = weight * (square / variance - 2) / sigma
    return torch.where(within & ((below > 0) | (across > 0)), weight, 0).flatten(1)


def _weights(
    x: Tensor, z: Tensor, spatial: list[Tensor], unlike: Tensor, inverse: Tensor, buffers: list[Tensor], part: int
) -> Tensor:
    """K between pixels of colours ``x [B, 3, t]`` and ``z [B, 3, n]``, in one of the buffers.

    ``spatial`` are the spatial weights, and the same times e^(-2 mu).
    """
    shape = (len(x), x.shape[2], z.shape[2])
    out, scratch = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
    weight, scaled = (table[:, : shape[2]] for table in spatial)
    torch.sub(x[:, 0, :, None], z[:, 0, None], out=out).abs_()
    for channel in range(1, x.shape[1]):
        out.add_(torch.sub(x[:, channel, :, None], z[:, channel, None], out=scratch).abs_())
    torch.sub(unlike, out, out=scratch)
    out.div_(scratch)  # q, infinite where the colours are as different as can be
    torch.addcmul(inverse, out, out, out=scratch)
    if part != BY_MU:
        return torch.addcdiv(weight, scaled, scratch, value=-2, out=out)
    # With v = e^(-2 mu) / (e^(-2 mu) + q^2): f = 1 - 2 v, and 1 - f^2 = 4 v (1 - v).
    torch.div(inverse, scratch, out=out)
    return torch.addcmul(out, out, out, value=-1, out=scratch).mul_(4 * weight)


register(
    "dissimilarity(Tensor values, Tensor image, Tensor sigma, Tensor mu, int reach, bool disc, int part) -> Tensor",
    _product,
    fake=lambda values, *_: torch.empty_like(values, memory_format=torch.contiguous_format),
)


class Product(torch.autograd.Function):
    """(D - K) y as a function of the values and of sigma and mu, scalar tensors; the image is a constant.

    Linear and symmetric in the values, so that it is its own derivative there, as often as one likes.
    """

    @staticmethod
    def forward(
        values: Tensor, image: Tensor, sigma: Tensor, mu: Tensor, reach: int, disc: bool, part: int = WEIGHT
    ) -> Tensor:
        return torch.ops.segloss.dissimilarity(values, image, sigma, mu, reach, disc, part)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reach, ctx.disc, ctx.part = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, *constants = ctx.saved_tensors
        if ctx.part != WEIGHT and any(ctx.needs_input_grad[2:4]):
            raise NotImplementedError(
                "sigma, mu: gradients with respect to them cannot be differentiated; take those of the scores first"
            )
        to_values = to_sigma = to_mu = None
        if ctx.needs_input_grad[0]:
            to_values = Product.apply(grad, *constants, ctx.reach, ctx.disc, ctx.part)
        if ctx.needs_input_grad[2]:
            to_sigma = (grad * Product.apply(values, *constants, ctx.reach, ctx.disc, BY_SIGMA)).sum()
        if ctx.needs_input_grad[3]:
            to_mu = (grad * Product.apply(values, *constants, ctx.reach, ctx.disc, BY_MU)).sum()
        return to_values, None, to_sigma, to_mu, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        values, image = _fold(info.batch_size, in_dims, inputs)
        return Product.apply(values, image, *inputs[2:]).unflatten(0, (info.batch_size, -1)), 0


class PairwiseEnergy(torch.autograd.Function):
    """y' (D - K) y of each image ``[B]``, and (D - K) y for the backward pass."""

    @staticmethod
    def forward(
        values: Tensor, image: Tensor, sigma: Tensor, mu: Tensor, reach: int, disc: bool
    ) -> tuple[Tensor, Tensor]:
        product = torch.ops.segloss.dissimilarity(values, image, sigma, mu, reach, disc, WEIGHT)
        return (_centred(values) * product).sum((1, 2, 3)), product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.reach, ctx.disc = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        values, image, sigma, mu, product = ctx.saved_tensors
        grad = grad[:, None, None, None]

        def derivative(values: Tensor, sigma: Tensor, mu: Tensor, image: Tensor, product: Tensor) -> Tensor:
            return 2 * Product.apply(values, image, sigma, mu, ctx.reach, ctx.disc, WEIGHT)

        def saved(values: Tensor, sigma: Tensor, mu: Tensor, image: Tensor, product: Tensor) -> Tensor:
            return 2 * product

        def by(part: int) -> Tensor:
            change = Product.apply(values, image, sigma, mu, ctx.reach, ctx.disc, part)
            return (grad * _centred(values) * change).sum()

        to_values = to_sigma = to_mu = None
        if ctx.needs_input_grad[0]:
            to_values = grad * known(saved, derivative, (values, sigma, mu), (image, product))
        if ctx.needs_input_grad[2]:
            to_sigma = by(BY_SIGMA)
        if ctx.needs_input_grad[3]:
            to_mu = by(BY_MU)
        return to_values, None, to_sigma, to_mu, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        values, image = _fold(info.batch_size, in_dims, inputs)
        energy, product = PairwiseEnergy.apply(values, image, *inputs[2:])
        return (energy.unflatten(0, (info.batch_size, -1)), product.unflatten(0, (info.batch_size, -1))), (0, 0)


def _fold(size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    if in_dims[2] is not None or in_dims[3] is not None:
        raise NotImplementedError("sigma, mu: expected the same for all under vmap")
    return fold(inputs[0], in_dims[0], size), fold(inputs[1], in_dims[1], size)
