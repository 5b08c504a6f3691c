r"""LRP rules: how a layer divides the relevance of its output among its inputs.

Each is :math:`R_j = \sum_k (x_j w_{jk} / z_k) R_k` with other inputs and weights in it. A :class:`Part` is one such
sum: all rules are made of one to four of them. Positive and negative parts are :math:`x^+ = \max(x, 0)` and
:math:`x^- = \min(x, 0)`; denominators get a small number of their own sign.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from segattr.lrp.adjoints import Layer
from segloss.common.checks import check_number

__all__ = ["AlphaBeta", "Epsilon", "Flat", "Gamma", "Pass", "WSquare", "ZBox", "ZPlus"]

STABILIZER = 1e-6  # added to denominators, in the unit of the activations


class Part(NamedTuple):
    """Relevance at the inputs: each input times what goes back to it of relevance over activation."""

    inverses: list[Tensor]  # 1 / z of each output, [B, 1, *out]
    inputs: list[Any]  # numbers, or [B, 1, *in]
    back: Callable[[Any], Tensor | Sequence[Tensor]]  # from [B, K, *out] to the inputs, [B, K, *in]
    shifts: dict[str, Tensor]  # what is added to z


class Rule(Protocol):
    """What a rule is: a function from a layer to the parts of its relevance."""

    def __call__(self, layer: Layer, /) -> list[Part]: ...


def stable(z: Tensor, stabilizer: float) -> Tensor:
    """1 / z as a constant, with a number of the sign of z added to it; 0 where z is 0 and the number too."""
    z = z.detach()
    if stabilizer:
        return 1 / torch.where(z < 0, z - stabilizer, z + stabilizer)
    return torch.where(z == 0, 0, 1 / torch.where(z == 0, 1, z))


@dataclass(frozen=True)
class _Term:
    """A layer with another input and weight, or with another bias."""

    x: Any
    weight: Tensor
    bias: Tensor | None = None


def _parts(
    layer: Layer, terms: list[_Term], stabilizer: float, factor: float = 1.0, where: Tensor | None = None
) -> list[Part]:
    """Terms over their common sum, times a factor, for some of the outputs."""
    with torch.no_grad():
        sums = [layer.forward(term.x.expand_as(layer.x), term.weight, term.bias) for term in terms]
        z = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        inverse = factor * stable(z, stabilizer).unsqueeze(1)
        if where is not None:
            inverse = inverse * where.unsqueeze(1)
    return [_part(layer, term, inverse) for term in terms]


def _part(layer: Layer, term: _Term, inverse: Tensor) -> Part:
    shifts = {} if term.bias is None else {"bias": term.bias}
    x = term.x.detach()
    return Part([inverse], [x if x.dim() == 0 else x.unsqueeze(1)], lambda s: layer.back(s, term.weight), shifts)


def _signed(layer: Layer, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> list[_Term]:
    """Positive inputs with one function of weight and bias, negative ones with another of the weight."""
    weight, bias = layer.weight, None if layer.bias is None else first(layer.bias)
    if layer.nonnegative:
        return [_Term(layer.x, first(weight), bias)]
    return [_Term(layer.x.clamp(min=0), first(weight), bias), _Term(layer.x.clamp(max=0), second(weight))]


def _positive(weight: Tensor) -> Tensor:
    return weight.clamp(min=0)


def _negative(weight: Tensor) -> Tensor:
    return weight.clamp(max=0)


@dataclass(frozen=True)
class Epsilon:
    r"""LRP-:math:`\epsilon`, and LRP-0 for :math:`\epsilon = 0`.

    .. math:: R_j = x_j \sum_k w_{jk} \frac{R_k}{z_k + \epsilon \, \mathrm{sign}(z_k)}, \quad
        z_k = \sum_j x_j w_{jk} + b_k

    It goes with any operation: what that is around its input stands for the weights. Its bias takes
    :math:`b_k / z_k` of the relevance, :math:`\epsilon` takes :math:`\epsilon / (|z_k| + \epsilon)`: with both 0 the
    rule conserves.

    Args:
        epsilon: at least 0, in the unit of the activations.

    Source:
        *On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation* (Bach et
        al., 2015), eq. 58.

    Example:
        >>> from segattr.lrp import unroll
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2, bias=False))
        >>> scores, heat = unroll(model, rule=[(lambda place: True, Epsilon(0))])(torch.rand(1, 3, 2, 2))
        >>> torch.allclose(heat.sum((2, 3)), scores)
        True
    """

    epsilon: float = STABILIZER

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, least=0)

    def __call__(self, layer: Layer) -> list[Part]:
        inverse = stable(layer.output, self.epsilon).unsqueeze(1)
        return [_part(layer, _Term(layer.x, layer.weight, layer.bias), inverse)]


@dataclass(frozen=True)
class ZPlus:
    r"""z+, or :math:`\alpha 1 \beta 0`: in proportion to what raises the output.

    .. math:: R_j = \sum_k \frac{x_j^+ w_{jk}^+ + x_j^- w_{jk}^-}{\sum_i (x_i^+ w_{ik}^+ + x_i^- w_{ik}^-) + b_k^+} R_k

    It conserves up to the share of positive biases, and outputs that nothing raises, whose relevance is lost.

    Args:
        stabilizer: added to the denominator.

    Source:
        *Explaining Nonlinear Classification Decisions with Deep Taylor Decomposition* (Montavon et al., 2017), for
        positive inputs; with negative ones as in Bach et al. (2015), eq. 60 with :math:`\alpha = 1`.

    Example:
        >>> from segattr.lrp import unroll
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> scores, heat = unroll(model, rule=ZPlus())(torch.rand(1, 3, 2, 2))
        >>> bool((heat * scores[..., None, None] >= 0).all())
        True
    """

    stabilizer: float = STABILIZER

    def __post_init__(self) -> None:
        check_number("stabilizer", self.stabilizer, least=0)

    def __call__(self, layer: Layer) -> list[Part]:
        return _parts(layer, _signed(layer, _positive, _negative), self.stabilizer)


@dataclass(frozen=True)
class AlphaBeta:
    r"""Positive and negative contributions apart, :math:`\alpha` times the first minus :math:`\beta` times the second.

    .. math:: R_j = \sum_k \Bigl(\alpha \frac{(x_j w_{jk})^+}{\sum_i (x_i w_{ik})^+ + b_k^+}
        - \beta \frac{(x_j w_{jk})^-}{\sum_i (x_i w_{ik})^- + b_k^-}\Bigr) R_k

    It conserves, as :math:`\alpha - \beta = 1`, up to the shares of biases, where an output has contributions of both
    signs; one without negative ones gives back :math:`\alpha` times its relevance.

    Args:
        alpha: at least 1.
        beta: ``alpha - 1``.
        stabilizer: added to the denominators.

    Raises:
        ValueError: numbers that do not differ by 1.

    Source:
        Bach et al. (2015), eq. 60.

    Example:
        >>> AlphaBeta(alpha=2, beta=1)
        AlphaBeta(alpha=2, beta=1, stabilizer=1e-06)
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = STABILIZER

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, least=1)
        check_number("beta", self.beta, least=0)
        check_number("stabilizer", self.stabilizer, least=0)
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(
                f"beta: expected alpha - 1 = {self.alpha - 1:g}, so that relevance is kept, got {self.beta}"
            )

    def __call__(self, layer: Layer) -> list[Part]:
        raising = _parts(layer, _signed(layer, _positive, _negative), self.stabilizer, self.alpha)
        if not self.beta:
            return raising
        return raising + _parts(layer, _signed(layer, _negative, _positive), self.stabilizer, -self.beta)


@dataclass(frozen=True)
class Gamma:
    r"""LRP-:math:`\gamma`: contributions that raise an output count :math:`1 + \gamma` times.

    .. math:: R_j = \sum_k
        \frac{x_j (w_{jk} + \gamma w_{jk}^+)}{\sum_i x_i (w_{ik} + \gamma w_{ik}^+) + b_k + \gamma b_k^+} R_k

    for positive inputs and outputs. Negative inputs take :math:`w^-` in place of :math:`w^+`; of negative outputs it is
    the contributions that lower them. Outputs of 0 give nothing back. It conserves up to the share of biases.

    Args:
        gamma: at least 0, where it is LRP-0.
        stabilizer: added to the denominator.

    Source:
        *Layer-Wise Relevance Propagation: An Overview* (Montavon et al., 2019); for any sign *Learning
        Domain Invariant Representations by Joint Wasserstein Distance Minimization* (Andéol et al., 2021).

    Example:
        >>> Gamma(0.25)
        Gamma(gamma=0.25, stabilizer=1e-06)
    """

    gamma: float = 0.25
    stabilizer: float = STABILIZER

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, least=0)
        check_number("stabilizer", self.stabilizer, least=0)

    def __call__(self, layer: Layer) -> list[Part]:
        up, down = (lambda w: w + self.gamma * _positive(w)), (lambda w: w + self.gamma * _negative(w))
        raised = _parts(layer, _signed(layer, up, down), self.stabilizer, where=layer.output > 0)
        return raised + _parts(layer, _signed(layer, down, up), self.stabilizer, where=layer.output < 0)


@dataclass(frozen=True)
class Flat:
    r"""In equal parts to all inputs, whatever they and the weights are.

    .. math:: R_j = \sum_k \frac{1}{n_k} R_k

    with the number :math:`n_k` of inputs of output k. It conserves, and has no weights to train. For lower layers.

    Args:
        stabilizer: added to the denominator.

    Source:
        *Unmasking Clever Hans Predictors and Assessing What Machines Really Learn* (Lapuschkin et al., 2019), methods.

    Example:
        >>> from segattr.lrp import unroll
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> scores, heat = unroll(model, rule=Flat(0))(torch.rand(1, 3, 2, 2))
        >>> torch.allclose(heat, scores[..., None, None] / 4)
        True
    """

    stabilizer: float = STABILIZER

    def __post_init__(self) -> None:
        check_number("stabilizer", self.stabilizer, least=0)

    def __call__(self, layer: Layer) -> list[Part]:
        ones = torch.ones_like(layer.weight)
        return _parts(layer, [_Term(layer.x.new_ones(()), ones.detach())], self.stabilizer)


@dataclass(frozen=True)
class WSquare:
    r"""In proportion to squared weights, whatever the inputs are.

    .. math:: R_j = \sum_k \frac{w_{jk}^2}{\sum_i w_{ik}^2 + b_k^2} R_k

    It conserves up to the share of biases. For the first layer, where inputs have no bounds.

    Args:
        stabilizer: added to the denominator.

    Source:
        Montavon et al. (2017); there without a bias, which is in the denominator here as it is in zennit.

    Example:
        >>> WSquare()
        WSquare(stabilizer=1e-06)
    """

    stabilizer: float = STABILIZER

    def __post_init__(self) -> None:
        check_number("stabilizer", self.stabilizer, least=0)

    def __call__(self, layer: Layer) -> list[Part]:
        bias = None if layer.bias is None else layer.bias.square()
        return _parts(layer, [_Term(layer.x.new_ones(()), layer.weight.square(), bias)], self.stabilizer)


@dataclass(frozen=True)
class ZBox:
    r"""For a layer whose inputs are pixels between two bounds.

    .. math:: R_j = \sum_k \frac{x_j w_{jk} - l_j w_{jk}^+ - h_j w_{jk}^-}
        {\sum_i (x_i w_{ik} - l_i w_{ik}^+ - h_i w_{ik}^-)} R_k

    It conserves: biases take nothing. For layers that get the image.

    Args:
        low: the least value that a pixel can have, in the unit of the images as the classifier gets them: a number, or
            a tensor that broadcasts against ``[B, C, H, W]``, such as ``[C, 1, 1]``.
        high: the largest one.
        stabilizer: added to the denominator.

    Raises:
        ValueError: ``low`` that is not below ``high``.

    Source:
        Montavon et al. (2017).

    Example:
        >>> mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        >>> rule = ZBox(low=((0 - mean) / std)[:, None, None], high=((1 - mean) / std)[:, None, None])
    """

    low: float | Tensor
    high: float | Tensor
    stabilizer: float = STABILIZER

    def __post_init__(self) -> None:
        check_number("stabilizer", self.stabilizer, least=0)
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        if not bool((low < high).all()):
            raise ValueError(f"low: expected numbers below high, got {self.low} and {self.high}")

    def __call__(self, layer: Layer) -> list[Part]:
        low, high = (torch.as_tensor(v).to(layer.x).expand_as(layer.x) for v in (self.low, self.high))
        weight = layer.weight
        terms = [_Term(layer.x, weight), _Term(-low, _positive(weight)), _Term(-high, _negative(weight))]
        return _parts(layer, terms, self.stabilizer)


class Pass:
    """Relevance as it is, for operations on single numbers: activations, products with gates, batch normalisation.

    It conserves: what such an operation adds takes nothing.

    Example:
        >>> Pass()
        Pass()
    """

    def __call__(self, layer: Layer) -> list[Part]:
        raise ValueError("Pass: expected an operation on single numbers, got a layer with weights")

    def __repr__(self) -> str:
        return "Pass()"
