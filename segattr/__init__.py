"""Attribution for weakly supervised segmentation: from a classifier and images to maps, and from maps to masks."""

from segattr import lrp, metrics, plot, refine
from segattr.advcam import advcam
from segattr.bbam import Detector, adaptive_stride, bbam, detector_from_torchvision, positive_proposals
from segattr.bottleneck import gndrp, rib
from segattr.cam import cam, multiscale, normalize
from segattr.ficklenet import StochasticConv2d, ficklenet
from segattr.gradients import grad_cam
from segattr.networks.classifier import Classifier, split

__all__ = [
    "Classifier",
    "Detector",
    "StochasticConv2d",
    "adaptive_stride",
    "advcam",
    "bbam",
    "cam",
    "detector_from_torchvision",
    "ficklenet",
    "gndrp",
    "grad_cam",
    "lrp",
    "metrics",
    "multiscale",
    "normalize",
    "plot",
    "positive_proposals",
    "refine",
    "rib",
    "split",
]
