"""Relevance instead of gradients through the operations of a network, by the rules of a composite."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from segattr.lrp.adjoints import Adjoint, Linearised
from segattr.lrp.composites import SCALES, WEIGHTED, Composite, Place
from segattr.lrp.products import summed
from segattr.lrp.rules import Epsilon, Part, Pass, Rule, stable
from segattr.networks.reader.graph import results_in
from segattr.networks.reader.record import IMAGES, Attribute, Result, tensors_in

if TYPE_CHECKING:
    from segattr.lrp.plan import Operation

# Operations whose every output is an input, a sum of inputs that were repeated, or a constant.
_MOVES = frozenset(
    (
        *("flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "reshapeas", "viewas", "permute"),
        *("transpose", "swapaxes", "swapdims", "t", "mt", "adjoint", "movedim", "moveaxis", "cat", "concat"),
        *("concatenate", "stack", "hstack", "vstack", "dstack", "split", "chunk", "splitwithsizes", "tensorsplit"),
        *("unbind", "hsplit", "vsplit", "dsplit", "getitem", "narrow", "select", "indexselect", "gather"),
        *("takealongdim", "maskedselect", "flip", "fliplr", "flipud", "roll", "rot90", "diagonal", "pad"),
        *("constantpadnd", "repeat", "repeatinterleave", "tile", "expand", "expandas", "broadcastto", "tril", "triu"),
        *("pixelshuffle", "pixelunshuffle", "channelshuffle", "nativechannelshuffle", "identity", "max", "min"),
        *(f"{kind}{d}" for kind in ("maxpool", "adaptivemaxpool", "maxunpool") for d in ("1d", "2d", "3d")),
        *(f"{kind}{d}withindices" for kind in ("maxpool", "adaptivemaxpool") for d in ("1d", "2d", "3d")),
        *("amax", "amin", "maximum", "minimum", "fmax", "fmin", "topk", "sort", "msort", "kthvalue", "median"),
        *("where", "maskedfill", "setitem", "indexput", "indexcopy", "indexfill", "scatter", "selectscatter"),
        *("slicescatter", "asstrided", "unfold", "overwritten", "contiguous", "clone", "positive", "to", "type"),
        *("typeas", "float", "double", "half", "bfloat16", "cpu", "cuda", "zeropad2d"),
    )
)
_KEPT_BY_TWO = ("add", "mul")
_POSITIVE = frozenset(("relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "abs", "square", "exp"))
# Results without numbers below 0 of such tensors, where no constant comes in.
_KEEP_SIGN = frozenset(
    (
        *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "unflatten", "contiguous"),
        *("clone", "cat", "concat", "stack", "split", "chunk", "getitem", "expand", "pixelshuffle", "channelshuffle"),
        *("identity", "dropout", "max", "amax", "mean", "sum", *_KEPT_BY_TWO),
        *(
            f"{kind}{d}"
            for kind in ("dropout", "maxpool", "adaptivemaxpool", "avgpool", "adaptiveavgpool")
            for d in ("1d", "2d", "3d")
        ),
        *(f"{kind}{d}withindices" for kind in ("maxpool", "adaptivemaxpool") for d in ("1d", "2d", "3d")),
    )
)


def kind_of(operation: "Operation") -> str:
    """What it is called, the same for a module and a function."""
    return operation.kind.lower().replace("_", "")


class Choice:
    """The rules of the operations of a plan, which depend on the network alone.

    Raises:
        ValueError: a rule for layers with weights for an operation without any.
    """

    def __init__(self, operations: Sequence["Operation"], model: nn.Module, composite: Composite) -> None:
        self.rules: dict[str, Rule | None] = {}  # None for what moves numbers
        self.nonnegative: dict[str, bool] = {}  # whether an operation gets no numbers below 0
        positive: set[Result] = set()  # results without numbers below 0
        pixels = {IMAGES}  # results that are made of pixels alone
        for operation in operations:
            kind, given = kind_of(operation), results_in((operation.args, operation.kwargs))
            self.nonnegative[operation.name] = positive.issuperset(operation.inputs)
            if kind in _POSITIVE or (_keeps_sign(operation, kind) and positive.issuperset(given)):
                positive.update(operation.outputs)
            of_pixels = bool(operation.inputs) and pixels.issuperset(operation.inputs)
            first = of_pixels and len(operation.inputs) == 1
            if (of_pixels and kind in _MOVES) or (first and kind in SCALES):
                pixels.update(operation.outputs)
            if operation.inputs and kind not in _MOVES:
                self.rules[operation.name] = _rule(operation, model, composite, first)

    def way(self, operation: "Operation", step: Linearised, results: Mapping[Result, Any]) -> "Way":
        """How relevance goes through an operation that has run."""
        rule = self.rules.get(operation.name)
        if rule is None:
            return Way(step.adjoint, [], takes=len(step.shifts) > 0)  # constants that are concatenated
        inputs = [results[result] for result in operation.inputs]
        if isinstance(rule, Pass):
            shape = inputs[0].shape
            return Way(lambda relevance: summed(relevance, shape), [], takes=False)
        if step.layer is not None:
            step.layer.nonnegative = self.nonnegative[operation.name]
            parts = rule(step.layer)
        else:
            assert isinstance(rule, Epsilon)
            outputs = [step.output] if isinstance(step.output, Tensor) else step.output
            inverses = [stable(output, rule.epsilon).unsqueeze(1) for output in outputs if output.is_floating_point()]
            parts = [Part(inverses, [x.detach().unsqueeze(1) for x in inputs], step.adjoint, step.shifts)]
        return Way(lambda relevance: _divided(relevance, parts), parts, takes=True)


def _keeps_sign(operation: "Operation", kind: str) -> bool:
    """Whether nothing comes in that could be below 0 where its tensors are not."""
    constants = next(tensors_in((operation.args, operation.kwargs)), None) is not None or _has_parameter(operation.args)
    given = len(results_in(operation.args))
    enough = given >= (2 if kind in _KEPT_BY_TWO else 1)
    return kind in _KEEP_SIGN and enough and not constants and not operation.kwargs.get("alpha")


def _has_parameter(value: Any) -> bool:
    return isinstance(value, Attribute) or (isinstance(value, (tuple, list)) and any(map(_has_parameter, value)))


def _rule(operation: "Operation", model: nn.Module, composite: Composite, first: bool) -> Rule:
    node = operation.node
    module = model.get_submodule(node.target) if node.how == "module" else None
    path = node.path or (node.within[-1] if node.within else "")
    place = Place(path, kind_of(operation), module, first)
    rule = next((rule for predicate, rule in composite if predicate(place)), Epsilon(0))
    if not isinstance(rule, (Epsilon, Pass)) and place.kind not in WEIGHTED:
        raise ValueError(f"rule: {rule} is for layers with weights, and the composite gives it to {node.place}")
    if isinstance(rule, Pass) and (place.kind in WEIGHTED or len(operation.inputs) > 1):
        raise ValueError(f"rule: Pass is for operations on single numbers, and the composite gives it to {node.place}")
    return rule


class Way(NamedTuple):
    """How relevance goes from the output of an operation to its inputs."""

    back: Adjoint
    parts: list[Part]
    takes: bool  # whether the sum may be another one at the inputs


def _divided(relevance: Any, parts: list[Part]) -> list[Tensor]:
    total: list[Tensor] = []
    for part in parts:
        back = part.back(over(relevance, part))
        shares = [x * b for x, b in zip(part.inputs, [back] if isinstance(back, Tensor) else back, strict=True)]
        total = [a + b for a, b in zip(total, shares, strict=True)] if total else shares
    return total


def over(relevance: Any, part: Part) -> Any:
    """Relevance over activation, of one output or of each of several."""
    if isinstance(relevance, Tensor):
        return relevance * part.inverses[0]
    return [r * inverse for r, inverse in zip(relevance, part.inverses, strict=True)]
