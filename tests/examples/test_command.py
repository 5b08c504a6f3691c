"""The command line: options, one-line errors, the folder of the results."""

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from data.sample import DataError, Images, Sample
from data.stream import Stream
from engine.command import check_least, each_run, output_folder, parse, run
from engine.processes import Device
from engine.storage import StorageError


@dataclass(frozen=True)
class Config:
    """A configuration."""

    steps: int = 3
    """Number of steps."""
    device: Device = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")


class Unreadable(Images):
    """Images whose files are missing."""

    def __init__(self) -> None:
        self.names, self.classes = ["cat"], ("background",)

    def __getitem__(self, index: int) -> Sample:
        raise DataError(f"cannot read {self.names[index]}.jpg: No such file")


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["example"])


def raising(error: BaseException) -> Callable[[Config], None]:
    def main(config: Config) -> None:
        raise error

    return main


@dataclass(frozen=True)
class Repeated(Config):
    """A configuration of several runs."""

    seed: int = 5
    """Seed of the first run."""
    repeats: int = 3
    """Number of runs."""


def test_parse_reads_options() -> None:
    assert parse(Config, []) == Config(3)
    assert parse(Config, ["--steps", "7"]) == Config(7)


@dataclass(frozen=True)
class OfImages(Config):
    """A configuration with other defaults for photographs."""

    PHOTOGRAPHS: ClassVar[dict[str, Any]] = {"steps": 1000, "size": 512}
    QUICK: ClassVar[dict[str, Any]] = {"steps": 50}

    data: str = "scenes"
    """Images."""
    size: int = 48
    """Of the images."""
    quick: bool = False
    """Few steps."""


@pytest.mark.parametrize(
    ("args", "steps", "size"),
    [
        ([], 3, 48),
        (["--quick"], 3, 48),
        (["--data", "voc"], 1000, 512),
        (["--data=folder", "--size", "64"], 1000, 64),
        (["--quick", "--data", "voc"], 50, 512),
        (["--data", "voc", "--quick", "--steps", "7"], 7, 512),
    ],
)
def test_photographs_and_quick_have_their_own_defaults(args: list[str], steps: int, size: int) -> None:
    found = parse(OfImages, args)
    assert (found.steps, found.size) == (steps, size)


@dataclass(frozen=True)
class OfVolumes(Config):
    """A configuration that knows no photographs."""

    QUICK: ClassVar[dict[str, Any]] = {"steps": 50}

    quick: bool = False
    """Few steps."""


@pytest.mark.parametrize(("args", "steps"), [([], 3), (["--quick"], 50), (["--quick", "--steps", "7"], 7)])
def test_quick_stands_alone_where_there_are_no_photographs(args: list[str], steps: int) -> None:
    assert parse(OfVolumes, args).steps == steps


def test_runs_differ_by_their_seeds_alone() -> None:
    assert each_run(Repeated(steps=7)) == [Repeated(steps=7, seed=seed) for seed in (5, 6, 7)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--step", "7"], "--step, 7"),
        (["--steps", "x"], "'x'"),
        (["--steps"], "--steps"),
        (["--steps", "-1"], "steps: expected at least 0, got -1"),
        (["--device", "tpu"], "'tpu'"),
        (["stray"], "stray"),
        (["--steps", "1" * 100 + "x"], "1x'"),
    ],
)
def test_parse_ends_with_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Config, args)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("(see --help)\n")
    assert err.count("\n") == 1
    assert message in err


def test_only_the_first_process_says_what_is_wrong_with_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        parse(Config, ["stray"])
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_parse_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Config, ["--help"])
    assert not end.value.code
    assert "Number of steps." in capsys.readouterr().out


def test_options_below_their_bounds_are_named() -> None:
    config = SimpleNamespace(steps=1, pretrain_steps=-1)
    check_least(config, steps=1)
    with pytest.raises(ValueError, match="--pretrain-steps: expected at least 0, got -1"):
        check_least(config, steps=1, pretrain_steps=0)


@pytest.mark.parametrize(
    ("value", "message"), [("nan", "at least 0, got nan"), ("-inf", "at least 0, got -inf"), ("inf", "a finite .* inf")]
)
def test_numbers_that_are_not_finite_are_refused(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^--weight: expected {message}$"):
        check_least(SimpleNamespace(weight=float(value)), weight=0)


def test_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = output_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("place", ["file/folder", "file", "/proc/folder"])
def test_an_unwritable_output_folder_ends_the_program(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=rf"^error: cannot write to .*{place}: [A-Z][a-z ]+$"):
        output_folder(tmp_path / place)


def test_run_gives_the_example_the_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["example", "--steps", "7"])
    seen: list[Config] = []
    run(seen.append, Config)
    assert seen == [Config(7)]


@pytest.mark.parametrize("error", [DataError, StorageError, FloatingPointError])
def test_what_a_user_can_mend_ends_the_program_with_one_line(error: type[Exception]) -> None:
    with pytest.raises(SystemExit) as end:
        run(raising(error("cat.png: expected a mask, got a photograph")), Config)
    assert end.value.code == "error: cat.png: expected a mask, got a photograph"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_process_is_the_same_line(workers: int) -> None:
    def main(config: Config) -> None:
        next(Stream(Unreadable(), batch_size=1, workers=workers).steps(0, 1))

    with pytest.raises(SystemExit) as end:
        run(main, Config)
    assert end.value.code == "error: cannot read cat.jpg: No such file"
    assert isinstance(end.value.__context__, DataError)
    traceback.clear_frames(end.value.__context__.__traceback__)
    end.value.__context__ = None  # or the worker is left to the garbage collector, which waits 5 s for it


@pytest.mark.parametrize("error", [ValueError("shapes"), OSError("no route"), RuntimeError("bug"), KeyError("labels")])
def test_other_errors_pass_with_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        run(raising(error), Config)
    assert raised.value is error
    assert raised.traceback[-1].name == "main"


def test_an_interrupted_run_says_so_in_one_word() -> None:
    with pytest.raises(SystemExit) as end:
        run(raising(KeyboardInterrupt()), Config)
    assert end.value.code == "stopped"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_several_processes_without_the_device_that_they_ask_for_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["example", "--device", "cuda"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"^error: --device cuda: PyTorch sees no CUDA device$"):
        run(raising(AssertionError("must not run")), Config)
