#!/usr/bin/env bash
# zennit 0.5.1, torchvision 0.28.0, torch 2.13.0, numpy 2.3.5
#
# What happens: zennit's canonizers merge a batch normalisation into the convolution before it and turn the layer that
# is left into the identity by mean 0, variance 1, scale 1 and shift 0. Its eps stays: the layer still divides by
# sqrt(1 + eps), once for each layer. With torch's eps of 1e-5 the scores of vgg16_bn are off by 7e-5, in double
# precision too; with eps 1e-3, which networks converted from TensorFlow have, by 0.7%.
# Why it surprises: merging is exact, so that scores inside and outside of the context should agree to rounding; the
# relevance is that of another network.
#
# Output seen:
#   eps 1e-05: relative change of the scores 6.5e-05
#   eps 0.001: relative change of the scores 6.5e-03
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet zennit==0.5.1 torchvision==0.28.0 torch==2.13.0 numpy==2.3.5
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

import torchvision
from torch import nn
from zennit.composites import EpsilonPlus
from zennit.torchvision import VGGCanonizer

torch.manual_seed(0)
network = torchvision.models.vgg16_bn(num_classes=10)
network.classifier = nn.Sequential(nn.Flatten(), nn.Linear(512 * 7 * 7, 10, bias=False))
network = network.double().eval()
image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
changes = {}
for eps in (1e-5, 1e-3):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    with torch.no_grad():
        scores = network(image)
        with EpsilonPlus(canonizers=[VGGCanonizer()]).context(network) as merged:
            inside = merged(image)
    changes[eps] = ((inside - scores).abs().max() / scores.abs().max()).item()
    print(f"eps {eps:g}: relative change of the scores {changes[eps]:.1e}")
if not (changes[1e-5] > 1e-6 and changes[1e-3] > 1e-3):
    sys.exit("the behaviour has changed")
PY
