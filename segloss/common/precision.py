"""Full float32 precision of matrix products, whatever the user allows them elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_CPU: Any = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
_CUDA = torch.backends.cuda.matmul
_FULL = ["ieee", "ieee"] if _CPU else ["highest"]
_LOCK = Lock()
_users = 0
_saved = _FULL


def _get() -> list[str]:
    if _CPU:
        return [_CUDA.fp32_precision, _CPU.fp32_precision]
    return [torch.get_float32_matmul_precision()]


def _set(precision: list[str]) -> None:
    if not _CPU:
        torch.set_float32_matmul_precision(precision[0])
        return
    for backend, wanted in zip((_CUDA, _CPU), precision, strict=True):
        backend.fp32_precision = "none"  # what torch.backends.fp32_precision says, and follows it in future
        if backend.fp32_precision != wanted:
            backend.fp32_precision = wanted


@contextmanager
def full_precision() -> Iterator[None]:
    """Squared distances by products of matrices are useless in TF32 or bfloat16, which users may have switched on.

    The setting is global: the first thread to come changes it, and the last one to leave puts it back.
    """
    global _users, _saved
    with _LOCK:
        if _users == 0:
            _saved = _get()
            _set(_FULL)
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if _users == 0:
                _set(_saved)
