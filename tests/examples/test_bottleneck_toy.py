"""The toy experiment as a user runs it, on a tiny budget, and the images that it is made with."""

import re
from pathlib import Path

import pytest
import torch
from bottleneck_toy import (
    CANVAS,
    COMPANIONS,
    IMAGES,
    LAYERS,
    RATE,
    REGIONS,
    SHARE,
    Config,
    Outcome,
    Toys,
    batches,
    claims,
    fine_tune,
    gradient,
    load,
    place,
    quality,
    train,
)
from matplotlib.image import imread

from segattr.bottleneck import rib
from tests.run_example import run_example

TINY = Config(test=2, steps=3, rib_steps=2, device="cpu")
OPTIONS = ("--test", 2, "--steps", 3, "--rib-steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def data() -> tuple[Toys, Toys]:
    return load(Config(test=40, seed=5))


@pytest.mark.slow
def test_it_prints_ratios_quality_and_claims_and_draws_a_picture(tmp_path: Path) -> None:
    done = run_example("bottleneck_toy", *OPTIONS, "--repeats", 2, "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    number = r"-?\d\.\d{3} ±\d\.\d{3}"
    rows = re.findall(rf"^(\S.*?) +({number}) +({number}) +({number})$", done.stdout, re.M)
    assert [row[0] for row in rows] == [
        *(f"layer {i}" for i in range(1, 6)),
        *("score", "after RIB", "after RIB, own scale"),
    ]
    single = re.findall(rf"^([A-Za-z, ]+?) +{number}$", done.stdout, re.M)
    assert single == ["CAM", "AdvCAM", "RIB", "RIB, GNDRP", "accuracy"]
    assert len(re.findall(rf"{number} +[012] of 2$", done.stdout, re.M)) == 11
    assert "no rise shows a gain of information" in done.stdout
    assert imread(tmp_path / "new" / "bottleneck_toy.png").shape == (900, 1300, 4)


@pytest.mark.slow
def test_same_seed_same_numbers_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        run_example("bottleneck_toy", *OPTIONS, "--repeats", 1, "--out", tmp_path, "--seed", seed).stdout
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert "±" not in first


@pytest.mark.slow
def test_a_wrong_number_is_one_line() -> None:
    done = run_example("bottleneck_toy", "--repeats", 0)
    assert done.returncode != 0
    assert re.fullmatch(r"error: .*--repeats: expected at least 1, got 0.*\n", done.stderr)


def test_each_pixel_is_of_one_region_and_marks_do_not_touch_digits(data: tuple[Toys, Toys]) -> None:
    for toys in data:
        assert toys.regions.shape == (len(toys.image), len(REGIONS), CANVAS, CANVAS)
        assert (toys.regions.sum(1) == 1).all()
        digit, mark, _ = toys.regions.unbind(1)
        assert digit.flatten(1).any(1).all()
        assert (toys.image[:, 0][mark] == 1).all()
        assert (toys.image[:, 0][digit] > 0.25).all()
        assert toys.image.min() >= 0
        assert toys.image.max() <= 1


def test_about_a_tenth_of_the_training_images_and_all_test_images_have_the_mark_of_their_digit(
    data: tuple[Toys, Toys],
) -> None:
    training, test = data
    marked = training.regions[:, 1].flatten(1).any(1)
    assert len(marked) == IMAGES
    # Four standard deviations of a binomial distribution.
    assert marked.float().mean().item() == pytest.approx(SHARE, abs=4 * (SHARE * (1 - SHARE) / IMAGES) ** 0.5)
    for toys, own in ((training, marked), (test, torch.ones(len(test.image), dtype=torch.bool))):
        sizes = toys.regions[own, 1].sum((1, 2))
        assert set(sizes[toys.label[own] == 0].tolist()) == {37}, "a disc of diameter 7"
        assert set(sizes[toys.label[own] == 1].tolist()) == {25}, "a square of side 5"


def test_images_are_those_of_the_seed(data: tuple[Toys, Toys]) -> None:
    for toys, again, other in zip(data, load(Config(test=40, seed=5)), load(Config(test=40, seed=6)), strict=True):
        assert all(map(torch.equal, toys, again))
        assert not torch.equal(toys.image, other.image)


def test_patches_are_placed_at_their_corners() -> None:
    patch = torch.arange(1.0, 9.0).view(2, 2, 2)
    canvas = place(patch, torch.tensor([[0, 0], [CANVAS - 2, 3]]))
    assert canvas.sum() == patch.sum()
    assert torch.equal(canvas[0, :2, :2], patch[0])
    assert torch.equal(canvas[1, -2:, 3:5], patch[1])


def test_the_gradient_of_the_score_is_that_of_finite_differences(data: tuple[Toys, Toys]) -> None:
    one = data[1].take(slice(0, 1))
    clf = train(TINY, data[0]).double()
    one = one._replace(image=one.image.double())
    found = gradient(clf, one)[0]
    for row, column in ((9, 9), (14, 20), (27, 0)):
        step = torch.zeros_like(one.image)
        step[0, 0, row, column] = 1e-6
        up, down = (clf(one.image + sign * step)[0, one.label[0]] for sign in (1, -1))
        assert found[row, column].item() == pytest.approx(abs(up - down).item() / 2e-6, rel=1e-4, abs=1e-9)
    assert gradient(clf, one, 1).shape == gradient(clf, one, LAYERS).shape == (1, CANVAS, CANVAS)


def test_the_maps_of_the_steps_add_up_to_that_of_rib_and_the_classifier_stays(data: tuple[Toys, Toys]) -> None:
    training, test = data[0], data[1].take(slice(0, 3))
    clf = train(TINY, training)
    before = {name: value.clone() for name, value in clf.state_dict().items()}
    maps, cams, gradients = fine_tune(TINY, clf, test, training)
    assert cams.shape[:2] == gradients.shape[:2] == (3, TINY.rib_steps + 1)
    torch.testing.assert_close(cams.sum(1), maps)
    torch.testing.assert_close(gradients[:, 0], gradient(clf, test))
    assert not torch.equal(gradients[:, 1], gradients[:, 0]), "the weights are those of each step"
    for i in range(3):
        one, draw = test.take(slice(i, i + 1)), batches(training, COMPANIONS, TINY.seed + i)
        alone = rib(clf, one.image, one.tags(), companions=draw, steps=TINY.rib_steps, lr=RATE, pool="gap")
        torch.testing.assert_close(maps[i], alone[0, one.label[0]])
    assert all(torch.equal(value, before[name]) for name, value in clf.state_dict().items())
    assert not clf.get_submodule("features")._forward_pre_hooks


def test_quality_is_1_for_the_truth_itself(data: tuple[Toys, Toys]) -> None:
    truth = (~data[1].regions[:, 2]).float()
    assert quality(truth, data[1]) == 1
    assert quality(1 - truth, data[1]) < 0.6


def test_claims_hold_where_the_ratios_say_so() -> None:
    layers = torch.full((6, 3), 0.5)
    layers[5] = torch.tensor([0.4, 0.1, 0.5])  # the mark falls by 0.4 and the digit by 0.1, all in the last layer
    fixed = torch.tensor([[0.4, 0.1, 0.5], [0.6, 0.4, 0.55]])
    miou = {"CAM": 0.4, "AdvCAM": 0.5, "RIB": 0.4, "RIB, GNDRP": 0.3}
    moving = torch.tensor([[0.4, 0.1, 0.5], [0.4, 0.05, 0.5]])
    one = Outcome(1.0, layers, fixed, moving, miou)
    flat = one._replace(layers=torch.full((6, 3), 0.5), fixed=fixed.flip(0))
    rows = re.findall(r"^(.*?) +(-?\d\.\d{3})( ±\d\.\d{3})? +(\d) of (\d)$", claims([one]), re.M)
    assert [(float(row[1]), row[3]) for row in rows] == [
        *[(0.4, "1"), (0.4, "1"), (0.4, "1"), (0.3, "1")],
        *[(0.2, "1"), (0.3, "1"), (0.25, "1"), (-0.05, "0")],
        *[(0.1, "1"), (0.0, "0"), (-0.1, "0")],
    ]
    both = re.findall(r"(\d) of 2$", claims([one, flat]), re.M)
    assert both == ["1"] * 7 + ["0"] + ["2", "0", "0"]
