"""Every example explains itself, and a mistake in its command line ends it with one line."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.run_example import ROOT, run_example

EXAMPLES = [path.stem for path in sorted((ROOT / "examples").glob("*.py")) if "\ndef main(" in path.read_text()]
FAST = ("quickstart",)
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in EXAMPLES]
)


@cache
def options(name: str) -> frozenset[str]:
    """The options that an example explains, the required ones too."""
    done = run_example(name, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    text = re.sub(r"\s*│\n│\s*", " ", done.stdout)
    found = set(re.findall(r" --([a-z-]+)[ ,]", text)) - {"help"}
    for option in found:
        assert re.search(rf" --{option}[ ,][^│]*?[A-Z][a-z]+ [^│]*?\((default: |required)", text), option
    return frozenset(found)


def mistake(name: str, *words: object) -> str:
    """What an example says, as its only line, to such a command line."""
    done = run_example(name, *words)
    assert done.returncode != 0
    line = re.fullmatch(r"error: (.+)\n", done.stderr)
    assert line, done.stderr
    return line[1]


@EVERY
def test_help_explains_every_option(name: str) -> None:
    assert "out" in options(name)


@EVERY
def test_a_folder_that_cannot_be_made_is_refused(name: str) -> None:
    assert re.match(r"cannot write .*below", mistake(name, "--out", Path(__file__, "below")))


@EVERY
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_refused(name: str, tmp_path: Path) -> None:
    if "device" in options(name):
        folder = tmp_path / "out"
        assert mistake(name, "--device", "cuda", "--out", folder) == "--device cuda: PyTorch sees no CUDA device"
        assert not folder.exists(), "the program stops before it has done anything"


@EVERY
@pytest.mark.parametrize("layout", ["voc", "folder"])
def test_images_that_are_not_there_are_refused(name: str, layout: str, tmp_path: Path) -> None:
    if "data" in options(name):
        words = ("--data", layout, "--root", "/nowhere", "--out", tmp_path)
        assert re.match(r"/nowhere: expected a folder, found none$", mistake(name, *words))


def test_the_list_of_scripts_has_a_line_and_a_command_for_each() -> None:
    text = (ROOT / "examples" / "README.md").read_text()
    pattern = r"^\| \[`(\w+)\.py`\]\(\1\.py\) \| .+ \| `python examples/\1\.py(?: [^`]+)?` \| "
    assert sorted(re.findall(pattern, text, re.M)) == EXAMPLES
