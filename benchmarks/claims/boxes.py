"""Claim 8: maps of what a detector looks at (BBAM) make masks of boxes.

The claims of Jungbeom Lee's dissertation, table 5.1, with a Faster R-CNN that trains on the boxes of the connected
parts of masks; its features are frozen. Of a detector that finds too few objects nothing is claimed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from data.sample import Images, Sample
from engine import training
from parts import deeplab
from parts.detector import RoIAlign, loss_of
from parts.frozen import freeze
from parts.pretrained import Segmenter, pretrained
from parts.tag_classifier import plain
from pseudo_labels import Config
from scipy import ndimage
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from benchmarks.claims.refinement import Neighbours
from benchmarks.claims.shared import NETWORK, Outcome, Verdict, Work, digest, of_seeds
from segattr.bbam import adaptive_stride, bbam, detector_from_torchvision
from segattr.metrics import average_best_overlap, average_precision
from segattr.networks import evaluating
from segattr.refine import instance_masks

SIZE = 160  # pixels, for which claim 1 has features
STEPS = 400
WIDTH, POOLED, HIDDEN = 64, 5, 128  # channels, cells along a box, features of a box
ANCHORS = (32, 64, 96, 128)  # pixels
LEAST = 12  # height and width of a box, in pixels
USEFUL = 50  # AP50 of boxes, in percent, from which on maps are made
IMAGES = 20  # that get them, of val
RATE = 1e-3
# Of scenes, see examples/boxes.py: fewer steps and proposals than the dissertation's, for speed.
SETTINGS: dict[str, Any] = {"proposals": 100, "steps": 100, "lr": 0.05}
PLAIN: dict[str, Any] = {"rule": "value", "foreground": 0.2, "background": 0.2}
HALF = 0.5  # share of a box that is object, for the CRF
FILLED, BBAM, CRF = MASKS = ("filled boxes", "BBAM", "BBAM + CRF")
WIDTH_OF_PHOTOGRAPHS = 800  # which the published strides are meant for


def config_of(work: Work, seed: int) -> Config:
    preset = Config.PHOTOGRAPHS | {"frozen": True, "size": SIZE, "steps": STEPS, "save_every": 50}
    config = Config(data="voc", root=work.data, seed=seed, resume=True, **preset)
    return dataclasses.replace(config, out=work.folder / f"boxes-{digest(plain(config))}")


def objects(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Masks ``[n, H, W]`` and classes of the connected parts of labels, but for the smallest."""
    masks, found = [], []
    for label in range(1, classes):
        parts, count = ndimage.label((labels == label).numpy())
        for part in (torch.from_numpy(parts == number) for number in range(1, count + 1)):
            if part.any(0).sum() >= LEAST and part.any(1).sum() >= LEAST:
                masks.append(part)
                found.append(label)
    return torch.stack(masks) if masks else torch.zeros(0, *labels.shape, dtype=torch.bool), torch.tensor(found).long()


def around(masks: Tensor) -> Tensor:
    """Boxes ``[n, 4]`` of masks."""
    rows, columns = masks.any(2), masks.any(1)
    ends = [(own.int().argmax(1), own.shape[1] - own.flip(1).int().argmax(1)) for own in (columns, rows)]
    return torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], 1).float()


def filled(boxes: Tensor) -> Tensor:
    """Masks ``[n, H, W]`` of boxes."""
    place = torch.arange(SIZE) + 0.5
    across, down = ((place >= boxes[:, i, None]) & (place <= boxes[:, i + 2, None]) for i in (0, 1))
    return down[:, :, None] & across[:, None]


class Boxed(Images):
    """Images with the boxes of their objects in place of labels; those without an object are left out.

    Args:
        images: made to fit.
    """

    def __init__(self, images: Images) -> None:
        self.classes, self._images = images.classes, images
        found = {i: objects(images.labels(i).as_subclass(Tensor), len(self.classes)) for i in range(len(images))}
        self.objects = [(i, *own) for i, own in found.items() if len(own[0])]
        self.names = [images.names[i] for i, _, _ in self.objects]

    def __getitem__(self, index: int) -> Sample:
        i, masks, labels = self.objects[index]
        boxes = tv_tensors.BoundingBoxes(around(masks), format="XYXY", canvas_size=(SIZE, SIZE))
        return {"image": self._images[i]["image"], "boxes": boxes, "box_labels": labels}


class Detector(nn.Module):
    """A Faster R-CNN on the features of a light decoder. It leaves images as they are: its losses need boxes, too.

    Args:
        classes: with the background.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        decoder = deeplab.build(NETWORK, WIDTH, "imagenet")
        assert isinstance(decoder, Segmenter)
        self.decoder = decoder
        backbone = Neighbours(decoder)
        backbone.out_channels = WIDTH  # type: ignore[assignment]  # where FasterRCNN looks for it
        self.network = FasterRCNN(
            backbone,
            min_size=SIZE,
            max_size=SIZE,
            image_mean=(0.0,) * 3,  # the encoder knows how its images are normalised
            image_std=(1.0,) * 3,
            rpn_anchor_generator=AnchorGenerator((ANCHORS,), ((0.5, 1.0, 2.0),)),
            rpn_pre_nms_top_n_train=64,
            rpn_post_nms_top_n_train=32,
            rpn_pre_nms_top_n_test=64,
            rpn_post_nms_top_n_test=32,
            rpn_batch_size_per_image=64,
            box_roi_pool=RoIAlign(POOLED),
            box_head=TwoMLPHead(WIDTH * POOLED**2, HIDDEN),
            box_predictor=FastRCNNPredictor(HIDDEN, classes),
            box_batch_size_per_image=32,
        )

    def forward(self, image: Tensor) -> Tensor:
        return image


def trained(work: Work, seed: int, images: Sequence[Boxed]) -> Detector:
    """A detector that was trained on the first of the images, and knows the features of all."""
    config = config_of(work, seed)
    training.seed_everything(seed)
    model = Detector(len(images[0].classes))
    freeze(model.decoder, images, work.folder / "features")

    training.train(
        model,
        loss_of(model.network),
        config.stream(images[0], config.fit(mirror=True)),
        torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2),
        steps=STEPS,
        name=f"detector, seed {seed}",
        options=config,
    )
    return model


@torch.no_grad()
def precision(model: Detector, images: Boxed) -> float:
    """AP50 of boxes, in percent."""
    found, truths = [], []
    with evaluating(model):
        for i, (_, masks, labels) in enumerate(images.objects):
            (own,) = model.network([images[i]["image"].as_subclass(Tensor)])
            found.append({"masks": filled(own["boxes"]), "labels": own["labels"], "scores": own["scores"]})
            truths.append({"masks": filled(around(masks)), "labels": labels})
    return 100 * average_precision(found, truths).mean


def overlaps(model: Detector, images: Boxed) -> dict[str, Tensor]:
    """Best overlap, in percent, of the filled boxes of some images and of the masks of BBAMs, without and with CRF."""
    model.decoder.encoder = pretrained(NETWORK).requires_grad_(False)  # BBAM looks at images that nobody has seen
    detector = detector_from_torchvision(model.network)
    found: dict[str, list[dict[str, Tensor]]] = {name: [] for name in MASKS}

    def stride(area: float) -> float:
        return max(1.0, adaptive_stride(area) * SIZE / WIDTH_OF_PHOTOGRAPHS)

    truths = []
    for i, (_, masks, labels) in enumerate(images.objects[:IMAGES]):
        image, boxes = images[i]["image"].as_subclass(Tensor), around(masks)
        generator = torch.Generator().manual_seed(0)
        own = bbam(detector, image, boxes, labels, stride=stride, generator=generator, **SETTINGS)
        refined = instance_masks(own, boxes, image, foreground=HALF, background=HALF)
        made = (filled(boxes), instance_masks(own, boxes, **PLAIN) == 1, refined == 1)
        for name, kind in zip(MASKS, made, strict=True):
            found[name].append({"masks": kind, "labels": labels, "scores": torch.ones(len(labels))})
        truths.append({"masks": masks, "labels": labels})
    return {name: torch.tensor(100 * average_best_overlap(own, truths).mean) for name, own in found.items()}


def train(work: Work, seed: int) -> dict[str, Tensor]:
    """AP50 of a detector and, if that is of use, the best overlaps of masks."""

    def make() -> dict[str, Tensor]:
        config = config_of(work, seed)
        fit, val = (Boxed(config.whole(work.part(split))) for split in ("fit", "val"))
        model = trained(work, seed, [fit, val])
        found = precision(model, val)
        print(f"AP50 of boxes: {found:.1f}", flush=True)
        return {"AP50": torch.tensor(found)} | (overlaps(model, val) if found >= USEFUL else {})

    settings = plain(config_of(work, seed)) | {"useful": USEFUL, "shown": IMAGES, "bbam": SETTINGS}
    return work.once(f"boxes, seed {seed}", settings, make)


def run(work: Work) -> Outcome:
    made = [train(work, seed) for seed in range(work.seeds)]
    figures = {"AP50 of the boxes of the detector": of_seeds([float(own["AP50"]) for own in made])}
    about = f"{work.repeats}, {SIZE} pixels, {STEPS} steps; masks of {IMAGES} images"
    if not all(name in own for own in made for name in MASKS):
        found = figures["AP50 of the boxes of the detector"].value
        about = f"{work.repeats}, {SIZE} pixels, {STEPS} steps; the detector's AP50 is {found:.1f}, less than {USEFUL}"
        return Outcome(
            figures, [Verdict("masks of BBAM overlap objects better than filled boxes", "63.0", None)], about
        )
    figures |= {f"ABO of {name}": of_seeds([float(own[name]) for own in made]) for name in MASKS}
    verdicts = [
        Verdict(
            f"{words} of BBAM overlap objects better than filled boxes",
            "63.0 (with the CRF)" if name == CRF else "",
            of_seeds([float(own[name] - own[FILLED]) for own in made]),
            0.0,
            scenes=scenes,
        )
        for name, words, scenes in ((BBAM, "masks", "+4.1"), (CRF, "masks after the CRF", "+29.1"))
    ]
    return Outcome(figures, verdicts, about)
