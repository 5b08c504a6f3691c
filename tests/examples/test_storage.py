"""Files that are whole or not there: on a full disk, in a folder that is none, damaged."""

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine import storage
from engine.storage import PARTIAL, StorageError
from hypothesis import given
from hypothesis import strategies as st

from tests.kills import same

STATE = {"settings": {"seed": "1"}, "curve": [(4, 0.5)], "model": {"weight": torch.arange(12.0).reshape(3, 4)}}
full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Within it writing ends at that many bytes of a file, as it does on a disk that gets full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with old content."""
    path = tmp_path / "state.pt"
    storage.save(path, STATE)
    return path


def check_unchanged(file: Path) -> None:
    assert same(storage.load(file), STATE)
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing is left behind"


def test_what_is_saved_is_loaded(file: Path) -> None:
    loaded = storage.load(file)
    assert same(loaded, STATE)
    assert loaded["model"]["weight"].device == torch.device("cpu")
    storage.save(file, {"other": 1})
    assert storage.load(file) == {"other": 1}
    assert [path.name for path in file.parent.iterdir()] == ["state.pt"]


def test_what_a_crash_left_behind_is_written_over(file: Path) -> None:
    file.with_name(file.name + PARTIAL).write_bytes(b"half" * 10_000)
    storage.save(file, {"new": 1})
    assert storage.load(file) == {"new": 1}
    assert [path.name for path in file.parent.iterdir()] == ["state.pt"]


def test_a_reader_finds_the_old_or_the_new_content_at_any_time(tmp_path: Path) -> None:
    path, contents, seen = tmp_path / "file", [b"a" * 100_000, b"b" * 50_000], set()
    storage.write(path, contents[0])
    writing = True

    def read() -> None:
        while writing:
            seen.add(path.read_bytes())  # an error of a thread is a warning of pytest, which is an error

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        storage.write(path, contents[i % 2])
    writing = False
    reader.join()
    assert seen <= set(contents)
    assert len(seen) == 2


def test_the_content_is_on_the_disk_before_it_gets_the_name_and_then_the_name_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, found, fsync = file.read_bytes(), [], os.fsync

    def spy(descriptor: int) -> None:
        found.append({path.name: path.read_bytes() for path in file.parent.iterdir()})
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    storage.write(file, b"new")
    assert found == [{file.name: old, file.name + PARTIAL: b"new"}, {file.name: b"new"}]


@full_disk
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_full_disk_leaves_the_old_content(file: Path, size: int) -> None:
    file.with_name(file.name + PARTIAL).symlink_to("/dev/full")  # writing to it fails as on a full disk
    with pytest.raises(StorageError) as error:
        storage.write(file, b"x" * size)
    assert str(error.value) == f"cannot write {file}: No space left on device; what was there is unchanged"
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    check_unchanged(file)


def test_a_disk_that_gets_full_in_the_middle_of_a_file_leaves_the_old_content(file: Path) -> None:
    with file_size_limit(100_000), pytest.raises(StorageError) as error:
        storage.save(file, {"model": torch.zeros(100_000)})
    assert str(error.value) == f"cannot write {file}: File too large; what was there is unchanged"
    check_unchanged(file)
    storage.save(file, {"model": torch.zeros(100_000)})
    assert storage.load(file)["model"].shape == (100_000,)


@pytest.mark.parametrize("place", ["file/state.pt", "/proc/state.pt", "folder"])
def test_a_place_that_cannot_be_written_to_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=rf"^cannot write .*{place}: [A-Z][a-z ]+; what was there is unchanged$"):
        storage.write(tmp_path / place, b"content")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_read_only_folder_keeps_the_old_content(file: Path) -> None:
    file.parent.chmod(0o500)
    try:
        if os.access(file.parent, os.W_OK):
            pytest.skip("this user may write to read-only folders")
        with pytest.raises(StorageError, match="Permission denied"):
            storage.write(file, b"new")
        check_unchanged(file)
    finally:
        file.parent.chmod(0o700)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(StorageError, match=f"^cannot read {file}: "):
        storage.load(file)


@pytest.mark.parametrize(
    "content", [b"some text", b"\x89PNG\r\n\x1a\n" + bytes(99), b"\x80\x02.", b"\x80\x02}q\x00.", b"(lp0\n.", b"q\x00"]
)
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=f"^cannot read {path}: ") as error:
        storage.load(path)
    assert "\n" not in str(error.value)


def test_a_tensor_alone_is_refused(file: Path) -> None:
    torch.save(torch.zeros(2), file)
    with pytest.raises(StorageError, match=f"^cannot read {file}: it holds Tensor instead of values by name$"):
        storage.load(file)


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(StorageError, match=f"^cannot read {path}: ") as error:
            storage.load(path)
        assert "\n" not in str(error.value)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_file_with_a_flipped_bit_is_refused_or_means_the_same(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("flipped") / "state.pt"
    storage.save(path, STATE)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        loaded = storage.load(path)
    except StorageError:
        return
    assert same(loaded, STATE)


def test_a_tensor_that_is_marked_as_a_folder_is_refused(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\1\2") + 38] |= 0x10  # attributes of the first entry; PyTorch returns memory as it is
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"it is damaged$"):
        storage.load(file)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"model": Code(tmp_path / "made")}, path)
    with pytest.raises(StorageError, match=f"^cannot read {path}: "):
        storage.load(path)
    assert not (tmp_path / "made").exists()


def test_no_file_is_said_to_be_worth_loading_in_an_unsafe_way(tmp_path: Path) -> None:
    """PyTorch's own message proposes ``weights_only=False`` for whatever it cannot read."""
    path = tmp_path / "state.pt"
    torch.save({"model": Code(tmp_path / "made")}, path)
    for content in (path.read_bytes(), b"text"):
        path.write_bytes(content)
        with pytest.raises(StorageError) as error:
            storage.load(path)
        assert "weights_only" not in str(error.value)
