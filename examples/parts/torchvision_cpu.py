"""Makes torchvision importable beside a CPU build of PyTorch; import it before torchvision.

The torchvision of the package index is compiled against CUDA. Beside a CPU build of PyTorch its compiled operators do
not load, and ``import torchvision`` stops because the schema of ``nms`` is missing. Only then this module defines
the schemas, a plain non-maximum suppression for CPU tensors, and lets ``torchvision.ops.nms`` call it. RoIAlign
already has a Python form in torchvision. Where the compiled operators are present, nothing is changed.
"""

import torch
from torch import Tensor


def non_maximum_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes kept, best score first: a box goes when a better kept one overlaps it by more than the IoU.

    Args:
        boxes: x1, y1, x2, y2, ``[n, 4]``.
        scores: ``[n]``.
        iou_threshold: largest intersection over union of two kept boxes.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    corners = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    overlap = (corners[1] - corners[0]).clamp(min=0).prod(2)
    covers = overlap / (area[:, None] + area - overlap) > iou_threshold
    alive = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if alive[i]:
            alive[i + 1 :] &= ~covers[i, i + 1 :]
    return order[alive]


try:
    import torchvision.ops.boxes
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    # The registrations last as long as this object.
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", non_maximum_suppression, "CPU")

    import torchvision.ops.boxes

    torchvision.ops.boxes._assert_has_ops = lambda: None
