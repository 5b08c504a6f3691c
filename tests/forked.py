"""Runs scripts and modules in processes of their own, which do not import the large libraries again.

They are forked from one that has these: a command takes .3 seconds instead of 3. It is the command itself that runs,
with its own arguments, folder, environment, standard streams and exit status.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
_SECONDS = 300


def run(*command: object, typed: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python`` with a command: a script, or ``-m`` and a module, and its options.

    ``typed`` is what it reads from the terminal, ``variables`` change its environment.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as name:
        streams = [Path(name, stream) for stream in ("in", "out", "err")]
        streams[0].write_text(typed or "")
        process = _context().Process(target=_become, args=(words, os.environ | variables, os.getcwd(), streams))
        with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"):  # the first call starts the server
            process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, _SECONDS)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in streams[1:]))


@cache
def _context() -> ForkServerContext | SpawnContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def _become(words: Sequence[str], environment: dict[str, str], folder: str, streams: Sequence[Path]) -> None:
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, closefd=False)
    multiprocessing.set_start_method(None, force=True)  # workers of a loader start as they do elsewhere
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path = [str(ROOT), *(path for path in sys.path if not Path(path).is_relative_to(ROOT / "examples"))]
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
