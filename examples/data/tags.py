"""Which classes are in each image, from a file: of another project (``cls_labels.npy``), CSV or JSON."""

import csv
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.files import check_file, one_line, read_text
from data.sample import DataError


def read_tags(path: Path, names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Tags of images.

    Args:
        path: ``.npy``, a dict of names to rows of 0 and 1, whose keys are names (SEAM's ``cls_labels.npy``) or their
            digits as integers (IRN's); ``.csv``, with a header of ``name`` and names of classes and rows of 0 and 1;
            ``.json``, names of images with lists of names of classes, or with rows of 0 and 1.
        names: of the images; what the file has of further images is not looked at.
        classes: names of the classes. Where a row has no background, or a list does not name it, it is there.

    Returns:
        ``[N, K]``, int64.

    Raises:
        DataError: no file, one that cannot be read, an image without tags, another number of classes, an unknown class,
            other values than 0 and 1, two images whose names have the same digits where keys are integers.
    """
    readers = {".npy": _read_npy, ".csv": _read_csv, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path}: expected tags in a file called {', '.join(readers)}, got {path.suffix or 'no ending'}"
        )
    check_file(path, "tags")
    found = readers[path.suffix.lower()](path, classes)
    if found and all(isinstance(key, int | np.integer) for key in found):
        found = _by_name(path, found, names)
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path}: expected tags of each image, got none of {missing[0]} ({len(missing)} missing)")
    return torch.tensor([_row(path, name, found[name], classes) for name in names], dtype=torch.int64)


def _row(path: Path, name: str, values: Any, classes: Sequence[str]) -> list[int]:
    """Tags of all classes from a row of 0 and 1, with or without the background, or from a list of names."""
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list):
        raise DataError(f"{path}: {name}: expected a list of classes or of 0 and 1, got {type(values).__name__}")
    if all(isinstance(value, str) for value in values):
        unknown = [value for value in values if value not in classes]
        if unknown:
            raise DataError(f"{path}: {name}: expected classes of {', '.join(classes)}, got {unknown[0]!r}")
        return [1, *(int(label in values) for label in classes[1:])]
    if len(values) not in (len(classes), len(classes) - 1):
        raise DataError(f"{path}: {name}: expected {len(classes)} values, or one less, got {len(values)}")
    wrong = [value for value in values if not (isinstance(value, int | float | np.generic) and value in (0, 1))]
    if wrong:
        raise DataError(f"{path}: {name}: expected 0 or 1 for each class, got {wrong[0]!r}")
    return [1] * (len(classes) - len(values)) + [int(value) for value in values]


def _by_name(path: Path, found: Mapping[Any, Any], names: Sequence[str]) -> dict[Any, Any]:
    """Tags by name where the keys are the digits of names: 2007000032 for 2007_000032."""
    by_name: dict[Any, Any] = {}
    taken: dict[int, str] = {}
    for name in names:
        digits = name.replace("_", "")
        key = int(digits) if digits.isdecimal() else -1
        if key in found:
            if key in taken:
                raise DataError(f"{path}: expected tags of one image under {key}, got {taken[key]} and {name}")
            taken[key] = name
            by_name[name] = found[key]
    return by_name


def _read_csv(path: Path, classes: Sequence[str]) -> dict[str, list[float | str]]:
    lines = csv.reader(io.StringIO(read_text(path)), skipinitialspace=True, strict=True)
    try:
        header, *rows = [(lines.line_num, row) for row in lines if row] or [(1, [])]
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: expected comma-separated values, got: {error}") from None
    columns = header[1]
    unknown = [column for column in columns if column != "name" and column not in classes]
    if "name" not in columns or unknown or len(set(columns)) < len(columns):
        raise DataError(f"{path}:1: expected a header of name and of each class once, got {','.join(columns)!r}")
    missing = [label for label in classes[1:] if label not in columns]
    if missing:
        raise DataError(f"{path}:1: expected a column for each class, got none for {missing[0]}")
    tags: dict[str, list[float | str]] = {}
    for number, row in rows:
        if len(row) != len(columns):
            raise DataError(f"{path}:{number}: expected {len(columns)} fields as in the header, got {len(row)}")
        fields = dict(zip(columns, row, strict=True))
        if fields["name"] in tags:
            raise DataError(f"{path}:{number}: expected one row for each image, got another for {fields['name']}")
        texts = [fields[label] for label in classes if label in fields]
        if wrong := [text for text in texts if text.strip() not in ("0", "1")]:
            raise DataError(f"{path}:{number}: expected 0 or 1 for each class, got {wrong[0]!r}")
        tags[fields["name"]] = [int(text) for text in texts]
    return tags


def _read_json(path: Path, _: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (RecursionError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: expected a JSON file that can be read, got: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected names of images with their tags, got {type(content).__name__}")
    return content


def _unique(path: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) is not value:
            raise DataError(f"{path}: expected every image once, got {key} again")
    return found


class _Arrays(pickle.Unpickler):
    """Takes arrays and nothing else: a pickle may otherwise run any program."""

    ALLOWED: ClassVar[dict[str, Any]] = {
        "_reconstruct": np.zeros(0).__reduce__()[0],
        "scalar": np.float64(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": lambda text, encoding: text.encode("latin1"),  # of _codecs: how Python 2's bytes are written
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_npy(path: Path, _: Sequence[str]) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            content = _Arrays(file).load()
        content = content.item()
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{path}: expected a dict of tags that can be read, got: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a dict of tags, got {type(content).__name__}")
    return content
