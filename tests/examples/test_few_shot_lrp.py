"""The comparison with few masks as a user runs it, on a tiny budget."""

import copy
import re
from pathlib import Path

import few_shot_lrp
import numpy as np
import pytest
import torch
from data.augment import Fit
from data.sample import VOID, Stacked
from data.scenes import CLASSES, Scenes, stack
from data.write_voc import write_voc
from engine.command import parse
from few_shot_lrp import METHODS, FewMasks, Hide
from matplotlib.image import imread
from torch import Tensor, nn
from torchvision import models

from segattr.lrp import unroll
from tests.run_example import run_example
from tests.tiny_photographs import write_tiny_photographs

TINY = ("--steps", "3", "--pretrain-steps", "2", "--scenes", "24", "--size", "32", "--device", "cpu")


@pytest.fixture(scope="module")
def images() -> Stacked:
    scenes = stack(Scenes("train", 12, size=32))
    return Stacked(CLASSES, scenes.image, scenes.labels)


@pytest.mark.slow
def test_it_compares_the_networks_and_draws_their_masks(tmp_path: Path) -> None:
    done = run_example("few_shot_lrp", *TINY, "--labelled", "1", "0", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\D+?) +(\d\.\d{3}) +(\d\.\d{3})$", done.stdout, re.M)
    trained_on_tags = [name for name, method in METHODS.items() if method.tags]
    assert [row[0] for row in rows] == [*METHODS, *trained_on_tags]
    assert re.search(r"F1 \(classifier: \d\.\d{3}\) +1 per class +all\n", done.stdout)
    assert imread(tmp_path / "few_shot_lrp.png").shape[2] == 4


@pytest.mark.slow
def test_it_trains_a_resnet_on_a_folder_in_the_layout_of_voc_with_spreads(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {"train": Scenes("train", 24, size=40), "val": Scenes("val", 8, size=40, void_width=2)})
    options = ("--data", "voc", "--root", tmp_path / "voc", "--network", "small_resnet", "--repeats", "2")
    done = run_example("few_shot_lrp", *TINY, *options, "--labelled", "1", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\d\.\d{3} ±\d\.\d{3}$", done.stdout, re.M)) == len(METHODS) + 3


@pytest.mark.slow
def test_it_trains_a_network_for_photographs_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    write_tiny_photographs(tmp_path / "photographs")
    options = ("--data", "voc", "--root", tmp_path / "photographs", "--quick", "--weights", "none", "--labelled", "1")
    small = ("--size", "64", "--steps", "2", "--pretrain-steps", "2", "--batch-size", "4", "--device", "cpu")
    first = run_example("few_shot_lrp", *options, *small, "--out", tmp_path)
    assert first.returncode == 0, first.stderr
    picture = (tmp_path / "few_shot_lrp.png").read_bytes()
    (tmp_path / "checkpoints" / "U_Net_1_seed_0.pt").unlink()
    again = run_example("few_shot_lrp", *options, *small, "--out", tmp_path, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert (tmp_path / "few_shot_lrp.png").read_bytes() == picture, "what it showed before the stop, too"


def test_pretrained_features_learn_more_slowly_and_keep_their_statistics(tmp_path: Path) -> None:
    torch.save(models.squeezenet1_0().state_dict(), tmp_path / "weights.pt")
    config = few_shot_lrp.Config(network="squeezenet1_0", weights=str(tmp_path / "weights.pt"))
    model = few_shot_lrp.classifier(config, 4)
    assert not model.network[0].training  # type: ignore[index]
    assert model(torch.rand(2, 3, 64, 48)).shape == (2, 4)
    example = torch.rand(1, 3, 64, 64)
    for method in METHODS.values():
        unrolled = model.made_of(unroll(copy.deepcopy(model.network), example=example, **method.options))
        new, known = few_shot_lrp.optimizer(unrolled, unrolled.network.encoder, config).param_groups  # type: ignore[arg-type]
        assert known["lr"] < new["lr"]
        assert len(known["params"]) == len([*model.network[0].parameters()])  # type: ignore[index]
        assert len(known["params"]) + len(new["params"]) == len([*unrolled.parameters()])


def test_the_settings_of_photographs_go_with_all_networks(capsys: pytest.CaptureFixture[str]) -> None:
    photographs = ["--data", "voc", "--root", "."]
    config = parse(few_shot_lrp.Config, photographs)
    assert (config.network, config.weights, config.pretrained) == ("efficientnet_lite0", "imagenet", True)
    assert not parse(few_shot_lrp.Config, [*photographs, "--network", "small"]).pretrained
    with pytest.raises(SystemExit):
        parse(few_shot_lrp.Config, [*photographs, "--network", "small", "--weights", "a.pt"])
    assert "--weights: expected another --network with a.pt, got small" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("script", ["few_shot_lrp", "size_supervision"])
def test_wrong_weights_are_one_line(script: str, tmp_path: Path) -> None:
    write_tiny_photographs(tmp_path)
    done = run_example(script, "--data", "voc", "--root", tmp_path, "--weights", "none.pt", "--out", tmp_path)
    assert done.returncode != 0
    assert "\nerror: --weights none.pt: expected those of efficientnet_lite0, got: " in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_half_of_an_epoch_has_masks(images: Stacked) -> None:
    few = FewMasks(images, [3, 7], others=True)
    shown = [bool(few[i]["shown"].all()) for i in range(len(few))]
    assert len(few) == 20
    assert sum(shown) == 10
    assert {name for name, mask in zip(few.names, shown, strict=True) if mask} == {images.names[3], images.names[7]}
    assert len(FewMasks(images, [3, 7], others=False)) == 2
    assert len(FewMasks(images, list(range(12)), others=True)) == 12


def test_hidden_masks_leave_the_tags(images: Stacked) -> None:
    few = FewMasks(images, [3], others=True)
    hide = Hide(Fit(32), len(CLASSES))
    for i in (0, len(few) - 1):
        sample = hide(few[i], np.random.default_rng(0))
        truth = images[images.names.index(few.names[i])]["labels"].as_subclass(Tensor)
        assert "shown" not in sample
        assert sample["tags"].tolist() == [int((truth == c).any()) for c in range(len(CLASSES))]
        expected = truth if few.names[i] == images.names[3] else torch.full_like(truth, VOID)
        assert torch.equal(sample["labels"].as_subclass(Tensor), expected)


def test_maps_are_scaled_by_the_part_of_the_scores_that_reaches_pixels(images: Stacked) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(*layers, nn.Linear(8, 5, bias=False))
    all_arrives = few_shot_lrp.map_scale(unroll(network, rule="epsilon_plus"), images, {"rule": "epsilon_plus"})
    assert all_arrives == pytest.approx(32 * 32, rel=1e-3)
    assert few_shot_lrp.map_scale(network, images, {}) == "pixels"
    assert few_shot_lrp.map_scale(network, images, METHODS["U-Net"].options) == 1


def test_maps_of_ws_ae_are_as_large_as_scores(images: Stacked) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    options = METHODS["WS-AE"].options
    model = unroll(network, **options).eval()
    scale = few_shot_lrp.map_scale(model, images, options)
    with torch.no_grad():
        scores, heat = model(torch.stack([images[i]["image"].as_subclass(Tensor) for i in range(5)]))
    assert float((scale * heat).mean((2, 3)).abs().sum()) == pytest.approx(float(scores.abs().sum()), rel=1e-3)


def test_f1_of_known_predictions(images: Stacked) -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0]))

        def forward(self, image: Tensor) -> Tensor:
            return self.bias.expand(len(image), -1)

    config = few_shot_lrp.Config(size=32, workers=0)
    tags = torch.stack([(images[i]["labels"] == c).any() for i in range(12) for c in range(5)]).view(12, 5)
    expected = [2 * tags[:, c].sum() / (12 + tags[:, c].sum()) for c in (1, 3)]
    assert few_shot_lrp.f1(Always(), images, config) == pytest.approx(float(sum(expected)) / 4)


def test_a_wrong_number_of_masks_is_one_line() -> None:
    done = run_example("few_shot_lrp", "--labelled", "1", "-2")
    assert done.returncode != 0
    assert "--labelled: expected numbers of at least 0, got (1, -2)" in done.stderr
