"""Attribution for weakly supervised segmentation: from a classifier and images to maps."""

from segattr import metrics

__all__ = ["metrics"]
