"""How to filter: the settings of a call, checked, and what ``"auto"`` means for an image."""

import math
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

from segloss.common.checks import check_choice, check_number

_METHODS = ("auto", "exact", "blocksparse", "lowrank", "lattice")
_BACKENDS = ("auto", "torch", "triton")
_PRECISIONS = ("auto", "float32")
_HAS_TRITON = find_spec("triton") is not None
_WORTH_SORTING = 2500  # pixels; below, leaving out pairs saves less than finding them costs
_WORTH_LANDMARKS = 10000  # pixels; below, pairs are cheaper than landmarks


class Plan(NamedTuple):
    """How to filter."""

    size: tuple[int, ...]  # of the image, along each spatial axis
    method: str  # "auto" prefers low rank and takes block-sparse where that misses the tolerance
    tolerance: float
    full: bool  # keep the large products of the low-rank method out of bfloat16
    triton: bool  # kernels instead of plain torch for the methods that visit pairs of pixels


def check_plan(method: str, tolerance: float, backend: str, precision: str) -> None:
    """The settings as far as they can be checked without an image."""
    check_choice("method", method, _METHODS)
    check_choice("backend", backend, _BACKENDS)
    check_choice("precision", precision, _PRECISIONS)
    check_number("tolerance", tolerance, above=0, below=1)


def make_plan(method: str, tolerance: float, backend: str, precision: str, image: Tensor) -> Plan:
    """The settings of :func:`bilateral_filter` for an image, checked; ``"auto"`` as far as the shape decides it."""
    check_plan(method, tolerance, backend, precision)
    size = tuple(image.shape[2:])
    pixels = math.prod(size)
    triton = image.is_cuda and backend != "torch" and _HAS_TRITON
    if backend == "triton" and not triton:
        lacks = "the package triton" if image.is_cuda else "a CUDA device"
        raise ValueError(f"backend: expected {lacks} for 'triton', got an image on {image.device}")
    if method == "auto" and pixels < _WORTH_SORTING:
        method = "exact"
    elif method == "auto" and (triton or pixels < _WORTH_LANDMARKS):
        method = "blocksparse"
    return Plan(size, method, float(tolerance), precision == "float32", triton)
