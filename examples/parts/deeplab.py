"""Segmentation networks to train: a small one for quick trials, torchvision's DeepLabV3, pretrained encoders with a
light decoder."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from engine import storage
from torch import Tensor, nn
from torchvision.models import segmentation

from parts import pretrained
from parts.network import EncoderDecoder
from parts.pretrained import DEVIATION, MEAN, UNUSABLE, Segmenter

DeepLab = Literal["deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101"]
Name = Literal["small", DeepLab, pretrained.Name]
Weights = str  # none, imagenet, coco, or the path of a state dict

# Of the features that a decoder reads. Without the last ones the mIoU is .37 instead of .56: full masks, 150 steps on
# frozen features of EfficientNet-Lite0 for 160 pixels, 243 photographs of five animals, and 61 others to evaluate.
STRIDES = (8, 16, 32)


class Logits(nn.Module):
    """Takes images in [0, 1] to the logits of a segmentation network of torchvision, which stays as it is.

    Args:
        network: takes normalised images to a dictionary with the logits as ``"out"``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        mean, deviation = (image.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        logits: Tensor = self.network((image - mean) / deviation)["out"]
        return logits


def check(name: Name, weights: Weights, at_once: int, frozen: bool = False) -> None:
    """Raises ValueError for options that do not go together.

    ImageNet's weights, the default for photographs, go with every network: the small one starts from nothing.

    Args:
        name: see :func:`build`.
        weights: see :func:`build`.
        at_once: images in the network at a time.
        frozen: whether only the decoder trains.
    """
    if frozen and name not in get_args(pretrained.Name):
        raise ValueError(f"--frozen: expected a --network with a decoder of its own, or --no-frozen, got {name}")
    if weights == "coco" and name not in get_args(DeepLab):
        raise ValueError(f"--weights: expected a DeepLabV3 as --network with {weights}, got {name}")
    if name == "small" and weights not in ("none", "imagenet"):
        raise ValueError(f"--weights: expected another --network with {weights}, got {name}")
    if name in get_args(DeepLab) and at_once == 1:  # statistics of its pooled features
        raise ValueError("--batch-size: expected at least 2 images at once for a DeepLabV3, got 1")


def build(name: Name, num_classes: int, weights: Weights) -> nn.Module:
    """A network from images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, K, H, W]``.

    Args:
        name: ``"small"``; a network of ``torchvision.models.segmentation``; or one of :mod:`parts.pretrained`, which
            gets a light decoder and, if it has weights, keeps the statistics of its batch normalisation.
        num_classes: K, the background being class 0.
        weights: where a network other than the small one starts: ``"none"``, ``"imagenet"`` or the path of a state dict
            for :func:`parts.pretrained.pretrained`; for torchvision's, ``"imagenet"`` has the backbone, ``"coco"`` or
            a state dict of the same kind all of it but, for other than VOC's 21 classes, the last layer.
    """
    if name == "small":
        return EncoderDecoder(num_classes)
    if name in get_args(DeepLab):
        return Logits(_deeplab(name, num_classes, weights))
    encoder = pretrained.pretrained(name, weights)  # type: ignore[arg-type]
    strides = [stride for stride in STRIDES if stride in encoder.channels]
    return Segmenter(encoder.train(weights == "none"), num_classes, strides=strides)


def _deeplab(name: str, num_classes: int, weights: Weights) -> nn.Module:
    make = getattr(segmentation, name)
    try:
        if weights in ("none", "imagenet"):
            backbone = "DEFAULT" if weights == "imagenet" else None
            return make(weights=None, weights_backbone=backbone, num_classes=num_classes)
        network: Any = make(weights="DEFAULT") if weights == "coco" else _of_file(make, Path(weights))
    except UNUSABLE as error:
        wanted = "to download those" if weights in ("imagenet", "coco") else "those"
        message = f"expected {wanted} of {name}, got: {storage.reason(error)}"
        raise SystemExit(f"error: --weights {weights}: {message}") from None
    last = network.classifier[-1]
    if last.out_channels != num_classes:
        network.classifier[-1] = nn.Conv2d(last.in_channels, num_classes, 1)
    return network


def _of_file(make: Any, path: Path) -> nn.Module:
    network: nn.Module = make(weights=None, weights_backbone=None, aux_loss=True)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def optimizer(model: nn.Module, weights: Weights) -> torch.optim.Optimizer:
    """SGD as in the paper for a DeepLabV3 whose weights are there; otherwise AdamW, which learns more in few steps,
    with a tenth of its rate for an encoder whose weights are there.
    """
    if isinstance(model, Logits) and weights != "none":
        return torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    encoder = [*model.encoder.parameters()] if isinstance(model, Segmenter) and weights != "none" else []
    known = {*encoder}
    new = [parameter for parameter in model.parameters() if parameter not in known]
    groups = [{"params": new, "lr": 2e-3}, *([{"params": encoder, "lr": 2e-4}] if encoder else [])]
    return torch.optim.AdamW(groups, weight_decay=1e-2)
