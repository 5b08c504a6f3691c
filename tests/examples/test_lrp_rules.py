"""The rules of LRP beside each other on a photograph: by a network of random weights, and wrong options."""

from pathlib import Path

import lrp_rules
import pytest
import torch
from lrp_rules import Config, main
from matplotlib.image import imread
from parts.pretrained import Pretrained, pretrained


def random_network(name: str) -> Pretrained:
    assert name == "efficientnet_lite0"
    torch.manual_seed(0)
    return pretrained("efficientnet_lite0", "none")


@pytest.mark.slow
def test_it_draws_every_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lrp_rules, "pretrained", random_network)
    main(Config(size=64, name="tabby", out=tmp_path / "drawn"))
    assert capsys.readouterr().out.startswith("tabby: score ")
    picture = imread(tmp_path / "drawn" / "lrp_rules.png")
    assert picture.shape[1] == 1280  # four columns
    assert (picture[..., :3] != 1).any(2).mean() > 0.2


def test_the_bounds_of_the_box_are_those_of_normalised_pixels() -> None:
    low, high = torch.full((3, 1, 1), -1.0), torch.full((3, 1, 1), 2.0)
    (_, box), *_ = lrp_rules.rules(low, high)["epsilon_gamma_box"]["rule"]
    assert box.low is low
    assert box.high is high


@pytest.mark.parametrize(
    ("options", "message"), [({"blur": 0.0}, "--blur"), ({"name": "cat"}, "--name: expected"), ({"size": 8}, "--size")]
)
def test_wrong_options(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)  # type: ignore[arg-type]
