"""Layer-wise relevance propagation (LRP) unrolled into a decoder whose layers are tied to those of the classifier."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segattr.lrp.adjoints import RULES, Linearised, batch_statistics, channels, relu, relu_module, untied_relu
from segattr.lrp.composites import Composite, composite
from segattr.lrp.free import FreeDecoder
from segattr.lrp.plan import Operation, Plan, Plans, Saved
from segattr.lrp.relevance import over
from segattr.lrp.rules import STABILIZER, Epsilon, Rule
from segattr.networks.classes import Classes, Maps, ScoresAndMaps, check_classes
from segattr.networks.classifier import Classifier, check_images, check_layout, taking, tracked
from segattr.networks.reader.read import unwrapped
from segattr.networks.reader.record import IMAGES, Result
from segloss.common.checks import check_choice, check_finite, check_floating, check_int, check_number, shape_text


class UnrolledLRP(nn.Module):
    """A classifier and the decoder that is tied to it; see :func:`unroll`, which makes it.

    Attributes:
        encoder: the classifier itself, which has all parameters.
        decoder: one layer for each operation of the encoder, last one first; printing shows what each is tied to.
    """

    __call__: ScoresAndMaps

    def __init__(self, plans: Plans, epsilon: float, chunk: int | None) -> None:
        super().__init__()
        self.encoder = plans.model
        self.decoder = plans.kept[0].decoder if plans.kept else nn.ModuleList()
        self.plans, self.epsilon, self.chunk = plans, epsilon, chunk

    def forward(self, x: Tensor, classes: Classes | None = None) -> tuple[Tensor, Maps]:
        """Class scores and heatmaps.

        Args:
            x: images as the classifier wants them, ``[B, C, H, W]``, or volumes, ``[B, C, D, H, W]``.
            classes: all of them if None; numbers of classes, the same for every image; or a sequence of them for each
                image, the classes present say.

        Returns:
            Scores of all classes, ``[B, K]``, and heatmaps of the wanted ones, ``[B, len(classes), H, W]``, or
            ``[B, len(classes), D, H, W]``; a list of ``[len(classes[i]), H, W]`` where images have their own.

        Raises:
            TypeError: ``x`` that is not a floating point tensor, ``classes`` that are not integers.
            ValueError: ``x`` of another shape, a class that there is not, sequences for more or fewer than
                B images; from an operation of the classifier, what its adjoint cannot do.
        """
        _check_chunk(self.chunk)  # which may have been set since
        plan = self._plan(x)
        x = tracked(x)
        scores, tape = self._encode(plan, x)
        start, counts = _start(scores, classes, plan.choice is not None)
        chunk = self.chunk or (start.shape[1] if scores.requires_grad else _at_once(x, start.shape[1]))
        parts = start.split(max(int(chunk), 1), 1)  # also of NumPy
        if self.chunk and scores.requires_grad:  # the decoder runs again in the backward pass, a chunk at a time
            heat = [checkpoint(self._heat, plan, x, part, tape, use_reentrant=False) for part in parts]
        else:
            heat = [self._heat(plan, x, part, tape) for part in parts]
        maps = heat[0] if len(heat) == 1 else torch.cat(heat, 1)
        return scores, maps if counts is None else [m[:n] for m, n in zip(maps, counts, strict=True)]

    def ledger(self, x: Tensor) -> dict[str, Tensor]:
        r"""Relevance that goes to biases and other constants instead of pixels.

        .. math:: s_c = \sum_{pixels} heat_c + \sum_{entries} absorbed_c

        for every class c. An operation that adds :math:`b` to its output z has the entry
        :math:`\langle b, \partial s_c / \partial z \rangle`: ``"<layer>.bias"``; batch normalisation also has
        ``"<layer>.mean_shift"``, :math:`b = -\gamma \mu / \sqrt{\sigma^2 + \epsilon}`; bounds of a clamp have
        ``"<operation>.saturation"``, activations that are not 0 at 0 ``".at_zero"``, padding ``".value"``, all other
        constants that are added or concatenated ``".constant"``. Under rules other than LRP-0 biases take the share
        that the rule gives them, and ``"<operation>.rule"`` is what the rule takes, or adds if it is negative, by its
        stabiliser or otherwise. With ``activations="relu"`` the sum is another one. It runs the classifier: in training
        mode dropout is drawn anew, and with ``batch_norm="batch"`` running statistics are updated.
        Where a constant is added to windows or tokens of all images, it takes a pass for each image.

        Args:
            x: images, ``[B, C, H, W]``, or volumes, ``[B, C, D, H, W]``.

        Returns:
            ``[B, K]`` by name, in the order of the decoder.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        plan = self._plan(x)
        scores, tape = self._encode(plan, tracked(x))
        start = _start(scores, None, plan.choice is not None)[0]
        adding = [operation for operation in plan.carrying if tape[operation.name].adds]
        if all(map(plan.apart, adding)):
            return self._absorbed(plan, start, tape)
        parts = [self._absorbed(plan, start * _one(start, i), tape, apart=False) for i in range(len(x))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _plan(self, x: Tensor) -> Plan:
        check_floating("x", x)
        check_layout("x", x)
        check_finite("x", x)
        with taking("x", x):
            plan = self.plans.plan(x)
        if plan is self.plans.kept[0] and self.decoder is not plan.decoder:  # read only now, or again in a copy
            self.decoder = plan.decoder
        return plan

    def _encode(self, plan: Plan, x: Tensor) -> tuple[Tensor, dict[str, Saved]]:
        """The scores, and for every operation its adjoint around what it got."""

        def save(operation: Operation, step: Linearised, results: Mapping[Result, Any]) -> Saved:
            several = None if isinstance(step.output, Tensor) else step.output
            if plan.choice is not None:
                way = plan.choice.way(operation, step, results)
                return Saved(way.back, {}, None, several, way.takes, way.parts)
            output = step.output.detach().unsqueeze(1) if self.epsilon and step.weighted else None
            return Saved(step.adjoint, step.shifts, output, several, len(step.shifts) > 0 or output is not None)

        with taking("x", x):
            results, tape = plan.run(self.encoder, x, save)
        return results[plan.output], tape

    def _heat(self, plan: Plan, x: Tensor, start: Tensor, tape: dict[str, Saved]) -> Tensor:
        decoded = self._decode(plan, start, tape)
        return (decoded if plan.choice is not None else decoded * x.unsqueeze(1)).sum(2)

    def _absorbed(self, plan: Plan, start: Tensor, tape: dict[str, Saved], apart: bool = True) -> dict[str, Tensor]:
        absorbed: dict[str, Tensor] = {}
        self._decode(plan, start, tape, absorbed, apart)
        return absorbed

    def _decode(
        self,
        plan: Plan,
        start: Tensor,
        tape: dict[str, Saved],
        absorbed: dict[str, Tensor] | None = None,
        apart: bool = True,
    ) -> Tensor:
        """Gradients at the image, ``[B, K, C, H, W]``, from those at the scores, ``[B, K, classes]``; or relevance."""
        gradients = {plan.output: start}
        for operation, layer in zip(reversed(plan.carrying), plan.decoder, strict=True):
            step = tape[operation.name]
            gradient = _gather(operation, gradients, step.several)
            taken = {}
            if step.output is not None:
                size = step.output.abs()
                whole, gradient = gradient, gradient * (size / (size + self.epsilon))
                if absorbed is not None:
                    taken[f"{operation.label}.rule"] = _total([(whole - gradient) * step.output], apart)
            back = layer(gradient, step)
            if absorbed is not None:
                taken |= _absorbed(operation, gradient, back, step, apart)
                for entry, value in taken.items():
                    absorbed[entry] = absorbed[entry] + value if entry in absorbed else value  # modules used twice
            for result, part in zip(operation.inputs, back, strict=True):
                gradients[result] = gradients[result] + part if result in gradients else part
        return gradients[IMAGES]


def _gather(operation: Operation, gradients: dict[Result, Tensor], several: Sequence[Tensor] | None) -> Any:
    """Gradients at the result of an operation, or at its several ones, with zeros where nothing used one."""
    if several is None:
        return gradients.pop(operation.outputs[0])
    found = [gradients.pop(result, None) for result in operation.outputs]
    classes = next(gradient.shape[1] for gradient in found if gradient is not None)
    return [
        t.new_zeros(t.shape[:1] + (classes,) + t.shape[1:]) if gradient is None else gradient
        for gradient, t in zip(found, several, strict=True)
        if t.is_floating_point()
    ]


def _absorbed(
    operation: Operation, gradient: Any, back: Sequence[Tensor], step: Saved, apart: bool
) -> dict[str, Tensor]:
    """What goes to the shifts of an operation instead of its inputs, by name, ``[B, K]``; what its rule takes, or adds.

    Where images do not lie apart along the first axis, ``[1, K]``, of all of them together.
    """
    entries: dict[str, Tensor] = {}
    if step.parts is None:
        for name, shift in step.shifts.items():
            entries[_entry(operation, name)] = _inner(gradient, shift, apart)
        return entries
    for part in step.parts:
        for name, shift in part.shifts.items():
            share = _inner(_one_of(over(gradient, part)), shift, apart)
            entry = _entry(operation, name)
            entries[entry] = entries[entry] + share if entry in entries else share
    if step.adds:
        given = _total([gradient] if isinstance(gradient, Tensor) else gradient, apart)
        entries[f"{operation.label}.rule"] = given - _total(back, apart) - sum(entries.values())
    return entries


def _entry(operation: Operation, name: str) -> str:
    place = operation.norm.label if operation.norm and name.startswith("norm.") else operation.label
    return f"{place}.{name.removeprefix('norm.')}"


def _one_of(gradient: Any) -> Tensor:
    """Of an operation with shifts, which has one output."""
    return gradient if isinstance(gradient, Tensor) else gradient[0]


def _total(relevance: Sequence[Tensor], apart: bool) -> Tensor:
    total = torch.stack([r.flatten(2).sum(2) for r in relevance]).sum(0)
    return total if apart else total.sum(0, keepdim=True)


def _inner(gradient: Tensor, shift: Tensor, apart: bool) -> Tensor:
    """Inner products with a shift, which is per channel, or broadcasts."""
    if shift.dim() == 1 and apart:
        return (gradient.flatten(3).sum(3) if gradient.dim() > 3 else gradient) @ shift
    if shift.dim() == 1:
        shift = channels(shift, gradient)
    else:
        shift = shift.reshape(*[1] * (gradient.dim() - 1 - shift.dim()), *shift.shape).unsqueeze(1)
    products = (gradient * shift).flatten(2).sum(2)
    return products if apart else products.sum(0, keepdim=True)


def _one(start: Tensor, image: int) -> Tensor:
    """1 for one of the images, 0 for all other ones."""
    return (torch.arange(len(start), device=start.device) == image).to(start.dtype)[:, None, None]


# Class and pixel pairs whose decoder runs fastest on a CPU: more do not fit its caches, with fewer calls take longer.
_PAIRS = 2**17


def _at_once(x: Tensor, classes: int) -> int:
    """Classes to decode at once without gradients: all for compilers and accelerators."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return classes
    return max(_PAIRS // max(x.numel() // x.shape[1], 1), 1)


def _check_chunk(chunk: object) -> None:
    if chunk is not None:
        check_int("chunk", chunk)
        check_number("chunk", chunk, least=1)


def _start(scores: Tensor, classes: Classes | None, scaled: bool = False) -> tuple[Tensor, list[int] | None]:
    """Unit vectors of the wanted classes, ``[B, K, classes]``; per image, padded, with the number of each.

    Scaled, they are the scores themselves, as constants: relevance to start with.
    """
    if scores.dim() != 2:
        raise ValueError(f"model: expected scores [B, K], got {shape_text(scores.shape)}")
    units = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
    counts: list[int] = []
    if classes is None:
        start = units.expand(len(scores), -1, -1)
    else:
        wanted = check_classes(classes, *scores.shape)
        counts = [len(numbers) for numbers in wanted if isinstance(numbers, list)]
        padded = [[*numbers, *[0] * (max(counts) - len(numbers))] for numbers in wanted if isinstance(numbers, list)]
        places = torch.tensor(padded if counts else wanted, dtype=torch.int64, device=scores.device)
        start = units[places] if counts else units[places].expand(len(scores), -1, -1)
    return start * scores.detach().unsqueeze(1) if scaled else start, counts or None


def unroll(
    model: nn.Module,
    *,
    activations: Literal["tied", "relu"] = "tied",
    weights: Literal["tied", "free"] = "tied",
    upsampling: Literal["tied", "nearest"] = "tied",
    skip: Literal["concat"] | None = None,
    batch_norm: Literal["eval", "batch"] = "eval",
    epsilon: float = 0.0,
    chunk: int | None = None,
    gates: Literal["constant", "refuse"] = "constant",
    example: Tensor | None = None,
    rule: str | Rule | Composite = "zero",
) -> UnrolledLRP | FreeDecoder:
    r"""Turns a classifier into a segmentation network: LRP of all classes as a decoder that shares its parameters.

    .. math:: heat_c = \sum_{channels} x \odot \frac{\partial s_c}{\partial x}

    is LRP-0 of the score of class c, which in networks of convolutions, ReLU and pooling equals input times gradient.
    The decoder is explicit, one layer for each operation of the classifier: transposed convolutions with its weights,
    its activation masks, up-sampling to where its pooling took the maxima from, each the exact adjoint. It runs for all
    classes in one batch, can be trained, and reads the parameters of the classifier, of which there is one copy:
    training, moving or loading one is training, moving or loading the other.

    Other rules, for smoother heatmaps, pass relevance instead of gradients: see ``rule``, ``segattr.lrp.rules`` and
    ``segattr.lrp.composites``. Masks, indices of maxima, inputs and what is divided by are constants then, so that
    the heatmaps reach the weights where a rule has them, scales of batch normalisation among them: gamma, z+ and
    alpha-beta through their positive and negative parts, w-squared through squares, z-box through all three, flat not
    at all; biases get no gradient.

    Other networks have gates, which are held constant, so that the heatmaps are no longer input times gradient, but
    scores are still conserved (see :meth:`UnrolledLRP.ledger`):

    - an activation such as SiLU, GELU or tanh is :math:`x \, g(x) + f(0)` with g as gate: the identity rule of
      AttnLRP;
    - results of sigmoid, softmax, exp, roots, norms and comparisons are gates, and so is what is made of gates alone:
      attention weights (the AH rule of Ali et al.), squeeze and excitation;
    - of a product, matrix products among them, the first factor that is no gate carries the relevance, all other ones
      are its gates (signal-take-all of Arras et al.); of a quotient the numerator, of a power x times its remaining
      power, of ``scaled_dot_product_attention`` the values;
    - layer, group, instance and RMS normalisation divide by a constant, while the mean carries (the LN rule of Ali
      et al.).

    What a saturated ReLU6, padding, a class token, a gate that is added or ``+ 1`` give, whatever the image is, goes to
    the ledger.

    Masks, indices of maxima and gates are constants. So a loss of the heatmaps reaches weights through the decoder
    only, and neither biases nor shifts of batch normalisation at all; :class:`segattr.lrp.HeatmapLoss` adds a loss of
    the scores that does. Under DistributedDataParallel a loss of the heatmaps alone needs
    ``find_unused_parameters=True``.

    Where this differs from the authors' code: overlapping maxima add up (``max_unpool2d`` there overwrites them), tied
    weights are one parameter (two leaves there), nothing is divided by activations.

    Args:
        model: classifier from images ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``, to scores ``[B, K]``, or an
            object with ``logits``. It is run on noise to see what it does, for each other size of images again where
            that depends on it. Its modes are left as they are; branches that depend on them are those of evaluation
            mode. Weights that hooks or parametrizations compute are computed at each call. Of a network compiled by
            ``torch.compile``, or wrapped in ``DataParallel``, ``DistributedDataParallel`` or ``AveragedModel``, the
            network inside is unrolled, of a :class:`segattr.Classifier` the network that it was split from.
        activations: of a tied decoder: ``"tied"``, the masks of the classifier; ``"relu"``, ReLU of the decoder's own
            signal, which is the weight-sharing auto-encoder (WS-AE) of the paper's ablation.
        weights: ``"tied"``, or ``"free"``, a decoder with parameters of its own and one branch for all classes.
        upsampling: ``"tied"``, or ``"nearest"``, which goes with free weights and only with them.
        skip: with free weights, ``"concat"`` for a U-Net; None for a fully convolutional network (FCN).
        batch_norm: statistics of batch normalisation, which are constants: ``"eval"``, running ones in any mode;
            ``"batch"``, in training mode those of the batch, by which running ones are updated once a step.
        epsilon: stabiliser of LRP-epsilon, in the unit of the activations z: the relevance of each convolution, linear
            layer and batch normalisation shrinks by :math:`|z| / (|z| + \epsilon)`. For attribution only: the factor is
            taken as a constant in the backward pass, where its derivative would give rare huge gradients.
        chunk: classes decoded at once. If None, all of them, but without gradients on a CPU as many as are fastest
            there: 2 for an image of 224 pixels a side, 7 for two of 96. In training, to save memory; the decoder then
            runs twice.
        gates: ``"constant"``, or ``"refuse"`` for a network with gates, whose heatmaps are not input times gradient.
        example: images that the model takes, of which only the shape, precision and device count; None to try usual
            ones.
        rule: ``"zero"``, LRP-0; ``"epsilon"``, short for ``epsilon=1e-6``; ``"gamma"``, ``"zplus"``, ``"alpha_beta"``,
            ``"flat"``, ``"wsquare"`` or a rule such as ``Gamma(0.1)`` for all layers with weights; a composite:
            ``"epsilon_plus"``, ``"epsilon_plus_flat"``, ``"epsilon_alpha2_beta1"``, ``"epsilon_alpha2_beta1_flat"``,
            :func:`segattr.lrp.composites.epsilon_gamma_box`; or pairs of a predicate and a rule, of which the first
            that holds of an operation counts, LRP-0 if none does.

    Returns:
        A module from images to ``(scores [B, K], heatmaps [B, K, H, W])``, or ``[B, K, D, H, W]`` of volumes; see
        :meth:`UnrolledLRP.forward`.

    Raises:
        TypeError: an ``example`` that is not floating point; a model whose code cannot be followed, as it reads numbers
            out of images, say; with operations that have no adjoint (all are named; see :func:`segattr.lrp.adjoint`);
            with other outputs, probabilities among them.
        ValueError: options that do not go together, ``epsilon`` below 0, ``chunk`` below 1, an unknown rule, one that
            is not for an operation that it is given to.

    Source:
        *Model Guidance via Explanations Turns Image Classifiers into Segmentation Models*, sec. 2, tables 1 and 3.
        Gates: *AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers* (Achtibat et al., 2024);
        *XAI for Transformers: Better Explanations through Conservative Propagation* (Ali et al., 2022); *Explaining and
        Interpreting LSTMs* (Arras et al., 2019).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> unrolled = unroll(model)
        >>> image = torch.randn(2, 3, 32, 32)
        >>> scores, heatmaps = unrolled(image)
        >>> heatmaps.shape
        torch.Size([2, 4, 32, 32])
        >>> torch.allclose(heatmaps.sum((2, 3)) + sum(unrolled.ledger(image).values()), scores, atol=1e-5)
        True
        >>> unrolled.decoder[0]
        TiedLayer(adjoint of Linear, tied to 4)
    """
    check_choice("activations", activations, ("tied", "relu"))
    check_choice("weights", weights, ("tied", "free"))
    check_choice("upsampling", upsampling, ("tied", "nearest"))
    check_choice("skip", skip, (None, "concat"))
    check_choice("batch_norm", batch_norm, ("eval", "batch"))
    check_choice("gates", gates, ("constant", "refuse"))
    check_number("epsilon", epsilon, least=0)
    _check_chunk(chunk)
    if (weights == "free") != (upsampling == "nearest") or (skip and weights == "tied"):
        raise ValueError(
            "weights: expected 'tied' with upsampling='tied' and skip=None, or 'free' with upsampling='nearest', "
            f"got {weights!r} with {upsampling!r} and {skip!r}"
        )
    if weights == "free" and (activations != "tied" or epsilon or chunk):
        raise ValueError(
            "weights: expected 'tied' with activations='relu', epsilon or chunk: a free decoder has none, got 'free'"
        )
    if isinstance(rule, Epsilon) and epsilon:
        raise ValueError(f"epsilon: expected none beside a rule that has one, got {epsilon} with {rule}")
    if isinstance(rule, Epsilon) or (isinstance(rule, str) and rule == "epsilon"):
        rule, epsilon = "zero", rule.epsilon if isinstance(rule, Epsilon) else epsilon or STABILIZER
    chosen = composite(rule)
    if chosen is not None and (weights == "free" or activations != "tied" or epsilon):
        raise ValueError(
            f"rule: expected weights='tied', activations='tied' and epsilon=0, got {weights!r}, {activations!r} and "
            f"{epsilon} with {rule}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if example is not None:
        check_images(example, "example")
    rules = dict(RULES)
    if activations == "relu":
        rules |= {operation: untied_relu for operation, rule in RULES.items() if rule in (relu, relu_module)}
    if batch_norm == "batch":
        rules |= {operation: batch_statistics for operation, rule in RULES.items() if rule is RULES[nn.BatchNorm2d]}
    with nullcontext() if example is None else taking("example", example):
        plans = Plans(_inside(model), rules, gates, example, chosen)
    if weights == "free":
        return FreeDecoder(plans, skip, plans.reader.shape) if plans.reader.dims == 5 else FreeDecoder(plans, skip)
    return UnrolledLRP(plans, float(epsilon), chunk)


def _inside(model: nn.Module) -> nn.Module:
    """The classifier in what it is wrapped in."""
    model = unwrapped(model)
    return model.model if isinstance(model, Classifier) and model.model is not None else model
