"""Classifiers trained from image tags, with and without ISL + FSL, with and without W-OoD, to make maps of."""

import copy
import hashlib
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from data.sample import Batch, Images, Sample
from data.source import Options
from data.stream import Prepared, Whole, loader
from engine import training
from engine.per_image import each_image, read
from engine.processes import pick_device
from torch import Tensor, nn

import segloss
from parts import pretrained
from parts.network import block
from parts.pretrained import Pretrained
from parts.settings import PHOTOGRAPHS, SCENES, Settings
from segattr import Classifier
from segattr.networks import evaluating

Output = tuple[Tensor, Tensor]  # features [B, D, h, w], score maps [B, C, h, w]

ISL_WEIGHT, FSL_WEIGHT = 0.25, 1.0  # added to a classification loss of 1: the paper's share of ISL, 0.2 of both
OOD_WEIGHT, DISTANCE_WEIGHT = 1.0, 0.01  # not tuned
CLUSTERS = 20  # of out-of-distribution images; the paper has 50 of about 5,000 photographs

isl, fsl = segloss.ImportanceClassification(weight=1), segloss.FeatureSimilarity()


class TagClassifier(nn.Module):
    """Features of an encoder, and score maps of RGB images in [0, 1]; the mean of a map over the image is the logit.

    Args:
        encoder: whose features are taken; it knows how its images are normalised.
        classes: number of score maps.
        fixed: how many layers of the encoder, the first ones, RIB leaves as they are.
        settings: that go with the network.
    """

    def __init__(self, encoder: Pretrained, classes: int, fixed: int, settings: Settings) -> None:
        super().__init__()
        (*_, width) = encoder.channels.values()
        self.encoder, self.head = encoder, nn.Conv2d(width, classes, 1)
        self.fixed, self.settings = fixed, settings

    def forward(self, image: Tensor) -> Output:
        features = self.encoder.features(self.normalized(image))
        return features, self.head(features)

    def normalized(self, image: Tensor) -> Tensor:
        return self.encoder.normalized(image).contiguous(memory_format=torch.channels_last)

    def optimizer(self, *, first: bool) -> torch.optim.Optimizer:
        """Of the first training, or of one that goes on from it."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, self.settings.rates[not first], weight_decay=1e-2)

    def split(self, start: int = 0) -> Classifier:
        """For attribution: from normalised images, or from what the first layers make of them, to logits."""
        head = nn.Sequential(self.head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Classifier(self.encoder.features[start:], head).train(self.training)


def build(network: str, classes: int, weights: str) -> TagClassifier:
    """A classifier with an encoder of :mod:`parts.pretrained`, or a small one, whose features are half as large as the
    image.

    A pretrained one trains its head and its last layers, and keeps the statistics of its batch normalisation.
    """
    if network not in get_args(pretrained.Name):
        width = 16
        layers = block(3, width, stride=2), block(width, 2 * width), block(2 * width, 2 * width)
        encoder = Pretrained(nn.Sequential(*layers), nn.Identity(), (0.5,) * 3, (0.25,) * 3)
        return TagClassifier(encoder, classes, 2, SCENES)
    encoder = pretrained.pretrained(network, weights)  # type: ignore[arg-type]
    encoder.head = nn.Identity()  # ImageNet's
    fixed = encoder.fixed()
    encoder.features[:fixed].requires_grad_(False)
    return TagClassifier(encoder, classes, fixed, PHOTOGRAPHS).eval()


def digest(model: nn.Module) -> str:
    """Of the weights: what is made by other weights is something else."""
    state = hashlib.sha256()
    for value in model.state_dict().values():
        state.update(value.cpu().numpy().tobytes())
    return state.hexdigest()[:16]


def plain(options: Options) -> dict[str, str]:
    """What results depend on, for :func:`each_image`."""
    return {key: str(value) for key, value in vars(options).items() if key not in training.FREE}


def fit_head(model: TagClassifier, images: Images, folder: Path, steps: int, options: Options) -> float:
    """Trains the head alone, by steps over all images, on pooled features that are made once and kept in a folder.

    Returns the seconds that it took, without the features.
    """
    device, whole = pick_device(options.device), Whole(images, options.fit())

    def work(sample: Sample) -> dict[str, Tensor]:
        features, _ = model(sample["image"].as_subclass(Tensor)[None].to(device))
        return {"features": features.mean((2, 3))[0], "tags": sample["tags"]}

    with torch.no_grad(), evaluating(model):
        each_image(work, whole, folder, settings=plain(options) | {"encoder": digest(model)}, name="features")
    found = [read(folder, name) for name in images.names]
    features, tags = (torch.stack([one[key] for one in found]).to(device) for key in ("features", "tags"))
    began = time.perf_counter()
    optimizer = torch.optim.AdamW(model.head.parameters(), model.settings.rates[0], weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = model.settings.rates[0] * (1 - step / steps) ** 0.9
        optimizer.zero_grad()
        logits = model.head(features[:, :, None, None])[:, :, 0, 0]
        F.binary_cross_entropy_with_logits(logits, tags[:, 1:].to(logits.dtype)).backward()
        optimizer.step()
    return time.perf_counter() - began


class WithOOD(Images):
    """Images, and behind them out-of-distribution ones, which show no class; ``"ood"`` says which is which.

    Args:
        images: of the classes.
        ood: images of background that is easily taken for a class.
    """

    def __init__(self, images: Images, ood: Images) -> None:
        self._images, self._ood = images, ood
        self.names, self.classes = [*images.names, *(f"ood {name}" for name in ood.names)], images.classes

    def __getitem__(self, index: int) -> Sample:
        known = len(self._images)
        sample = self._images[index] if index < known else self._ood[index - known]
        return sample | {"ood": torch.tensor(index >= known)}


class Part(Images):
    """Some images of a data set, by their indices."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self._images, self._indices = images, list(indices)
        self.names, self.classes = [images.names[i] for i in self._indices], images.classes

    def __getitem__(self, index: int) -> Sample:
        return self._images[self._indices[index]]


def present(batch: Batch) -> Tensor:
    """Tags of the foreground classes."""
    return batch["tags"][:, 1:]


def _known(batch: Batch) -> Tensor:
    """Which images are not out-of-distribution, bool ``[B]``."""
    return ~batch["ood"] if "ood" in batch else torch.ones_like(batch["tags"][:, 0], dtype=torch.bool)


def tags_alone(output: Output, batch: Batch) -> Tensor:
    """Classification after global average pooling (GAP), out-of-distribution images among the images."""
    logits, known = output[1].mean((2, 3)), _known(batch)
    return segloss.ood_classification(logits[known], present(batch)[known], logits[~known], ood_weight=OOD_WEIGHT)


def isl_fsl(output: Output, batch: Batch) -> Tensor:
    """What ISL and FSL add: scores at sampled pixels, boundaries of the maps where those of the image are."""
    scores, tags = output[1], present(batch)
    return ISL_WEIGHT * isl(scores, tags) + FSL_WEIGHT * fsl(scores, batch["image"], tags)


CLASSIFIERS: dict[str, list[training.Loss]] = {"GAP": [tags_alone], "ISL + FSL": [tags_alone, isl_fsl]}


def away(clusters: segloss.OODClusters) -> training.Loss:
    """What W-OoD adds: features near those of their classes, far from those of out-of-distribution images."""

    def loss(output: Output, batch: Batch) -> Tensor:
        known = _known(batch)
        return DISTANCE_WEIGHT * clusters(output[0].mean((2, 3))[known], present(batch)[known])

    return loss


def describe(model: TagClassifier, data: Images, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features ``[N, D]``, logits ``[N, C]`` and tags ``[N, C]`` of all images, in each process."""
    device = next(model.parameters()).device
    keys = [[(0, i) for i in range(first, min(first + 50, len(data)))] for first in range(0, len(data), 50)]
    found = []
    with torch.no_grad(), evaluating(model):
        for batch in loader(Prepared(data, options.fit()), keys, options.workers):
            features, scores = model(batch["image"].to(device))
            found.append((features.mean((2, 3)), scores.mean((2, 3)), present(batch).to(device)))
    features, logits, tags = (torch.cat(parts) for parts in zip(*found, strict=True))
    return features, logits, tags


def train_classifiers(
    start: TagClassifier,
    images: Images,
    candidates: Images | None,
    pretrain_steps: int,
    steps: int,
    folder: Path,
    options: Options,
    *,
    without: Collection[str] = (),
) -> dict[str, TagClassifier]:
    """Classifiers that go on from the same one with different losses.

    Args:
        start: the one, on its device; small and new, or pretrained.
        images: with the tags of their masks.
        candidates: images without a class, for W-OoD, which keeps the half that is hardest to tell; None leaves it out.
        pretrain_steps: optimizer steps of the one that all start from; of a pretrained one its head alone trains.
        steps: optimizer steps of each of them.
        folder: of what a pretrained one makes of the images.
        options: of the command line.
        without: names of those that are not needed.
    """

    def fit(model: TagClassifier, name: str, data: Images, losses: Sequence[training.Loss]) -> TagClassifier:
        first = name == "start"
        training.train(
            model,
            lambda output, batch: sum((loss(output, batch) for loss in losses), torch.zeros(())),
            options.stream(data, options.fit(mirror=True)),
            model.optimizer(first=first),
            steps=pretrain_steps if first else steps,
            name=f"{name}, seed {options.seed}",
            options=options,
        )
        return model

    if start.settings.head_first:
        fit_head(start, images, folder / "pooled", pretrain_steps, options)
    else:
        fit(start, "start", images, [tags_alone])
    models = {name: (images, losses) for name, losses in CLASSIFIERS.items()}
    if candidates:
        features, _, tags = describe(start, images, options)
        ood_features, logits, _ = describe(start, candidates, options)
        (ranked,) = segloss.rank_hard_ood(logits.sigmoid().amax(1, keepdim=True), threshold=0)
        hard = ranked[: len(candidates) // 2]
        clusters = segloss.OODClusters.from_features(
            features, tags, ood_features[hard], CLUSTERS, generator=torch.Generator().manual_seed(options.seed)
        )
        joint = WithOOD(images, Part(candidates, hard.tolist()))
        models |= {f"W-OoD + {name}": (joint, [*losses, away(clusters)]) for name, losses in CLASSIFIERS.items()}
    wanted = {name: model for name, model in models.items() if name not in without}
    return {name: fit(copy.deepcopy(start), name, data, losses) for name, (data, losses) in wanted.items()}
