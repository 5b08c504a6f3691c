"""All that is called mIoU tells the same of the same masks, whatever classes are absent; torchmetrics among them."""

import math
import warnings

import pytest
import torch
from data.sample import VOID, Stacked
from engine import training
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from segattr.metrics import JAndF, best_threshold_miou, region_similarity

CLASSES = 6


class Fixed(nn.Module):
    """Gives the one-hot of what the first channel of the image says."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        return one_hot(image[:, 0].long()).float()


def one_hot(labels: Tensor) -> Tensor:
    return labels[:, None] == torch.arange(CLASSES).view(-1, 1, 1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Predicted and true labels ``[N, H, W]``, in which some classes are in both, in one of them or in neither."""
    some = st.sets(st.integers(0, CLASSES - 1), min_size=1)
    found, true = (torch.tensor(sorted(draw(some))) for _ in range(2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    prediction, labels = (own[torch.randint(len(own), (3, 5, 7), generator=generator)] for own in (found, true))
    return prediction, labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.2, VOID)


def by_pixels(prediction: Tensor, labels: Tensor) -> list[float]:
    """IoU of each class, NaN without any pixel."""
    every = zip(prediction.flatten().tolist(), labels.flatten().tolist(), strict=True)
    pairs = [(found, true) for found, true in every if true != VOID]
    counts = [([p == (k, k) for p in pairs].count(True), [k in p for p in pairs].count(True)) for k in range(CLASSES)]
    return [both / either if either else math.nan for both, either in counts]


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-5, atol=0, equal_nan=True)


@given(cases())
def test_all_of_this_library_agree(case: tuple[Tensor, Tensor]) -> None:
    prediction, labels = case
    expected = by_pixels(prediction, labels)
    masks, valid = (one_hot(prediction), one_hot(labels)), labels != VOID
    close(region_similarity(*masks, valid=valid, pooled=True), expected)

    quality = JAndF(CLASSES)
    for n in range(len(labels)):
        quality.update(masks[0][n : n + 1], masks[1][n : n + 1], valid=valid[n : n + 1])
    region, contour = quality.compute()
    close(region, expected)
    assert torch.equal(contour.isnan(), region.isnan())

    best = best_threshold_miou(masks[0][:, 1:].float(), labels, thresholds=[0.5])
    close(best.iou, expected)
    assert best.miou == pytest.approx(float(region.nanmean()), rel=1e-6, nan_ok=True)

    image = prediction[:, None].expand(-1, 3, -1, -1).float()
    close(training.evaluate(Fixed(), Stacked(tuple("abcdef"), image, labels)).cpu(), expected)


@given(cases())
def test_the_way_of_davis_is_a_number_for_absent_classes(case: tuple[Tensor, Tensor]) -> None:
    prediction, labels = case
    masks, valid = (one_hot(prediction), one_hot(labels)), labels != VOID
    expected = [1 if math.isnan(iou) else iou for iou in by_pixels(prediction, labels)]
    close(region_similarity(*masks, valid=valid, pooled=True, absent=1.0), expected)
    quality = JAndF(CLASSES, absent=1.0)
    quality.update(*masks, valid=valid)
    close(quality.compute()[0], expected)


@given(cases())
def test_torchmetrics_agrees(case: tuple[Tensor, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, while it is imported
        torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    prediction, labels = case
    arguments = {"num_classes": CLASSES, "ignore_index": VOID}
    region = region_similarity(one_hot(prediction), one_hot(labels), valid=labels != VOID, pooled=True)
    of_each = torchmetrics.multiclass_jaccard_index(
        prediction, labels, average="none", zero_division=math.nan, **arguments
    )
    close(of_each, region.tolist())
    if (labels != VOID).any():
        mean = torchmetrics.multiclass_jaccard_index(prediction, labels, average="macro", **arguments)
        assert float(mean) == pytest.approx(float(region.nanmean()), rel=1e-5)
