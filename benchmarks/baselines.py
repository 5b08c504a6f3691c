"""What the library is measured against: the same formulas as one would write them in plain torch."""

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segloss.bilateral import guide_features

Batch = tuple[Tensor, Tensor]  # images and tags

# Of AdvCAM: a step in the image, and the share of a map's largest value above which changes cost.
_STEP_SIZE = 0.08
_THRESHOLD = 0.5


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


def released_advcam(
    features: nn.Module, linear: nn.Linear, image: Tensor, classes: Sequence[int], steps: int
) -> Tensor:
    """AdvCAM with the costs of the authors' procedure: maps ``[K, h, w]`` of ``image [1, C, H, W]``.

    One class at a time, the image together with its mirror image. Each step is a forward pass and two backward ones
    through the network, of the map for Grad-CAM and of the objective; both make gradients of the parameters, too, and
    the last step is taken like the others, though its image is not used.
    """
    maps = []
    for c in classes:
        x, total = torch.cat([image, image.flip(-1)]), image.new_zeros(())
        first: Tensor | None = None
        for _ in range(steps):
            x = x.detach().requires_grad_()
            maps_of_features = features(x)
            maps_of_features.retain_grad()
            cams = F.conv2d(maps_of_features, linear.weight[:, :, None, None])
            cams[:, c].relu().sum().backward(retain_graph=True)
            gradient = maps_of_features.grad
            assert gradient is not None
            weight = gradient.sum((2, 3), keepdim=True) / (gradient > 0).sum().clamp(min=1)
            scaled = (weight * maps_of_features).sum(1).relu()
            r = scaled[0] + scaled[1].flip(-1)
            first = r.detach() if first is None else first
            total = total + r.detach()
            logits = cams.relu().mean((2, 3)).sum(0)
            deviation = ((r > _THRESHOLD * r.max()) * (r - first).abs()).sum()
            features.zero_grad()
            linear.zero_grad()
            x.grad = None
            (2 * logits[c] - logits.sum() - 7 * deviation).backward()
            x = _climbed(x, x)
        maps.append(total)
    features.zero_grad()
    linear.zero_grad()
    return torch.stack(maps)


def plain_advcam(features: nn.Module, linear: nn.Linear, image: Tensor, classes: Sequence[int], steps: int) -> Tensor:
    """AdvCAM as the library defines it, one class at a time with ``backward()``, which reaches the parameters, too."""
    maps = []
    for c in classes:
        x, total = image, image.new_zeros(())
        first: Tensor | None = None
        for step in range(steps + 1):
            x = x.detach().requires_grad_()
            maps_of_features = features(x)
            r = (linear.weight[c, :, None, None] * maps_of_features).sum(1).relu()
            first = r.detach() if first is None else first
            total = total + r.detach()
            if step < steps:
                logits = linear(maps_of_features.mean((2, 3)))[0]
                deviation = ((r > _THRESHOLD * r.max()) * (r - first).abs()).mean()
                (2 * logits[c] - logits.sum() - 3 * deviation).backward()
                x = _climbed(x, image)
        maps.append(total)
    features.zero_grad()
    linear.zero_grad()
    return torch.cat(maps)


def _climbed(x: Tensor, limits: Tensor) -> Tensor:
    assert x.grad is not None
    return (x + _STEP_SIZE * x.grad / x.grad.abs().max()).detach().clamp(limits.min(), limits.max())


def sequential_grad_cam(
    features: nn.Module, head: nn.Module, images: Tensor, classes: Sequence[int], whole: bool
) -> Tensor:
    """Signed Grad-CAM ``[B, K, h, w]``, a backward pass for each class.

    ``whole``: for each class also a forward pass, and the backward pass goes through the whole network to the
    parameters; otherwise only through the head.
    """
    f = features(images)
    scores = head(f).sum(0)
    maps = []
    for c in classes:
        if whole:
            f = features(images)
            f.retain_grad()
            head(f)[:, c].sum().backward()
            gradient = f.grad
            features.zero_grad()
            head.zero_grad()
        else:
            gradient = torch.autograd.grad(scores[c], f, retain_graph=True)[0]
        assert gradient is not None
        maps.append((gradient.mean((2, 3), keepdim=True) * f).sum(1).detach())
    return torch.stack(maps, 1)


def deepcopy_rib(
    features: nn.Module,
    linear: nn.Linear,
    images: Tensor,
    tags: Tensor,
    companions: Sequence[Batch],
    lr: float,
    margin: float = 600.0,
    threshold: float = 0.4,
) -> Tensor:
    """RIB on a copy of the network for each image, trained by an optimiser: maps ``[B, K, h, w]``."""
    summed = []
    for image, tag in zip(images, tags, strict=True):
        body, last = deepcopy((features, linear))
        trained = [p for p in (*body.parameters(), *last.parameters()) if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr)
        total = image.new_zeros(())
        for others, their_tags in companions:
            maps = F.conv2d(body(torch.cat([image[None], others])), last.weight[:, :, None, None])
            total = total + maps[0].detach().relu()
            peak = maps.detach().amax((2, 3), keepdim=True)
            region = (maps.detach() <= threshold * peak) | (peak <= 0)
            logits = (maps * region).sum((2, 3)) / region.sum((2, 3)).clamp(min=1) + last.bias
            optimizer.zero_grad()
            (-torch.cat([tag[None], their_tags]) * logits.clamp(max=margin)).sum().backward()
            optimizer.step()
        with torch.no_grad():
            total = total + F.conv2d(body(image[None]), last.weight[:, :, None, None])[0].relu()
        summed.append(total)
    return torch.stack(summed)


def expanded_scores(features: Tensor, weight: Tensor, keep: Tensor, drop: float) -> Tensor:
    """FickleNet's layer by map expansion: windows are laid side by side, so that dropout is another in each.

    ``features [B, D, h, w]``, ``weight [C, D, s, s]``, ``keep [B, h, w, s, s]``; maps ``[B, C, h, w]``.
    """
    size = weight.shape[2]
    windows = F.pad(features, (size // 2,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    expanded = windows.transpose(3, 4).flatten(4).flatten(2, 3)
    kept = keep.transpose(2, 3).flatten(3).flatten(1, 2)[:, None]
    return F.conv2d(expanded * (kept / (1 - drop)), weight, stride=size)


def expanded_ficklenet(
    features: Tensor, weight: Tensor, keeps: Sequence[Tensor], drop: float, classes: Sequence[int], threshold: float
) -> Tensor:
    """FickleNet's labels ``[B, h, w]`` of some classes: each pass expands the map, Grad-CAM is autograd's."""
    passes = []
    for keep in keeps:
        f = features.detach().requires_grad_()
        logits = expanded_scores(f, weight, keep, drop).mean((2, 3)).sum(0)
        gradients = [torch.autograd.grad(logits[c], f, retain_graph=True)[0] for c in classes]
        maps = torch.stack([(f.detach() * gradient).sum(1).relu() for gradient in gradients], 1)
        passes.append(maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-30))
    every = torch.stack(passes)
    found = every.amax(0) > threshold
    best = torch.where(found, every.mean(0), -1).argmax(1)
    return torch.where(found.any(1), best.new_tensor(classes)[best], -1)


def squared_walk(maps: Tensor, affinity: Tensor, beta: float, doublings: int) -> Tensor:
    """Random walk of ``2^doublings`` steps by squaring a dense transition matrix, as the authors' codes do."""
    power = affinity.to_dense()[0] ** beta
    matrix = power / power.sum(1, keepdim=True)
    torch.set_flush_denormal(True)  # products of small weights: four times slower with denormal numbers
    for _ in range(doublings):
        matrix = matrix @ matrix
    torch.set_flush_denormal(False)
    return (matrix @ maps[0].flatten(1).t()).t().view(maps.shape)


def dense_mean_field(
    probabilities: Tensor,
    image: Tensor,
    *,
    iterations: int,
    weight: float,
    sigma_rgb: float,
    sigma_xy: float,
    smooth_weight: float,
    smooth_sigma_xy: float,
) -> Tensor:
    """Mean-field inference in which every pair of pixels is visited, ``[1, K, H, W]``."""
    classes, height, width = probabilities.shape[1:]
    colours = guide_features(image, sigma_rgb, sigma_xy)[0].t().contiguous()
    lines = [torch.arange(n).to(image) / smooth_sigma_xy for n in (height, width)]
    rows, columns = (((line[:, None] - line).square() / -2).exp() for line in lines)

    def smooth(values: Tensor) -> Tensor:
        return (rows @ values.t().view(-1, height, width) @ columns).flatten(1).t()

    kernels = [
        (weight, lambda values: dense_filter(values, colours)),
        (smooth_weight, smooth),
    ]
    scaled = [(w, kernel, kernel(image.new_ones(height * width, 1)).rsqrt()) for w, kernel in kernels]
    unary = probabilities[0].flatten(1).t().clamp(min=1e-5).log()
    q = unary.softmax(1)
    for _ in range(iterations):
        messages = [w * (d * kernel((d * q).contiguous()) - d * d * q) for w, kernel, d in scaled]
        q = (unary + sum(messages)).softmax(1)
    return q.t().reshape(1, classes, height, width)
