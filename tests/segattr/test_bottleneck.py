"""RIB against golden values and against a training of a real copy, and pooling against counts location by location."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from segattr.bottleneck import gndrp, rib
from segattr.networks.classifier import Classifier, split

Case = dict[str, Tensor]
Golden = Callable[[str], Case]
Batch = tuple[Tensor, Tensor]

VARIANTS: dict[str, dict[str, Any]] = {
    "gap_paper": {"lr": 0.02, "pool": "gap"},
    "gap_margin": {"lr": 0.02, "pool": "gap", "margin": 0.3},
    "gndrp_paper": {"lr": 0.02, "pool": "gndrp"},
    "gndrp_code": {"lr": 0.002, "reference": True},
}


@pytest.fixture
def case(golden: Golden) -> Case:
    return golden("attr/rib")


def golden_net(case: Case) -> nn.Sequential:
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, padding=1), nn.ReLU()]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False)).double()
    names = {"0": "conv1", "2": "conv2", "6": "fc"}
    net.load_state_dict({key: case["in/net/" + names[key[0]] + key[1:]] for key in net.state_dict()})
    return net


def golden_arguments(case: Case) -> dict[str, Any]:
    """Image 1 with its companions of each step."""
    images, tags = case["in/x"], case["in/labels"]
    return {
        "images": images[1:2],
        "tags": tags[1:2],
        "companions": [(images[order], tags[order]) for order in case["in/rib/order"]],
        "steps": 2,
    }


class Residual(nn.Module):
    """Normalisation, dropout, a block with a shortcut, a bias in the last layer, and a count of the calls."""

    calls: Tensor
    stem: nn.Sequential
    block: nn.Sequential

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, classes)
        self.register_buffer("calls", torch.zeros(()))

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(self.pool(self.body(x)).flatten(1))


def residual(classes: int = 4) -> Residual:
    torch.manual_seed(0)
    net = Residual(classes).double()
    with torch.no_grad():
        net.train()
        for _ in range(3):  # statistics that are not those of new layers
            net(torch.rand(8, 3, 9, 9).double())
    net.calls.zero_()
    return net


def data(images: int = 3, companions: int = 4, steps: int = 3, classes: int = 4) -> dict[str, Any]:
    def batch(count: int, size: int = 9) -> Batch:
        return torch.rand(count, 3, size, size).double(), (torch.rand(count, classes) < 0.4).double()

    x, tags = batch(images)
    # companions of another size than the images
    batches = [batch(companions, 7) for _ in range(steps)]
    return {"images": x, "tags": tags, "companions": batches, "steps": steps}


def by_locations(values: Tensor, maps: Tensor, threshold: float, divide_by: str) -> Tensor:
    pooled = values.new_zeros(maps.shape[:2])
    height, width = maps.shape[2:]
    for b, c in itertools.product(*map(range, maps.shape[:2])):
        peak = max(maps[b, c].flatten().tolist())
        places = [
            (y, x)
            for y, x in itertools.product(range(height), range(width))
            if peak <= 0 or maps[b, c, y, x] / peak <= threshold
        ]
        if places:
            count = len(places) if divide_by == "region" else height * width
            pooled[b, c] = torch.stack([values[b, c, y, x] for y, x in places]).sum() / count
    return pooled


def by_copies(
    net: Residual,
    images: Tensor,
    tags: Tensor,
    companions: list[Batch],
    steps: int,
    *,
    lr: float,
    margin: float = 600.0,
    pool: str = "gndrp",
    threshold: float = 0.4,
    reference: bool = False,
    stop: bool = False,
    counts: list[int] | None = None,
) -> Tensor:
    """The process with a deep copy of the network for each image, trained in place; counts how often they train."""
    every = []
    for image, tag in zip(images, tags, strict=True):
        clone = copy.deepcopy(net).eval()
        body = [p for name, p in clone.named_parameters() if not name.startswith("fc")]
        groups: list[dict[str, Any]] = [
            {"params": body},
            {"params": list(clone.fc.parameters()), "lr": lr * (10 if reference else 1)},
        ]
        optimizer = torch.optim.SGD(groups, lr, momentum=1e-4 * reference, weight_decay=1e-4 * reference)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: (1 - k / steps) ** 0.9 if reference and k < steps else 1.0
        )

        def outputs(x: Tensor, clone: Residual = clone) -> tuple[Tensor, Tensor]:
            maps = torch.einsum("kd,bdhw->bkhw", clone.fc.weight, clone.body(x))
            if pool == "gap":
                return maps, maps.mean((2, 3)) + clone.fc.bias
            pooled = by_locations(maps, maps.detach(), threshold, "all" if reference else "region")
            return maps, pooled + clone.fc.bias

        total, trained = outputs(image[None])[0].detach().relu(), 0
        for others, their_tags in companions[:steps]:
            maps, logits = outputs(image[None])
            covered = torch.zeros(maps.shape[2:], dtype=torch.bool)
            for c in tag.nonzero().flatten():
                if maps[0, c].max() > 0:
                    covered |= maps[0, c] / maps[0, c].max() > 0.3
            if stop and ((logits[0] * tag).sum() > margin or (trained and covered.double().mean() > 0.7)):
                break
            loss = torch.zeros((), dtype=torch.float64)
            for y, t in ((logits, tag[None]), (outputs(others)[1], their_tags)):
                loss = loss - (t * (y if reference else y.clamp(max=margin))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            trained += 1
            total = total + outputs(image[None])[0].detach().relu()
        every.append(total)
        if counts is not None:
            counts.append(trained)
    return torch.cat(every)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_maps(case: Case, variant: str) -> None:
    net = golden_net(case)
    settings = VARIANTS[variant] | ({"frozen": [net[0]]} if variant == "gndrp_code" else {})
    maps = rib(net, **golden_arguments(case), **settings)
    torch.testing.assert_close(maps[0], case[f"out/rib/{variant}/M"], rtol=0, atol=1e-9)
    maps = rib(net, **golden_arguments(case), **settings, norm="max")
    torch.testing.assert_close(maps[0], case[f"out/rib/{variant}/M_normalised_terms"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", ["gap_paper", "gap_margin", "gndrp_paper"])
def test_golden_maps_of_each_step(case: Case, variant: str) -> None:
    arguments = golden_arguments(case) | VARIANTS[variant]
    sums = torch.cat([rib(golden_net(case), **arguments | {"steps": steps}, norm="raw") for steps in range(3)])
    maps = torch.cat([sums[:1], sums.diff(dim=0)])
    torch.testing.assert_close(maps, case[f"out/rib/{variant}/cams"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("variant", "divide_by"), [("gndrp_paper", "region"), ("gndrp_code", "all")])
def test_golden_pooling(case: Case, variant: str, divide_by: Any) -> None:
    """Logits of the first step: those of the tagged classes; the stored ones of the others are plain means."""
    batch = [1, *case["in/rib/order"][0].tolist()]
    features = golden_net(case)[:4](case["in/x"][batch])
    maps = torch.einsum("kd,bdhw->bkhw", case["in/net/fc.weight"], features)
    expected, tagged = case[f"out/rib/{variant}/logits"][0], case["in/labels"][batch] == 1
    pooled = gndrp(maps, maps, divide_by=divide_by)
    torch.testing.assert_close(pooled[tagged], expected[tagged], rtol=0, atol=1e-9)
    torch.testing.assert_close(maps.mean((2, 3))[~tagged], expected[~tagged], rtol=0, atol=1e-9)


@given(st.integers(0, 2**16), st.sampled_from([-0.5, 0.0, 0.4, 0.9, 1.0, 2.0]), st.sampled_from(["region", "all"]))
def test_pooling_is_the_mean_over_the_region(seed: int, threshold: float, divide_by: Any) -> None:
    torch.manual_seed(seed)
    shape = [int(n) for n in torch.randint(1, 5, (4,))]
    # whole numbers: some maps are flat, zero or negative everywhere
    maps = torch.randint(-2, 3, shape).double()
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = gndrp(values, maps, threshold=threshold, divide_by=divide_by)
    expected = by_locations(values, maps, threshold, divide_by)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        upstream = torch.randn_like(found)
        torch.testing.assert_close(*(torch.autograd.grad(pooled, values, upstream)[0] for pooled in (found, expected)))


@given(st.integers(0, 2**16), st.floats(0.01, 100))
def test_pooling_needs_no_normalised_maps_and_is_linear_in_the_features(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    features = torch.rand(2, 5, 4, 3, dtype=torch.float64)
    weight = torch.randn(3, 5, dtype=torch.float64)
    maps = torch.einsum("kd,bdhw->bkhw", weight, features)
    pooled = gndrp(maps, maps)
    torch.testing.assert_close(gndrp(maps, maps * scale), pooled)
    torch.testing.assert_close(gndrp(maps, maps / maps.amax((2, 3), keepdim=True).abs()), pooled)
    by_features = gndrp(features, maps)
    assert by_features.shape == (2, 3, 5)
    torch.testing.assert_close((by_features * weight).sum(2), pooled)


def test_the_choice_of_locations_is_a_constant() -> None:
    maps = torch.tensor([[[[1.0, 4.0, 10.0]]]], requires_grad=True)
    (grad,) = torch.autograd.grad(gndrp(maps, maps).sum(), maps)
    assert torch.equal(grad, torch.tensor([[[[0.5, 0.5, 0.0]]]]))


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-45, 1e38, -1e38])
def test_flat_maps_have_a_finite_mean_and_gradient(value: float) -> None:
    maps = torch.full((1, 2, 3, 3), value, requires_grad=True)
    for divide_by in ("region", "all"):
        pooled = gndrp(maps, maps, divide_by=divide_by)
        # no location of a positive constant map is up to .4 of its maximum, all locations of another one count
        torch.testing.assert_close(pooled, torch.full((1, 2), 0.0 if value > 0 else max(value, -1e30)))
        assert torch.autograd.grad(pooled.sum(), maps)[0].isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.01},
        {"lr": 0.01, "pool": "gap"},
        {"lr": 0.01, "margin": 0.2, "threshold": 0.6},
        {"lr": 0.001, "reference": True},
        {"lr": 0.001, "reference": True, "margin": 0.0, "pool": "gap"},
    ],
    ids=str,
)
def test_each_image_trains_a_copy_of_its_own(settings: dict[str, Any]) -> None:
    """Three images at once, by functional weights, against one deep copy after the other."""
    net, arguments = residual(), data()
    found = rib(net, **arguments, **settings)
    torch.testing.assert_close(found, by_copies(net, **arguments, **settings), rtol=1e-9, atol=1e-9)
    assert (found - 4 * rib(net, **arguments | {"steps": 0})).abs().max() > 1e-3  # the training does something


def test_a_batch_equals_one_image_at_a_time() -> None:
    net, arguments = residual(), data(images=3)
    together = rib(net, **arguments, lr=0.01)
    for i in range(3):
        alone = {"images": arguments["images"][i : i + 1], "tags": arguments["tags"][i : i + 1]}
        torch.testing.assert_close(rib(net, **arguments | alone, lr=0.01), together[i : i + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reference", [False, True])
def test_frozen_layers_can_be_left_out_and_computed_once(reference: bool) -> None:
    net, arguments = residual(), data()
    frozen = rib(net, **arguments, frozen=[net.stem], lr=0.01, reference=reference)

    class Rest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = net.block

        def forward(self, x: Tensor) -> Tensor:
            return x + self.block(x)

    rest = Classifier(Rest(), nn.Sequential(net.pool, nn.Flatten(), net.fc))
    stem = copy.deepcopy(net.stem).eval()
    shared = arguments | {
        "images": stem(arguments["images"]),
        "companions": ((stem(x), t) for x, t in arguments["companions"]),
    }
    torch.testing.assert_close(rib(rest, **shared, lr=0.01, reference=reference), frozen, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(frozen, rib(net, **arguments, lr=0.01, reference=reference), rtol=1e-6)


def test_a_model_and_its_classifier_give_the_same_also_where_gradients_are_off() -> None:
    net, arguments = residual(), data(images=1)
    expected = rib(net, **arguments, lr=0.01)
    clf = split(net)
    assert torch.equal(rib(clf, **arguments, lr=0.01), expected)
    net.requires_grad_(False).eval()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert torch.equal(rib(clf, **arguments, lr=0.01), expected)


@pytest.mark.parametrize("inside", [True, False])
def test_images_made_in_inference_mode_are_like_others(inside: bool) -> None:
    net, arguments = residual(), data(images=1)
    expected = rib(net, **arguments, lr=0.01)
    with torch.inference_mode():
        made = arguments | {
            "images": arguments["images"].clone(),
            "companions": [(images.clone(), tags.clone()) for images, tags in arguments["companions"]],
        }
    with torch.inference_mode(inside):
        assert torch.equal(rib(net, **made, lr=0.01), expected)


def test_computes_in_full_precision_under_autocast() -> None:
    net, arguments = residual().float(), data(images=1)
    arguments["companions"] = [(x.float(), t) for x, t in arguments["companions"]]
    arguments["images"] = arguments["images"].float()
    expected = rib(net, **arguments, lr=0.01)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rib(net, **arguments, lr=0.01), expected)


def test_a_pointwise_convolution_before_pooling_is_a_last_layer_too() -> None:
    net, arguments = residual(), data(images=2)
    conv = nn.Conv2d(6, 4, 1).double()
    conv.load_state_dict({"weight": net.fc.weight[:, :, None, None], "bias": net.fc.bias})

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = net.stem, net.block

        def forward(self, x: Tensor) -> Tensor:
            return net.body(x)

    other = Classifier(Body(), nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    settings: dict[str, Any] = {"lr": 0.01, "reference": True}
    torch.testing.assert_close(rib(other, **arguments, **settings), rib(net, **arguments, **settings))


def test_classes_select_maps() -> None:
    net, arguments = residual(), data(images=3)
    every = rib(net, **arguments)
    assert every.shape == (3, 4, 9, 9)
    assert torch.equal(rib(net, **arguments, classes=[2, 0]), every[:, [2, 0]])
    assert rib(net, **arguments, classes=[]).shape == (3, 0, 9, 9)
    ragged = rib(net, **arguments, classes=[[1], [], [3, 0]])
    for found, expected in zip(ragged, (every[0, [1]], every[1, []], every[2, [3, 0]]), strict=True):
        assert torch.equal(found, expected)


def test_companions_from_a_function_depend_on_the_image() -> None:
    net, arguments = residual(), data(images=2)
    tags = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]])
    pool_images, pool_tags = torch.rand(12, 3, 8, 8).double(), torch.eye(4).repeat(3, 1)
    asked: list[list[float]] = []

    def disjoint(tag: Tensor) -> Iterator[Batch]:
        asked.append(tag.tolist())
        rows = (pool_tags @ tag.float() == 0).nonzero().flatten()
        for step in itertools.count():
            batch = rows.roll(step)[:3]
            yield pool_images[batch], pool_tags[batch]

    arguments |= {"tags": tags}
    found = rib(net, **arguments | {"companions": disjoint}, lr=0.01)
    assert asked == tags.tolist()
    for i in range(2):
        batches = list(itertools.islice(disjoint(tags[i]), 3))
        alone = {"images": arguments["images"][i : i + 1], "tags": tags[i : i + 1], "companions": batches}
        torch.testing.assert_close(found[i : i + 1], by_copies(net, steps=3, lr=0.01, **alone), rtol=1e-9, atol=1e-9)


def test_an_endless_iterator_is_asked_for_the_steps_only() -> None:
    net, arguments = residual(), data(images=2)
    batches = arguments["companions"]
    endless = itertools.cycle(batches)
    assert torch.equal(rib(net, **arguments | {"companions": endless}), rib(net, **arguments))
    assert next(endless)[0] is batches[0][0]


def test_companions_without_images_leave_the_image_alone() -> None:
    net, arguments = residual(), data(images=2)
    empty = [(x[:0], t[:0]) for x, t in arguments["companions"]]
    found = rib(net, **arguments | {"companions": empty}, lr=0.01)
    torch.testing.assert_close(found, by_copies(net, **arguments | {"companions": empty}, lr=0.01))
    assert not torch.allclose(found, rib(net, **arguments, lr=0.01))


def test_tagged_logits_rise_until_the_margin() -> None:
    """Of logits at the margin or above nothing is left to train, and the maps stay."""
    net, arguments = residual(), data(images=2, steps=3)
    arguments["tags"] = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1]])
    start = rib(net, **arguments | {"steps": 0})
    assert torch.equal(rib(net, **arguments, margin=-1e30, lr=1.0), start + start + start + start)
    tagged = arguments["tags"] == 1
    rise = [
        (rib(net, **arguments, margin=margin, lr=0.01, pool="gap") - 4 * start).mean((2, 3))[tagged]
        for margin in (0.1, 1.0, 600.0)
    ]
    assert 0 < rise[0].sum() < rise[1].sum() <= rise[2].sum()


def test_images_and_companions_without_tags_do_not_train() -> None:
    net, arguments = residual(), data(images=2)
    arguments["tags"] = torch.zeros(2, 4)
    arguments["companions"] = [(x, torch.zeros_like(t)) for x, t in arguments["companions"]]
    torch.testing.assert_close(rib(net, **arguments, lr=1.0), 4 * rib(net, **arguments | {"steps": 0}))


def test_the_process_stops_before_a_step_once_the_tagged_logits_exceed_the_margin() -> None:
    net, arguments = residual(), data(images=1, steps=4)
    arguments["tags"] = torch.tensor([[1, 0, 1, 0]])
    reached = set()
    for reference, margin in itertools.product((False, True), (-1.0, 0.1, 0.3, 0.6, 1.0, 1.5, 600.0)):
        settings: dict[str, Any] = {"lr": 0.02, "pool": "gap", "margin": margin, "reference": reference, "stop": True}
        counts: list[int] = []
        expected = by_copies(net, **arguments, **settings, counts=counts)
        torch.testing.assert_close(rib(net, **arguments, **settings), expected, rtol=1e-9, atol=1e-9)
        reached.update(counts)
    assert len(reached) >= 3


def test_the_process_stops_once_the_maps_cover_the_image() -> None:
    """Whether it does depends on the image; the maps of the classifier itself do not stop it."""
    net, arguments = residual(), data(images=8, steps=4)
    for size, image in enumerate(arguments["images"]):
        image[:, : 2 + size // 2] = 0
    counts: list[int] = []
    expected = by_copies(net, **arguments, lr=0.02, stop=True, counts=counts)
    torch.testing.assert_close(rib(net, **arguments, lr=0.02, stop=True), expected, rtol=1e-9, atol=1e-9)
    assert 0 not in counts
    assert len(set(counts)) >= 2


def test_the_images_may_be_zero_and_the_maps_negative_everywhere() -> None:
    net, arguments = residual(), data(images=2, steps=2)
    arguments["images"] = torch.zeros_like(arguments["images"])
    assert rib(net, **arguments).isfinite().all()
    with torch.no_grad():
        net.fc.weight.abs_().neg_()
        net.stem[0].get_parameter("weight").abs_()
        net.block[1].get_parameter("bias").fill_(2)
    arguments["images"] = torch.rand_like(arguments["images"])
    for stop in (False, True):
        assert (rib(net, **arguments, stop=stop) == 0).all()


@pytest.mark.parametrize("reference", [False, True])
def test_a_network_of_zeros_gives_zeros(reference: bool) -> None:
    net = residual()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    maps = rib(net, **data(images=1), reference=reference, lr=0.1, stop=True)
    assert (maps == 0).all()


@pytest.mark.parametrize(("images", "classes", "steps"), [(0, 4, 2), (2, 1, 2), (2, 4, 0), (1, 4, 1)])
def test_no_images_one_class_no_steps(images: int, classes: int, steps: int) -> None:
    net, arguments = residual(classes), data(images=images, classes=classes, steps=steps)
    maps = rib(net, **arguments)
    assert maps.shape == (images, classes, 9, 9)
    assert not maps.requires_grad


class Fault(Exception):
    pass


def state_of(net: Residual) -> dict[str, Any]:
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return {
        "modes": [module.training for module in net.modules()],
        "flags": [p.requires_grad for p in net.parameters()],
        "grads": [None if p.grad is None else id(p.grad) for p in net.parameters()],
        "identities": [id(t) for t in (*net.parameters(), *net.buffers())],
        "values": [t.detach().clone() for t in (*net.parameters(), *net.buffers(), *grads)],
        "hooks": [dict(module._forward_hooks) for module in net.modules()],
        "random": torch.get_rng_state(),
        "attributes": [sorted(module.__dict__) for module in net.modules()],
        "grad_mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails_at", [None, 1, 2, 5])
def test_the_model_is_left_as_it_was_after_success_and_after_an_error_within(fails_at: int | None) -> None:
    net, arguments = residual(), data(images=2)
    net.train()
    net.block.eval()
    net.stem[0].weight.requires_grad_(False)
    net.fc.bias.grad = torch.ones(4).double()
    arguments["images"].requires_grad_()
    calls = itertools.count(1)

    def hook(*_: Any) -> None:
        if next(calls) == fails_at:
            raise Fault

    clf = split(net)
    assert clf.linear is net.fc
    net.block.register_forward_hook(hook)
    before = state_of(net)
    try:
        rib(clf, **arguments, lr=0.01, reference=True)
    except Fault:
        assert fails_at is not None
    else:
        assert fails_at is None
    after = state_of(net)
    for name in ("values", "random"):
        torch.testing.assert_close(after.pop(name), before.pop(name), rtol=0, atol=0)
    assert after == before
    assert arguments["images"].grad is None


def test_an_exhausted_source_leaves_the_model_as_it_was() -> None:
    net, arguments = residual(), data(images=1)
    net.train()
    with pytest.raises(ValueError, match="companions: expected a batch for each of 3 steps, got 2"):
        rib(net, **arguments | {"companions": lambda tags: iter(arguments["companions"][:2])})
    assert net.training
    assert net.block.training


def test_the_mode_of_the_model_does_not_matter() -> None:
    net, arguments = residual(), data(images=2)
    first, second = (rib(net.train(mode), **arguments, lr=0.01) for mode in (True, False))
    assert torch.equal(first, second)


def test_weights_of_earlier_images_are_not_kept() -> None:
    net, arguments = residual(), data(images=3, steps=1)
    rib(net, **arguments)  # what torch imports at the first call
    alive: list[int] = []
    known: list[weakref.ref[Tensor]] = []

    def watch() -> None:
        alive.append(sum(ref() is not None for ref in known))
        weight = net.fc.weight
        if not any(ref() is weight for ref in known):
            known.append(weakref.ref(weight))

    clf = split(net.eval())
    assert clf.linear is net.fc
    net.stem.register_forward_pre_hook(lambda *_: watch())
    gc.collect()
    gc.disable()
    try:
        rib(clf, **arguments)
    finally:
        gc.enable()
    assert len(known) == 3
    assert max(alive) <= 2
    assert all(ref() is None for ref in known)


NET = residual()
DATA = data(images=2, steps=2)
ONE = DATA["companions"][0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clf": nn.Linear(3, 4)}, ValueError, "images: expected what the network can take"),
        ({"images": DATA["images"][0]}, ValueError, r"images: expected \[B, C, H, W\]"),
        ({"images": DATA["images"] * torch.inf}, ValueError, "images: expected finite values"),
        ({"tags": DATA["tags"][:1]}, ValueError, r"tags: expected \[2, 4\] to go with images"),
        ({"tags": DATA["tags"] + 1}, ValueError, "tags: expected 0 or 1, got"),
        ({"tags": None}, TypeError, "tags: expected a tensor"),
        ({"steps": -1}, ValueError, "steps: expected a finite number of at least 0, got -1"),
        ({"steps": 2.0}, TypeError, "steps: expected an int"),
        ({"lr": 0}, ValueError, "lr: expected a finite number above 0 and of at most"),
        ({"lr": 1e200}, ValueError, "clf: expected finite maps, got NaN or infinity"),
        ({"lr": 1e200, "pool": "gap", "reference": True}, ValueError, "clf: expected finite maps, got NaN or infinity"),
        ({"margin": torch.inf}, ValueError, "margin: expected"),
        ({"pool": "max"}, ValueError, "pool: expected one of 'gndrp', 'gap', got 'max'"),
        ({"threshold": torch.nan}, ValueError, "threshold: expected a finite number, got nan"),
        ({"classes": [4]}, ValueError, "classes: expected integers from 0 to 3, got 4"),
        ({"classes": [[1]]}, ValueError, "classes: expected a sequence for each of 2 images, got 1"),
        ({"norm": "sum"}, ValueError, "norm: expected one of 'raw', 'relu', 'relu_max', 'minmax', 'max', got 'sum'"),
        ({"stop": 1}, TypeError, "stop: expected a bool, got int"),
        ({"reference": None}, TypeError, "reference: expected a bool, got NoneType"),
        ({"frozen": NET.stem}, TypeError, "frozen: expected a sequence of modules"),
        ({"frozen": ["stem"]}, TypeError, "frozen: expected a sequence of modules"),
        ({"frozen": [nn.Conv2d(3, 6, 3)]}, ValueError, "frozen: expected modules of the classifier"),
        ({"frozen": [NET]}, ValueError, "frozen: expected to leave parameters to train, got all 10 of them"),
        (
            {"companions": None},
            TypeError,
            "companions: expected an iterable, or a function that gives one, got NoneType",
        ),
        ({"companions": lambda tags: 3}, TypeError, "companions: expected an iterable, .* got int"),
        ({"companions": [ONE]}, ValueError, "companions: expected a batch for each of 2 steps, got 1"),
        ({"companions": ONE}, TypeError, r"companions: expected batches \(images, tags\), got Tensor"),
        ({"companions": [ONE[0], ONE[0]]}, TypeError, r"companions: expected batches \(images, tags\), got Tensor"),
        ({"companions": [(ONE[0].float(), ONE[1])] * 2}, TypeError, "companions: expected torch.float64, as of images"),
        ({"companions": [(ONE[0][0], ONE[1])] * 2}, ValueError, r"companions: expected images \[N, C, H, W\], got"),
        ({"companions": [(ONE[0][:, :2], ONE[1])] * 2}, ValueError, r"companions: expected \[4, 3, 7, 7\]"),
        ({"companions": [(ONE[0] * torch.nan, ONE[1])] * 2}, ValueError, "companions: expected finite values"),
        ({"companions": [(ONE[0], ONE[1][:, :2])] * 2}, ValueError, r"tags: expected \[4, 4\] to go with companions"),
        ({"companions": [(ONE[0], ONE[1] * 3)] * 2}, ValueError, "tags: expected 0 or 1, got 3"),
    ],
)
def test_errors_of_rib(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rib(**{"clf": NET} | DATA | change)


MAPS = torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": MAPS.long()}, TypeError, "maps: expected a floating-point tensor"),
        ({"maps": MAPS[0]}, ValueError, r"maps: expected \[B, K, h, w\]"),
        ({"maps": MAPS[..., :0]}, ValueError, "maps: expected .* with at least one pixel"),
        ({"maps": MAPS * torch.nan}, ValueError, "maps: expected finite values"),
        ({"features_or_maps": MAPS[:1]}, ValueError, r"features_or_maps: expected \[2, 3, 4, 5\] to go with maps"),
        ({"features_or_maps": MAPS[..., :4]}, ValueError, "features_or_maps: expected"),
        ({"features_or_maps": None}, TypeError, "features_or_maps: expected a tensor"),
        ({"threshold": "low"}, TypeError, "threshold: expected a number"),
        ({"threshold": torch.inf}, ValueError, "threshold: expected a finite number"),
        ({"divide_by": "kept"}, ValueError, "divide_by: expected one of 'region', 'all', got 'kept'"),
    ],
)
def test_errors_of_pooling(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"features_or_maps": MAPS, "maps": MAPS}
    with pytest.raises(error, match=message):
        gndrp(**arguments | change)


def test_sizes_that_the_classifier_does_not_take() -> None:
    """Of images and of companions, each by its name."""
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    large, small, tags = torch.rand(1, 3, 9, 9), torch.rand(1, 3, 3, 3), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"companions: expected what the network can take, got \[1, 3, 3, 3\]"):
        rib(model, large, tags, companions=[(small, tags)], steps=1)
    with pytest.raises(ValueError, match=r"images: expected what the network can take, got \[1, 3, 3, 3\]"):
        rib(model, small, tags, companions=[(large, tags)], steps=1)
    with pytest.raises(ValueError, match=r"^companions: tags: expected 0 or 1, got 2"):
        rib(model, large, tags, companions=[(large, 2 * tags)], steps=1)
