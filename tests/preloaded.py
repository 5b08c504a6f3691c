"""The large libraries that command lines import, for the process that the tests of these fork: see ``forked.py``."""

import sys
from pathlib import Path

_EXAMPLES = str(Path(__file__).parents[1] / "examples")

sys.path.insert(0, _EXAMPLES)
from parts import torchvision_cpu  # noqa: E402, F401  (before torchvision)

sys.path.remove(_EXAMPLES)
for _name in [name for name in sys.modules if name.partition(".")[0] == "parts"]:
    del sys.modules[_name]

import matplotlib.figure  # noqa: E402, F401
import scipy.ndimage  # noqa: E402, F401
import torchvision.models  # noqa: E402
import torchvision.tv_tensors  # noqa: E402, F401
import tqdm  # noqa: E402, F401
import tyro  # noqa: E402, F401
