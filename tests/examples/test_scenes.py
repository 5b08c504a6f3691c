"""The scenes are reproducible, and their annotations agree with each other under every option."""

import hashlib

import numpy as np
import PIL
import pytest
import torch
from data.scenes import CLASSES, NUM_CLASSES, SPLITS, VERSION, VOID, Scene, Scenes, Split, _digits, _region, stack
from hypothesis import given, settings
from hypothesis import strategies as st

OPTIONS = st.fixed_dictionaries(
    {
        "split": st.sampled_from(sorted(SPLITS)),
        "size": st.sampled_from([32, 48, 65]),
        "seed": st.integers(0, 1000),
        "plain": st.sampled_from([0.0, 0.6, 1.0]),
        "cooccurrence": st.sampled_from([0.0, 0.5, 1.0]),
        "void_width": st.integers(0, 3),
    }
)


def digest(scenes: Scenes) -> str:
    sample = hashlib.sha256()
    for scene in scenes:
        for values in ((scene.image * 255).round().byte(), scene.labels.byte(), scene.parts.byte()):
            sample.update(values.numpy().tobytes())
    return sample.hexdigest()[:16]


def equal(one: Scene, other: Scene) -> bool:
    return all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())


def test_version_1_draws_these_bits() -> None:
    assert VERSION == 1
    assert digest(Scenes("train", 8, size=48)) == "df51603a83ea6b51"
    val = "1eb3f73f444ae44a" if int(PIL.__version__.partition(".")[0]) >= 13 else "f3f6136aa8d1b78d"
    assert digest(Scenes("val", 8, size=64, plain=0.75, cooccurrence=1.0, void_width=1)) == val


def test_a_scene_does_not_depend_on_the_order_of_access_or_the_length() -> None:
    forward = [Scenes("train", 6, seed=3)[i] for i in range(6)]
    scenes = Scenes("train", 100, seed=3)
    for i in reversed(range(6)):
        assert equal(scenes[i], forward[i])


def test_workers_draw_the_same_scenes() -> None:
    scenes = Scenes("val", 6, size=32)
    loader = torch.utils.data.DataLoader(scenes, batch_size=3, collate_fn=stack, num_workers=2)
    assert torch.equal(torch.cat([batch.image for batch in loader]), stack(scenes).image)


@pytest.mark.parametrize(("one", "other"), [(("train", 0), ("train", 1)), (("train", 0), ("val", 0))])
def test_other_seeds_and_splits_give_other_scenes(one: tuple[Split, int], other: tuple[Split, int]) -> None:
    first, second = (stack(Scenes(split, 20, size=32, seed=seed)).image for split, seed in (one, other))
    assert (first - second).abs().amax((1, 2, 3)).min() > 0


def test_splits_share_no_digit_and_no_region_of_a_picture() -> None:
    digits = [{digit.tobytes() for digit in _digits(split)} for split in SPLITS]
    assert sum(len(group) for group in digits) == len(set.union(*digits)) > 1700
    widths = [_region("coffee.png", split).width for split in SPLITS]
    heights = [_region("coffee.png", split).height for split in SPLITS]
    assert sum(widths) == 600
    assert heights == [400, 400, 400]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(options=OPTIONS, index=st.integers(0, 1000))
def test_annotations_agree_with_the_labels(options: dict, index: int) -> None:
    scene = Scenes(count=1001, **options)[index]
    size, classes = options["size"], scene.box_labels
    assert scene.image.shape == (3, size, size)
    assert 0 <= scene.image.min() < scene.image.max() <= 1
    assert 1 <= len(classes) <= 3

    counted = scene.labels != VOID
    counts = torch.bincount(scene.labels[counted], minlength=NUM_CLASSES)
    assert len(counts) == len(CLASSES)
    torch.testing.assert_close(scene.sizes, counts / counted.sum())
    assert torch.equal(scene.tags, (counts > 0).long())
    assert set(classes.tolist()) == set(scene.tags.nonzero().flatten().tolist()) - {0}

    objects = torch.zeros_like(scene.labels)
    for mask, label, box in zip(scene.instances, classes, scene.boxes, strict=True):
        assert mask.any()
        assert not objects[mask].any(), "visible pixels belong to one object"
        objects[mask] = label
        y, x = mask.nonzero(as_tuple=True)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert torch.equal(objects > 0, (scene.labels > 0) & counted)
    assert torch.equal(objects[objects > 0], scene.labels[objects > 0])
    assert torch.equal(scene.parts > 0, objects > 0)
    assert not scene.companions[objects > 0].any()
    assert counted.all() == (options["void_width"] == 0)


@settings(deadline=None, max_examples=20)
@given(width=st.integers(1, 3), index=st.integers(0, 1000))
def test_void_pixels_are_the_background_next_to_objects(width: int, index: int) -> None:
    plain, ringed = (Scenes("train", 1001, size=48, void_width=w)[index] for w in (0, width))
    objects = (plain.labels > 0).float()
    near = torch.nn.functional.max_pool2d(objects[None], 2 * width + 1, stride=1, padding=width)[0] > 0
    assert torch.equal(ringed.labels == VOID, near & (objects == 0))
    assert torch.equal(ringed.instances, plain.instances)
    assert torch.equal(ringed.image, plain.image)


def test_the_remainder_of_plain_objects_is_grey_and_their_part_is_as_before() -> None:
    textured, plain = (stack(Scenes("train", 30, plain=share)) for share in (0.0, 1.0))
    assert torch.equal(textured.parts, plain.parts)
    same = (textured.image == plain.image).all(1)
    assert same[plain.parts != 2].all()
    colours = plain.image.movedim(1, -1)[plain.parts == 2]
    assert torch.equal(colours[:, 0], colours[:, 2])
    share = (plain.parts == 1).sum() / (plain.parts > 0).sum()
    assert 0.1 < share < 0.4


def test_a_ground_accompanies_its_class() -> None:
    scenes = Scenes("train", 40, cooccurrence=1.0)
    kinds = [set(scene.companions.unique().tolist()) - {0} for scene in scenes]
    assert np.mean([len(kind) > 0 for kind in kinds]) > 0.9
    without = stack(Scenes("train", 40))
    assert not without.companions.any()
    assert torch.equal(stack(scenes).labels, without.labels)


def test_scenes_out_of_distribution_have_grounds_and_no_objects() -> None:
    batch = stack(Scenes("val", 30, out_of_distribution=True))
    assert not batch.labels.any()
    assert not batch.parts.any()
    assert batch.tags.tolist() == [[1, 0, 0, 0, 0]] * 30
    assert batch.sizes.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 30
    assert all(len(boxes) == 0 for boxes in batch.boxes)
    assert all((batch.companions == label).any() for label in range(1, NUM_CLASSES))
    assert batch.companions.flatten(1).any(1).all()


def test_all_classes_and_all_counts_of_objects_occur() -> None:
    batch = stack(Scenes("train", 200, size=32))
    assert batch.tags.float().mean(0)[1:].min() > 0.2
    assert {len(boxes) for boxes in batch.boxes} == {1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split: expected one of train, val, final, got 'test'"),
        ({"size": 16}, "expected count >= 0, size >= 32"),
        ({"void_width": -1}, "got count=3, size=64, void_width=-1"),
        ({"plain": 1.5}, "got plain=1.5"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**{"split": "train", "count": 3, **options})


def test_there_is_no_scene_beyond_the_last() -> None:
    with pytest.raises(IndexError, match="scene 3 of 3"):
        Scenes("train", 3)[3]
