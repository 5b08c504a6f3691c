"""A folder of NIfTI files: orientation and spacing are honoured, and one line tells whatever is wrong with a file."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from data.nifti import Volume, filling, fit, list_pairs, read_classes, read_volume
from data.sample import DataError
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

SPACING = (3.0, 1.5, 1.0)  # z, y, x
AFFINE = np.diag((*SPACING[::-1], 1.0))  # x to the right, y to the front, z up
ORIENTATIONS = ("RAS", "LPS", "LAS", "PIR", "SAL", "IRP")


def voxels(*, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Intensities and labels, ``[D, H, W]``, in which no two axes and no two ends are alike."""
    intensities = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    return intensities, (intensities // 10).astype(np.uint8) % classes


def write(path: Path, values: np.ndarray, orientation: str = "RAS", affine: np.ndarray = AFFINE) -> Path:
    """Values ``[D, H, W]``, stored in another order and direction of axes: the same places in space."""
    stored = nibabel.Nifti1Image(values.transpose(), affine)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    turned = stored.as_reoriented(turn)
    assert nibabel.aff2axcodes(turned.affine) == tuple(orientation)
    np.testing.assert_allclose(turned.affine, affine @ inv_ornt_aff(turn, stored.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(turned, path)
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_voxels_and_spacing_are_the_same_in_every_orientation(tmp_path: Path, orientation: str, ending: str) -> None:
    intensities, labels = voxels()
    image = write(tmp_path / f"image{ending}", intensities, orientation)
    masks = write(tmp_path / f"labels{ending}", labels, "RAS" if ending == ".nii" else orientation)
    volume = read_volume(image, masks, 3)
    assert volume.spacing == SPACING
    assert torch.equal(volume.labels, torch.from_numpy(labels).long())
    dark, bright = np.percentile(intensities, (0.5, 99.5))
    expected = torch.from_numpy(((intensities - dark) / (bright - dark)).clip(0, 1))
    torch.testing.assert_close(volume.image, expected.float())
    assert (volume.image.min(), volume.image.max()) == (0, 1)


def test_values_are_scaled_as_the_header_says(tmp_path: Path) -> None:
    intensities, labels = voxels()
    stored = nibabel.Nifti1Image(intensities.transpose().astype(np.int16), AFFINE)
    stored.header.set_slope_inter(2, -1024)
    nibabel.save(stored, tmp_path / "image.nii")
    plain = write(tmp_path / "plain.nii", intensities)
    masks = write(tmp_path / "labels.nii", labels.astype(np.float32))  # floats that are whole are labels
    scaled, own = (read_volume(path, masks, 3) for path in (tmp_path / "image.nii", plain))
    torch.testing.assert_close(scaled.image, own.image)
    assert torch.equal(scaled.labels, torch.from_numpy(labels).long())


Change = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, labels: (image, labels + 1), r"labels\.nii: expected labels from 0 to 2, got 3$"),
        (lambda image, labels: (image, labels + np.float32(0.5)), r"expected labels from 0 to 2, got 0\.5$"),
        (lambda image, labels: (image, labels - np.float32(1)), r"expected labels from 0 to 2, got -1$"),
        (lambda image, labels: (image, labels * np.float32(np.nan)), r"expected labels from 0 to 2, got nan$"),
        (lambda image, labels: (image, labels[:3]), r"expected \(4, 5, 6\) voxels \(z, y, x\) as .*, got \(3, 5, 6\)$"),
        (lambda image, labels: (np.where(image == 7, np.nan, image), labels), r"image\.nii: expected finite intens"),
        (lambda image, labels: (np.ones_like(image), labels), r"expected intensities that differ, got 1 nearly every"),
        (lambda image, labels: (image[0], labels), r"image\.nii: expected a volume of three dimensions, got \[6, 5\]$"),
    ],
)
def test_wrong_values_are_told_in_one_line(tmp_path: Path, change: Change, message: str) -> None:
    image, labels = change(*voxels())
    paths = [tmp_path / "image.nii", tmp_path / "labels.nii"]
    for path, values in zip(paths, (image, labels), strict=True):
        nibabel.save(nibabel.Nifti1Image(values.transpose(), AFFINE), path)
    with pytest.raises(DataError, match=message) as error:
        read_volume(*paths, 3)
    assert "\n" not in str(error.value)


def test_labels_of_another_place_are_refused(tmp_path: Path) -> None:
    intensities, labels = voxels()
    moved = AFFINE.copy()
    moved[:3, 3] = 10
    paths = write(tmp_path / "image.nii", intensities), write(tmp_path / "labels.nii", labels, affine=moved)
    with pytest.raises(DataError, match=r"labels\.nii: expected the place of the image in space, got another matrix"):
        read_volume(*paths, 3)


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    image = write(tmp_path / "image.nii.gz", voxels()[0])
    with pytest.raises(DataError, match=r"^/nowhere/labels\.nii: expected labels, found no file$"):
        read_volume(image, Path("/nowhere/labels.nii"), 3)
    (tmp_path / "text.nii").write_text("no volume")
    image.write_bytes(image.read_bytes()[:-20])
    for path in (tmp_path / "text.nii", image):
        with pytest.raises(DataError, match=rf"{path.name}: expected a NIfTI file that can be read, got: .+$") as error:
            read_volume(path, path, 3)
        assert "\n" not in str(error.value)


def test_a_damaged_compressed_file_never_gives_other_values(tmp_path: Path) -> None:
    image, labels = (write(tmp_path / f"{i}.nii.gz", values) for i, values in enumerate(voxels()))
    intact, expected = labels.read_bytes(), read_volume(image, labels, 3)
    refused = 0
    for place in range(len(intact)):
        labels.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        try:
            assert torch.equal(read_volume(image, labels, 3).labels, expected.labels)
        except DataError:
            refused += 1
    assert refused > len(intact) - 100, "all but what gzip says about the file"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(6):
        for folder, values in zip(("imagesTr", "labelsTr"), voxels(), strict=True):
            write(tmp_path / folder / f"case_{i}.nii.gz", values)
    (tmp_path / "labelsTr" / "._case_0.nii.gz").write_text("of macOS")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "tumour"}}))
    return tmp_path


def test_of_five_volumes_three_are_for_training(root: Path) -> None:
    assert read_classes(root) == ("background", "liver", "tumour")
    names = {split: [image.name[:6] for image, _ in list_pairs(root, split)] for split in ("train", "val", "final")}
    assert names == {"train": ["case_0", "case_1", "case_2", "case_5"], "val": ["case_3"], "final": ["case_4"]}
    for image, labels in list_pairs(root, "train"):
        assert read_volume(image, labels, 3).labels.max() == 2


def test_a_folder_of_another_layout_is_refused(root: Path) -> None:
    for text in ("{", "[]", '{"labels": ["background"]}', '{"labels": {"1": "liver", "2": "tumour"}}'):
        (root / "dataset.json").write_text(text)
        with pytest.raises(DataError, match=r'dataset\.json: expected "labels": {"0": "background", "1": \.\.\.}'):
            read_classes(root)
    (root / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset\.json: expected a text file, found no file"):
        read_classes(root)
    (root / "imagesTr" / "case_5.nii.gz").unlink()
    with pytest.raises(DataError, match=r"imagesTr/case_5.nii.gz: expected the image of .*labelsTr/case_5"):
        list_pairs(root, "val")
    for i in (4, 5):
        (root / "labelsTr" / f"case_{i}.nii.gz").unlink()
    with pytest.raises(DataError, match=r"labelsTr: expected at least 5 files \(\.nii or \.nii\.gz\), found 4"):
        list_pairs(root, "train")
    with pytest.raises(DataError, match=r"^/nowhere: expected a folder, found none$"):
        list_pairs(Path("/nowhere"), "train")


def volume(spacing: tuple[float, float, float] = SPACING) -> Volume:
    intensities, labels = voxels()
    return Volume(torch.from_numpy(intensities) / 119, torch.from_numpy(labels).long(), spacing)


def test_a_volume_that_fits_keeps_its_bits() -> None:
    image, labels = fit(volume(), (4, 5, 6), SPACING)
    assert torch.equal(image[0], volume().image)
    assert torch.equal(labels, volume().labels)


def test_volumes_are_cut_or_padded_about_their_centre() -> None:
    own = volume()
    image, labels = fit(own, (2, 9, 6), SPACING)
    for found, expected in ((image[0], own.image), (labels, own.labels)):
        assert torch.equal(found[:, 2:7], expected[1:3])
        assert not found[:, :2].any()
        assert not found[:, 7:].any()


def test_a_volume_in_other_units_is_named() -> None:
    large = volume((3000.0, 1500.0, 1000.0))._replace(file=Path("knee.nii"))
    with pytest.raises(DataError, match=r"^knee\.nii: expected voxels of about \(3\.0, 1\.5, 1\.0\) mm .*, got \(3000"):
        fit(large, (4, 5, 6), SPACING)


def test_coarser_voxels_hold_means_and_finer_ones_are_interpolated() -> None:
    own = volume()
    halves, labels = fit(own, (2, 5, 6), (6.0, 1.5, 1.0))
    torch.testing.assert_close(halves[0], own.image.unflatten(0, (2, 2)).mean(1))
    assert torch.equal(labels, own.labels[1::2])  # of the two centres, equally far, the upper
    finer, labels = fit(own, (4, 5, 12), (3.0, 1.5, 0.5))
    assert torch.equal(labels, own.labels.repeat_interleave(2, 2))
    inner = own.image[..., :-1] * 0.75 + own.image[..., 1:] * 0.25
    torch.testing.assert_close(finer[0, ..., 1:-1:2], inner)


def test_the_spacing_that_fills_a_shape_is_that_of_the_median_extent() -> None:
    volumes = [volume(), volume((6.0, 3.0, 2.0)), volume((30.0, 15.0, 10.0))]
    assert filling(volumes, (4, 5, 6)) == pytest.approx((6.0, 3.0, 2.0))
    assert filling(volumes, (8, 5, 6)) == pytest.approx((3.0, 3.0, 2.0))
