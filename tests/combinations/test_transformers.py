"""SegFormer of transformers, whose logits have a quarter of the resolution of the image."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segattr
from segloss import average_prediction, partial_cross_entropy, potts_crf, size_kl
from tests.combinations.rectangles import CLASSES, rectangles

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}


def segformer(kind: str = "SegformerForSemanticSegmentation") -> nn.Module:
    """With random weights."""
    config = transformers.SegformerConfig(num_labels=CLASSES, decoder_hidden_size=16, **SMALL)
    return getattr(transformers, kind)(config)


def at_image(logits: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(logits, image.shape[2:], mode="bilinear")


def by_interpolation(logits: Tensor, image: Tensor) -> Tensor:
    """The CRF loss of interpolated logits, computed at the quarter."""
    return potts_crf(at_image(logits, image), image, scale_factor=0.25, centred=True, normalize="pixels")


def by_reduction(logits: Tensor, image: Tensor) -> Tensor:
    """That of the logits as they are, with the image of their size."""
    reduced = F.interpolate(image, logits.shape[2:], mode="bilinear")
    return potts_crf(logits, reduced, sigma_xy=25.0, normalize="pixels")


def test_cross_entropy_is_that_of_the_model() -> None:
    image, labels, _ = rectangles(4, 64, 96)
    scribbles = labels.masked_fill(torch.rand(labels.shape) < 0.9, 255)
    output = segformer()(image, labels=scribbles)
    torch.testing.assert_close(partial_cross_entropy(at_image(output.logits, image), scribbles), output.loss)


def trained(crf: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[float], Tensor]:
    """Losses of all steps, and the last logits."""
    image, _, sizes = rectangles(4, 64, 96)
    model = segformer()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    values = []
    for _ in range(30):
        logits = model(image).logits
        loss = size_kl(logits, sizes) + 1e-3 * crf(logits, image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, logits.detach()


@pytest.mark.parametrize("crf", [by_interpolation, by_reduction])
def test_size_and_crf_losses_fall(crf: Callable[[Tensor, Tensor], Tensor]) -> None:
    values = trained(crf)[0]
    assert values[-1] < 0.5 * values[0]


def test_both_ways_to_the_crf_loss_pull_alike() -> None:
    image = rectangles(4, 64, 96).image
    logits = trained(by_reduction)[1].requires_grad_()
    pulls = [torch.autograd.grad(crf(logits, image), logits)[0].flatten() for crf in (by_interpolation, by_reduction)]
    assert F.cosine_similarity(*pulls, dim=0) > 0.95
    assert 0.8 < pulls[0].norm() / pulls[1].norm() < 1.25


def test_sizes_at_the_quarter_are_those_of_the_image() -> None:
    image = rectangles(4, 64, 96).image
    logits = trained(by_reduction)[1]
    torch.testing.assert_close(
        average_prediction(logits), average_prediction(at_image(logits, image)), rtol=0, atol=1e-2
    )


def test_outputs_and_resolutions_that_do_not_fit_are_refused_by_name() -> None:
    image = rectangles(2, 64, 96).image
    output = segformer()(image)
    with pytest.raises(TypeError, match="logits: expected a tensor, got SemanticSegmenterOutput"):
        potts_crf(output, image)
    with pytest.raises(ValueError, match=r"logits = F.interpolate\(logits, image.shape\[-2:\], mode=.bilinear.\)"):
        potts_crf(output.logits, image)


def test_maps_of_the_classifier() -> None:
    image = rectangles(2, 64, 96).image.double()
    model = segformer("SegformerForImageClassification").eval().double()
    clf = segattr.split(model)
    torch.testing.assert_close(clf(image), model(image).logits)
    maps = segattr.cam(clf, image)
    assert maps.shape == (2, CLASSES, 2, 3)
    torch.testing.assert_close(maps.mean((2, 3)) + model.classifier.bias, model(image).logits)
