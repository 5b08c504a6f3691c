"""Attribution for weakly supervised segmentation: from a classifier and images to maps."""

from segattr import lrp, metrics

__all__ = ["lrp", "metrics"]
