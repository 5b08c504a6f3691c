"""The CUDA half, checked against float64 and timed: under ten minutes on an H200, the quick part under six.

First every Triton kernel is checked; with ``--quick`` only what has a target is measured then, and a training step of
an example's network under bfloat16 autocast. Times are medians of ``triton.testing.do_bench``. ``bilateral_filter`` and
``potts_crf`` run on bundled photographs with sigma 15/255 and 50 pixels at 256 pixels a side, in proportion at other
sizes. Limits come from the device: exponentials at 16 a clock and multiprocessor, half-precision products at 1,024
(from compute capability 9 on 2,048) multiplications, memory from a measured copy. Attribution and refinement are timed
beside the procedures that they replace, on a network of ten convolutions, on FickleNet's features of 321 pixels, on a
walk over maps of images of 512 pixels, and on a photograph of VOC's size. A case that fails or misses its bound is
marked as such and not timed, the others go on, and the exit status is 1; a missed target is told, and no failure. What
is measured is written after every case.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import segloss
from benchmarks.__main__ import environment
from benchmarks.baselines import (
    dense_mean_field,
    expanded_ficklenet,
    log_space_size_kl,
    naive_size_kl,
    plain_advcam,
    released_advcam,
    sequential_grad_cam,
    squared_walk,
)
from benchmarks.gpu_report import Report, Row, Target
from benchmarks.kernel_checks import Errors, cases, functions, relative, unreached, watched
from benchmarks.photos import SIGMA_RGB, TUNED, photo, probabilities, sigma_xy, truth
from benchmarks.test_refine import PRESETS, problem, settings
from segattr.advcam import advcam
from segattr.cam import cam
from segattr.ficklenet import StochasticConv2d, ficklenet
from segattr.gradients import grad_cam
from segattr.networks.classifier import Classifier
from segattr.refine import dense_crf, random_walk
from segloss.bilateral import guide_features

HERE = Path(__file__).parent
QUICK_SECONDS = 330.0  # six minutes less the imports and the case that is running when they are over
DEVICE = "cuda"
SIDES = (256, 384, 512)
METHODS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "blocksparse 1e-2": {"method": "blocksparse", "tolerance": 1e-2},
    "lowrank 4e-2": {"method": "lowrank", "tolerance": 4e-2},
    "lowrank 2e-2": {"method": "lowrank", "tolerance": 2e-2},
    "lowrank 1e-2": {"method": "lowrank", "tolerance": 1e-2},
    "lowrank 1e-2 float32": {"method": "lowrank", "tolerance": 1e-2, "precision": "float32"},
}
SHAPES = ((2, 21, 64, 64), (4, 21, 256, 256), (16, 21, 512, 512))
WIDTHS = (64, 128, 256, 512, 512)  # of pairs of convolutions, each before a halving of the resolution
CAM_SIDE, ADVCAM_SIDE, ADVCAM_STEPS, FICKLENET_SIDE, WALK_SIDE = 224, 112, 27, 41, 128
CRF_SIZES = ((94, 125), (375, 500))  # to check, and to time
CLASSES = 20
_EXPONENTIALS = 16  # a clock and multiprocessor


def milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=200, return_mode="median"))


def extra_megabytes(call: Callable[[], object]) -> float:
    """Peak memory of a call beyond what was in use."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def limits() -> dict[str, float]:
    """Exponentials, multiply-adds in half precision, and bytes of a copy, a second."""
    from triton.runtime import driver

    device = torch.cuda.get_device_properties(0)
    kilohertz = driver.active.utils.get_device_properties(0)["sm_clock_rate"]
    cycles = device.multi_processor_count * 1e3 * kilohertz
    source = torch.rand(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    products = 2048 if device.major >= 9 else 1024
    return {"exponentials": _EXPONENTIALS * cycles, "products": products * cycles, "copy": copy}


def options(side: int) -> dict[str, Any]:
    return {"sigma_rgb": SIGMA_RGB, "sigma_xy": sigma_xy(side)}


def require(error: float, bound: float) -> None:
    if not error <= bound:
        raise ArithmeticError(f"error {error:.1e} above {bound:g}")


def kept_share(image: Tensor, side: int, method: str, tolerance: float) -> float:
    """Share of the pixel pairs that the kernels visit."""
    from segloss.bilateral import kernel_tiles, kernels

    if method == "exact":
        return 1.0
    features = guide_features(image, **options(side))
    tiles = kernel_tiles.cut(features, tolerance, kernels._config(kernels._FILTER, features).tile)
    counts = sum(int(counts.sum()) for _, _, counts in kernel_tiles.lists(tiles, tolerance))
    return counts / tiles.number**2


def filter_group(classes: int, side: int, name: str) -> str:
    return f"bilateral_filter K={classes} {side}x{side} {name}"


def filtering(
    report: Report, name: str, side: int, classes: int, most: dict[str, float], methods: Iterable[str] = METHODS
) -> None:
    values, image = probabilities(classes, side).to(DEVICE), photo(name, side).to(DEVICE)
    pixels = torch.randperm(side**2, generator=torch.Generator().manual_seed(1))[:256].to(DEVICE)
    exact = truth(image, values, pixels)[0]
    for method in methods:
        measure = partial(
            filter_case, choice=METHODS[method], values=values, image=image, most=most, pixels=pixels, exact=exact
        )
        report.add(filter_group(classes, side, name), method, measure)


def filter_case(
    row: Row,
    choice: dict[str, Any],
    values: Tensor,
    image: Tensor,
    most: dict[str, float],
    pixels: Tensor,
    exact: Tensor,
) -> None:
    classes, side = values.shape[1:3]

    def run() -> Tensor:
        return segloss.bilateral_filter(values, image, **choice, **options(side))

    row["error"] = relative(run()[0].flatten(1).t()[pixels], exact)
    # The low-rank method measures its error on other pixels.
    require(row["error"], 5e-4 if choice["method"] == "exact" else 1.3 * choice["tolerance"])
    row["milliseconds"] = milliseconds(run)
    if choice["method"] == "lowrank":
        return
    row["share of pairs"] = kept_share(image, side, choice["method"], choice.get("tolerance", 0.0))
    pairs = row["share of pairs"] * side**4
    # 16 columns for the distances; values in two limbs, padded to a power of two.
    columns = 16 + 2 * max(16, 1 << (classes - 1).bit_length())
    row["of exponential limit"] = 1e3 * pairs / most["exponentials"] / row["milliseconds"]
    row["of product limit"] = 1e3 * pairs * columns / most["products"] / row["milliseconds"]


def crf(report: Report, side: int) -> None:
    """Forward, and forward with backward, to the logits and to the image as well."""
    logits, image = probabilities(21, side).log().to(DEVICE), photo(TUNED[0], side).to(DEVICE)
    exact = None
    if side == SIDES[0]:  # in float64 larger ones take long
        exact = crf_gradients(logits.double(), image.double(), True, {"method": "exact"})
    for label, choice in METHODS.items():
        for what in ("forward", "forward and backward", "with the image"):
            measure = partial(crf_case, choice=choice, what=what, logits=logits, image=image, exact=exact)
            report.add(f"potts_crf K=21 {side}x{side} {what}", label, measure)


def crf_case(
    row: Row, choice: dict[str, Any], what: str, logits: Tensor, image: Tensor, exact: list[Tensor] | None
) -> None:
    def run() -> list[Tensor]:
        if what == "forward":
            return [segloss.potts_crf(logits, image, **choice, **options(image.shape[2]))]
        return crf_gradients(logits, image, what == "with the image", choice)

    results = run()
    if exact is not None:
        row["error"] = max(relative(result, right) for result, right in zip(results, exact, strict=False))
        require(row["error"], 3e-3 if choice["method"] == "exact" else 10 * choice["tolerance"])
    row["milliseconds"] = milliseconds(run)


def crf_gradients(logits: Tensor, image: Tensor, with_image: bool, choice: dict[str, Any]) -> list[Tensor]:
    """The loss and its gradients."""
    logits, image = logits.detach().requires_grad_(), image.detach().requires_grad_(with_image)
    loss = segloss.potts_crf(logits, image, **choice, **options(image.shape[2]))
    return [loss.detach(), *torch.autograd.grad(loss, (logits, image) if with_image else (logits,))]


def size_group(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"size_kl {'x'.join(map(str, shape))} {str(dtype).split('.')[1]}"


def size_kl(report: Report, shape: tuple[int, ...], dtype: torch.dtype, most: dict[str, float]) -> None:
    """Forward and backward; the floor reads the logits twice and writes the gradient."""
    torch.manual_seed(0)
    logits = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    sizes = torch.rand(shape[:2], device=DEVICE).softmax(1)
    double = logits.detach().double().requires_grad_()
    exact = torch.autograd.grad(log_space_size_kl(double, sizes.double()), double)[0]
    for label, loss in (("naive autograd", naive_size_kl), ("segloss.size_kl", segloss.size_kl)):
        measure = partial(size_kl_case, loss=loss, logits=logits, sizes=sizes, exact=exact, most=most)
        report.add(size_group(shape, dtype), label, measure)


def size_kl_case(
    row: Row, loss: Callable[..., Tensor], logits: Tensor, sizes: Tensor, exact: Tensor, most: dict[str, float]
) -> None:
    def run() -> Tensor:
        return torch.autograd.grad(loss(logits, sizes), logits)[0]

    row["error"] = relative(run(), exact)
    if loss is segloss.size_kl:
        require(row["error"], 1e-4 if logits.dtype == torch.float32 else 1e-2)
    row["megabytes"] = extra_megabytes(run)
    row["milliseconds"] = milliseconds(run)
    row["of copy bandwidth"] = 1e3 * 3 * logits.nbytes / most["copy"] / row["milliseconds"]


def classifier(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """Ten convolutions with random weights, and the head."""
    torch.manual_seed(0)
    layers, channels = list[nn.Module](), 3
    for width in WIDTHS:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    return nn.Sequential(*layers).eval().to(DEVICE, dtype), head.eval().to(DEVICE, dtype)


def compare(
    report: Report,
    group: str,
    methods: dict[str, Callable[[], Tensor]],
    exact: Tensor,
    bound: float,
    checks: dict[str, Callable[[], Tensor]] | None = None,
) -> None:
    """A row for each method, of whose result, or that of its check, the error is below the bound."""

    def measure(row: Row, method: str) -> None:
        result = (checks or methods)[method]()
        if result.is_floating_point():
            row["error"] = relative(result, exact)
        else:
            row["error"] = (result != exact).double().mean().item()  # of labels
        require(row["error"], bound)
        row["megabytes"] = extra_megabytes(methods[method])
        row["milliseconds"] = milliseconds(methods[method])

    for method in methods:
        report.add(group, method, partial(measure, method=method))


def cams(report: Report) -> None:
    """Convolutions in the precision that torch is set to, TensorFloat-32 by default."""
    features, head = classifier()
    images = torch.randn(8, 3, CAM_SIDE, CAM_SIDE, device=DEVICE)
    clf, pixels = Classifier(features, head), (CAM_SIDE // 32) ** 2
    methods: dict[str, Callable[[], Any]] = {
        "K forward and backward passes": lambda: sequential_grad_cam(features, head, images, range(CLASSES), True),
        "grad_cam": torch.no_grad()(lambda: grad_cam(clf, images, norm="raw")),
        "cam": torch.no_grad()(lambda: torch.as_tensor(cam(clf, images)) / pixels),
    }
    exact = sequential_grad_cam(*classifier(torch.float64), images.double(), range(CLASSES), False)
    compare(report, f"cam 8x3x{CAM_SIDE}x{CAM_SIDE}, {CLASSES} classes", methods, exact, 1e-2)


def advcams(report: Report) -> None:
    """Checked after 3 steps: images climb apart by rounding."""
    features, head = classifier()
    linear, classes = head[2], range(8)
    assert isinstance(linear, nn.Linear)
    image = torch.randn(1, 3, ADVCAM_SIDE, ADVCAM_SIDE, device=DEVICE)
    clf = Classifier(features, head)
    wide, wide_head = classifier(torch.float64)
    assert isinstance(wide_head[2], nn.Linear)
    group = f"advcam {ADVCAM_SIDE}x{ADVCAM_SIDE}, 8 classes, {ADVCAM_STEPS} steps"

    def ours(steps: int, reference: bool) -> Callable[[], Tensor]:
        penalty = 7.0 if reference else 3.0
        return lambda: advcam(clf, image, classes, steps=steps, penalty=penalty, reference=reference)[0]

    def theirs(baseline: Callable[..., Tensor], steps: int) -> Callable[[], Tensor]:
        return lambda: baseline(features, linear, image, classes, steps)

    for baseline, names in (
        (released_advcam, ("released procedure", "advcam reference=True")),
        (plain_advcam, ("one class at a time", "advcam")),
    ):
        reference = baseline is released_advcam
        methods, checks = (
            dict(zip(names, (theirs(baseline, steps), ours(steps, reference)), strict=True))
            for steps in (ADVCAM_STEPS, 3)
        )
        exact = baseline(wide, wide_head[2], image.double(), classes, 3)
        compare(report, group, methods, exact, 5e-2, checks)


def ficklenets(report: Report) -> None:
    torch.manual_seed(0)
    layer = StochasticConv2d(512, CLASSES, kernel=9, drop=0.9).to(DEVICE)
    features = torch.rand(1, 512, FICKLENET_SIDE, FICKLENET_SIDE, device=DEVICE)
    tags = (torch.arange(CLASSES, device=DEVICE) < 2).long()[None]

    def generator() -> torch.Generator:
        return torch.Generator(DEVICE).manual_seed(0)

    def expansion(dtype: torch.dtype) -> Tensor:
        random = generator()
        keeps = [layer.draw(features, random) for _ in range(10)]
        return expanded_ficklenet(features.to(dtype), layer.weight.to(dtype), keeps, 0.9, [0, 1], 0.35)

    methods: dict[str, Callable[[], Tensor]] = {
        "map expansion": lambda: expansion(torch.float32),
        "ficklenet": lambda: ficklenet(features, layer, passes=10, tags=tags, generator=generator()),
    }
    group = f"ficklenet 512x{FICKLENET_SIDE}x{FICKLENET_SIDE}, window 9, 2 of {CLASSES} classes, 10 passes"
    compare(report, group, methods, expansion(torch.float64), 1e-2)


def walks(report: Report) -> None:
    torch.manual_seed(0)
    boundary = torch.rand(1, 1, WALK_SIDE, WALK_SIDE, device=DEVICE)
    affinity, maps = segloss.path_affinity(boundary, radius=5), torch.rand(1, 4, WALK_SIDE, WALK_SIDE, device=DEVICE)
    methods = {
        "dense squaring": lambda: squared_walk(maps, affinity, 10.0, 8),
        "random_walk": lambda: random_walk(maps, affinity),
    }
    exact = squared_walk(maps.double(), affinity.double(), 10.0, 8)
    compare(report, f"random_walk {WALK_SIDE}x{WALK_SIDE}, 4 classes, 256 steps", methods, exact, 1e-3)


def inferences(report: Report, preset: str) -> None:
    """Checked at a quarter of the size, sigmas in proportion."""

    def prepared(size: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        values, image = problem(*size)
        return values.to(DEVICE), image.to(DEVICE), settings(preset, size[0])

    def methods(size: tuple[int, int]) -> dict[str, Callable[[], Tensor]]:
        values, image, options = prepared(size)
        refine = partial(dense_crf, values, image, **options)
        return {
            "exact": partial(refine, method="exact"),
            "blocksparse": partial(refine, method="blocksparse"),
        }

    small, large = CRF_SIZES
    values, image, options = prepared(small)
    exact = dense_mean_field(values.double(), image.double(), **options)
    group = f"dense_crf {preset} {large[0]}x{large[1]}, 4 classes, 10 iterations"
    compare(report, group, methods(large), exact, 1e-2, methods(small))


def targets() -> list[Target]:
    small, large = (filter_group(21, side, TUNED[0]) for side in (SIDES[0], SIDES[-1]))
    return [
        Target(small, "exact", "milliseconds", 1.5),
        Target(small, "blocksparse 1e-2", "of exponential limit", 0.6),
        Target(small, "lowrank 1e-2", "milliseconds", 0.2),
        Target(large, "blocksparse 1e-2", "of exponential limit", 0.6),
        Target(large, "blocksparse 1e-2", "milliseconds", 7.0),
        Target(large, "lowrank 1e-2", "milliseconds", 0.6),
        Target(size_group(SHAPES[-1], torch.float32), "segloss.size_kl", "of copy bandwidth", 0.7),
    ]


def check_kernels(report: Report) -> None:
    """Every Triton kernel, forward and backward, and that none of them was forgotten."""
    group = "Triton kernels"
    with watched() as launched:
        for name, check in cases():
            report.add(group, name, partial(kernel_case, check=check))
    report.add(group, "no kernel without a check", partial(coverage, launched=launched))


def kernel_case(row: Row, check: Callable[[str], Errors]) -> None:
    errors = check(DEVICE)
    row |= {key: error for key, (error, _) in errors.items()}
    for error, bound in errors.values():
        require(error, bound)


def coverage(row: Row, launched: set[str]) -> None:
    row["functions"] = len(functions())
    if unreached(launched):
        raise AssertionError(f"not checked: {', '.join(unreached(launched))}")


def mixed_precision(row: Row) -> None:
    """The step of the quickstart with size targets: the loss near that in float32, gradients and weights finite."""
    from parts.network import EncoderDecoder

    torch.manual_seed(0)
    model = EncoderDecoder(5).to(DEVICE)
    images = torch.cat([photo(TUNED[0], side)[:, :, :96, :96] for side in (96, 128, 192, 256)]).to(DEVICE)
    sizes = torch.rand(len(images), 5, device=DEVICE).softmax(1)
    size_loss, crf_loss = segloss.SizeKL(), segloss.PottsCRF(sigma_xy=8.0, scale_factor=0.5, normalize="pixels")

    def step(model: nn.Module, enabled: bool) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=enabled):
            logits = model(images)
            loss = size_loss(logits, sizes) + 0.1 * crf_loss(logits, images)
        loss.backward()
        optimizer.step()
        numbers = [t for p in model.parameters() for t in (p, p.grad)]
        if not all(t is not None and t.isfinite().all() for t in numbers):
            raise ArithmeticError("expected finite gradients and weights")
        return loss.item()

    row["float32"], row["bfloat16"] = step(copy.deepcopy(model), False), step(model, True)
    row["error"] = abs(row["bfloat16"] / row["float32"] - 1)
    require(row["error"], 2e-2)


def measure_table(report: Report, most: dict[str, float]) -> None:
    """The rows with targets, and few others."""
    methods = [method for method in METHODS if method in {target.method for target in targets()}]
    for side in (SIDES[0], SIDES[-1]):
        report.attempt(f"bilateral_filter {side}", partial(filtering, report, TUNED[0], side, 21, most, methods))
    report.attempt("size_kl", partial(size_kl, report, SHAPES[-1], torch.float32, most))


def measure_all(report: Report, names: list[str], most: dict[str, float]) -> None:
    for side in SIDES:
        for name in names:
            report.attempt(f"bilateral_filter {side} {name}", partial(filtering, report, name, side, 21, most))
    for classes in (1, 81):
        report.attempt(f"bilateral_filter K={classes}", partial(filtering, report, names[0], SIDES[0], classes, most))
    for side in SIDES:
        report.attempt(f"potts_crf {side}", partial(crf, report, side))
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            report.attempt(f"size_kl {shape} {dtype}", partial(size_kl, report, shape, dtype, most))


def measure_attribution(report: Report) -> None:
    for name, measure in (("cam", cams), ("advcam", advcams), ("ficklenet", ficklenets), ("random_walk", walks)):
        report.attempt(name, partial(measure, report))
    for preset in PRESETS:
        report.attempt(f"dense_crf {preset}", partial(inferences, report, preset))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the kernels, what has a target, and the step; no more")
    parser.add_argument(
        "--limit",
        type=float,
        help=f"seconds after which no case begins; {QUICK_SECONDS:g} with --quick, otherwise none",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for gpu.json and gpu.md")
    chosen = parser.parse_args()
    limit = chosen.limit if chosen.limit is not None else QUICK_SECONDS if chosen.quick else math.inf
    if not limit > 0:
        parser.exit(2, f"--limit: expected a positive number of seconds, got {limit:g}\n")
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu: expected a CUDA device, found none\n")
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.exit(2, f"--out: expected a folder that can be written, got {chosen.out} ({error.strerror})\n")
    import triton

    most: dict[str, float] = {}
    where = environment() | {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "limits": most}
    report = Report(chosen.out, where, targets(), limit)
    report.attempt("Triton kernels", partial(check_kernels, report))
    report.attempt("limits of the device", lambda: most.update(limits()))
    if chosen.quick:
        measure_table(report, most)
    report.add("EncoderDecoder, SizeKL + PottsCRF", "step under bfloat16 autocast", mixed_precision)
    if not chosen.quick:
        measure_all(report, TUNED, most)
        measure_attribution(report)
    print((chosen.out / "gpu.md").read_text())
    if report.left_out:
        print(f"benchmarks.gpu: left out after {limit:g} s: {'; '.join(report.left_out)}", file=sys.stderr)
    if report.failed():
        print(f"benchmarks.gpu: {report.failed()} of {len(report.rows)} cases failed", file=sys.stderr)
    return int(report.failed() > 0)


if __name__ == "__main__":
    sys.exit(main())
