#!/usr/bin/env bash
# Pillow 13.0.0, numpy 2.3.5
#
# What happens: a palette image (mode "P") whose palette has 16 colours or fewer is written to PNG with 4, 2 or 1
# bits per pixel. The depth follows the number of palette colours, not the values of the pixels, and larger values
# lose their high bits without a warning: 255 becomes 15, 3 or 1.
# Why it surprises: label maps are palette PNGs in the manner of Pascal VOC, with 255 for "no label". With 16 classes
# or fewer and a palette of exactly these classes, the void pixels come back from the file as the last class; with
# two colours they come back as foreground. With VOC's own 21 colours nothing happens, so code that was tried on VOC
# looks right.
#
# Output seen:
#   colours   labels written     labels read
#         2   [0, 1, 255]        [0, 1]         255 -> 1
#         4   [0, 1, 255]        [0, 1, 3]      255 -> 3
#        16   [0, 1, 255]        [0, 1, 15]     255 -> 15
#        21   [0, 1, 255]        [0, 1, 255]    255 -> 255
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet Pillow==13.0.0 numpy==2.3.5
"$work/env/bin/python" - "$work/label.png" <<'PY'
import sys

import numpy as np
from PIL import Image

label = np.array([[255, 255, 255], [255, 1, 0], [255, 0, 0]], np.uint8)
void = {}
print("colours   labels written     labels read")
for colours in (2, 4, 16, 21):
    image = Image.fromarray(label)
    image.putpalette(list(range(3 * colours)))
    assert image.mode == "P" and (np.asarray(image) == label).all()
    image.save(sys.argv[1])
    back = np.asarray(Image.open(sys.argv[1]))
    void[colours] = int(back[0, 0])
    written, read = (str(np.unique(x).tolist()) for x in (label, back))
    print(f"{colours:7}   {written:18} {read:14} 255 -> {void[colours]}")
if void != {2: 1, 4: 3, 16: 15, 21: 255}:
    sys.exit("the behaviour has changed")
PY
