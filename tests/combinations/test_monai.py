"""A step of MONAI's 3-D U-Net with losses of both libraries; its tensors that carry metadata."""

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceLoss
from monai.metrics import MeanIoU
from monai.networks import one_hot
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from segattr.metrics import region_similarity
from segloss import boundary_loss, signed_distances, size_kl
from tests.attack.calls_segattr import CALLS as CALLS_SEGATTR
from tests.attack.calls_segloss import CALLS as CALLS_SEGLOSS
from tests.combinations.rectangles import CLASSES, rectangles

CALLS = CALLS_SEGLOSS | CALLS_SEGATTR


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet(3, 3, CLASSES, channels=(4, 8, 16), strides=(2, 2))


def test_three_losses_of_volumes_fall_and_metadata_changes_nothing() -> None:
    image, labels, sizes = rectangles(4, 12, 16, 20)
    distances = signed_distances(labels, CLASSES, spacing=(2.0, 1.0, 1.0))
    dice = DiceLoss(to_onehot_y=True, softmax=True)

    def trained(image: Tensor, distances: Tensor, sizes: Tensor) -> tuple[list[float], Tensor]:
        model = unet()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        values = []
        for _ in range(8):
            logits = model(image)
            loss = dice(logits, labels[:, None]) + size_kl(logits, sizes) + 0.1 * boundary_loss(logits, distances)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values, torch.cat([weight.detach().flatten() for weight in model.parameters()])

    values, weights = trained(image, distances, sizes)
    assert values[-1] < values[0] - 0.5
    others, with_metadata = trained(*map(MetaTensor, (image, distances, sizes)))
    assert others == values
    assert torch.equal(with_metadata, weights)


def test_windows_put_together_give_the_size_loss_of_the_whole_volume() -> None:
    image, _, sizes = rectangles(2, 12, 16, 20)
    model = nn.Conv3d(3, CLASSES, 1)  # which windows cannot change
    logits = SlidingWindowInferer((12, 8, 8), overlap=0.5)(MetaTensor(image), model)
    torch.testing.assert_close(size_kl(logits, sizes).as_tensor(), size_kl(model(image), sizes))


def test_the_iou_of_volumes_is_that_of_monai() -> None:
    labels, found = torch.randint(CLASSES, (2, 3, 1, 6, 7, 8))
    masks, truth = one_hot(found, CLASSES), one_hot(labels, CLASSES)
    theirs = MeanIoU()(masks, truth)
    torch.testing.assert_close(region_similarity(masks.bool(), truth.bool(), dims=3), theirs)


def with_metadata(value: object) -> object:
    return MetaTensor(value) if type(value) is Tensor and value.layout == torch.strided else value


def numbers(result: object) -> list[Tensor]:
    plain = [leaf.as_tensor() if isinstance(leaf, MetaTensor) else leaf for leaf in tree_leaves(result)]
    return [leaf.to_dense() for leaf in plain if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "segloss.ToleranceError"])
def test_every_public_name_takes_tensors_with_metadata(name: str) -> None:
    results = []
    for carry in (lambda value: value, with_metadata):
        torch.manual_seed(0)
        call = CALLS[name]()
        fixed = (*call.fixed, "affinity")  # a matrix, which torch makes sparse of its own tensors only
        arguments = {key: v if key in fixed else tree_map(carry, v) for key, v in call.arguments.items()}
        torch.manual_seed(0)
        results.append(numbers(call.function(**arguments)))
    torch.testing.assert_close(results[1], results[0], equal_nan=True)
