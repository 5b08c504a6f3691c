"""A valid call of everything public in segloss, small enough to make a hundred of them a second."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import segloss
from segloss.bilateral import LatticeError
from tests.attack.call import Call, Calls, module

Arguments = dict[str, Any]
B, K, H, W = 2, 3, 5, 4
REDUCTION = {"reduction": "none"}


def logits() -> Tensor:
    return torch.randn(B, K, H, W)


def image() -> Tensor:
    return torch.rand(B, 3, H, W)


def sizes() -> Tensor:
    return torch.rand(B, K).softmax(1)


def tags() -> Tensor:
    return torch.tensor([[1, 0, 1], [0, 1, 0]])


def labels() -> Tensor:
    return torch.randint(0, K, (B, H, W)).masked_fill(torch.rand(B, H, W) < 0.3, 255)


def valid() -> Tensor:
    return torch.rand(B, H, W) < 0.8


def centres(count: int) -> Tensor:
    return torch.randn(count, 6)


def per_image(first: str) -> Callable[[Arguments], tuple[int, ...]]:
    """Losses that give one value an image, here and with a module."""

    def shape(arguments: Arguments) -> tuple[int, ...]:
        return (len(arguments[first]),) if arguments.get("reduction") == "none" else ()

    return shape


def scalar(_: Arguments) -> tuple[int, ...]:
    return ()


def size_loss(function: Callable[..., Any], target: Callable[[], Arguments], **settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {"logits": logits(), **target(), "valid": valid(), **settings, **REDUCTION}
        return Call(function, arguments, per_image("logits"))

    return make


def potts(function: Callable[..., Any], **settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {"logits": logits(), "image": image(), "sigma_rgb": 0.2, "valid": valid(), "from_logits": True}
        arguments |= {"spacing": None}
        return Call(function, arguments | REDUCTION | settings, per_image("logits"))

    return make


def volume(function: Callable[..., Any], **settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {
            "logits": torch.randn(B, K, 3, H, W),
            "image": torch.rand(B, 1, 3, H, W),
            "spacing": (2.0, 1.0, 0.5),
        }
        return potts(function, **arguments | {"valid": torch.rand(B, 3, H, W) < 0.8} | settings)()

    return make


DENSE = {
    "sigma_xy": 3.0,
    "form": "potts",
    "scale_factor": 1.0,
    "centred": False,
    "normalize": "pixels",
    "method": "auto",
    "tolerance": 0.01,
    "backend": "auto",
    "precision": "auto",
}
WINDOW = {"sigma_xy": 3.0, "radius": 2, "normalize": "pairs"}


def dense(function: Callable[..., Any], **settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        return potts(function, **DENSE | {"gate": torch.rand(B, H, W)} | settings)()

    return make


def sampling(function: Callable[..., Any], **settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {"scores": logits(), "tags": tags(), "samples": 4, "generator": torch.Generator(), **REDUCTION}
        arguments |= {"mode": "sample", "posterior": "binomial"} | settings
        return Call(function, arguments, per_image("scores"))

    return make


def picked(function: Callable[..., Any]) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {"scores": logits(), "tags": tags(), "indices": torch.randint(0, H * W, (B, K, 4)), **REDUCTION}
        arguments |= {"generator": torch.Generator()}
        return Call(function, arguments, per_image("scores"))

    return make


def similarity(function: Callable[..., Any], **settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {"scores": logits(), "image": torch.rand(B, 3, 8, 7), "tags": tags(), "gate": "max", "sigma": 2.0}
        arguments |= {"mu": 2.5, "window": 3, "window_shape": "square", "background": False} | REDUCTION | settings
        return Call(function, arguments, per_image("scores"))

    return make


def neighbours(function: Callable[..., Any], first: str, channels: int, **settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {first: torch.randn(B, channels, H, W), "labels": labels(), "radius": 2.5, "ignore_index": 255}
        return Call(function, arguments | {"crop": False} | settings, scalar)

    return make


def sparse_affinity(function: Callable[..., Any], first: str, channels: int, **settings: Any) -> Callable[[], Call]:
    def shape(arguments: Arguments) -> tuple[int, ...]:
        count, _, height, width = arguments[first].shape
        return (count, height * width, height * width)

    def make() -> Call:
        arguments = {first: torch.rand(B, channels, H, W), "radius": 2.5, **settings}
        return Call(function, arguments, shape)

    return make


def filtering(**settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {"values": torch.randn(B, K, H, W), "image": image(), "sigma_rgb": 0.2, "sigma_xy": 3.0}
        arguments |= {"spacing": (1.0, 2.0)}
        arguments |= {"method": "exact", "tolerance": 0.01, "backend": "auto", "precision": "auto"} | settings
        refusals = {"lowrank": (segloss.ToleranceError,), "lattice": (LatticeError,)}
        errors = refusals.get(arguments["method"], ())
        return Call(segloss.bilateral_filter, arguments, of("values"), errors=errors)

    return make


def kept(values: Tensor, image: Tensor, **settings: Any) -> Tensor:
    return segloss.PreparedFilter(image, **settings)(values)


def preparing(**settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        call = filtering(**settings)()
        del call.arguments["precision"]
        return Call(kept, call.arguments, of("values"), errors=call.errors)

    return make


def noise() -> Call:
    """Low rank cannot follow noise to this tolerance: the documented ToleranceError."""
    arguments = {"values": torch.randn(1, 2, 9, 9), "image": torch.rand(1, 3, 9, 9)}
    arguments |= {"sigma_rgb": 0.02, "sigma_xy": 8.0, "method": "lowrank", "tolerance": 1e-4}
    return Call(segloss.bilateral_filter, arguments, of("values"), errors=(segloss.ToleranceError,))


def of(first: str) -> Callable[[Arguments], tuple[int, ...]]:
    return lambda arguments: tuple(arguments[first].shape)


def rows(first: str) -> Callable[[Arguments], tuple[int, ...]]:
    return lambda arguments: tuple(arguments[first].shape[:2])


def check_values_and_back(enabled: bool) -> None:
    """A setting of the whole process, by design: set back at once."""
    segloss.check_values(enabled)
    segloss.check_values(False)


def distance(function: Callable[..., Any], **settings: Any) -> Callable[[], Call]:
    def make() -> Call:
        arguments = {"features": centres(B), "tags": tags(), "centres": centres(K), "ood": centres(5), "top": 0.4}
        arguments |= {"scope": "image", "squared": False} | REDUCTION | settings
        return Call(function, arguments, per_image("features"))

    return make


def with_sizes() -> Arguments:
    return {"sizes": sizes()}


def with_tags() -> Arguments:
    return {"tags": tags()}


def clusters() -> Arguments:
    return {**features_of_all(), "clusters": 2, "top": 0.4, "scope": "image", "squared": False, "reduction": "none"}


def features_of_all() -> Arguments:
    return {"features": centres(B), "tags": tags(), "ood_features": centres(9), "generator": torch.Generator()}


def refit(**arguments: Any) -> Tensor:
    clusters = segloss.OODClusters(torch.zeros(K, 6), torch.zeros(2, 6))
    clusters.refit(**arguments)
    return torch.cat([clusters.centres, clusters.ood])


def seed_maps() -> Tensor:
    return (torch.rand(B, K, H, W) < 0.3).float()


def seeding() -> Arguments:
    return {"logits": logits(), "seeds": seed_maps(), "background": 0, "floor": 1e-4} | REDUCTION


def boundary() -> Arguments:
    refined = torch.rand(B, K, H, W).softmax(1)
    return {"logits": logits(), "refined": refined, "seeds": seed_maps(), "clip": (0.05, 20.0)} | REDUCTION


def cross_entropy() -> Arguments:
    return {"logits": logits(), "labels": labels(), "ignore_index": 255} | REDUCTION


def margin() -> Arguments:
    return {"logits": torch.randn(B, K), "tags": tags(), "margin": 600.0} | REDUCTION


def bounds() -> Arguments:
    return {"logits": logits(), "lower": torch.rand(B, K), "upper": 0.5, "valid": valid()} | REDUCTION


def prior() -> Arguments:
    return {"logits": torch.randn(7, K), "prior": torch.rand(K).softmax(0)}


def known() -> Tensor:
    return torch.tensor([[False, True, False], [True, True, False]])


def known_sizes(function: Callable[..., Any], **settings: Any) -> Callable[[], Call]:
    """The sizes of free classes are not looked at."""

    def make() -> Call:
        arguments = {"logits": logits(), "sizes": sizes(), "known": known(), "valid": valid(), **settings}
        return Call(function, arguments | REDUCTION, per_image("logits"), any_value=("sizes",))

    return make


def points(function: Callable[..., Any], **settings: Any) -> Callable[[], Call]:
    """Nor are the targets of such classes."""

    def make() -> Call:
        arguments = {"logits": logits(), "targets": torch.rand(B, K, 2), "known": known(), "valid": valid()}
        arguments |= {"descriptor": "centroid", "tolerance": 0.5, "t": 2.0, "spacing": (3.0, 0.5)}
        return Call(function, arguments | REDUCTION | settings, per_image("logits"), any_value=("targets",))

    return make


def numbers_of_labels(**arguments: Any) -> list[Tensor]:
    """Classes that an image does not show have none."""
    return [descriptor.nan_to_num(nan=0) for descriptor in segloss.centroids_from_labels(**arguments)]


def depths() -> Arguments:
    return {"logits": logits(), "distances": torch.randn(B, K, H, W), "valid": valid()} | REDUCTION


def label_maps() -> Arguments:
    return {"labels": labels(), "num_classes": K, "spacing": (3.0, 0.5), "ignore_index": 255}


def simple(
    function: Callable[..., Any],
    arguments: Callable[[], Arguments],
    shape: Callable[[Arguments], Any] | None,
) -> Callable[[], Call]:
    return lambda: Call(function, arguments(), shape)


CALLS: Calls = {
    "segloss.AffinityLoss": neighbours(module(segloss.AffinityLoss), "features", 6, distance="mean", floor=1e-6),
    "segloss.BalanceKL": simple(module(segloss.BalanceKL), prior, scalar),
    "segloss.BalancedSeeding": simple(module(segloss.BalancedSeeding), seeding, per_image("logits")),
    "segloss.BoundaryConstraint": simple(module(segloss.BoundaryConstraint), boundary, per_image("logits")),
    "segloss.BoundaryLoss": simple(module(segloss.BoundaryLoss), depths, per_image("logits")),
    "segloss.CentroidLoss": points(module(segloss.CentroidLoss)),
    "segloss.FeatureSimilarity": similarity(module(segloss.FeatureSimilarity)),
    "segloss.FlatBarrier": size_loss(module(segloss.FlatBarrier), with_tags, floor=0.2, flat="below"),
    "segloss.GridPotts": potts(module(segloss.GridPotts), connectivity=4),
    "segloss.ImportanceClassification": sampling(
        module(segloss.ImportanceClassification), weight=0.2, pooling="average"
    ),
    "segloss.ImportanceSampling": sampling(module(segloss.ImportanceSampling), floor=1e-3),
    "segloss.LogBarrier": size_loss(module(segloss.LogBarrier), with_tags),
    "segloss.OODClusters": distance(module(segloss.OODClusters)),
    "segloss.OODClusters.from_features": lambda: Call(segloss.OODClusters.from_features, clusters()),
    "segloss.OODClusters.refit": lambda: Call(refit, features_of_all()),
    "segloss.PartialCrossEntropy": simple(module(segloss.PartialCrossEntropy), cross_entropy, per_image("logits")),
    "segloss.PathAffinityLoss": neighbours(module(segloss.PathAffinityLoss), "boundary_logits", 1, eps=1e-5),
    "segloss.PottsCRF": dense(module(segloss.PottsCRF)),
    "segloss.RIBMargin": simple(module(segloss.RIBMargin), margin, per_image("logits")),
    "segloss.ReverseSizeKL": size_loss(module(segloss.ReverseSizeKL), with_sizes, floor=1e-8),
    "segloss.SizeBarrier": simple(module(segloss.SizeBarrier), bounds, per_image("logits")),
    "segloss.SizeKL": size_loss(module(segloss.SizeKL), with_sizes),
    "segloss.Suppression": size_loss(module(segloss.Suppression), with_tags),
    "segloss.ToleranceError": noise,
    "segloss.WindowedPotts": potts(module(segloss.WindowedPotts), **WINDOW),
    "segloss.affinity_loss": neighbours(segloss.affinity_loss, "features", 6, distance="sum", floor=1e-6),
    "segloss.annotation_cost": lambda: Call(segloss.annotation_cost, {"images": 100, "positive_rate": 0.2}, scalar),
    "segloss.average_prediction": lambda: Call(
        segloss.average_prediction, {"logits": logits(), "valid": valid()}, rows("logits")
    ),
    "segloss.balance_kl": simple(segloss.balance_kl, prior, scalar),
    "segloss.balanced_seeding": simple(segloss.balanced_seeding, seeding, per_image("logits")),
    "segloss.bilateral_error": lambda: Call(
        segloss.bilateral_error,
        {"values": logits(), "image": image(), "filtered": logits(), "sigma_rgb": 0.2, "sigma_xy": 3.0}
        | {"spacing": (1.0, 2.0)},
        lambda arguments: (len(arguments["values"]),),
    ),
    "segloss.PreparedFilter": preparing(),
    "segloss.PreparedFilter lattice": preparing(method="lattice"),
    "segloss.bilateral_filter": filtering(),
    "segloss.bilateral_filter blocksparse": filtering(method="blocksparse"),
    "segloss.bilateral_filter lowrank": filtering(method="lowrank"),
    "segloss.bilateral_filter lattice": filtering(method="lattice"),
    "segloss.bilateral_filter tensors": filtering(sigma_rgb=torch.tensor(0.2), sigma_xy=torch.tensor(3.0)),
    "segloss.bilateral_filter signal": filtering(
        values=torch.randn(B, K, 9), image=torch.rand(B, 1, 9), spacing=(2.0,)
    ),
    "segloss.boundary_constraint": simple(segloss.boundary_constraint, boundary, per_image("logits")),
    "segloss.boundary_loss": simple(segloss.boundary_loss, depths, per_image("logits")),
    "segloss.centroid_loss": points(segloss.centroid_loss, descriptor="distance", t=None),
    "segloss.centroid_loss tensors": points(segloss.centroid_loss, tolerance=torch.full((K, 2), 0.5)),
    "segloss.centroids_from_labels": simple(
        numbers_of_labels,
        label_maps,
        lambda arguments: [(len(arguments["labels"]), arguments["num_classes"], arguments["labels"].dim() - 1)] * 2,
    ),
    "segloss.check_values": lambda: Call(check_values_and_back, {"enabled": True}),
    "segloss.class_balanced_weights": lambda: Call(
        segloss.class_balanced_weights,
        {"counts": torch.tensor([1000.0, 10.0, 1.0]), "beta": 0.99, "normalize": True},
        of("counts"),
        infinite=("counts",),
    ),
    "segloss.class_centres": lambda: Call(
        segloss.class_centres,
        {"features": centres(B), "tags": tags()},
        lambda arguments: (arguments["tags"].shape[1], arguments["features"].shape[1]),
    ),
    "segloss.confidence_gate": lambda: Call(
        segloss.confidence_gate,
        {"logits": logits(), "labels": labels(), "ignore_index": 255, "from_logits": True},
        lambda arguments: (len(arguments["logits"]), *arguments["logits"].shape[2:]),
    ),
    "segloss.corrupt_sizes": lambda: Call(
        segloss.corrupt_sizes, {"sizes": sizes(), "sigma": 0.5, "generator": torch.Generator()}, of("sizes")
    ),
    "segloss.denormalize": lambda: Call(
        segloss.denormalize,
        {"image": image(), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)},
        of("image"),
        any_value=("image",),
    ),
    "segloss.feature_affinity": sparse_affinity(segloss.feature_affinity, "features", 6, distance="sum"),
    "segloss.feature_similarity": similarity(segloss.feature_similarity),
    "segloss.feature_similarity all pairs": similarity(segloss.feature_similarity, gate="sigmoid", window=None),
    "segloss.feature_similarity background": similarity(segloss.feature_similarity, background=True),
    "segloss.feature_similarity raw": similarity(segloss.feature_similarity, gate="raw", window_shape="disc"),
    "segloss.feature_similarity softmax": similarity(segloss.feature_similarity, gate="softmax"),
    "segloss.feature_similarity tensors": similarity(
        segloss.feature_similarity, sigma=torch.tensor(2.0), mu=torch.tensor(2.5)
    ),
    "segloss.flat_barrier": size_loss(segloss.flat_barrier, with_tags, floor=0.2, flat="above"),
    "segloss.grid_potts": potts(segloss.grid_potts, connectivity=8),
    "segloss.grid_potts volume": volume(segloss.grid_potts, connectivity=18),
    "segloss.importance_classification": sampling(segloss.importance_classification, weight=0.2, pooling="max"),
    "segloss.importance_classification sum": sampling(segloss.importance_classification, pooling="sum"),
    "segloss.importance_sampling": sampling(segloss.importance_sampling, floor=1e-3),
    "segloss.importance_sampling expected": sampling(segloss.importance_sampling, mode="expected"),
    "segloss.importance_sampling indices": picked(segloss.importance_sampling),
    "segloss.importance_sampling multinomial": sampling(segloss.importance_sampling, posterior="multinomial"),
    "segloss.log_barrier": size_loss(segloss.log_barrier, with_tags),
    "segloss.max_normalize": lambda: Call(
        segloss.max_normalize, {"scores": logits(), "detach_maximum": False}, of("scores")
    ),
    "segloss.mean_relative_error": lambda: Call(
        segloss.mean_relative_error, {"sizes": sizes(), "exact": sizes()}, scalar
    ),
    "segloss.ood_centres": lambda: Call(
        segloss.ood_centres,
        {"features": centres(9), "clusters": 2, "generator": torch.Generator()},
        lambda arguments: (arguments["clusters"], arguments["features"].shape[1]),
    ),
    "segloss.ood_classification": lambda: Call(
        segloss.ood_classification,
        {"logits": torch.randn(B, K), "tags": tags(), "ood_logits": torch.randn(4, K), "ood_weight": 0.5},
        scalar,
    ),
    "segloss.ood_distance": distance(segloss.ood_distance),
    "segloss.ood_distance batch": distance(segloss.ood_distance, scope="batch", squared=True),
    "segloss.partial_cross_entropy": simple(segloss.partial_cross_entropy, cross_entropy, per_image("logits")),
    "segloss.path_affinity": sparse_affinity(segloss.path_affinity, "boundary", 1),
    "segloss.path_affinity_loss": neighbours(segloss.path_affinity_loss, "boundary_logits", 1, eps=1e-5),
    "segloss.potts_crf": dense(segloss.potts_crf),
    "segloss.potts_crf blocksparse": potts(segloss.potts_crf, **DENSE | {"method": "blocksparse"}),
    "segloss.potts_crf half": dense(segloss.potts_crf, scale_factor=0.5, form="quadratic"),
    "segloss.potts_crf half, centred": dense(segloss.potts_crf, scale_factor=0.5, centred=True),
    "segloss.potts_crf lowrank": potts(segloss.potts_crf, **DENSE | {"method": "lowrank", "normalize": None}),
    "segloss.potts_crf volume": volume(segloss.potts_crf, **DENSE | {"method": "blocksparse"}),
    "segloss.potts_crf probabilities": potts(
        segloss.potts_crf, **DENSE, logits=torch.rand(B, K, H, W).softmax(1), from_logits=False
    ),
    "segloss.rank_hard_ood": lambda: Call(segloss.rank_hard_ood, {"probabilities": torch.rand(7, K), "threshold": 0.5}),
    "segloss.reverse_size_kl": size_loss(segloss.reverse_size_kl, with_sizes, floor=1e-8),
    "segloss.reverse_size_kl known": known_sizes(segloss.reverse_size_kl, floor=1e-8),
    "segloss.rib_margin": simple(segloss.rib_margin, margin, per_image("logits")),
    "segloss.sample_pixels": lambda: Call(
        segloss.sample_pixels,
        {"scores": logits(), "samples": 4, "posterior": "binomial", "generator": torch.Generator()},
        lambda arguments: (*arguments["scores"].shape[:2], arguments["samples"]),
    ),
    "segloss.size_barrier": simple(segloss.size_barrier, bounds, per_image("logits")),
    "segloss.signed_distances": simple(
        segloss.signed_distances,
        label_maps,
        lambda arguments: (len(arguments["labels"]), arguments["num_classes"], *arguments["labels"].shape[1:]),
    ),
    "segloss.size_barrier log": simple(segloss.size_barrier, lambda: bounds() | {"t": 5.0}, per_image("logits")),
    "segloss.size_kl": size_loss(segloss.size_kl, with_sizes),
    "segloss.size_kl known": known_sizes(segloss.size_kl),
    "segloss.sizes_from_labels": lambda: Call(
        segloss.sizes_from_labels,
        {"labels": labels(), "num_classes": K, "ignore_index": 255},
        lambda arguments: (len(arguments["labels"]), arguments["num_classes"]),
    ),
    "segloss.suppression": size_loss(segloss.suppression, with_tags),
    "segloss.window_mass": lambda: Call(
        segloss.window_mass,
        {"image": image(), "sigma_rgb": 0.2, "sigma_xy": 3.0, "spacing": (1.0, 2.0), "radius": 2},
        lambda arguments: (len(arguments["image"]),),
    ),
    "segloss.windowed_potts": potts(segloss.windowed_potts, **WINDOW),
    "segloss.windowed_potts volume": volume(segloss.windowed_potts, **WINDOW),
}
