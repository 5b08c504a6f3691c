"""SBD as it is distributed: lists beside img/ and cls/, masks in MATLAB's files."""

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from data.sample import DataError
from data.sbd import SBD, read_mat
from data.voc import CLASSES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from PIL import Image
from torchvision.datasets import SBDataset

from tests.value_or_line import value_or_line

NAMES = ("2008_000002", "2009_000001")
LABELS = np.array([[0, 1, 20], [7, 7, 0]], np.uint8)


def save(path: Path, segmentation: np.ndarray, *, compressed: bool = True) -> None:
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[np.zeros((2, 3), np.uint8)]]
    content = {"Boundaries": boundaries, "Segmentation": segmentation, "CategoriesPresent": np.array([[1], [7], [20]])}
    scipy.io.savemat(path, {"GTcls": content}, do_compression=compressed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    dataset = tmp_path / "dataset"
    for folder in ("img", "cls", "inst"):
        (dataset / folder).mkdir(parents=True)
    for i, name in enumerate(NAMES):
        Image.new("RGB", (3, 2), (0, 100 * i, 0)).save(dataset / "img" / f"{name}.jpg")
        save(dataset / "cls" / f"{name}.mat", LABELS, compressed=bool(i))
    (dataset / "train.txt").write_text("".join(f"{name}\r\n" for name in NAMES))
    return tmp_path


def test_samples_are_those_of_torchvision(root: Path) -> None:
    theirs = SBDataset(root / "dataset", "train", mode="segmentation")
    for folder in (root, root / "dataset"):
        data = SBD(folder, "train")
        assert data.names == list(NAMES)
        assert data.classes == CLASSES
        for i, (image, mask) in enumerate(theirs):
            assert data[i]["labels"].tolist() == np.array(mask).tolist() == LABELS.tolist()
            assert data.labels(i).tolist() == LABELS.tolist()
            assert np.array_equal((data[i]["image"] * 255).round().permute(1, 2, 0).numpy(), np.array(image))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"GTcls": {"Segmentation": LABELS.astype(float)}}, r"expected a Segmentation of bytes, got float64 \[2, 3\]"),
        ({"GTcls": {"Segmentation": LABELS[None]}}, r"expected a Segmentation of bytes, got uint8 \[1, 2, 3\]"),
        ({"GTcls": {"Boundaries": LABELS}}, "expected GTcls with its Segmentation, got: .*"),
        ({"GTinst": {"Segmentation": LABELS}}, "expected GTcls with its Segmentation, got: KeyError 'GTcls'"),
        ({"GTcls": {"Segmentation": LABELS.T.copy()}}, r"expected 3x2 \(width x height\) as the image, got 2x3"),
        ({"GTcls": {"Segmentation": LABELS + 1}}, r"expected labels from 0 to 20 and 255 \(void\), got 21"),
    ],
)
def test_other_files_are_refused(root: Path, content: dict[str, object], message: str) -> None:
    path = root / "dataset" / "cls" / f"{NAMES[1]}.mat"
    scipy.io.savemat(path, content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: {message}$"):
        list(SBD(root, "train"))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (f"dataset/cls/{NAMES[1]}.mat", f"/train.txt:2: expected a mask of {NAMES[1]}, found none at .*/cls/.*.mat$"),
        (f"dataset/img/{NAMES[0]}.jpg", "/train.txt:1: expected an image, found none at .*/img/.*.jpg$"),
        ("dataset/train.txt", "/train.txt: expected the list of the images of a split, found no file$"),
    ],
)
def test_what_is_missing_is_said_at_once(root: Path, gone: str, message: str) -> None:
    (root / gone).unlink()
    with pytest.raises(DataError, match=message):
        SBD(root, "train")


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:RuntimeWarning")
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    compressed=st.booleans(),
    changes=st.lists(st.tuples(st.integers(128, 900), st.integers(0, 255)), max_size=2),
    end=st.integers(0, 2000),
)
def test_damaged_files_give_one_line_or_labels(
    tmp_path: Path, compressed: bool, changes: list[tuple[int, int]], end: int
) -> None:
    path = tmp_path / "x.mat"
    save(path, LABELS, compressed=compressed)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[:end])
    labels = value_or_line(path, lambda: read_mat(path, 21, size=(2, 3)))
    assert labels is None or labels.shape == (2, 3)
