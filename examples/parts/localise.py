"""Maps of where classifiers look: CAM, AdvCAM, RIB and their combinations, made once for each image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from data.sample import Images, Sample, first
from engine.per_image import read
from torch import Tensor

from parts.tag_classifier import TagClassifier, present
from segattr import advcam, cam, normalize, rib
from segattr.refine import random_walk
from segloss import feature_affinity

WALKED = " + random walk"

POOL = 64  # images that the companions of RIB are drawn from
COLOURS = 4.0  # their weight in the affinity of pixels


class Method(NamedTuple):
    classifier: str
    maps: tuple[str, ...]  # whose mean it takes, each over its maximum

    def walked(self) -> "Method":
        return Method(self.classifier, tuple(kind + WALKED for kind in self.maps))


# The dissertation's section 4.6 does not say how it combines AdvCAM and RIB: here their maps are averaged.
KINDS = {"CAM": ("CAM",), "AdvCAM": ("AdvCAM",), "RIB": ("RIB",), "AdvCAM + RIB": ("AdvCAM", "RIB")}
METHODS = {
    **{name: Method("GAP", maps) for name, maps in KINDS.items()},
    "ISL + FSL": Method("ISL + FSL", ("CAM",)),
    "W-OoD": Method("W-OoD + GAP", ("CAM",)),
    **{f"W-OoD + {name}": Method("W-OoD + GAP", maps) for name, maps in KINDS.items() if name != "CAM"},
    "W-OoD + ISL + FSL": Method("W-OoD + ISL + FSL", ("CAM",)),
}


def companions(
    features: Tensor, tags: Tensor, count: int, seed: int
) -> Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]:
    """For RIB: batches of random images that share no class with the one of some tags, or any if all share one.

    Args:
        features: of images, by the layers that do not train, ``[N, D, h, w]``.
        tags: of these images, ``[N, C]``.
        count: images of a batch.
        seed: of the choice.
    """

    def batches(own: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)  # a new one for each image: results depend on that alone
        strangers = ((tags * own).sum(1) == 0).nonzero().flatten().cpu()
        candidates = strangers if len(strangers) else torch.arange(len(features))
        while True:
            drawn = candidates[torch.randint(len(candidates), (count,), generator=generator)].to(tags.device)
            yield features[drawn], tags[drawn]

    return batches


def attribute(
    model: TagClassifier, kinds: Sequence[str], images: Images, seed: int
) -> Callable[[Sample], dict[str, Tensor]]:
    """Work for each image: maps ``[n, h, w]`` of its n classes, each over its maximum, and after a random walk.

    Args:
        model: in evaluation mode.
        kinds: of the maps.
        images: companions of RIB are some of them.
        seed: of the choice of companions.
    """
    device, settings = next(model.parameters()).device, model.settings
    clf, rest, fixed = model.split(), model.split(model.fixed), model.encoder.features[: model.fixed]
    pool = first(images, POOL)
    with torch.no_grad():
        features = fixed(model.normalized(pool["image"].to(device)))
    others = companions(features, present(pool).to(device), settings.companions, seed)

    def fine_tuned(x: Tensor, classes: list[list[int]], tags: Tensor) -> Any:
        with torch.no_grad():
            features = fixed(x)
        return rib(rest, features, tags, companions=others, classes=classes, **settings.rib)

    methods: dict[str, Callable[..., Any]] = {
        "CAM": lambda x, classes, tags: cam(clf, x, classes),
        "AdvCAM": lambda x, classes, tags: advcam(clf, x, classes, **settings.advcam),
        "RIB": fine_tuned,
    }

    def work(sample: Sample) -> dict[str, Tensor]:
        image, tags = (sample[name].as_subclass(Tensor)[None].to(device) for name in ("image", "tags"))
        classes = [tags[0, 1:].nonzero().flatten().tolist()]
        found = {}
        for kind in kinds:
            (maps,) = methods[kind](model.normalized(image), classes, tags[:, 1:])
            found[kind] = scaled(maps.detach())
            found[kind + WALKED] = walk(found[kind], image, model)
        return found

    return work


def scaled(maps: Tensor) -> Tensor:
    """Positive parts of maps, each over its maximum."""
    return normalize(maps, "relu_max")


def walk(maps: Tensor, image: Tensor, model: TagClassifier) -> Tensor:
    """Maps ``[n, h, w]`` carried to neighbours of the same kind, at the resolution of what tells them."""
    settings = model.settings
    if settings.affinity:
        with torch.no_grad():
            features = model.encoder.pyramid(image)[settings.affinity]
        maps = F.interpolate(maps[:, None], features.shape[2:], mode="bilinear")[:, 0]  # of no classes, too
        affinity = feature_affinity(features / features.std(), distance="mean")
    else:
        small = F.interpolate(image, maps.shape[1:], mode="bilinear", antialias=True)
        affinity = feature_affinity(COLOURS * small)
    return random_walk(maps[None], affinity, **settings.walk)[0]


class Located(Images):
    """Images with the maps ``[C, H, W]`` of methods, under their names; 0 for classes that an image has not.

    Args:
        images: made to fit, with tags.
        folder: of a folder with the results of :func:`attribute` for each classifier.
        methods: by their names.
    """

    def __init__(self, images: Images, folder: Path, methods: Mapping[str, Method]) -> None:
        self.names, self.classes = images.names, images.classes
        self._images, self._folder, self._methods = images, folder, methods

    def __getitem__(self, index: int) -> Sample:
        sample = dict(self._images[index])
        tagged = sample["tags"][1:] > 0
        classifiers = {method.classifier for method in self._methods.values()}
        found = {name: read(self._folder / name, self.names[index]) for name in classifiers}
        for name, method in self._methods.items():
            mean = torch.stack([found[method.classifier][kind] for kind in method.maps]).mean(0)
            maps = mean.new_zeros(len(tagged), *mean.shape[1:])
            maps[tagged] = scaled(mean)
            sample[name] = F.interpolate(maps[None], sample["image"].shape[1:], mode="bilinear")[0]
        return sample
