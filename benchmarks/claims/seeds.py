"""Claim 7: FickleNet's layer covers more of objects; networks on few sure pixels gain by growing and boundaries.

The claims of Jungbeom Lee's dissertation, sections 2.3.2 and 3.2.1. FickleNet's layer is the last one of a pretrained
network whose last layers train with it; its maps are compared with CAMs of the network that trained as long with the
usual head. Light decoders on frozen features train on the sure pixels of CAM's and of AdvCAM's maps: on these alone,
with deep seeded region growing, constrained to boundaries, and with both (DSRG).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from data.sample import VOID, Batch, Images, Sample
from engine import training
from engine.per_image import each_image
from isl_fsl import Config, average
from parts import deeplab
from parts.localise import Method
from parts.settings import PHOTOGRAPHS
from parts.tag_classifier import Output, plain, present
from parts.tag_classifier import digest as digest_of_weights
from pseudo_labels import Relabelled, build_network
from torch import Tensor

import segloss
from benchmarks.claims import contours, maps, refinement, sizes
from benchmarks.claims.maps import Maker
from benchmarks.claims.refinement import TRUE, Refiner
from benchmarks.claims.shared import Outcome, Runs, Split, Verdict, Work, difference, digest, estimate, share
from segattr import StochasticConv2d
from segattr.ficklenet import stochastic_grad_cam
from segattr.networks import evaluating
from segattr.refine import dense_crf, grow_seeds

KERNEL, DROP, PASSES, THRESHOLD = 9, 0.9, 200, 0.35  # FickleNet's
FICKLE, WINDOW, CAM = "FickleNet", "window of 9 cells", "CAM"
HEADS: dict[str, float | None] = {CAM: None, WINDOW: 0.0, FICKLE: DROP}  # and the rates at which they hide units
LARGEST, MEAN = "largest of the passes", "mean of the passes"
STRIDE: Literal[16, 32] = 16  # of the maps
STEPS = 120  # of classifiers, eight epochs
RATES = (1e-4, 1e-3)  # of layers, and of a head, which may be a new one

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
SHRUNK = 4  # times, images for the CRF


def classifier(work: Work, head: str, seed: int) -> contours.Tail:
    """Trained on tags, with a head."""
    config, images, drop = config_of(work, seed), contours.kept(work), HEADS[head]
    start = maps.classifier(work, stride=STRIDE)
    model = contours.Tail(start, list(images.values()), work).eval()
    training.seed_everything(seed)
    if drop is not None:
        model.head = StochasticConv2d(start.head.in_channels, start.head.out_channels, KERNEL, drop)
    layers, own = model.layers.parameters(), model.head.parameters()
    groups = [{"params": values, "lr": rate} for values, rate in zip((layers, own), RATES, strict=True)]

    def loss(output: Output, batch: Batch) -> Tensor:
        return average(output[1], present(batch))

    training.train(
        model,
        loss,
        config.stream(images["fit"], config.fit(mirror=True)),
        torch.optim.AdamW(groups, weight_decay=1e-2),
        steps=STEPS,
        name=f"{head}, seed {seed}",
        options=config,
    )
    return model


def config_of(work: Work, seed: int) -> Config:
    preset = Config.PHOTOGRAPHS | {"steps": STEPS, "save_every": 20}
    config = Config(data="voc", root=work.data, seed=seed, resume=True, **preset)
    return dataclasses.replace(config, out=work.folder / f"fickle-{digest(plain(config))}")


def passes(model: contours.Tail) -> Callable[[Sample], dict[str, Tensor]]:
    """Work for each image: the largest and the mean of the maps of all passes, each over its maximum.

    For one class, the labels of :func:`segattr.ficklenet` are where the largest is above the threshold.
    """
    head = model.head
    assert isinstance(head, StochasticConv2d)

    def work(sample: Sample) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)  # a new one for each image: results depend on that alone
        with torch.no_grad(), evaluating(model):
            features, _ = model(sample["image"].as_subclass(Tensor)[None])
            weight = head.weight[sample["tags"][1:] > 0]
            found = [
                segloss.max_normalize(stochastic_grad_cam(features, weight, keep, drop=head.drop))[0]
                for keep in (head.draw(features, generator) for _ in range(PASSES if head.drop else 1))
            ]
        return {LARGEST: torch.stack(found).amax(0), MEAN: torch.stack(found).mean(0)}

    return work


def mapped(work: Work, head: str, seed: int) -> dict[str, Tensor]:
    """Counts on val of the masks of the best threshold, by the names of maps; FickleNet's at its own threshold, too."""

    def make() -> dict[str, Tensor]:
        images, model = contours.kept(work)["val"], classifier(work, head, seed)
        if head == CAM:
            return {CAM: maps.assess(maps.Mapped(images, model), [CAM])[CAM]}
        depends = {"weights": digest_of_weights(model), "passes": PASSES}
        folder = f"{head}-{digest(depends)}".replace(" ", "_")
        each_image(passes(model), images, work.folder / "maps" / folder, settings=depends, name=head)
        names = {head: LARGEST} | ({f"{head}, {MEAN}": MEAN} if head == FICKLE else {})
        located = Maker(work, maps.classifier(work)).located(
            {name: Method(folder, (kind,)) for name, kind in names.items()}, images
        )
        found = {name: maps.assess(located, [name])[name] for name in names}
        if head == FICKLE:
            found[f"{head} at {THRESHOLD}"] = maps.at_thresholds(located, {head: THRESHOLD})[head]
        return found

    settings = plain(config_of(work, seed)) | {"passes": PASSES, "rates": RATES}
    return work.once(f"{head}, stride {STRIDE}, seed {seed}", settings, make)


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
    """Counts on val of a network that was trained on the sure pixels of the images that have maps."""
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


def labels_of(work: Work) -> Labels:
    refiner = Refiner(Maker(work, maps.classifier(work)))
    maker = refiner.maker
    advcam, _ = maps.choose(maker, "AdvCAM", maps.ADVCAM)

    def methods(split: Split) -> dict[str, Method]:
        images = maps.photographs(work, split)
        return {name: maker.make(name, own, images) for name, own in zip(MAPS, ({}, advcam), strict=True)}

    thresholds = refinement.thresholds_of(refiner.measured("held out", methods("held out")))
    small = refinement.network_config(work, 0).whole(maps.mapped(work, "fit"))
    located = maker.located(methods("fit"), small)
    whole = {name: refinement.thresholded(located, name, thresholds[name]) for name in MAPS}
    whole[TRUE] = [small.labels(i).as_subclass(Tensor).byte() for i in range(len(small))]
    return Labels({name: sown(located, name, thresholds[name]) for name in MAPS}, whole)


def known(labels: list[Tensor]) -> float:
    """Share of the pixels that have a label, in percent."""
    return 100 * float((torch.stack(labels) != VOID).double().mean())


def run(work: Work) -> Outcome:
    seeds = range(work.seeds)
    made = [{name: own for head in HEADS for name, own in mapped(work, head, seed).items()} for seed in seeds]
    runs: dict[str, Runs] = {name: [own[name] for own in made] for name in made[0]}
    labels = labels_of(work)
    networks: dict[str, Runs] = {
        f"{name}, {kind}": [train(work, own, name, kind, seed) for seed in seeds]
        for name, own in labels.sure.items()
        for kind in TERMS
    }
    networks |= {
        name: [refinement.train_network_on(work, own, name, seed) for seed in seeds]
        for name, own in labels.whole.items()
    }
    figures = {name: estimate(own) for name, own in runs.items()}
    figures |= {f"network on {name}": estimate(own) for name, own in networks.items()}
    verdicts = [
        Verdict(f"maps of FickleNet are better than {words}", "", difference(runs[FICKLE], runs[other]), 0.0)
        for other, words in ((CAM, "CAM of a network with the usual head"), (WINDOW, "those without hidden units"))
    ]
    for name in MAPS:
        gains = (
            ("growing adds to seeds", f"{name}, {GROWN}", f"{name}, {ALONE}"),
            ("the constraint to boundaries adds to seeds", f"{name}, {CONSTRAINED}", f"{name}, {ALONE}"),
            ("a network with both is better than one on whole masks", f"{name}, {BOTH}", name),
        )
        verdicts += [
            Verdict(f"{words} of {name}", "", difference(networks[better], networks[other]), 0.0)
            for words, better, other in gains
        ]
    verdicts.append(
        Verdict(
            "with both, AdvCAM's seeds reach 90% of true masks",
            "",
            share(networks[f"AdvCAM, {BOTH}"], networks[TRUE]),
            90,
            unit="%",
        )
    )
    sure = " and ".join(f"{known(own):.0f}% of {name}" for name, own in labels.sure.items())
    about = (
        f"{len(runs[CAM][0])} images, {work.repeats}; classifiers with maps of stride {STRIDE}, {STEPS} steps; "
        f"networks on {len(labels.whole[TRUE])} images, {refinement.SMALL} pixels, {refinement.STEPS} steps; "
        f"pixels that are seeds: {sure}"
    )
    return Outcome(figures, verdicts, about)
