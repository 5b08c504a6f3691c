"""Products in full precision leave the user's settings alone."""

from threading import Barrier, Thread

import pytest
import torch

from segloss import bilateral_filter
from segloss.common.precision import _FULL, _get, _set, full_precision


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request: pytest.FixtureRequest) -> str:
    before = _get()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    _set(before)


def test_the_setting_comes_back_also_after_an_error(precision: str) -> None:
    state = _get()

    def fail() -> None:
        with full_precision():
            with full_precision():
                assert _get() == _FULL
            assert _get() == _FULL
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _get() == state
    assert torch.get_float32_matmul_precision() == precision


def test_the_setting_comes_back_when_threads_overlap(precision: str) -> None:
    state, together = _get(), Barrier(2)

    def first() -> None:
        with full_precision():
            together.wait()

    def second() -> None:
        with full_precision():
            together.wait()
            together.wait()

    thread, other = Thread(target=first), Thread(target=second)
    thread.start(), other.start()
    thread.join()
    assert _get() == _FULL  # the other one is still at work
    together.wait()
    other.join()
    assert _get() == state


@pytest.mark.parametrize("method", ["exact", "blocksparse", "lowrank"])
def test_results_do_not_depend_on_it(precision: str, method: str) -> None:
    values, image = torch.rand(1, 2, 20, 20), torch.rand(1, 1, 20, 20)
    options = {"sigma_rgb": 0.3, "sigma_xy": 10.0, "method": method}
    filtered = bilateral_filter(values, image, **options)
    assert torch.get_float32_matmul_precision() == precision
    torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(filtered, bilateral_filter(values, image, **options), rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="settings per backend came with torch 2.9")
def test_what_was_inherited_stays_inherited() -> None:
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with full_precision():
            assert _get() == _FULL
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
