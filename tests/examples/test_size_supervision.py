"""Size supervision as a user runs it, on a tiny budget, and what it is made of."""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import size_supervision
import torch
from data.augment import Fit
from data.sample import VOID, DataError, Stacked
from data.scenes import CLASSES as TEXTURES
from data.scenes import Scenes
from data.stream import Prepared, Whole
from data.write_voc import write_voc
from engine.command import parse
from engine.storage import StorageError
from matplotlib.image import imread
from parts import deeplab, supervisions, sweeps
from parts.frozen import freeze
from parts.scribbles import Scribbled, all_scribbles, scribbles
from parts.subset import Subset
from parts.sweeps import SWEEPS, TABLE, Result, Trial
from parts.tag_classifier import Part
from scipy.ndimage import label
from size_supervision import Annotator, Config, background_and_dice
from torch import Tensor, nn
from torchvision import models

from tests.run_example import run_example
from tests.tiny_photographs import write_tiny_photographs

TINY = ("--steps", "1", "--pretrain-steps", "1", "--scenes", "24", "--size", "32", "--device", "cpu")
CLASSES = ("background", "cat", "dog")

example = partial(run_example, "size_supervision")


def rows(output: str) -> list[tuple[str, list[str]]]:
    """Name of each row of the table, and its other cells."""
    lines = output.split("supervision  ", 1)[1].split("\nmasks:", 1)[0].splitlines()[1:]
    return [(line[:26].strip(), line[26:].split()) for line in lines]


def stacked(*labels: Tensor) -> Stacked:
    maps = torch.stack(labels)
    return Stacked(CLASSES, torch.rand(len(maps), 3, *maps.shape[1:]), maps)


@pytest.fixture(scope="module")
def images() -> Stacked:
    """Three images of 10 x 10: cat of 20 and dog of 10 pixels; cat of 40; cat of 30 and 10 void pixels."""
    first, second, third = torch.zeros(3, 10, 10, dtype=torch.int64)
    first[:2], first[9] = 1, 2
    second[:4] = 1
    third[:3], third[9] = 1, VOID
    return stacked(first, second, third)


@pytest.mark.slow
def test_it_prints_a_row_for_each_supervision_and_draws_a_picture(tmp_path: Path) -> None:
    done = example(*TINY, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    table = rows(done.stdout)
    assert [name for name, _ in table] == [trial.curve for trial in TABLE]
    for trial, (_, cells) in zip(TABLE, table, strict=True):
        assert (cells[0] == "-") == (not {"size", "reverse", "average"} & {*trial.terms})
        assert cells[1] == ("0" if "seeds" in trial.terms else "-")
        assert 0 <= float(cells[2]) <= 1
    assert table[0][1][3] == "100.0%"
    assert re.search(r"^masks: background \d\d\.\d%, 5 classes$", done.stdout, re.M)
    assert imread(tmp_path / "size_supervision.png")[..., :3].std() > 0.1
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(TABLE) + 1


@pytest.mark.slow
@pytest.mark.parametrize("sweep", sorted(SWEEPS))
def test_a_sweep_prints_its_table_and_draws_its_plot(sweep: str, tmp_path: Path) -> None:
    done = example(*TINY, "--sweep", sweep, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    plan = SWEEPS[sweep]
    table = rows(done.stdout)
    assert [name for name, _ in table] == [trial.curve for trial in plan.trials]
    assert all((cells[4] != "-") == plan.on_training for _, cells in table)
    assert plan.score in done.stdout
    assert f" {plan.classes + 1 if plan.classes else 5} classes\n" in done.stdout
    assert imread(tmp_path / f"{sweep}.png")[..., :3].std() > 0.05
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(plan.trials) + 1


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_table(tmp_path: Path) -> None:
    options = (*TINY, "--sweep", "classes", "--repeats", "2", "--out", tmp_path)
    first = example(*options)
    assert first.returncode == 0, first.stderr
    assert len(re.findall(r"^size .*%±|^size .* ±", first.stdout, re.M)) == 5
    (tmp_path / "checkpoints" / "size_error_8_seed_1.pt").unlink()
    again = example(*options, "--resume")
    assert again.returncode == 0, again.stderr
    without_seconds = [[(name, cells[:-1]) for name, cells in rows(done.stdout)] for done in (first, again)]
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.slow
def test_two_processes_share_a_deeplab_on_voc_with_sizes_of_a_file(tmp_path: Path) -> None:
    root = tmp_path / "voc"
    write_voc(root, {"train": Scenes("train", 24, size=40), "val": Scenes("val", 8, size=40, void_width=2)})
    done = example(
        *("--steps", 1, "--pretrain-steps", 1, "--size", 32, "--device", "cpu", "--batch-size", 4),
        *("--data", "voc", "--root", root, "--sizes", root / "sizes.csv", "--out", tmp_path / "out"),
        *("--network", "deeplabv3_mobilenet_v3_large", "--weights", "none"),
        *("--sweep", "classes", "--classes", "grass", "brick", "gravel"),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    table = rows(done.stdout)
    assert [name for name, _ in table] == [*(trial.curve for trial in SWEEPS["classes"].trials), "sizes of --sizes"]
    assert " 4 classes\n" in done.stdout


@pytest.mark.slow
def test_decoders_train_on_frozen_features_of_photographs_and_go_on_after_a_stop(tmp_path: Path) -> None:
    write_tiny_photographs(tmp_path / "photographs")
    options = ("--data", "voc", "--root", tmp_path / "photographs", "--quick", "--weights", "none", "--out", tmp_path)
    small = ("--size", 64, "--steps", 2, "--batch-size", 4, "--device", "cpu")
    first = example(*options, *small)
    assert first.returncode == 0, first.stderr
    assert [name for name, _ in rows(first.stdout)] == [trial.curve for trial in TABLE]
    (features,) = (tmp_path / "features").iterdir()
    made = {path: path.stat().st_mtime_ns for path in features.glob("*.npz")}
    assert len(made) == 2 * (6 + 3), "the images of both lists, as they are and mirrored"
    next(iter(made)).unlink()
    (tmp_path / "checkpoints" / "average_size_seed_0.pt").unlink()
    again = example(*options, *small, "--resume")
    assert again.returncode == 0, again.stderr
    assert [cells[:-1] for _, cells in rows(first.stdout)] == [cells[:-1] for _, cells in rows(again.stdout)]
    assert sum(path.stat().st_mtime_ns != time for path, time in made.items()) == 1


@pytest.mark.slow
def test_a_whole_network_trains_on_photographs(tmp_path: Path) -> None:
    write_tiny_photographs(tmp_path / "photographs")
    options = ("--data", "voc", "--root", tmp_path / "photographs", "--weights", "none", "--out", tmp_path)
    done = example(*options, "--size", 64, "--steps", 2, "--batch-size", 4, "--device", "cpu", "--sweep", "barrier")
    assert done.returncode == 0, done.stderr
    assert imread(tmp_path / "barrier.png")[..., :3].std() > 0.05


def test_frozen_features_are_those_of_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Stacked(CLASSES, torch.rand(3, 3, 40, 40), torch.zeros(3, 40, 40, dtype=torch.int64))
    model = deeplab.build("squeezenet1_0", 3, "none").eval()
    images = torch.stack([data[0]["image"], data[2]["image"].flip(-1)])
    with torch.no_grad():
        expected = model(images)
        freeze(model, [Part(data, [0, 1]), Part(data, [2])], tmp_path)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-3)  # kept in half precision
    assert not [name for name in model.state_dict() if name.startswith("encoder")]
    with pytest.raises(StorageError, match=r"^cannot read .*\.npz: No such file or directory$"):
        model(torch.rand(1, 3, 40, 40))


def test_presets_for_photographs(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(Config, ["--data", "voc", "--root", "."])
    assert (config.network, config.weights, config.frozen, config.size) == (
        "efficientnet_lite0",
        "imagenet",
        False,
        512,
    )
    config = parse(Config, ["--data", "voc", "--root", ".", "--quick", "--size", "96"])
    assert (config.network, config.weights, config.frozen, config.size) == ("efficientnet_lite0", "imagenet", True, 96)
    parse(Config, ["--data", "voc", "--root", ".", "--network", "small"])
    with pytest.raises(SystemExit):
        parse(Config, ["--data", "voc", "--root", ".", "--quick", "--network", "small"])
    assert "--frozen: expected a --network with a decoder of its own, or --no-frozen, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "coco"], "--weights: expected a DeepLabV3 as --network with coco, got small"),
        (["--network", "resnet18", "--weights", "coco"], "--weights: expected a DeepLabV3 .* with coco, got resnet18"),
        (["--weights", "a.pt"], "--weights: expected another --network with a.pt, got small"),
        (["--classes", "brick"], "--classes: expected --sweep classes or barrier with it, got brick"),
        (
            ["--sweep", "classes", "--classes", "brick"],
            "--classes: expected 3 different for --sweep classes, .*",
        ),
        (["--sweep", "barrier", "--classes", "brick", "brick"], "--classes: expected 1 .*, got brick brick"),
        (["--network", "deeplabv3_resnet50", "--batch-size", "1"], "--batch-size: expected at least 2 images .*"),
        (["--crf-weight", "-1"], "--crf-weight: expected at least 0, got -1.0"),
        (["--crf-weight", "nan"], "--crf-weight: expected at least 0, got nan"),
        (["--crf-scale", "0"], "--crf-scale: expected above 0 and at most 1, got 0.0"),
        (["--sizes", "sizes.csv", "--repeats", "3"], "--repeats: expected 1 with --sizes: .*, got 3"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Config, options)
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


def test_unknown_classes_are_named() -> None:
    config = Config(sweep="barrier", classes=("sand",), scenes=2, size=32)
    with pytest.raises(DataError, match=r"--classes: expected classes among brick, .*, got sand"):
        config.images("train")


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    for weights in ("imagenet", "coco"):
        with pytest.raises(SystemExit, match=rf"^error: --weights {weights}: expected to download .*[^\n]$"):
            deeplab.build("deeplabv3_mobilenet_v3_large", 5, weights)


def test_a_deeplab_is_that_of_torchvision_and_sees_normalised_images() -> None:
    model = deeplab.build("deeplabv3_mobilenet_v3_large", 4, "none").eval()
    network = deeplab.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    network.load_state_dict({name.removeprefix("network."): value for name, value in model.state_dict().items()})
    image = torch.rand(2, 3, 48, 40)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalised = (image - mean) / deviation
    with torch.no_grad():
        torch.testing.assert_close(model(image), network.eval()(normalised)["out"])
        assert model(image).shape == (2, 4, 48, 40)


def test_weights_of_a_file_replace_those_of_coco(tmp_path: Path) -> None:
    name: deeplab.Name = "deeplabv3_mobilenet_v3_large"
    network = deeplab.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, aux_loss=True)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    built = deeplab.build(name, 4, str(tmp_path / "weights.pt")).state_dict()
    last = {name for name, value in network.state_dict().items() if not torch.equal(built[f"network.{name}"], value)}
    assert last == {"classifier.4.weight", "classifier.4.bias"}
    for path in (tmp_path / "none.pt", Path(__file__)):
        with pytest.raises(SystemExit, match=rf"^error: --weights .*: expected those of {name}, got: [^\n]*$"):
            deeplab.build(name, 4, str(path))


@pytest.mark.parametrize("weights", ["none", "of a file"])
def test_a_pretrained_encoder_gets_a_decoder_that_learns_faster(weights: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if weights == "of a file":
        weights = str(tmp_path / "weights.pt")
        torch.save(models.squeezenet1_0().state_dict(), weights)
    model = deeplab.build("squeezenet1_0", 4, weights)
    assert model(torch.rand(2, 3, 48, 40)).shape == (2, 4, 48, 40)
    assert model.encoder.training == (weights == "none")
    groups = deeplab.optimizer(model, weights).param_groups
    assert [group["lr"] for group in groups] == [2e-3, 2e-4][: len(groups)]
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    assert len(groups) == (1 if weights == "none" else 2)


def test_each_object_has_a_scribble_of_its_own_class_and_the_background_one() -> None:
    labels = torch.zeros(24, 24, dtype=torch.int64)
    labels[2:8, 2:20] = 1
    labels[12:22, 2:5] = 1  # a second object of the class
    labels[12:22, 12:20] = 2
    labels[14:16, 14:16] = 0  # a hole
    labels[23] = VOID
    strokes = scribbles(labels, np.random.default_rng(0))
    classes = [labels.flatten()[stroke].unique().tolist() for stroke in strokes]
    assert classes == [[0], [1], [1], [2]]
    hole = {14 * 24 + 14, 14 * 24 + 15, 15 * 24 + 14, 15 * 24 + 15}
    assert not hole & set(strokes[0].tolist())
    assert len(strokes[1]) >= 12, "along the bar of 6 x 18 pixels"
    assert all(len(stroke.unique()) == len(stroke) for stroke in strokes)


@pytest.mark.parametrize("index", range(4))
def test_the_beginning_of_a_scribble_is_connected_and_the_same_for_each_call(index: int) -> None:
    labels = Scenes("train", 4, size=48)[index].labels
    strokes, again, other = (scribbles(labels, np.random.default_rng(seed)) for seed in (0, 0, 1))
    for stroke in strokes:
        for count in (1, len(stroke) // 3 + 1, len(stroke)):
            drawn = np.zeros(48 * 48, bool)
            drawn[stroke[:count]] = True
            assert label(drawn.reshape(48, 48), np.ones((3, 3)))[1] == 1
    assert all(torch.equal(a, b) for a, b in zip(strokes, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(strokes, other, strict=True))
    assert [set(a.tolist()) for a in strokes] == [set(b.tolist()) for b in other], "only the order differs"


def test_seeds_are_labels_and_more_of_them_for_longer_scribbles() -> None:
    scenes = [Scenes("train", 3, size=48, void_width=1)[i] for i in range(3)]
    data = Stacked(TEXTURES, torch.stack([s.image for s in scenes]), torch.stack([s.labels for s in scenes]))
    strokes = all_scribbles(data, seed=0)
    fewer = None
    for length in (0.0, 0.5, 1.0):
        seeded = Prepared(Scribbled(data, strokes, length), Fit(48, mirror=True))
        samples = [seeded[1, i] for i in range(3)]
        seeds, labels = (
            torch.stack([sample[name].as_subclass(Tensor) for sample in samples]) for name in ("seeds", "labels")
        )
        drawn = seeds != VOID
        assert torch.equal(seeds[drawn], labels[drawn]), "mirrored together"
        if fewer is None:
            assert drawn.sum((1, 2)).tolist() == [len(own) for own in strokes]
        else:
            assert (fewer <= drawn).all()
            assert (drawn.sum((1, 2)) > fewer.sum((1, 2))).all()
        fewer = drawn


def test_what_annotators_tell(images: Stacked) -> None:
    annotator = Annotator(images, Config(size=32))
    sample = annotator.annotate(Trial("", ("size",), error=0.0))[2]
    torch.testing.assert_close(sample["targets"], torch.tensor([2 / 3, 1 / 3, 0]))
    cat, dog = (0.2 + 0.4 + 1 / 3) / 3, 0.1
    torch.testing.assert_close(sample["average"], torch.tensor([1 - cat, cat, 0]))
    torch.testing.assert_close(annotator.average()[0], torch.tensor([1 - cat - dog, cat, dog]))
    assert sample["tags"].tolist() == [1, 1, 0]
    torch.testing.assert_close(sample["lower"], torch.tensor([0.54, 0.18, 0]))
    assert "seeds" not in sample
    assert "seeds" in annotator.annotate(Trial("", ("seeds",)))[0]
    measured = [annotator.error(Trial("", ("size",), error=error)) for error in (0, 0.08, 0.16)]
    assert measured[0] < 1e-6 < measured[1] < measured[2]
    errors = (cat / 0.2 - 1, 0, 1 - cat / 0.4, 1 - cat / (1 / 3))  # cat, dog; cat; cat
    assert annotator.error(Trial("", ("average",))) == pytest.approx(sum(map(abs, errors)) / 4, abs=1e-6)
    assert math.isnan(annotator.error(Trial("", ("squared barrier",))))
    assert torch.equal(annotator.targets(0.16), Annotator(images, Config(size=32)).targets(0.16))


def test_averages_that_leave_no_background_share_with_it() -> None:
    """Cat alone covers 0.9, dog alone 0.8: together they do not fit."""
    cat, dog, both = torch.zeros(3, 10, 10, dtype=torch.int64)
    cat[:9], dog[:8] = 1, 2
    both[:9], both[9, :8] = 1, 2
    average = Annotator(stacked(cat, dog, both), Config(size=32)).average()
    means = torch.tensor([(0.1 + 0.2 + 0.02) / 3, 0.9, (0.8 + 0.08) / 2])
    torch.testing.assert_close(average[2], means / means.sum())
    torch.testing.assert_close(average[0], torch.tensor([0.1, 0.9, 0]))


def test_tags_are_those_of_the_whole_mask() -> None:
    """One pixel of cat in 64 x 64 is lost at a size of 32."""
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[0, 0] = 1
    config = Config(size=32)
    sample = Prepared(Annotator(stacked(labels), config).annotate(TABLE[1]), config.fit())[0, 0]
    assert not (sample["labels"] == 1).any()
    assert sample["targets"][1] > 0
    assert sample["tags"].tolist() == [1, 1, 0]


def test_a_mask_that_is_all_void_is_named() -> None:
    with pytest.raises(DataError, match=r"^000000: expected a mask with labelled pixels, got one that is all void"):
        Annotator(stacked(torch.full((8, 8), VOID)), Config(size=32))


def test_other_classes_become_background(images: Stacked, tmp_path: Path) -> None:
    dogs = Subset(images, ["dog"], empty=False)
    assert (dogs.names, dogs.classes) == (["000000"], ("background", "dog"))
    assert dogs.labels(0).unique(return_counts=True)[1].tolist() == [90, 10]
    everything = Subset(images, ["dog"], empty=True)
    assert everything.names == images.names
    assert everything[2]["labels"].unique().tolist() == [0, VOID]
    path = tmp_path / "sizes.csv"
    path.write_text("name,background,cat,dog\n000000,0.7,0.2,0.1\n000001,0.5,0.5,0\n000002,0.6,0.4,0\n")
    torch.testing.assert_close(everything.read_sizes(path), torch.tensor([[0.9, 0.1], [1, 0], [1, 0]]))
    with pytest.raises(DataError, match="--classes: expected images with dog, found none"):
        Subset(stacked(torch.zeros(8, 8, dtype=torch.int64)), ["dog"], empty=False)


def logits_of(*shares: tuple[float, ...]) -> Tensor:
    """Logits whose average prediction is as given, ``[B, K, 4, 4]``."""
    return torch.tensor(shares).log()[:, :, None, None].expand(-1, -1, 4, 4)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, 0] = 1
    seeds = torch.full_like(labels, VOID)
    seeds[0, 0, 0], seeds[0, 3, 3] = 1, 0
    return {
        "image": torch.rand(1, 3, 4, 4),
        "labels": labels,
        "seeds": seeds,
        "tags": torch.tensor([[1, 1, 0]]),
        "targets": torch.tensor([[0.75, 0.25, 0.0]]),
        "average": torch.tensor([[0.5, 0.5, 0.0]]),
        "lower": torch.tensor([[0.5, 0.1, 0.0]]),
        "valid": torch.ones(1, 4, 4, dtype=torch.bool),
        "labelled": torch.tensor(16.0),
        "seeded": torch.tensor(2.0),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("masks", -(4 * math.log(0.2) + 12 * math.log(0.7)) / 16),
        ("size", 0.75 * math.log(0.75 / 0.7) + 0.25 * math.log(0.25 / 0.2)),
        ("average", 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.2)),
        ("reverse", 0.7 * math.log(0.7 / 0.75) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 1e-8)),
        ("seeds", -(math.log(0.2) + math.log(0.7)) / 2),
        ("log barrier", -math.log(0.7) - math.log(0.2)),
        # both are above the floor; the third class is suppressed
        ("flat barrier", -2 * math.log(supervisions.FLOOR) - math.log(0.9)),
        ("squared barrier", supervisions.BARRIER_WEIGHT * 0.1**2),
        ("light squared barrier", supervisions.LIGHT_BARRIER_WEIGHT * 0.1**2),
    ],
)
def test_terms_at_known_sizes(name: str, expected: float, batch: dict[str, Tensor]) -> None:
    value = supervisions.TERMS[name](logits_of((0.7, 0.2, 0.1)), batch)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_a_loss_is_the_sum_of_its_terms_and_its_divisors_are_counted(batch: dict[str, Tensor]) -> None:
    names = ("size", "seeds", "crf")
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = supervisions.total_loss(names, crf_weight=7.0)(logits, batch)
    terms = [supervisions.TERMS[name](logits, batch) for name in names]
    torch.testing.assert_close(value, terms[0] + terms[1] + 7 * terms[2])
    assert terms[2] > 0
    counted = {name: float(count(batch)) for name, count in supervisions.counts(("masks", "seeds")).items()}
    assert counted == {"labelled": 16, "seeded": 2}
    assert supervisions.counts(("size", "crf")) == {}


def test_the_trivial_solution_is_all_background(images: Stacked) -> None:
    model = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(model.weight)
    config = Config(size=32, device="cpu")
    for background, share in ((1.0, 1.0), (-1.0, 0.0)):
        with torch.no_grad():
            assert model.bias is not None
            model.bias.copy_(torch.tensor([background, 0, 0]))
        assert background_and_dice(model, Whole(images, Fit(32, mirror=False)), config)[0] == share


def test_dice_is_the_mean_over_the_images_that_have_the_class() -> None:
    """The network finds cat where the first channel is 1."""
    labels = torch.zeros(3, 8, 8, dtype=torch.int64)
    image = torch.zeros(3, 3, 8, 8)
    labels[0, :4], image[0, 0, :2] = 1, 1  # half of it: 2 * 16 / (16 + 32)
    labels[1, :1], image[1, 0, :2] = 1, 1  # twice as much: 2 * 8 / (16 + 8)
    labels[1, 1, :4] = VOID  # of the half that is wrong: 2 * 8 / (12 + 8)
    image[2, 0] = 1  # none there, which does not count
    model = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        model.weight.zero_()[1, 0], model.bias[:] = 2, torch.tensor([1.0, 0, -1])
    _, dice = background_and_dice(model, Stacked(CLASSES, image, labels), Config(size=32, device="cpu"))
    assert dice == pytest.approx((2 / 3 + 0.8) / 2)


def result(iou: list[float], error: float = math.nan) -> Result:
    none = torch.full((1,), torch.nan)
    return Result(torch.tensor(iou), none, 0.6, 0.9, error, 1.0, torch.zeros(1, 2, 2, dtype=torch.int64))


def test_scores_and_their_share_of_full_masks() -> None:
    full, part = result([0.9, 0.5]), result([0.8, 0.05], error=0.05)
    assert full.score("mIoU") == pytest.approx(0.7)
    assert full.score("DSC") == 0.6
    trials = [sweeps.FULL, Trial("size", ("size", "crf"))]
    text = sweeps.table(trials, [[full, part]], "mIoU").splitlines()
    assert text[1].split() == ["full", "masks", "-", "-", "0.700", "100.0%", "-", "90.0%", "2", "1"]
    assert text[2].split() == ["size", "5.0%", "-", "0.425", "60.7%", "-", "90.0%", "1", "1"]
    text = sweeps.table(trials, [[full, part], [full, result([0.8, 0.25])]], "mIoU").splitlines()
    assert "0.475 ±0.071" in text[2]


def test_sizes_of_a_file_are_one_more_curve(tmp_path: Path) -> None:
    path = tmp_path / "sizes.csv"
    given = [trial for trial in Config(sweep="errors", sizes=path).trials if trial.error is None]
    assert [trial.terms for trial in given] == [("size", "crf")]
    given = [trial for trial in Config(sweep="seeds", sizes=path).trials if trial.error is None]
    assert [trial.length for trial in given] == list(sweeps.LENGTHS)
    assert all(trial.error is None for trial in Config(sizes=path).trials)


def test_checkpoints_have_names_of_their_own() -> None:
    for trials in (TABLE, *(plan.trials for plan in SWEEPS.values())):
        names = {re.sub(r"\W+", "_", trial.name) for trial in trials}
        assert len(names) == len(trials)


@pytest.mark.slow
def test_help_explains_every_option() -> None:
    done = example("--help")
    assert done.returncode == 0
    text = re.sub(r"\s*│\n│\s*", " ", done.stdout)
    options = set(re.findall(r" --([a-z-]+)[ ,]", text)) - {"help"}
    assert {"network", "weights", "sweep", "classes", "crf-weight", "sizes", "repeats"} < options
    for option in options:
        assert re.search(rf"--{option}[ ,][^│]*?[A-Z][a-z]+ [^│]*\(default: ", text), option


def test_the_subset_of_a_sweep_is_cat_dog_and_bird_or_the_first_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(sweep: str, *classes: str) -> tuple[str, ...]:
        labels = torch.arange(len(classes) + 1).repeat(1, 8, 8)
        data = Stacked(("ground", *classes), torch.rand(1, 3, *labels.shape[1:]), labels)
        monkeypatch.setattr(size_supervision.Options, "images", lambda self, purpose: data)
        return Config(sweep=sweep).images("train").classes[1:]

    assert kept("classes", "aeroplane", "bird", "cow", "dog", "cat") == ("cat", "dog", "bird")
    assert kept("barrier", "aeroplane", "bird", "cow", "dog", "cat") == ("cat",)
    assert kept("classes", "sand", "cat", "dog", "cow") == ("sand", "cat", "dog")
    with pytest.raises(DataError, match=r"^--sweep classes: expected at least 3 classes beside .*, got 2$"):
        kept("classes", "cat", "dog")
