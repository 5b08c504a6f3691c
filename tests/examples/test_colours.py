"""Masks of VOC saved as colours become indices, or are refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from data.colours import is_coloured, read_colours
from data.files import read_labels
from data.sample import VOID, DataError
from data.write_voc import palette
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2), elements=st.sampled_from([*range(21), VOID])))
def test_colours_become_the_indices_that_a_palette_would_give(tmp_path: Path, labels: np.ndarray) -> None:
    path = tmp_path / "x.png"
    for mode in ("RGB", "RGBA"):
        Image.fromarray(palette()[labels]).convert(mode).save(path)
        assert is_coloured(path)
        assert read_colours(path, 21, size=labels.shape).tolist() == labels.tolist()
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    image.save(path)
    assert not is_coloured(path)
    assert read_labels(path, 21).tolist() == labels.tolist()


def test_every_index_has_its_colour(tmp_path: Path) -> None:
    Image.fromarray(palette()[None]).save(tmp_path / "x.png")
    assert read_colours(tmp_path / "x.png", 255 + 1).tolist() == [list(range(256))]


def coloured(colour: tuple[int, int, int], path: Path) -> None:
    pixels = np.zeros((3, 4, 3), np.uint8)
    pixels[1, 2] = colour
    Image.fromarray(pixels).save(path)


def test_other_colours_and_classes_and_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    start = f"^{re.escape(str(path))}: expected"
    for colour in ((127, 0, 0), (255, 255, 255), (0, 0, 1)):
        coloured(colour, path)
        with pytest.raises(
            DataError, match=rf"{start} colours of VOC, got \({', '.join(map(str, colour))}\) in row 1, col"
        ):
            read_colours(path, 21)
    coloured((128, 64, 128), path)  # of class 21
    with pytest.raises(DataError, match=rf"{start} labels from 0 to 20 and 255 \(void\), got 21$"):
        read_colours(path, 21)
    with pytest.raises(DataError, match=rf"{start} 3x4 \(width x height\) as the image, got 4x3$"):
        read_colours(path, 23, size=(4, 3))
    Image.new("L", (4, 3)).save(path)
    with pytest.raises(DataError, match=rf"{start} a mask of colours, got mode L$"):
        read_colours(path, 21)
    Image.new("RGBA", (4, 3)).save(path)
    with pytest.raises(DataError, match=rf"{start} a mask of colours, got one with transparent pixels$"):
        read_colours(path, 21)


def test_truncated_masks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    coloured((128, 0, 0), path)
    content = path.read_bytes()
    for end in range(0, len(content) - 16, 5):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: expected a PNG mask that can be read, got: .*$"):
            read_colours(path, 21)
