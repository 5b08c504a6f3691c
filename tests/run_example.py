"""Runs an example as a user does."""

import os
import subprocess
import sys

from tests.forked import ROOT, run


def run_example(
    name: str, *options: object, processes: int = 1, typed: str | None = None
) -> subprocess.CompletedProcess[str]:
    """``python examples/NAME.py OPTIONS``, or ``torchrun --nproc-per-node PROCESSES`` in place of ``python``.

    ``typed`` is what it reads from the terminal.
    """
    script = ROOT / "examples" / f"{name}.py"
    if processes == 1:
        return run(script, *options, typed=typed)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, input=typed)
