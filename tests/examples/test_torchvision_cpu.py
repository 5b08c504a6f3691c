"""torchvision works beside a CPU build of PyTorch."""

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import torchvision_cpu
from torch import Tensor
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import nms


def brute_force(boxes: list[list[float]], scores: list[float], threshold: float) -> list[int]:
    def iou(a: list[float], b: list[float]) -> float:
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        overlap = max(width, 0) * max(height, 0)
        return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)

    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 40), threshold=st.floats(0.05, 0.95))
def test_suppression_is_the_greedy_definition(seed: int, count: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 10
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 10 + 0.1
    boxes, scores = torch.cat([corner, corner + size], 1), torch.rand(count, generator=generator, dtype=torch.float64)
    expected = brute_force(boxes.tolist(), scores.tolist(), threshold)
    for suppress in (torchvision_cpu.non_maximum_suppression, nms):
        assert suppress(boxes, scores, threshold).tolist() == expected


def test_equal_scores_keep_the_first_box() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [5, 5, 6, 6]])
    assert torchvision_cpu.non_maximum_suppression(boxes, torch.ones(3), 0.5).tolist() == [0, 2]


def test_resnet_runs() -> None:
    assert resnet18(num_classes=5).eval()(torch.rand(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torchvision's own use of it
@torch._dynamo.config.patch(disable=True)  # torchvision would compile its Python form of RoIAlign, slowly
def test_faster_rcnn_trains_and_detects() -> None:
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=5)
    target: dict[str, Tensor] = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    gradients = [parameter.grad for parameter in model.roi_heads.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    found = model.eval()([torch.rand(3, 64, 64)])[0]
    assert found["boxes"].shape == (len(found["scores"]), 4)
