"""The GPU benchmark's command: its table, its help, its errors. The measurements need a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import segloss
from benchmarks import gpu
from benchmarks.gpu import Report, Row, line, markdown

ROOT = Path(__file__).parents[1]
WHERE = {"date": "today", "gpu": "one", "torch": "2", "triton": "3", "limits": {"copy": 4.2e12}}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


def test_rows_of_a_group_share_a_table() -> None:
    rows = [
        {"group": "a", "method": "one", "milliseconds": 2.0, "error": 1e-4},
        {"group": "a", "method": "two", "milliseconds": 1.0, "error": 2e-3, "share of pairs": 0.25},
        {"group": "b", "method": "one", "milliseconds": 0.5},
    ]
    table = markdown(rows, WHERE)
    assert "today, one, torch 2, Triton 3; copies move 4.20 TB/s" in table
    assert "| method | time | error | share of pairs |\n|---|---|---|---|\n| one | 2 ms | 0.0001 | - |" in table
    assert "| two | 1 ms | 0.002 | 0.25 |" in table
    assert "## b\n\n| method | time |\n|---|---|\n| one | 0.5 ms |" in table
    assert line(rows[1]) == "a: two 1 ms, error 0.002, share of pairs 0.25"


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


def test_nan_is_no_small_error() -> None:
    with pytest.raises(ArithmeticError):
        gpu.require(float("nan"), 1.0)


def test_every_case_runs_and_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, small, and with everything that only a GPU can tell left out."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SIDES", (16, 24))
    monkeypatch.setattr(gpu, "SHAPES", ((2, 5, 8, 8),))
    for name, number in (("milliseconds", 1.0), ("extra_megabytes", 1.0), ("kept_share", 0.5)):
        monkeypatch.setattr(gpu, name, lambda *_, number=number: number)
    report = Report(tmp_path, WHERE)
    gpu.measure_all(report, ["astronaut", "coffee"], {"exponentials": 1e12, "products": 1e14, "copy": 1e12})
    assert report.failed() == 0, [row for row in report.rows if "failed" in row]
    methods = len(gpu.METHODS)
    assert len(report.rows) == methods * (2 * 2 + 2 + 2 * 3) + 2 * 2
    assert all("milliseconds" in row or "refused" in row for row in report.rows)
    exact = [row for row in report.rows if row["method"] == "exact" and "error" in row]
    assert len(exact) == 9
    assert max(row["error"] for row in exact) < 1e-5


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
    assert all(row["milliseconds"] > 0 for row in written["results"])
    assert (tmp_path / "gpu.md").read_text() in done.stdout
