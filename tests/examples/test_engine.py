"""The engine: command line, seeds, batches, schedule and evaluation."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import engine
import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """A configuration."""

    steps: int = 3
    """Number of steps."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")


class Fixed(nn.Module):
    """Gives the one-hot of what the first channel of the image says."""

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.one_hot(image[:, 0].long(), 3).movedim(-1, 1).float()


def test_parse_reads_options() -> None:
    assert engine.parse(Config, []) == Config(3)
    assert engine.parse(Config, ["--steps", "7"]) == Config(7)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--step", "7"], "--step, 7"),
        (["--steps", "x"], "'x'"),
        (["--steps"], "--steps"),
        (["--steps", "-1"], "steps: expected at least 0, got -1"),
        (["stray"], "stray"),
        (["--steps", "1" * 100 + "x"], "1x'"),
    ],
)
def test_parse_ends_with_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        engine.parse(Config, args)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("(see --help)\n")
    assert err.count("\n") == 1
    assert message in err


def test_parse_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        engine.parse(Config, ["--help"])
    assert not end.value.code
    assert "Number of steps." in capsys.readouterr().out


def test_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = engine.output_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_an_unwritable_output_folder_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: cannot write to .*file/folder: Not a directory$"):
        engine.output_folder(tmp_path / "file" / "folder")


def test_device() -> None:
    assert engine.pick_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert engine.pick_device("auto") == engine.pick_device("cuda") == torch.device("cuda")
    else:
        assert engine.pick_device("auto") == torch.device("cpu")
        with pytest.raises(SystemExit, match="PyTorch sees no CUDA device"):
            engine.pick_device("cuda")


def test_batches_mirror_maps_together_and_leave_the_rest() -> None:
    image = torch.arange(24.0).reshape(2, 1, 3, 4)
    data = {"image": image, "labels": image[:, 0].long(), "tags": torch.tensor([[1, 0], [0, 1]])}
    batches = engine.draw_batches(data, 64, torch.Generator().manual_seed(0))
    batch = next(batches)
    seen = set()
    for x, labels, tags in zip(batch["image"], batch["labels"], batch["tags"], strict=True):
        assert torch.equal(x[0].long(), labels)
        index = int(tags[1])
        mirrored = not torch.equal(x, image[index])
        assert torch.equal(x, image[index].flip(-1) if mirrored else image[index])
        seen.add((index, mirrored))
    assert len(seen) == 4
    assert torch.equal(image, torch.arange(24.0).reshape(2, 1, 3, 4)), "the data set itself is not mirrored"


def test_same_seed_same_batches() -> None:
    data = {"image": torch.rand(50, 3, 4, 4)}
    one, other = (engine.draw_batches(data, 8, torch.Generator().manual_seed(5)) for _ in range(2))
    for _ in range(3):
        assert torch.equal(next(one)["image"], next(other)["image"])


def test_the_learning_rate_follows_a_polynomial_of_power_point_nine() -> None:
    """With a gradient of one sign AdamW's first steps move by the learning rate, so that the path shows it."""
    model = nn.Conv2d(1, 2, 1, bias=False)
    nn.init.zeros_(model.weight)
    weights = []

    def loss(logits: Tensor, batch: engine.Batch) -> Tensor:
        weights.append(model.weight.detach().flatten()[0].clone())
        return -logits.sum()

    batches = engine.draw_batches({"image": torch.ones(1, 1, 1, 1)}, 1, torch.Generator())
    engine.train(model, loss, batches, steps=10, lr=1e-3, name="slope")
    moved = torch.stack(weights).diff()
    expected = torch.tensor([1e-3 * (1 - step / 10) ** 0.9 for step in range(9)])
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)


def test_training_learns_and_reports_its_checkpoints() -> None:
    engine.seed_everything(0)
    image = torch.rand(64, 3, 4, 4)
    labels = (image[:, 0] > 0.5).long()
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    curve = engine.train(
        model,
        lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
        engine.draw_batches({"image": image, "labels": labels}, 16, torch.Generator().manual_seed(0)),
        steps=150,
        lr=0.05,
        name="threshold",
        evaluate=lambda model: engine.evaluate(model, image, labels, 2),
        checkpoints=3,
    )
    assert [step for step, _ in curve] == [50, 100, 150]
    assert curve[-1][1] > 0.95


def test_evaluation_sums_over_the_data_set_and_leaves_out_ignored_pixels() -> None:
    predicted = torch.tensor([[[0, 0, 1], [1, 2, 2]], [[0, 0, 0], [0, 1, 2]], [[2, 2, 2], [2, 2, 2]]])
    labels = torch.tensor([[[0, 1, 1], [1, 2, 255]], [[0, 0, 255], [2, 1, 2]], [[255] * 3] * 2])
    image = predicted[:, None].float().expand(-1, 3, -1, -1)
    # Counted pixels: class 0 hits 3 of a union of 5, class 1 hits 3 of 4, class 2 hits 2 of 3.
    expected = torch.tensor([3 / 5, 3 / 4, 2 / 3])
    for batch_size in (1, 2, 50):
        iou = engine.evaluate(Fixed(), image, labels, 3, batch_size=batch_size)
        torch.testing.assert_close(iou, expected)


def test_same_seed_same_weights() -> None:
    weights = []
    for _ in range(2):
        engine.seed_everything(3)
        weights.append(nn.Linear(4, 4).weight)
    assert torch.equal(*weights)


def test_options_below_their_bounds_are_named() -> None:
    config = SimpleNamespace(steps=1, pretrain_steps=-1)
    engine.check_least(config, steps=1)
    with pytest.raises(ValueError, match="--pretrain-steps: expected at least 0, got -1"):
        engine.check_least(config, steps=1, pretrain_steps=0)
