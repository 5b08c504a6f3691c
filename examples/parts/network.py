"""A small encoder-decoder for images of 48 pixels and more, and its pretraining on image tags."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Two 3 x 3 convolutions with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class EncoderDecoder(nn.Module):
    """A U-Net of three levels, the first at half the resolution of the image.

    Args:
        num_classes: K, the background being class 0.
        width: channels of the first level; the others have two and three times as many.
    """

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.down1 = block(3, width, stride=2)
        self.down2 = block(width, 2 * width, stride=2)
        self.down3 = block(2 * width, 3 * width, stride=2)
        self.up2 = block(3 * width + 2 * width, 2 * width)
        self.up1 = block(2 * width + width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, K, H, W]`` of RGB images in [0, 1], ``[B, 3, H, W]``."""
        # Channels last: convolutions of few channels are a third faster on CPU.
        x1 = self.down1((4 * image - 2).contiguous(memory_format=torch.channels_last))
        x2 = self.down2(x1)
        x = self.down3(x2)
        x = self.up2(_beside(x, x2))
        x = self.up1(_beside(x, x1))
        return F.interpolate(self.head(x), size=image.shape[2:], mode="bilinear")


def _beside(coarse: Tensor, fine: Tensor) -> Tensor:
    """Channels of both, the first ones at the resolution of the second."""
    upsampled = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")
    if upsampled.requires_grad:
        # A slice of the gradient of both would be upsampled backwards in another memory format, ten times as slowly.
        upsampled.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return torch.cat([upsampled, fine], 1)


def tag_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Binary cross-entropy of image tags, to pretrain all of the network and not only its encoder.

    The score of a class is the log-mean-exp over the pixels of its margin over the background. A smooth maximum asks
    for some pixels of the class only, and the margin makes the background take the pixels that no tag explains, so
    that the logits roughly localise the classes: scores without it put classes in the wrong places on some seeds.

    Args:
        logits: ``[B, K, H, W]``.
        tags: 1 where a class is present, ``[B, K]``; the background is present everywhere and has no score.
    """
    margins = (logits[:, 1:] - logits[:, :1]).flatten(2)
    scores = margins.logsumexp(2) - math.log(margins.shape[2])
    return F.binary_cross_entropy_with_logits(scores, tags[:, 1:].to(scores.dtype))
