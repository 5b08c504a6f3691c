"""The papers' claims, one by one, on photographs of Pascal VOC: what holds with a pretrained network, and what not."""

import sys

from benchmarks.__main__ import HERE

sys.path.append(str(HERE.parent / "examples"))  # no package; what pytest does
