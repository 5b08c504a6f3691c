"""Networks to train with size targets: torchvision's DeepLabV3 as they are, and a small one for quick trials."""

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import segmentation

from parts.network import EncoderDecoder

Name = Literal["small", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101"]
Weights = Literal["none", "imagenet", "coco"]

# Of the photographs that the weights of torchvision were trained on.
MEAN, STANDARD_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Logits(nn.Module):
    """Takes images in [0, 1] to the logits of a segmentation network of torchvision, which stays as it is.

    Args:
        network: takes normalised images to a dictionary with the logits as ``"out"``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        mean, deviation = (image.new_tensor(values).view(3, 1, 1) for values in (MEAN, STANDARD_DEVIATION))
        logits: Tensor = self.network((image - mean) / deviation)["out"]
        return logits


def check(name: Name, weights: Weights, at_once: int) -> None:
    """Raises ValueError for options that do not go together; ``at_once``: images in the network at a time."""
    if name == "small" and weights != "none":
        raise ValueError(f"--weights: expected a DeepLabV3 as --network with {weights}, got small")
    if name != "small" and at_once == 1:  # statistics of its pooled features
        raise ValueError("--batch-size: expected at least 2 images at once for a DeepLabV3, got 1")


def build(name: Name, num_classes: int, weights: Weights) -> nn.Module:
    """A network from images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, K, H, W]``.

    Args:
        name: ``"small"``, or a network of ``torchvision.models.segmentation``.
        num_classes: K, the background being class 0.
        weights: where a network of torchvision starts: ``"imagenet"`` has its backbone, ``"coco"`` all of it but, for
            other than VOC's 21 classes, its last layer. Both are downloaded.
    """
    if name == "small":
        return EncoderDecoder(num_classes)
    make = getattr(segmentation, name)
    try:
        if weights != "coco":
            backbone = "DEFAULT" if weights == "imagenet" else None
            return Logits(make(weights=None, weights_backbone=backbone, num_classes=num_classes))
        network = make(weights="DEFAULT")
    except (OSError, RuntimeError) as error:  # no connection; a file with another check sum
        raise SystemExit(f"error: --weights {weights}: expected to download those of {name}, got: {error}") from None
    last = network.classifier[-1]
    if last.out_channels != num_classes:
        network.classifier[-1] = nn.Conv2d(last.in_channels, num_classes, 1)
    return Logits(network)


def optimizer(model: nn.Module, weights: Weights) -> torch.optim.Optimizer:
    """SGD as in the paper for weights that are there; from scratch AdamW learns more in few steps."""
    if weights != "none":
        return torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
