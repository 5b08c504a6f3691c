"""The Triton kernels: interpreted and compiled without a GPU, each in a process of its own, and run where there is one.

Triton decides when it is imported whether its kernels are interpreted, so the two cannot share a process.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import segloss
from segloss.bilateral.reference import gaussian_filter_reference

HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")


def run(name: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "pytest", str(HERE / name), "-q", "-x", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)


@needs_triton
@pytest.mark.slow
def test_kernels_compute_what_they_should_in_the_interpreter() -> None:
    done = run("interpreted_kernels.py", "-m", "not slow", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.slow
def test_kernels_compute_what_they_should_in_more_cases() -> None:
    done = run("interpreted_kernels.py", "-m", "slow", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    done = run("compiled_kernels.py", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_imports_triton_before_it_is_needed() -> None:
    code = "import sys, segloss; assert not any(name.startswith('triton') for name in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def scene(side: int, classes: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Values, and smooth colours with some noise, on the CPU in float64."""
    rows = torch.linspace(0, 3, side, dtype=torch.float64)
    smooth = torch.stack([rows[:, None].sin() * rows.cos(), (rows[:, None] * rows).cos(), rows[:, None] / 3 + 0 * rows])
    image = (smooth.abs() + 0.03 * torch.randn(batch, 3, side, side, dtype=torch.float64)).clamp(0, 1)
    return torch.softmax(2 * torch.randn(batch, classes, side, side, dtype=torch.float64), 1), image


OPTIONS = {"sigma_rgb": 15 / 255, "sigma_xy": 12.0}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "batch"), [(1, 1), (21, 3), (81, 1)])
@pytest.mark.parametrize("method", ["exact", "blocksparse"])
def test_filter_on_the_gpu(method: str, classes: int, batch: int, dtype: torch.dtype) -> None:
    values, image = (t.to(dtype) for t in scene(60, classes, batch))
    exact = segloss.bilateral_filter(values.double(), image.double(), method="exact", **OPTIONS)
    filtered = segloss.bilateral_filter(
        values.cuda(), image.cuda(), method=method, tolerance=1e-3, backend="triton", **OPTIONS
    )
    assert filtered.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert filtered.is_cuda
    limit = 1e-3 if method == "blocksparse" else 1e-4 if dtype != torch.float64 else 1e-12
    assert (filtered.cpu() - exact).norm() <= limit * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_on_the_gpu_at_extreme_sigmas(dtype: torch.dtype) -> None:
    values, image = (t.to(dtype) for t in scene(40, 3))
    image = (4 * image).round() / 4
    for sigma_rgb, sigma_xy in ((1e-4, 5.0), (1e-30, 5.0), (0.1, 1e-3), (1e10, 1e10), (0.01, float("inf"))):
        sigmas = {"sigma_rgb": sigma_rgb, "sigma_xy": sigma_xy, "method": "exact"}
        exact = segloss.bilateral_filter(values.double(), image.double(), **sigmas)
        filtered = segloss.bilateral_filter(values.cuda(), image.cuda(), backend="triton", **sigmas)
        assert (filtered.cpu() - exact).norm() <= (5e-4 if dtype == torch.float32 else 1e-12) * exact.norm(), sigmas


@pytest.mark.gpu
def test_large_images_on_the_gpu() -> None:
    values, image = (t.cuda() for t in scene(301, 21))
    options = {"sigma_rgb": 15 / 255, "sigma_xy": 50.0, "backend": "triton"}
    exact = segloss.bilateral_filter(values, image, method="exact", **options)
    for method, tolerance, limit in (("exact", 1e-2, 1e-4), ("blocksparse", 1e-2, 1e-2), ("blocksparse", 1e-4, 2e-4)):
        choice = {"method": method, "tolerance": tolerance}
        filtered = segloss.bilateral_filter(values.float(), image.float(), **choice, **options)
        assert (filtered - exact).norm() <= limit * exact.norm(), choice


@pytest.mark.gpu
def test_nan_stays_in_its_image_on_the_gpu() -> None:
    values, image = (t.float().cuda() for t in scene(60, 3, 2))
    good = segloss.bilateral_filter(values, image, backend="triton", **OPTIONS)
    for poisoned in (values, image):
        poisoned[0, 0, 5, 7] = torch.nan
        filtered = segloss.bilateral_filter(values, image, backend="triton", **OPTIONS)
        assert torch.equal(filtered[1], good[1])


def check_low_rank(device: str, tolerance: float, precision: str, dtype: torch.dtype) -> None:
    """The error, what is told of it, and the symmetry that makes its gradient."""
    values, image = scene(84, 5, 2)
    options = {"sigma_rgb": 0.2, "sigma_xy": 20.0}
    exact = segloss.bilateral_filter(values, image, method="exact", **options)
    on_device, guide = values.to(device, dtype).requires_grad_(), image.to(device, dtype)
    filtered = segloss.bilateral_filter(
        on_device, guide, method="lowrank", tolerance=tolerance, precision=precision, **options
    )
    assert filtered.dtype == dtype
    errors = (filtered.detach().cpu() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert (errors <= tolerance).all()
    told = segloss.bilateral_error(on_device, guide, filtered, **options).cpu()
    torch.testing.assert_close(told.double(), errors, rtol=0.5, atol=1e-6)
    direction = torch.rand_like(on_device)
    gradient = torch.autograd.grad(filtered, on_device, direction)[0]
    wanted = segloss.bilateral_filter(direction.double().cpu(), image, method="exact", **options)
    assert (gradient.cpu() - wanted).norm() <= 2 * tolerance * wanted.norm()


LOW_RANK = pytest.mark.parametrize(
    ("tolerance", "precision", "dtype"),
    [
        (4e-2, "auto", torch.float32),
        (1e-2, "auto", torch.float32),
        (1e-2, "float32", torch.float32),
        (1e-3, "auto", torch.float64),
    ],
)


@LOW_RANK
def test_low_rank(tolerance: float, precision: str, dtype: torch.dtype) -> None:
    check_low_rank("cpu", tolerance, precision, dtype)


@pytest.mark.gpu
@LOW_RANK
def test_low_rank_on_the_gpu(tolerance: float, precision: str, dtype: torch.dtype) -> None:
    check_low_rank("cuda", tolerance, precision, dtype)


@pytest.mark.gpu
def test_low_rank_on_the_gpu_says_no_where_the_cpu_does() -> None:
    values, image = torch.rand(1, 2, 84, 84), torch.rand(1, 3, 84, 84)
    for device in ("cpu", "cuda"):
        with pytest.raises(segloss.ToleranceError):
            segloss.bilateral_filter(values.to(device), image.to(device), method="lowrank", tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["exact", "blocksparse", "lowrank"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_results_on_the_gpu_do_not_depend_on_tf32(backend: str, method: str) -> None:
    values, image = (t.float().cuda() for t in scene(84, 5))
    options = {"sigma_rgb": 0.2, "sigma_xy": 20.0, "method": method, "backend": backend, "precision": "float32"}
    expected = segloss.bilateral_filter(values, image, **options)
    torch.set_float32_matmul_precision("high")
    try:
        filtered = segloss.bilateral_filter(values, image, **options)
        # Landmarks come from sums in any order; distances in TF32 would be off by far more.
        assert (filtered - expected).norm() <= 1e-3 * expected.norm()
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["exact", "blocksparse"])
def test_crf_gradients_on_the_gpu(method: str) -> None:
    values, image = scene(48, 5, 2)
    logits = values.log()
    valid = torch.rand(2, 48, 48) < 0.8

    def gradients(device: str, dtype: torch.dtype, **choice: object) -> tuple[Tensor, ...]:
        inputs = [t.to(device, dtype).requires_grad_() for t in (logits, image, torch.tensor(0.1), torch.tensor(9.0))]
        loss = segloss.potts_crf(
            *inputs[:2], sigma_rgb=inputs[2], sigma_xy=inputs[3], valid=valid.to(device), tolerance=1e-4, **choice
        )
        return loss, *torch.autograd.grad(loss, inputs)

    expected = gradients("cpu", torch.float64, method="exact")
    for dtype, limit in ((torch.float32, 3e-3), (torch.float64, 1e-3 if method == "blocksparse" else 1e-10)):
        for value, exact in zip(gradients("cuda", dtype, method=method, backend="triton"), expected, strict=True):
            assert (value.cpu() - exact).norm() <= limit * exact.norm()


@pytest.mark.gpu
def test_filter_on_the_gpu_equals_itself_in_every_run_and_layout() -> None:
    values, image = (t.float().cuda() for t in scene(100, 21, 2))
    first = segloss.bilateral_filter(values, image, backend="triton", **OPTIONS)
    last = torch.channels_last
    for _ in range(3):
        assert torch.equal(segloss.bilateral_filter(values, image, backend="triton", **OPTIONS), first)
    moved = segloss.bilateral_filter(
        values.to(memory_format=last), image.to(memory_format=last), backend="triton", **OPTIONS
    )
    assert torch.equal(moved, first)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    values, image = (t.float().cuda().requires_grad_() for t in scene(100, 21, 2))
    for method in ("exact", "blocksparse"):
        segloss.bilateral_filter(values, image, method=method, backend="triton", **OPTIONS).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            segloss.bilateral_filter(values, image, method=method, backend="triton", **OPTIONS).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert values.grad is not None
        assert values.grad.isfinite().all()


@pytest.mark.gpu
def test_compiles_on_the_gpu() -> None:
    values, image = (t.float().cuda() for t in scene(64, 4))

    def loss(values: Tensor, image: Tensor) -> Tensor:
        return segloss.bilateral_filter(values, image, backend="triton", **OPTIONS).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, image), loss(values, image))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_gpu() -> None:
    values, image = (t.float() for t in scene(64, 4))
    expected = segloss.bilateral_filter(values.to("cuda:0"), image.to("cuda:0"), backend="triton", **OPTIONS)
    other = segloss.bilateral_filter(values.to("cuda:1"), image.to("cuda:1"), backend="triton", **OPTIONS)
    assert other.device == torch.device("cuda:1")
    assert torch.equal(other.cpu(), expected.cpu())
    sizes = torch.full((1, 4), 0.25)
    losses = [segloss.size_kl(values.to(device), sizes.to(device)).cpu() for device in ("cuda:0", "cuda:1")]
    assert torch.equal(*losses)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 21, 150, 300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_size_kl_on_the_gpu(layout: torch.memory_format, masked: bool, classes: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(2, classes, 67, 45)).to(dtype)
    sizes = torch.rand(2, classes, dtype=torch.float64).softmax(1)
    valid = torch.rand(2, 67, 45) < 0.7 if masked else None

    def gradient(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        mask = None if valid is None else valid.to(logits.device)
        loss = segloss.size_kl(logits, sizes.to(logits.device, logits.dtype).float(), valid=mask)
        return loss, torch.autograd.grad(loss, logits)[0]

    loss, grad = gradient(logits.cuda().to(memory_format=layout))
    expected, exact = gradient(logits.double())
    assert grad.dtype == dtype
    limit = max(1e-5, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=limit, atol=limit)
    torch.testing.assert_close(grad.double().cpu(), exact, rtol=limit, atol=limit * exact.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("gap", [59.0, 200.0, 1e4, 1e29])
def test_vanished_classes_on_the_gpu(gap: float) -> None:
    logits = torch.randn(2, 3, 64, 64)
    logits[0, 1] -= gap
    sizes = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_()
        loss = segloss.size_kl(x, sizes.to(device))
        results.append((loss.detach().cpu(), torch.autograd.grad(loss, x)[0].cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-8)


@pytest.mark.gpu
def test_reference_on_the_gpu_needs_no_kernels() -> None:
    values, features = torch.rand(1, 2, 30, device="cuda"), torch.rand(1, 5, 30, device="cuda")
    expected = gaussian_filter_reference(values.cpu(), features.cpu())
    torch.testing.assert_close(gaussian_filter_reference(values, features).cpu(), expected)
