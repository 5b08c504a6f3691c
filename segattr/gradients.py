"""Grad-CAM and its variants: maps of any head, from the gradients of the class scores at a layer."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segattr.cam import NORMS, check_maps, normalize
from segattr.networks.classes import Classes, Maps, Pairs, typed
from segattr.networks.classifier import as_classifier, check_images, tracked, undisturbed
from segattr.networks.features import Features, feature_maps, head_gradient, head_logits
from segattr.networks.spatial import axes, size_text
from segloss.common.checks import check_bool, check_choice, check_real, shape_text
from segloss.common.reduction import wide_dtype
from segloss.common.resizing import resize_linear

Weighting = Literal["gradient", "gradcam++", "layercam"]
Layer = str | nn.Module


@typed
def grad_cam(
    clf: nn.Module,
    images: Tensor,
    classes: Classes | None = None,
    *,
    layer: Layer | Sequence[Layer] | None = None,
    pool: bool = True,
    weighting: Weighting = "gradient",
    pixels: Tensor | None = None,
    norm: str = "relu",
) -> Maps:
    r"""Grad-CAM of all requested classes of all images: for any head, and any layer.

    .. math::
        M_c(i) = \sum_k \alpha_{ck}(i) f_k(i), \qquad
        \alpha_{ck}(i) = \frac{1}{hw} \sum_j g_{ck}(j) \;\text{ or }\; g_{ck}(i), \qquad
        g_{ck} = \frac{\partial y_c}{\partial f_k}

    with the gradient averaged over the map (``pool=True``, the common reading), or taken at each location (eq. (2.2)
    as printed). The other weightings are

    .. math::
        \alpha_{ck} = \sum_j \frac{g_{ck}(j)^2}{2 g_{ck}(j)^2 + g_{ck}(j)^3 \sum_a f_k(a)} \max(g_{ck}(j), 0)
        \;\text{ (Grad-CAM++)}, \qquad \alpha_{ck}(i) = \max(g_{ck}(i), 0) \;\text{ (LayerCAM)}

    Their ReLU is the default ``norm``. Where the head is global average pooling and one linear layer, Grad-CAM is the
    class activation map over the number of locations. The maps are differentiable with respect to images
    and parameters, the gradients in them too, where these require a gradient.

    A network with a single logit has one class, 0. The map of its absence is that of the negative logit,
    ``normalize(-grad_cam(clf, images, norm="raw"), "relu")``.

    Of a transformer the map is made of the patch tokens where the logits still depend on them (see
    :func:`~segattr.split`); the other tokens are held constant. Of a segmentation network the score of a class is the
    sum of its logits over ``pixels``.

    One forward pass, one backward pass through the head for all classes of all images. The network runs as for
    :func:`cam`. In training mode, where batch normalisation mixes images, the gradient is that of all images' scores.

    Args:
        clf: a :class:`~segattr.Classifier`, or a network that :func:`~segattr.split` understands
            (in a loop, split it once, at the layer).
        images: ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``, normalised as the network expects it.
        classes: numbers of classes, for all images or one sequence for each image, or an integer tensor ``[n]`` or
            ``[B, n]``; all classes if None.
        layer: the submodule, or its name, whose output is the feature map :math:`f`; the last feature map if None. Of
            several layers the maps, each in [0, 1] by ``"minmax"`` of its ReLU, are brought to the size of the largest
            and averaged.
        pool: average the gradient over the map; of ``weighting="gradient"``.
        weighting: ``"gradient"``, ``"gradcam++"`` or ``"layercam"``.
        pixels: for segmentation networks, bool, ``[B, H', W']`` as their output (``[B, D', H', W']`` of volumes); by
            default those where the class wins.
        norm: what :func:`normalize` does with the maps; ``"raw"`` leaves them signed.

    Returns:
        As :func:`cam`.

    Raises:
        TypeError: ``images`` that are not floating point, ``classes`` that are not sequences of integers, ``pool`` that
            is no bool, ``pixels`` that are not bool, a network that cannot be split, parts that give no tensor.
        ValueError: images, classes, ``layer``, ``weighting`` or ``norm`` out of range, ``pixels`` for a network that
            gives one vector for each image, a head that does not give ``[B, K]``, whose logits are detached or that
            overwrites in place what its gradient needs, maps that are NaN or infinite.

    Source:
        *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization*; the dissertation's
        eq. (2.2); *Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks*, eqs. (5), (19), for
        scores that are exponentials of the logits; *LayerCAM: Exploring Hierarchical Class Activation Maps*, eq. (6).

    Example:
        >>> features, pooling = [nn.Conv2d(3, 8, 3), nn.ReLU()], [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        >>> net = nn.Sequential(*features, *pooling, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> grad_cam(net, torch.rand(2, 3, 9, 9), [1, 2], pool=False).shape
        torch.Size([2, 2, 7, 7])
    """
    check_images(images)
    check_bool("pool", pool)
    check_choice("weighting", weighting, ("gradient", "gradcam++", "layercam"))
    check_choice("norm", norm, NORMS)
    _check_pixels(pixels, images)
    if isinstance(layer, Sequence) and not isinstance(layer, str):
        return _averaged(clf, images, classes, layer, pool=pool, weighting=weighting, pixels=pixels, norm=norm)
    if weighting != "gradient":
        rule = _grad_cam_plus_plus if weighting == "gradcam++" else _layer_cam
    else:
        rule = _pooled if pool else _located
    classifier = as_classifier(clf, images, layer)
    trained = [parameter.requires_grad for parameter in classifier.parameters()] or [True]  # functions do not tell
    differentiable = torch.is_grad_enabled() and (images.requires_grad or any(trained))

    def maps() -> Maps:
        with torch.set_grad_enabled(differentiable):
            features = feature_maps(classifier, tracked(images))
        with torch.enable_grad():
            leaf = features.maps if features.maps.requires_grad else features.maps.detach().requires_grad_()
            logits = head_logits(classifier, Features(leaf, features.rest), images, pixels)
            pairs = Pairs.of(classes, len(images), logits.shape[1], images.device)
            gradients = _gradients(logits, leaf, pairs, differentiable)
        with torch.set_grad_enabled(differentiable):
            rows = rule(gradients.to(wide_dtype(gradients)), leaf.to(wide_dtype(leaf)))
            check_maps(rows)
            return normalize(pairs.arrange(rows[pairs.slots, pairs.images]), norm, dims=images.dim() - 2)

    with torch.inference_mode(False):
        return undisturbed(classifier, maps, constant=not differentiable)


# --- maps [S, B, *spatial] of gradients [S, B, D, *spatial] and features [B, D, *spatial]


def _pooled(gradients: Tensor, features: Tensor) -> Tensor:
    return torch.einsum("sbd,bd...->sb...", gradients.mean(axes(gradients, 3)), features)


def _located(gradients: Tensor, features: Tensor) -> Tensor:
    return (gradients * features).sum(2)


def _layer_cam(gradients: Tensor, features: Tensor) -> Tensor:
    return (gradients.relu() * features).sum(2)


def _grad_cam_plus_plus(gradients: Tensor, features: Tensor) -> Tensor:
    squares = gradients.square()
    divisor = 2 * squares + features.sum(axes(features), keepdim=True) * squares * gradients
    known = divisor != 0
    share = torch.where(known, squares / torch.where(known, divisor, 1), 0)
    return torch.einsum("sbd,bd...->sb...", (share * gradients.relu()).sum(axes(gradients, 3)), features)


def _averaged(
    clf: nn.Module, images: Tensor, classes: Any, layers: Sequence[Layer], *, norm: str, **options: Any
) -> Maps:
    """The average over layers, each scaled to [0, 1], at the size of the largest."""
    if not layers:
        raise ValueError("layer: expected at least one layer, got none")
    found = [grad_cam(clf, images, classes, layer=layer, norm="relu", **options) for layer in layers]
    dims = images.dim() - 2
    scaled = [normalize(maps, "minmax", dims=dims) for maps in found]
    each = [maps if isinstance(maps, list) else list(maps) for maps in scaled]
    size = [max(maps[0].shape[axis] for maps in each) if len(images) else 1 for axis in range(1, dims + 1)]
    mean = [
        torch.stack([resize_linear(maps[None], size)[0] for maps in own]).mean(0) for own in zip(*each, strict=True)
    ]
    return normalize(mean if isinstance(scaled[0], list) else torch.stack(mean), norm, dims=dims)


def _check_pixels(pixels: Tensor | None, images: Tensor) -> None:
    if pixels is None:
        return
    check_real("pixels", pixels)
    if pixels.dtype != torch.bool:
        raise TypeError(f"pixels: expected a bool tensor, got {pixels.dtype}")
    if pixels.dim() != images.dim() - 1:
        raise ValueError(f"pixels: expected [B, {size_text(images.dim()).upper()}], got {shape_text(pixels.shape)}")


def _gradients(logits: Tensor, features: Tensor, pairs: Pairs, differentiable: bool) -> Tensor:
    """Of each image's first, second, ... class with respect to its features, ``[S, B, D, *spatial]``."""
    one_hot = logits.new_zeros(pairs.most(), *logits.shape)
    if not one_hot.numel():
        return features.new_zeros(len(one_hot), *features.shape)
    one_hot[pairs.slots, pairs.images, pairs.classes] = 1
    return head_gradient(logits, features, grad_outputs=one_hot, create_graph=differentiable, is_grads_batched=True)
