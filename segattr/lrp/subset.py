"""Which images of a training set get pixel labels, given the tags of all of them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segloss.common.checks import (
    check_generator,
    check_has_values,
    check_int,
    check_number,
    check_real,
    check_tags,
    shape_text,
)


def labelled_subset(
    tags: Tensor, count: int, *, uniform_below: int = 500, generator: torch.Generator | None = None
) -> Tensor:
    r"""A random subset of the images in which every class has its share of the tags, as far as the images allow.

    The shares :math:`q` are uniform for small subsets, and for larger ones, for which rare classes do not have enough
    images, the average of uniform and the class distribution of the set:

    .. math:: q_c = \frac 1 C \quad \text{or} \quad q_c = \frac 1 2 \Bigl(\frac 1 C + \frac{n_c}{\sum_k n_k}\Bigr)

    with the number :math:`n_c` of images of a class. Images are drawn one by one, without replacement. Each time, it is
    the turn of the class that is furthest behind its share, with the least :math:`m_c / q_c`, where :math:`m_c` of the
    images drawn so far have it. A round gives one image to the class with the smallest share, and more to the others in
    proportion. Of the images that are left of the class, one is drawn at random whose classes are all in the earliest
    round possible, so that common classes do not come along with rare ones too often.

    Every class that occurs is in the subset if ``count`` is at least their number, C. With uniform shares, each has at
    least :math:`\lfloor \text{count} / C \rfloor` images, or all that there are.

    The paper has the two kinds of shares, the counts (20 and 100 with uniform shares, 500 with the average) and that
    each class occurs among 20 images. How classes and images take turns is this library's reading; the authors' code,
    for the same aim, draws images in proportion to the need for the class that they have and need least.

    Args:
        tags: 1 where a class is present in an image, 0 elsewhere, ``[N, C]``, any dtype. Foreground classes only: every
            image has background, so leave its column out (``tags[:, 1:]``).
        count: images to draw, from 1 to N, which gives all of them.
        uniform_below: the shares are uniform for a ``count`` below this.
        generator: source of randomness, on any device; the global one of the CPU if None. The same state gives the same
            images, and the subset for a smaller count with the same kind of shares is the beginning of a larger one.

    Returns:
        Indices of the images in the order in which they were drawn, int64, ``[count]``.

    Raises:
        TypeError: ``tags`` that are no tensor of real numbers, ``count`` or ``uniform_below`` that is no int,
            ``generator`` that is no generator.
        ValueError: ``tags`` that are not ``[N, C]`` or not 0 and 1, an image without any class, ``count`` that is not
            from 1 to N, a negative ``uniform_below``.

    Source:
        *Model Guidance via Explanations Turns Image Classifiers into Segmentation Models*, sec. 3.0.1.

    Example:
        >>> tags = torch.tensor([[1, 0]] * 90 + [[0, 1]] * 10)
        >>> tags[labelled_subset(tags, 8)].sum(0)
        tensor([4, 4])
    """
    present = _check(tags, count, uniform_below, generator)
    present = present[:, present.any(0)]
    images, classes = (_order(n, generator) for n in present.shape)
    present = present[images][:, classes]
    share = np.full(present.shape[1], 1 / present.shape[1])
    if count >= uniform_below:
        share = (share + present.sum(0) / present.sum()) / 2
    return torch.from_numpy(images[_draw(present, count, share)]).to(tags.device)


def _order(length: int, generator: torch.Generator | None) -> NDArray[np.int64]:
    device = "cpu" if generator is None else generator.device
    return torch.randperm(length, device=device, generator=generator).cpu().numpy()


def _draw(present: NDArray[np.bool_], count: int, share: NDArray[np.float64]) -> list[int]:
    """Of classes that are equally far behind, and of images that serve equally well, the first one is taken."""
    of_class = [np.flatnonzero(column) for column in present.T]
    total, drawn = present.sum(0), np.zeros(present.shape[1], dtype=np.int64)
    latest = np.zeros(len(present))  # round of each image: that of its class that is furthest ahead
    subset = []
    for _ in range(count):
        wanted = np.where(drawn < total, drawn / share, np.inf).argmin()
        image = of_class[wanted][latest[of_class[wanted]].argmin()]
        latest[image] = np.inf  # never again
        drawn += present[image]
        rounds = np.floor(drawn * (share.min() / share))
        for k in np.flatnonzero(present[image]):
            latest[of_class[k]] = np.maximum(latest[of_class[k]], rounds[k])
        subset.append(int(image))
    return subset


def _check(tags: Tensor, count: int, uniform_below: int, generator: torch.Generator | None) -> NDArray[np.bool_]:
    check_real("tags", tags)
    if tags.dim() != 2 or tags.shape[1] == 0:
        raise ValueError(f"tags: expected [N, C] with at least one class, got {shape_text(tags.shape)}")
    check_has_values("tags", tags)
    known = tags.detach().cpu()  # where values are always checked
    check_tags(known, known, "tags")
    check_int("count", count)
    if not 1 <= count <= len(tags):
        raise ValueError(f"count: expected 1 to {len(tags)}, the number of images, got {count} (see tags)")
    check_int("uniform_below", uniform_below)
    check_number("uniform_below", uniform_below, least=0)
    check_generator(generator)
    present = (known != 0).numpy()
    without = np.flatnonzero(~present.any(1))
    if len(without):
        raise ValueError(f"tags: expected at least one class in each image, got none in image {without[0]}")
    return present
