"""Claim 6: images of background that a classifier takes for objects keep its maps on the objects (W-OoD).

The claims of Jungbeom Lee's dissertation, tables 4.1 and 4.5, for the last layers of a pretrained network. A folder in
the layout of VOC has no images without a class. In their place are parts of photographs that scikit-image and
scikit-learn bring along, and parts of the training images outside their masks; of both those that the classifier sees
a class in.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import skimage
import sklearn
import torch
from data.files import read_image
from data.sample import Batch, Images, Sample
from data.stream import Whole
from engine import training
from isl_fsl import Config
from parts.frozen import Kept
from parts.tag_classifier import Output, Part, TagClassifier, WithOOD, plain, present
from torch import Tensor
from torchvision import tv_tensors

import segloss
from benchmarks.claims import contours, maps
from benchmarks.claims.shared import (
    Outcome,
    Runs,
    Verdict,
    Work,
    best_threshold,
    difference,
    digest,
    estimate,
    of_seeds,
)
from segattr.networks import evaluating

# Photographs that packages bring along, and which of VOC's classes they show.
BUNDLED: dict[str, tuple[str, ...]] = {
    "astronaut.png": ("aeroplane", "person"),
    "brick.png": (),
    "camera.png": ("person",),
    "chelsea.png": ("cat",),
    "china.jpg": (),
    "clock_motion.png": (),
    "coffee.png": ("diningtable",),
    "coins.png": (),
    "flower.jpg": (),
    "grass.png": (),
    "gravel.png": (),
    "hubble_deep_field.jpg": (),
    "ihc.png": (),
    "moon.png": (),
    "motorcycle_left.png": ("bicycle", "car", "motorbike"),
    "retina.jpg": (),
    "rocket.jpg": (),
}
PARTS = (1, 2, 3)  # images are cut into windows of their whole height and width, of halves and of thirds


class Bundled(Images):
    """Photographs that packages bring along and that show none of some classes; all of their pixels are background."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.names = [name for name, shown in BUNDLED.items() if not {*shown} & {*classes}]

    def __getitem__(self, index: int) -> Sample:
        folders = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
        image = read_image(next(path for path in (folder / self.names[index] for folder in folders) if path.is_file()))
        return {"image": image, "labels": tv_tensors.Mask(torch.zeros(image.shape[1:], dtype=torch.int64))}


class Window(NamedTuple):
    """Part of an image."""

    image: int  # its index
    rows: slice
    columns: slice


def windows(images: Images) -> Iterator[Window]:
    """Those of all pixels background, in steps of half of their height and width."""
    for i in range(len(images)):
        labels = images.labels(i).as_subclass(Tensor)
        for parts in PARTS:
            height, width = (side // parts for side in labels.shape)
            for top in range(0, labels.shape[0] - height + 1, height // 2):
                for left in range(0, labels.shape[1] - width + 1, width // 2):
                    window = Window(i, slice(top, top + height), slice(left, left + width))
                    if not labels[window.rows, window.columns].any():
                        yield window


class Windows(Images):
    """Parts of images."""

    def __init__(self, images: Images, found: Sequence[Window]) -> None:
        self.classes = images.classes
        self.names = [
            f"{images.names[own.image]} {own.rows.start}-{own.rows.stop} {own.columns.start}-{own.columns.stop}"
            for own in found
        ]
        self._images, self._windows = images, found

    def __getitem__(self, index: int) -> Sample:
        image, rows, columns = self._windows[index]
        sample = self._images[image]
        return {
            "image": tv_tensors.Image(sample["image"][:, rows, columns]),
            "labels": tv_tensors.Mask(sample["labels"][rows, columns]),
        }


SOURCES = ("photographs", "backgrounds")
LEAST = 20  # images that a classifier takes for objects; fewer test nothing
CLUSTERS = 20  # of these; the paper has 50 of 5,190
WEIGHT = 0.007  # of the distance: the paper's


@cache
def candidates(work: Work, source: str) -> Images:
    """Parts of images that show no class, made to fit."""
    fit = work.part("fit")
    images = Bundled(fit.classes) if source == "photographs" else fit
    return Whole(Windows(images, [*windows(images)]), contours.config_of(work, 0).fit())


def hard(work: Work, source: str) -> tuple[Images, int]:
    """The candidates that the classifier is surest of, half as many as there are training images; how many are hard."""
    images = candidates(work, source)
    made = work.once(
        f"candidates for W-OoD, {source}", {"parts": PARTS}, lambda: described(maps.classifier(work), images)
    )
    (ranked,) = segloss.rank_hard_ood(made["logits"].sigmoid().amax(1, keepdim=True))
    return Kept(Part(images, ranked[: len(work.part("fit")) // 2].tolist())), len(ranked)


def described(model: TagClassifier | contours.Tail, images: Images) -> dict[str, Tensor]:
    """Pooled features ``[N, D]``, logits and tags ``[N, C]`` of images made to fit."""
    rows: dict[str, list[Tensor]] = {"features": [], "logits": [], "tags": []}
    with torch.no_grad(), evaluating(model):
        for i in range(len(images)):
            sample = images[i]
            features, scores = model(sample["image"].as_subclass(Tensor)[None])
            rows["features"].append(features.mean((2, 3))[0])
            rows["logits"].append(scores.mean((2, 3))[0])
            rows["tags"].append(sample["tags"][1:])
    return {name: torch.stack(own) for name, own in rows.items()}


class Method(NamedTuple):
    """How a classifier trains on with images that show no class.

    Attributes:
        source: of these images.
        weight: of the distance to them; 0 for their classification alone.
    """

    source: str
    weight: float = 0.0


ALONE, PLAIN, BEFORE = "classified alone", "training images alone", "before"


def train(work: Work, seed: int, method: Method | str) -> dict[str, Tensor]:
    """What :func:`benchmarks.claims.maps.assess` finds for the CAMs of a classifier, logits and tags, by split.

    Args:
        work: the photographs and the folder.
        seed: of the order of the images.
        method: ``PLAIN`` for the classifier of claim 5 that trains on with average pooling, ``BEFORE`` for none.
    """

    def make() -> dict[str, Tensor]:
        if isinstance(method, Method):
            model = trained(work, seed, method)
        else:
            model = contours.trained(work, seed, contours.Weights(0, 0) if method == PLAIN else None)
        images = contours.kept(work)
        return {
            f"{split}, {name}": values
            for split in ("held out", "val")
            for found in (maps.assess(maps.Mapped(images[split], model), ["CAM"]), described(model, images[split]))
            for name, values in found.items()
        }

    settings = plain(config_of(work, seed)) | {"method": method, "parts": PARTS, "clusters": CLUSTERS}
    return work.once(f"W-OoD, {method}, seed {seed}", settings, make)


def trained(work: Work, seed: int, method: Method) -> contours.Tail:
    config, images, (found, _) = config_of(work, seed), contours.kept(work), hard(work, method.source)
    model = contours.Tail(maps.classifier(work), [*images.values(), found], work).eval()
    clusters = fitted(model, images["fit"], found) if method.weight else None
    data = WithOOD(images["fit"], found)
    training.seed_everything(seed)
    training.train(
        model,
        loss_of(clusters, method.weight),
        config.stream(data, config.fit(mirror=True)),
        torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-2),
        steps=contours.STEPS * len(data) // len(images["fit"]),  # as many epochs of the training images
        name=f"{method.source}, {method.weight}, seed {seed}",
        options=config,
    )
    return model


def fitted(model: contours.Tail, images: Images, found: Images) -> segloss.OODClusters:
    """Centres of the classes, and of the images without one, of the classifier before the training."""
    own, other = described(model, images), described(model, found)
    generator = torch.Generator().manual_seed(0)
    return segloss.OODClusters.from_features(
        own["features"], own["tags"], other["features"], CLUSTERS, generator=generator, scope="batch"
    )


def loss_of(clusters: segloss.OODClusters | None, weight: float) -> training.Loss:
    def loss(output: Output, batch: Batch) -> Tensor:
        features, logits = (maps.mean((2, 3)) for maps in output)
        known = ~batch["ood"]
        tags = present(batch)[known]
        value = segloss.ood_classification(logits[known], tags, logits[~known])
        return value + weight * clusters(features[known], tags) if clusters else value

    return loss


def config_of(work: Work, seed: int) -> Config:
    preset = Config.PHOTOGRAPHS | {"steps": contours.STEPS, "save_every": 20}
    config = Config(data="voc", root=work.data, seed=seed, resume=True, **preset)
    return dataclasses.replace(config, out=work.folder / f"ood-{digest(plain(config))}")


def f1(made: Mapping[str, Tensor]) -> float:
    """Of the tags of val, in percent, mean over the classes; a tag is predicted where its logit is above 0."""
    found, tags = made["val, logits"] > 0, made["val, tags"] > 0
    return 100 * float((2 * (found & tags).sum(0) / (found.sum(0) + tags.sum(0)).clamp(min=1)).mean())


def pixels(made: Mapping[str, Tensor], measure: Literal["precision", "recall"]) -> float:
    """Of the masks of val at the best threshold, in percent, mean over the foreground classes."""
    best = best_threshold(made["val, sweep, CAM"])
    return 100 * float(getattr(best, measure)[1:].nanmean())


def run(work: Work) -> Outcome:
    counted = {source: hard(work, source)[1] for source in SOURCES}
    about = "; ".join(
        f"{number} of {len(candidates(work, source))} {source} are taken for a class"
        for source, number in counted.items()
    )
    tested = [source for source, number in counted.items() if number >= LEAST]
    if not tested:
        return Outcome({}, [Verdict("W-OoD adds to mIoU of CAM", "49.5 to 53.3", None)], about)
    methods: dict[str, Method | str] = {BEFORE: BEFORE, PLAIN: PLAIN}
    for source in tested:
        methods |= {f"{source}, {ALONE}": Method(source), f"{source}, W-OoD": Method(source, WEIGHT)}
    made = {
        name: [train(work, seed, method) for seed in range(1 if name == BEFORE else work.seeds)]
        for name, method in methods.items()
    }
    runs: dict[str, Runs] = {name: [own["val, CAM"] for own in of] for name, of in made.items()}
    others = {
        "precision": {name: [pixels(own, "precision") for own in of] for name, of in made.items()},
        "recall": {name: [pixels(own, "recall") for own in of] for name, of in made.items()},
        "F1 of tags": {name: [f1(own) for own in of] for name, of in made.items()},
    }
    figures = {f"{name}, mIoU": estimate(own) for name, own in runs.items()}
    figures |= {f"{name}, {measure}": of_seeds(own) for measure, of in others.items() for name, own in of.items()}

    def gained(measure: str, name: str) -> list[float]:
        return [own - other for own, other in zip(others[measure][name], others[measure][PLAIN], strict=True)]

    verdicts = []
    for source in tested:
        name = f"{source}, W-OoD"
        beside = "beside as many epochs without"
        verdicts += [
            Verdict(
                f"W-OoD with {source} adds 2 or more to mIoU of CAM, {beside}",
                "49.5 to 53.3",
                difference(runs[name], runs[PLAIN]),
                2.0,
                scenes="+2.3",
            ),
            Verdict(
                f"the distance to {source} adds to their classification alone",
                "50.0 to 53.3",
                difference(runs[name], runs[f"{source}, {ALONE}"]),
                0.0,
            ),
            Verdict(
                f"W-OoD with {source} adds to precision, {beside}",
                "61.9 to 66.5",
                of_seeds(gained("precision", name)),
                0.0,
            ),
            Verdict(
                f"F1 of tags falls by at most 2 points, {beside}, {source}",
                "",
                of_seeds([-value for value in gained("F1 of tags", name)]),
                most=2.0,
            ),
        ]
    images = len(runs[BEFORE][0])
    return Outcome(figures, verdicts, f"{images} images, {work.repeats}, {contours.STEPS} steps without them; {about}")
