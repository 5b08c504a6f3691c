"""The definition of the Gaussian filter: dense, any dtype, differentiable by autograd. All else is tested by it."""

import torch
from torch import Tensor


def gaussian_filter_reference(values: Tensor, features: Tensor) -> Tensor:
    """``values [B, K, N]`` times the symmetric ``W [B, N, N]`` with W_pq = exp(-|f_p - f_q|^2 / 2).

    ``features`` are ``[B, D, N]``. Memory is quadratic in N.
    """
    square = (features[:, :, :, None] - features[:, :, None, :]).square().sum(1)
    return values @ torch.exp(-square / 2)


def guide_gradient_reference(grad: Tensor, values: Tensor, features: Tensor) -> Tensor:
    """Gradient of ``(grad * gaussian_filter(values, features)).sum()`` with respect to ``features``, ``[B, D, N]``.

    For pixel p it is the sum over q of (g_p . v_q + v_p . g_q) W_pq (f_q - f_p).
    """
    difference = features[:, :, None, :] - features[:, :, :, None]
    products = grad.transpose(1, 2) @ values
    weights = (products + products.transpose(1, 2)) * torch.exp(-difference.square().sum(1) / 2)
    return (weights[:, None] * difference).sum(3)
