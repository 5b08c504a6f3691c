"""BBAM against stored cases, against one object at a time, and without a trace in the detector."""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.tv_tensors import BoundingBoxes

from segattr.bbam import (
    _cells,
    _interpolation,
    adaptive_stride,
    bbam,
    detector_from_torchvision,
    positive_proposals,
)
from segattr.networks.proposals import _decode
from tests.segattr.lrp_nets import randomise
from tests.segattr.test_cam import assert_untouched, snapshot

Golden = Callable[[str], dict[str, Tensor]]

# Of torchvision itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper_box": {"heads": ["box"]},
    "paper_cls": {"heads": ["cls"]},
    "code": {"reference": True},
}

BOXES = torch.tensor([[2.0, 3, 17, 20], [0, 0, 40, 30], [20.5, 8, 30, 29.5]])
LABELS = torch.tensor([1, 3, 2])


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchvision would compile its Python form of RoIAlign, slowly."""
    with torch._dynamo.config.patch(disable=True):
        yield


class Pyramid(nn.Module):
    """Two levels of features."""

    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.top = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.stem(x)
        return {"0": low, "1": self.top(low)}


def faster_rcnn(levels: int = 1) -> Any:
    """Four classes; images of 40 x 30 pixels become 48 x 36, padded to 64."""
    torch.manual_seed(0)
    backbone: Any = Pyramid()
    if levels == 1:
        backbone = nn.Sequential(*backbone.stem, *backbone.top)
        backbone.out_channels = 4
    names = [str(level) for level in range(levels)]
    model = FasterRCNN(
        backbone,
        min_size=36,
        max_size=60,
        rpn_anchor_generator=AnchorGenerator(((8,),) * levels, ((1.0,),) * levels),
        box_roi_pool=MultiScaleRoIAlign(names, 2, 2, canonical_scale=32, canonical_level=2),
        box_head=TwoMLPHead(16, 8),
        box_predictor=FastRCNNPredictor(8, 4),
    )
    return randomise(model).double().eval()


def of_format(name: str) -> Any:
    return BoundingBoxes([[2.0, 3, 17, 20]], format=name, canvas_size=(30, 40))  # type: ignore[call-overload]


def picture(*size: int) -> Tensor:
    return torch.rand(3, *(size or (30, 40)), dtype=torch.float64)


def near(boxes: Tensor, *counts: int) -> list[Tensor]:
    """Proposals within the boxes."""
    found = []
    for box, count in zip(boxes.double(), counts, strict=True):
        sides = (box[2:] - box[:2]).repeat(2) * torch.tensor([1, 1, -1, -1])
        found.append(box + 0.3 * torch.rand(count, 4, dtype=torch.float64) * sides)
    return found


def fine(area: float) -> float:
    return 3 + 9 * area**0.5


def regions(images: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
    return [x[:, y1:y2, x1:x2] for x, own in zip(images, boxes, strict=True) for x1, y1, x2, y2 in own.long().tolist()]


def same_box(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Says class 1 where a proposal starts in the first 6 columns, and that the proposal is right."""
    every = torch.cat(list(boxes))
    first = (every[:, :1] < 6).to(every)
    return torch.cat([1 - first, first], 1), torch.zeros_like(every)


def halves(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The class depends on the left half of an image, the offsets on the right half."""
    count = torch.tensor([len(own) for own in boxes])
    side = images.shape[3] // 2
    left, right = (half.mean((1, 2, 3)).repeat_interleave(count) for half in images.split(side, 3))
    return torch.stack([1 - left, left], 1), right[:, None].expand(-1, 4)


# --- the optimisation


@pytest.mark.parametrize("name", VARIANTS)
def test_stored_cases(golden: Golden, name: str) -> None:
    case = golden("attr/bbam")

    def detector(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        maps = F.conv2d(images, case["in/conv.weight"], case["in/conv.bias"], padding=1).relu()
        pooled = torch.stack([region.mean((1, 2)) for region in regions(maps, boxes)])
        logits = F.linear(pooled, case["in/cls.weight"], case["in/cls.bias"])
        offsets = F.linear(pooled, case["in/box.weight"], case["in/box.bias"])
        return logits.softmax(1), offsets.unflatten(1, (4, 4))

    stored = {key: case[f"out/{name}/{key}"] for key in ("mask", "loss", "parts")}
    before = case["in/mask_init"]
    for steps in range(1, 6):
        terms: list[Tensor] = []
        found = bbam(
            *(detector, case["in/image"], torch.tensor([[4, 4, 20, 20]]), torch.tensor([1])),
            **VARIANTS[name],
            steps=steps,
            proposals=[case["in/boxes"]],
            stride=4,
            mean=case["in/mean"],
            progress=lambda step, losses: terms.append(losses),  # noqa: B023
        )
        mask = stored["mask"][None, steps - 1 : steps]
        expected = F.interpolate(mask, size=(24, 24), mode="bilinear", align_corners=name == "code")[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert len(terms) == steps
        torch.testing.assert_close(terms[-1][0], stored["parts"][steps - 1], rtol=0, atol=1e-9)
        used = [head in VARIANTS[name].get("heads", ("box", "cls")) for head in ("box", "cls")]
        loss = 0.007 * before.sum() + (terms[-1][0] * torch.tensor(used)).sum()
        torch.testing.assert_close(loss, stored["loss"][steps - 1], rtol=0, atol=1e-9)
        before = mask


def test_stored_strides(golden: Golden) -> None:
    case = golden("attr/bbam")
    height, width = case["stride/in/hw"].tolist()
    strides = torch.tensor([adaptive_stride(a) for a in case["stride/in/a"].tolist()], dtype=torch.float64)
    torch.testing.assert_close(strides, case["stride/s"], rtol=0, atol=1e-9)
    boxes = torch.tensor([[0, 0, a * width, height] for a in case["stride/in/a"].tolist()], dtype=torch.float64)
    image = torch.zeros(3, height, width)
    assert torch.equal(_cells(boxes, image, adaptive_stride, floor=False), case["stride/mask_hw_ceil"])
    assert torch.equal(_cells(boxes, image, adaptive_stride, floor=True), case["stride/mask_hw_floor"])


@given(
    numbers=st.lists(st.integers(1, 9), min_size=1, max_size=3), side=st.integers(1, 40), align_corners=st.booleans()
)
def test_up_sampling_is_bilinear(numbers: list[int], side: int, align_corners: bool) -> None:
    """Of grids of several sizes; cells that are all 1 show all of the image, exactly."""
    matrices = _interpolation(torch.tensor(numbers), side, align_corners, torch.float64)
    for matrix, number in zip(matrices, numbers, strict=True):
        cells = torch.rand(1, 1, number, number, dtype=torch.float64)
        expected = F.interpolate(cells, size=(side, side), mode="bilinear", align_corners=align_corners)
        found = matrix[:, :number] @ cells @ matrix[:, :number].T
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert not matrix[:, number:].any()
    assert (matrices.sum(2) == 1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_is_one_at_a_time(variant: str) -> None:
    """Grids and numbers of proposals differ; one box is all of the image."""
    detector, image = detector_from_torchvision(faster_rcnn()), picture()
    proposals = near(BOXES, 3, 1, 4)
    options: dict[str, Any] = {"steps": 12, "stride": fine, "sparsity": 1e-3, **VARIANTS[variant]}
    every = bbam(detector, image, BOXES, LABELS, proposals=proposals, **options)
    assert every.shape == (3, 30, 40)
    assert every.dtype == torch.float64
    assert not every.requires_grad
    chunks = bbam(detector, image, BOXES, LABELS, proposals=proposals, chunk=2, **options)
    torch.testing.assert_close(chunks, every, rtol=0, atol=1e-9)
    for i in range(3):
        alone = bbam(detector, image, BOXES[i : i + 1], LABELS[i : i + 1], proposals=[proposals[i]], **options)
        torch.testing.assert_close(alone[0], every[i], rtol=0, atol=1e-9)
        assert alone.std() > 0.05


def test_the_loss_is_a_mean_over_proposals() -> None:
    detector, image, twice = detector_from_torchvision(faster_rcnn()), picture(), near(BOXES[:1], 2)
    options: dict[str, Any] = {"steps": 5, "stride": 4}
    repeated = bbam(detector, image, BOXES[:1], LABELS[:1], proposals=[twice[0].repeat(3, 1)], **options)
    once = bbam(detector, image, BOXES[:1], LABELS[:1], proposals=twice, **options)
    torch.testing.assert_close(repeated, once, rtol=0, atol=1e-9)
    single = bbam(detector, image, BOXES[:1], LABELS[:1], proposals=[twice[0][:1]], **options)
    assert (single - once).abs().max() > 1e-3


def test_masks_keep_what_a_head_looks_at() -> None:
    image, box, label = torch.ones(3, 8, 32), torch.tensor([[0.0, 0, 32, 8]]), torch.tensor([1])
    shares = {}
    for heads in (("cls",), ("box",), ("box", "cls")):
        mask = bbam(halves, image, box, label, proposals=[box], stride=4, heads=heads, steps=100)[0]
        shares[heads] = [mask[:, :12].mean().item(), mask[:, 20:].mean().item()]
    assert shares["cls",] == pytest.approx([1, 0], abs=0.1)
    assert shares["box",] == pytest.approx([0, 1], abs=0.1)
    assert shares["box", "cls"] == pytest.approx([1, 1], abs=0.1)


def test_a_head_that_is_not_used_is_not_followed() -> None:
    """Not even where its gradient would not be finite."""

    def steep(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        probabilities, offsets = halves(images, boxes)
        return probabilities, (offsets - offsets.detach()).sqrt()

    image, box, label = picture(8, 32), torch.tensor([[4.0, 0, 28, 8]]), torch.tensor([1])
    options: dict[str, Any] = {"proposals": [box], "stride": 4, "steps": 20, "heads": ["cls"]}
    assert torch.equal(bbam(steep, image, box, label, **options), bbam(halves, image, box, label, **options))
    with pytest.raises(ValueError, match="detector: expected finite outputs and gradients, got NaN or infinity"):
        bbam(steep, image, box, label, **{**options, "heads": ["box"]})


@pytest.mark.parametrize("proposals", [9, [torch.tensor([[0.0, 0, 32, 8]])]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("steps", [0, 2])
def test_outputs_that_are_not_finite_are_refused(proposals: Any, value: float, head: int, steps: int) -> None:
    def broken(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        probabilities, offsets = halves(images, boxes)
        return (probabilities * value, offsets) if head == 0 else (probabilities, offsets + value)

    box = torch.tensor([[0.0, 0, 32, 8]])
    with pytest.raises(ValueError, match="detector: expected finite values, got NaN or infinity"):
        bbam(broken, torch.ones(3, 8, 32), box, torch.tensor([1]), proposals=proposals, steps=steps)


def test_a_head_without_gradient_is_refused_where_it_is_the_only_one() -> None:
    def detached(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        probabilities, offsets = halves(images, boxes)
        return probabilities, offsets.detach()

    image, box, label = picture(8, 32), torch.tensor([[4.0, 0, 28, 8]]), torch.tensor([1])
    options: dict[str, Any] = {"proposals": [box], "stride": 4, "steps": 2}
    assert torch.equal(
        bbam(detached, image, box, label, **options), bbam(halves, image, box, label, heads=["cls"], **options)
    )
    with pytest.raises(ValueError, match="detector: expected outputs that autograd can follow"):
        bbam(detached, image, box, label, heads=["box"], **options)


def test_offsets_that_are_the_same_for_all_classes() -> None:
    def per_class(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        probabilities, offsets = halves(images, boxes)
        return probabilities, torch.stack([100 * offsets, offsets], 1)

    image, box, label = picture(8, 32), torch.tensor([[4.0, 0, 28, 8]]), torch.tensor([1])
    options: dict[str, Any] = {"proposals": [box], "stride": 4, "steps": 20}
    assert torch.equal(bbam(per_class, image, box, label, **options), bbam(halves, image, box, label, **options))


def test_without_steps_masks_are_boxes() -> None:
    boxes = torch.tensor([[4, 8, 16, 12], [0, 0, 20, 16]])
    found = bbam(halves, torch.ones(3, 16, 20), boxes, torch.tensor([0, 1]), proposals=[boxes] * 2, steps=0, stride=4)
    cells = found[:, 1::4, 1::4] > 0.5
    expected = torch.zeros(2, 4, 5, dtype=torch.bool)
    expected[0, 2, 1:4] = True
    expected[1] = True
    assert torch.equal(cells, expected)
    touched = bbam(
        *(halves, torch.ones(3, 16, 20), torch.tensor([[7.9, 7.9, 8.1, 8.1]]), torch.tensor([0])),
        proposals=[boxes[:1]],
        steps=0,
        stride=4,
    )
    assert (touched[0, 1::4, 1::4] > 0.5).sum() == 4


def test_a_mask_of_ones_costs_nothing() -> None:
    """Exactly, not up to rounding whose sign would be a gradient."""
    detector, image = detector_from_torchvision(faster_rcnn()), picture()
    terms: list[Tensor] = []
    found = bbam(
        *(detector, image, BOXES[1:2], LABELS[1:2]),
        proposals=near(BOXES[1:2], 3),
        steps=4,
        sparsity=0,
        stride=3.7,
        progress=lambda step, losses: terms.append(losses),
    )
    assert (found == 1).all()
    assert not torch.stack(terms).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparsity", [0, 50, 1e30, 1e300])
def test_any_sparsity(sparsity: float, dtype: torch.dtype) -> None:
    detector, image = detector_from_torchvision(faster_rcnn().to(dtype)), picture().to(dtype)
    found = bbam(detector, image, BOXES, LABELS, proposals=near(BOXES, 2, 2, 2), steps=60, sparsity=sparsity, stride=5)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.any() == (sparsity == 0)


def test_what_is_hidden_has_the_mean_of_the_data() -> None:
    seen: list[Tensor] = []

    def detector(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        seen.append(images.detach())
        return halves(images, boxes)

    image, box, label = torch.ones(3, 8, 32), torch.tensor([[0.0, 0, 16, 8]]), torch.tensor([1])
    options: dict[str, Any] = {"proposals": [box], "stride": 4, "steps": 1}
    bbam(detector, image, box, label, **options)
    assert not seen[-1][0, :, :, 20:].any()
    assert (seen[-1][0, :, :, :12] == 1).all()
    bbam(detector, image, box, label, mean=[0.5, 2, -1], **options)
    assert seen[-1][0, :, 0, 31].tolist() == [0.5, 2, -1]
    detector.mean = torch.tensor([3.0, 4, 5])  # type: ignore[attr-defined]
    bbam(detector, image, box, label, **options)
    assert seen[-1][0, :, 0, 31].tolist() == [3, 4, 5]
    assert detector_from_torchvision(faster_rcnn()).mean == [0.485, 0.456, 0.406]  # type: ignore[attr-defined]


def test_progress() -> None:
    """Of the objects that have proposals, chunk by chunk."""
    calls: list[tuple[int, torch.Size]] = []
    detector, image = detector_from_torchvision(faster_rcnn()), picture()
    proposals = near(BOXES, 2, 0, 1)
    options: dict[str, Any] = {"steps": 2, "stride": 6, "progress": lambda step, x: calls.append((step, x.shape))}
    masks = bbam(detector, image, BOXES, LABELS, proposals=proposals, **options)
    assert calls == [(1, (2, 2)), (2, (2, 2))]
    assert not masks[1].any()
    assert masks[0].any()
    calls.clear()
    bbam(detector, image, BOXES, LABELS, proposals=proposals, chunk=1, **options)
    assert calls == [(1, (1, 2)), (2, (1, 2))] * 2


def test_no_objects_and_no_positive_proposals() -> None:
    detector, image = detector_from_torchvision(faster_rcnn()), picture()
    assert bbam(detector, image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 30, 40)
    assert positive_proposals(detector, image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)) == []
    boxes, labels = torch.tensor([[20.0, 3, 30, 13], [1, 3, 11, 13]]), torch.tensor([1, 1])
    assert [len(own) > 0 for own in positive_proposals(same_box, image, boxes, labels)] == [False, True]

    def detector_of_class(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        probabilities, offsets = same_box(images, boxes)
        return probabilities + 0 * images.sum(), offsets

    masks = bbam(detector_of_class, image, boxes, labels, steps=2, stride=5)
    assert not masks[0].any()
    assert masks[1].any()
    assert not bbam(detector_of_class, image, boxes[:1], labels[:1], stride=5).any()


# --- proposals


def test_proposals_are_near_the_box_and_in_the_image() -> None:
    boxes, labels = torch.tensor([[2.0, 0, 6, 20], [0, 4, 20, 10]]), torch.tensor([1, 1])
    found = positive_proposals(
        *(same_box, torch.zeros(3, 20, 20), boxes, labels), count=4000, min_iou=(0.0,), keep=10000, jitter=0.2
    )
    for own, box in zip(found, boxes, strict=True):
        assert own.dtype == torch.float32
        assert own.min() >= 0
        assert own.max() <= 20
        moved = (own - box) / (box[2:] - box[:2]).repeat(2)
        assert moved.abs().max() <= 0.2 + 1e-6
        inner = [0, 2] if box[0] else [1, 3]  # what is not held by the border
        assert (moved[:, inner].amin(0) < -0.19).all()
        assert (moved[:, inner].amax(0) > 0.19).all()
    assert all((own[:, 0] < 6).all() for own in found)


def test_the_threshold_falls_until_enough_proposals_pass() -> None:
    image, box, label = torch.zeros(3, 40, 40), torch.tensor([[4.0, 4, 34, 30]]), torch.tensor([1])

    def of(min_iou: Sequence[float], keep: int) -> Tensor:
        source = torch.Generator().manual_seed(1)
        options: dict[str, Any] = {"min_iou": min_iou, "keep": keep, "generator": source, "jitter": 0.1}
        return positive_proposals(same_box, image, box, label, **options)[0]

    every = of([0], 10000)
    overlap = box_iou(every, box)[:, 0]
    levels = (0.9, 0.85, 0.8)
    counts = [int((overlap > level).sum()) for level in levels]
    assert 0 < counts[0] < counts[1] < counts[2] < 1000
    assert (every[:, 0] < 6).all()
    wanted = [(1, 0.9), (counts[0], 0.9), (counts[0] + 1, 0.85), (counts[1], 0.85), (counts[1] + 1, 0.8), (10000, 0.8)]
    for keep, level in wanted:
        assert torch.equal(of(levels, keep), every[overlap > level][:keep])
    assert torch.equal(of((0.8,), 10000), every[overlap > 0.8])


def test_offsets_are_decoded() -> None:
    """By default as offsets of centres and logarithms of sides; else by a function."""
    boxes, offsets = near(BOXES[:1], 9)[0], torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(_decode(offsets, boxes), BoxCoder((1.0,) * 4).decode_single(offsets, boxes))
    detector: Any = detector_from_torchvision(faster_rcnn())
    torch.testing.assert_close(
        detector.decode(offsets, boxes), BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(offsets, boxes)
    )
    image, box, label = torch.zeros(3, 30, 40), torch.tensor([[0.0, 2, 18, 20]]), torch.tensor([1])

    def always(offsets: Tensor, boxes: Tensor) -> Tensor:
        return box.expand_as(boxes) + torch.tensor([0, 0, 2, 0])  # IoU 0.9

    assert len(positive_proposals(same_box, image, box, label, decode=always, keep=2000)[0]) == 1000
    assert len(positive_proposals(same_box, image, box, label, decode=always, min_iou=[0.91])[0]) == 0

    def beyond(offsets: Tensor, boxes: Tensor) -> Tensor:
        return torch.tensor([-50.0, -50, 20, 20]).expand_as(boxes)

    corner = torch.tensor([[0.0, 0, 20, 20]])
    assert len(positive_proposals(same_box, image, corner, label, decode=beyond)[0]) == 100


def test_bbam_draws_positive_proposals() -> None:
    model = faster_rcnn()
    detector, image = detector_from_torchvision(model), picture()
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(1e-3)
        model.roi_heads.box_predictor.bbox_pred.bias.zero_()
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([0, 9, 0, 0]))
    labels, state = torch.ones(3, dtype=torch.int64), torch.get_rng_state()
    options: dict[str, Any] = {"steps": 3, "stride": 6}

    def source() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    found = bbam(detector, image, BOXES, labels, proposals=300, generator=source(), **options)
    proposals = positive_proposals(detector, image, BOXES, labels, count=300, generator=source())
    assert all(0 < len(own) <= 100 for own in proposals)
    torch.testing.assert_close(found, bbam(detector, image, BOXES, labels, proposals=proposals, **options))
    drawn = bbam(detector, image, BOXES, labels, proposals=np.int64(300), generator=source(), **options)  # type: ignore[arg-type]
    assert torch.equal(drawn, found)
    assert torch.equal(torch.get_rng_state(), state)
    one = source()
    alone = [positive_proposals(detector, image, b[None], labels[:1], count=300, generator=one)[0] for b in BOXES]
    torch.testing.assert_close(alone, proposals, rtol=0, atol=1e-9)
    torch.manual_seed(5)
    first = positive_proposals(detector, image, BOXES, labels)
    torch.manual_seed(5)
    torch.testing.assert_close(positive_proposals(detector, image, BOXES, labels), first)


# --- detectors


@pytest.mark.parametrize("levels", [1, 2])
def test_the_detector_is_faster_rcnn(levels: int) -> None:
    """The outputs of its heads for its own proposals, at their resolution."""
    model = faster_rcnn(levels)
    images = [picture(), picture()]
    seen: dict[str, Any] = {}
    model.roi_heads.register_forward_pre_hook(lambda module, args: seen.update(proposals=args[1], sizes=args[2]))
    model.roi_heads.box_predictor.register_forward_hook(lambda module, args, output: seen.update(heads=output))
    model(images)
    assert seen["sizes"] == [(36, 48)] * 2
    logits, offsets = seen["heads"]
    boxes = [own / torch.tensor([48 / 40, 36 / 30] * 2, dtype=torch.float64) for own in seen["proposals"]]
    assert sum(map(len, boxes)) > 10
    detector = detector_from_torchvision(model)
    probabilities, found = detector(torch.stack(images), boxes)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.flatten(1), offsets, rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_untouched(training: bool) -> None:
    model = faster_rcnn().train(training)
    model.backbone[0].requires_grad_(False)
    model.roi_heads.box_head.eval()
    detector, image = detector_from_torchvision(model), picture().requires_grad_()
    assert [own.training for own in model.modules()].count(training) > 5
    options: dict[str, Any] = {"steps": 3, "stride": 6, "proposals": near(BOXES, 2, 1, 1)}
    before, start = snapshot(model), image.detach().clone()
    masks = bbam(detector, image, BOXES, LABELS, **options)
    assert not masks.requires_grad
    positive_proposals(detector, image, BOXES, LABELS, generator=torch.Generator())
    assert_untouched(model, before)
    assert model.roi_heads.box_roi_pool.scales is None
    assert model.roi_heads.box_roi_pool.map_levels is None
    assert torch.equal(image, start)
    assert image.grad is None

    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # in the middle of the optimisation
            raise RuntimeError("in the model")

    handle = model.roi_heads.box_predictor.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the model"):
        bbam(detector, image, BOXES, LABELS, **options)
    handle.remove()
    assert_untouched(model, before)
    assert model.roi_heads.box_roi_pool.scales is None
    torch.testing.assert_close(bbam(detector, image, BOXES, LABELS, **options), masks)


def test_a_module_of_the_user_is_untouched() -> None:
    class Own(nn.Module):
        """In training mode, with batch statistics."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())
            self.heads = nn.Linear(4, 6)

        def forward(self, images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            pooled = torch.stack([region.mean((1, 2)) for region in regions(self.body(images), boxes)])
            outputs = self.heads(pooled)
            return outputs[:, :2].softmax(1), outputs[:, 2:]

    detector, image = Own().double(), picture()
    arguments: Any = (image, BOXES, torch.ones(3, dtype=torch.int64))
    options: dict[str, Any] = {"steps": 3, "stride": 6, "proposals": near(BOXES, 2, 1, 1)}
    before = snapshot(detector)
    found = bbam(detector, *arguments, **options)
    assert_untouched(detector, before)
    torch.testing.assert_close(bbam(lambda *args: detector.forward(*args), *arguments, **options), found)
    assert all(parameter.grad is None for parameter in detector.parameters())


def test_passes_through_the_network() -> None:
    """One for the whole image, one for each step, one for each object to find proposals; no parameter is followed."""
    model = faster_rcnn()
    counts = {"backbone": 0, "rpn": 0}
    weights: list[bool] = []

    def count(name: str) -> Callable[..., None]:
        return lambda *args: counts.update({name: counts[name] + 1})

    model.backbone.register_forward_hook(count("backbone"))
    model.rpn.register_forward_hook(count("rpn"))
    model.backbone[0].register_forward_pre_hook(lambda module, args: weights.append(module.weight.requires_grad))
    detector, image = detector_from_torchvision(model), picture()
    bbam(detector, image, BOXES, LABELS, proposals=near(BOXES, 2, 1, 3), steps=5, stride=6)
    assert counts == {"backbone": 6, "rpn": 0}
    assert not any(weights)
    counts["backbone"] = 0
    positive_proposals(detector, image, BOXES, LABELS)
    assert counts == {"backbone": 3, "rpn": 0}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode(mode: Callable[[], Any]) -> None:
    detector, image, proposals = detector_from_torchvision(faster_rcnn()), picture(), near(BOXES, 1, 2, 1)
    options: dict[str, Any] = {"steps": 3, "stride": 6}
    expected = bbam(detector, image, BOXES, LABELS, proposals=proposals, **options)
    with mode():
        inside: list[Any] = [x.clone() for x in (image, BOXES, LABELS)]
        found = bbam(detector, *inside, proposals=[own.clone() for own in proposals], **options)
        positive_proposals(detector, *inside)
    assert torch.equal(found, expected)


def test_precision_is_that_of_the_network() -> None:
    model, image, proposals = faster_rcnn(), picture(), near(BOXES, 1, 2, 1)
    options: dict[str, Any] = {"proposals": proposals, "steps": 5, "stride": 6}
    exact = bbam(detector_from_torchvision(model), image, BOXES, LABELS, **options)
    single = detector_from_torchvision(copy.deepcopy(model).float())
    expected = bbam(single, image.float(), BOXES.double(), LABELS.int(), **options)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected.double(), exact, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bbam(single, image.float(), BOXES, LABELS, **options), expected)
    half = bbam(halves, image.half(), BOXES, torch.tensor([0, 1, 1]), **options)
    assert half.dtype == torch.float32
    wide = bbam(halves, image.half().float(), BOXES, torch.tensor([0, 1, 1]), **options)
    assert (half - wide).abs().max() < 0.1


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    detector, image, proposals = detector_from_torchvision(faster_rcnn()), picture(), near(BOXES, 1, 2, 1)

    def run() -> int:
        bbam(detector, image, BOXES, LABELS, proposals=proposals, steps=2, stride=6)
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    before = run()
    assert max(run() for _ in range(3)) <= before


# --- errors


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"image": torch.zeros(1, 3, 9, 9)}, ValueError, r"image: expected \[C, H, W\] with at least one pixel, got"),
        ({"image": torch.zeros(3, 9, 9).int()}, TypeError, "image: expected a floating-point tensor"),
        ({"image": torch.full((3, 9, 9), torch.nan)}, ValueError, "image: expected finite values"),
        ({"boxes": [[1, 2, 3, 4]]}, TypeError, "boxes: expected a tensor, got list"),
        ({"boxes": torch.zeros(4)}, ValueError, r"boxes: expected \[n, 4\], got \[4\]"),
        ({"boxes": torch.tensor([[1.0, 1, 1, 9]])}, ValueError, "boxes: expected 0 <= x1 < x2 <= 40 and 0 <= y1 < y2"),
        ({"boxes": torch.tensor([[1.0, 9, 5, 2]])}, ValueError, "boxes: expected 0 <= x1 .* got .1.0, 9.0, 5.0, 2.0."),
        ({"boxes": torch.tensor([[1.0, 1, 5, 31]])}, ValueError, "boxes: expected .* y2 <= 30, the size of image, got"),
        ({"boxes": torch.tensor([[-1, 1, 5, 9]])}, ValueError, "boxes: expected 0 <= x1"),
        ({"boxes": torch.tensor([[1, 1, torch.nan, 9]])}, ValueError, "boxes: expected 0 <= x1"),
        ({"labels": torch.tensor([1, 2])}, ValueError, r"labels: expected \[1\] to go with boxes \[1, 4\], got \[2\]"),
        ({"labels": torch.tensor([1.0])}, TypeError, "labels: expected an integer tensor"),
        ({"labels": torch.tensor([4])}, ValueError, r"labels: expected classes 0 to 3 of the detector, got \[4"),
        ({"labels": torch.tensor([-1])}, ValueError, r"labels: expected classes 0 to 3 of the detector, got \[-1"),
        ({"labels": torch.tensor([4]), "proposals": 9}, ValueError, "labels: expected classes 0 to 3 of the detector"),
        ({"steps": -1}, ValueError, "steps: expected a finite number of at least 0, got -1"),
        ({"steps": 1.0}, TypeError, "steps: expected an int, got float"),
        ({"lr": 0}, ValueError, "lr: expected a finite number above 0, got 0"),
        ({"sparsity": -1e-3}, ValueError, "sparsity: expected a finite number of at least 0"),
        ({"sparsity": float("inf")}, ValueError, "sparsity: expected a finite number of at least 0"),
        ({"heads": "box"}, TypeError, 'heads: expected a sequence of "box" and "cls", got \'box\''),
        ({"heads": ()}, ValueError, r'heads: expected "box", "cls" or both, got \(\)'),
        ({"boxes": of_format("XYWH")}, ValueError, "boxes: expected corners .* XYXY, got the format XYWH"),
        ({"boxes": of_format("CXCYWH")}, ValueError, "boxes: expected corners .* XYXY, got the format CXCYWH"),
        (
            {"proposals": [of_format("XYWH")]},
            ValueError,
            r"proposals\[0\]: expected corners .* XYXY, got the format XYWH",
        ),
        ({"heads": ["mask"]}, ValueError, 'heads: expected "box", "cls" or both'),
        ({"stride": 0.5}, ValueError, "stride: expected a finite number of at least 1, got 0.5"),
        ({"stride": lambda area: 0}, ValueError, "stride: expected a finite number of at least 1, got 0"),
        ({"stride": "16"}, TypeError, "stride: expected a number, got str"),
        ({"reference": 1}, TypeError, "reference: expected a bool, got int"),
        ({"chunk": 0}, ValueError, "chunk: expected a finite number of at least 1, got 0"),
        ({"progress": True}, TypeError, "progress: expected a function, got bool"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator, got int"),
        ({"mean": "grey"}, TypeError, "mean: expected a number for each channel, got str"),
        ({"mean": [0.5]}, ValueError, r"mean: expected \[3\], a value for each channel, got \[1\]"),
        ({"proposals": 0}, ValueError, "proposals: expected a finite number of at least 1, got 0"),
        ({"proposals": True}, TypeError, "proposals: expected an int, got bool"),
        ({"proposals": 0.5}, TypeError, "proposals: expected an int, or boxes for each object, got float"),
        ({"proposals": []}, ValueError, "proposals: expected boxes for each of 1 objects, got 0"),
        ({"proposals": [torch.zeros(2, 5)]}, ValueError, r"proposals\[0\]: expected \[n, 4\], got \[2, 5\]"),
        ({"proposals": [torch.tensor([[1, 1, 50, 9]])]}, ValueError, r"proposals\[0\]: expected 0 <= x1 < x2 <= 40"),
        ({"detector": "net"}, TypeError, "detector: expected a function of images and boxes, got str"),
        ({"detector": lambda x, b: [{}]}, TypeError, "detector: expected class probabilities and box offsets, a pair"),
        (
            {"detector": lambda x, b: (torch.zeros(2, 4), torch.zeros(2, 8))},
            ValueError,
            r"detector: expected probabilities \[2, K\] and offsets \[2, K, 4\] or \[2, 4\], got \[2, 4\] and \[2, 8\]",
        ),
        (
            {"detector": lambda x, b: (torch.zeros(2, 4), torch.zeros(2, 4))},
            ValueError,
            "detector: expected outputs that autograd can follow to the images, got detached ones",
        ),
    ],
)
def test_errors(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"image": picture(), "boxes": BOXES[:1], "labels": LABELS[:1], "stride": 9, "steps": 2}
    arguments["proposals"] = near(BOXES[:1], 2)
    arguments["detector"] = settings.get("detector") or detector_from_torchvision(faster_rcnn())
    with pytest.raises(error, match=message):
        bbam(**{**arguments, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"count": 0}, ValueError, "count: expected a finite number of at least 1, got 0"),
        ({"count": 2.0}, TypeError, "count: expected an int, got float"),
        ({"jitter": 0.5}, ValueError, "jitter: expected a finite number of at least 0 and below 0.5, got 0.5"),
        ({"decode": "boxes"}, TypeError, "decode: expected a function of offsets and boxes, got str"),
        ({"decode": lambda o, b: b[:, :2]}, ValueError, r"decode: expected boxes \[1000, 4\], got \[1000, 2\]"),
        ({"keep": 0}, ValueError, "keep: expected a finite number of at least 1, got 0"),
        ({"min_iou": 0.8}, TypeError, "min_iou: expected a sequence of numbers, got float"),
        ({"min_iou": ()}, ValueError, "min_iou: expected at least one threshold, got none"),
        ({"min_iou": (0.9, 1)}, ValueError, "min_iou: expected a finite number of at least 0 and below 1, got 1"),
        ({"generator": 1}, TypeError, "generator: expected a torch.Generator, got int"),
        ({"boxes": torch.tensor([[3.0, 3, 3, 9]])}, ValueError, "boxes: expected 0 <= x1 < x2"),
    ],
)
def test_errors_of_proposals(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"boxes": BOXES[:1], "labels": LABELS[:1], **settings}
    with pytest.raises(error, match=message):
        positive_proposals(same_box, picture(), **arguments)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        detector_from_torchvision("net")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a Faster R-CNN, got a Conv2d without transform"):
        detector_from_torchvision(nn.Conv2d(3, 3, 1))
    model = faster_rcnn()
    with pytest.raises(TypeError, match="detector_from_torchvision makes a detector of a Faster R-CNN"):
        bbam(lambda images, boxes: model(images), picture(), BOXES, LABELS)
    model.roi_heads = nn.Identity()
    with pytest.raises(TypeError, match=r"got a FasterRCNN without roi_heads\.box_roi_pool"):
        detector_from_torchvision(model)
