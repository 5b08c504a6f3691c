"""Mean-field inference against a dense float64 implementation of the definition, and what it promises besides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segattr.refine import BBAM_CRF, DEEPLAB_CRF, IRN_CRF, dense_crf, label_probabilities
from segattr.refine.dense_crf import _smooth
from segloss.bilateral import guide_features
from segloss.bilateral.reference import gaussian_filter_reference


def brute_force(
    probabilities: Tensor,
    image: Tensor,
    *,
    iterations: int = 10,
    weight: float = 10.0,
    sigma_rgb: float = 5 / 255,
    sigma_xy: float = 50.0,
    smooth_weight: float = 3.0,
    smooth_sigma_xy: float = 3.0,
    spacing: tuple[float, ...] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The definition, one image after the other, with matrices of all pairs of pixels."""
    batch, classes, *size = probabilities.shape
    place = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij")).flatten(1).t().double()
    place *= torch.tensor(spacing or [1.0] * len(size), dtype=torch.float64)
    far = torch.cdist(place, place).square()
    pixels = math.prod(size)
    refined = torch.zeros(batch, classes, pixels, dtype=torch.float64)
    for b in range(batch):
        counts = torch.ones(pixels, dtype=torch.bool) if valid is None else valid[b].flatten()
        colour = image[b].flatten(1).double()
        apart = (colour[:, :, None] - colour[:, None]).square().sum(0)
        messages = []
        for w, kernel in (
            (weight, torch.exp(-apart / (2 * sigma_rgb**2) - far / (2 * sigma_xy**2))),
            (smooth_weight, torch.exp(-far / (2 * smooth_sigma_xy**2))),
        ):
            kernel = kernel * counts * counts[:, None]
            degree = kernel.sum(1).clamp(min=1e-300)
            normalised = kernel / degree.sqrt() / degree.sqrt()[:, None]
            messages.append(w * normalised.fill_diagonal_(0))
        p = probabilities[b].flatten(1).double()
        present = [k for k in range(classes) if (p[k][counts] > 0).any()]
        if not present:
            continue
        p = p[present]
        total = p.sum(0)
        share = torch.where(total > 0, p / total, 0)
        unary = share.clamp(min=1e-5).log()
        q = torch.softmax(unary, 0)
        for _ in range(iterations):
            q = torch.softmax(unary + sum(q @ message for message in messages), 0)
        refined[b, present] = q
    return refined.view_as(probabilities)


def scene(batch: int, classes: int, height: int, width: int, *, seed: int = 0, contrast: float = 0.1) -> list[Tensor]:
    """Probabilities with hard zeros among them, and images of two colours with some noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)
    probabilities = torch.softmax(logits, 1)
    image = contrast * torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)
    image[:, :, :, width // 2 :] += 0.5
    return [probabilities, image]


def smooth_scene(height: int, width: int, classes: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A picture of soft colours and edges, and blobs of classes: what block-sparse approximates."""
    generator = torch.Generator().manual_seed(3)

    def blobs(channels: int, cells: int) -> Tensor:
        coarse = torch.rand(1, channels, cells, cells, generator=generator, dtype=dtype)
        return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")

    image = (blobs(3, 5) + 0.3 * (blobs(3, 3) > 0.5) + 0.02 * blobs(3, 30)) / 1.4
    return [torch.softmax(6 * blobs(classes, 6), 1), image]


@given(
    batch=st.integers(1, 3),
    classes=st.integers(2, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    iterations=st.integers(0, 6),
    weight=st.sampled_from([0.0, 0.5, 4.0, 10.0]),
    sigma_rgb=st.sampled_from([3 / 255, 0.1, 1.0, math.inf]),
    sigma_xy=st.sampled_from([0.4, 5.0, 50.0, math.inf]),
    smooth_weight=st.sampled_from([0.0, 1.0, 3.0]),
    smooth_sigma_xy=st.sampled_from([0.1, 1.0, 3.0, math.inf]),
    masked=st.booleans(),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_exact_equals_the_definition(
    batch: int,
    classes: int,
    height: int,
    width: int,
    iterations: int,
    weight: float,
    sigma_rgb: float,
    sigma_xy: float,
    smooth_weight: float,
    smooth_sigma_xy: float,
    masked: bool,
    zeros: bool,
    seed: int,
) -> None:
    probabilities, image = scene(batch, classes, height, width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(batch, height, width, generator=generator) < 0.7 if masked else None
    if zeros:
        probabilities *= torch.rand(batch, classes, 1, 1, generator=generator) < 0.6
        probabilities *= torch.rand(batch, 1, height, width, generator=generator) < 0.8
    settings = {
        "iterations": iterations,
        "weight": weight,
        "sigma_rgb": sigma_rgb,
        "sigma_xy": sigma_xy,
        "smooth_weight": smooth_weight,
        "smooth_sigma_xy": smooth_sigma_xy,
    }
    refined = dense_crf(probabilities, image, valid=valid, method="exact", **settings)
    expected = brute_force(probabilities, image, valid=valid, **settings)
    torch.testing.assert_close(refined, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("preset", [IRN_CRF, BBAM_CRF])
def test_presets_are_settings_of_the_definition(preset: dict[str, float]) -> None:
    probabilities, image = scene(2, 3, 12, 10, contrast=0.05)
    refined = dense_crf(probabilities, image, **preset)
    torch.testing.assert_close(refined, brute_force(probabilities, image, **preset), rtol=0, atol=1e-9)


def test_presets_are_those_of_the_released_codes() -> None:
    probabilities, image = scene(1, 3, 12, 10, contrast=0.05)
    byte = {"image": 255 * image, "method": "exact"}
    irn = dense_crf(probabilities, **byte, sigma_xy=50, sigma_rgb=5, weight=10, smooth_sigma_xy=3, smooth_weight=3)
    bbam = dense_crf(probabilities, **byte, sigma_xy=80, sigma_rgb=3, weight=4, smooth_sigma_xy=1, smooth_weight=3)
    torch.testing.assert_close(dense_crf(probabilities, image, **IRN_CRF), irn)
    torch.testing.assert_close(dense_crf(probabilities, image, **BBAM_CRF), bbam)
    torch.testing.assert_close(dense_crf(probabilities, image), irn)
    assert IRN_CRF["iterations"] == BBAM_CRF["iterations"] == 10


@pytest.mark.parametrize(("tolerance", "largest"), [(1e-2, 2e-2), (1e-4, 2e-4)])
@pytest.mark.parametrize("preset", [IRN_CRF, BBAM_CRF])
def test_block_sparse_is_close_to_exact(preset: dict[str, float], tolerance: float, largest: float) -> None:
    probabilities, image = smooth_scene(60, 52)
    exact = dense_crf(probabilities, image, **preset, method="exact")
    sparse = dense_crf(probabilities, image, **preset, method="blocksparse", tolerance=tolerance)
    assert (sparse - exact).abs().max() < largest
    assert (probabilities - exact).abs().max() > 0.3


def test_auto_is_exact_for_small_images_and_block_sparse_for_others() -> None:
    for size, method in (((49, 50), "exact"), ((50, 51), "blocksparse")):
        probabilities, image = smooth_scene(*size)
        settings = {"iterations": 2, "tolerance": 0.3}
        same = dense_crf(probabilities, image, **settings)
        torch.testing.assert_close(same, dense_crf(probabilities, image, method=method, **settings), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["exact", "blocksparse"])
def test_a_batch_gives_what_its_images_give_alone(method: str) -> None:
    probabilities, image = scene(4, 5, 20, 17)
    tags = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    probabilities = probabilities * tags[:, :, None, None]
    together = dense_crf(probabilities, image, method=method)
    alone = [dense_crf(p[None], i[None], method=method) for p, i in zip(probabilities, image, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale_factor", [1.0, 0.5])
@pytest.mark.parametrize("method", ["exact", "blocksparse"])
def test_an_expanded_image_gives_what_its_copies_give(method: str, scale_factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(5, 3, 12, 10, generator=generator, dtype=torch.float64)
    probabilities[2, 1] = 0
    image = torch.rand(1, 3, 12, 10, generator=generator, dtype=torch.float64).expand(5, -1, -1, -1)
    settings = {"sigma_rgb": 0.2, "sigma_xy": 6.0, "method": method, "scale_factor": scale_factor}
    found, expected = (dense_crf(probabilities, guide, **settings) for guide in (image, image.clone()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_absent_classes_stay_zero_and_do_not_count() -> None:
    probabilities, image = scene(1, 5, 9, 8)
    probabilities[:, [1, 3]] = 0
    refined = dense_crf(probabilities, image)
    assert (refined[:, [1, 3]] == 0).all()
    torch.testing.assert_close(refined[:, [0, 2, 4]], dense_crf(probabilities[:, [0, 2, 4]], image))
    torch.testing.assert_close(refined.sum(1), torch.ones(1, 9, 8, dtype=torch.float64))


def test_a_class_that_is_alone_is_certain_and_an_image_without_classes_is_zero() -> None:
    probabilities, image = scene(2, 3, 6, 7)
    probabilities[0, 1:] = 0
    probabilities[1] = 0
    refined = dense_crf(probabilities, image)
    assert (refined[0, 0] == 1).all()
    assert (refined[0, 1:] == 0).all()
    assert (refined[1] == 0).all()


def test_only_ratios_of_probabilities_count() -> None:
    probabilities, image = scene(1, 3, 7, 8)
    scale = 0.1 + 0.9 * torch.rand(1, 1, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(dense_crf(scale * probabilities, image), dense_crf(probabilities, image))


def test_a_constant_image_leaves_no_edges() -> None:
    probabilities, _ = scene(1, 3, 8, 9)
    constant = torch.full((1, 3, 8, 9), 0.7, dtype=torch.float64)
    refined = dense_crf(probabilities, constant)
    torch.testing.assert_close(refined, dense_crf(probabilities, torch.zeros_like(constant), sigma_rgb=math.inf))
    uniform = torch.full((1, 3, 8, 9), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(dense_crf(uniform, constant), uniform)


def test_the_edge_of_the_image_becomes_that_of_the_classes() -> None:
    image = torch.zeros(1, 3, 24, 24)
    image[..., 12:] = 0.5
    truth = torch.zeros(1, 24, 24, dtype=torch.long)
    truth[..., 12:] = 1
    sloppy = torch.zeros_like(truth)
    sloppy[..., 9:] = 1
    probabilities = label_probabilities(sloppy, torch.ones(1, 2))
    assert torch.equal(dense_crf(probabilities, image).argmax(1), truth)


def test_without_kernels_or_iterations_probabilities_are_only_normalised() -> None:
    probabilities, image = scene(1, 4, 5, 6)
    torch.testing.assert_close(dense_crf(0.5 * probabilities, image, iterations=0), probabilities)
    torch.testing.assert_close(dense_crf(0.5 * probabilities, image, weight=0, smooth_weight=0), probabilities)


def test_pixels_that_are_not_valid_neither_send_nor_receive() -> None:
    probabilities, image = scene(1, 3, 10, 11)
    padded = torch.nn.functional.pad(probabilities, (0, 4, 0, 3), value=0.2)
    guide = torch.nn.functional.pad(image, (0, 4, 0, 3), value=0.3)
    valid = torch.zeros(1, 13, 15, dtype=torch.bool)
    valid[:, :10, :11] = True
    refined = dense_crf(padded, guide, valid=valid)
    torch.testing.assert_close(refined[:, :, :10, :11], dense_crf(probabilities, image), rtol=0, atol=1e-9)
    torch.testing.assert_close(refined[:, :, 10:], torch.full((1, 3, 3, 15), 1 / 3, dtype=torch.float64))


def test_classes_that_only_occur_where_nothing_is_valid_are_absent() -> None:
    probabilities, image = scene(1, 3, 6, 6)
    probabilities[:, 2, :, :3] = 0
    valid = torch.zeros(1, 6, 6, dtype=torch.bool)
    valid[:, :, :3] = True
    refined = dense_crf(probabilities, image, valid=valid)
    assert (refined[:, 2] == 0).all()
    torch.testing.assert_close(refined.sum(1), torch.ones(1, 6, 6, dtype=torch.float64))
    assert (dense_crf(probabilities, image, valid=torch.zeros_like(valid)) == 0).all()


@pytest.mark.parametrize("factor", [0.5, 0.4, 0.25])
def test_a_lower_resolution_makes_most_of_the_same_changes(factor: float) -> None:
    probabilities, image = smooth_scene(61, 50)
    full = dense_crf(probabilities, image, sigma_rgb=15 / 255)
    refined = dense_crf(probabilities, image, sigma_rgb=15 / 255, scale_factor=factor)
    torch.testing.assert_close(refined.sum(1), torch.ones(1, 61, 50, dtype=torch.float64))
    wrong, before = ((labels.argmax(1) != full.argmax(1)).double().mean() for labels in (refined, probabilities))
    assert wrong < before / 2


def test_a_lower_resolution_is_the_same_kernel_where_cells_are_uniform() -> None:
    # Colours of 2 x 2 cells differ so much that a pixel meets none but its cell: at half the resolution every message
    # is the same, but for interpolation between cells, which the narrow stripe keeps within one.
    image = torch.rand(1, 3, 1, 6, dtype=torch.float64).repeat_interleave(2, 3).repeat_interleave(2, 2)
    one = torch.full((1, 2, 2, 12), 0.5, dtype=torch.float64)
    one[:, 0], one[:, 1] = 0.8, 0.2
    settings = {"sigma_rgb": 1e-4, "sigma_xy": math.inf, "smooth_weight": 0.0}
    full = dense_crf(one, image, **settings)
    torch.testing.assert_close(dense_crf(one, image, scale_factor=0.5, **settings), full)


def test_lower_resolution_ignores_colours_and_classes_of_pixels_that_are_not_valid() -> None:
    probabilities, image = smooth_scene(24, 24)
    valid = torch.ones(1, 24, 24, dtype=torch.bool)
    valid[:, 5:11, 3:20] = False
    other, changed = image.clone(), probabilities.clone()
    other[:, :, 5:11, 3:20] = torch.rand(1, 3, 6, 17, dtype=torch.float64)
    changed[:, :, 5:11, 3:20] = torch.rand(1, 4, 6, 17, dtype=torch.float64)
    refined = dense_crf(probabilities, image, valid=valid, scale_factor=0.5)
    again = dense_crf(changed, other, valid=valid, scale_factor=0.5)
    keep = valid[:, None].expand_as(refined)
    torch.testing.assert_close(again[keep], refined[keep])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    probabilities, image = scene(1, 3, 8, 9, contrast=0.05)
    narrow = probabilities.to(dtype), image.to(dtype)
    with torch.autocast("cpu"):
        refined = dense_crf(*narrow)
    assert refined.dtype == torch.float32
    torch.testing.assert_close(refined.double(), brute_force(*narrow), rtol=0, atol=1e-4)


def test_no_gradient_flows_and_arguments_stay_as_they_are() -> None:
    probabilities, image = scene(1, 3, 6, 5)
    before = probabilities.clone(), image.clone()
    probabilities.requires_grad_()
    assert not dense_crf(probabilities, image).requires_grad
    assert torch.equal(probabilities, before[0])
    assert torch.equal(image, before[1])


def test_memory_layout_does_not_matter() -> None:
    probabilities, image = scene(2, 3, 6, 5)
    channels_last = (t.contiguous(memory_format=torch.channels_last) for t in (probabilities, image))
    torch.testing.assert_close(dense_crf(*channels_last), dense_crf(probabilities, image))


@pytest.mark.parametrize("method", ["exact", "blocksparse"])
@pytest.mark.parametrize(
    "settings",
    [
        {"weight": 1e300},
        {"smooth_weight": 1e300},
        {"sigma_rgb": 1e-300},
        {"sigma_xy": 1e-300, "smooth_sigma_xy": 1e-300},
        {"sigma_xy": 1e300, "sigma_rgb": 1e300, "smooth_sigma_xy": 1e300},
    ],
)
def test_results_are_finite_and_sum_to_one(method: str, settings: dict[str, float]) -> None:
    probabilities, image = (t.float() for t in scene(1, 3, 12, 12))
    probabilities[:, 0, :4] = 0
    probabilities[:, :, 5] = 0
    for guide in (image, torch.zeros_like(image), 1e30 * image):
        refined = dense_crf(probabilities, guide, method=method, **{"sigma_rgb": 5 / 255, **settings})
        torch.testing.assert_close(refined.sum(1), torch.ones(1, 12, 12))


def test_no_images_and_no_pixels() -> None:
    assert dense_crf(torch.ones(0, 3, 4, 5), torch.ones(0, 3, 4, 5)).shape == (0, 3, 4, 5)
    assert dense_crf(torch.ones(2, 3, 0, 5), torch.ones(2, 3, 0, 5)).shape == (2, 3, 0, 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"probabilities": [[0.5]]}, TypeError, "probabilities: expected a tensor, got list"),
        ({"probabilities": torch.ones(1, 2, 4, 5).long()}, TypeError, "probabilities: expected a floating-point"),
        (
            {"probabilities": torch.ones(4, 5)},
            ValueError,
            r"probabilities: expected \[B, K, \*spatial\] of 1 to 3 dimensions, got \[4, 5\]",
        ),
        ({"probabilities": torch.ones(1, 1, 4, 5)}, ValueError, "probabilities: expected at least 2 classes"),
        ({"probabilities": -torch.ones(1, 2, 4, 5)}, ValueError, "probabilities: expected probabilities from 0 to 1"),
        ({"probabilities": 2 * torch.ones(1, 2, 4, 5)}, ValueError, "probabilities: expected probabilities from 0"),
        ({"probabilities": torch.full((1, 2, 4, 5), torch.nan)}, ValueError, "values outside or NaN"),
        ({"image": torch.ones(1, 3, 4, 6)}, ValueError, r"image: expected \[1, 3, 4, 5\] to go with probabilities"),
        ({"image": torch.ones(1, 3, 4, 5).byte()}, TypeError, "image: expected a floating-point tensor"),
        ({"image": torch.full((1, 3, 4, 5), torch.inf)}, ValueError, "image: expected finite values"),
        ({"valid": torch.ones(1, 4, 5)}, TypeError, "valid: expected a bool tensor, got torch.float32"),
        ({"valid": [True]}, TypeError, "valid: expected a tensor, got list"),
        ({"valid": torch.ones(1, 5, 4, dtype=torch.bool)}, ValueError, r"valid: expected \[1, 4, 5\] to go with prob"),
        ({"iterations": 2.0}, TypeError, "iterations: expected an int, got float"),
        ({"iterations": -1}, ValueError, "iterations: expected a finite number of at least 0, got -1"),
        ({"weight": -1.0}, ValueError, "weight: expected a finite number of at least 0, got -1"),
        ({"weight": math.inf}, ValueError, "weight: expected a finite number"),
        ({"weight": "3"}, TypeError, "weight: expected a number, got str"),
        ({"smooth_weight": -1.0}, ValueError, "smooth_weight: expected a finite number of at least 0"),
        ({"sigma_rgb": 0.0}, ValueError, "sigma_rgb: expected a number above 0, got 0"),
        ({"sigma_rgb": torch.tensor(1.0)}, TypeError, "sigma_rgb: expected a number, got Tensor"),
        ({"sigma_xy": math.nan}, ValueError, "sigma_xy: expected a number above 0, got nan"),
        ({"smooth_sigma_xy": -3.0}, ValueError, "smooth_sigma_xy: expected a number above 0, got -3"),
        ({"scale_factor": 0.0}, ValueError, "scale_factor: expected a finite number above 0 and of at most 1"),
        ({"scale_factor": 1.5}, ValueError, "scale_factor: expected a finite number above 0 and of at most 1"),
        ({"scale_factor": 0.2}, ValueError, r"scale_factor: expected to leave at least 1 pixel of \[1, 3, 4, 5\]"),
        (
            {"method": "lowrank"},
            ValueError,
            "method: expected one of 'auto', 'exact', 'blocksparse', 'lattice', got 'lowrank'",
        ),
        ({"tolerance": 1.0}, ValueError, "tolerance: expected a finite number above 0 and below 1"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'torch', 'triton', got 'cuda'"),
        ({"backend": "triton"}, ValueError, "backend: expected a CUDA device for 'triton', got an image on cpu"),
    ],
)
def test_errors_of_dense_crf(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"probabilities": torch.full((1, 2, 4, 5), 0.5), "image": torch.ones(1, 3, 4, 5)}
    with pytest.raises(error, match=message):
        dense_crf(**{**arguments, **changes})


def test_label_probabilities_are_those_of_the_label_crf() -> None:
    labels = torch.tensor([[[0, 3], [255, 1]], [[2, 2], [255, 2]]])
    tags = torch.tensor([[1.0, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.float64)
    probabilities = label_probabilities(labels, tags, confidence=0.6)
    assert probabilities.dtype == torch.float64
    expected = [[0.6, 0.2, 0, 0.2], [0.2, 0.2, 0, 0.6], [1 / 3, 1 / 3, 0, 1 / 3], [0.2, 0.6, 0, 0.2]]
    torch.testing.assert_close(probabilities[0].flatten(1).t(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(probabilities[1, 2], torch.ones(2, 2, dtype=torch.float64))
    assert (probabilities[1, [0, 1, 3]] == 0).all()


def test_label_probabilities_without_tags_or_pixels() -> None:
    nothing = label_probabilities(torch.full((1, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, 3))
    assert (nothing == 0).all()
    assert label_probabilities(torch.zeros(0, 2, 2).long(), torch.zeros(0, 3)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": torch.zeros(1, 2, 2)}, TypeError, "labels: expected an integer tensor, got torch.float32"),
        ({"labels": torch.zeros(2).long()}, ValueError, r"labels: expected \[B, \*spatial\], got \[2\]"),
        ({"labels": torch.full((1, 2, 2), 7)}, ValueError, "labels: expected classes 0 to 2 or 255 to ignore, got 7"),
        ({"labels": torch.full((1, 2, 2), 1)}, ValueError, "labels: expected classes with a tag, got 1 without"),
        ({"tags": [1, 0, 1]}, TypeError, "tags: expected a tensor, got list"),
        ({"tags": torch.ones(3)}, ValueError, r"tags: expected \[B, K\], got \[3\]"),
        (
            {"tags": torch.ones(2, 3)},
            ValueError,
            r"tags: expected \[1, 3\] to go with labels \[1, 2, 2\], got \[2, 3\]",
        ),
        ({"tags": torch.tensor([[1.0, 0.5, 1.0]])}, ValueError, "tags: expected 0 or 1, got 0.5"),
        ({"confidence": 1.0}, ValueError, "confidence: expected a finite number above 0 and below 1, got 1"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
    ],
)
def test_errors_of_label_probabilities(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "labels": torch.tensor([[[0, 2], [255, 0]]]),
        "tags": torch.tensor([[1.0, 0.0, 1.0]]),
    }
    with pytest.raises(error, match=message):
        label_probabilities(**{**arguments, **changes})


@pytest.mark.gpu
def test_devices_agree() -> None:
    probabilities, image = smooth_scene(96, 80, dtype=torch.float32)
    on_cpu = dense_crf(probabilities, image, tolerance=1e-4)
    for backend in ("torch", "triton"):
        on_gpu = dense_crf(probabilities.cuda(), image.cuda(), tolerance=1e-4, backend=backend)
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale_factor", [1.0, 0.5])
def test_the_largest_images_give_finite_probabilities(scale_factor: float) -> None:
    probabilities = torch.rand(1, 2, 6, 4)
    refined = dense_crf(probabilities, torch.full((1, 3, 6, 4), 3e38), sigma_rgb=5 / 255, scale_factor=scale_factor)
    torch.testing.assert_close(refined.sum(1), torch.ones(1, 6, 4))


def test_tensors_without_values() -> None:
    with pytest.raises(ValueError, match="probabilities: expected a tensor with values"):
        dense_crf(torch.rand(1, 2, 6, 4, device="meta"), torch.rand(1, 3, 6, 4, device="meta"))


def off(refined: Tensor, expected: Tensor) -> float:
    """Share of the pixels with another label."""
    return (refined.argmax(1) != expected.argmax(1)).double().mean().item()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("preset", [IRN_CRF, BBAM_CRF, DEEPLAB_CRF])
def test_the_lattice_makes_most_of_the_changes_of_the_exact_kernel(preset: dict[str, float], own: bool) -> None:
    probabilities, image = smooth_scene(60, 52, dtype=torch.float32)
    exact, lattice = (
        dense_crf(probabilities, image, **preset, own=own, method=method) for method in ("exact", "lattice")
    )
    assert off(lattice, exact) < min(0.04, off(probabilities, exact) / 2)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("preset", [IRN_CRF, BBAM_CRF])
def test_a_filled_lattice_has_fewer_labels_wrong(preset: dict[str, float], own: bool) -> None:
    probabilities, image = smooth_scene(60, 52, dtype=torch.float32)
    exact = dense_crf(probabilities, image, **preset, own=own, method="exact")
    sparse, filled = (
        dense_crf(probabilities, image, **preset, own=own, method="lattice", filled=filled) for filled in (False, True)
    )
    assert off(filled, exact) < off(sparse, exact)


def test_the_lattice_is_the_default_from_10000_pixels_where_it_can_be() -> None:
    for size, sigma_rgb, method in (
        ((99, 100), 0.1, "blocksparse"),
        ((100, 100), 0.1, "lattice"),
        ((100, 100), 1e-7, "blocksparse"),
    ):
        probabilities, image = smooth_scene(*size, dtype=torch.float32)
        settings = {"iterations": 1, "tolerance": 0.3, "sigma_xy": 4.0, "sigma_rgb": sigma_rgb}
        same = dense_crf(probabilities, image, **settings)
        torch.testing.assert_close(same, dense_crf(probabilities, image, method=method, **settings), rtol=0, atol=0)
    with pytest.raises(ValueError, match="method: 'lattice' is not accurate on image 0"):
        dense_crf(probabilities, image, method="lattice", sigma_rgb=1e-7)


def test_own_messages_are_those_of_pixels_to_themselves() -> None:
    probabilities, image = scene(2, 3, 7, 6, contrast=0.05)
    settings = {"iterations": 1, "weight": 2.0, "smooth_weight": 0.5}
    without, kept = (dense_crf(probabilities, image, own=own, **settings) for own in (False, True))
    features = guide_features(image, 5 / 255, 50.0)
    one = torch.ones(2, 1, 42, dtype=torch.float64)
    message = torch.zeros(2, 3, 42, dtype=torch.float64)
    for weight, guide in ((2.0, features), (0.5, features[:, -2:] * 50 / 3)):
        message += weight * probabilities.flatten(2) / gaussian_filter_reference(one, guide)
    expected = (without.log() + message.view_as(without)).softmax(1)
    torch.testing.assert_close(kept, expected)


def test_pixels_that_are_not_valid_do_not_count_on_the_lattice_either() -> None:
    probabilities, image = smooth_scene(40, 36)
    valid = torch.ones(1, 40, 36, dtype=torch.bool)
    valid[:, 5:20, 3:20] = False
    changed = torch.where(valid, probabilities, 0.25)
    options = {"valid": valid, "method": "lattice"}
    refined, again = (dense_crf(p, image, **options)[:, :, valid[0]] for p in (probabilities, changed))
    torch.testing.assert_close(refined, again)


@pytest.mark.parametrize("sigma", [0.3, 3.0, 40.0, math.inf])
@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 97)])
def test_the_kernel_of_position_is_exact_to_rounding(sigma: float, size: tuple[int, int]) -> None:
    probabilities, _ = scene(2, 3, *size)
    found = _smooth(probabilities[:, :1], sigma, None)(probabilities)
    rows, columns = (
        torch.exp(-((torch.arange(n)[:, None] - torch.arange(n)).double() / sigma).square() / 2) for n in size
    )
    torch.testing.assert_close(found, rows @ probabilities @ columns)


def spatial_scene(shape: tuple[int, ...], *, channels: int = 1, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, 3, *shape, generator=generator, dtype=torch.float64)
    return logits.softmax(1), torch.rand(batch, channels, *shape, generator=generator, dtype=torch.float64)


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    spacing=st.lists(st.sampled_from([0.4, 1.0, 3.0]), min_size=3, max_size=3),
    masked=st.booleans(),
    channels=st.integers(1, 3),
)
def test_signals_and_volumes_equal_the_dense_definition(
    shape: tuple[int, ...], spacing: list[float], masked: bool, channels: int
) -> None:
    probabilities, image = spatial_scene(shape, channels=channels)
    valid = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    options = {"iterations": 4, "sigma_rgb": 0.3, "sigma_xy": 3.0, "smooth_sigma_xy": 1.5, "valid": valid}
    options |= {"spacing": tuple(spacing[: len(shape)])}
    refined = dense_crf(probabilities, image, **options)
    counts = slice(None) if valid is None else valid[:, None].expand_as(refined)
    torch.testing.assert_close(refined[counts], brute_force(probabilities, image, **options)[counts])


@pytest.mark.parametrize("sigma", [0.3, 3.0, math.inf])
@pytest.mark.parametrize("shape", [(70,), (40, 9), (35, 3, 40)])
def test_the_kernel_of_position_is_a_product_over_all_axes(sigma: float, shape: tuple[int, ...]) -> None:
    probabilities, _ = spatial_scene(shape)
    spacing = (2.0, 0.5, 1.0)[: len(shape)]
    expected = probabilities
    for axis, (length, step) in enumerate(zip(shape, spacing, strict=True), 2):
        apart = step * (torch.arange(length)[:, None] - torch.arange(length)).double()
        weights = (apart / sigma).square().div(-2).exp()
        expected = (expected.movedim(axis, -1) @ weights).movedim(-1, axis)
    torch.testing.assert_close(_smooth(probabilities[:, :1], sigma, spacing)(probabilities), expected)


@pytest.mark.parametrize("shape", [(12000,), (24, 22, 20)])
def test_the_lattice_refines_signals_and_volumes(shape: tuple[int, ...]) -> None:
    truth = torch.zeros(shape, dtype=torch.int64)
    truth[tuple(slice(length // 4, 3 * length // 4) for length in shape)] = 1
    generator = torch.Generator().manual_seed(0)
    image = (0.3 + 0.3 * truth + 0.02 * torch.randn(shape, generator=generator))[None, None]
    noisy = torch.where(torch.rand(shape, generator=generator) < 0.25, 1 - truth, truth)
    probabilities = label_probabilities(noisy[None], torch.ones(1, 2), confidence=0.6)
    spacing = (2.0, 1.0, 1.0)[: len(shape)]
    refined = dense_crf(probabilities, image, sigma_rgb=0.1, sigma_xy=10.0, weight=4.0, spacing=spacing)
    assert (refined[0].argmax(0) != truth).double().mean() < 0.02


@pytest.mark.parametrize("shape", [(40,), (10, 12, 16)])
def test_volumes_may_be_refined_at_half_the_resolution(shape: tuple[int, ...]) -> None:
    probabilities, image = spatial_scene(shape)
    options = {"sigma_rgb": 0.5, "sigma_xy": 4.0, "weight": 1.0}
    whole, half = (dense_crf(probabilities, image, scale_factor=s, **options) for s in (1.0, 0.5))
    torch.testing.assert_close(half.sum(1), torch.ones_like(half[:, 0]))
    assert 0 < (half - whole).abs().mean() < 0.2


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, math.nan), (1.0, -1.0)])
def test_spacings_that_make_no_sense_are_refused(spacing: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="spacing: expected"):
        dense_crf(*spatial_scene((4, 5)), spacing=spacing)
