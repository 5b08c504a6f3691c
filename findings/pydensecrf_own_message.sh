#!/usr/bin/env bash
# pydensecrf2 1.1, numpy 2.3.5 (Python 3.11 or 3.12 and a C++ compiler)
#
# What happens: the pairwise energy of a dense CRF is a sum over pairs of different pixels, so an image of one pixel
# has none and inference should return the softmax of the unary term. pydensecrf2 lets each pixel send its message
# to itself as well: one pixel of .6 / .4 becomes more certain at every step. In a row of nine pixels one step reads
# the filter off directly: with sxy=1 the weight at distance d should be exp(-d^2 / 2); the permutohedral lattice
# gives about two thirds of it at the pixel itself and at its neighbours, and at distance 2 twice as much to the left
# as to the right.
# Why it surprises: weights and kernel widths are quoted in papers as those of a Gaussian, and an exact
# implementation of the formula with the same numbers gives other label maps; a pixel's agreement with itself
# sharpens every result, also where no neighbour supports it.
#
# Output seen:
#   one pixel of .6 / .4, after 1, 5 and 20 steps: 0.642 0.670 0.671
#   distance    -4    -3    -2    -1     0     1     2     3     4
#   measured  0.00  0.01  0.14  0.40  0.64  0.41  0.07  0.00  0.00
#   Gaussian  0.00  0.01  0.14  0.61  1.00  0.61  0.14  0.01  0.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet pydensecrf2==1.1 numpy==2.3.5
"$work/env/bin/python" - <<'PY'
import sys

import numpy as np
import pydensecrf.densecrf as densecrf


def infer(first_label, steps):
    """Probabilities of the first of two labels along a row of pixels."""
    p = np.array([first_label, 1 - np.array(first_label)], np.float32)
    crf = densecrf.DenseCRF2D(p.shape[1], 1, 2)
    crf.setUnaryEnergy(-np.log(p))
    crf.addPairwiseGaussian(sxy=1, compat=1, kernel=densecrf.CONST_KERNEL, normalization=densecrf.NO_NORMALIZATION)
    return np.array(crf.inference(steps))[0]


print("one pixel of .6 / .4, after 1, 5 and 20 steps:", *(f"{infer([0.6], n)[0]:.3f}" for n in (1, 5, 20)))

# Only the middle pixel prefers a label, by 0.8: the log odds after a step are 0.8 times the weight of its message.
row = np.full(9, 0.5)
row[4] = 0.9
q = infer(row, 1)
weight = (np.log(q / (1 - q)) - np.log(row / (1 - row))) / 0.8
gaussian = np.exp(-((np.arange(9) - 4) ** 2) / 2)
print("distance", *(f"{d:5}" for d in range(-4, 5)))
print("measured", *(f"{abs(w):5.2f}" for w in weight))
print("Gaussian", *(f"{g:5.2f}" for g in gaussian))
if not (infer([0.6], 1)[0] > 0.63 and 0.4 < weight[4] < 0.9):
    sys.exit("the behaviour has changed")
PY
