"""What an installed package promises: its names, a quiet and light import, types."""

import ast
import inspect
import operator
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import segattr
import segloss

ROOT = Path(__file__).parents[1]
PACKAGES = [segloss, segattr]
PARTS = ("lrp", "metrics", "plot", "refine")  # of segattr


def in_fresh_interpreter(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_imports_are_quiet_and_light() -> None:
    heavy = {"triton", "torchvision", "matplotlib", "torchmetrics", "skimage", "sklearn", "tqdm", "tyro", "scipy"}
    code = (
        f"import torch, sys; old = set(sys.modules); import segloss, segattr; print((set(sys.modules) - old) & {heavy})"
    )
    assert in_fresh_interpreter(code) == "set()\n"


def test_import_leaves_torch_as_it_was() -> None:
    state = "(torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed())"
    assert in_fresh_interpreter(f"import torch; a = {state}; import segloss, segattr; print(a == {state})") == "True\n"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_public_names_exist_and_are_typed(package) -> None:  # type: ignore[no-untyped-def]
    assert package.__all__ == sorted(package.__all__, key=lambda name: (not name[0].isupper(), name))
    assert all(hasattr(package, name) for name in package.__all__)
    assert (Path(package.__file__).parent / "py.typed").exists()


def test_a_typed_user_calls_every_public_name() -> None:
    used = {ast.unparse(node) for node in ast.walk(ast.parse((ROOT / "tests" / "typed_user.py").read_text()))}
    parts = [getattr(segattr, part) for part in PARTS]
    for package in (segloss, segloss.bilateral, segattr, *parts, segattr.lrp.composites, segattr.lrp.rules):
        assert {f"{package.__name__}.{name}" for name in package.__all__} - used == set()


def test_public_functions_are_documented() -> None:
    functions = [(name, getattr(segloss, name)) for name in segloss.__all__]
    functions += [(name, getattr(segattr, name)) for name in segattr.__all__ if name not in PARTS]
    for part in PARTS:
        module = getattr(segattr, part)
        functions += [(f"{part}.{name}", getattr(module, name)) for name in module.__all__]
    for name, item in functions:
        assert item.__doc__, name
        if inspect.isfunction(item) and name != "check_values":
            for section in ("Args:", "Returns:", "Raises:", "Example:"):
                assert section in item.__doc__, (name, section)


def test_names_are_the_published_ones() -> None:
    signatures = {
        "average_prediction": "(logits, *, valid)",
        "size_kl": "(logits, sizes, *, known, valid, reduction)",
        "reverse_size_kl": "(logits, sizes, *, floor, known, valid, reduction)",
        "log_barrier": "(logits, tags, *, valid, reduction)",
        "suppression": "(logits, tags, *, valid, reduction)",
        "flat_barrier": "(logits, tags, *, floor, flat, valid, reduction)",
        "size_barrier": "(logits, *, lower, upper, t, valid, reduction)",
        "balance_kl": "(logits, prior)",
        "class_balanced_weights": "(counts, beta, *, normalize)",
        "sizes_from_labels": "(labels, num_classes, *, ignore_index)",
        "corrupt_sizes": "(sizes, sigma, *, generator)",
        "mean_relative_error": "(sizes, exact)",
        "partial_cross_entropy": "(logits, labels, *, ignore_index, reduction)",
        "balanced_seeding": "(logits, seeds, *, background, floor, reduction)",
        "boundary_constraint": "(logits, refined, *, seeds, clip, reduction)",
        "centroid_loss": "(logits, targets, *, descriptor, tolerance, t, spacing, known, valid, reduction)",
        "centroids_from_labels": "(labels, num_classes, *, spacing, ignore_index)",
        "boundary_loss": "(logits, distances, *, valid, reduction)",
        "signed_distances": "(labels, num_classes, *, spacing, ignore_index)",
        "potts_crf": "(logits, image, *, sigma_rgb, sigma_xy, spacing, valid, gate, from_logits, form, scale_factor, "
        "centred, normalize, method, tolerance, backend, precision, reduction)",
        "grid_potts": "(logits, image, *, sigma_rgb, connectivity, spacing, valid, from_logits, reduction)",
        "windowed_potts": "(logits, image, *, sigma_rgb, sigma_xy, spacing, radius, valid, from_logits, normalize, "
        "reduction)",
        "window_mass": "(image, *, sigma_rgb, sigma_xy, spacing, radius)",
        "confidence_gate": "(logits, labels, *, ignore_index, from_logits)",
        "bilateral_filter": "(values, image, *, sigma_rgb, sigma_xy, spacing, method, tolerance, backend, precision)",
        "bilateral_error": "(values, image, filtered, *, sigma_rgb, sigma_xy, spacing)",
        "sample_pixels": "(scores, samples, *, posterior, generator)",
        "importance_sampling": "(scores, tags, *, samples, indices, mode, posterior, floor, generator, reduction)",
        "importance_classification": "(scores, tags, *, weight, samples, indices, mode, posterior, pooling, generator, "
        "reduction)",
        "max_normalize": "(scores, *, detach_maximum)",
        "feature_similarity": "(scores, image, tags, *, gate, sigma, mu, window, window_shape, background, reduction)",
        "rib_margin": "(logits, tags, *, margin, reduction)",
        "class_centres": "(features, tags)",
        "ood_centres": "(features, clusters, *, generator)",
        "ood_distance": "(features, tags, centres, ood, *, top, scope, squared, reduction)",
        "ood_classification": "(logits, tags, ood_logits, *, ood_weight)",
        "rank_hard_ood": "(probabilities, *, threshold)",
        "annotation_cost": "(images, positive_rate)",
        "affinity_loss": "(features, labels, *, radius, ignore_index, distance, crop, floor)",
        "feature_affinity": "(features, *, radius, distance)",
        "path_affinity": "(boundary, *, radius)",
        "path_affinity_loss": "(boundary_logits, labels, *, radius, ignore_index, crop, eps)",
        "denormalize": "(image, mean, std)",
        "check_values": "(enabled)",
    }
    others = ("PreparedFilter", "ToleranceError")
    modules = [name for name in segloss.__all__ if isinstance(getattr(segloss, name), type)]
    assert set(segloss.__all__) == set(signatures) | set(modules)
    assert all(issubclass(getattr(segloss, name), nn.Module) for name in modules if name not in others)
    attribution = {
        "adaptive_stride": "(area)",
        "bbam": "(detector, image, boxes, labels, *, steps, lr, sparsity, heads, proposals, stride, mean, decode, "
        "reference, chunk, progress, generator)",
        "detector_from_torchvision": "(model)",
        "positive_proposals": "(detector, image, boxes, labels, *, count, jitter, min_iou, keep, decode, generator)",
        "advcam": "(clf, images, classes, *, steps, step_size, threshold, penalty, suppress, literal, reference, "
        "chunk)",
        "cam": "(clf, images, classes, *, norm)",
        "ficklenet": "(features, head, *, passes, threshold, tags, norm, generator)",
        "gndrp": "(features_or_maps, maps, *, threshold, divide_by)",
        "grad_cam": "(clf, images, classes, *, layer, pool, weighting, pixels, norm)",
        "multiscale": "(method, images, scales, flip)",
        "normalize": "(maps, mode, *, dims)",
        "rib": "(clf, images, tags, *, companions, steps, lr, margin, pool, threshold, classes, norm, frozen, stop, "
        "reference)",
        "split": "(model, layer, *, example)",
        "lrp.heatmap_loss": "(heatmaps, scores, labels, tags, *, scale, weight, background_weight, ignore_index)",
        "lrp.labelled_subset": "(tags, count, *, uniform_below, generator)",
        "lrp.unroll": "(model, *, activations, weights, upsampling, skip, batch_norm, epsilon, chunk, gates, example, "
        "rule)",
        "metrics.average_best_overlap": "(predictions, truths)",
        "metrics.average_precision": "(predictions, truths, *, threshold)",
        "metrics.best_threshold_miou": "(maps, labels, *, tags, thresholds, ignore_index)",
        "metrics.contour_f": "(prediction, truth, *, tolerance, valid, pooled, absent)",
        "metrics.high_gradient_ratio": "(gradients, regions, *, threshold, scale)",
        "metrics.j_and_f": "(prediction, truth, *, tolerance, valid, pooled, absent)",
        "metrics.pointing_game": "(maps, masks, *, tolerance)",
        "metrics.region_similarity": "(prediction, truth, *, valid, pooled, absent, dims)",
        "refine.dense_crf": "(probabilities, image, *, iterations, weight, sigma_rgb, sigma_xy, smooth_weight, "
        "smooth_sigma_xy, spacing, own, filled, valid, scale_factor, method, tolerance, backend)",
        "refine.grow_seeds": "(seeds, probabilities, *, foreground, background, ignore_index)",
        "refine.instance_masks": "(bbams, boxes, image, *, rule, foreground, background, smoothing, crf, ignore_index)",
        "refine.label_probabilities": "(labels, tags, *, confidence, ignore_index)",
        "refine.merge_proposals": "(mask, proposals)",
        "refine.pseudo_labels": "(maps, tags, *, foreground, background, size, ignore_index)",
        "refine.random_walk": "(maps, affinity, *, beta, steps, boundary)",
        "refine.semantic_labels": "(masks, labels, *, ignore_index)",
    }
    published = [(segloss, *item) for item in signatures.items()] + [(segattr, *item) for item in attribution.items()]
    for package, name, expected in published:
        parameters = list(inspect.signature(operator.attrgetter(name)(package)).parameters.values())
        words, starred = [], False
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
                words.append("*")
                starred = True
            words.append(parameter.name)
        assert f"({', '.join(words)})" == expected, name


def imported_names(file: Path) -> set[str]:
    """What a file imports, ``package.module.name``, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("floor", "own", "below"),
    [
        # ... its own modules, and those it stands on: nothing else of the project
        ("segloss/common", "segloss.common", ()),
        ("segloss/bilateral", "segloss.bilateral", ("segloss.common",)),
        ("segloss", "segloss", ()),
        ("segattr/networks", "segattr.networks", ("segloss.common",)),
        ("segattr", "segattr", ("segloss",)),
    ],
)
def test_every_floor_stands_on_those_below(floor: str, own: str, below: tuple[str, ...]) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    for file in files:
        ours = {name for name in imported_names(file) if name.split(".")[0] in ("segloss", "segattr", "examples")}
        assert {n for n in ours if not any(f"{n}.".startswith(f"{part}.") for part in (own, *below))} == set(), file


@pytest.mark.parametrize("folder", ["segattr", "examples"])
def test_private_names_stay_within_their_package(folder: str) -> None:
    for file in sorted((ROOT / folder).rglob("*.py")):
        foreign = {name for name in imported_names(file) if name.split(".")[0] in {"segloss", "segattr"} - {folder}}
        assert {name for name in foreign if "._" in name} == set(), file
