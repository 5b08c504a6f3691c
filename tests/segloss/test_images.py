"""Undoing the normalisation of images."""

import pytest
import torch

import segloss


def test_denormalize_undoes_a_normalisation() -> None:
    image = torch.rand(2, 3, 4, 5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(segloss.denormalize(normalised), image)
    torch.testing.assert_close(segloss.denormalize(normalised, mean, std.tolist()), image)
    torch.testing.assert_close(segloss.denormalize(image[:, :1], [0.5], [2.0]), image[:, :1] * 2 + 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4, 4),), ValueError, r"image: expected \[B, C, H, W\], got \[3, 4, 4\]"),
        ((torch.zeros(1, 3, 4, 4, dtype=torch.uint8),), TypeError, "image: expected a floating-point tensor"),
        ((torch.zeros(1, 3, 4, 4), "abc"), TypeError, "mean: expected numbers, got 'abc'"),
        ((torch.zeros(1, 3, 4, 4), (0.5, float("nan"), 0.5)), ValueError, "mean: expected finite values"),
        ((torch.zeros(1, 3, 4, 4), (0.5, 0.5, 0.5), (0.2, 0.2, 1e300)), ValueError, "std: expected finite values"),
        ((torch.zeros(1, 4, 4, 4),), ValueError, r"std: expected \[4\] to go with image \[1, 4, 4, 4\], got \[3\]"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        segloss.denormalize(*arguments)


def test_the_mean_of_images_without_values_is_checked_all_the_same() -> None:
    with pytest.raises(ValueError, match=r"^mean: expected finite"):
        segloss.denormalize(torch.empty(1, 3, 2, 2, device="meta"), [0.5, torch.nan, 0.5])
