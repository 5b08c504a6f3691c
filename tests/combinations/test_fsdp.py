"""Two processes, whose weights are whole (DDP) or shared out (FSDP2), against one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segloss import PottsCRF, SizeKL
from tests.combinations.rectangles import Batch, rectangles, small_network

PROCESSES = 2


def sharded(model: nn.Sequential) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer)
    return fully_shard(model)


def trained(model: nn.Module, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """Losses of the steps, and weights."""
    size_loss, crf_loss = SizeKL(), PottsCRF(scale_factor=0.5, normalize="pixels")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    values = []
    for _ in range(5):
        logits = model(batch.image)
        loss = size_loss(logits, batch.sizes) + 1e-3 * crf_loss(logits, batch.image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    whole = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    return values, torch.cat([weight.detach().flatten() for weight in whole])


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    own = Batch(*(part.chunk(PROCESSES)[rank] for part in rectangles(8, 24, 32)))
    results = []
    for wrap in (DistributedDataParallel, sharded):
        values, weights = trained(wrap(small_network()), own)
        for value in values:
            dist.all_reduce(value)
        results.append((torch.stack(values) / PROCESSES, weights))
    if rank == 0:
        torch.save(results, Path(folder, "results"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train, args=(str(tmp_path),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    values, weights = trained(small_network(), rectangles(8, 24, 32))
    assert values[-1] < 0.9 * values[0]
    for found, found_weights in torch.load(tmp_path / "results"):
        torch.testing.assert_close(found, torch.stack(values), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found_weights, weights, rtol=1e-4, atol=1e-5)
