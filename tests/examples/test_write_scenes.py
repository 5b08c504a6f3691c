"""What the scenes write is what others read as Pascal VOC, and nothing of the user's is touched."""

import csv
import errno
import re
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from data.scenes import CLASSES, Scene, Scenes
from data.write_voc import write_voc
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from PIL import Image
from torchvision.datasets import VOCDetection, VOCSegmentation

from tests.run_example import run_example

EXAMPLES = Path(__file__).parents[2] / "examples"
SPLITS = {
    "train": Scenes("train", 6, size=40, seed=3, void_width=1),
    "val": Scenes("val", 3, size=48),
    "final": Scenes("final", 2, out_of_distribution=True),
}
SCENES = {f"{split}_{i:06d}": scenes[i] for split, scenes in SPLITS.items() for i in range(len(scenes))}
EACH = pytest.mark.parametrize(("name", "scene"), SCENES.items(), ids=SCENES.keys())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc") / "VOCdevkit" / "VOC2012"
    write_voc(folder, SPLITS)
    return folder


def indices(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        assert image.mode == "P"
        return torch.from_numpy(np.array(image)).long()


def test_the_folder_has_the_files_of_the_layout_and_no_others(root: Path) -> None:
    lists = {*SPLITS, *(f"{category}_{split}" for split in SPLITS for category in CLASSES[1:])}
    expected = {"classes.txt", "sizes.csv"}
    expected |= {f"ImageSets/Segmentation/{split}.txt" for split in SPLITS}
    expected |= {f"ImageSets/Main/{name}.txt" for name in lists}
    for folder, ending in (
        ("JPEGImages", "jpg"),
        ("SegmentationClass", "png"),
        ("SegmentationObject", "png"),
        ("Annotations", "xml"),
    ):
        expected |= {f"{folder}/{name}.{ending}" for name in SCENES}
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == expected


@EACH
def test_images_are_those_of_the_scenes_up_to_jpeg(root: Path, name: str, scene: Scene) -> None:
    with Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
        assert image.format == "JPEG"
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3, "colours at full resolution"
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert (pixels / 255 - scene.image).abs().mean() < 0.015
    assert (pixels / 255 - scene.image).abs().mean() < (pixels.roll(1, -1) / 255 - scene.image).abs().mean()


@EACH
def test_class_masks_are_the_labels(root: Path, name: str, scene: Scene) -> None:
    assert torch.equal(indices(root / "SegmentationClass" / f"{name}.png"), scene.labels)


@EACH
def test_object_masks_number_the_objects_from_one(root: Path, name: str, scene: Scene) -> None:
    objects = indices(root / "SegmentationObject" / f"{name}.png")
    assert torch.equal(objects == 255, scene.labels == 255)
    assert set(objects.unique().tolist()) - {0, 255} == set(range(1, len(scene.instances) + 1))
    for i, visible in enumerate(scene.instances):
        assert torch.equal(objects == i + 1, visible)


def test_some_scenes_have_void_and_some_have_several_objects(root: Path) -> None:
    assert (SCENES["train_000000"].labels == 255).any()
    assert max(len(scene.boxes) for scene in SCENES.values()) > 1
    assert min(len(scene.boxes) for scene in SCENES.values()) == 0


@pytest.mark.parametrize("folder", ["SegmentationClass", "SegmentationObject"])
def test_masks_have_the_colours_of_voc(root: Path, folder: str) -> None:
    with Image.open(root / folder / "train_000000.png") as image:
        colours = np.reshape(image.getpalette(), (-1, 3)).tolist()
    assert len(colours) == len({tuple(colour) for colour in colours}) == 256
    published = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 4: [0, 0, 128], 8: [64, 0, 0]}
    published |= {15: [192, 128, 128], 20: [0, 64, 128], 255: [224, 224, 192]}
    assert {index: colours[index] for index in published} == published


@EACH
def test_annotations_have_the_boxes_counted_from_one_with_their_last_pixel(root: Path, name: str, scene: Scene) -> None:
    annotation = ElementTree.parse(root / "Annotations" / f"{name}.xml").getroot()
    size = scene.labels.shape[-1]
    assert annotation.tag == "annotation"
    assert annotation.findtext("folder") == "VOC2012"
    assert annotation.findtext("filename") == f"{name}.jpg"
    assert annotation.findtext("source/database")
    assert [annotation.findtext(f"size/{side}") for side in ("width", "height", "depth")] == [f"{size}", f"{size}", "3"]
    assert annotation.findtext("segmented") == "1"

    entries = annotation.findall("object")
    boxes = [
        [int(entry.findtext(f"bndbox/{end}", "")) for end in ("xmin", "ymin", "xmax", "ymax")] for entry in entries
    ]
    assert [[x1 - 1, y1 - 1, x2, y2] for x1, y1, x2, y2 in boxes] == scene.boxes.tolist()
    assert [CLASSES.index(entry.findtext("name", "")) for entry in entries] == scene.box_labels.tolist()
    for entry in entries:
        assert [entry.findtext(tag) for tag in ("pose", "truncated", "difficult")] == ["Unspecified", "0", "0"]


def test_an_object_in_a_corner_has_a_box_from_one_to_the_last_pixel(tmp_path: Path) -> None:
    labels = torch.zeros(8, 12, dtype=torch.int64)
    labels[:3, :5] = 2
    mask = labels == 2
    scene = Scene(
        image=torch.rand(3, 8, 12),
        labels=labels,
        tags=torch.tensor([1, 0, 1, 0, 0]),
        sizes=torch.tensor([81 / 96, 0, 15 / 96, 0, 0]),
        boxes=torch.tensor([[0.0, 0.0, 5.0, 3.0]]),
        box_labels=torch.tensor([2]),
        instances=mask[None],
        parts=labels,
        companions=labels,
    )
    write_voc(tmp_path / "voc", {"train": [scene]})  # type: ignore[dict-item]
    text = (tmp_path / "voc" / "Annotations" / "train_000000.xml").read_text()
    assert re.findall(r"<(width|height|x...|y...)>(\d+)</", text) == [
        ("width", "12"),
        ("height", "8"),
        ("xmin", "1"),
        ("ymin", "1"),
        ("xmax", "5"),
        ("ymax", "3"),
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_lists_name_every_image_of_their_split_in_order(root: Path, split: str) -> None:
    names = [name for name in SCENES if name.startswith(split)]
    for kind in ("Segmentation", "Main"):
        assert (root / "ImageSets" / kind / f"{split}.txt").read_text() == "".join(f"{name}\n" for name in names)
    for label, category in enumerate(CLASSES[1:], start=1):
        rows = [f"{name}  1" if (SCENES[name].labels == label).any() else f"{name} -1" for name in names]
        assert (root / "ImageSets" / "Main" / f"{category}_{split}.txt").read_text().splitlines() == rows


def test_classes_are_listed_with_the_background_first(root: Path) -> None:
    assert (root / "classes.txt").read_text() == "background\nbrick\ngrass\ngravel\ntissue\n"


def test_sizes_are_the_shares_of_the_labelled_pixels(root: Path) -> None:
    with (root / "sizes.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", *CLASSES]
    assert [name for name, *_ in rows] == list(SCENES)
    for name, *shares in rows:
        labels = SCENES[name].labels[SCENES[name].labels != 255]
        counted = [(labels == label).sum().item() / labels.numel() for label in range(len(CLASSES))]
        assert [float(share) for share in shares] == pytest.approx(counted, abs=1e-7)
        assert sum(map(float, shares)) == pytest.approx(1, abs=1e-6)
        assert torch.equal(torch.tensor([float(share) for share in shares]), SCENES[name].sizes), "all of float32"


@pytest.mark.parametrize("split", ["train", "val"])
def test_torchvision_reads_the_folder(root: Path, split: str) -> None:
    scenes = SPLITS[split]
    segmentation = VOCSegmentation(root.parents[1], year="2012", image_set=split)
    detection = VOCDetection(root.parents[1], year="2012", image_set=split)
    assert len(segmentation) == len(detection) == len(scenes)
    for scene, (image, mask), (_, target) in zip(scenes, segmentation, detection, strict=True):
        assert image.size == mask.size == tuple(scene.labels.shape)
        assert torch.equal(torch.from_numpy(np.array(mask)).long(), scene.labels)
        names = [entry["name"] for entry in target["annotation"]["object"]]
        assert names == [CLASSES[label] for label in scene.box_labels]


def test_a_folder_in_use_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: expected a new or an empty folder, got a folder")):
        write_voc(tmp_path, SPLITS)
    with pytest.raises(ValueError, match=r"thesis\.txt: expected a new or an empty folder, got a file"):
        write_voc(tmp_path / "thesis.txt", SPLITS)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    write_voc(tmp_path, {"val": Scenes("val", 1, size=32)})
    assert (tmp_path / "ImageSets" / "Segmentation" / "val.txt").read_text() == "val_000000\n"


def test_a_run_that_ends_early_leaves_whole_files_and_no_list(tmp_path: Path) -> None:
    class Interrupted(Scenes):
        def __getitem__(self, index: int) -> Scene:
            if index == 2:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    root = tmp_path / "voc"
    with pytest.raises(KeyboardInterrupt):
        write_voc(root, {"train": Interrupted("train", 4, size=32)})
    assert not (root / "ImageSets").exists()
    left = sorted(path.stem for path in root.rglob("*") if path.is_file())
    assert left == ["train_000000"] * 4 + ["train_000001"] * 4


def test_what_has_its_name_is_complete_wherever_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": Scenes("train", 1, size=32)}
    write_voc(tmp_path / "voc", splits)
    expected = {path.relative_to(tmp_path / "voc"): path.read_bytes() for path in (tmp_path / "voc").rglob("*.*")}
    assert len(expected) == 4 + 2 + 6  # of the image, of all images, lists
    disk, written = Path.write_bytes, []

    def limited(path: Path, content: bytes) -> int:
        written.append(path.name)
        if len(written) == stop:
            disk(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return disk(path, content)

    monkeypatch.setattr(Path, "write_bytes", limited)
    for stop in range(1, len(expected) + 1):
        written.clear()
        root = tmp_path / str(stop) / "voc"
        with pytest.raises(OSError, match="No space left"):
            write_voc(root, splits)
        files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
        complete = {path: content for path, content in files.items() if ".partial" not in str(path)}
        assert complete == {path: expected[path] for path in complete}
        assert len(complete) == min(stop - 1, 6)
        assert not (root / "ImageSets").exists()


write_scenes = partial(run_example, "write_scenes")


TINY = ("--train", "3", "--val", "2", "--final", "1", "--size", "32", "--seed", "5")


@pytest.mark.slow
def test_the_command_writes_three_splits_and_says_how_to_use_them(tmp_path: Path) -> None:
    root = tmp_path / "my scenes"
    done = write_scenes(*TINY, "--out", root)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == f"6 scenes are in '{root}'; to use them: python examples/quickstart.py --data voc --root '{root}'\n"
    )
    assert re.search(r"scenes: 100%.* 6/6 ", done.stderr)
    for split, seed, count in (("train", 5, 3), ("val", 0, 2), ("final", 0, 1)):
        names = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        scenes = Scenes(split, count, size=32, seed=seed, void_width=1)
        assert len(names) == count
        for name, scene in zip(names, scenes, strict=True):
            assert torch.equal(indices(root / "SegmentationClass" / f"{name}.png"), scene.labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", EXAMPLES], "examples: expected a new or an empty folder, got a folder with files"),
        pytest.param(
            ["--out", f"{__file__}/below"], "cannot write to .*/below: Not a directory", marks=pytest.mark.slow
        ),
        pytest.param(["--out", "x", "--train", "0"], "--train: expected at least 1, got 0", marks=pytest.mark.slow),
        pytest.param([], "--out", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_ends_with_one_line(options: list[str], message: str) -> None:
    done = write_scenes(*options)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr)
