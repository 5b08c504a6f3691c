"""Boxes as labelImg, VoTT and LabelMe write them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from data.boxes import read_boxes
from data.folder import Folder
from data.sample import DataError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.value_or_line import value_or_line

CLASSES = ("background", "cat", "dog")
HEIGHT, WIDTH = 6, 10


def xml(*ends: float, size: tuple[int, int] = (WIDTH, HEIGHT), name: str = "cat") -> str:
    corners = "".join(f"<{e}>{v}</{e}>" for e, v in zip(("xmin", "ymin", "xmax", "ymax"), ends, strict=True))
    extent = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation>{extent}<object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>"


def labelme(*points: list[float], kind: str = "rectangle", label: str = "cat", **more: Any) -> str:
    shape = {"label": label, "points": list(points), "shape_type": kind, "group_id": None}
    return json.dumps({"version": "5.5", "shapes": [shape], "imageHeight": HEIGHT, "imageWidth": WIDTH, **more})


def vott(*points: tuple[float, float], name: str = "a.jpg", tags: tuple[str, ...] = ("dog",)) -> str:
    region = {"type": "RECTANGLE", "tags": tags, "points": [{"x": x, "y": y} for x, y in points]}
    asset = {"asset": {"name": name, "size": {"width": WIDTH, "height": HEIGHT}}, "regions": [region]}
    return json.dumps({"assets": {"3f": asset, "4a": {"asset": {"name": "b.jpg"}, "regions": []}}})


def read(folder: Path, content: str, **options: Any) -> tuple[list[list[float]], list[int], int]:
    path = folder / ("x.xml" if content.startswith("<") else "x.json")
    path.write_text(content)
    boxes, labels, cut = read_boxes(path, CLASSES, HEIGHT, WIDTH, image="a.jpg", **options)
    assert boxes.canvas_size == (HEIGHT, WIDTH)
    assert boxes.dtype == torch.float32
    return boxes.tolist(), labels.tolist(), cut


@pytest.mark.parametrize(
    ("content", "first", "expected"),
    [
        (xml(1, 1, 10, 6), 1, [0, 0, 10, 6]),
        (xml(0, 0, 9, 5), 0, [0, 0, 10, 6]),
        (xml(2, 3, 2, 3), 0, [2, 3, 3, 4]),
        (xml(2, 3, 2, 3), 1, [1, 2, 2, 3]),
        (xml(2, 3, 4, 4, size=(0, 0)), 1, [1, 2, 4, 4]),
        (labelme([7.5, 5], [2, 1.25]), 1, [2, 1.25, 7.5, 5]),
        (labelme([7, 5], [2, 1], [3, 6], kind="polygon"), 0, [2, 1, 7, 6]),
    ],
)
def test_boxes_are_read_as_each_tool_counts(tmp_path: Path, content: str, first: int, expected: list[float]) -> None:
    assert read(tmp_path, content, first=first) == ([expected], [1], 0)


def test_the_export_of_vott_has_the_boxes_of_each_image(tmp_path: Path) -> None:
    assert read(tmp_path, vott((2, 1), (7.5, 1), (7.5, 5), (2, 5))) == ([[2, 1, 7.5, 5]], [2], 0)
    boxes, _, _ = read_boxes(tmp_path / "x.json", CLASSES, HEIGHT, WIDTH, image="b.jpg")
    assert boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("content", "first", "expected"),
    [
        (xml(0, 0, 10, 6), 1, [0, 0, 10, 6]),
        (xml(1, 1, 11, 7), 1, [0, 0, 10, 6]),
        (xml(0, 0, 10, 6), 0, [0, 0, 10, 6]),
        (labelme([-0.5, 0], [10.75, 7]), 1, [0, 0, 10, 6]),
    ],
)
def test_a_pixel_beyond_the_image_is_cut_off_and_counted(
    tmp_path: Path, content: str, first: int, expected: list[float]
) -> None:
    assert read(tmp_path, content, first=first, slack=1) == ([expected], [1], 1)
    with pytest.raises(DataError, match=r"expected a box within x . to \d+ and y . to \d+ for cat, got xmin "):
        read(tmp_path, content, first=first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (xml(-1, 1, 4, 4), "expected a box within x 1 to 10 and y 1 to 6 for cat, got xmin -1, ymin 1, xmax 4, ymax 4"),
        (xml(1, 1, 12, 4), "expected a box within x 1 to 10 and y 1 to 6 for cat, got xmin 1, ymin 1, xmax 12, ymax 4"),
        (xml(1, 1, 4, 4, size=(20, 12)), "expected boxes in an image of width 10, got width 20"),
        (xml(11, 1, 11, 4), "expected a box within x 1 to 10 .*"),
        ("<annotations><image/></annotations>", "expected XML as VOC has it, in <annotation>, got <annotations>"),
        (
            labelme([0, 0], [12, 3]),
            "expected a box within x 0 to 10 and y 0 to 6 for cat, got xmin 0, ymin 0, xmax 12, .*",
        ),
        (labelme([1, 1], [1, 3]), "expected a box within .*"),
        (labelme([1, 1], [2, float("nan")]), "expected a box within .*"),
        (labelme([1, 1], [2, 3], label="cow"), "expected objects called cat, dog, got 'cow'"),
        (labelme([1, 1], [2, 3], kind="circle"), "expected shapes that are rectangles or polygons, got 'circle'"),
        (labelme([1, 1], [2, 3], imageWidth=20), "expected boxes in an image of width 10, got width 20"),
        (labelme([1], [2, 3]), "expected what LabelMe or VoTT writes, got: ValueError .*"),
        ("{}", "expected what LabelMe or VoTT writes, got: KeyError 'shapes'"),
        ("[1]", "expected what LabelMe or VoTT writes, got: TypeError .*"),
        ("{", "expected a JSON file that can be read, got: .*"),
        (vott((1, 1), (2, 2), name="c.jpg"), "expected one asset called a.jpg, got 0"),
        (vott((1, 1), (2, 2), name="a.jpg", tags=()), r"expected one tag for each region of a.jpg, got \[\]"),
        (vott(), "expected what LabelMe or VoTT writes, got: ValueError .*"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / ("x.xml" if content.startswith("<") else "x.json")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: {message}$"):
        read(tmp_path, content, slack=1)


def folder(root: Path, annotations: dict[str, str]) -> Path:
    for name in ("images", "annotations"):
        (root / name).mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / f"{name}.jpg")
    for name, content in annotations.items():
        (root / "annotations" / name).write_text(content)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.mark.parametrize(
    "annotations",
    [
        {"a.xml": xml(2, 1, 7, 4), "b.xml": "<annotation/>"},
        {"a.json": labelme([2, 1], [8, 5]), "b.json": '{"shapes": []}'},
        {"my-export.json": vott((2, 1), (8, 5), tags=("cat",))},
    ],
)
def test_a_folder_has_boxes_of_each_tool(tmp_path: Path, annotations: dict[str, str]) -> None:
    data = Folder(folder(tmp_path, annotations), masks=False, boxes=True, first=0)
    assert data[0]["boxes"].tolist() == [[2, 1, 8, 5]]
    assert data[0]["box_labels"].tolist() == [1]
    assert data[1]["boxes"].shape == (0, 4)


def test_a_folder_counts_what_it_cuts_off_and_names_what_is_missing(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a.xml": xml(0, 1, 7, 4), "b.xml": xml(1, 1, 11, 7)})
    data = Folder(root, masks=False, boxes=True, slack=1)
    assert [sample["boxes"].tolist() for sample in data] == [[[0, 0, 7, 4]], [[0, 0, 10, 6]]]
    assert data.oddities["boxes that were cut off at the border of their image"] == 2
    (root / "annotations" / "b.xml").unlink()
    with pytest.raises(DataError, match=r"/annotations/b.xml: expected an annotation, found no file$"):
        Folder(root, masks=False, boxes=True)


INTACT = [xml(1, 1, 4, 4), labelme([1, 1], [2, 3]), vott((1, 1), (2, 2))]


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    intact=st.sampled_from(INTACT),
    changes=st.lists(st.tuples(st.integers(0, 400), st.characters()), max_size=3),
    end=st.integers(0, 400),
)
def test_damaged_files_give_one_line_or_boxes(
    tmp_path: Path, intact: str, changes: list[tuple[int, str]], end: int
) -> None:
    content = list(intact)
    for place, letter in changes:
        content[place % len(content)] = letter
    path = tmp_path / ("x.xml" if intact.startswith("<") else "x.json")
    path.write_bytes("".join(content)[:end].encode(errors="replace"))
    found = value_or_line(path, lambda: read_boxes(path, CLASSES, HEIGHT, WIDTH, image="a.jpg", slack=1))
    assert found is None or len(found[0]) == len(found[1])
