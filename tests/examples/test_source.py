"""Which images an example trains on and which it evaluates, and what it knows of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import quickstart
import torch
from data.sample import DataError, Images
from data.scenes import Scenes
from data.source import Options
from data.stream import Prepared
from data.write_voc import write_voc
from PIL import Image
from torch import Tensor


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "voc"
    splits = {"train": ("train", 5), "val": ("val", 4), "final": ("final", 3), "other": ("train", 2)}
    write_voc(root, {name: Scenes(split, count, size=32) for name, (split, count) in splits.items()})  # type: ignore[arg-type]
    return root


def first_names(images: Images) -> tuple[int, str]:
    return len(images), images.names[0]


def test_voc_images_are_those_of_the_lists(voc: Path) -> None:
    options = Options(data="voc", root=voc)
    assert first_names(options.images("train")) == (5, "train_000000")
    assert first_names(options.images("evaluate")) == (4, "val_000000")
    assert first_names(replace(options, split="final").images("evaluate")) == (3, "final_000000")
    assert first_names(replace(options, train_split="other").images("train")) == (2, "other_000000")


def test_scenes_are_those_of_the_splits_and_of_the_seed() -> None:
    options = Options(scenes=3, size=32, seed=7)
    for images, scenes in (
        (options.images("train"), Scenes("train", 3, size=32, seed=7)),
        (options.images("evaluate"), Scenes("val", 200, size=32)),
        (replace(options, split="final").images("evaluate"), Scenes("final", 200, size=32)),
    ):
        assert len(images) == len(scenes)
        assert images.names[2] == f"size32_seed{scenes.seed}_000002"
        assert torch.equal(images[2]["image"], scenes[2].image)
        assert torch.equal(images[2]["labels"], scenes[2].labels)


def folder(root: Path, split: str, classes: str) -> None:
    for name in ("images", "masks"):
        (root / split / name).mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(root / split / "images" / f"{split}.jpg")
    Image.new("L", (40, 20), 1).save(root / split / "masks" / f"{split}.png")
    (root / split / "classes.txt").write_text(classes)


def test_folders_must_have_the_same_classes(tmp_path: Path) -> None:
    folder(tmp_path, "train", "ground\ncat\ndog\n")
    folder(tmp_path, "val", "ground\ncat\ndog\n")
    options = Options(data="folder", root=tmp_path)
    assert options.images("train").names == ["train"]
    assert options.images("evaluate").names == ["val"]
    (tmp_path / "val" / "classes.txt").write_text("ground\ndog\ncat\n")
    with pytest.raises(DataError, match=r"/val/classes.txt: expected the classes of .*/train/classes.txt, got others"):
        options.images("evaluate")


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--root: expected the folder of --data voc, got none"):
        Options(data="voc")
    with pytest.raises(ValueError, match="--root: expected --data voc or --data folder with it, got --data scenes and"):
        Options(root=tmp_path)
    with pytest.raises(ValueError, match="--train-split: expected --data voc with it, got --data folder"):
        Options(data="folder", root=tmp_path, train_split="trainaug")


def test_size_targets_of_a_file_go_to_the_images_that_it_names(voc: Path, tmp_path: Path) -> None:
    names = Options(data="voc", root=voc).images("train").names
    path = tmp_path / "sizes.csv"
    rows = [f"{name},0.{i + 1},0.{9 - i}" for i, name in enumerate(names)]
    path.write_text("\n".join(["name,grass,background", *reversed(rows)]))
    images = quickstart.training_images(quickstart.Config(data="voc", root=voc, sizes=path))
    for i in range(len(names)):
        torch.testing.assert_close(images[i]["targets"], torch.tensor([(9 - i) / 10, 0, (i + 1) / 10, 0, 0]))


def test_a_mask_that_is_all_void_and_a_class_without_pixels_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, "train", "ground\ncat\n")
    config = quickstart.Config(data="folder", root=tmp_path)
    quickstart.training_images(config)
    assert "no training mask has a pixel of ground" in capsys.readouterr().out
    Image.new("L", (40, 20), 255).save(tmp_path / "train" / "masks" / "train.png")
    with pytest.raises(DataError, match="train: expected a mask with labelled pixels, got one that is all void"):
        quickstart.training_images(config)


@pytest.mark.parametrize("loss", quickstart.SUPERVISIONS.values(), ids=list(quickstart.SUPERVISIONS))
def test_padding_does_not_count_in_the_losses(
    loss: Callable[[Tensor, dict[str, Tensor]], Tensor], tmp_path: Path
) -> None:
    """The image is twice as wide as high, so that half of the square is padding."""
    folder(tmp_path, "train", "ground\ncat\n")
    config = quickstart.Config(data="folder", root=tmp_path, size=32)
    sample = Prepared(quickstart.training_images(config), config.fit())[0, 0]
    batch = {name: value.as_subclass(Tensor)[None] for name, value in sample.items()}
    batch["labelled"] = (batch["labels"] != 255).sum()
    assert batch["labelled"] == 32 * 16
    logits = torch.randn(1, 2, 32, 32, requires_grad=True)
    loss(logits, batch).backward()
    assert logits.grad is not None
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[8:24] = True
    # The CRF loss looks at maps of half the size, and so at the two rows of padding beside the image.
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[6:26] = False
    assert (logits.grad[0, :, inside] != 0).all()
    assert (logits.grad[0, :, outside] == 0).all()
