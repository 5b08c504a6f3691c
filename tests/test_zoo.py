"""The benchmark over networks: its verdicts on networks that are made for them, its tables, its command."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import zoo, zoo_checks
from benchmarks.zoo_networks import names

IMAGES = torch.randn(2, 3, 24, 18, dtype=torch.float64)
ROW = {"family": "resnet", "size": [64, 96], "parameters": 1, "seconds": 2.0, "megabytes": 3}


def net() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, 4)).double().eval()


def test_all_methods_are_right_on_a_plain_network() -> None:
    assert zoo_checks.judge(net(), IMAGES, list(zoo.METHODS)) == dict.fromkeys(zoo.METHODS, "right")


@pytest.mark.parametrize("method", ["cam", "grad_cam", "advcam"])
def test_maps_that_are_not_those_of_the_network_are_wrong(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, check = zoo_checks._MAPS[method]
    monkeypatch.setitem(zoo_checks._MAPS, method, (lambda *arguments: call(*arguments) * (1 + 1e-5), check))
    assert zoo_checks.judge(net(), IMAGES, [method])[method].startswith("wrong: maps: relative error 1")


def test_a_network_that_is_left_another_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    call, check = zoo_checks._MAPS["cam"]

    def forgetful(clf: nn.Module, images: Tensor, classes: list[int]) -> Tensor:
        maps = call(clf, images, classes)
        clf.get_submodule("model.1").running_mean.add_(1)
        return maps

    monkeypatch.setitem(zoo_checks._MAPS, "cam", (forgetful, check))
    assert zoo_checks.judge(net(), IMAGES, ["cam"])["cam"] == "wrong: leaves 1.running_mean"


def test_what_is_refused_is_told() -> None:
    verdicts = zoo_checks.judge(nn.Sequential(nn.Flatten(), nn.Linear(1296, 4)).double(), IMAGES, ["cam"])
    assert verdicts["split"].startswith("refused: ")
    assert verdicts["cam"] == verdicts["split"]


def test_a_network_that_hangs_or_raises_is_a_row() -> None:
    row = zoo.in_a_process("timm/none of this name", ["split"], patience=0.01)
    assert row == {"name": "timm/none of this name", "family": "", "split": "wrong: longer than 0.01 s"}


def test_tables_count_by_family_and_tell_reasons() -> None:
    verdicts = [{"split": "right", "cam": "refused: no"}, {"split": "wrong: error 1e-3", "cam": "wrong: error 1e-3"}]
    rows = [{"name": f"timm/{i}", **ROW, **own} for i, own in enumerate(verdicts)]
    text = zoo.tables(rows, {"torch": "2"})
    assert "| timm resnet | 2 | 1 / 0 / 1 | 0 / 1 / 1 |" in text
    assert "- `cam` refused: no: 1 (0)" in text
    assert "- `split` wrong: error n: 1 (1)" in text
    assert "`cam` wrong" not in text  # told once


def test_each_network_has_one_name() -> None:
    assert len(set(names())) == len(names())


def test_stored_results_are_what_the_tables_say() -> None:
    folder = Path(zoo.__file__).parent / "results" / "zoo"
    stored = json.loads((folder / "networks.json").read_text())
    assert zoo.tables(stored["networks"], stored["where"]) == (folder / "networks.md").read_text()


def test_a_pattern_of_no_network_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        zoo.main(["--only", "nothing", "--output", str(tmp_path)])
    assert "--only: expected a pattern of networks, got nothing" in capsys.readouterr().err
