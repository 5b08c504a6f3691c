"""A collection of torchmetrics beside the metrics of this library, over batches and over processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tests.combinations  # noqa: F401  (in the processes, before torchvision)
from segattr.metrics import JAndF
from tests.combinations.rectangles import CLASSES, rectangles

torchmetrics = pytest.importorskip("torchmetrics")

PROCESSES = 2


def batches() -> list[tuple[Tensor, Tensor]]:
    """Logits and labels: the last class is in some batches only, and some pixels are void."""
    labels = rectangles(16, 24, 32).labels
    logits = torch.randn(16, CLASSES, 24, 32, generator=torch.Generator().manual_seed(1))
    logits.scatter_add_(1, labels[:, None], torch.full(labels[:, None].shape, 2.0))
    labels[:, :3] = 255
    return list(zip(logits.split(4), labels.split(4), strict=True))


def both(batches: list[tuple[Tensor, Tensor]]) -> tuple[torchmetrics.MetricCollection, JAndF]:
    settings = {"num_classes": CLASSES, "ignore_index": 255}
    theirs = torchmetrics.MetricCollection(
        {
            "miou": torchmetrics.JaccardIndex(task="multiclass", **settings),
            "iou": torchmetrics.JaccardIndex(task="multiclass", average="none", zero_division=math.nan, **settings),
            "accuracy": torchmetrics.Accuracy(task="multiclass", **settings),
        }
    )
    ours, classes = JAndF(CLASSES), torch.arange(CLASSES).view(CLASSES, 1, 1)
    for logits, labels in batches:
        theirs.update(logits, labels)
        ours.update(logits.argmax(1)[:, None] == classes, labels[:, None] == classes, valid=labels != 255)
    return theirs, ours


def test_the_same_miou_over_batches() -> None:
    theirs, ours = both(batches())
    region = ours.compute()[0]
    torch.testing.assert_close(region, theirs.compute()["iou"])
    torch.testing.assert_close(region.nanmean(), theirs.compute()["miou"])
    assert 0.3 < region.nanmean() < 0.95


def compare(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    theirs, ours = both(batches()[rank::PROCESSES])
    dist.all_reduce(ours.counts)
    torch.save([theirs.compute()["miou"], ours.compute()[0].nanmean()], Path(folder, str(rank)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_same_miou_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare, args=(str(tmp_path),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    expected = both(batches())[1].compute()[0].nanmean()
    for rank in range(PROCESSES):
        for found in torch.load(tmp_path / str(rank)):
            torch.testing.assert_close(found, expected)
