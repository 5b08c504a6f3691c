"""EfficientNet-Lite0: TensorFlow's padding, the published architecture, weights of other implementations."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from parts import torchvision_cpu  # noqa: F401  (before timm, which imports torchvision)
from parts.efficientnet import EfficientNetLite0, SameConv2d
from torch import Tensor, nn

from segattr.networks import evaluating

SIZES = ((224, 224), (97, 130), (65, 32))


def worked_in(network: nn.Module) -> nn.Module:
    """A network whose batch normalisation is not that of a new one."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.bias, module.running_mean):
                nn.init.normal_(values, std=0.1)
    return network.eval()


def convolved(values: Tensor, kernel: Tensor, stride: int) -> list[float]:
    """TensorFlow's SAME in one dimension, location by location."""
    length, width = len(values), len(kernel)
    count = -(-length // stride)
    start = -(max(0, (count - 1) * stride + width - length) // 2)
    return [
        sum(float(kernel[j] * values[at + j]) for j in range(width) if 0 <= at + j < length)
        for at in range(start, start + count * stride, stride)
    ]


@given(length=st.integers(1, 12), kernel=st.sampled_from([1, 3, 5]), stride=st.sampled_from([1, 2]))
def test_padding_is_that_of_tensorflow(length: int, kernel: int, stride: int) -> None:
    layer = SameConv2d(1, 1, kernel, stride, bias=False).double()
    values, weight = torch.randn(length, dtype=torch.float64), torch.randn(kernel, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()[0, 0, kernel // 2] = weight
        found = layer(values.expand(1, 1, 1, length))[0, 0, 0]
    assert found.tolist() == pytest.approx(convolved(values, weight, stride), abs=1e-12)


def test_it_has_the_published_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in EfficientNetLite0().parameters()) == 4_652_008


def test_features_are_a_32nd_of_the_image() -> None:
    network = EfficientNetLite0(num_classes=5).eval()
    with torch.no_grad():
        for height, width in SIZES:
            features = network.features(torch.rand(1, 3, height, width))
            assert features.shape == (1, 1280, -(-height // 32), -(-width // 32))
            pooled = F.linear(features.mean((2, 3)), network.classifier.weight, network.classifier.bias)
            torch.testing.assert_close(network.classifier(network.avgpool(features).flatten(1)), pooled)


def test_weights_under_other_names_are_read_in_their_order(tmp_path: Path) -> None:
    network, other = worked_in(EfficientNetLite0()), EfficientNetLite0().eval()
    torch.save({f"layer{i}": value for i, value in enumerate(network.state_dict().values())}, tmp_path / "weights.pt")
    other.load(tmp_path / "weights.pt")
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(other(image), network(image))


@pytest.mark.slow
def test_logits_are_those_of_timm() -> None:
    timm = pytest.importorskip("timm")
    network, theirs = worked_in(EfficientNetLite0()), timm.create_model("tf_efficientnet_lite0")
    state = zip(theirs.state_dict(), network.state_dict().values(), strict=True)
    theirs.load_state_dict(dict(state))
    with torch.no_grad(), evaluating(theirs):
        for size in SIZES:
            image = torch.randn(2, 3, *size)
            torch.testing.assert_close(network(image), theirs(image), rtol=1e-5, atol=1e-5)
