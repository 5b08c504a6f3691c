"""Measures of masks (J, contour F), instances (AP, ABO), maps (pointing game, best threshold) and gradients (HGR)."""

from segattr.metrics.gradients import high_gradient_ratio
from segattr.metrics.instances import PerClass, average_best_overlap, average_precision
from segattr.metrics.maps import BestThreshold, ThresholdSweep, best_threshold_miou, pointing_game
from segattr.metrics.masks import JAndF, contour_f, j_and_f, region_similarity

__all__ = [
    "BestThreshold",
    "JAndF",
    "PerClass",
    "ThresholdSweep",
    "average_best_overlap",
    "average_precision",
    "best_threshold_miou",
    "contour_f",
    "high_gradient_ratio",
    "j_and_f",
    "pointing_game",
    "region_similarity",
]
