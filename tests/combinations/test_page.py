"""The blocks of the page about other libraries run as they stand, where these are installed."""

import re
from pathlib import Path

import pytest

from tests.code_blocks import assert_trains, python_blocks, run

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
# In the order of the page.
LIBRARIES = ["lightning", "segmentation_models_pytorch", "transformers", "timm", "monai", "torchmetrics"]
BLOCKS = python_blocks(PAGE.read_text())


def test_each_library_has_a_block() -> None:
    assert len(BLOCKS) == len(LIBRARIES)
    for library, block in zip(LIBRARIES, BLOCKS, strict=True):
        assert re.search(rf"^(import|from) {library}\b", block, re.MULTILINE)


@pytest.mark.parametrize("library", LIBRARIES)
def test_code_runs_as_it_stands(library: str) -> None:
    pytest.importorskip(library)
    names = run(BLOCKS[LIBRARIES.index(library)])
    if "loss" in names:
        assert_trains(names)
