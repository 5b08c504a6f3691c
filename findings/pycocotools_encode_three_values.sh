#!/usr/bin/env bash
# pycocotools 2.0.11, numpy 2.3.5
#
# What happens: pycocotools.mask.encode does not ask which pixels are non-zero. It starts a new run wherever the value
# differs from the one before, and runs are zeros and ones in turn. A mask with a third value therefore comes back
# with some of its foreground as background, and, where values change directly from one to another and back, with
# background as foreground. No error; the array is uint8 and Fortran-ordered as asked.
# Why it surprises: an object cut from a Pascal VOC label has exactly three values: 0, 1 for the object and 255 for
# the unlabelled ring around it. An object inside the image is encoded as its ring alone; of one cut off by
# the lower border half the code is background. A mask of 0 and 255 is encoded correctly, so that one is not warned.
#
# Output seen:
#   object inside the image: 9 pixels, ring 16
#   encoded from 0, 255: 25 pixels; from 0, 1, 255: 16, 0 of them background
#   [[  0 255 255 255 255 255   0   0   1   1   1   1   1   0]
#    [  0 255   1   1   1 255   0   0   1   0   0   0   1   0]
#    [  0 255   1   1   1 255   0   0   1   0   0   0   1   0]
#    [  0 255   1   1   1 255   0   0   1   0   0   0   1   0]
#    [  0 255 255 255 255 255   0   0   1   1   1   1   1   0]
#    [  0   0   0   0   0   0   0   0   0   0   0   0   0   0]]
#   object cut off by the lower border: 9 pixels, ring 11
#   encoded from 0, 255: 20 pixels; from 0, 1, 255: 19, 10 of them background
#   [[  0   0   0   0   0   0   0   0   0   0   1   0   1   1]
#    [  0   0   0   0   0   0   0   0   0   0   1   0   1   1]
#    [  0 255 255 255 255 255   0   0   1   1   0   1   0   1]
#    [  0 255   1   1   1 255   0   0   1   0   1   0   0   1]
#    [  0 255   1   1   1 255   0   0   1   0   1   0   0   1]
#    [  0 255   1   1   1 255   0   0   1   0   1   0   0   1]]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet pycocotools==2.0.11 numpy==2.3.5
"$work/env/bin/python" - <<'PY'
import sys

import numpy as np
from pycocotools import mask as coco

inside = np.zeros((6, 7), np.uint8, order="F")
inside[:5, 1:6] = 255
inside[1:4, 2:5] = 1
at_border = np.roll(inside, 2, axis=0)
at_border[:2] = 0
at_border = np.asfortranarray(at_border)
areas = []
for name, mask in ("inside the image", inside), ("cut off by the lower border", at_border):
    binary = np.asfortranarray((mask != 0).astype(np.uint8) * 255)
    code = coco.encode(mask)
    decoded = coco.decode(code)
    areas.append((int(coco.area(coco.encode(binary))), int(coco.area(code)), int(decoded[mask == 0].sum())))
    print(f"object {name}: {(mask == 1).sum()} pixels, ring {(mask == 255).sum()}")
    print("encoded from 0, 255: {} pixels; from 0, 1, 255: {}, {} of them background".format(*areas[-1]))
    print(np.hstack([mask, decoded]))
if areas != [(25, 16, 0), (20, 19, 10)]:
    sys.exit("the behaviour has changed")
PY
