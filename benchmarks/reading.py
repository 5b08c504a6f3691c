"""How fast images and masks are read, beside torchvision's VOCSegmentation with the same decoding, on one worker.

``python -m benchmarks.reading FOLDER`` reads the list ``train`` of a folder that holds ``VOCdevkit/VOC2012``, four
times. The worker reads each image in both ways, either first in every other epoch, and the shortest time of each
counts, so that other programs disturb the two alike. Nothing is augmented: what follows is the same for both.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.memory import status

EPOCHS = 4

Measured = tuple[float, float, int]  # seconds of ours and of torchvision's, bytes of the worker


def decode(image: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What our samples hold: RGB in [0, 1], and labels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels, torch.from_numpy(np.array(mask)).long()


class Both(Dataset[Measured]):
    """What it takes to read each image in both ways, which must give the same."""

    def __init__(self, ours: Any, theirs: Any) -> None:
        self._ways = (ours, theirs)
        self._read = 0

    def __len__(self) -> int:
        return len(self._ways[0])

    def __getitem__(self, index: int) -> Measured:
        seconds = [0.0, 0.0]
        samples: list[Any] = [None, None]
        epoch, self._read = self._read // len(self), self._read + 1
        for way in (0, 1) if (index + epoch) % 2 else (1, 0):
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

    from data.sample import DataError
    from data.voc import VOC
    from torchvision.datasets import VOCSegmentation

    try:
        ours = VOC(options.folder, "train")
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: cannot write to {options.out.parent}: {error.strerror}") from None
    theirs = VOCSegmentation(options.folder, year="2012", image_set="train", transforms=decode)
    both = Both(ours, theirs)
    loader = DataLoader(both, batch_size=1, num_workers=1, collate_fn=only, persistent_workers=True)
    list(loader)  # the disk's cache
    epochs = [list(zip(*loader, strict=True)) for _ in range(EPOCHS)]
    mine, other = (sum(map(min, zip(*(epoch[way] for epoch in epochs), strict=True))) for way in (0, 1))
    memory = [epoch[2][-1] / 2**20 for epoch in epochs]
    result: dict[str, Any] = {
        "images": len(both),
        "images_per_second": len(both) / mine,
        "torchvision": len(both) / other,
        "ratio": other / mine,
        "spread": [sum(epoch[1]) / sum(epoch[0]) for epoch in epochs],
        "megabytes": memory,
        "torch": torch.__version__,
    }
    print(f"{len(both) / mine:.0f} images/s, torchvision {len(both) / other:.0f}: ratio {other / mine:.3f}")
    print("by epoch: " + ", ".join(f"{ratio:.3f}" for ratio in result["spread"]))
    print("worker, MB: " + ", ".join(f"{size:.0f}" for size in memory))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
