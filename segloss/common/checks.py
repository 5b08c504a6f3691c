"""Argument checks shared by the public functions: what was passed, what was expected, what came."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_SUM_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}  # other dtypes: 1e-4, a size typed to four digits

_OVERSHOOT = 0.01  # beyond [0, 1], of colours that were interpolated or rounded

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_SHOWN = 4  # values that an error tells of

_MAPS = ("heatmaps", "logits", "maps", "probabilities")  # what a network gives, often at a lower resolution
_OF_THE_IMAGE = ("distances", "image", "labels", "masks", "refined", "seeds", "valid")  # ... than these have

_always = False


def check_values(enabled: bool) -> None:
    """Check the values of arguments on every device, not only on the CPU.

    Shapes, dtypes and devices are always checked. Values (finite logits, sizes that sum to 1, tags of 0 and 1) are
    checked for CPU tensors in eager mode; on an accelerator a look at a value would wait for the device, so there they
    are checked only after ``check_values(True)``. Under ``torch.compile`` and ``vmap`` values are never checked.

    Args:
        enabled: True to check values on every device, False to go back to CPU tensors only.

    Raises:
        TypeError: ``enabled`` is not a bool.

    Example:
        >>> check_values(True)
        >>> check_values(False)
    """
    check_bool("enabled", enabled)
    global _always
    _always = enabled


def require(
    name: str,
    tensor: Tensor,
    holds: Callable[[], Tensor | bool],
    problem: Callable[[], str],
    quick: Callable[[], Tensor | bool] | None = None,
) -> None:
    """Raise ``ValueError(name: problem)`` if the values of ``tensor`` can be looked at and do not satisfy ``holds``.

    Where the cheaper ``quick`` is satisfied, so is ``holds``.
    """
    if torch.compiler.is_compiling() or not (_always or tensor.device.type == "cpu") or tensor.is_meta:
        return
    with torch.no_grad():
        for test in (holds,) if quick is None else (quick, holds):
            try:
                satisfied = bool(test())
            except RuntimeError:  # vmap and fake tensors have no values to look at
                return
            if satisfied:
                return
        raise ValueError(f"{name}: {problem()}")


def shape_text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def values_text(values: Tensor) -> str:
    """The different integers, in order; the first of many."""
    different = values.unique().tolist()
    more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return ", ".join(map(str, different[:_SHOWN])) + more


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_real(name: str, value: object) -> None:
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.is_complex():
        raise TypeError(f"{name}: expected a tensor of real numbers, got {value.dtype}")
    _check_dense(name, value)


def check_floating(name: str, value: object) -> None:
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    _check_dense(name, value)


def check_integer(name: str, value: object) -> None:
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")
    _check_dense(name, value)


def check_mask(name: str, value: object) -> None:
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, got {value.dtype}")
    _check_dense(name, value)


def _check_dense(name: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")


def check_has_values(name: str, value: Tensor) -> None:
    """For results whose shape depends on values."""
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on the device meta")


def check_like(name: str, value: Tensor, shape: Sequence[int], anchor: str, anchor_value: Tensor) -> None:
    """``value`` must have this shape and lie on the device of ``anchor_value``, the argument named ``anchor``."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected {shape_text(shape)} to go with {anchor} {shape_text(anchor_value.shape)}, "
            f"got {shape_text(value.shape)}{_resize_text(name, value, shape, anchor, anchor_value)}"
        )
    if value.device != anchor_value.device:
        raise ValueError(f"{name}: expected device {anchor_value.device}, that of {anchor}, got {value.device}")


def _resize_text(name: str, value: Tensor, shape: Sequence[int], anchor: str, anchor_value: Tensor) -> str:
    """The line that brings maps to the resolution of ``value``, if that is all that is wrong."""
    if name not in _OF_THE_IMAGE or anchor not in _MAPS or anchor_value.dim() != 4:
        return ""
    of_one_size = tuple(shape[-2:]) == anchor_value.shape[2:] and value.shape[:-2] == tuple(shape[:-2])
    if not of_one_size or not value.numel():
        return ""
    return f'; for maps of this size: {anchor} = F.interpolate({anchor}, {name}.shape[-2:], mode="bilinear")'


def check_finite(name: str, value: Tensor, most: float = math.inf) -> None:
    """No NaN, no infinity, and nothing beyond ±``most``."""

    def fits() -> Tensor:
        # The two extremes carry every NaN and infinity and need one pass and no buffer.
        least, largest = torch.aminmax(value)
        limit = min(most, torch.finfo(value.dtype).max) if value.is_floating_point() else most
        return (least >= -limit) & (largest <= limit)

    def problem() -> str:
        beyond = value[value.isfinite() & (value.abs() > most)]
        limits = f" within ±{most:g}" if most < math.inf else ""
        got = f"{beyond[0].item():g}" if len(beyond) else "NaN or infinity"
        return f"expected finite values{limits}, got {got}"

    # A sum in which nothing is NaN or infinite takes less time; that of large numbers may overflow.
    quick = (lambda: value.sum().isfinite()) if most == math.inf else None
    if value.numel():
        require(name, value, fits, problem, quick)


def check_colours(image: Tensor, sigma: float) -> None:
    """An image for a default width in colour: three channels are RGB in [0, 1], other numbers of them anything."""

    def fits() -> Tensor:
        least, largest = torch.aminmax(image)
        return (least >= -_OVERSHOOT) & (largest <= 1 + _OVERSHOOT)

    def problem() -> str:
        least, largest = (extreme.item() for extreme in torch.aminmax(image))
        return (
            f"expected RGB in [0, 1], the unit of the default sigma_rgb of {255 * sigma:g}/255, got values from "
            f"{least:.4g} to {largest:.4g} (see denormalize, or pass sigma_rgb in the unit of image)"
        )

    if image.shape[1] == 3 and image.numel():
        require("image", image, fits, problem)


def check_fractions(name: str, value: Tensor, kind: str = "values", slack: float = 0) -> None:
    """Values from 0 to 1, or up to ``slack`` above, as rounded probabilities are; NaN is none."""

    def fits() -> Tensor:
        least, largest = torch.aminmax(value)
        return (least >= 0) & (largest <= 1 + slack)

    if value.numel():
        require(name, value, fits, lambda: f"expected {kind} from 0 to 1, got values outside or NaN")


def check_two_classes(name: str, maps: Tensor, problem: str, *, background: bool = False) -> None:
    """``maps [B, K, ...]`` must have K >= 2; ``problem`` is that of a single class."""
    if maps.shape[1] < 2:
        classes = "classes, the background among them" if background else "classes"
        raise ValueError(f"{name}: expected at least 2 {classes}, got {shape_text(maps.shape)}: {problem}")


def check_logits(logits: object) -> None:
    """Finite, floating point, at least 2 classes: ``[B, K, *spatial]``."""
    check_floating("logits", logits)
    assert isinstance(logits, Tensor)
    if logits.dim() < 3:
        raise ValueError(f"logits: expected [B, K, *spatial], got {shape_text(logits.shape)}")
    check_two_classes("logits", logits, "the softmax of a single class is constant; add a background class")
    check_finite("logits", logits)


def check_image_logits(logits: object) -> None:
    """Logits of whole images ``[B, C]``: finite, floating point, at least one class."""
    check_floating("logits", logits)
    assert isinstance(logits, Tensor)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected [B, C] with at least one class, got {shape_text(logits.shape)}")
    check_finite("logits", logits)


def check_valid(valid: object, logits: Tensor) -> None:
    if valid is None:
        return
    check_mask("valid", valid)
    assert isinstance(valid, Tensor)
    check_like("valid", valid, (logits.shape[0], *logits.shape[2:]), "logits", logits)


def check_known(known: object, logits: Tensor) -> None:
    """Which classes of an image a target is known of, bool ``[B, K]``, or None for all."""
    if known is None:
        return
    check_mask("known", known)
    assert isinstance(known, Tensor)
    check_like("known", known, logits.shape[:2], "logits", logits)


def check_sizes(name: str, sizes: object, logits: Tensor | None = None, known: Tensor | None = None) -> None:
    """Rows of non-negative fractions ``[B, K]`` that sum to 1, or to at most 1 where some classes are not ``known``."""
    check_floating(name, sizes)
    assert isinstance(sizes, Tensor)
    if logits is not None:
        check_like(name, sizes, logits.shape[:2], "logits", logits)
    elif sizes.dim() != 2:
        raise ValueError(f"{name}: expected [B, K], got {shape_text(sizes.shape)}")
    if not sizes.numel():
        return
    tolerance = _SUM_TOLERANCE.get(sizes.dtype, 1e-4)
    counted = sizes if known is None else torch.where(known, sizes, 0)

    def errors() -> list[float]:
        """Of each row, as a list: calls of torch on so few numbers take ten times as long."""
        excess = [sum(row) - 1 for row in counted.tolist()]
        if known is None:
            return [abs(error) for error in excess]
        return [abs(error) if whole else error for error, whole in zip(excess, known.all(1).tolist(), strict=True)]

    def fits() -> bool:
        return all(least >= 0 for least in map(min, counted.tolist())) and all(e <= tolerance for e in errors())

    def problem() -> str:
        if not (counted >= 0).all():
            return f"expected fractions of at least 0, got {counted.min().item():.6g}"
        found = errors()
        row = found.index(max(found))
        whole = known is None or bool(known[row].all())
        expected = "each row to sum to 1" if whole else "the known ones of each row to sum to at most 1"
        return f"expected {expected}, got {counted[row].sum(dtype=torch.float64).item():.6g} in row {row}"

    require(name, sizes, fits, problem)


def check_scores(scores: object) -> None:
    """Class score maps ``[B, C, H, W]``: finite, floating point, at least one class and one pixel."""
    check_floating("scores", scores)
    assert isinstance(scores, Tensor)
    if scores.dim() != 4:
        raise ValueError(f"scores: expected [B, C, H, W], got {shape_text(scores.shape)}")
    if 0 in scores.shape[1:]:
        raise ValueError(f"scores: expected at least one class and one pixel, got {shape_text(scores.shape)}")
    check_finite("scores", scores)


def check_tags(tags: object, like: Tensor, anchor: str = "logits", classes: int | None = None) -> None:
    """``[B, K]`` of zeros and ones, of any dtype, to go with ``like [B, K, ...]``, the argument named ``anchor``.

    ``classes`` is K where that argument does not tell.
    """
    check_real("tags", tags)
    assert isinstance(tags, Tensor)
    check_like("tags", tags, (len(like), like.shape[1] if classes is None else classes), anchor, like)

    def binary() -> Tensor:
        return (tags == 0) | (tags == 1)

    require(
        "tags",
        tags,
        lambda: binary().all(),
        lambda: f"expected 0 or 1, got {tags[~binary()][0].item():.6g}",
    )


def check_ignore_index(value: object) -> None:
    check_int("ignore_index", value)
    check_number("ignore_index", value)  # within 64 bits


def check_labels(labels: Tensor, classes: int, ignore_index: int, anchor: str) -> None:
    """``labels`` are int64: narrower integers could not hold, or would wrap, ``ignore_index``.

    ``anchor`` is the argument that tells the number of classes.
    """

    def fits() -> Tensor:
        least, largest = torch.aminmax(torch.where(labels == ignore_index, 0, labels))
        return (least >= 0) & (largest < classes)

    def problem() -> str:
        others = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
        return (
            f"expected classes 0 to {classes - 1} or {ignore_index} to ignore, got {values_text(others)} "
            f"(see {anchor} and ignore_index)"
        )

    if labels.numel():
        require("labels", labels, fits, problem)


def check_label_maps(labels: object, num_classes: object, ignore_index: int) -> Tensor:
    """Labels ``[B, *spatial]`` of so many classes, in int64."""
    check_integer("labels", labels)
    assert isinstance(labels, Tensor)
    if labels.dim() < 2:
        raise ValueError(f"labels: expected [B, *spatial], got {shape_text(labels.shape)}")
    check_int("num_classes", num_classes)
    assert isinstance(num_classes, (int, np.integer))
    check_number("num_classes", num_classes, least=1, most=2**31 - 1)
    check_ignore_index(ignore_index)
    labels = labels.long()
    check_labels(labels, int(num_classes), ignore_index, "num_classes")
    return labels


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    finite: bool = True,
) -> None:
    """A real number in a range; ``above`` and ``below`` are excluded, ``least`` and ``most`` are included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if isinstance(value, (int, np.integer)) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a number, or an int of 64 bits as torch has them, got {value}")
    # Comparisons only: under torch.compile the number may be symbolic. NaN fails all of them.
    fits = above < value <= most and least <= value and (value < below or not finite)
    if not fits:
        bounds = [f"above {above:g}"] * (above > -math.inf) + [f"of at least {least:g}"] * (least > -math.inf)
        bounds += [f"below {below:g}"] * (below < math.inf) + [f"of at most {most:g}"] * (most < math.inf)
        kind = "finite number" if finite else "number"
        raise ValueError(f"{name}: expected a {' '.join([kind, ' and '.join(bounds)])}".rstrip() + f", got {value}")


def check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def check_spacing(
    spacing: object, dimensions: int | None = None, anchor: str = "", anchor_value: Tensor | None = None
) -> None:
    """The size of a pixel along each spatial dimension of ``anchor_value``, the argument named ``anchor``, or None.

    Settings of a module do not know it yet.
    """
    if spacing is None:
        return
    if not isinstance(spacing, (list, tuple)):
        raise TypeError(f"spacing: expected a sequence of numbers, got {type(spacing).__name__}")
    if anchor_value is not None and len(spacing) != dimensions:
        shape = shape_text(anchor_value.shape)
        raise ValueError(f"spacing: expected {dimensions} numbers to go with {anchor} {shape}, got {len(spacing)}")
    for size in spacing:
        check_number("spacing", size, above=0, below=1e6)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        kind = "numpy.bool" if isinstance(value, np.bool_) else type(value).__name__
        raise TypeError(f"{name}: expected a bool, got {kind}")


def check_generator(generator: object) -> None:
    """A source of randomness, or None for the global one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if isinstance(value, np.integer):
        value = int(value)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
