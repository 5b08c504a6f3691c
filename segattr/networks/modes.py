"""Training and evaluation mode of a user's network, which is left as it was."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it all modules are in evaluation mode; afterwards each is in the mode that it was in.

    Modules are not told, as their ``train`` may merge weights or clear caches, which nothing would bring back.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
