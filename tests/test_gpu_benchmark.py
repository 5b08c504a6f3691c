"""The GPU benchmark's command: its table, its help, its errors. The measurements need a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import line, markdown

ROOT = Path(__file__).parents[1]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


def test_rows_of_a_group_share_a_table() -> None:
    rows = [
        {"group": "a", "method": "one", "milliseconds": 2.0, "error": 1e-4},
        {"group": "a", "method": "two", "milliseconds": 1.0, "error": 2e-3, "share of pairs": 0.25},
        {"group": "b", "method": "one", "milliseconds": 0.5},
    ]
    where = {"date": "today", "gpu": "one", "torch": "2", "triton": "3", "limits": {"copy": 4.2e12}}
    table = markdown(rows, where)
    assert "today, one, torch 2, Triton 3; copies move 4.20 TB/s" in table
    assert "| method | time | error | share of pairs |\n|---|---|---|---|\n| one | 2 ms | 0.0001 | - |" in table
    assert "| two | 1 ms | 0.002 | 0.25 |" in table
    assert "## b\n\n| method | time |\n|---|---|\n| one | 0.5 ms |" in table
    assert line(rows[1]) == "a: two 1 ms, error 0.002, share of pairs 0.25"


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
