"""torch.compile of a whole training step: network, two losses, backward pass and optimizer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from segloss import PottsCRF, SizeKL
from tests.combinations.rectangles import rectangles, small_network

Step = Callable[[Tensor, Tensor], Tensor]


def step_of(model: nn.Module, compiled: bool, backend: str) -> Step:
    size_loss, crf_loss = SizeKL(), PottsCRF(scale_factor=0.5, normalize="pixels")
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(1e-2))

    def loss(image: Tensor, sizes: Tensor) -> Tensor:
        logits = model(image)
        return size_loss(logits, sizes) + 1e-3 * crf_loss(logits, image)

    def step(image: Tensor, sizes: Tensor) -> Tensor:
        value = loss(image, sizes)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return torch.compile(step, backend=backend) if compiled else step


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_is_the_step(backend: str) -> None:
    torch.compiler.reset()
    image, _, sizes = rectangles(4, 24, 32)
    values, weights = [], []
    for compiled in (False, True):
        model = small_network()
        step = step_of(model, compiled, backend)
        values.append(torch.stack([step(image, sizes) for _ in range(5)]))
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    print(values, (weights[0]-weights[1]).abs().max())
    assert values[0][-1] < 0.9 * values[0][0]
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
