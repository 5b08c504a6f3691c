"""Attribution for weakly supervised segmentation: from a classifier and images to maps, and from maps to masks."""

from segattr import lrp, metrics, plot, refine
from segattr.advcam import advcam
from segattr.bottleneck import gndrp, rib
from segattr.cam import cam, grad_cam, multiscale, normalize
from segattr.classifier import Classifier, split
from segattr.ficklenet import StochasticConv2d, ficklenet

__all__ = [
    "Classifier",
    "StochasticConv2d",
    "advcam",
    "cam",
    "ficklenet",
    "gndrp",
    "grad_cam",
    "lrp",
    "metrics",
    "multiscale",
    "normalize",
    "plot",
    "refine",
    "rib",
    "split",
]
