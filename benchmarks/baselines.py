"""What the library is measured against: the same formulas as one would write them in plain torch."""

import math

import torch
from torch import Tensor, nn


def naive_size_kl(logits: Tensor, sizes: Tensor) -> Tensor:
    """softmax -> mean -> log, left to autograd; infinite where a class underflows."""
    average = torch.softmax(logits, 1).flatten(2).mean(2)
    return torch.special.xlogy(sizes, sizes / average).sum(1).mean()


def log_space_size_kl(logits: Tensor, sizes: Tensor) -> Tensor:
    """As accurate as the library: everything in log space, left to autograd."""
    log_softmax = torch.log_softmax(logits, 1).flatten(2)
    log_average = torch.logsumexp(log_softmax, 2) - torch.tensor(float(log_softmax.shape[2])).log()
    return (torch.special.xlogy(sizes, sizes) - sizes * log_average).sum(1).mean()


def dense_filter(values: Tensor, features: Tensor, rows: int = 8, queries: Tensor | None = None) -> Tensor:
    """Brute force over all pairs of pixels, ``values [N, K]``, ``features [N, D]``.

    As fast as plain torch makes it: few rows at a time, so that they stay in cache (8 were the best of 4 to 1,024), the
    distances by one matrix product, exponents clamped to keep denormal numbers out. ``queries`` are the features of the
    pixels to compute, all of them if None.
    """
    queries = features if queries is None else queries
    square, query_square = features.square().sum(1), queries.square().sum(1)
    out = values.new_empty(len(queries), values.shape[1])
    for part in range(0, len(queries), rows):
        exponent = torch.addmm(square, queries[part : part + rows], features.t(), alpha=-2)
        exponent.add_(query_square[part : part + rows, None]).mul_(-0.5).clamp_(-80, 0)
        out[part : part + rows] = exponent.exp_() @ values
    return out


def naive_feature_similarity(maps: Tensor, image: Tensor, sigma: float = 5.0, mu: float = 2.5) -> Tensor:
    """All pairs of pixels as matrices, left to autograd: ``maps [B, C, H, W]`` in [0, 1], ``image [B, 3, H, W]``.

    The squared distances of the maps by one matrix product: the fastest plain form, 4 times faster than differences
    class by class, but wrong where the maps hardly vary.
    """
    height, width = maps.shape[2:]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(maps.dtype)
    weight = torch.exp((place[:, None] - place).square().sum(2) / (-2 * sigma**2)) / (2 * math.pi * sigma**2)
    loss = maps.new_zeros(())
    for y, x in zip(maps.flatten(2).mT, image.flatten(2).mT, strict=True):
        delta = (x[:, None] - x).abs().sum(2) / 3
        square = y.square().sum(1)
        gate = (square[:, None] + square) / 2 - y @ y.t()
        loss = loss - (weight * gate * torch.tanh(mu + torch.log(delta / (1 - delta)))).sum()
    return loss / (len(maps) * height * width)


def naive_path_affinity_loss(boundary_logits: Tensor, labels: Tensor, radius: int = 10) -> Tensor:
    """IRNet's loss as one would write it: for each offset the pixels on all lines are gathered, the rest is autograd's.

    ``boundary_logits [B, 1, H, W]``, ``labels [B, H, W]`` without ignored pixels.
    """
    height, width = labels.shape[1:]
    boundary = boundary_logits.sigmoid()[:, 0]
    totals = {True: boundary.new_zeros(()), False: boundary.new_zeros(())}
    counts = {True: boundary.new_zeros(()), False: boundary.new_zeros(())}
    for down in range(min(radius, height)):
        for right in range(-radius + 1 if down else 1, radius):
            length = math.hypot(down, right)
            if length >= radius or abs(right) >= width:
                continue
            left = max(0, -right)
            rows, columns = height - down, width - abs(right)
            line = [
                boundary[:, i : i + rows, left + j : left + j + columns]
                for i in range(down + 1)
                for j in range(min(right, 0), max(right, 0) + 1)
                if abs(right * i - down * j) < length
            ]
            largest = torch.stack(line).amax(0)
            upper = labels[:, :rows, left : left + columns]
            lower = labels[:, down:, left + right : left + right + columns]
            for same in (True, False):
                chosen = (upper == lower) == same
                loss = -torch.log(1 - largest if same else largest)
                totals[same] = totals[same] + torch.where(chosen, loss, 0).sum()
                counts[same] = counts[same] + chosen.sum()
    return totals[True] / counts[True].clamp(min=1) + totals[False] / counts[False].clamp(min=1)


def sequential_heatmaps(model: nn.Module, images: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Input times gradient, a backward pass for each class: scores ``[B, K]``, heatmaps ``[B, K, H, W]``."""
    pixels = images.detach().requires_grad_()
    scores = model(pixels)
    gradients = (
        torch.autograd.grad(score, pixels, retain_graph=True, create_graph=create_graph)[0] for score in scores.sum(0)
    )
    return scores, torch.stack([(images * gradient).sum(1) for gradient in gradients], 1)


def batched_heatmaps(model: nn.Module, images: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """The same with one call for all classes, over which autograd's backward pass is vectorised (vmap)."""
    pixels = images.detach().requires_grad_()
    scores = model(pixels)
    units = torch.eye(scores.shape[1], dtype=scores.dtype).unsqueeze(1).expand(-1, len(scores), -1)
    (gradients,) = torch.autograd.grad(scores, pixels, units, create_graph=create_graph, is_grads_batched=True)
    return scores, (images * gradients).sum(2).transpose(0, 1)
