"""Views of samples: image, maps and boxes stay together, whatever is drawn."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from data.augment import MEAN_COLOUR, Crop, Fit
from data.sample import VOID, DataError, Sample, complete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

CLASSES = 5
SIDES = st.integers(1, 24)
SEEDS = st.integers(0, 2**32)
MAPS = {"labels": VOID, "place": VOID, "instances": False, "depth": 0.0}  # and what their padding is
View = Callable[[Sample, np.random.Generator], Sample]


def coordinates(height: int, width: int) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return y, x


def draw_sample(height: int, width: int, rng: np.random.Generator) -> Sample:
    """An image whose red and green are the place of each pixel, random labels, and rectangles with their boxes."""
    y, x = coordinates(height, width)
    count = int(rng.integers(0, 4))
    top, left = rng.integers(0, height, count), rng.integers(0, width, count)
    bottom, right = rng.integers(top + 1, height + 1), rng.integers(left + 1, width + 1)
    boxes = torch.from_numpy(np.stack([left, top, right, bottom], 1)).float()
    inside = [(x >= x1) & (x < x2) & (y >= y1) & (y < y2) for x1, y1, x2, y2 in boxes]
    labels = rng.choice([*range(CLASSES), VOID], (height, width))
    return {
        "image": tv_tensors.Image(torch.stack([x, y, torch.full_like(x, 7)]).float() / 255),
        "labels": tv_tensors.Mask(torch.from_numpy(labels)),
        "instances": tv_tensors.Mask(torch.stack([*inside, torch.ones_like(x, dtype=torch.bool)])),
        "place": tv_tensors.Mask(torch.stack([x, y]).short()),
        "depth": tv_tensors.Mask(torch.rand(height, width) + 1),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "box_labels": torch.arange(count),
    }


def extent(mask: Tensor) -> list[int]:
    y, x = mask.nonzero(as_tuple=True)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def same(one: Sample, other: Sample) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@settings(deadline=None, max_examples=200)
@given(height=SIDES, width=SIDES, size=st.integers(1, 30), mirror=st.booleans(), seed=SEEDS)
def test_every_pixel_of_a_crop_at_scale_one_is_a_pixel_of_the_image(
    height: int, width: int, size: int, mirror: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sample = draw_sample(height, width, rng)
    crop = Crop(size, (1.0, 1.0), mirror)(sample, rng)
    valid = crop["valid"].as_subclass(Tensor)
    assert valid.shape == (size, size)
    assert valid.sum() == min(height, size) * min(width, size)

    pixels = {name: crop[name].as_subclass(Tensor) for name in ("image", *MAPS)}
    x, y, blue = (pixels["image"][:, valid] * 255).round().long()
    assert (blue == 7).all()
    for name, values in pixels.items():
        assert torch.equal(values[..., valid], sample[name].as_subclass(Tensor)[..., y, x])
    x, y = x.reshape(min(height, size), -1), y.reshape(min(height, size), -1)
    assert (y.diff(dim=0) == 1).all()
    assert (y.diff(dim=1) == 0).all()
    assert (x.diff(dim=0) == 0).all()
    assert (x.diff(dim=1) == 1).all() or (mirror and (x.diff(dim=1) == -1).all())

    assert (pixels["image"][:, ~valid] == torch.tensor(MEAN_COLOUR)[:, None]).all()
    for name, padding in MAPS.items():
        assert (pixels[name][..., ~valid] == padding).all()

    assert sorted(crop["box_labels"].tolist()) == crop["box_labels"].tolist()
    tight = {i: extent(mask) for i, mask in enumerate(crop["instances"][:-1]) if mask.any()}
    assert dict(zip(crop["box_labels"].tolist(), crop["boxes"].tolist(), strict=True)) == tight


@settings(deadline=None, max_examples=150)
@given(
    height=SIDES,
    width=SIDES,
    size=st.integers(1, 30),
    scale=st.one_of(st.floats(0.2, 4.0), st.sampled_from([0.5, 2.0])),
    seed=SEEDS,
)
def test_boxes_agree_with_masks_to_half_a_pixel_at_any_scale(
    height: int, width: int, size: int, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sample = draw_sample(height, width, rng)
    fit, crop = Fit(size)(sample, rng), Crop(size, (scale, scale))(sample, rng)
    assert torch.equal(fit["box_labels"], sample["box_labels"]), "the whole image has all of its boxes"
    for view in (fit, crop):
        boxes = dict(zip(view["box_labels"].tolist(), view["boxes"], strict=True))
        for i, mask in enumerate(view["instances"][:-1]):
            if i not in boxes:
                assert min(mask.any(0).sum(), mask.any(1).sum()) <= 1, "only what is thinner than a pixel goes"
            elif mask.any():
                assert (boxes[i] - torch.tensor(extent(mask))).abs().max() <= 0.5 + 1e-4
            else:
                assert view is fit
                assert (boxes[i][2:] - boxes[i][:2]).min() < 1
        assert (view["boxes"] >= 0).all()
        assert (view["boxes"] <= size).all()


@settings(deadline=None, max_examples=150)
@given(height=st.integers(2, 24), width=st.integers(2, 24), scale=st.floats(0.3, 4.0), seed=SEEDS)
def test_image_and_masks_are_resampled_at_the_same_places(height: int, width: int, scale: float, seed: int) -> None:
    """On a ramp, bilinear values are the centres of the pixels; the nearest pixel is at most half a pixel away."""
    rng = np.random.default_rng(seed)
    sample = draw_sample(height, width, rng)
    for view in (Crop(40, (scale, scale))(sample, rng), Fit(max(1, round(24 * scale)))(sample, rng)):
        rows, columns = view["valid"].any(1).nonzero()[1:-1, 0], view["valid"].any(0).nonzero()[1:-1, 0]
        inner = (..., rows[:, None], columns)  # at the border, antialiasing is one-sided
        distance = view["image"].as_subclass(Tensor)[:2][inner] * 255 - view["place"].as_subclass(Tensor)[inner]
        assert not distance.numel() or distance.abs().max() <= 0.5 + 1e-3


@settings(deadline=None, max_examples=100)
@given(height=SIDES, width=SIDES, size=st.integers(1, 30), seed=SEEDS)
def test_sizes_and_tags_of_a_crop_are_counts_of_its_labels(height: int, width: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    crop = complete(Crop(size)(draw_sample(height, width, rng), rng), CLASSES)
    labels = crop["labels"].numpy()
    counts = np.array([np.count_nonzero(labels == k) for k in range(CLASSES)])
    np.testing.assert_allclose(crop["sizes"].numpy(), counts / max(counts.sum(), 1), atol=1e-6)
    assert crop["tags"].tolist() == (counts > 0).astype(int).tolist()


@settings(deadline=None, max_examples=100)
@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 60), seed=SEEDS)
def test_fit_shows_the_whole_image_in_the_middle(height: int, width: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = draw_sample(height, width, rng) | {"tags": torch.tensor([1, 0, 1])}
    fit = Fit(size)(sample, rng)
    assert torch.equal(fit["tags"], sample["tags"])
    left, top, right, bottom = extent(fit["valid"])
    shown_height, shown_width = bottom - top, right - left
    assert fit["valid"].sum() == shown_height * shown_width
    assert max(shown_height, shown_width) == size
    assert abs(shown_height / size - height / max(height, width)) <= 1 / size
    assert abs(shown_width / size - width / max(height, width)) <= 1 / size
    assert abs(top - (size - bottom)) <= 1
    assert abs(left - (size - right)) <= 1
    for before, after in zip(sample["instances"], fit["instances"], strict=True):  # their shares: sizes
        error = abs(before.float().mean() - after.sum() / fit["valid"].sum())
        assert error <= 1 / shown_height + 1 / shown_width + 1e-5


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 11), (7, 16)])
def test_what_has_the_size_already_keeps_its_bits(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    image = torch.rand(3, height, width)
    seen = set()
    for _ in range(20):
        fit = Fit(16)({"image": tv_tensors.Image(image)}, rng)
        left, top, right, bottom = extent(fit["valid"])
        shown = fit["image"][:, top:bottom, left:right]
        mirrored = not torch.equal(shown, image)
        assert torch.equal(shown, image.flip(-1) if mirrored else image)
        seen.add(mirrored)
    assert seen == {False, True}


def test_without_mirror_nothing_is_mirrored() -> None:
    rng = np.random.default_rng(0)
    sample = draw_sample(8, 8, rng)
    for view in (Fit(8, mirror=False), Crop(8, (1.0, 1.0), mirror=False)):
        for _ in range(20):
            assert torch.equal(view(sample, rng)["image"], sample["image"])


def test_smaller_images_are_antialiased_and_stay_in_range() -> None:
    rng = np.random.default_rng(0)
    _, x = coordinates(64, 64)
    stripes = tv_tensors.Image((x % 4 == 0).float().repeat(3, 1, 1))
    assert (Fit(16)({"image": stripes}, rng)["image"][..., 1:-1] - 0.25).abs().max() < 1e-5
    white = tv_tensors.Image(torch.ones(3, 37, 50))
    for _ in range(50):
        assert Crop(32)({"image": white}, rng)["image"].max() <= 1


def test_scales_fill_the_interval() -> None:
    rng = np.random.default_rng(0)
    sample = {"image": tv_tensors.Image(torch.rand(3, 40, 20))}
    sides = torch.tensor([extent(Crop(100, (0.5, 2.0))(sample, rng)["valid"]) for _ in range(300)])
    heights, widths = sides[:, 3] - sides[:, 1], sides[:, 2] - sides[:, 0]
    assert (widths - heights / 2).abs().max() <= 1
    assert 20 <= heights.min() <= 22
    assert 78 <= heights.max() <= 80
    assert 47 < heights.float().mean() < 53
    assert sides[:, 0].min() < 5, "smaller images lie anywhere"
    assert sides[:, 2].max() > 95


def test_crops_come_from_everywhere() -> None:
    rng = np.random.default_rng(0)
    sample = draw_sample(3, 4, rng)
    places = {tuple(Crop(1, (1.0, 1.0))(sample, rng)["place"].flatten().tolist()) for _ in range(300)}
    assert places == {(x, y) for x in range(4) for y in range(3)}


@pytest.mark.parametrize("view", [Fit(13), Crop(13)])
def test_equal_random_numbers_give_equal_samples_and_the_input_stays(view: View) -> None:
    sample = draw_sample(20, 30, np.random.default_rng(1))
    before = {name: value.clone() for name, value in sample.items()}
    views = [view(sample, np.random.default_rng(seed)) for seed in range(6)]
    for seed, one in enumerate(views):
        assert same(one, view(sample, np.random.default_rng(seed)))
        for value in one.values():
            value.zero_()
    assert same(sample, before)
    fresh = [view(sample, np.random.default_rng(seed)) for seed in range(6)]
    assert not all(torch.equal(fresh[0]["image"], other["image"]) for other in fresh[1:])


@pytest.mark.parametrize("view", [Fit(9), Crop(9)])
def test_types_stay(view: View) -> None:
    rng = np.random.default_rng(0)
    sample = draw_sample(12, 10, rng)
    sample["boxes"] = tv_tensors.wrap(torch.zeros(0, 4), like=sample["boxes"])
    sample["box_labels"] = torch.zeros(0, dtype=torch.int64)
    result = view(sample, rng)
    for name, value in sample.items():
        assert type(result[name]) is type(value)
        assert result[name].dtype == value.dtype
    assert result["image"].shape == (3, 9, 9)
    assert result["instances"].shape == (len(sample["instances"]), 9, 9)
    assert result["boxes"].shape == (0, 4)
    assert result["boxes"].canvas_size == (9, 9)
    assert result["valid"].dtype == torch.bool
    assert isinstance(result["valid"], tv_tensors.Mask)


def test_what_was_padding_before_stays_padding() -> None:
    rng = np.random.default_rng(0)
    once = Fit(8)(draw_sample(8, 4, rng), rng)
    assert extent(once["valid"]) == [2, 0, 6, 8]
    assert extent(Fit(16)(once, rng)["valid"]) == [4, 0, 12, 16]


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"sizes": torch.ones(2) / 2}, "sizes"),
        ({"tags": torch.ones(2), "targets": torch.ones(2) / 2}, "tags, targets"),
        ({"weight": torch.tensor(1.0)}, "weight"),
    ],
)
@pytest.mark.parametrize("height", [2, 8, 50])
def test_a_crop_refuses_what_is_known_of_the_whole_image_even_where_nothing_is_cut_off(
    entries: Sample, named: str, height: int
) -> None:
    rng = np.random.default_rng(0)
    sample = draw_sample(height, 8, rng) | entries
    message = f"^{named}: known of the whole image only, not of a crop: use Fit, or masks$"
    with pytest.raises(DataError, match=message):
        Crop(8, (1.0, 1.0))(sample, rng)
    for name, value in entries.items():
        assert torch.equal(Fit(8)(sample, rng)[name], value)


@pytest.mark.parametrize("view", [Fit(8), Crop(8)])
def test_a_mask_of_another_size_is_refused(view: View) -> None:
    sample = {"image": tv_tensors.Image(torch.rand(3, 6, 8)), "seeds": tv_tensors.Mask(torch.zeros(2, 8, 6))}
    with pytest.raises(DataError, match=r"^seeds: expected \[6, 8\] as the image, got \[8, 6\]$"):
        view(sample, np.random.default_rng(0))


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_is_refused(size: int) -> None:
    for view in (Fit, Crop):
        with pytest.raises(ValueError, match=f"^size: expected at least 1, got {size}$"):
            view(size)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, float("inf")), (float("nan"), 1.0)])
def test_scales_out_of_order_or_range_are_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"^scale: expected two finite numbers above 0, the smaller one first, got \("):
        Crop(8, scale)
