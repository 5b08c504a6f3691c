"""Overlays, grids of maps and size grids: the pixels of the pictures, the axes of the figures, nothing left behind."""

import copy
import subprocess
import sys
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from data.write_voc import palette
from matplotlib.figure import Figure
from torch import Tensor

from segattr import plot

IMAGE = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))
MAP = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))


def pictures(figure: Figure) -> list[Any]:
    return [axis.images[0].get_array() for axis in figure.axes]


def test_slices_are_those_of_the_volume_and_of_the_maps_over_it() -> None:
    volume, labels = torch.rand(1, 4, 6, 8), torch.randint(0, 3, (4, 6, 8))
    heat = torch.rand(2, 3, 4)
    figure = plot.slices(volume, {"heat": heat, "labels": labels}, at=(1, 2, 5), spacing=(3, 1, 0.5), alpha=1)
    assert [axes.get_title() for axes in figure.axes] == ["z = 1", "y = 2", "x = 5", *[""] * 6]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["volume", "heat", "labels"]
    assert [axes.get_aspect() for axes in figure.axes[:3]] == [2, 6, 3]
    large = torch.nn.functional.interpolate(heat[None, None], (4, 6, 8), mode="trilinear")[0, 0]
    found = pictures(figure)
    for number, place in enumerate((1, 2, 5)):
        grey = volume[0].select(number, place)
        expected = [grey.expand(3, *grey.shape)]
        for values in (large.select(number, place), labels.select(number, place)):
            expected.append(plot.overlay(expected[0], values, alpha=1))
        for row, picture in enumerate(expected):
            np.testing.assert_allclose(found[3 * row + number], picture.movedim(0, -1).numpy(), atol=1e-6)


def test_slices_go_through_the_middle() -> None:
    figure = plot.slices(torch.rand(3, 5, 6, 7, dtype=torch.float64))
    assert [axes.get_title() for axes in figure.axes] == ["z = 2", "y = 3", "x = 3"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [3, 3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"volume": torch.rand(4, 6, 8)},
            ValueError,
            r"volume: expected \[1, D, H, W\] or \[3, D, H, W\], got \[4, 6, 8\]",
        ),
        ({"volume": torch.rand(2, 4, 6, 8)}, ValueError, r"volume: expected \[1, D, H, W\] or .* got \[2, 4, 6, 8\]"),
        ({"volume": 900 * torch.ones(1, 4, 6, 8)}, ValueError, r"volume: expected values in \[0, 1\], got 900 to 900"),
        ({"maps": torch.rand(4, 6, 8)}, TypeError, "maps: expected maps or labels by their titles, got Tensor"),
        ({"maps": {"CAM": torch.rand(6, 8)}}, ValueError, r"maps\['CAM'\]: expected \[D, H, W\], got \[6, 8\]"),
        ({"maps": {"a": torch.ones(2, 3, 4).long()}}, ValueError, r"maps\['a'\]: expected labels \[4, 6, 8\] .* got"),
        ({"at": (4, 0, 0)}, ValueError, r"at: expected a voxel of \[4, 6, 8\], got \(4, 0, 0\) \(see volume\)"),
        ({"at": (0, 0)}, TypeError, r"at: expected three numbers, along z, y and x, got \(0, 0\)"),
        ({"at": (0, 0, 0.5)}, TypeError, "at: expected an int, got float"),
        ({"spacing": (1, 1, 0)}, ValueError, "spacing: expected a finite number of at least 0.0001"),
        ({"spacing": 2.0}, TypeError, "spacing: expected three numbers, along z, y and x, got 2.0"),
        ({"alpha": 2}, ValueError, "alpha: expected a"),
    ],
)
def test_errors_of_slices(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot.slices(**{"volume": torch.rand(1, 4, 6, 8), **arguments})


def test_labels_are_in_the_colours_of_voc_label_images() -> None:
    labels = torch.arange(256).view(16, 16)
    coloured = plot.overlay(torch.rand(3, 16, 16), labels, alpha=1)
    np.testing.assert_array_equal((255 * coloured).round().flatten(1).T.numpy(), palette())


def test_an_overlay_mixes_image_and_colours() -> None:
    labels = torch.randint(0, 21, (6, 8))
    expected = 0.7 * IMAGE + 0.3 * torch.from_numpy(palette())[labels].movedim(-1, 0) / 255
    torch.testing.assert_close(plot.overlay(IMAGE, labels, alpha=0.3), expected)
    assert torch.equal(plot.overlay(IMAGE, labels, alpha=0), IMAGE)
    assert torch.equal(plot.overlay(IMAGE, MAP, alpha=0), IMAGE)


def test_heat_runs_from_blue_through_green_to_red() -> None:
    values = torch.tensor([[0, 0.125, 0.25, 0.5, 0.75, 0.875, 1]])
    red, green, blue = [0, 0, 0, 0.5, 1, 1, 0.5], [0, 0, 0.5, 1, 0.5, 0, 0], [0.5, 1, 1, 0.5, 0, 0, 0]
    torch.testing.assert_close(
        plot.overlay(torch.zeros(3, 1, 7), values, alpha=1), torch.tensor([[red], [green], [blue]])
    )


def test_a_coarse_map_is_laid_over_the_whole_image() -> None:
    values = torch.zeros(2, 2)
    values[:, 1] = 1
    heat = plot.overlay(torch.zeros(3, 20, 40), values, alpha=1)
    assert heat.shape == (3, 20, 40)
    torch.testing.assert_close(heat[:, 0, 0], torch.tensor([0, 0, 0.5]))
    torch.testing.assert_close(heat[:, -1, -1], torch.tensor([0.5, 0, 0]))
    torch.testing.assert_close(heat, heat[:, :1].expand(3, 20, 40))  # rows alike


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_overlay_has_the_dtype_of_its_image_and_no_graph(dtype: torch.dtype) -> None:
    image = IMAGE.to(dtype, copy=True).requires_grad_()
    for values in (MAP, MAP.double().requires_grad_(), torch.ones(6, 8, dtype=torch.bool), torch.zeros(6, 8).byte()):
        picture = plot.overlay(image, values)
        assert picture.shape == IMAGE.shape
        assert picture.dtype == dtype
        assert not picture.requires_grad
        assert 0 <= picture.min() <= picture.max() <= 1


def test_rounding_beyond_0_and_1_is_cut_off() -> None:
    image = torch.tensor([-1e-4, 1 + 1e-4]).expand(3, 1, 2)
    picture = plot.overlay(image, image[0], alpha=0.5)
    assert 0 <= picture.min() <= picture.max() <= 1
    (shown,) = pictures(plot.size_grid(image))
    assert 0 <= shown.min() <= shown.max() <= 1


def test_figures_take_tensors_with_a_graph() -> None:
    image, values = IMAGE.clone().requires_grad_(), MAP.clone().requires_grad_()
    assert len(plot.size_grid(image).axes) == 1
    assert len(plot.map_grid(image[None], {"CAM": values[None]}).axes) == 2


@pytest.mark.gpu
def test_an_overlay_stays_on_the_gpu() -> None:
    for values in (MAP, torch.randint(0, 21, (6, 8))):
        picture = plot.overlay(IMAGE.cuda(), values.cuda())
        assert picture.is_cuda
        torch.testing.assert_close(picture.cpu(), plot.overlay(IMAGE, values))
    assert len(plot.map_grid(IMAGE[None].cuda(), {"CAM": MAP[None].cuda()}).axes) == 2


def test_a_map_grid_has_a_row_for_each_image_and_a_column_for_each_kind() -> None:
    images, cams, labels = torch.rand(2, 3, 6, 8), torch.rand(2, 3, 4), torch.randint(0, 3, (2, 6, 8))
    figure = plot.map_grid(images, {"CAM": cams, "truth": labels}, alpha=0.4)
    assert isinstance(figure, Figure)
    expected: list[Tensor] = []
    for image, cam, label in zip(images, cams, labels, strict=True):
        expected += [image, plot.overlay(image, cam, alpha=0.4), plot.overlay(image, label, alpha=0.4)]
    for picture, value in zip(pictures(figure), expected, strict=True):
        np.testing.assert_array_equal(picture, value.movedim(0, -1))
    assert [axis.get_title() for axis in figure.axes] == ["image", "CAM", "truth", "", "", ""]
    assert not any(len(axis.get_xticks()) or len(axis.get_yticks()) for axis in figure.axes)


def test_a_map_grid_takes_images_of_different_sizes_and_no_maps() -> None:
    images = [torch.rand(3, 6, 8), torch.rand(3, 9, 5).double()]
    figure = plot.map_grid(images, {"mask": [torch.ones(6, 8).bool(), torch.zeros(9, 5).bool()]})
    assert [picture.shape for picture in pictures(figure)] == [(6, 8, 3)] * 2 + [(9, 5, 3)] * 2
    assert len(plot.map_grid(images, {}).axes) == 2


def segments(figure: Figure) -> tuple[list[float], list[float]]:
    """Places of the vertical and of the horizontal lines of the first colour."""
    vertical, horizontal = figure.axes[0].collections[:2]
    across = [line[0][0] for line in vertical.get_segments()]  # type: ignore[attr-defined]
    down = [line[0][1] for line in horizontal.get_segments()]  # type: ignore[attr-defined]
    return across, down


@pytest.mark.parametrize(("columns", "rows"), [(5, 4), (3, 3), (1, 1), (2, 1)])
def test_size_grid_cuts_the_image_into_equal_cells(columns: int, rows: int) -> None:
    figure = plot.size_grid(torch.rand(3, 37, 50), columns=columns, rows=rows)
    (axis,) = figure.axes
    assert (axis.get_xlim(), axis.get_ylim()) == ((-0.5, 49.5), (36.5, -0.5))  # the image and nothing else
    across, down = segments(figure)
    np.testing.assert_allclose(np.diff([-0.5, *across, 49.5]), 50 / columns)
    np.testing.assert_allclose(np.diff([-0.5, *down, 36.5]), 37 / rows)
    for lines in axis.collections:  # from edge to edge
        for (x, y), (other_x, other_y) in lines.get_segments():  # type: ignore[attr-defined]
            assert (x == other_x and (y, other_y) == (-0.5, 36.5)) or (y == other_y and (x, other_x) == (-0.5, 49.5))


def test_size_grid_shows_the_image_and_says_what_a_cell_is_worth() -> None:
    figure = plot.size_grid(IMAGE)
    np.testing.assert_array_equal(pictures(figure)[0], IMAGE.movedim(0, -1))
    assert figure.axes[0].get_xlabel() == "20 cells of 5% each"
    assert len(segments(figure)[0]) == 4
    assert len(segments(figure)[1]) == 3


def test_lines_are_white_within_black_and_so_show_on_any_image() -> None:
    lines = plot.size_grid(IMAGE).axes[0].collections
    colours = [(tuple(line.get_edgecolor()[0][:3]), line.get_linewidth()[0]) for line in lines]  # type: ignore[index]
    assert colours == [((0, 0, 0), 3)] * 2 + [((1, 1, 1), 1)] * 2  # drawn in this order


def test_heatmaps_have_symmetric_colours_up_to_a_percentile() -> None:
    values = torch.linspace(-1, 1, 400).reshape(20, 20)
    values[0, 0] = -50  # one pixel that would leave all others white
    figure = plot.heatmap(torch.rand(3, 20, 20), {"cat": values, "dog": -values.double()}, percentile=99)
    assert [axis.get_title() for axis in figure.axes] == ["image", "cat", "dog", "", ""]
    for axis in figure.axes[1:3]:
        low, high = axis.images[0].get_clim()
        assert -low == high
        assert 0.95 < high <= 1
    np.testing.assert_allclose(np.asarray(figure.axes[1].images[0].get_array()), values.numpy())
    assert plot.heatmap(torch.rand(3, 2, 2), {"": torch.zeros(2, 2)}).axes[1].images[0].get_clim() == (-1, 1)


@pytest.mark.parametrize(
    ("heatmaps", "percentile", "error", "message"),
    [
        (torch.zeros(1, 4, 4), 99, TypeError, "heatmaps: expected heatmaps by their titles, got Tensor"),
        ({}, 99, ValueError, "heatmaps: expected at least one"),
        ({"a": torch.zeros(4, 5)}, 99, ValueError, r"heatmaps\['a'\]: expected \[4, 4\], the size of image"),
        ({"a": torch.full((4, 4), torch.nan)}, 99, ValueError, r"heatmaps\['a'\]"),
        ({"a": torch.zeros(4, 4)}, 0, ValueError, "percentile"),
        ({"a": torch.zeros(4, 4)}, 101, ValueError, "percentile"),
    ],
)
def test_heatmaps_that_make_no_sense(heatmaps: Any, percentile: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot.heatmap(torch.rand(3, 4, 4), heatmaps, percentile=percentile)


def test_settings_and_random_state_stay_and_do_not_turn_pictures_over() -> None:
    with mpl.rc_context({"image.origin": "lower", "image.cmap": "gray"}):
        settings, state = copy.deepcopy(dict(mpl.rcParams)), torch.get_rng_state()
        figure = plot.size_grid(IMAGE)
        plot.map_grid(IMAGE[None], {"CAM": MAP[None]})
        assert figure.axes[0].get_ylim() == (5.5, -0.5)
        assert dict(mpl.rcParams) == settings
        assert torch.equal(torch.get_rng_state(), state)


def test_figures_are_written_to_files(tmp_path: Any) -> None:
    for n, figure in enumerate((plot.size_grid(IMAGE), plot.map_grid(IMAGE[None], {"CAM": MAP[None]}))):
        figure.savefig(tmp_path / f"{n}.png", dpi=40)
        assert (tmp_path / f"{n}.png").stat().st_size > 500


def test_matplotlib_is_imported_for_figures_only_and_pyplot_never() -> None:
    code = """
import sys, torch
from segattr import plot
image = torch.rand(3, 6, 8)
plot.overlay(image, image[0])
print("matplotlib" in sys.modules)
sys.modules["matplotlib"] = None  # as if it were not installed
try:
    plot.size_grid(image)
except ImportError as error:
    print(error)
del sys.modules["matplotlib"]
plot.size_grid(image), plot.map_grid(image[None], {"CAM": image[:1]})
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        "False",
        "figures need matplotlib: pip install matplotlib, or segprims[examples]",
        "True False",
    ], result.stderr


@pytest.mark.parametrize(
    ("image", "values", "options", "error", "message"),
    [
        (IMAGE.numpy(), MAP, {}, TypeError, "image: expected a tensor, got ndarray"),
        ((255 * IMAGE).byte(), MAP, {}, TypeError, "image: expected a floating-point tensor, got torch.uint8"),
        (IMAGE[None], MAP, {}, ValueError, r"image: expected \[3, H, W\], got \[1, 3, 6, 8\]"),
        (IMAGE.movedim(0, -1), MAP, {}, ValueError, r"image: expected \[3, H, W\], got \[6, 8, 3\]"),
        (IMAGE[:, :0], MAP, {}, ValueError, r"image: expected \[3, H, W\], got \[3, 0, 8\]"),
        (255 * IMAGE, MAP, {}, ValueError, r"image: expected values in \[0, 1\], got .* to 2\d\d"),
        (IMAGE - 0.5, MAP, {}, ValueError, r"image: expected values in \[0, 1\], got -0\.4\d* to"),
        (IMAGE * float("nan"), MAP, {}, ValueError, r"image: expected values in \[0, 1\], got nan to nan"),
        (IMAGE, None, {}, TypeError, "values: expected a tensor, got NoneType"),
        (IMAGE, MAP + 0j, {}, TypeError, "values: expected a tensor of real numbers, got torch.complex64"),
        (IMAGE, MAP[None], {}, ValueError, r"values: expected \[H, W\], got \[1, 3, 4\]"),
        (IMAGE, MAP[:0], {}, ValueError, r"values: expected \[H, W\], got \[0, 4\]"),
        (IMAGE, MAP.to("meta"), {}, ValueError, "values: expected device cpu, that of image, got meta"),
        (IMAGE, 3 * MAP, {}, ValueError, r"values: expected values in \[0, 1\], got .* to 2\."),
        (IMAGE, MAP.long(), {}, ValueError, r"values: expected labels \[6, 8\] .* image \[3, 6, 8\], got \[3, 4\]"),
        (IMAGE, torch.full((6, 8), 256), {}, ValueError, "values: expected labels from 0 to 255, got 256 to 256"),
        (IMAGE, torch.full((6, 8), -1), {}, ValueError, "values: expected labels from 0 to 255, got -1 to -1"),
        (IMAGE, MAP, {"alpha": 1.5}, ValueError, "alpha: expected a"),
        (IMAGE, MAP, {"alpha": None}, TypeError, "alpha: expected a number, got NoneType"),
    ],
)
def test_an_overlay_refuses_what_makes_no_sense(
    image: Any, values: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plot.overlay(image, values, **options)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plot.map_grid([], {}), ValueError, "images: expected at least one, got none"),
        (lambda: plot.map_grid(IMAGE, {}), ValueError, r"images: expected \[3, H, W\], got \[6, 8\]"),
        (
            lambda: plot.map_grid(IMAGE[None], {"CAM": MAP[None].expand(2, 3, 4)}),
            ValueError,
            "maps: expected 1 of 'CAM', one for each image, got 2",
        ),
        (
            lambda: plot.map_grid(IMAGE[None], {"CAM": 2 + MAP[None]}),
            ValueError,
            r"maps: expected values in \[0, 1\]",
        ),
        (lambda: plot.size_grid(IMAGE[None]), ValueError, r"image: expected \[3, H, W\]"),
        (
            lambda: plot.size_grid(IMAGE, columns=0),
            ValueError,
            "columns: expected a finite number of at least 1 and of at most 1000, got 0",
        ),
        (lambda: plot.size_grid(IMAGE, rows=2.0), TypeError, "rows: expected an int, got float"),  # type: ignore[arg-type]
    ],
)
def test_figures_refuse_what_makes_no_sense(draw: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw()


@pytest.mark.parametrize(
    ("images", "maps", "error", "message"),
    [
        (None, {}, TypeError, "images: expected a batch or a sequence of tensors, got NoneType"),
        (IMAGE[None], [MAP], TypeError, "maps: expected maps or labels by their titles, got list"),
        (IMAGE[None], {"CAM": 3}, TypeError, "maps: expected a batch or a sequence of tensors, got int"),
        (IMAGE[None], {"CAM": MAP[None] + 2}, ValueError, r"maps: expected values in \[0, 1\]"),
        (IMAGE[None].to("meta"), {}, ValueError, "images: expected values that can be drawn"),
    ],
)
def test_errors_of_a_grid_name_its_arguments(images: Any, maps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot.map_grid(images, maps)


def test_more_cells_than_can_be_told_apart() -> None:
    with pytest.raises(ValueError, match=r"rows: expected a finite number of at least 1 and of at most 1000, got 1001"):
        plot.size_grid(IMAGE, rows=1001)
