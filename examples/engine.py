"""The training engine that the examples share: command line, device, seeds, batches, training and evaluation."""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torchvision_cpu  # noqa: F401  (before torchmetrics, which imports torchvision)
import tyro
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from tqdm import tqdm

Config = TypeVar("Config")
Batch = dict[str, Tensor]  # named tensors with one entry per image: "image" [B, 3, H, W], "labels" [B, H, W], ...


def parse(config: type[Config], args: Sequence[str] | None = None) -> Config:
    """The command line as a configuration dataclass; a wrong option ends the program with one line on stderr.

    Args:
        config: a dataclass whose fields have defaults and docstrings; its ``__post_init__`` may raise ``ValueError``.
        args: arguments instead of those of the command line.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(config, args=args)
    except SystemExit as end:
        if end.code:
            lines = [line.strip("│╰╯ ") for line in messages.getvalue().splitlines()[1:]]  # without the title
            while not lines[0].strip("─-"):
                lines.pop(0)
            message = itertools.takewhile(lambda line: line.strip("─-"), lines)  # hints follow below a rule
            print(f"error: {' '.join(message)} (see --help)", file=sys.stderr)
        raise


def check_least(config: object, **bounds: int) -> None:
    """Raises ``ValueError`` for the first field of a configuration that is below its bound."""
    for name, bound in bounds.items():
        if getattr(config, name) < bound:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {bound}, got {getattr(config, name)}")


def output_folder(path: Path) -> Path:
    """Makes a folder that can be written to, or ends the program with one line on stderr."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise SystemExit(f"error: cannot write to {path}: {error.strerror}") from None
    return path


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that name; ``"auto"`` is the GPU when there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: PyTorch sees no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def seed_everything(seed: int) -> None:
    """Same seed, same numbers, on the same machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def draw_batches(data: Batch, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Random batches without end, drawn with replacement; half of the images are mirrored, maps along with them.

    Tensors of three or more dimensions count as maps ``[N, ..., H, W]``; what has fewer, such as tags and sizes, does
    not change when an image is mirrored.
    """
    count = len(data["image"])
    while True:
        index = torch.randint(count, (batch_size,), generator=generator).to(data["image"].device)
        mirror = (torch.rand(batch_size, generator=generator) < 0.5).to(index.device)
        batch = {}
        for name, values in data.items():
            drawn = values[index]
            if drawn.ndim >= 3:
                drawn[mirror] = drawn[mirror].flip(-1)
            batch[name] = drawn
        yield batch


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Batch], Tensor],
    batches: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    name: str,
    evaluate: Callable[[nn.Module], Tensor] | None = None,
    checkpoints: int = 10,
) -> list[tuple[int, float]]:
    """AdamW with a polynomial schedule (power 0.9); the progress bar shows the running loss and the last evaluation.

    Args:
        model: trained in place.
        loss: from the logits of a batch, and the batch, to a scalar.
        batches: at least ``steps`` of them.
        steps: optimizer steps.
        lr: learning rate of the first step.
        name: what the progress bar is called.
        evaluate: from the model to the IoU of its classes; called ``checkpoints`` times.
        checkpoints: evenly spaced over the training, the last one at its end.

    Returns:
        The training curve: (step, mIoU) pairs.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
    curve: list[tuple[int, float]] = []
    due = {steps * (i + 1) // checkpoints for i in range(checkpoints)} if evaluate else set()
    running = torch.zeros(())
    model.train()
    with tqdm(total=steps, desc=f"{name:>13}", unit="step") as bar:
        for step in range(1, steps + 1):
            batch = next(batches)
            value = loss(model(batch["image"]), batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            running = value.detach() if step == 1 else 0.95 * running + 0.05 * value.detach()
            if evaluate and step in due:
                curve.append((step, evaluate(model).mean().item()))
                model.train()
            if step % 10 == 0 or step == steps:  # reading the loss makes a GPU wait
                shown = {"mIoU": f"{curve[-1][1]:.3f}"} if curve else {}
                bar.set_postfix({"loss": f"{running.item():.3f}", **shown}, refresh=False)
            bar.update()
    return curve


@torch.no_grad()
def evaluate(
    model: nn.Module, image: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255, batch_size: int = 50
) -> Tensor:
    """IoU of every class, ``[K]``: intersections and unions are summed over all images before they are divided.

    Args:
        model: from ``[B, 3, H, W]`` to logits ``[B, K, H, W]``.
        image: ``[N, 3, H, W]``.
        labels: ``[N, H, W]``; pixels with ``ignore_index`` do not count.
        num_classes: K.
        ignore_index: label of the pixels left out.
        batch_size: images at once.
    """
    metric = MulticlassJaccardIndex(num_classes, average="none", ignore_index=ignore_index).to(image.device)
    model.eval()
    for x, y in zip(image.split(batch_size), labels.split(batch_size), strict=True):
        metric.update(model(x).argmax(1), y)
    iou: Tensor = metric.compute()
    return iou
