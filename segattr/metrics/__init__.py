"""Measures: of masks (region J, contour F, J&F), of maps (pointing game, best threshold) and of gradients (HGR)."""

from segattr.metrics.gradients import high_gradient_ratio
from segattr.metrics.maps import BestThreshold, ThresholdSweep, best_threshold_miou, pointing_game
from segattr.metrics.masks import JAndF, contour_f, j_and_f, region_similarity

__all__ = [
    "BestThreshold",
    "JAndF",
    "ThresholdSweep",
    "best_threshold_miou",
    "contour_f",
    "high_gradient_ratio",
    "j_and_f",
    "pointing_game",
    "region_similarity",
]
