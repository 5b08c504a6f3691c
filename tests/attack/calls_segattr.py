"""Valid calls of every public name of segattr, on networks and images so small that each takes milliseconds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import segattr
from segattr import lrp, metrics, plot, refine
from tests.attack.call import Call, module, shape_of

HEIGHT, WIDTH, CLASSES = 12, 10, 3


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images() -> Tensor:
    return rand(2, 3, HEIGHT, WIDTH)


def network() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *head)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.01, 0.01, generator=generator())  # for images of 1e38, too
    return net


def detector(images: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Says class 1 of 2 where a proposal is bright, and that the proposal is right."""
    bright = torch.stack([image.mean() for image, own in zip(images, boxes, strict=True) for _ in own])
    return torch.stack([1 - bright, 1 + bright], 1), 0 * bright[:, None].expand(-1, 4)


class RegionCNN(nn.Module):
    """The parts of torchvision's Faster R-CNN that the adapter looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.backbone, self.roi_heads = nn.Identity(), nn.Identity(), nn.Module()
        for part in ("box_roi_pool", "box_head", "box_predictor", "box_coder"):
            setattr(self.roi_heads, part, nn.Identity())


def objects() -> dict[str, Any]:
    """An image with two objects, for a detector."""
    boxes = torch.tensor([[1.0, 1, 8, 9], [3, 2, 10, 12]])
    return {"detector": detector, "image": rand(3, HEIGHT, WIDTH), "boxes": boxes, "labels": torch.tensor([1, 1])}


def masks(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % 3 == 0


def tags(count: int = CLASSES) -> Tensor:
    return torch.eye(2, count) + torch.eye(2, count).roll(1, 1)


# --- shapes of results


def maps_of(arguments: dict[str, Any], *size: int) -> Any:
    """Of all classes, of some, or of those of each image."""
    classes, batch = arguments["classes"], len(arguments["images"])
    size = size or tuple(arguments["images"].shape[2:])
    if classes is None:
        return (batch, CLASSES, *size)
    if any(isinstance(own, Sequence) for own in classes):
        return [(len(own), *size) for own in classes]
    return (batch, len(classes), *size)


def of_masks(arguments: dict[str, Any]) -> Any:
    pooled = arguments["pooled"]
    return tuple(arguments["prediction"].shape[1 if pooled else 0 : -2])


def of_labels(arguments: dict[str, Any]) -> Any:
    maps, size = arguments["maps"], arguments["size"]
    if isinstance(maps, Tensor):
        return (len(maps), *(size or maps.shape[2:]))
    return [tuple(size or own.shape[1:]) for own in maps]


def like(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: shape_of(arguments[name])


# --- results without the NaN that some are documented to hold


def known(function: Callable[..., Any]) -> Callable[..., Any]:
    """0 for what a measure has no value of."""

    def clean(value: Any) -> Any:
        if isinstance(value, tuple):
            return [clean(part) for part in value]
        return (value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")).nan_to_num(nan=0)

    return lambda **arguments: clean(function(**arguments))


# --- classifiers and their maps


def classifier() -> Call:
    layers = list(network().children())
    parts = {"features": nn.Sequential(*layers[:2]), "head": nn.Sequential(*layers[2:])}
    return Call(
        module(segattr.Classifier),
        {**parts, "images": images()},
        lambda arguments: (len(arguments["images"]), CLASSES),
        fixed=("images",),  # goes to the user's own layers as it is
    )


def volumes() -> Tensor:
    return rand(2, 1, 5, 6, 7)


def network_of_volumes() -> nn.Module:
    head = [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), *head)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.01, 0.01, generator=generator())
    return segattr.split(net, example=volumes())


def split() -> Call:
    return Call(segattr.split, {"model": network(), "layer": "1"})


def cam() -> Call:
    arguments = {"clf": network(), "images": images(), "classes": [[0, 2], [1]], "norm": "relu_max"}
    return Call(segattr.cam, arguments, maps_of)


def cam_of_volumes() -> Call:
    arguments = {"clf": network_of_volumes(), "images": volumes(), "classes": [[0, 2], [1]], "norm": "relu_max"}
    return Call(segattr.cam, arguments, maps_of)


def grad_cam() -> Call:
    arguments = {"clf": network(), "images": images(), "classes": [0, 2], "layer": "1", "pool": False, "norm": "max"}
    return Call(segattr.grad_cam, arguments, maps_of)


def normalize() -> Call:
    return Call(segattr.normalize, {"maps": rand(2, 3, 5, 4) - 0.5, "mode": "minmax"}, like("maps"))


def normalize_of_volumes() -> Call:
    return Call(segattr.normalize, {"maps": rand(2, 3, 2, 5, 4) - 0.5, "mode": "max", "dims": 3}, like("maps"))


def multiscale() -> Call:
    net = network()
    arguments = {"method": lambda x: segattr.cam(net, x), "images": images(), "scales": (0.5, 1.0), "flip": True}
    return Call(
        segattr.multiscale,
        arguments,
        lambda arguments: maps_of({**arguments, "classes": None}),
        fixed=("method",),
    )


def advcam() -> Call:
    arguments = {
        "clf": network(),
        "images": images(),
        "classes": [[0, 2], [1]],
        "steps": 2,
        "step_size": 0.08,
        "threshold": 0.5,
        "penalty": 3.0,
        "suppress": True,
        "literal": False,
        "reference": False,
        "chunk": 2,
    }
    return Call(segattr.advcam, arguments, maps_of, counts=("steps",))


def gndrp() -> Call:
    arguments = {"features_or_maps": rand(2, 5, 4, 3), "maps": rand(2, 3, 4, 3), "threshold": 0.4, "divide_by": "all"}

    def shape(arguments: dict[str, Any]) -> Any:
        pooled, maps = arguments["features_or_maps"].shape, arguments["maps"].shape
        return tuple(maps[:2]) if pooled == maps else (*maps[:2], pooled[1])

    return Call(segattr.gndrp, arguments, shape)


def rib() -> Call:
    arguments = {
        "clf": network(),
        "images": images(),
        "tags": tags(),
        "companions": [(images(), tags()), (images()[:, :, :6], tags())],
        "steps": 2,
        "lr": 8e-6,
        "margin": 600.0,
        "pool": "gndrp",
        "threshold": 0.4,
        "classes": [[0, 2], [1]],
        "norm": "relu",
        "frozen": (),
        "stop": False,
        "reference": False,
    }
    return Call(segattr.rib, arguments, maps_of, counts=("steps",))


def ficklenet() -> Call:
    arguments = {
        "features": rand(2, 4, 6, 5),
        "head": segattr.StochasticConv2d(4, CLASSES, kernel=3, drop=0.5),
        "passes": 3,
        "threshold": 0.35,
        "tags": tags(),
        "norm": "relu_max",
        "generator": generator(),
    }
    return Call(
        segattr.ficklenet,
        arguments,
        lambda arguments: (len(arguments["features"]), *arguments["features"].shape[2:]),
        counts=("passes",),
    )


def stochastic_conv2d() -> Call:
    arguments = {"in_channels": 4, "classes": CLASSES, "kernel": 3, "drop": 0.5}
    return Call(
        module(segattr.StochasticConv2d),
        {**arguments, "features": rand(2, 4, 6, 5), "generator": generator()},
        lambda arguments: (len(arguments["features"]), arguments["classes"], *arguments["features"].shape[2:]),
        fixed=("in_channels",),  # which the features tell
        counts=("classes", "kernel"),
        random=True,  # the first weights
    )


# --- detectors


def bbam() -> Call:
    arguments = objects() | {
        "steps": 2,
        "lr": 0.02,
        "sparsity": 0.007,
        "heads": ("box", "cls"),
        "proposals": 5,
        "stride": 4.0,
        "mean": [0.5, 0.5, 0.5],
        "decode": None,
        "reference": False,
        "chunk": 1,
        "progress": lambda step, terms: None,
        "generator": generator(),
    }
    return Call(
        segattr.bbam,
        arguments,
        lambda arguments: (len(arguments["boxes"]), *arguments["image"].shape[1:]),
        counts=("steps", "proposals"),
    )


def bbam_of_proposals() -> Call:
    """A detector by its protocol, with proposals of the user."""
    arguments = objects() | {"proposals": [torch.tensor([[1.0, 1, 8, 8]])] * 2, "generator": generator(), "steps": 1}
    return Call(
        segattr.bbam,
        arguments,
        lambda arguments: (len(arguments["boxes"]), *arguments["image"].shape[1:]),
        counts=("steps",),
    )


def positive_proposals() -> Call:
    arguments = objects() | {
        "count": 5,
        "jitter": 0.1,
        "min_iou": (0.9, 0.1),
        "keep": 3,
        "decode": None,
        "generator": generator(),
    }
    return Call(segattr.positive_proposals, arguments, counts=("count",))


# --- LRP


def heatmaps(arguments: dict[str, Any]) -> Any:
    x = arguments["x"]
    return [(len(x), CLASSES), maps_of({"images": x, "classes": arguments["classes"]})]


def unroll() -> Call:
    def call(model: Any, x: Any, classes: Any, **settings: Any) -> Any:
        return lrp.unroll(model, **settings)(x, classes)

    settings = {
        "activations": "tied",
        "weights": "tied",
        "upsampling": "tied",
        "skip": None,
        "batch_norm": "batch",
        "epsilon": 0.1,
        "chunk": 2,
    }
    arguments = {"model": network(), "x": images(), "classes": [0, 2]}
    return Call(call, arguments | settings, heatmaps, fixed=("model",))


def unroll_by_a_rule() -> Call:
    def call(model: Any, x: Any, classes: Any, **settings: Any) -> Any:
        return lrp.unroll(model, **settings)(x, classes)

    settings = {"rule": "gamma", "gates": "constant", "example": images(), "chunk": 2}
    arguments = {"model": network(), "x": images(), "classes": [0, 2]}
    return Call(call, arguments | settings, heatmaps, fixed=("model",))


def unrolled_lrp() -> Call:
    unrolled = lrp.unroll(network())
    return Call(unrolled, {"x": images(), "classes": [[0, 2], [1]]}, heatmaps, fixed=("x",))


def ledger() -> Call:
    unrolled = lrp.unroll(network())
    assert isinstance(unrolled, lrp.UnrolledLRP)
    return Call(unrolled.ledger, {"x": images()}, lambda arguments: [(len(arguments["x"]), CLASSES)] * 2)


def free_decoder() -> Call:
    decoder = lrp.unroll(network(), weights="free", upsampling="nearest", skip="concat").eval()
    return Call(decoder, {"x": images(), "classes": None}, heatmaps)


def adjoint() -> Call:
    class Triple(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    return Call(lambda operations: lrp.adjoint(operations), {"operations": Triple})


def linearised() -> Call:
    """A record, which checks nothing."""
    arguments = {"output": rand(2, 3), "adjoint": lambda gradient: gradient}
    return Call(lrp.Linearised, arguments, fixed=("output", "adjoint"))


def heatmap_loss(function: Callable[..., Tensor]) -> Call:
    labels = torch.zeros(2, 4, 3, dtype=torch.int64)
    labels[0, 0] = 255
    arguments = {
        "heatmaps": rand(2, CLASSES, 4, 3),
        "scores": rand(2, CLASSES),
        "labels": labels,
        "tags": tags(),
        "scale": 2.0,
        "weight": 1.0,
        "background_weight": 0.5,
        "ignore_index": 255,
    }
    return Call(function, arguments, lambda arguments: ())


def labelled_subset() -> Call:
    arguments = {"tags": tags().repeat(3, 1), "count": 3, "uniform_below": 2, "generator": generator()}
    return Call(lrp.labelled_subset, arguments, lambda arguments: (int(arguments["count"]),))


# --- measures


def of_two_masks(function: Callable[..., Tensor]) -> Call:
    arguments: dict[str, Any] = {"prediction": masks(2, 3, 6, 5), "truth": masks(2, 3, 6, 5).flip(-1)}
    arguments |= {"valid": ~masks(2, 6, 5), "pooled": True, "absent": 1.0}
    if function is not metrics.region_similarity:
        arguments["tolerance"] = 0.1
    return Call(function, arguments, of_masks, any_value=("absent",))


def j_and_f_of_data_set() -> Call:
    def call(prediction: Any, truth: Any, valid: Any, **settings: Any) -> Any:
        quality = metrics.JAndF(**settings)
        quality.update(prediction, truth, valid=valid)
        return quality.compute()

    arguments = {"prediction": masks(2, 3, 6, 5), "truth": masks(2, 3, 6, 5).flip(-1), "valid": ~masks(2, 6, 5)}
    settings = {"classes": 3, "tolerance": 0.1, "absent": 1.0, "device": "cpu"}
    return Call(
        call,
        arguments | settings,
        lambda arguments: [(arguments["classes"],)] * 2,
        any_value=("absent",),
        counts=("classes",),
    )


def high_gradient_ratio() -> Call:
    arguments = {
        "gradients": rand(2, 3, 6, 5),
        "regions": masks(2, 4, 6, 5),
        "threshold": 0.3,
        "scale": torch.tensor([1.0, 0.5]),
    }

    def shape(arguments: dict[str, Any]) -> Any:
        return tuple(arguments["regions"].shape[:-2])

    return Call(known(metrics.high_gradient_ratio), arguments, shape)


def pointing_game() -> Call:
    arguments = {"maps": rand(2, 3, 6, 5), "masks": masks(2, 3, 6, 5), "tolerance": 2.0}
    return Call(known(metrics.pointing_game), arguments, lambda arguments: tuple(arguments["maps"].shape[:2]))


def of_maps() -> dict[str, Any]:
    labels = torch.arange(60).view(2, 6, 5) % 4
    return {
        "maps": rand(2, CLASSES, 6, 5),
        "labels": labels,
        "tags": torch.ones(2, CLASSES),
        "thresholds": [0.1, 0.3, 0.5],
        "ignore_index": 255,
    }


def best_threshold(arguments: dict[str, Any]) -> Any:
    classes = arguments["maps"].shape[1] + 1
    return [(), (), (classes,), (classes,), (classes,), (len(arguments["thresholds"]),)]


def best_threshold_miou() -> Call:
    return Call(known(metrics.best_threshold_miou), of_maps(), best_threshold)


def threshold_sweep() -> Call:
    def call(classes: Any, thresholds: Any, ignore_index: Any, device: Any, **batch: Any) -> Any:
        sweep = metrics.ThresholdSweep(classes, thresholds=thresholds, ignore_index=ignore_index, device=device)
        sweep.update(**batch)
        return sweep.compute()

    arguments = of_maps() | {"classes": CLASSES, "device": "cpu"}
    return Call(known(call), arguments, best_threshold, counts=("classes",))


def of_instances(function: Callable[..., Any]) -> Call:
    """Besides whole lists, the tensors of one prediction are spoilt."""

    def call(predictions: Any, truths: Any, masks: Any, labels: Any, scores: Any, **settings: Any) -> Any:
        first = {"masks": masks, "labels": labels, "scores": scores}
        listed = isinstance(predictions, list)
        return function([first, *predictions] if listed else predictions, truths, **settings)

    arguments = {
        "predictions": [{"masks": masks(2, 6, 5), "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.2])}],
        "truths": [{"masks": masks(1, 6, 5), "labels": torch.tensor([1])}] * 2,
        "masks": masks(2, 6, 5),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.2]),
    }
    if function is metrics.average_precision:
        return Call(call, {**arguments, "threshold": 0.5}, lambda arguments: [(), (1,), (1,)])
    return Call(call, arguments, lambda arguments: [(), (1,), (1,)], any_value=("scores",))  # which it does not use


def per_class() -> Call:
    """A record, which checks nothing; as the next one."""
    arguments = {"mean": 0.5, "classes": torch.tensor([1]), "values": torch.tensor([0.5])}
    return Call(metrics.PerClass, arguments, fixed=tuple(arguments))


def best_threshold_record() -> Call:
    values = {name: rand(2) for name in ("iou", "precision", "recall", "curve")}
    arguments = {"threshold": 0.5, "miou": 0.5, **values}
    return Call(metrics.BestThreshold, arguments, fixed=tuple(arguments))


# --- refinement


def dense_crf() -> Call:
    arguments = {
        "probabilities": rand(2, CLASSES, 6, 5),
        "image": rand(2, 3, 6, 5),
        "iterations": 2,
        "weight": 4.0,
        "sigma_rgb": 0.1,
        "sigma_xy": 5.0,
        "smooth_weight": 3.0,
        "smooth_sigma_xy": 2.0,
        "spacing": (1.0, 2.0),
        "own": False,
        "filled": False,
        "valid": ~masks(2, 6, 5),
        "scale_factor": 0.5,
        "method": "exact",
        "tolerance": 1e-2,
        "backend": "auto",
    }
    return Call(refine.dense_crf, arguments, like("probabilities"), counts=("iterations",))


def published_crf(settings: refine.CRFSettings) -> Call:
    arguments = {"probabilities": rand(1, CLASSES, 6, 5), "image": rand(1, 3, 6, 5), **settings}
    return Call(refine.dense_crf, arguments, like("probabilities"), counts=("iterations",))


def label_probabilities() -> Call:
    arguments = {"labels": masks(2, 6, 5).long(), "tags": torch.ones(2, CLASSES), "confidence": 0.7}

    def shape(arguments: dict[str, Any]) -> Any:
        batch, *size = arguments["labels"].shape
        return (batch, arguments["tags"].shape[1], *size)

    return Call(refine.label_probabilities, {**arguments, "ignore_index": 255}, shape)


def grow_seeds() -> Call:
    seeds = torch.full((2, 6, 5), 255)
    seeds[:, 2, 2] = 1
    arguments = {"seeds": seeds, "probabilities": rand(2, CLASSES, 6, 5)}
    settings = {"foreground": 0.85, "background": 0.99, "ignore_index": 255}
    return Call(refine.grow_seeds, arguments | settings, like("seeds"))


def instance_masks() -> Call:
    arguments = {
        "bbams": rand(2, HEIGHT, WIDTH),
        "boxes": objects()["boxes"],
        "image": rand(3, HEIGHT, WIDTH),
        "rule": "area",
        "foreground": 0.15,
        "background": 0.8,
        "smoothing": 2.0,
        "crf": {**refine.BBAM_CRF, "iterations": 1},
        "ignore_index": 255,
    }
    return Call(refine.instance_masks, arguments, like("bbams"))


def semantic_labels() -> Call:
    arguments = {"masks": masks(2, 6, 5).long(), "labels": torch.tensor([3, 7]), "ignore_index": 255}
    return Call(refine.semantic_labels, arguments, lambda arguments: tuple(arguments["masks"].shape[1:]))


def merge_proposals() -> Call:
    return Call(refine.merge_proposals, {"mask": masks(2, 6, 5), "proposals": masks(4, 6, 5)}, like("mask"))


def pseudo_labels() -> Call:
    arguments = {"maps": rand(2, CLASSES, 6, 5), "tags": tags(), "size": (8, 7)}
    settings = {"foreground": 0.3, "background": 0.05, "ignore_index": 255}
    return Call(refine.pseudo_labels, arguments | settings, of_labels, counts=("size",))


def pseudo_labels_of_lists() -> Call:
    arguments = {"maps": [rand(2, 6, 5), rand(1, 4, 3)], "tags": [[0, 2], [1]], "size": None}
    return Call(refine.pseudo_labels, arguments, of_labels)


def random_walk() -> Call:
    arguments = {
        "maps": rand(2, CLASSES, 3, 2),
        "affinity": rand(2, 6, 6) + 0.1,
        "beta": 10.0,
        "steps": 3,
        "boundary": rand(2, 1, 3, 2),
    }
    return Call(refine.random_walk, arguments, like("maps"), counts=("steps",))


# --- pictures


def overlay() -> Call:
    arguments = {"image": rand(3, HEIGHT, WIDTH), "values": rand(4, 3), "alpha": 0.5}
    return Call(plot.overlay, arguments, like("image"))


def map_grid() -> Call:
    arguments = {"images": rand(1, 3, 4, 3), "maps": {"CAM": rand(1, 4, 3)}, "alpha": 0.5}
    return Call(plot.map_grid, arguments)


def heatmap() -> Call:
    arguments = {"image": rand(3, 4, 3), "heatmaps": {"cat": rand(4, 3)}, "percentile": 99.0}
    return Call(plot.heatmap, arguments)


def slices() -> Call:
    arguments = {
        "volume": rand(1, 4, 3, 5),
        "maps": {"CAM": rand(2, 2, 2)},
        "at": (1, 2, 3),
        "spacing": (2.0, 1.0, 1.0),
        "alpha": 0.5,
    }
    return Call(plot.slices, arguments)


def size_grid() -> Call:
    arguments = {"image": rand(3, 4, 3), "columns": 3, "rows": 2}
    return Call(plot.size_grid, arguments)


CALLS: dict[str, Callable[[], Call]] = {
    "segattr.Classifier": classifier,
    "segattr.Detector": bbam_of_proposals,
    "segattr.StochasticConv2d": stochastic_conv2d,
    "segattr.adaptive_stride": lambda: Call(segattr.adaptive_stride, {"area": 0.25}, lambda arguments: ()),
    "segattr.advcam": advcam,
    "segattr.bbam": bbam,
    "segattr.cam": cam,
    "segattr.cam volumes": cam_of_volumes,
    "segattr.detector_from_torchvision": lambda: Call(segattr.detector_from_torchvision, {"model": RegionCNN()}),
    "segattr.ficklenet": ficklenet,
    "segattr.gndrp": gndrp,
    "segattr.grad_cam": grad_cam,
    "segattr.multiscale": multiscale,
    "segattr.normalize": normalize,
    "segattr.normalize volumes": normalize_of_volumes,
    "segattr.positive_proposals": positive_proposals,
    "segattr.rib": rib,
    "segattr.split": split,
    "segattr.lrp.FreeDecoder": free_decoder,
    "segattr.lrp.HeatmapLoss": lambda: heatmap_loss(module(lrp.HeatmapLoss)),
    "segattr.lrp.Linearised": linearised,
    "segattr.lrp.UnrolledLRP": unrolled_lrp,
    "segattr.lrp.UnrolledLRP.ledger": ledger,
    "segattr.lrp.adjoint": adjoint,
    "segattr.lrp.heatmap_loss": lambda: heatmap_loss(lrp.heatmap_loss),
    "segattr.lrp.labelled_subset": labelled_subset,
    "segattr.lrp.unroll": unroll,
    "segattr.lrp.unroll rules": unroll_by_a_rule,
    "segattr.metrics.BestThreshold": best_threshold_record,
    "segattr.metrics.JAndF": j_and_f_of_data_set,
    "segattr.metrics.PerClass": per_class,
    "segattr.metrics.ThresholdSweep": threshold_sweep,
    "segattr.metrics.average_best_overlap": lambda: of_instances(metrics.average_best_overlap),
    "segattr.metrics.average_precision": lambda: of_instances(metrics.average_precision),
    "segattr.metrics.best_threshold_miou": best_threshold_miou,
    "segattr.metrics.contour_f": lambda: of_two_masks(metrics.contour_f),
    "segattr.metrics.high_gradient_ratio": high_gradient_ratio,
    "segattr.metrics.j_and_f": lambda: of_two_masks(metrics.j_and_f),
    "segattr.metrics.pointing_game": pointing_game,
    "segattr.metrics.region_similarity": lambda: of_two_masks(metrics.region_similarity),
    "segattr.plot.heatmap": heatmap,
    "segattr.plot.map_grid": map_grid,
    "segattr.plot.overlay": overlay,
    "segattr.plot.size_grid": size_grid,
    "segattr.plot.slices": slices,
    "segattr.refine.BBAM_CRF": lambda: published_crf(refine.BBAM_CRF),
    "segattr.refine.CRFSettings": lambda: Call(refine.CRFSettings, dict(refine.IRN_CRF), fixed=tuple(refine.IRN_CRF)),
    "segattr.refine.IRN_CRF": lambda: published_crf(refine.IRN_CRF),
    "segattr.refine.DEEPLAB_CRF": lambda: published_crf(refine.DEEPLAB_CRF),
    "segattr.refine.dense_crf": dense_crf,
    "segattr.refine.grow_seeds": grow_seeds,
    "segattr.refine.instance_masks": instance_masks,
    "segattr.refine.label_probabilities": label_probabilities,
    "segattr.refine.merge_proposals": merge_proposals,
    "segattr.refine.pseudo_labels": pseudo_labels,
    "segattr.refine.pseudo_labels lists": pseudo_labels_of_lists,
    "segattr.refine.random_walk": random_walk,
    "segattr.refine.semantic_labels": semantic_labels,
}
