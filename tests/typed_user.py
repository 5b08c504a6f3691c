"""What a user with mypy writes: every public name, and the type that it gives. It is checked, not run."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import assert_type

import segattr
import segattr.plot
import segloss
import segloss.bilateral


def losses(logits: Tensor, image: Tensor, labels: Tensor, tags: Tensor, sizes: Tensor, scores: Tensor) -> None:
    assert_type(segloss.size_kl(logits, sizes, known=tags, valid=None, reduction="none"), Tensor)
    assert_type(segloss.reverse_size_kl(logits, sizes, floor=1e-8), Tensor)
    assert_type(segloss.log_barrier(logits, tags), Tensor)
    assert_type(segloss.suppression(logits, tags), Tensor)
    assert_type(segloss.flat_barrier(logits, tags, floor=0.05, flat="above"), Tensor)
    assert_type(segloss.size_barrier(logits, lower=sizes, upper=0.5, t=5), Tensor)
    assert_type(segloss.balance_kl(logits, sizes[0]), Tensor)
    assert_type(segloss.partial_cross_entropy(logits, labels), Tensor)
    assert_type(segloss.balanced_seeding(logits, labels, background=0), Tensor)
    assert_type(segloss.boundary_constraint(logits, logits.softmax(1), seeds=labels, clip=(0.0, 1.0)), Tensor)
    assert_type(segloss.centroids_from_labels(labels, 3, spacing=(3.0, 1.0, 1.0)), tuple[Tensor, Tensor])
    assert_type(segloss.centroid_loss(logits, sizes, descriptor="spread", spacing=[1, 1], known=tags), Tensor)
    assert_type(segloss.signed_distances(labels, 3), Tensor)
    assert_type(segloss.boundary_loss(logits, logits), Tensor)
    assert_type(segloss.potts_crf(logits, image, sigma_rgb=torch.tensor(0.1), normalize="pixels"), Tensor)
    assert_type(segloss.confidence_gate(logits, labels), Tensor)
    assert_type(segloss.windowed_potts(logits, image, radius=5), Tensor)
    assert_type(segloss.window_mass(image), Tensor)
    assert_type(segloss.grid_potts(logits, image, connectivity=8), Tensor)
    assert_type(segloss.sample_pixels(scores, 10, generator=torch.Generator()), Tensor)
    assert_type(segloss.importance_sampling(scores, tags, mode="expected"), Tensor)
    assert_type(segloss.importance_classification(scores, tags, pooling="max"), Tensor)
    assert_type(segloss.max_normalize(scores), Tensor)
    assert_type(segloss.feature_similarity(scores, image, tags, gate="sigmoid", window=15), Tensor)
    assert_type(segloss.rib_margin(scores, tags, margin=600), Tensor)
    assert_type(segloss.affinity_loss(scores, labels, radius=5), Tensor)
    assert_type(segloss.path_affinity_loss(scores, labels, radius=5), Tensor)


def tools(logits: Tensor, image: Tensor, labels: Tensor, tags: Tensor, sizes: Tensor, features: Tensor) -> None:
    assert_type(segloss.average_prediction(logits), Tensor)
    assert_type(segloss.sizes_from_labels(labels, 3), Tensor)
    assert_type(segloss.corrupt_sizes(sizes, 0.1), Tensor)
    assert_type(segloss.mean_relative_error(sizes, sizes), Tensor)
    assert_type(segloss.class_balanced_weights(torch.tensor([1, 2]), 0.99), Tensor)
    assert_type(segloss.denormalize(image, mean=[0.5, 0.5, 0.5]), Tensor)
    centres, ood = segloss.class_centres(features, tags), segloss.ood_centres(features, 5)
    assert_type(centres, Tensor)
    assert_type(ood, Tensor)
    assert_type(segloss.ood_distance(features, tags, centres, ood, scope="batch"), Tensor)
    assert_type(segloss.ood_classification(logits, tags, logits), Tensor)
    assert_type(segloss.rank_hard_ood(sizes), list[Tensor] | Tensor)
    assert_type(segloss.annotation_cost(1000, 0.1), float)
    assert_type(segloss.feature_affinity(features, radius=3), Tensor)
    assert_type(segloss.path_affinity(features, radius=3), Tensor)
    segloss.check_values(True)
    assert_type(segloss.PreparedFilter(image)(logits), Tensor)
    try:
        filtered = segloss.bilateral_filter(logits, image, method="lowrank")
        assert_type(filtered, Tensor)
        assert_type(segloss.bilateral_error(logits, image, filtered), Tensor)
    except (segloss.ToleranceError, segloss.bilateral.ToleranceError, segloss.bilateral.LatticeError) as error:
        assert_type(str(error), str)


def modules(logits: Tensor, image: Tensor, labels: Tensor, tags: Tensor, sizes: Tensor, scores: Tensor) -> None:
    assert_type(segloss.SizeKL(reduction="sum")(logits, sizes), Tensor)
    assert_type(segloss.ReverseSizeKL()(logits, sizes), Tensor)
    assert_type(segloss.LogBarrier()(logits, tags), Tensor)
    assert_type(segloss.Suppression()(logits, tags), Tensor)
    assert_type(segloss.FlatBarrier(floor=0.05)(logits, tags), Tensor)
    assert_type(segloss.SizeBarrier(upper=0.5)(logits), Tensor)
    assert_type(segloss.BalanceKL(sizes[0])(logits), Tensor)
    assert_type(segloss.PartialCrossEntropy()(logits, labels), Tensor)
    assert_type(segloss.BalancedSeeding()(logits, labels), Tensor)
    assert_type(segloss.BoundaryConstraint()(logits, logits), Tensor)
    assert_type(segloss.CentroidLoss(spacing=(1, 1))(logits, sizes), Tensor)
    assert_type(segloss.BoundaryLoss()(logits, logits), Tensor)
    assert_type(segloss.PottsCRF(scale_factor=0.5)(logits, image), Tensor)
    assert_type(segloss.WindowedPotts(radius=5)(logits, image), Tensor)
    assert_type(segloss.GridPotts()(logits, image), Tensor)
    assert_type(segloss.ImportanceSampling()(scores, tags), Tensor)
    assert_type(segloss.ImportanceClassification()(scores, tags), Tensor)
    assert_type(segloss.FeatureSimilarity()(scores, image, tags), Tensor)
    assert_type(segloss.RIBMargin()(scores, tags), Tensor)
    assert_type(segloss.OODClusters.from_features(scores, tags, scores, top=0.1)(scores, tags), Tensor)
    assert_type(segloss.AffinityLoss()(scores, labels), Tensor)
    assert_type(segloss.PathAffinityLoss()(scores, labels), Tensor)


def built_on_the_filter(image: Tensor, values: Tensor) -> None:
    segloss.bilateral.check_guide(image, values, "values")
    segloss.bilateral.check_space("values", values, "[B, K, *spatial]")
    segloss.bilateral.check_sigma("sigma_xy", 50.0)
    segloss.bilateral.check_plan("auto", 1e-2, "auto", "auto")
    assert_type(segloss.bilateral.make_plan("auto", 1e-2, "auto", "auto", image), segloss.bilateral.Plan)
    sigma = segloss.bilateral.colour_sigma(image, None)
    assert_type(sigma, float | Tensor)
    assert_type(segloss.bilateral.guide_colour(image, sigma), Tensor)
    assert_type(segloss.bilateral.guide_features(image, sigma, 50.0), Tensor)
    assert_type(segloss.bilateral.PreparedFilter(image)(values), Tensor)
    assert_type(segloss.bilateral.bilateral_filter(values, image), Tensor)
    assert_type(segloss.bilateral.bilateral_error(values, image, values), Tensor)


def attribution(
    model: nn.Module, images: Tensor, tags: Tensor, either: Sequence[int] | Sequence[Sequence[int]]
) -> None:
    clf = segattr.split(model, example=images)
    assert_type(clf, segattr.Classifier)
    assert_type(clf(images), Tensor)
    assert_type(clf.num_classes, int)
    assert_type(clf.class_weight(), Tensor)
    maps = segattr.cam(clf, images, norm="relu")
    assert_type(maps, Tensor)
    assert_type(segattr.cam(model, images, [0, 2]), Tensor)
    assert_type(segattr.cam(model, images, classes=[[0, 2], [1]]), list[Tensor])
    assert_type(segattr.cam(model, images, either), Tensor | list[Tensor])
    assert_type(segattr.cam(model, images, torch.tensor([0, 2])), Tensor | list[Tensor])
    assert_type(segattr.grad_cam(clf, images, layer=["layer3", "layer4"], weighting="layercam"), Tensor)
    assert_type(segattr.grad_cam(clf, images, [[0], [1]]), list[Tensor])
    assert_type(segattr.advcam(clf, images, steps=5), Tensor)
    assert_type(segattr.advcam(clf, images, [[0], [1]], chunk=2), list[Tensor])
    assert_type(segattr.rib(clf, images, tags, companions=[(images, tags)]), Tensor | list[Tensor])
    assert_type(segattr.gndrp(maps, maps), Tensor)
    assert_type(segattr.normalize(maps, "relu_max"), Tensor)
    assert_type(segattr.normalize([maps], "relu_max"), list[Tensor])
    assert_type(segattr.multiscale(lambda x: segattr.cam(clf, x), images, scales=(0.5, 1)), Tensor | list[Tensor])
    head = segattr.StochasticConv2d(512, 20, kernel=9, drop=0.9)
    assert_type(head(images), Tensor)
    assert_type(segattr.ficklenet(images, head, passes=10), Tensor)


def boxes(model: nn.Module, image: Tensor, corners: Tensor, labels: Tensor) -> None:
    def mine(images: Tensor, boxes: Sequence[Tensor], /) -> tuple[Tensor, Tensor]:
        return images, boxes[0]

    detectors: list[segattr.Detector] = [segattr.detector_from_torchvision(model), mine]
    assert_type(detectors[0]([image][0], [corners]), tuple[Tensor, Tensor])
    proposals = segattr.positive_proposals(detectors[0], image, corners, labels)
    assert_type(proposals, list[Tensor])
    assert_type(segattr.adaptive_stride(100.0), float)
    stride: Callable[[float], float] = segattr.adaptive_stride
    assert_type(segattr.bbam(mine, image, corners, labels, proposals=proposals, stride=stride), Tensor)


def propagation(model: nn.Module, images: Tensor, labels: Tensor, tags: Tensor) -> None:
    network = segattr.lrp.unroll(model, rule=segattr.lrp.composites.epsilon_gamma_box(low=-2.2, high=images))
    assert_type(network, segattr.lrp.UnrolledLRP | segattr.lrp.FreeDecoder)
    scores, heatmaps = network(images)
    assert_type(scores, Tensor)
    assert_type(heatmaps, Tensor)
    assert_type(network(images, [0, 1]), tuple[Tensor, Tensor])
    assert_type(network(images, [[0, 1], [2]]), tuple[Tensor, list[Tensor]])
    if isinstance(network, segattr.lrp.UnrolledLRP):
        assert_type(network.ledger(images), dict[str, Tensor])
    assert_type(segattr.lrp.heatmap_loss(heatmaps, scores, labels, tags, scale="pixels"), Tensor)
    assert_type(segattr.lrp.HeatmapLoss(scale=3.0)(heatmaps, scores, labels, tags), Tensor)
    assert_type(segattr.lrp.labelled_subset(tags, 100), Tensor)

    @segattr.lrp.adjoint("triple")
    def triple(x: Tensor) -> segattr.lrp.Linearised:
        return segattr.lrp.Linearised(3 * x, lambda gradient: 3 * gradient)

    assert_type(triple(images), segattr.lrp.Linearised)


def rules(model: nn.Module, low: Tensor, place: segattr.lrp.composites.Place) -> None:
    for rule in (
        segattr.lrp.rules.Epsilon(1e-6),
        segattr.lrp.rules.Gamma(0.1),
        segattr.lrp.rules.ZPlus(),
        segattr.lrp.rules.AlphaBeta(alpha=2, beta=1),
        segattr.lrp.rules.Flat(),
        segattr.lrp.rules.WSquare(),
        segattr.lrp.rules.ZBox(low, 1.0),
        segattr.lrp.rules.Pass(),
    ):
        segattr.lrp.unroll(model, rule=rule)
    for composite in (
        segattr.lrp.composites.base(),
        segattr.lrp.composites.epsilon_plus(),
        segattr.lrp.composites.epsilon_plus_flat(),
        segattr.lrp.composites.epsilon_alpha2_beta1(),
        segattr.lrp.composites.epsilon_alpha2_beta1_flat(),
    ):
        segattr.lrp.unroll(model, rule=composite)
    predicates = (
        segattr.lrp.composites.anything,
        segattr.lrp.composites.convolution,
        segattr.lrp.composites.first,
        segattr.lrp.composites.linear,
        segattr.lrp.composites.normalisation,
        segattr.lrp.composites.single,
        segattr.lrp.composites.weighted,
    )
    segattr.lrp.unroll(model, rule=[(predicate, segattr.lrp.rules.Flat()) for predicate in predicates])
    assert_type(predicates[0](place), bool)


class Found(TypedDict):
    masks: Tensor
    labels: Tensor


def refinement(maps: Tensor, image: Tensor, seeds: Tensor, tags: Tensor, affinity: Tensor, corners: Tensor) -> None:
    mine: segattr.refine.CRFSettings = {**segattr.refine.DEEPLAB_CRF, "iterations": 5}
    for crf in (mine, segattr.refine.IRN_CRF, segattr.refine.BBAM_CRF):
        assert_type(segattr.refine.dense_crf(maps, image, **crf), Tensor)
    assert_type(segattr.refine.dense_crf(maps, image, sigma_rgb=None, method="lattice", filled=True), Tensor)
    assert_type(segattr.refine.label_probabilities(seeds, tags), Tensor)
    assert_type(segattr.refine.random_walk(maps, affinity), Tensor)
    assert_type(segattr.refine.grow_seeds(seeds, maps), Tensor)
    assert_type(segattr.refine.pseudo_labels(maps, tags, size=image.shape[2:]), Tensor)
    assert_type(segattr.refine.pseudo_labels([maps[0], maps[1]], [[1, 2], [3]]), list[Tensor])
    masks = segattr.refine.instance_masks(maps, corners, image, crf=mine)
    assert_type(masks, Tensor)
    assert_type(segattr.refine.semantic_labels(masks, tags), Tensor)
    assert_type(segattr.refine.merge_proposals(masks[0] == 1, masks == 1), Tensor)


def measures(maps: Tensor, labels: Tensor, masks: Tensor, found: list[dict[str, Tensor]]) -> None:
    assert_type(segattr.metrics.region_similarity(masks, masks, pooled=True), Tensor)
    assert_type(segattr.metrics.contour_f(masks, masks), Tensor)
    assert_type(segattr.metrics.j_and_f(masks, masks), Tensor)
    both = segattr.metrics.JAndF(21, device="cpu")
    both.update(labels, labels)
    assert_type(both.compute(), tuple[Tensor, Tensor])
    best = segattr.metrics.best_threshold_miou(maps, labels)
    assert_type(best, segattr.metrics.BestThreshold)
    assert_type((best.threshold, best.miou), tuple[float, float])
    sweep = segattr.metrics.ThresholdSweep(20, thresholds=[0.1, 0.2])
    sweep.update(maps, labels)
    assert_type(sweep.compute(), segattr.metrics.BestThreshold)
    assert_type(segattr.metrics.pointing_game(maps, masks), Tensor)
    assert_type(segattr.metrics.high_gradient_ratio(maps, masks), Tensor)
    assert_type(segattr.metrics.average_precision(found, found), segattr.metrics.PerClass)
    assert_type(segattr.metrics.average_best_overlap(found, found).mean, float)


def pictures(image: Tensor, maps: Tensor, volume: Tensor) -> None:
    assert_type(segattr.plot.overlay(image, maps), Tensor)
    assert_type(segattr.plot.map_grid([image], {"CAM": [maps]}), Figure)
    assert_type(segattr.plot.heatmap(image, {"LRP": maps}), Figure)
    assert_type(segattr.plot.size_grid(image), Figure)
    assert_type(segattr.plot.slices(volume, {"CAM": volume}, at=(1, 2, 3)), Figure)
