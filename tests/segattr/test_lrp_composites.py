"""LRP rules against their textbook formulas, written with one contribution for each pair of an input and an output."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segattr.lrp import Linearised, composites, unroll
from segattr.lrp.adjoints import RULES as ADJOINTS
from segattr.lrp.composites import Place, anything, base, convolution, first, linear
from segattr.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, WSquare, ZBox, ZPlus
from tests.segattr.lrp_nets import classifiers, conservation_error, error, gradients

RULES: dict[str, Rule] = {
    "zero": Epsilon(0),
    "epsilon": Epsilon(0.1),
    "gamma": Gamma(0.3),
    "zplus": ZPlus(),
    "alpha_beta": AlphaBeta(2, 1),
    "alpha 1.5": AlphaBeta(1.5, 0.5),
    "flat": Flat(),
    "wsquare": WSquare(),
    "zbox": ZBox(-3.0, 3.0),
}


# --- plain definitions: x [I], w [O, I], b [O], relevance [O]; what is divided by is a constant


def _ratio(contributions: Tensor, denominator: Tensor, relevance: Tensor, stabilizer: float = 1e-6) -> Tensor:
    """Each contribution's share of the relevance of its output."""
    z = denominator.detach()
    sign = torch.where(z < 0, -1.0, 1.0).double()
    divisor = z + stabilizer * sign
    return (contributions * torch.where(divisor == 0, 0, relevance / divisor)[:, None]).sum(0)


def plain(rule: Rule, x: Tensor, w: Tensor, b: Tensor, connected: Tensor, relevance: Tensor) -> Tensor:
    x = x.detach()
    products = x * w
    up, down = products.clamp(min=0), products.clamp(max=0)
    match rule:
        case Epsilon(epsilon):
            return _ratio(products, products.sum(1) + b, relevance, epsilon)
        case ZPlus():
            return _ratio(up, up.sum(1) + b.clamp(min=0), relevance)
        case AlphaBeta(alpha, beta):
            raising = _ratio(up, up.sum(1) + b.clamp(min=0), relevance)
            return alpha * raising - beta * _ratio(down, down.sum(1) + b.clamp(max=0), relevance)
        case Gamma(gamma):
            z = products.sum(1) + b
            more, less = products + gamma * up, products + gamma * down
            raised = _ratio(more, more.sum(1) + b + gamma * b.clamp(min=0), relevance * (z > 0))
            return raised + _ratio(less, less.sum(1) + b + gamma * b.clamp(max=0), relevance * (z < 0))
        case Flat():
            return _ratio(connected, connected.sum(1), relevance)
        case WSquare():
            return _ratio(w.square(), w.square().sum(1) + b.square(), relevance)
        case ZBox(low, high):
            box = products - low * w.clamp(min=0) - high * w.clamp(max=0)
            return _ratio(box, box.sum(1), relevance)
    raise AssertionError(rule)


def heatmaps(rule_of: Callable[[int], Rule], layers: list[Any], x: Tensor) -> Tensor:
    """Relevance of each class at the input, ``[B, K, I]``; a layer is weight, bias and connections, or None, a ReLU."""
    images = []
    for image in x:
        values = [image.flatten()]
        for layer in layers:
            values.append(values[-1].relu() if layer is None else layer[0] @ values[-1] + layer[1])
        classes = []
        for k in range(len(values[-1])):
            relevance = torch.zeros_like(values[-1])
            relevance[k] = values[-1][k].detach()
            for i in reversed(range(len(layers))):
                if layers[i] is not None:
                    relevance = plain(rule_of(i), values[i], *layers[i], relevance)
            classes.append(relevance)
        images.append(torch.stack(classes))
    return torch.stack(images)


def dense(conv: nn.Conv2d, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution as a matrix, its bias per output, and 1 where an output has an input."""
    count = torch.Size(shape).numel()
    units = torch.eye(count, dtype=torch.float64).view(count, *shape)
    settings = conv.stride, conv.padding, conv.dilation, conv.groups
    matrix, connected = (F.conv2d(units, w, None, *settings) for w in (conv.weight, torch.ones_like(conv.weight)))
    assert conv.bias is not None
    return matrix.flatten(1).T, conv.bias.repeat_interleave(matrix[0, 0].numel()), connected.flatten(1).T


def network(seed: int, stride: int, groups: int, side: int) -> tuple[nn.Sequential, Tensor, list[Any]]:
    torch.manual_seed(seed)
    convs = [nn.Conv2d(2, 4, 3, stride, 1, groups=groups), nn.Conv2d(4, 3, 2, padding=1)]
    x = torch.randn(2, 2, side, side + 1, dtype=torch.float64)
    body = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Flatten()).double()
    model = nn.Sequential(*body, nn.Linear(body(x).shape[1], 3).double())
    middle = tuple(body[:2](x)[0].shape)
    head = model[-1]
    last = head.weight, head.bias, torch.ones_like(head.weight)
    return model, x, [dense(convs[0], (2, side, side + 1)), None, dense(convs[1], middle), None, last]


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 100), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.integers(2, 4))
def test_a_rule_is_its_formula_and_so_are_its_gradients(
    name: str, seed: int, stride: int, groups: int, side: int
) -> None:
    """The rule in the first layer, with signed inputs, and in the second one; z+ elsewhere."""
    model, x, layers = network(seed, stride, groups, side)
    rule = RULES[name]
    places = [("0", 0)] if name == "zbox" else [("0", 0), ("2", 2)]
    for path, i in places:
        composite = [(lambda place, path=path: place.path == path, rule), (first, ZPlus()), (convolution, ZPlus())]
        _, heat = unroll(model, rule=[*composite, (linear, Epsilon(1e-6)), *base()], example=x)(x)
        others = {0: ZPlus(), 2: ZPlus(), 4: Epsilon(1e-6), i: rule}
        expected = heatmaps(others.__getitem__, layers, x).unflatten(2, x.shape[1:]).sum(2)
        assert error(heat, expected) < 1e-9
        weights = torch.randn(heat.shape, dtype=torch.float64)
        found = gradients((heat * weights).sum(), model)
        reference = gradients((expected * weights).sum(), model)
        scale = max(float(g.abs().max()) for g in reference.values())
        for key, gradient in reference.items():
            own = found[key]
            torch.testing.assert_close(own, gradient, rtol=0, atol=1e-8 * scale, msg=lambda m, key=key: f"{key}: {m}")


# --- accounts


def closes(model: nn.Module, x: Tensor, rule: Any) -> float:
    unrolled = unroll(model, rule=rule, example=x)
    with torch.no_grad():
        return conservation_error(*unrolled(x), unrolled.ledger(x))


@pytest.mark.parametrize("name", [name for name in RULES if name != "zbox"])
@settings(max_examples=3, deadline=None)
@given(classifiers())
def test_heatmaps_and_ledger_sum_to_the_score_under_every_rule(name: str, drawn: tuple[nn.Module, Tensor]) -> None:
    assert closes(*drawn, composites.everywhere(RULES[name])) < 1e-9


@pytest.mark.parametrize(
    "rule", ["epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_alpha2_beta1_flat"]
)
@settings(max_examples=4, deadline=None)
@given(classifiers())
def test_heatmaps_and_ledger_sum_to_the_score_under_composites(rule: str, drawn: tuple[nn.Module, Tensor]) -> None:
    assert closes(*drawn, rule) < 1e-9


@pytest.mark.parametrize(
    "options", [{"epsilon": 0.3}, {"rule": "epsilon"}, {"rule": Epsilon(0.1)}, {"epsilon": 0.3, "batch_norm": "batch"}]
)
@settings(max_examples=3, deadline=None)
@given(classifiers())
def test_the_ledger_says_what_epsilon_takes(options: dict[str, Any], drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    unrolled = unroll(model, **options, example=x)
    with torch.no_grad():
        ledger = unrolled.ledger(x)
        assert conservation_error(*unrolled(x), ledger) < 1e-9
    assert any(name.endswith(".rule") for name in ledger)


@settings(max_examples=5, deadline=None)
@given(classifiers())
def test_the_rule_zero_is_input_times_gradient(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    with torch.no_grad():
        expected = unroll(model, example=x)(x)[1]
        assert error(unroll(model, rule=[(anything, Epsilon(0))], example=x)(x)[1], expected) < 1e-8
        short = unroll(model, epsilon=1e-6, example=x)(x)[1]
        assert error(unroll(model, rule="epsilon", example=x)(x)[1], short) == 0


class Normalising(nn.Module):
    """Wants images in [0, 1], as networks do that know how they were trained."""

    mean: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64).view(3, 1, 1))

    def normalised(self, image: Tensor) -> Tensor:
        return (image - self.mean) / 0.25

    def forward(self, image: Tensor) -> Tensor:
        return self.network(self.normalised(image))


@pytest.mark.parametrize("rule", ["flat", "epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "zplus"])
def test_a_network_that_normalises_its_image_has_the_heatmaps_of_its_layers(rule: str) -> None:
    network, x = without_biases()
    model = Normalising(network)
    with torch.no_grad():
        found, expected = unroll(model, rule=rule)(x), unroll(network, rule=rule)(model.normalised(x))
    torch.testing.assert_close(found, expected)
    assert closes(model, x, rule) < 1e-9


def without_biases() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False)).double()
    return model, torch.rand(2, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    "rule", [Epsilon(0), Gamma(0.5, 0), ZPlus(0), Flat(0), WSquare(0), [(first, ZBox(0.0, 1.0, 0))]]
)
def test_rules_that_conserve_put_the_whole_score_on_pixels(rule: Any) -> None:
    """Without biases and stabilisers, and with the linear layer by LRP-0."""
    model, x = without_biases()
    chosen = rule if isinstance(rule, list) else [(convolution, rule)]
    scores, heat = unroll(model, rule=[*chosen, (convolution, ZPlus(0)), (linear, Epsilon(0)), *base(0)])(x)
    assert error(heat.sum((2, 3)), scores) < 1e-10


def test_alpha_beta_conserves_where_outputs_have_contributions_of_both_signs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 5, bias=False)).double()
    scores, heat = unroll(model, rule=AlphaBeta(3, 2, 0))(torch.randn(2, 3, 3, 3, dtype=torch.float64))
    assert error(heat.sum((2, 3)), scores) < 1e-10


class Squeeze(nn.Module):
    """Gates, layer scale, a sum, a concatenation, normalisation by statistics, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8, 1, 1))
        self.before, self.more = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.layer_norm, self.attend = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        x = torch.cat([x, x + self.scale * self.more(self.before(x).relu())], 1)
        tokens = self.layer_norm(x.flatten(2).mT)
        tokens = tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("rule", ["epsilon_plus", "epsilon_alpha2_beta1_flat", "gamma", "wsquare", "zplus"])
def test_networks_with_gates_and_attention_keep_their_accounts(rule: str) -> None:
    torch.manual_seed(0)
    model, x = Squeeze().double().eval(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    assert closes(model, x, rule) < 1e-9
    assert unroll(model, rule=rule, example=x)(x)[1].abs().amax((2, 3)).min() > 0


def test_the_ledger_says_what_a_rule_takes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1)).double()
    nn.init.constant_(model[1].weight, 2.0)
    nn.init.constant_(model[1].bias, 1.0)
    ledger = unroll(model, rule=[(linear, Epsilon(1.0))]).ledger(torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert ledger.keys() == {"1.bias", "1.rule"}  # score 3: heat 2 * 3/4, bias 1 * 3/4, epsilon 1 * 3/4
    torch.testing.assert_close(torch.stack([*ledger.values()]).flatten(), torch.tensor([0.75, 0.75]).double())


# --- where a rule goes


def test_a_composite_chooses_by_path_kind_module_and_the_image() -> None:
    seen: list[Place] = []
    model = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (4, 4)), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2))
    model = nn.Sequential(model, nn.Flatten())
    unroll(model, rule=[(lambda place: seen.append(place), Flat()), *base()], example=torch.zeros(1, 3, 4, 4))
    found = [(p.path, p.kind, p.first) for p in seen]
    assert found[:3] == [("0.2", "conv2d", True), ("0.3", "relu", False), ("0.4", "conv2d", False)]
    assert seen[0].module is model[0][2]


def test_classes_and_chunks_are_those_of_all_classes() -> None:
    model, x = without_biases()
    _, heat = unroll(model, rule="epsilon_plus")(x)
    some = unroll(model, rule="epsilon_plus", chunk=1)(x, [[2, 0], [1]])[1]
    assert error(some[0], heat[0, [2, 0]]) < 1e-12
    assert error(some[1], heat[1, [1]]) < 1e-12


@pytest.mark.parametrize("rule", ["epsilon_plus", "gamma"])
def test_rules_compile(rule: str) -> None:
    model, x = without_biases()
    unrolled = unroll(model, rule=rule)
    torch.testing.assert_close(torch.compile(unrolled, fullgraph=True, backend="eager")(x), unrolled(x))


def test_a_rule_of_another_module_does_not_stand_in_the_way_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(nn.Module):
        """Cannot be found by another process."""

    monkeypatch.setitem(ADJOINTS, Local, lambda module, x: Linearised(x, lambda gradient: gradient))
    model, x = without_biases()
    unrolled = unroll(model)
    assert error(pickle.loads(pickle.dumps(unrolled))(x)[1], unrolled(x)[1]) == 0


@pytest.mark.parametrize("rule", ["gamma", "epsilon_plus_flat"])
def test_a_copy_has_the_same_rules(rule: str) -> None:
    model, x = without_biases()
    unrolled = unroll(model, rule=rule)
    for copied in (copy.deepcopy(unrolled), pickle.loads(pickle.dumps(unrolled))):
        assert error(copied(x)[1], unrolled(x)[1]) == 0


@pytest.mark.parametrize("rule", ["gamma", "epsilon_plus", "epsilon_alpha2_beta1_flat"])
def test_rules_under_autocast_are_close_to_single_precision(rule: str) -> None:
    model, x = without_biases()
    unrolled, x = unroll(model.float(), rule=rule), x.float()
    with torch.no_grad():
        expected = unrolled(x)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = unrolled(x)[1]
    assert error(found.double(), expected.double()) < 0.1


def test_a_constant_that_is_added_makes_an_input_signed() -> None:
    """Where inputs are known not to be negative, half of the work is left out: never wrongly."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(-1 * (x.relu() - 1) + x.relu()).flatten(1)

    model = Shifted().double()
    x = torch.rand(1, 2, 1, 1, dtype=torch.float64) + 1
    _, heat = unroll(model, rule=[(convolution, ZPlus()), (anything, Epsilon(0))], example=x)(x)
    value = (1 - x.relu() + x.relu()).flatten()
    weight, bias = model.conv.weight.flatten(1), model.conv.bias
    assert bias is not None
    scores = weight @ value + bias
    expected = torch.stack(
        [plain(ZPlus(), value, weight, bias, weight, torch.eye(2).double()[k] * scores) for k in range(2)]
    )
    # Of x + (1 - x) the constant 1 takes all.
    ledger = unroll(model, rule=[(convolution, ZPlus()), (anything, Epsilon(0))], example=x).ledger(x)
    assert error(ledger["sub.constant"] + heat.sum((2, 3)), expected.sum(1)[None]) < 1e-9


# --- errors


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("epsilon_pluss", ValueError, "rule: expected"),
        ("zbox", ValueError, r"ZBox\(low, high\)"),
        ("epsilon_gamma_box", ValueError, r"epsilon_gamma_box\(low, high\)"),
        (Gamma, TypeError, r"Gamma\(\)"),
        (3, TypeError, "rule: expected a name"),
        ([(first, Flat)], TypeError, r"first, Flat\(\)"),
        ([Flat()], TypeError, "pairs"),
        ([(anything, ZPlus())], ValueError, "for layers with weights, and the composite gives it to 1 "),
        ([(anything, Pass())], ValueError, "on single numbers, and the composite gives it to 0 "),
    ],
)
def test_a_wrong_rule_is_refused(rule: Any, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(error, match=message):
        unroll(model, rule=rule, example=torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Epsilon(-1), "epsilon"),
        (lambda: Gamma(-0.1), "gamma"),
        (lambda: AlphaBeta(2, 0), "alpha - 1"),
        (lambda: AlphaBeta(0.5, -0.5), "alpha"),
        (lambda: ZBox(1.0, 0.0), "below high"),
        (lambda: ZPlus(-1), "stabilizer"),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], Rule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_epsilon_is_said_once() -> None:
    with pytest.raises(ValueError, match=r"epsilon: expected none beside a rule that has one, got 0\.1 with Epsilon"):
        unroll(without_biases()[0], rule=Epsilon(0.2), epsilon=0.1)


@pytest.mark.parametrize("options", [{"epsilon": 0.1}, {"activations": "relu"}, {"weights": "free"}])
def test_rules_do_not_go_with_other_decoders(options: dict[str, Any]) -> None:
    upsampling = {"upsampling": "nearest"} if "weights" in options else {}
    with pytest.raises(ValueError, match="rule: expected weights='tied'"):
        unroll(without_biases()[0], rule="gamma", **options, **upsampling)
