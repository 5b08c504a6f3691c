"""Trains with all losses together and watches the memory: ``python -m tests.soak --steps 2000``."""

import argparse
import gc
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import segloss

CLASSES, FEATURES, BATCH = 4, 8, 2
SIZES = ((24, 20), (32, 32), (17, 28), (40, 24))  # of the images, in turn
LINES = 10  # of output, at most a hundred steps apart
MEGABYTES, OBJECTS = 24.0, 200  # growth after the warm-up that allocators and caches may have


class AllTogether(nn.Module):
    """One loss of every kind on the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(FEATURES, CLASSES, 1)
        self.edge = nn.Conv2d(FEATURES, 1, 1)
        self.size, self.crf = segloss.SizeKL(), segloss.PottsCRF(sigma_xy=8.0, normalize="pixels")
        self.window = segloss.WindowedPotts(sigma_xy=4.0, radius=2, normalize="pairs")
        self.classify, self.align = segloss.ImportanceClassification(), segloss.FeatureSimilarity(sigma=2.0, window=3)
        self.seeds, self.margin = segloss.PartialCrossEntropy(), segloss.RIBMargin()
        self.affinity, self.paths = segloss.AffinityLoss(radius=3.0), segloss.PathAffinityLoss(radius=3.0)
        self.ood = segloss.OODClusters(torch.randn(CLASSES, FEATURES), torch.randn(5, FEATURES))

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        logits, pooled = self.head(features), features.mean((2, 3))
        tags = (torch.rand(BATCH, CLASSES) < 0.5).float()
        labels = torch.randint(CLASSES, (BATCH, *image.shape[2:])).masked_fill(torch.rand(image[:, 0].shape) < 0.8, 255)
        return (
            self.size(logits, torch.rand(BATCH, CLASSES).softmax(1))
            + self.crf(logits, image)
            + self.window(logits, image)
            + self.classify(logits, tags)
            + self.align(logits, image, tags)
            + self.seeds(logits, labels)
            + 0.01 * self.margin(logits.mean((2, 3)), tags)
            + self.affinity(features, labels)
            + self.paths(self.edge(features), labels)
            + 0.01 * self.ood(pooled, tags)
        )


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(steps: int, loss: nn.Module | None = None) -> list[str]:
    """Trains for so many steps, at least 5, and says what has grown since the first fifth of them."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, FEATURES, 3, padding=1), nn.ReLU(), nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
    network = nn.Sequential(*layers)
    loss = AllTogether() if loss is None else loss
    optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], lr=1e-3)
    warm = (0.0, 0)
    for step in range(1, steps + 1):
        image = torch.rand(BATCH, 3, *SIZES[step % len(SIZES)])
        value = loss(network(image), image)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        report = step % max(1, min(200, steps // LINES)) == 0
        if report or step == steps // 5:
            gc.collect()
            now = (resident_megabytes(), len(gc.get_objects()))
            if step == steps // 5:
                warm = now
            if report:
                print(f"step {step}: loss {value.item():.4f}, {now[0]:.1f} MB, {now[1]} objects", flush=True)
    grown = []
    if now[0] - warm[0] > MEGABYTES:
        grown.append(f"resident memory grew from {warm[0]:.1f} to {now[0]:.1f} MB")
    if now[1] - warm[1] > OBJECTS:
        grown.append(f"the number of objects grew from {warm[1]} to {now[1]}")
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains with all losses together and watches the memory.")
    parser.add_argument("--steps", type=int, default=2000, help="training steps, at least 10")
    steps = parser.parse_args().steps
    if steps < 10:
        parser.error(f"--steps: expected at least 10, got {steps}")
    grown = soak(steps)
    if grown:
        sys.exit("; ".join(grown))
    print(f"no growth in {steps} steps")


if __name__ == "__main__":
    main()
