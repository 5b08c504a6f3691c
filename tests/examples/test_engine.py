"""The training engine: schedule, precision, accumulation, checkpoints and resume, evaluation."""

import contextlib
import copy
import dataclasses
import functools
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data.sample import VOID, Batch, Sample, Stacked
from engine import storage, training
from engine.storage import PARTIAL, StorageError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segattr.networks import evaluating
from tests.kills import same

CLASSES = ("background", "cat", "dog")
STEPS, SAVE_EVERY = 12, 4
Loss = Callable[[Tensor, Batch], Tensor]
COUNTS = {"labelled": lambda batch: (batch["labels"] != VOID).sum()}


class Stopped(Exception):
    """Raised by a loss, as if the training were killed there."""


class Fixed(nn.Module):
    """Gives the one-hot of what the first channel of the image says."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        return F.one_hot(image[:, 0].long(), 3).movedim(-1, 1).float()


@pytest.fixture(autouse=True)
def _leave_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def photos(count: int = 10, dtype: torch.dtype = torch.float32) -> Stacked:
    """Images whose first channel says their labels; each has another number of void pixels."""
    image = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    labels = (3 * image[:, 0]).long()
    for i in range(count):
        labels[i].flatten()[: 6 * i] = VOID
    return Stacked(CLASSES, image, labels)


def network(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *between, nn.ReLU(), nn.Conv2d(8, 3, 1))


def mean_over_pixels(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], ignore_index=VOID)


def mean_over_counted_pixels(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], ignore_index=VOID, reduction="sum") / batch["labelled"]


def mean_over_images(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], ignore_index=VOID, reduction="none").mean((1, 2)).mean()


def calling(action: Callable[[], object], at: int, loss: Loss = mean_over_pixels) -> Loss:
    """A loss that acts when it is called for the given time, from 0."""
    calls = iter(range(10**6))

    def acting(logits: Tensor, batch: Batch) -> Tensor:
        if next(calls) == at:
            action()
        return loss(logits, batch)

    return acting


def stop() -> None:
    raise Stopped


def fit(
    out: Path,
    model: nn.Module,
    loss: Loss = mean_over_pixels,
    *,
    data: Stacked | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = STEPS,
    evaluations: int = 0,
    counts: dict[str, Any] | None = None,
    **choices: Any,
) -> training.Progress:
    """A training of a few milliseconds."""
    options = training.Options(**{"batch_size": 4, "save_every": SAVE_EVERY, "device": "cpu", "out": out} | choices)
    data = data or photos()
    return training.train(
        model,
        loss,
        options.stream(data),
        optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2),
        steps=steps,
        name="small fit",
        options=options,
        counts=counts,
        evaluate=(lambda model: training.evaluate(model, data)) if evaluations else None,
        evaluations=evaluations,
    )


def checkpoint(out: Path) -> dict[str, Any]:
    """What the checkpoint of a training holds; how long it took is not the same twice."""
    state = storage.load(out / "checkpoints" / "small_fit.pt")
    del state["progress"]["seconds"]
    return state


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- seeds and options


def test_same_seed_same_numbers() -> None:
    drawn = []
    for _ in range(2):
        training.seed_everything(3)
        drawn.append((nn.Linear(4, 4).weight.tolist(), np.random.rand(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["batch_size", "accumulate", "workers", "save_every", "seed"])
def test_options_below_their_bounds_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')}: expected at least [01], got -1$"):
        training.Options(**{name: -1})


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^--batch-size: expected a multiple of 3 .*, got 16$"):
        training.Options(batch_size=16, accumulate=3)
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ValueError, match=r"^--batch-size: expected a multiple of 10 .*, got 16$"):
        training.Options(batch_size=16, accumulate=2)


def test_options_give_the_stream_of_their_seed() -> None:
    def shifted(sample: Sample, rng: np.random.Generator) -> Sample:
        return sample | {"image": sample["image"] + 1}

    stream = training.Options(batch_size=6, seed=5, accumulate=3, workers=0).stream(photos(), shifted)
    assert (stream.batch_size, stream.seed, stream.accumulate, stream.workers) == (6, 5, 3, 0)
    [parts] = stream.steps(0, 1)
    assert len(parts) == 3
    assert parts[0]["image"].min() >= 1


# --- schedule, learning, modes


def test_learning_rates_follow_a_polynomial_of_power_point_nine(tmp_path: Path) -> None:
    """By plain gradient descent along a gradient of 1 each weight moves by its learning rate."""
    model = nn.Conv2d(1, 1, 1)
    rates = {"weight": 1e-1, "bias": 1e-3}
    optimizer = torch.optim.SGD([{"params": [getattr(model, name)], "lr": rate} for name, rate in rates.items()])
    path: dict[str, list[float]] = {name: [] for name in rates}

    def slope(logits: Tensor, batch: Batch) -> Tensor:
        for name in rates:
            path[name].append(getattr(model, name).item())
        return -logits.mean()

    ones = Stacked(CLASSES, torch.ones(4, 1, 1, 1, dtype=torch.float64), torch.zeros(4, 1, 1, dtype=torch.int64))
    fit(tmp_path, model.double(), slope, data=ones, optimizer=optimizer, steps=10)
    for name, rate in rates.items():
        moved = torch.tensor([*path[name], getattr(model, name).item()], dtype=torch.float64).diff()
        expected = rate * (1 - torch.arange(10, dtype=torch.float64) / 10) ** 0.9
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


def test_training_learns_and_reports_its_evaluations(tmp_path: Path) -> None:
    model = network()
    progress = fit(tmp_path, model, steps=90, evaluations=3, optimizer=torch.optim.AdamW(model.parameters(), lr=0.05))
    assert [step for step, _ in progress.curve] == [30, 60, 90]
    assert progress.curve[-1][1] > 0.9
    assert progress.curve[-1][1] > progress.curve[0][1]
    assert progress.step == 90
    assert progress.seconds > 0
    assert progress.loss < 0.4


def test_the_loss_shown_is_a_running_mean(tmp_path: Path) -> None:
    losses: list[float] = []

    def spy(logits: Tensor, batch: Batch) -> Tensor:
        loss = mean_over_images(logits, batch)
        losses.append(loss.item())
        return loss

    progress = fit(tmp_path, network(), spy, accumulate=2)
    means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    expected = functools.reduce(lambda running, new: 0.95 * running + 0.05 * new, means)
    assert len(means) == STEPS
    assert progress.loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_steps_nothing_happens(tmp_path: Path) -> None:
    model = network()
    before = weights(model)
    assert fit(tmp_path, model, steps=0, evaluations=3).step == 0
    assert torch.equal(weights(model), before)


def test_frozen_normalisation_stays_frozen(tmp_path: Path) -> None:
    model = network(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    model[1].eval()
    frozen, live = (copy.deepcopy(model[i].state_dict()) for i in (1, 2))
    modes = [module.training for module in model.modules()]
    seen = []

    def spy(logits: Tensor, batch: Batch) -> Tensor:
        seen.append([module.training for module in model.modules()])
        return mean_over_pixels(logits, batch)

    fit(tmp_path, model, spy, evaluations=3)
    assert seen == [modes] * STEPS
    assert torch.equal(model[1].running_mean, frozen["running_mean"])
    assert not torch.equal(model[2].running_mean, live["running_mean"])
    assert model[2].num_batches_tracked == STEPS


# --- precision


@pytest.mark.parametrize(
    ("precision", "dtype", "error"), [("fp16", torch.float16, 2e-3), ("bf16", torch.bfloat16, 2e-2)]
)
def test_mixed_precision_computes_in_its_dtype_and_comes_close(
    precision: str, dtype: torch.dtype, error: float, tmp_path: Path
) -> None:
    seen = set()

    def spy(logits: Tensor, batch: Batch) -> Tensor:
        seen.add((logits.dtype, torch.get_autocast_dtype("cpu")))
        return mean_over_pixels(logits, batch)

    model = network(nn.GroupNorm(2, 8))
    start = copy.deepcopy(model)
    expected = fit(tmp_path / "fp32", start, steps=40).loss
    found = fit(tmp_path / precision, model, spy, steps=40, precision=precision).loss
    assert seen == {(dtype, dtype)}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=error, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_full_precision_is_not_cast(tmp_path: Path) -> None:
    def check(logits: Tensor, batch: Batch) -> Tensor:
        assert logits.dtype == torch.float64
        assert not torch.is_autocast_enabled("cpu")
        return mean_over_pixels(logits, batch)

    fit(tmp_path, network().double(), check, data=photos(dtype=torch.float64))


def test_an_infinite_gradient_costs_a_step_and_half_of_the_scale(tmp_path: Path) -> None:
    """A gradient of 1 in half precision: times the first scale, 65536, it is infinite; times 32768 it is not."""
    model = nn.Conv2d(1, 1, 1, bias=False)
    path: list[float] = []

    def slope(logits: Tensor, batch: Batch) -> Tensor:
        path.append(model.weight.item())
        return -logits.float().sum()

    one = Stacked(CLASSES, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(tmp_path, model, slope, data=one, optimizer=optimizer, steps=3, precision="fp16", batch_size=1)
    moved = torch.tensor([*path, model.weight.item()]).diff()
    expected = torch.tensor([0, 0.1 * (2 / 3) ** 0.9, 0.1 * (1 / 3) ** 0.9])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=0)
    assert checkpoint(tmp_path)["scaler"]["scale"] == 32768


@pytest.mark.parametrize(("first", "shown"), [(0, 10), (9, 10), (10, 12), (11, 12)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_training(first: int, shown: int, value: float, tmp_path: Path) -> None:
    loss = mean_over_pixels
    spoilt = iter([1.0] * first + [value] * STEPS)
    with pytest.raises(FloatingPointError, match=r"^small fit: the loss is (nan|inf) after \d+ of 12 steps$") as error:
        fit(tmp_path, network(), lambda logits, batch: loss(logits, batch) * next(spoilt))
    assert first < int(str(error.value).split()[-4]) <= shown


@pytest.mark.parametrize("save_every", [1, 4])
def test_no_checkpoint_is_written_after_the_loss_stopped_being_finite(save_every: int, tmp_path: Path) -> None:
    """A training that goes on from it could only end in the same way."""
    spoilt = iter([1.0] * 5 + [float("nan")] * STEPS)
    with pytest.raises(FloatingPointError):
        fit(tmp_path, network(), lambda logits, batch: logits.mean() * next(spoilt), save_every=save_every)
    state = checkpoint(tmp_path)
    assert state["progress"]["step"] <= 5
    assert all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    """The loss of the last step is finite, its gradient is not."""
    model = network()

    def spoil() -> None:
        model[0].weight.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(FloatingPointError, match=r"^small fit: .* not finite after 12 of 12 steps$"):
        fit(tmp_path, model, calling(spoil, STEPS - 1))
    assert checkpoint(tmp_path)["progress"]["step"] == 8


# --- accumulation


def accumulated(
    out: Path, accumulate: int, loss: Loss, counts: dict[str, Any] | None, *norm: Callable[[], nn.Module]
) -> Tensor:
    torch.manual_seed(0)
    model = network(*(make() for make in norm)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = photos(dtype=torch.float64)
    progress = fit(
        out, model, loss, data=data, optimizer=optimizer, accumulate=accumulate, counts=counts, evaluations=2
    )
    return torch.cat([weights(model), progress.loss[None], torch.tensor([miou for _, miou in progress.curve])])


@pytest.mark.parametrize("norm", [(), (lambda: nn.GroupNorm(2, 8),)])
@pytest.mark.parametrize(("loss", "counts"), [(mean_over_counted_pixels, COUNTS), (mean_over_images, None)])
def test_accumulated_batches_equal_one(
    loss: Loss, counts: dict[str, Any] | None, norm: tuple[Callable[[], nn.Module], ...], tmp_path: Path
) -> None:
    """In float64, so that another order of the sums does not hide an error."""
    expected = accumulated(tmp_path, 1, loss, counts, *norm)
    for accumulate in (2, 4):
        found = accumulated(tmp_path, accumulate, loss, counts, *norm)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_mean_over_the_pixels_of_a_batch_needs_counts_to_be_accumulated(tmp_path: Path) -> None:
    expected = accumulated(tmp_path, 1, mean_over_counted_pixels, COUNTS)
    torch.testing.assert_close(accumulated(tmp_path, 1, mean_over_pixels, None), expected)
    assert (accumulated(tmp_path, 2, mean_over_pixels, None) - expected).abs().max() > 1e-3


def test_a_step_in_which_nothing_counts_costs_nothing(tmp_path: Path) -> None:
    data = Stacked(CLASSES, torch.rand(4, 3, 8, 8), torch.full((4, 8, 8), VOID))
    model = network()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    progress = fit(tmp_path, model, mean_over_counted_pixels, data=data, optimizer=optimizer, counts=COUNTS)
    assert progress.loss == 0
    assert torch.equal(weights(model), before)


# --- stop and resume


@functools.cache
def uninterrupted(precision: str, accumulate: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder), stochastic(), evaluations=3, precision=precision, accumulate=accumulate)
        return checkpoint(Path(folder))


def stochastic() -> nn.Module:
    """The network at the beginning of a training, with all that has a state."""
    training.seed_everything(0)
    return network(nn.BatchNorm2d(8), nn.Dropout(0.3))


@settings(max_examples=18)
@given(
    stops=st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=2),
    save_every=st.integers(1, 7),
    precision=st.sampled_from(["fp32", "fp16", "bf16"]),
    accumulate=st.sampled_from([1, 2]),
)
def test_a_training_that_was_stopped_ends_bit_by_bit_as_one_that_was_not(
    stops: list[int], save_every: int, precision: str, accumulate: int
) -> None:
    choices: Any = {"evaluations": 3, "precision": precision, "accumulate": accumulate, "save_every": save_every}
    with tempfile.TemporaryDirectory() as folder:
        for steps in stops:  # since the last stop
            with contextlib.suppress(Stopped):
                fit(Path(folder), stochastic(), calling(stop, steps), resume=True, **choices)
        model = stochastic()
        progress = fit(Path(folder), model, resume=True, **choices)
        found = checkpoint(Path(folder))
    expected = uninterrupted(precision, accumulate)
    assert same(found, expected)
    assert same(dict(model.state_dict()), dict(expected["model"]))
    assert progress.curve == expected["progress"]["curve"]


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    model = stochastic()
    progress = fit(tmp_path, model, evaluations=3)
    drawn = torch.rand(3)
    content = (tmp_path / "checkpoints" / "small_fit.pt").read_bytes()
    other = stochastic()
    assert fit(tmp_path, other, calling(stop, 0), evaluations=3, resume=True) == progress
    assert torch.equal(torch.rand(3), drawn), "what comes next draws the same random numbers"
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert (tmp_path / "checkpoints" / "small_fit.pt").read_bytes() == content


def test_the_time_before_a_stop_counts(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path, network(), calling(stop, 5))
    path = tmp_path / "checkpoints" / "small_fit.pt"
    state = storage.load(path)
    state["progress"]["seconds"] = 1000.0
    storage.save(path, state)
    assert 1000 < fit(tmp_path, network(), resume=True).seconds < 1100


def test_without_resume_a_training_starts_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start, calls = network(), []
    expected = copy.deepcopy(start)
    fit(tmp_path, expected)

    def counting(logits: Tensor, batch: Batch) -> Tensor:
        calls.append(1)
        return mean_over_pixels(logits, batch)

    fit(tmp_path, start, counting)
    assert len(calls) == STEPS
    assert torch.equal(weights(start), weights(expected))


def test_a_run_that_started_over_does_not_go_on_from_the_one_before(tmp_path: Path) -> None:
    """Somebody changed the loss, started over, stopped before the first checkpoint, and then went on."""

    def run(folder: str, loss: Loss, *, resume: bool = False) -> Tensor:
        training.start(training.Options(out=tmp_path / folder, resume=resume))
        model = network()
        fit(tmp_path / folder, model, loss, resume=resume)
        return weights(model)

    expected = run("expected", mean_over_images)
    assert not torch.equal(run("changed", mean_over_pixels), expected)
    with pytest.raises(Stopped):
        run("changed", calling(stop, 2, mean_over_images))
    assert torch.equal(run("changed", mean_over_images, resume=True), expected)


def test_a_start_makes_the_folder_and_seeds(tmp_path: Path) -> None:
    options = training.Options(seed=3, out=tmp_path / "a" / "b")
    drawn = []
    for _ in range(2):
        assert training.start(options) == options.out
        drawn.append((torch.rand(3).tolist(), np.random.rand(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert not list(options.out.iterdir())


@pytest.mark.parametrize(("resume", "left"), [(False, set()), (True, {"pretraining.pt", "tags.pt"})])
def test_a_start_leaves_nothing_but_results_of_the_run_before_unless_it_goes_on(
    resume: bool, left: set[str], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "picture.png").touch()
    for name in ("pretraining.pt", "tags.pt"):
        (tmp_path / "checkpoints" / name).touch()
    training.start(training.Options(out=tmp_path, resume=resume))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == left
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"batch_size": 2}, "batch_size 4, not 2"),
        ({"accumulate": 2}, "accumulate 1, not 2"),
        ({"precision": "bf16"}, "precision fp32, not bf16"),
        ({"steps": 13}, "steps of small fit 12, not 13"),
    ],
)
def test_a_training_cannot_go_on_with_other_options(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path, network(), calling(stop, 5))
    with pytest.raises(StorageError, match=rf"^cannot resume: .*small_fit.pt was written with {message}$"):
        fit(tmp_path, network(), resume=True, **change)


def test_a_training_goes_on_with_the_same_file_of_sizes_only(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class WithSizes(training.Options):
        sizes: Path | None = None

    def train(sizes: Path | None, *, resume: bool) -> int:
        options = WithSizes(batch_size=4, device="cpu", out=tmp_path, sizes=sizes, resume=resume)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        return training.train(
            model, mean_over_pixels, options.stream(photos()), optimizer, steps=2, name="small fit", options=options
        ).step

    path = tmp_path / "sizes.csv"
    path.write_text("name,cat\na,1\n")
    train(path, resume=False)
    assert train(path, resume=True) == 2
    path.write_text("name,cat\na,0.9\n")
    with pytest.raises(StorageError, match=r"^cannot resume: .* was written with content of sizes \w+, not \w+$"):
        train(path, resume=True)
    train(None, resume=False)
    assert checkpoint(tmp_path)["settings"].keys() == {*vars(WithSizes())} - {*training.FREE} | {"steps of small fit"}


def test_a_training_can_go_on_with_options_that_change_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path, stochastic(), calling(stop, 5), evaluations=3)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    fit(moved, stochastic(), resume=True, evaluations=3, workers=1, save_every=5, device="auto")
    assert same(checkpoint(moved), uninterrupted("fp32", 1))


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    (folder / f"small_fit.pt{PARTIAL}").symlink_to("/dev/full")
    yield


@contextlib.contextmanager
def disk_that_gets_full(folder: Path) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "small_fit.pt").stat().st_size // 2, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def file_in_place_of_the_folder(folder: Path) -> Iterator[None]:
    aside = folder.rename(folder.with_name("aside"))
    folder.touch()
    yield
    folder.unlink()
    aside.rename(folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (full_disk, "No space left on device"),
        (disk_that_gets_full, "File too large"),
        (file_in_place_of_the_folder, "(File exists|Not a directory)"),
    ],
)
def test_a_training_whose_checkpoint_cannot_be_written_can_go_on_from_the_last_one(
    trouble: Callable[[Path], AbstractContextManager[None]], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    with contextlib.ExitStack() as stack:
        loss = calling(lambda: stack.enter_context(trouble(folder)), 5)
        with pytest.raises(StorageError, match=rf"^cannot write .*small_fit.pt: {reason}; .* unchanged$"):
            fit(tmp_path, stochastic(), loss, evaluations=3)
    assert [path.name for path in folder.iterdir()] == ["small_fit.pt"]
    assert checkpoint(tmp_path)["progress"]["step"] == 4
    fit(tmp_path, stochastic(), resume=True, evaluations=3)
    assert same(checkpoint(tmp_path), uninterrupted("fp32", 1))


# --- progress bar and log


def test_the_bar_shows_name_steps_loss_and_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = fit(tmp_path, network(), evaluations=3)
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1].split("\r")[-1]
    assert out == ""
    assert "small fit: 100%" in last
    assert "12/12" in last
    assert f"loss={progress.loss:.3f}" in last
    assert f"mIoU={progress.curve[-1][1]:.3f}" in last


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "tensorboard" / "small_fit"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_log_has_loss_rate_and_evaluations_at_their_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    running: list[float] = []

    def spy(logits: Tensor, batch: Batch) -> Tensor:
        loss = mean_over_images(logits, batch)
        running.append(0.95 * running[-1] + 0.05 * loss.item() if running else loss.item())
        return loss

    progress = fit(tmp_path, network(), spy, steps=25, evaluations=3, tensorboard=True)
    logged = scalars(tmp_path)
    assert logged.keys() == {"loss", "lr", "mIoU"}
    assert logged["mIoU"] == [(step, pytest.approx(miou, rel=1e-6)) for step, miou in progress.curve]
    assert [step for step, _ in progress.curve] == [8, 16, 25]
    steps = [step for step, _ in logged["loss"]]
    assert steps == sorted(set(steps))
    assert {10, 20, 25} <= set(steps)
    assert logged["loss"] == [(step, pytest.approx(running[step - 1], rel=1e-5)) for step in steps]
    rates = {step: 1e-2 * (1 - (step - 1) / 25) ** 0.9 for step in steps}
    assert logged["lr"] == [(step, pytest.approx(rate, rel=1e-5)) for step, rate in rates.items()]


def test_the_log_of_a_training_that_was_stopped_has_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    choices: Any = {"steps": 40, "evaluations": 4, "save_every": 16, "tensorboard": True}
    fit(tmp_path / "whole", stochastic(), **choices)
    with pytest.raises(Stopped):
        fit(tmp_path / "stopped", stochastic(), calling(stop, 31), **choices)
    assert [step for step, _ in scalars(tmp_path / "stopped")["loss"]][-1] == 30, "14 after the last checkpoint"
    fit(tmp_path / "stopped", stochastic(), resume=True, **choices)
    assert scalars(tmp_path / "stopped") == scalars(tmp_path / "whole")


def test_a_log_without_tensorboard_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, network(), tensorboard=True)
    assert end.value.code == "error: --tensorboard: expected the package tensorboard to be installed"


def test_tensorboard_is_not_imported_without_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    fit(tmp_path, network(), evaluations=3)
    assert not (tmp_path / "tensorboard").exists()


# --- evaluation


def test_evaluation_sums_over_the_data_set_and_leaves_out_void_pixels() -> None:
    predicted = torch.tensor([[[0, 0, 1], [1, 2, 2]], [[0, 0, 0], [0, 1, 2]], [[2, 2, 2], [2, 2, 2]]])
    labels = torch.tensor([[[0, 1, 1], [1, 2, VOID]], [[0, 0, VOID], [2, 1, 2]], [[VOID] * 3] * 2])
    data = Stacked(CLASSES, predicted[:, None].float().expand(-1, 3, -1, -1), labels)
    # Counted pixels: class 0 hits 3 of a union of 5, class 1 hits 3 of 4, class 2 hits 2 of 3.
    expected = torch.tensor([3 / 5, 3 / 4, 2 / 3])
    for batch_size in (1, 2, 50):
        for workers in (0, 1):
            iou = training.evaluate(Fixed(), data, batch_size=batch_size, workers=workers)
            torch.testing.assert_close(iou.float(), expected, rtol=1e-6, atol=0)


def test_a_class_that_is_nowhere_has_no_iou_and_does_not_count(tmp_path: Path) -> None:
    labels = torch.tensor([[[0, 0, 1, 1], [0, 1, VOID, VOID]]])
    image = torch.tensor([[[0, 0, 1, 1], [0, 0, 2, 2]]])[:, None].float().expand(-1, 3, -1, -1)
    data = Stacked(CLASSES, image, labels)
    expected = torch.tensor([3 / 4, 2 / 3, float("nan")])  # class 2 is predicted on void pixels only
    torch.testing.assert_close(training.evaluate(Fixed(), data).float(), expected, equal_nan=True)

    def still(logits: Tensor, batch: Batch) -> Tensor:
        return 0 * logits.sum().requires_grad_()

    progress = fit(tmp_path, Fixed(), still, data=data, steps=1, evaluations=1)
    assert progress.curve == [(1, pytest.approx((3 / 4 + 2 / 3) / 2))]


def test_evaluation_sees_augmented_images_in_their_order() -> None:
    image = torch.randint(3, (5, 1, 4, 4)).expand(-1, 3, -1, -1)
    data = Stacked(CLASSES, image.float(), image[:, 0].clone())

    def next_class(sample: Sample, rng: np.random.Generator) -> Sample:
        return sample | {"labels": (sample["labels"] + 1) % 3}

    assert training.evaluate(Fixed(), data).tolist() == [1, 1, 1]
    assert training.evaluate(Fixed(), data, augment=next_class).tolist() == [0, 0, 0]


def test_evaluation_neither_trains_nor_draws_random_numbers() -> None:
    model = network(nn.BatchNorm2d(8), nn.Dropout(0.5))
    before, numbers = copy.deepcopy(dict(model.state_dict())), torch.get_rng_state()
    first = training.evaluate(model, photos())
    assert torch.equal(training.evaluate(model, photos()), first)
    assert same(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not first.requires_grad
    assert torch.is_grad_enabled()


class Largest(TorchDispatchMode):
    """Finds the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.elements = max([self.elements, *made])
        return result


def test_deterministic_evaluation_needs_no_more_memory_than_the_logits() -> None:
    """All examples are deterministic, and there counts of pairs of classes may take K x K numbers for each pixel."""
    classes, images, size = 21, 4, 16
    data = Stacked(("x",) * classes, torch.rand(images, 3, size, size), torch.randint(classes, (images, size, size)))
    training.seed_everything(0)
    with Largest() as largest:
        training.evaluate(nn.Conv2d(3, classes, 1), data)
    assert largest.elements <= images * classes * size**2


@pytest.mark.parametrize("error", [None, Stopped])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 3)])
def test_modes_of_modules_are_restored_after_inference(error: type[Exception] | None, frozen: tuple[int, ...]) -> None:
    model = network(nn.BatchNorm2d(8))
    for i in frozen:
        model[i].eval()
    modes = [module.training for module in model.modules()]
    with contextlib.suppress(Stopped), evaluating(model):
        assert not any(module.training for module in model.modules())
        if error:
            raise error
    assert [module.training for module in model.modules()] == modes


def test_modes_of_modules_are_restored_after_an_evaluation_that_failed() -> None:
    model = network(nn.BatchNorm2d(8))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    training.evaluate(model, photos())
    assert [module.training for module in model.modules()] == modes
    model.register_forward_hook(lambda *_: stop())
    with pytest.raises(Stopped):
        training.evaluate(model, photos())
    assert [module.training for module in model.modules()] == modes


def test_free_options_are_options() -> None:
    """A misspelt one would be compared; ``repeats`` is one of an example."""
    assert set(training.FREE) - {"repeats"} <= {field.name for field in dataclasses.fields(training.Options)}
