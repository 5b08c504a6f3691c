"""The training engine that the examples share: mixed precision, several processes, checkpoints, evaluation."""

import contextlib
import dataclasses
import hashlib
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from data.sample import VOID, Batch, Images
from data.stream import Augment, Prepared, Stream, loader
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from engine import processes
from engine.checkpoint import Checkpoint
from engine.command import check_least, output_folder
from engine.storage import StorageError
from segattr.networks import evaluating

Loss = Callable[[Any, Batch], Tensor]  # from the output of a model for a batch's images, and the batch, to a scalar
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Options:
    """What every training can be told on the command line."""

    seed: int = 0
    """Seed of the weights, of the order of the images and of their augmentation."""
    batch_size: int = 16
    """Images of an optimizer step, of all processes together."""
    accumulate: int = 1
    """Batches that each process makes of its share of a step, one after the other, to save memory."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Mixed precision: fp16 with a gradient scaler, or bf16."""
    device: processes.Device = "auto"
    """Where to train; auto is the GPU when there is one. Several: torchrun --nproc-per-node N examples/..."""
    workers: int = 0
    """Processes that read images beside each training process."""
    save_every: int = 100
    """Optimizer steps between checkpoints."""
    resume: bool = False
    """Go on with the stopped run in --out; weights on CPU become the same as without the stop."""
    tensorboard: bool = False
    """Write a TensorBoard log into --out."""
    out: Path = Path("runs/example")
    """Folder of the results and checkpoints."""

    def __post_init__(self) -> None:
        check_least(self, seed=0, batch_size=1, accumulate=1, workers=0, save_every=1)
        shares = processes.count() * self.accumulate
        if self.batch_size % shares:
            raise ValueError(
                f"--batch-size: expected a multiple of {shares} (processes x --accumulate), got {self.batch_size}"
            )

    def stream(self, data: Images, augment: Augment | None = None) -> Stream:
        """Batches of images in the order of the seed."""
        return Stream(data, augment, self.batch_size, self.seed, self.accumulate, self.workers)


# Options that do not change what is computed: a run may go on with other ones.
FREE = ("device", "workers", "save_every", "resume", "tensorboard", "out", "repeats")


@dataclasses.dataclass
class Progress:
    """How far a training is."""

    step: int = 0  # optimizer steps done
    loss: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))  # running mean
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # step, mIoU
    seconds: float = 0.0  # of training and evaluation, those before a stop included


def start(options: Options, *results: str) -> Path:
    """Makes the folder of a run, without what an earlier one left unless it goes on; seeds everything.

    Args:
        options: of the command line.
        results: names of folders in it, beside that of the checkpoints.
    """
    folder = output_folder(options.out)
    if not options.resume and processes.rank() == 0:
        for path in (folder / "checkpoints").glob("*.pt"):
            path.unlink()
        for name in results:
            shutil.rmtree(folder / name, ignore_errors=True)
    processes.gather(None)  # nobody begins before
    seed_everything(options.seed)
    return folder


def seed_everything(seed: int) -> None:
    """Same seed, same numbers, on the same machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # All memory is written before it is read; the module has the attribute through a class of its own.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the global one, for the user's code)
    torch.manual_seed(seed)


def train(
    model: nn.Module,
    loss: Loss,
    batches: Stream,
    optimizer: Optimizer,
    *,
    steps: int,
    name: str,
    options: Options,
    counts: Mapping[str, Callable[[Batch], Tensor]] | None = None,
    evaluate: Callable[[nn.Module], Tensor] | None = None,
    evaluations: int = 10,
    further: Mapping[str, Any] | None = None,
) -> Progress:
    """Trains with a polynomial schedule (power 0.9); the progress bar shows the running loss and the last evaluation.

    Started by ``torchrun``, each process takes its share of every batch and gradients are averaged. A loss that is a
    mean over images is then the same as in one process. One that is a mean over something else, such as labelled
    pixels, is a sum divided by ``batch[count]``, where ``counts`` says how to count: what is counted in all batches of
    the step, in all processes, divided by the number of these batches.

    A checkpoint is written to ``options.out`` every so many steps and at the end. With ``options.resume`` the
    training goes on from it: on CPU to the same weights, bit by bit, as without the stop.

    Args:
        model: trained in place, on the device where it is; its modules stay in the modes (training or evaluation) in
            which they are, so that normalisation can be frozen.
        loss: from the output of the model for ``batch["image"]``, and the batch, to a scalar.
        batches: of the training.
        optimizer: of the parameters of the model; its learning rates are those of the first step.
        steps: optimizer steps.
        name: of the checkpoint and of the progress bar.
        options: of the command line.
        counts: what sums are divided by, scalars, by the name that they get in the batch; see above.
        evaluate: from the model to the IoU of its classes; called ``evaluations`` times, the last one at the end.
        evaluations: evenly spaced over the training.
        further: what else has a state and goes on with the training, by name.

    Raises:
        StorageError: a checkpoint that cannot be written, or read, or that was written with other options.
        FloatingPointError: a loss, or weights at a checkpoint, that are not finite.
    """
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")  # its gradients have a small range
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    settings = {key: str(value) for key, value in vars(options).items() if key not in FREE}
    files = {key: value for key, value in vars(options).items() if isinstance(value, Path) and value.is_file()}
    settings |= {f"content of {key}": hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()}
    checkpoint = Checkpoint(
        options.out / "checkpoints" / f"{_file_name(name)}.pt",
        settings | {f"steps of {name}": str(steps)},
        {"model": model, "optimizer": optimizer, "scaler": scaler, **(further or {})},
    )
    if processes.rank():
        _seed(options.seed + 1_000_003 * processes.rank())  # its own dropout
    progress = _restored(checkpoint) if options.resume else Progress()
    # Looking for parameters without gradient also keeps the order of sums, which a resumed training would change.
    parallel = DistributedDataParallel(model, find_unused_parameters=True) if processes.count() > 1 else model
    due = {steps * (i + 1) // evaluations for i in range(evaluations)} if evaluate else set()
    began = time.perf_counter() - progress.seconds
    bar = tqdm(
        total=steps,
        initial=progress.step,
        desc=f"{name:>13}",
        unit="step",
        disable=processes.rank() > 0,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file is not filled with bars
    )
    with bar, _log(options, name, progress.step) as log:
        for parts in batches.steps(progress.step, steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - progress.step / steps) ** 0.9
            parts = [_to(device, batch) for batch in parts]
            _share_counts(parts, counts or {})
            value = _descend(parallel, loss, parts, optimizer, scaler, PRECISIONS[options.precision])
            progress.step += 1
            progress.loss = value if progress.step == 1 else 0.95 * progress.loss + 0.05 * value
            if evaluate and progress.step in due:
                processes.same_buffers(model)
                progress.curve.append((progress.step, evaluate(model).nanmean().item()))
                log(progress.step, mIoU=progress.curve[-1][1])
            saved = progress.step % options.save_every == 0 or progress.step == steps
            if progress.step % 10 == 0 or saved:  # reading the loss makes a GPU wait
                shown = progress.loss.item()
                if not math.isfinite(shown):
                    raise FloatingPointError(f"{name}: the loss is {shown} after {progress.step} of {steps} steps")
                log(progress.step, loss=shown, lr=optimizer.param_groups[0]["lr"])
                miou = {"mIoU": f"{progress.curve[-1][1]:.3f}"} if progress.curve else {}
                bar.set_postfix({"loss": f"{shown:.3f}", **miou}, refresh=False)
            if saved:
                if not all(parameter.isfinite().all() for parameter in model.parameters()):
                    raise FloatingPointError(f"{name}: weights are not finite after {progress.step} of {steps} steps")
                processes.same_buffers(model)
                progress.seconds = time.perf_counter() - began
                checkpoint.save(vars(progress))
            bar.update()
    return progress


def _restored(checkpoint: Checkpoint) -> Progress:
    """Where the training goes on: at its beginning if there is no checkpoint."""
    found = checkpoint.restore() or {}
    try:
        return Progress(**found)
    except TypeError as error:
        raise StorageError(f"cannot resume: {checkpoint.path} is of something else: {error}") from error


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def _to(device: torch.device, batch: Batch) -> Batch:
    def move(values: Any) -> Any:
        return [move(v) for v in values] if isinstance(values, list) else values.to(device, non_blocking=True)

    return {name: move(values) for name, values in batch.items()}


def _share_counts(parts: list[Batch], counts: Mapping[str, Callable[[Batch], Tensor]]) -> None:
    """Adds to each batch of a step what all of them have, in all processes, divided by their number."""
    for name, count in counts.items():
        total = processes.total(torch.stack([count(batch) for batch in parts]).sum())
        mean = total.clamp(min=1) / (processes.count() * len(parts))  # what is divided by it is 0 where nothing counts
        for batch in parts:
            batch[name] = mean


def _descend(
    model: nn.Module,
    loss: Loss,
    parts: list[Batch],
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    precision: torch.dtype,
) -> Tensor:
    """One optimizer step; returns the mean of the loss over the batches of the step, in all processes."""
    optimizer.zero_grad()
    values = []
    for i, batch in enumerate(parts):
        # Gradients travel between processes with the last batch only.
        alone = isinstance(model, DistributedDataParallel) and i < len(parts) - 1
        with cast(DistributedDataParallel, model).no_sync() if alone else contextlib.nullcontext():
            with torch.autocast(batch["image"].device.type, precision, enabled=precision != torch.float32):
                value = loss(model(batch["image"]), batch) / len(parts)
            scaler.scale(value).backward()
        values.append(value.detach())
    scaler.step(optimizer)
    scaler.update()
    return processes.total(torch.stack(values).sum()) / processes.count()


@contextlib.contextmanager
def _log(options: Options, name: str, step: int) -> Iterator[Callable[..., None]]:
    """Writes scalars for TensorBoard, if asked to; a resumed log goes on from its step."""
    if not options.tensorboard or processes.rank():
        yield lambda step, **scalars: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit("error: --tensorboard: expected the package tensorboard to be installed") from None

    def log(step: int, **scalars: float) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)

    with SummaryWriter(options.out / "tensorboard" / _file_name(name), purge_step=step + 1) as writer:
        yield log


def share(data: Images, augment: Augment | None, batch_size: int, workers: int) -> Iterable[Batch]:
    """This process's share of the images of a data set, in batches."""
    own = [(0, i) for i in range(processes.rank(), len(data), processes.count())]
    batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    return loader(Prepared(data, augment), batches, workers)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Images, *, augment: Augment | None = None, batch_size: int = 50, workers: int = 0
) -> Tensor:
    """IoU of every class, ``[K]``: intersections and unions are summed over all images before they are divided.

    NaN for a class that is neither in the labels nor in the predictions: leave it out of the mean by ``nanmean``.
    Several processes share the images. The modes of the modules of the model are as before in the end.

    Args:
        model: from ``[B, 3, H, W]`` to logits ``[B, K, H, W]``.
        data: images with labels; void pixels do not count.
        augment: brings images to one size, as batches need it.
        batch_size: images at once, in one process.
        workers: processes that read images.
    """
    device, count = next(model.parameters()).device, len(data.classes)
    pairs = torch.zeros(count * count, dtype=torch.int64, device=device)  # pixels by truth and prediction
    with evaluating(model):
        for batch in share(data, augment, batch_size, workers):
            found, labels = model(batch["image"].to(device)).argmax(1), batch["labels"].to(device)
            labelled = labels != VOID
            pairs += torch.bincount(labels[labelled] * count + found[labelled], minlength=count * count)
    table = processes.total(pairs).view(count, count).double()
    return table.diag() / (table.sum(0) + table.sum(1) - table.diag())
