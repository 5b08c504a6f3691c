"""How fast images and masks are read, beside torchvision's VOCSegmentation with the same decoding, on one worker.

``python -m benchmarks.reading FOLDER`` reads the list ``train`` of a folder that holds ``VOCdevkit/VOC2012``, three
times with each of the two in turn. Nothing is augmented: what follows the reading is the same for both.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.__main__ import HERE
from benchmarks.memory import status

EPOCHS = 3


def decode(image: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What our samples hold: RGB in [0, 1], and labels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels, torch.from_numpy(np.array(mask)).long()


class Measured(Dataset[tuple[Any, int]]):
    """Samples with the memory of the process that reads them, in bytes."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._data[index], status("VmRSS")


def only(batch: Sequence[Any]) -> Any:
    return batch[0]


def epochs(data: Any) -> Iterator[tuple[float, float]]:
    """Images in a second and megabytes of the worker at the end, of each epoch."""
    loader = DataLoader(Measured(data), batch_size=1, num_workers=1, collate_fn=only, persistent_workers=True)
    while True:
        begin = time.perf_counter()
        sizes = [size for _, size in loader]
        yield len(data) / (time.perf_counter() - begin), sizes[-1] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="holds VOCdevkit/VOC2012")
    parser.add_argument("--out", type=Path, default=Path("runs/reading.json"), help="file of the results")
    options = parser.parse_args()

    sys.path.append(str(HERE.parent / "examples"))  # no package; what pytest does
    from data.voc import VOC
    from torchvision.datasets import VOCSegmentation

    ours = VOC(options.folder, "train")
    theirs = VOCSegmentation(options.folder, year="2012", image_set="train", transforms=decode)
    for sample, (pixels, labels) in zip(_every(ours, 50), _every(theirs, 50), strict=True):
        assert torch.equal(sample["image"], pixels)
        assert torch.equal(sample["labels"], labels)
    runs = {"data.voc.VOC": epochs(ours), "torchvision": epochs(theirs)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        next(run)  # the disk's cache, and the start of the worker
    for _ in range(EPOCHS):
        for name, run in runs.items():
            found[name].append(next(run))
    rates = {name: [round(rate, 1) for rate, _ in values] for name, values in found.items()}
    memory = {name: [round(size) for _, size in values] for name, values in found.items()}
    ratio = statistics.median(rates["data.voc.VOC"]) / statistics.median(rates["torchvision"])
    for name in found:
        print(f"{name:<13} {rates[name]} images/s, worker {memory[name]} MB, epoch by epoch")
    print(f"ratio of the medians {ratio:.2f}, {len(ours)} images")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"images": len(ours), "rates": rates, "megabytes": memory, "ratio": ratio, "torch": torch.__version__}
    options.out.write_text(json.dumps(result | {"processors": os.cpu_count()}, indent=2) + "\n")


def _every(data: Any, step: int) -> Iterator[Any]:
    return (data[index] for index in range(0, len(data), step))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
