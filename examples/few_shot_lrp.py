"""Few pixel labels, many tags: classifiers trained through their heatmaps against U-Nets and their kin.

For VOC, ``--data voc --train-split trainaug --network resnet50`` is close to the paper, in steps that are a guess.

``--quick`` shows that all of it runs on photographs, not what it reaches there: its steps are too few for any of the
networks.
"""

import copy
import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data.sample import VOID, Batch, Images, Sample, complete, first
from data.source import Options
from data.stream import Whole
from engine import training
from engine.command import check_least, each_run, run
from engine.processes import pick_device, rank, say, total
from matplotlib import colormaps
from matplotlib.figure import Figure
from parts import pretrained, torchvision_cpu  # noqa: F401  (before torchvision)
from parts.frozen import Kept
from parts.report import draw_rows
from torch import Tensor, nn
from torchvision import models, tv_tensors

from segattr.lrp import HeatmapLoss, labelled_subset, unroll
from segattr.networks import evaluating


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Trains a classifier on tags, then segmentation networks made from it on few masks; prints mIoU and F1."""

    PHOTOGRAPHS: ClassVar[dict[str, Any]] = {
        "network": "efficientnet_lite0",
        "weights": "imagenet",
        "size": 256,
        "labelled": (1, 5, 25, 0),
        "pretrain_steps": 5000,
        "steps": 10000,
    }
    QUICK: ClassVar[dict[str, Any]] = {
        "size": 96,
        "labelled": (5,),
        "batch_size": 8,
        "pretrain_steps": 60,
        "steps": 60,
        "rule": "epsilon_plus",
        "pretrained_rate": 1e-4,
    }

    labelled: tuple[int, ...] = (1,)
    """Images with masks per class, one column of the tables each; 0 for all images. The paper has 1 5 25 0."""
    network: Literal["small", "small_resnet", pretrained.Name] = "small"
    """Classifier: a small VGG or ResNet, or for photographs a network that can start from ImageNet."""
    weights: str = "none"
    """Where a network that is not small starts: imagenet, or the path of a state dict; those of efficientnet_lite0 are
    a package, others are downloaded."""
    rule: Literal["zero", "epsilon_plus"] = "zero"
    """Rule of unrolled LRP: zero, which is the paper's; or epsilon_plus, whose heatmaps are smooth."""
    rate: float = 1e-3
    """Learning rate of new weights."""
    pretrained_rate: float = 1e-5
    """Learning rate of weights of ImageNet."""
    pretrain_steps: int = 1000
    """Optimizer steps of the classifier, on tags."""
    steps: int = 250
    """Optimizer steps of each segmentation network."""
    repeats: int = 1
    """Number of runs; their seeds count up from --seed, and the tables show mean and standard deviation."""
    scenes: int = 3000
    """Number of training scenes, for scenes."""
    batch_size: int = 10
    """Images of an optimizer step, of all processes together; half of them have masks."""
    out: Path = Path("runs/few_shot_lrp")
    """Folder of the pictures and of the checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, pretrain_steps=0, steps=1, repeats=1, rate=0, pretrained_rate=0)
        if not self.labelled or min(self.labelled) < 0:
            raise ValueError(f"--labelled: expected numbers of at least 0, got {self.labelled}")
        if self.network.startswith("small") and self.weights not in ("none", "imagenet"):
            raise ValueError(f"--weights: expected another --network with {self.weights}, got {self.network}")

    def whole(self, images: Images) -> Images:
        """Images as the networks see them, in memory with --quick."""
        fitted = Whole(images, self.fit())
        return Kept(fitted) if self.quick else fitted

    @property
    def pretrained(self) -> bool:
        """Whether the classifier starts with features, whose statistics stay and which learn more slowly."""
        return not self.network.startswith("small") and self.weights != "none"


class Method(NamedTuple):
    options: dict[str, Any]  # of unroll
    tags: bool  # trained on images without masks, too


FREE: dict[str, Any] = {"weights": "free", "upsampling": "nearest"}
METHODS = {
    "unrolled LRP": Method({}, tags=True),
    "WS-AE": Method({"activations": "relu"}, tags=True),
    "FCN": Method(FREE, tags=False),
    "U-Net": Method(FREE | {"skip": "concat"}, tags=False),
    "multi-task U-Net": Method(FREE | {"skip": "concat"}, tags=True),
}
TAGS_WEIGHT = 10.0  # of the loss of the tags: that of the authors' code, where with 1 the F1 score falls more
SHOWN = 5


class Normalised(nn.Module):
    """A network for images in [0, 1] from one that wants their mean and deviation to be 0 and 1.

    Args:
        network: for normalised images.
        mean: of the images, by channel.
        deviation: of the images, by channel.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, image: Tensor) -> Any:
        return self.network((image - self.mean) / self.deviation)

    def made_of(self, network: nn.Module) -> "Normalised":
        """Another network for the same images."""
        return Normalised(network, self.mean, self.deviation)


class Maps(nn.Module):
    """What of a network's scores and maps is the segmentation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)[1]


def classifier(config: Config, classes: int) -> Normalised:
    if not config.network.startswith("small"):
        whole = pretrained.pretrained(config.network, config.weights).tag_classifier(classes)  # type: ignore[arg-type]
        whole.features.train(not config.pretrained)  # statistics that are there stay
        return Normalised(nn.Sequential(whole.features, whole.head), whole.mean, whole.deviation)
    if config.network == "small_resnet":
        network = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        network.fc = nn.Linear(512, classes)
    else:
        features = models.vgg.make_layers([16, 16, "M", 32, 32, "M", 64, 64, "M", 128, 128], batch_norm=True)
        network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (pretrained.MEAN, pretrained.DEVIATION))
    return Normalised(network, mean, deviation)


def optimizer(model: Normalised, encoder: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW. Features of the encoder, which is a part of the model, learn more slowly where they are pretrained."""
    known = [*encoder[0].parameters()] if config.pretrained else []  # type: ignore[index]
    ours = {*known}
    new = [p for p in model.parameters() if p.requires_grad and p not in ours]
    groups = [{"params": new, "lr": config.rate}, *([{"params": known, "lr": config.pretrained_rate}] if known else [])]
    return torch.optim.AdamW(groups)


class FewMasks(Images):
    """Images of which only some have masks; each epoch has as many of these as of the others.

    Args:
        images: all of them.
        masked: those that have masks.
        others: whether there are others.
    """

    def __init__(self, images: Images, masked: list[int], *, others: bool) -> None:
        self._images, self._masked = images, set(masked)
        rest = [i for i in range(len(images)) if i not in self._masked] if others else []
        self._index = rest + [masked[i % len(masked)] for i in range(max(len(rest), len(masked)))]
        self.names, self.classes = [images.names[i] for i in self._index], images.classes

    def __getitem__(self, index: int) -> Sample:
        sample = self._images[self._index[index]]
        shown = torch.full(sample["labels"].shape, self._index[index] in self._masked)
        return sample | {"shown": tv_tensors.Mask(shown)}


@dataclasses.dataclass(frozen=True)
class Hide:
    """Augments, takes the tags from the mask, and then hides the masks of images that have none."""

    augment: Any
    classes: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        sample = complete(self.augment(sample, rng), self.classes)
        shown = sample.pop("shown", None)
        if shown is not None:
            sample["labels"] = tv_tensors.Mask(torch.where(shown.as_subclass(Tensor), sample["labels"], VOID))
        return sample


@torch.no_grad()
def f1(model: nn.Module, data: Images, config: Config) -> float:
    """F1 score of the tags of the foreground, mean over the classes; a tag is predicted where its score is above 0.

    Args:
        model: a classifier.
        data: the images.
        config: of the command line.
    """
    counts = torch.zeros(2, len(data.classes), device=next(model.parameters()).device)
    with evaluating(model):
        for batch in training.share(data, config.fit(), 50, config.workers):
            found = model(batch["image"].to(counts.device)) > 0
            tags = batch["tags"].to(counts.device).bool()
            counts += torch.stack([2 * (found & tags).sum(0), found.sum(0) + tags.sum(0)])
    hits, both = total(counts)[:, 1:]
    return float((hits / both.clamp(min=1)).mean())


class Looks:
    """What a network makes of some images, over its training: labels ``[n, H, W]`` and heatmaps ``[n, K, H, W]``.

    Checkpoints hold them: the picture of a training that was stopped has those from before.
    """

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"shown": self.shown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shown = state["shown"]


class Outcome(NamedTuple):
    iou: float
    f1: float
    shown: list[tuple[Tensor, Tensor]]  # see Looks


def pretrain(config: Config, images: Images) -> Normalised:
    """A classifier trained on tags; the background, which is everywhere, has no weight."""
    model = classifier(config, len(images.classes)).to(pick_device(config.device))
    training.train(
        model,
        lambda scores, batch: F.binary_cross_entropy_with_logits(scores[:, 1:], batch["tags"][:, 1:].to(scores.dtype)),
        config.stream(images, Hide(config.fit(mirror=True), len(images.classes))),
        optimizer(model, model.network, config),
        steps=config.pretrain_steps,
        name=f"classifier, seed {config.seed}",
        options=config,
    )
    return model


@torch.no_grad()
def map_scale(model: nn.Module, images: Images, options: Mapping[str, Any]) -> float | Literal["pixels"]:
    """What makes the maps of a network comparable to scores.

    Those of free decoders are. Relevances of pixels are shares of a score under LRP-0. Under other rules only a part of
    the score arrives, the same of all classes: of EfficientNet-Lite0 2e-4 with ``epsilon_plus``, the rest being its
    biases' and saturated activations'. From WS-AE, whose decoder has activations of its own, more comes than the score.

    Args:
        model: an unrolled classifier.
        images: some of them show which part.
        options: of :func:`segattr.lrp.unroll`.
    """
    if "weights" in options:
        return 1.0
    if options.get("rule", "zero") == "zero" and "activations" not in options:
        return "pixels"
    image = first(images, SHOWN)["image"].to(next(model.parameters()).device)
    with evaluating(model):
        scores, heat = model(image)
    return heat[0, 0].numel() * float(scores.abs().sum() / heat.sum((2, 3)).abs().sum())


def experiment(
    config: Config, name: str, per_class: int, start: Normalised, images: Images, tags: Tensor, test: Images
) -> Outcome:
    """Trains one network, made from the classifier, with some masks.

    Args:
        config: of the command line.
        name: of the method.
        per_class: images with masks.
        start: the classifier.
        images: to train on.
        tags: of the masks of these images, ``[N, K]``.
        test: to evaluate on.
    """
    method, count = METHODS[name], min(per_class * (len(images.classes) - 1), len(images)) or len(images)
    device, generator = pick_device(config.device), torch.Generator().manual_seed(config.seed)
    masked = labelled_subset(tags[:, 1:], count, generator=generator).tolist()
    looked_at = first(test, SHOWN)
    image = looked_at["image"].to(device)
    encoder = copy.deepcopy(start.network)
    options = method.options | ({"rule": config.rule} if name == "unrolled LRP" else {})
    model = start.made_of(unroll(encoder, example=image, **options)).to(device)
    heatmap_loss = HeatmapLoss(scale=map_scale(model, images, options), weight=TAGS_WEIGHT * method.tags)
    looks = Looks()

    def loss(output: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        return heatmap_loss(output[1], output[0], batch["labels"], batch["tags"])

    def evaluate(model: nn.Module) -> Tensor:
        look(model)
        return training.evaluate(Maps(model), test, augment=config.fit(), workers=config.workers)

    def look(model: nn.Module) -> None:
        with torch.no_grad(), evaluating(model):
            heat = model(image)[1].cpu()
        looks.shown.append((heat.argmax(1).where(looked_at["valid"], VOID), heat))

    look(model)
    progress = training.train(
        model,
        loss,
        config.stream(FewMasks(images, masked, others=method.tags), Hide(config.fit(mirror=True), len(images.classes))),
        optimizer(model, encoder, config),
        steps=config.steps,
        name=f"{name}, {per_class or 'all'}, seed {config.seed}",
        options=config,
        evaluate=evaluate,
        evaluations=3,
        further={"looks": looks},
    )
    return Outcome(progress.curve[-1][1], f1(start.made_of(encoder), test, config), looks.shown)


def table(outcomes: dict[tuple[str, int], list[Outcome]], config: Config, before: list[float]) -> str:
    """mIoU and F1 by method and number of masks; means over runs, and standard deviations."""
    lines = []
    for measure in ("iou", "f1"):
        title = "mIoU" if measure == "iou" else f"F1 (classifier: {statistics.mean(before):.3f})"
        columns = [f"{per_class or 'all'} per class" if per_class else "all" for per_class in config.labelled]
        lines.append(f"{title:<26}" + "".join(f"{column:>16}" for column in columns))
        for name, method in METHODS.items():
            if measure == "f1" and not method.tags:
                continue
            cells = []
            for per_class in config.labelled:
                values = [getattr(outcome, measure) for outcome in outcomes[name, per_class]]
                spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            lines.append(f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def picture(shown: Batch, outcomes: dict[str, Outcome], path: Path) -> None:
    """Segmentations of all methods, and how that of unrolled LRP came about, with the heatmap of a class shown."""
    rows = {"image": shown["image"].movedim(1, -1), "truth": shown["labels"]}
    present = shown["tags"][:, 1:].argmax(1) + 1
    for i, (labels, heat) in enumerate(outcomes["unrolled LRP"].shown):
        own = torch.stack(
            [maps[c] / maps[c].abs().max().clamp(min=1e-12) for maps, c in zip(heat, present, strict=True)]
        )
        rows[f"heat {i}"] = torch.from_numpy(colormaps["RdBu_r"](0.5 + own.numpy() / 2)[..., :3])
        rows[f"LRP {i}"] = labels
    others = {name: outcome for name, outcome in outcomes.items() if name != "unrolled LRP"}
    rows |= {name.replace(" ", "\n"): outcome.shown[-1][0] for name, outcome in others.items()}
    figure = Figure(figsize=(7, 1.3 * len(rows)), layout="constrained")
    draw_rows(figure, rows)
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    folder = training.start(config)
    test = config.whole(config.images("evaluate"))
    outcomes: dict[tuple[str, int], list[Outcome]] = {}
    before = []
    for own in each_run(config):
        training.seed_everything(own.seed)
        images = own.images("train")
        tags = images.sizes() > 0
        images = own.whole(images)
        start = pretrain(own, images)
        before.append(f1(start, test, config))
        for per_class in config.labelled:
            for name in METHODS:
                outcome = experiment(own, name, per_class, start, images, tags, test)
                outcomes.setdefault((name, per_class), []).append(outcome)
    say(table(outcomes, config, before))
    if rank() == 0:
        shown = {name: outcomes[name, config.labelled[0]][0] for name in METHODS}
        picture(first(test, SHOWN), shown, folder / "few_shot_lrp.png")
    say(f"picture: {folder / 'few_shot_lrp.png'}")


if __name__ == "__main__":
    run(main, Config)
