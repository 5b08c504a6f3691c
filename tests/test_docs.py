"""The reference pages: their code runs, no section is missing, and every public name has one API entry."""

import re
from pathlib import Path

import pytest

import segattr
import segloss
from tests.code_blocks import assert_trains, python_blocks, run

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
LOSSES = [page for page in PAGES if page.parent.name == "losses"]
METHODS = LOSSES + [page for page in PAGES if page.parent.name == "attribution"]
SECTIONS = ["When to use it", "Recipe", "Numbers", "API"]


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_runs_as_it_stands(page: Path) -> None:
    for block in python_blocks(page.read_text()):
        names = run(block)
        if page in LOSSES or "loss" in names:
            assert_trains(names)


@pytest.mark.parametrize("page", METHODS, ids=name)
def test_no_section_is_missing_or_empty(page: Path) -> None:
    head, *parts = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    bodies = dict(part.split("\n", 1) for part in parts)
    assert re.match(r"# \S", head)
    assert [title for title in bodies if title in SECTIONS] == SECTIONS
    for title in SECTIONS:
        assert re.search(r"\w{3}", bodies[title]), title
    assert python_blocks(bodies["Recipe"])
    assert ".. plot::" in page.read_text() or "![" in page.read_text()


@pytest.mark.parametrize("page", LOSSES, ids=name)
def test_each_loss_has_a_formula(page: Path) -> None:
    assert page.read_text().count("$$") >= 2


def test_every_public_name_has_exactly_one_api_entry() -> None:
    parts = {f"segattr.{part}": getattr(segattr, part) for part in ("lrp", "metrics", "plot", "refine")}
    packages = {"segloss": segloss, "segattr": segattr, **parts}
    public = {f"{path}.{name}" for path, package in packages.items() for name in package.__all__} - set(parts)
    directive = r"^\.\. (?:auto(?:function|class|exception)|(?:auto|py:)data):: ([\w.]+)"
    entries = [entry for page in METHODS for entry in re.findall(directive, page.read_text(), re.MULTILINE)]
    assert public - set(entries) == set()
    assert set(entries) - public == set()
    assert [entry for entry in set(entries) if entries.count(entry) > 1] == []
