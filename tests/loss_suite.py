"""What every loss must do. A loss registers with one line and gets all the tests of ``test_losses.py``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import segloss

Inputs = dict[str, Any]  # everything but the logits, by argument name


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
    inputs: Callable[[Tensor], Inputs]  # example inputs to go with logits
    settings: dict[str, Any] = field(default_factory=dict)
    golden: tuple[Golden, ...] = ()
    masked: bool = True  # takes `valid`
    ignorable: Callable[[Inputs], Inputs] | None = None  # inputs that ignore every pixel, for losses without `valid`
    name: str = ""

    def __call__(self, logits: Tensor, inputs: Inputs, **settings: Any) -> Tensor:
        return self.function(logits, **inputs, **self.settings, **settings)


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


def refined_for(logits: Tensor) -> Tensor:
    return torch.softmax(torch.randn(logits.shape, dtype=logits.dtype if logits.dtype == torch.float64 else None), 1)


def _masked(arrays: dict[str, Tensor]) -> Inputs:
    return {"sizes": arrays["target"], "valid": arrays["mask"] > 0}


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
        segloss.log_barrier,
        segloss.LogBarrier,
        lambda x: {"tags": tags_for(x)},
        golden=(Golden("losses/log_barrier", lambda a: {"tags": a["tags"]}),),
    ),
    Loss(
        segloss.suppression,
        segloss.Suppression,
        lambda x: {"tags": tags_for(x)},
        golden=(Golden("losses/log_barrier", lambda a: {"tags": a["tags"]}, "loss_suppress", "grad_suppress"),),
    ),
    Loss(
        segloss.flat_barrier,
        segloss.FlatBarrier,
        lambda x: {"tags": tags_for(x)},
        settings={"floor": 0.21},
        golden=(Golden("losses/flat_barrier", lambda a: {"tags": a["tags"]}),),
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
        segloss.partial_cross_entropy,
        segloss.PartialCrossEntropy,
        lambda x: {"labels": labels_for(x)},
        golden=(
            Golden("losses/partial_ce", lambda a: {"labels": a["target"]}, settings={"reduction": "sum"}),
            Golden("losses/partial_ce", lambda a: {"labels": a["target"]}, "loss_mean", "grad_mean"),
        ),
        masked=False,
        ignorable=lambda inputs: {"labels": torch.full_like(inputs["labels"], 255)},
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
        ignorable=lambda inputs: {"seeds": torch.zeros_like(inputs["seeds"])},
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
        ),
        masked=False,
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
]


def loss_id(loss: Loss) -> str:
    return loss.name or loss.function.__name__
