"""The classes that maps are wanted for, and their pairs with images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, overload

import torch
from torch import Tensor, nn

from segloss.common.checks import check_int, check_integer, shape_text

Classes: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | Tensor
Maps: TypeAlias = Tensor | list[Tensor]
Options = ParamSpec("Options")


class MapsOfClasses(Protocol[Options]):
    """A method that makes maps, for type checkers: which classes give a tensor, and which a list."""

    @overload
    def __call__(
        self,
        clf: nn.Module,
        images: Tensor,
        classes: Sequence[int] | None = None,
        *args: Options.args,
        **kwargs: Options.kwargs,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        clf: nn.Module,
        images: Tensor,
        classes: Sequence[Sequence[int]],
        *args: Options.args,
        **kwargs: Options.kwargs,
    ) -> list[Tensor]: ...
    @overload
    def __call__(
        self, clf: nn.Module, images: Tensor, classes: Tensor, *args: Options.args, **kwargs: Options.kwargs
    ) -> Maps: ...


class ScoresAndMaps(Protocol):
    """The same of a network that :func:`segattr.lrp.unroll` makes."""

    @overload
    def __call__(self, x: Tensor, classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(self, x: Tensor, classes: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor]]: ...
    @overload
    def __call__(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Maps]: ...


def typed(method: Callable[Concatenate[nn.Module, Tensor, Classes | None, Options], Maps]) -> MapsOfClasses[Options]:
    """The method itself, for type checkers one whose maps are a tensor or a list as its classes say."""
    return method  # type: ignore[return-value]


def check_classes(classes: Any, images: int, count: int) -> list[int] | list[list[int]]:
    """Numbers of classes, for all images or a list for each; of tensors ``[n]`` or ``[B, n]`` too.

    Raises:
        TypeError: what is not a sequence of integers, or of sequences of them.
        ValueError: a tensor of another shape, a class that is not among ``count``, sequences for more or fewer than
            ``images``.
    """
    if isinstance(classes, Tensor):
        check_integer("classes", classes)
        if classes.dim() not in (1, 2):
            raise ValueError(f"classes: expected a tensor [n] or [B, n], got {shape_text(classes.shape)}")
        classes = classes.tolist()
    if not isinstance(classes, Sequence):
        raise TypeError(
            f"classes: expected a sequence of integers such as [0, 2], or one for each image, got {classes!r}"
        )
    if not any(isinstance(c, Sequence) for c in classes):
        return _numbers(classes, count)
    if len(classes) != images:
        raise ValueError(f"classes: expected a sequence for each of {images} images, got {len(classes)}")
    return [_numbers(c, count) for c in classes]


def _numbers(classes: Any, count: int) -> list[int]:
    if not isinstance(classes, Sequence):
        raise TypeError(f"classes: expected a sequence of integers for each image, got {classes!r}")
    for c in classes:
        check_int("classes", c)
        if not 0 <= c < count:
            raise ValueError(f"classes: expected integers from 0 to {count - 1}, got {c}")
    return list(classes)


@dataclass(frozen=True)
class Pairs:
    """The pairs of an image and a class that maps are wanted for, image by image.

    Args:
        images: of each pair, ``[N]``.
        classes: of each pair, ``[N]``.
        slots: how many pairs of the same image are before it, ``[N]``.
        shape: B and K if all images have as many pairs, or a list of how many each has.
    """

    images: Tensor
    classes: Tensor
    slots: Tensor
    shape: tuple[int, int] | list[int]

    @classmethod
    def of(cls, classes: Classes | None, images: int, count: int, device: torch.device) -> "Pairs":
        """Of the argument ``classes`` of a method, for this number of images and of classes in all."""
        wanted: Any = check_classes(range(count) if classes is None else classes, images, count)
        ragged = any(isinstance(own, list) for own in wanted)
        lengths = [len(own) for own in wanted] if ragged else [len(wanted)] * images
        flat = [c for own in wanted for c in own] if ragged else wanted * images
        image = [i for i, length in enumerate(lengths) for _ in range(length)]
        slot = [s for length in lengths for s in range(length)]
        columns = torch.tensor([image, flat, slot], dtype=torch.int64, device=device)
        return cls(columns[0], columns[1], columns[2], lengths if ragged else (images, len(wanted)))

    def arrange(self, rows: Tensor) -> Maps:
        """Rows ``[N, h, w]`` as a method returns them."""
        if isinstance(self.shape, list):
            return list(rows.split(self.shape))
        return rows.view(*self.shape, *rows.shape[1:])

    def most(self) -> int:
        """Number of pairs of the image that has most of them."""
        return max(self.shape, default=0) if isinstance(self.shape, list) else self.shape[1]
