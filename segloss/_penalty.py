"""What a statistic of a prediction costs outside its bounds: a squared penalty, or the log-barrier extension."""

from torch import Tensor, where

from segloss.common.checks import check_number


def penalty(excess: Tensor, t: float | None) -> Tensor:
    r"""The cost of a bound that is exceeded by :math:`z` (0 or less where it holds).

    Without ``t`` it is :math:`\max(z, 0)^2`, otherwise

    .. math:: \psi_t(z) = -\tfrac 1 t \ln(-z) \text{ if } z \le -\tfrac 1 {t^2}, \quad
        t z - \tfrac 1 t \ln \tfrac 1 {t^2} + \tfrac 1 t \text{ elsewhere}

    which is smooth once, and finite on both sides of the bound.
    """
    if t is None:
        return excess.clamp(min=0) ** 2
    scale = excess.new_full((), t)  # torch.compile makes one graph for all numbers that a schedule gives
    inside = excess <= -(scale**-2)
    barrier = -where(inside, -excess, 1).log() / scale
    return where(inside, barrier, scale * excess + (2 * scale.log() + 1) / scale)


def check_t(t: float | None) -> None:
    if t is not None:
        check_number("t", t, least=1e-3, most=1e6)
