"""Claim 7: FickleNet's layer covers more of objects; networks on few sure pixels gain by growing and boundaries.

The claims of Jungbeom Lee's dissertation, sections 2.3.2 and 3.2.1. FickleNet's layer takes the place of the head of a
pretrained network, on whose last features it trains; its maps are compared with CAMs of the usual head. Light decoders
on frozen features train on the sure pixels of CAM's and of AdvCAM's maps: on these alone, with deep seeded region
growing, constrained to boundaries, and with both (DSRG).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from data.sample import VOID, Batch, Images, Sample
from data.stream import Whole
from engine import training
from engine.per_image import each_image, read
from isl_fsl import Config, average
from parts import deeplab
from parts.localise import Method
from parts.settings import PHOTOGRAPHS
from parts.tag_classifier import TagClassifier, plain, present
from parts.tag_classifier import digest as digest_of_weights
from pseudo_labels import Relabelled, build_network
from torch import Tensor

import segloss
from benchmarks.claims import maps, refinement, sizes
from benchmarks.claims.maps import Maker
from benchmarks.claims.refinement import TRUE, Refiner
from benchmarks.claims.shared import Measure, Outcome, Runs, Split, Verdict, Work, difference, digest, estimate, share
from segattr import StochasticConv2d
from segattr.ficklenet import stochastic_grad_cam
from segattr.networks import evaluating
from segattr.refine import dense_crf, grow_seeds

DROP, PASSES, THRESHOLD = 0.9, 200, 0.35  # FickleNet's
STRIDE: Literal[16, 32] = 16  # of the maps
KERNEL = 5  # 80 pixels; FickleNet's 9 cells of its stride, 8, are 72
FICKLE, WINDOW, CAM = "FickleNet", "no unit hidden", "CAM"
HEADS = {WINDOW: 0.0, FICKLE: DROP}  # rates at which layers hide units
LARGEST, MEAN = "largest of the passes", "mean of the passes"
STEPS = 150  # of these layers, ten epochs

MAPS = ("CAM", "AdvCAM")


class Terms(NamedTuple):
    """What a network trains with beside the seeds."""

    grow: bool
    constrain: bool


ALONE, GROWN, CONSTRAINED, BOTH = "seeds", "growing", "constrained", "growing, constrained"
TERMS = {
    ALONE: Terms(False, False),
    GROWN: Terms(True, False),
    CONSTRAINED: Terms(False, True),
    BOTH: Terms(True, True),
}
BALANCED = "balanced"  # the loss of seeds, which counts background and objects alike, on all pixels
SHRUNK = 4  # times, images for the CRF


def config_of(work: Work, seed: int) -> Config:
    preset = Config.PHOTOGRAPHS | {"steps": STEPS, "save_every": 50}
    config = Config(data="voc", root=work.data, seed=seed, resume=True, **preset)
    return dataclasses.replace(config, out=work.folder / f"fickle-{digest(plain(config))}")


class Features(Images):
    """The last features of images in place of these, made once; they stay in memory.

    Args:
        work: has the folder of the features.
        split: of the images.
        model: whose features they are.
    """

    def __init__(self, work: Work, split: Split, model: TagClassifier) -> None:
        images, folder = Whole(work.part(split), config_of(work, 0).fit()), work.folder / f"last-{STRIDE}"
        self.names, self.classes = images.names, images.classes

        def one(sample: Sample) -> dict[str, Tensor]:
            with torch.no_grad(), evaluating(model):
                features, _ = model(sample["image"].as_subclass(Tensor)[None])
            return {"features": features[0].half(), "tags": sample["tags"]}

        each_image(one, images, folder, settings={"weights": digest_of_weights(model)}, name="features")
        self._found = [read(folder, name) for name in self.names]

    def __getitem__(self, index: int) -> Sample:
        found = self._found[index]
        return {"image": found["features"].float(), "tags": found["tags"]}


def layer(work: Work, name: str, seed: int, images: Images) -> StochasticConv2d:
    """Trained on the features of images."""
    config, (_, channels, *_) = config_of(work, seed), images[0]["image"][None].shape
    training.seed_everything(seed)
    model = StochasticConv2d(channels, len(images.classes) - 1, KERNEL, HEADS[name])

    def loss(scores: Tensor, batch: Batch) -> Tensor:
        return average(scores, present(batch))

    training.train(
        model,
        loss,
        config.stream(images),
        torch.optim.AdamW(model.parameters(), PHOTOGRAPHS.rates[0], weight_decay=1e-2),
        steps=STEPS,
        name=f"{name}, seed {seed}",
        options=config,
    )
    return model


def passes(head: StochasticConv2d) -> Callable[[Sample], dict[str, Tensor]]:
    """Work for the features of each image: the largest and the mean of the maps of all passes, each over its maximum.

    For one class, the labels of :func:`segattr.ficklenet` are where the largest is above the threshold.
    """

    @torch.no_grad()
    def work(sample: Sample) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)  # a new one for each image: results depend on that alone
        features, weight = sample["image"][None], head.weight[sample["tags"][1:] > 0]
        found = []
        for _ in range(PASSES if head.drop else 1):
            keep = head.draw(features, generator)
            found.append(segloss.max_normalize(stochastic_grad_cam(features, weight, keep, drop=head.drop))[0])
        return {LARGEST: torch.stack(found).amax(0), MEAN: torch.stack(found).mean(0)}

    return work


def mapped(work: Work, seed: int) -> dict[str, Tensor]:
    """Counts on val of the masks of the best threshold, by the names of maps; FickleNet's at its own threshold, too."""

    def make() -> dict[str, Tensor]:
        model, images = maps.classifier(work, stride=STRIDE), maps.photographs(work, "val")
        fit, val = (Features(work, split, model) for split in ("fit", "val"))
        methods = {}
        for name in HEADS:
            head = layer(work, name, seed, fit)
            depends = {"weights": digest_of_weights(head), "passes": PASSES}
            folder = f"{name}-{digest(depends)}".replace(" ", "_")
            each_image(passes(head), val, work.folder / "maps" / folder, settings=depends, name=name)
            methods[name] = Method(folder, (LARGEST,))
        methods[f"{FICKLE}, {MEAN}"] = methods[FICKLE]._replace(maps=(MEAN,))
        located = Maker(work, model).located(methods, images)
        found = {name: own for name, own in maps.assess(located, [*methods]).items() if name in methods}
        found[f"{FICKLE} at {THRESHOLD}"] = maps.at_thresholds(located, {FICKLE: THRESHOLD})[FICKLE]
        return found | {CAM: maps.variant(work, maps.config_of(work).size, STRIDE)[CAM]}

    settings = plain(config_of(work, seed)) | {"passes": PASSES, "kernel": KERNEL, "stride": STRIDE}
    return work.once(f"FickleNet, seed {seed}", settings, make)


def sown(images: Images, name: str, threshold: float) -> list[Tensor]:
    """Labels of the pixels that maps are sure of: scores below half of the threshold, or above midway from it to 1."""
    found = []
    for i in range(len(images)):
        score, best = images[i][name].max(0)
        labels = torch.where(score > (1 + threshold) / 2, best + 1, VOID)
        found.append(labels.masked_fill(score < threshold / 2, 0).byte())
    return found


def loss_of(terms: Terms) -> training.Loss:
    def loss(logits: Tensor, batch: Batch) -> Tensor:
        tags = batch["tags"][:, :, None, None]
        labels = batch["labels"]
        if terms.grow:
            labels = grow_seeds(labels, logits.detach().softmax(1) * tags).where(batch["valid"], VOID)
        classes = torch.arange(logits.shape[1]).view(-1, 1, 1)
        value = segloss.balanced_seeding(logits, labels[:, None] == classes)
        if terms.constrain:
            small, image = F.avg_pool2d(logits, SHRUNK), F.avg_pool2d(batch["image"], SHRUNK)
            widths = {name: width * image.shape[-1] for name, width in PHOTOGRAPHS.crf_widths.items()}
            settings: dict[str, Any] = PHOTOGRAPHS.crf | widths
            refined = dense_crf(small.detach().softmax(1) * tags, image, method="lattice", **settings)
            value = value + segloss.boundary_constraint(small, refined, clip=(0.05, 20))
        return value

    return loss


def train(work: Work, labels: list[Tensor], name: str, kind: str, seed: int) -> Tensor:
    """Counts on val of a network that was trained on labels, such as seeds, of the images that have maps."""
    config = refinement.on_labels(refinement.network_config(work, seed), labels)

    def make() -> dict[str, Tensor]:
        fit, val = (config.whole(maps.mapped(work, split)) for split in ("fit", "val"))
        training.seed_everything(seed)
        model = build_network([fit, val], work.folder, config)
        training.train(
            model,
            loss_of(TERMS[kind]),
            config.stream(Relabelled(fit, labels), config.fit(mirror=True)),
            deeplab.optimizer(model, config.weights),
            steps=config.steps,
            name=f"{kind} of {name}, seed {seed}",
            options=config,
        )
        return {"val": sizes.assess(model, val)}

    settings = plain(config) | {"labels": refinement.content(labels), "terms": TERMS[kind], "shrunk": SHRUNK}
    return work.once(f"network on seeds of {name}, {kind}, seed {seed}", settings, make)["val"]


class Labels(NamedTuple):
    """Of the training images that have maps, by the names of maps."""

    sure: dict[str, list[Tensor]]  # of the pixels that maps are sure of
    whole: dict[str, list[Tensor]]  # of all pixels, and the true ones
    walked: str  # name of the better walked maps of all


def labels_of(work: Work) -> Labels:
    refiner = Refiner(Maker(work, maps.classifier(work)))
    maker, refined = refiner.maker, refinement.refined(refiner)
    advcam, _ = maps.choose(maker, "AdvCAM", maps.ADVCAM)

    def methods(split: Split) -> dict[str, Method]:
        images = maps.photographs(work, split)
        return {name: maker.make(name, own, images) for name, own in zip(MAPS, ({}, advcam), strict=True)}

    thresholds = refinement.thresholds_of(refiner.measured("held out", methods("held out")))
    small = refinement.network_config(work, 0).whole(maps.mapped(work, "fit"))
    located = maker.located(methods("fit"), small)
    sure = {name: sown(located, name, thresholds[name]) for name in MAPS}
    return Labels(sure, {name: refined.labels[name] for name in (*MAPS, refined.best, TRUE)}, refined.best)


def known(labels: list[Tensor]) -> float:
    """Share of the pixels that have a label, in percent."""
    return 100 * float((torch.stack(labels) != VOID).double().mean())


def run(work: Work) -> Outcome:
    seeds = range(work.seeds)
    made = [mapped(work, seed) for seed in seeds]
    runs: dict[str, Runs] = {name: [own[name] for own in made] for name in made[0]}
    labels = labels_of(work)
    networks: dict[str, Runs] = {
        f"{name}, {kind}": [train(work, own, name, kind, seed) for seed in seeds]
        for name, own in labels.sure.items()
        for kind in TERMS
    }
    for name, own in labels.whole.items():
        networks[name] = [refinement.train_network_on(work, own, name, seed) for seed in seeds]
        networks[f"{name}, {BALANCED}"] = [train(work, own, name, ALONE, seed) for seed in seeds]
    measures: tuple[Measure, ...] = ("mIoU", "F")
    figures = {f"{name}, {measure}": estimate(own, measure) for measure in measures for name, own in runs.items()}
    figures |= {f"network on {name}": estimate(own) for name, own in networks.items()}
    kinds: tuple[tuple[str, str, Measure], ...] = (
        (CAM, "CAM of the usual head", "mIoU"),
        (CAM, "CAM of the usual head, by F", "F"),
        (WINDOW, "those of the layer without hidden units", "mIoU"),
    )
    verdicts = [
        Verdict(f"maps of FickleNet are better than {words}", "", difference(runs[FICKLE], runs[other], measure), 0.0)
        for other, words, measure in kinds
    ]
    for name in MAPS:
        balanced = f"{name}, {BALANCED}"
        gains = (
            ("growing adds to seeds", f"{name}, {GROWN}", f"{name}, {ALONE}"),
            ("the constraint to boundaries adds to seeds", f"{name}, {CONSTRAINED}", f"{name}, {ALONE}"),
            ("a network with both is better than one on whole masks", f"{name}, {BOTH}", name),
            ("a network with both is better than one with the same loss on whole masks", f"{name}, {BOTH}", balanced),
        )
        verdicts += [
            Verdict(f"{words} of {name}", "", difference(networks[better], networks[other]), 0.0)
            for words, better, other in gains
        ]
    best = max((TRUE, f"{TRUE}, {BALANCED}"), key=lambda name: figures[f"network on {name}"].value)
    verdicts += [
        Verdict(f"{words} reaches 90% of one on true masks", "", share(networks[name], networks[best]), 90, unit="%")
        for words, name in (
            ("a network with both on AdvCAM's seeds", f"AdvCAM, {BOTH}"),
            (f"a network with the same loss on masks of {labels.walked}", f"{labels.walked}, {BALANCED}"),
        )
    ]
    sure = " and ".join(f"{known(own):.0f}% of {name}" for name, own in labels.sure.items())
    about = (
        f"{len(runs[CAM][0])} images, {work.repeats}; maps of stride {STRIDE}, layers of {KERNEL} cells, "
        f"{STEPS} steps; networks on {len(labels.whole[TRUE])} images, {refinement.SMALL} pixels, "
        f"{refinement.NETWORK_STEPS} steps; pixels that are seeds: {sure}"
    )
    return Outcome(figures, verdicts, about)
