"""FickleNet: many maps from one classifier whose last convolution sees random hidden units in every window."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segloss.common.checks import (
    check_choice,
    check_finite,
    check_floating,
    check_generator,
    check_int,
    check_like,
    check_number,
    check_tags,
    check_tensor,
    shape_text,
)
from segloss.common.reduction import wide_dtype
from segloss.similarity import max_normalize


def stochastic_conv2d(features: Tensor, weight: Tensor, keep: Tensor, *, drop: float) -> Tensor:
    r"""Convolution in which every window sees its own choice of hidden units.

    .. math:: s_c(u) = \frac{1}{1 - p} \sum_t m_u(t) \sum_d w_{cd}(t) f_d(u + t)

    over the offsets t of the kernel, with zeros beyond the border. The choice :math:`m_u` holds for all channels of a
    location. So the products of a location with the weights of a tap, the inner sum, do not depend on it: a 1x1
    convolution makes these tap maps once, and a choice of hidden units costs no more than a sum over them. The result
    is that of a dropout in every window, and of the source's map expansion, where windows that no longer overlap are
    convolved with a stride of the kernel size.

    Args:
        features: feature maps f, ``[B, D, h, w]``.
        weight: weights w, ``[C, D, s, s]`` with an odd s.
        keep: the hidden units that each window sees, m, bool, ``[B, h, w, s, s]``: the location of the window, then
            the row and the column within it.
        drop: rate p at which hidden units are dropped, in [0, 1); what is left is scaled up for it, as in dropout.

    Returns:
        Class maps ``[B, C, h, w]``, in the wider dtype of features and weights, whatever autocast says. Their mean over
        the locations is the logit of a class.

    Raises:
        TypeError: ``features`` or ``weight`` that are not floating point, ``keep`` that is not bool, ``drop`` that is
            no number.
        ValueError: shapes or devices that do not fit each other, an even kernel, no location, NaN or infinite
            features, ``drop`` outside [0, 1).

    Source:
        FickleNet, the dissertation's sec. 3.2.1.

    Example:
        >>> keep = torch.zeros(1, 2, 3, 3, 3, dtype=torch.bool)
        >>> keep[..., 1, 1] = True  # of each window its centre only
        >>> stochastic_conv2d(torch.arange(6.0).view(1, 1, 2, 3), torch.ones(1, 1, 3, 3), keep, drop=0.5)
        tensor([[[[ 0.,  2.,  4.],
                  [ 6.,  8., 10.]]]])
    """
    _check(features, weight, drop)
    _check_keep(keep, features, weight)
    return _masked_sum(_windows(_tap_maps(features, weight, drop)).movedim(1, 3), keep)


class StochasticConv2d(nn.Module):
    """``stochastic_conv2d`` as a layer that draws the hidden units anew for every image in every call.

    The last layer of a classifier: its logits are the means of its maps over the locations, and the source trains them
    with the sigmoid cross-entropy. In contrast to dropout it is random in evaluation mode, too. A window always keeps
    its centre. The layer is differentiable, and has no bias.

    Args:
        in_channels: channels of the features, at least 1.
        classes: class maps, at least 1.
        kernel: side s of the windows, odd. The source uses 9.
        drop: rate at which hidden units are dropped, in [0, 1). The source uses 0.9.

    Raises:
        TypeError: ``in_channels``, ``classes`` or ``kernel`` that is no int, ``drop`` that is no number.
        ValueError: ``in_channels`` or ``classes`` below 1, a ``kernel`` that is even or below 1, ``drop`` outside
            [0, 1); on a call: as ``stochastic_conv2d``.

    Example:
        >>> layer = StochasticConv2d(512, 20, kernel=9, drop=0.9).eval()
        >>> features = torch.rand(2, 512, 14, 14)
        >>> first, second = layer(features), layer(features)
        >>> first.shape, torch.equal(first, second)
        (torch.Size([2, 20, 14, 14]), False)
    """

    __call__: Callable[..., Tensor]  # for type checkers: torch says Any

    def __init__(self, in_channels: int, classes: int, kernel: int, drop: float) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("classes", classes), ("kernel", kernel)):
            check_int(name, value)
            check_number(name, value, least=1)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd size, so that a window has a centre, got {kernel}")
        check_number("drop", drop, least=0, below=1)
        self.in_channels, self.classes, self.kernel, self.drop = in_channels, classes, kernel, drop
        self.weight = nn.Parameter(torch.empty(classes, in_channels, kernel, kernel))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as of nn.Conv2d

    def draw(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Hidden units for one pass over ``features [B, D, h, w]``: bool, ``[B, h, w, s, s]``."""
        device = features.device if generator is None else generator.device
        shape = (len(features), *features.shape[2:], self.kernel, self.kernel)
        keep = torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - self.drop, generator=generator)
        keep[..., self.kernel // 2, self.kernel // 2] = True
        return keep.to(features.device)

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Class maps ``[B, C, h, w]``; ``generator``, on any device, replaces the global source of randomness."""
        _check(features, self.weight, self.drop)
        check_generator(generator)
        return stochastic_conv2d(features, self.weight, self.draw(features, generator), drop=self.drop)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.classes}, kernel={self.kernel}, drop={self.drop}"


def stochastic_grad_cam(features: Tensor, weight: Tensor, keep: Tensor, *, drop: float) -> Tensor:
    r"""Grad-CAM of the logits of ``stochastic_conv2d`` with respect to its features.

    .. math::
        M_c(v) = \mathrm{ReLU}\Big( \sum_d f_d(v) \frac{\partial y_c}{\partial f_d(v)} \Big)
        = \mathrm{ReLU}\Big( \frac{1}{(1 - p) \, |U|} \sum_t m_{v - t}(t) \sum_d w_{cd}(t) f_d(v) \Big)
        , \quad y_c = \frac{1}{|U|} \sum_{u \in U} s_c(u)

    Another sum over the tap maps, which takes no backward pass: a location has the products with those taps at which a
    window saw it.

    Args:
        features: feature maps f, ``[B, D, h, w]``.
        weight: weights w, ``[C, D, s, s]`` with an odd s.
        keep: the hidden units that each window sees, m, bool, ``[B, h, w, s, s]``.
        drop: rate p at which hidden units are dropped, in [0, 1).

    Returns:
        ``[B, C, h, w]``, at least 0, in the wider dtype of features and weights, whatever autocast says.

    Raises:
        TypeError, ValueError: as ``stochastic_conv2d``.

    Source:
        FickleNet, the dissertation's sec. 3.2.1; Grad-CAM as in eq. (2.2), with the gradient of each location. The
        derivative of a sigmoid after the logit would only scale a map as a whole.

    Example:
        >>> keep = torch.ones(1, 1, 3, 1, 1, dtype=torch.bool)
        >>> stochastic_grad_cam(torch.tensor([[[[3.0, -3.0, 6.0]]]]), torch.ones(1, 1, 1, 1), keep, drop=0)
        tensor([[[[1., 0., 2.]]]])
    """
    _check(features, weight, drop)
    _check_keep(keep, features, weight)
    return _grad_cam(_flipped(features, weight, drop), keep)


@torch.no_grad()
def ficklenet(
    features: Tensor,
    head: StochasticConv2d,
    *,
    passes: int = 200,
    threshold: float = 0.35,
    tags: Tensor | None = None,
    norm: Literal["relu_max", "relu"] = "relu_max",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Labels from many stochastic passes over the same features.

    A location has a class if the map :math:`M_c^{(n)}` of any pass n exceeds the threshold there; of several such
    classes the one with the largest mean map :math:`\frac{1}{N} \sum_n M_c^{(n)}`, and of equal ones the first. The
    maps are those of ``stochastic_grad_cam``, for hidden units that are drawn as in a call of the head.

    The tap maps are computed once, and a pass is then a masked sum over them. One pass is held at a time, so that the
    memory does not depend on their number.

    Args:
        features: feature maps that the head takes, ``[B, D, h, w]``.
        head: the layer, in either mode.
        passes: number of passes N, at least 1.
        threshold: what a map must exceed, at least 0.
        tags: 1 where a class is present in the image, 0 elsewhere, ``[B, C]``; only those get locations. All of them
            if None, which is of little use with ``norm="relu_max"``: the map of an absent class has the maximum 1, too.
        norm: ``"relu_max"`` divides each map of each pass by its maximum, so that the threshold is a share of it;
            ``"relu"`` compares the maps as they are. They fall with the number of locations.
        generator: source of randomness, on any device; the global one of the device of the features if None.

    Returns:
        int64, ``[B, h, w]``: classes, -1 where no map exceeds the threshold.

    Raises:
        TypeError: ``features`` that are not floating point, ``head`` that is no :class:`StochasticConv2d`, ``passes``
            that is no int, ``threshold`` that is no number, ``tags`` that are no tensor of real numbers, ``generator``
            that is no generator.
        ValueError: features that do not fit the head, NaN or infinite features or weights of the head, ``passes`` below
            1, a negative ``threshold``, tags that do not fit or are neither 0 nor 1, an unknown ``norm``.

    Source:
        FickleNet, the dissertation's sec. 3.2.1, with the passes and the threshold of *FickleNet: Weakly and
        Semi-supervised Semantic Image Segmentation using Stochastic Inference*.

    Example:
        >>> head = StochasticConv2d(8, 3, kernel=5, drop=0.5)
        >>> tags = torch.tensor([[1, 0, 1], [0, 0, 0]])
        >>> labels = ficklenet(torch.rand(2, 8, 6, 6), head, passes=10, tags=tags)
        >>> labels.shape, (labels[1] == -1).all()
        (torch.Size([2, 6, 6]), tensor(True))
    """
    if not isinstance(head, StochasticConv2d):
        raise TypeError(f"head: expected a StochasticConv2d, got {type(head).__name__}")
    _check(features, head.weight, head.drop)
    check_finite("head", head.weight)
    check_int("passes", passes)
    check_number("passes", passes, least=1)
    check_number("threshold", threshold, least=0)
    if tags is not None:
        check_tags(tags, features, "features", classes=head.classes)
    check_choice("norm", norm, ("relu_max", "relu"))
    check_generator(generator)
    taps = _flipped(features, head.weight, head.drop)
    maps = (_grad_cam(taps, head.draw(features, generator)) for _ in range(passes))
    return aggregate(map(max_normalize, maps) if norm == "relu_max" else maps, threshold, tags)


def aggregate(maps: Iterable[Tensor], threshold: float, tags: Tensor | None = None) -> Tensor:
    """Labels ``[B, h, w]`` from the maps ``[B, C, h, w]`` of one pass or more, as of :func:`ficklenet`."""
    passes = iter(maps)
    first = next(passes)
    total = first.to(wide_dtype(first), copy=True)  # in half precision a sum of hundreds would lose the last maps
    largest = total.clone()
    for one in passes:
        total += one
        torch.maximum(largest, one, out=largest)
    found = largest > threshold
    if tags is not None:
        found &= (tags != 0)[:, :, None, None]
    return torch.where(found.any(1), torch.where(found, total, -torch.inf).argmax(1), -1)


def _tap_maps(features: Tensor, weight: Tensor, drop: float) -> Tensor:
    """Products of each location with the weights of each tap, ``[B, C, s, s, h, w]``, scaled up for what is dropped."""
    classes, channels, size, _ = weight.shape
    dtype = torch.promote_types(features.dtype, weight.dtype)
    taps = weight.to(dtype).div(1 - drop).movedim(1, 3).reshape(-1, channels, 1, 1)
    with torch.autocast(features.device.type, enabled=False):
        products = F.conv2d(features.to(dtype), taps)
    return products.unflatten(1, (classes, size, size))


def _windows(taps: Tensor) -> Tensor:
    """Of maps of taps ``[..., s, s, h, w]`` what each window sees at its taps, ``[..., h, w, s, s]``."""
    size, height, width = taps.shape[-3:]
    padded = F.pad(taps, (size // 2,) * 4).contiguous()
    *outer, row, column, down, right = padded.stride()
    # A step to the next tap is a step in the window, too. Each element is seen at most once, so the gradient is a copy.
    return padded.as_strided(
        (*taps.shape[:-4], height, width, size, size), (*outer, down, right, row + down, column + right)
    )


def _flipped(features: Tensor, weight: Tensor, drop: float) -> Tensor:
    """The tap maps ``[B, h, w, C, s, s]`` of the logits, last tap first: seen from a location, windows lie opposite."""
    taps = _tap_maps(features, weight, drop).div(features.shape[2] * features.shape[3])
    return taps.flip(2, 3).permute(0, 4, 5, 1, 2, 3).contiguous()


def _grad_cam(flipped: Tensor, keep: Tensor) -> Tensor:
    return _masked_sum(flipped, _windows(keep.flip(3, 4).permute(0, 3, 4, 1, 2))).relu()


def _masked_sum(taps: Tensor, keep: Tensor) -> Tensor:
    """``[B, C, h, w]`` from taps ``[B, h, w, C, s, s]`` and masks ``[B, h, w, s, s]``."""
    with torch.autocast(taps.device.type, enabled=False):
        # Rows times matrices: a matrix times a column is several times slower in such a batch.
        return (keep.flatten(-2).unsqueeze(-2).to(taps.dtype) @ taps.flatten(-2).mT).squeeze(-2).movedim(3, 1)


def _check(features: object, weight: object, drop: object) -> None:
    check_floating("features", features)
    check_floating("weight", weight)
    assert isinstance(features, Tensor)
    assert isinstance(weight, Tensor)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"weight: expected [C, D, s, s] with an odd s, got {shape_text(weight.shape)}")
    if features.dim() != 4 or 0 in features.shape[2:]:
        raise ValueError(f"features: expected [B, D, h, w] with at least one pixel, got {shape_text(features.shape)}")
    check_like("features", features, (len(features), weight.shape[1], *features.shape[2:]), "weight", weight)
    check_finite("features", features)
    check_number("drop", drop, least=0, below=1)


def _check_keep(keep: object, features: Tensor, weight: Tensor) -> None:
    check_tensor("keep", keep)
    assert isinstance(keep, Tensor)
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: expected a bool tensor, got {keep.dtype}")
    check_like("keep", keep, (len(features), *features.shape[2:], *weight.shape[2:]), "features", features)
