"""The command line of the examples: options, one-line errors, the folder that results go to."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import tyro
from data.sample import DataError

from engine import processes
from engine.storage import StorageError

Config = TypeVar("Config")


class Repeated(Protocol):
    """A configuration dataclass of a script that may run several times."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seed(self) -> int: ...

    @property
    def repeats(self) -> int: ...


RepeatedConfig = TypeVar("RepeatedConfig", bound=Repeated)


def parse(config: type[Config], args: Sequence[str] | None = None) -> Config:
    """The command line as a configuration dataclass; a wrong option ends the program with one line on stderr.

    Args:
        config: a dataclass whose fields have defaults and docstrings; its ``__post_init__`` may raise ``ValueError``.
            Its mappings ``PHOTOGRAPHS`` and ``QUICK``, if it has them, are other defaults: those with ``--data voc``
            or ``folder``, and those with ``--quick`` on top. Without ``PHOTOGRAPHS``, ``--quick`` stands alone.
        args: arguments instead of those of the command line.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            preset = _preset(config, args)
            return tyro.cli(config, args=args, default=config(**preset) if preset else tyro.MISSING_NONPROP)
    except SystemExit as end:
        if end.code and processes.rank() == 0:  # all processes have the same command line
            lines = [line.strip("│╰╯ ") for line in messages.getvalue().splitlines()[1:]]  # without the title
            while not lines[0].strip("─-"):
                lines.pop(0)
            message = itertools.takewhile(lambda line: line.strip("─-"), lines)  # hints follow below a rule
            text = " ".join(message).removeprefix(f"Error parsing {config.__name__}: ")
            print(f"error: {text} (see --help)", file=sys.stderr)
        raise


def _preset(config: type[Any], args: Sequence[str] | None) -> dict[str, Any]:
    """Defaults that go with other options; these are looked up before all of them are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="?")
    parser.add_argument("--quick", action="store_true")
    given, _ = parser.parse_known_args(args)
    preset: dict[str, Any] = {}
    photographs = given.data in ("voc", "folder")
    if photographs:
        preset |= getattr(config, "PHOTOGRAPHS", {})
    if given.quick and (photographs or not hasattr(config, "PHOTOGRAPHS")):
        preset |= getattr(config, "QUICK", {})
    return preset


def check_least(config: object, **bounds: int) -> None:
    """Raises ``ValueError`` for the first field of a configuration that is below its bound, infinite or NaN."""
    for name, bound in bounds.items():
        value = getattr(config, name)
        if not bound <= value < math.inf:
            what = "a finite number" if value >= bound else f"at least {bound}"
            raise ValueError(f"--{name.replace('_', '-')}: expected {what}, got {value}")


def each_run(config: RepeatedConfig) -> list[RepeatedConfig]:
    """The configuration of each of ``--repeats`` runs; their seeds count up from ``--seed``."""
    return [dataclasses.replace(config, seed=config.seed + i) for i in range(config.repeats)]


def output_folder(path: Path) -> Path:
    """Makes a folder that can be written to, or ends the program with one line on stderr."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # a killed run leaves none behind
            pass
    except OSError as error:
        raise SystemExit(f"error: cannot write to {path}: {error.strerror}") from None
    return path


def run(main: Callable[[Config], None], config: type[Config]) -> None:
    """Runs an example with its command line, in one process or in those of ``torchrun``.

    What a user can mend, in data, folders or settings, ends it with one line on stderr.

    Args:
        main: the example.
        config: its configuration, with a field ``device``.
    """
    try:
        options = parse(config)
        with processes.joined(options.device):  # type: ignore[attr-defined]
            main(options)
    except (DataError, StorageError, FloatingPointError) as error:
        # A worker process of a data loader puts its traceback before the message.
        raise SystemExit(f"error: {str(error).rsplit('DataError: ')[-1].strip()}") from None
    except RuntimeError as error:
        if processes.count() > 1 and "closed by peer" in str(error):
            raise SystemExit("stopped: another process has ended") from None
        raise
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
