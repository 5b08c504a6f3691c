"""The one pass over the pixels behind every size loss: the logarithm of the average softmax prediction.

All size losses are small formulas on the ``[B, K]`` result, so this is where their time and memory go. On the CPU the
pixels are walked in blocks that stay in cache; forward keeps one number per pixel (its log-partition), backward needs
no full-size buffer but the gradient. Exponentials and
logarithms go through base 2, which is several times faster here.
"""

import math
from typing import Any

import torch
from torch import Tensor

from segloss._reduce import LOG_FLOOR, wide_dtype
from segloss._register import register

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)
_BLOCK = 1 << 19  # elements per block: it stays in cache, and the calls it costs are few


def log_sum_reference(logits: Tensor, valid: Tensor | None) -> Tensor:
    """The definition: log of the sum over the pixels of the softmax over the classes, ``[B, K, N]`` to ``[B, K]``."""
    log_softmax = torch.log_softmax(logits, 1)
    if valid is not None:
        log_softmax = log_softmax.masked_fill(~valid[:, None], -torch.inf)
    return torch.logsumexp(log_softmax, 2).clamp(min=LOG_FLOOR)


def _blocks(logits: Tensor) -> list[tuple[slice, slice]]:
    """Cuts ``[B, K, N]`` into (images, pixels) blocks of about ``_BLOCK`` elements."""
    batch, classes, pixels = logits.shape
    step = max(1, min(pixels, _BLOCK // classes))
    images = max(1, _BLOCK // (classes * step))
    return [(slice(b, b + images), slice(p, p + step)) for b in range(0, batch, images) for p in range(0, pixels, step)]


def _log_sum(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """``[B, K, N]`` logits to the log-sums ``[B, K]`` and the log-partitions ``[B, N]``, infinite at ignored pixels."""
    wide = logits.to(wide_dtype(logits))
    partition = torch.logsumexp(wide, 1)
    if valid is not None:
        partition = partition.masked_fill(~valid, torch.inf)
    log_sum = torch.logsumexp(wide - partition[:, None], 2).clamp_(min=LOG_FLOOR)
    return log_sum, partition


def _log_sum_cpu(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, classes, pixels = logits.shape
    dtype = wide_dtype(logits)
    partition = torch.empty(batch, pixels, dtype=dtype)
    log_sum = torch.full((batch, classes), -torch.inf, dtype=dtype)
    with torch.autocast("cpu", enabled=False):
        for images, part in _blocks(logits):
            block = logits[images, :, part].to(dtype)
            peak = block.amax(1)
            shifted = block - peak[:, None]
            if valid is not None:
                shifted.masked_fill_(~valid[images, None, part], -torch.inf)
            # Each class is scaled by its own largest value in the block, so that none underflows as a whole;
            # the scales come back in the partition function, where a class that small does not count.
            top = shifted.amax(2).clamp_(min=LOG_FLOOR)
            scaled = torch.add(top[:, :, None] * -_LOG2E, shifted, alpha=_LOG2E, out=shifted).exp2_()
            total = torch.bmm(top.exp()[:, None], scaled)
            inverse = total.reciprocal()
            if valid is not None:
                inverse.masked_fill_(~valid[images, None, part], 0)
            sums = torch.bmm(scaled, inverse.transpose(1, 2))[:, :, 0].log_() + top
            log_sum[images] = torch.logaddexp(log_sum[images], sums)
            torch.add(peak, total[:, 0].log2_(), alpha=_LN2, out=partition[images, part])
    if valid is not None:
        partition.masked_fill_(~valid, torch.inf)
    return log_sum.clamp_(min=LOG_FLOOR), partition


def _log_sum_fake(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, classes, pixels = logits.shape
    dtype = wide_dtype(logits)
    return logits.new_empty(batch, classes, dtype=dtype), logits.new_empty(batch, pixels, dtype=dtype)


def _log_sum_backward(grad: Tensor, logits: Tensor, partition: Tensor, log_sum: Tensor) -> Tensor:
    """With the softmax S, its sum s over the pixels and w = S / s: dL/dx = g w - S (g . w) = w (g - s (g . w))."""
    share = torch.exp(logits - partition[:, None] - log_sum[:, :, None])
    mean = (grad[:, :, None] * share).sum(1, keepdim=True)
    return (share * (grad[:, :, None] - log_sum.exp()[:, :, None] * mean)).to(logits.dtype)


def _log_sum_backward_cpu(grad: Tensor, logits: Tensor, partition: Tensor, log_sum: Tensor) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    total = log_sum.exp()[:, :, None]
    with torch.autocast("cpu", enabled=False):
        for images, part in _blocks(logits):
            share = logits[images, :, part] - partition[images, None, part]
            torch.add(log_sum[images, :, None] * -_LOG2E, share, alpha=_LOG2E, out=share).exp2_()
            mean = torch.bmm(grad[images, None], share)
            factor = torch.baddbmm(grad[images, :, None], total[images], mean, alpha=-1)
            target = out[images, :, part]
            if out.dtype == share.dtype:
                torch.mul(share, factor, out=target)
            else:
                target.copy_(share.mul_(factor))
    return out


def _log_sum_backward_fake(grad: Tensor, logits: Tensor, partition: Tensor, log_sum: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


register("log_sum(Tensor logits, Tensor? valid) -> (Tensor, Tensor)", _log_sum, fake=_log_sum_fake, cpu=_log_sum_cpu)
register(
    "log_sum_backward(Tensor grad, Tensor logits, Tensor partition, Tensor log_sum) -> Tensor",
    _log_sum_backward,
    fake=_log_sum_backward_fake,
    cpu=_log_sum_backward_cpu,
)


class LogSum(torch.autograd.Function):
    """Differentiable ``segloss::log_sum``; a double backward goes through plain torch."""

    @staticmethod
    def forward(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.segloss.log_sum(logits, valid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
        logits, valid = inputs
        log_sum, partition = output
        ctx.mark_non_differentiable(partition)
        ctx.save_for_backward(logits, valid, log_sum, partition)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, valid, log_sum, partition = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the same formula, differentiable once more
            wide = logits.to(grad.dtype)
            log_softmax = torch.log_softmax(wide, 1)
            share = torch.exp(log_softmax - log_sum_reference(wide, valid)[:, :, None])
            if valid is not None:
                share = share * valid[:, None]
            mean = (grad[:, :, None] * share).sum(1, keepdim=True)
            return (grad[:, :, None] * share - torch.exp(log_softmax) * mean).to(logits.dtype), None
        return torch.ops.segloss.log_sum_backward(grad.contiguous(), logits, partition, log_sum), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], logits: Tensor, valid: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        def fold(tensor: Tensor, dim: int | None) -> Tensor:
            tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return tensor.flatten(0, 1)

        out = LogSum.apply(fold(logits, in_dims[0]), None if valid is None else fold(valid, in_dims[1]))
        return tuple(o.unflatten(0, (info.batch_size, -1)) for o in out), (0, 0)


def log_average(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Log of the average prediction, ``[B, K]``, and which images have pixels at all, ``[B]`` or None for all of them.

    ``logits`` are ``[B, K, *spatial]``, ``valid`` ``[B, *spatial]`` or None. Images without pixels get 0.
    """
    logits = logits.flatten(2)
    pixels = logits.shape[2]
    if pixels == 0 or logits.shape[0] == 0:
        nothing = logits.sum(2).to(wide_dtype(logits))
        return nothing, torch.zeros_like(nothing[:, 0], dtype=torch.bool)
    if valid is None:
        return LogSum.apply(logits, None)[0] - math.log(pixels), None
    valid = valid.flatten(1)
    log_sum = LogSum.apply(logits, valid)[0]
    count = valid.sum(1)
    seen = count > 0
    average = log_sum - count.clamp(min=1).to(log_sum.dtype).log()[:, None]
    return torch.where(seen[:, None], average, 0), seen
