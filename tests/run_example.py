"""Runs an example as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_example(
    name: str, *options: object, processes: int = 1, typed: str | None = None
) -> subprocess.CompletedProcess[str]:
    """``python examples/NAME.py OPTIONS``, or ``torchrun --nproc-per-node PROCESSES`` in place of ``python``.

    ``typed`` is what it reads from the terminal.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher * (processes > 1), str(ROOT / "examples" / f"{name}.py"), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, input=typed)
