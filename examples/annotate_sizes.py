"""A person says about how much of each image every class covers: the size targets that networks are trained from.

As in *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, sec. 3.4, with a grid to count by.
"""

import csv
import io
import math
import os
import re
import textwrap
import time
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from data.files import check_complete, check_folder, check_sizes
from data.folder import Folder
from data.sample import DataError, Images, class_sizes, object_error
from data.source import Options
from data.voc import VOC
from engine import storage
from engine.command import output_folder, parse
from engine.storage import StorageError
from torch import Tensor

from segattr.plot import size_grid

Grid = Literal["5x4", "3x3"]
GRIDS: dict[str, tuple[int, int]] = {"5x4": (5, 4), "3x3": (3, 3)}  # columns and rows
COMMANDS = ("skip", "back", "quit", *GRIDS)

Sizes = dict[str, list[float]]  # of the classes, by the name of the image
NAME = r"(.+?)(?:\s*:\s*|\s+)"  # of a class, and what is between it and its size


@dataclass(frozen=True)
class Config:
    """Draws a grid over each image that has no sizes yet, asks for them, and writes them to a CSV file at once."""

    data: Literal["scenes", "voc", "folder"] = "scenes"
    """Images: scenes, which are drawn, to try it out; voc, the layout of VOC 2012; folder, with train/ that has images/
    and classes.txt."""
    root: Path | None = None
    """Folder of the images, for voc and folder."""
    train_split: str = "train"
    """Images of voc: the name of their list."""
    scenes: int = 24
    """Number of scenes, for scenes; a training on them needs the same number."""
    size: int = 48
    """Height and width of the scenes in pixels; a training on them needs the same."""
    seed: int = 0
    """Seed of the scenes; a training on them needs the same."""
    sizes: Path = Path("runs/annotate_sizes/sizes.csv")
    """CSV file of the sizes; images with a row are done, those without one are asked for."""
    grid: Grid = "5x4"
    """Grid to begin with: 5x4 cells for small objects, 3x3 for large ones; the answer 5x4 or 3x3 changes it."""
    masks: bool = False
    """Say in the end how wrong the sizes are: the images have masks, too."""
    check: bool = False
    """Ask nothing: look at each row of the CSV file, print what is wrong and where, and fail if anything is."""
    out: Path = Path("runs/annotate_sizes")
    """Folder of the images with grids."""

    def __post_init__(self) -> None:
        self._options()  # checks them

    def images(self) -> Images:
        """The images of a training; masks need not be there unless they are asked for."""
        if self.root:
            check_folder(self.root)
        if self.root and self.data == "voc":
            return VOC(self.root, self.train_split, masks=self.masks)
        if self.root and self.data == "folder":
            return Folder(self.root / "train", masks=self.masks)
        return self._options().images("train")

    def _options(self) -> Options:
        where = {"data": self.data, "root": self.root, "train_split": self.train_split}
        return Options(**where, scenes=self.scenes, size=self.size, seed=self.seed)  # type: ignore[arg-type]


def read_answer(answer: str, classes: tuple[str, ...], cells: int) -> list[float]:
    """Sizes of all classes from an answer such as ``"dog 2.5, cat 1/2, bird 12%"``; the background is the rest.

    Raises:
        ValueError: what is wrong, for the person who is asked.
    """
    shares: dict[str, Fraction] = {}
    for entry in filter(None, map(str.strip, answer.split(","))):
        name, numbers, percent = _split(entry, classes)
        if name not in classes[1:]:
            reason = "is the rest, which needs no size" if name == classes[0] else "is no class"
            raise ValueError(f"{name} {reason}: expected one of {', '.join(classes[1:])}")
        if name in shares:
            raise ValueError(f"{name}: expected one size of all its objects together, got two")
        shares[name] = sum(_number(name, number) for number in numbers) / Fraction(100 if percent else cells)
    total = sum(shares.values(), Fraction())
    if total > 1:
        raise ValueError(f"expected at most {cells} cells, or 100%, in all, got {float(total):.4g} times as much")
    return [float(size) for size in (1 - total, *(shares.get(name, Fraction()) for name in classes[1:]))]


def _split(entry: str, classes: tuple[str, ...]) -> tuple[str, list[str], str]:
    """Of ``"dog 2.5"``, ``"Dog: 1 1/2"`` or ``"dog 12%"`` the class, the numbers to add, and the percent sign."""
    parts = re.fullmatch(rf"{NAME}([^\s:]+?)\s*(%?)", entry)
    if not parts:
        raise ValueError(f"{entry}: expected a class and its size, such as {classes[1]} 2.5")
    name, number, percent = parts.groups()
    numbers = [number]
    spelling = {label.casefold(): label for label in classes}
    whole = re.fullmatch(rf"{NAME}(\d+)", name)
    if whole and "/" in number and name.casefold() not in spelling:  # no class called "dog 1"
        name, numbers = whole[1], [whole[2], number]
    return name if name in classes else spelling.get(name.casefold(), name), numbers, percent


def _number(name: str, text: str) -> Fraction:
    try:
        if not re.fullmatch(r"-?\d*\.?\d+(/\d+)?", text):  # Fraction takes more: 1e999999999, which is slow
            raise ValueError
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name}: expected a number such as 2.5 or 1/2, or percent such as 12%, got {text}") from None
    if number < 0:
        raise ValueError(f"{name}: expected a size of at least 0, got {text}")
    return number


def ask(classes: tuple[str, ...], cells: int) -> str | list[float]:
    """One of the commands, or the sizes of all classes; asks until the answer is right."""
    while True:
        try:
            answer = input("sizes: ").strip()
            return answer.lower() if answer.lower() in COMMANDS else read_answer(answer, classes, cells)
        except ValueError as error:
            print(f"  {error}", flush=True)
        except (EOFError, KeyboardInterrupt):
            print()
            return "quit"


def draw(image: Tensor, classes: tuple[str, ...], grid: str, path: Path) -> None:
    """Writes the image under its grid, with the names of the classes."""
    columns, rows = GRIDS[grid]
    figure = size_grid(image, columns=columns, rows=rows)
    figure.axes[0].set_title(textwrap.fill(", ".join(classes[1:]), 80), fontsize="medium")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    storage.write(path, file.getvalue())


def save(path: Path, classes: tuple[str, ...], rows: Sizes) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *classes])
    writer.writerows([name, *(f"{size:.9g}" for size in sizes)] for name, sizes in rows.items())
    storage.write(path, text.getvalue().encode())


def annotate(images: Images, rows: Sizes, config: Config) -> dict[str, float]:
    """Asks for each image without a row, and writes the file after each answer.

    Returns:
        Seconds that each image with an answer took, by name.
    """
    waiting = deque(index for index, name in enumerate(images.names) if name not in rows)
    index_of = {name: index for index, name in enumerate(images.names)}
    past = [index_of[name] for name in rows]
    grid: str = config.grid
    seconds: dict[str, float] = {}  # of each image that was shown
    answered = set()
    while waiting:
        name = images.names[waiting[0]]
        path = config.out / "grids" / f"{name}.png"  # in a folder of its own: nothing else has that name
        draw(images[waiting[0]]["image"], images.classes, grid, path)
        columns, lines = GRIDS[grid]
        print(f"{name}, {len(rows)} of {len(images)} done, {columns * lines} cells: {path}", flush=True)
        begin = time.monotonic()
        answer = ask(images.classes, columns * lines)
        if answer == "quit":
            break
        seconds[name] = seconds.get(name, 0) + time.monotonic() - begin
        if isinstance(answer, str) and answer in GRIDS:
            grid = answer
        elif answer == "back":
            if past:
                waiting.appendleft(past.pop())
            else:
                print("  this is the first image")
        else:
            past.append(waiting.popleft())
            if isinstance(answer, list):
                rows[name] = answer
                save(config.sizes, images.classes, rows)
                answered.add(name)
                found = zip(images.classes, answer, strict=True)
                print("  written: " + ", ".join(f"{label} {size:.3g}" for label, size in found if size), flush=True)
    return {name: seconds[name] for name in answered}


def table(images: Images, rows: Sizes, seconds: dict[str, float]) -> str:
    """For each class: its images, what one of them took, mean relative error of its sizes, images where it is not and
    has a size all the same. All classes together leave out the background.
    """
    index_of = {name: index for index, name in enumerate(images.names)}
    truth = {name: class_sizes(images.labels(index_of[name]), len(images.classes)) for name in rows}
    names = [name for name in rows if truth[name].any()]  # not those that are void everywhere
    if not names:
        return "no image that has sizes and a mask with labelled pixels"
    sizes = torch.tensor([rows[name] for name in names])
    exact = torch.stack([truth[name] for name in names])
    took = torch.tensor([seconds.get(name, torch.nan) for name in names])  # NaN: in an earlier session

    def line(label: str, present: Tensor, error: float, wrong: Tensor) -> str:
        mean = float(took[present].nanmean())
        average = "-" if math.isnan(mean) else f"{mean:.1f}"
        shown = "-" if math.isnan(error) else f"{error:.1%}"
        return f"{label:<13}{int(present.sum()):>8}{average:>9}{shown:>8}{int(wrong.sum()):>8}"

    lines = [f"{'class':<13}{'images':>8}{'seconds':>9}{'mRE':>8}{'absent':>8}"]
    absent = (sizes > 0) & (exact == 0)
    for label, size, share, wrong in zip(images.classes, sizes.T, exact.T, absent.T, strict=True):
        present = share > 0
        if (present | wrong).any():
            error = float(((size - share).abs() / share)[present].mean())
            lines.append(line(label, present, error, wrong))
    everything = torch.ones(len(names), dtype=torch.bool)
    lines.append(line("all objects", everything, object_error(sizes, exact), absent[:, 1:]))
    return "\n".join(lines)


def check(images: Images, path: Path) -> None:
    """Prints all that is wrong with a file of sizes, and fails if anything is."""
    rows, problems = check_sizes(path, images.names, images.classes, others=False)
    try:
        check_complete(path, images.names, rows)
    except DataError as error:
        problems.append(str(error))
    if problems:
        print("\n".join(problems))
        raise SystemExit(1)
    print(f"{path}: right, with a row for each of {len(images)} images")


def main(config: Config) -> None:
    images = config.images()
    if config.check:
        check(images, config.sizes)
        return
    output_folder(config.out)
    rows: Sizes = {}
    if os.path.exists(config.sizes):
        rows, problems = check_sizes(config.sizes, images.names, images.classes, others=False)
        if problems:
            raise DataError(f"{problems[0]} (--check prints all problems)")
    save(config.sizes, images.classes, rows)  # a file that cannot be written stops the program before anybody answers
    background, example, *_ = images.classes
    print(f"Classes: {', '.join(images.classes[1:])}; {background} is the rest, or all if nothing is typed")
    print(f"Answers: {example} 2.5, in cells, or {example} 1/2, or {example} 12%; several with commas between")
    print(f"Or: {', '.join(COMMANDS)}")
    seconds = annotate(images, rows, config)
    if seconds:
        print(f"{sum(seconds.values()) / len(seconds):.1f} seconds per image, {len(seconds)} images")
    if config.masks:
        print(table(images, rows, seconds))
    print(f"{len(rows)} of {len(images)} images are in {config.sizes}")


if __name__ == "__main__":
    try:
        main(parse(Config))
    except (DataError, StorageError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
