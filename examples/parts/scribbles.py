"""Scribbles drawn from masks: the skeleton of each object, of which any share can be kept."""

from collections.abc import Sequence

import numpy as np
import torch
from data.sample import VOID, Images, Sample
from engine import processes
from numpy.typing import NDArray
from skimage.graph import MCP
from skimage.measure import label, regionprops
from skimage.morphology import skeletonize
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm


def scribbles(labels: Tensor, rng: np.random.Generator) -> list[Tensor]:
    """Pixels of the scribble of each object, flat indices ``[n]``, in the order in which they are drawn.

    An object is a connected part of a class; the background has one scribble, in its largest part. A scribble is the
    skeleton of its object, drawn from one of its pixels to ever farther ones.

    Args:
        labels: of one image, ``[H, W]``, with 255 where there is none.
        rng: picks the first pixels.
    """
    pixels, strokes = labels.as_subclass(Tensor).numpy(), []
    for value in np.unique(pixels[pixels != VOID]):
        parts = regionprops(label(pixels == value, connectivity=2))
        if value == 0:
            parts = [max(parts, key=lambda part: part.area)]
        for part in parts:
            rows, columns = _stroke(part.image, rng)
            flat = np.ravel_multi_index((rows + part.bbox[0], columns + part.bbox[1]), pixels.shape)
            strokes.append(torch.from_numpy(flat))
    return strokes


def _stroke(region: NDArray[np.bool_], rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the pixels."""
    skeleton = skeletonize(region)
    pixels = np.argwhere(skeleton)
    along, _ = MCP(np.where(skeleton, 1.0, -1.0)).find_costs([pixels[rng.integers(len(pixels))]])  # distances
    rows, columns = pixels[along[skeleton].argsort(kind="stable")].T
    return rows, columns


def all_scribbles(data: Images, seed: int) -> list[list[Tensor]]:
    """The scribbles of each image: the same for the same masks and seed. Several processes share the images."""
    count = processes.count()
    own = tqdm(range(processes.rank(), len(data), count), "scribbles", delay=2, disable=processes.rank() > 0)
    shares = processes.gather([scribbles(data.labels(i), np.random.default_rng([seed, i])) for i in own])
    return [shares[i % count][i // count] for i in range(len(data))]


class Scribbled(Images):
    """Images with ``"seeds"``, the labels of the pixels of scribbles and 255 elsewhere, int64 ``[H, W]``.

    Args:
        data: images of the size that they are trained at: scribbles are thin, resizing would lose them.
        strokes: of each image, as :func:`all_scribbles` gives them.
        length: share of the pixels of each scribble that is kept, the first ones; 0 keeps one pixel.
    """

    def __init__(self, data: Images, strokes: Sequence[Sequence[Tensor]], length: float) -> None:
        self.names, self.classes = data.names, data.classes
        self._data, self._strokes, self._length = data, strokes, length

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        labels = sample["labels"].as_subclass(Tensor)
        seeds = torch.full_like(labels, VOID)
        for stroke in self._strokes[index]:
            drawn = stroke[: max(1, round(self._length * len(stroke)))]
            seeds.view(-1)[drawn] = labels.reshape(-1)[drawn]
        return sample | {"seeds": tv_tensors.Mask(seeds)}
