"""Pictures of images, maps and labels; figures need matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from segloss.common.checks import (
    check_finite,
    check_floating,
    check_has_values,
    check_int,
    check_number,
    check_real,
    require,
    shape_text,
)
from segloss.common.resizing import resize_linear

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["heatmap", "map_grid", "overlay", "size_grid", "slices"]

_MOST_CELLS = 1000  # in a row or column of a grid: more lines cannot be told apart
_SMALLEST_STEP = 1e-4  # from voxel to voxel, in whatever unit: less is a mistake
_SLACK = 1e-3  # beyond [0, 1]: what normalising, resizing and going back leave


@torch.no_grad()
def overlay(image: Tensor, values: Tensor, *, alpha: float = 0.5) -> Tensor:
    r"""A heat map, or labels in colours, over an image.

    .. math:: (1 - \alpha) \, I + \alpha \, \mathrm{colour}(v)

    Args:
        image: RGB in [0, 1], ``[3, H, W]``, see :func:`segloss.denormalize`.
        values: a floating-point map in [0, 1] of any resolution, ``[h, w]``, which is resized to the image (bilinear)
            and coloured from blue to red (jet), or labels, integers from 0 to 255 or a bool mask, ``[H, W]``, in VOC's
            colours.
        alpha: opacity of the colours, in [0, 1].

    Returns:
        ``[3, H, W]`` in [0, 1], in the dtype and on the device of the image. No gradient.

    Raises:
        TypeError: ``image`` that is not floating point, ``values`` that are no tensor or complex, ``alpha`` that is no
            number.
        ValueError: shapes or devices that do not fit, ``alpha`` outside [0, 1], an image or map outside it by more
            than 1e-3 or NaN, labels outside 0 to 255.

    Example:
        >>> overlay(torch.ones(3, 1, 2), torch.tensor([[0, 1]]))[:, 0].T  # background, aeroplane
        tensor([[0.5000, 0.5000, 0.5000],
                [0.7510, 0.5000, 0.5000]])
    """
    _check_image("image", image)
    check_number("alpha", alpha, least=0, most=1)
    return _coloured("values", values, image, alpha)


def map_grid(
    images: Tensor | Sequence[Tensor], maps: Mapping[str, Tensor | Sequence[Tensor]], *, alpha: float = 0.5
) -> Figure:
    """Images and what was found in them: a row for each image, first the image, then each kind of maps over it.

    Args:
        images: N images, RGB in [0, 1], ``[N, 3, H, W]`` or a sequence of ``[3, H, W]`` that may differ in size.
        maps: by their titles, N maps or label images each, as for :func:`overlay`. The maps of several classes go in
            as ``dict(zip(names, maps.unbind(1)))``.
        alpha: opacity of the colours, in [0, 1].

    Returns:
        A matplotlib figure that belongs to no window: ``figure.savefig(path)`` writes it. Its axes lie row by row.

    Raises:
        TypeError, ValueError: as :func:`overlay`; no image, or maps of more or fewer images.
        ImportError: matplotlib is not installed.

    Example:
        >>> maps = {"CAM": torch.rand(2, 6, 8), "truth": torch.ones(2, 24, 32, dtype=torch.bool)}
        >>> figure = map_grid(torch.rand(2, 3, 24, 32), maps)
        >>> [axes.get_title() for axes in figure.axes]
        ['image', 'CAM', 'truth', '', '', '']
    """
    _check_several("images", images)
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    if not isinstance(maps, Mapping):
        raise TypeError(f"maps: expected maps or labels by their titles, got {type(maps).__name__}")
    for title, found in maps.items():
        _check_several("maps", found)
        if len(found) != len(images):
            raise ValueError(
                f"maps: expected {len(images)} of {title!r}, one for each image, got {len(found)} (see images)"
            )
    for image in images:
        _check_drawn("images", image)
    check_number("alpha", alpha, least=0, most=1)
    rows = [
        [image, *(_coloured("maps", found[n], image, alpha) for found in maps.values())]
        for n, image in enumerate(images)
    ]
    figure = _figure(2.5 * (1 + len(maps)), 2.5 * len(rows))
    grid = figure.subplots(len(rows), 1 + len(maps), squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        for axis, picture in zip(axes, row, strict=True):
            _show(axis, picture)
    for axis, title in zip(grid[0], ("image", *maps), strict=True):
        axis.set_title(title)
    return figure


def heatmap(image: Tensor, heatmaps: Mapping[str, Tensor], *, percentile: float = 99.5) -> Figure:
    r"""Signed heatmaps such as those of LRP beside their image, four in a row: red for, blue against, white for 0.

    Colours are symmetric: they reach from :math:`-v` to :math:`v`, the percentile of the absolute values of each
    heatmap, so that a few large pixels do not leave the others white.

    Args:
        image: RGB in [0, 1], ``[3, H, W]``.
        heatmaps: by their titles, ``[H, W]`` each. Those of several classes go in as ``dict(zip(names, heat))``.
        percentile: of the absolute values, above 0 and at most 100, which is the largest one.

    Returns:
        A matplotlib figure that belongs to no window: ``figure.savefig(path)`` writes it. Its axes are the image, the
        heatmaps, then the bars of their colours, in the unit of the scores.

    Raises:
        TypeError: ``image`` or heatmaps that are not floating point, ``heatmaps`` that are no mapping.
        ValueError: shapes that do not fit, no heatmap, ``percentile`` outside its range, an image outside [0, 1], a
            heatmap that is not finite.
        ImportError: matplotlib is not installed.

    Example:
        >>> figure = heatmap(torch.rand(3, 24, 32), {"cat": torch.randn(24, 32), "dog": torch.randn(24, 32)})
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['image', 'cat', 'dog']
    """
    _check_drawn("image", image)
    if not isinstance(heatmaps, Mapping):
        raise TypeError(f"heatmaps: expected heatmaps by their titles, got {type(heatmaps).__name__}")
    if not heatmaps:
        raise ValueError("heatmaps: expected at least one, got none")
    check_number("percentile", percentile, least=0, most=100)
    if percentile == 0:
        raise ValueError("percentile: expected a number above 0, got 0")
    for title, values in heatmaps.items():
        check_floating(f"heatmaps[{title!r}]", values)
        check_finite(f"heatmaps[{title!r}]", values)
        if values.shape != image.shape[1:]:
            raise ValueError(
                f"heatmaps[{title!r}]: expected {shape_text(image.shape[1:])}, the size of image, got "
                f"{shape_text(values.shape)}"
            )
    height, width = image.shape[1:]
    columns = min(4, 1 + len(heatmaps))
    rows = -(-(1 + len(heatmaps)) // columns)
    figure = _figure(3.2 * columns, rows * (3.2 * 0.8 * height / width + 0.5))
    first, *others = figure.subplots(rows, columns, squeeze=False).flat
    _show(first, image)
    first.set_title("image")
    for axis in others[len(heatmaps) :]:
        axis.remove()
    for axis, (title, values) in zip(others, heatmaps.items(), strict=False):
        numbers = values.detach().double().cpu()
        limit = float(torch.quantile(numbers.abs().flatten()[:: -(-numbers.numel() // 10**6)], percentile / 100))
        limit = limit or float(numbers.abs().max()) or 1.0
        drawn = axis.imshow(numbers.numpy(), cmap="bwr", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=title)
        figure.colorbar(drawn, ax=axis, shrink=0.8, format="%.1e")
    return figure


def size_grid(image: Tensor, *, columns: int = 5, rows: int = 4) -> Figure:
    """An image under grid lines, for annotating sizes: who counts the cells of a class, in fractions, has its size.

    All cells have the same area, to a fraction of a pixel: a class that covers n of them has the size
    ``n / (columns * rows)``. The source's tool offers 5 x 4 cells for small objects and 3 x 3 for large ones.

    Args:
        image: RGB in [0, 1], ``[3, H, W]``.
        columns: number of cells from left to right, from 1 to 1000.
        rows: number of cells from top to bottom, from 1 to 1000.

    Returns:
        A matplotlib figure that belongs to no window: ``figure.savefig(path)`` writes it.

    Raises:
        TypeError: ``image`` that is not floating point, ``columns`` or ``rows`` that are no int.
        ValueError: ``image`` that is not ``[3, H, W]``, is NaN or outside [0, 1] by more than 1e-3, ``columns`` or
            ``rows`` outside 1 to 1000.
        ImportError: matplotlib is not installed.

    Source:
        *Approximate Size Targets Are Sufficient for Accurate Semantic Segmentation*, sec. 3.4, annotation tool.

    Example:
        >>> figure = size_grid(torch.rand(3, 375, 500), columns=3, rows=3)
        >>> figure.axes[0].get_xlabel()
        '9 cells of 11.1% each'
    """
    _check_drawn("image", image)
    height, width = image.shape[1:]
    for name, count in (("columns", columns), ("rows", rows)):
        check_int(name, count)
        check_number(name, count, least=1, most=_MOST_CELLS)
    figure = _figure(8, 8 * height / width)
    axis = figure.subplots()
    _show(axis, image)
    # Pixels are drawn around their centres: the image begins at -0.5. White on a wider black line shows everywhere.
    across = [width * column / columns - 0.5 for column in range(1, columns)]
    down = [height * row / rows - 0.5 for row in range(1, rows)]
    for colour, thickness in (("black", 3), ("white", 1)):
        axis.vlines(across, -0.5, height - 0.5, colors=colour, linewidths=thickness)
        axis.hlines(down, -0.5, width - 0.5, colors=colour, linewidths=thickness)
    axis.set_xlabel(f"{columns * rows} cells of {100 / (columns * rows):.3g}% each")
    return figure


def slices(
    volume: Tensor,
    maps: Mapping[str, Tensor] | None = None,
    *,
    at: Sequence[int] | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    alpha: float = 0.5,
) -> Figure:
    """Three orthogonal slices of a volume: a row of them for the volume itself, then one for each map over it.

    All three go through one voxel, which thin lines mark. The first voxel of a slice is its upper left corner.

    Args:
        volume: grey values or RGB in [0, 1], ``[C, D, H, W]`` with C = 1 or 3.
        maps: by their titles, floating-point maps in [0, 1] of any resolution, ``[d, h, w]``, which are resized to the
            volume (trilinear), or labels, as for :func:`overlay`, ``[D, H, W]``.
        at: the voxel ``(z, y, x)``; the middle one if None.
        spacing: physical size of a voxel along z, y and x, in any unit, from 1e-4 to 1e4.
        alpha: opacity of the colours, in [0, 1].

    Returns:
        A matplotlib figure that belongs to no window: ``figure.savefig(path)`` writes it. Its axes lie row by row: the
        planes of constant z, y and x.

    Raises:
        TypeError: ``volume`` that is not floating point, ``maps`` that are no mapping or no tensors of real numbers,
            ``at`` that are no ints, ``spacing`` or ``alpha`` that are no numbers.
        ValueError: shapes or devices that do not fit, a volume or map outside [0, 1] by more than 1e-3 or NaN, labels
            outside 0 to 255, a voxel outside the volume, ``spacing`` outside 1e-4 to 1e4, ``alpha`` outside [0, 1].
        ImportError: matplotlib is not installed.

    Example:
        >>> figure = slices(torch.rand(1, 8, 16, 12), {"CAM": torch.rand(2, 4, 3)}, at=(2, 7, 6), spacing=(3, 1, 1))
        >>> [axes.get_title() for axes in figure.axes]
        ['z = 2', 'y = 7', 'x = 6', '', '', '']
    """
    _check_volume("volume", volume)
    if maps is not None and not isinstance(maps, Mapping):
        raise TypeError(f"maps: expected maps or labels by their titles, got {type(maps).__name__}")
    size = volume.shape[1:]
    voxel = [length // 2 for length in size] if at is None else _three("at", at)
    for place, length in zip(voxel, size, strict=True):
        check_int("at", place)
        if not 0 <= place < length:
            raise ValueError(f"at: expected a voxel of {shape_text(size)}, got {tuple(voxel)} (see volume)")
    for step in _three("spacing", spacing):
        check_number("spacing", step, least=_SMALLEST_STEP, most=1 / _SMALLEST_STEP)
    check_number("alpha", alpha, least=0, most=1)
    colours = volume.expand(3, *size)
    rows = {"volume": colours} | {
        title: _coloured(f"maps[{title!r}]", values, colours, alpha) for title, values in (maps or {}).items()
    }
    deep, high, wide = (length * step for length, step in zip(size, spacing, strict=True))
    widths, height = [wide, wide, high], max(deep, high)
    figure = _figure(8, len(rows) * (min(7.5 * height / sum(widths), 8) + 0.3))
    grid = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"width_ratios": widths})
    for axes, (title, picture) in zip(grid, rows.items(), strict=True):
        for number, axis in enumerate(axes):
            down, across = [other for other in range(3) if other != number]
            _show(axis, picture.select(number + 1, int(voxel[number])))
            axis.set_aspect(spacing[down] / spacing[across])
            axis.axhline(voxel[down], color="white", linewidth=0.5, alpha=0.6)
            axis.axvline(voxel[across], color="white", linewidth=0.5, alpha=0.6)
        axes[0].set_ylabel(title)
    for axis, name, place in zip(grid[0], "zyx", voxel, strict=True):
        axis.set_title(f"{name} = {place}")
    return figure


def _three(name: str, values: object) -> Sequence[Any]:
    if not isinstance(values, Sequence) or len(values) != 3:
        raise TypeError(f"{name}: expected three numbers, along z, y and x, got {values!r}")
    return values


def _check_volume(name: str, volume: object) -> None:
    check_floating(name, volume)
    assert isinstance(volume, Tensor)
    if volume.dim() != 4 or volume.shape[0] not in (1, 3) or not volume.numel():
        raise ValueError(f"{name}: expected [1, D, H, W] or [3, D, H, W], got {shape_text(volume.shape)}")
    _check_unit(name, volume)
    check_has_values(name, volume)


def _check_image(name: str, image: object) -> None:
    check_floating(name, image)
    assert isinstance(image, Tensor)
    if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"{name}: expected [3, H, W], got {shape_text(image.shape)}")
    _check_unit(name, image)


def _check_drawn(name: str, image: object) -> None:
    _check_image(name, image)
    assert isinstance(image, Tensor)
    if image.is_meta:
        raise ValueError(f"{name}: expected values that can be drawn, got a tensor on the meta device")


def _check_several(name: str, several: object) -> None:
    """A batch, or a sequence; what is in it is checked later."""
    listed = several.dim() > 0 if isinstance(several, Tensor) else isinstance(several, Sequence)
    if not listed or isinstance(several, str):
        raise TypeError(f"{name}: expected a batch or a sequence of tensors, got {type(several).__name__}")


def _check_unit(name: str, values: Tensor) -> None:
    require(
        name,
        values,
        lambda: ((values >= -_SLACK) & (values <= 1 + _SLACK)).all(),
        lambda: f"expected values in [0, 1], got {values.min().item():.6g} to {values.max().item():.6g}",
    )


def _coloured(name: str, values: Tensor, image: Tensor, alpha: float) -> Tensor:
    """A map, or labels, the argument of this name, over an image."""
    is_map = _is_map(name, values, image)
    colours = _heat(name, values, image) if is_map else _palette(image)[_labels(name, values, image)].movedim(-1, 0)
    return torch.lerp(image.clamp(0, 1), colours, float(alpha))


def _is_map(name: str, values: object, image: Tensor) -> bool:
    """Whether these are the values of a map, and not labels."""
    check_real(name, values)
    assert isinstance(values, Tensor)
    if values.dim() != image.dim() - 1 or not values.numel():
        expected = "[H, W]" if image.dim() == 3 else "[D, H, W]"
        raise ValueError(f"{name}: expected {expected}, got {shape_text(values.shape)}")
    if values.device != image.device:
        raise ValueError(f"{name}: expected device {image.device}, that of image, got {values.device}")
    return values.is_floating_point()


def _heat(name: str, values: Tensor, image: Tensor) -> Tensor:
    """Jet: ramps of the three colours, each a quarter of the range after the other."""
    _check_unit(name, values)
    resized = resize_linear(values.to(image.dtype)[None, None], image.shape[1:])
    centres = image.new_tensor([3.0, 2.0, 1.0]).view(3, *[1] * values.dim())
    return (1.5 - (4 * resized[0] - centres).abs()).clamp(0, 1)


def _labels(name: str, values: Tensor, image: Tensor) -> Tensor:
    if values.shape != image.shape[1:]:
        raise ValueError(
            f"{name}: expected labels {shape_text(image.shape[1:])} to go with image {shape_text(image.shape)}, "
            f"got {shape_text(values.shape)}"
        )
    labels = values.long()
    require(
        name,
        labels,
        lambda: ((labels >= 0) & (labels <= 255)).all(),
        lambda: f"expected labels from 0 to 255, got {labels.min().item()} to {labels.max().item()}",
    )
    return labels


def _palette(like: Tensor) -> Tensor:
    """VOC's colours, ``[256, 3]``: red, green and blue take the bits of a label in turn, the lowest as 128."""
    labels, channels = torch.arange(256, device=like.device)[:, None], torch.arange(3, device=like.device)
    bits = [(labels >> (3 * turn + channels) & 1) << (7 - turn) for turn in range(3)]
    return sum(bits, torch.zeros_like(channels)).to(like.dtype) / 255


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: pyplot, with its global state and its choice of a window system, stays out of this."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib, or segprims[examples]") from error
    return Figure(figsize=(width, height), layout="constrained")


def _show(axis: Axes, image: Tensor) -> None:
    pixels = image.detach().float().cpu().clamp(0, 1).movedim(0, -1).numpy()
    axis.imshow(pixels, interpolation="nearest", origin="upper")
    axis.set(xticks=[], yticks=[])
