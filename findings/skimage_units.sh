#!/usr/bin/env bash
# scikit-image 0.26.0, numpy 2.3.5, scipy 1.17.1
#
# What happens: the same photograph, once as uint8 and once as the same numbers in float64, is segmented differently
# by felzenszwalb and random_walker, and identically by slic. The first two divide integer images by 255 and take
# floating-point images as they are, so that `scale` and `beta` mean other things at 0..255; slic stretches every
# image to 0..1 first.
# Why it surprises: superpixels, and scribbles spread by a random walk, are the usual pseudo-labels of weak
# supervision, and images are float 0..255 in many pipelines (after a mean was subtracted, or as a tensor). A cast to
# float changes the pseudo-labels, nothing is said about it, and a test with slic does not show it.
#
# Output seen:
#   slic: 37 regions of uint8, 37 of float 0..255, 37 of float 0..1
#   felzenszwalb: 59 regions of uint8, 204 of float 0..255, 59 of float 0..1
#   random_walker: 2 regions of uint8, 2 of float 0..255, 2 of float 0..1
#   random_walker: 3% of the labels differ between uint8 and float 0..255
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet scikit-image==0.26.0 numpy==2.3.5 scipy==1.17.1
"$work/env/bin/python" - <<'PY'
import sys

import numpy as np
from skimage.data import camera
from skimage.segmentation import felzenszwalb, random_walker, slic

image = camera()[::4, ::4]
scribbles = np.zeros(image.shape, int)
scribbles[30:34, 55:60] = scribbles[60:64, 60:62] = 1
scribbles[5:8, 5:120] = scribbles[100:104, 100:110] = 2
methods = {
    "slic": lambda x: slic(x, n_segments=50, compactness=0.1, channel_axis=None),
    "felzenszwalb": lambda x: felzenszwalb(x, scale=100),
    "random_walker": lambda x: random_walker(x, scribbles, mode="bf"),
}
equal = {}
for name, method in methods.items():
    integer, wide, unit = (method(x) for x in (image, image.astype(float), image / 255))
    equal[name] = bool((integer == wide).all())
    counts = [len(np.unique(x)) for x in (integer, wide, unit)]
    print(f"{name}: {counts[0]} regions of uint8, {counts[1]} of float 0..255, {counts[2]} of float 0..1")
    if not (integer == unit).all():
        sys.exit("the behaviour has changed")
    if name == "random_walker":
        print(f"{name}: {(integer != wide).mean():.0%} of the labels differ between uint8 and float 0..255")
if equal != {"slic": True, "felzenszwalb": False, "random_walker": False}:
    sys.exit("the behaviour has changed")
PY
