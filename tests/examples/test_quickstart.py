"""The quickstart as a user runs it, on a tiny budget."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parents[2]
TINY = ("--steps", "3", "--pretrain-steps", "2", "--scenes", "24", "--size", "32", "--device", "cpu")


def quickstart(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


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
        assert re.search(rf"{name}: 100%.*3/3.*loss=\d+\.\d+, mIoU=0\.\d+", finished[0].stderr)


def test_the_picture_can_be_looked_at(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    folder = finished[1]
    assert [path.name for path in folder.iterdir()] == ["quickstart.png"]
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
    for option in ("steps", "pretrain-steps", "scenes", "size", "split", "seed", "repeats", "device", "out"):
        assert re.search(rf"--{option} \S+ +[A-Z][a-z]+", done.stdout), option


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stpes", "3"], "Unrecognized options: --stpes, 3"),
        pytest.param(["--steps", "-1"], "--steps: expected at least 1, got -1", marks=pytest.mark.slow),
        pytest.param(["--split", "train"], "invalid choice 'train'", marks=pytest.mark.slow),
        (["--out", f"{__file__}/below"], "cannot write to .*/below: Not a directory"),
    ],
)
def test_a_mistake_ends_with_one_line(options: list[str], message: str) -> None:
    done = quickstart(*TINY, *options)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr)
