"""Where a network looks in photographs: maps of its classes by each method, and masks made of them; nothing trains."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from data.files import read_image
from data.scenes import bundled_file
from engine.command import check_least, output_folder, run
from engine.processes import Device, pick_device
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from parts.pretrained import CLASSES, Pretrained, pretrained
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from segattr import Classifier, advcam, cam, grad_cam, multiscale, normalize, rib, split
from segattr.lrp import unroll
from segattr.plot import overlay
from segattr.refine import dense_crf


@dataclass(frozen=True)
class Config:
    """Draws where EfficientNet-Lite0 sees classes in photographs: maps of each method, and masks."""

    image: tuple[Path, ...] = ()
    """Photographs, JPEG or PNG; without any, those that scikit-image and scikit-learn bring along."""
    classes: tuple[str, ...] = ()
    """Names of ImageNet's classes, in quotes, a row of the picture each: tabby "tiger cat"."""
    best: int = 1
    """Classes of each photograph of your own where --classes names none: those of the highest probability."""
    size: int = 224
    """Shorter side in pixels in which the network sees a photograph, to the nearest multiple of 32."""
    device: Device = "auto"
    """Where to compute; auto is the GPU when there is one."""
    out: Path = Path("runs/photographs")
    """Folder of the picture."""

    def __post_init__(self) -> None:
        check_least(self, best=1, size=32)
        for name in self.classes:
            if name not in CLASSES:
                word = name or "cat"
                named = [known for known in CLASSES if word in known.split()]
                close = named or difflib.get_close_matches(word, CLASSES, 3, cutoff=0)
                raise ValueError(f"--classes: expected names such as {', '.join(close[:3])}, got {name!r}")


BUNDLED = {  # photographs, and classes that a person sees in them
    "chelsea.png": ("Egyptian cat",),
    "coffee.png": ("espresso",),
    "motorcycle_left.png": ("moped",),
    "flower.jpg": ("daisy",),
    "china.jpg": ("palace", "lakeside"),
}
CELL = 32  # pixels between the locations of the last feature map

# Settings for EfficientNet-Lite0, chosen by looking at the bundled photographs.
GRAD_CAM: dict[str, Any] = {"layer": ("features.10", "features.17"), "pool": False}  # the last of strides 16 and 32
ADVCAM: dict[str, Any] = {"steps": 27, "step_size": 0.04}
RIB: dict[str, Any] = {"steps": 10, "lr": 5e-5, "threshold": 0.8}
FROZEN = 11  # layers, up to stride 16, that RIB leaves as they are
LRP: dict[str, dict[str, Any]] = {"LRP-0": {}, "LRP ε, z+": {"rule": "epsilon_plus"}}  # rules, a column each
CRF: dict[str, Any] = {"weight": 4.0, "sigma_xy": 40.0}
BACKGROUND = 0.45  # the score of the background, where maps have at most 1

Method = Callable[[Tensor, list[int]], Tensor]  # image [1, 3, H, W] and n classes to maps [1, n, h, w]


class Shown(NamedTuple):
    image: Tensor  # [3, H, W]
    titles: list[str]  # of the n classes: their names and probabilities
    maps: dict[str, Tensor]  # [n, h, w], by method
    labels: Tensor  # [H, W]: 0 for the background, then the classes in turn


def bundled() -> list[Path]:
    return [bundled_file(name) for name in BUNDLED]


def load(path: Path, size: int, device: torch.device) -> Tensor:
    """A photograph ``[1, 3, H, W]`` of so many pixels on its shorter side, of whole cells."""
    image = read_image(path).as_subclass(Tensor)[None]
    sides = [max(1, round(side * size / min(image.shape[2:]) / CELL)) * CELL for side in image.shape[2:]]
    return F.interpolate(image, sides, mode="bilinear", antialias=True).clamp(0, 1).to(device)


def make_methods(network: Pretrained, size: int) -> dict[str, Method]:
    device = network.mean.device
    clf, inner = split(network), nn.Sequential(network.features, network.head).eval()
    start, rest = network.features[:FROZEN], Classifier(network.features[FROZEN:], network.head).eval()
    with torch.no_grad():
        squares = [F.interpolate(load(path, size, device), (size, size), mode="bilinear") for path in bundled()]
        others = start(network.normalized(torch.cat(squares)))
        tags = torch.stack([multi_hot([CLASSES.index(name) for name in names], device) for names in BUNDLED.values()])

    def companions(own: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        strangers = (tags * own).sum(1) == 0
        while True:
            yield others[strangers], tags[strangers]

    def fine_tuned(image: Tensor, classes: list[int]) -> Tensor:
        with torch.no_grad():
            features = start(network.normalized(image))
        own = multi_hot(classes, device)[None]
        return cast(Tensor, rib(rest, features, own, companions=companions, classes=classes, **RIB))

    def propagated(unrolled: nn.Module) -> Method:
        def relevance(image: Tensor, classes: list[int]) -> Tensor:
            with torch.no_grad():
                heatmaps = gaussian_blur(unrolled(network.normalized(image), classes)[1], 19, 3)
            return heatmaps.minimum(heatmaps.flatten(2).quantile(0.995, 2)[:, :, None, None])  # few pixels have most

        return relevance

    return {
        "CAM": lambda image, classes: cam(clf, image, classes),
        "Grad-CAM": lambda image, classes: grad_cam(network, image, classes, **GRAD_CAM),
        "AdvCAM": lambda image, classes: advcam(clf, image, classes, **ADVCAM),
        "RIB": fine_tuned,
        **{name: propagated(unroll(inner, **rule)) for name, rule in LRP.items()},
        "multi-scale CAM": lambda image, classes: cast(Tensor, multiscale(lambda x: cam(clf, x, classes), image)),
    }


def multi_hot(classes: list[int], device: torch.device) -> Tensor:
    tags = torch.zeros(len(CLASSES), device=device)
    tags[classes] = 1
    return tags


def positive(maps: Tensor) -> Tensor:
    """Positive parts of maps, each over its maximum."""
    return normalize(maps.detach(), "relu_max")


def refined(maps: dict[str, Tensor], image: Tensor) -> Tensor:
    """Labels ``[H, W]`` by the dense CRF, of the mean of AdvCAM's and multi-scale maps."""
    sides = image.shape[2:]
    resized = [F.interpolate(maps[name][None], sides, mode="bilinear") for name in ("AdvCAM", "multi-scale CAM")]
    scores = F.pad(positive(torch.stack(resized).mean(0)), (0, 0, 0, 0, 1, 0), value=BACKGROUND)
    return dense_crf(scores / scores.sum(1, keepdim=True), image, **CRF).argmax(1)[0]


def look(
    network: Pretrained, methods: dict[str, Method], image: Tensor, name: str, config: Config, bar: "tqdm[Any]"
) -> Shown:
    """Maps of a photograph ``[1, 3, H, W]`` of this name: of the classes of the command line, or the best ones."""
    with torch.no_grad():
        probabilities = network(image).softmax(1)[0]
    best = [CLASSES[c] for c in probabilities.topk(config.best).indices.tolist()]
    classes = [CLASSES.index(n) for n in config.classes or (best if config.image else BUNDLED[name])]
    maps = {}
    for title, method in methods.items():
        bar.set_postfix_str(f"{name}, {title}")
        maps[title] = positive(method(image, classes))[0]
        bar.update()
    titles = [f"{CLASSES[c]}\n{probabilities[c]:.1%}" for c in classes]
    return Shown(image[0].cpu(), titles, {k: m.cpu() for k, m in maps.items()}, refined(maps, image).cpu())


def picture(photographs: Sequence[Shown], path: Path) -> None:
    """Draws a row for each class: the image, each method's map over it, and what the mask leaves of the image."""
    rows = [(shown, n) for shown in photographs for n in range(len(shown.titles))]
    titles = ["image", *photographs[0].maps, "mask by dense CRF"]
    ratios = [shown.image.shape[1] / shown.image.shape[2] for shown, _ in rows]
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figure = Figure(figsize=(2 * len(titles), 0.5 + 2 * sum(ratios)), layout=layout)
    grid = figure.subplots(len(rows), len(titles), squeeze=False, gridspec_kw={"height_ratios": ratios})
    for axes, (shown, n) in zip(grid, rows, strict=True):
        mask = shown.labels == n + 1
        rest = torch.lerp(shown.image.mean(0), torch.tensor(1.0), 0.8)
        maps = [overlay(shown.image, of_method[n]) for of_method in shown.maps.values()]
        cells = [shown.image, *maps, torch.where(mask, shown.image, rest)]
        for axis, cell in zip(axes, cells, strict=True):
            axis.imshow(cell.clamp(0, 1).movedim(0, -1).numpy())
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(shown.titles[n], fontsize=12)
        axes[-1].contour(mask.numpy(), [0.5], colors="red", linewidths=1)
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title)
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    folder = output_folder(config.out)
    device, paths = pick_device(config.device), config.image or bundled()
    images = [load(path, config.size, device) for path in paths]
    network = pretrained("efficientnet_lite0").to(device).requires_grad_(False)
    methods, seen = make_methods(network, config.size), []
    with tqdm(total=len(paths) * len(methods), unit="map") as bar:
        for path, image in zip(paths, images, strict=True):
            seen.append(look(network, methods, image, path.name, config, bar))
    for path, shown in zip(paths, seen, strict=True):
        print(f"{path.name}: {', '.join(shown.titles)}".replace("\n", " "))
    picture(seen, folder / "photographs.png")
    print(f"picture: {folder / 'photographs.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # a single small image is soon done: where cores are shared, threads wait for each other
    run(main, Config)
