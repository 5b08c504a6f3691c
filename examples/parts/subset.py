"""Some classes of a data set, as if there were no others."""

from collections.abc import Sequence
from pathlib import Path

import torch
from data.files import read_sizes
from data.sample import VOID, DataError, Images, Sample
from torch import Tensor
from torchvision import tv_tensors


class Subset(Images):
    """Images with some of their classes; the others count as background.

    Args:
        images: with masks.
        classes: names of the foreground classes that are kept.
        empty: whether images without any of these classes are kept.
    """

    def __init__(self, images: Images, classes: Sequence[str], *, empty: bool) -> None:
        self._images = images
        self.columns = [images.classes.index(name) for name in classes]
        sizes = images.sizes()
        kept = sizes.sum(1) > 0 if empty else sizes[:, self.columns].sum(1) > 0
        self._indices = kept.nonzero().flatten().tolist()
        if not self._indices:
            raise DataError(f"--classes: expected images with {', '.join(classes)}, found none")
        self.names, self.classes = [images.names[i] for i in self._indices], (images.classes[0], *classes)
        self.all_classes = images.classes
        self._table = torch.zeros(VOID + 1, dtype=torch.int64)
        self._table[[VOID, *self.columns]] = torch.tensor([VOID, *range(1, len(self.classes))])

    def __getitem__(self, index: int) -> Sample:
        sample = self._images[self._indices[index]]
        return {"image": sample["image"], "labels": self._merged(sample["labels"])}

    def labels(self, index: int) -> Tensor:
        return self._merged(self._images.labels(self._indices[index]))

    def _merged(self, labels: Tensor) -> tv_tensors.Mask:
        return tv_tensors.Mask(self._table[labels.as_subclass(Tensor)])

    def read_sizes(self, path: Path) -> Tensor:
        """Sizes of the kept classes from a file with those of all classes, ``[N, K]``."""
        sizes = read_sizes(path, self.names, self.all_classes)[:, self.columns]
        return torch.cat([1 - sizes.sum(1, keepdim=True), sizes], 1).clamp(0, 1)
