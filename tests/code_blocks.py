"""The code that the README and the reference pages show: it must run as it stands."""

import re
from typing import Any

from torch import Tensor, nn


def python_blocks(text: str) -> list[str]:
    """The ```` ```python ```` blocks of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(block: str) -> dict[str, Any]:
    """The names that a block leaves behind."""
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def assert_trains(names: dict[str, Any]) -> None:
    """A block that shows a training step has a finite loss, and gradients have reached its tensors or modules."""
    assert names["loss"].isfinite()
    leaves = [value for value in names.values() if isinstance(value, Tensor) and value.is_leaf]
    leaves += [p for value in names.values() if isinstance(value, nn.Module) for p in value.parameters()]
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.count_nonzero() for gradient in gradients)
