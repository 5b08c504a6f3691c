"""Digits with added marks: how much of each a classifier's layers look at, before and after RIB.

The toy experiment of the dissertation's sections 3.4.2 and 3.4.3, with the digits of scikit-learn.
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from engine.command import check_least, each_run, output_folder, run
from engine.processes import Device, pick_device
from engine.training import seed_everything
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from segattr.advcam import advcam
from segattr.bottleneck import rib
from segattr.cam import cam
from segattr.metrics import best_threshold_miou, high_gradient_ratio
from segattr.networks.classifier import Classifier
from segloss import max_normalize


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a classifier of digits; prints high gradient ratios, quality of maps and what holds, draws a picture."""

    test: int = 60
    """Number of test images, all with a mark."""
    steps: int = 400
    """Optimizer steps of the classifier."""
    rib_steps: int = 10
    """Steps of RIB for each test image."""
    repeats: int = 3
    """Number of runs; their seeds count up from --seed, and the tables show mean and standard deviation."""
    seed: int = 0
    """Seed of the images and of the weights."""
    device: Device = "auto"
    """Where to compute; auto is the GPU when there is one."""
    out: Path = Path("runs/bottleneck_toy")
    """Folder of the picture."""

    def __post_init__(self) -> None:
        check_least(self, test=1, steps=1, rib_steps=1, repeats=1, seed=0)


CANVAS, DIGIT, MARK = 28, 14, 7  # sides; beside a digit of half the canvas there is always room for a mark
REGIONS = ("digit", "mark", "background")  # discriminative, class-relevant only, irrelevant
IMAGES, SHARE = 2000, 0.1  # of the training, and of these those with a mark, about
LAYERS, BATCH, COMPANIONS = 6, 64, 9
RATE = 2e-5  # of RIB, chosen on seeds 10 and 11


class Toys(NamedTuple):
    image: Tensor  # [N, 1, H, W] in [0, 1]
    label: Tensor  # [N]: 0 for the digit 2, 1 for 8
    regions: Tensor  # bool [N, 3, H, W], each pixel is of one of REGIONS

    def tags(self) -> Tensor:
        return F.one_hot(self.label, 2).to(self.image)

    def take(self, index: Tensor | slice) -> "Toys":
        return Toys(*(tensor[index] for tensor in self))


def place(patch: Tensor, corner: Tensor) -> Tensor:
    """Patches ``[N, s, s]`` in empty canvases ``[N, H, W]``, with their upper left corners ``[N, 2]``."""
    canvas = patch.new_zeros(len(patch), CANVAS, CANVAS)
    rows, columns = (corner[:, i, None] + torch.arange(patch.shape[1]) for i in (0, 1))
    canvas[torch.arange(len(patch))[:, None, None], rows[:, :, None], columns[:, None, :]] = patch
    return canvas


def toys(digits: Tensor, labels: Tensor, count: int, share: float, generator: torch.Generator) -> Toys:
    """Digits 2 and 8 at random places, a share of them with a mark that does not touch them: 2 a disc, 8 a square."""
    which = torch.randint(len(digits), (count,), generator=generator)
    large = F.interpolate(digits[which, None], size=(DIGIT, DIGIT), mode="bilinear")[:, 0]
    digit = place(large, torch.randint(CANVAS - DIGIT + 1, (count, 2), generator=generator))
    of_digit = digit > 0.25
    free = F.max_pool2d(of_digit[:, None].float(), MARK, stride=1).flatten(1) == 0
    corner = torch.multinomial(free.float(), 1, generator=generator)[:, 0]
    across = torch.arange(MARK) - MARK // 2
    disc = (across[:, None] ** 2 + across**2).sqrt() <= MARK / 2
    square = (across.abs() < MARK // 2) & (across.abs() < MARK // 2)[:, None]
    shape = torch.stack([disc, square])[labels[which]] & (torch.rand(count, 1, 1, generator=generator) < share)
    columns = CANVAS - MARK + 1
    of_mark = place(shape, torch.stack([corner // columns, corner % columns], 1))
    regions = torch.stack([of_digit, of_mark, ~(of_digit | of_mark)], 1)
    return Toys(torch.where(of_mark, 1.0, digit)[:, None], labels[which], regions)


def load(config: Config) -> tuple[Toys, Toys]:
    """Training images and test images, which are made of different digits."""
    generator = torch.Generator().manual_seed(config.seed)
    pixels, names = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    chosen = ((names == 2) | (names == 8)).nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    digits, labels = pixels[chosen].float().view(-1, 8, 8) / 16, (names[chosen] == 8).long()
    training = toys(digits[:250], labels[:250], IMAGES, SHARE, generator)
    return training, toys(digits[250:], labels[250:], config.test, 1.0, generator)


def batches(data: Toys, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images and their tags, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(data.image), (size,), generator=generator)
        yield data.image[index], data.take(index).tags()


def train(config: Config, data: Toys) -> Classifier:
    """Five convolutions and a fully connected layer."""
    shapes = ((1, 16, 2), (16, 32, 1), (32, 32, 2), (32, 32, 1), (32, 32, 1))
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1), nn.ReLU()) for a, b, stride in shapes]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    clf = Classifier(nn.Sequential(*layers), head).to(data.image.device)
    optimizer = torch.optim.Adam(clf.parameters(), lr=2e-3)
    draw = batches(data, BATCH, config.seed)
    for _ in tqdm(range(config.steps), desc=f"classifier, seed {config.seed}", unit="step"):
        image, tags = next(draw)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(clf(image), tags).backward()
        optimizer.step()
    return clf


def gradient(clf: Classifier, data: Toys, layer: int = LAYERS) -> Tensor:
    """Magnitude ``[N, H, W]`` of the gradient of a layer's summed output, or of the score of the class for the last."""
    image = data.image.clone().requires_grad_()
    output = clf(image).gather(1, data.label[:, None])
    if layer < LAYERS:
        output = nn.Sequential(*list(clf.get_submodule("features").children())[:layer])(image)
    return torch.autograd.grad(output.sum(), image)[0].abs()[:, 0]


def cams(clf: Classifier, data: Toys) -> Tensor:
    """Maps ``[N, h, w]`` of the class of each image."""
    return torch.cat(list(cam(clf, data.image, data.label[:, None].tolist(), norm="relu"))).detach()


def fine_tune(config: Config, clf: Classifier, data: Toys, companions: Toys) -> tuple[Tensor, Tensor, Tensor]:
    """RIB with global average pooling, as the dissertation measures it, and what it does not return.

    Maps ``[N, h, w]``, and before each step and after the last one the map ``[N, K + 1, h, w]`` and the gradient of the
    score ``[N, K + 1, H, W]``.
    """
    own, weights = copy.deepcopy(clf), list[dict[str, Tensor]]()

    def remember(features: nn.Module, inputs: tuple[Tensor]) -> None:
        # RIB runs the classifier, with weights of its own, once a step: companions of its size are in the same batch.
        weights.append({name: value.detach().clone() for name, value in clf.named_parameters()})

    handle = clf.get_submodule("features").register_forward_pre_hook(remember)
    maps, found = [], []
    for i in tqdm(range(len(data.image)), desc=f"RIB, seed {config.seed}", unit="image"):
        one, draw = data.take(slice(i, i + 1)), batches(companions, COMPANIONS, config.seed + i)
        (summed,) = rib(clf, one.image, one.tags(), companions=draw, steps=config.rib_steps, lr=RATE, pool="gap")
        maps.append(summed[data.label[i]])
        for state in weights:
            own.load_state_dict(state)
            found.append((cams(own, one)[0], gradient(own, one)[0]))
        weights.clear()
    handle.remove()
    at_k, gradients = (torch.stack(t).unflatten(0, (len(maps), -1)) for t in zip(*found, strict=True))
    return torch.stack(maps), at_k, gradients


def quality(maps: Tensor, data: Toys) -> float:
    """Best-threshold mIoU of maps of the own class ``[N, h, w]`` against digit and mark."""
    large = F.interpolate(max_normalize(maps[:, None]), size=(CANVAS, CANVAS), mode="bilinear")
    return best_threshold_miou(large, (~data.regions[:, 2]).long()).miou


class Outcome(NamedTuple):
    accuracy: float
    layers: Tensor  # [6, 3], high gradient ratios of layers and regions
    fixed: Tensor  # [K + 1, 3], of the score during RIB, over the maximum at k = 0
    moving: Tensor  # [K + 1, 3], over the maximum at each k
    miou: dict[str, float]


def experiment(config: Config) -> tuple[Outcome, Toys, Tensor]:
    """Also gives the test images and their maps at each k."""
    seed_everything(config.seed)
    training, test = (Toys(*(tensor.to(pick_device(config.device)) for tensor in data)) for data in load(config))
    clf = train(config, training)
    summed, at_k, gradients = fine_tune(config, clf, test, training)
    classes, draw = test.label[:, None].tolist(), batches(training, COMPANIONS, config.seed)
    gndrp = rib(clf, test.image, test.tags(), companions=draw, steps=config.rib_steps, lr=RATE, classes=classes)
    advcams = torch.cat(list(advcam(clf, test.image, classes)))
    maps = {"CAM": cams(clf, test), "AdvCAM": advcams, "RIB": summed, "RIB, GNDRP": torch.cat(list(gndrp))}

    def ratios(gradients: Iterable[Tensor], scale: Tensor | None = None) -> Tensor:
        every = [high_gradient_ratio(one, test.regions, scale=scale).nanmean(0) for one in gradients]
        return torch.stack(every).cpu()

    outcome = Outcome(
        (clf(test.image).argmax(1) == test.label).float().mean().item(),
        ratios(gradient(clf, test, layer) for layer in range(1, LAYERS + 1)),
        ratios(gradients.unbind(1), scale=gradients[:, 0].amax((1, 2))),
        ratios(gradients.unbind(1)),
        {name: quality(found, test) for name, found in maps.items()},
    )
    return outcome, test, at_k


def spread(values: list[float]) -> str:
    numbers = torch.tensor(values)
    return f"{numbers.mean():.3f}" + (f" ±{numbers.std():.3f}" if len(values) > 1 else "")


def table(outcomes: list[Outcome]) -> str:
    """High gradient ratios and quality of maps; means over runs, and standard deviations."""
    lines = [f"{'high gradient ratio':<24}" + "".join(f"{name:>14}" for name in REGIONS)]
    names = [*(f"layer {layer}" for layer in range(1, LAYERS)), "score", "after RIB", "after RIB, own scale"]
    runs = torch.stack([torch.cat([o.layers, o.fixed[-1:], o.moving[-1:]]) for o in outcomes], 2)  # [row, 3, run]
    for name, row in zip(names, runs.tolist(), strict=True):
        lines.append(f"{name:<24}" + "".join(f"{spread(cell):>14}" for cell in row))
    lines += ["", f"{'best-threshold mIoU':<24}"]
    lines += [f"{name:<24}{spread([o.miou[name] for o in outcomes]):>14}" for name in outcomes[0].miou]
    return "\n".join([*lines, f"{'accuracy':<24}{spread([o.accuracy for o in outcomes]):>14}"])


def claims(outcomes: list[Outcome]) -> str:
    """What the dissertation says of the experiment, each as a difference that is positive where it holds."""
    layers, fixed, moving = (torch.stack(values).unbind(2) for values in list(zip(*outcomes, strict=True))[1:4])
    (digit_falls, mark_falls), rises = (
        (-values.diff(dim=1) for values in layers[:2]),
        [f[:, -1] - f[:, 0] for f in fixed],
    )
    rows = {
        "mark falls from layer 1 to the score": mark_falls.sum(1),
        "mark falls from layer 5 to the score": mark_falls[:, -1],
        "... more than between other layers": mark_falls[:, -1] - mark_falls[:, :-1].amax(1),
        "... more than the digit": mark_falls[:, -1] - digit_falls[:, -1],
        "RIB raises the digit": rises[0],
        "RIB raises the mark": rises[1],
        "... more than the background": rises[1] - rises[2],
        "... with its scale at each k, too": moving[1][:, -1] - moving[1][:, 0],
    }
    for name in list(outcomes[0].miou)[1:]:
        rows[f"mIoU of {name} above CAM"] = torch.tensor([o.miou[name] - o.miou["CAM"] for o in outcomes])
    lines = [f"{'claim':<38}{'difference':>14}{'holds in':>14}"]
    for name, found in rows.items():
        lines.append(f"{name:<38}{spread(found.tolist()):>14}{int((found > 0).sum()):>9} of {len(found)}")
    return "\n".join([*lines, "RIB raises all gradients with the score: no rise shows a gain of information."])


def picture(outcomes: list[Outcome], data: Toys, cams: Tensor, path: Path, shown: int = 4) -> None:
    """Digits with their map at each k, on the scale of k = 0; below, ratios by layer and by k, means over runs."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 4), squeeze=False)[:, 0]
    grid = above.subplots(min(shown, len(data.image)), cams.shape[1] + 1, squeeze=False)
    for axes, image, maps in zip(grid, data.image[:, 0].cpu(), cams.cpu(), strict=False):
        axes[0].imshow(image, cmap="gray")
        for k, axis in enumerate(axes[1:]):
            axis.imshow(maps[k], vmin=0, vmax=max(1e-12, maps[0].max().item()), cmap="jet")
            axis.set_title(f"k = {k}")
        for axis in axes:
            axis.set(xticks=[], yticks=[])
    panels = below.subplots(1, 3, sharey=True)
    names = ("layer (6: the score)", "step k of RIB, scale of k = 0", "step k of RIB, scale of each k")
    for panel, name, curves in zip(panels, names, list(zip(*outcomes, strict=True))[1:4], strict=True):
        for region, values in zip(REGIONS, torch.stack(curves).mean(0).T, strict=True):
            panel.plot(torch.arange(len(values)) + int(panel is panels[0]), values, marker=".", label=region)
        panel.set(xlabel=name, ylim=(0, 1))
    panels[0].set_ylabel("high gradient ratio")
    panels[0].legend()
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    folder = output_folder(config.out)
    runs = [experiment(own) for own in each_run(config)]
    outcomes = [outcome for outcome, *_ in runs]
    print(table(outcomes), claims(outcomes), sep="\n\n")
    picture(outcomes, *runs[0][1:], folder / "bottleneck_toy.png")
    print(f"picture: {folder / 'bottleneck_toy.png'}")


if __name__ == "__main__":
    run(main, Config)
