"""A folder of images: what is in its files, and one line for whatever is wrong with them."""

import io
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import read_image, read_labels, read_sizes
from data.folder import Folder
from data.sample import VOID, DataError, complete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors

import segloss

CLASSES = ("background", "cat", "dög")
SIZES = "name,dög,background,cat\na,0.25,0.75,0\nb,0,0.2,0.8\nfurther,what,ever,\nc.d,0,1,0\n"

NAMES = {"a": "a.jpg", "b": "b.PNG", "c.d": "c.d.JPEG"}  # in the order of the names, not of the files
LABELS = {
    "a": np.array([[0, 1, 2], [VOID, 1, 0]]),
    "b": np.array([[1, 1], [1, 0], [VOID, VOID]]),
    "c.d": np.array([[0, 0, 0, 2]]),
}


def colours(height: int, width: int) -> np.ndarray:
    """Red above, and blue in the last column; every pixel of both in [0, 255]."""
    image = np.zeros((height, width, 3), np.uint8)
    image[0, :, 0], image[:, -1, 2] = 255, 51
    return image


def save_mask(labels: np.ndarray, path: Path, mode: str = "P") -> None:
    image = Image.fromarray(labels.astype(np.uint8))
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for folder in ("images/below", "masks"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    (tmp_path / "sizes.csv").write_text(SIZES, encoding="utf-8")
    for name, file in NAMES.items():
        Image.fromarray(colours(*LABELS[name].shape)).save(root / "images" / file, quality=100, subsampling=0)
        save_mask(LABELS[name], root / "masks" / f"{name}.png", "L" if name == "b" else "P")
    Image.fromarray(colours(4, 4)).save(root / "images" / "below" / "e.png")
    (root / "images" / "notes.txt").write_text("no image")
    return root


def read(root: Path, **options: object) -> list[dict[str, torch.Tensor]]:
    data = Folder(root, **options)  # type: ignore[arg-type]
    return [data[i] for i in range(len(data))]


def test_samples_hold_what_is_in_the_files(root: Path) -> None:
    data = Folder(root, sizes=root.parent / "sizes.csv")
    assert data.classes == CLASSES
    assert data.names == list(NAMES)
    for sample, (name, labels) in zip(data, LABELS.items(), strict=True):
        assert list(sample) == ["image", "labels", "sizes"]
        assert isinstance(sample["image"], tv_tensors.Image)
        assert isinstance(sample["labels"], tv_tensors.Mask)
        assert sample["image"].dtype == torch.float32
        expected = torch.from_numpy(colours(*labels.shape)).permute(2, 0, 1) / 255
        assert (sample["image"] - expected).abs().max() <= (0 if name == "b" else 0.03), "JPEG is not exact"
        assert sample["labels"].dtype == torch.int64
        assert sample["labels"].tolist() == labels.tolist()
    expected = torch.tensor([[0.75, 0, 0.25], [0.2, 0.8, 0], [1, 0, 0]])
    assert torch.equal(torch.stack([sample["sizes"] for sample in data]), expected)


def test_without_masks_there_need_not_be_any(root: Path) -> None:
    shutil.rmtree(root / "masks")
    samples = read(root, masks=False, sizes=root.parent / "sizes.csv")
    assert [list(sample) for sample in samples] == [["image", "sizes"]] * 3
    assert complete(samples[0], len(CLASSES))["tags"].tolist() == [1, 0, 1]


def test_labels_and_sizes_are_read_without_the_images(root: Path) -> None:
    data = Folder(root)
    shutil.rmtree(root / "images")
    assert data.labels(1).tolist() == LABELS["b"].tolist()
    expected = torch.tensor([[2 / 5, 2 / 5, 1 / 5], [1 / 4, 3 / 4, 0], [3 / 4, 0, 1 / 4]])
    torch.testing.assert_close(data.sizes(), expected)


def test_images_of_every_mode_become_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 51], [102, 255]], np.uint8))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        grey.convert(mode).save(tmp_path / "x.png")
        pixels = np.array(grey.convert(mode).convert("L")) / np.float32(255)
        assert torch.equal(read_image(tmp_path / "x.png"), torch.from_numpy(pixels).repeat(3, 1, 1))
    grey.convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    assert (read_image(tmp_path / "x.jpg")[1] * 255 - torch.tensor([[0, 51], [102, 255]])).abs().max() < 5
    grey.convert("P").save(tmp_path / "x.png", transparency=bytes(range(256)))
    assert (read_image(tmp_path / "x.png")[2] * 255).tolist() == [[0, 51], [102, 255]]


def chunks(*parts: tuple[bytes, bytes]) -> bytes:
    packed = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def png(depth: int, colour_type: int, row: bytes, *between: tuple[bytes, bytes]) -> bytes:
    """A PNG with one row of 8 pixels, in a layout that Pillow does not write, with chunks before its pixels."""
    header = (b"IHDR", struct.pack(">IIBBBBB", 8, 1, depth, colour_type, 0, 0, 0))
    palette = [(b"PLTE", bytes(range(48)))] if colour_type == 3 else []
    return chunks(header, *palette, *between, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))


@pytest.mark.parametrize(("depth", "row"), [(1, b"\x1b"), (2, b"\x1b\x1b"), (4, b"\x01\x23\x01\x23")])
def test_masks_of_few_bits_are_indices_or_refused(depth: int, row: bytes, tmp_path: Path) -> None:
    """Pillow stretches greys of 2 and 4 bits to 0..255, where a class 1 becomes 85 or 17."""
    path = tmp_path / "x.png"
    path.write_bytes(png(depth, 3, row))
    bits = f"{int.from_bytes(row, 'big'):0{8 * depth}b}"
    assert read_labels(path, 5)[0].tolist() == [int(bits[i * depth :][:depth], 2) for i in range(8)]
    path.write_bytes(png(depth, 0, row))
    with pytest.raises(DataError, match=r"x\.png: expected class indices .*, got mode (1|L;2|L;4)$"):
        read_labels(path, 21)


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def write(path: str, content: str | bytes) -> Callable[[Path], object]:
    content = content if isinstance(content, bytes) else content.encode()
    return lambda root: (root / path).write_bytes(content)


def mask(values: object, *, mode: str = "L") -> Callable[[Path], None]:
    return lambda root: Image.fromarray(np.array(values, np.uint8)).convert(mode).save(root / "masks" / "a.png")


def cut(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:-30])


AT_ONCE = [
    (remove("."), ": expected a folder, found none"),
    (remove("images"), "/images: expected a folder, found none"),
    (remove("masks"), "/masks: expected a folder, found none"),
    (remove("masks/c.d.png"), r"/masks/c\.d\.png: expected a mask, found no file"),
    (remove("classes.txt"), r"/classes\.txt: expected a text file, found no file"),
    (write("classes.txt", "\n\n"), r"/classes\.txt: expected at least one name, got an empty file"),
    (write("classes.txt", "sky"), r"/classes\.txt: expected 2 to 255 classes, the background first, got 1"),
    (write("classes.txt", "\n".join(map(str, range(256)))), r"/classes\.txt: expected 2 to 255 classes, .*, got 256"),
    (write("classes.txt", "sky\n\ncat\n"), r"/classes\.txt:2: expected a name, got an empty line"),
    (
        write("classes.txt", "sky\ncat\ndog\ncat"),
        r"/classes\.txt:4: expected every name once, got cat again \(first in line 2\)",
    ),
    (write("classes.txt", b"sky\n\xe9t\xe9"), r"/classes\.txt: expected UTF-8 text, got .* at byte 4"),
    (write("images/a.png", ""), "/images: expected one image for each name, got a.jpg and a.png"),
    (
        lambda root: [write(f"images/{file}", "")(root) for file in ("a.JPG", "a.b.png")],
        "/images: expected one image for each name, got a.JPG and a.jpg",
    ),
    (
        lambda root: [(root / "images" / file).unlink() for file in NAMES.values()],
        r"/images: expected images \(\.jpg, \.jpeg, \.png, \.bmp, \.tif, \.tiff\), found none",
    ),
]
WHEN_READ = [
    (remove("images/a.jpg"), r"/images/a\.jpg: expected a JPEG, PNG, BMP or TIFF image, found no file"),
    (
        write("images/a.jpg", ""),
        r"/images/a\.jpg: expected a JPEG, PNG, BMP or TIFF image that can be read, got: cannot .*",
    ),
    (
        write("images/a.jpg", "text\n"),
        r"/images/a\.jpg: expected a JPEG, PNG, BMP or TIFF image that can be read, got: cannot .*",
    ),
    (
        cut("images/a.jpg"),
        r"/images/a\.jpg: expected a JPEG, PNG, BMP or TIFF image that can be read, got: .*truncated.*",
    ),
    (cut("images/b.PNG"), r"/images/b\.PNG: expected a JPEG, PNG, BMP or TIFF image that can be read, got: .*"),
    (
        write("images/b.PNG", png(16, 0, bytes(16))),
        r"/images/b\.PNG: expected 8 bits for each channel, got an image of mode I;16",
    ),
    (
        write("images/b.PNG", png(8, 0, bytes(8), (b"IDAT", b""), (b"\0\1\2\3", b""))),
        r"/images/b\.PNG: expected a JPEG, PNG, BMP or TIFF image that can be read, got: broken PNG file .*",
    ),
    (
        write("images/b.PNG", png(8, 0, bytes(8), (b"zTXt", b"text\0\0" + zlib.compress(bytes(2**21))))),
        r"/images/b\.PNG: expected a JPEG, PNG, BMP or TIFF image .*, got: Decompressed data too large .*",
    ),
    (remove("masks/a.png"), r"/masks/a\.png: expected a PNG mask, found no file"),
    (write("masks/a.png", "text"), r"/masks/a\.png: expected a PNG mask that can be read, got: cannot identify .*"),
    (
        lambda root: shutil.copy(root / "images" / "a.jpg", root / "masks" / "a.png"),
        r"/masks/a\.png: expected a PNG mask that can be read, got: cannot identify .*",
    ),
    (cut("masks/a.png"), r"/masks/a\.png: expected a PNG mask that can be read, got: .*"),
    (
        mask([[0, 0, 0], [0, 0, 0]], mode="RGB"),
        r"/masks/a\.png: expected class indices \(an indexed PNG, or greys of 8 bits\), got mode RGB",
    ),
    (
        mask([[0, 0], [0, 0], [0, 0]]),
        r"/masks/a\.png: expected 3x2 \(width x height\) as the image, got 2x3",
    ),
    (mask([[0, 0, 3], [254, 0, 0]]), r"/masks/a\.png: expected labels from 0 to 2 and 255 \(void\), got 3"),
]


@pytest.mark.parametrize(("spoil", "message"), AT_ONCE)
def test_what_is_missing_is_said_at_once(root: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(root)
    with pytest.raises(DataError, match=f"^{re.escape(str(root))}{message}$"):
        Folder(root)


@pytest.mark.parametrize(("spoil", "message"), WHEN_READ)
def test_what_is_wrong_in_a_file_is_said_when_it_is_read(
    root: Path, spoil: Callable[[Path], object], message: str
) -> None:
    data = Folder(root)
    spoil(root)
    with pytest.raises(DataError, match=f"^{re.escape(str(root))}{message}$"):
        list(data)


def test_an_image_that_viewers_turn_is_refused(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3, 2)).save(root / "images" / "a.jpg", exif=exif)
    with pytest.raises(DataError, match=r"a\.jpg: expected an upright image, got EXIF orientation 6: save it turned$"):
        Folder(root)[0]


def test_an_image_too_large_to_be_true_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DataError, match=r"a\.jpg: expected .* that can be read, got: Image size \(6 pixels\) exceeds"):
        read(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: expected a header name,<class>,<class>,..., got ''"),
        ("background,cat\n", ":1: expected a header name,<class>,<class>,..., got 'background,cat'"),
        ("name,cow\n", ":1: expected columns called name or background, cat, dög, got 'cow'"),
        ("name,cat,cat\n", ":1: expected every column once, got cat twice"),
        ("name,background\na,1\n\nb,1\n", r": expected a row for each image, got none for c\.d \(1 missing\)"),
        ("name,background\na,1\nb,1\na,1\n", ":4: expected one row for each image, got another for a"),
        ("name,background,cat\na,1\n", ":2: expected 3 fields as in the header, got 2"),
        ("name,background,cat\na,1,0\nx,1,0,0\n", ":3: expected 3 fields as in the header, got 4"),
        ("name,background,cat\na,0.5,half\n", ":2: a: expected numbers of at least 0, got 'half'"),
        ("name,background,cat\na,0.5,\n", ":2: a: expected numbers of at least 0, got ''"),
        ("name,background,cat\na,1.5,-0.5\n", ":2: a: expected numbers of at least 0, got '-0.5'"),
        ("name,background,cat\na,1,nan\n", ":2: a: expected numbers of at least 0, got 'nan'"),
        ("name,background\na,inf\n", ":2: a: expected sizes that sum to 1 within 0.001, got a sum of inf"),
        (
            "name,background,cat\nx,9,9\na,0.6,0.402\n",
            r":3: a: expected sizes that sum to 1 within 0\.001, got a sum of 1\.002",
        ),
        ('name,background\n"a"b,1\n', ":2: expected comma-separated values, got: .*"),
    ],
)
def test_wrong_sizes_are_refused_with_their_line(root: Path, text: str, message: str) -> None:
    path = root.parent / "sizes.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}{message}$"):
        Folder(root, sizes=path)


def test_rounded_sizes_are_divided_by_their_sum(tmp_path: Path) -> None:
    """Losses ask for sums closer to 1 than people write."""
    (tmp_path / "sizes.csv").write_text("name,sky,cat\na,0.333,0.6662\n")
    sizes = read_sizes(tmp_path / "sizes.csv", ["a"], ["cat", "sky"])
    torch.testing.assert_close(sizes.double(), torch.tensor([[0.6662, 0.333]], dtype=torch.float64) / 0.9992)
    segloss.size_kl(torch.zeros(1, 2, 4, 4), sizes)


def test_a_missing_table_of_sizes_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"/none\.csv: expected a text file, found no file$"):
        Folder(root, sizes=root.parent / "none.csv")


def test_tables_of_spreadsheets_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sizes.csv"
    path.write_bytes('\ufeff"name", "cat, black"\r\nb,1.0004\r\n"a, first",.9996\r\n'.encode())
    sizes = read_sizes(path, ["a, first", "b"], ["background", "cat, black"])
    torch.testing.assert_close(sizes, torch.tensor([[0.0, 1.0], [0.0, 1.0]]), rtol=0, atol=1e-7)


def encoded(format: str, **options: object) -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.convert(str(options.pop("mode", "RGB"))).save(file, format, **options)
    return file.getvalue()


INTACT = [encoded("JPEG"), encoded("JPEG", progressive=True), encoded("PNG"), encoded("PNG", mode="P", bits=4)]
FURTHER = [encoded("BMP"), encoded("TIFF"), encoded("TIFF", compression="tiff_lzw")]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    intact=st.sampled_from(INTACT + FURTHER),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 700),
)
def test_damaged_files_give_one_line_or_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intact: bytes, changes: list[tuple[int, int]], end: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # damaged sizes shall not take the memory of the machine
    content = bytearray(intact)
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path / "x.png"
    path.write_bytes(content[:end])
    for read in (read_image, lambda path: read_labels(path, 5)):
        try:
            values = read(path)
        except DataError as error:
            message = str(error)
        else:
            message = None
            assert values.numel()
            assert values.min() >= 0
        assert message is None or re.fullmatch(rf"{re.escape(str(path))}: expected .*, got.*", message)


def test_intact_files_are_read_and_truncated_ones_are_not(tmp_path: Path) -> None:
    for intact in INTACT:
        (tmp_path / "x").write_bytes(intact)
        assert read_image(tmp_path / "x").shape == (3, 9, 12)
        for end in range(0, len(intact) - 20, 11):
            (tmp_path / "x").write_bytes(intact[:end])
            with pytest.raises(DataError, match="x: expected a JPEG, PNG, BMP or TIFF image that can be read, got"):
                read_image(tmp_path / "x")


def test_a_damaged_png_never_gives_other_values(tmp_path: Path) -> None:
    path, intact = tmp_path / "mask.png", encoded("PNG", mode="P")
    path.write_bytes(intact)
    expected, refused = read_labels(path, VOID), 0
    for place in range(len(intact)):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        try:
            assert torch.equal(read_labels(path, VOID), expected)
        except DataError:
            refused += 1
    assert refused > len(intact) - 20, "all but what follows the pixels"


def test_tiff_and_bmp_are_read_and_hidden_files_are_passed_over_and_counted(root: Path) -> None:
    for name, ending in (("d", "tif"), ("e", "TIFF"), ("f", "bmp")):
        Image.fromarray(colours(2, 3)).save(root / "images" / f"{name}.{ending}")
        save_mask(LABELS["a"], root / "masks" / f"{name}.png")
    for name in ("._a.jpg", ".hidden.png", ".DS_Store"):
        (root / "images" / name).write_bytes(b"no image")
    data = Folder(root)
    assert data.names == [*NAMES, "d", "e", "f"]
    for i in (3, 4, 5):
        assert torch.equal((data[i]["image"] * 255).round(), torch.from_numpy(colours(2, 3)).permute(2, 0, 1).float())
    assert data.oddities["hidden files that were passed over"] == 3


@pytest.mark.parametrize("ending", ["webp", "GIF", "heic", "jp2"])
def test_images_that_are_not_read_are_named(root: Path, ending: str) -> None:
    (root / "images" / f"z.{ending}").write_bytes(b"image")
    with pytest.raises(
        DataError, match=rf"/images/z\.{ending}: expected images \(.*\), got another format: save it as PNG$"
    ):
        Folder(root)


def test_a_tiff_of_several_pages_or_turned_or_of_16_bits_is_refused(tmp_path: Path) -> None:
    path, image = tmp_path / "x.tif", Image.new("RGB", (3, 2))
    image.save(path, save_all=True, append_images=[image])
    with pytest.raises(DataError, match=r"x\.tif: expected one image, got a file of 2 pages$"):
        read_image(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    with pytest.raises(DataError, match=r"x\.tif: expected an upright image, got EXIF orientation 6: save it turned$"):
        read_image(path)
    Image.new("I;16", (3, 2)).save(path)
    with pytest.raises(DataError, match=r"x\.tif: expected 8 bits for each channel, got an image of mode I;16$"):
        read_image(path)
