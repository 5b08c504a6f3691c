"""What every loss must do. A loss registers with one line and gets all the tests of ``test_losses.py``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import segloss

Inputs = dict[str, Any]  # everything but the first argument, by argument name


@dataclass(frozen=True)
class Golden:
    """A golden case: which arrays are the inputs, the expected loss and its gradient."""

    case: str
    inputs: Callable[[dict[str, Tensor]], Inputs]
    loss: str = "loss"
    grad: str = "grad"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    function: Callable[..., Tensor]
    module: type[nn.Module]
    inputs: Callable[[Tensor], Inputs]  # example inputs to go with the first argument
    settings: dict[str, Any] = field(default_factory=dict)
    golden: tuple[Golden, ...] = ()
    masked: bool = True  # takes `valid`
    ignorable: Callable[[Inputs], Inputs] | None = None  # inputs that ignore every pixel, for losses without `valid`
    name: str = ""
    argument: str = "logits"  # name of the first argument
    layout: str = r"\[B, K, .*"  # of the first argument, as its errors show it (a pattern)
    shape: tuple[int, ...] = (2, 3, 5, 4)  # of an example of the first argument; the batch comes first
    softmax: bool = True  # refuses a single class
    per_image: bool = True  # has a `reduction`, over images that are independent of each other
    of_the_batch: bool = False  # a statistic of the whole batch: two processes do not equal one
    detached: bool = False  # a part of the value is a constant for the gradient: finite differences tell otherwise

    def __call__(self, first: Tensor, inputs: Inputs, **settings: Any) -> Tensor:
        return self.function(first, **inputs, **self.settings, **settings)

    @property
    def fixed_sides(self) -> bool:
        """Settings that are tensors, such as centres, fix the sides; so does a single channel, that of a boundary."""
        return self.shape[1] == 1 or any(isinstance(value, Tensor) for value in self.settings.values())

    def example(self, batch: int = 2, **options: Any) -> Tensor:
        """A random first argument."""
        return torch.randn(batch, *self.shape[1:], **options)


def sizes_for(logits: Tensor) -> Tensor:
    sizes = torch.rand(logits.shape[:2], dtype=torch.float64) + 0.05
    sizes[:, -1] = 0
    return (sizes / sizes.sum(1, keepdim=True)).to(logits.dtype if logits.dtype == torch.float64 else torch.float32)


def tags_for(logits: Tensor) -> Tensor:
    tags = torch.rand(logits.shape[:2]) < 0.5
    tags[:, 0] = True
    return tags


def labels_for(logits: Tensor) -> Tensor:
    labels = torch.randint(0, logits.shape[1], (logits.shape[0], *logits.shape[2:]))
    return labels.masked_fill(torch.rand(labels.shape) < 0.5, 255)


def image_for(logits: Tensor) -> Tensor:
    return torch.rand(
        logits.shape[0], 3, *logits.shape[2:], dtype=logits.dtype if logits.dtype == torch.float64 else None
    )


def gate_for(logits: Tensor) -> Tensor:
    return torch.rand(logits.shape[0], *logits.shape[2:], dtype=logits.dtype if logits.dtype == torch.float64 else None)


def known_for(logits: Tensor) -> Tensor:
    known = torch.rand(logits.shape[:2]) < 0.5
    known[:, 0] = True
    return known


def points_for(logits: Tensor) -> Tensor:
    return torch.rand(*logits.shape[:2], logits.dim() - 2) * 4


def refined_for(logits: Tensor) -> Tensor:
    return torch.softmax(torch.randn(logits.shape, dtype=logits.dtype if logits.dtype == torch.float64 else None), 1)


def indices_for(scores: Tensor) -> Tensor:
    return torch.randint(0, scores.shape[2] * scores.shape[3], (*scores.shape[:2], 5))


def _tagged(arrays: dict[str, Tensor]) -> Inputs:
    return {"tags": arrays["tags"]}


def _labelled(arrays: dict[str, Tensor]) -> Inputs:
    return {"labels": arrays["labels"]}


def _coloured(arrays: dict[str, Tensor]) -> Inputs:
    return {"image": arrays["image"], "tags": arrays["labels"]}


def _drawn(arrays: dict[str, Tensor]) -> Inputs:
    return {"tags": arrays["labels"], "indices": arrays["indices"]}


def pseudo_labels_for(maps: Tensor) -> Tensor:
    labels = torch.randint(0, 3, (len(maps), *maps.shape[2:]))
    return labels.masked_fill(torch.rand(labels.shape) < 0.2, 255)


def _masked(arrays: dict[str, Tensor]) -> Inputs:
    return {"sizes": arrays["target"], "valid": arrays["mask"] > 0}


def _ribbed(arrays: dict[str, Tensor]) -> Inputs:
    return {"tags": arrays["labels"], "margin": arrays["margin"].item()}


def _clustered(arrays: dict[str, Tensor]) -> Inputs:
    top = arrays["tau_percent"].item() / 100
    return {"tags": arrays["labels"], "centres": arrays["centers_in"], "ood": arrays["centers_ood"], "top": top}


def _without_labels(inputs: Inputs) -> Inputs:
    return {"labels": torch.full_like(inputs["labels"], 255)}


def _without_tags(inputs: Inputs) -> Inputs:
    return {**inputs, "tags": torch.zeros_like(inputs["tags"])}


def _without_seeds(inputs: Inputs) -> Inputs:
    return {**inputs, "seeds": torch.zeros_like(inputs["seeds"])}


# What the losses of score maps, of neighbouring pixels and of the distance to centres register alike.
of_scores = partial(Loss, masked=False, argument="scores", layout=r"\[B, C, H, W\]", softmax=False)
of_neighbours = partial(Loss, masked=False, of_the_batch=True, softmax=False, per_image=False)
of_features = partial(of_neighbours, argument="features", layout=r"\[B, D, H, W\]")
of_boundary = partial(of_neighbours, argument="boundary_logits", layout=r"\[B, 1, H, W\]", shape=(2, 1, 5, 4))
of_centres = partial(Loss, masked=False, argument="features", layout=r"\[B, D\].*", shape=(2, 8), softmax=False)

LOSSES = [
    Loss(
        segloss.size_kl,
        segloss.SizeKL,
        lambda x: {"sizes": sizes_for(x)},
        golden=(
            Golden("losses/size_kl", lambda a: {"sizes": a["target"]}),
            Golden("losses/size_kl", _masked, "loss_masked", "grad_masked"),
        ),
    ),
    Loss(
        segloss.reverse_size_kl,
        segloss.ReverseSizeKL,
        lambda x: {"sizes": sizes_for(x)},
        golden=(Golden("losses/size_kl_reverse", lambda a: {"sizes": a["target"]}),),
    ),
    Loss(
        segloss.size_kl,
        segloss.SizeKL,
        lambda x: {"sizes": sizes_for(x), "known": known_for(x)},
        name="size_kl_known",
    ),
    Loss(
        segloss.reverse_size_kl,
        segloss.ReverseSizeKL,
        lambda x: {"sizes": sizes_for(x), "known": known_for(x)},
        name="reverse_size_kl_known",
    ),
    Loss(
        segloss.log_barrier,
        segloss.LogBarrier,
        lambda x: {"tags": tags_for(x)},
        golden=(Golden("losses/log_barrier", _tagged),),
    ),
    Loss(
        segloss.suppression,
        segloss.Suppression,
        lambda x: {"tags": tags_for(x)},
        golden=(Golden("losses/log_barrier", _tagged, "loss_suppress", "grad_suppress"),),
    ),
    Loss(
        segloss.flat_barrier,
        segloss.FlatBarrier,
        lambda x: {"tags": tags_for(x)},
        settings={"floor": 0.21},
        golden=(Golden("losses/flat_barrier", _tagged),),
    ),
    Loss(
        segloss.flat_barrier,
        segloss.FlatBarrier,
        lambda x: {"tags": tags_for(x)},
        settings={"floor": 0.3, "flat": "above"},
        name="flat_barrier_above",
    ),
    Loss(
        segloss.size_barrier,
        segloss.SizeBarrier,
        lambda x: {},
        settings={"lower": 0.3, "upper": 0.4},
        golden=(
            Golden("losses/squared_barrier", lambda a: {"lower": a["lower"], "upper": None}),
            Golden(
                "losses/squared_barrier",
                lambda a: {"lower": a["lower"], "upper": a["upper"]},
                "loss_two_sided",
                "grad_two_sided",
            ),
        ),
    ),
    Loss(
        segloss.size_barrier,
        segloss.SizeBarrier,
        lambda x: {},
        settings={"lower": 0.2, "upper": 0.5, "t": 5.0},
        name="size_barrier_log",
    ),
    Loss(
        segloss.centroid_loss,
        segloss.CentroidLoss,
        lambda x: {"targets": points_for(x), "known": known_for(x)},
        settings={"tolerance": 0.1, "spacing": (0.8, 1.5)},
    ),
    Loss(
        segloss.centroid_loss,
        segloss.CentroidLoss,
        lambda x: {"targets": points_for(x)},
        settings={"descriptor": "distance", "tolerance": 0.5, "t": 2.0},
        name="centroid_loss_distance_log",
    ),
    Loss(segloss.boundary_loss, segloss.BoundaryLoss, lambda x: {"distances": torch.randn(x.shape)}),
    Loss(
        segloss.partial_cross_entropy,
        segloss.PartialCrossEntropy,
        lambda x: {"labels": labels_for(x)},
        golden=(
            Golden("losses/partial_ce", lambda a: {"labels": a["target"]}, settings={"reduction": "sum"}),
            Golden("losses/partial_ce", lambda a: {"labels": a["target"]}, "loss_mean", "grad_mean"),
        ),
        masked=False,
        of_the_batch=True,
        ignorable=_without_labels,
    ),
    Loss(
        segloss.balanced_seeding,
        segloss.BalancedSeeding,
        lambda x: {"seeds": torch.rand(x.shape) < 0.3},
        golden=(
            Golden("losses/dsrg_seed", lambda a: {"seeds": a["seeds"]}),
            Golden("losses/dsrg_seed", lambda a: {"seeds": a["seeds"]}, "loss_floor", "grad_floor", {"floor": 1e-4}),
        ),
        masked=False,
        ignorable=_without_seeds,
    ),
    Loss(
        segloss.boundary_constraint,
        segloss.BoundaryConstraint,
        lambda x: {"refined": refined_for(x)},
        golden=(
            Golden("losses/constrain_boundary", lambda a: {"refined": a["q"]}),
            Golden(
                "losses/constrain_boundary",
                lambda a: {"refined": a["q"]},
                "loss_clip",
                "grad_clip",
                {"clip": (0.05, 20.0)},
            ),
            Golden(
                "losses/constrain_boundary",
                lambda a: {"refined": a["q"], "seeds": a["seeds"]},
                "loss_seeds_only_sum",
                "grad_seeds_only_sum",
            ),
        ),
        masked=False,
    ),
    Loss(
        segloss.boundary_constraint,
        segloss.BoundaryConstraint,
        lambda x: {"refined": refined_for(x), "seeds": torch.rand(x.shape) < 0.3},
        masked=False,
        ignorable=_without_seeds,
        name="boundary_constraint_seeds",
    ),
    Loss(
        segloss.potts_crf,
        segloss.PottsCRF,
        lambda x: {"image": image_for(x)},
        settings={"sigma_xy": 3.0, "sigma_rgb": 0.5},
    ),
    Loss(
        segloss.potts_crf,
        segloss.PottsCRF,
        lambda x: {"image": image_for(x)},
        settings={"sigma_xy": 4.0, "sigma_rgb": 0.5, "form": "quadratic", "normalize": "pairs", "scale_factor": 0.5},
        name="potts_crf_quadratic_scaled",
    ),
    Loss(
        segloss.potts_crf,
        segloss.PottsCRF,
        lambda x: {"image": image_for(x)},
        settings={"sigma_xy": 4.0, "sigma_rgb": 0.5, "scale_factor": 0.5, "centred": True},
        name="potts_crf_centred",
    ),
    Loss(
        segloss.potts_crf,
        segloss.PottsCRF,
        lambda x: {"image": image_for(x), "gate": gate_for(x)},
        settings={"sigma_xy": 3.0, "sigma_rgb": 0.5},
        name="potts_crf_gated",
    ),
    Loss(segloss.grid_potts, segloss.GridPotts, lambda x: {"image": image_for(x)}, settings={"connectivity": 8}),
    Loss(
        segloss.windowed_potts,
        segloss.WindowedPotts,
        lambda x: {"image": image_for(x)},
        settings={"sigma_xy": 3.0, "sigma_rgb": 0.5, "radius": 2, "normalize": "pairs"},
    ),
    of_scores(
        segloss.importance_sampling,
        segloss.ImportanceSampling,
        lambda x: {"tags": tags_for(x), "indices": indices_for(x)},
        golden=(Golden("losses/isl", _drawn),),
    ),
    of_scores(
        segloss.importance_sampling,
        segloss.ImportanceSampling,
        lambda x: {"tags": tags_for(x)},
        settings={"mode": "expected"},
        golden=(Golden("losses/isl", lambda a: {"tags": a["labels"]}, "loss_expected", "grad_expected"),),
        name="importance_sampling_expected",
        detached=True,
    ),
    of_scores(
        segloss.importance_sampling,
        segloss.ImportanceSampling,
        lambda x: {"tags": tags_for(x), "indices": indices_for(x)},
        settings={"posterior": "multinomial"},
        golden=(
            Golden("losses/isl", _drawn, "loss_multinomial", "grad_multinomial"),
            Golden("losses/isl", _drawn, "loss_multinomial_eps", "grad_multinomial_eps", {"floor": 1e-3}),
        ),
        name="importance_sampling_multinomial",
        softmax=True,
    ),
    of_scores(
        segloss.importance_classification,
        segloss.ImportanceClassification,
        lambda x: {"tags": tags_for(x), "indices": indices_for(x)},
        golden=(
            Golden("losses/combined_cls", _drawn),
            Golden("losses/combined_cls", _drawn, "loss_sum", "grad_sum", {"pooling": "sum"}),
        ),
    ),
    of_scores(
        segloss.importance_classification,
        segloss.ImportanceClassification,
        lambda x: {"tags": tags_for(x), "indices": indices_for(x)},
        settings={"pooling": "max", "posterior": "multinomial", "weight": 0.6},
        name="importance_classification_max",
        softmax=True,
    ),
    of_scores(
        segloss.feature_similarity,
        segloss.FeatureSimilarity,
        lambda x: {"image": image_for(x), "tags": tags_for(x)},
        golden=(
            Golden("losses/fsl", _coloured, "loss_r", "grad_r", {}),
            Golden("losses/fsl", _coloured, "loss_b", "grad_b", {"gate": "sigmoid"}),
            Golden("losses/fsl", _coloured, "loss_s", "grad_s", {"gate": "raw"}),
            Golden("losses/fsl", lambda a: {"image": a["image"]}, "loss_a", "grad_a", {"gate": "softmax"}),
            Golden("losses/fsl", _coloured, "loss_r_window_square4", "grad_r_window_square4", {"window": 4}),
            Golden(
                "losses/fsl",
                _coloured,
                "loss_r_window_disc4",
                "grad_r_window_disc4",
                {"window": 4, "window_shape": "disc"},
            ),
            Golden("losses/fsl", _coloured, "loss_r_with_bg", "grad_r_with_bg", {"background": True}),
        ),
        ignorable=_without_tags,
    ),
    of_scores(
        segloss.feature_similarity,
        segloss.FeatureSimilarity,
        lambda x: {"image": image_for(x), "tags": tags_for(x)},
        settings={"gate": "sigmoid", "sigma": 1.5, "mu": 1.0, "window": 3, "background": True},
        name="feature_similarity_sigmoid_window",
    ),
    of_scores(
        segloss.feature_similarity,
        segloss.FeatureSimilarity,
        lambda x: {"image": image_for(x)},
        settings={"gate": "raw"},
        name="feature_similarity_raw",
    ),
    Loss(
        segloss.rib_margin,
        segloss.RIBMargin,
        lambda x: {"tags": tags_for(x)},
        settings={"margin": 0.5},
        golden=(
            Golden("losses/rib_margin", _ribbed),
            Golden("losses/rib_margin", _ribbed, "loss_sum", "grad_sum", {"reduction": "sum"}),
        ),
        masked=False,
        ignorable=_without_tags,
        layout=r"\[B, C\].*",
        shape=(2, 4),
        softmax=False,
    ),
    of_centres(
        segloss.ood_distance,
        segloss.OODClusters,
        lambda x: {"tags": torch.rand(len(x), 4) < 0.5},
        settings={"centres": torch.eye(4, 8), "ood": torch.eye(8).roll(3, 0) + 0.5},
        golden=(
            Golden("losses/wood_ld", _clustered),
            Golden("losses/wood_ld", _clustered, "loss_squared", "grad_squared", {"squared": True}),
        ),
    ),
    of_centres(
        segloss.ood_distance,
        segloss.OODClusters,
        lambda x: {"tags": torch.rand(len(x), 4) < 0.5},
        settings={"centres": torch.eye(4, 8), "ood": torch.eye(8).roll(3, 0) + 0.5, "scope": "batch", "squared": True},
        of_the_batch=True,
        name="ood_distance_batch",
        per_image=False,
    ),
    of_features(
        segloss.affinity_loss,
        segloss.AffinityLoss,
        lambda x: {"labels": pseudo_labels_for(x)},
        settings={"radius": 2.5},
        golden=(Golden("losses/affinity", _labelled, settings={"radius": 5.0}),),
        ignorable=_without_labels,
    ),
    of_features(
        segloss.affinity_loss,
        segloss.AffinityLoss,
        lambda x: {"labels": pseudo_labels_for(x)},
        settings={"radius": 2.0, "distance": "mean", "crop": True},
        golden=(
            Golden(
                "losses/affinity", _labelled, "loss_balanced_mean", "grad_balanced_mean", {"radius": 5.0, "crop": False}
            ),
            Golden("losses/affinity", _labelled, "loss_balanced_mean_crop", "grad_balanced_mean_crop", {"radius": 5.0}),
        ),
        name="affinity_loss_mean",
    ),
    of_boundary(
        segloss.path_affinity_loss,
        segloss.PathAffinityLoss,
        lambda x: {"labels": pseudo_labels_for(x)},
        settings={"radius": 3.0},
        golden=(Golden("losses/irnet_affinity", _labelled, settings={"radius": 5.0}),),
        ignorable=_without_labels,
    ),
    of_boundary(
        segloss.path_affinity_loss,
        segloss.PathAffinityLoss,
        lambda x: {"labels": pseudo_labels_for(x)},
        settings={"radius": 2.0, "crop": True, "eps": 1e-5},
        golden=(
            Golden("losses/irnet_affinity", _labelled, "loss_eps", "grad_eps", {"radius": 5.0, "crop": False}),
            Golden("losses/irnet_affinity", _labelled, "loss_eps_crop", "grad_eps_crop", {"radius": 5.0}),
        ),
        name="path_affinity_loss_eps",
    ),
]


def loss_id(loss: Loss) -> str:
    return loss.name or loss.function.__name__
