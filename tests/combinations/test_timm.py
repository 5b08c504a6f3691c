"""Encoders and classifiers of timm."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segattr
from segattr import lrp
from segloss import potts_crf, size_kl
from tests.combinations.rectangles import CLASSES, rectangles

timm = pytest.importorskip("timm")


class Decoder(nn.Module):
    """Classes of all feature maps of an encoder, added up at the resolution of the image."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = timm.create_model(name, features_only=True)
        self.heads = nn.ModuleList(nn.Conv2d(width, CLASSES, 1) for width in self.encoder.feature_info.channels())

    def forward(self, image: Tensor) -> Tensor:
        maps = [head(features) for head, features in zip(self.heads, self.encoder(image), strict=True)]
        return sum(F.interpolate(map, image.shape[2:], mode="bilinear") for map in maps)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_losses_reach_the_encoder_and_fall(name: str) -> None:
    image, _, sizes = rectangles(4, 64, 96)
    model = Decoder(name)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    values = []
    for _ in range(15):
        logits = model(image)
        loss = size_kl(logits, sizes) + 1e-3 * potts_crf(logits, image, scale_factor=0.25, normalize="pixels")
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_a_classifier_is_split_where_timm_splits_it(name: str) -> None:
    image = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    model = timm.create_model(name, num_classes=CLASSES).eval().double()
    clf = segattr.split(model)
    features = clf.features(image)
    torch.testing.assert_close(features, model.forward_features(image))
    torch.testing.assert_close(clf.head(features), model(image))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_maps_and_heatmaps_sum_to_the_scores(name: str) -> None:
    image = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    model = timm.create_model(name, num_classes=CLASSES).eval().double()
    maps = segattr.cam(segattr.split(model), image)
    torch.testing.assert_close(maps.mean((2, 3)) + model.get_classifier().bias, model(image))
    unrolled = lrp.unroll(model)
    scores, heatmaps = unrolled(image)
    torch.testing.assert_close(scores, model(image))
    torch.testing.assert_close(heatmaps.sum((2, 3)) + sum(unrolled.ledger(image).values()), scores)
