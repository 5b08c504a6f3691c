"""Images of two coloured rectangles, and what is known of them: what these tests train on."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import segloss

CLASSES = 3
COLOURS = torch.tensor([[0.3, 0.3, 0.3], [0.8, 0.2, 0.1], [0.1, 0.3, 0.9]])


class Batch(NamedTuple):
    image: Tensor  # RGB in [0, 1], [B, 3, *spatial]
    labels: Tensor  # int64, [B, *spatial]
    sizes: Tensor  # fractions, [B, CLASSES]


def rectangles(count: int, *spatial: int) -> Batch:
    """The same for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(count, *spatial, dtype=torch.int64)
    for n in range(count):
        for label in (1, 2):
            places = [torch.randint(side // 2 + 1, (), generator=generator).item() for side in spatial]
            # Half of the images lack one of the classes.
            if n % 4 != label:
                box = tuple(slice(a, a + side // 2) for a, side in zip(places, spatial, strict=True))
                labels[(n, *box)] = label
    noise = 0.1 * torch.rand(count, 3, *spatial, generator=generator)
    image = COLOURS[labels].movedim(-1, 1) + noise
    return Batch(image, labels, segloss.sizes_from_labels(labels, CLASSES))


def small_network(dims: int = 2) -> nn.Module:
    """Two convolutions, the same for the same arguments."""
    convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(convolution(3, 8, 3, padding=1), nn.ReLU(), convolution(8, CLASSES, 1))
