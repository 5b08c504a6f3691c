"""CAM, Grad-CAM, AdvCAM, RIB and FickleNet against the procedures that they replace.

AdvCAM on an image of 112 pixels and resnet18, with 2 and with 8 classes: the authors' procedure takes one class at a
time, the image with its mirror image, a backward pass for Grad-CAM and one for the objective, and makes the gradients
of all parameters. ``reference`` computes the same maps; the library's own form does without the mirror image. Maps of
20 classes (VOC) on 2 images of 224 pixels: the rival runs the network forward and back for each class, as the public
packages do, which take part where they are installed. Grad-CAM before the last stage of resnet18, behind which the
backward pass is a tenth of the network. RIB in 10 steps on 2 images with 4 companions, of all parameters and of those
from the third stage on, as in the authors' code. FickleNet with a window of 9 pixels, 512 channels and 2 of 20 classes
against map expansion, for the same hidden units.

Behind a method stands how many images it passes through the first layer of the network, and back to it. Evaluation
mode, float32, one thread.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from parts import torchvision_cpu  # noqa: F401  (before torchvision)
from torch import Tensor, nn
from torchvision.models import resnet18

from benchmarks.baselines import (
    deepcopy_rib,
    expanded_ficklenet,
    expanded_scores,
    plain_advcam,
    released_advcam,
    sequential_grad_cam,
)
from benchmarks.memory import peak_bytes
from segattr.advcam import advcam
from segattr.bottleneck import rib
from segattr.cam import cam, normalize
from segattr.ficklenet import StochasticConv2d, ficklenet, stochastic_conv2d
from segattr.gradients import grad_cam
from segattr.networks.classifier import Classifier, split

CLASSES = 20
RIB_LR = 1e-4
DROP, THRESHOLD = 0.9, 0.35  # of FickleNet


@dataclass(frozen=True)
class Case:
    task: str
    group: str
    rival: str
    methods: tuple[str, ...]
    size: int  # of the images, or of FickleNet's features
    steps: int = 1  # of AdvCAM and RIB, or passes of FickleNet
    classes: int = CLASSES
    frozen: int = 0  # children of resnet18 that RIB does not train
    tolerance: float = 1e-4  # of the relative error
    rounds: int = 1

    def __str__(self) -> str:
        return self.group


ADVCAM = ("advcam reference=True", "one class at a time", "advcam", "advcam channels_last")
EXPANSION = "map expansion"
CASES = [
    *(
        Case(
            "advcam",
            f"advcam resnet18 112x112, {classes} classes, 27 steps",
            "released procedure",
            ADVCAM,
            size=112,
            steps=27,
            classes=classes,
            tolerance=5e-2,  # float32: locations at the threshold fall on either side, and images climb apart
        )
        for classes in (2, 8)
    ),
    Case(
        "cam",
        "cam resnet18 2x3x224x224, 20 classes",
        "K forward and backward passes",
        ("K gradients", "grad_cam", "cam", "pytorch_grad_cam", "torchcam"),
        size=224,
        rounds=3,
    ),
    Case(
        "grad_cam layer3",
        "grad_cam resnet18 2x3x224x224 after layer3, 20 classes",
        "K forward and backward passes",
        ("K gradients", "grad_cam"),
        size=224,
        rounds=3,
    ),
    Case("rib", "rib resnet18 2x3x112x112, 10 steps", "deepcopy and train", ("rib",), size=112, steps=10, rounds=3),
    Case(
        "rib",
        "rib resnet18 2x3x112x112, 10 steps, two stages frozen",
        "deepcopy and train",
        ("rib", "rib behind the frozen stages"),
        size=112,
        steps=10,
        frozen=6,
        rounds=3,
    ),
    Case("ficklenet", "ficklenet 512x14x14, 10 passes", EXPANSION, ("ficklenet",), size=14, steps=10),
    Case("ficklenet", "ficklenet 512x28x28, 3 passes", EXPANSION, ("ficklenet",), size=28, steps=3),
    Case(
        "training",
        "stochastic_conv2d 4x512x14x14, forward and backward",
        EXPANSION,
        ("stochastic_conv2d",),
        size=14,
        rounds=3,
    ),
]
ROWS = [(case, method) for case in CASES for method in (case.rival, *case.methods)]

Run = Callable[[], Tensor]


class Passes:
    """How many images go through the first layer of a network, and how many gradients come back to it."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def watch(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self._count)

    def __deepcopy__(self, memo: object) -> "Passes":
        return self  # a copy of the network is counted, too

    def _count(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.forward += len(output)
        if output.requires_grad:
            output.register_hook(partial(self._count_back, len(output)))

    def _count_back(self, images: int, gradient: Tensor) -> None:
        self.backward += images


def classifier() -> Any:
    """resnet18 with random weights and statistics."""
    torch.manual_seed(0)
    model = resnet18(num_classes=CLASSES)
    for name, statistic in model.named_buffers():
        if name.endswith("running_mean"):
            statistic.normal_(0, 0.1)
        elif name.endswith("running_var"):
            statistic.uniform_(1, 3)
    return model.eval()


def parts(model: nn.Module, first: int = 0, cut: int = 8) -> tuple[nn.Sequential, nn.Sequential]:
    """Children ``first`` to ``cut`` of resnet18, and the rest as its head."""
    *layers, linear = model.children()
    return nn.Sequential(*layers[first:cut]), nn.Sequential(*layers[cut:], nn.Flatten(), linear)


def prepare_advcam(method: str, case: Case, model: Any) -> Callable[[Tensor, int], Tensor]:
    features, _ = parts(model)
    classes = range(case.classes)
    if method in ("released procedure", "one class at a time"):
        plain = released_advcam if method == "released procedure" else plain_advcam
        return lambda image, steps: plain(features, model.fc, image, classes, steps)
    if method == "advcam channels_last":
        model.to(memory_format=torch.channels_last)
    clf = split(model)
    reference = "reference" in method
    penalty = 7.0 if reference else 3.0
    return lambda image, steps: advcam(clf, image, classes, steps=steps, penalty=penalty, reference=reference)[0]


def advcam_run(method: str, case: Case, model: Any) -> Run:
    call = prepare_advcam(method, case, model)
    call(torch.randn(1, 3, 64, 64), 1)  # the first call of any kind loads code
    image = torch.randn(1, 3, case.size, case.size)
    if "channels_last" in method:
        image = image.contiguous(memory_format=torch.channels_last)
    return lambda: call(image, case.steps)


def cam_run(method: str, case: Case, model: Any) -> Any:
    """Raw maps of all classes. Those of pytorch-grad-cam are what it gives, stretched and at the size of the image."""
    layer = case.task.partition(" ")[2]
    images = torch.randn(2, 3, case.size, case.size)
    features, head = parts(model, cut=7 if layer else 8)
    clf = split(model, layer or None)
    if method in (case.rival, "K gradients"):
        return lambda: sequential_grad_cam(features, head, images, range(CLASSES), method == case.rival)
    if method == "grad_cam":
        return torch.no_grad()(lambda: grad_cam(clf, images, norm="raw"))
    if method == "cam":
        return torch.no_grad()(lambda: torch.as_tensor(cam(clf, images)) / (case.size // 32) ** 2)
    if method == "torchcam":
        extractor = import_module("torchcam.methods").CAM(model, "layer4", "fc")

        def run() -> Tensor:
            with torch.no_grad():
                model(images)
            maps = [extractor(c, normalized=False)[0] for c in range(CLASSES)]
            return torch.stack(maps, 1) / (case.size // 32) ** 2

        return run
    peer = import_module("pytorch_grad_cam").GradCAM(model, [model.layer4])
    target = import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    return lambda: torch.stack([torch.from_numpy(peer(images, [target(c)] * 2)) for c in range(CLASSES)], 1)


def rib_run(method: str, case: Case, model: Any) -> Run:
    images, tags = torch.randn(2, 3, case.size, case.size), torch.eye(CLASSES)[:2]
    companions = [(torch.randn(4, 3, case.size, case.size), torch.eye(CLASSES)[4:8]) for _ in range(case.steps)]
    features, head = parts(model)
    frozen = nn.Sequential(*[*features][: case.frozen])
    frozen.requires_grad_(False)
    if method == "deepcopy and train":
        return lambda: deepcopy_rib(features, model.fc, images, tags, companions, RIB_LR)
    options: Any = {"steps": case.steps, "lr": RIB_LR}
    if method == "rib":
        clf = split(model)
        return lambda: cast(Tensor, rib(clf, images, tags, companions=companions, frozen=[*frozen], **options))
    rest = Classifier(nn.Sequential(*[*features][case.frozen :]), head)

    def run() -> Tensor:
        with torch.no_grad():
            inner = [(frozen(others), their_tags) for others, their_tags in companions]
            return cast(Tensor, rib(rest, frozen(images), tags, companions=inner, **options))

    return run


def ficklenet_run(method: str, case: Case, model: Any) -> Run:
    layer = StochasticConv2d(512, CLASSES, kernel=9, drop=DROP)
    nn.init.normal_(layer.weight)
    features = torch.rand(1, 512, case.size, case.size)
    tags = (torch.arange(CLASSES) < 2).long()[None]

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if method == "ficklenet":
            return ficklenet(features, layer, passes=case.steps, threshold=THRESHOLD, tags=tags, generator=generator)
        keeps = [layer.draw(features, generator) for _ in range(case.steps)]
        return expanded_ficklenet(features, layer.weight, keeps, DROP, [0, 1], THRESHOLD)

    return run


def training_run(method: str, case: Case, model: Any) -> Run:
    """The gradients of features and weight, as one row."""
    layer = StochasticConv2d(512, CLASSES, kernel=9, drop=DROP)
    features = torch.rand(4, 512, case.size, case.size, requires_grad=True)
    keep = layer.draw(features)
    scores = stochastic_conv2d if method == "stochastic_conv2d" else expanded_scores

    def run() -> Tensor:
        logits = scores(features, layer.weight, keep, drop=DROP).mean((2, 3))
        loss = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (features, layer.weight))])

    return run


RUNS: dict[str, Callable[[str, Case, Any], Run]] = {
    "advcam": advcam_run,
    "cam": cam_run,
    "grad_cam layer3": cam_run,
    "rib": rib_run,
    "ficklenet": ficklenet_run,
    "training": training_run,
}


def step(method: str, case: Case, passes: Passes | None = None) -> Run:
    torch.set_num_threads(1)
    model = classifier()
    if passes is not None:
        passes.watch(model.conv1)
    return RUNS[case.task](method, case, model)


KNOWN: dict[tuple[str, Case], Tensor] = {}  # results, some of which take half a minute


def expected(method: str, case: Case) -> Tensor:
    """What a method must give: the maps of the rival; AdvCAM's own form those of the plain code for one class."""
    own = case.task == "advcam" and method in ADVCAM[1:]
    key = "one class at a time" if own else case.rival
    if (key, case) not in KNOWN:
        KNOWN[key, case] = step(key, case)()
    truth = KNOWN[key, case]
    if method != "pytorch_grad_cam":
        return truth
    size = (case.size, case.size)
    stretched = normalize(truth.relu(), "minmax")
    assert isinstance(stretched, Tensor)
    return normalize(F.interpolate(stretched, size, mode="bilinear", align_corners=False), "minmax")


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("case", "method"), ROWS, ids=str)
def test_attribution(benchmark, case: Case, method: str) -> None:  # type: ignore[no-untyped-def]
    if method in ("pytorch_grad_cam", "torchcam"):
        pytest.importorskip(method)
    passes = Passes()
    run = step(method, case, passes)
    if case.rounds > 1:
        run()
    passes.forward = passes.backward = 0
    benchmark.group = case.group + ", 1 thread"  # before the measurement
    result = KNOWN[method, case] = benchmark.pedantic(run, rounds=case.rounds)
    truth = expected(method, case)
    if result.is_floating_point():
        error = ((result - truth).norm() / truth.norm()).item()
    else:
        error = (result != truth).double().mean().item()  # of labels
    assert error < (1e-2 if method == "pytorch_grad_cam" else case.tolerance)
    counts = [count // case.rounds for count in (passes.forward, passes.backward)]
    label = f"{method}: {counts[0]} forward, {counts[1]} back" if any(counts) else method
    benchmark.extra_info.update(method=label, rival=label if method == case.rival else case.rival, error=error)
    # Every step uses the same memory again.
    peak = peak_bytes(step, method, replace(case, steps=min(case.steps, 2)))
    benchmark.extra_info["extra_bytes"] = max(0, peak - result.nbytes)


@pytest.mark.parametrize(("released", "reference"), [(released_advcam, True), (plain_advcam, False)])
def test_attribution_advcam_is_the_same_in_float64(released: Callable[..., Tensor], reference: bool) -> None:
    model = classifier().double()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = released(parts(model)[0], model.fc, image, [3, 0], 4)
    found = advcam(model, image, [3, 0], steps=4, penalty=7.0 if reference else 3.0, reference=reference)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
