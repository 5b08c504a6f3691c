"""The GPU benchmark's command: its tables, its help, its errors. The measurements need a GPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import segloss
from benchmarks import gpu
from benchmarks.gpu_report import Report, Row, Target, line, markdown, replace
from tests import forked

ROOT = Path(__file__).parents[1]
WHERE = {"date": "today", "gpu": "one", "torch": "2", "triton": "3", "limits": {"copy": 4.2e12}}


run = partial(forked.run, "-m", "benchmarks.gpu")


def test_rows_of_a_group_share_a_table() -> None:
    rows = [
        {"group": "a", "method": "one", "milliseconds": 2.0, "error": 1e-4},
        {"group": "a", "method": "two", "milliseconds": 1.0, "error": 2e-3, "share of pairs": 0.25, "seconds": 3.04},
        {"group": "b", "method": "one", "milliseconds": 0.5},
        {"group": "c", "method": "one", "error": 1e-4},
    ]
    table = markdown(rows, WHERE)
    assert "today, one, torch 2, Triton 3; copies move 4.20 TB/s" in table
    assert "| method | result | error | share of pairs |\n|---|---|---|---|\n| one | 2 ms | 0.0001 | - |" in table
    assert "| two | 1 ms | 0.002 | 0.25 |" in table
    assert "## b\n\n| method | result |\n|---|---|\n| one | 0.5 ms |" in table
    assert "| one | right | 0.0001 |" in table
    assert line(rows[1]) == "1 ms, error 0.002, share of pairs 0.25 [3.0 s]"


def test_targets_stand_beside_what_was_measured() -> None:
    rows = [
        {"group": "a", "method": "one", "milliseconds": 2.0, "share": 0.5},
        {"group": "a", "method": "two", "share": math.nan, "failed": "no"},
    ]
    targets = [
        Target("a", "one", "milliseconds", 2.0),
        Target("a", "one", "milliseconds", 1.5),
        Target("a", "one", "share", 0.6),
        Target("a", "one", "share", 0.5),
        Target("a", "two", "share", 0.5),
        Target("a", "two", "milliseconds", 0.5),
    ]
    table = markdown(rows, WHERE | {"limits": {}}, targets)
    assert "Triton 3. Median" in table
    assert "| a: one | at most 2 ms | 2 | pass |\n| a: one | at most 1.5 ms | 2 | MISS |" in table
    assert "| a: one | at least 0.6 share | 0.5 | MISS |\n| a: one | at least 0.5 share | 0.5 | pass |" in table
    assert "| a: two | at least 0.5 share | nan | MISS |\n| a: two | at most 0.5 ms | - | not measured |" in table


def test_a_failure_costs_no_other_result(tmp_path: Path) -> None:
    report = Report(tmp_path, WHERE)

    def good(row: Row) -> None:
        row["milliseconds"] = 2.0

    def bad(row: Row) -> None:
        row["error"] = 0.5
        gpu.require(row["error"], 0.1)

    def refused(row: Row) -> None:
        raise segloss.ToleranceError("method: too far off")

    def hopeless() -> None:
        raise RuntimeError("no\nmemory")

    report.attempt("b", hopeless)
    for method, measure in (("one", good), ("two", bad), ("three", refused), ("four", good)):
        report.add("a", method, measure)
    written = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert all(row.pop("seconds") >= 0 for row in written)
    assert written == [
        {"group": "b", "method": "set-up", "failed": "RuntimeError: no"},
        {"group": "a", "method": "one", "milliseconds": 2.0},
        {"group": "a", "method": "two", "error": 0.5, "failed": "ArithmeticError: error 5.0e-01 above 0.1"},
        {"group": "a", "method": "three", "refused": "method: too far off"},
        {"group": "a", "method": "four", "milliseconds": 2.0},
    ]
    assert report.failed() == 2
    table = (tmp_path / "gpu.md").read_text()
    assert "| two | FAILED (ArithmeticError: error 5.0e-01 above 0.1) | 0.5 |" in table
    assert "| three | refused | - |" in table


def test_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    report = Report(tmp_path, WHERE, limit=0.0)

    def unwanted(*_: Row) -> None:
        raise AssertionError

    report.add("a", "one", unwanted)
    report.attempt("b", unwanted)
    assert report.left_out == ["a: one", "b"]
    assert report.failed() == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["left out"] == ["a: one", "b"]
    assert "Left out, the time being over: a: one; b." in (tmp_path / "gpu.md").read_text()


def test_results_are_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "gpu.json", Path.write_text
    replace(path, "first")

    def interrupted(self: Path, text: str) -> None:
        write(self, text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(path, "second")
    assert path.read_text() == "first"


def test_nan_is_no_small_error() -> None:
    with pytest.raises(ArithmeticError):
        gpu.require(float("nan"), 1.0)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, small, and with everything that only a GPU can tell left out."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SIDES", (16, 24))
    monkeypatch.setattr(gpu, "SHAPES", ((2, 5, 8, 8),))
    for name, number in (("milliseconds", 1.0), ("extra_megabytes", 1.0), ("kept_share", 0.5)):
        monkeypatch.setattr(gpu, name, lambda *_, number=number: number)


MOST = {"exponentials": 1e12, "products": 1e14, "copy": 1e12}


@pytest.mark.usefixtures("_small")
@pytest.mark.slow
def test_every_case_runs_and_is_right(tmp_path: Path) -> None:
    report = Report(tmp_path, WHERE)
    gpu.measure_all(report, ["astronaut", "coffee"], MOST)
    assert report.failed() == 0, [row for row in report.rows if "failed" in row]
    methods = len(gpu.METHODS)
    assert len(report.rows) == methods * (2 * 2 + 2 + 2 * 3) + 2 * 2
    assert all("milliseconds" in row or "refused" in row for row in report.rows)
    exact = [row for row in report.rows if row["method"] == "exact" and "error" in row]
    assert len(exact) == 9
    assert max(row["error"] for row in exact) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_every_target_is_measured_in_the_quick_run_and_in_the_long_one(tmp_path: Path) -> None:
    for measure in (gpu.measure_table, lambda report, most: gpu.measure_all(report, gpu.TUNED[:1], most)):
        report = Report(tmp_path, WHERE, gpu.targets())
        measure(report, MOST)
        assert report.failed() == 0, [row for row in report.rows if "failed" in row]
        rows = {(row["group"], row["method"]): row for row in report.rows}
        for group, method, key, _ in gpu.targets():
            assert key in rows[group, method] or "refused" in rows[group, method]


@pytest.mark.usefixtures("_small")
def test_a_step_under_autocast_is_near_one_in_float32() -> None:
    row: Row = {}
    gpu.mixed_precision(row)
    assert 0 < row["error"] < 2e-2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")
def test_every_kernel_is_checked_and_right_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether its kernels are interpreted."""
    command = [sys.executable, "-m", "pytest", "tests/interpreted_checks.py", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_case_of_attribution_runs_and_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"WIDTHS": (8,) * 5, "CAM_SIDE": 64, "ADVCAM_SIDE": 64, "ADVCAM_STEPS": 2, "FICKLENET_SIDE": 6}
    small |= {"WALK_SIDE": 16, "CRF_SIZES": ((24, 32), (30, 40)), "DEVICE": "cpu"}
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    for name in ("milliseconds", "extra_megabytes"):
        monkeypatch.setattr(gpu, name, lambda *_: 1.0)
    report = Report(tmp_path, WHERE)
    gpu.measure_attribution(report)
    assert report.failed() == 0, [row for row in report.rows if "failed" in row]
    assert len(report.rows) >= 13


def test_help_says_what_is_measured() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "float64" in done.stdout


def test_a_limit_that_is_none_is_an_error() -> None:
    done = run("--limit", "0")
    assert done.returncode == 2
    assert done.stderr == "--limit: expected a positive number of seconds, got 0\n"


def test_no_gpu_is_one_line() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr == "benchmarks.gpu: expected a CUDA device, found none\n"


@pytest.mark.gpu
@pytest.mark.slow
def test_the_command_writes_results_with_their_environment(tmp_path: Path) -> None:
    done = run("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert {"date", "gpu", "torch", "triton", "limits"} <= written["environment"].keys()
    assert all(row.get("milliseconds", 1) > 0 for row in written["results"])
    assert written["left out"] == []
    assert (tmp_path / "gpu.md").read_text() in done.stdout
