"""What pages point to within the project, files, headings, scripts and make targets, and which code they show."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "findings", "segattr", "segloss", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
EVERY = pytest.mark.parametrize(
    "page", sorted(page for page in PAGES if "_build" not in page.parts), ids=lambda page: str(page.relative_to(ROOT))
)
RUN = {"README.md", "docs"}  # whose Python is run: see test_readme and test_docs
KINDS = {"bash", "python", "text", "{eval-rst}", "{include}", "{literalinclude}", "{toctree}"}
TARGETS = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@EVERY
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@EVERY
def test_every_path_and_command_exists(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)
    paths += re.findall(r"(?:python|torchrun)(?: --\S+ \d+)? (\w+/\S+?\.py)\b", text)
    modules = re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", text)
    for path in paths:
        assert (ROOT / path).exists(), path
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for target in re.findall(r"[`\n]make ((?!PYTHON)[\w-]+)", text):
        assert target in TARGETS, target


@EVERY
def test_no_code_is_shown_that_is_not_run(page: Path) -> None:
    fences = re.findall(r"^( *)(?:```+|~~~+) *(\S+)", page.read_text(), re.MULTILINE)
    for indent, kind in fences:
        assert not indent, kind  # as tests.code_blocks finds them
        assert kind in KINDS
        assert kind != "python" or page.relative_to(ROOT).parts[0] in RUN
