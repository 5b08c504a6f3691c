"""Attribution for weakly supervised segmentation: from a classifier and images to maps."""

__all__: list[str] = []
