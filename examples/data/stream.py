"""The batches of a training: seeded order, seeded augmentation, a share for each process."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from engine import processes
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data.sample import Batch, Images, Sample, collate, complete

Augment = Callable[[Sample, np.random.Generator], Sample]
Key = tuple[int, int]  # epoch and index of an image


@dataclass(frozen=True)
class Prepared(Dataset[Sample]):
    """Augmented and completed samples, by epoch and index: the same, wherever and in whatever order they are made.

    Args:
        data: the images.
        augment: changes a sample by the random numbers of a generator; None changes nothing.
        seed: another one gives other random numbers.
    """

    data: Images
    augment: Augment | None = None
    seed: int = 0

    def __getitem__(self, key: Key) -> Sample:
        sample = self.data[key[1]]
        if self.augment:
            sample = self.augment(sample, np.random.default_rng([1, self.seed, *key]))
        return complete(sample, len(self.data.classes))


class Whole(Images):
    """Images as they are shown to the networks, without augmentation."""

    def __init__(self, images: Images, fit: Augment) -> None:
        self.names, self.classes = images.names, images.classes
        self._prepared = Prepared(images, fit)

    def __getitem__(self, index: int) -> Sample:
        return self._prepared[0, index]


def loader(data: Prepared, keys: Iterable[list[Key]], workers: int) -> DataLoader[Sample]:
    """Batches of the samples of each list of keys, read by that many worker processes, in the order of the lists."""
    return DataLoader(
        data,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_initialized(),
        generator=torch.Generator(),  # it would draw from the global one, and a resumed training would have another
    )


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The images of an epoch in random order."""
    return np.random.default_rng([0, seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Stream:
    """Batches without end: every image once, in random order, then every image again in another order, and so on.

    Which images a step takes, and how they are augmented, follows from its number, whatever the number of processes:
    so a training can go on from any step. A batch may hold the end of an epoch and the beginning of the next.

    Args:
        data: the images.
        augment: see :class:`Prepared`.
        batch_size: images of a step, those of all processes and accumulated batches together.
        seed: of order and augmentation.
        accumulate: batches that each process makes of its share of a step, whose gradients are added up.
        workers: processes that read and augment beside each training process; 0 leaves it to that.

    Raises:
        ValueError: no images, or a batch size that cannot be shared equally.
    """

    data: Images
    augment: Augment | None = None
    batch_size: int = 16
    seed: int = 0
    accumulate: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if not len(self.data):
            raise ValueError("data: expected at least one image, got none")
        shares = processes.count() * self.accumulate
        if self.batch_size < 1 or self.batch_size % shares:
            raise ValueError(
                f"batch_size: expected a multiple of {shares} (processes x accumulated batches), got {self.batch_size}"
            )

    def keys(self, step: int) -> list[Key]:
        """Epoch and index of the images of a step, from 0."""
        keys: list[Key] = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, len(self.data))
            keys.append((epoch, int(_order(len(self.data), self.seed, epoch)[place])))
        return keys

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """This process's batches of the steps from ``start`` up to ``stop``."""
        share = self.batch_size // (processes.count() * self.accumulate)

        def lists() -> Iterator[list[Key]]:
            for step in range(start, stop):
                keys = self.keys(step)
                for batch in range(self.accumulate):
                    first = (batch * processes.count() + processes.rank()) * share
                    yield keys[first : first + share]

        prepared = Prepared(self.data, self.augment, self.seed)
        batches = iter(loader(prepared, lists(), self.workers))
        for _ in range(start, stop):
            yield [next(batches) for _ in range(self.accumulate)]
