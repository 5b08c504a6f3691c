"""The Triton kernels compile for the GPUs of the configuration tables without one; ``test_kernels.py`` runs this file.

The launches are recorded from real calls on CPU tensors: arguments are specialised as Triton's launcher does it.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from segloss import _average_kernels
from segloss.bilateral import kernel_tiles, kernels

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
SETTINGS = ("num_warps", "num_stages")
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Recorder:
    """Stands for a kernel that is launched, and keeps the arguments."""

    def __init__(self, function: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.function, self.launches = function, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.launches.append((self.function, dict(zip(self.function.arg_names, arguments, strict=False)) | named))

        return launch


def record(call: Callable[[], object]) -> list[tuple[Any, dict[str, Any]]]:
    launches: list[tuple[Any, dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (_average_kernels, kernel_tiles, kernels):
            for name, function in list(vars(module).items()):
                if isinstance(function, triton.runtime.JITFunction):
                    patch.setattr(module, name, Recorder(function, launches))
        call()
    return launches


def resources(function: Any, arguments: dict[str, Any], capability: int, folder: Path) -> dict[str, int]:
    """Compiles a launch, and reads what the machine code needs."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (name, parameter) in enumerate(zip(function.arg_names, function.params, strict=True)):
        value = arguments[name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if special and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: arguments[name] for name in SETTINGS if name in arguments} | {"enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = folder / "kernel.cubin"
    code.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([TOOL, "-res-usage", code], capture_output=True, text=True, check=True)
    usage = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout + report.stderr)}
    return usage | {"SHARED": compiled.metadata.shared}


def check(launches: list[tuple[Any, dict[str, Any]]], capability: int, folder: Path) -> None:
    assert launches
    for function, arguments in launches:
        usage = resources(function, arguments, capability, folder)
        where = (function.__name__, usage)
        # The assembler itself gives up a word or two for one more block on a multiprocessor.
        assert usage["STACK"] <= 16, where
        assert usage["LOCAL"] == 0, where
        assert usage["SHARED"] <= 99 * 1024, where


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [1, 21, 81])  # tiles of 16, 32 and 64 channels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bilateral_kernels(
    dtype: torch.dtype, channels: int, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "_capability", lambda device: capability)
    values, features = torch.rand(2, channels, 4096, dtype=dtype), torch.rand(2, 5, 4096, dtype=dtype)
    check(record(lambda: kernels.gaussian_filter(values, features, 1e-2)), capability, tmp_path)
    check(record(lambda: kernels.guide_gradient(values, values, features, 0.0)), capability, tmp_path)


def builds(call: Callable[[], object]) -> set[tuple[Any, ...]]:
    """What tells the builds of a call's kernels apart, by the code that the launcher uses."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = set()
    for function, arguments in record(call):
        bind = create_function_from_signature(function.signature, function.params, backend)
        _, specialization, options = bind(**arguments)
        found.add((function.__name__, str(specialization), str(sorted(options.items()))))
    return found


@pytest.mark.parametrize("channels", [1, 21])
def test_one_build_serves_images_of_all_sizes(channels: int) -> None:
    def run(batch: int, pixels: int, tolerance: float) -> set[tuple[Any, ...]]:
        # Views that start anywhere.
        values = torch.rand(batch * channels * pixels + 1)[1:].view(batch, channels, pixels)
        features = torch.rand(batch * 5 * pixels + 1)[1:].view(batch, 5, pixels)

        def call() -> None:
            kernels.gaussian_filter(values, features, tolerance)
            kernels.guide_gradient(values, values, features, tolerance)

        return builds(call)

    usual = run(2, 4096, 1e-2)
    for batch, pixels in ((1, 1), (1, 4097), (3, 5000), (16, 160)):
        assert run(batch, pixels, 1e-3) == usual
        assert run(batch, pixels, 0.0) < usual


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("classes", [2, 21, 150, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_average_kernels(dtype: torch.dtype, classes: int, capability: int, tmp_path: Path) -> None:
    logits = torch.rand(2, classes, 4096).to(dtype)
    grad = torch.rand(2, classes, dtype=torch.promote_types(dtype, torch.float32))
    for x in (logits, logits.transpose(1, 2).contiguous().transpose(1, 2)):
        saved: list[Tensor] = []
        valid = torch.rand(2, 4096) < 0.5 if classes == 21 else None
        launches = record(lambda: saved.extend(_average_kernels.log_sum(x, valid)))  # noqa: B023
        launches += record(lambda: _average_kernels.log_sum_backward(grad, x, *saved))  # noqa: B023
        check(launches, capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
def test_average_kernels_of_a_large_image(capability: int, tmp_path: Path) -> None:
    check(record(lambda: _average_kernels.log_sum(torch.empty(1, 21, 512 * 512), None)), capability, tmp_path)
