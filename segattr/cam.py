"""Class activation maps and Grad-CAM, their normalisation, and their average over scales and flipping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segattr.networks.classes import Classes, check_classes
from segattr.networks.classifier import Classifier, as_classifier, check_images, taking, undisturbed
from segloss import max_normalize
from segloss.common.checks import (
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_has_values,
    check_number,
    require,
    shape_text,
)
from segloss.common.reduction import LARGEST, wide_dtype, widen

Maps: TypeAlias = Tensor | list[Tensor]

_NORMS = ("raw", "relu", "relu_max", "minmax", "max")
_SMALLEST_MAXIMUM = 1e-30  # as in max_normalize
_LARGEST_SCALE = 100.0  # more is a mistake, which would take all memory


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
        images: ``[B, C, H, W]``, normalised as the network expects it.
        classes: numbers of classes, for all images or one sequence for each image; all classes if None.
        norm: what :func:`normalize` does with the maps: ``"raw"`` (nothing), ``"relu"``, ``"relu_max"``, ``"minmax"``
            or ``"max"``, eq. (2.1).

    Returns:
        ``[B, K, h, w]``, K the number of requested classes, at the resolution of the features; a list of
        ``[K_i, h, w]`` if ``classes`` is a sequence for each image. float32 (float64 for a float64 network).

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
    check_choice("norm", norm, _NORMS)
    classifier = as_classifier(clf)
    linear = classifier.linear
    if linear is None:
        raise ValueError("clf: expected global average pooling and one linear layer as head, got another: use grad_cam")
    pairs = Pairs.of(classes, len(images), classifier.num_classes, images.device)

    def rows() -> Tensor:
        features = feature_maps(classifier, images)
        # Each class is projected once, however many images want it.
        wanted, position = pairs.classes.unique(return_inverse=True)
        weight = widen(linear.weight).flatten(1)[wanted]
        maps = torch.einsum("kd,bdhw->bkhw", weight, features.to(wide_dtype(features)))
        return maps[pairs.images, position]

    maps = undisturbed(classifier, rows)
    check_maps(maps)
    return normalize(pairs.arrange(maps), norm)


def grad_cam(
    clf: nn.Module,
    images: Tensor,
    classes: Classes | None = None,
    *,
    layer: str | nn.Module | None = None,
    pool: bool = True,
    norm: str = "relu",
) -> Maps:
    r"""Grad-CAM of all requested classes of all images: for any head, and any layer.

    .. math::
        \mathrm{GradCAM}_c(i) = \sum_k \alpha_{ck}(i) f_k(i), \qquad
        \alpha_{ck}(i) = \frac{1}{hw} \sum_j \frac{\partial y_c}{\partial f_k(j)} \;\text{ or }\;
        \frac{\partial y_c}{\partial f_k(i)}

    with the gradient averaged over the map (``pool=True``, the common reading), or taken at each location (eq. (2.2)
    as printed). Its ReLU is the default ``norm``. Where the head is global average pooling and one linear layer
    both are the class activation map over the number of locations. The maps are differentiable with respect to images
    and parameters, the gradients in them too, where these require a gradient.

    One forward pass, one backward pass through the head for all classes of all images. The network runs as for
    :func:`cam`. In training mode, where batch normalisation mixes images, the gradient is that of all images' scores.

    Args:
        clf: a :class:`~segattr.Classifier`, or a network that :func:`~segattr.split` understands
            (in a loop, split it once, at the layer).
        images: ``[B, C, H, W]``, normalised as the network expects it.
        classes: numbers of classes, for all images or one sequence for each image; all classes if None.
        layer: the submodule, or its name, whose output is the feature map :math:`f`; the last feature map if None.
        pool: average the gradient over the map.
        norm: what :func:`normalize` does with the maps; ``"raw"`` leaves them signed.

    Returns:
        As :func:`cam`.

    Raises:
        TypeError: ``images`` that are not floating point, ``classes`` that are not sequences of integers, ``pool`` that
            is no bool, a network that cannot be split, parts that give no tensor.
        ValueError: images, classes, ``layer`` or ``norm`` out of range, a head that does not give ``[B, K]`` or whose
            logits are detached, maps that are NaN or infinite.

    Source:
        *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization*; the dissertation's
        eq. (2.2).

    Example:
        >>> features, pooling = [nn.Conv2d(3, 8, 3), nn.ReLU()], [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        >>> net = nn.Sequential(*features, *pooling, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> grad_cam(net, torch.rand(2, 3, 9, 9), [1, 2], pool=False).shape
        torch.Size([2, 2, 7, 7])
    """
    check_images(images)
    check_bool("pool", pool)
    check_choice("norm", norm, _NORMS)
    classifier = as_classifier(clf, layer)
    trained = [parameter.requires_grad for parameter in classifier.parameters()] or [True]  # functions do not tell
    differentiable = torch.is_grad_enabled() and (images.requires_grad or any(trained))

    def maps() -> Maps:
        with torch.set_grad_enabled(differentiable):
            features = feature_maps(classifier, images)
        with torch.enable_grad():
            leaf = features if features.requires_grad else features.detach().requires_grad_()
            logits = head_logits(classifier, leaf, images)
            pairs = Pairs.of(classes, len(images), logits.shape[1], images.device)
            gradients = _gradients(logits, leaf, pairs, differentiable)
        with torch.set_grad_enabled(differentiable):
            gradients, features = (t.to(wide_dtype(t)) for t in (gradients, leaf))
            if pool:
                rows = torch.einsum("sbd,bdhw->sbhw", gradients.mean((3, 4)), features)
            else:
                rows = (gradients * features).sum(2)
            check_maps(rows)
            return normalize(pairs.arrange(rows[pairs.slots, pairs.images]), norm)

    with torch.inference_mode(False):
        return undisturbed(classifier, maps, constant=not differentiable)


def normalize(maps: Maps, mode: str) -> Maps:
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
        maps: ``[..., h, w]``, any finite values, or a list of them.
        mode: one of the above.

    Returns:
        As ``maps``; float32 (float64 for float64 maps) except for ``raw`` and ``relu``. The gradient flows through
        the extremes.

    Raises:
        TypeError: maps that are not floating point.
        ValueError: another ``mode``, maps without two dimensions, NaN or infinite values.

    Source:
        The dissertation's eq. (2.1) for ``max``; *High-fidelity Pseudo-labels for Boosting Weakly-Supervised
        Segmentation*, eq. (4), for ``relu_max``. Public code often stretches a ReLU of the map by ``minmax``.

    Example:
        >>> normalize(torch.tensor([[-1.0, 2.0], [4.0, 0.0]]), "max")
        tensor([[-0.2500,  0.5000],
                [ 1.0000,  0.0000]])
    """
    check_choice("mode", mode, _NORMS)
    return _each(maps, lambda own: normalize_each(own, mode))


def multiscale(
    method: Callable[[Tensor], Maps],
    images: Tensor,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
) -> Maps:
    r"""Average of the raw maps of images at several scales, and of their mirror images.

    .. math:: \frac{1}{2|S|} \sum_{s \in S} U\, m(R_s x) + U\, \mathrm{flip}\, m(\mathrm{flip}\, R_s x)

    with the method m, bilinear resizing by the factor s, :math:`R_s`, and back to the size of the images, :math:`U`.
    Normalise the average, not its terms: they are on the scale of the logits, which says how sure each is.

    Args:
        method: takes images, gives raw maps ``[B, K, h, w]``, or a list of ``[K_i, h, w]`` for each image: ``lambda x:
            cam(clf, x, classes)``, say.
        images: ``[B, C, H, W]``.
        scales: factors above 0 and up to 100; a scaled image has at least one pixel.
        flip: whether horizontally mirrored images count too.

    Returns:
        ``[B, K, H, W]``, or a list of ``[K_i, H, W]``; differentiable where ``method`` is.

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


@dataclass(frozen=True)
class Pairs:
    """The pairs of an image and a class that maps are wanted for, image by image.

    Args:
        images: of each pair, ``[N]``.
        classes: of each pair, ``[N]``.
        slots: how many pairs of the same image are before it, ``[N]``.
        shape: B and K if all images have as many pairs, or a list of how many each has.
    """

    images: Tensor
    classes: Tensor
    slots: Tensor
    shape: tuple[int, int] | list[int]

    @classmethod
    def of(cls, classes: Classes | None, images: int, count: int, device: torch.device) -> "Pairs":
        """Of the argument ``classes`` of a method, for this number of images and of classes in all."""
        wanted: Any = check_classes(range(count) if classes is None else classes, images, count)
        ragged = any(isinstance(own, list) for own in wanted)
        lengths = [len(own) for own in wanted] if ragged else [len(wanted)] * images
        flat = [c for own in wanted for c in own] if ragged else wanted * images
        image = [i for i, length in enumerate(lengths) for _ in range(length)]
        slot = [s for length in lengths for s in range(length)]
        columns = torch.tensor([image, flat, slot], dtype=torch.int64, device=device)
        return cls(columns[0], columns[1], columns[2], lengths if ragged else (images, len(wanted)))

    def arrange(self, rows: Tensor) -> Maps:
        """Rows ``[N, h, w]`` as a method returns them."""
        if isinstance(self.shape, list):
            return list(rows.split(self.shape))
        return rows.view(*self.shape, *rows.shape[1:])

    def most(self) -> int:
        """Number of pairs of the image that has most of them."""
        return max(self.shape, default=0) if isinstance(self.shape, list) else self.shape[1]


def feature_maps(clf: Classifier, images: Tensor) -> Tensor:
    with taking("images", images):
        features = clf.features(images)
    if not isinstance(features, Tensor):
        raise TypeError(f"clf: expected a tensor of features, got {type(features).__name__}")
    if features.dim() != 4:
        raise ValueError(f"clf: expected features [B, D, h, w], got {shape_text(features.shape)}")
    channels = features.shape[1] if clf.linear is None else clf.linear.weight.shape[1]
    if features.shape[1] != channels:
        raise ValueError(f"clf: expected features of {channels} channels, got {shape_text(features.shape)}")
    return features


def head_logits(clf: Classifier, features: Tensor, images: Tensor) -> Tensor:
    with taking("images", images):
        logits = clf.head(features.clone())  # which it may overwrite
    if not isinstance(logits, Tensor):
        raise TypeError(f"clf: expected a tensor of logits from its head, got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(features):
        expected = f"[{len(features)}, K] from its head"
        raise ValueError(f"clf: expected logits {expected}, got {shape_text(logits.shape)}")
    return logits


def _gradients(logits: Tensor, features: Tensor, pairs: Pairs, differentiable: bool) -> Tensor:
    """Of each image's first, second, ... class with respect to its features, ``[S, B, D, h, w]``."""
    one_hot = logits.new_zeros(pairs.most(), *logits.shape)
    if not one_hot.numel():
        return features.new_zeros(len(one_hot), *features.shape)
    one_hot[pairs.slots, pairs.images, pairs.classes] = 1
    return head_gradient(logits, features, grad_outputs=one_hot, create_graph=differentiable, is_grads_batched=True)


def head_gradient(output: Tensor, features: Tensor, **options: Any) -> Tensor:
    """Of what the head made of the features, with respect to them."""
    gradient = None
    if output.requires_grad:
        (gradient,) = torch.autograd.grad(output, features, allow_unused=True, **options)
    if gradient is None:
        raise ValueError("clf: expected logits that autograd can follow to the features, got detached ones")
    return gradient


def check_maps(maps: Tensor) -> None:
    """Not finite: as a network has diverged, or for images that are too large for its dtype."""
    require(
        "clf",
        maps,
        lambda: maps.isfinite().all(),
        lambda: "expected finite maps, got NaN or infinity (see images)",
    )


def normalize_each(maps: Tensor, mode: str) -> Tensor:
    check_floating("maps", maps)
    if maps.dim() < 2:
        raise ValueError(f"maps: expected [..., h, w], got {shape_text(maps.shape)}")
    check_finite("maps", maps)
    if mode == "raw":
        return maps
    if mode == "relu":
        return maps.relu()
    if not maps.numel():
        return maps.to(wide_dtype(maps))
    if mode == "relu_max":
        return max_normalize(maps.reshape(1, -1, *maps.shape[-2:])).view(maps.shape)
    maps = widen(maps)
    maximum = maps.amax((-2, -1), keepdim=True)
    offset = maps.amin((-2, -1), keepdim=True) if mode == "minmax" else torch.zeros_like(maximum)
    quotient = (maps - offset) / (maximum - offset).clamp(min=_SMALLEST_MAXIMUM)
    return torch.where(maximum > 0, quotient.clamp(min=-LARGEST), 0)


def _of_method(maps: Any, images: Tensor) -> Maps:
    """What a method of the user gave, checked."""
    each = maps if isinstance(maps, list) else [maps]
    for own in each:
        if not isinstance(own, Tensor):
            raise TypeError(f"method: expected maps, a tensor or a list of tensors, got {type(own).__name__}")
        if own.dim() != (3 if isinstance(maps, list) else 4):
            raise ValueError(f"method: expected maps [B, K, h, w] or a list of [K, h, w], got {shape_text(own.shape)}")
    if len(maps) != len(images):
        raise ValueError(f"method: expected maps of {len(images)} images, got those of {len(maps)}")
    return maps


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Of ``[..., h, w]``."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    if not maps.numel():
        return maps.new_zeros(*maps.shape[:-2], *size)
    stacked = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(stacked, tuple(size), mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)


def _each(maps: Maps, function: Callable[[Tensor], Tensor]) -> Maps:
    return [function(own) for own in maps] if isinstance(maps, list) else function(maps)
