"""Killed trainings, on a small budget; more of them by ``make kills``."""

import os
import re
import subprocess
import sys

import pytest

from tests.run_example import ROOT


@pytest.mark.slow
def test_killed_trainings_end_with_equal_weights() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    done = subprocess.run([sys.executable, "-m", "tests.kills", "3"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^kill \d: in step \d+; equal", done.stdout, re.M)) == 2
    assert len(re.findall(r"^kill \d: after \d+ steps, \d+ bytes into a checkpoint; equal", done.stdout, re.M)) == 1
    assert done.stdout.endswith("3 of 3 killed trainings ended with equal weights\n")
