"""AdvCAM: class activation maps summed while the image climbs towards its class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segattr.cam import check_maps, normalize_each
from segattr.networks.backward import followed
from segattr.networks.classes import Classes, Maps, Pairs, typed
from segattr.networks.classifier import Classifier, as_classifier, check_images, undisturbed
from segattr.networks.features import Features, count_classes, feature_maps, head_gradient, head_logits
from segattr.networks.spatial import axes
from segloss.common.checks import check_bool, check_int, check_number
from segloss.common.reduction import LARGEST, wide_dtype


@typed
def advcam(
    clf: nn.Module,
    images: Tensor,
    classes: Classes | None = None,
    *,
    steps: int = 27,
    step_size: float = 0.08,
    threshold: float = 0.5,
    penalty: float = 3.0,
    suppress: bool = True,
    literal: bool = False,
    reference: bool = False,
    chunk: int | None = None,
) -> Maps:
    r"""Anti-adversarially manipulated attribution (AdvCAM): more of an object than its most telling part.

    .. math::
        A &= \sum_{t=0}^T r_t, \qquad r_t = \mathrm{ReLU}(\mathrm{CAM}_c(x_t)) \\
        x_t &= \mathrm{clamp}\Bigl(x_{t-1} + \xi \frac{\nabla L}{\max |\nabla L|}\Bigr) \\
        L &= y_c - \sum_{k \ne c} y_k - \frac{\lambda}{hw} \sum_i M(i) |r_{t-1}(i) - r_0(i)|, \qquad
        M(i) = [r_{t-1}(i) > \tau \max_j r_{t-1}(j)]

    with logits y of :math:`x_{t-1}`, and the range of values of :math:`x_0` to clamp to. Each pair of an image and a
    class is a row of a batch that climbs on its own. No gradient of parameters is computed, nor one after the
    last map. A post-process for any classifier: where its head is not global average pooling and one linear layer,
    CAM is Grad-CAM with the gradient summed over the map, the same thing where it is. Batched over the classes and
    one at a time are the same up to rounding; in float32 a location at the threshold may fall on either side.

    The network runs in the mode that it is in (evaluation, normally), without autocast and without an update of batch
    statistics; for speed at some loss use a network and images in half precision.

    Args:
        clf: a :class:`~segattr.Classifier`, or a network that :func:`~segattr.split` understands.
        images: ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``, normalised as the network expects it.
        classes: numbers of classes, for all images or one sequence for each image; all classes if None. Those of the
            image's tags, normally.
        steps: T, at least 0, which is a CAM.
        step_size: :math:`\xi`, at least 0, in the unit of the images: the largest change of a value in one step.
        threshold: :math:`\tau`, in [0, 1].
        penalty: :math:`\lambda`, at least 0. The text and the released code have 7.
        suppress: whether the logits of other classes are pushed down: the second term of L.
        literal: equations (3.2) to (3.6) as printed: steps :math:`\xi \nabla L` without a limit, signed maps over
            their maximum, eq. (2.1), and a penalty that is a sum over locations, which grows with the resolution. The
            text has a ``step_size`` of 0.008 and a ``penalty`` of 7.
        reference: the released code, whose settings are the defaults but for ``penalty=7``: an image and its mirror
            image climb together, r is the sum of both, each weighted with its share of positive locations, y the mean
            of the ReLU of the maps, without a bias; the penalty is a sum over locations; the range to clamp to is that
            of :math:`x_{t-1}`; :math:`r_T` is left out. For its scales use :func:`~segattr.multiscale` without
            flip; it makes half the steps at scale 0.5, and counts the maps of that scale and all later ones twice.
        chunk: rows in the network at once, to save memory; all if None.

    Returns:
        Sums of maps ``[B, K, h, w]``, K the number of requested classes, at the resolution of the features, or a list
        of ``[K_i, h, w]`` if ``classes`` is a sequence for each image, with the depth of volumes; without gradient.
        Eq. (3.3) divides them by their maximum: :func:`~segattr.normalize`.

    Raises:
        TypeError: ``images`` that are not floating point, ``classes`` that are not sequences of integers, settings of
            another type, a network that cannot be split.
        ValueError: images, classes or settings out of range, ``literal`` and ``reference`` at once, ``reference`` for
            a head that is not global average pooling and one linear layer, a network that overwrites in place what its
            gradient needs, maps that are NaN or infinite.

    Source:
        *Anti-Adversarially Manipulated Attributions for Weakly and Semi-Supervised Semantic Segmentation*; the
        dissertation's section 3.3.2. The defaults are of neither: they are what works at any resolution.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> [maps.shape for maps in advcam(net, torch.rand(2, 3, 9, 9), [[0, 3], [1]], steps=5)]
        [torch.Size([2, 7, 7]), torch.Size([1, 7, 7])]
    """
    check_images(images)
    for name, flag in (("suppress", suppress), ("literal", literal), ("reference", reference)):
        check_bool(name, flag)
    check_int("steps", steps)
    check_number("steps", steps, least=int(reference))
    check_number("step_size", step_size, least=0, most=LARGEST)
    check_number("threshold", threshold, least=0, most=1)
    check_number("penalty", penalty, least=0, most=LARGEST)
    if chunk is not None:
        check_int("chunk", chunk)
        check_number("chunk", chunk, least=1)
    if literal and reference:
        raise ValueError("literal: expected False with reference=True, got True")
    classifier = as_classifier(clf, images)
    if reference and classifier.linear is None:
        raise ValueError("reference: expected False for a head other than global average pooling and one linear layer")
    climb = _Climb(classifier, steps, step_size, threshold, penalty, suppress, literal, reference)

    def maps() -> Maps:
        pairs = Pairs.of(classes, len(images), count_classes(classifier, images), images.device)
        if not len(pairs.classes):
            features = feature_maps(classifier, images.detach()).maps
            return pairs.arrange(_wide(features).new_zeros(0, *features.shape[2:]))
        size = int(chunk or len(pairs.classes))  # also of NumPy
        parts = zip(pairs.images.split(size), pairs.classes.split(size), strict=True)
        return pairs.arrange(torch.cat([climb(images.detach()[own], c) for own, c in parts]))

    with torch.inference_mode(False), torch.enable_grad():
        return undisturbed(classifier, maps, constant=True)


@dataclass(frozen=True)
class _Climb:
    """The settings of :func:`advcam`, and its steps for rows of images."""

    clf: Classifier
    steps: int
    step_size: float
    threshold: float
    penalty: float
    suppress: bool
    literal: bool
    reference: bool

    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        """Sums of maps ``[N, *spatial]`` for images ``[N, C, *spatial]`` and one class for each."""
        x = torch.stack([images, images.flip(-1)], 1) if self.reference else images[:, None]
        start = x
        first: Tensor | None = None
        total = torch.zeros((), device=x.device)
        for remaining in reversed(range(self.steps + (not self.reference))):
            x = x.detach().requires_grad_(remaining > 0)
            features = feature_maps(self.clf, x.flatten(0, 1))
            # The gradient of the objective is taken in two parts, so that the network is passed through once.
            leaves = [tensor.detach().requires_grad_() for tensor in features if tensor is not None]
            leaf = Features(leaves[0], leaves[1] if len(leaves) > 1 else None)
            r, score = (
                self._pair(leaf.maps, classes) if self.reference else self._single(leaf, x.flatten(0, 1), classes)
            )
            total = total + r.detach()
            if remaining:
                first = r.detach() if first is None else first
                objective = (score - self.penalty * self._deviation(r, first)).sum()
                with followed("clf"):
                    gradient = _gradient(features, x, torch.autograd.grad(objective, leaves))
                x = self._step(x.detach(), gradient, start)
        return total

    def _single(self, features: Features, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``[N, *spatial]``, and scores ``[N]``: the objective without its penalty."""
        logits = head_logits(self.clf, features, images)
        own = logits.gather(1, classes[:, None])[:, 0]
        if self.clf.linear is not None:
            weight = self.clf.class_weight()[classes]
        else:
            weight = head_gradient(own.sum(), features.maps, retain_graph=True).sum(axes(features.maps))
        maps = torch.einsum("nd,nd...->n...", _wide(weight), _wide(features.maps))
        check_maps(maps)
        r = normalize_each(maps, "max" if self.literal else "relu", images.dim() - 2)
        return r, _wide(2 * own - logits.sum(1) if self.suppress else own)

    def _pair(self, features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """As the released code: of an image and its mirror image, which are next to each other in the batch."""
        weight = _wide(self.clf.class_weight())
        cams = torch.einsum("kd,npd...->npk...", weight, _wide(features).unflatten(0, (-1, 2)))
        own = cams[torch.arange(len(cams), device=classes.device), :, classes]
        # Grad-CAM of the sum of the map's ReLU. Its gradient, the weight where the map is positive, is summed over
        # locations and divided by how many elements of the gradients of both are positive.
        positive = (own > 0).sum(axes(own))
        count = positive.sum(1, keepdim=True) * (weight[classes] > 0).sum(1, keepdim=True)
        share = positive / count.clamp(min=1).to(own.dtype)
        scaled = (own * share.view(*share.shape, *[1] * (own.dim() - 2))).relu()
        logits = cams.relu().mean(axes(cams, 3)).sum(1)
        target = logits.gather(1, classes[:, None])[:, 0]
        return scaled[:, 0] + scaled[:, 1].flip(-1), 2 * target - logits.sum(1) if self.suppress else target

    def _deviation(self, r: Tensor, first: Tensor) -> Tensor:
        """Of maps from the first ones, where they are high, ``[N]``."""
        spatial = axes(r, 1)
        high = r > self.threshold * r.amax(spatial, keepdim=True)
        deviation = high * (r - first).abs()
        return deviation.sum(spatial) if self.literal or self.reference else deviation.mean(spatial)

    def _step(self, x: Tensor, gradient: Tensor, start: Tensor) -> Tensor:
        if self.literal:
            return x + self.step_size * gradient
        dims = axes(x, 1)
        largest = gradient.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        limits = x if self.reference else start
        return (x + self.step_size * gradient / largest).clamp(
            limits.amin(dims, keepdim=True), limits.amax(dims, keepdim=True)
        )


def _gradient(features: Features, x: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    if not features.maps.requires_grad:
        raise ValueError("clf: expected features that autograd can follow to the image, got detached ones")
    outputs = [tensor for tensor in features if tensor is not None]
    return torch.autograd.grad(outputs, x, gradients)[0]


def _wide(values: Tensor) -> Tensor:
    return values.to(wide_dtype(values))
