"""The rules of LRP beside each other: signed heatmaps of a pretrained network for one class of a photograph."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine.command import check_least, output_folder, run
from engine.processes import Device, pick_device
from parts.pretrained import CLASSES, pretrained
from photographs import bundled, load
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from segattr.lrp import unroll
from segattr.lrp.composites import epsilon_gamma_box
from segattr.plot import heatmap


@dataclass(frozen=True)
class Config:
    """Draws what each rule of LRP says of one class of a photograph, with EfficientNet-Lite0."""

    image: Path | None = None
    """A photograph, JPEG or PNG; without it, the cat that scikit-image brings along."""
    name: str = ""
    """Name of ImageNet's class; the best one if empty."""
    size: int = 224
    """Shorter side in pixels in which the network sees the photograph, to the nearest multiple of 32."""
    blur: float = 1.0
    """Standard deviation in pixels of the Gaussian that heatmaps are blurred by."""
    device: Device = "auto"
    """Where to compute; auto is the GPU when there is one."""
    out: Path = Path("runs/lrp_rules")
    """Folder of the picture."""

    def __post_init__(self) -> None:
        check_least(self, size=32)
        if not self.blur > 0:
            raise ValueError(f"--blur: expected a number above 0, got {self.blur}")
        if self.name and self.name not in CLASSES:
            raise ValueError(f"--name: expected a name of ImageNet's classes such as {CLASSES[285]}, got {self.name!r}")


def rules(low: torch.Tensor, high: torch.Tensor) -> dict[str, Any]:
    """By title, what ``unroll`` takes; the bounds are those of normalised pixels."""
    return {
        "LRP-0": {},
        "epsilon 0.5": {"epsilon": 0.5},
        "gamma 0.25": {"rule": "gamma"},
        "epsilon_plus": {"rule": "epsilon_plus"},
        "epsilon_plus_flat": {"rule": "epsilon_plus_flat"},
        "epsilon_alpha2_beta1": {"rule": "epsilon_alpha2_beta1"},
        "epsilon_gamma_box": {"rule": epsilon_gamma_box(low, high)},
    }


def main(config: Config) -> None:
    folder = output_folder(config.out)
    device = pick_device(config.device)
    image = load(config.image or bundled()[0], config.size, device)
    network = pretrained("efficientnet_lite0").to(device).requires_grad_(False)
    inner, pixels = nn.Sequential(network.features, network.head).eval(), network.normalized(image)
    low, high = (network.normalized(image.new_full((1, 3, 1, 1), value))[0] for value in (0.0, 1.0))
    with torch.no_grad():
        scores = inner(pixels)
        number = CLASSES.index(config.name) if config.name else int(scores.argmax())
        print(f"{CLASSES[number]}: score {scores[0, number]:.2f}, probability {scores.softmax(1)[0, number]:.1%}")
        maps, width = {}, 2 * round(3 * config.blur) + 1
        for title, options in tqdm(rules(low, high).items(), unit="rule"):
            heat = unroll(inner, **options)(pixels, [number])[1]
            maps[f"{title}\nsum {float(heat.sum()):.2g}"] = gaussian_blur(heat, width, config.blur)[0, 0]
    heatmap(image[0], maps).savefig(folder / "lrp_rules.png", dpi=100)
    print(f"picture: {folder / 'lrp_rules.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in photographs.py
    run(main, Config)
