"""Class activation maps, their normalisation, and their average over scales and flipping."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from segattr.networks.classes import Classes, Maps, Pairs, typed
from segattr.networks.classifier import as_classifier, check_images, tracked, undisturbed
from segattr.networks.features import feature_maps
from segattr.networks.spatial import size_text
from segloss import max_normalize
from segloss.common.checks import (
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_has_values,
    check_int,
    check_number,
    require,
    shape_text,
)
from segloss.common.reduction import LARGEST, wide_dtype, widen
from segloss.common.resizing import resize_linear

NORMS = ("raw", "relu", "relu_max", "minmax", "max")
_SMALLEST_MAXIMUM = 1e-30  # as in max_normalize
_LARGEST_SCALE = 100.0  # more is a mistake, which would take all memory


@typed
def cam(clf: nn.Module, images: Tensor, classes: Classes | None = None, *, norm: str = "raw") -> Maps:
    r"""Class activation maps (CAM) of all requested classes of all images.

    .. math:: \mathrm{CAM}_c(i) = w_c^\top f(i), \qquad y_c = \frac{1}{hw} \sum_i \mathrm{CAM}_c(i) + b_c

    with the feature vector :math:`f(i)` at location i, and weight :math:`w_c` and bias :math:`b_c` of the linear layer
    that follows global average pooling. The maps are differentiable with respect to images and parameters.

    The network runs in the mode that it is in, without autocast, and without an update of batch statistics; for maps
    in half precision use a network and images in half precision, whose maps are float32 again.

    Args:
        clf: a :class:`~segattr.Classifier`, or a network that :func:`~segattr.split` understands
            (in a loop, split it once).
        images: ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``, normalised as the network expects it.
        classes: numbers of classes, for all images or one sequence for each image, or an integer tensor ``[n]`` or
            ``[B, n]``; all classes if None.
        norm: what :func:`normalize` does with the maps: ``"raw"`` (nothing), ``"relu"``, ``"relu_max"``, ``"minmax"``
            or ``"max"``, eq. (2.1).

    Returns:
        ``[B, K, h, w]``, K the number of requested classes, at the resolution of the features; a list of
        ``[K_i, h, w]`` if ``classes`` is a sequence for each image. Of volumes ``[B, K, d, h, w]``, or
        ``[K_i, d, h, w]``. float32 (float64 for a float64 network).

    Raises:
        TypeError: ``images`` that are not floating point, ``classes`` that are not sequences of integers, a network
            that cannot be split.
        ValueError: a network whose head is not global average pooling and one linear layer: :func:`grad_cam` makes
            maps of it; images, classes or ``norm`` out of range, maps that are NaN or infinite (as of such images).

    Source:
        *Learning Deep Features for Discriminative Localization*; the dissertation's eq. (2.1) is ``norm="max"``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> cam(net, torch.rand(2, 3, 9, 9), norm="relu_max").shape
        torch.Size([2, 4, 7, 7])
        >>> [maps.shape[0] for maps in cam(net, torch.rand(2, 3, 9, 9), [[0, 3], [1]])]
        [2, 1]
    """
    check_images(images)
    check_has_values("images", images)
    check_choice("norm", norm, NORMS)
    classifier = as_classifier(clf, images)
    if classifier.linear is None:
        raise ValueError("clf: expected global average pooling and one linear layer as head, got another: use grad_cam")
    pairs = Pairs.of(classes, len(images), classifier.num_classes, images.device)

    def rows() -> Tensor:
        features, _ = feature_maps(classifier, tracked(images))
        # Each class is projected once, however many images want it.
        wanted, position = pairs.classes.unique(return_inverse=True)
        weight = widen(classifier.class_weight())[wanted]
        maps = torch.einsum("kd,bd...->bk...", weight, features.to(wide_dtype(features)))
        return maps[pairs.images, position]

    maps = undisturbed(classifier, rows)
    check_maps(maps)
    return normalize(pairs.arrange(maps), norm, dims=images.dim() - 2)


@overload
def normalize(maps: Tensor, mode: str, *, dims: int | None = ...) -> Tensor: ...
@overload
def normalize(maps: list[Tensor], mode: str, *, dims: int | None = ...) -> list[Tensor]: ...
def normalize(maps: Maps, mode: str, *, dims: int | None = None) -> Maps:
    r"""Brings maps to a common scale, each on its own.

    ============  =========================================================================================
    ``raw``       as they are
    ``relu``      :math:`\max(s, 0)`
    ``relu_max``  :math:`\max(s, 0) / \max_i s(i)`, :func:`segloss.max_normalize`
    ``minmax``    :math:`(s - \min_i s(i)) / (\max_i s(i) - \min_i s(i))`
    ``max``       :math:`s / \max_i s(i)`, signed: at most 1, negative where the score is
    ============  =========================================================================================

    A map without a positive score says that the class is nowhere: it gives 0 in the last three modes. A constant map
    gives 0 for ``minmax``. A divisor below 1e-30 counts as that.

    Args:
        maps: ``[..., h, w]``, any finite values, or a list of them; of volumes ``[..., d, h, w]``.
        mode: one of the above.
        dims: number of spatial dimensions, 2 or 3. If None 2, which more dimensions than ``[B, K, h, w]`` or a list of
            ``[K, h, w]`` must say: maps of volumes would be normalised slice by slice.

    Returns:
        As ``maps``; float32 (float64 for float64 maps) except for ``raw`` and ``relu``. The gradient flows through
        the extremes.

    Raises:
        TypeError: maps that are not floating point, ``dims`` that is no int.
        ValueError: another ``mode`` or ``dims``, maps without as many dimensions, NaN or infinite values.

    Source:
        The dissertation's eq. (2.1) for ``max``; *High-fidelity Pseudo-labels for Boosting Weakly-Supervised
        Segmentation*, eq. (4), for ``relu_max``. Public code often stretches a ReLU of the map by ``minmax``.

    Example:
        >>> normalize(torch.tensor([[-1.0, 2.0], [4.0, 0.0]]), "max")
        tensor([[-0.2500,  0.5000],
                [ 1.0000,  0.0000]])
    """
    check_choice("mode", mode, NORMS)
    if dims is not None:
        check_int("dims", dims)
        check_choice("dims", dims, (2, 3))
    most = 3 if isinstance(maps, list) else 4
    return _each(maps, lambda own: normalize_each(own, mode, _spatial_dims(own, dims, most)))


def multiscale(
    method: Callable[[Tensor], Maps],
    images: Tensor,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
) -> Maps:
    r"""Average of the raw maps of images at several scales, and of their mirror images.

    .. math:: \frac{1}{2|S|} \sum_{s \in S} U\, m(R_s x) + U\, \mathrm{flip}\, m(\mathrm{flip}\, R_s x)

    with the method m, bilinear resizing (trilinear of volumes) by the factor s, :math:`R_s`, and back to the size of
    the images, :math:`U`. Normalise the average, not its terms: they are on the scale of the logits, which says how
    sure each is.

    Args:
        method: takes images, gives raw maps ``[B, K, h, w]``, or a list of ``[K_i, h, w]`` for each image: ``lambda x:
            cam(clf, x, classes)``, say.
        images: ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``.
        scales: factors above 0 and up to 100; a scaled image has at least one pixel.
        flip: whether mirrored images count too, flipped along their last axis.

    Returns:
        ``[B, K, H, W]``, or a list of ``[K_i, H, W]``, with the depth of volumes; differentiable where ``method`` is.

    Raises:
        TypeError: ``images`` that are not floating point, ``scales`` that are not numbers, ``flip`` that is no bool.
        ValueError: ``images`` that are not ``[B, C, H, W]``, no scales or scales out of range.

    Source:
        Released code of *Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation* and its successors, which add maps up at a quarter of the resolution.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> maps = multiscale(lambda x: cam(net, x), torch.rand(2, 3, 16, 12))
        >>> normalize(maps, "relu_max").shape
        torch.Size([2, 4, 16, 12])
    """
    check_images(images)
    check_bool("flip", flip)
    if not callable(method):
        raise TypeError(f"method: expected a function of images, got {type(method).__name__}")
    if not isinstance(scales, Sequence) or not scales:
        raise ValueError(f"scales: expected a sequence of at least one number, got {scales!r}")
    for scale in scales:
        check_number("scales", scale, above=0, most=_LARGEST_SCALE)
    size = images.shape[2:]
    terms: list[Maps] = []
    for scale in scales:
        scaled = _resize(images, [max(1, round(n * scale)) for n in size])
        terms.append(_each(_of_method(method(scaled), images), lambda maps: _resize(maps, size)))
        if flip:
            terms.append(_each(_of_method(method(scaled.flip(-1)), images), lambda maps: _resize(maps.flip(-1), size)))
    if isinstance(terms[0], list):
        return [torch.stack(own).mean(0) for own in zip(*terms, strict=True)]
    return torch.stack([term for term in terms if isinstance(term, Tensor)]).mean(0)


def check_maps(maps: Tensor) -> None:
    """Not finite: as a network has diverged, or for images that are too large for its dtype."""
    require(
        "clf",
        maps,
        lambda: maps.isfinite().all(),
        lambda: "expected finite maps, got NaN or infinity (see images)",
    )


def _spatial_dims(maps: object, dims: int | None, most: int) -> int:
    check_floating("maps", maps)
    assert isinstance(maps, Tensor)
    if dims is None and maps.dim() > most:
        got = shape_text(maps.shape)
        raise ValueError(f"maps: expected at most {most} dimensions without dims, got {got}: dims=3 is for volumes")
    if maps.dim() < (dims or 2):
        raise ValueError(f"maps: expected [..., {size_text(2 + (dims or 2))}], got {shape_text(maps.shape)}")
    return dims or 2


def normalize_each(maps: Tensor, mode: str, dims: int) -> Tensor:
    """Of maps with so many spatial dimensions."""
    check_finite("maps", maps)
    if mode == "raw":
        return maps
    if mode == "relu":
        return maps.relu()
    if not maps.numel():
        return maps.to(wide_dtype(maps))
    if mode == "relu_max":
        return max_normalize(maps.reshape(1, -1, 1, maps.shape[-dims:].numel())).view(maps.shape)
    maps, spatial = widen(maps), tuple(range(-dims, 0))
    maximum = maps.amax(spatial, keepdim=True)
    offset = maps.amin(spatial, keepdim=True) if mode == "minmax" else torch.zeros_like(maximum)
    quotient = (maps - offset) / (maximum - offset).clamp(min=_SMALLEST_MAXIMUM)
    return torch.where(maximum > 0, quotient.clamp(min=-LARGEST), 0)


def _of_method(maps: Any, images: Tensor) -> Maps:
    """What a method of the user gave, checked."""
    each = maps if isinstance(maps, list) else [maps]
    for own in each:
        if not isinstance(own, Tensor):
            raise TypeError(f"method: expected maps, a tensor or a list of tensors, got {type(own).__name__}")
        if own.dim() != images.dim() - isinstance(maps, list):
            size = size_text(images.dim())
            kinds = f"[B, K, {size}] or a list of [K, {size}]"
            raise ValueError(f"method: expected maps {kinds}, got {shape_text(own.shape)}")
    if len(maps) != len(images):
        raise ValueError(f"method: expected maps of {len(images)} images, got those of {len(maps)}")
    return maps


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Of ``[..., *spatial]``."""
    before, spatial = maps.shape[: -len(size)], maps.shape[-len(size) :]
    if spatial == torch.Size(size):
        return maps
    if not maps.numel():
        return maps.new_zeros(*before, *size)
    return resize_linear(maps.reshape(1, -1, *spatial), size).view(*before, *size)


def _each(maps: Maps, function: Callable[[Tensor], Tensor]) -> Maps:
    return [function(own) for own in maps] if isinstance(maps, list) else function(maps)
