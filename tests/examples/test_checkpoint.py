"""Checkpoints: a training goes on with all of its state, or says why it cannot."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import storage
from engine.checkpoint import Checkpoint, random_state, restore_random_state
from engine.storage import PARTIAL, StorageError
from torch import nn

from tests.kills import same

SETTINGS = {"seed": "1", "precision": "fp32"}
PROGRESS = {"step": 3, "loss": torch.tensor(0.25), "curve": [(3, 0.5)], "seconds": 1.5}


def draw() -> list[float]:
    """Random numbers of all generators; normal ones come in pairs, of which the second one is kept for later."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),  # noqa: NPY002
        np.random.randn(),  # noqa: NPY002
        torch.rand(()).item(),
        torch.randn(()).item(),
    ]


def parts() -> dict[str, Any]:
    """A model, and an optimizer and a scaler in the middle of a training."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "scaler": torch.amp.GradScaler("cpu", init_scale=torch.rand(1).item()),
    }


def states(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "training.pt", SETTINGS, parts())
    checkpoint.save(PROGRESS)
    return checkpoint


def other(saved: Checkpoint, **settings: str) -> Checkpoint:
    """The same file for parts with other weights."""
    return Checkpoint(saved.path, SETTINGS | settings, parts())


@pytest.mark.parametrize("drawn", range(3))
def test_random_numbers_go_on_where_they_were(drawn: int, tmp_path: Path) -> None:
    for _ in range(drawn):
        draw()
    storage.save(tmp_path / "random.pt", random_state())
    expected = draw() + draw()
    assert draw() + draw() != expected
    restore_random_state(storage.load(tmp_path / "random.pt"))
    assert draw() + draw() == expected


def test_a_restored_training_has_the_same_state(saved: Checkpoint) -> None:
    expected = draw()
    checkpoint = other(saved)
    assert not same(states(checkpoint.parts), states(saved.parts))
    assert same(checkpoint.restore(), PROGRESS)
    assert draw() == expected
    assert same(states(checkpoint.parts), states(saved.parts))


class Versioned(nn.Linear):
    """Reads weights by the version of the module that wrote them, as some of torchvision's do."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_learn_the_version_of_their_weights(tmp_path: Path) -> None:
    model, restored = Versioned(2, 2), Versioned(2, 2)
    Checkpoint(tmp_path / "training.pt", SETTINGS, {"model": model}).save(PROGRESS)
    Checkpoint(tmp_path / "training.pt", SETTINGS, {"model": restored}).restore()
    assert torch.equal(restored.weight, model.weight)


def test_a_learning_rate_of_numpy_is_read_again(tmp_path: Path) -> None:
    def optimizer(rate: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=rate)

    Checkpoint(tmp_path / "training.pt", SETTINGS, {"optimizer": optimizer(np.float64(0.25))}).save(PROGRESS)
    restored = optimizer(1.0)
    Checkpoint(tmp_path / "training.pt", SETTINGS, {"optimizer": restored}).restore()
    assert restored.param_groups[0]["lr"] == 0.25


def test_the_checkpoint_of_another_model_is_refused_with_one_line(saved: Checkpoint) -> None:
    with pytest.raises(StorageError, match=f"^cannot resume: {saved.path} ") as error:
        Checkpoint(saved.path, SETTINGS, parts() | {"model": nn.Linear(5, 5)}).restore()
    assert "\n" not in str(error.value)


def test_without_a_file_there_is_nothing_to_restore(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "training.pt", SETTINGS, parts())
    before, numbers = {name: {**state} for name, state in states(checkpoint.parts).items()}, random_state()
    assert checkpoint.restore() is None
    assert same(states(checkpoint.parts), before)
    assert same(random_state(), numbers)
    assert not list(tmp_path.iterdir())


def test_saving_draws_no_random_numbers(saved: Checkpoint) -> None:
    numbers = random_state()
    saved.save(PROGRESS)
    assert same(random_state(), numbers)


def test_each_checkpoint_takes_the_place_of_the_one_before(saved: Checkpoint) -> None:
    saved.save(PROGRESS | {"step": 4})
    assert [path.name for path in saved.path.parent.iterdir()] == ["training.pt"]
    progress = other(saved).restore()
    assert progress is not None
    assert progress["step"] == 4


def test_other_settings_are_named_and_nothing_is_restored(saved: Checkpoint) -> None:
    checkpoint, numbers = other(saved, seed="2"), random_state()
    before = {name: value.clone() for name, value in checkpoint.parts["model"].state_dict().items()}
    with pytest.raises(StorageError, match=f"^cannot resume: {saved.path} was written with seed 1, not 2$"):
        checkpoint.restore()
    assert same(dict(checkpoint.parts["model"].state_dict()), before)
    assert same(random_state(), numbers)


def test_a_setting_that_the_file_does_not_have_is_named(saved: Checkpoint) -> None:
    with pytest.raises(StorageError, match=r"^cannot resume: .* was written with crop None, not 321$"):
        other(saved, crop="321").restore()


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"text"])
def test_a_damaged_file_is_refused_with_one_line(saved: Checkpoint, damage: Callable[[bytes], bytes]) -> None:
    saved.path.write_bytes(damage(saved.path.read_bytes()))
    with pytest.raises(StorageError, match=f"^cannot read {saved.path}: ") as error:
        other(saved).restore()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"settings": SETTINGS}, {"weight": torch.ones(3)}, [1, 2]])
def test_a_file_that_is_no_checkpoint_is_refused_with_one_line(saved: Checkpoint, content: Any) -> None:
    """Weights that somebody put there, say."""
    torch.save(content, saved.path)
    with pytest.raises(StorageError, match=str(saved.path)) as error:
        other(saved).restore()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_on_a_full_disk_the_last_checkpoint_stays(saved: Checkpoint) -> None:
    saved.path.with_name(saved.path.name + PARTIAL).symlink_to("/dev/full")
    with pytest.raises(StorageError, match=f"^cannot write {saved.path}: No space left on device; "):
        saved.save(PROGRESS | {"step": 4})
    assert [path.name for path in saved.path.parent.iterdir()] == ["training.pt"]
    assert same(other(saved).restore(), PROGRESS)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/checkpoints"])
def test_a_folder_that_cannot_be_made_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the folder should be")
    checkpoint = Checkpoint(tmp_path / place / "training.pt", SETTINGS, parts())
    with pytest.raises(StorageError, match=rf"^cannot write .*{place}/training.pt: [A-Z][a-z ]+; "):
        checkpoint.save(PROGRESS)
