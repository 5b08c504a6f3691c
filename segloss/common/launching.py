"""What the Triton kernels of the library share; importing it does not import Triton."""

from contextlib import AbstractContextManager, nullcontext

import torch


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; the interpreter, for tests, runs on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
