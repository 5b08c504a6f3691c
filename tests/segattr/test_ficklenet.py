"""FickleNet against dropout made window by window, map expansion, autograd and golden values."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segattr.ficklenet import StochasticConv2d, aggregate, ficklenet, stochastic_conv2d, stochastic_grad_cam

Case = dict[str, Tensor]
Golden = Callable[[str], Case]


@pytest.fixture
def case(golden: Golden) -> Case:
    """The golden case, its features repeated for each of the 4 passes."""
    stored = {name.split("/")[-1]: value for name, value in golden("attr/fickle").items()}
    return stored | {"x": stored["x"].expand(4, -1, -1, -1), "keep": stored["keep"].bool()}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Features, weights and masks of small odd shapes, maps smaller than the kernel among them."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    images, channels, classes, size = (draw(st.integers(1, n)) for n in (2, 3, 3, 3))
    height, width, kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5)), 2 * size - 1
    layer = StochasticConv2d(channels, classes, kernel, draw(st.sampled_from([0.0, 0.5, 0.9]))).double()
    features = torch.randn(images, channels, height, width, dtype=torch.float64)
    return {
        "features": features,
        "weight": layer.weight.detach(),
        "keep": layer.draw(features),
        "drop": layer.drop,
    }


def by_windows(features: Tensor, weight: Tensor, keep: Tensor, drop: float) -> Tensor:
    """Dropout and a product with the kernel at each position."""
    size = weight.shape[-1]
    padded = F.pad(features, (size // 2,) * 4)
    maps = features.new_zeros(len(features), len(weight), *features.shape[2:])
    for b, y, x in itertools.product(*map(range, (len(features), *features.shape[2:]))):
        window = padded[b, :, y : y + size, x : x + size] * keep[b, y, x] / (1 - drop)
        maps[b, :, y, x] = (weight * window).sum((1, 2, 3))
    return maps


def by_expansion(features: Tensor, weight: Tensor, keep: Tensor, drop: float) -> Tensor:
    """Windows side by side, dropout of locations, and a convolution with a stride of the kernel size."""
    images, channels, height, width = features.shape
    size = weight.shape[-1]
    columns = F.unfold(features, size, padding=size // 2).view(images, channels, size, size, height, width)
    expanded = columns.permute(0, 1, 4, 2, 5, 3).reshape(images, channels, height * size, width * size)
    mask = keep.transpose(2, 3).reshape(images, 1, height * size, width * size)
    return F.conv2d(expanded * mask / (1 - drop), weight, stride=size)


def test_golden_scores(case: Case) -> None:
    scores = stochastic_conv2d(case["x"], case["weight"], case["keep"], drop=0.6)
    torch.testing.assert_close(scores, case["scores"], rtol=0, atol=1e-9)


def test_golden_expansion(case: Case) -> None:
    """The stored expanded map and mask are those that the reference here is made of."""
    expanded = F.conv2d(case["expanded_map"] * case["expanded_keep"] / 0.4, case["weight"], stride=3)
    torch.testing.assert_close(expanded, case["scores"], rtol=0, atol=1e-9)
    reference = by_expansion(case["x"], case["weight"], case["keep"], 0.6)
    torch.testing.assert_close(reference, expanded, rtol=0, atol=1e-9)


def test_golden_grad_cam(case: Case) -> None:
    maps = stochastic_grad_cam(case["x"], case["weight"], case["keep"], drop=0.6)
    torch.testing.assert_close(maps, case["gradcam"], rtol=0, atol=1e-9)


def test_golden_aggregate(case: Case) -> None:
    maps = stochastic_grad_cam(case["x"], case["weight"], case["keep"], drop=0.6)
    assert torch.equal(aggregate((one[None] for one in maps), case["theta"].item())[0], case["aggregate"])


@pytest.mark.parametrize("reference", [by_windows, by_expansion])
@given(problem=problems())
def test_maps_and_gradients_are_those_of_dropout_in_every_window(
    reference: Callable[..., Tensor], problem: dict[str, Any]
) -> None:
    features, weight = problem["features"].requires_grad_(), problem["weight"].requires_grad_()
    found = stochastic_conv2d(**problem)
    expected = reference(**problem)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (features, weight), upstream),
        torch.autograd.grad(expected, (features, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(problem=problems())
def test_grad_cam_is_features_times_the_gradient_of_the_logit(problem: dict[str, Any]) -> None:
    features = problem["features"].requires_grad_()
    logits = by_windows(**problem).mean((2, 3))
    expected = torch.stack(
        [
            (features * torch.autograd.grad(logits[:, c].sum(), features, retain_graph=True)[0]).sum(1).relu()
            for c in range(logits.shape[1])
        ],
        1,
    )
    torch.testing.assert_close(stochastic_grad_cam(**problem), expected, rtol=1e-12, atol=1e-12)


@given(problem=problems())
def test_all_images_at_once_equal_one_at_a_time(problem: dict[str, Any]) -> None:
    for function in (stochastic_conv2d, stochastic_grad_cam):
        together = function(**problem)
        for b in range(len(together)):
            rows = {name: problem[name][b : b + 1] for name in ("features", "keep")}
            torch.testing.assert_close(function(**problem | rows), together[b : b + 1], rtol=1e-13, atol=1e-13)


def test_gradcheck() -> None:
    layer = StochasticConv2d(2, 2, 3, 0.5).double()
    features = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    keep = layer.draw(features)

    def function(f: Tensor, w: Tensor) -> Tensor:
        return stochastic_conv2d(f, w, keep, drop=0.5)

    assert torch.autograd.gradcheck(function, (features, layer.weight))
    assert torch.autograd.gradgradcheck(function, (features, layer.weight))


def test_nothing_dropped_is_a_plain_convolution() -> None:
    layer, features = StochasticConv2d(4, 3, 5, 0), torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(layer(features), F.conv2d(features, layer.weight, padding=2))


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_random_in_both_modes_and_repeats_with_the_generator(training: bool) -> None:
    layer, features = StochasticConv2d(4, 3, 3, 0.5).train(training), torch.randn(1, 4, 7, 6)
    assert not torch.equal(layer(features), layer(features))
    first, second = (layer(features, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_hidden_units_are_dropped_at_the_rate_and_the_centre_is_kept() -> None:
    layer = StochasticConv2d(1, 1, 3, 0.7)
    keep = layer.draw(torch.zeros(4, 1, 60, 50))
    assert keep[..., 1, 1].all()
    rates = keep.flatten(-2).float().mean((0, 1, 2))
    rates = rates[[0, 1, 2, 3, 5, 6, 7, 8]]
    # 12000 windows: a standard deviation of .0042, for each tap
    torch.testing.assert_close(rates, torch.full((8,), 0.3), rtol=0, atol=0.02)
    assert not torch.equal(keep[0], keep[1])
    assert not torch.equal(keep[0, 0, 0], keep[0, 0, 1])


def test_the_layer_learns_a_class_from_tags() -> None:
    """Trained with the mean of its maps as logits, it finds the channel that tells the classes apart."""
    torch.manual_seed(1)
    layer = StochasticConv2d(3, 2, 3, 0.5)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(60):
        tags = torch.randint(2, (16, 2)).float()
        features = torch.rand(16, 3, 5, 5)
        features[:, :2] *= tags[:, :, None, None]
        loss = F.binary_cross_entropy_with_logits(layer(features).mean((2, 3)), tags)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        hits = (layer(features).mean((2, 3)) > 0) == tags.bool()
    assert hits.float().mean() > 0.9
    share = layer.weight.detach().sum((2, 3))
    assert share[0].argmax() == 0
    assert share[1].argmax() == 1


@pytest.mark.parametrize("norm", ["relu", "relu_max"])
@pytest.mark.parametrize("with_tags", [True, False])
def test_labels_are_those_of_the_passes_of_the_layer_itself(norm: str, with_tags: bool) -> None:
    """Grad-CAM of calls of the layer, by autograd, and the rule spelled out for each location."""
    head = StochasticConv2d(4, 3, 3, 0.6).double()
    features = torch.rand(2, 4, 5, 6, dtype=torch.float64)
    tags = torch.tensor([[1, 0, 1], [0, 1, 1]]) if with_tags else torch.ones(2, 3)
    generator, passes, maps = torch.Generator().manual_seed(5), 7, []
    for _ in range(passes):
        leaf = features.clone().requires_grad_()
        logits = head(leaf, generator).mean((2, 3))
        grads = [torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)[0] for c in range(3)]
        one = torch.stack([(leaf.detach() * g).sum(1).relu() for g in grads], 1)
        maps.append(one / one.amax((2, 3), keepdim=True) if norm == "relu_max" else one)
    every = torch.stack(maps)
    threshold = 0.7 if norm == "relu_max" else every.quantile(0.95).item()
    found = ficklenet(
        features,
        head,
        passes=passes,
        threshold=threshold,
        tags=tags if with_tags else None,
        norm=norm,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(5),
    )
    seen = set()
    for b, y, x in itertools.product(range(2), range(5), range(6)):
        candidates = [c for c in range(3) if tags[b, c] and (every[:, b, c, y, x] > threshold).any()]
        expected = max(candidates, key=lambda c: every[:, b, c, y, x].mean().item(), default=-1)
        assert found[b, y, x] == expected
        seen.add(min(len(candidates), 2))
    assert seen == {0, 1, 2}  # locations without a class, with one and with several


def test_more_passes_find_more() -> None:
    head, features = StochasticConv2d(8, 2, 5, 0.9), torch.rand(1, 8, 9, 9)
    torch.manual_seed(2)
    few, many = (
        ficklenet(features, head, passes=n, threshold=0.6, generator=torch.Generator().manual_seed(0)) >= 0
        for n in (2, 40)
    )
    assert (many | ~few).all()
    assert many.sum() > few.sum()


def test_zero_and_negative_maps_give_no_class() -> None:
    head = StochasticConv2d(3, 2, 3, 0.5)
    with torch.no_grad():
        head.weight.abs_()
    for features in (torch.zeros(1, 3, 4, 4), -torch.rand(1, 3, 4, 4)):
        for norm in ("relu", "relu_max"):
            labels = ficklenet(features, head, passes=3, threshold=0, norm=norm)
            assert (labels == -1).all()


def test_the_mean_of_many_half_precision_maps_counts_all_of_them() -> None:
    first, second = torch.tensor([[1, 0.5], [0, 0.4]]).view(2, 1, 2, 1, 1).bfloat16()
    # 256 + 0 against 128 + 160, of which a sum in bfloat16 takes no more than the 128.
    assert aggregate([first] * 256 + [second] * 400, 0.1).item() == 1


@pytest.mark.parametrize(("images", "classes", "kernel"), [(0, 3, 3), (2, 1, 3), (1, 2, 1), (1, 2, 9)])
def test_no_images_one_class_and_kernels_larger_than_the_map(images: int, classes: int, kernel: int) -> None:
    head = StochasticConv2d(3, classes, kernel, 0.5)
    features = torch.rand(images, 3, 2, 3)
    assert head(features).shape == (images, classes, 2, 3)
    labels = ficklenet(features, head, passes=2)
    assert labels.shape == (images, 2, 3)
    assert labels.dtype == torch.int64


def test_images_without_tags_get_no_class() -> None:
    labels = ficklenet(torch.rand(2, 3, 4, 4), StochasticConv2d(3, 2, 3, 0.5), tags=torch.zeros(2, 2), passes=3)
    assert (labels == -1).all()


def test_equal_classes_give_the_first() -> None:
    head = StochasticConv2d(2, 2, 3, 0.5)
    with torch.no_grad():
        head.weight.abs_()[1] = head.weight[0]
    labels = ficklenet(torch.rand(1, 2, 4, 4) + 0.1, head, passes=5, threshold=0)
    assert (labels == 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training: bool) -> None:
    head = StochasticConv2d(3, 2, 3, 0.5).train(training)
    features = torch.rand(1, 3, 4, 4, requires_grad=True)
    weight, state = head.weight.clone(), torch.get_rng_state()
    ficklenet(features, head, passes=3, generator=torch.Generator().manual_seed(0))
    head(features, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(head.weight, weight)
    assert head.training is training
    assert head.weight.grad is None
    assert features.grad is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("features", "weights", "expected"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_wider_dtype_counts_and_autocast_does_not(
    features: torch.dtype, weights: torch.dtype, expected: torch.dtype
) -> None:
    head, x = StochasticConv2d(3, 2, 3, 0.5).to(weights), torch.rand(1, 3, 4, 4).to(features)
    keep = head.draw(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = stochastic_conv2d(x, head.weight, keep, drop=0.5)
        maps = stochastic_grad_cam(x, head.weight, keep, drop=0.5)
    assert inside.dtype == maps.dtype == expected
    assert torch.equal(inside, stochastic_conv2d(x, head.weight, keep, drop=0.5))
    assert torch.equal(maps, stochastic_grad_cam(x, head.weight, keep, drop=0.5))


def test_the_layer_is_saved_copied_and_shown() -> None:
    layer = StochasticConv2d(3, 2, 5, 0.5)
    assert set(layer.state_dict()) == {"weight"}
    assert repr(layer) == "StochasticConv2d(3, 2, kernel=5, drop=0.5)"


FEATURES, KEEP = torch.rand(2, 3, 4, 5), torch.ones(2, 4, 5, 3, 3, dtype=torch.bool)
WEIGHT, HEAD = torch.rand(2, 3, 3, 3), StochasticConv2d(3, 2, 3, 0.5)


@pytest.mark.parametrize("function", [stochastic_conv2d, stochastic_grad_cam])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": FEATURES.long()}, TypeError, "features: expected a floating-point tensor"),
        ({"features": FEATURES[0]}, ValueError, r"features: expected \[B, D, h, w\] with at least one pixel"),
        ({"features": FEATURES[..., :0]}, ValueError, r"features: expected \[B, D, h, w\] with at least one pixel"),
        ({"features": FEATURES[:, :2]}, ValueError, r"features: expected \[2, 3, 4, 5\] to go with weight"),
        ({"features": FEATURES * torch.nan}, ValueError, "features: expected finite values"),
        ({"weight": "w"}, TypeError, "weight: expected a tensor"),
        ({"weight": WEIGHT[0]}, ValueError, "weight: expected .* with an odd s"),
        ({"weight": WEIGHT[..., :2]}, ValueError, "weight: expected .* with an odd s"),
        ({"weight": WEIGHT[..., :2, :2]}, ValueError, "weight: expected .* with an odd s"),
        ({"keep": KEEP.float()}, TypeError, "keep: expected a bool tensor, got torch.float32"),
        ({"keep": KEEP[:1]}, ValueError, r"keep: expected \[2, 4, 5, 3, 3\] to go with features"),
        ({"drop": 1}, ValueError, "drop: expected a finite number of at least 0 and below 1, got 1"),
        ({"drop": "half"}, TypeError, "drop: expected a number"),
    ],
)
def test_errors_of_the_functions(
    function: Callable[..., Tensor], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"features": FEATURES, "weight": WEIGHT, "keep": KEEP, "drop": 0.5}
    with pytest.raises(error, match=message):
        function(**arguments | change)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3.0, 2, 3, 0.5), TypeError, "in_channels: expected an int"),
        ((0, 2, 3, 0.5), ValueError, "in_channels: expected a finite number of at least 1"),
        ((3, 0, 3, 0.5), ValueError, "classes: expected"),
        ((3, 2, -1, 0.5), ValueError, "kernel: expected a finite number of at least 1"),
        ((3, 2, 4, 0.5), ValueError, "kernel: expected an odd size"),
        ((3, 2, (3, 3), 0.5), TypeError, "kernel: expected an int, got tuple"),
        ((3, 2, 3, 1.0), ValueError, "drop: expected"),
    ],
)
def test_errors_of_the_layer(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StochasticConv2d(*arguments)


DIVERGED = StochasticConv2d(3, 2, 3, 0.5)
torch.nn.init.constant_(DIVERGED.weight, torch.nan)


def test_errors_of_a_call() -> None:
    with pytest.raises(ValueError, match=r"features: expected \[2, 3, 4, 5\] to go with weight"):
        HEAD(FEATURES[:, :1])
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator, got int"):
        HEAD(FEATURES, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head": torch.nn.Conv2d(3, 2, 3)}, TypeError, "head: expected a StochasticConv2d, got Conv2d"),
        ({"features": FEATURES[:, :2]}, ValueError, "features: expected"),
        ({"passes": 0}, ValueError, "passes: expected a finite number of at least 1, got 0"),
        ({"passes": 2.0}, TypeError, "passes: expected an int"),
        ({"threshold": -0.1}, ValueError, "threshold: expected"),
        ({"threshold": None}, TypeError, "threshold: expected a number"),
        ({"tags": torch.ones(2, 3)}, ValueError, r"tags: expected \[2, 2\] to go with features"),
        ({"tags": torch.full((2, 2), 2)}, ValueError, "tags: expected 0 or 1, got 2"),
        ({"head": DIVERGED}, ValueError, "head: expected finite values"),
        ({"norm": "minmax"}, ValueError, "norm: expected one of 'relu_max', 'relu'"),
        ({"generator": 1}, TypeError, "generator: expected a torch.Generator"),
    ],
)
def test_errors_of_ficklenet(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"features": FEATURES, "head": HEAD}
    with pytest.raises(error, match=message):
        ficklenet(**arguments | change)
