"""Two processes do the work of one: the same weights, curve, evaluation and checkpoints."""

import contextlib
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data.sample import VOID, Batch, Sample, Stacked
from engine import processes, storage, training
from parts.scribbles import all_scribbles
from torch import Tensor, nn

from tests.kills import same

PROCESSES, STEPS, STOP = 2, 8, 5
CLASSES = ("background", "cat", "dog")
COUNTS = {"labelled": lambda batch: (batch["labels"] != VOID).sum()}
Loss = Callable[[Tensor, Batch], Tensor]


class Stopped(Exception):
    """Raised by a loss, as if the training were killed there."""


class Photos(Stacked):
    """Remembers which images were read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        return super().__getitem__(index)


def photos(count: int = 5) -> Photos:
    """An odd number of images; the first channel says the labels, and each image has another number of void pixels."""
    image = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = (3 * image[:, 0]).long()
    for i in range(count):
        labels[i].flatten()[: 12 * i] = VOID
    return Photos(CLASSES, image, labels)


def network(*between: nn.Module) -> nn.Module:
    """In float64, so that another order of the sums does not hide an error."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *between, nn.ReLU(), nn.Conv2d(8, 3, 1)).double()


def group_norm() -> nn.Module:
    return network(nn.GroupNorm(2, 8))


def unused_weight() -> nn.Module:
    model = group_norm()
    model[0].unused = nn.Parameter(torch.ones(1, dtype=torch.float64))
    return model


def frozen_norm() -> nn.Module:
    model = live_norm()
    nn.init.uniform_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    model[1].eval()
    return model


def live_norm() -> nn.Module:
    return network(nn.BatchNorm2d(8))


def dropout() -> nn.Module:
    return network(nn.BatchNorm2d(8), nn.Dropout(0.5))


def mean_over_all_pixels(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], ignore_index=VOID, reduction="sum") / batch["labelled"]


def mean_over_own_pixels(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], ignore_index=VOID)


def mean_over_images(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], ignore_index=VOID, reduction="none").mean((1, 2)).mean()


# Trainings that are the same in any number of processes, and that are not; the number is that of accumulated batches.
EQUAL: dict[str, tuple[Callable[[], nn.Module], Loss, int]] = {
    "group norm": (group_norm, mean_over_all_pixels, 1),
    "frozen norm": (frozen_norm, mean_over_all_pixels, 1),
    "mean over images": (group_norm, mean_over_images, 1),
    "accumulated": (group_norm, mean_over_all_pixels, 2),
    "unused weight": (unused_weight, mean_over_all_pixels, 2),
}
UNEQUAL: dict[str, tuple[Callable[[], nn.Module], Loss, int]] = {
    "own pixels": (group_norm, mean_over_own_pixels, 1),
    "live norm": (live_norm, mean_over_all_pixels, 1),
}


def evaluated(model: nn.Module) -> Tensor:
    return training.evaluate(model, photos())


def fit(
    out: Path,
    name: str,
    model: nn.Module,
    loss: Loss,
    *,
    evaluate: Callable[[nn.Module], Tensor] | None = evaluated,
    **choices: Any,
) -> dict[str, Any]:
    """A training, and what came out of it in this process."""
    options = training.Options(**{"batch_size": 4, "save_every": 3, "device": "cpu", "out": out} | choices)
    progress = training.train(
        model,
        loss,
        options.stream(photos()),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        steps=STEPS,
        name=name,
        options=options,
        counts=COUNTS,
        evaluate=evaluate,
        evaluations=2,
    )
    weights = torch.cat([value.double().flatten() for value in model.state_dict().values()])
    return {"weights": weights, "loss": progress.loss, "curve": progress.curve, "iou": evaluated(model)}


def train_all(out: Path) -> dict[str, Any]:
    found = {}
    for name, (make, loss, accumulate) in (EQUAL | UNEQUAL).items():
        torch.manual_seed(0)
        found[name] = fit(out, name, make(), loss, accumulate=accumulate)
    return found


def stopping(at: int, loss: Loss) -> Loss:
    calls = iter(range(STEPS))

    def stop(logits: Tensor, batch: Batch) -> Tensor:
        if next(calls) == at:
            raise Stopped
        return loss(logits, batch)

    return stop


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


def train_with_dropout(out: Path, *, stop: int = STEPS, resume: bool = False) -> dict[str, Any]:
    """Each process has random numbers of its own, other ones when it is started again."""
    seed(0)
    model = dropout()
    seed(100 + 10 * resume + processes.rank())
    found = fit(out, "dropout", model, stopping(stop, mean_over_all_pixels), resume=resume)
    return found | {"random": (random.random(), np.random.rand(), torch.rand(3))}  # noqa: NPY002


def train_in_two_parts(out: Path) -> dict[str, Any]:
    with contextlib.suppress(Stopped):
        train_with_dropout(out, stop=STOP)
    return train_with_dropout(out, resume=True)


def start_training(out: Path) -> None:
    """The training with group normalisation, up to a stop."""
    torch.manual_seed(0)
    with contextlib.suppress(Stopped):
        fit(out, "group norm", group_norm(), stopping(STOP, mean_over_all_pixels))


def train_as_examples_do(out: Path) -> Tensor:
    """What dropout leaves out in the first step of this process, after the seeding of the examples."""
    training.seed_everything(0)
    model, dropped = dropout(), []
    model[2].register_forward_hook(lambda module, inputs, output: dropped.append(output == 0))
    fit(out, "as examples do", model, mean_over_images)
    return dropped[0]


def talk() -> dict[str, Any]:
    """What the processes tell each other."""
    rank = processes.rank()
    value = torch.tensor([1.0, rank])
    model = nn.BatchNorm2d(2)
    for tensor in model.state_dict().values():
        tensor.fill_(rank + 1)
    processes.same_buffers(model)
    processes.say(f"said by {rank}")
    return {
        "rank": rank,
        "count": processes.count(),
        "total": processes.total(value).tolist(),
        "value": value.tolist(),
        "gathered": processes.gather({"rank": rank, "text": "x" * rank}),
        "scribbles": all_scribbles(photos(), seed=0),
        "model": {name: tensor.max().item() for name, tensor in model.state_dict().items()},
    }


def train_live_norm(out: Path) -> list[dict[str, Any]]:
    """Without an evaluation, and with one that returns the statistics of batch normalisation."""
    return [
        fit(out / "unseen", "live norm", live_norm(), mean_over_all_pixels, evaluate=None),
        fit(out / "seen", "live norm", live_norm(), mean_over_all_pixels, evaluate=lambda model: model[1].running_mean),
    ]


def read_by_evaluation() -> list[int]:
    data = photos()
    training.evaluate(group_norm(), data, batch_size=2)
    return data.read


def evaluate_one_image() -> dict[str, Any]:
    """There is none for the second process."""
    torch.manual_seed(0)
    model = group_norm()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iou = training.evaluate(model, photos(1))
    return {"iou": iou, "warnings": [str(warning.message) for warning in caught]}


def work(rank: int, folder: Path, port: int) -> None:
    """All that two processes do, in one start of them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with open(folder / f"out{rank}", "w") as out, open(folder / f"err{rank}", "w") as err:
        sys.stdout, sys.stderr = out, err
        with processes.joined("cpu"):
            found = {
                "talk": talk(),
                "trainings": train_all(folder / "two"),
                "live": train_live_norm(folder / "live"),
                "read": read_by_evaluation(),
                "one image": evaluate_one_image(),
                "whole": train_with_dropout(folder / "whole"),
                "parts": train_in_two_parts(folder / "parts"),
                "dropped": train_as_examples_do(folder / "examples"),
            }
            start_training(folder / "started by two")
        torch.save(found | {"joined": dist.is_initialized()}, folder / f"found{rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have worked."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(folder, port), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    return train_all(tmp_path_factory.mktemp("one"))


def checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; how long the training took is not the same twice."""
    state = storage.load(path)
    del state["progress"]["seconds"]
    return state


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest one of the weights, of the loss, of the curve and of the evaluation."""
    assert [step for step, _ in found["curve"]] == [step for step, _ in expected["curve"]] == [STEPS // 2, STEPS]

    def numbers(found: dict[str, Any]) -> Tensor:
        curve = torch.tensor([miou for _, miou in found["curve"]])
        return torch.cat([found["weights"], found["loss"][None], found["iou"], curve])

    return (numbers(found) - numbers(expected)).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_as_one(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for found in two:
        assert difference(found["trainings"][name], one[name]) < 1e-9


@pytest.mark.slow
def test_a_mean_over_the_pixels_of_each_process_is_another_loss(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert difference(one["own pixels"], one["group norm"]) < 1e-9, "in one process it is the same"
    assert difference(two[0]["trainings"]["own pixels"], one["own pixels"]) > 1e-3


@pytest.mark.slow
def test_both_processes_evaluate_and_end_with_the_same_statistics_of_batch_normalisation(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    (unseen, seen), others = (found["live"] for found in two)
    assert same([unseen, seen], others)
    assert len(seen["curve"]) == 2
    first = two[0]["trainings"]["live norm"]
    assert difference(first, one["live norm"]) > 1e-3, "they are those of the images of one process"


@pytest.mark.slow
def test_each_image_is_evaluated_by_one_process(two: list[dict[str, Any]]) -> None:
    assert [sorted(found["read"]) for found in two] == [[0, 2, 4], [1, 3]]


@pytest.mark.slow
def test_a_training_goes_on_in_another_number_of_processes(folder: Path, one: dict[str, Any]) -> None:
    assert checkpoint(folder / "started by two" / "checkpoints" / "group_norm.pt")["progress"]["step"] == 3
    found = fit(folder / "started by two", "group norm", group_norm(), mean_over_all_pixels, resume=True)
    assert difference(found, one["group norm"]) < 1e-9


@pytest.mark.slow
def test_two_stopped_processes_end_bit_by_bit_as_two_that_were_not(folder: Path, two: list[dict[str, Any]]) -> None:
    for found in two:
        assert same(found["parts"], found["whole"])
    assert two[0]["whole"]["random"][:2] != two[1]["whole"]["random"][:2], "each has random numbers of its own"
    states = [checkpoint(folder / name / "checkpoints" / "dropout.pt") for name in ("parts", "whole")]
    assert same(*states)
    assert len(states[0]["random"]) == PROCESSES


@pytest.mark.slow
def test_dropout_is_another_one_in_each_process(two: list[dict[str, Any]]) -> None:
    first, second = (found["dropped"] for found in two)
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (first != second).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_processes_without_an_image_help_to_evaluate(two: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    expected = training.evaluate(group_norm(), photos(1))
    for found in two:
        torch.testing.assert_close(found["one image"]["iou"], expected)
        assert not found["one image"]["warnings"]


@pytest.mark.slow
def test_processes_talk(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        said = found["talk"]
        assert (said["rank"], said["count"]) == (rank, 2)
        assert said["total"] == [2, 1]
        assert said["value"] == [1, rank], "it is not changed itself"
        assert said["gathered"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
        buffers = dict.fromkeys(["running_mean", "running_var", "num_batches_tracked"], 1)
        assert said["model"] == buffers | dict.fromkeys(["weight", "bias"], rank + 1)
        assert not found["joined"]


@pytest.mark.slow
def test_processes_share_scribbles_which_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    expected = all_scribbles(photos(), seed=0)
    assert len({len(strokes) for strokes in expected}) > 1, "in another order they are others"
    assert all(same(found["talk"]["scribbles"], expected) for found in two)


@pytest.mark.slow
def test_the_first_process_alone_prints_and_writes(folder: Path, two: list[dict[str, Any]]) -> None:
    assert (folder / "out0").read_text() == "said by 0\n"
    assert (folder / "out1").read_text() == ""
    bars = (folder / "err0").read_text()
    assert all(f"{name}: 100%" in bars for name in EQUAL)
    assert (folder / "err1").read_text() == ""
    files = sorted(path.name for path in (folder / "two").rglob("*") if path.is_file())
    assert files == sorted(f"{name.replace(' ', '_')}.pt" for name in EQUAL | UNEQUAL)


def test_one_process_needs_no_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    model = live_norm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with processes.joined("cpu"):
        assert not dist.is_initialized()
        assert (processes.rank(), processes.count()) == (0, 1)
        assert processes.total(torch.tensor(3.0)) == 3
        assert processes.gather("value") == ["value"]
        processes.same_buffers(model)
        processes.say("said")
    assert same(dict(model.state_dict()), before)
    assert capsys.readouterr().out == "said\n"


def test_the_processes_of_torchrun_are_known_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (processes.rank(), processes.count()) == (5, 8)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.pick_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert processes.pick_device("auto") == processes.pick_device("cuda") == torch.device("cuda", 0)
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert processes.pick_device("auto") == torch.device("cuda", 3)
    else:
        assert processes.pick_device("auto") == torch.device("cpu")
        with pytest.raises(SystemExit, match=r"^error: --device cuda: PyTorch sees no CUDA device$"):
            processes.pick_device("cuda")
