"""``bbam`` of 4 objects with 20 proposals each: one batch, against one object and against one proposal at a time.

The detector is the small Faster R-CNN of the examples, on an image of 128 pixels, for 10 of the 300 steps. What was
released optimises one object at a time, through the whole detector: its proposal network runs, and parameters get
gradients. Evaluation mode, float32, one thread.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from parts.detector import faster_rcnn
from torch import Tensor

from benchmarks.memory import peak_bytes
from segattr.bbam import bbam, detector_from_torchvision

OBJECTS, PROPOSALS, SIDE, CELL, STEPS = 4, 20, 128, 16, 10
RIVAL = "one mask per proposal"
METHODS = (RIVAL, "one object at a time, as released", "one object at a time", "bbam")


def prepare(method: str) -> Callable[[], Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = faster_rcnn(SIDE, classes=5).eval()
    image = torch.rand(3, SIDE, SIDE)
    corner = 8 + 40 * torch.rand(OBJECTS, 2)
    boxes = torch.cat([corner, corner + 30 + 30 * torch.rand(OBJECTS, 2)], 1)
    labels = torch.randint(1, 5, (OBJECTS,))
    proposals = [(box + 8 * torch.rand(PROPOSALS, 4) - 4).clamp(0, SIDE) for box in boxes]
    detector = detector_from_torchvision(model)

    def masks(*numbers: int, own: list[Tensor] | None = None) -> Tensor:
        index = torch.tensor(numbers)
        chosen = own or [proposals[i] for i in numbers]
        return bbam(detector, image, boxes[index], labels[index], proposals=chosen, stride=CELL, steps=STEPS)

    if method == "bbam":
        return lambda: masks(*range(OBJECTS))
    if method == "one object at a time":
        return lambda: torch.cat([masks(i) for i in range(OBJECTS)])
    if method == RIVAL:
        return lambda: torch.stack(
            [torch.cat([masks(i, own=[one[None]]) for one in proposals[i]]).mean(0) for i in range(OBJECTS)]
        )

    def released(i: int) -> Tensor:
        """The loss of ``bbam`` for one object, by autograd through all of the detector."""
        mean, size = torch.tensor(model.transform.image_mean)[:, None, None], (SIDE, SIDE)

        def predict(x: Tensor) -> tuple[Tensor, Tensor]:
            batch, _ = model.transform([x])
            features = {"0": model.backbone(batch.tensors)}
            model.rpn(batch, features)
            heads = model.roi_heads
            pooled = heads.box_head(heads.box_roi_pool(features, [proposals[i]], batch.image_sizes))
            scores, offsets = heads.box_predictor(pooled)
            return scores.softmax(1), offsets.unflatten(1, (-1, 4))[:, labels[i]]

        with torch.no_grad():
            probabilities, offsets = predict(image)
        x1, y1, x2, y2 = (boxes[i] / CELL).tolist()
        side = SIDE // CELL
        mask = torch.zeros(side, side)
        mask[int(y1) : -int(-y2 // 1), int(x1) : -int(-x2 // 1)] = 1
        mask.requires_grad_()
        optimizer = torch.optim.Adam([mask], 0.02)
        for _ in range(STEPS):
            whole = F.interpolate(mask[None, None], size, mode="bilinear", align_corners=False)[0]
            found = predict(image * whole + mean * (1 - whole))
            terms = (found[0] - probabilities).abs().sum(1) + (found[1] - offsets).abs().sum(1)
            optimizer.zero_grad()
            (0.007 * mask.sum() + terms.mean()).backward()
            optimizer.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
        return F.interpolate(mask.detach()[None, None], size, mode="bilinear", align_corners=False)[0]

    return lambda: torch.cat([released(i) for i in range(OBJECTS)])


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("method", METHODS)
def test_bbam(benchmark, method: str) -> None:  # type: ignore[no-untyped-def]
    run = prepare(method)
    result, expected = run(), prepare(METHODS[-1])()
    error = ((result - expected).norm() / expected.norm()).item()
    if method != RIVAL:  # which is another mask: the mean of those of the proposals
        assert error < 1e-3
    benchmark.group = f"bbam {OBJECTS} objects x {PROPOSALS} proposals, {SIDE}x{SIDE}, {STEPS} steps, 1 thread"
    benchmark.extra_info.update(method=method, rival=RIVAL, error=error)
    benchmark.extra_info["extra_bytes"] = max(0, peak_bytes(prepare, method) - result.nbytes)
    benchmark.pedantic(run, rounds=2)
