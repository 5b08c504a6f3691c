"""One copy of the parameters, whatever is done to the module; policies of modes, options, and what is refused."""

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

import segattr
from segattr.lrp import FreeDecoder, Linearised, adjoint, unroll
from segattr.lrp.adjoints import RULES
from tests.segattr.lrp_nets import (
    Residual,
    basic,
    conservation_error,
    error,
    gradients,
    input_times_gradient,
    randomise,
)


class Small(nn.Module):
    """A residual block, dropout and a linear layer."""

    def __init__(self, gate: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.block: Residual = basic(6, 8, 2)
        self.gate = gate or nn.Identity()
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.block(self.stem(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


@pytest.fixture
def model() -> nn.Module:
    return randomise(Small())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 17, 14, dtype=torch.float64)


def loss(results: tuple[Tensor, Tensor]) -> Tensor:
    """Reaches all parameters."""
    scores, heat = results
    return (30 * heat).softmax(1)[:, 0].mean() + scores.sigmoid().mean()


# --- one copy of the parameters


def test_there_is_one_copy_of_the_parameters(model: nn.Module) -> None:
    unrolled = unroll(model)
    assert unrolled.encoder is model
    own, tied = list(model.parameters()), list(unrolled.parameters())
    assert len(own) == len(tied)
    assert all(a is b for a, b in zip(own, tied, strict=True))
    assert list(unrolled.state_dict()) == [f"encoder.{name}" for name in model.state_dict()]
    assert not list(unrolled.decoder.parameters())


def test_adamw_moves_each_weight_once(model: nn.Module, x: Tensor) -> None:
    """By the gradient of the tied parameters, from double back-propagation of the classifier alone."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = gradients(loss(input_times_gradient(model, x, create_graph=True)), model)
    unrolled = unroll(model)
    optimizer = torch.optim.AdamW(unrolled.parameters(), lr=1e-3, weight_decay=0.1)
    loss(unrolled(x)).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        g = expected[name]
        moved = before[name] * (1 - 1e-3 * 0.1) - 1e-3 * g / (g.abs() + 1e-8)  # the first step of AdamW
        torch.testing.assert_close(parameter.detach(), moved, rtol=1e-6, atol=1e-8, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_a_change_of_the_classifier_is_one_of_the_decoder(model: nn.Module, x: Tensor) -> None:
    unrolled = unroll(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert error(unrolled(x)[1], input_times_gradient_no_grad(model, x)) < 1e-12


def input_times_gradient_no_grad(model: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return input_times_gradient(model, x)[1]


def test_moving_to_another_precision_moves_both() -> None:
    model = randomise(Small()).float()
    unrolled = unroll(model).to(torch.float64)
    x = torch.randn(2, 3, 17, 14, dtype=torch.float64)
    scores, heat = unrolled(x)
    assert scores.dtype == heat.dtype == torch.float64
    assert error(heat, input_times_gradient(model, x)[1]) < 1e-12
    assert len(list(unrolled.parameters())) == len(list(model.parameters()))


def test_a_deep_copy_is_tied_to_itself_only(model: nn.Module, x: Tensor) -> None:
    unrolled = unroll(model)
    other = copy.deepcopy(unrolled)
    scores, heat = unrolled(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(unrolled(x), (scores, heat), rtol=0, atol=0)
    assert error(other(x)[1], input_times_gradient(other.encoder, x)[1]) < 1e-12
    assert error(other(x)[1], heat) > 0.1
    assert len(list(other.parameters())) == len(list(model.parameters()))


def test_states_are_saved_and_loaded(model: nn.Module, x: Tensor) -> None:
    file = io.BytesIO()
    torch.save(unroll(model).state_dict(), file)
    file.seek(0)
    other = unroll(randomise(Small()))
    assert error(other(x)[1], unroll(model)(x)[1]) > 0.1
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x), unroll(model)(x), rtol=0, atol=0)


def test_the_whole_module_is_saved_and_loaded(model: nn.Module, x: Tensor) -> None:
    file = io.BytesIO()
    torch.save(unroll(model), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), unroll(model)(x), rtol=0, atol=0)


def network_and_images() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomise(Small()), torch.randn(4, 3, 17, 14, dtype=torch.float64)


def distributed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, images = network_and_images()
    shared = DistributedDataParallel(unroll(model))
    loss(shared(images[2 * rank : 2 * rank + 2])).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, Path(folder, "gradients"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    found = torch.load(tmp_path / "gradients")
    model, images = network_and_images()
    for name, expected in gradients(loss(unroll(model)(images)), model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in ({"chunk": 2}, {"batch_norm": "batch"}, {"activations": "relu"}, {"epsilon": 0.1})
        ),
    ],
    ids=lambda options: next(iter(options), "tied"),
)
def test_it_compiles_to_one_graph(model: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    eager = unroll(model, **options)
    compiled = torch.compile(unroll(model, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eager(x))
    expected = gradients(loss(eager(x)), model)
    for name, gradient in gradients(loss(compiled(x)), model).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("chunk", [None, 2])
# Rounding changes the masks of activations near 0, of which statistics of the batch make more.
@pytest.mark.parametrize(("batch_norm", "close"), [("eval", 0.1), ("batch", 0.15)])
def test_bfloat16_autocast_is_close_to_single_precision(batch_norm: Any, close: float, chunk: int | None) -> None:
    model = randomise(Small()).float().train()
    model.dropout.eval()
    unrolled = unroll(model, batch_norm=batch_norm, chunk=chunk)
    x = torch.randn(2, 3, 17, 14)
    scores, heat = unrolled(x)
    with torch.autocast("cpu", torch.bfloat16):
        half_scores, half = unrolled(x)
        absorbed = sum(unrolled.ledger(x).values())
    assert half_scores.dtype == torch.bfloat16
    torch.testing.assert_close(half_scores.float(), scores, rtol=0, atol=0.05 * float(scores.detach().abs().max()))
    assert (half.float() - heat).norm() < close * heat.norm()
    difference = half.detach().float().sum((2, 3)) + absorbed - scores.detach()
    assert difference.abs().max() < close * scores.detach().abs().max()
    (half.float().square().sum() + half_scores.float().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_printing_the_decoder_shows_the_tied_layers_in_order(model: nn.Module) -> None:
    lines = str(unroll(model).decoder).splitlines()[1:-1]
    assert [line.split(": ", 1)[1] for line in lines] == [
        f"TiedLayer(adjoint of {kind}, tied to {tied})"
        for kind, tied in [
            ("Linear", "fc"),
            ("Dropout", "dropout"),
            ("mean", "mean"),
            ("Identity", "gate"),
            ("ReLU", "block.relu"),
            ("add", "add"),
            ("Conv2d", "block.downsample.0 and block.downsample.1"),
            ("Conv2d", "block.conv2 and block.bn2"),
            ("ReLU", "block.relu"),
            ("Conv2d", "block.conv1 and block.bn1"),
            ("ReLU", "stem.2"),
            ("Conv2d", "stem.0 and stem.1"),
        ]
    ]


# --- what surrounds and what computes the parameters


def plain_layers() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double().eval()


WEIGHTS_BY_HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "weight_norm as parametrization": nn.utils.parametrizations.weight_norm,
    "spectral_norm as parametrization": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", WEIGHTS_BY_HOOKS.values(), ids=WEIGHTS_BY_HOOKS.keys())
def test_weights_that_hooks_compute_are_those_of_the_parameters(wrap: Callable[[nn.Module], Any], x: Tensor) -> None:
    """After loading and after each step, with gradients as those of autograd."""
    trained, model = plain_layers(), plain_layers()
    wrap(trained[2])
    wrap(model[2])
    unrolled = unroll(model)
    model.load_state_dict(trained.state_dict())
    optimizer = torch.optim.SGD(unrolled.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        assert error(unrolled(x)[0], model(x)) < 1e-12
        assert error(unrolled(x)[1], input_times_gradient(model, x)[1]) < 1e-12
        expected = gradients(loss(input_times_gradient(model, x, create_graph=True)), model)
        for name, gradient in gradients(loss(unrolled(x)), model).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)
        optimizer.zero_grad()
        loss(unrolled(x)).backward()
        optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "Classifier": segattr.split,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_the_classifier_in_a_wrapper_is_unrolled(
    model: nn.Module, x: Tensor, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    unrolled = unroll(wrap(model))
    torch.testing.assert_close(unrolled(x), unroll(model)(x), rtol=0, atol=0)
    assert list(unrolled.state_dict()) == [f"encoder.{name}" for name in model.state_dict()]


def test_a_classifier_in_two_parts_is_unrolled(model: nn.Module, x: Tensor) -> None:
    features = nn.Sequential(model.stem, model.block)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    torch.testing.assert_close(unroll(segattr.Classifier(features, head))(x), unroll(model)(x))


class Keeping(Small):
    """Keeps its last feature map, to look at it."""

    maps: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.maps = self.block(self.stem(x))
        return self.fc(self.maps.mean((2, 3)) + 0 * torch.ones(8, dtype=x.dtype))


def test_nothing_is_left_in_the_classifier(x: Tensor) -> None:
    model = randomise(Keeping())
    with torch.no_grad():
        model(x)
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    unrolled = unroll(model)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()
        assert all(module.__dict__[key] is value for key, value in attributes[name].items()), name
    torch.save(unrolled, io.BytesIO())


class Logits(Small):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "other": x}


def test_what_a_classifier_calls_logits_are_its_scores(x: Tensor) -> None:
    model = randomise(Logits())
    assert torch.equal(unroll(model)(x)[0], model(x)["logits"])


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        unroll(lambda x: x)  # type: ignore[arg-type]


class Fused(nn.BatchNorm2d):
    """With its activation, by the function, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(x, inplace=True)


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_a_normalisation_with_code_of_its_own_is_one(x: Tensor, mode: Any) -> None:
    model, fused = randomise(Small()), Small()
    fused.stem = nn.Sequential(fused.stem[0], Fused(6))
    fused.load_state_dict(model.state_dict())
    results = []
    for network in (model, fused.double()):
        network.train().get_submodule("dropout").eval()
        unrolled = unroll(network, batch_norm=mode)
        results.append((*unrolled(x), dict(network.named_buffers())))
        assert "TiedLayer(adjoint of Conv2d, tied to stem.0 and stem.1)" in map(str, unrolled.decoder)
    torch.testing.assert_close(*results)


# --- what is refused


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2)
        return (y @ (y.transpose(1, 2) @ y).softmax(-1)).view(x.shape)


class Attended(nn.Sequential):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__(nn.Flatten(2), attention)

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x).transpose(1, 2)
        return self[1](y, y, y)[0].transpose(1, 2).view(x.shape)


@pytest.mark.parametrize(
    ("gate", "place"),
    [
        (nn.SiLU(), r"silu \(node silu, in gate\)"),
        (nn.Hardswish(), r"hardswish \(node hardswish, in gate\)"),
        (nn.GroupNorm(2, 8), r"group_norm \(node group_norm, in gate\)"),
        (Gate(), r"sigmoid \(node sigmoid, in gate\), mul \(node mul, in gate\)"),
        (Attention(), r"softmax \(node softmax, in gate\), matmul \(node matmul_1, in gate\)"),
        (Attended(nn.MultiheadAttention(8, 2, batch_first=True)), r".*softmax .*in gate\.1\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gates_are_refused_on_request(gate: nn.Module, place: str) -> None:
    unrolled = unroll(Small(gate))
    assert unrolled(torch.rand(2, 3, 17, 14))[1].shape == (2, 3, 17, 14)
    with pytest.raises(TypeError, match=f"model: expected no gates, as gates='refuse' says, got {place}") as refusal:
        unroll(Small(gate), gates="refuse")
    assert "\n" not in str(refusal.value)
    unroll(Small(nn.ReLU6()), gates="refuse")


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(torch.fft.fft(x).real) + torch.special.i0(x)


def test_operations_without_adjoint_are_refused_all_at_once() -> None:
    message = (
        r"model: LRP has no adjoint for fft_fft \(node fft_fft, in gate\), real \(node real, in gate\), special_i0 "
        r"\(node special_i0, in gate\) and 1 more of its kind: register one with segattr.lrp.adjoint"
    )
    with pytest.raises(TypeError, match=message) as refusal:
        unroll(Small(Strange()))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("last", "place"),
    [(nn.Softmax(1), r"softmax \(node softmax, in 4\)"), (nn.Sigmoid(), r"sigmoid \(node sigmoid, in 4\)")],
    ids=str,
)
def test_probabilities_are_no_logits(last: nn.Module, place: str) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    with pytest.raises(TypeError, match=f"model: expected logits, .* got what {place} makes of them"):
        unroll(nn.Sequential(*layers, last))


def test_images_that_no_scores_depend_on_are_refused() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x).mean((2, 3))

    with pytest.raises(TypeError, match=r"model: expected logits, .* got no function of the images"):
        unroll(Constant())


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Pair(Small):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Small(Branches()),
            r"model: expected code that reads no numbers out of images, got bool \(node bool, in gate\): what it does",
        ),
        (Pair, r"model: expected one tensor of class scores as its output, got \(fc, fc\)"),
        (lambda: Small(Strange()), "no adjoint"),
    ],
    ids=["branches", "two outputs", "no adjoint"],
)
def test_a_refused_classifier_is_left_in_its_modes(make: Callable[[], nn.Module], message: str) -> None:
    model = make().train()
    model.get_submodule("block").eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(TypeError, match=message):
        unroll(model)
    assert [module.training for module in model.modules()] == modes


def test_modes_and_random_numbers_are_left_as_they_are() -> None:
    model = Small().train()
    model.get_submodule("block").eval()
    modes = [module.training for module in model.modules()]
    numbers = torch.get_rng_state()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    unroll(model, batch_norm="batch")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)


def test_scores_that_are_not_one_vector_an_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected scores \[B, K\], got \[1, 3, 2, 2\]"):
        unroll(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("classes", "kind", "message"),
    [
        ([3], ValueError, "classes: expected integers from 0 to 2, got 3"),
        ([-1], ValueError, "classes: expected integers from 0 to 2, got -1"),
        ([[0], [1], [2]], ValueError, "classes: expected a sequence for each of 2 images, got 3"),
        ([[0], [5]], ValueError, "classes: expected integers from 0 to 2, got 5"),
        ([0.5], TypeError, "classes: "),
        ([[0], 1], TypeError, "classes: expected a sequence of integers for each image, got 1"),
        (1, TypeError, r"classes: expected a sequence of integers such as \[0, 2\], or one for each image, got 1"),
    ],
    ids=str,
)
def test_wrong_classes_are_refused(
    model: nn.Module, x: Tensor, classes: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        unroll(model)(x, classes)


def test_wrong_images_are_refused(model: nn.Module) -> None:
    for method in (unroll(model), unroll(model).ledger):
        with pytest.raises(TypeError, match="x: "):
            method(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"x: expected \[B, C, H, W\] or \[B, C, D, H, W\], got \[3, 9, 9\]"):
            method(torch.zeros(3, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "free"}, "weights: expected 'tied' with upsampling='tied'"),
        ({"upsampling": "nearest"}, "weights: expected .* got 'tied' with 'nearest'"),
        ({"skip": "concat"}, "weights: expected .* got 'tied' with 'tied' and 'concat'"),
        ({"skip": "add"}, "skip: "),
        ({"activations": "gelu"}, "activations: "),
        ({"weights": "shared"}, "weights: "),
        ({"upsampling": "bilinear"}, "upsampling: "),
        ({"batch_norm": "train"}, "batch_norm: "),
        ({"epsilon": -0.1}, "epsilon: "),
        ({"chunk": 0}, "chunk: "),
    ],
    ids=str,
)
def test_wrong_options_are_refused(model: nn.Module, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unroll(model, **options)


@pytest.mark.parametrize(
    "options",
    [{"activations": "relu"}, {"epsilon": 0.1}, {"chunk": 2}],
    ids=str,
)
def test_options_of_the_tied_decoder_are_refused_with_free_weights(options: Any) -> None:
    """They would be ignored."""
    with pytest.raises(ValueError, match=next(iter(options))):
        unroll(Small(), weights="free", upsampling="nearest", **options)


def test_free_weights_give_the_other_networks() -> None:
    model = Small()
    fcn = unroll(model, weights="free", upsampling="nearest")
    unet = unroll(model, weights="free", upsampling="nearest", skip="concat")
    assert isinstance(fcn, FreeDecoder)
    assert isinstance(unet, FreeDecoder)
    assert sum(p.numel() for p in unet.parameters()) > sum(p.numel() for p in fcn.parameters())
    assert fcn.encoder is unet.encoder is model


# --- operations of the user


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2 + 1


@pytest.fixture
def own_rule() -> Iterator[None]:
    @adjoint(Half)
    def half(module: Half, x: Tensor) -> Linearised:
        channels = x.shape[1]
        return Linearised(module(x), lambda gradient: gradient / 2, {"offset": x.new_ones(channels)})

    yield
    del RULES[Half]


@pytest.mark.usefixtures("own_rule")
def test_an_operation_of_the_user(x: Tensor) -> None:
    model = randomise(Small(Half()))
    unrolled = unroll(model)
    scores, heat = unrolled(x)
    ledger = unrolled.ledger(x)
    assert "gate.offset" in ledger
    assert conservation_error(scores, heat, ledger) < 1e-12
    assert error(heat, input_times_gradient(model, x)[1]) < 1e-12


@pytest.mark.parametrize("operations", [(), (3,)])
def test_what_is_no_operation_cannot_be_registered(operations: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="operations: expected types of modules"):
        adjoint(*operations)


def test_an_operation_that_nobody_registered_is_opened(x: Tensor) -> None:
    model = randomise(Small(Half()))
    assert "gate.offset" not in unroll(model).ledger(x)
    assert error(unroll(model)(x)[1], input_times_gradient(model, x)[1]) < 1e-12


@pytest.mark.parametrize("gate", [lambda x: x.flip(0), lambda x: x * x.std()], ids=["flip", "gate"])
def test_images_that_are_of_matter_to_each_other_are_refused(gate: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match="model: expected scores of an image that are the same whatever other images"):
        unroll(randomise(Small(gate)))


class OptionalArgument(Small):
    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        y = self.block(self.stem(x))
        return y if features else self.fc(y.mean((2, 3)))


def test_further_arguments_of_the_classifier_have_their_defaults(x: Tensor) -> None:
    model = randomise(OptionalArgument())
    assert error(unroll(model)(x)[1], input_times_gradient(model, x)[1]) < 1e-12


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            lambda x: x.mean(0, keepdim=True) + x,
            r"cannot do mean \(node mean\): expected images to stay apart",
        ),
        (lambda x: F.dropout(x, 0.5), r"cannot do dropout \(node dropout\): expected dropout in training mode"),
    ],
    ids=["mean over the batch", "dropout in any mode"],
)
def test_arguments_that_an_adjoint_cannot_do_are_refused(
    x: Tensor, gate: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        unroll(randomise(Small(gate)))(x)


# --- modes


def test_running_statistics_are_used_in_training_mode_and_left_alone(model: nn.Module, x: Tensor) -> None:
    unrolled = unroll(model)
    expected = unrolled(x)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    unrolled.train()
    model.dropout.eval()
    torch.testing.assert_close(unrolled(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)


def test_statistics_of_the_batch_are_those_of_evaluation_in_evaluation_mode(model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(unroll(model, batch_norm="batch")(x), unroll(model)(x), rtol=0, atol=0)


def test_statistics_of_the_batch_are_constants(model: nn.Module, x: Tensor) -> None:
    """Relevance is conserved, where live statistics would take all of it; the ledger has shifts of the batch."""
    model.train().dropout.eval()
    unrolled = unroll(model, batch_norm="batch")
    scores, heat = unrolled(x)
    assert conservation_error(scores, heat, unrolled.ledger(x)) < 1e-12
    assert error(heat, unroll(model)(x)[1]) > 0.01
    assert not any(g.any() for name, g in gradients(heat.square().sum(), model).items() if name.endswith("bias"))


def test_relevance_is_conserved_for_the_mask_of_dropout_that_was_drawn(model: nn.Module, x: Tensor) -> None:
    unrolled = unroll(model).train()
    torch.manual_seed(1)
    scores, heat = unrolled(x)
    torch.manual_seed(1)
    ledger = unrolled.ledger(x)
    assert conservation_error(scores, heat, ledger) < 1e-12
    torch.manual_seed(2)
    assert error(unrolled(x)[1], heat) > 1e-3
    assert error(unroll(model.eval())(x)[1], heat) > 1e-3


# --- other relevance


def test_epsilon_takes_relevance_away(model: nn.Module) -> None:
    """From a network of positive weights and images, without shifts, in which every part of it is positive."""
    model = randomise(Small(), shifts=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    x = torch.rand(2, 3, 17, 14, dtype=torch.float64)
    totals = [unroll(model, epsilon=epsilon)(x)[1].detach().sum((2, 3)) for epsilon in (0.0, 0.01, 0.1, 1.0)]
    torch.testing.assert_close(totals[0], model(x).detach())
    for more, less in itertools.pairwise(totals):
        assert (less < more).all()
        assert (less > 0).all()


def test_epsilon_shrinks_each_layer_by_its_share() -> None:
    """Written out for two layers."""
    model = randomise(nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)))
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    conv, fc = model[0].weight.flatten(), model[3].weight.view(2, 4)
    z = conv[:, None] * x.flatten()
    score = model(x)
    at_hidden = z.clamp(min=0) * fc * (score.abs() / (score.abs() + 0.3))
    expected = (at_hidden * z.abs() / (z.abs() + 0.3)).sum(0).view(1, 1, 2, 2)
    torch.testing.assert_close(unroll(model, epsilon=0.3)(x)[1], expected)


def test_epsilon_to_zero_is_the_plain_rule(model: nn.Module, x: Tensor) -> None:
    expected = unroll(model)(x)[1]
    errors = [error(unroll(model, epsilon=epsilon)(x)[1], expected) for epsilon in (1e-2, 1e-5, 1e-8, 1e-11)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-7


def test_relu_of_its_own_signal_is_not_the_tied_mask_and_can_be_trained(model: nn.Module, x: Tensor) -> None:
    """The signal behind the last activation on the way back is that of the classifier, clipped at 0."""
    untied = unroll(model, activations="relu")
    scores, heat = untied(x)
    tied_scores, tied = unroll(model)(x)
    torch.testing.assert_close(scores, tied_scores, rtol=0, atol=0)
    assert error(heat, tied) > 0.1
    found = gradients(heat.square().sum(), model)
    weights = [name for name in found if name.endswith("weight")]
    assert all(found[name].any() for name in weights)
    two_layers = randomise(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)))
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    signal = two_layers[3].weight.view(2, 4).clamp(min=0)
    expected = (x.flatten() * (two_layers[0].weight.flatten() @ signal)).view(1, 1, 2, 2)
    torch.testing.assert_close(unroll(two_layers, activations="relu")(x)[1], expected)


@pytest.mark.parametrize("settings", [{}, {"weights": "free", "upsampling": "nearest"}])
def test_images_that_the_classifier_does_not_take(settings: dict[str, Any]) -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    unrolled = unroll(nn.Sequential(*layers), **settings)
    for x, message in (
        (torch.ones(1, 4, 9, 9), r"x: expected what the network can take, got \[1, 4, 9, 9\], .* channels"),
        (torch.ones(1, 3, 9, 9).double(), "x: expected what the network can take, got .*torch.float64 on cpu"),
        (torch.full((1, 3, 9, 9), torch.nan), "x: expected finite values, got NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            unrolled(x)


def test_a_chunk_that_is_set_later_is_checked() -> None:
    unrolled = unroll(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert not isinstance(unrolled, FreeDecoder)
    unrolled.chunk = -1
    with pytest.raises(ValueError, match="chunk: expected a finite number of at least 1, got -1"):
        unrolled(torch.ones(1, 3, 9, 9))
    unrolled.chunk = 1
    assert unrolled(torch.ones(1, 3, 9, 9))[1].shape == (1, 2, 9, 9)


def test_a_chunk_of_numpy() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    x = torch.rand(2, 3, 9, 9)
    expected = unroll(nn.Sequential(*layers))(x)[1]
    model = nn.Sequential(*layers)
    found = unroll(model, chunk=np.int64(2))(x)[1]  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
