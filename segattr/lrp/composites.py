"""Which LRP rule each operation of a network gets: a list of pairs of a predicate and a rule, the first that holds.

The named ones are those of zennit. In each, numbers that the image is normalised with, activations, products with gates
and constants, and batch normalisation that follows no convolution pass relevance on, and all other operations that mix
numbers (sums, averages, attention weights times values, layer normalisation) take the epsilon rule with 1e-6. What only
moves numbers, as maximum pooling, concatenation and views do, brings relevance back to where it is from, and has no
other rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from segattr.lrp.rules import STABILIZER, AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, WSquare, ZBox, ZPlus
from segloss.common.checks import check_choice

__all__ = [
    "Place",
    "anything",
    "base",
    "convolution",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
    "first",
    "linear",
    "normalisation",
    "single",
    "weighted",
]


@dataclass(frozen=True)
class Place:
    """An operation, for predicates.

    Args:
        path: of the module that it is, or else of the one that it is in.
        kind: what it is called, in lower case without underscores: ``"conv2d"``, ``"linear"``, ``"batchnorm2d"``,
            ``"relu"``, ``"add"``, for the module and the function alike.
        module: that it is; None for a function.
        first: whether it gets the image alone, or what moves, shifts and scales its pixels makes of it.
    """

    path: str
    kind: str
    module: nn.Module | None
    first: bool


Composite = Sequence[tuple[Callable[[Place], Any], Rule]]

_DIMENSIONS = ("1d", "2d", "3d")
WEIGHTED = frozenset(("linear", *(f"{kind}{d}" for kind in ("conv", "convtranspose") for d in _DIMENSIONS)))
_SINGLE = frozenset(
    (
        *("relu", "relu6", "leakyrelu", "prelu", "rrelu", "hardtanh", "threshold", "clamp", "clip", "clampmin"),
        *("clampmax", "abs", "absolute", "silu", "gelu", "hardswish", "mish", "tanh", "elu", "celu", "selu"),
        *("softplus", "logsigmoid", "softsign", "hardshrink", "softshrink", "tanhshrink", "pow", "square"),
        *("floatpower", "mul", "multiply", "div", "divide", "truediv", "truedivide", "neg", "negative", "dropout"),
        *("alphadropout", "featuredropout", "featurealphadropout", *(f"dropout{d}" for d in _DIMENSIONS)),
    )
)
_NORMALISATIONS = frozenset(("batchnorm", "syncbatchnorm", *(f"batchnorm{d}" for d in _DIMENSIONS)))
SCALES = frozenset(("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "truediv", "truedivide"))


# --- predicates


def first(place: Place) -> bool:
    """Layers with weights that get the image.

    Example:
        >>> first(Place("conv1", "conv2d", None, first=True))
        True
    """
    return place.first and weighted(place)


def normalisation(place: Place) -> bool:
    """The numbers that a network normalises its image with.

    Example:
        >>> normalisation(Place("", "sub", None, first=True))
        True
    """
    return place.first and place.kind in SCALES


def convolution(place: Place) -> bool:
    """Convolutions, transposed ones too.

    Example:
        >>> convolution(Place("fc", "linear", None, first=False))
        False
    """
    return weighted(place) and place.kind != "linear"


def linear(place: Place) -> bool:
    """Linear layers.

    Example:
        >>> linear(Place("fc", "linear", None, first=False))
        True
    """
    return place.kind == "linear"


def weighted(place: Place) -> bool:
    """All layers with weights.

    Example:
        >>> weighted(Place("fc", "linear", None, first=False))
        True
    """
    return place.kind in WEIGHTED


def single(place: Place) -> bool:
    """Operations on single numbers: activations, dropout, products with gates or constants, batch normalisation.

    Example:
        >>> single(Place("act", "gelu", None, first=False))
        True
    """
    return place.kind in _SINGLE or place.kind in _NORMALISATIONS


def anything(place: Place) -> bool:
    """All operations.

    Example:
        >>> anything(Place("", "add", None, first=False))
        True
    """
    return True


# --- composites


def base(stabilizer: float = STABILIZER) -> Composite:
    """What all named composites do with operations that are no layers with weights; for the end of one's own.

    Args:
        stabilizer: of the epsilon rule.

    Example:
        >>> composite = [(first, Flat()), (convolution, Gamma(0.1)), (linear, Epsilon()), *base()]
    """
    return [(normalisation, Pass()), (single, Pass()), (anything, Epsilon(stabilizer))]


def everywhere(rule: Rule) -> Composite:
    """One rule for all layers with weights."""
    return [(weighted, rule), *base()]


def epsilon_plus(epsilon: float = STABILIZER, stabilizer: float = STABILIZER) -> Composite:
    """z+ for convolutions, epsilon for linear layers.

    Args:
        epsilon: of the epsilon rule.
        stabilizer: of all denominators else.

    Example:
        >>> import torch
        >>> from segattr.lrp import unroll
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> scores, heatmaps = unroll(model, rule="epsilon_plus")(torch.rand(1, 3, 8, 8))
    """
    return [(convolution, ZPlus(stabilizer)), (linear, Epsilon(epsilon)), *base(stabilizer)]


def epsilon_plus_flat(epsilon: float = STABILIZER, stabilizer: float = STABILIZER) -> Composite:
    """As :func:`epsilon_plus`, with the flat rule for layers that get the image.

    Example:
        >>> composite = epsilon_plus_flat(epsilon=0.1)
    """
    return [(first, Flat(stabilizer)), *epsilon_plus(epsilon, stabilizer)]


def epsilon_alpha2_beta1(epsilon: float = STABILIZER, stabilizer: float = STABILIZER) -> Composite:
    """alpha 2, beta 1 for convolutions, epsilon for linear layers.

    Example:
        >>> composite = epsilon_alpha2_beta1()
    """
    return [(convolution, AlphaBeta(2.0, 1.0, stabilizer)), (linear, Epsilon(epsilon)), *base(stabilizer)]


def epsilon_alpha2_beta1_flat(epsilon: float = STABILIZER, stabilizer: float = STABILIZER) -> Composite:
    """As :func:`epsilon_alpha2_beta1`, with the flat rule for layers that get the image.

    Example:
        >>> composite = epsilon_alpha2_beta1_flat()
    """
    return [(first, Flat(stabilizer)), *epsilon_alpha2_beta1(epsilon, stabilizer)]


def epsilon_gamma_box(
    low: float | Tensor,
    high: float | Tensor,
    epsilon: float = STABILIZER,
    gamma: float = 0.25,
    stabilizer: float = STABILIZER,
) -> Composite:
    """z-box for layers that get the image, gamma for other convolutions, epsilon for linear layers.

    Args:
        low: least value of a pixel, as in :class:`~segattr.lrp.rules.ZBox`.
        high: largest value.
        epsilon: of the epsilon rule.
        gamma: of the gamma rule.
        stabilizer: of all denominators else.

    Example:
        >>> composite = epsilon_gamma_box(low=-2.2, high=2.7)
    """
    box, others = ZBox(low, high, stabilizer), Gamma(gamma, stabilizer)
    return [(first, box), (convolution, others), (linear, Epsilon(epsilon)), *base(stabilizer)]


_NAMED: dict[str, Callable[[], Composite]] = {
    "gamma": lambda: everywhere(Gamma()),
    "zplus": lambda: everywhere(ZPlus()),
    "alpha_beta": lambda: everywhere(AlphaBeta()),
    "flat": lambda: everywhere(Flat()),
    "wsquare": lambda: everywhere(WSquare()),
    "epsilon_plus": epsilon_plus,
    "epsilon_plus_flat": epsilon_plus_flat,
    "epsilon_alpha2_beta1": epsilon_alpha2_beta1,
    "epsilon_alpha2_beta1_flat": epsilon_alpha2_beta1_flat,
}
_BOUNDED = {"zbox": "[(first, ZBox(low, high)), ...]", "epsilon_gamma_box": "epsilon_gamma_box(low, high)"}


def composite(rule: object) -> Composite | None:
    """The composite of a name, of a rule for all layers with weights, or itself; None for LRP-0."""
    if isinstance(rule, str):
        if rule in _BOUNDED:
            raise ValueError(f"rule: {rule} needs the bounds of the pixels: pass {_BOUNDED[rule]} of segattr.lrp")
        check_choice("rule", rule, ("zero", "epsilon", *_NAMED, *_BOUNDED))
        return None if rule == "zero" else _NAMED[rule]()
    if isinstance(rule, (list, tuple)):
        for entry in rule:
            pair = isinstance(entry, tuple) and len(entry) == 2 and all(map(callable, entry))
            if not pair or isinstance(entry[1], type):
                raise TypeError(f"rule: expected pairs of a predicate and a rule such as (first, Flat()), got {entry}")
        return list(rule)
    if isinstance(rule, type) or not callable(rule):
        raise TypeError(f"rule: expected a name, a rule such as Gamma(), or a list of pairs, got {rule}")
    return everywhere(rule)
