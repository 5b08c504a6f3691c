"""A module of Lightning with two losses: mixed precision, two processes, a checkpoint from which training goes on."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from segloss import PottsCRF, SizeKL
from tests.combinations.rectangles import rectangles, small_network

lightning = pytest.importorskip("lightning")

# Lightning's own: of deprecated parts of torch, and of data loaders without workers.
pytestmark = pytest.mark.filterwarnings("ignore")
PROCESSES = 2


class Segmentation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()
        self.size_loss, self.crf_loss = SizeKL(), PottsCRF(scale_factor=0.5, normalize="pixels")
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        image, sizes = batch
        logits = self.network(image)
        loss = self.size_loss(logits, sizes) + 1e-3 * self.crf_loss(logits, image)
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(module: Segmentation, epochs: int, start: Path | None = None, **settings: Any) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet, **settings)
    batch = rectangles(16, 24, 32)
    trainer.fit(module, DataLoader(TensorDataset(batch.image, batch.sizes), 4, shuffle=True), ckpt_path=start)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_loss_falls_and_is_in_single_precision(precision: str) -> None:
    module = Segmentation()
    fit(module, 8, devices=1, precision=precision)
    assert sum(module.losses[-4:]) < 0.5 * sum(module.losses[:4])
    assert module.crf_loss(torch.zeros(1, 2, 8, 8, dtype=torch.bfloat16), torch.rand(1, 3, 8, 8)).dtype == torch.float32


def test_under_autocast_the_losses_are_those_of_the_logits_outside_of_it() -> None:
    image, _, sizes = rectangles(4, 24, 32)
    module = Segmentation()
    with lightning.pytorch.plugins.MixedPrecision("bf16-mixed", "cpu").forward_context():
        logits = module.network(image)
        loss = module.size_loss(logits, sizes) + 1e-3 * module.crf_loss(logits, image)
    assert logits.dtype == torch.bfloat16
    (found,) = torch.autograd.grad(loss, logits)
    alone = logits.detach().float().requires_grad_()
    size = torch.autograd.grad(module.size_loss(alone, sizes), alone)[0]
    crf = torch.autograd.grad(module.crf_loss(alone, image), alone)[0]
    torch.testing.assert_close(found.float(), size + 1e-3 * crf, rtol=2**-7, atol=1e-7)


def train(rank: int, port: int, folder: Path) -> None:
    """One of the processes that torchrun would start."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    settings = {"strategy": "ddp", "devices": PROCESSES, "precision": "bf16-mixed"}

    whole = Segmentation()
    fit(whole, 6, **settings)
    fit(Segmentation(), 3, **settings).save_checkpoint(folder / "half.ckpt")
    resumed = Segmentation()
    fit(resumed, 6, folder / "half.ckpt", **settings)
    torch.save(
        {"whole": whole.state_dict(), "resumed": resumed.state_dict(), "losses": whole.losses}, folder / f"{rank}"
    )


@pytest.mark.slow
def test_two_processes_end_alike_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, args=(port, tmp_path), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(PROCESSES))
    for name, weights in first["whole"].items():
        assert torch.equal(weights, first["resumed"][name]), name
        assert torch.equal(weights, second["whole"][name]), name
    assert first["losses"] != second["losses"]  # each has its part of the images
    assert sum(first["losses"][-2:]) < 0.7 * sum(first["losses"][:2])
