"""Tags from the files that projects pass around."""

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.sample import DataError
from data.source import Options
from data.tags import read_tags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.value_or_line import value_or_line

CLASSES = ("background", "cat", "dog, black")
NAMES = ("2007_000032", "2008_000007")
TAGS = [[1, 1, 0], [1, 0, 1]]


def npy(content: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, content, allow_pickle=True)
    return file.getvalue()


ROWS = [np.array(row[1:], np.float32) for row in TAGS]
FILES = {
    "irn.npy": npy({2007000032: ROWS[0], 2008000007: ROWS[1], 2009000001: ROWS[0]}),
    "numpy_keys.npy": npy({np.int64(2007000032): ROWS[0], np.int64(2008000007): ROWS[1]}),
    "seam.npy": npy({"2008_000007": ROWS[1], "2007_000032": ROWS[0]}),
    "with_background.npy": npy({name: np.array(row) for name, row in zip(NAMES, TAGS, strict=True)}),
    "a.csv": b'\xef\xbb\xbfname,"dog, black",cat\r\n2008_000007,1,0\r\n2007_000032,0,1\r\nother,0,0\r\n',
    "names.json": json.dumps({"2007_000032": ["cat"], "2008_000007": ["background", "dog, black"]}).encode(),
    "rows.json": json.dumps({"2007_000032": [1, 0], "2008_000007": [1, 0, 1], "other": "what"}).encode(),
}


@pytest.mark.parametrize("file", FILES)
def test_every_form_gives_the_same_tags(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(FILES[file])
    tags = read_tags(tmp_path / file, NAMES, CLASSES)
    assert tags.tolist() == TAGS
    assert read_tags(tmp_path / file, NAMES[::-1], CLASSES).tolist() == TAGS[::-1]


def test_a_file_of_python_2_is_read(tmp_path: Path) -> None:
    content = np.array({"2007_000032": ROWS[0]}, dtype=object)
    header = npy({})[: npy({}).index(b"\n") + 1]
    (tmp_path / "x.npy").write_bytes(header + pickle.dumps(content, protocol=2))
    assert read_tags(tmp_path / "x.npy", NAMES[:1], CLASSES).tolist() == TAGS[:1]


class Program:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("a program",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.txt", b"", "expected tags in a file called .npy, .csv, .json, got .txt"),
        ("x.npy", npy({2007000032: ROWS[0]}), r"expected tags of each image, got none of 2008_000007 \(1 missing\)"),
        ("x.npy", npy([1, 2]), "expected a dict of tags that can be read, got: .*"),
        ("x.npy", npy(np.array([None])), "expected a dict of tags, got NoneType"),
        ("x.npy", npy({"2007_000032": Program()}), "expected a dict of tags .*, got: it asks for builtins.print"),
        ("x.npy", npy({2007000032: np.zeros(20)}), "2007_000032: expected 3 values, or one less, got 20|.*1 missing.*"),
        ("x.npy", npy(dict.fromkeys(NAMES, np.zeros(20))), "2007_000032: expected 3 values, or one less, got 20"),
        ("x.npy", npy(dict.fromkeys(NAMES, np.full(2, 0.5))), "2007_000032: expected 0 or 1 for each class, got 0.5"),
        ("x.npy", npy({name: [1, np.ones(2)] for name in NAMES}), r"2007_000032: expected 0 or 1 .*, got array\(.*"),
        ("x.npy", npy(dict.fromkeys(NAMES, 1)), "2007_000032: expected a list of classes or of 0 and 1, got int"),
        ("x.csv", b"", ":1: expected a header of name and of each class once, got ''"),
        ("x.csv", b"name,cat\n", ":1: expected a column for each class, got none for dog, black"),
        ("x.csv", b"name,cat,cow\n", ":1: expected a header of name and of each class once, got 'name,cat,cow'"),
        ("x.csv", b'name,cat,"dog, black"\na,1\n', ":2: expected 3 fields as in the header, got 2"),
        ("x.csv", b'name,cat,"dog, black"\na,1,2\n', ":2: expected 0 or 1 for each class, got '2'"),
        ("x.csv", b'name,cat,"dog, black"\na,1,0\na,1,0\n', ":3: expected one row for each image, got another for a"),
        ("x.csv", b'name,"a"b\n', ":1: expected comma-separated values, got: .*"),
        ("x.csv", b"name,\xff\n", "expected UTF-8 text, got .*"),
        ("x.json", b"", "expected a JSON file that can be read, got: .*"),
        ("x.json", b"[]", "expected names of images with their tags, got list"),
        ("x.json", b'{"a": [1, 0], "a": [0, 1]}', "expected every image once, got a again"),
        ("x.json", b'{"2007_000032": ["cow"]}', "expected tags of each image, got none of 2008_000007.*"),
        ("x.json", b'{"2007_000032": ["cow"], "2008_000007": []}', "2007_000032: expected classes of .*, got 'cow'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    separator = "" if message.startswith(":") else ": "
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}{separator}({message})$"):
        read_tags(path, NAMES, CLASSES)


def test_digits_that_two_names_share_are_not_guessed_between(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(npy({123: ROWS[0]}))
    with pytest.raises(DataError, match=r"expected tags of one image under 123, got 1_23 and 12_3$"):
        read_tags(tmp_path / "x.npy", ["1_23", "12_3"], CLASSES)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=3),
    end=st.integers(0, 900),
)
def test_damaged_files_give_one_line_or_tags(
    tmp_path: Path, file: str, changes: list[tuple[int, int]], end: int
) -> None:
    content = bytearray(FILES[file])
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path / file
    path.write_bytes(content[:end])
    tags = value_or_line(path, lambda: read_tags(path, NAMES, CLASSES))
    assert tags is None or (tags.shape == (2, 3) and set(tags.flatten().tolist()) <= {0, 1})


def test_examples_train_on_the_tags_of_a_file(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        (tmp_path / "val" / folder).mkdir(parents=True)
    for split in ("train", "val"):
        Image.new("RGB", (4, 3)).save(tmp_path / split / "images" / "a.png")
        Image.new("L", (4, 3), 1).save(tmp_path / split / "masks" / "a.png")
        (tmp_path / split / "classes.txt").write_text("ground\ncat\ndog\n")
    (tmp_path / "tags.json").write_text('{"a": ["dog"]}')
    options = Options(data="folder", root=tmp_path, tags=tmp_path / "tags.json")
    assert options.images("train")[0]["tags"].tolist() == [1, 0, 1]
    assert "tags" not in options.images("evaluate")[0]
    with pytest.raises(ValueError, match="--tags: expected --data voc or --data folder with it, got --data scenes"):
        Options(tags=tmp_path / "tags.json")
