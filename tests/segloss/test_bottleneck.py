"""What is particular to the RIB margin loss."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segloss.bottleneck import RIBMargin, rib_margin

images = st.lists(
    st.tuples(*[st.tuples(st.one_of(st.floats(-1e3, 1e3), st.just(7.0)), st.booleans())] * 3), min_size=1, max_size=4
)


@given(images=images)
def test_value_and_gradient_follow_the_formula(images: list[Any]) -> None:
    values, tags = torch.tensor(images, dtype=torch.float64).unbind(2)
    logits = values.requires_grad_()
    loss = rib_margin(logits, tags, margin=7.0)
    loss.backward()
    expected = sum(-min(7.0, y) for image in images for y, tag in image if tag) / len(images)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    # At the margin itself nothing pulls any more.
    slope = [[-1 / len(images) if tag and y < 7.0 else 0.0 for y, tag in image] for image in images]
    torch.testing.assert_close(logits.grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_default_margin_is_that_of_the_paper() -> None:
    logits = torch.tensor([[599.0, 600.0, 601.0]], requires_grad=True)
    loss = rib_margin(logits, torch.ones(1, 3))
    loss.backward()
    assert loss == -1799
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-1, 0, 0]]
    assert RIBMargin().margin == 600


def test_a_margin_that_no_float32_holds_is_reached_by_its_nearest_float32() -> None:
    logits = torch.tensor([[0.1]], requires_grad=True)
    rib_margin(logits, torch.ones(1, 1), margin=0.1).backward()
    assert logits.grad == 0


def test_nothing_tagged_costs_a_plain_zero() -> None:
    loss = rib_margin(torch.randn(2, 3), torch.zeros(2, 3), reduction="none")
    assert loss.tolist() == [0, 0]
    assert not loss.signbit().any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: rib_margin(x[:, :0], x[:, :0]), ValueError, r"logits: expected .* at least one class, got \[2, 0\]"),
        (lambda x: rib_margin(x, x), ValueError, "tags: expected 0 or 1, got 3"),
        (lambda x: rib_margin(x, x * 1j), TypeError, "tags: expected a tensor of real numbers"),
        (lambda x: rib_margin(x, x > 0, margin=torch.inf), ValueError, "margin: expected a finite number .*, got inf"),
        (lambda x: rib_margin(x, x > 0, margin="600"), TypeError, "margin: expected a number, got str"),
        (lambda x: rib_margin(x, x > 0, margin=1e39), ValueError, "margin: expected .* of at most 1e.30, got 1e.39"),
        (lambda x: RIBMargin(margin=torch.nan), ValueError, "margin: expected a finite number .*, got nan"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.full((2, 4), 3.0))
