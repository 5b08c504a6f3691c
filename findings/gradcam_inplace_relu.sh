#!/usr/bin/env bash
# grad-cam 1.5.7, torchvision 0.28.0, torch 2.13.0, numpy 2.3.5
#
# What happens: GradCAM keeps the output of its target layer as a view and not as a copy. Where the layer is a
# convolution or a normalisation and the next one is ReLU(inplace=True), the kept values are those after the ReLU,
# while the kept gradient is the one before it. Two networks with the same weights and exactly the same scores, one
# with ReLU(inplace=True) and one with ReLU(inplace=False), get different maps.
# Why it surprises: the map is a sum of weighted activations, and which activations is decided by a memory flag that
# changes nothing else. torchvision's VGG, AlexNet and DenseNet (`features[-1]` is a normalisation whose ReLU is in
# place) are built in this way. Since the copy is made by `.cpu()`, which copies only from another device, the same
# network should differ from itself on a GPU (not run here).
#
# Output seen:
#   ReLU(inplace=True): smallest activation kept 0.000, mean of the map 0.052
#   ReLU(inplace=False): smallest activation kept -0.447, mean of the map 0.058
#   largest difference: scores 0.0, maps 0.36 (maps lie in 0..1)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet grad-cam==1.5.7 torchvision==0.28.0 torch==2.13.0 numpy==2.3.5
"$work/env/bin/python" - <<'PY'
import sys

import numpy as np
import torch

# The torchvision of the package index has no compiled operators for a CPU build of torch, and then cannot be imported
# before two operators, which no classifier calls, are declared.
try:
    import torchvision
except RuntimeError:
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn


def classifier(inplace):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(inplace),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
scores, maps = [], []
for inplace in (True, False):
    network = classifier(inplace)
    scores.append(network(image).detach())
    with GradCAM(network, [network[2]]) as cam:
        maps.append(cam(image, [ClassifierOutputTarget(2)])[0])
        kept = cam.activations_and_grads.activations[0]
    print(f"ReLU(inplace={inplace}): smallest activation kept {kept.min():.3f}, mean of the map {maps[-1].mean():.3f}")
score_gap = (scores[0] - scores[1]).abs().max().item()
map_gap = np.abs(maps[0] - maps[1]).max()
print(f"largest difference: scores {score_gap:.1f}, maps {map_gap:.2f} (maps lie in 0..1)")
if score_gap != 0 or map_gap < 0.1:
    sys.exit("the behaviour has changed")
PY
