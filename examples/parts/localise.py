"""Maps of where classifiers look: CAM, AdvCAM, RIB and their combinations, made once for each image."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from data.sample import Images, Sample, first
from engine.per_image import read
from torch import Tensor, nn

from parts.tag_classifier import TagClassifier, normalized, present
from segattr import advcam, cam, normalize, rib
from segattr.refine import random_walk
from segloss import feature_affinity

WALKED = " + random walk"

# Chosen on the first training scenes of seed 0. With AdvCAM's default, 27 steps of 0.08, maps of such small images grow
# over the background; RIB at less than a third of this rate changes nothing, and needs many companions.
ADVCAM: dict[str, Any] = {"steps": 10, "step_size": 0.04}
RIB: dict[str, Any] = {"steps": 10, "lr": 3e-3, "threshold": 0.8}
COMPANIONS, POOL = 20, 64  # images that a step of RIB takes, and those that they are drawn from
WALK: dict[str, Any] = {"beta": 10.0, "steps": 16}
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


def companions(images: Tensor, tags: Tensor, seed: int) -> Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]:
    """For RIB: batches of random images that share no class with the one of some tags, or any if all share one."""

    def batches(own: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)  # a new one for each image: results depend on that alone
        strangers = ((tags * own).sum(1) == 0).nonzero().flatten().cpu()
        candidates = strangers if len(strangers) else torch.arange(len(images))
        while True:
            drawn = candidates[torch.randint(len(candidates), (COMPANIONS,), generator=generator)].to(tags.device)
            yield images[drawn], tags[drawn]

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
    device = next(model.parameters()).device
    pool = first(images, POOL)
    others = companions(normalized(pool["image"].to(device)), present(pool).to(device), seed)
    clf = model.split()
    methods: dict[str, Callable[..., Any]] = {
        "CAM": lambda x, classes, tags: cam(clf, x, classes),
        "AdvCAM": lambda x, classes, tags: advcam(clf, x, classes, **ADVCAM),
        "RIB": lambda x, classes, tags: rib(
            clf, x, tags, companions=others, classes=classes, frozen=list(model.features.children())[:-1], **RIB
        ),
    }

    def work(sample: Sample) -> dict[str, Tensor]:
        image, tags = (sample[name].as_subclass(Tensor)[None].to(device) for name in ("image", "tags"))
        classes = [tags[0, 1:].nonzero().flatten().tolist()]
        found = {}
        for kind in kinds:
            (maps,) = methods[kind](normalized(image), classes, tags[:, 1:])
            found[kind] = scaled(maps.detach())
            found[kind + WALKED] = walk(found[kind], image)
        return found

    return work


def scaled(maps: Tensor) -> Tensor:
    """Positive parts of maps, each over its maximum."""
    return cast(Tensor, normalize(maps, "relu_max"))


def walk(maps: Tensor, image: Tensor) -> Tensor:
    """Maps ``[n, h, w]`` carried to neighbours of the same colour."""
    small = F.interpolate(image, maps.shape[1:], mode="bilinear", antialias=True)
    return random_walk(maps[None], feature_affinity(COLOURS * small), **WALK)[0]


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


def digest(model: nn.Module) -> str:
    """Of the weights: maps of other weights are other maps."""
    state = hashlib.sha256()
    for value in model.state_dict().values():
        state.update(value.cpu().numpy().tobytes())
    return state.hexdigest()[:16]
