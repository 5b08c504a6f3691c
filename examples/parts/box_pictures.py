"""Pictures of objects and of where the heads of a detector look: maps, masks, relative positions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from data.scenes import Scene
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from segattr.plot import map_grid

SHOWN = 5  # objects
HIGH = 0.9  # value of a BBAM, of its maximum


def contour(mask: Tensor) -> Tensor:
    """Pixels of a mask ``[H, W]`` with a neighbour outside it, or at the border of the image."""
    outside = F.pad(~mask, (1, 1, 1, 1), value=True)
    beside = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
    return mask & beside


def relative_positions(chosen: Tensor, mask: Tensor) -> Tensor:
    r"""Where pixels lie between the centroid of an object and its contour, ``[n, 2]``: the dissertation's fig. 5.6 (a).

    .. math:: R = \frac{r_1}{r_1 + r_2} (\cos \theta, \sin \theta)

    for the distances :math:`r_1` to the centroid, in the direction :math:`\theta`, and :math:`r_2` to the contour.

    Args:
        chosen: the pixels, bool, ``[H, W]``.
        mask: of the object, bool, ``[H, W]``, with at least one pixel.
    """
    pixels, edge, inside = (where.nonzero().float().flip(1) for where in (chosen, contour(mask), mask))
    away = pixels - inside.mean(0)
    near = away.norm(dim=1, keepdim=True)
    far = torch.cdist(pixels, edge).amin(1, keepdim=True)
    return away / (near + far).clamp(min=torch.finfo(near.dtype).tiny)


def high_positions(maps: Mapping[str, Sequence[Tensor]], scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Relative positions of the high values of BBAMs, and of all pixels of objects to compare them with."""
    masks, positions = torch.cat([scene.instances for scene in scenes]), {}
    for name in ("box head", "class head"):
        found = zip(torch.cat(list(maps[name])), masks, strict=True)
        positions[name] = torch.cat([relative_positions((m > 0) & (m >= HIGH * m.max()), mask) for m, mask in found])
    positions["all of the object"] = torch.cat([relative_positions(mask, mask) for mask in masks])
    return positions


def draw_objects(scenes: Sequence[Scene], found: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """The first objects: image with box, maps or masks ``[n, H, W]`` of each scene by their titles, and the truth."""
    owners = [scene for scene in scenes for _ in scene.boxes][:SHOWN]
    rows = {name: torch.cat(list(values))[: len(owners)] for name, values in found.items()}
    rows["truth"] = torch.cat([scene.instances for scene in scenes])[: len(owners)]
    figure = map_grid(torch.stack([scene.image for scene in owners]), rows)
    boxes = torch.cat([scene.boxes for scene in scenes])
    for axis, (x1, y1, x2, y2) in zip(figure.axes[:: 1 + len(rows)], boxes.tolist(), strict=False):
        axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor="yellow", linewidth=2))
    figure.savefig(path, dpi=60)


def draw_positions(positions: dict[str, Tensor], path: Path) -> None:
    """Relative positions of pixels, as in fig. 5.6 (b), and how far from the centroid they lie."""
    figure = Figure(figsize=(4 * (len(positions) + 1), 4), layout="constrained")
    *planes, last = figure.subplots(1, len(positions) + 1)
    for axis, (name, points) in zip(planes, positions.items(), strict=True):
        axis.plot(*points.T, ".", markersize=2, alpha=0.3)
        axis.set(title=name, xlim=(-1.05, 1.05), ylim=(1.05, -1.05), aspect="equal")
        shares = torch.full((len(points),), 1 / max(1, len(points)))
        last.hist(points.norm(dim=1), bins=20, range=(0, 1), weights=shares, histtype="step", label=name)
    last.set(xlabel="0: centroid, 1: contour", ylabel="share of the pixels")
    last.legend(loc="upper left")
    figure.savefig(path, dpi=80)
