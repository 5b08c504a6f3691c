"""``dense_crf`` beside pydensecrf: time, labels off the truth, memory and growth, on one core.

Both run 10 iterations on photographs of 375 x 500 pixels, the size of VOC's, in turns in one process; the time of a
method is the median of its rounds, in seconds of the processor: both have one thread. The truth is mean field with the
block-sparse kernel at a tolerance of 2e-2, each method's own: pydensecrf, and ``own=True`` here, keep the message of a
pixel to itself. Memory is the peak above the inputs. Growth is that with pixels and with classes, on another
photograph, which is larger than 1024 x 1024, with the first preset. Writes dense_crf.json and dense_crf.md.
"""

import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.__main__ import HERE, environment, store
from benchmarks.frontier import Parser, count, one_thread
from benchmarks.memory import peak_bytes
from benchmarks.photos import bundled
from segattr.refine import BBAM_CRF, IRN_CRF, dense_crf

PHOTOS = ["china", "flower", "rocket", "motorcycle"]  # astronaut, chelsea and coffee served to choose the lattice
PRESETS: dict[str, dict[str, Any]] = {"IRN": dict(IRN_CRF), "BBAM": dict(BBAM_CRF)}
SIZE = (375, 500)
SIZES, CLASSES, LARGE = [(188, 250), SIZE, (512, 512), (1024, 1024)], [2, 4, 8, 21, 81], "retina"
PEER = "pydensecrf"
OURS: dict[str, dict[str, Any]] = {
    "dense_crf": {},
    "dense_crf own=True": {"own": True},
    "dense_crf filled=True": {"filled": True},
}
TRUTH: dict[str, Any] = {"method": "blocksparse", "tolerance": 2e-2}


def photograph(name: str, size: tuple[int, int] = SIZE) -> Tensor:
    """The largest part of a photograph with this ratio of sides, in levels of a byte: ``[1, 3, *size]``."""
    pixels = bundled(name)
    height, width = pixels.shape[:2]
    tall, wide = min(height, width * size[0] // size[1]), min(width, height * size[1] // size[0])
    top, left = (height - tall) // 2, (width - wide) // 2
    part = torch.from_numpy(pixels[top : top + tall, left : left + wide].copy()).permute(2, 0, 1)[None]
    return F.interpolate(part.float(), size, mode="area").round_().div_(255)


def maps(classes: int, size: tuple[int, int] = SIZE) -> Tensor:
    """Blurred random probabilities, as maps of classifiers are."""
    coarse = 2 * torch.randn(1, classes, 12, 16, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size, mode="bilinear").softmax(1)


def pydensecrf(probabilities: Tensor, image: Tensor, settings: dict[str, Any]) -> Tensor:
    """The released code's inference, with symmetric normalisation, which is its default."""
    _, classes, height, width = probabilities.shape
    model = import_module("pydensecrf.densecrf").DenseCRF2D(width, height, classes)
    model.setUnaryEnergy(-probabilities[0].clamp(min=1e-5).log().flatten(1).contiguous().numpy())
    model.addPairwiseGaussian(sxy=settings["smooth_sigma_xy"], compat=settings["smooth_weight"])
    levels = (255 * image[0]).round().byte().permute(1, 2, 0).contiguous().numpy()
    colour = {"srgb": 255 * settings["sigma_rgb"], "rgbim": levels}
    model.addPairwiseBilateral(sxy=settings["sigma_xy"], compat=settings["weight"], **colour)
    return torch.from_numpy(np.array(model.inference(settings["iterations"]))).view_as(probabilities)


def inference(method: str, name: str, preset: str, classes: int, size: tuple[int, int] = SIZE) -> Callable[[], Tensor]:
    torch.set_num_threads(1)
    probabilities, image, settings = maps(classes, size), photograph(name, size), PRESETS[preset]
    if method == PEER:
        return lambda: pydensecrf(probabilities, image, settings)
    return lambda: dense_crf(probabilities, image, **OURS[method], **settings)


def measure(rounds: int, *case: Any) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Time and memory of each method, and its result; ``case``: the arguments of ``inference`` after the method."""
    runs = {method: inference(method, *case) for method in (PEER, *OURS)}
    found = {method: run() for method, run in runs.items()}  # and warms up
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(rounds):
        for method, run in runs.items():
            start = time.process_time()
            run()
            seconds[method].append(time.process_time() - start)
    measured = {
        method: {
            "seconds": median(seconds[method]),
            "time_ratio": median(ours / theirs for ours, theirs in zip(seconds[method], seconds[PEER], strict=True)),
            "megabytes": peak_bytes(inference, method, *case) / 2**20,
        }
        for method in runs
    }
    return measured, found


def truths(name: str, preset: str, classes: int, folder: Path | None) -> Tensor:
    """Labels without and with a pixel's own message, ``[2, H, W]``; kept in a folder, since they take minutes."""
    file = folder / f"{name}_{preset}_{classes}.npy" if folder else None
    if file is not None and file.exists():
        return torch.from_numpy(np.load(file))
    settings = PRESETS[preset] | TRUTH
    probabilities, image = maps(classes), photograph(name)
    found = torch.cat([dense_crf(probabilities, image, own=own, **settings).argmax(1) for own in (False, True)])
    if file is not None:
        np.save(file, found.byte().numpy())
    return found


def compare(name: str, preset: str, classes: int, rounds: int, truth: Tensor | None) -> list[dict[str, Any]]:
    measured, found = measure(rounds, name, preset, classes)
    rows = []
    for method, figures in measured.items():
        own = method == PEER or "own" in OURS[method]
        off = None if truth is None else (found[method].argmax(1)[0] != truth[int(own)]).double().mean().item()
        case = {"photo": name, "preset": preset, "classes": classes, "method": method}
        rows.append(case | figures | {"labels_off": off})
    return rows


def growth(rounds: int) -> list[dict[str, Any]]:
    """With pixels at 4 classes, and with classes at 375 x 500."""
    rows = []
    for size, classes in [(size, 4) for size in SIZES] + [(SIZE, classes) for classes in CLASSES if classes != 4]:
        measured, _ = measure(rounds, LARGE, next(iter(PRESETS)), classes, size)
        for method, figures in measured.items():
            rows.append({"size": f"{size[0]} x {size[1]}", "classes": classes, "method": method} | figures)
    return rows


def markdown(rows: list[dict[str, Any]], grown: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        "# Dense CRF",
        "",
        f"{where['date']}, {where['processor']} ({where['instructions']}), 1 thread, load {where['load']:.1f}, torch "
        f"{where['torch']}, pydensecrf2 {where['pydensecrf2']}. 375 x 500, 10 iterations. Labels off the truth of the "
        "same definition; peak memory above the inputs.",
        "",
        "| photograph | preset | classes | method | time | of pydensecrf | labels off | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        off = "" if row["labels_off"] is None else f"{100 * row['labels_off']:.2f}%"
        lines.append(
            f"| {row['photo']} | {row['preset']} | {row['classes']} | {row['method']} | {row['seconds']:.3f} s "
            f"| {row['time_ratio']:.2f} | {off} | {row['megabytes']:.0f} MB |"
        )
    lines.append("")
    for classes in sorted({row["classes"] for row in rows}):
        for method in OURS:
            ratios = [row["time_ratio"] for row in rows if row["method"] == method and row["classes"] == classes]
            lines.append(
                f"- {method}, {classes} classes: {geometric_mean(ratios):.2f} of pydensecrf's time (geometric mean)"
            )
    lines += [
        "",
        f"Growth: {LARGE}, {next(iter(PRESETS))}.",
        "",
        "| size | classes | method | time | of pydensecrf | memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in grown:
        lines.append(
            f"| {row['size']} | {row['classes']} | {row['method']} | {row['seconds']:.3f} s | {row['time_ratio']:.2f} "
            f"| {row['megabytes']:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = Parser(prog="python -m benchmarks.dense_crf", description=__doc__)
    parser.add_argument("--photos", nargs="+", choices=PHOTOS, default=PHOTOS)
    parser.add_argument("--classes", nargs="+", type=count, default=[4])
    parser.add_argument("--timed", nargs="*", type=count, default=[21], help="classes without truths")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--truths", type=Path, help="folder that keeps the truths, which take minutes, for another run")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for dense_crf.json and dense_crf.md")
    options = parser.parse_args()
    parser.folder(options.out)
    if options.truths:
        parser.folder(options.truths, "--truths")
    try:
        where = environment() | {"pydensecrf2": version("pydensecrf2")}
    except PackageNotFoundError:
        parser.error("pydensecrf2: expected it to be installed, found none: pip install pydensecrf2")
    rows = []
    with one_thread():
        for classes in options.classes + options.timed:
            for name in options.photos:
                for preset in PRESETS:
                    truth = truths(name, preset, classes, options.truths) if classes in options.classes else None
                    rows += compare(name, preset, classes, options.rounds, truth)
        grown = growth(options.rounds)
    report = {"environment": where, "results": rows, "growth": grown}
    print(store(options.out / "dense_crf", report, markdown(rows, grown, where)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
