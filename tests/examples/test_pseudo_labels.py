"""The pipeline from tags to a segmentation network as a user runs it, on a tiny budget."""

import math
import re
from itertools import islice
from pathlib import Path

import pseudo_labels
import pytest
import torch
from data.augment import Fit
from data.sample import VOID, Stacked
from data.scenes import CLASSES, Scenes, stack
from data.stream import Prepared, Whole
from data.write_voc import write_voc
from matplotlib.image import imread
from parts import localise, tag_classifier
from parts.settings import SCENES
from parts.tag_classifier import WithOOD
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from segattr import cam
from tests.run_example import run_example
from tests.tiny_photographs import write_tiny_photographs

TINY = (
    *("--pretrain-steps", "2", "--classifier-steps", "2", "--steps", "2", "--maps", "3"),
    *("--scenes", "24", "--ood", "44", "--size", "32", "--device", "cpu"),
)


SLOW = pytest.mark.slow
PHOTOGRAPHS = (
    *("--pretrain-steps", "2", "--classifier-steps", "2", "--steps", "2", "--maps", "4"),
    *("--size", "64", "--batch-size", "4", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def images() -> Stacked:
    scenes = stack(Scenes("train", 12, size=32))
    return Stacked(CLASSES, scenes.image, scenes.labels)


def rows(printed: str, stage: str) -> list[str]:
    """Names of the rows of a stage's table."""
    block = printed.split(f"\n{stage} ", 1)[1].splitlines()[1:] if stage != "maps" else printed.splitlines()[1:]
    names = []
    for line in block:
        found = re.fullmatch(r"(.+?)((?: +\d+\.\d){6})( +\d\.\d\d)?", line)
        if not found:
            break
        names.append(found[1].strip())
    return names


@pytest.mark.slow
def test_it_prints_a_table_of_each_stage_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    done = run_example("pseudo_labels", *TINY, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout, "maps") == list(localise.METHODS)
    starts = [f"{name}{walk}" for name in ("CAM", "W-OoD + AdvCAM + RIB") for walk in ("", " + random walk")]
    assert rows(done.stdout, "refinement") == [*starts, *(f"{name} + CRF" for name in starts)]
    assert rows(done.stdout, "pseudo-labels") == starts
    assert rows(done.stdout, "networks") == [*starts, "true masks"]
    assert imread(tmp_path / "pseudo_labels.png").shape[2] == 4

    (lost,) = (tmp_path / "maps" / "seed 0" / "GAP").glob("000001.npz")
    lost.unlink()
    again = run_example("pseudo_labels", *TINY, "--out", tmp_path, "--resume")
    assert again.returncode == 0, again.stderr
    assert lost.exists()
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_it_leaves_out_wood_on_a_folder_in_the_layout_of_voc(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {"train": Scenes("train", 24, size=40), "val": Scenes("val", 8, size=40, void_width=2)})
    options = ("--data", "voc", "--root", tmp_path / "voc", "--repeats", "2", "--out", tmp_path / "out")
    done = run_example("pseudo_labels", *TINY, *options, "--network", "small")
    assert done.returncode == 0, done.stderr
    assert "without W-OoD: only scenes have out-of-distribution images" in done.stdout
    assert "W-OoD +" not in done.stdout
    assert len(re.findall(r"^AdvCAM \+ RIB( \+ random walk)?( \+ CRF)? .*±", done.stdout, re.M)) == 1 + 4 + 2 + 2


@pytest.mark.slow
def test_a_pretrained_network_makes_labels_of_photographs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write_tiny_photographs(tmp_path / "photographs")
    words = ("--data", "voc", "--root", tmp_path / "photographs", "--quick", "--weights", "none", *PHOTOGRAPHS)
    done = run_example("pseudo_labels", *words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    tables = done.stdout.partition("\n")[2]  # the first line says why there is no W-OoD
    assert rows(tables, "maps") == ["CAM", "AdvCAM", "RIB", "AdvCAM + RIB", "ISL + FSL"]
    assert rows(done.stdout, "networks")[-1] == "true masks"
    assert imread(tmp_path / "out" / "pseudo_labels.png")[..., :3].std() > 0.05

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "maps").rglob("*.npz")}
    folders = [path.parent.name for path in made]
    assert [folders.count(name) for name in ("pooled", "GAP", "ISL + FSL", "refined")] == [6, 4, 4, 4]
    lost = [next(path for path in made if path.parent.name == name) for name in ("pooled", "GAP", "refined")]
    for path in (*lost, tmp_path / "out" / "checkpoints" / "network_on_true_masks_seed_0.pt"):
        path.unlink()
    again = run_example("pseudo_labels", *words, "--out", tmp_path / "out", "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert {path for path, time in made.items() if path.stat().st_mtime_ns != time} == {*lost}


def test_weights_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    write_tiny_photographs(tmp_path / "photographs")
    config = pseudo_labels.Config(
        data="voc",
        root=tmp_path / "photographs",
        network="efficientnet_lite0",
        weights=str(tmp_path / "none.pt"),
        out=tmp_path,
    )
    with pytest.raises(SystemExit, match=r"^error: --weights .*none.pt: expected those of efficientnet_lite0, got: "):
        pseudo_labels.main(config)


def test_wrong_shares_are_one_line() -> None:
    done = run_example("pseudo_labels", "--plain", "1.5")
    assert done.returncode != 0
    assert "--plain: expected a number from 0 to 1, got 1.5" in done.stderr


def test_out_of_distribution_images_count_as_images_without_tags(images: Stacked) -> None:
    joint = WithOOD(images, images)
    batch = {"tags": torch.tensor([[1, 1, 0], [1, 0, 1]]), "ood": torch.tensor([False, True])}
    assert [bool(joint[i]["ood"]) for i in (0, 11, 12, 23)] == [False, False, True, True]
    assert len(set(joint.names)) == 24
    scores = torch.tensor([[2.0, -1.0], [0.5, 1.5]]).view(2, 2, 1, 1)
    loss = tag_classifier.tags_alone((torch.zeros(2, 3, 1, 1), scores), batch)
    # -ln sigma(2), -ln sigma(1), and for the other image -ln sigma(-0.5), -ln sigma(-1.5), each halved
    expected = sum(math.log1p(math.exp(-margin)) for margin in (2.0, 1.0, -0.5, -1.5)) / 2
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize("network", ["small", "efficientnet_lite0", "squeezenet1_0"])
def test_the_classifier_for_maps_is_the_one_that_trains(network: str) -> None:
    model = tag_classifier.build(network, 4, "none").eval()
    image = torch.rand(2, 3, 64, 64)
    _, scores = model(image)
    clf = model.split()
    x = model.normalized(image)
    torch.testing.assert_close(clf(x), scores.mean((2, 3)))
    rest = model.split(model.fixed)
    torch.testing.assert_close(rest(model.encoder.features[: model.fixed](x)), scores.mean((2, 3)))
    assert model.head.bias is not None
    torch.testing.assert_close(cam(clf, x), scores - model.head.bias.view(-1, 1, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "network", ["efficientnet_lite0", "squeezenet1_0", pytest.param("vgg16", marks=pytest.mark.slow)]
)
def test_a_pretrained_classifier_trains_its_head_and_its_last_layers(network: str) -> None:
    model = tag_classifier.build(network, 4, "none")
    assert not any(module.training for module in model.modules()), "statistics of normalisation stay"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    (*_, last) = [name for name, _ in model.encoder.named_parameters()]
    assert {"head.weight", "head.bias", f"encoder.{last}"} <= trained
    assert not [name for name in trained if name.startswith("encoder.features.0.")]
    (group,) = model.optimizer(first=False).param_groups
    assert len(group["params"]) == len(trained)


def test_a_head_learns_tags_from_features_that_are_made_once(images: Stacked, tmp_path: Path) -> None:
    config = pseudo_labels.Config(size=64, device="cpu")

    def loss(steps: int) -> float:
        torch.manual_seed(0)
        model = tag_classifier.build("squeezenet1_0", 4, "none")
        before = tag_classifier.digest(model.encoder)
        tag_classifier.fit_head(model, images, tmp_path, steps, config)
        assert tag_classifier.digest(model.encoder) == before
        _, logits, tags = tag_classifier.describe(model, images, config)
        return float(binary_cross_entropy_with_logits(logits, tags.float()))

    start = loss(1)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len(made) == len(images)
    assert loss(100) < start
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}


def test_companions_share_no_class_and_are_the_same_for_each_call() -> None:
    tags = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1]])
    images = torch.arange(4.0).view(4, 1, 1, 1)
    others = localise.companions(images, tags, 20, seed=3)
    drawn = [list(islice(others(torch.tensor([1, 0, 0])), 4)) for _ in range(2)]
    chosen = torch.cat([batch.flatten() for batch, _ in drawn[0]])
    assert set(chosen.tolist()) == {1.0, 2.0}
    assert all(torch.equal(a, b) for one, two in zip(*drawn, strict=True) for a, b in zip(one, two, strict=True))
    everything = next(others(torch.tensor([1, 1, 1])))[0]
    assert set(everything.flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize(("network", "side"), [("small", 16), ("efficientnet_lite0", 1)])
def test_images_without_classes_have_no_maps(images: Stacked, network: str, side: int) -> None:
    model = tag_classifier.build(network, 4, "none").eval()
    work = localise.attribute(model, ["CAM", "AdvCAM", "RIB"], Whole(images, Fit(32, mirror=False)), seed=0)
    found = work({"image": torch.rand(3, 32, 32), "tags": torch.tensor([1, 0, 0, 0, 0])})
    assert {found[kind].shape for kind in ("CAM", "AdvCAM", "RIB")} == {(0, side, side)}
    assert {maps.shape for kind, maps in found.items() if kind.endswith(localise.WALKED)} == {
        (0, max(side, 4), max(side, 4))
    }


def test_quality_of_known_masks(images: Stacked) -> None:
    config = pseudo_labels.Config(size=32)

    def perfect(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        half = batch["labels"].clone()
        half[:, :16] = VOID
        return {"all": batch["labels"], "half": half, "none": torch.zeros_like(half)}

    found = pseudo_labels.assess(images, dict.fromkeys(("all", "half", "none"), 0.5), perfect, config)
    assert found["all"] == (100, 100, 100, 100, 100, 100, 0.5)
    assert found["half"] == (100, 100, 100, 100, 100, 50, 0.5)
    truth = torch.stack([images[i]["labels"].as_subclass(Tensor) for i in range(12)])
    assert found["none"].miou == pytest.approx(100 * float((truth == 0).double().mean()) / 5)
    assert (found["none"].recall, found["none"].region) == (0, 0)


def test_refinement_gives_masks_of_the_classes_present_and_leaves_out_padding(images: Stacked) -> None:
    sample = dict(Prepared(images)[0, 0])
    tags = sample["tags"]
    sample["valid"] = sample["valid"].clone()
    sample["valid"][:, 30:] = False
    sample["CAM"] = torch.rand(4, 32, 32) * tags[1:, None, None]
    found = pseudo_labels.refine(sample, {"CAM": 0.4}, SCENES, torch.device("cpu"))
    masks, labels = found["CAM + CRF"], found["CAM, pseudo-labels"]
    assert set(masks[:, :30].unique().tolist()) <= set(tags.nonzero().flatten().tolist())
    assert masks.shape == labels.shape == (32, 32)
    assert (masks[:, 30:] == VOID).all()
    assert (labels[:, 30:] == VOID).all()


def test_cells_have_mean_and_spread_and_are_empty_without_a_value() -> None:
    assert pseudo_labels.cell([1.0, 3.0], digits=1) == "2.0 ±1.4"
    assert pseudo_labels.cell([0.25], digits=2) == "0.25"
    assert pseudo_labels.cell([math.nan, math.nan], digits=2) == ""
