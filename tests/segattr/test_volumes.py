"""Classifiers of volumes: maps and heatmaps against their definitions in 3-D, and against those of images."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks.blocks.squeeze_and_excitation import SEResNetBottleneck
from monai.networks.nets import DenseNet, ResNet, SENet
from monai.visualize import CAM, GradCAM
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

from segattr import Classifier, advcam, cam, gndrp, grad_cam, lrp, metrics, multiscale, normalize, rib, split
from tests.segattr.lrp_nets import conservation_error, error, gradients, input_times_gradient, randomise

CLASSES = 3
VOLUMES = torch.randn(2, 1, 17, 33, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
assert_close = torch.testing.assert_close


def plain(bias: bool = True) -> nn.Module:
    """Convolutions, normalisation and pools of windows that overlap."""
    layers = [nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(5, CLASSES, bias=bias)]
    return nn.Sequential(*layers, nn.Conv3d(4, 5, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.ReLU(inplace=True), *head)


def deep_head() -> nn.Module:
    """Pools of both kinds, two linear layers behind the last one."""
    features = [nn.Conv3d(1, 4, 3, 2), nn.ReLU(), nn.AvgPool3d(3, 2, 1, ceil_mode=True, count_include_pad=False)]
    head = [nn.AdaptiveAvgPool3d((1, 2, 3)), nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, CLASSES)]
    return nn.Sequential(*features, nn.Conv3d(4, 4, 1, 2), nn.ReLU(), *head)


def gated() -> nn.Module:
    """Normalisation by statistics of the volume, interpolation, an activation that is no ReLU."""
    layers = [nn.Conv3d(1, 4, 3, 2, 1), nn.InstanceNorm3d(4, affine=True), nn.SiLU(), nn.Upsample(scale_factor=2)]
    layers += [nn.Conv3d(4, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Upsample(scale_factor=1.5, mode="trilinear")]
    head = [nn.AdaptiveMaxPool3d(2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
    return nn.Sequential(*layers, *head)


def resnet(**settings: Any) -> nn.Module:
    return ResNet("basic", [1, 1, 1, 1], [4, 4, 6, 8], 3, 1, conv1_t_size=3, num_classes=CLASSES, **settings)


def densenet() -> nn.Module:
    return DenseNet(3, 1, CLASSES, init_features=4, growth_rate=3, block_config=(1, 2, 1), bn_size=2)


def senet() -> nn.Module:
    shape = {"inplanes": 4, "downsample_kernel_size": 1, "input_3x3": False}
    return SENet(3, 1, SEResNetBottleneck, [1, 1, 1, 1], 1, 16, None, num_classes=CLASSES, **shape)


def video() -> nn.Module:
    """What torchvision's r3d_18 is made of, with a single channel in and few blocks."""
    net = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=CLASSES)
    net.stem[0] = nn.Conv3d(1, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
    return net


PIECEWISE: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "deep head": deep_head,
    "MONAI's ResNet": resnet,
    "MONAI's DenseNet": densenet,
}
GATED: dict[str, Callable[[], nn.Module]] = {
    "MONAI's ResNet, shortcuts A": lambda: resnet(shortcut_type="A"),  # which it detaches
    "gated": gated,
    "MONAI's ResNet, instance normalisation": lambda: resnet(norm=("instance", {"affine": True})),
    "MONAI's SENet": senet,
}
NETS = PIECEWISE | GATED


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make())


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow if n == "MONAI's SENet" else ()) for n in NETS])
def net(request: pytest.FixtureRequest) -> nn.Module:
    return made(NETS[request.param])


# --- features and head


def test_the_parts_are_the_network(net: nn.Module) -> None:
    clf = split(net, example=VOLUMES)
    features = clf.features(VOLUMES)
    assert features.dim() == 5
    assert features.shape[2:].numel() > 1
    assert_close(clf.head(features), net(VOLUMES))
    assert clf.num_classes == CLASSES
    other = torch.randn(3, 1, 20, 40, 33, dtype=torch.float64)  # of another size
    assert_close(clf(other), net(other))


@pytest.mark.slow
def test_the_parts_of_a_video_network() -> None:
    net = made(video)
    clf = split(net, example=VOLUMES[:, :, :8])
    features = clf.features(VOLUMES)
    assert features.shape == (2, 512, 3, 3, 3)
    assert_close(clf.head(features), net(VOLUMES))
    assert_close(cam(clf, VOLUMES), torch.einsum("kd,bdzyx->bkzyx", net.fc.weight, features))


def test_a_network_is_read_without_a_volume() -> None:
    net = made(plain)
    clf = split(net)
    assert clf.linear is net[-1]
    assert clf.features(VOLUMES).shape == (2, 5, 9, 9, 9)
    at_layer = split(net, "0")
    assert at_layer.features(VOLUMES).shape == (2, 4, 17, 33, 36)
    assert_close(at_layer(VOLUMES), net(VOLUMES))


def test_a_convolution_of_single_voxels_after_pooling_is_the_linear_layer() -> None:
    layers = [nn.Conv3d(1, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Conv3d(4, CLASSES, 1), nn.Flatten()]
    net = made(lambda: nn.Sequential(*layers))
    before = made(lambda: nn.Sequential(*layers[:2], layers[3], layers[2], nn.Flatten()))
    for own in (net, before):
        clf = split(own, example=VOLUMES)
        assert clf.linear is layers[3]
        assert clf.features(VOLUMES).shape[1] == 4
        assert_close(cam(clf, VOLUMES).mean((2, 3, 4)) + layers[3].bias, own(VOLUMES))


@pytest.mark.parametrize("pool", [lambda f: f.mean((2, 3, 4)), lambda f: F.adaptive_avg_pool3d(f, 1).flatten(1)])
def test_a_pair_of_parts(pool: Callable[[Tensor], Tensor]) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, CLASSES)

        def forward(self, features: Tensor) -> Tensor:
            return self.fc(pool(features))

    features, head = nn.Conv3d(1, 4, 3, 2).double(), Head().double()
    clf = Classifier(features, head)
    assert clf.linear is head.fc
    assert_close(cam(clf, VOLUMES), torch.einsum("kd,bdzyx->bkzyx", head.fc.weight, features(VOLUMES)))


class Tokens(nn.Module):
    """Patches as tokens, with a block that mixes them, and the average of them."""

    def __init__(self, class_token: bool) -> None:
        super().__init__()
        self.patches = nn.Conv3d(1, 4, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4)) if class_token else None
        self.query, self.key, self.value, self.fc = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        weights = (self.query(tokens) @ self.key(tokens).transpose(1, 2)).softmax(2)
        tokens = tokens + weights @ self.value(tokens)
        return self.fc(tokens[:, 0] if self.token is not None else tokens.mean(1))


@pytest.mark.parametrize("class_token", [True, False])
def test_tokens_of_a_volume_are_a_map(class_token: bool) -> None:
    net = made(lambda: Tokens(class_token))
    volumes = VOLUMES[:, :, :12, :16, :20]
    clf = split(net, example=volumes)
    features = clf.features(volumes)
    maps = features[0] if isinstance(features, tuple) else features
    assert maps.shape == (2, 4, 3, 4, 5)
    assert_close(clf(volumes), net(volumes))
    assert grad_cam(clf, volumes).shape == (2, 4, 3, 4, 5)


# --- maps


def test_maps_by_definition() -> None:
    net = made(plain)
    clf = split(net, example=VOLUMES)
    features, weight = clf.features(VOLUMES), net[-1].weight
    expected = torch.einsum("kd,bdzyx->bkzyx", weight, features)
    assert_close(cam(clf, VOLUMES), expected)
    assert_close(grad_cam(clf, VOLUMES, norm="raw") * features[0, 0].numel(), expected)
    peak = expected.relu().amax((2, 3, 4), keepdim=True)
    assert_close(cam(clf, VOLUMES, [2, 0], norm="relu_max"), (expected.relu() / peak)[:, [2, 0]])
    least, most = expected.amin((2, 3, 4), keepdim=True), expected.amax((2, 3, 4), keepdim=True)
    assert_close(normalize(expected, "minmax", dims=3), (expected - least) / (most - least))
    ragged = cam(clf, VOLUMES, [[1], []], norm="max")
    assert [own.shape for own in ragged] == [(1, 9, 9, 9), (0, 9, 9, 9)]
    assert_close(normalize([own[0] for own in expected.split(1)], "max", dims=3)[0][[1]], ragged[0])


@pytest.mark.parametrize("settings", [{}, {"pool": False}, {"weighting": "gradcam++"}, {"weighting": "layercam"}])
def test_grad_cam_of_any_head(settings: dict[str, Any]) -> None:
    net = made(deep_head)
    clf = split(net, example=VOLUMES)
    features = clf.features(VOLUMES).detach().requires_grad_()
    scores = clf.head(features).sum(0)
    found = grad_cam(clf, VOLUMES, norm="raw", **settings)
    for c in range(CLASSES):
        (g,) = torch.autograd.grad(scores[c], features, retain_graph=True)
        if settings.get("weighting") == "gradcam++":
            share = g**2 / (2 * g**2 + features.sum((2, 3, 4), keepdim=True) * g**3)
            weight = (torch.where(g == 0, 0, share) * g.relu()).sum((2, 3, 4), keepdim=True)
        elif settings.get("weighting") == "layercam":
            weight = g.relu()
        else:
            weight = g.mean((2, 3, 4), keepdim=True) if settings.get("pool", True) else g
        assert_close(found[:, c], (weight * features).sum(1))


def test_grad_cam_of_several_layers_and_of_a_segmentation_network() -> None:
    net = made(deep_head)
    several = grad_cam(net, VOLUMES, [1], layer=["0", "3"])
    first, last = (grad_cam(net, VOLUMES, [1], layer=layer, norm="minmax") for layer in ("0", "3"))
    last = F.interpolate(last, first.shape[2:], mode="trilinear")
    assert several.shape == first.shape == (2, 1, 8, 16, 17)
    assert several.isfinite().all()
    dense = made(lambda: nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, CLASSES, 1)))
    pixels = torch.rand(2, *VOLUMES.shape[2:]) < 0.1
    features = dense[1](dense[0](VOLUMES))
    weight = dense[2].weight.flatten(1) * pixels.flatten(1).sum(1)[:, None, None] / pixels[0].numel()
    expected = torch.einsum("bkd,bdzyx->bkzyx", weight, features)
    assert_close(grad_cam(dense, VOLUMES, pixels=pixels, norm="raw"), expected)


def test_maps_of_monai_are_ours() -> None:
    """Its CAM, which has the bias in it, and Grad-CAM, before they are turned round, stretched and resized."""
    net = made(densenet)
    clf = split(net, example=VOLUMES)
    last = clf.linear
    for c in range(CLASSES):
        theirs = CAM(net, "class_layers.relu", "class_layers.out").compute_map(VOLUMES, class_idx=[c, c])
        assert_close(cam(clf, VOLUMES, [c]) + last.bias[c], theirs)
        theirs = GradCAM(net, "class_layers.relu").compute_map(VOLUMES, class_idx=c)
        assert_close(grad_cam(clf, VOLUMES, [c]), theirs)


def flattened(make: Callable[[int], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A network of images, and the same of volumes: kernels of depth 1."""
    image, volume = made(lambda: make(2)), made(lambda: make(3))
    with torch.no_grad():
        for own, other in zip(volume.parameters(), image.parameters(), strict=True):
            own.copy_(other.view_as(own))
        for own, other in zip(volume.buffers(), image.buffers(), strict=True):
            own.copy_(other)
    return image, volume


def of_dims(dims: int) -> nn.Module:
    def size(side: int) -> Any:
        return (1,) * (dims - 2) + (side, side)

    conv, pool = (nn.Conv2d, nn.MaxPool2d) if dims == 2 else (nn.Conv3d, nn.MaxPool3d)
    norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    average = nn.AdaptiveAvgPool2d if dims == 2 else nn.AdaptiveAvgPool3d
    padding = (0,) * (dims - 2) + (1, 1)
    layers = [conv(1, 4, size(3), size(2), padding), norm(4), nn.ReLU(), pool(size(3), size(2), padding)]
    layers += [conv(4, 5, 1), nn.ReLU(), average(1), nn.Flatten(), nn.Linear(5, CLASSES)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "method",
    [
        lambda clf, x: cam(clf, x, norm="max"),
        lambda clf, x: grad_cam(clf, x, norm="relu"),
        lambda clf, x: advcam(clf, x, steps=3),
        lambda clf, x: advcam(clf, x, steps=2, reference=True),
        lambda clf, x: rib(clf, x, torch.eye(2, CLASSES), companions=[(x, torch.eye(2, CLASSES))] * 2, steps=2),
        lambda clf, x: lrp.unroll(clf)(x)[1],
        lambda clf, x: lrp.unroll(clf, rule="epsilon_plus")(x)[1],
    ],
    ids=["cam", "grad_cam", "advcam", "reference", "rib", "LRP-0", "epsilon_plus"],
)
def test_a_volume_of_depth_1_is_an_image(method: Callable[[nn.Module, Tensor], Tensor]) -> None:
    image, volume = flattened(of_dims)
    x = VOLUMES[:, :, :1]
    flat, deep = split(image, example=x[:, :, 0]), split(volume, example=x)
    assert_close(method(deep, x)[:, :, 0], method(flat, x[:, :, 0]))


def test_a_climb_raises_its_class_in_any_head() -> None:
    net = made(deep_head)
    clf = split(net, example=VOLUMES)
    assert_close(advcam(clf, VOLUMES, steps=0), grad_cam(clf, VOLUMES) * clf.features(VOLUMES)[0, 0].numel())
    assert advcam(clf, VOLUMES, [[1], [0, 2]], steps=2)[1].shape[:1] == (2,)


def test_regions_of_volumes() -> None:
    maps, features = torch.randn(2, CLASSES, 3, 4, 5), torch.randn(2, 6, 3, 4, 5)
    chosen = (maps / maps.amax((2, 3, 4), keepdim=True) <= 0.4)[:, :, None]
    assert_close(gndrp(features, maps), (features[:, None] * chosen).sum((3, 4, 5)) / chosen.sum((3, 4, 5)))


def test_scales_and_mirrors_of_volumes() -> None:
    def lopsided(x: Tensor) -> Tensor:
        return x.cumsum(4)

    x = VOLUMES[:, :, :6, :8, :10]

    def resize(values: Tensor, *size: int) -> Tensor:
        return F.interpolate(values, size, mode="trilinear")

    half = resize(x, 3, 4, 5)
    terms = [resize(lopsided(half), 6, 8, 10), resize(lopsided(half.flip(-1)).flip(-1), 6, 8, 10)]
    terms += [lopsided(x), lopsided(x.flip(-1)).flip(-1)]
    assert_close(multiscale(lopsided, x, (0.5, 1)), sum(terms) / 4)


@pytest.mark.slow
def test_volumes_of_monai() -> None:
    net = made(plain)
    meta = MetaTensor(VOLUMES)
    assert_close(torch.as_tensor(cam(net, meta)), cam(net, VOLUMES))
    assert_close(torch.as_tensor(lrp.unroll(net)(meta)[1]), lrp.unroll(net)(VOLUMES)[1])


# --- LRP


@pytest.mark.parametrize("rule", ["zero", "epsilon", "epsilon_plus"])
def test_relevance_is_conserved(net: nn.Module, rule: str) -> None:
    unrolled = lrp.unroll(net, rule=rule, example=VOLUMES)
    scores, heat = unrolled(VOLUMES)
    assert heat.shape == (2, CLASSES, *VOLUMES.shape[2:])
    assert_close(scores, net(VOLUMES))
    assert conservation_error(scores, heat, unrolled.ledger(VOLUMES)) < 1e-9


@pytest.mark.parametrize("name", PIECEWISE)
def test_heatmaps_are_input_times_gradient(name: str) -> None:
    net = made(PIECEWISE[name])
    scores, heat = lrp.unroll(net, gates="refuse", example=VOLUMES)(VOLUMES)
    expected_scores, expected = input_times_gradient(net, VOLUMES)
    assert error(scores, expected_scores) < 1e-12
    assert error(heat, expected) < 1e-12


@pytest.mark.parametrize("stride", [1, 2, (1, 2, 3)])
def test_convolutions_of_single_voxels(stride: Any) -> None:
    """They are products of matrices in the decoder."""
    layers = [nn.Conv3d(1, 4, 1, stride), nn.ReLU(), nn.Conv3d(4, 3, 1, stride), nn.AdaptiveAvgPool3d(1)]
    net = made(lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, CLASSES)))
    _, heat = lrp.unroll(net, example=VOLUMES)(VOLUMES)
    assert error(heat, input_times_gradient(net, VOLUMES)[1]) < 1e-12


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool3d((1, 3, 2), (1, 2, 3), (0, 1, 1), ceil_mode=True),
        nn.AvgPool3d(3, 2, 1, count_include_pad=False),
        nn.AvgPool3d(2, divisor_override=3),
        nn.AdaptiveAvgPool3d((2, 5, None)),
        nn.MaxPool3d(3, 2, 1, ceil_mode=True),
        nn.AdaptiveMaxPool3d((2, 5, 3)),
        nn.Upsample(size=(5, 7, 9), mode="trilinear", align_corners=True),
        nn.Upsample(scale_factor=(2, 1, 0.5), mode="trilinear"),
        nn.ConvTranspose3d(4, 4, (1, 3, 2), (1, 2, 2), bias=False),
        nn.ConstantPad3d((1, 0, 2, 1, 0, 1), 0.5),
    ],
    ids=lambda pool: str(pool),
)
def test_adjoints_of_layers_of_volumes(pool: nn.Module) -> None:
    layers = [nn.Conv3d(1, 4, 3), nn.ReLU(), pool, nn.Conv3d(4, 3, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(1)]
    net = made(lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, CLASSES)))
    x = VOLUMES[:, :, :11, :12, :13]
    unrolled = lrp.unroll(net, example=x)
    scores, heat = unrolled(x)
    assert error(heat, input_times_gradient(net, x)[1]) < 1e-12
    assert conservation_error(scores, heat, unrolled.ledger(x)) < 1e-12


def test_a_pool_of_volumes_in_a_network_of_images() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(2, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.avg_pool3d(self.conv(x).relu()[:, None], 2)[:, 0].flatten(2).mean(2))

    net, x = made(Pooled), VOLUMES[:, :, 0]
    assert error(lrp.unroll(net)(x)[1], input_times_gradient(net, x)[1]) < 1e-12


def test_training_through_heatmaps_of_volumes() -> None:
    net = made(plain)
    scores, heat = lrp.unroll(net, example=VOLUMES)(VOLUMES)
    labels = torch.randint(0, CLASSES, (2, *VOLUMES.shape[2:]))
    tags = torch.ones(2, CLASSES)
    found = gradients(lrp.heatmap_loss(heat, scores, labels, tags), net)
    own, expected = input_times_gradient(net, VOLUMES, create_graph=True)
    pixels = F.cross_entropy(expected * expected[0, 0].numel(), labels)
    classification = F.binary_cross_entropy_with_logits(own[:, 1:], tags[:, 1:], reduction="sum") / own.numel()
    for name, gradient in gradients(pixels + classification, net).items():
        assert_close(found[name], gradient)


def test_statistics_of_a_batch_of_volumes() -> None:
    net = made(plain).train()
    unrolled = lrp.unroll(net, batch_norm="batch", example=VOLUMES)
    expected = copy.deepcopy(net)
    expected(VOLUMES)
    scores, heat = unrolled(VOLUMES)
    assert_close(net[1].running_var, expected[1].running_var)
    assert_close(scores, net(VOLUMES))
    assert conservation_error(scores, heat, unrolled.ledger(VOLUMES)) < 1e-12


def test_a_decoder_with_weights_of_its_own() -> None:
    net = made(plain)
    unet = lrp.unroll(net, weights="free", upsampling="nearest", skip="concat").eval()
    scores, maps = unet(VOLUMES)
    assert_close(scores, net(VOLUMES))
    assert maps.shape == (2, CLASSES, *VOLUMES.shape[2:])


# --- measures


def test_measures_of_volumes() -> None:
    """Those of images whose height is depth and height of the volume, one after the other."""
    maps, labels = torch.rand(2, CLASSES, 3, 4, 5), torch.randint(0, CLASSES + 1, (2, 3, 4, 5))
    masks = labels[:, None] == torch.arange(1, CLASSES + 1).view(-1, 1, 1, 1)
    predicted = maps > 0.5
    stacked = {"maps": maps.flatten(2, 3), "labels": labels.flatten(1, 2), "tags": torch.eye(2, CLASSES)}
    for own, other in zip(
        metrics.best_threshold_miou(maps, labels, tags=stacked["tags"]),
        metrics.best_threshold_miou(**stacked),
        strict=True,
    ):
        assert_close(own, other)
    for pooled in (False, True):
        found = metrics.region_similarity(predicted, masks, pooled=pooled, dims=3)
        assert_close(found, metrics.region_similarity(predicted.flatten(2, 3), masks.flatten(2, 3), pooled=pooled))
    valid = labels < 3
    found = metrics.region_similarity(predicted, masks, valid=valid, dims=3)
    assert_close(found, metrics.region_similarity(predicted & valid[:, None], masks & valid[:, None], dims=3))
    gradients, regions = torch.randn(2, 1, 3, 4, 5), masks
    flat = metrics.high_gradient_ratio(gradients.flatten(2, 3), regions.flatten(2, 3))
    assert_close(metrics.high_gradient_ratio(gradients, regions), flat)
    assert_close(metrics.high_gradient_ratio(gradients, regions[:, 1]), flat[:, 1])


@pytest.mark.parametrize("tolerance", [0, 1.2, 2, 2.5])
def test_pointing_game_of_volumes(tolerance: float) -> None:
    maps, masks = torch.rand(3, 4, 3, 4, 5), torch.rand(3, 4, 3, 4, 5) < 0.04
    found = metrics.pointing_game(maps, masks, tolerance=tolerance)
    for own, mask, hit in zip(maps.flatten(0, 1), masks.flatten(0, 1), found.flatten(), strict=True):
        point = (own == own.max()).nonzero()[0]
        distances = (mask.nonzero() - point).double().norm(dim=1)
        near = (distances < tolerance) | (distances == 0)
        assert hit.isnan() if not len(distances) else hit == near.any()


# --- what is refused


@pytest.mark.parametrize("method", [cam, grad_cam, advcam, lambda net, x: lrp.unroll(net)(x)])
def test_images_for_a_network_of_volumes_and_volumes_for_one_of_images(method: Callable[..., Any]) -> None:
    """Layers of volumes would take a batch of images of one channel for a single volume."""
    with pytest.raises(ValueError, match=r"(images|x): expected \[B, C, D, H, W\], got \[\d, 1, 33, 36\]$"):
        method(made(plain), VOLUMES[:1, :, 0])
    flat = made(lambda: of_dims(2))
    with pytest.raises(ValueError, match=r"(images|x): expected \[B, C, H, W\], got \[\d, 1, 17, 33, 36\]$"):
        method(flat, VOLUMES)
    with pytest.raises(
        ValueError, match=r"(images|x): expected \[B, C, H, W\] or \[B, C, D, H, W\], got \[17, 33, 36\]$"
    ):
        method(flat, VOLUMES[0, 0])


def test_an_example_of_the_wrong_kind() -> None:
    for read in (split, lrp.unroll):
        with pytest.raises(ValueError, match=r"example: expected \[B, C, D, H, W\], got \[2, 1, 33, 36\]$"):
            read(made(plain), example=VOLUMES[:, :, 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normalize(torch.zeros(2, 3, 4, 5, 6), "max"), ValueError, "maps: expected at most 4 .* dims=3 is for"),
        (lambda: normalize([torch.zeros(3, 4, 5, 6)], "max"), ValueError, "maps: expected at most 3 dimensions"),
        (
            lambda: normalize(torch.zeros(4, 5), "max", dims=3),
            ValueError,
            r"maps: expected \[..., d, h, w\], got \[4, 5\]",
        ),
        (lambda: normalize(torch.zeros(4, 5), "max", dims=1), ValueError, "dims: expected one of 2, 3, got 1"),
        (lambda: normalize(torch.zeros(4, 5), "max", dims=2.0), TypeError, "dims: expected an int, got float"),
        (
            lambda: multiscale(lambda x: x[:, :, 0], VOLUMES),
            ValueError,
            r"method: expected maps \[B, K, d, h, w\] or a list of \[K, d, h, w\], got",
        ),
        (
            lambda: grad_cam(Classifier(lambda x: x[:, :, 0], nn.Flatten()), VOLUMES),
            ValueError,
            r"clf: expected features \[B, D, d, h, w\], got \[2, 1, 33, 36\]",
        ),
        (
            lambda: grad_cam(made(plain), VOLUMES, pixels=torch.ones(2, 3, 3, dtype=torch.bool)),
            ValueError,
            r"pixels: expected \[B, D, H, W\], got \[2, 3, 3\]",
        ),
        (
            lambda: metrics.region_similarity(*[torch.ones(4, 5, dtype=torch.bool)] * 2, dims=3),
            ValueError,
            r"prediction: expected \[..., D, H, W\], got \[4, 5\]",
        ),
        (
            lambda: metrics.region_similarity(*[torch.ones(3, 4, 5, dtype=torch.bool)] * 2, pooled=True, dims=3),
            ValueError,
            r"prediction: expected \[N, ..., D, H, W\] to pool over N, got \[3, 4, 5\]",
        ),
    ],
)
def test_errors_of_volumes(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
