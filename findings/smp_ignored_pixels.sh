#!/usr/bin/env bash
# segmentation_models_pytorch 0.6.0, torchvision 0.28.0, torch 2.13.0, numpy 2.3.5
#
# What happens: SoftCrossEntropyLoss(ignore_index=255) sets the loss of ignored pixels to zero and then divides by
# all pixels, ignored ones included, where torch's CrossEntropyLoss divides by the labelled ones.
# Why it surprises: with full labels the two agree, so a test on full labels shows nothing. With scribbles on 3% of
# the pixels the loss and its gradient are 33 times smaller, and beside any second term (a CRF or a size loss) the
# labels all but vanish; the factor also changes from batch to batch with the length of the scribbles.
#
# Output seen:
#                              all pixels labelled   3% labelled
#   torch CrossEntropyLoss                  1.7307        1.5902
#   smp SoftCrossEntropyLoss                1.7307        0.0477
#   torch / smp SoftCrossEntropyLoss: 1.00 and 33.33
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet segmentation_models_pytorch==0.6.0 torchvision==0.28.0 torch==2.13.0 numpy==2.3.5
"$work/env/bin/python" - <<'PY'
import sys

import torch

# The torchvision of the package index has no compiled operators for a CPU build of torch, and then cannot be imported
# before two operators, which no classifier calls, are declared.
try:
    import torchvision
except RuntimeError:
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from segmentation_models_pytorch.losses import SoftCrossEntropyLoss

torch.manual_seed(0)
logits = torch.randn(2, 4, 10, 10)
full = torch.randint(4, (2, 10, 10))
scribbles = torch.full_like(full, 255)
scribbles[:, :3, 0] = full[:, :3, 0]
losses = {
    "torch CrossEntropyLoss": torch.nn.CrossEntropyLoss(ignore_index=255),
    "smp SoftCrossEntropyLoss": SoftCrossEntropyLoss(ignore_index=255, smooth_factor=0.0),
}
values = []
print("                           all pixels labelled   3% labelled")
for name, loss in losses.items():
    values.append([loss(logits, labels).item() for labels in (full, scribbles)])
    print(f"{name:26} {values[-1][0]:19.4f} {values[-1][1]:13.4f}")
(torch_full, torch_few), (smp_full, smp_few) = values
print(f"torch / smp SoftCrossEntropyLoss: {torch_full / smp_full:.2f} and {torch_few / smp_few:.2f}")
if abs(torch_full / smp_full - 1) > 1e-4 or abs(torch_few / smp_few - 100 / 3) > 0.01:
    sys.exit("the behaviour has changed")
PY
