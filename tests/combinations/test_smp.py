"""Networks of segmentation_models_pytorch with an auxiliary head for tags."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segattr
from segloss import partial_cross_entropy, potts_crf, size_kl, suppression
from tests.combinations.rectangles import CLASSES, rectangles

smp = pytest.importorskip("segmentation_models_pytorch")

TAGS = CLASSES - 1  # without the background
AUXILIARY = {"classes": TAGS, "dropout": 0.2}


def network(architecture: str = "Unet", **settings: object) -> nn.Module:
    """With random weights."""
    return smp.create_model(architecture, "resnet18", None, classes=CLASSES, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Unet", "FPN", "DeepLabV3Plus", "UPerNet"])
def test_losses_on_both_heads_add_up_and_fall(architecture: str) -> None:
    image, _, sizes = rectangles(4, 64, 96)
    tags = (sizes > 0).float()
    model = network(architecture, aux_params=AUXILIARY)

    def losses() -> tuple[Tensor, ...]:
        logits, scores = model(image)
        assert logits.shape[2:] == image.shape[2:]
        on_tags = F.binary_cross_entropy_with_logits(scores, tags[:, 1:])
        crf = 1e-3 * potts_crf(logits, image, scale_factor=0.25, normalize="pixels")
        return size_kl(logits, sizes), 0.1 * suppression(logits, tags), crf, on_tags

    weight = model.encoder.conv1.weight
    each = losses()
    parts = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in each]
    (whole,) = torch.autograd.grad(torch.stack(each).sum(), weight)
    assert all(part.count_nonzero() for part in parts)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    values = []
    for _ in range(6):
        loss = torch.stack(losses()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


class TagClassifier(nn.Module):
    """The part of a network that answers for tags."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.classification_head

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(image)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Unet", "PSPNet"])
def test_maps_of_the_auxiliary_head(architecture: str) -> None:
    image = rectangles(2, 64, 96).image.double()
    model = network(architecture, aux_params=AUXILIARY).eval().double()
    clf = segattr.split(TagClassifier(model))
    torch.testing.assert_close(clf(image), model(image)[1])
    linear = model.classification_head[3]
    features = model.encoder(image)[-1]
    maps = segattr.cam(clf, image)
    torch.testing.assert_close(maps, torch.einsum("kd,bdhw->bkhw", linear.weight, features))
    torch.testing.assert_close(maps.mean((2, 3)) + linear.bias, model(image)[1])


def test_a_network_of_two_outputs_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^model: expected logits .*, got a tuple$"):
        segattr.split(network(aux_params=AUXILIARY))


def test_a_network_of_one_output_is_split_at_its_last_layer() -> None:
    image, model = rectangles(2, 64, 96).image, network().eval()
    clf = segattr.split(model)
    torch.testing.assert_close(clf(image), model(image))
    assert clf.features(image).shape == (2, 16, 64, 96)


def test_probabilities_of_an_activation_go_into_the_crf_as_such() -> None:
    image = rectangles(2, 64, 96).image
    model = network(activation="softmax2d").eval()
    probability = model(image)
    logits = model.segmentation_head[0](model.decoder(model.encoder(image)))
    torch.testing.assert_close(potts_crf(probability, image, from_logits=False), potts_crf(logits, image))


def test_cross_entropy_of_full_labels_is_that_of_the_library() -> None:
    logits, labels = torch.randn(2, CLASSES, 8, 9), torch.randint(CLASSES, (2, 8, 9))
    theirs = smp.losses.SoftCrossEntropyLoss(smooth_factor=0.0, ignore_index=255)
    torch.testing.assert_close(partial_cross_entropy(logits, labels), theirs(logits, labels))
