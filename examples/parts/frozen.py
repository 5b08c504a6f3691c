"""Features of a frozen encoder, made once for each image: only a light decoder is left to train, which CPUs can."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from data.sample import Images, Sample
from engine import processes
from engine.per_image import each_image, read
from torch import Tensor, nn
from torchvision import tv_tensors
from tqdm import tqdm

from parts.pretrained import Segmenter
from parts.tag_classifier import digest
from segattr.networks import evaluating


class Kept(Images):
    """Images that stay in memory once they have been read.

    Args:
        images: as many as there is memory for.
    """

    def __init__(self, images: Images) -> None:
        self.names, self.classes = images.names, images.classes
        self._images = images
        self._samples: dict[int, Sample] = {}

    def __getitem__(self, index: int) -> Sample:
        if index not in self._samples:
            self._samples[index] = self._images[index]
        return self._samples[index]


class Views(Images):
    """Images of one size, as they are and mirrored, under names that are digests of their pixels.

    Args:
        images: made to fit.
    """

    def __init__(self, images: Sequence[Images]) -> None:
        self.classes = images[0].classes
        self._views: dict[str, tuple[Images, int, bool]] = {}
        for data in images:
            for index in tqdm(range(len(data)), "images", delay=2, disable=processes.rank() > 0):
                image = data[index]["image"]
                self._views[_name(image)] = (data, index, False)
                self._views[_name(image.flip(-1))] = (data, index, True)
        self.names = list(self._views)

    def __getitem__(self, index: int) -> Sample:
        data, place, mirror = self._views[self.names[index]]
        image = data[place]["image"].as_subclass(Tensor)
        return {"image": tv_tensors.Image(image.flip(-1) if mirror else image)}


class Remembered(nn.Module):
    """In the place of an encoder: finds the features of an image by its pixels, among those that were made.

    Args:
        channels: of the feature map of each stride.
        folder: of the features of :class:`Views`.
    """

    def __init__(self, channels: Mapping[int, int], folder: Path) -> None:
        super().__init__()
        self.channels, self._folder = channels, folder

    def pyramid(self, image: Tensor) -> dict[int, Tensor]:
        """Feature maps by stride; see :meth:`parts.pretrained.Pretrained.pyramid`."""
        found = [read(self._folder, _name(one)) for one in image]
        return {int(stride): torch.stack([maps[stride] for maps in found]).to(image) for stride in found[0]}


def freeze(model: nn.Module, images: Sequence[Images], folder: Path) -> None:
    """Makes the features of images and replaces the encoder, which is not needed any more, by these.

    Images of trainings, evaluations and pictures then go through the network as ever, as long as they are among those,
    as they are or mirrored. Features that are there already, from another run or a stopped one, are taken.

    Args:
        model: with an encoder.
        images: made to fit; from several data sets.
        folder: in which the features of each encoder have a folder of their own.
    """
    assert isinstance(model, Segmenter)
    encoder, strides = model.encoder, model.strides
    device = next(encoder.parameters()).device

    def work(sample: Sample) -> dict[str, Tensor]:
        with torch.no_grad(), evaluating(encoder):
            maps = encoder.pyramid(sample["image"].as_subclass(Tensor)[None].to(device))
        return {str(stride): maps[stride][0].half() for stride in strides}

    weights = digest(encoder)
    each_image(
        work, Views(images), folder / weights, settings={"weights": weights, "strides": strides}, name="features"
    )
    model.encoder = Remembered(encoder.channels, folder / weights)  # type: ignore[assignment]


def _name(image: Tensor) -> str:
    return hashlib.sha256(image.as_subclass(Tensor).cpu().contiguous().numpy().tobytes()).hexdigest()[:32]
