"""The example of volumes as a user runs it, on a tiny budget; annotations, mirrored volumes, measures."""

import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from data.phantoms import CLASSES, SPACING, Phantoms
from data.sample import VOID, Stacked, collate
from data.stream import Prepared
from matplotlib.image import imread
from torch import Tensor, nn
from volumes import Config, Data, Mirror, Outcome, annotate, evaluate, load, one_slice, supervisions, table, unet

import segloss
from tests.run_example import run_example

OPTIONS = ("--volumes", 4, "--shape", 8, 16, 16, "--pretrain-steps", 2, "--steps", 2, "--batch-size", 2)
NAMES = ("full masks", "full + boundary", "sizes", "sizes + CRF", "bounds", "sizes + centroids", "one slice")
ROWS = (*NAMES, "one slice + sizes")


@pytest.fixture
def data() -> Data:
    return load(Config(volumes=3, shape=(8, 16, 16), device="cpu"))


def test_what_annotators_tell(data: Data) -> None:
    for sample in (data.train[i] for i in range(3)):
        labels = sample["labels"].as_subclass(Tensor)
        sizes = segloss.sizes_from_labels(labels[None], len(CLASSES))[0]
        assert (sample["lower"] <= sizes).all()
        assert (sizes <= sample["upper"]).all()
        assert torch.equal(sample["present"], sizes > 0)
        assert not sample["upper"][~sample["present"]].any()
        assert torch.equal(sample["targets"] > 0, sizes > 0)
        for k in sample["present"].nonzero()[:, 0]:
            centre = (labels == k).nonzero().double().mean(0) * torch.tensor(SPACING)
            torch.testing.assert_close(sample["centroids"][k], centre.float())
            assert torch.equal(sample["distances"][k] < 0, labels == k)
        shown = sample["slice"] != VOID
        assert shown.flatten(1).any(1).sum() == 1
        assert torch.equal(sample["slice"][shown], labels[shown])


def test_the_annotated_slice_shows_most_classes_and_of_these_the_most() -> None:
    labels = torch.zeros(4, 3, 3, dtype=torch.int64)
    labels[0], labels[1, 0, 0], labels[2, 0] = 1, 2, 1
    labels[1, 1, 1], labels[3, 0, 0], labels[3, 1:] = 1, 2, 1
    assert (one_slice(labels) != VOID).flatten(1).any(1).tolist() == [False, False, False, True]
    assert (one_slice(labels[:3]) != VOID).flatten(1).any(1).tolist() == [False, True, False]


def test_mirrored_volumes_have_mirrored_annotations(data: Data) -> None:
    mirror = Mirror(data.spacing)
    kinds: set[tuple[int, ...]] = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        axes = tuple(axis for axis in range(3) if rng.random() < 0.5)
        kinds.add(axes)
        sample = mirror(data.train[0], np.random.default_rng(seed))
        dims = [axis - 3 for axis in axes]
        assert torch.equal(sample["image"], data.train[0]["image"].flip(dims))
        again = annotate(Stacked(CLASSES, sample["image"][None], sample["labels"][None]), data.spacing, seed=0)[0]
        for name in ("centroids", "distances", "lower"):
            there = sample["present"]
            torch.testing.assert_close(sample[name][there], again[name][there])
        assert torch.equal(sample["slice"] != VOID, (data.train[0]["slice"] != VOID).flip(dims))
    assert len(kinds) == 8


def test_every_supervision_of_truth_is_cheaper_than_that_of_a_shifted_volume(data: Data) -> None:
    batch = collate([Prepared(data.train)[0, i] for i in range(3)])
    perfect = 20 * nn.functional.one_hot(batch["labels"], len(CLASSES)).movedim(-1, 1).float()
    wrong = perfect.roll(1, 1)  # every class takes the place of the next one
    for name, loss in supervisions(data.spacing).items():
        assert loss(perfect, batch) < loss(wrong, batch), name


def test_the_network_draws_no_stripes() -> None:
    """A fresh UNet of MONAI tells odd columns from even ones in the mean, by half a standard deviation and more."""
    torch.manual_seed(0)
    model = unet(len(CLASSES))
    for network, striped in ((model[0], True), (model, False)):
        logits = network(torch.rand(2, 1, 8, 32, 32)).detach()
        for axis in (3, 4):
            even, odd = logits.unflatten(axis, (-1, 2)).unbind(axis + 1)
            difference = (even - odd).mean((2, 3, 4)).abs() / logits.std((2, 3, 4))
            assert (difference.max() > 0.2) == striped


class Found(nn.Module):
    """Takes the intensity for the class."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(100.0))

    def forward(self, image: Tensor) -> Tensor:
        return self.strength * nn.functional.one_hot(image[:, 0].round().long(), 3).movedim(-1, 1).float()


def test_dice_and_distances_are_means_over_the_volumes_that_show_a_class() -> None:
    """Class 1 is a cube that is found one voxel of 3 mm too high; class 2 is there once, and not found."""
    labels = torch.zeros(2, 12, 8, 8, dtype=torch.int64)
    labels[:, 2:6, 2:6, 2:6] = 1
    image = labels.roll(1, 1)[:, None].float()
    labels[1, 8:, 1:5, 1:5] = 2
    test = Stacked(("ground", "cube", "lost"), image, labels)
    config = Config(shape=(12, 8, 8), device="cpu")
    dice, distance = evaluate(Found(), Data(test, test, SPACING), config)
    assert dice.tolist() == pytest.approx([0.75, 0])
    assert 0.5 < distance[0] < 3
    assert distance[1] == pytest.approx((36**2 + 8**2 + 8**2) ** 0.5)
    exact, none = evaluate(Found(), Data(test, Stacked(test.classes, image, image[:, 0].long()), SPACING), config)
    assert (exact[0], none[0]) == (1, 0)
    assert exact[1].isnan(), "no volume shows it"


def test_the_table_has_means_shares_and_spreads() -> None:
    def outcome(*dice: float) -> Outcome:
        return Outcome(torch.tensor(dice), torch.tensor([1.0, 2.0]), 3.0, torch.zeros(1, 1, 1, 1))

    runs = [{"full masks": outcome(0.8, 0.8), "sizes": outcome(0.3, 0.5)} for _ in range(2)]
    one = table(("ground", "a", "b"), runs[:1]).splitlines()[2].split()
    assert one == ["sizes", "0.300", "0.500", "0.400", "50.0%", "1.50", "mm", "3"]
    assert table(("ground", "a", "b"), runs).splitlines()[2].split()[:3] == ["sizes", "0.300", "±0.000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (8, 16, 18)}, r"--shape: expected multiples of 4 from 8, got \(8, 16, 18\)"),
        ({"spacing": (1.0, 1.0, 1.0)}, r"--spacing: expected --root with it: that of phantoms is \(3.0, 1.0, 1.0\), "),
        ({"root": Path("x"), "spacing": (1.0, 0.0, 1.0)}, "--spacing: expected numbers above 0, got"),
        ({"volumes": 0}, "--volumes: expected at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def write_folder(root: Path) -> None:
    """Phantoms as a scanner would write them: from front to back, and with thick slices."""
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    affine = np.diag((-1.0, -1.0, 3.0, 1.0))
    for i, phantom in enumerate(Phantoms("train", 10, shape=(8, 20, 16))):
        for name, values in (("imagesTr", 1000 * phantom.image[0]), ("labelsTr", phantom.labels.byte())):
            stored = np.ascontiguousarray(values.numpy().transpose()[::-1, ::-1])
            nibabel.save(nibabel.Nifti1Image(stored, affine), root / name / f"case_{i}.nii.gz")
    labels = {str(k): name for k, name in enumerate(CLASSES)}
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_volumes_of_a_folder_are_those_that_were_written(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = load(Config(root=tmp_path, shape=(8, 20, 16), device="cpu"))
    assert data.spacing == pytest.approx(SPACING)
    assert (len(data.train), len(data.test)) == (6, 2)
    drawn = Phantoms("train", 10, shape=(8, 20, 16))
    for i, sample in ((0, data.train[0]), (3, data.test[0]), (5, data.train[3])):
        assert torch.equal(sample["labels"], drawn[i].labels)
        intensity = torch.corrcoef(torch.stack([sample["image"].flatten(), drawn[i].image.flatten()]))[0, 1]
        assert intensity > 0.99


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run_example("volumes", "--root", "/nowhere", "--out", tmp_path)
    assert done.returncode != 0
    assert done.stderr == "error: /nowhere: expected a folder, found none\n"


def check_output(text: str, folder: Path) -> None:
    rows = re.findall(r"^(\S.*?)  +\d\.\d{3} .* mm .*$", text, re.M)
    assert tuple(rows) == ROWS
    assert imread(folder / "volumes.png").std() > 0


@pytest.mark.slow
def test_it_prints_a_table_and_draws_a_picture_and_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    first, again = (
        run_example("volumes", *OPTIONS, "--device", "cpu", "--repeats", 2, "--out", tmp_path, *more)
        for more in ((), ("--resume",))
    )
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    check_output(first.stdout, tmp_path)
    assert first.stdout == again.stdout


@pytest.mark.slow
def test_it_trains_on_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    done = run_example("volumes", *OPTIONS, "--root", tmp_path / "data", "--quick", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_print_one_table(tmp_path: Path) -> None:
    words = [*OPTIONS, "--device", "cpu", "--split", "final", "--out"]
    one, two = (run_example("volumes", *words, tmp_path / str(n), processes=n) for n in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    check_output(two.stdout, tmp_path / "2")
