"""A classifier as encoder of a segmentation network with free weights: the FCN and the U-Net of the ablation."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segattr.lrp.plan import Operation, Plan, Plans
from segattr.networks.classes import Classes, Maps, ScoresAndMaps, check_classes
from segattr.networks.classifier import check_layout, taking, tracked
from segattr.networks.modes import evaluating
from segattr.networks.reader.record import IMAGES, Result
from segattr.networks.spatial import CONVOLUTIONS
from segloss.common.checks import check_choice, check_finite, check_floating, shape_text

_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WIDEST = 256  # channels of a level: makes the U-Net of ResNet-50 about as large as the one of the paper


class Level(nn.Sequential):
    """One resolution of the decoder: nearest up-sampling, concatenation with the encoder's map, two convolutions.

    Args:
        source: the result whose size it goes up to.
        below: channels that it gets from the level below.
        beside: channels of the encoder's map that are concatenated; 0 for none.
        width: channels that it gives.
        dims: number of spatial dimensions.
    """

    def __init__(self, source: Result, below: int, beside: int, width: int, dims: int) -> None:
        convolution, normalisation = CONVOLUTIONS[dims - 1], _NORMALISATIONS[dims - 1]
        layers: list[nn.Module] = []
        for channels in (below + beside, width):
            layers += [convolution(channels, width, 3, padding=1, bias=False), normalisation(width), nn.ReLU()]
        super().__init__(*layers)
        self.source, self.beside = source, beside

    def forward(self, x: Tensor, results: dict[Result, Tensor]) -> Tensor:  # type: ignore[override]
        guide = results[self.source]
        x = _resize(x, guide)
        return super().forward(torch.cat([x, guide], 1) if self.beside else x)

    def extra_repr(self) -> str:
        concatenated = f", concatenated with its {self.beside} channels" if self.beside else ""
        return f"up to the size of {self.source.name}{concatenated}"


class FreeDecoder(nn.Module):
    """A classifier as encoder, and a decoder with weights of its own from its last feature map to one map per class.

    At each resolution, one per halving of the image, the encoder's map is the last one that everything after it
    depends on: the end of a stage of a ResNet, not something inside a block. The coarsest one before global pooling
    or flattening is the bottleneck. From there every level of the decoder goes up to the actual size of the
    next map and has as many channels, at most 256. A last one goes up to the image, which is not concatenated, as
    in the U-Net, unless the encoder has a map of that size. A convolution 1x1 gives the maps.

    The encoder runs by the rules of its operations, so that its batch normalisation is that of the unrolled decoder.
    The decoder starts in training mode, on the device and in the dtype of the classifier. With ResNet-50 and 21
    classes the U-Net has 35.65 M parameters (38.84 M in the paper), the FCN 31.48 M. The head of the classifier has no
    part in the maps: under DistributedDataParallel a loss of the maps alone needs ``find_unused_parameters=True``.

    Args:
        plans: of the classifier, which is the encoder, and whose own head gives the scores.
        skip: ``"concat"`` for the U-Net, None for the FCN.
        size: of the image or volume to find the resolutions with, ``(C, H, W)`` or ``(C, D, H, W)``, any that the
            classifier can take.

    Raises:
        ValueError: another ``skip``, a ``size`` that the classifier cannot take, scores that are not ``[B, K]``.
        TypeError: a classifier without feature maps.

    Source:
        *Model Guidance via Explanations Turns Image Classifiers into Segmentation Models*, section 3 and table 3.
    """

    __call__: ScoresAndMaps

    def __init__(
        self,
        plans: Plans,
        skip: Literal["concat"] | None = None,
        size: tuple[int, ...] = (3, 224, 224),
    ) -> None:
        check_choice("skip", skip, (None, "concat"))
        super().__init__()
        self.encoder, self.plans = plans.model, plans
        results, plan = self._example(size)
        *sources, self.bottleneck = _feature_maps(plan, results)
        scores = results[plan.output]
        if scores.dim() != 2:
            raise ValueError(f"model: expected scores [B, K], got {shape_text(scores.shape)}")
        width = results[self.bottleneck].shape[1]
        levels = []
        for source in reversed(sources):
            below, beside = width, results[source].shape[1]
            if source != IMAGES:  # the finest level is as wide as the one before
                width = min(beside, WIDEST)
            levels.append(Level(source, below, beside if skip and source != IMAGES else 0, width, len(size) - 1))
        self.decoder = nn.ModuleList(levels).to(scores)
        self.maps = CONVOLUTIONS[len(size) - 2](width, scores.shape[1], 1).to(scores)

    def forward(self, x: Tensor, classes: Classes | None = None) -> tuple[Tensor, Maps]:
        """Class scores and maps, with the arguments, results and errors of :meth:`UnrolledLRP.forward`."""
        check_floating("x", x)
        check_layout("x", x)
        check_finite("x", x)
        with taking("x", x):
            plan = self.plans.plan(x)
            results = plan.run(self.encoder, tracked(x))[0]
        maps = results[self.bottleneck]
        for level in self.decoder:
            maps = level(maps, results)
        return results[plan.output], _choose(_resize(self.maps(maps), x), classes)

    def _example(self, size: tuple[int, ...]) -> tuple[dict[Result, Any], Plan]:
        """The results for a blank image in evaluation mode, which leaves no trace in the encoder."""
        parameter = next(self.encoder.parameters(), torch.empty(0))
        with torch.no_grad(), evaluating(self.encoder):
            try:
                x = parameter.new_zeros(1, *size)
                plan = self.plans.plan(x)
                return plan.run(self.encoder, x)[0], plan
            except RuntimeError as error:
                raise ValueError(f"size: the classifier does not take an image {shape_text(size)}: {error}") from error


def _choose(maps: Tensor, classes: Classes | None) -> Maps:
    if classes is None:
        return maps
    wanted = check_classes(classes, *maps.shape[:2])
    if any(isinstance(numbers, list) for numbers in wanted):
        return [own[numbers] for own, numbers in zip(maps, wanted, strict=True)]
    return maps[:, wanted]


def _resize(x: Tensor, guide: Tensor) -> Tensor:
    return x if x.shape[2:] == guide.shape[2:] else F.interpolate(x, guide.shape[2:], mode="nearest")


def _feature_maps(plan: Plan, results: dict[Result, Any]) -> list[Result]:
    """The feature maps, the last at each resolution, from fine to coarse; the image where none is as fine."""
    image = results[IMAGES].shape
    found = {0: IMAGES}  # by how often the image is halved
    for operation in _cut_points(plan):
        (result,) = operation.outputs
        shape = results[result].shape
        if len(shape) != len(image) or shape[2:].numel() == 1 or operation.kind.lower().startswith("adaptive"):
            break  # global pooling, or the head
        found[round(math.log2(image[2:].numel() / shape[2:].numel()) / len(shape[2:]))] = result
    if found == {0: IMAGES}:
        raise TypeError("model: expected a classifier with feature maps, such as a ResNet, got none before its head")
    return [found[halvings] for halvings in sorted(found)]


def _cut_points(plan: Plan) -> list[Operation]:
    """The operations that everything after them depends on, in order: none later has an input from before them."""
    place = {IMAGES: -1} | {r: i for i, operation in enumerate(plan.operations) for r in operation.outputs}
    found = []
    earliest = len(plan.operations)
    for i, operation in reversed(list(enumerate(plan.operations))):
        if earliest >= i and operation.inputs and len(operation.outputs) == 1:
            found.append(operation)
        earliest = min([earliest, *(place[result] for result in plan.dependencies(operation))])
    return found[::-1]
