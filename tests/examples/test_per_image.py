"""Results of each image are made once and are the same, whoever makes them and however often he is stopped."""

import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.sample import DataError, Sample, Stacked
from engine.per_image import each_image, read
from engine.processes import joined, rank
from engine.storage import StorageError
from torch import Tensor
from torchvision import tv_tensors

ROOT = Path(__file__).parents[2]
SETTINGS = {"method": "gradient", "threshold": 0.4}
COUNT = 12


def images(count: int = COUNT, size: int = 16) -> Stacked:
    image = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    return Stacked(("background", "thing"), image, labels, number=torch.arange(count))


def gradient(sample: Sample) -> dict[str, Tensor]:
    """Attribution whose result is known: the gradient of the sum of the squares is twice the image."""
    image = sample["image"].as_subclass(Tensor).clone().requires_grad_()
    (maps,) = torch.autograd.grad(image.square().sum(), image)
    return {"maps": maps, "number": sample["number"]}


def assert_complete(folder: Path, data: Stacked) -> None:
    """All results are there and right, and nothing else is."""
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{name}.npz" for name in data.names), "settings.json"]
    for index, name in enumerate(data.names):
        found = read(folder, name)
        assert list(found) == ["maps", "number"]
        assert torch.equal(found["maps"], 2 * data[index]["image"].as_subclass(Tensor))
        assert found["number"] == index


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inodes and times of the finished results: writing one again changes them."""
    stats = {path.stem: path.stat() for path in folder.glob("*.npz")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


# In one process


def test_the_results_of_every_image_are_there_and_right(tmp_path: Path) -> None:
    data = images()
    each_image(gradient, data, tmp_path / "new" / "maps", settings=SETTINGS, name="maps")
    assert_complete(tmp_path / "new" / "maps", data)


def test_images_come_in_order_and_once(tmp_path: Path) -> None:
    order: list[int] = []

    def work(sample: Sample) -> dict[str, Tensor]:
        order.append(int(sample["number"]))
        return gradient(sample)

    for _ in range(2):
        each_image(work, images(), tmp_path, settings=SETTINGS, name="maps")
    assert order == list(range(COUNT))


def test_finished_results_are_not_touched_and_a_missing_one_is_made_again(tmp_path: Path) -> None:
    data = images()
    each_image(gradient, data, tmp_path, settings=SETTINGS, name="maps")
    (tmp_path / "000003.npz").unlink()
    before = files(tmp_path)
    each_image(gradient, data, tmp_path, settings=SETTINGS, name="maps")
    assert files(tmp_path).items() > before.items()
    assert_complete(tmp_path, data)


def test_half_files_of_images_that_are_gone_are_removed(tmp_path: Path) -> None:
    (tmp_path / "gone.npz.partial").write_bytes(b"PK")
    each_image(gradient, images(), tmp_path, settings=SETTINGS, name="maps")
    assert_complete(tmp_path, images())


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    results = {
        "half": torch.rand(2, 3).half(),
        "double": torch.rand(2, 3, dtype=torch.float64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "mask": torch.rand(3, 4) > 0.5,
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "transposed": torch.rand(4, 3).T,
        "with gradient": torch.rand(3, requires_grad=True) * 2,
        "conjugate": torch.rand(3, dtype=torch.complex64).conj(),
        "of/a layer.1": tv_tensors.Mask(torch.ones(2, 2)),
    }
    each_image(lambda sample: results, images(1), tmp_path, settings={}, name="maps")
    found = read(tmp_path, "000000")
    assert list(found) == list(results)
    for name, value in results.items():
        torch.testing.assert_close(found[name], value.detach().as_subclass(Tensor).resolve_conj(), rtol=0, atol=0)


def test_an_empty_data_set_gives_no_results(tmp_path: Path) -> None:
    each_image(gradient, images(0), tmp_path / "maps", settings=SETTINGS, name="maps")
    assert_complete(tmp_path / "maps", images(0))


def test_the_bar_goes_on_from_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each_image(gradient, images(3), tmp_path, settings=SETTINGS, name="maps")
    capsys.readouterr()
    each_image(gradient, images(5), tmp_path, settings=SETTINGS, name="maps of more")
    bars = capsys.readouterr().err.strip("\n").split("\r")
    assert " 3/5 " in bars[1]
    assert " 5/5 " in bars[-1]
    assert all("maps of more" in bar for bar in bars[1:])
    assert "image/s" in bars[-1]


def test_names_with_folders_are_refused_before_any_work(tmp_path: Path) -> None:
    data = images(2)
    data.names = ["a", "../b"]
    with pytest.raises(DataError, match=r"^names of the images: expected file names, got '../b'$"):
        each_image(gradient, data, tmp_path / "maps", settings=SETTINGS, name="maps")
    assert not list(tmp_path.iterdir())


# Settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"threshold": 0.5}, "its results are of threshold 0.4, not 0.5"),
        ({"method": "größer"}, 'its results are of method "gradient", not "größer"'),
        ({"scales": [0.5, 1.0]}, "its results are of scales unset, not [0.5, 1.0]"),
        ({"layers": (1, 3)}, "its results are of layers [1, 2], not [1, 3]"),
        ({"weights": None}, 'its results are of weights "a.pt", not null'),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    settings = SETTINGS | {"layers": (1, 2), "weights": Path("a.pt")}
    each_image(gradient, images(1), tmp_path, settings=settings, name="maps")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StorageError) as error:
        each_image(gradient, images(3), tmp_path, settings=settings | changed, name="maps")
    assert str(error.value) == f"cannot go on in {tmp_path}: {message}"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_setting_that_is_gone_is_refused(tmp_path: Path) -> None:
    each_image(gradient, images(1), tmp_path, settings=SETTINGS, name="maps")
    with pytest.raises(StorageError, match=r"its results are of threshold 0\.4, not unset$"):
        each_image(gradient, images(1), tmp_path, settings={"method": "gradient"}, name="maps")


def test_the_same_settings_go_on_in_any_order(tmp_path: Path) -> None:
    settings = {"weights": Path("a.pt"), "scales": (0.5, 1.0), "limit": float("nan"), "options": {"b": 1, "a": None}}
    each_image(gradient, images(1), tmp_path, settings=settings, name="maps")
    settings["options"] = {"a": None, "b": 1}
    each_image(gradient, images(2), tmp_path, settings=dict(reversed(settings.items())), name="maps")
    assert_complete(tmp_path, images(2))


def test_settings_are_there_before_the_first_result(tmp_path: Path) -> None:
    def work(sample: Sample) -> dict[str, Tensor]:
        assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
        return {}

    each_image(work, images(1), tmp_path, settings=SETTINGS, name="maps")


@pytest.mark.parametrize("value", [torch.ones(2), b"bytes", {"a": {1}}, np.float32(1)], ids=lambda v: type(v).__name__)
def test_settings_that_cannot_be_kept_are_refused(tmp_path: Path, value: object) -> None:
    message = f"^settings: expected scale to be made of numbers, text and paths, got {type(value).__name__}$"
    with pytest.raises(TypeError, match=message):
        each_image(gradient, images(1), tmp_path / "maps", settings={"scale": value}, name="maps")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b'"method"', b"3", b"\xff\xfe{"])
def test_damaged_settings_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"^cannot read .*settings\.json: [^\n]+$"):
        each_image(gradient, images(1), tmp_path, settings=SETTINGS, name="maps")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_results_of_unknown_settings_are_refused(tmp_path: Path) -> None:
    each_image(gradient, images(1), tmp_path, settings=SETTINGS, name="maps")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StorageError, match=r"^cannot go on in .*: it has results, but no settings\.json$"):
        each_image(gradient, images(2), tmp_path, settings=SETTINGS, name="maps")
    assert [path.name for path in tmp_path.iterdir()] == ["000000.npz"]


# Errors


def failing_at(number: int, error: Exception) -> Callable[[Sample], dict[str, Tensor]]:
    def work(sample: Sample) -> dict[str, Tensor]:
        if sample["number"] == number:
            raise error
        return gradient(sample)

    return work


def test_an_error_names_the_image_and_loses_nothing(tmp_path: Path) -> None:
    cause = ZeroDivisionError("no region")
    with pytest.raises(RuntimeError, match=r"^000007: ZeroDivisionError: no region$") as error:
        each_image(failing_at(7, cause), images(), tmp_path, settings=SETTINGS, name="maps")
    assert error.value.__cause__ is cause
    before = files(tmp_path)
    assert sorted(before) == [f"{i:06d}" for i in range(7)]
    each_image(gradient, images(), tmp_path, settings=SETTINGS, name="maps")
    assert files(tmp_path).items() > before.items()
    assert_complete(tmp_path, images())


@pytest.mark.parametrize("error", [DataError("a.png: expected 2 classes, got 3"), StorageError("cannot read a.npz")])
def test_errors_that_name_a_file_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as found:
        each_image(failing_at(0, error), images(), tmp_path, settings=SETTINGS, name="maps")
    assert found.value is error


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.ones(2).bfloat16(), "torch.bfloat16, torch.strided"),
        (torch.eye(2).to_sparse(), "torch.float32, torch.sparse_coo"),
    ],
)
def test_tensors_that_numpy_does_not_have_are_refused(tmp_path: Path, value: Tensor, kind: str) -> None:
    message = f"^000000: TypeError: maps: expected a type and a layout that NumPy has, got {kind}$"
    with pytest.raises(RuntimeError, match=message):
        each_image(lambda sample: {"maps": value}, images(1), tmp_path, settings=SETTINGS, name="maps")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_full_disk_is_told_in_one_line_and_loses_nothing(tmp_path: Path) -> None:
    def work(sample: Sample) -> dict[str, Tensor]:
        if sample["number"] == 2:
            (tmp_path / "000002.npz.partial").symlink_to("/dev/full")
        return gradient(sample)

    with pytest.raises(StorageError, match=r"^cannot write .*000002\.npz: No space left on device[^\n]*$"):
        each_image(work, images(), tmp_path, settings=SETTINGS, name="maps")
    before = files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.npz", "000001.npz", "settings.json"]
    each_image(gradient, images(), tmp_path, settings=SETTINGS, name="maps")
    assert files(tmp_path).items() > before.items()
    assert_complete(tmp_path, images())


def test_a_folder_that_is_a_file_or_below_one_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text("notes")
    with pytest.raises(StorageError, match=r"^cannot write to .*maps: File exists$"):
        each_image(gradient, images(1), tmp_path / "maps", settings=SETTINGS, name="maps")
    with pytest.raises(StorageError, match=r"^cannot write to .*below: Not a directory$"):
        each_image(gradient, images(1), tmp_path / "maps" / "below", settings=SETTINGS, name="maps")
    assert (tmp_path / "maps").read_text() == "notes"


def test_a_missing_result_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^cannot read .*other\.npz: No such file or directory$"):
        read(tmp_path, "other")


@pytest.mark.parametrize("content", [b"", b"maps", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_a_file_of_another_format_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(StorageError, match=r"^cannot read .*a\.npz: [^\n]+$"):
        read(tmp_path, "a")


def test_an_array_of_text_is_told_in_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", names=np.array(["cat"]))
    with pytest.raises(StorageError, match=r"^cannot read .*a\.npz: [^\n]+$"):
        read(tmp_path, "a")


def test_a_damaged_result_never_gives_other_values(tmp_path: Path) -> None:
    """Every byte is changed, and the file cut at every length."""
    each_image(gradient, images(1, size=4), tmp_path, settings=SETTINGS, name="maps")
    path, expected = tmp_path / "000000.npz", read(tmp_path, "000000")
    good = path.read_bytes()
    changed = [good[:i] + bytes([good[i] ^ 0xFF]) + good[i + 1 :] for i in range(len(good))]
    messages = []
    for content in [*changed, *(good[:i] for i in range(len(good)))]:
        path.write_bytes(content)
        try:
            found = read(tmp_path, "000000")
        except StorageError as error:
            messages.append(str(error))
        else:
            assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert len(messages) > 1.5 * len(good)
    assert not any("\n" in message for message in messages)


# In several processes, and killed


class Run:
    """A run in processes of its own, which write down the images that they work on.

    Args:
        folder: of the results.
        processes: how many share the work.
        die_at: images in whose midst a process kills itself.
        limit: bytes of a file at which the kernel kills a process that writes more.
        size: of the images in pixels; large results take a while to write.
        settings: of the results.
    """

    def __init__(
        self,
        context: ForkServerContext,
        folder: Path,
        *,
        processes: int = 1,
        die_at: Sequence[int] = (),
        limit: int | None = None,
        size: int = 16,
        settings: Mapping[str, object] = SETTINGS,
    ) -> None:
        self.log = folder.with_name(f"{time.monotonic_ns()}.log")
        self.log.touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free.getsockname()[1]}"}
        self.processes = []
        for number in range(processes):
            environment |= {"RANK": f"{number}", "WORLD_SIZE": f"{processes}"}
            args = (folder, self.log, dict(environment), die_at, limit, size, settings)
            self.processes.append(context.Process(target=_run, args=args, daemon=True))
            self.processes[-1].start()

    def end(self) -> list[int | None]:
        """Waits; returns the exit codes."""
        for process in self.processes:
            process.join(300)
        return [process.exitcode for process in self.processes]

    def worked_on(self) -> list[tuple[int, str]]:
        """Process and image, in order."""
        lines = (line.split() for line in self.log.read_text().splitlines())
        return [(int(rank), name) for rank, name in lines]


def _run(
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    die_at: Sequence[int],
    limit: int | None,
    size: int,
    settings: Mapping[str, object],
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def work(sample: Sample) -> dict[str, Tensor]:
        with open(log, "a") as file:
            file.write(f"{rank()} {sample['number']:06d}\n")
        results = gradient(sample)
        time.sleep(0.01 * rank())  # processes are not equally fast
        if sample["number"] in die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return results

    try:
        with joined("cpu"):
            each_image(work, images(size=size), folder, settings=settings, name="maps")
            log.with_name(f"seen{rank()}").write_text(f"{len(files(folder))}")
    except StorageError as error:
        log.with_name(f"error{rank()}").write_text(str(error))
        os._exit(3)


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """Starts processes that have everything imported already and that share nothing with this one."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["engine.per_image", "torch.distributed", "pytest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'examples'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield server


@pytest.mark.parametrize("number", [0, 5, COUNT - 1])
def test_a_run_killed_at_work_goes_on(tmp_path: Path, context: ForkServerContext, number: int) -> None:
    folder = tmp_path / "maps"
    assert Run(context, folder, die_at=[number]).end() == [-signal.SIGKILL]
    before = files(folder)
    assert sorted(before) == images().names[:number]
    assert_goes_on(Run(context, folder), before, folder, images())


def test_a_run_killed_while_it_writes_goes_on(tmp_path: Path, context: ForkServerContext) -> None:
    """The kill may come too late, when the file is complete; but not so often."""
    size = 400
    for attempt in range(10):
        folder = tmp_path / f"maps{attempt}"
        run = Run(context, folder, size=size)
        (process,) = run.processes
        while process.is_alive() and not (len(files(folder)) > 1 and any(folder.glob("*.npz.partial"))):
            pass
        process.kill()
        run.end()
        if any(folder.glob("*.npz.partial")):
            break
    before = files(folder)
    assert 1 < len(before) < COUNT
    assert any(folder.glob("*.npz.partial"))
    assert_goes_on(Run(context, folder, size=size), before, folder, images(size=size))


def test_a_run_that_dies_within_a_file_goes_on(tmp_path: Path, context: ForkServerContext) -> None:
    """The kernel kills a process that writes more than so many bytes, after it has written these: never too late."""
    folder = tmp_path / "maps"
    assert Run(context, folder, die_at=[3]).end() == [-signal.SIGKILL]
    before = files(folder)
    assert Run(context, folder, limit=2000).end() == [-signal.SIGXFSZ]
    assert {path.name: path.stat().st_size for path in folder.glob("*.partial")} == {"000003.npz.partial": 2000}
    assert files(folder) == before
    assert_goes_on(Run(context, folder), before, folder, images())


def assert_goes_on(run: Run, before: dict[str, tuple[int, int]], folder: Path, data: Stacked) -> None:
    """The run makes what was not there, once, and leaves alone what was."""
    assert run.end() == [0] * len(run.processes)
    assert sorted(name for _, name in run.worked_on()) == [name for name in data.names if name not in before]
    assert files(folder).items() >= before.items()
    assert_complete(folder, data)


def assert_shared(run: Run) -> None:
    workers = [process for process, _ in run.worked_on()]
    shares = [workers.count(process) for process in range(len(run.processes))]
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1


def test_two_processes_share_the_images(tmp_path: Path, context: ForkServerContext) -> None:
    run = Run(context, tmp_path / "maps", processes=2)
    assert_goes_on(run, {}, tmp_path / "maps", images())
    assert_shared(run)


def test_both_processes_return_when_all_results_are_there(tmp_path: Path, context: ForkServerContext) -> None:
    assert Run(context, tmp_path / "maps", processes=2).end() == [0, 0]
    assert [(tmp_path / f"seen{process}").read_text() for process in range(2)] == [f"{COUNT}"] * 2


def test_two_processes_share_what_killed_ones_have_left(tmp_path: Path, context: ForkServerContext) -> None:
    folder = tmp_path / "maps"
    killed = Run(context, folder, processes=2, die_at=[2, 9])  # one early, the other late
    assert killed.end() == [-signal.SIGKILL] * 2
    before = files(folder)
    assert sorted(before) == [f"{number:06d}" for number in (0, 1, 3, 5, 7)]
    run = Run(context, folder, processes=2)
    assert_goes_on(run, before, folder, images())
    assert_shared(run)


def test_one_process_goes_on_where_two_were_killed(tmp_path: Path, context: ForkServerContext) -> None:
    folder = tmp_path / "maps"
    assert Run(context, folder, processes=2, die_at=[2, 9]).end() == [-signal.SIGKILL] * 2
    assert_goes_on(Run(context, folder), files(folder), folder, images())


def test_other_settings_stop_all_processes(tmp_path: Path, context: ForkServerContext) -> None:
    folder = tmp_path / "maps"
    each_image(gradient, images(1), folder, settings=SETTINGS, name="maps")
    run = Run(context, folder, processes=2, settings=SETTINGS | {"threshold": 0.5})
    assert run.end() == [3, 3]
    message = f"cannot go on in {folder}: its results are of threshold 0.4, not 0.5"
    assert [(tmp_path / f"error{process}").read_text() for process in range(2)] == [message] * 2
    assert run.worked_on() == []
