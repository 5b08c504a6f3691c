"""What readers do with damaged files: they give a value, or one line that names the file."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data.sample import DataError

T = TypeVar("T")


def value_or_line(path: Path, read: Callable[[], T]) -> T | None:
    """What is read; None where it is refused as it should be."""
    try:
        return read()
    except DataError as error:
        message = str(error)
    assert re.fullmatch(rf"{re.escape(str(path))}[^\n]*: [^\n]*expected [^\n]*", message), message
    return None
