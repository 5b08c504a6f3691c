"""Where the images of an example come from: scenes, a folder in the layout of VOC 2012, a plain folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import training
from engine.command import check_least

from data.augment import Fit
from data.files import check_folder, read_classes
from data.folder import Folder
from data.sample import Annotated, DataError, Images, Stacked
from data.scenes import CLASSES, Scenes, Split, stack
from data.tags import read_tags
from data.voc import VOC

EVALUATED = 200  # scenes


@dataclass(frozen=True)
class Options(training.Options):
    """What every training on images can be told on the command line."""

    data: Literal["scenes", "voc", "folder"] = "scenes"
    """Images: scenes, which are drawn; voc, the layout of VOC 2012; folder, with train/ and val/ that have images/,
    masks/ (PNG files of class indices, 255 where the class is not known) and classes.txt each."""
    root: Path | None = None
    """Folder of the images, for voc and folder."""
    train_split: str = "train"
    """Training images of voc: the name of their list; trainaug with SBD, whose masks are in SegmentationClassAug."""
    split: Literal["val", "final"] = "val"
    """Images that are evaluated: val, or final, scenes kept for figures to report; settings were chosen on val."""
    tags: Path | None = None
    """File of the tags of training images of voc or folder, in place of the classes of their masks: cls_labels.npy,
    .csv or .json."""
    scenes: int = 1500
    """Number of training scenes, for scenes."""
    quick: bool = False
    """For photographs, settings that take at most 20 minutes on two cores; without it, those of the papers, for a GPU.
    ``--data voc --help`` shows the one, ``--data voc --quick --help`` the other."""
    size: int = 48
    """Height and width of the images in pixels; photographs are made to fit and padded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, scenes=1, size=32)
        if self.data == "scenes" and self.root:
            raise ValueError(f"--root: expected --data voc or --data folder with it, got --data scenes and {self.root}")
        if self.data != "scenes" and not self.root:
            raise ValueError(f"--root: expected the folder of --data {self.data}, got none")
        if self.data != "voc" and self.train_split != "train":
            raise ValueError(f"--train-split: expected --data voc with it, got --data {self.data}")
        if self.data == "scenes" and self.tags:
            raise ValueError(f"--tags: expected --data voc or --data folder with it, got --data scenes and {self.tags}")
        if self.data == "scenes" and self.quick:
            raise ValueError("--quick: expected --data voc or --data folder with it, got --data scenes")

    def images(self, purpose: Literal["train", "evaluate"]) -> Images:
        """Images with masks, to train on or to evaluate."""
        if purpose == "train" and self.tags:
            images = self._images(purpose)
            return Annotated(images, tags=read_tags(self.tags, images.names, images.classes))
        return self._images(purpose)

    def _images(self, purpose: Literal["train", "evaluate"]) -> Images:
        split: Split = "train" if purpose == "train" else self.split
        if self.root and self.data == "voc":
            return VOC(self.root, self.train_split if purpose == "train" else split)
        if self.root and self.data == "folder":
            for folder in (self.root, self.root / "train", self.root / split):
                check_folder(folder)
            lists = [self.root / name / "classes.txt" for name in ("train", split)]
            if read_classes(lists[0]) != read_classes(lists[1]):
                raise DataError(f"{lists[1]}: expected the classes of {lists[0]}, got others, or another order")
            return Folder(self.root / split)
        count, seed = (self.scenes, self.seed) if purpose == "train" else (EVALUATED, 0)
        scenes = stack(Scenes(split, count, size=self.size, seed=seed))
        # Names tell scenes of other options apart: sizes that were typed for one must not pass for those of another.
        return Stacked(CLASSES, scenes.image, scenes.labels, prefix=f"size{self.size}_seed{seed}_")

    def fit(self, *, mirror: bool = False) -> Fit:
        """Brings images to one size; what is known of whole images stays true."""
        return Fit(self.size, mirror=mirror)
