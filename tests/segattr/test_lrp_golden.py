"""Unrolled LRP against scores, heatmaps, ledgers and gradients of tiny networks that hold every hard case."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segattr.lrp import unroll
from tests.segattr.lrp_nets import GOLDEN, error, gradients

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
PRECISIONS = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
NETS = pytest.mark.parametrize("name", GOLDEN)

Case = dict[str, Any]


@pytest.fixture(scope="module")
def stored() -> Case:
    with np.load(Path(__file__).parents[1] / "golden/lrp/golden.npz") as arrays:
        return {name: arrays[name] for name in arrays}


def load(stored: Case, name: str, dtype: torch.dtype) -> tuple[nn.Module, Case]:
    """A network with its stored parameters, and its arrays by name."""
    case = {key.removeprefix(f"{name}/"): value for key, value in stored.items() if key.startswith(f"{name}/")}
    case = {key: value if value.dtype.kind == "U" else torch.from_numpy(np.array(value)) for key, value in case.items()}
    model = GOLDEN[name]()
    state = model.state_dict()
    state |= split(case["p"], case["p_names"], state)
    model.load_state_dict(state)
    return model.to(dtype).eval(), case


def split(values: Tensor, names: Any, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = values.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}


@PRECISIONS
@NETS
def test_scores_and_heatmaps(stored: Case, name: str, dtype: torch.dtype) -> None:
    model, case = load(stored, name, dtype)
    scores, heat = unroll(model)(case["x"].to(dtype))
    assert scores.dtype == heat.dtype == dtype
    assert error(scores, case["scores"]) < TOLERANCE[dtype]
    assert error(heat, case["heat"]) < TOLERANCE[dtype]


@PRECISIONS
@NETS
def test_ledger_by_name(stored: Case, name: str, dtype: torch.dtype) -> None:
    model, case = load(stored, name, dtype)
    ledger = unroll(model).ledger(case["x"].to(dtype))
    assert set(ledger) == set(case["ledger_names"])
    found = torch.stack([ledger[entry] for entry in case["ledger_names"]])
    assert error(found, case["ledger"]) < TOLERANCE[dtype]
    score = case["heat"].sum((2, 3)) + found.sum(0)
    assert error(score, case["scores"]) < TOLERANCE[dtype]


@PRECISIONS
@NETS
def test_gradients_of_the_losses(stored: Case, name: str, dtype: torch.dtype) -> None:
    """Of the pixel cross-entropy of the heatmaps, and with the cross-entropy of the scores added to it."""
    model, case = load(stored, name, dtype)
    scores, heat = unroll(model)(case["x"].to(dtype))
    pixels = F.cross_entropy(30 * heat, case["y"].long(), ignore_index=-1)
    tags = F.binary_cross_entropy_with_logits(scores, case["t"].to(dtype))
    assert error(pixels, case["ce"]) < TOLERANCE[dtype]
    assert error(tags, case["bce"]) < TOLERANCE[dtype]
    for loss, key in ((pixels, "g_ce"), (pixels + tags, "g_total")):
        if key in case:
            found = gradients(loss, model)
            expected = split(case[key], case["g_names"], found)
            assert set(found) == set(expected)
            for parameter, gradient in expected.items():
                scale = gradient.norm() + 1e-3 * case[key].norm()
                assert (found[parameter] - gradient).norm() < TOLERANCE[dtype] * scale, f"{key} of {parameter}"


@pytest.fixture(params=["resnet_basic", "vgg_bn"])
def training(request: pytest.FixtureRequest, stored: Case) -> tuple[nn.Module, Case]:
    """In training mode, without dropout, as the stored arrays are."""
    model, case = load(stored, request.param, torch.float64)
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model, case


def test_statistics_of_the_batch(training: tuple[nn.Module, Case]) -> None:
    model, case = training
    scores, heat = unroll(model, batch_norm="batch")(case["x"].double())
    assert error(scores, case["batchstats/scores"]) < 1e-10
    assert error(heat, case["batchstats/heat"]) < 1e-10


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("chunk", [None, 2])
def test_running_statistics_follow_once_a_step(
    training: tuple[nn.Module, Case], chunk: int | None, momentum: float | None
) -> None:
    """As those of the classifier alone do, for any number of classes, and also where the decoder runs twice."""
    model, case = training
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    alone = copy.deepcopy(model)
    unrolled = unroll(model, batch_norm="batch", chunk=chunk)
    for step in (1, 2):
        x = step * case["x"].double()
        heat = unrolled(x)[1]
        if chunk:
            heat.sum().backward()
        alone(x)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
