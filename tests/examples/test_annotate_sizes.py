"""Sizes typed by a person: what is asked, what is written, what is refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import annotate_sizes
import pytest
import torch
from annotate_sizes import read_answer
from data.files import read_sizes
from data.folder import Folder
from data.sample import class_sizes
from data.scenes import Scenes
from data.write_voc import write_voc
from matplotlib.image import imread

from tests.run_example import ROOT, run_example

CLASSES = ("background", "cat", "traffic light")
NAMES = [f"size32_seed0_{i:06d}" for i in range(3)]
SCENES = ("background", "brick", "grass", "gravel", "tissue")


def annotate(folder: Path, answers: str, *options: object) -> subprocess.CompletedProcess[str]:
    """``python examples/annotate_sizes.py`` on a few scenes, with these answers typed."""
    where = ("--scenes", 3, "--size", 32, "--sizes", folder / "sizes.csv", "--out", folder / "out")
    return run_example("annotate_sizes", *where, *options, typed=answers)


@pytest.mark.parametrize(
    ("answer", "cells", "expected"),
    [
        ("cat 2.5, traffic light 1", 20, [0.825, 0.125, 0.05]),
        ("traffic light 1/2", 9, [17 / 18, 0, 1 / 18]),
        ("cat 12%,traffic light  3 %", 9, [0.85, 0.12, 0.03]),
        ("cat 100%", 20, [0, 1, 0]),
        ("cat .5, traffic light 0", 20, [0.975, 0.025, 0]),
        ("cat 1/3, traffic light 26/3", 9, [0, 1 / 27, 26 / 27]),
        ("", 20, [1, 0, 0]),
        ("Cat 2, TRAFFIC Light 1", 20, [0.85, 0.1, 0.05]),
        ("cat: 2, traffic light:1", 20, [0.85, 0.1, 0.05]),
        ("cat 1 1/2, traffic light: 2 1/4", 20, [0.8125, 0.075, 0.1125]),
        ("cat 1 1/2%", 20, [0.985, 0.015, 0]),
    ],
)
def test_an_answer_is_cells_or_percent(answer: str, cells: int, expected: list[float]) -> None:
    assert read_answer(answer, CLASSES, cells) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("dog 1", "dog is no class: expected one of cat, traffic light"),
        ("cow 1 1/2", "cow is no class: expected one of cat, traffic light"),
        ("cat 1 1/0", "cat: expected a number .*, got 1/0"),
        ("cat 1, background 2", "background is the rest, which needs no size: expected one of cat, traffic light"),
        ("cat", "cat: expected a class and its size, such as cat 2.5"),
        ("cat -1", "cat: expected a size of at least 0, got -1"),
        ("cat 1/0", "cat: expected a number .*, got 1/0"),
        ("cat many", "cat: expected a number .*, got many"),
        ("cat nan", "cat: expected a number .*, got nan"),
        ("cat 1e999999999", "cat: expected a number .*, got 1e999999999"),
        ("cat 5, traffic light 5", r"expected at most 9 cells, or 100%, in all, got 1\.111 times as much"),
        ("cat 100.1%", r"expected at most 9 cells, or 100%, in all, got 1\.001 times as much"),
        ("Cat 1, cat 2", "cat: expected one size of all its objects together, got two"),
    ],
)
def test_a_wrong_answer_is_explained(answer: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        read_answer(answer, CLASSES, 9)


def test_a_number_in_the_name_of_a_class_is_no_size() -> None:
    assert read_answer("Level 1 1/2", ("background", "level 1", "level"), 10) == pytest.approx([0.95, 0.05, 0])
    assert read_answer("level 1/2, LEVEL 1: 1 1/2", ("background", "level 1", "level"), 10)[1:] == [0.15, 0.05]


@pytest.mark.slow
def test_a_session_that_ends_early_goes_on_with_the_images_that_are_left(tmp_path: Path) -> None:
    first = annotate(tmp_path, "brick two\nbrick 2\nskip\nback\n3x3\ngrass 1\n")  # the input ends
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert "brick: expected a number such as 2.5 or 1/2, or percent such as 12%, got two" in first.stdout
    shown = re.findall(r"seed0_(\d{6}), \d of 3 done, (\d+) cells: (.+\.png)", first.stdout)
    # The answer "back" comes when the third is shown, and leads to the second, which was skipped.
    assert [(name, cells) for name, cells, _ in shown] == [
        ("000000", "20"),
        ("000001", "20"),
        ("000002", "20"),
        ("000001", "20"),
        ("000001", "9"),
        ("000002", "9"),
    ]
    for _, _, path in shown:
        assert imread(path).std() > 0.1
    assert "2 of 3 images are in" in first.stdout
    table = tmp_path / "sizes.csv"
    assert table.read_text().splitlines() == [
        "name,background,brick,grass,gravel,tissue",
        "size32_seed0_000000,0.9,0.1,0,0,0",
        "size32_seed0_000001,0.888888889,0,0.111111111,0,0",
    ]

    second = annotate(tmp_path, "back\ntissue 50%\ngravel 20\nnever read\n")
    shown = re.findall(r"seed0_(\d{6}), (\d) of 3 done", second.stdout)
    assert shown == [("000002", "2"), ("000001", "2"), ("000002", "2")]
    sizes = read_sizes(table, NAMES, SCENES)
    expected = [[0.9, 0.1, 0, 0, 0], [0.5, 0, 0, 0, 0.5], [0, 0, 0, 1, 0]]
    torch.testing.assert_close(sizes, torch.tensor(expected))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("sizes")] == ["sizes.csv"]


def test_the_time_before_a_change_of_grid_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["3X3", "brick 1", "skip", "quit"])

    def typed(prompt: str) -> str:
        time.sleep(0.2)
        return next(answers)

    monkeypatch.setattr("builtins.input", typed)
    config = annotate_sizes.Config(scenes=3, size=32, sizes=tmp_path / "sizes.csv", out=tmp_path / "out")
    seconds = annotate_sizes.annotate(config.images(), {}, config)
    assert list(seconds) == [NAMES[0]], "not of the one that was skipped"
    assert 0.4 <= seconds[NAMES[0]] < 10


@pytest.mark.slow
def test_nothing_is_asked_with_a_table_that_is_wrong(tmp_path: Path) -> None:
    header = "name,background,brick\n"
    rows = ("0.5,0.6", "1,0", "1,0", "1,0", "1")
    names = (NAMES[0], NAMES[1], NAMES[1], "9", NAMES[2])
    lines = [f"{name},{row}\n" for name, row in zip(names, rows, strict=True)]
    (tmp_path / "sizes.csv").write_text(header + "".join(lines))
    done = annotate(tmp_path, "brick 1\n")
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*sizes\.csv:2: {NAMES[0]}: expected sizes that sum to 1 .*--check.*\n", done.stderr)
    checked = annotate(tmp_path, "", "--check")
    assert checked.returncode == 1
    table = tmp_path / "sizes.csv"
    assert checked.stdout.splitlines() == [
        f"{table}:2: {NAMES[0]}: expected sizes that sum to 1 within 0.001, got a sum of 1.1",
        f"{table}:4: expected one row for each image, got another for {NAMES[1]}",
        f"{table}:5: expected the name of an image, got '9'",
        f"{table}:6: expected 3 fields as in the header, got 2",
        f"{table}: expected a row for each image, got none for {NAMES[0]} (2 missing)",
    ]


@pytest.mark.slow
def test_a_right_table_passes_the_check_and_a_missing_one_does_not(tmp_path: Path) -> None:
    missing = annotate(tmp_path, "", "--check")
    assert re.fullmatch(r"error: .*sizes\.csv: expected a text file, found no file\n", missing.stderr)
    assert missing.returncode == 1
    rows = [f"{NAMES[2]},0,1", f"{NAMES[0]},0.25,0.75", f"{NAMES[1]},1,0"]
    (tmp_path / "sizes.csv").write_text("\n".join(["name,brick,background", *rows]))
    other = annotate(tmp_path, "", "--check", "--seed", "7")
    assert "expected the name of an image, got 'size32_seed0_000002'" in other.stdout, "other scenes"
    assert other.returncode == 1
    done = annotate(tmp_path, "", "--check")
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path / 'sizes.csv'}: right, with a row for each of 3 images\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    options = ("--scenes", "3", "--sizes", str(tmp_path / "sizes.csv"), "--out", str(tmp_path / "out"))
    command = [sys.executable, str(ROOT / "examples" / "annotate_sizes.py"), *options]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) as process:
        process.stdin.write("brick 1\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("size48_seed0_000001"):  # the second image: it waits for an answer
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "1 of 3 images are in" in rest
    assert (tmp_path / "sizes.csv").read_text().splitlines()[1:] == ["size48_seed0_000000,0.95,0.05,0,0,0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/`` with 4 scenes as JPEG files and their masks."""
    root = tmp_path_factory.mktemp("folder")
    source = root / "VOC2012"
    write_voc(source, {"train": Scenes("train", 4, size=32, void_width=1)})
    for old, new in (("JPEGImages", "images"), ("SegmentationClass", "masks")):
        shutil.copytree(source / old, root / "train" / new)
    shutil.copy(source / "classes.txt", root / "train")
    return root


@pytest.mark.slow
def test_masks_tell_how_wrong_the_sizes_are(folder: Path, tmp_path: Path) -> None:
    """The person knows the sizes, and says 80% of that of grass each time."""
    images = Folder(folder / "train")
    exact = torch.stack([class_sizes(images.labels(i), 5) for i in range(4)])
    told = exact * torch.tensor([1, 1, 0.8, 1, 1])
    absent = next((i, k) for i in range(3) for k in range(1, 5) if not exact[i, k])
    told[absent] = 0.01  # of the background
    answers = [", ".join(f"{SCENES[k]} {100 * float(row[k]):.6f}%" for k in range(1, 5) if row[k]) for row in told]
    done = annotate(tmp_path, "\n".join([*answers[:3], "quit"]) + "\n", "--data", "folder", "--root", folder, "--masks")
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.partition("class ")[2].splitlines()[1:-1]}
    present = exact[:3] > 0
    assert present[:, 2].any()
    assert list(table) == [*(SCENES[k] for k in range(5) if (exact[:3, k] + told[:3, k]).any()), "all"]
    everything = table.pop("all")  # "all objects"
    expected = 0.2 * present[:, 2].sum() / present[:, 1:].sum()
    assert everything[1] == "3"
    assert everything[3:] == [f"{float(expected):.1%}", "1"]
    for k, name in enumerate(SCENES):
        if present[:, k].any():
            count, seconds, error, wrong = table[name]
            assert wrong == str(int(absent[1] == k))
            assert int(count) == present[:, k].sum()
            assert 0 <= float(seconds) < 60
            if name == "grass":
                assert error == "20.0%"
            elif name != "background":  # which gets what grass lost
                assert error == "0.0%"
    assert re.search(r"\b\d+\.\d seconds per image, 3 images$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_images_without_masks_can_be_annotated_and_a_training_reads_the_sizes(folder: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "data" / "train"
    shutil.copytree(folder / "train" / "images", unlabelled / "images")
    shutil.copy(folder / "train" / "classes.txt", unlabelled)
    done = annotate(tmp_path, "brick 3\n\ngrass 20%\ntissue 5\n", "--data", "folder", "--root", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert "4 of 4 images are in" in done.stdout

    data = tmp_path / "with masks"
    for split in ("train", "val"):
        shutil.copytree(folder / "train", data / split)
    budget = ("--steps", 2, "--pretrain-steps", 1, "--batch-size", 2, "--size", 32, "--device", "cpu")
    sizes = ("--sizes", tmp_path / "sizes.csv", "--out", tmp_path / "quickstart")
    trained = run_example("quickstart", "--data", "folder", "--root", data, *budget, *sizes)
    assert trained.returncode == 0, trained.stderr
    assert "size targets" in trained.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "4x4"], "invalid choice '4x4'"),
        (["--scenes", "0"], "--scenes: expected at least 1, got 0"),
        (["--data", "voc"], "--root: expected the folder of --data voc, got none"),
        (["--data", "folder", "--root", "/nowhere"], "/nowhere: expected a folder, found none"),
        (["--out", f"{__file__}/below"], "cannot write to .*/below: Not a directory"),
        (["--sizes", f"{__file__}/sizes.csv"], "cannot write .*sizes.csv: .*"),
    ],
)
def test_a_mistake_ends_with_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    done = annotate(tmp_path, "brick 1\n", *options)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr)
