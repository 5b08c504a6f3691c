"""The table and the pictures of a comparison."""

from pathlib import Path

import torch
from data.voc import CLASSES
from matplotlib.figure import Figure
from matplotlib.image import imread
from parts.report import Outcome, draw_rows, picture, table

NAN = float("nan")


def outcome(iou: list[float], images: int = 2) -> Outcome:
    return Outcome(torch.tensor(iou), 3.0, [(1, 0.5)], torch.zeros(images, 4, 4, dtype=torch.int64))


def test_names_of_any_length_stand_apart() -> None:
    header, row = table(CLASSES, [{"full masks": outcome([0.5] * len(CLASSES))}]).splitlines()
    assert header.split() == ["IoU", *CLASSES, "mean", "of", "full", "seconds"]
    assert row.split() == ["full", "masks", *["0.500"] * 22, "100.0%", "3"]
    assert len(header) == len(row)


def test_the_mean_is_over_the_classes_that_occur() -> None:
    rows = table(("a", "b", "c"), [{"one": outcome([0.6, NAN, 0.2]), "other": outcome([0.3, NAN, 0.1])}]).splitlines()
    assert rows[1].split() == ["one", "0.600", "nan", "0.200", "0.400", "100.0%", "3"]
    assert rows[2].split() == ["other", "0.300", "nan", "0.100", "0.200", "50.0%", "3"]


def test_classes_have_the_colours_of_voc() -> None:
    figure = Figure()
    draw_rows(figure, {"truth": torch.tensor([[[0, 1], [15, 255]]])})
    (shown,) = figure.axes[0].get_images()
    assert shown.get_array().tolist() == [[[0, 0, 0], [128, 0, 0]], [[192, 128, 128], [224, 224, 192]]]


def test_one_image_can_be_drawn(tmp_path: Path) -> None:
    image, labels = torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    picture(image, labels, {"one": outcome([0.5], images=1)}, tmp_path / "one.png")
    assert imread(tmp_path / "one.png").shape == (1100, 900, 4)
