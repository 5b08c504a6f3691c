"""How fast images and masks are read, beside torchvision's VOCSegmentation with the same decoding, on one worker.

``python -m benchmarks.reading FOLDER`` reads the list ``train`` of a folder that holds ``VOCdevkit/VOC2012`` three
times. The worker reads each image in both ways, one after the other and in turn first, so that other programs on the
machine slow both down. Nothing is augmented: what follows the reading is the same for both.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.__main__ import HERE
from benchmarks.memory import status

EPOCHS = 3

Measured = tuple[float, float, int]  # seconds of ours and of torchvision's, bytes of the worker


def decode(image: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What our samples hold: RGB in [0, 1], and labels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels, torch.from_numpy(np.array(mask)).long()


class Both(Dataset[Measured]):
    """What it takes to read each image in both ways, which must give the same."""

    def __init__(self, ours: Any, theirs: Any) -> None:
        self._ways = (ours, theirs)

    def __len__(self) -> int:
        return len(self._ways[0])

    def __getitem__(self, index: int) -> Measured:
        seconds = [0.0, 0.0]
        samples: list[Any] = [None, None]
        for way in (0, 1) if index % 2 else (1, 0):
            begin = time.perf_counter()
            samples[way] = self._ways[way][index]
            seconds[way] = time.perf_counter() - begin
        sample, (pixels, labels) = samples
        if not (torch.equal(sample["image"], pixels) and torch.equal(sample["labels"], labels)):
            raise AssertionError(f"image {index}: the two differ")
        return seconds[0], seconds[1], status("VmRSS")


def only(batch: Sequence[Measured]) -> Measured:
    return batch[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="holds VOCdevkit/VOC2012")
    parser.add_argument("--out", type=Path, default=Path("runs/reading.json"), help="file of the results")
    options = parser.parse_args()

    sys.path.append(str(HERE.parent / "examples"))  # no package; what pytest does
    from data.voc import VOC
    from torchvision.datasets import VOCSegmentation

    theirs = VOCSegmentation(options.folder, year="2012", image_set="train", transforms=decode)
    both = Both(VOC(options.folder, "train"), theirs)
    loader = DataLoader(both, batch_size=1, num_workers=1, collate_fn=only, persistent_workers=True)
    list(loader)  # the disk's cache
    rows = []
    for _ in range(EPOCHS):
        seconds, other, sizes = zip(*loader, strict=True)
        ratios = [theirs / mine for mine, theirs in zip(seconds, other, strict=True)]
        rows.append(
            {
                "images_per_second": len(both) / sum(seconds),
                "torchvision": len(both) / sum(other),
                "ratio": statistics.median(ratios),
                "megabytes": sizes[-1] / 2**20,
            }
        )
        print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"images": len(both), "torch": torch.__version__, "epochs": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
