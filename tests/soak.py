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
    """Every loss on the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.edge = nn.Conv2d(FEATURES, CLASSES, 1), nn.Conv2d(FEATURES, 1, 1)
        self.bounds, self.balance = segloss.SizeBarrier(lower=0.1, upper=0.4), segloss.BalanceKL()
        # By what they take beside the logits of the classes.
        self.of_sizes = nn.ModuleList([segloss.SizeKL(), segloss.ReverseSizeKL()])
        self.of_tags = nn.ModuleList(
            [
                segloss.LogBarrier(),
                segloss.FlatBarrier(floor=0.1),
                segloss.Suppression(),
                segloss.ImportanceSampling(),
                segloss.ImportanceClassification(),
            ]
        )
        self.of_images = nn.ModuleList(
            [
                segloss.PottsCRF(sigma_xy=8.0, normalize="pixels"),
                segloss.WindowedPotts(sigma_xy=4.0, radius=2, normalize="pairs"),
                segloss.GridPotts(),
                segloss.FeatureSimilarity(sigma=2.0, window=3),
            ]
        )
        self.of_seeds, self.grown = segloss.PartialCrossEntropy(), segloss.BalancedSeeding()
        self.boundary, self.constraint = segloss.BoundaryLoss(), segloss.BoundaryConstraint()
        self.centroids, self.margin = segloss.CentroidLoss(), segloss.RIBMargin()
        self.affinity, self.paths = segloss.AffinityLoss(radius=3.0), segloss.PathAffinityLoss(radius=3.0)
        self.ood = segloss.OODClusters(torch.randn(CLASSES, FEATURES), torch.randn(5, FEATURES))

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        logits = self.head(features)
        tags, sizes = (torch.rand(BATCH, CLASSES) < 0.5).float(), torch.rand(BATCH, CLASSES).softmax(1)
        labels = torch.randint(CLASSES, (BATCH, *image.shape[2:]))
        seeds = labels.masked_fill(torch.rand(labels.shape) < 0.8, 255)
        centroids, _ = segloss.centroids_from_labels(labels, CLASSES)
        values = [
            self.bounds(logits),
            self.balance(logits.mean((2, 3))),
            *(loss(logits, sizes) for loss in self.of_sizes),
            *(loss(logits, tags) for loss in self.of_tags),
            *(loss(logits, image) for loss in self.of_images),
            self.of_seeds(logits, seeds),
            self.grown(logits, torch.rand(logits.shape) < 0.1),
            self.boundary(logits, segloss.signed_distances(labels, CLASSES)),
            self.constraint(logits, torch.rand(logits.shape).softmax(1)),
            1e-3 * self.centroids(logits, centroids),
            0.01 * self.margin(logits.mean((2, 3)), tags),
            self.affinity(features, seeds),
            self.paths(self.edge(features), seeds),
            0.01 * self.ood(features.mean((2, 3)), tags),
        ]
        return torch.stack(values).sum()


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(steps: int, loss: nn.Module | None = None) -> list[str]:
    """Trains for so many steps, at least 5, and says what has grown since the first fifth of them."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, FEATURES, 3, padding=1), nn.ReLU(), nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
    network = nn.Sequential(*layers)
    loss = AllTogether() if loss is None else loss
    parameters = [*network.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    warm = (0.0, 0)
    for step in range(1, steps + 1):
        image = torch.rand(BATCH, 3, *SIZES[step % len(SIZES)])
        value = loss(network(image), image)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
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
