"""Folders in the layout of Pascal VOC 2012, written by hand: what samples hold, and one line for what is wrong."""

import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from data.augment import Crop
from data.boxes import read_boxes
from data.sample import VOID, DataError, Sample, collate, complete
from data.voc import CLASSES, VOC
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

HEIGHT, WIDTH = 5, 8
NAMES = ("2007_000032", "2008_000007", "2011_003353")
SHADES = {name: shade for shade, name in enumerate(NAMES, 100)}  # what the images look like

Box = tuple[object, object, object, object]


def thing(name: str, box: Box, extra: str = "") -> str:
    ends = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"\n\t\t\t<{end}>{value}</{end}>" for end, value in ends)
    return f"\n\t<object>\n\t\t<name>{name}</name>{extra}\n\t\t<bndbox>{corners}\n\t\t</bndbox>\n\t</object>"


def annotation(*objects: str) -> str:
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation>\n\t<folder>VOC2012</folder>{size}{''.join(objects)}\n</annotation>\n"


HEAD = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>1</ymin><xmax>3</xmax><ymax>2</ymax></bndbox></part>"
ANNOTATIONS = (
    annotation(thing("person", (1, 1, WIDTH, HEIGHT), HEAD), thing("cat", (3, 2, 3, 2), "<difficult>1</difficult>")),
    annotation(),
    annotation(thing("dog", (1.5, "2.7000000762939453", 7.25, 4))),
)
BOXES = ([[0, 0, 8, 5], [2, 1, 3, 2]], [], [[0.5, 1.7, 7.25, 4]])
BOX_LABELS = ([15, 8], [], [12])


def labels_of(index: int) -> np.ndarray:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[1:3, 2 : 4 + index], labels[4] = 20 - index, VOID
    return labels


def save_mask(labels: np.ndarray, path: Path) -> None:
    image = Image.fromarray(labels)
    image.putpalette(bytes(range(256)) * 3)
    image.save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    for folder in (lists, root / "JPEGImages", root / "SegmentationClass", root / "Annotations"):
        folder.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(NAMES) + "\n")
    (lists / "val.txt").write_text(f"{NAMES[2]}\n{NAMES[0]}\n")
    for i, name in enumerate(NAMES):
        Image.new("RGB", (WIDTH, HEIGHT), (SHADES[name], 0, 0)).save(root / "JPEGImages" / f"{name}.jpg")
        save_mask(labels_of(i), root / "SegmentationClass" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(ANNOTATIONS[i])
    return root


def shades(samples: Sequence[Sample] | VOC) -> list[int]:
    return [round(sample["image"][0].mean().item() * 255) for sample in samples]  # type: ignore[union-attr]


def test_samples_hold_what_is_in_the_files(root: Path) -> None:
    data = VOC(root, "train", boxes=True)
    assert data.names == list(NAMES)
    assert data.classes == CLASSES
    assert len(CLASSES) == 21
    assert [abs(one - other) <= 1 for one, other in zip(shades(data), SHADES.values(), strict=True)] == [True] * 3
    for i, sample in enumerate(data):
        assert list(sample) == ["image", "labels", "boxes", "box_labels"]
        assert sample["image"].shape == (3, HEIGHT, WIDTH)
        assert isinstance(sample["labels"], tv_tensors.Mask)
        assert sample["labels"].tolist() == labels_of(i).tolist()
        assert isinstance(sample["boxes"], tv_tensors.BoundingBoxes)
        assert sample["boxes"].canvas_size == (HEIGHT, WIDTH)
        assert sample["boxes"].dtype == torch.float32
        assert sample["boxes"].shape == (len(BOXES[i]), 4)
        torch.testing.assert_close(sample["boxes"].data.flatten(), torch.tensor(BOXES[i]).float().flatten())
        assert sample["box_labels"].dtype == torch.int64
        assert sample["box_labels"].tolist() == BOX_LABELS[i]


@pytest.mark.parametrize("above", ["VOC2012", "VOCdevkit/VOC2012"])
def test_the_root_may_be_a_folder_above(root: Path, above: str) -> None:
    home = root.parent / "home"
    (home / above).parent.mkdir(parents=True)
    root.rename(home / above)
    assert len(VOC(home, "train")) == 3


def test_a_split_has_the_images_of_its_list_in_order(root: Path) -> None:
    data = VOC(root, "val", masks=False)
    assert data.names == [NAMES[2], NAMES[0]]
    assert [list(sample) for sample in data] == [["image"]] * 2
    assert shades(data)[0] > shades(data)[1]


def test_other_classes_come_from_a_file(root: Path) -> None:
    (root / "classes.txt").write_text("\n".join(["nothing", *(f"thing {i}" for i in range(20))]))
    (root / "Annotations" / f"{NAMES[0]}.xml").write_text(annotation(thing("thing 3", (1, 1, 2, 2))))
    data = VOC(root, "train", boxes=True)
    assert data.classes[:2] == ("nothing", "thing 0")
    assert data[0]["box_labels"].tolist() == [4]
    with pytest.raises(DataError, match=r"expected objects called thing 0, thing 1, .*, got 'dog'$"):
        data[2]


def test_classes_that_cannot_be_read_are_refused(root: Path) -> None:
    (root / "classes.txt").symlink_to(root / "gone.txt")
    with pytest.raises(DataError, match=r"classes\.txt: expected a text file, found no file$"):
        VOC(root, "train")


@pytest.mark.parametrize("file", ["trainaug.txt", "train_aug.txt"])
@pytest.mark.parametrize("line", ["{}", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"])
def test_masks_of_sbd_come_first_in_trainaug_and_nowhere_else(root: Path, file: str, line: str) -> None:
    lists = root / "ImageSets" / "Segmentation"
    (lists / file).write_text("\n".join(map(line.format, NAMES)))
    assert torch.equal(VOC(root, "trainaug").labels(1), VOC(root, "train").labels(1)), "without a folder of its own"
    (root / "SegmentationClassAug").mkdir()
    Image.new("L", (WIDTH, HEIGHT), 7).save(root / "SegmentationClassAug" / f"{NAMES[1]}.png")
    data = VOC(root, "trainaug")
    assert data.names == list(NAMES)
    assert (data[1]["labels"] == 7).all()
    assert (data.labels(1) == 7).all()
    assert data[0]["labels"].tolist() == labels_of(0).tolist()
    assert VOC(root, "train")[1]["labels"].tolist() == labels_of(1).tolist()


def test_sizes_come_from_a_table_and_give_tags(root: Path) -> None:
    shutil.rmtree(root / "SegmentationClass")
    (root / "sizes.csv").write_text(f"name,dog,background\n{NAMES[0]},0.25,0.75\n{NAMES[2]},0,1\n")
    data = VOC(root, "val", masks=False, sizes=root / "sizes.csv")
    samples = [complete(sample, 21) for sample in data]
    assert [list(sample) for sample in samples] == [["image", "sizes", "valid", "tags"]] * 2
    assert samples[1]["sizes"].nonzero().flatten().tolist() == [0, 12]
    assert samples[1]["sizes"][12] == 0.25
    assert samples[0]["tags"].nonzero().flatten().tolist() == [0]


def test_labels_and_sizes_are_read_without_the_images(root: Path) -> None:
    data = VOC(root, "train", boxes=True)
    shutil.rmtree(root / "JPEGImages")
    shutil.rmtree(root / "Annotations")
    assert data.labels(2).tolist() == labels_of(2).tolist()
    sizes = data.sizes()
    assert sizes.shape == (3, 21)
    for i, row in enumerate(sizes):
        counts = np.bincount(labels_of(i)[:4].ravel(), minlength=21)
        torch.testing.assert_close(row, torch.from_numpy(counts / counts.sum()).float())


def test_tags_follow_from_boxes_for_want_of_labels(root: Path) -> None:
    for i, sample in enumerate(VOC(root, "train", masks=False, boxes=True)):
        tags = complete(sample, 21)["tags"]
        assert tags.nonzero().flatten().tolist() == sorted({0, *BOX_LABELS[i]})


def test_workers_give_the_same_samples(root: Path) -> None:
    data = VOC(root, "train", boxes=True)
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)
    batches = list(loader)
    assert [len(batch["image"]) for batch in batches] == [2, 1]
    samples = list(data)
    for name in ("image", "labels"):
        expected = torch.stack([sample[name].as_subclass(torch.Tensor) for sample in samples])
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected)
    for name in ("boxes", "box_labels"):
        values = [value for batch in batches for value in batch[name]]
        assert all(torch.equal(value, sample[name]) for value, sample in zip(values, samples, strict=True))


def test_it_can_be_sent_to_a_process_that_was_not_forked(root: Path) -> None:
    (root / "sizes.csv").write_text("name,background\n" + "".join(f"{name},1\n" for name in NAMES))
    data = VOC(root, "train", boxes=True, sizes=root / "sizes.csv")
    received = pickle.loads(pickle.dumps(data))
    assert received.names == data.names
    for sample, original in zip(received, data, strict=True):
        assert sample.keys() == original.keys()
        assert all(torch.equal(value, original[name]) for name, value in sample.items())


def test_samples_can_be_cropped(root: Path) -> None:
    """The whole way: what is read and cropped still has boxes around the pixels that they belong to."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[1:4, 2:7] = 15
    save_mask(labels, root / "SegmentationClass" / f"{NAMES[0]}.png")
    (root / "Annotations" / f"{NAMES[0]}.xml").write_text(annotation(thing("person", (3, 2, 7, 4))))
    sample = VOC(root, "train", boxes=True)[0]
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(50):
        crop = complete(Crop(4, (1.0, 1.0))(sample, rng), 21)
        y, x = (crop["labels"] == 15).nonzero(as_tuple=True)
        extents = [[x.min(), y.min(), x.max() + 1, y.max() + 1]] if len(x) else []
        assert crop["boxes"].tolist() == extents
        assert crop["tags"][15] == len(extents)
        seen += len(extents)
    assert seen > 25


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def write(path: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(text)


TRAIN = "ImageSets/Segmentation/train.txt"
AT_ONCE = [
    (remove("."), ": expected a folder, found none"),
    (
        remove("JPEGImages"),
        ": expected JPEGImages in it, or in VOC2012 or VOCdevkit/VOC2012 below it, found none",
    ),
    (remove("ImageSets"), "/ImageSets/Segmentation: expected a folder, found none"),
    (remove(TRAIN), f"/{TRAIN}: expected the list of the images of a split, found no file"),
    (write(TRAIN, "\n"), f"/{TRAIN}: expected at least one name, got an empty file"),
    (write(TRAIN, f"{NAMES[0]}\n\n{NAMES[1]}\n"), f"/{TRAIN}:2: expected a name, got an empty line"),
    (
        write(TRAIN, f"{NAMES[1]}\n{NAMES[0]}\n{NAMES[1]}\n"),
        rf"/{TRAIN}:3: expected every name once, got {NAMES[1]} again \(first in line 1\)",
    ),
    (
        write(TRAIN, f"{NAMES[1]}\n/JPEGImages/{NAMES[1]}.jpg /SegmentationClassAug/{NAMES[1]}.png\n"),
        rf"/{TRAIN}:2: expected every name once, got {NAMES[1]} again \(first in line 1\)",
    ),
    (write(TRAIN, "2007_1\n"), f"/{TRAIN}:1: expected an image, found none at .*/JPEGImages/2007_1.jpg"),
    (
        remove("SegmentationClass"),
        f"/{TRAIN}:1: expected a mask of {NAMES[0]}, found none at .*/SegmentationClass/{NAMES[0]}.png "
        f"or .*/SegmentationClassAug/{NAMES[0]}.png",
    ),
    (remove(f"Annotations/{NAMES[1]}.xml"), f"/Annotations/{NAMES[1]}.xml: expected an annotation, found no file"),
    (write("classes.txt", "sky\nsky\n"), r"/classes.txt:2: expected every name once, got sky again .*"),
]


@pytest.mark.parametrize(("spoil", "message"), AT_ONCE)
def test_what_is_missing_is_said_at_once(root: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(root)
    with pytest.raises(DataError, match=f"^{re.escape(str(root))}{message}$"):
        VOC(root, "train", boxes=True)


def test_a_list_of_trainaug_that_is_missing_is_said_at_once(root: Path) -> None:
    with pytest.raises(DataError, match=r"/trainaug\.txt: expected the list of the images of a split, found no file$"):
        VOC(root, "trainaug")


def test_an_image_without_a_row_of_sizes_is_said_at_once(root: Path) -> None:
    (root / "sizes.csv").write_text(f"name,background\n{NAMES[0]},1\n")
    with pytest.raises(DataError, match=f"expected a row for each image, got none for {NAMES[1]} \\(2 missing\\)$"):
        VOC(root, "train", sizes=root / "sizes.csv")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            write(f"JPEGImages/{NAMES[2]}.jpg", ""),
            f"/JPEGImages/{NAMES[2]}.jpg: expected a JPEG, PNG, BMP or TIFF image that can be read, got: .*",
        ),
        (
            lambda root: save_mask(labels_of(0).T.copy(), root / "SegmentationClass" / f"{NAMES[2]}.png"),
            rf"/SegmentationClass/{NAMES[2]}.png: expected 8x5 \(width x height\) as the image, got 5x8",
        ),
        (
            lambda root: save_mask(labels_of(0) + 1, root / "SegmentationClass" / f"{NAMES[2]}.png"),
            rf"/SegmentationClass/{NAMES[2]}.png: expected labels from 0 to 20 and 255 \(void\), got 21",
        ),
        (
            write(f"Annotations/{NAMES[2]}.xml", "<annotation><object>"),
            f"/Annotations/{NAMES[2]}.xml: expected an XML file that can be read, got: no element found: .*",
        ),
        (remove(f"Annotations/{NAMES[2]}.xml"), f"/Annotations/{NAMES[2]}.xml: expected an XML file .*, got: .*"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_when_it_is_read(
    root: Path, spoil: Callable[[Path], object], message: str
) -> None:
    data = VOC(root, "train", boxes=True)
    spoil(root)
    with pytest.raises(DataError, match=f"^{re.escape(str(root))}{message}$"):
        list(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected an XML file that can be read, got: .*"),
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "expected an XML file that can be read, got: .*"),
        (annotation(thing("horse", (1, 1, 2, 2))), "expected objects called cat, dog, got 'horse'"),
        (annotation(thing("sky", (1, 1, 2, 2))), "expected objects called cat, dog, got 'sky'"),
        (annotation("<object><bndbox/></object>"), "expected objects called cat, dog, got ''"),
        (
            annotation("<object><name>cat</name></object>"),
            "expected a box within x 1 to 8 and y 1 to 5 for cat, got xmin nan, ymin nan, xmax nan, ymax nan",
        ),
        (annotation("<object><name>cat</name>" + HEAD + "</object>"), ".* for cat, got xmin nan, .*"),
        *(
            (
                annotation(thing("dog", box)),
                "expected a box within x 1 to 8 and y 1 to 5 for dog, got xmin {}, ymin {}, xmax {}, ymax {}".format(
                    *box
                ),
            )
            for box in [
                (0, 1, 4, 4),
                (1, 0, 4, 4),
                (1, 1, 9, 4),
                (1, 1, 4, 6),
                (1, 1, 8.5, 4),
                (4, 1, 3, 4),
                (1, 4, 8, 3),
                (5, 1, 2, 4),
                (1, 1, "nan", 4),
                (1, 1, "inf", 4),
            ]
        ),
        (annotation(thing("dog", (1, 1, "four", 4))), ".*, got xmin 1, ymin 1, xmax nan, ymax 4"),
    ],
)
def test_wrong_annotations_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.xml"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: {message}$"):
        read_boxes(path, ("sky", "cat", "dog"), HEIGHT, WIDTH)
