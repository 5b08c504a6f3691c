"""What gives another result elsewhere without a word: it is refused here, and the error says what to do."""

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import segattr
import segloss
from segattr import refine
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
    run(whole * 1.02 - 0.01)  # as interpolation and rounding leave images
    for image in (whole * 1.04 - 0.02, whole + 0.02, whole - 0.02):
        with pytest.raises(ValueError, match="image: expected RGB in"):
            run(image)


@pytest.mark.parametrize("run", IN_COLOUR.values(), ids=IN_COLOUR)
def test_a_width_of_ones_own_and_other_channels_may_be_in_any_unit(run: Run) -> None:
    for settings in (BYTES, {"sigma_rgb": 15 / 255}, {"sigma_rgb": 5 / 255}):
        run(255 * IMAGE, **settings)
    run(255 * IMAGE[:, :1])
    run(255 * torch.cat([IMAGE, IMAGE], 1))


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
