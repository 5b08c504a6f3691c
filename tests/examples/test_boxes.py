"""The example of boxes as a user runs it, on a tiny budget, and its parts: RoI pooling, measures, positions."""

import re
from pathlib import Path

import pytest
import torch
from boxes import CLASSES, Config, Quality, make_masks, miou, table, train_network
from data.sample import VOID, Stacked
from data.scenes import Scenes
from engine import training
from matplotlib.image import imread
from parts.box_pictures import contour, relative_positions
from parts.detector import RoIAlign, faster_rcnn
from torch import Tensor
from torchvision.ops import roi_align

from segattr.bbam import bbam, detector_from_torchvision
from tests.run_example import run_example

OPTIONS = ("--labelled", 2, "--detector-steps", 2, "--bbam-steps", 2, "--steps", 2, "--scenes", 8, "--device", "cpu")


def sampled(maps: Tensor, box: Tensor, size: int, samples: int) -> Tensor:
    """Features of one box in pixels of the maps ``[C, h, w]``, point by point."""
    x1, y1, x2, y2 = box.tolist()
    result = torch.zeros(len(maps), size, size, dtype=maps.dtype)
    for row in range(size * samples):
        for column in range(size * samples):
            y, x = (
                min(max(start + (i + 0.5) * max(end - start, 1) / (size * samples), 0), side - 1)
                for start, end, i, side in ((y1, y2, row, maps.shape[1]), (x1, x2, column, maps.shape[2]))
            )
            top, left = int(y), int(x)
            for near_y, weight_y in ((top, 1 - y + top), (top + 1, y - top)):
                for near_x, weight_x in ((left, 1 - x + left), (left + 1, x - left)):
                    if weight_y * weight_x:
                        value = maps[:, near_y, near_x] * weight_y * weight_x / samples**2
                        result[:, row // samples, column // samples] += value
    return result


def test_roi_features_are_means_of_bilinear_samples() -> None:
    maps = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = [
        torch.tensor([[3.0, 4, 40, 30], [0, 0, 48, 32], [10, 20, 10.5, 20.1]], dtype=torch.float64),
        torch.tensor([[44.0, 28, 48, 32]], dtype=torch.float64),
    ]
    found = RoIAlign(5, samples=2)({"0": maps}, boxes, [(32, 48)] * 2)
    expected = [sampled(level, box / 4, 5, 2) for level, own in zip(maps, boxes, strict=True) for box in own]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_roi_features_are_those_of_torchvision() -> None:
    maps = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([[3.0, 4, 40, 30], [0, 0, 48, 32], [10, 20, 10.5, 20.1]])]
    with torch.compiler.set_stance("force_eager"):
        expected = roi_align(maps, boxes, 5, spatial_scale=0.25, sampling_ratio=2)
    torch.testing.assert_close(RoIAlign(5)({"0": maps}, boxes, [(32, 48)]), expected, rtol=0, atol=1e-5)


def test_the_detector_learns_from_boxes_and_has_bbams() -> None:
    training.seed_everything(0)
    model, scene = faster_rcnn(48, len(CLASSES)), Scenes("train", 1, size=48)[0]
    losses = model([scene.image], [{"boxes": scene.boxes, "labels": scene.box_labels}])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    proposals = list(scene.boxes[:, None])
    found = bbam(
        detector_from_torchvision(model),
        scene.image,
        scene.boxes,
        scene.box_labels,
        proposals=proposals,
        steps=2,
        stride=4,
    )
    assert found.shape == scene.instances.shape
    assert (found > 0).flatten(1).any(1).all()


def test_masks_are_made_of_each_kind_of_map_and_filled_boxes_are_filled() -> None:
    scenes = [scene for scene in Scenes("train", 2, size=32) if len(scene.boxes)]
    masks = make_masks({"both heads": [scene.instances.float() for scene in scenes]}, scenes)
    assert list(masks) == ["boxes filled", "both heads", "boxes filled + CRF", "both heads + CRF"]
    for scene, filled in zip(scenes, masks["boxes filled"], strict=True):
        x1, y1, x2, y2 = scene.boxes.T
        assert set(filled.unique().tolist()) == {0, 1}
        assert filled.sum((1, 2)).tolist() == ((x2 - x1) * (y2 - y1)).tolist()


@pytest.mark.slow
def test_growing_finds_more_of_an_object_than_its_seeds(tmp_path: Path) -> None:
    labels = (torch.arange(48) >= 24).long().expand(4, 48, 48)  # left and right half
    image = labels[:, None].expand(-1, 3, -1, -1).float()  # black and white: soon a network is sure
    seeds = torch.where(torch.arange(48) % 24 == 12, labels, VOID)
    config = Config(size=48, steps=60, batch_size=4, device="cpu", out=tmp_path)

    def trained(targets: Tensor, grow: bool) -> float:
        images, test = (Stacked(CLASSES, image, values) for values in (targets, labels))
        return train_network(images, test, "halves", config, grow=grow)

    assert trained(seeds, grow=True) > trained(seeds, grow=False)
    assert trained(labels, grow=True) == pytest.approx(trained(labels, grow=False)), "nothing left to grow"


def test_miou_is_that_of_the_pixels_that_have_labels() -> None:
    truth = torch.tensor([[[0, 0, 1, 1, 2]]])
    assert miou(truth, truth) == 1
    assert miou(torch.tensor([[[0, 1, 1, 255, 2]]]), truth) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)


def test_relative_positions_are_0_at_the_centroid_and_of_length_1_on_the_contour() -> None:
    mask = torch.zeros(11, 11, dtype=torch.bool)
    mask[1:10, 1:10] = True
    assert contour(mask).sum() == 32
    assert not contour(mask)[2:9, 2:9].any()
    chosen = torch.zeros_like(mask)
    chosen[5, 5] = chosen[5, 9] = chosen[1, 5] = chosen[5, 7] = True
    found = {tuple(round(value, 4) for value in point) for point in relative_positions(chosen, mask).tolist()}
    assert found == {(0, 0), (1, 0), (0, -1), (0.5, 0)}, "x to the right, y down"


def test_relative_positions_of_an_object_of_one_pixel_and_of_no_pixels() -> None:
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1, 1] = True
    assert relative_positions(mask, mask).tolist() == [[0, 0]]
    assert relative_positions(torch.zeros_like(mask), mask).shape == (0, 2)


def test_the_table_has_means_and_spreads() -> None:
    runs = [{"a": Quality(1.0, 2, 3, 4, 5)}, {"a": Quality(3.0, 2, 3, 4, 5)}]
    cells = ["a", "2.0", "±1.4", "2.0", "±0.0", "3.0", "±0.0", "4.0", "±0.0", "5.0", "±0.0", "-"]
    assert table(runs).splitlines()[1].split() == cells
    assert table(runs[:1]).splitlines()[1].split() == ["a", "1.0", "2.0", "3.0", "4.0", "5.0", "-"]


def test_more_labelled_scenes_than_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--labelled: expected at most 3, the number of --scenes, got 4"):
        Config(scenes=3, labelled=4)


@pytest.mark.slow
def test_it_prints_a_table_and_draws_pictures(tmp_path: Path) -> None:
    done = run_example("boxes", *OPTIONS, "--repeats", 2, "--split", "final", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    cell = r"\d+\.\d ±\d+\.\d|-"
    rows = re.findall(rf"^(\S.*?)  +(?:(?:{cell}) +){{4}}({cell}) +({cell})$", done.stdout, re.M)
    kinds = ("boxes filled", "box head", "class head", "both heads")
    assert [name for name, *_ in rows] == [*kinds, *(f"{kind} + CRF" for kind in kinds), "true masks"]
    trained = {name for name, network, _ in rows if network != "-"}
    assert trained == {"boxes filled", "boxes filled + CRF", "both heads + CRF", "true masks"}
    assert [name for name, _, grown in rows if grown != "-"] == ["both heads + CRF"]
    for name in ("boxes", "positions"):
        assert imread(tmp_path / f"{name}.png").std() > 0


@pytest.mark.slow
def test_it_goes_on_from_its_checkpoints_to_the_same_table(tmp_path: Path) -> None:
    first, again = (
        run_example("boxes", *OPTIONS, "--labelled", 1, "--out", tmp_path, *more) for more in ((), ("--resume",))
    )
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert first.stdout == again.stdout
