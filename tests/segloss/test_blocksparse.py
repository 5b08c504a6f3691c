"""The tolerance of the block-sparse filter, weight by weight."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segloss.bilateral import blocksparse, farfield, guide_features

kinds = st.sampled_from(["smooth", "noise", "edge", "constant"])


def picture(kind: str, height: int, width: int, *, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, channels, height, width, generator=generator, dtype=torch.float64)
    if kind == "smooth":
        return torch.nn.functional.interpolate(image[:, :, :3, :3], (height, width), mode="bilinear")
    if kind == "edge":
        image *= 0.05
        image[..., width // 2 :] += 0.6
    if kind == "constant":
        image[:] = 0.3
    return image


def weights(features: Tensor) -> Tensor:
    """``[B, D, N]`` to ``[B, N, N]``, pixel by pixel."""
    return torch.exp(-(features[:, :, :, None] - features[:, :, None]).square().sum(1) / 2)


@settings(max_examples=40, deadline=None)
@given(
    kind=kinds,
    height=st.integers(3, 40),
    width=st.integers(3, 40),
    channels=st.integers(1, 8),
    sigma_rgb=st.sampled_from([0.06, 0.3, 2.0, math.inf]),
    sigma_xy=st.sampled_from([2.0, 8.0, 40.0, math.inf]),
    tolerance=st.sampled_from([0.9, 0.3, 1e-1, 1e-2, 1e-4]),
    seed=st.integers(0, 100),
)
def test_wrong_weights_of_a_tile_add_up_to_at_most_the_tolerance(
    kind: str,
    height: int,
    width: int,
    channels: int,
    sigma_rgb: float,
    sigma_xy: float,
    tolerance: float,
    seed: int,
) -> None:
    features = guide_features(picture(kind, height, width, channels=channels, seed=seed), sigma_rgb, sigma_xy)
    exact = weights(features)
    used = blocksparse.gaussian_filter(torch.eye(height * width, dtype=torch.float64)[None], features, tolerance)
    torch.testing.assert_close(used, used.transpose(1, 2), rtol=1e-9, atol=1e-15)
    tiles = blocksparse.cut(features)
    wrong, total = (tiles.gather(matrix.sum(1, keepdim=True)).sum((1, 2)) for matrix in ((used - exact).abs(), exact))
    assert (wrong <= tolerance * total + 1e-9).all()


@pytest.mark.parametrize("dims", [2, 5, 8])
@pytest.mark.parametrize("apart", [0.0, 1.0, 4.0])
def test_sums_bound_the_weights_and_expanded_weights_have_the_right_sum(dims: int, apart: float) -> None:
    generator = torch.Generator().manual_seed(dims)
    pixels = torch.rand(2, dims, 30, generator=generator, dtype=torch.float64)
    pixels[1, 0] += apart
    real = torch.ones(2, 30, dtype=torch.float64)
    real[1, 20:] = 0
    tiles = farfield.expand(pixels, real)
    first, second, z = farfield.sums(tiles)
    exact = weights(torch.cat([pixels[0], pixels[1, :, :20]], 1)[None])[0]
    between = exact[:30, 30:].sum()
    assert first[0, 1] <= between <= first[0, 1] + 2 * tiles.bound[0, 1] * second[0, 1]
    values = torch.zeros(2, 30, 20, dtype=torch.float64)
    values[1, :20] = torch.eye(20)
    other = ~torch.eye(2, dtype=torch.bool)
    expanded = farfield.expanded_filter(values, tiles, z, other)[0]
    torch.testing.assert_close(expanded.sum(), first[0, 1] + second[0, 1])
    wrong = (expanded - exact[:30, 30:]).abs().sum()
    assert wrong <= (1 + 2 * tiles.bound[0, 1]) * second[0, 1]
    assert wrong <= 0.1 * between  # 1 + a.b alone misses more


def test_many_channels_are_filtered_as_few_are() -> None:
    features = guide_features(picture("smooth", 40, 40), 0.2, 10.0)
    values = torch.rand(1, 70, 1600, dtype=torch.float64)
    one_by_one = torch.cat([blocksparse.gaussian_filter(v, features, 1e-2) for v in values.split(1, 1)], 1)
    torch.testing.assert_close(blocksparse.gaussian_filter(values, features, 1e-2), one_by_one)


def test_smooth_pictures_need_few_exact_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    weigh = blocksparse._weighted

    def counted(tiles: blocksparse.Tiles, first: Tensor, second: Tensor) -> Iterator[blocksparse._Pairs]:
        pairs.append(len(first))
        return weigh(tiles, first, second)

    monkeypatch.setattr(blocksparse, "_weighted", counted)
    features = guide_features(picture("smooth", 64, 64), 0.3, 20.0)
    values = torch.rand(1, 2, 64 * 64, dtype=torch.float64)
    filtered = blocksparse.gaussian_filter(values, features, 1e-2)
    first, _ = blocksparse.kept_pairs(blocksparse.cut(features), 1e-2)
    assert pairs[0] < len(first) / 4
    exact = blocksparse.gaussian_filter(values, features, 0.0)
    assert (filtered - exact).norm() < 1e-3 * exact.norm()
