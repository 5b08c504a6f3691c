"""The GPU benchmark's checks of the kernels, in Triton's interpreter; ``test_gpu_benchmark.py`` runs this file."""

from pathlib import Path

import pytest

from benchmarks import gpu, kernel_checks
from benchmarks.gpu_report import Report
from segloss.bilateral import kernel_tiles

WHERE = {"date": "today", "gpu": "none", "torch": "2", "triton": "3", "limits": {}}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")


def test_every_kernel_is_checked_and_right(tmp_path: Path) -> None:
    report = Report(tmp_path, WHERE)
    gpu.check_kernels(report)
    assert report.failed() == 0, [row for row in report.rows if "failed" in row]
    assert len(report.rows) == len(kernel_checks.cases()) + 1
    assert report.rows[-1]["functions"] == len(kernel_checks.functions())


def test_a_kernel_that_no_case_launches_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "LOG_SUMS", kernel_checks.LOG_SUMS[-2:-1])
    monkeypatch.setattr(kernel_checks, "FILTERS", ())
    report = Report(tmp_path, WHERE)
    gpu.check_kernels(report)
    assert report.failed() == 1
    named = report.rows[-1]["failed"]
    assert "segloss.bilateral.kernels._guide_full" in named
    assert "_average_kernels" not in named


def test_a_wrong_kernel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_checks.gaussian_filter_reference
    monkeypatch.setattr(kernel_checks, "gaussian_filter_reference", lambda *inputs: 1.001 * right(*inputs))
    report = Report(tmp_path, WHERE)
    case = kernel_checks.Filter(1, 2, 3, 70)
    report.add("kernels", "filter", lambda row: gpu.kernel_case(row, lambda at: kernel_checks.check_filter(case, at)))
    assert report.rows[0]["failed"].startswith("ArithmeticError: error 1.0e-03 above")


def test_block_sparse_cases_leave_pairs_out() -> None:
    cases = [case for case in kernel_checks.FILTERS if case.tolerance]
    assert cases
    for case in cases:
        features = kernel_checks.filter_inputs(case)[2]
        tiles = kernel_tiles.cut(features, case.tolerance, 64)
        met = sum(int(counts.sum()) for _, _, counts in kernel_tiles.lists(tiles, case.tolerance))
        assert met < case.batch * tiles.number**2, case
