"""A folder of a few small photographs of different sizes in the layout of VOC 2012, with rough boxes as masks."""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

CLASSES = ("background", "cat", "cup", "person")
# Photographs of scikit-image, the boxes of their objects in shares of width and height, and the sizes that they get.
BOXES = {"chelsea": (0.15, 0.05, 0.75, 0.95), "coffee": (0.2, 0.05, 0.85, 0.95), "astronaut": (0.15, 0.0, 0.7, 1.0)}
SIZES = {"train": ((100, 66), (60, 90)), "val": ((80, 64),)}


def write_tiny_photographs(root: Path) -> None:
    """Two images of each class for training, one to evaluate."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for split, sizes in SIZES.items():
        names = []
        for label, (name, (x1, y1, x2, y2)) in enumerate(BOXES.items(), 1):
            for width, height in sizes:
                names.append(f"{name}_{split}_{width}")
                image = Image.fromarray(getattr(data, name)()).resize((width, height))
                image.save(root / "JPEGImages" / f"{names[-1]}.jpg")
                mask = np.zeros((height, width), np.uint8)
                mask[int(y1 * height) : int(y2 * height), int(x1 * width) : int(x2 * width)] = label
                Image.fromarray(mask).save(root / "SegmentationClass" / f"{names[-1]}.png")
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
