"""A classifier trained from image tags, with and without ISL + FSL, with and without W-OoD, to make maps of."""

import copy
from collections.abc import Collection, Sequence

import torch
from data.sample import Batch, Images, Sample
from data.source import Options
from data.stream import Prepared, loader
from engine import training
from engine.processes import pick_device
from torch import Tensor, nn

import segloss
from parts.network import block
from segattr import Classifier
from segattr.networks import evaluating

Output = tuple[Tensor, Tensor]  # features [B, D, h, w], score maps [B, C, h, w]
LEARNING_RATES = (2e-3, 1e-3)

ISL_WEIGHT, FSL_WEIGHT = 0.25, 1.0  # added to a classification loss of 1: the paper's share of ISL, 0.2 of both
OOD_WEIGHT, DISTANCE_WEIGHT = 1.0, 0.01  # not tuned
CLUSTERS = 20  # of out-of-distribution images; the paper has 50 of about 5,000 photographs

isl, fsl = segloss.ImportanceClassification(weight=1), segloss.FeatureSimilarity()


class TagClassifier(nn.Module):
    """Features, half as large as the image, and score maps; the mean of a map over the image is the logit."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, width, stride=2), block(width, 2 * width), block(2 * width, 2 * width))
        self.head = nn.Conv2d(2 * width, classes, 1)

    def forward(self, image: Tensor) -> Output:
        features = self.features(normalized(image))
        return features, self.head(features)

    def split(self) -> Classifier:
        """For attribution: from normalised images to logits."""
        return Classifier(self.features, nn.Sequential(self.head, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def normalized(image: Tensor) -> Tensor:
    """What the network wants of RGB in [0, 1]."""
    return (4 * image - 2).contiguous(memory_format=torch.channels_last)


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
    images: Images,
    candidates: Images | None,
    pretrain_steps: int,
    steps: int,
    options: Options,
    *,
    without: Collection[str] = (),
) -> dict[str, TagClassifier]:
    """Classifiers that go on from the same one with different losses.

    Args:
        images: with the tags of their masks.
        candidates: images without a class, for W-OoD, which keeps the half that is hardest to tell; None leaves it out.
        pretrain_steps: optimizer steps of the classifier that all start from.
        steps: optimizer steps of each of them.
        options: of the command line.
        without: names of those that are not needed.
    """

    def fit(model: TagClassifier, name: str, data: Images, losses: Sequence[training.Loss]) -> TagClassifier:
        first = name == "start"
        training.train(
            model,
            lambda output, batch: sum((loss(output, batch) for loss in losses), torch.zeros(())),
            options.stream(data, options.fit(mirror=True)),
            torch.optim.AdamW(model.parameters(), LEARNING_RATES[not first], weight_decay=1e-2),
            steps=pretrain_steps if first else steps,
            name=f"{name}, seed {options.seed}",
            options=options,
        )
        return model

    start = fit(TagClassifier(len(images.classes) - 1).to(pick_device(options.device)), "start", images, [tags_alone])
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
