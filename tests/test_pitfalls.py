"""What gives another result elsewhere without a word: it is refused here, and the error says what to do."""

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segattr
import segloss
from segattr import lrp, metrics, refine
from segloss.bilateral import PreparedFilter

LOGITS, IMAGE = torch.randn(2, 3, 8, 6), torch.rand(2, 3, 8, 6)
BOXES = torch.tensor([[1, 1, 5, 6]])
BYTES = {"sigma_rgb": 15.0}

Run = Callable[..., Any]  # of an image and settings

IN_COLOUR: dict[str, Run] = {
    "bilateral_error": lambda image, **settings: segloss.bilateral_error(LOGITS, image, LOGITS, **settings),
    "bilateral_filter": lambda image, **settings: segloss.bilateral_filter(LOGITS, image, **settings),
    "dense_crf": lambda image, **settings: refine.dense_crf(LOGITS.softmax(1), image, **settings),
    "grid_potts": lambda image, **settings: segloss.grid_potts(LOGITS, image, **settings),
    "potts_crf": lambda image, **settings: segloss.potts_crf(LOGITS, image, **settings),
    "window_mass": lambda image, **settings: segloss.window_mass(image, **settings),
    "windowed_potts": lambda image, **settings: segloss.windowed_potts(LOGITS, image, **settings),
    "GridPotts": lambda image, **settings: segloss.GridPotts(**settings)(LOGITS, image),
    "PottsCRF": lambda image, **settings: segloss.PottsCRF(**settings)(LOGITS, image),
    "WindowedPotts": lambda image, **settings: segloss.WindowedPotts(**settings)(LOGITS, image),
    "PreparedFilter": lambda image, **settings: PreparedFilter(image, **settings)(LOGITS),
}


def test_every_function_with_a_default_width_in_colour_is_here() -> None:
    public = [(name, getattr(package, name)) for package in (segloss, segattr, refine) for name in package.__all__]
    named = set()
    for name, item in public:
        runs = inspect.isfunction(item) or (inspect.isclass(item) and issubclass(item, nn.Module))
        if runs and "sigma_rgb" in inspect.signature(item).parameters:
            named.add(name)
    assert named | {"PreparedFilter"} == set(IN_COLOUR)


@pytest.mark.parametrize("run", IN_COLOUR.values(), ids=IN_COLOUR)
def test_the_default_width_refuses_images_of_another_unit(run: Run) -> None:
    whole = IMAGE.clamp(0, 0.9)
    whole[0, 0, 0, 0], whole[1, 2, 3, 4] = 0, 1
    with pytest.raises(ValueError, match=r"image: expected RGB in \[0, 1\], .* got values from 0 to 255 .*denormalize"):
        run(255 * whole)
    with pytest.raises(ValueError, match=r"sigma_rgb of (5|15)/255, got values from -2 to 2.444 "):
        run((whole - 0.45) / 0.225)
    run(whole * 1.016 - 0.008)  # as interpolation and rounding leave images
    for image in (whole * 1.04 - 0.02, whole + 0.02, whole - 0.02):
        with pytest.raises(ValueError, match="image: expected RGB in"):
            run(image)


@pytest.mark.parametrize("run", IN_COLOUR.values(), ids=IN_COLOUR)
def test_a_width_of_ones_own_and_other_channels_may_be_in_any_unit(run: Run) -> None:
    torch.testing.assert_close(run(255 * IMAGE, **BYTES), run(IMAGE, sigma_rgb=15 / 255), rtol=1e-3, atol=1e-5)
    for sigma in (15 / 255, 5 / 255):
        assert run(255 * IMAGE, sigma_rgb=sigma).isfinite().all()
    for image in (255 * IMAGE[:, :1], 255 * torch.cat([IMAGE, IMAGE], 1)):
        assert run(image).isfinite().all()


def test_the_default_is_that_of_the_page() -> None:
    for name, run in IN_COLOUR.items():
        sigma = 5 / 255 if name == "dense_crf" else 15 / 255
        torch.testing.assert_close(run(IMAGE), run(IMAGE, sigma_rgb=sigma), rtol=0, atol=0)


def test_a_module_that_was_saved_still_refuses() -> None:
    with pytest.raises(ValueError, match="image: expected RGB in"):
        pickle.loads(pickle.dumps(segloss.PottsCRF()))(LOGITS, 255 * IMAGE)


def test_instance_masks_refuse_with_their_own_crf_only() -> None:
    bbams = torch.rand(1, 8, 6)
    with pytest.raises(
        ValueError, match=r"^image: expected RGB in \[0, 1\], the unit of the default sigma_rgb of 3/255"
    ):
        refine.instance_masks(bbams, BOXES, 255 * IMAGE[0])
    refine.instance_masks(bbams, BOXES, 255 * IMAGE[0], crf={**refine.BBAM_CRF, "sigma_rgb": 3.0})
    refine.instance_masks(bbams, BOXES, IMAGE[0])


def test_graphs_do_not_look_at_the_image() -> None:
    compiled = torch.compile(segloss.grid_potts, backend="eager", fullgraph=True)
    assert compiled(LOGITS, 255 * IMAGE).isfinite()


def sized(*size: int) -> dict[str, Any]:
    """What goes with logits of 3 classes at this size."""
    labels = torch.randint(3, (2, *size))
    masks = labels[:, None] == torch.arange(3).view(3, 1, 1)
    return {
        "image": torch.rand(2, 3, *size),
        "labels": labels,
        "valid": labels > 0,
        "masks": masks,
        "seeds": labels,
        "refined": masks / 1,
        "distances": masks / 1,
    }


TAGS = torch.ones(2, 3)
OF_MAPS: dict[str, tuple[str, str, Run]] = {
    "potts_crf": ("logits", "image", lambda maps, other: segloss.potts_crf(maps, other["image"])),
    "grid_potts": ("logits", "image", lambda maps, other: segloss.grid_potts(maps, other["image"])),
    "windowed_potts": ("logits", "image", lambda maps, other: segloss.windowed_potts(maps, other["image"])),
    "partial_cross_entropy": (
        "logits",
        "labels",
        lambda maps, other: segloss.partial_cross_entropy(maps, other["labels"]),
    ),
    "boundary_constraint": (
        "logits",
        "refined",
        lambda maps, other: segloss.boundary_constraint(maps, other["refined"]),
    ),
    "boundary_loss": ("logits", "distances", lambda maps, other: segloss.boundary_loss(maps, other["distances"])),
    "confidence_gate": ("logits", "labels", lambda maps, other: segloss.confidence_gate(maps, other["labels"])),
    "size_kl": ("logits", "valid", lambda maps, other: segloss.size_kl(maps, TAGS / 3, valid=other["valid"])),
    "dense_crf": ("probabilities", "image", lambda maps, other: refine.dense_crf(maps.softmax(1), other["image"])),
    "grow_seeds": ("probabilities", "seeds", lambda maps, other: refine.grow_seeds(other["seeds"], maps.softmax(1))),
    "best_threshold_miou": ("maps", "labels", lambda maps, other: metrics.best_threshold_miou(maps, other["labels"])),
    "pointing_game": ("maps", "masks", lambda maps, other: metrics.pointing_game(maps, other["masks"])),
    "heatmap_loss": ("heatmaps", "labels", lambda maps, other: lrp.heatmap_loss(maps, TAGS, other["labels"], TAGS)),
}


@pytest.mark.parametrize(("maps", "name", "run"), OF_MAPS.values(), ids=OF_MAPS)
def test_maps_of_another_resolution_are_told_the_line_that_resizes_them(maps: str, name: str, run: Run) -> None:
    coarse, others = torch.randn(2, 3, 4, 3), sized(16, 12)
    with pytest.raises(ValueError, match=f"^{name}: expected .* to go with {maps} ") as caught:
        run(coarse, others)
    line = str(caught.value).partition("for maps of this size: ")[2]
    scope = {"F": F, maps: coarse, name: others[name]}
    exec(line, scope)
    run(scope[maps], others)


def test_other_shapes_that_are_wrong_have_no_such_line() -> None:
    for image in (torch.rand(1, 3, 8, 6), torch.rand(1, 3, 16, 12), torch.rand(2, 3, 0, 6)):
        with pytest.raises(ValueError, match=r"to go with logits \[2, 3, 8, 6\], got \[\d, \d, \d+, \d+\]$"):
            segloss.potts_crf(LOGITS, image)
    with pytest.raises(ValueError, match=r"^labels: expected \[2, 8, 6\] to go with .*, got \[2, 1, 16, 12\]$"):
        segloss.partial_cross_entropy(LOGITS, torch.zeros(2, 1, 16, 12).long())


def test_labels_that_can_be_no_classes_are_named() -> None:
    grey = torch.tensor([0, 38, 75, 113, 52, 89, 14, 255])[torch.randint(8, (2, 8, 6))]  # VOC's colours, read as grey
    expected = r"^labels: expected classes 0 to 2 or 255 to ignore, got 14, 38, 52, 75 and 2 more \(see "
    with pytest.raises(ValueError, match=expected):
        segloss.partial_cross_entropy(LOGITS, grey)
    with pytest.raises(ValueError, match=expected):
        segloss.sizes_from_labels(grey, 3)
    with pytest.raises(ValueError, match=r"got 14, 38, 52, 75 and 2 more"):
        refine.grow_seeds(grey, LOGITS.softmax(1))
    with pytest.raises(ValueError, match=r"^masks: expected 0, 1 or 255 to ignore, got 2, 7 \("):
        refine.semantic_labels(torch.tensor([[[0, 7, 2, 1, 255]]]), torch.tensor([1]))
