"""MS COCO as it is distributed, in small: masks, boxes, instances and tags are those of pycocotools."""

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.coco import COCO, rasterise, read_catalogue
from data.panoptic import Panoptic
from data.sample import VOID, DataError, complete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.value_or_line import value_or_line

mask = pytest.importorskip("pycocotools.mask", reason="an extra of its own")

HEIGHT, WIDTH = 12, 16
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
CLASSES = ("background", "person", "dog", "toothbrush")
LARGE = [[1.0, 1.0, 14.0, 1.0, 14.0, 10.0, 1.0, 10.0]]
SMALL = [[3.0, 3.0, 8.5, 3.0, 5.0, 8.0], [10.0, 5.0, 12.0, 5.0, 12.0, 9.0, 10.0, 9.0]]
CROWD = {"size": [HEIGHT, WIDTH], "counts": [100, 60, 32]}

Content = dict[str, Any]


def annotation(number: int, image: int, category: int, segmentation: object, **more: object) -> Content:
    entry = {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation}
    return {**entry, "bbox": [1.0, 1.0, 13.0, 9.0], "area": 10.0, "iscrowd": 0, **more}


CONTENT: Content = {
    "info": {},
    "images": [
        {"id": 9, "file_name": "000000000009.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 4, "file_name": "000000000004.jpg", "height": HEIGHT, "width": WIDTH},
    ],
    "categories": CATEGORIES,
    "annotations": [
        annotation(1, 9, 18, SMALL, bbox=[3.0, 3.0, 9.0, 6.5]),
        annotation(2, 9, 18, LARGE),
        annotation(3, 9, 1, CROWD, iscrowd=1),
        annotation(4, 9, 90, {"size": [HEIGHT, WIDTH], "counts": [0, 2, 190]}, bbox=[0.0, 0.0, 0.0, 2.0]),
    ],
}
CONTENT["annotations"][1]["category_id"] = 1


def write(root: Path, content: Content, name: str = "instances") -> Path:
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"{name}_val2017.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "val2017").mkdir()
    for entry in CONTENT["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "val2017" / entry["file_name"])
    write(tmp_path, CONTENT)
    return tmp_path


def drawn(segmentation: Any) -> np.ndarray:
    """What pycocotools draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy 2
        runs = mask.frPyObjects(segmentation, HEIGHT, WIDTH)
        return mask.decode(mask.merge(runs) if isinstance(runs, list) else runs).astype(bool)


def test_samples_hold_what_the_file_says(root: Path) -> None:
    data = COCO(root, "val2017")
    assert data.names == ["000000000004", "000000000009"]
    assert data.classes == CLASSES
    expected = np.where(drawn(CROWD), VOID, 0)
    expected[drawn(LARGE)] = 1
    expected[drawn(SMALL)] = 2
    expected.T.flat[:2] = 3
    sample = data[1]
    assert sample["labels"].tolist() == data.labels(1).tolist() == expected.tolist()
    assert [shown.tolist() for shown in sample["instances"][:2]] == [drawn(LARGE).tolist(), drawn(SMALL).tolist()]
    assert len(sample["instances"]) == 3
    assert sample["boxes"].tolist() == [[1, 1, 14, 10], [3, 3, 12, 9.5]]
    assert sample["box_labels"].tolist() == [1, 2]
    assert sample["tags"].tolist() == complete(sample, 4)["tags"].tolist() == [1, 1, 1, 1]
    assert data.oddities == {
        "boxes that were cut off at the border of their image": 0,
        "crowds that became void": 1,
        "objects without extent, which have no box": 1,
    }


def test_an_image_without_objects_is_background(root: Path) -> None:
    sample = COCO(root, "val2017")[0]
    assert (sample["labels"] == 0).all()
    assert sample["tags"].tolist() == [1, 0, 0, 0]
    assert sample["instances"].shape == (0, HEIGHT, WIDTH)
    assert sample["boxes"].shape == (0, 4)


def test_a_crowd_alone_is_a_tag(root: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["annotations"] = [annotation(1, 4, 18, CROWD, iscrowd=1)]
    write(root, content)
    sample = COCO(root, "val2017")[0]
    assert sample["tags"].tolist() == [1, 0, 1, 0]
    assert sample["labels"].unique().tolist() == [0, VOID]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 9), st.integers(1, 70), st.data())
def test_runs_in_letters_are_those_in_numbers(height: int, width: int, data: st.DataObject) -> None:
    pixels = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    shown = np.array(pixels, np.uint8).reshape(height, width)
    runs = mask.encode(np.asfortranarray(shown))
    segmentation = {"size": [height, width], "counts": runs["counts"].decode()}
    assert np.array_equal(rasterise("x", segmentation, height, width), shown.astype(bool))


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[]],
        [[1, 1, 5, 1]],
        [[1, 1, 5, 1, 5, 5, 3]],
        [[1, 1, 5, 1, 5, float("nan")]],
        [["a"] * 6],
        {"size": [HEIGHT, WIDTH], "counts": [3, 500]},
        {"size": [HEIGHT, WIDTH], "counts": [3, 5]},
        {"size": [HEIGHT, WIDTH], "counts": [3, -5, HEIGHT * WIDTH + 2]},
        {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": ""},
        {"size": [HEIGHT, WIDTH], "counts": "zz"},
        {"counts": [HEIGHT * WIDTH]},
        7,
    ],
)
def test_what_is_no_shape_is_refused(segmentation: object) -> None:
    """Some of these make pycocotools read memory that is not its own."""
    with pytest.raises(DataError, match=r"^x: expected (polygons|runs).*, got"):
        rasterise("x", segmentation, HEIGHT, WIDTH)


def change(*keys: object, value: object) -> Callable[[Content], None]:
    def spoil(content: Content) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("images"), "expected what COCO's JSON files hold, got: KeyError 'images'"),
        (
            change("images", value=[]),
            "expected images, and 1 to 254 categories, got 0 images, 3 categories|.*an image.*",
        ),
        (change("categories", 1, "id", value=18), "expected every category once, got 18 2 times"),
        (change("categories", 1, "name", value="dog"), "expected every category once, got 'dog' 2 times"),
        (change("categories", 1, "name", value=None), "expected names of categories, got .*"),
        (change("images", 0, "id", value=4), "expected every image once, got 4 2 times"),
        (
            change("images", 0, "file_name", value="x/000000000004.png"),
            "expected every image once, got '000000000004' .*",
        ),
        (change("images", 0, "height", value="a"), "expected height and width of '000000000009.jpg' in pixels"),
        (change("annotations", 0, "image_id", value=7), "annotation 1: expected an image, got 7"),
        (change("annotations", 0, "category_id", value=2), "expected a category, got 2 in 9"),
        (change("annotations", 0, "bbox", value=[1, 2, 3]), r"expected a box of four numbers, got \[1, 2, 3\]"),
        (change("annotations", 0, "bbox", value="\n"), r"expected a box of four numbers, got '\\n'"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_at_once(
    root: Path, spoil: Callable[[Content], None], message: str
) -> None:
    content = copy.deepcopy(CONTENT)
    spoil(content)
    path = write(root, content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: ({message})$"):
        COCO(root, "val2017")


def test_images_must_be_there_and_of_the_size_that_the_file_says(root: Path) -> None:
    path = root / "val2017" / "000000000009.jpg"
    Image.new("RGB", (HEIGHT, WIDTH)).save(path)
    with pytest.raises(DataError, match=f"^{path}: expected 16x12 as instances_val2017.json says, got 12x16$"):
        COCO(root, "val2017")[1]
    path.unlink()
    with pytest.raises(DataError, match=f"^{path}: expected an image, found no file$"):
        COCO(root, "val2017")


def test_boxes_far_beyond_the_image_are_refused(root: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["bbox"] = [1, 1, 40, 4]
    path = write(root, content)
    with pytest.raises(DataError, match=f"^{path}: expected a box within x 0 to 16 and y 0 to 12 for dog, got xmin 1"):
        COCO(root, "val2017")[1]


TEXT = json.dumps(CONTENT)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(TEXT)), st.sampled_from('0123456789.-"[]{},:aeN ')), max_size=3),
    end=st.one_of(st.just(len(TEXT)), st.integers(0, len(TEXT))),
)
def test_damaged_files_give_one_line_or_all_images(root: Path, changes: list[tuple[int, str]], end: int) -> None:
    content = list(TEXT)
    for place, letter in changes:
        content[place % len(content)] = letter
    path = write(root, {})
    path.write_text("".join(content)[:end])
    catalogue = value_or_line(path, lambda: read_catalogue(path))
    if catalogue and all((root / "val2017" / entry["file_name"]).is_file() for entry in catalogue.images):
        assert len(COCO(root, "val2017")) == len(json.loads(path.read_text())["images"])
        value_or_line(root, lambda: list(COCO(root, "val2017")))


PANOPTIC: Content = {
    "images": CONTENT["images"],
    "categories": [{**entry, "isthing": 1} for entry in CATEGORIES] + [{"id": 119, "name": "flower", "isthing": 0}],
    "annotations": [
        {
            "image_id": 9,
            "file_name": "000000000009.png",
            "segments_info": [
                {"id": 70000, "category_id": 18, "iscrowd": 0, "bbox": [0, 0, 3, 12], "area": 36},
                {"id": 300, "category_id": 119, "iscrowd": 0, "bbox": [3, 0, 3, 12], "area": 36},
                {"id": 5, "category_id": 1, "iscrowd": 1, "bbox": [6, 0, 3, 12], "area": 36},
            ],
        },
        {"image_id": 4, "file_name": "000000000004.png", "segments_info": []},
    ],
}
NUMBERS = np.zeros((HEIGHT, WIDTH), np.int64)
NUMBERS[:, :3], NUMBERS[:, 3:6], NUMBERS[:, 6:9] = 70000, 300, 5


def save_numbers(path: Path, numbers: np.ndarray) -> None:
    Image.fromarray(np.stack([numbers, numbers >> 8, numbers >> 16], -1).astype(np.uint8)).save(path)


@pytest.fixture
def panoptic(root: Path) -> Path:
    write(root, PANOPTIC, "panoptic")
    folder = root / "annotations" / "panoptic_val2017"
    folder.mkdir()
    save_numbers(folder / "000000000009.png", NUMBERS)
    save_numbers(folder / "000000000004.png", NUMBERS * 0)
    return root


def test_panoptic_masks_give_things_over_a_background_of_stuff(panoptic: Path) -> None:
    data = Panoptic(panoptic, "val2017")
    assert data.classes == CLASSES
    sample = data[1]
    assert sample["labels"][0].tolist() == [2] * 3 + [0] * 3 + [VOID] * 10
    assert data.labels(1).tolist() == sample["labels"].tolist()
    assert sample["instances"].tolist() == [(NUMBERS == 70000).tolist()]
    assert sample["boxes"].tolist() == [[0, 0, 3, 12]]
    assert sample["tags"].tolist() == [1, 1, 1, 0]
    assert (data[0]["labels"] == VOID).all()


def test_segments_have_numbers(panoptic: Path) -> None:
    content = copy.deepcopy(PANOPTIC)
    content["annotations"][0]["segments_info"][1]["id"] = "300"
    path = write(panoptic, content, "panoptic")
    with pytest.raises(DataError, match=f"^{path}: expected numbers of segments, got '300'$"):
        Panoptic(panoptic, "val2017")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.where(NUMBERS == 5, 6, NUMBERS), "expected pixels of segment 5, found none"),
        (np.where(NUMBERS == 0, 6, NUMBERS), "expected segments that panoptic_val2017.json names, got 6"),
        (NUMBERS.T, r"expected \[12, 16\] as panoptic_val2017.json, got \[16, 12\]"),
    ],
)
def test_masks_that_do_not_fit_their_file_are_refused(panoptic: Path, numbers: np.ndarray, message: str) -> None:
    path = panoptic / "annotations" / "panoptic_val2017" / "000000000009.png"
    save_numbers(path, numbers)
    with pytest.raises(DataError, match=f"^{path}: {message}$"):
        Panoptic(panoptic, "val2017")[1]
    Image.new("L", (WIDTH, HEIGHT)).save(path)
    with pytest.raises(DataError, match=f"^{path}: expected the numbers of segments in RGB, got mode L$"):
        Panoptic(panoptic, "val2017")[1]
    path.unlink()
    with pytest.raises(DataError, match=f"^{path}: expected a mask, found no file$"):
        Panoptic(panoptic, "val2017")
    content = copy.deepcopy(PANOPTIC)
    del content["annotations"][0]
    write(panoptic, content, "panoptic")
    with pytest.raises(DataError, match=r"expected one annotation with a mask of 000000000009.jpg, got 0$"):
        Panoptic(panoptic, "val2017")
