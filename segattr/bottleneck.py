"""RIB: maps of a classifier that is fine-tuned for each image, with a loss that does not saturate."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from segattr.cam import normalize_each
from segattr.networks.backward import followed
from segattr.networks.classes import Classes, Maps, check_classes
from segattr.networks.classifier import Classifier, as_classifier, check_images, taking, tracked, undisturbed
from segattr.networks.features import Features, checked_features, count_classes, head_gradient, head_logits
from segattr.networks.modes import evaluating
from segattr.networks.reader.record import attributes_kept
from segattr.networks.spatial import axes, layout_text
from segloss.bottleneck import rib_margin
from segloss.common.checks import (
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_has_values,
    check_int,
    check_like,
    check_number,
    check_tags,
    require,
    shape_text,
)
from segloss.common.reduction import LARGEST, widen
from segloss.similarity import max_normalize

Batch: TypeAlias = tuple[Tensor, Tensor]
Companions: TypeAlias = Iterable[Batch] | Callable[[Tensor], Iterable[Batch]]

# The authors' public code takes an image for finished when that share of it is highly activated.
_HIGH, _FINISHED = 0.3, 0.7


def gndrp(
    features_or_maps: Tensor,
    maps: Tensor,
    *,
    threshold: float = 0.4,
    divide_by: Literal["region", "all"] = "region",
) -> Tensor:
    r"""Global non-discriminative region pooling: the mean over the locations that a class is not yet seen at.

    .. math::
        \mathrm{GNDRP}_c(T) = \frac{1}{|U_c|} \sum_{u \in U_c} T(u), \quad
        U_c = \Big\{ u : \frac{M_c(u)}{\max_v M_c(v)} \le \tau \Big\}

    The choice of locations is a constant, no gradient flows to the maps through it. A map without a positive value
    has no discriminative region: all locations count. Where none does, as for a constant positive map, the result is 0.

    The authors' public code divides by the number of all locations (``divide_by="all"``), leaves out locations where
    the map is the threshold itself, and pools nothing of a map that is negative everywhere.

    Args:
        features_or_maps: what is pooled, T: class maps of the shape of ``maps``, each over its own locations, or
            feature maps ``[B, D, h, w]``, over those of each class in turn. Maps with as many channels as there are
            classes count as class maps.
        maps: class activation maps M, ``[B, K, h, w]``, or ``[B, K, d, h, w]`` of volumes, normalised or not.
        threshold: share of the maximum of a map up to which locations count, :math:`\tau`.
        divide_by: ``"region"``, the number of locations that count, or ``"all"``, the number of all.

    Returns:
        ``[B, K]`` for class maps, ``[B, K, D]`` for features; float32 (float64 for float64 input).

    Raises:
        TypeError: ``features_or_maps`` or ``maps`` that are not floating point, ``threshold`` that is no number.
        ValueError: shapes or devices that do not fit each other, no location, NaN or infinite values, an unknown
            ``divide_by``.

    Source:
        Reducing the information bottleneck, the dissertation's sec. 3.4.3.

    Example:
        >>> maps = torch.tensor([[[[1.0, 10.0], [3.0, 5.0]], [[-1.0, -2.0], [-3.0, -4.0]]]])
        >>> gndrp(maps, maps)
        tensor([[ 2.0000, -2.5000]])
    """
    _check_maps("maps", maps)
    _check_maps("features_or_maps", features_or_maps)
    shape = (len(maps), features_or_maps.shape[1], *maps.shape[2:])
    check_like("features_or_maps", features_or_maps, shape, "maps", maps)
    check_number("threshold", threshold)
    check_choice("divide_by", divide_by, ("region", "all"))
    selected = _non_discriminative(widen(maps.detach()), threshold).flatten(2)
    values = widen(features_or_maps).flatten(2)
    if features_or_maps.shape == maps.shape:
        pooled, count = torch.where(selected, values, 0).sum(2), selected.sum(2)
    else:
        with torch.autocast(values.device.type, enabled=False):
            pooled, count = selected.to(values.dtype) @ values.mT, selected.sum(2, keepdim=True)
    return pooled / (count.clamp(min=1) if divide_by == "region" else selected.shape[2])


def rib(
    clf: nn.Module,
    images: Tensor,
    tags: Tensor,
    *,
    companions: Companions,
    steps: int = 10,
    lr: float = 8e-6,
    margin: float = 600.0,
    pool: Literal["gndrp", "gap"] = "gndrp",
    threshold: float = 0.4,
    classes: Classes | None = None,
    norm: str = "relu",
    frozen: Sequence[nn.Module] = (),
    stop: bool = False,
    reference: bool = False,
) -> Maps:
    r"""Class activation maps summed over a short fine-tuning that each image gets to itself.

    .. math::
        M_c = \sum_{k=0}^{K} \mathrm{CAM}_c(x; \theta_k), \quad
        \theta_{k+1} = \theta_k - \lambda \nabla_{\theta_k} \sum_{x' \in \{x\} \cup X_k} L(y(x'; \theta_k), t')

    with the loss L of :func:`segloss.rib_margin`, logits y pooled from the maps by :func:`gndrp`, each over the
    locations of its own map, plus the bias of the classifier if it has one, and the companions :math:`X_k` of a step.
    They keep the weights from fitting the image alone.

    Every image starts from the weights of the classifier and trains a copy of them; the classifier is left as it is.
    It runs in evaluation mode: statistics of normalisation are constants, nothing is drawn at random. All parameters
    train, whether or not they require a gradient, except those of ``frozen``. Images are processed one after the other:
    for a batch of weights at once, convolutions become grouped ones, which take longer for all but tiny images.

    Layers that are frozen at the beginning of the network need not be part of the classifier: one that starts behind
    them, ``Classifier(rest, head)``, takes their output for ``images`` and companions, which is then computed once.

    Args:
        clf: a :class:`Classifier` or a model that :func:`split` takes. Where its head is not linear after global
            average pooling, the weights of the maps are those of :func:`grad_cam`, summed over locations instead of
            averaged, in each step anew; they are constants in the backward pass, and logits have no bias.
        images: x, ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``.
        tags: 1 where a class is present in the image, 0 elsewhere, ``[B, K]``. An image without tags has no loss of
            its own.
        companions: batches (images ``[N, C, H', W']`` or volumes, tags ``[N, K]``) of any size, one for each step. From
            an iterable the first ``steps`` are taken, held in memory and used for all images of the call. From a
            function, which is called for each image with its tags ``[K]``, comes an iterable for that image, so that
            companions can depend on it: those of the public code are random images that share no class with it, 20 in a
            step.
        steps: number of steps, K; 0 gives the maps of the classifier itself.
        lr: learning rate :math:`\lambda`, above 0.
        margin: logit up to which classes train, m; without effect on the loss with ``reference``.
        pool: ``"gndrp"``, or ``"gap"`` for global average pooling.
        threshold: :math:`\tau` of :func:`gndrp`.
        classes: classes that maps are wanted for, tagged or not, as in :func:`cam`; all if None.
        norm: what :func:`normalize` does with each map before the sum: ``"relu"``, ``"raw"``, ``"relu_max"``,
            ``"minmax"`` or ``"max"``.
        frozen: modules of the classifier whose parameters do not train. In the public code, all before the third stage
            of its ResNet.
        stop: end the process of an image early, as the public code does: before a step at which the sum of its tagged
            logits exceeds the margin, or at which the maps of its tagged classes, each over its maximum, exceed 0.3 on
            more than 70% of the image (the latter not before the first step). The public code compares the sum over six
            scaled and flipped views of the image with the margin. Waits for the device in every step.
        reference: the optimiser of the public code instead of plain steps, its loss without a margin, and
            ``divide_by="all"`` in the pooling: learning rate ten times as high for the last layer and falling with the
            power 0.9 of the steps left, weight decay 1e-4, momentum 1e-4 (which stands where a weight decay was meant).

    Returns:
        ``[B, K', h, w]``, no gradient: all classes, or those of ``classes``; a list of ``[K_i, h, w]``
        if these are given for each image. Of volumes with their depth.

    Raises:
        TypeError: an argument of another type than above, companions that are not pairs of tensors or have another
            dtype than the images.
        ValueError: shapes or devices that do not fit each other,
            tags other than 0 and 1, NaN or infinite images, companions for fewer than ``steps`` steps, negative
            ``steps``, ``lr`` of 0 or less, a ``margin`` outside ±1e30, an unknown ``pool`` or ``norm``, ``frozen``
            modules that are not of the classifier, or that leave nothing to train, features without parameters before a
            head that is not linear, a network that overwrites in place what its gradient needs; maps that are NaN or
            infinite, or become so as weights diverge.

    Source:
        Reducing the information bottleneck, the dissertation's sec. 3.4.3. The sum of eq. (2.1) as printed is
        ``norm="max"``; the default is what the public code adds up. That code also takes the image at four scales and
        flipped (but for half size to train, too), and leaves out the map after the last step.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> images, tags = torch.rand(6, 3, 9, 9), torch.eye(4).repeat(2, 1)[:6]
        >>> def others(tag: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        ...     disjoint = (tags @ tag == 0).nonzero().flatten()
        ...     while True:
        ...         batch = disjoint[torch.randperm(len(disjoint))[:3]]
        ...         yield images[batch], tags[batch]
        >>> rib(net, images[:2], tags[:2], companions=others).shape
        torch.Size([2, 4, 7, 7])
    """
    check_images(images)
    clf = as_classifier(clf, images)
    with evaluating(clf):
        count = undisturbed(clf, partial(count_classes, clf, images))
    check_tags(tags, images, "images", classes=count)
    check_int("steps", steps)
    check_number("steps", steps, least=0)
    check_number("lr", lr, above=0, most=torch.finfo(images.dtype).max / 10)  # also for the last layer
    check_number("margin", margin, least=-LARGEST, most=LARGEST)
    check_choice("pool", pool, ("gndrp", "gap"))
    check_number("threshold", threshold)
    wanted = None if classes is None else check_classes(classes, len(images), count)
    fixed = _parameters_of(frozen, clf)
    check_choice("norm", norm, ("raw", "relu", "relu_max", "minmax", "max"))
    check_bool("stop", stop)
    check_bool("reference", reference)
    batches = _source(companions, steps, images, count)

    region = partial(gndrp, threshold=threshold, divide_by="all" if reference else "region")
    model = _ClassMaps(clf, (lambda maps: region(maps, maps)) if pool == "gndrp" else _average)
    loss = partial(rib_margin, margin=LARGEST if reference else margin, reduction="sum")
    limit = margin if stop else None
    autocast = torch.autocast(images.device.type, enabled=False)
    with (
        evaluating(clf),
        attributes_kept(list(clf.modules())),
        autocast,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        with taking("images", images):
            maps = [] if len(images) else [undisturbed(model, lambda: model(images)[0].detach(), constant=True)]
        for image, tag in zip(images.detach(), tags, strict=True):
            copy = _Copy(model, fixed, lr, reference)
            # Copies of images, here and below: autograd cannot use tensors that were made in inference mode.
            process = _process(copy, image[None].clone(), tag[None], batches(tag), steps, loss, limit)
            normalised = [normalize_each(widen(one), norm, images.dim() - 2) for one in process]
            maps.append(torch.stack(normalised).sum(0))
    summed = torch.cat(maps)
    if wanted is None:
        return summed
    if any(isinstance(numbers, list) for numbers in wanted):
        return [one[numbers] for one, numbers in zip(summed, wanted, strict=True)]
    return summed[:, wanted]


def _average(maps: Tensor) -> Tensor:
    return maps.mean(axes(maps))


class _ClassMaps(nn.Module):
    """Class activation maps, and the logits pooled from them."""

    def __init__(self, clf: Classifier, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.clf, self.pool = clf, pool

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = checked_features(self.clf, self.clf.features(images), images)
        linear = self.clf.linear
        if linear is None:
            maps = torch.einsum("kbd,bd...->bk...", _class_weights(self.clf, features, images), features.maps)
        else:
            pointwise = F.conv2d if images.dim() == 4 else F.conv3d
            ones = [1] * (images.dim() - 2)
            maps = pointwise(features.maps, self.clf.class_weight().unflatten(1, (-1, *ones)))
        require(
            "clf",
            maps,
            lambda: maps.isfinite().all(),
            lambda: (
                "expected finite maps, got NaN or infinity: from its weights, or an lr at which they diverge "
                "(see images and companions)"
            ),
        )
        logits = self.pool(maps)
        return maps, logits if linear is None or linear.bias is None else logits + linear.bias


def _class_weights(clf: Classifier, features: Features, images: Tensor) -> Tensor:
    """Grad-CAM's weights of each image, ``[K, B, D]``, constants: what a linear layer after pooling has itself."""
    with torch.enable_grad():
        leaf = features.maps.detach().requires_grad_()
        logits = head_logits(clf, Features(leaf, features.rest), images)
        units = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        each = units[:, None].expand(-1, len(images), -1)
        gradient = head_gradient(logits, leaf, grad_outputs=each, is_grads_batched=True)
        return gradient.sum(axes(gradient, 3))


class _Copy:
    """The maps of a classifier with weights of its own, which it trains."""

    def __init__(self, model: _ClassMaps, fixed: set[int], lr: float, reference: bool) -> None:
        self.model, self.reference = model, reference
        last = set(map(id, model.clf.linear.parameters())) if model.clf.linear is not None else set()
        self.state = {name: buffer.clone() for name, buffer in model.named_buffers()}
        groups: list[dict[str, Any]] = [{"params": []}, {"params": []}]
        for name, parameter in model.named_parameters():
            self.state[name] = tracked(parameter.detach())
            if id(parameter) not in fixed:
                self.state[name] = parameter.detach().clone().requires_grad_()
                groups[id(parameter) in last]["params"].append(self.state[name])
        self.rates = (lr, 10 * lr) if reference else (lr, lr)
        decay = 1e-4 if reference else 0.0
        self.optimizer = torch.optim.SGD(groups, lr, momentum=decay, weight_decay=decay)

    def __call__(self, images: Tensor, name: str = "images") -> tuple[Tensor, Tensor]:
        with taking(name, images):
            return functional_call(self.model, self.state, (images,))

    def descend(self, loss: Tensor, left: float) -> None:
        """A step of the optimiser, with this share of the steps left."""
        if not loss.requires_grad:
            raise ValueError(
                "clf: expected parameters to train that the maps depend on, got none (see frozen): of heads only one "
                "linear layer after global average pooling is trained, others are constants"
            )
        groups = self.optimizer.param_groups
        weights = [weight for group in groups for weight in group["params"]]
        with followed("clf"):
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * left**0.9 if self.reference else rate
        self.optimizer.step()


def _process(
    copy: _Copy,
    image: Tensor,
    tags: Tensor,
    batches: Iterator[Batch],
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    limit: float | None,
) -> Iterator[Tensor]:
    """The maps ``[1, K, *spatial]`` of an image ``[1, C, *spatial]`` before each step and after the last one.

    With a limit of the logits it may end early.
    """
    for step in range(steps):
        others, their_tags = next(batches)
        maps, logits = _of_all(copy, image, others.clone())
        yield maps.detach()
        if limit is not None and _is_finished(maps, logits[:1], tags, step, limit):
            return
        copy.descend(loss(logits, torch.cat([tags, their_tags])), 1 - step / steps)
    with torch.no_grad():
        yield copy(image)[0]


def _of_all(copy: _Copy, image: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of an image, and the logits of all images: in one pass, where they are of one size."""
    if image.shape[1:] == others.shape[1:]:
        maps, logits = copy(torch.cat([image, others]))
        return maps[:1], logits
    maps, logits = copy(image)
    return maps, torch.cat([logits, copy(others, "companions")[1]])


def _is_finished(maps: Tensor, logits: Tensor, tags: Tensor, step: int, limit: float) -> bool:
    tagged = tags != 0
    strong = torch.where(tagged, logits, 0).sum() > limit
    high = (max_normalize(maps.flatten(2)[:, :, None]) > _HIGH) & tagged[:, :, None, None]
    wide = high.any(1).float().mean() > _FINISHED
    return bool(strong | wide if step else strong)


def _non_discriminative(maps: Tensor, threshold: float) -> Tensor:
    """The locations of maps ``[B, K, *spatial]`` up to a share of the maximum; all where nothing is positive."""
    peak = maps.amax(axes(maps), keepdim=True)
    return (peak <= 0) | (maps / peak <= threshold)


def _source(companions: object, steps: int, images: Tensor, classes: int) -> Callable[[Tensor], Iterator[Batch]]:
    """A function from the tags of an image to its checked batches."""

    def checked(batches: object) -> Iterator[Batch]:
        if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
            raise TypeError(f"companions: expected an iterable, or a function that gives one, got {_type(batches)}")
        count = 0
        for batch in islice(batches, steps):
            _check_batch(batch, images, classes)
            count += 1
            yield batch[0].detach(), batch[1]
        if count < steps:
            raise ValueError(f"companions: expected a batch for each of {steps} steps, got {count}")

    if callable(companions) and not isinstance(companions, Iterable):
        return lambda tags: checked(companions(tags))
    shared = list(checked(companions))
    return lambda tags: iter(shared)


def _check_batch(batch: object, images: Tensor, classes: int) -> None:
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise TypeError(f"companions: expected batches (images, tags), got {_type(batch)}")
    others, tags = batch
    check_floating("companions", others)
    if others.dtype != images.dtype:
        raise TypeError(f"companions: expected {images.dtype}, as of images, got {others.dtype}")
    if others.dim() != images.dim():
        expected = layout_text(images.dim()).replace("B", "N")
        raise ValueError(f"companions: expected images {expected}, got {shape_text(others.shape)}")
    check_like("companions", others, (len(others), images.shape[1], *others.shape[2:]), "images", images)
    check_finite("companions", others)
    try:
        check_tags(tags, others, "companions", classes=classes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"companions: {error}") from None


def _parameters_of(frozen: object, clf: Classifier) -> set[int]:
    if not isinstance(frozen, Sequence) or not all(isinstance(module, nn.Module) for module in frozen):
        raise TypeError(f"frozen: expected a sequence of modules, got {frozen!r}")
    fixed = {id(parameter) for module in frozen for parameter in module.parameters()}
    every = set(map(id, clf.parameters()))
    if not fixed <= every:
        raise ValueError("frozen: expected modules of the classifier, got parameters that it does not have")
    if fixed == every:
        raise ValueError(f"frozen: expected to leave parameters to train, got all {len(every)} of them")
    return fixed


def _check_maps(name: str, maps: object) -> None:
    check_floating(name, maps)
    assert isinstance(maps, Tensor)
    if maps.dim() not in (4, 5) or 0 in maps.shape[1:]:
        kinds = "[B, K, h, w] or [B, K, d, h, w]"
        raise ValueError(f"{name}: expected {kinds} with at least one pixel, got {shape_text(maps.shape)}")
    check_has_values(name, maps)
    check_finite(name, maps)


def _type(value: object) -> str:
    return type(value).__name__
