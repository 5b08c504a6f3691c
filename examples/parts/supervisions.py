"""What a segmentation network can be trained with: terms of losses, each for one kind of annotation."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from data.sample import VOID, Batch
from torch import Tensor

import segloss

Term = Callable[[Tensor, Batch], Tensor]

# The CRF loss at half the resolution, as the paper has it: a width of 100 pixels in images of 512.
SIGMA_XY, SCALE = 100 / 512, 0.5

FLOOR = 0.05  # share of an image from which on the flat barrier leaves a tagged class alone
# Of squares of shares, chosen on val: beside the CRF loss, which takes most classes away with 20; beside seeds, where
# 400 costs 17 points of the Dice coefficient.
BARRIER_WEIGHT, LIGHT_BARRIER_WEIGHT = 400.0, 4.0


def masks(logits: Tensor, batch: Batch) -> Tensor:
    """Mean over the pixels that have a label, ``batch["labelled"]`` of them."""
    return F.cross_entropy(logits, batch["labels"], ignore_index=VOID, reduction="sum") / batch["labelled"]


def size(logits: Tensor, batch: Batch) -> Tensor:
    return segloss.size_kl(logits, batch["targets"], valid=batch["valid"])


def average_size(logits: Tensor, batch: Batch) -> Tensor:
    return segloss.size_kl(logits, batch["average"], valid=batch["valid"])


def reverse_size(logits: Tensor, batch: Batch) -> Tensor:
    return segloss.reverse_size_kl(logits, batch["targets"], valid=batch["valid"])


def seeds(logits: Tensor, batch: Batch) -> Tensor:
    return segloss.partial_cross_entropy(logits, batch["seeds"], ignore_index=VOID, reduction="sum") / batch["seeded"]


def log_barrier(logits: Tensor, batch: Batch) -> Tensor:
    return segloss.log_barrier(logits, batch["tags"], valid=batch["valid"])


def flat_barrier(logits: Tensor, batch: Batch) -> Tensor:
    """The barrier that the paper describes, flat above the floor; classes without a tag then need suppression."""
    inside, tags = batch["valid"], batch["tags"]
    barrier = segloss.flat_barrier(logits, tags, floor=FLOOR, flat="above", valid=inside)
    return barrier + segloss.suppression(logits, tags, valid=inside)


def squared_barrier(logits: Tensor, batch: Batch, weight: float = BARRIER_WEIGHT) -> Tensor:
    """Lower bounds of tagged classes; those without a tag have the upper bound 0."""
    upper = (batch["tags"] > 0).float()
    return weight * segloss.size_barrier(logits, lower=batch["lower"], upper=upper, valid=batch["valid"])


def crf(logits: Tensor, batch: Batch, scale: float = SCALE) -> Tensor:
    """Over the square of the number of pixels: the same weight then does for images of all sizes."""
    image, inside = batch["image"], batch["valid"]
    width = SIGMA_XY * image.shape[-1]
    return segloss.potts_crf(logits, image, sigma_xy=width, scale_factor=scale, normalize="pairs", valid=inside)


TERMS: dict[str, Term] = {
    "masks": masks,
    "size": size,
    "average": average_size,
    "reverse": reverse_size,
    "seeds": seeds,
    "log barrier": log_barrier,
    "flat barrier": flat_barrier,
    "squared barrier": squared_barrier,
    "light squared barrier": partial(squared_barrier, weight=LIGHT_BARRIER_WEIGHT),
    "crf": crf,
}


def counts(names: Sequence[str]) -> dict[str, Callable[[Batch], Tensor]]:
    """What the terms that are sums over labelled pixels are divided by."""
    divisors: dict[str, Callable[[Batch], Tensor]] = {}
    if "masks" in names:
        divisors["labelled"] = lambda batch: (batch["labels"] != VOID).sum()
    if "seeds" in names:
        divisors["seeded"] = lambda batch: (batch["seeds"] != VOID).sum()
    return divisors


def total_loss(names: Sequence[str], crf_weight: float, crf_scale: float = SCALE) -> Term:
    """The sum of some terms."""

    def value(name: str, logits: Tensor, batch: Batch) -> Tensor:
        return crf_weight * crf(logits, batch, crf_scale) if name == "crf" else TERMS[name](logits, batch)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        values = [value(name, logits, batch) for name in names]
        return sum(values[1:], values[0])

    return loss
