"""Backward passes through a user's network."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def followed(name: str) -> Iterator[None]:
    """Around a backward pass: a network that overwrites what its gradient needs is an error of this argument."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ValueError(
            f"{name}: expected a network that autograd can follow, got one with an operation in place that overwrites "
            "what a gradient needs: set its inplace=False"
        ) from error
