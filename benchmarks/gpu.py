"""The CUDA half, checked against float64 first, then timed: under eight minutes on an H200.

Times are medians of ``triton.testing.do_bench``. ``bilateral_filter`` and ``potts_crf`` run on bundled photographs with
sigma 15/255 and 50 pixels at 256 pixels a side, in proportion at other sizes. Limits come from the device: exponentials
at 16 a clock and multiprocessor, half-precision products at 1,024 (from compute capability 9 on 2,048) multiplications,
memory from a measured copy.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import segloss
from benchmarks.__main__ import environment
from benchmarks.baselines import log_space_size_kl, naive_size_kl
from benchmarks.photos import photo
from segloss.bilateral import guide_features
from segloss.bilateral.operator import ToleranceError

HERE = Path(__file__).parent
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
SIDES = (256, 384, 512)
METHODS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "blocksparse 1e-2": {"method": "blocksparse", "tolerance": 1e-2},
    "lowrank 4e-2": {"method": "lowrank", "tolerance": 4e-2},
    "lowrank 2e-2": {"method": "lowrank", "tolerance": 2e-2},
    "lowrank 1e-2": {"method": "lowrank", "tolerance": 1e-2},
}
SHAPES = ((2, 21, 64, 64), (4, 21, 256, 256), (16, 21, 512, 512))
_EXPONENTIALS = 16  # a clock and multiprocessor


def milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=200, return_mode="median"))


def clock() -> float:
    """Highest clock of the multiprocessors, in Hz; the driver tells it."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def limits() -> dict[str, float]:
    """Exponentials, multiply-adds in half precision, and bytes of a copy, a second."""
    device = torch.cuda.get_device_properties(0)
    cycles = device.multi_processor_count * clock()
    source = torch.rand(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    products = 2048 if device.major >= 9 else 1024
    return {"exponentials": _EXPONENTIALS * cycles, "products": products * cycles, "copy": copy}


def options(side: int) -> dict[str, Any]:
    return {"sigma_rgb": 15 / 255, "sigma_xy": 50 * side / 256}


def case(name: str, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Probabilities and an image, on the CPU."""
    torch.manual_seed(0)
    return torch.softmax(2 * torch.randn(1, classes, side, side), 1), photo(name, side)


def error_of(filtered: Tensor, values: Tensor, image: Tensor, side: int) -> float:
    """Relative error at 512 random pixels against float64."""
    features = guide_features(image.cuda().double(), **options(side))[0].t()
    pixels = torch.randperm(side**2)[:512].cuda()
    weights = torch.exp(-(features[pixels, None] - features).square().sum(2) / 2)
    exact = weights @ values.cuda()[0].flatten(1).t().double()
    error = filtered[0].flatten(1).t()[pixels] - exact
    return (error.norm() / exact.norm()).item()


def kept_share(image: Tensor, side: int, method: str, tolerance: float) -> float:
    """Share of the pixel pairs that the kernels visit."""
    from segloss.bilateral import kernels

    if method == "exact":
        return 1.0
    features = guide_features(image.cuda(), **options(side))
    tiles = kernels._cut_tiles(features, tolerance, kernels._config(kernels._FILTER, features).tile)
    counts = sum(int(counts.sum()) for _, _, counts in kernels._lists(tiles, tolerance))
    return counts / tiles.low.shape[2] ** 2


def filtering(names: tuple[str, ...], most: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for side in SIDES:
        for classes in (21, 1, 81) if side == SIDES[0] else (21,):
            for name in names if classes == 21 else names[:1]:
                values, image = case(name, side, classes)
                for label, choice in METHODS.items():
                    try:
                        rows.append(filtering_row(label, choice, name, values, image, most))
                    except ToleranceError as problem:
                        print(f"{label} {name} {side}: left out, {problem}", flush=True)
                    else:
                        print(line(rows[-1]), flush=True)
    return rows


def filtering_row(
    label: str, choice: dict[str, Any], name: str, values: Tensor, image: Tensor, most: dict[str, float]
) -> dict[str, Any]:
    classes, side = values.shape[1], values.shape[2]
    on_gpu, guide = values.cuda(), image.cuda()

    def run() -> Tensor:
        return segloss.bilateral_filter(on_gpu, guide, **choice, **options(side))

    error = error_of(run(), values, image, side)
    # The low-rank method measures its error on other pixels.
    bound = 5e-4 if label == "exact" else 1.3 * choice["tolerance"]
    if not error <= bound:
        raise SystemExit(f"bilateral_filter {label} {name} {side}: error {error:.1e} above {bound:g}, nothing is timed")
    time = milliseconds(run)
    row = {"group": f"bilateral_filter K={classes} {side}x{side} {name}", "method": label, "milliseconds": time}
    row["error"] = error
    if choice["method"] != "lowrank":
        share = kept_share(image, side, choice["method"], choice.get("tolerance", 0.0))
        pairs = share * side**4
        # 16 columns for the distances; values in two limbs, padded to a power of two.
        columns = 16 + 2 * max(16, 1 << (classes - 1).bit_length())
        row["share of pairs"] = share
        row["of exponential limit"] = 1e3 * pairs / most["exponentials"] / time
        row["of product limit"] = 1e3 * pairs * columns / most["products"] / time
    return row


def crf(most: dict[str, float]) -> list[dict[str, Any]]:
    """Forward, and forward with backward, to the logits and to the image as well."""
    rows = []
    for side in SIDES:
        values, image = case(PHOTOS[0], side, 21)
        for label, choice in METHODS.items():
            if label == "lowrank 4e-2":
                continue
            logits, guide = values.log().cuda().requires_grad_(), image.cuda()

            def forward(guide: Tensor = guide, logits: Tensor = logits, choice: dict[str, Any] = choice) -> Tensor:
                return segloss.potts_crf(logits, guide, **choice, **options(side))  # noqa: B023

            moving = image.cuda().requires_grad_()
            calls: dict[str, Callable[[], object]] = {
                "forward": forward,
                "forward and backward": lambda: torch.autograd.grad(forward(), logits),  # noqa: B023
                "with the image": lambda: torch.autograd.grad(forward(moving), (logits, moving)),  # noqa: B023
            }
            for what, call in calls.items():
                if "lowrank" in label and what == "with the image":
                    continue
                time = milliseconds(call)
                rows.append({"group": f"potts_crf K=21 {side}x{side} {what}", "method": label, "milliseconds": time})
                print(line(rows[-1]), flush=True)
    return rows


def size_kl(most: dict[str, float]) -> list[dict[str, Any]]:
    """Forward and backward; the floor reads the logits twice and writes the gradient."""
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            logits = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            sizes = torch.rand(shape[:2], device="cuda").softmax(1)
            exact = logits.detach().double().requires_grad_()
            expected = torch.autograd.grad(log_space_size_kl(exact, sizes.double()), exact)[0]
            del exact
            for label, loss in (("naive autograd", naive_size_kl), ("segloss.size_kl", segloss.size_kl)):

                def run(loss: Callable[..., Tensor] = loss) -> Tensor:
                    return torch.autograd.grad(loss(logits, sizes), logits)[0]  # noqa: B023

                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                error = ((run() - expected).norm() / expected.norm()).item()
                megabytes = (torch.cuda.max_memory_allocated() - before) / 2**20
                if label == "segloss.size_kl" and not error <= (1e-4 if dtype == torch.float32 else 1e-2):
                    raise SystemExit(f"size_kl {shape} {dtype}: error {error:.1e}, nothing is timed")
                time = milliseconds(run)
                size = "x".join(map(str, shape))
                row = {"group": f"size_kl {size} {str(dtype).split('.')[1]}", "method": label, "milliseconds": time}
                row |= {"error": error, "megabytes": megabytes}
                row["of copy bandwidth"] = 1e3 * 3 * logits.nbytes / most["copy"] / time
                rows.append(row)
                print(line(row), flush=True)
            del expected
    return rows


def line(row: dict[str, Any]) -> str:
    rest = [f"{key} {value:.2g}" for key, value in row.items() if key not in ("group", "method", "milliseconds")]
    return ", ".join([f"{row['group']}: {row['method']} {row['milliseconds']:.4g} ms", *rest])


def markdown(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    text = [
        "# Benchmarks on a GPU",
        "",
        f"{where['date']}, {where['gpu']}, torch {where['torch']}, Triton {where['triton']}; copies move "
        f"{where['limits']['copy'] / 1e12:.2f} TB/s. Median time; error against float64; shares of the limits.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        here = [row for row in rows if row["group"] == group]
        keys = list(dict.fromkeys(key for row in here for key in row if key not in ("group", "method", "milliseconds")))
        text += ["", f"## {group}", "", "| " + " | ".join(["method", "time", *keys]) + " |"]
        text.append("|---" * (2 + len(keys)) + "|")
        for row in here:
            cells = [f"{row[key]:.2g}" if key in row else "-" for key in keys]
            text.append("| " + " | ".join([row["method"], f"{row['milliseconds']:.4g} ms", *cells]) + " |")
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one photograph in place of four")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for gpu.json and gpu.md")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu: expected a CUDA device, found none\n")
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.exit(2, f"--out: expected a folder that can be written, got {chosen.out} ({error.strerror})\n")
    import triton

    most = limits()
    where = environment() | {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "limits": most}
    rows = [*filtering(PHOTOS[:1] if chosen.quick else PHOTOS, most), *crf(most), *size_kl(most)]
    (chosen.out / "gpu.json").write_text(json.dumps({"environment": where, "results": rows}, indent=1) + "\n")
    table = markdown(rows, where)
    (chosen.out / "gpu.md").write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
