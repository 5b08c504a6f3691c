"""The one pass over the pixels behind every size loss: the logarithm of the average softmax prediction.

All size losses are small formulas on the ``[B, K]`` result, so this is where their time and memory go. On the CPU the
pixels of large inputs are walked in blocks that stay in cache; forward keeps two numbers per pixel, backward needs no
full-size buffer but the gradient. Exponentials are powers of 2, which are several times faster there. Small inputs keep
their softmax instead, which takes fewer calls.
"""

import math
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segloss.common.reduction import LOG_FLOOR, wide_dtype
from segloss.common.registration import fold, known, register

_LOG2E = math.log2(math.e)
_BLOCK = 1 << 19  # elements per block: it stays in cache, and the calls it costs are few
_SMALL = 1 << 22  # elements: up to there the softmax is kept, beyond computed twice, which then costs less than memory
_TINY = 1 << 18  # elements: up to there autograd's own steps take less time than the calls of a function
_LEAST = 1e-20  # sums of probabilities from which on no rounding error of small ones counts
_MOST_CLASSES = 256  # of the Triton kernels, which hold a pixel in registers


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


def _log_sum(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over the pixels of the softmax of ``[B, K, N]`` logits, in parts that no logits overflow.

    Every logit is relative to the peak of its pixel and then to the top of its class, so that neither a pixel nor a
    class underflows as a whole and large numbers cancel exactly.

    Returns:
        top: largest logit of each class relative to the peaks, ``[B, K]``.
        total: the sum divided by exp(top), ``[B, K]``; 0 without valid pixels.
        peak: largest logit of each pixel, ``[B, N]``; infinite at ignored pixels.
        inverse: 1 / sum of exp(logit - peak), ``[B, N]``; 0 at ignored pixels.
    """
    wide = logits.to(wide_dtype(logits))
    peak = wide.amax(1)
    shifted = wide - peak[:, None]
    if valid is not None:
        shifted = shifted.masked_fill(~valid[:, None], -torch.inf)
    top = shifted.amax(2).clamp(min=LOG_FLOOR)
    scaled = torch.exp(shifted - top[:, :, None])
    inverse = (top.exp()[:, :, None] * scaled).sum(1).reciprocal()
    if valid is not None:
        inverse, peak = inverse.masked_fill(~valid, 0), peak.masked_fill(~valid, torch.inf)
    return top, (scaled * inverse[:, None]).sum(2), peak, inverse


def _log_sum_cpu(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, classes, pixels = logits.shape
    dtype = wide_dtype(logits)
    peak = torch.empty(batch, pixels, dtype=dtype, device="cpu")
    inverse = torch.empty_like(peak)
    top = torch.full((batch, classes), LOG_FLOOR, dtype=dtype, device="cpu")
    total = torch.zeros(batch, classes, dtype=dtype, device="cpu")
    with torch.autocast("cpu", enabled=False):
        for images, part in _blocks(logits):
            block = logits[images, :, part].to(dtype)
            shifted = block - torch.amax(block, 1, out=peak[images, part])[:, None]
            if valid is not None:
                shifted.masked_fill_(~valid[images, None, part], -torch.inf)
            highest = torch.maximum(shifted.amax(2), top[images])
            scaled = shifted.sub_(highest[:, :, None]).mul_(_LOG2E).exp2_()
            torch.reciprocal(torch.bmm(highest.exp()[:, None], scaled)[:, 0], out=inverse[images, part])
            if valid is not None:
                inverse[images, part].masked_fill_(~valid[images, part], 0)
            here = torch.bmm(scaled, inverse[images, part, None])[:, :, 0]
            total[images] = total[images] * (top[images] - highest).exp_() + here
            top[images] = highest
    if valid is not None:
        peak.masked_fill_(~valid, torch.inf)
    return top, total, peak, inverse


def _log_sum_cuda(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _has_kernels(logits):
        return _log_sum(logits, valid)
    from segloss import _average_kernels

    return _average_kernels.log_sum(logits, valid)


def _log_sum_fake(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, classes, pixels = logits.shape
    shapes = ((batch, classes), (batch, classes), (batch, pixels), (batch, pixels))
    top, total, peak, inverse = (logits.new_empty(shape, dtype=wide_dtype(logits)) for shape in shapes)
    return top, total, peak, inverse


def _log_sum_backward(
    grad: Tensor, logits: Tensor, top: Tensor, total: Tensor, peak: Tensor, inverse: Tensor
) -> Tensor:
    """With the softmax S and its sum s over the pixels: dL/dx = S (g / s - sum_k S_k g_k / s_k)."""
    scaled = torch.exp(logits - peak[:, None] - top[:, :, None])
    slope = (grad / total).masked_fill(total == 0, 0)[:, :, None]
    mean = inverse[:, None] * (slope * scaled).sum(1, keepdim=True)
    return (scaled * inverse[:, None] * (slope - top.exp()[:, :, None] * mean)).to(logits.dtype)


def _empty_like(logits: Tensor) -> Tensor:
    """An uninitialised gradient: numpy asks the system for huge pages, which makes first writing to it much faster."""
    if logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.empty(logits.shape, np.float32 if logits.dtype == torch.float32 else np.float64))
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _log_sum_backward_cpu(
    grad: Tensor, logits: Tensor, top: Tensor, total: Tensor, peak: Tensor, inverse: Tensor
) -> Tensor:
    out = _empty_like(logits)
    slope = (grad / total).masked_fill_(total == 0, 0)
    left = torch.stack([slope, -top.exp()], 2)
    with torch.autocast("cpu", enabled=False):
        for images, part in _blocks(logits):
            scaled = logits[images, :, part] - peak[images, None, part]
            scaled.sub_(top[images, :, None]).mul_(_LOG2E).exp2_()
            weight = inverse[images, None, part]
            mean = weight * torch.bmm(slope[images, None], scaled)
            factor = torch.bmm(left[images], torch.cat([weight, weight * mean], 1))
            target = out[images, :, part]
            if out.dtype == scaled.dtype:
                torch.mul(scaled, factor, out=target)
            else:
                target.copy_(scaled.mul_(factor))
    return out


def _log_sum_backward_cuda(
    grad: Tensor, logits: Tensor, top: Tensor, total: Tensor, peak: Tensor, inverse: Tensor
) -> Tensor:
    if not _has_kernels(logits):
        return _log_sum_backward(grad, logits, top, total, peak, inverse)
    from segloss import _average_kernels

    return _average_kernels.log_sum_backward(grad, logits, top, total, peak, inverse)


def _has_kernels(logits: Tensor) -> bool:
    """The kernels hold all classes of a pixel in registers."""
    return logits.shape[1] <= _MOST_CLASSES and logits.numel() > 0 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _log_sum_backward_fake(grad: Tensor, logits: Tensor, *saved: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


register(
    "log_sum(Tensor logits, Tensor? valid) -> (Tensor, Tensor, Tensor, Tensor)",
    _log_sum,
    fake=_log_sum_fake,
    cpu=_log_sum_cpu,
    cuda=_log_sum_cuda,
)
register(
    "log_sum_backward(Tensor grad, Tensor logits, Tensor top, Tensor total, Tensor peak, Tensor inverse) -> Tensor",
    _log_sum_backward,
    fake=_log_sum_backward_fake,
    cpu=_log_sum_backward_cpu,
    cuda=_log_sum_backward_cuda,
)


class LogSum(torch.autograd.Function):
    """Differentiable ``segloss::log_sum``: the log-sums ``[B, K]``, and what the backward pass needs."""

    @staticmethod
    def forward(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        top, total, peak, inverse = torch.ops.segloss.log_sum(logits, valid)
        return (top + total.log()).clamp_(min=LOG_FLOOR), top, total, peak, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        logits, valid, *saved = ctx.saved_tensors
        return known(_gradient, _gradient_reference, (grad, logits), (valid, *saved)), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], logits: Tensor, valid: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        out = LogSum.apply(fold(logits, in_dims[0], size), None if valid is None else fold(valid, in_dims[1], size))
        return tuple(o.unflatten(0, (size, -1)) for o in out), (0,) * len(out)


def _gradient(grad: Tensor, logits: Tensor, _: Tensor | None, *saved: Tensor) -> Tensor:
    return torch.ops.segloss.log_sum_backward(grad.contiguous(), logits, *saved)


def _gradient_reference(grad: Tensor, logits: Tensor, valid: Tensor | None, *_: Tensor) -> Tensor:
    """The backward pass in operations that can be differentiated once more."""
    log_softmax = torch.log_softmax(logits.to(grad.dtype), 1)
    share = torch.exp(log_softmax - log_sum_reference(logits.to(grad.dtype), valid)[:, :, None])
    if valid is not None:
        share = share * valid[:, None]
    mean = (grad[:, :, None] * share).sum(1, keepdim=True)
    return (grad[:, :, None] * share - torch.exp(log_softmax) * mean).to(logits.dtype)


class KeptLogSum(torch.autograd.Function):
    """The log-sums of few logits, with their softmax kept for the backward pass: fewer calls than blocks have."""

    @staticmethod
    def forward(logits: Tensor, valid: Tensor | None, share: Tensor, total: Tensor) -> Tensor:
        return total.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, *kept = ctx.saved_tensors
        return known(_kept_gradient, _gradient_reference, (grad, logits), tuple(kept)), None, None, None


def _kept_gradient(grad: Tensor, logits: Tensor, _: Tensor | None, share: Tensor, total: Tensor) -> Tensor:
    slope = grad / total
    with torch.autocast("cpu", enabled=False):
        mean = torch.bmm(slope[:, None], share)
    return (slope[:, :, None] - mean).mul_(share).to(logits.dtype)


def _small_log_sum(logits: Tensor, valid: Tensor | None) -> Tensor | None:
    """None for many logits, where a class nearly vanishes, and where no value can be looked at."""
    if logits.device.type != "cpu" or logits.numel() > _SMALL or torch.compiler.is_compiling():
        return None
    tiny = logits.numel() <= _TINY
    with torch.set_grad_enabled(tiny and torch.is_grad_enabled()):
        share = torch.softmax(logits, 1, dtype=wide_dtype(logits))
        if valid is not None:
            share = share * valid[:, None]
        total = share.sum(2)
    try:
        enough = bool((total > _LEAST).all())
    except RuntimeError:  # vmap and fake tensors have no values
        return None
    if not enough:
        return None
    return total.log() if tiny else KeptLogSum.apply(logits, valid, share, total)


def _log_sums(logits: Tensor, valid: Tensor | None) -> Tensor:
    small = _small_log_sum(logits, valid)
    return LogSum.apply(logits, valid)[0] if small is None else small


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
        return _log_sums(logits, None) - math.log(pixels), None
    valid = valid.flatten(1)
    log_sum = _log_sums(logits, valid)
    count = valid.sum(1)
    seen = count > 0
    average = log_sum - count.clamp(min=1).to(log_sum.dtype).log()[:, None]
    return torch.where(seen[:, None], average, 0), seen
