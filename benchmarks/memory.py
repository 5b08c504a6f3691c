"""Peak memory of a call on the CPU, beyond what was there before it; Linux only."""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def status(key: str) -> int:
    """A field of the process status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _measure(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], result: Any) -> None:
    call = prepare(*arguments)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but still there would be used again, and not count
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    kept = call()
    result.put(status("VmHWM") - before)
    del kept


def peak_bytes(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Runs ``prepare(*arguments)()`` in a process of its own; what ``prepare`` allocates does not count."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_measure, args=(prepare, arguments, result))
    process.start()
    peak: int = result.get(timeout=600)
    process.join()
    return peak
