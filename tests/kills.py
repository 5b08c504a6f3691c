"""Kills trainings, between checkpoints and while one is written, and lets them go on: ``python -m tests.kills 20``.

Each must end with the same weights, optimizer, random numbers and curve, bit by bit, as the one that nobody killed.
"""

import multiprocessing
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data.sample import Batch, Sample, Stacked
from engine import storage, training
from torch import Tensor, nn

STEPS, SAVE_EVERY, LOG = 40, 6, "log"
IMAGES, BATCH_SIZE = 79, 4  # two epochs and a bit; a batch across the end of each
Context = multiprocessing.get_context("fork")  # a training starts at once: everything is imported already


class Network(nn.Module):
    """Dropout and batch normalisation, and weights that take a while to write."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0.2))
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(1024, 2048), nn.Dropout(0.5))
        self.head = nn.Conv2d(16, 3, 1)
        self.prior = nn.Linear(2048, 3)

    def forward(self, image: Tensor) -> Tensor:
        features = self.features(image)
        return F.interpolate(self.head(features) + self.prior(self.context(features))[:, :, None, None], scale_factor=2)


def noisy(sample: Sample, rng: np.random.Generator) -> Sample:
    return sample | {"image": sample["image"] + 0.1 * torch.from_numpy(rng.standard_normal((3, 16, 16))).float()}


def train(out: Path, steps_done: Any) -> None:
    """A training with all that has a state; goes on where the last one in its folder stopped."""
    out.mkdir(exist_ok=True)
    sys.stderr = open(out / LOG, "a")  # noqa: SIM115  (until the process is killed)
    training.seed_everything(0)
    image = torch.rand(IMAGES, 3, 16, 16)
    data = Stacked(("a", "b", "c"), image, (image[:, 0] * 3).long().clamp(max=2))
    options = training.Options(
        batch_size=BATCH_SIZE, accumulate=2, workers=1, save_every=SAVE_EVERY, device="cpu", out=out, resume=True
    )
    model = Network()

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        steps_done.value += 0.5
        return F.cross_entropy(logits, batch["labels"])

    training.train(
        model,
        loss,
        options.stream(data, noisy),
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        steps=STEPS,
        name="training",
        options=options,
        evaluate=lambda model: training.evaluate(model, data),
        evaluations=3,
    )


def start(out: Path) -> tuple[BaseProcess, Any]:
    """A training in a process of its own, and the number of steps that it has done since."""
    steps_done = Context.Value("d", 0.0)
    process = Context.Process(target=train, args=(out, steps_done))
    process.start()
    return process, steps_done


def finish(out: Path) -> dict[str, Any]:
    """Trains to the end and returns the state there."""
    process, _ = start(out)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the training ended with {process.exitcode}: {(out / LOG).read_text()}")
    state = storage.load(out / "checkpoints" / "training.pt")
    del state["progress"]["seconds"]
    return state


def kill_between(out: Path, rng: Random) -> str:
    """Kills a training within a step, at any time from its first to its last."""
    process, steps_done = start(out)
    end = rng.uniform(0, STEPS - 1)
    while steps_done.value < end and process.is_alive():
        time.sleep(1e-4)
    time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.join()
    return f"in step {steps_done.value + 1:.0f}"


def kill_while_writing(out: Path, rng: Random) -> str:
    """Kills a training while it writes one of its checkpoints: what it has written is left behind, half."""
    partial = out / "checkpoints" / f"training.pt{storage.PARTIAL}"
    while True:
        process, steps_done = start(out)
        end = rng.uniform(0, STEPS - SAVE_EVERY)
        while (steps_done.value < end or not partial.exists()) and process.is_alive():
            pass
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.join()
        if process.exitcode == 0:
            raise SystemExit("the training ended before it could be killed")
        if partial.exists():
            return f"after {steps_done.value:.0f} steps, {partial.stat().st_size} bytes into a checkpoint"


def same(one: Any, other: Any) -> bool:
    """Equality bit by bit of what checkpoints hold."""
    if isinstance(one, Tensor):
        return torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if one.ndim else bool(one == other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def trial(number: int, out: Path, expected: dict[str, Any]) -> tuple[str, bool]:
    """Kills one training, every second one while it writes; says when, and whether it ended as expected."""
    moment = (kill_while_writing if number % 2 else kill_between)(out, Random(number))
    return moment, same(finish(out), expected)


def main(trials: int) -> None:
    torch.set_num_threads(1)  # forked processes cannot use the threads of their parent
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        expected = finish(Path(folder, "whole"))
        for number in range(trials):
            moment, good = trial(number, Path(folder, str(number)), expected)
            equal += good
            print(f"kill {number + 1}: {moment}; {'equal' if good else 'DIFFERENT'} weights in the end", flush=True)
    print(f"{equal} of {trials} killed trainings ended with equal weights")
    sys.exit(equal < trials)


if __name__ == "__main__":
    main(int(sys.argv[1]))
