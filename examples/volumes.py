"""Volumes as MRI and CT have them: one 3-D network, eight supervisions, from full masks down to a single slice."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data.nifti import Spacing, filling, fit, list_pairs, read_classes, read_volumes
from data.phantoms import CLASSES, SHAPE, SPACING, Phantoms, Split
from data.sample import VOID, Annotated, Batch, Images, Sample, Stacked, first
from engine import processes, training
from engine.command import check_least, each_run, run
from engine.processes import pick_device, rank, say
from matplotlib.figure import Figure
from parts.network import tag_loss
from parts.report import draw_rows
from parts.sizes import exact_sizes, noisy_sizes
from torch import Tensor, nn

import segloss
from segattr.networks import evaluating

try:
    from monai.losses import DiceCELoss
    from monai.metrics import compute_average_surface_distance, compute_dice
    from monai.networks.nets import UNet
except ImportError:
    raise SystemExit("error: volumes need MONAI and nibabel: pip install '.[volumes]'") from None


@dataclasses.dataclass(frozen=True)
class Config(training.Options):
    """Trains MONAI's UNet on phantoms, or on NIfTI files, with each kind of supervision.

    Prints Dice coefficients and average surface distances, draws slices of a volume.
    """

    QUICK: ClassVar[dict[str, Any]] = {"pretrain_steps": 100, "steps": 100}

    root: Path | None = None
    """Folder of NIfTI files in the layout of the Medical Segmentation Decathlon: imagesTr/, labelsTr/, dataset.json.
    Without it, phantoms are drawn."""
    split: Split = "val"
    """Volumes that are evaluated: val, on which settings were chosen, or final, kept for figures to report."""
    shape: tuple[int, int, int] = SHAPE
    """Depth, height and width of the volumes in voxels, multiples of 4; those of files are cut or padded to it."""
    spacing: tuple[float, float, float] | None = None
    """Depth, height and width in mm of the voxels that files are brought to; by default such that a training volume of
    median extent fills --shape."""
    volumes: int = 128
    """Number of training volumes, of phantoms."""
    pretrain_steps: int = 300
    """Optimizer steps of the pretraining on tags from which all trainings start."""
    steps: int = 250
    """Optimizer steps of each training."""
    batch_size: int = 8
    """Volumes of an optimizer step."""
    quick: bool = False
    """Few steps: what the example does, not what the supervisions reach."""
    repeats: int = 1
    """Number of runs; their seeds count up from --seed, and the table shows mean and standard deviation."""
    out: Path = Path("runs/volumes")
    """Folder of the picture and of the checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, volumes=1, pretrain_steps=0, steps=1, repeats=1)
        if any(length < 8 or length % 4 for length in self.shape):
            raise ValueError(f"--shape: expected multiples of 4 from 8, got {self.shape}")
        if self.spacing and not self.root:
            raise ValueError(f"--spacing: expected --root with it: that of phantoms is {SPACING}, got {self.spacing}")
        if self.spacing and not min(self.spacing) > 0:
            raise ValueError(f"--spacing: expected numbers above 0, got {self.spacing}")


MAPS = ("image", "labels", "slice", "distances")
EVALUATED, SHOWN = 32, 6  # phantoms
LEARNING_RATE = 1e-2
MRE = 0.08  # nominal mean relative error of the size targets
MARGIN = 0.1  # of the bounds, around the exact sizes
# Weight and width in intensity of the CRF loss were chosen for size targets on val volumes, seed 0, in trainings of 250
# steps: 0.0025 and 0.05 against 0.00125 and 0.1. The others are not tuned: they make terms about as large as those
# beside them.
CRF_WEIGHT, SIGMA_INTENSITY, SIGMA_MM = 0.0025, 0.05, 5.0
BOUNDS_WEIGHT, CENTROID_WEIGHT, BOUNDARY_WEIGHT = 400.0, 1e-4, 0.01


class Data(NamedTuple):
    """Volumes in memory, of one shape and spacing."""

    train: Images  # annotated
    test: Images
    spacing: Spacing


def load(config: Config) -> Data:
    """Phantoms, or the volumes of a folder, made to fit."""
    if config.root is None:
        drawn = (
            Phantoms("train", config.volumes, shape=config.shape, seed=config.seed),
            Phantoms(config.split, EVALUATED, shape=config.shape),
        )
        pairs = [[(phantom.image, phantom.labels) for phantom in phantoms] for phantoms in drawn]
        return _data(CLASSES, pairs, SPACING, config.seed)
    classes = read_classes(config.root)
    lists = [list_pairs(config.root, split) for split in ("train", config.split)]
    volumes = [read_volumes(own, len(classes)) for own in lists]
    spacing = config.spacing or filling(volumes[0], config.shape)
    return _data(classes, [[fit(v, config.shape, spacing) for v in own] for own in volumes], spacing, config.seed)


def _data(
    classes: tuple[str, ...], pairs: Sequence[Sequence[tuple[Tensor, Tensor]]], spacing: Spacing, seed: int
) -> Data:
    train, test = (
        Stacked(classes, torch.stack([image for image, _ in own]), torch.stack([labels for _, labels in own]))
        for own in pairs
    )
    return Data(annotate(train, spacing, seed), test, spacing)


def annotate(images: Images, spacing: Spacing, seed: int) -> Images:
    """Volumes with what an annotator could tell of each of them, made from its mask."""
    labels, k = torch.stack([images.labels(i).as_subclass(Tensor) for i in range(len(images))]), len(images.classes)
    exact = exact_sizes(images)
    centroids, _ = segloss.centroids_from_labels(labels, k, spacing=spacing)
    return Annotated(
        images,
        slice=torch.stack([one_slice(own) for own in labels]),
        targets=noisy_sizes(exact, MRE, seed),
        lower=(1 - MARGIN) * exact,
        upper=((1 + MARGIN) * exact).clamp(max=1),  # 0 for absent classes
        centroids=centroids.nan_to_num(),
        present=exact > 0,
        distances=segloss.signed_distances(labels, k, spacing=spacing),
    )


@dataclasses.dataclass(frozen=True)
class Mirror:
    """Mirrors half of the volumes along each axis, with what is known of places in them."""

    spacing: Spacing

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        axes = [axis for axis in range(3) if rng.random() < 0.5]
        maps = {name: sample[name].flip([axis - 3 for axis in axes]) for name in MAPS}
        centroids = sample["centroids"].clone()
        for axis in axes:
            last = (sample["labels"].shape[axis] - 1) * self.spacing[axis]
            centroids[:, axis] = last - centroids[:, axis]
        return sample | maps | {"centroids": centroids}


def one_slice(labels: Tensor) -> Tensor:
    """The labels ``[D, H, W]`` of the slice that shows most classes, of these the most of objects; void elsewhere."""
    counts = F.one_hot(labels).sum((1, 2))  # [D, K]
    shown = (counts[:, 1:] > 0).sum(1) + counts[:, 1:].sum(1) / (labels[0].numel() + 1)
    chosen = int(shown.argmax())
    return torch.full_like(labels, VOID).index_copy(0, torch.tensor([chosen]), labels[chosen, None])


Loss = Callable[[Tensor, Batch], Tensor]


def supervisions(spacing: Spacing) -> dict[str, Loss]:
    """A loss for each kind of annotation, from the logits ``[B, K, D, H, W]``."""
    dice_and_cross_entropy = DiceCELoss(to_onehot_y=True, softmax=True)
    boundary = segloss.BoundaryLoss()
    sizes = segloss.SizeKL()
    crf = segloss.PottsCRF(
        sigma_rgb=SIGMA_INTENSITY, sigma_xy=SIGMA_MM, spacing=spacing, normalize="pixels", tolerance=0.1
    )
    centroids = segloss.CentroidLoss(spacing=spacing)
    cross_entropy = segloss.PartialCrossEntropy(ignore_index=VOID)

    def full(logits: Tensor, batch: Batch) -> Tensor:
        return dice_and_cross_entropy(logits, batch["labels"][:, None])

    def size(logits: Tensor, batch: Batch) -> Tensor:
        return sizes(logits, batch["targets"])

    def bounds(logits: Tensor, batch: Batch) -> Tensor:
        return BOUNDS_WEIGHT * segloss.size_barrier(logits, lower=batch["lower"], upper=batch["upper"])

    def centroid(logits: Tensor, batch: Batch) -> Tensor:
        return CENTROID_WEIGHT * centroids(logits, batch["centroids"], known=batch["present"])

    def one_slice(logits: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(logits, batch["slice"])

    def smooth(logits: Tensor, batch: Batch) -> Tensor:
        return CRF_WEIGHT * crf(logits, batch["image"])

    def outlines(logits: Tensor, batch: Batch) -> Tensor:
        return BOUNDARY_WEIGHT * boundary(logits, batch["distances"])

    terms: dict[str, Sequence[Loss]] = {
        "full masks": (full,),
        "full + boundary": (full, outlines),
        "sizes": (size,),
        "sizes + CRF": (size, smooth),
        "bounds": (bounds,),
        "sizes + centroids": (size, centroid),
        "one slice": (one_slice,),
        "one slice + sizes": (one_slice, size),
    }
    return {name: partial(total, own) for name, own in terms.items()}


def total(terms: Sequence[Loss], logits: Tensor, batch: Batch) -> Tensor:
    values = [term(logits, batch) for term in terms]
    return sum(values[1:], values[0])


def unet(classes: int) -> nn.Sequential:
    """MONAI's UNet; slices are thick, so that its first step halves height and width only.

    Its last layer, a transposed convolution, has weights of its own for every other voxel: sizes can be met by stripes,
    which a mean over 2 x 2 voxels takes out.
    """
    model = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=classes,
        channels=(16, 32, 48),
        strides=((1, 2, 2), (2, 2, 2)),
        norm="BATCH",  # that of instances would hide how much of a class there is
        act="RELU",
    )
    model = model.to(memory_format=torch.channels_last_3d)  # a third faster on CPU
    return nn.Sequential(model, nn.AvgPool3d((1, 2, 2)), nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear"))


class Outcome(NamedTuple):
    dice: Tensor  # [K - 1], without the background; means over the volumes that show the class
    distance: Tensor  # [K - 1], average surface distance in mm
    seconds: float  # of the training
    predictions: Tensor  # int64 [n, D, H, W], of the first n volumes


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, config: Config) -> tuple[Tensor, Tensor]:
    """Dice coefficients and symmetric average surface distances of the classes, ``[K - 1]`` each.

    A class that is not found at all is as far away as the opposite corner of the volume.
    """
    device, k = pick_device(config.device), len(data.test.classes)
    sums = torch.zeros(3, k - 1, dtype=torch.float64)
    corner = math.hypot(*(length * step for length, step in zip(config.shape, data.spacing, strict=True)))
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MONAI: classes that are absent, its own deprecated arguments
        for batch in training.share(data.test, None, config.batch_size, config.workers):
            found = F.one_hot(model(batch["image"].to(device)).argmax(1).cpu(), k).movedim(-1, 1)
            truth = F.one_hot(batch["labels"], k).movedim(-1, 1)
            dice = compute_dice(found, truth, include_background=False)
            distance = compute_average_surface_distance(found, truth, symmetric=True, spacing=data.spacing)
            there = truth[:, 1:].flatten(2).any(2)
            for row, values in zip(sums, (there, dice, distance.nan_to_num(corner, corner)), strict=True):
                row += values.where(there, 0).sum(0)
    count, dice, distance = processes.total(sums.to(device)).cpu()
    return dice / count, distance / count


def experiment(config: Config, data: Data) -> dict[str, Outcome]:
    """Pretrains on tags, then trains with each supervision: the same weights to begin with, the same batches."""
    training.seed_everything(config.seed)
    device = pick_device(config.device)
    fit = partial(training.train, batches=config.stream(data.train, Mirror(data.spacing)), options=config)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)

    pretrained = unet(len(data.train.classes)).to(device)
    fit(
        pretrained,
        lambda logits, batch: tag_loss(logits, batch["tags"]),
        optimizer=optimizer(pretrained),
        steps=config.pretrain_steps,
        name=f"pretraining, seed {config.seed}",
    )
    outcomes = {}
    for name, loss in supervisions(data.spacing).items():
        model = copy.deepcopy(pretrained)
        progress = fit(model, loss, optimizer=optimizer(model), steps=config.steps, name=f"{name}, seed {config.seed}")
        dice, distance = evaluate(model, data, config)
        with torch.no_grad(), evaluating(model):
            predictions = model(first(data.test, SHOWN)["image"].to(device)).argmax(1).cpu()
        outcomes[name] = Outcome(dice, distance, progress.seconds, predictions)
    return outcomes


def table(classes: Sequence[str], runs: Sequence[Mapping[str, Outcome]]) -> str:
    """Dice coefficients, their mean, its share of that of full masks, distances, seconds; means and deviations."""
    titles = (*classes[1:], "mean", "of full", "distance", "seconds")
    width = max(15, *(len(title) + 2 for title in titles))
    lines = [f"{'Dice':<18}" + "".join(f"{title:>{width}}" for title in titles)]
    for name in runs[0]:
        rows = []
        for outcomes in runs:
            own, full = outcomes[name], outcomes["full masks"].dice.nanmean()
            shares = torch.stack([own.dice.nanmean(), own.dice.nanmean() / full, own.distance.nanmean()])
            rows.append(torch.cat([own.dice, shares, torch.tensor([own.seconds])]))
        values = torch.stack(rows)
        forms = ["{:.3f}"] * len(classes) + ["{:.1%}", "{:.2f} mm", "{:.0f}"]
        cells = [form.format(value) for form, value in zip(forms, values.mean(0), strict=True)]
        if len(runs) > 1:
            spread = [form.removesuffix(" mm").format(value) for form, value in zip(forms, values.std(0), strict=True)]
            cells = [f"{cell} ±{more}" for cell, more in zip(cells, spread, strict=True)]
        lines.append(f"{name:<18}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def picture(data: Data, outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Draws the slice of each volume that shows the most, its truth and the predictions."""
    batch = first(data.test, SHOWN)
    chosen = torch.stack([(one_slice(labels) != VOID).flatten(1).any(1) for labels in batch["labels"]])
    rows = {"image": batch["image"][:, 0][chosen][..., None].expand(-1, -1, -1, 3), "truth": batch["labels"][chosen]}
    rows |= {name.replace(" + ", "\n+ "): outcome.predictions[chosen] for name, outcome in outcomes.items()}
    figure = Figure(figsize=(8, 1.25 * len(rows)), layout="constrained")
    draw_rows(figure, rows)
    figure.savefig(path, dpi=80)


def main(config: Config) -> None:
    folder = training.start(config)
    loaded = [load(own) for own in each_run(config)]
    runs = [experiment(own, data) for own, data in zip(each_run(config), loaded, strict=True)]
    say(table(loaded[0].test.classes, runs))
    if rank() == 0:
        picture(loaded[0], runs[0], folder / "volumes.png")
    say(f"picture: {folder / 'volumes.png'}")


if __name__ == "__main__":
    run(main, Config)
