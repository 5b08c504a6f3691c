"""Heatmaps of all classes, and a training step through them: the unrolled decoder against autograd, class by class.

21 classes are VOC's. resnet18 on 2 images of 96 pixels is small enough for what is done per class to show, resnet50 on
an image of 224 is what classifiers are trained on; its training step is left out, as it takes long. The composite
EpsilonPlus is zennit's and the same by rule="epsilon_plus"; time over the number of classes that are decoded at once is
a curve of its own. Shares are those of
one forward pass of the classifier, without gradients, in the same group: time in forward passes is what can be compared
between machines. Evaluation mode, float32, one thread.

zennit and captum take part where they are installed, in heatmaps only: captum's gradients cannot be differentiated
again, and zennit merges batch normalisation into copies of the weights, which its scale gets no gradient from. Both run
the classifier again for each class. captum's own LRP does not know the sums of residual networks, so that its input
times gradient, the same quantity, stands in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

import pytest
import torch
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision import models

from benchmarks.baselines import batched_heatmaps, sequential_heatmaps
from benchmarks.memory import peak_bytes
from segattr.lrp import heatmap_loss, unroll

CLASSES = 21
FORWARD, SEQUENTIAL = "one forward pass", "K gradients"

Heatmaps = Callable[[Tensor], tuple[Tensor, Tensor]]  # from images to scores and heatmaps


@dataclass(frozen=True)
class Case:
    task: str  # "heatmaps" or "training"
    network: str
    shape: tuple[int, ...]
    rounds: int

    def __str__(self) -> str:
        return f"{self.task} {self.network} {'x'.join(map(str, self.shape))}"


CASES = [
    Case("heatmaps", "resnet18", (2, 3, 96, 96), 5),
    Case("training", "resnet18", (2, 3, 96, 96), 3),
    Case("heatmaps", "resnet50", (1, 3, 224, 224), 2),
]
CHUNKS = [1, 2, 3, 4, 5, 7, 11, 21]


def zennit(model: nn.Module) -> Heatmaps:
    composites, rules, types = (import_module(f"zennit.{name}") for name in ("composites", "rules", "types"))
    layers = [
        (types.Activation, rules.Pass()),
        (import_module("zennit.layer").Sum, rules.Norm()),
        (types.AvgPool, rules.Norm()),
        (types.Linear, rules.Epsilon(epsilon=1e-9)),  # convolutions too; LRP-0, but for 0 / 0
    ]
    canonizer = import_module("zennit.torchvision").ResNetCanonizer()
    return class_by_class(model, composites.LayerMapComposite(layers, canonizers=[canonizer]))


def zennit_epsilon_plus(model: nn.Module) -> Heatmaps:
    canonizer = import_module("zennit.torchvision").ResNetCanonizer()
    return class_by_class(model, import_module("zennit.composites").EpsilonPlus(canonizers=[canonizer]))


def class_by_class(model: nn.Module, composite: object) -> Heatmaps:
    attributor = import_module("zennit.attribution").Gradient(model, composite)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        with attributor:
            for unit in torch.eye(CLASSES):
                scores, relevance = attributor(images, lambda scores, unit=unit: scores * unit)
                maps.append(relevance.sum(1))
        return scores, torch.stack(maps, 1)

    return run


def captum(model: nn.Module) -> Heatmaps:
    method = import_module("captum.attr").InputXGradient(model)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.clone().requires_grad_()
        maps = [method.attribute(pixels, target=number).sum(1).detach() for number in range(CLASSES)]
        return model(images), torch.stack(maps, 1)

    return run


METHODS: dict[str, Callable[[nn.Module, bool], Heatmaps]] = {
    SEQUENTIAL: lambda model, training: partial(sequential_heatmaps, model, create_graph=training),
    "is_grads_batched": lambda model, training: partial(batched_heatmaps, model, create_graph=training),
    "unrolled LRP": lambda model, training: unroll(model),
}
PEERS = {"zennit": zennit, "captum": captum}
ROWS = [(case, method) for case in CASES for method in [FORWARD, *METHODS, *(PEERS if case.task == "heatmaps" else [])]]


def classifier(case: Case) -> nn.Module:
    """With random weights and statistics; the parameters are constants unless they are trained."""
    torch.manual_seed(0)
    model: nn.Module = getattr(models, case.network)(num_classes=CLASSES)
    for name, statistic in model.named_buffers():
        if name.endswith("running_mean"):
            statistic.normal_(0, 0.1)
        elif name.endswith("running_var"):
            statistic.uniform_(1, 3)
    return model.eval().requires_grad_(case.task == "training")


def step(method: str, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns the heatmaps, or the gradients of all parameters."""
    torch.set_num_threads(1)
    model = classifier(case)
    images = torch.randn(case.shape)
    labels = torch.randint(0, CLASSES, (case.shape[0], *case.shape[2:]))
    labels[:, ::4] = 255  # ignored
    tags = torch.randint(0, 2, (case.shape[0], CLASSES))
    training = case.task == "training"

    if method == FORWARD:

        def forward(images: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (model(images),)

        forward(images[:1, :, :32, :32])
        return partial(forward, images)

    heatmaps = PEERS[method](model) if method in PEERS else METHODS[method](model, training)

    def call(images: Tensor, labels: Tensor, tags: Tensor) -> tuple[Tensor, ...]:
        scores, maps = heatmaps(images)
        if not training:
            return (maps,)
        return torch.autograd.grad(heatmap_loss(maps, scores, labels, tags), list(model.parameters()))

    call(images[:1, :, :32, :32], labels[:1, :32, :32], tags[:1])  # the first call of any kind loads code
    return partial(call, images, labels, tags)


@cache
def expected(case: Case) -> tuple[Tensor, ...]:
    return step(SEQUENTIAL, case)()


def relative_error(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    difference = sum((a - b).double().square().sum() for a, b in zip(found, truth, strict=True))
    return float((difference / sum(b.double().square().sum() for b in truth)) ** 0.5)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("case", "method"), ROWS, ids=str)
def test_lrp(benchmark, case: Case, method: str) -> None:  # type: ignore[no-untyped-def]
    if method in PEERS:
        pytest.importorskip(method)
    run = step(method, case)
    results = run()
    error = 0.0 if method == FORWARD else relative_error(results, expected(case))
    assert error < (5e-2 if method == "zennit" else 1e-4)  # it divides by activations, some of which are next to 0
    output = sum(4 * result.numel() for result in results)
    del results
    benchmark.group = f"lrp {case}, {CLASSES} classes, 1 thread"
    benchmark.extra_info.update(method=method, rival=FORWARD, error=error)
    benchmark.extra_info["extra_bytes"] = max(0, peak_bytes(step, method, case) - output)
    benchmark.pedantic(run, rounds=20 if method == FORWARD else case.rounds)


RULES: dict[str, Callable[[nn.Module], Heatmaps]] = {
    "unrolled": lambda model: unroll(model, rule="epsilon_plus"),
    "zennit": zennit_epsilon_plus,
}


def rule_step(method: str, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns the heatmaps of the composite, of a network whose normalisation zennit merges rightly."""
    torch.set_num_threads(1)
    model = classifier(case)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    images = torch.randn(case.shape)
    heatmaps = RULES[method](model)

    def call(images: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(method == "zennit"):
            return (heatmaps(images)[1],)

    call(images[:1, :, :32, :32])
    return partial(call, images)


@cache
def by_zennit(case: Case) -> tuple[Tensor, ...]:
    return rule_step("zennit", case)()


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("method", RULES)
def test_lrp_epsilon_plus(benchmark, method: str) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("zennit")
    case = CASES[0]
    run = rule_step(method, case)
    results = run()
    error = relative_error(results, by_zennit(case))
    assert error < 1e-3
    output = sum(4 * result.numel() for result in results)
    benchmark.group = f"lrp epsilon_plus {case.network} {'x'.join(map(str, case.shape))}, {CLASSES} classes, 1 thread"
    benchmark.extra_info.update(method=method, rival="zennit", error=error)
    benchmark.extra_info["extra_bytes"] = max(0, peak_bytes(rule_step, method, case) - output)
    benchmark.pedantic(run, rounds=3)


def chunk_step(chunk: int, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    torch.set_num_threads(1)
    unrolled = unroll(classifier(case), chunk=chunk)
    images = torch.randn(case.shape)

    def call(images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (unrolled(images)[1],)

    call(images[:1, :, :32, :32])
    return partial(call, images)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_lrp_chunk(benchmark, case: Case, chunk: int) -> None:  # type: ignore[no-untyped-def]
    run = chunk_step(chunk, case)
    results = run()
    error = relative_error(results, expected(case))
    assert error < 1e-4
    benchmark.group = f"lrp {case}, classes decoded at once, 1 thread"
    benchmark.extra_info.update(method=f"{chunk} at once", rival=f"{CLASSES} at once", error=error)
    benchmark.extra_info["extra_bytes"] = max(0, peak_bytes(chunk_step, chunk, case) - 4 * results[0].numel())
    benchmark.pedantic(run, rounds=3)
