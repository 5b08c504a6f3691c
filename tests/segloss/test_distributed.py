"""Two gloo processes against one: the losses keep the promise that they make, or say that they make none."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.loss_suite import LOSSES, Loss, loss_id

PROCESSES, PER_PROCESS = 2, 2


class Training(nn.Module):
    """A scale and a shift for each channel before the loss, which is part of the model, as its buffers want."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        shape = (loss.shape[1], *[1] * (len(loss.shape) - 2))
        self.scale, self.shift = (nn.Parameter(values) for values in (torch.ones(shape), torch.zeros(shape)))
        self.loss = loss.module(**loss.settings)

    def forward(self, first: Tensor, inputs: dict[str, Any]) -> Tensor:
        return self.loss(first * self.scale + self.shift, **inputs)


def gradients(model: nn.Module, first: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    model(first, inputs).backward()
    return torch.stack([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    differences = {}
    for loss in LOSSES:
        torch.manual_seed(0)
        first = loss.example(PROCESSES * PER_PROCESS)
        first[PER_PROCESS:] *= 3  # unlike parts, so that a statistic of the whole batch shows
        inputs = loss.inputs(first)
        expected = gradients(Training(loss), first, inputs)
        own = slice(rank * PER_PROCESS, (rank + 1) * PER_PROCESS)
        shared = DistributedDataParallel(Training(loss))
        found = gradients(shared, first[own], {name: value[own] for name, value in inputs.items()})
        differences[loss_id(loss)] = ((found - expected).norm() / expected.norm()).item()
    if rank == 0:
        torch.save(differences, Path(folder, "differences"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_unless_the_docstring_says_that_they_do_not(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare, args=(str(tmp_path),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    differences = torch.load(tmp_path / "differences")
    for loss in LOSSES:
        if loss.of_the_batch:
            assert differences[loss_id(loss)] > 1e-3, loss_id(loss)
            assert "each process" in (loss.function.__doc__ or ""), loss_id(loss)
        else:
            assert differences[loss_id(loss)] < 1e-5, loss_id(loss)
