"""Layer-wise relevance propagation unrolled into trainable segmentation networks."""

from segattr.lrp import composites, rules
from segattr.lrp.adjoints import Linearised, adjoint
from segattr.lrp.free import FreeDecoder
from segattr.lrp.loss import HeatmapLoss, heatmap_loss
from segattr.lrp.subset import labelled_subset
from segattr.lrp.unroll import UnrolledLRP, unroll

__all__ = [
    "FreeDecoder",
    "HeatmapLoss",
    "Linearised",
    "UnrolledLRP",
    "adjoint",
    "composites",
    "heatmap_loss",
    "labelled_subset",
    "rules",
    "unroll",
]
