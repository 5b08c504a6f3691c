#!/usr/bin/env bash
# scipy 1.17.1, numpy 2.3.5
#
# What happens: scipy.ndimage.distance_transform_edt gives every pixel its distance to the nearest zero. Where the
# array has no zero at all, it returns distances to a pixel that does not exist, above the upper left corner, at
# (-1, 0): finite, positive, plausible numbers, no warning. The city-block transform of the same module says -1.
# Why it surprises: boundary and Hausdorff losses, and level sets made from masks, take the distance transform of a
# mask and of its complement. A crop that lies inside one object (or outside all) has no zero in one of the two, and
# its "signed distance" is then a ramp from the top of the image to its bottom. NaN, infinity or 0 would be noticed.
#
# Output seen:
#   euclidean, mask of ones:
#   [[1.   1.41 2.24 3.16]
#    [2.   2.24 2.83 3.61]
#    [3.   3.16 3.61 4.24]]
#   city block, mask of ones: [-1]
#   distance to a pixel at (-1, 0) minus the euclidean result: 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet scipy==1.17.1 numpy==2.3.5
"$work/env/bin/python" - <<'PY'
import sys

import numpy as np
from scipy import ndimage

mask = np.ones((3, 4), np.uint8)
euclidean = ndimage.distance_transform_edt(mask)
city_block = ndimage.distance_transform_cdt(mask, metric="taxicab")
row, column = np.indices(mask.shape)
gap = np.abs(np.hypot(row + 1, column) - euclidean).max()
print("euclidean, mask of ones:")
print(euclidean.round(2))
print("city block, mask of ones:", np.unique(city_block))
print("distance to a pixel at (-1, 0) minus the euclidean result:", gap)
if gap > 1e-12 or (city_block != -1).any():
    sys.exit("the behaviour has changed")
PY
