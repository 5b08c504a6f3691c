"""The passes of ``_average.py`` in Triton: one read forward, one read and one write backward.

A program walks over blocks of pixels with all their classes in registers. Its sums over the pixels stay apart in each
lane until the end, and programs leave partial results for a last kernel: every run gives the same.
"""

# Kernels are untyped.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from segloss.common.launching import launching_on
from segloss.common.reduction import LOG_FLOOR, wide_dtype

_BYTES = 2048  # of each array in a warp: 16 registers a thread
_PROGRAMS = 8192  # enough for several rounds on every accelerator
_FLOOR = tl.constexpr(LOG_FLOOR)
# Classes whose largest logit is so far below the peaks are summed once more, relative to it: exp would underflow.
_VANISHED = tl.constexpr(-60.0)

# Launched from Python; one build serves batches of every size. That the strides and the number of pixels are multiples
# of 16, in contrast, makes loads and stores wider.
kernel = triton.jit(do_not_specialize=["classes", "splits"])


@triton.jit
def _share(classes, image_stride, class_stride, splits, CLASSES: tl.constexpr):
    """A program's image and its number there; the classes, which of them exist, and where their logits start."""
    image = (tl.program_id(0) // splits).to(tl.int64)
    k = tl.arange(0, CLASSES)
    offsets = image * image_stride + k.to(tl.int64) * class_stride
    return image, tl.program_id(0) % splits, k, k < classes, offsets


@triton.jit
def _load(logits, valid, n, offsets, present, pixels, stride, valid_stride, WIDE: tl.constexpr, VALID: tl.constexpr):
    """A block of pixels n: which count, the largest logit of each, and the logits relative to it or -inf."""
    seen = n < pixels
    mask = present[:, None] & seen[None, :]
    place = n.to(tl.int64)
    x = tl.load(logits + offsets[:, None] + (place * stride)[None, :], mask=mask, other=0.0).to(WIDE)
    x = tl.where(present[:, None], x, -float("inf"))
    if VALID:
        seen = seen & (tl.load(valid + place * valid_stride, mask=seen, other=0) != 0)
    peak = tl.max(x, 0)
    return seen, peak, tl.where(seen[None, :], x - peak[None, :], -float("inf"))


@triton.jit
def _inverse(seen, terms):
    """1 / sum of the terms of each pixel; 0 where it does not count."""
    return tl.where(seen, 1.0 / tl.where(seen, tl.sum(terms, 0), 1.0), 0.0)


@kernel
def _forward(
    logits,
    valid,
    tops,
    totals,
    peaks,
    inverses,
    classes,
    pixels,
    image_stride,
    class_stride,
    stride,
    valid_image_stride,
    valid_stride,
    splits,
    VALID: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Peaks and inverses of some of the pixels, and the tops and totals of each class over them."""
    image, split, k, present, offsets = _share(classes, image_stride, class_stride, splits, CLASSES)
    wide = totals.dtype.element_ty
    valid += image * valid_image_stride
    peaks += image * pixels
    inverses += image * pixels
    top = tl.full([CLASSES, BLOCK], _FLOOR, wide)
    total = tl.zeros([CLASSES, BLOCK], wide)
    for start in tl.range(split * BLOCK, pixels, splits * BLOCK, num_stages=3):
        n = start + tl.arange(0, BLOCK)
        seen, peak, x = _load(logits, valid, n, offsets, present, pixels, stride, valid_stride, wide, VALID)
        terms = tl.exp(x)
        inverse = _inverse(seen, terms)
        top = tl.maximum(top, x)
        total += terms * inverse[None, :]
        tl.store(peaks + n, tl.where(seen, peak, float("inf")), mask=n < pixels)
        tl.store(inverses + n, inverse, mask=n < pixels)
    target = (image * classes + k) * splits + split
    tl.store(tops + target, tl.max(top, 1), mask=present)
    tl.store(totals + target, tl.sum(total, 1), mask=present)


@kernel
def _combine(tops, totals, top, total, splits, BLOCK: tl.constexpr):
    """The top of a class over its programs, and the total relative to it unless it has vanished."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    highest = tl.max(tl.load(tops + row * splits + part, mask=part < splits, other=_FLOOR), 0)
    sums = tl.sum(tl.load(totals + row * splits + part, mask=part < splits, other=0.0), 0)
    tl.store(top + row, highest)
    tl.store(total + row, sums * tl.exp(-tl.maximum(highest, _VANISHED)))


@kernel
def _forward_vanished(
    logits,
    valid,
    top,
    totals,
    classes,
    pixels,
    image_stride,
    class_stride,
    stride,
    valid_image_stride,
    valid_stride,
    splits,
    VALID: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The totals once more, relative to the tops, for images with classes that have vanished."""
    image, split, k, present, offsets = _share(classes, image_stride, class_stride, splits, CLASSES)
    wide = totals.dtype.element_ty
    valid += image * valid_image_stride
    highest = tl.load(top + image * classes + k, mask=present, other=0.0)
    end = tl.where(tl.min(highest, 0) < _VANISHED, pixels, 0)
    total = tl.zeros([CLASSES, BLOCK], wide)
    for start in range(split * BLOCK, end, splits * BLOCK):
        n = start + tl.arange(0, BLOCK)
        seen, _, x = _load(logits, valid, n, offsets, present, pixels, stride, valid_stride, wide, VALID)
        total += tl.exp(x - highest[:, None]) * _inverse(seen, tl.exp(x))[None, :]
    target = (image * classes + k) * splits + split
    tl.store(totals + target, tl.sum(total, 1), mask=present)


@kernel
def _combine_vanished(totals, top, total, splits, BLOCK: tl.constexpr):
    """The totals of classes that have vanished."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    sums = tl.sum(tl.load(totals + row * splits + part, mask=part < splits, other=0.0), 0)
    tl.store(total + row, sums, mask=tl.load(top + row) < _VANISHED)


@kernel
def _backward(
    grad,
    logits,
    tops,
    totals,
    peaks,
    inverses,
    out,
    classes,
    pixels,
    image_stride,
    class_stride,
    stride,
    splits,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient at some of the pixels."""
    image, split, k, present, offsets = _share(classes, image_stride, class_stride, splits, CLASSES)
    wide = totals.dtype.element_ty
    targets = (image * classes + k) * pixels
    top = tl.load(tops + image * classes + k, mask=present, other=0.0)
    total = tl.load(totals + image * classes + k, mask=present, other=0.0)
    seen_class = total != 0
    slope = tl.load(grad + image * classes + k, mask=present, other=0.0) / tl.where(seen_class, total, 1.0)
    slope = tl.where(seen_class, slope, 0.0)
    factor = tl.exp(top)
    for start in tl.range(split * BLOCK, pixels, splits * BLOCK, num_stages=3):
        n = start + tl.arange(0, BLOCK)
        inside = n < pixels
        mask = present[:, None] & inside[None, :]
        source = logits + offsets[:, None] + (n.to(tl.int64) * stride)[None, :]
        x = tl.load(source, mask=mask, other=-float("inf")).to(wide)
        peak = tl.load(peaks + image * pixels + n, mask=inside, other=0.0)
        inverse = tl.load(inverses + image * pixels + n, mask=inside, other=0.0)
        terms = tl.exp(x - peak[None, :] - top[:, None])
        mean = inverse * tl.sum(slope[:, None] * terms, 0)
        gradient = terms * inverse[None, :] * (slope[:, None] - factor[:, None] * mean[None, :])
        tl.store(out + targets[:, None] + n[None, :], gradient.to(out.dtype.element_ty), mask=mask)


def _launch(logits: Tensor) -> tuple[int, dict[str, int]]:
    """Programs for each image, and the settings of a kernel."""
    batch, classes, pixels = logits.shape
    padded = triton.next_power_of_2(classes)
    wide = wide_dtype(logits).itemsize
    # Whole lines of memory, but at most 8 warps: more would have too few registers each.
    block = max(min(128, 8 * _BYTES // padded), _BYTES // padded) // wide
    splits = max(1, min(triton.cdiv(pixels, block), _PROGRAMS // batch))
    return splits, {"CLASSES": padded, "BLOCK": block, "num_warps": padded * block * wide // _BYTES}


def log_sum(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``_average._log_sum`` for any strides, at least one pixel, and as many classes as registers hold."""
    batch, classes, pixels = logits.shape
    splits, settings = _launch(logits)
    # Buffers of their own start at multiples of 16 bytes.
    wide = wide_dtype(logits)
    tops, totals = (logits.new_empty((batch, classes, splits), dtype=wide) for _ in range(2))
    top, total = (logits.new_empty((batch, classes), dtype=wide) for _ in range(2))
    peak, inverse = (logits.new_empty((batch, pixels), dtype=wide) for _ in range(2))
    mask = logits if valid is None else valid.view(torch.uint8)
    strides = (*logits.stride(), mask.stride(0), mask.stride(1))
    sizes = (classes, pixels, *strides, splits)
    settings["VALID"] = valid is not None
    padded = triton.next_power_of_2(splits)
    rows = {"BLOCK": padded, "num_warps": min(8, triton.cdiv(padded, 256))}
    with launching_on(logits.device):
        _forward[(splits * batch,)](logits, mask, tops, totals, peak, inverse, *sizes, **settings)
        _combine[(batch * classes,)](tops, totals, top, total, splits, **rows)
        _forward_vanished[(splits * batch,)](logits, mask, top, totals, *sizes, **settings)
        _combine_vanished[(batch * classes,)](totals, top, total, splits, **rows)
    return top, total, peak, inverse


def log_sum_backward(grad: Tensor, logits: Tensor, top: Tensor, total: Tensor, peak: Tensor, inverse: Tensor) -> Tensor:
    """``_average._log_sum_backward`` of the outputs of :func:`log_sum`."""
    batch, classes, pixels = logits.shape
    splits, settings = _launch(logits)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    saved = (t.contiguous() for t in (top, total, peak, inverse))
    with launching_on(logits.device):
        _backward[(splits * batch,)](
            grad.contiguous(), logits, *saved, out, classes, pixels, *logits.stride(), splits, **settings
        )
    return out
