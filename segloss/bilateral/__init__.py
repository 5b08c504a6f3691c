"""The bilateral filter: a Gaussian kernel of colour and position, applied to any number of channels.

For code that is built on the filter: :class:`PreparedFilter`, for many values of one image; ``guide_features`` and
``guide_colour``, what the kernel sees of an image; ``check_guide``, ``check_space``, ``check_sigma``,
``colour_sigma`` and ``check_plan``, the checks of the arguments that every function of this kernel
shares, and ``make_plan``, what its methods are told.
"""

from segloss.bilateral.filter import bilateral_error, bilateral_filter
from segloss.bilateral.guide import (
    check_guide,
    check_sigma,
    check_space,
    colour_sigma,
    guide_colour,
    guide_features,
)
from segloss.bilateral.lattice import LatticeError
from segloss.bilateral.operator import ToleranceError
from segloss.bilateral.plan import Plan, check_plan, make_plan
from segloss.bilateral.prepared import PreparedFilter

__all__ = [
    "LatticeError",
    "Plan",
    "PreparedFilter",
    "ToleranceError",
    "bilateral_error",
    "bilateral_filter",
    "check_guide",
    "check_plan",
    "check_sigma",
    "check_space",
    "colour_sigma",
    "guide_colour",
    "guide_features",
    "make_plan",
]
