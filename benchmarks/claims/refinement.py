"""Claim 3: walks and a dense CRF make better masks of maps, and better masks better networks.

The claims of Jungbeom Lee's dissertation, tables 3.2 to 3.4, with AffinityNet and IRNet as light decoders on frozen
features, trained on the sure pixels of AdvCAM's maps.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from data.sample import Images, Sample
from engine import training
from engine.per_image import each_image
from parts import deeplab
from parts.frozen import Kept, freeze
from parts.localise import WALKED, Method, scaled, walk
from parts.pretrained import Segmenter
from parts.tag_classifier import plain
from pseudo_labels import CRF_MASKS, LABELS, Config, Relabelled, Stored, refine, train_network
from torch import Tensor, nn

import segloss
from benchmarks.claims import maps, pictures, sizes
from benchmarks.claims.maps import Maker
from benchmarks.claims.shared import (
    NETWORK,
    Outcome,
    Runs,
    Split,
    Verdict,
    Work,
    best_threshold,
    counts,
    difference,
    digest,
    estimate,
    share,
)
from segattr.networks import evaluating
from segattr.refine import random_walk

MAPS = "AdvCAM"
WALKED_MAPS = MAPS + WALKED
# Of the walk over the features of the network as it is, and the scale of its image; the first ones are the examples'.
WALKS: tuple[dict[str, Any], ...] = (
    {"beta": 10.0, "steps": 256, "scale": 1.0},
    {"beta": 10.0, "steps": 64, "scale": 1.0},
    {"beta": 20.0, "steps": 256, "scale": 1.0},
    {"beta": 10.0, "steps": 256, "scale": 1.5},
    {"beta": 10.0, "steps": 1024, "scale": 2.0},
)
WALK_STEPS = (4, 16, 64, 256)  # of the walks over learned affinities; the last one is the papers'
FINEST = 8  # stride of what AffinityNet and IRNet give
RADIUS = 5
SMALL = 160  # pixels of the images that segmentation networks train on
AFFINITY_STEPS, NETWORK_STEPS = 200, 300
SPLITS: tuple[Split, ...] = ("held out", "val", "fit")


class Affinity(NamedTuple):
    """A network that tells which pixels belong together.

    Attributes:
        channels: of its output.
        loss: of its output and the labels, at the same resolution.
        matrix: affinities, from its output.
        beta: power of these in the walk.
    """

    channels: int
    loss: Callable[[Tensor, Tensor], Tensor]
    matrix: Callable[[Tensor], Tensor]
    beta: float


AFFINITIES = {
    "AffinityNet": Affinity(
        32,
        partial(segloss.affinity_loss, radius=RADIUS, distance="mean"),
        partial(segloss.feature_affinity, radius=RADIUS, distance="mean"),
        beta=8,
    ),
    "IRNet": Affinity(
        1,
        partial(segloss.path_affinity_loss, radius=RADIUS),
        lambda output: segloss.path_affinity(output.sigmoid(), radius=RADIUS),
        beta=10,
    ),
}


@dataclasses.dataclass(frozen=True)
class Refiner:
    """AdvCAM's maps, and what walks and a CRF make of them; every result is kept on disk.

    Args:
        maker: of the maps.
    """

    maker: Maker
    _networks: dict[str, "Neighbours"] = dataclasses.field(default_factory=dict)

    @property
    def work(self) -> Work:
        return self.maker.work

    def methods(self, split: Split, settings: Mapping[str, Any]) -> dict[str, Method]:
        """CAM and AdvCAM with the settings chosen for claim 2, and AdvCAM after a walk over the network's features."""
        images, model = maps.photographs(self.work, split), self.maker.model
        advcam, _ = maps.choose(self.maker, MAPS, maps.ADVCAM)
        found = {"CAM": self.maker.make("CAM", {}, images), MAPS: self.maker.make(MAPS, advcam, images)}

        def one(sample: Sample) -> dict[str, Tensor]:
            own, image = model.settings, sample["image"].as_subclass(Tensor)[None]
            image = F.interpolate(image, scale_factor=settings["scale"], mode="bilinear")
            model.settings = own._replace(walk={name: settings[name] for name in ("beta", "steps")})
            walked = walk(tagged(sample), image, model)
            model.settings = own
            return {WALKED_MAPS: scaled(walked)}

        return found | {WALKED_MAPS: self._kept(one, WALKED_MAPS, found[MAPS], images, {"walk": dict(settings)})}

    def _kept(
        self,
        one: Callable[[Sample], dict[str, Tensor]],
        name: str,
        source: Method,
        images: Images,
        settings: Mapping[str, Any],
    ) -> Method:
        depends = {"source": source.classifier, "settings": dict(settings)}
        folder = f"{name}-{digest(depends)}".replace(" ", "_")
        located = self.maker.located({MAPS: source}, images)
        each_image(one, located, self.work.folder / "maps" / folder, settings=depends, name=name)
        return Method(folder, (name,))

    def chosen_walk(self) -> dict[str, Any]:
        """That of the best mIoU on images held out."""
        found = []
        for settings in WALKS:
            made = self.measured("held out", self.methods("held out", settings))
            found.append(best_threshold(made[f"sweep, {WALKED_MAPS}"]).miou)
            print(f"{WALKED_MAPS}, {maps.told(settings)}: {100 * found[-1]:.1f}", flush=True)
        return WALKS[found.index(max(found))]

    def measured(self, split: Split, methods: Mapping[str, Method]) -> dict[str, Tensor]:
        """What :func:`benchmarks.claims.maps.assess` finds."""
        images = self.maker.located(methods, maps.photographs(self.work, split))
        folders = sorted(method.classifier for method in methods.values())
        return self.work.once(
            f"refined maps of {split}", {"folders": folders}, partial(maps.assess, images, [*methods])
        )

    def masks(self, split: Split, methods: Mapping[str, Method], thresholds: Mapping[str, float], size: int) -> Stored:
        """Images of a size with the masks that the CRF makes of maps, and pseudo-labels; names have these endings."""
        config = dataclasses.replace(maps.config_of(self.work), size=size)
        images = config.whole(maps.mapped(self.work, split))
        located = self.maker.located({name: methods[name] for name in thresholds}, images)
        depends = {"from": {name: (methods[name].classifier, thresholds[name]) for name in thresholds}, "size": size}
        folder = self.work.folder / "masks" / digest(depends)
        one = partial(refine, thresholds=thresholds, settings=self.maker.model.settings, device=torch.device("cpu"))
        each_image(one, located, folder, settings=depends, name="CRF")
        return Stored(located, folder, [name + end for name in thresholds for end in (CRF_MASKS, LABELS)])

    def pseudo_labels(self, methods: Mapping[str, Method], name: str, thresholds: Mapping[str, float]) -> list[Tensor]:
        """Labels of the training images, for networks: of the pixels that the CRF is sure of."""
        made = self.masks("fit", methods, {name: thresholds[name]}, SMALL)
        return [made[i][name + LABELS].as_subclass(Tensor).byte() for i in range(len(made))]

    def affine(self, name: str, split: Split, source: Method, labels: list[Tensor], steps: int) -> Method:
        """AdvCAM after a walk over the affinities of a network that was trained on labels of the training images."""
        affinity, images = AFFINITIES[name], maps.photographs(self.work, split)
        title = f"{MAPS} + {name}"

        def one(sample: Sample) -> dict[str, Tensor]:
            model, image = self._network(name, labels), sample["image"].as_subclass(Tensor)[None]
            with torch.no_grad(), evaluating(model):
                output = model(image)
            small = F.interpolate(tagged(sample)[None], output.shape[2:], mode="bilinear")
            walked = random_walk(small, affinity.matrix(output), beta=affinity.beta, steps=steps)
            return {title: scaled(walked[0])}

        settings = {"labels": content(labels), "steps": AFFINITY_STEPS, "radius": RADIUS, "walk": steps}
        return self._kept(one, title, source, images, settings)

    def _network(self, name: str, labels: list[Tensor]) -> "Neighbours":
        """Trained when it is needed first."""
        if name not in self._networks:
            model = train_affinity(self.work, AFFINITIES[name], labels, name)
            model.decoder.encoder = self.maker.model.encoder  # for images of which it has no features
            self._networks[name] = model
        return self._networks[name]

    def chosen_steps(self, name: str, source: Method, labels: list[Tensor]) -> int:
        """Of the walk, those of the best mIoU on images held out."""
        found, title = [], f"{MAPS} + {name}"
        for steps in WALK_STEPS:
            made = self.measured("held out", {title: self.affine(name, "held out", source, labels, steps)})
            found.append(best_threshold(made[f"sweep, {title}"]).miou)
            print(f"{title}, {steps} steps: {100 * found[-1]:.1f}", flush=True)
        return WALK_STEPS[found.index(max(found))]


class Neighbours(nn.Module):
    """The output of a light decoder at the finest stride of the features that it reads."""

    def __init__(self, decoder: Segmenter) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, image: Tensor) -> Tensor:
        side = image.shape[-1] // FINEST
        return self.decoder.head(self.decoder.encoder.pyramid(image), (side, side))


def tagged(sample: Sample) -> Tensor:
    """AdvCAM's maps ``[n, H, W]`` of the classes that an image has."""
    return sample[MAPS][sample["tags"][1:] > 0]


def train_affinity(work: Work, affinity: Affinity, labels: list[Tensor], name: str) -> Neighbours:
    """A light decoder on frozen features that tells neighbours of a kind from others."""
    config = on_labels(network_config(work, 0, size=maps.config_of(work).size), labels)
    training.seed_everything(0)
    decoder = deeplab.build(NETWORK, affinity.channels, config.weights)
    images = Kept(config.whole(maps.mapped(work, "fit")))
    known = Relabelled(images, [coarse(own, config.size) for own in labels])
    freeze(decoder, [images], work.folder / "features")
    assert isinstance(decoder, Segmenter)
    model, middle = Neighbours(decoder), slice(FINEST // 2, None, FINEST)
    training.train(
        model,
        lambda output, batch: affinity.loss(output, batch["labels"][:, middle, middle]),
        config.stream(known, config.fit(mirror=True)),
        deeplab.optimizer(model, config.weights),
        steps=AFFINITY_STEPS,
        name=name,
        options=config,
    )
    return model


def coarse(labels: Tensor, size: int) -> Tensor:
    """Labels at another size, of the nearest pixels."""
    return F.interpolate(labels.as_subclass(Tensor)[None, None].float(), (size, size))[0, 0].byte()


def content(labels: list[Tensor]) -> str:
    """A short text that other labels have another one of."""
    return digest({"labels": hashlib.sha256(torch.stack(labels).numpy().tobytes()).hexdigest()})


def on_labels(config: Config, labels: list[Tensor]) -> Config:
    """With a folder of its own for trainings on these labels."""
    return dataclasses.replace(config, out=config.out / content(labels))


def network_config(work: Work, seed: int, size: int = SMALL) -> Config:
    preset = Config.PHOTOGRAPHS | {"frozen": True, "size": size, "steps": NETWORK_STEPS, "save_every": 50}
    config = Config(data="voc", root=work.data, seed=seed, resume=True, **preset)
    return dataclasses.replace(config, out=work.folder / f"networks-{digest(plain(config))}")


def thresholded(images: Images, name: str, threshold: float) -> list[Tensor]:
    """Labels of the pixels whose scores are above the background's, and of the others."""
    found = []
    for i in range(len(images)):
        scores = images[i][name]
        found.append(torch.cat([torch.full_like(scores[:1], threshold), scores]).argmax(0).byte())
    return found


TRUE = "true masks"


def train_network_on(work: Work, labels: list[Tensor], name: str, seed: int) -> Tensor:
    """Counts on val of a network that was trained on labels of the images that have maps."""
    config = on_labels(network_config(work, seed), labels)

    def make() -> dict[str, Tensor]:
        fit, val = (config.whole(maps.mapped(work, split)) for split in ("fit", "val"))
        model = train_network(Relabelled(fit, labels), val, name, work.folder, config)
        return {"val": sizes.assess(model, val)}

    settings = plain(config) | {"labels": content(labels)}
    return work.once(f"network on {name}, seed {seed}", settings, make)["val"]


class Refined(NamedTuple):
    """What walks and the CRF make of AdvCAM's maps.

    Attributes:
        runs: counts on val, by the names of maps and masks.
        labels: of the training images, by the names of the maps that they are from.
        learned: name of the maps after the better walk over learned affinities, on images held out.
        best: name of the better walked maps of all, on images held out.
        walk: what was chosen for that over the network's own features.
    """

    runs: dict[str, Runs]
    labels: dict[str, list[Tensor]]
    learned: str
    best: str
    walk: dict[str, Any]


def refined(refiner: Refiner) -> Refined:
    """Chooses walks, trains affinities, makes masks of all images, and draws some."""
    work, chosen = refiner.work, refiner.chosen_walk()
    methods = {split: refiner.methods(split, chosen) for split in SPLITS}
    thresholds = thresholds_of(refiner.measured("held out", methods["held out"]))
    sure = refiner.pseudo_labels(methods["fit"], WALKED_MAPS, thresholds)
    for name in AFFINITIES:
        steps = refiner.chosen_steps(name, methods["held out"][MAPS], sure)
        for split in SPLITS:
            method = refiner.affine(name, split, methods[split][MAPS], sure, steps)
            methods[split][f"{MAPS} + {name}"] = method
    held, val = (refiner.measured(split, methods[split]) for split in ("held out", "val"))
    thresholds = thresholds_of(held)

    def better(names: Iterable[str]) -> str:
        return max(names, key=lambda name: best_threshold(held[f"sweep, {name}"]).miou)

    learned = better(f"{MAPS} + {name}" for name in AFFINITIES)
    ends = (WALKED_MAPS, learned)
    masks = refiner.masks("val", methods["val"], {name: thresholds[name] for name in ends}, maps.config_of(work).size)
    runs: dict[str, Runs] = {name: [val[name]] for name in methods["val"]}
    runs |= {name + CRF_MASKS: [of_masks(masks, name + CRF_MASKS)] for name in ends}
    drawn = {name: thresholds[name] for name in (MAPS, *ends)}
    located, shown = refiner.maker.located(methods["val"], masks), pictures.ranked(val[WALKED_MAPS])
    pictures.draw(located, shown, drawn | {name + CRF_MASKS: None for name in ends}, work.folder / "masks.jpg")

    small = network_config(work, 0).whole(maps.mapped(work, "fit"))
    trained_on = ("CAM", MAPS, *ends)
    located = refiner.maker.located({name: methods["fit"][name] for name in trained_on}, small)
    labels = {name: thresholded(located, name, thresholds[name]) for name in trained_on}
    labels[TRUE] = [small.labels(i).as_subclass(Tensor).byte() for i in range(len(small))]
    return Refined(runs, labels, learned, better(ends), chosen)


def run(work: Work) -> Outcome:
    runs, labels, learned, best, walked = refined(Refiner(Maker(work, maps.classifier(work))))
    networks = {
        name: [train_network_on(work, own, name, seed) for seed in range(work.seeds)] for name, own in labels.items()
    }
    figures = {name: estimate(own) for name, own in runs.items()}
    figures |= {f"network on {name}": estimate(own) for name, own in networks.items()}
    verdicts = [
        Verdict(
            "AdvCAM after a walk over the network's own features reaches 63",
            "69.9 (IRNet's walk)",
            figures[WALKED_MAPS],
            63,
            unit="mIoU",
        ),
        Verdict(
            "a dense CRF adds 2 or more to the best maps",
            "55.6 to 62.1",
            difference(runs[best + CRF_MASKS], runs[best]),
            2.0,
            scenes="+1.3 ±0.7",
        ),
        Verdict(
            f"the walk of a trained network ({learned.removeprefix(MAPS + ' + ')}) is better",
            "55.6 to 69.9",
            difference(runs[learned], runs[WALKED_MAPS]),
            0.0,
        ),
        Verdict(
            f"a network learns more from masks of {best.removeprefix(MAPS + ' + ')} than from CAM's",
            "63.5 to 68.1",
            difference(networks[best], networks["CAM"]),
            0.0,
            scenes="+7.9",
        ),
        Verdict(
            "a network on them reaches 90% of one on true masks",
            "",
            share(networks[best], networks[TRUE]),
            90,
            unit="%",
            scenes="76%",
        ),
    ]
    about = (
        f"{len(runs[best][0])} images; maps of one classifier; networks on {len(labels[TRUE])} images, {work.repeats}, "
        f"{SMALL} pixels, {NETWORK_STEPS} steps; "
        f"best of {len(WALKS)} walks on the images held out: {maps.told(walked)}"
    )
    return Outcome(figures, verdicts, about)


def thresholds_of(measured: Mapping[str, Tensor]) -> dict[str, float]:
    """The best ones, by the names of the maps."""
    sweeps = {name: values for name, values in measured.items() if name.startswith("sweep, ")}
    return {name.removeprefix("sweep, "): best_threshold(values).threshold for name, values in sweeps.items()}


def of_masks(images: Images, name: str) -> Tensor:
    """Counts ``[N, 6, K]`` of masks that are among the entries of samples."""
    samples = (images[i] for i in range(len(images)))
    pairs = ((sample[name].as_subclass(Tensor), sample["labels"].as_subclass(Tensor)) for sample in samples)
    return torch.stack([counts(masks, labels, len(images.classes)) for masks, labels in pairs])
