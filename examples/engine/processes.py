"""One process, or several that ``torchrun`` has started and that share the work."""

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Device = Literal["auto", "cpu", "cuda"]
Value = TypeVar("Value")


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(name: Device) -> torch.device:
    """The device of that name; ``"auto"`` is the GPU when there is one. Each process of a machine has its own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: PyTorch sees no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if place >= torch.cuda.device_count():
        raise SystemExit(f"error: expected at most a process for each of {torch.cuda.device_count()} GPUs, got more")
    return torch.device("cuda", place)


@contextlib.contextmanager
def joined(device: Device) -> Iterator[None]:
    """Within it the processes can talk to each other: by NCCL on GPUs, by Gloo on CPUs."""
    place = pick_device(device)  # a GPU that is not there stops the program before it has done anything
    if count() == 1:
        yield
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # Who is done first may wait for long: for the last image of a data set, say.
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(days=1))
    yield
    # Threads of Gloo need Python to drop their last tensors; torch 2.7 holds on to it while it destroys the group, and
    # waited for them without end in half of the runs. Later versions let go.
    time.sleep(0.1)
    dist.destroy_process_group()  # not after an exception: the others may never come


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over the processes."""
    if count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def gather(value: Value) -> list[Value]:
    """What each of the processes has."""
    if count() == 1:
        return [value]
    values: list[Value] = [value] * count()
    dist.all_gather_object(values, value)
    return values


def same_buffers(model: torch.nn.Module) -> None:
    """Gives all processes the buffers of the first; those of batch normalisation differ between them."""
    if count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def say(text: str) -> None:
    """Prints, once."""
    if rank() == 0:
        print(text, flush=True)
