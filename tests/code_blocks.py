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
    """A block that shows a training step has a finite loss, and its gradient reaches all that is to be trained.

    That is every tensor that requires a gradient, and every parameter of a module that is not in evaluation mode, or of
    which something has got a gradient.
    """
    assert names["loss"].isfinite()
    leaves = {name: v for name, v in names.items() if isinstance(v, Tensor) and v.is_leaf and v.requires_grad}
    for name, module in names.items():
        if isinstance(module, nn.Module):
            parameters = dict(module.named_parameters(prefix=name))
            if module.training or any(parameter.grad is not None for parameter in parameters.values()):
                leaves |= parameters
    assert leaves
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
        assert leaf.grad.count_nonzero(), name
