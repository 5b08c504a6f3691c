"""A small Faster R-CNN for images of 64 pixels, of torchvision's classes, and its training on boxes."""

import torch
from data.augment import Fit
from data.sample import Batch, Images, Sample
from data.scenes import CLASSES, Scenes
from engine import training
from engine.processes import pick_device
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from parts.network import block

WIDTH, POOLED, HIDDEN = 24, 5, 128  # channels of the first level, cells along a box, features of a box
ANCHORS = (24, 36, 48)  # pixels
LEARNING_RATE = 2e-3


class RoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]  # torchvision has no types
    """Features of boxes, ``[P, C, size, size]``, for one level of features, in products.

    Bilinear interpolation is one product with weights of rows and one with weights of columns. That is many times
    faster where torchvision has no compiled operators (see :mod:`parts.torchvision_cpu`), for boxes within their image.

    Args:
        size: of the grid of cells in a box; features are the mean of ``samples`` x ``samples`` points of a cell.
        samples: along a cell.
    """

    def __init__(self, size: int, samples: int = 2) -> None:
        super().__init__(["0"], size, samples)
        self.size, self.samples = size, samples

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        (level,) = x.values()
        pooled = []
        for maps, own, shape in zip(level, boxes, image_shapes, strict=True):
            x1, y1, x2, y2 = own.to(maps.dtype).unbind(1)
            rows, columns = (
                self._weights(start * number / side, end * number / side, number)
                for start, end, number, side in zip((y1, x1), (y2, x2), maps.shape[1:], shape, strict=True)
            )
            along = torch.einsum("chw,pjw->pchj", maps, columns)
            pooled.append(rows[:, None] @ along)
        return torch.cat(pooled)

    def _weights(self, start: Tensor, end: Tensor, number: int) -> Tensor:
        """Of the means of cells, ``[P, size, number]``, from where boxes start to where they end."""
        count = self.size * self.samples
        steps = (torch.arange(count, dtype=start.dtype, device=start.device) + 0.5) / count
        place = start[:, None] + steps * (end - start).clamp(min=1)[:, None]
        index = torch.arange(number, dtype=start.dtype, device=start.device)
        weights = (1 - (place.clamp(0, number - 1)[:, :, None] - index).abs()).clamp(min=0)
        return weights.unflatten(1, (self.size, self.samples)).mean(2)


def faster_rcnn(size: int, classes: int) -> FasterRCNN:
    """A Faster R-CNN with one level of features, at a quarter of the resolution of the image.

    Args:
        size: height and width of the images, in pixels, which are not resized.
        classes: with the background.
    """
    body = nn.Sequential(block(3, WIDTH, 2), block(WIDTH, 2 * WIDTH, 2), block(2 * WIDTH, 4 * WIDTH))
    body.out_channels = 4 * WIDTH  # type: ignore[assignment]  # where FasterRCNN looks for it
    return FasterRCNN(
        body,
        min_size=size,
        max_size=size,
        rpn_anchor_generator=AnchorGenerator((ANCHORS,), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=64,
        rpn_post_nms_top_n_train=32,
        rpn_batch_size_per_image=64,
        box_roi_pool=RoIAlign(POOLED),
        box_head=TwoMLPHead(4 * WIDTH * POOLED**2, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, classes),
        box_batch_size_per_image=32,
    )


class Boxed(Images):
    """Scenes with their boxes and without their labels, which the detector does not see."""

    def __init__(self, scenes: Scenes) -> None:
        self.classes, self.names = CLASSES, [f"{i:06d}" for i in range(len(scenes))]
        self._scenes = list(scenes)

    def __getitem__(self, index: int) -> Sample:
        scene = self._scenes[index]
        height, width = scene.image.shape[1:]
        return {
            "image": tv_tensors.Image(scene.image),
            "boxes": tv_tensors.BoundingBoxes(scene.boxes, format="XYXY", canvas_size=(height, width)),
            "box_labels": scene.box_labels,
        }


class Later(nn.Module):
    """Leaves images as they are: in training, torchvision's detectors give losses, and for these they need boxes."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> Tensor:
        return image


def loss_of(detector: FasterRCNN) -> training.Loss:
    """The sum of a detector's own losses, of images and the boxes and box labels of their batch."""

    def loss(image: Tensor, batch: Batch) -> Tensor:
        pairs = zip(batch["boxes"], batch["box_labels"], strict=True)
        targets = [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]
        return torch.stack(list(detector(list(image), targets).values())).sum()

    return loss


def train_detector(scenes: Scenes, steps: int, options: training.Options) -> FasterRCNN:
    """A detector trained on the boxes of scenes, in one process."""
    images = Boxed(scenes)
    model = Later(faster_rcnn(scenes.size, len(images.classes))).to(pick_device(options.device))

    training.train(
        model,
        loss_of(model.detector),
        options.stream(images, Fit(scenes.size, mirror=True)),
        torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2),
        steps=steps,
        name=f"detector, seed {options.seed}",
        options=options,
    )
    return model.detector.eval()
