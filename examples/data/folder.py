"""A data set of one's own: a folder of images, a folder of masks, and the names of the classes."""

from itertools import pairwise
from pathlib import Path

from data.files import ImageFiles, check_folder, read_classes
from data.sample import DataError

ENDINGS = (".jpg", ".jpeg", ".png")


class Folder(ImageFiles):
    """The images of a folder, in the order of their names.

    Samples have ``"image"``; ``"labels"`` with ``masks``; ``"sizes"`` with ``sizes``.

    Args:
        root: holds ``images/`` (.jpg, .jpeg or .png; what lies in folders below is left out), ``masks/`` (for every
            image a PNG of the same name whose pixel values are class indices, 255 being void) and ``classes.txt``
            (names, one in a line, the background first).
        masks: whether samples have labels; there need not be any masks otherwise.
        sizes: CSV file of the sizes of the classes, see :func:`data.files.read_sizes`.

    Raises:
        DataError: something is missing, two images differ in their endings only, sizes are wrong; when a sample is
            read, a file that cannot be read or a mask that does not fit.
    """

    def __init__(self, root: Path, *, masks: bool = True, sizes: Path | None = None) -> None:
        check_folder(root)
        folder = root / "images"
        check_folder(folder)
        try:
            images = [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS]
        except OSError as error:
            raise DataError(f"{folder}: expected a folder that can be read, got: {error.strerror}") from None
        images.sort(key=lambda path: (path.stem, path.name))
        if not images:
            raise DataError(f"{folder}: expected images ({', '.join(ENDINGS)}), found none")
        for one, other in pairwise(images):
            if one.stem == other.stem:
                raise DataError(f"{folder}: expected one image for each name, got {one.name} and {other.name}")
        if masks:
            check_folder(root / "masks")
        super().__init__(
            classes=read_classes(root / "classes.txt"),
            names=[path.stem for path in images],
            images=images,
            masks=[root / "masks" / f"{path.stem}.png" for path in images],
            with_masks=masks,
            sizes=sizes,
        )
