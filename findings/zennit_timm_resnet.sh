#!/usr/bin/env bash
# zennit 0.5.1, timm 1.0.31, torchvision 0.28.0, torch 2.13.0, numpy 2.3.5
#
# What happens: zennit's ResNetCanonizer, which makes the residual sums of a ResNet explicit so that layer-wise
# relevance propagation can share relevance between the branches, finds the blocks by torchvision's classes. timm's
# resnet18 has blocks of its own: the canonizer passes over them, and each of the eight residual sums hands its whole
# relevance to both branches. The two networks below take each other's state dict and give the same score.
# Why it surprises: nothing is raised or warned and the heat map looks right (correlation 0.95 with the other), but
# its sum, which the method says is the score, is off by about 2^8, one factor of two for each of the eight sums.
#
# Output seen:
#   torchvision: score 0.3460, sum of relevance 0.3321, ratio 0.96
#   timm: score 0.3460, sum of relevance 85.0302, ratio 245.79
#   correlation of the two maps: 0.95
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet zennit==0.5.1 timm==1.0.31 torchvision==0.28.0 torch==2.13.0 numpy==2.3.5
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

import timm
import torchvision
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus
from zennit.torchvision import ResNetCanonizer

torch.manual_seed(0)
networks = {"torchvision": torchvision.models.resnet18(), "timm": timm.create_model("resnet18", zero_init_last=False)}
networks["timm"].load_state_dict(networks["torchvision"].state_dict())
image = torch.randn(1, 3, 64, 64, requires_grad=True)
sums, maps = {}, {}
for name, network in networks.items():
    network.eval()
    with Gradient(network, EpsilonPlus(canonizers=[ResNetCanonizer()])) as attribution:
        scores, relevance = attribution(image, lambda output: output * torch.eye(1000)[[3]])
    score = scores[0, 3].item()
    maps[name] = relevance.sum(1).flatten()
    sums[name] = relevance.sum().item() / score
    print(f"{name}: score {score:.4f}, sum of relevance {relevance.sum():.4f}, ratio {sums[name]:.2f}")
correlation = torch.corrcoef(torch.stack(list(maps.values())))[0, 1]
print(f"correlation of the two maps: {correlation:.2f}")
if not (0.8 < sums["torchvision"] < 1.2 and sums["timm"] > 100):
    sys.exit("the behaviour has changed")
PY
