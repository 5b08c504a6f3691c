"""What the two parts of a classifier give, checked."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from segattr.networks.backward import followed
from segattr.networks.classifier import Classifier, taking
from segattr.networks.spatial import axes, size_text
from segloss.common.checks import check_like, shape_text


class Features(NamedTuple):
    """Feature maps ``[B, D, h, w]``, or ``[B, D, d, h, w]`` of volumes, and what else the head takes, or None."""

    maps: Tensor
    rest: Tensor | None


def feature_maps(clf: Classifier, images: Tensor) -> Features:
    with taking("images", images):
        return checked_features(clf, clf.features(images), images)


def checked_features(clf: Classifier, features: Any, images: Tensor) -> Features:
    """Of what the first part of a classifier gave for images."""
    maps, rest = features if isinstance(features, tuple) and len(features) == 2 else (features, None)
    for tensor in (maps,) if rest is None else (maps, rest):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"clf: expected a tensor of features, got {type(tensor).__name__}")
    if maps.dim() != images.dim():
        raise ValueError(f"clf: expected features [B, D, {size_text(images.dim())}], got {shape_text(maps.shape)}")
    channels = maps.shape[1] if clf.linear is None else clf.linear.weight.shape[1]
    if maps.shape[1] != channels:
        raise ValueError(f"clf: expected features of {channels} channels, got {shape_text(maps.shape)}")
    return Features(maps, rest)


def head_output(clf: Classifier, features: Features, images: Tensor) -> Tensor:
    """``[B, K]``, or ``[B, K, H, W]`` or ``[B, K, D, H, W]`` of a segmentation network."""
    with taking("images", images):
        maps = features.maps.clone()  # which it may overwrite
        logits = clf.head(maps) if features.rest is None else clf.head(maps, features.rest)
    if not isinstance(logits, Tensor):
        raise TypeError(f"clf: expected a tensor of logits from its head, got {type(logits).__name__}")
    if logits.dim() == 1:  # of a single class
        logits = logits[:, None]
    if logits.dim() not in (2, images.dim()) or len(logits) != len(images):
        expected = f"[{len(images)}, K] from its head"
        raise ValueError(f"clf: expected logits {expected}, got {shape_text(logits.shape)}")
    return logits


def head_logits(clf: Classifier, features: Features, images: Tensor, pixels: Tensor | None = None) -> Tensor:
    """``[B, K]``; of a segmentation network the sums over pixels, of each class over where it wins by default."""
    logits = head_output(clf, features, images)
    if logits.dim() == 2:
        if pixels is not None:
            raise ValueError("pixels: expected None for logits [B, K], got a mask")
        return logits
    if pixels is None:
        winners = logits.detach().argmax(1, keepdim=True)
        classes = torch.arange(logits.shape[1], device=logits.device)
        mask = winners == classes.view(-1, *[1] * (logits.dim() - 2))
    else:
        check_like("pixels", pixels, (len(logits), *logits.shape[2:]), "the maps of the network", logits)
        mask = pixels[:, None]
    return (logits * mask).sum(axes(logits))


def head_gradient(output: Tensor, features: Tensor, **options: Any) -> Tensor:
    """Of what the head made of the features, with respect to them."""
    gradient = None
    if output.requires_grad:
        with followed("clf"):
            (gradient,) = torch.autograd.grad(output, features, allow_unused=True, **options)
    if gradient is None:
        raise ValueError("clf: expected logits that autograd can follow to the features, got detached ones")
    return gradient


def count_classes(clf: Classifier, images: Tensor) -> int:
    try:
        return clf.num_classes
    except ValueError:  # only its logits tell
        with torch.no_grad():
            return head_logits(clf, feature_maps(clf, images), images).shape[1]
