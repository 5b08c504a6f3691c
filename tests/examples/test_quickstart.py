"""The quickstart as a user runs it, on a tiny budget."""

import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from data.scenes import Scenes
from data.write_voc import write_voc
from engine import storage
from matplotlib.image import imread

from tests.run_example import run_example

TINY = ("--steps", "3", "--pretrain-steps", "2", "--scenes", "24", "--size", "32", "--device", "cpu")


quickstart = partial(run_example, "quickstart")


def rows(output: str) -> dict[str, list[str]]:
    """Cells of the table without the seconds, by supervision."""
    names = ("full masks", "size targets", "tag barrier")
    lines = {name: line for line in output.splitlines() for name in names if line.startswith(name)}
    return {name: line.removeprefix(name).split()[:-1] for name, line in lines.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("quickstart") / "new" / "folder"
    return quickstart(*TINY, "--out", folder), folder


def test_it_ends_well(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    assert finished[0].returncode == 0, finished[0].stderr


def test_the_table_has_a_row_per_supervision(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    output = finished[0].stdout
    assert re.search(r"IoU +background +brick +grass +gravel +tissue +mean +of full +seconds\n", output)
    table = rows(output)
    assert list(table) == ["full masks", "size targets", "tag barrier"]
    full_mean = float(table["full masks"][5])
    for *classes, mean, share in table.values():
        assert len(classes) == 5
        assert all(0 <= float(iou) <= 1 for iou in classes)
        assert float(mean) == pytest.approx(sum(map(float, classes)) / 5, abs=1e-3)
        assert float(share.rstrip("%")) / 100 * full_mean == pytest.approx(float(mean), abs=2e-3)
    assert table["full masks"][-1] == "100.0%"


def test_it_says_how_wrong_the_sizes_are(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    found = re.search(r"seed 0: .* 8\.0% nominal, (\d\.\d)% measured", finished[0].stdout)
    assert found
    assert 4 < float(found[1]) < 8


def test_the_progress_bar_shows_loss_and_miou(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    for name in ("full masks", "size targets", "tag barrier"):
        assert re.search(rf"{name}, seed 0: 100%.*3/3.*loss=\d+\.\d+, mIoU=0\.\d+", finished[0].stderr)


def test_the_picture_can_be_looked_at(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    folder = finished[1]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "quickstart.png"]
    picture = imread(folder / "quickstart.png")
    assert picture.shape[:2] == (1100, 900)
    assert picture[..., :3].std() > 0.1


@pytest.mark.slow
def test_same_seed_same_numbers_and_another_seed_others(
    finished: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    expected = rows(finished[0].stdout)
    assert rows(quickstart(*TINY, "--out", tmp_path).stdout) == expected
    assert rows(quickstart(*TINY, "--out", tmp_path, "--seed", "1").stdout) != expected


@pytest.mark.slow
def test_repeats_give_mean_and_spread(tmp_path: Path) -> None:
    output = quickstart(*TINY, "--out", tmp_path, "--repeats", "2", "--split", "final").stdout
    assert "seed 0:" in output
    assert "seed 1:" in output
    assert len(rows(output)) == 3
    assert len(re.findall(r"^ +(±0\.\d{3} +){6}±\d+\.\d% +least share \d+\.\d%$", output, re.MULTILINE)) == 3


def test_help_explains_every_option() -> None:
    done = quickstart("--help")
    assert done.returncode == 0
    text = re.sub(r"\s*│\n│\s*", " ", done.stdout)
    options = set(re.findall(r" --([a-z-]+)[ ,]", text)) - {"help"}
    assert {"data", "root", "sizes", "seed", "precision", "resume", "tensorboard", "out", "steps"} < options
    for option in options:
        assert re.search(rf"--{option}[ ,][^│]*?[A-Z][a-z]+ [^│]*\(default: ", text), option


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stpes", "3"], "Unrecognized options: --stpes, 3"),
        pytest.param(["--steps", "-1"], "--steps: expected at least 1, got -1", marks=pytest.mark.slow),
        pytest.param(["--split", "train"], "invalid choice 'train'", marks=pytest.mark.slow),
        (["--out", f"{__file__}/below"], "cannot write to .*/below: Not a directory"),
        (["--data", "voc"], "--root: expected the folder of --data voc, got none"),
        pytest.param(
            ["--sizes", "sizes.csv", "--repeats", "2"],
            "--repeats: expected 1 with --sizes: other seeds draw other scenes, got 2",
            marks=pytest.mark.slow,
        ),
        (["--data", "voc", "--root", "/nowhere"], "/nowhere: .*"),
        pytest.param(
            ["--accumulate", "3"], "--batch-size: expected a multiple of 3 .*, got 16", marks=pytest.mark.slow
        ),
    ],
)
def test_a_mistake_ends_with_one_line(options: list[str], message: str) -> None:
    done = quickstart(*TINY, *options)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes of ``TINY`` in the layout of VOC, their images as JPEG files."""
    root = tmp_path_factory.mktemp("voc") / "VOCdevkit" / "VOC2012"
    write_voc(root, {"train": Scenes("train", 24, size=32), "val": Scenes("val", 10, size=32)})
    return root.parents[1]


@pytest.mark.slow
def test_it_trains_on_a_folder_in_the_layout_of_voc(voc: Path, tmp_path: Path) -> None:
    sizes = voc / "VOCdevkit" / "VOC2012" / "sizes.csv"
    done = quickstart(*TINY, "--data", "voc", "--root", voc, "--sizes", sizes, "--workers", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows(done.stdout)) == 3
    assert "measured" not in done.stdout, "the sizes of a file are taken as they are"
    assert (tmp_path / "quickstart.png").exists()


@pytest.mark.slow
def test_it_trains_on_plain_folders(voc: Path, tmp_path: Path) -> None:
    source = voc / "VOCdevkit" / "VOC2012"
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (tmp_path / split / folder).mkdir(parents=True)
        shutil.copy(source / "classes.txt", tmp_path / split)
        for name in (source / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split():
            shutil.copy(source / "JPEGImages" / f"{name}.jpg", tmp_path / split / "images")
            shutil.copy(source / "SegmentationClass" / f"{name}.png", tmp_path / split / "masks")
    done = quickstart(*TINY, "--data", "folder", "--root", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(rows(done.stdout)) == 3
    (tmp_path / "train" / "images" / f"train_{3:06d}.jpg").write_bytes(b"")
    for workers in (0, 2):
        done = quickstart(*TINY, "--data", "folder", "--root", tmp_path, "--workers", workers, "--out", tmp_path / "no")
        assert done.returncode == 1
        assert re.search(
            r"^error: .*train_000003.jpg: expected a JPEG, PNG, BMP or TIFF image that can be read, .*$",
            done.stderr,
            re.M,
        )
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_scenes_on_disk_give_the_sizes_of_scenes_in_memory(
    finished: tuple[subprocess.CompletedProcess[str], Path], voc: Path, tmp_path: Path
) -> None:
    done = quickstart(*TINY, "--data", "voc", "--root", voc, "--out", tmp_path)
    assert done.stdout.splitlines()[0] == finished[0].stdout.splitlines()[0]


@pytest.mark.slow
def test_two_processes_give_one_table_and_one_picture(tmp_path: Path) -> None:
    done = quickstart(*TINY, "--out", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("IoU") == done.stdout.count("picture:") == done.stdout.count("seed 0:") == 1
    assert len(rows(done.stdout)) == 3
    assert len(re.findall("full masks, seed 0: 100%.*3/3", done.stderr.replace("\r", "\n"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "quickstart.png"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_table(
    finished: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    """As if it had been stopped during the second training."""
    first = quickstart(*TINY, "--out", tmp_path)
    folder = tmp_path / "checkpoints"
    expected = storage.load(folder / "tag_barrier_seed_0.pt")["model"]
    (folder / "size_targets_seed_0.pt").unlink()
    (folder / "tag_barrier_seed_0.pt").unlink()
    resumed = quickstart(*TINY, "--out", tmp_path, "--resume")
    assert rows(resumed.stdout) == rows(first.stdout) == rows(finished[0].stdout)
    assert "full masks, seed 0: 100%|██████████| 3/3 [00:00<?" in resumed.stderr, "nothing was left to do"
    for name, values in storage.load(folder / "tag_barrier_seed_0.pt")["model"].items():
        assert torch.equal(values, expected[name]), name
    other = quickstart(*TINY, "--out", tmp_path, "--resume", "--seed", "0", "--size", "40")
    assert re.fullmatch(
        r"error: cannot resume: .*pretraining_seed_0.pt was written with size 32, not 40\n", other.stderr
    )
