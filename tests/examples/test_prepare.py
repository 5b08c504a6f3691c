"""Data sets in every form become VOC's layout, without a lost image, or one line says why not."""

import dataclasses
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import prepare
import pytest
import scipy.io
import torch
from data.convert import RECORDS
from data.sample import VOID, DataError
from data.tags import read_tags
from data.voc import VOC
from data.write_voc import palette
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.run_example import run_example

HEIGHT, WIDTH = 36, 48
LISTS = {"train": ("a", "b", "c"), "val": ("d", "e")}
CLASSES = ("background", "cat", "dog")


def labels_of(name: str) -> np.ndarray:
    """Two objects with a void border, at a place of their own; none in ``c``."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    place = 3 * "abcde".index(name)
    labels[4 : 20 + place, 5:20], labels[10:16, 30 : 34 + place], labels[:, 20] = 1, 2, VOID
    return labels * (name != "c")


def save_image(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng("abcde".index(name)).integers(0, 60, (HEIGHT, WIDTH, 3))
    Image.fromarray((noise + 60 * labels_of(name)[..., None].clip(max=3)).astype(np.uint8)).save(path)


def save_mask(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    image.save(path)


def voc(root: Path) -> None:
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in LISTS.items():
        (lists / f"{split}.txt").write_text("".join(f"/JPEGImages/{name}.jpg /Masks/{name}.png\r\n" for name in names))
        for name in names:
            save_image(root / "JPEGImages" / f"{name}.jpg", name)
            save_mask(root / "Masks" / f"{name}.png", labels_of(name))
    (root / "classes.txt").write_text("\n".join(CLASSES))


def colours(root: Path) -> None:
    voc(root)
    for path in (root / "Masks").iterdir():
        Image.open(path).convert("RGB").save(path)


def sbd(root: Path) -> None:
    for split, names in LISTS.items():
        (root / f"{split}.txt").parent.mkdir(exist_ok=True)
        (root / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            save_image(root / "img" / f"{name}.jpg", name)
            (root / "cls").mkdir(exist_ok=True)
            scipy.io.savemat(root / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels_of(name)}})


def folder(root: Path) -> None:
    for split, names in LISTS.items():
        for name, ending in zip(names, ("png", "tif", "bmp"), strict=False):
            save_image(root / split / "images" / f"{name}.{ending}", name)
            save_mask(root / split / "masks" / f"{name}.png", labels_of(name))
        (root / split / "images" / f"._{names[0]}.png").write_bytes(b"of macOS")
        (root / split / "classes.txt").write_text("\n".join(CLASSES))


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of runs as COCO counts them: by columns, of 0 first."""
    values = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])
    ends = np.flatnonzero(values[1:] != values[:-1])
    return np.diff(np.concatenate([[0], ends])).tolist()


def coco(root: Path, *, panoptic: bool = False) -> None:
    (root / "annotations").mkdir(parents=True)
    for split, names in LISTS.items():
        images, annotations = [], []
        for number, name in enumerate(names):
            save_image(root / split / f"{name}.jpg", name)
            labels = labels_of(name)
            images.append({"id": number, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
            segments = []
            for label, crowd in ((1, 0), (2, 0), (VOID, 1)):
                rows, columns = np.nonzero(labels == label)
                if len(rows):
                    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
                    shape = {"size": [HEIGHT, WIDTH], "counts": runs(labels == label)}
                    category = 10 + (1 if crowd else label)
                    segments.append(
                        {"id": len(segments) + 1, "image_id": number, "category_id": category, "iscrowd": crowd}
                        | {"bbox": [float(end) for end in box], "segmentation": shape}
                    )
            if panoptic:
                numbers = np.full((HEIGHT, WIDTH, 3), 0, np.uint8)
                numbers[..., 1] = 1  # 256: stuff
                for segment, label in zip(segments, (1, 2, VOID), strict=False):
                    numbers[labels == label] = (segment["id"], 0, 0)
                segments.append({"id": 256, "category_id": 99, "iscrowd": 0, "bbox": [0, 0, 1, 1]})
                masks = root / "annotations" / f"panoptic_{split}"
                masks.mkdir(exist_ok=True)
                Image.fromarray(numbers).save(masks / f"{name}.png")
                annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
            else:
                annotations += segments
        categories = [{"id": 11, "name": "cat", "isthing": 1}, {"id": 12, "name": "dog", "isthing": 1}]
        categories += [{"id": 99, "name": "grass", "isthing": 0}] * panoptic
        content = {"images": images, "annotations": annotations, "categories": categories}
        kind = "panoptic" if panoptic else "instances"
        (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


def panoptic(root: Path) -> None:
    coco(root, panoptic=True)


MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "voc": (voc, "voc"),
    "colours": (colours, "voc"),
    "sbd": (sbd, "sbd"),
    "folder": (folder, "folder"),
    "coco": (coco, "coco"),
    "panoptic": (panoptic, "panoptic"),
}
NEEDS_PYCOCOTOOLS = pytest.mark.skipif(not importlib.util.find_spec("pycocotools"), reason="an extra of its own")
EVERY = pytest.mark.parametrize(
    "form", [pytest.param(form, marks=NEEDS_PYCOCOTOOLS if form == "coco" else ()) for form in MAKERS]
)


def made(tmp_path: Path, form: str, **options: object) -> prepare.Config:
    """A data set, and how to prepare it."""
    make, data = MAKERS[form]
    root = tmp_path / form
    root.mkdir()
    make(root)
    return prepare.Config(out=tmp_path / "out", data=data, root=root, **options)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@EVERY
def test_every_form_gives_the_same_masks_and_tags(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made(tmp_path, form)
    before = files(config.root)
    prepare.main(config)
    assert files(config.root) == before, "the data set is untouched"
    for split, names in LISTS.items():
        data = VOC(config.out, split, sizes=config.out / "sizes.csv")
        assert data.names == list(names)
        tags = read_tags(config.out / "tags.csv", names, data.classes)
        for i, name in enumerate(names):
            assert data.labels(i).tolist() == labels_of(name).tolist()
            assert data[i]["image"].shape == (3, HEIGHT, WIDTH)
            assert tags[i, 1:3].tolist() == [int(name != "c")] * 2
            shares = [(labels_of(name) == label).sum() for label in range(3)]
            torch.testing.assert_close(data[i]["sizes"][:3], torch.tensor(shares) / sum(shares))
    printed = capsys.readouterr().out
    assert "3 images in train\n       2 images in val\n" in printed
    assert "1 images without an object" in printed
    assert "48 pixels of width, 48 to 48" in printed
    assert f"picture: {config.out / 'samples.png'}" in printed
    with Image.open(config.out / "samples.png") as picture:
        assert min(picture.size) > 500
    odd = {
        "colours": "5 masks of VOC's colours that became indices",
        "folder": "5 images that were no JPEG and became one, at quality 95\n",
        "coco": "4 crowds that became void",
    }
    assert odd.get(form, "") in printed
    if form == "folder":
        assert "2 hidden files that were passed over" in printed
    else:
        assert len(list(config.root.rglob("*.jpg"))) == 5
        for path in config.root.rglob("*.jpg"):
            assert (config.out / "JPEGImages" / path.name).read_bytes() == path.read_bytes(), "copied as it is"


def test_objects_and_boxes_are_written_where_there_are_any(tmp_path: Path) -> None:
    config = made(tmp_path, "panoptic")
    prepare.main(config)
    sample = VOC(config.out, "train", boxes=True)[0]
    assert sample["boxes"].tolist() == [[5, 4, 20, 20], [30, 10, 34, 16]]
    assert sample["box_labels"].tolist() == [1, 2]
    objects = np.array(Image.open(config.out / "SegmentationObject" / "a.png"))
    assert np.array_equal(objects == VOID, labels_of("a") == VOID)
    assert sorted(np.unique(objects)) == [0, 1, 2, VOID]


def xml(left: int, top: int, right: int, bottom: int) -> str:
    """What labelImg writes, counted from 0, far ends inclusive."""
    ends = zip(("xmin", "ymin", "xmax", "ymax"), (left, top, right - 1, bottom - 1), strict=True)
    corners = "".join(f"<{end}>{value}</{end}>" for end, value in ends)
    return f"<annotation><object><name>dog</name><bndbox>{corners}</bndbox></object></annotation>"


def labelme(left: int, top: int, right: int, bottom: int) -> str:
    shape = {"label": "dog", "shape_type": "rectangle", "points": [[right, top], [left, bottom]]}
    return json.dumps({"shapes": [shape], "imageHeight": HEIGHT, "imageWidth": WIDTH})


def vott(boxes: dict[str, tuple[int, int, int, int]]) -> str:
    assets = {}
    for file, (left, top, right, bottom) in boxes.items():
        points = [{"x": left, "y": top}, {"x": right, "y": bottom}]
        asset = {"name": file, "size": {"width": WIDTH, "height": HEIGHT}}
        assets[f"id of {file}"] = {"asset": asset, "regions": [{"tags": ["dog"], "points": points}]}
    return json.dumps({"assets": assets})


@pytest.mark.parametrize("tool", ["labelImg", "LabelMe", "VoTT"])
def test_boxes_without_masks_give_tags(tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = made(tmp_path, "folder", masks=False, boxes=True, first=0, val="none")
    shutil.rmtree(config.root / "train" / "masks")
    annotations = config.root / "train" / "annotations"
    annotations.mkdir()
    boxes = {"a.png": (0, 0, WIDTH + 1, HEIGHT), "b.tif": (4, 4, 10, 10), "c.bmp": (4, 4, 10, 10)}
    if tool == "VoTT":
        (annotations / "my-export.json").write_text(vott(boxes))
    for file, box in boxes.items() if tool != "VoTT" else ():
        ending, write = (".xml", xml) if tool == "labelImg" else (".json", labelme)
        (annotations / file).with_suffix(ending).write_text(write(*box))
    prepare.main(config)
    printed = capsys.readouterr().out
    assert "3 boxes\n" in printed
    assert "1 boxes that were cut off at the border of their image" in printed
    data = VOC(config.out, "train", masks=False, boxes=True)
    assert data[0]["boxes"].tolist() == [[0, 0, WIDTH, HEIGHT]]
    assert data[1]["boxes"].tolist() == [[4, 4, 10, 10]]
    assert read_tags(config.out / "tags.csv", data.names, data.classes).tolist() == [[1, 0, 1]] * 3
    assert not (config.out / "SegmentationClass").exists()
    assert not (config.out / "sizes.csv").exists()


def test_tags_of_a_file_are_compared_with_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags = {"a": ["cat"], "b": ["cat", "dog"], "c": ["cat"], "d": ["cat", "dog"], "e": ["dog", "cat"]}
    (tmp_path / "tags.json").write_text(json.dumps(tags))
    config = made(tmp_path, "voc", tags=tmp_path / "tags.json")
    prepare.main(config)
    assert "2 images whose tags are not the classes of their masks" in capsys.readouterr().out
    found = read_tags(config.out / "tags.csv", LISTS["train"], CLASSES)
    assert found.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    rows = (config.out / "ImageSets" / "Main" / "dog_train.txt").read_text()
    assert rows == "a -1\nb  1\nc -1\n"


def test_tags_of_a_file_are_enough(tmp_path: Path) -> None:
    (tmp_path / "tags.json").write_text(json.dumps({name: ["dog"] for name in "abcde"}))
    config = made(tmp_path, "folder", masks=False, tags=tmp_path / "tags.json")
    prepare.main(config)
    assert read_tags(config.out / "tags.csv", LISTS["val"], CLASSES).tolist() == [[1, 0, 1]] * 2
    with pytest.raises(ValueError, match="--no-masks: expected --boxes or --tags with it, got neither"):
        dataclasses.replace(config, tags=None)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(tmp_path, "colours")
    prepare.main(whole)
    stopped = dataclasses.replace(whole, out=tmp_path / "stopped")
    read = VOC.__getitem__
    seen: list[int] = []

    def limited(self: VOC, index: int) -> object:
        seen.append(index)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(VOC, "__getitem__", limited)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(stopped)
    assert not (stopped.out / "ImageSets").exists(), "a folder with lists is complete"
    with (stopped.out / RECORDS).open("a") as file:
        file.write('{"name": "b", "spl')  # as a kill leaves it
    prepare.main(stopped)
    assert seen[:6] == [0, 1, 2, 2, 0, 1], "what is done is not read again"
    assert files(stopped.out) == files(whole.out)
    prepare.main(stopped)
    assert files(stopped.out) == files(whole.out)


def test_a_run_that_was_killed_at_its_first_file_goes_on(tmp_path: Path) -> None:
    config = made(tmp_path, "voc")
    config.out.mkdir()
    (config.out / f"{RECORDS}.partial").write_text("{")
    prepare.main(config)
    assert len(VOC(config.out, "train")) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"name": 1},
        {"split": "test"},
        {"height": "36"},
        {"tags": [1, 0]},
        {"tags": [1, 0, -1]},
        {"sizes": [1.0]},
        {"sizes": ["1", "0", "0"]},
        {"void": None},
        {"boxes": True},
        {"oddities": [1]},
        {"more": 1},
    ],
)
def test_records_that_no_run_has_written_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    config = made(tmp_path, "voc")
    prepare.main(config)
    path = config.out / RECORDS
    first, second, *rows = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(json.loads(second) | change), *rows, ""]))
    with pytest.raises(DataError, match=rf"{RECORDS}: expected the file of an earlier run, got another: .+$"):
        prepare.main(config)


def test_folders_in_use_and_other_settings_are_refused(tmp_path: Path) -> None:
    config = made(tmp_path, "voc")
    with pytest.raises(DataError, match="expected another folder than the data set's own"):
        prepare.main(dataclasses.replace(config, out=config.root))
    prepare.main(config)
    before = files(config.out)
    with pytest.raises(DataError, match=r"out: expected the folder of a run with .*, got one with "):
        prepare.main(dataclasses.replace(config, val="none"))
    assert files(config.out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    with pytest.raises(
        DataError, match="mine: expected a new or an empty folder, or one of an earlier run, got another"
    ):
        prepare.main(dataclasses.replace(config, out=tmp_path / "mine"))
    (tmp_path / "mine" / RECORDS).write_text("{}\n{]\n")
    with pytest.raises(
        DataError, match=r"mine: expected the folder of a run with|mine/.*: expected the file of an earlier"
    ):
        prepare.main(dataclasses.replace(config, out=tmp_path / "mine"))


@pytest.mark.parametrize("name", ["dog ", "big\ndog", "\0", "\ud800"])
def test_classes_that_a_list_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    config = made(tmp_path, "panoptic")
    for split in LISTS:
        path = config.root / "annotations" / f"panoptic_{split}.json"
        path.write_text(path.read_text().replace('"dog"', json.dumps(name)))
    with pytest.raises(DataError, match=r"^train and val: expected names that a list can hold, got '.+'$"):
        prepare.main(config)


def test_lists_must_not_share_images(tmp_path: Path) -> None:
    config = made(tmp_path, "voc", val="train")
    with pytest.raises(DataError, match=r"train and val: expected lists without a common image, got a in both$"):
        prepare.main(config)


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: content[:-40] if len(content) > 60 else b"",
    lambda content: content[::-1],
]


@EVERY
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_named_and_no_image_is_lost(
    form: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    config = made(tmp_path_factory.mktemp("damaged"), form)
    hidden = re.compile(r"/\._")
    paths = sorted(path for path in config.root.rglob("*") if path.is_file() and not hidden.search(str(path)))
    path = data.draw(st.sampled_from(paths))
    if data.draw(st.booleans()):
        path.unlink()
    else:
        path.write_bytes(data.draw(st.sampled_from(DAMAGES))(path.read_bytes()))
    wanted = {split: _lines(config, split) for split in LISTS}
    try:
        prepare.main(config)
    except DataError as error:
        message = str(error)
    else:
        message = None
        for split, count in wanted.items():
            assert len(VOC(config.out, split)) == count
    assert message is None or re.fullmatch(r"[^\n]*: (annotation \d+: )?expected [^\n]*, (got|found)[^\n]*", message)


def _lines(config: prepare.Config, split: str) -> int:
    """How many images a list or a folder that could be damaged names."""
    if config.data == "folder":
        return sum(not path.name.startswith(".") for path in (config.root / split / "images").iterdir())
    if config.data in ("coco", "panoptic"):
        return len(LISTS[split])
    where = config.root if config.data == "sbd" else config.root / "ImageSets" / "Segmentation"
    path = where / f"{split}.txt"
    return len(path.read_text().rstrip().splitlines()) if path.is_file() else 0


@pytest.mark.slow
@EVERY
def test_pseudo_labels_run_on_what_it_wrote(form: str, tmp_path: Path) -> None:
    config = made(tmp_path, form)
    prepare.main(config)
    tiny = ("--pretrain-steps", 1, "--classifier-steps", 1, "--steps", 1, "--maps", 2, "--batch-size", 2, "--size", 32)
    words = ("--data", "voc", "--root", config.out, "--network", "small", "--out", tmp_path / "runs")
    done = run_example("pseudo_labels", *words, *tiny, "--device", "cpu")
    assert done.returncode == 0, done.stderr


def test_the_command_says_what_it_did_and_ends_with_one_line_where_it_cannot(tmp_path: Path) -> None:
    config = made(tmp_path, "voc")
    words = ("--data", "voc", "--root", config.root, "--out", config.out)
    done = run_example("prepare", *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"images: 100%.* 5/5 ", done.stderr)
    assert done.stdout.endswith(f"python examples/pseudo_labels.py --data voc --root {config.out}\n")
    (config.root / "Masks" / "b.png").unlink()
    done = run_example("prepare", *words, "--val", "none", "--out", tmp_path / "other")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: .*/train.txt:2: expected a mask of b, found none at .*/Masks/b.png or .*\n", done.stderr
    )
