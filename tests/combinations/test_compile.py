"""torch.compile of a whole training step: network, two losses, backward pass and optimizer."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from segloss import PottsCRF, SizeKL
from tests.combinations.rectangles import rectangles, small_network


def step_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    size_loss, crf_loss = SizeKL(), PottsCRF(scale_factor=0.5, normalize="pixels")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def step(image: Tensor, sizes: Tensor) -> Tensor:
        logits = model(image)
        loss = size_loss(logits, sizes) + 1e-3 * crf_loss(logits, image)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_step_is_the_step() -> None:
    torch.compiler.reset()
    image, _, sizes = rectangles(4, 24, 32)
    plain, compiled = small_network(), small_network()
    own, other = step_of(plain), torch.compile(step_of(compiled))
    expected, found = (torch.stack([step(image, sizes) for _ in range(5)]) for step in (own, other))
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
