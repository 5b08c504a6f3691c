"""Pictures of maps and masks over photographs, from the best to the worst."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from data.sample import VOID, Images, first
from engine import storage
from matplotlib.figure import Figure
from parts.report import draw_rows
from parts.tag_classifier import Part
from pseudo_labels import overlays
from torch import Tensor

SHOWN = 7


def ranked(of_images: Tensor) -> list[int]:
    """Some images by their counts ``[N, 6, K]``, at even steps from the best mIoU to the worst."""
    both, either = of_images[:, 0].float(), of_images[:, 1].float()
    order = torch.where(either > 0, both / either, torch.nan).nanmean(1).argsort(descending=True)
    return [int(order[i]) for i in torch.linspace(0, len(order) - 1, min(SHOWN, len(order))).long()]


def draw(images: Images, shown: Sequence[int], names: Mapping[str, float | None], path: Path) -> None:
    """Writes a JPEG file: photographs, truth, and below them maps, or the masks that a threshold makes of them.

    Args:
        images: with the maps, or masks, under their names.
        shown: indices of some.
        names: of what is drawn, with thresholds: maps without one, and masks, are drawn as they are.
        path: of the file.
    """
    batch = first(Part(images, shown), len(shown))
    rows = {"image": batch["image"].movedim(1, -1), "truth": batch["labels"]}
    for name, threshold in names.items():
        title = name.replace(" + ", "\n+ ").replace(", ", ",\n")
        if threshold is not None:
            scores = batch[name]
            masks = torch.cat([torch.full_like(scores[:, :1], threshold), scores], 1).argmax(1)
            rows[f"{title}\n> {threshold:.2f}"] = masks.where(batch["valid"].as_subclass(Tensor), VOID)
        else:
            rows[title] = overlays(batch, name) if batch[name].is_floating_point() else batch[name]
    figure = Figure(figsize=(1.15 * len(shown), 1.1 * len(rows)), layout="constrained")
    draw_rows(figure, rows)
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", dpi=80, pil_kwargs={"quality": 70})
    storage.write(path, file.getvalue())
    print(f"picture: {path}")
