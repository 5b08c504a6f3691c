"""What the README shows must run and exist."""

import re
from pathlib import Path

import segattr
import segloss
from tests.code_blocks import assert_trains, python_blocks, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_code_runs_as_it_stands() -> None:
    blocks = python_blocks(README)
    assert blocks
    for block in blocks:
        assert_trains(run(block))


def test_every_public_name_is_in_the_table() -> None:
    parts = (segattr.lrp, segattr.metrics, segattr.plot, segattr.refine)
    names = {name for package in (segloss, segattr, *parts) for name in package.__all__}
    for name in names - {"check_values", "lrp", "metrics", "plot", "refine"}:
        assert re.search(rf"[`.]{name}`", README), name


def test_ci_runs_exactly_the_test_command() -> None:
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[-1] == "make test"
