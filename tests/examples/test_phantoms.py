"""Phantoms are reproducible, their labels agree with what is drawn, and no threshold solves them."""

import hashlib

import pytest
import torch
from data.phantoms import CLASSES, VERSION, Phantom, Phantoms, Split


def digest(phantoms: Phantoms) -> str:
    sample = hashlib.sha256()
    for phantom in phantoms:
        for values in ((phantom.image * 255).round().byte(), phantom.labels.byte()):
            sample.update(values.numpy().tobytes())
    return sample.hexdigest()[:16]


def stack(phantoms: Phantoms) -> Phantom:
    return Phantom(*(torch.stack([vars(phantom)[name] for phantom in phantoms]) for name in ("image", "labels")))


def test_version_1_draws_these_bits() -> None:
    assert VERSION == 1
    assert digest(Phantoms("train", 4)) == "f15440a82473be9b"
    assert digest(Phantoms("val", 4, shape=(8, 24, 32), seed=1)) == "53ec0eb2a55a510b"


def test_a_phantom_does_not_depend_on_the_order_of_access_or_the_length() -> None:
    forward = [Phantoms("train", 3, seed=3)[i] for i in range(3)]
    phantoms = Phantoms("train", 100, seed=3)
    for i in reversed(range(3)):
        assert torch.equal(phantoms[i].image, forward[i].image)
        assert torch.equal(phantoms[i].labels, forward[i].labels)


@pytest.mark.parametrize(("one", "other"), [(("train", 0), ("train", 1)), (("train", 0), ("val", 0))])
def test_other_seeds_and_splits_give_other_phantoms(one: tuple[Split, int], other: tuple[Split, int]) -> None:
    first, second = (stack(Phantoms(split, 5, seed=seed)).image for split, seed in (one, other))
    assert (first - second).abs().amax((1, 2, 3, 4)).min() > 0


def test_volumes_have_the_shape_and_levels_of_eight_bits() -> None:
    phantom = Phantoms("train", 1, shape=(8, 20, 24))[0]
    assert phantom.image.shape == (1, 8, 20, 24)
    assert phantom.labels.shape == (8, 20, 24)
    assert 0 <= phantom.image.min() < phantom.image.max() <= 1
    assert torch.equal((phantom.image * 255).round() / 255, phantom.image)


def test_every_class_is_there_and_is_absent_in_some() -> None:
    labels = stack(Phantoms("train", 60)).labels
    for k in range(1, len(CLASSES)):
        share = (labels == k).flatten(1).any(1).float().mean()
        assert 0.4 < share < 1
        assert 0.01 < (labels == k).float().mean() < 0.15


def test_no_choice_by_intensity_finds_the_classes() -> None:
    """Each of 256 intensities takes the class that is the likeliest there, for the prior that suits each class best."""
    phantoms = stack(Phantoms("train", 60))
    levels, labels = (phantoms.image[:, 0] * 255).round().long(), phantoms.labels
    counts = torch.zeros(256, len(CLASSES)).index_put_(
        (levels.flatten(), labels.flatten()), torch.ones(labels.numel()), accumulate=True
    )
    best = torch.zeros(len(CLASSES))
    for strength in torch.linspace(0, 1, 11):
        found = (counts / counts.sum(0) ** strength).argmax(1)[levels]
        both = torch.stack([((found == k) & (labels == k)).sum() for k in range(len(CLASSES))])
        either = torch.stack([(found == k).sum() + (labels == k).sum() for k in range(len(CLASSES))])
        best = best.maximum(2 * both / either)
    assert best[1:].max() < 0.75
    assert best[1:].mean() < 0.65


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split: expected one of train, val, final, got 'test'"),
        ({"shape": (16, 4, 16)}, r"expected count >= 0 and a shape of at least 8, got count=3, shape=\(16, 4, 16\)"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phantoms(**{"split": "train", "count": 3, **options})


def test_there_is_no_phantom_beyond_the_last() -> None:
    with pytest.raises(IndexError, match="phantom 3 of 3"):
        Phantoms("train", 3)[3]
