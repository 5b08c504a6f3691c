"""The FCN and the U-Net around a classifier."""

import copy
import itertools
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision.models import densenet121, resnet18, resnet50
from torchvision.models.vgg import cfgs, make_layers

from segattr.lrp.adjoints import RULES, batch_statistics
from segattr.lrp.free import FreeDecoder
from segattr.lrp.plan import Plans

Skip = Literal["concat"] | None
SKIPS = pytest.mark.parametrize("skip", [None, "concat"])


def vgg11_bn() -> nn.Module:
    """With a small head: to draw the one of torchvision takes seconds."""
    features = make_layers(cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(25088, 5))


CLASSIFIERS = {
    "resnet18": lambda: resnet18(num_classes=5),
    "vgg11_bn": vgg11_bn,
    "densenet121": lambda: densenet121(num_classes=5),
}
# from coarse to fine, the bottleneck first: the channels of the encoder at 1/32, 1/16, ... of the image
ENCODERS = {
    "resnet18": [512, 256, 128, 64, 64],
    "vgg11_bn": [512, 512, 512, 256, 128, 64],
    "densenet121": [1024, 512, 256, 128, 64],
}


class Small(nn.Module):
    """Three resolutions in 10 thousand weights; a shortcut passes by everything inside the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.inside = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 24, 3, 2, 1), nn.BatchNorm2d(24))
        self.shortcut = nn.Conv2d(16, 24, 1, 2)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x))
        x = F.relu(self.inside(x) + self.shortcut(x))
        return self.fc(self.dropout(x.mean((2, 3))))


def free(model: nn.Module, skip: Skip = "concat", size: int = 64, batch_norm: str = "eval") -> FreeDecoder:
    rules = RULES | ({nn.BatchNorm2d: batch_statistics} if batch_norm == "batch" else {})
    return FreeDecoder(Plans(model, rules, "constant", None), skip, (3, size, size))


@pytest.fixture(scope="module", params=itertools.product(CLASSIFIERS, [None, "concat"]), ids=str)
def stock(request: pytest.FixtureRequest) -> tuple[str, Skip, FreeDecoder]:
    name, skip = request.param
    return name, skip, free(CLASSIFIERS[name]().eval(), skip).eval()


def test_levels_are_the_ends_of_the_stages(stock: tuple[str, Skip, FreeDecoder]) -> None:
    name, skip, network = stock
    bottleneck, *levels = ENCODERS[name]
    widths = [min(level, 256) for level in levels]
    below = [bottleneck, *widths[:-1]]
    expected = [(b + (c if skip else 0), w) for b, c, w in zip(below, levels, widths, strict=True)]
    if name != "vgg11_bn":  # its first convolutions are at the resolution of the image
        expected.append((widths[-1], widths[-1]))
    assert [(level[0].in_channels, level[0].out_channels) for level in network.decoder] == expected


@pytest.mark.parametrize("size", [(64, 64), (67, 53)])
def test_maps_have_the_size_of_the_image(stock: tuple[str, Skip, FreeDecoder], size: tuple[int, int]) -> None:
    network = stock[2]
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        scores, maps = network(images)
        torch.testing.assert_close(scores, network.encoder(images), rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, 5, *size)


def test_unet_of_resnet50_is_about_as_large_as_in_the_paper() -> None:
    """Trainable parameters: 23.55 M of the classifier, 38.84 M of the U-Net."""
    network = free(resnet50(num_classes=21))
    assert sum(p.numel() for p in network.encoder.parameters()) == pytest.approx(23.55e6, rel=1e-3)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(38.84e6, rel=0.1)


@SKIPS
def test_each_level_gets_the_map_that_everything_after_depends_on(skip: Skip) -> None:
    """The decoder written out for one classifier."""
    model = Small().eval()
    network = free(model, skip).eval()
    x = torch.rand(2, 3, 33, 18)
    fine = model.stem(x)
    middle = model.down(fine)
    y = F.relu(model.inside(middle) + model.shortcut(middle))
    for level, guide in zip(network.decoder, (middle, fine), strict=True):
        y = F.interpolate(y, guide.shape[2:], mode="nearest")
        y = nn.Sequential(*level)(torch.cat([y, guide], 1) if skip else y)
    torch.testing.assert_close(network(x), (model(x), network.maps(y)))


def test_without_padding_maps_still_have_the_size_of_the_image() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    network = free(model)
    assert len(network.decoder) == 1
    assert network(torch.rand(2, 3, 21, 34))[1].shape == (2, 2, 21, 34)


@pytest.mark.parametrize(
    "pooling", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d((3, 3)), nn.AvgPool2d(16), nn.MaxPool2d(16)], ids=str
)
def test_the_bottleneck_is_before_the_global_pooling(pooling: nn.Module) -> None:
    features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
    count = pooling(torch.zeros(1, 6, 16, 16)).numel()
    network = free(nn.Sequential(features, pooling, nn.Flatten(), nn.Linear(count, 2)))
    assert [level[0].in_channels for level in network.decoder] == [6 + 4, 4]
    assert network(torch.rand(2, 3, 64, 64))[1].shape == (2, 2, 64, 64)


def test_sizes_in_the_code_of_the_classifier_hide_no_feature_map() -> None:
    class Viewed(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.stem(x))
            y = F.relu(self.inside(y) + self.shortcut(y)).mean((2, 3))
            return self.fc(y.view(x.size(0), -1))

    network, plain = free(Viewed()), free(Small())
    assert [level[0].in_channels for level in network.decoder] == [level[0].in_channels for level in plain.decoder]
    assert network(torch.rand(2, 3, 16, 16))[1].shape == (2, 3, 16, 16)


def test_classes_choose_maps() -> None:
    network = free(Small()).eval()
    x = torch.rand(2, 3, 20, 20)
    scores, maps = network(x)
    torch.testing.assert_close(network(x, [2, 0]), (scores, maps[:, [2, 0]]), rtol=0, atol=0)
    per_image = network(x, [[1], [0, 2]])
    torch.testing.assert_close(per_image, (scores, [maps[0, [1]], maps[1, [0, 2]]]), rtol=0, atol=0)
    assert network(x, [])[1].shape == (2, 0, 20, 20)


@pytest.mark.parametrize(
    ("classes", "error", "problem"),
    [
        ([3], ValueError, "from 0 to 2, got 3"),
        ([-1], ValueError, "from 0 to 2, got -1"),
        ([0.0], TypeError, "classes: expected"),
        ([[1]], ValueError, "each of 2 images, got 1"),
        ([[1], 2], TypeError, "for each image, got 2"),
    ],
)
def test_classes_that_there_are_not_are_refused(classes: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        free(Small())(torch.rand(2, 3, 8, 8), classes)


@SKIPS
def test_both_outputs_together_reach_every_parameter(skip: Skip) -> None:
    network = free(Small(), skip, batch_norm="batch")
    scores, maps = network(torch.rand(4, 3, 16, 16))
    (scores.square().sum() + maps.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_maps_alone_leave_only_the_head_of_the_classifier_out() -> None:
    network = free(Small())
    network(torch.rand(2, 3, 16, 16))[1].square().sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is None} == {
        "encoder.fc.weight",
        "encoder.fc.bias",
    }


def test_the_classifier_is_the_encoder_and_counted_once() -> None:
    model = Small()
    network = free(model)
    assert network.encoder is model
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    assert sum(name.startswith("encoder.") for name in names) == len(list(model.parameters()))
    assert set(names) == set(dict(network.named_parameters())) <= set(network.state_dict())
    before = model.stem[0].weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.rand(2, 3, 16, 16))[1].square().mean().backward()
    optimizer.step()
    assert (model.stem[0].weight != before).any()


def test_a_copy_and_a_restored_state_give_the_same_and_stand_alone() -> None:
    network = free(Small()).eval()
    x = torch.rand(2, 3, 16, 16)
    copied, restored = copy.deepcopy(network), free(Small()).eval()
    restored.load_state_dict(network.state_dict())
    expected = network(x)
    torch.testing.assert_close(restored(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)


def test_a_classifier_in_float64_gets_a_decoder_in_float64() -> None:
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert free(Small().double())(x)[1].dtype == free(Small()).to(torch.float64)(x)[1].dtype == torch.float64


def test_building_leaves_the_classifier_as_it_was() -> None:
    model = Small().train()
    model.down.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    free(model, batch_norm="batch")
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and (parameter.grad == 1).all() for parameter in model.parameters())
    assert model.stem[1].num_batches_tracked == 0
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_only_the_new_weights_draw_random_numbers() -> None:
    model = Small().train()
    plans = Plans(model, RULES, "constant", None)
    torch.manual_seed(1)
    network = FreeDecoder(plans, "concat", (3, 64, 64))
    after = torch.rand(1)
    torch.manual_seed(1)
    for layer in [*network.decoder.modules(), network.maps]:
        if isinstance(layer, nn.Conv2d):
            drawn = copy.deepcopy(layer)
            drawn.reset_parameters()
            torch.testing.assert_close(drawn.weight, layer.weight, rtol=0, atol=0)
    assert torch.rand(1) == after


@SKIPS
@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_it_learns_two_images(skip: Skip, batch_norm: str) -> None:
    """Squares of two classes at other places in noise; to know only how frequent classes are would cost 0.8."""
    network = free(Small(), skip, batch_norm=batch_norm)
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    labels[0, 2:10, 2:10], labels[1, 4:12, 4:16] = 1, 2
    images = F.one_hot(labels, 3).movedim(-1, 1) + 0.3 * torch.randn(2, 3, 16, 16)
    tags = torch.tensor([[0.0, 1, 0], [0, 0, 1]])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-2)
    for _ in range(60):
        scores, maps = network(images)
        segmentation = F.cross_entropy(maps, labels)
        loss = segmentation + F.binary_cross_entropy_with_logits(scores, tags)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert segmentation < 0.1
    assert (maps.argmax(1) == labels).float().mean() > 0.98


def test_it_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    network = free(Small()).eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 3, 17, 16)
    torch.testing.assert_close(compiled(x, [[1], [0, 2]]), network(x, [[1], [0, 2]]))


def test_it_prints_where_each_level_goes() -> None:
    printed = str(free(Small()))
    assert "up to the size of down_2, concatenated with its 16 channels" in printed
    assert "concatenated" not in str(free(Small(), None))


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"skip: expected .*'concat'.*'add'"):
        free(Small(), "add")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected \[B, C, H, W\] or \[B, C, D, H, W\], got \[3, 8, 8\]"):
        free(Small())(torch.rand(3, 8, 8))
    with pytest.raises(TypeError, match="x: expected"):
        free(Small())(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_classifier_that_does_not_fit_is_refused_and_left_in_its_mode() -> None:
    without_features = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2))
    with pytest.raises(TypeError, match="model: expected a classifier with feature maps"):
        free(without_features)
    for_one_size = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2))
    with pytest.raises(ValueError, match=r"size: the classifier does not take an image \[3, 64, 64\]"):
        free(for_one_size)
    assert for_one_size.training
    assert len(free(for_one_size, size=32).decoder) == 0
    without_pooling = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"model: expected scores \[B, K\], got \[1, 4, 62, 62\]"):
        free(without_pooling)
