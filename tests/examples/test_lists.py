"""Lists of images in the forms that they are passed around in: all are read, or the line is named."""

import re
from pathlib import Path

import pytest
from data.lists import read_entries
from data.sample import DataError
from data.voc import VOC
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.value_or_line import value_or_line

NAMES = ("2007_000001", "2008_000002", "a b")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "other", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for i, name in enumerate(NAMES):
        Image.new("RGB", (4, 3)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        for label, folder in enumerate(("SegmentationClass", "SegmentationClassAug", "other")):
            if i or label:
                Image.new("L", (4, 3), label).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "ImageSets" / "Main").mkdir()
    return tmp_path


def write(root: Path, text: str, name: str = "x") -> Path:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "form",
    [
        "{0}",
        "{0}  1",
        "{0} -1",
        "{0}  0",
        "{0} 0 14 19",
        "{0}.jpg",
        "JPEGImages/{0}.jpg",
        "/JPEGImages/{0}.jpg",
        "./JPEGImages/{0}.jpg",
        "VOCdevkit/VOC2012/JPEGImages/{0}.jpg",
        "/home/me/VOC2012/JPEGImages/{0}.jpg /home/me/VOC2012/SegmentationClassAug/{0}.png",
        "JPEGImages\\{0}.jpg SegmentationClassAug\\{0}.png",
        "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png",
        "/JPEGImages/{0}.jpg\t/SegmentationClassAug/{0}.png ",
        "{0}.jpg {0}.png",
        "{0} {0}",
        "/JPEGImages/{0}.jpg /Gone/{0}.png",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\n\r\n"])
def test_every_form_of_a_line_names_the_same_files(root: Path, form: str, end: str) -> None:
    path = write(root, "\r\n".join(form.format(name) for name in NAMES[:2]) + end)
    entries = read_entries(path, root, masks=["SegmentationClassAug"])
    assert entries == [
        (name, root / f"JPEGImages/{name}.jpg", root / f"SegmentationClassAug/{name}.png") for name in NAMES[:2]
    ]
    assert [entry.mask for entry in read_entries(path, root)] == [None, None]


def test_masks_are_in_the_folder_of_the_line_or_in_the_first_that_has_one(root: Path) -> None:
    path = write(root, f"{NAMES[0]}\n{NAMES[1]} other/{NAMES[1]}.png\n{NAMES[2]}\n")
    masks = [entry.mask for entry in read_entries(path, root, masks=["SegmentationClass", "SegmentationClassAug"])]
    assert masks == [root / f"SegmentationClassAug/{NAMES[0]}.png", root / f"other/{NAMES[1]}.png"] + [
        root / f"SegmentationClass/{NAMES[2]}.png"
    ]


@pytest.mark.parametrize("file", ["trainaug", "train_aug", "train_augmented", "TrainAug", "train_aug_id"])
def test_the_list_with_sbd_is_found_under_any_name(root: Path, file: str) -> None:
    write(root, f"{NAMES[1]}\n", file)
    for split in (file, "trainaug", "train_aug"):
        data = VOC(root, split)
        assert data.names == [NAMES[1]]
        assert data.labels(0).unique().tolist() == [1], "the masks of SBD come first"


def test_two_lists_with_sbd_are_not_guessed_between(root: Path) -> None:
    for name in ("train_aug", "val_aug"):
        write(root, NAMES[0], name)
    with pytest.raises(
        DataError, match=r"trainaug.txt: expected the list of a split, found train_aug.txt, val_aug.txt$"
    ):
        VOC(root, "trainaug")


def test_lists_of_main_and_lists_elsewhere_are_read(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (root / "ImageSets" / "Main" / "cat_train.txt").write_text(f"{NAMES[0]}  1\n{NAMES[1]} -1\n")
    assert VOC(root, "cat_train").names == list(NAMES[:2])
    other = tmp_path_factory.mktemp("other") / "mine.txt"
    other.write_text(f"/JPEGImages/{NAMES[1]}.jpg /other/{NAMES[1]}.png\n")
    assert VOC(root, str(other)).labels(0).unique().tolist() == [2]
    with pytest.raises(DataError, match=r"/gone.txt: expected the list of the images of a split, found no file$"):
        VOC(root, str(other.with_name("gone.txt")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2009_1", "expected an image, found none at ROOT/JPEGImages/2009_1.jpg"),
        (
            "/JPEGImages/2009_1.jpg /SegmentationClass/2009_1.png",
            "expected an image, found none at ROOT/JPEGImages/2009_1.jpg",
        ),
        (
            "/Pictures/2009_1.jpg",
            "expected an image, found none at ROOT/Pictures/2009_1.jpg or ROOT/JPEGImages/2009_1.jpg",
        ),
        (
            "2007_000001 /Masks/2007_000001.png",
            "expected a mask of 2007_000001, found none at ROOT/Masks/2007_000001.png "
            "or ROOT/SegmentationClass/2007_000001.png",
        ),
        ("one two three", "expected a name, an image, or an image and its mask, got 'one two three'"),
        ("/", "expected an image, found none at ROOT/JPEGImages/.*.jpg"),
        ("2008_000002.jpg", "expected every name once, got 2008_000002 again (first in line 1)"),
    ],
)
def test_a_wrong_line_is_named_with_what_was_looked_for(root: Path, line: str, message: str) -> None:
    path = write(root, f"{NAMES[1]}\r\n{line}\r\n{NAMES[2]}\r\n")
    expected = re.escape(f"{path}:2: {message.replace('ROOT', str(root))}").replace(r"\.\*", ".*")
    with pytest.raises(DataError, match=f"^{expected}$"):
        read_entries(path, root, masks=["SegmentationClass"])


def test_a_file_of_something_else_is_no_list(root: Path) -> None:
    with pytest.raises(DataError, match=r"x.txt: expected names, got a line of 5000 characters$"):
        read_entries(write(root, "{" * 5000), root)


def test_an_empty_list_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"x.txt: expected at least one name, got an empty file$"):
        read_entries(write(root, "\r\n\r\n"), root)


PIECES = st.sampled_from(
    [*NAMES, "/", "\\", "JPEGImages", "..", ".jpg", ".png", " ", "\t", "\r\n", "\n", "1", "-1", "\0", "é"]
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=12))
def test_any_text_is_read_line_by_line_or_refused_in_one(root: Path, pieces: list[str]) -> None:
    path = write(root, "".join(pieces))
    entries = value_or_line(path, lambda: read_entries(path, root, masks=["SegmentationClassAug"]))
    if entries is not None:
        assert len(entries) == len("".join(pieces).rstrip().splitlines())
        assert all(entry.image.is_file() and entry.mask and entry.mask.is_file() for entry in entries)
