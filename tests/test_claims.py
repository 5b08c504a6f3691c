"""The papers' claims on photographs: parts, statistics, verdicts, tables, stages that stay; no figures."""

import json
import math
from pathlib import Path

import few_shot_lrp
import numpy as np
import pytest
import torch
from data.sample import Stacked
from engine.storage import StorageError

from benchmarks.claims import __main__ as command
from benchmarks.claims import boxes, few_masks, ood, report, seeds, shared, sizes
from benchmarks.claims.shared import Estimate, Outcome, Verdict, Work, best_threshold, counts, score
from segattr import StochasticConv2d, ficklenet
from segattr.metrics import best_threshold_miou, contour_f, region_similarity
from tests.forked import run
from tests.tiny_photographs import write_tiny_photographs


@pytest.fixture
def work(tmp_path: Path) -> Work:
    write_tiny_photographs(tmp_path / "photographs")
    return Work(tmp_path / "photographs", tmp_path / "work", seeds=1)


def of_random_masks(seed: int, images: int = 12, noise: float = 0.5) -> torch.Tensor:
    """Counts of random masks, of which a share is not that of the truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(3, (images, 8, 8), generator=torch.Generator().manual_seed(99))
    other = torch.randint(3, truth.shape, generator=generator)
    wrong = torch.rand(truth.shape, generator=generator) < noise
    return torch.stack([counts(o.where(w, t), t, 3) for o, w, t in zip(other, wrong, truth, strict=True)])


def test_every_fifth_training_image_is_held_out(work: Work) -> None:
    fit, held, val = (work.part(split).names for split in ("fit", "held out", "val"))
    assert len(held) == 2
    assert sorted([*fit, *held]) == sorted(work.part("fit")._images.names)
    assert not {*fit} & {*held}
    assert len(val) == 3
    assert len(Work(work.data, work.folder, images=2).part("val")) == 2


def test_scores_are_those_of_the_metrics() -> None:
    truth, found = torch.randint(4, (2, 5, 16, 16), generator=torch.Generator().manual_seed(0))
    truth[:, :2] = 255
    of_images = torch.stack([counts(f, t, 4) for f, t in zip(found, truth, strict=True)])
    each = torch.arange(4).view(-1, 1, 1)
    masks = (found[:, None] == each, truth[:, None] == each)
    region, contour = (measure(*masks, valid=truth != 255, pooled=True) for measure in (region_similarity, contour_f))
    assert score(of_images) == pytest.approx(100 * region.mean().item())
    assert score(of_images, "F") == pytest.approx(100 * contour[1:].mean().item())


def test_the_best_threshold_is_that_of_all_images() -> None:
    maps, labels = torch.rand(4, 2, 8, 8), torch.randint(3, (4, 8, 8))
    sweeps = []
    for one, truth in zip(maps, labels, strict=True):
        sweep = shared.ThresholdSweep(2)
        sweep.update(one[None], truth[None])
        sweeps.append(sweep.counts.int())
    expected, found = best_threshold_miou(maps, labels), best_threshold(torch.stack(sweeps))
    assert (found.threshold, found.miou) == (expected.threshold, pytest.approx(expected.miou))


def test_differences_are_of_pairs_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "RESAMPLES", 200)
    good, bad = of_random_masks(0, noise=0.1), of_random_masks(1, noise=0.8)
    same = shared.difference([good], [good])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    found = shared.difference([good], [bad])
    assert found.value == pytest.approx(score(good) - score(bad))
    assert 0 < found.low < found.value < found.high
    assert math.isnan(found.spread)
    assert shared.difference([bad], [good]).high < 0
    assert shared.share([bad], [good]).value == pytest.approx(100 * score(bad) / score(good))


def test_figures_are_means_over_seeds_and_have_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "RESAMPLES", 50)
    runs = [of_random_masks(seed) for seed in range(3)]
    values = [score(one) for one in runs]
    found = shared.estimate(runs)
    assert found.value == pytest.approx(np.mean(values))
    assert found.spread == pytest.approx(np.std(values, ddof=1))
    assert found.low < found.value < found.high
    both = shared.difference(runs, [runs[0]])  # maps have one run only
    assert both.value == pytest.approx(np.mean(values) - values[0])
    assert shared.of_seeds([1.0, 3.0]) == pytest.approx(Estimate(2, 2**0.5, 0, 4))
    assert math.isnan(shared.of_seeds([1.0]).low)


@pytest.mark.parametrize(
    ("found", "limits", "expected"),
    [
        (Estimate(3, 0, 1, 5), {"least": 2.0}, "holds"),
        (Estimate(3, 0, -1, 5), {"least": 2.0}, "in the mean only"),
        (Estimate(1, 0, 0.5, 5), {"least": 2.0}, "does not hold"),
        (Estimate(91, 1, -1, 95), {"least": 90, "unit": "%"}, "holds"),
        (Estimate(1, 0, 0, 2), {"most": 2.0}, "holds"),
        (Estimate(3, 0, 2, 4), {"most": 2.0}, "does not hold"),
        (None, {}, "not testable"),
    ],
)
def test_a_statement_holds_if_its_figure_and_its_interval_do(found, limits, expected) -> None:
    assert Verdict("", "", found, **limits).holds == expected


def test_a_stage_is_computed_once_for_its_settings(work: Work) -> None:
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"value": torch.tensor(float(len(made)))}

    again = Work(work.data, work.folder)
    assert work.once("stage", {"steps": 1}, make)["value"] == again.once("stage", {"steps": 1}, make)["value"] == 1
    assert work.once("stage", {"steps": 2}, make)["value"] == 2
    assert work.once("other", {"steps": 1}, make)["value"] == 3


def test_a_stage_that_was_stopped_is_made_anew(work: Work) -> None:
    def stopped() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.once("stage", {}, stopped)
    assert work.once("stage", {}, lambda: {"value": torch.ones(1)})["value"] == 1


def test_figures_and_table_are_written_and_those_of_other_claims_stay(tmp_path: Path) -> None:
    verdicts = [
        Verdict("A is better than B", "2.0", Estimate(3.25, math.nan, 1, 5), 2.0, scenes="-1"),
        Verdict("A reaches 90%", "", Estimate(92, 1.5, 88, 95), 90, unit="%"),
        Verdict("C", "1.0", None),
    ]
    outcome = Outcome({"A": Estimate(50, 0.5, 45, 55)}, verdicts, "two images")
    for name in ("maps", "sizes"):
        stored = report.read(tmp_path / "claims.json")
        stored["claims"][name] = report.entry(outcome, "command")
        report.write(tmp_path, stored)
    assert {*json.loads((tmp_path / "claims.json").read_text())["claims"]} == {"maps", "sizes"}
    table = (tmp_path / "claims.md").read_text()
    assert table.index("## 1. Sizes") < table.index("## 2. Maps")
    assert "| A is better than B | 2.0 | -1 | +3.2 | 1.0 to 5.0 | holds |" in table
    assert "| A reaches 90% |  |  | 92.0% ±1.5 | 88.0 to 95.0 | holds |" in table
    assert "| C | 1.0 |  |  |  | not testable |" in table
    assert "| A | 50.0 ±0.5 | 45.0 to 55.0 |" in table


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"claims": {"maps": {}}}', '{"claims": {"maps": {"command": 1}}}'])
def test_figures_that_cannot_be_read_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "claims.json").write_text(text)
    with pytest.raises(StorageError, match=r"^cannot read .*claims\.json: .+$"):
        report.read(tmp_path / "claims.json")


@pytest.mark.parametrize("options", [(), ("--claims", "none")])
def test_a_wrong_command_ends_with_one_line(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run("-m", "benchmarks.claims", "--data", tmp_path / "nothing", "--work", tmp_path / "work", *options)
    assert done.returncode
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert "error: " in last
    assert ("nothing" if not options else "none") in last
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("option", ["--work", "--out"])
def test_a_folder_that_cannot_be_written_is_told_before_any_work(work: Work, option: str, tmp_path: Path) -> None:
    folders = {"--work": tmp_path / "work", "--out": tmp_path / "out", option: work.data / "classes.txt" / "below"}
    done = run("-m", "benchmarks.claims", "--data", work.data, *(word for pair in folders.items() for word in pair))
    assert done.returncode == 1
    assert done.stderr == f"error: cannot write to {folders[option]}: Not a directory\n"
    assert done.stdout == ""


def test_too_few_photographs_are_refused(work: Work) -> None:
    path = work.data / "ImageSets/Segmentation/train.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:4]) + "\n")
    with pytest.raises(ValueError, match=r"expected more than 5 images in the list train, got 4$"):
        Work(work.data, work.folder).check()


def test_every_claim_has_a_title() -> None:
    assert {*command.CLAIMS} == {*report.TITLES}


def test_windows_show_background_only() -> None:
    labels = torch.zeros(2, 30, 40, dtype=torch.int64)
    labels[0, :12, 20:], labels[1] = 1, 1
    images = Stacked(("background", "cat"), torch.rand(2, 3, 30, 40), labels)
    found = [*ood.windows(images)]
    assert {own.image for own in found} == {0}
    parts = ood.Windows(images, found)
    assert len({*parts.names}) == len(parts)
    for i in range(len(parts)):
        sample = parts[i]
        assert sample["image"].shape[1:] == sample["labels"].shape
        assert not sample["labels"].any()


def test_windows_do_not_touch_void() -> None:
    labels = torch.zeros(1, 12, 12, dtype=torch.int64)
    labels[0, 5, 5] = shared.VOID
    images = Stacked(("background", "cat"), torch.rand(1, 3, 12, 12), labels)
    found = {(own.rows.start, own.columns.start) for own in ood.windows(images) if own.rows.stop - own.rows.start == 6}
    assert found == {(0, 6), (3, 6), (6, 0), (6, 3), (6, 6)}


def test_bundled_photographs_show_none_of_the_classes() -> None:
    assert {*ood.BUNDLED} - {*ood.Bundled(("background", "cat", "person")).names} == {
        "astronaut.png",
        "camera.png",
        "chelsea.png",
    }
    images = ood.Bundled(("background", "sheep"))
    for i in (0, len(images) - 1):
        assert not images[i]["labels"].any()
        assert images[i]["image"].shape[1:] == images[i]["labels"].shape


def test_f1_of_tags_is_a_mean_over_the_classes() -> None:
    logits, tags = torch.tensor([[2.0, -1], [1, 3], [-1, 2]]), torch.tensor([[1, 0], [0, 1], [0, 1]])
    assert ood.f1({"val, logits": logits, "val, tags": tags}) == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_without_hard_images_w_ood_is_not_testable(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ood, "hard", lambda work, source: (None, 3))
    outcome = ood.run(work)
    assert [verdict.holds for verdict in outcome.verdicts] == ["not testable"]
    assert "3 of 560 photographs are taken for a class" not in outcome.about  # astronaut and cat are classes here
    assert "3 of" in outcome.about


def test_seeds_are_what_maps_are_sure_of() -> None:
    scores = torch.tensor([[[0.0, 0.2, 0.3, 0.7, 0.9]], [[0.1, 0.1, 0.0, 0.0, 0.95]]])
    image = torch.rand(1, 3, 1, 5)
    images = Stacked(("background", "cat", "dog"), image, torch.zeros(1, 1, 5).long(), CAM=scores[None])
    (labels,) = seeds.sown(images, "CAM", 0.5)
    assert labels.tolist() == [[0, 0, 255, 255, 2]]


def test_growing_and_constraint_add_to_the_loss_of_seeds() -> None:
    labels = torch.full((1, 16, 16), 255)
    labels[:, :4], labels[:, 12:, 8] = 0, 1
    logits = torch.zeros(1, 3, 16, 16)
    logits[:, 0, :8], logits[:, 1, 8:12], logits[:, 1, 12:] = 9, 3, 6  # less sure where no seeds are
    batch = {"labels": labels, "tags": torch.tensor([[1, 1, 0]]), "image": torch.rand(1, 3, 16, 16)}
    batch["valid"] = torch.ones(1, 16, 16, dtype=torch.bool)
    alone, grown, constrained = (seeds.loss_of(seeds.TERMS[name])(logits, batch) for name in [*seeds.TERMS][:3])
    assert grown > alone
    assert constrained > alone


def test_passes_are_those_of_ficklenet() -> None:
    head = StochasticConv2d(4, 3, seeds.KERNEL, seeds.DROP)
    features = torch.rand(4, 6, 6)
    found = seeds.passes(head)({"image": features, "tags": torch.tensor([1, 0, 1, 0])})
    labels = ficklenet(
        features[None],
        head,
        passes=seeds.PASSES,
        threshold=0.35,
        tags=torch.tensor([[0, 1, 0]]),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(found[seeds.LARGEST][0] > 0.35, labels[0] == 1)


def test_boxes_are_those_of_connected_parts() -> None:
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[2:20, 3:23], labels[30:60, 3:40], labels[40:45, 50:55] = 1, 1, 2
    masks, classes = boxes.objects(labels, 3)
    assert classes.tolist() == [1, 1]
    assert boxes.around(masks).tolist() == [[3, 2, 23, 20], [3, 30, 40, 60]]
    assert torch.equal(boxes.filled(boxes.around(masks))[:, :64, :64], masks)
    assert boxes.objects(torch.zeros_like(labels), 3)[0].shape == (0, 64, 64)


def test_networks_start_alike_whatever_was_trained_before(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_masks, "pretrain", lambda *_: None)
    monkeypatch.setattr(few_masks, "experiment", lambda *_: few_shot_lrp.Outcome(float(torch.rand(())), 0.0, []))
    first = few_masks.Trials(work, 0).found("U-Net", 5)
    for path in (work.folder / "done").iterdir():
        path.unlink()
    again = few_masks.Trials(work, 0)
    again.found("FCN", 1)
    assert again.found("U-Net", 5) == first


@pytest.mark.slow
def test_sizes_are_trained_once_and_assessed(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "STEPS", 2)
    monkeypatch.setattr(shared, "RESAMPLES", 20)
    monkeypatch.setitem(sizes.Config.PHOTOGRAPHS, "weights", "none")
    monkeypatch.setitem(sizes.Config.QUICK, "pretrain_steps", 2)
    monkeypatch.setitem(sizes.Config.QUICK, "size", 64)
    outcome = sizes.run(work)
    assert {*outcome.figures} == {trial.name for trial in (*sizes.TRIALS, *sizes.ONCE)}
    assert all(math.isfinite(found.value) for found in outcome.figures.values())
    monkeypatch.setattr(sizes.training, "train", None)  # nothing is left to do
    assert report.entry(sizes.run(work), "command") == report.entry(outcome, "command")
