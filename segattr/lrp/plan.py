"""The operations of a classifier as a decoder needs them: which of them carry relevance, and by which rules."""

import collections
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from segattr.lrp import piecewise, structure  # noqa: F401  (their rules)
from segattr.lrp.adjoints import (
    Adjoint,
    Linearised,
    Rule,
    batch_norm,
    batch_statistics,
    convolution,
    convolution_module,
)
from segattr.lrp.call import Call, overwrites
from segattr.lrp.composites import Composite
from segattr.lrp.gates import GATED
from segattr.lrp.relevance import Choice
from segattr.lrp.roles import BLANK, CHOOSING, GATES, Arguments, arguments, flat
from segattr.lrp.rules import Part
from segattr.networks.modes import evaluating
from segattr.networks.reader.graph import Graph, filled, needed, results_in, store
from segattr.networks.reader.read import Reader
from segattr.networks.reader.record import IMAGES, Attribute, Node, Result

Rules = Mapping[type | str, Rule]
Gates = Literal["constant", "refuse"]


@dataclass
class Operation:
    """One operation of a classifier.

    Args:
        name: of its result.
        node: what it does.
        args: positional arguments, with stand-ins.
        kwargs: further arguments, with stand-ins.
        rule: runs it and gives its adjoint; None for one that runs as in the network.
        path: of the module whose rule it is.
        roles: of the positional arguments, as nested as they are: ``"signal"`` where relevance goes, ``"gate"`` what
            depends on the image otherwise, ``"free"`` all else.
        inputs: the results that relevance goes to; none if it carries none.
        norm: batch normalisation of its result that is made part of it.
    """

    name: str
    node: Node
    args: Any
    kwargs: Any
    rule: Rule | None
    path: str | None
    roles: Any
    inputs: tuple[Result, ...]
    norm: "Operation | None" = None

    def __post_init__(self) -> None:
        self.overwrites = overwrites(self.node)
        parameters = inspect.signature(self.rule).parameters if self.rule is not None else ()
        self.takes_roles, self.takes_call = "roles" in parameters, "call" in parameters

    @property
    def outputs(self) -> list[Result]:
        return (self.norm or self).node.results()

    @property
    def kind(self) -> str:
        return self.node.kind

    @property
    def label(self) -> str:
        return self.path or self.node.name

    def run(self, model: nn.Module, results: Mapping[Result, Any], images: int) -> Any:
        """Runs the rule with the arguments filled in; its errors name the operation."""
        args, kwargs = filled((self.args, self.kwargs), model, results, images)
        if self.rule is None:
            return Call(self.node, model, self.overwrites)(*args, **kwargs)
        if self.path is not None:
            args = (model.get_submodule(self.path), *args)
        if self.takes_roles:
            kwargs["roles"] = self.roles
        if self.takes_call:
            kwargs["call"] = Call(self.node, model, self.overwrites)
        if self.norm is not None:
            norm, module = self.norm.rule, model.get_submodule(self.norm.path or "")
            assert norm is not None
            kwargs["norm"] = lambda x: norm(module, x)
        try:
            return self.rule(*args, **kwargs)
        except (TypeError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"model: LRP cannot do {self.node.place}: {error}") from error


class Saved(NamedTuple):
    """What the decoder needs of an operation that the encoder has run."""

    adjoint: Adjoint
    shifts: dict[str, Tensor]
    output: Tensor | None  # [B, 1, *out], for LRP-epsilon
    several: Sequence[Tensor] | None  # outputs, where it has more than one
    adds: bool  # whether relevance may go to what it adds, or to its rule
    parts: list[Part] | None = None  # of its relevance, under rules other than LRP-0


Save = Callable[[Operation, Linearised, Mapping[Result, Any]], Saved]


class TiedLayer(nn.Module):
    """A layer of the decoder: the adjoint of an operation of the encoder, without parameters of its own."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        tied = [part.label for part in (operation, operation.norm) if part]
        self.description = f"adjoint of {operation.kind}, tied to {' and '.join(tied)}"

    def forward(self, gradient: Any, step: Saved) -> Sequence[Tensor]:
        """Gradients at the inputs of the operation from that at its output, or those at its outputs."""
        back = step.adjoint(gradient)
        return [back] if isinstance(back, Tensor) else back

    def extra_repr(self) -> str:
        return self.description


@dataclass
class Plan:
    """The operations of a classifier for images of one kind, in order."""

    graph: Graph
    operations: list[Operation]
    output: Result
    choice: Choice | None = None  # of rules, other than LRP-0

    def run(self, model: nn.Module, x: Tensor, save: Save | None = None) -> tuple[dict[Result, Any], dict[str, Saved]]:
        """All results; with ``save`` only those at the end, and what it saves of operations that carry relevance."""
        results: dict[Result, Any] = {IMAGES: x}
        tape: dict[str, Saved] = {}
        for operation, unused in zip(self.operations, self.unused, strict=True):
            step = operation.run(model, results, len(x))
            store((operation.norm or operation).node, step.output if isinstance(step, Linearised) else step, results)
            if save is None:
                continue
            if operation.inputs:
                tape[operation.name] = save(operation, step, results)
            for result in unused:
                results.pop(result, None)
        return results, tape

    def __post_init__(self) -> None:
        self.carrying = [operation for operation in self.operations if operation.inputs]
        self.decoder = nn.ModuleList(map(TiedLayer, reversed(self.carrying)))
        last: dict[Result, int] = {}
        for number, operation in enumerate(self.operations):
            last.update(dict.fromkeys(results_in((operation.args, operation.kwargs)), number))
        last.pop(self.output, None)
        self.unused: list[list[Result]] = [[] for _ in self.operations]  # results that no later operation gets
        for result, number in last.items():
            self.unused[number].append(result)

    def dependencies(self, operation: Operation) -> list[Result]:
        """What an operation gets that depends on the images."""
        return [r for r in results_in((operation.args, operation.kwargs)) if r in self.graph.dependent]

    def apart(self, operation: Operation) -> bool:
        """Whether images lie along the first axis of what an operation gives, which has no other meaning."""
        graph, images = self.graph, self.graph.shapes[IMAGES][0]
        return all(graph.axes[r] == 0 and graph.shapes[r][0] == images for r in operation.outputs)


class Plans:
    """The plans of a classifier: one for images of any size where that can be, else one for each size.

    Args:
        model: takes images ``[B, C, H, W]``.
        rules: of the operations.
        gates: ``"refuse"`` for none.
        example: images that it takes; None to try some.
        composite: chooses the rules of LRP; None for LRP-0.

    Raises:
        TypeError: a model whose code cannot be followed, with operations that have no rule, or with other outputs.
        ValueError: a composite that gives an operation a rule that is not for it.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        gates: Gates,
        example: Tensor | None,
        composite: Composite | None = None,
    ) -> None:
        self.model, self.rules, self.gates, self.example = model, dict(rules), gates, example
        self.composite = composite
        self.kept: list[Plan] = []
        self.reader = Reader(
            model,
            leaf=self._is_leaf,
            atomic=self._is_atomic,
            replay=self._scores,
            example=example,
            evaluate=True,
            compare=True,
        )

    def __reduce__(self) -> Any:  # read again in a copy or another process
        kinds = {kind for module in self.model.modules() for kind in type(module).__mro__}
        # Not those of other modules of users, which may be of classes that another process cannot find.
        rules = {
            key: rule for key, rule in self.rules.items() if isinstance(key, str) or key in kinds or _of_torch(key)
        }
        return Plans, (self.model, rules, self.gates, self.example, self.composite)

    def plan(self, x: Tensor) -> Plan:
        """For images. Under ``torch.compile`` one that there is."""
        plan = self._of(self.reader.graph(x))
        if len(self.kept) > len(self.reader.graphs):  # of a network that has been changed
            self.kept = [plan for plan in self.kept if any(plan.graph is graph for graph in self.reader.graphs)]
        return plan

    def _of(self, graph: Graph) -> Plan:
        for plan in self.kept:
            if plan.graph is graph:
                return plan
        plan = Planner(graph, self.model, self.rules, self.gates).plan()
        if self.composite is not None:
            plan.choice = Choice(plan.operations, self.model, self.composite)
        self.kept.append(plan)
        return plan

    def _scores(self, graph: Graph, images: Tensor) -> Tensor:
        plan = self._of(graph)
        with evaluating(self.model):
            scores: Tensor = plan.run(self.model, images)[0][plan.output]
            others = torch.cat([images[:1], -5 * images[1:2]])
            first = plan.run(self.model, others)[0][plan.output][0] if len(images) > 1 else scores[0]
        near = 1e-7 if scores.dtype == torch.float64 else 1e-3
        if (first - scores[0]).abs().max() > near * scores[0].abs().max():
            raise TypeError("model: expected scores of an image that are the same whatever other images are beside it")
        return scores

    def _is_leaf(self, module: nn.Module) -> bool:
        """Whether it has a rule, and computes neither weights nor anything else in hooks."""
        return module_rule(module, self.rules) is not None and not computed(module) and not _pads(module)

    def _is_atomic(self, kind: str) -> bool:
        return kind in self.rules or kind in GATES


def _of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.")


def computed(module: nn.Module) -> bool:
    """Whether hooks or parametrizations compute its weights, or anything else."""
    return bool(module._forward_hooks or module._forward_pre_hooks or parametrize.is_parametrized(module))


def _pads(module: nn.Module) -> bool:
    """Whether a convolution pads by other values than zeros, which is an operation of its own."""
    return getattr(module, "padding_mode", "zeros") != "zeros"


def module_rule(module: nn.Module, rules: Rules) -> Rule | None:
    """The rule of the type of a module, or of the one that it has its forward method from."""
    for kind in type(module).__mro__:
        if kind in rules and getattr(kind, "forward", None) is type(module).forward:
            return rules[kind]
    return None


class Planner:
    """Follows what carries relevance from the images to the scores, and back."""

    def __init__(self, graph: Graph, model: nn.Module, rules: Rules, gates: Gates) -> None:
        self.graph, self.model, self.rules, self.gates = graph, model, rules, gates
        self.roles: dict[Result, str] = {IMAGES: "signal"}
        self.arguments: dict[str, Arguments] = {}  # by name of an operation
        self.makers: dict[Result, Node] = {}  # of gates: the operation that signals went into

    def plan(self) -> Plan:
        output = self.graph.outputs
        if not isinstance(output, Result):
            raise TypeError(f"model: expected one tensor of class scores as its output, got {_text(output)}")
        for node in self.graph.nodes:
            self._follow(node)
        nodes = needed(self.graph.nodes, {output})
        carrying = self._carrying(nodes, output)
        self._refuse(nodes, carrying, output)
        return Plan(self.graph, _fold([self._operation(node, node in carrying) for node in nodes], output), output)

    # --- from the images on: what can carry

    def _follow(self, node: Node) -> None:
        given = self.arguments[node.name] = arguments(node, self.roles)
        dependent = {self.roles[r] for r in results_in((node.args, node.kwargs))} - {"free"}
        role = "signal" if given.inputs else "gate" if dependent and node.kind not in BLANK else "free"
        for result in node.results():
            self.roles[result] = "gate" if role == "signal" and result.part == 1 and node.kind in CHOOSING else role
            if role == "gate":
                self.makers[result] = self._maker(node, dependent)

    def _maker(self, node: Node, dependent: set[str]) -> Node:
        if "signal" in dependent:
            return node
        return next(self.makers[r] for r in results_in((node.args, node.kwargs)) if r in self.makers)

    # --- from the scores back: what does carry

    def _carrying(self, nodes: list[Node], output: Result) -> list[Node]:
        reached, carrying = {output}, []
        for node in reversed(nodes):
            if reached.intersection(node.results()) and self.arguments[node.name].inputs:
                reached.update(self.arguments[node.name].inputs)
                carrying.append(node)
        return carrying[::-1]

    def _refuse(self, nodes: list[Node], carrying: list[Node], output: Result) -> None:
        if self.roles[output] != "signal":
            maker = self.makers.get(output)
            made = f"what {maker.place} makes of them" if maker else "no function of the images"
            raise TypeError(f"model: expected logits, sums that relevance can go through, got {made}")
        read = [node for node in self.graph.nodes if node.how == "value" and self._depends(node)]
        if read:
            raise TypeError(
                f"model: expected code that reads no numbers out of images, got {_places(read)}: what it does with "
                "them would be that for another image"
            )
        missing = [node for node in carrying if self._rule(node)[0] is None]
        if missing:
            raise TypeError(
                f"model: LRP has no adjoint for {_places(missing)}: register one with segattr.lrp.adjoint for the "
                "operation, or for a module of yours around it, as in the example there"
            )
        mixing = [n for n in carrying if any(self.graph.axes[r] is None for r in n.results() if self._carries(r))]
        if mixing:
            raise TypeError(f"model: LRP cannot do {_places(mixing)}: expected images to stay apart")
        gating = [node for node in nodes if self._gates(node, node in carrying)] if self.gates == "refuse" else []
        if gating:
            raise TypeError(f"model: expected no gates, as gates='refuse' says, got {_places(gating)}")

    def _depends(self, node: Node) -> bool:
        return any(self.roles[r] != "free" for r in results_in((node.args, node.kwargs)))

    def _carries(self, result: Result) -> bool:
        return self.roles[result] == "signal"

    def _gates(self, node: Node, carries: bool) -> bool:
        """Whether it makes a gate of signals, or has one."""
        if node.kind in GATES:
            return any(self._carries(r) for r in results_in((node.args, node.kwargs)))
        given = self.arguments[node.name]
        return carries and (self._rule(node)[0] in GATED or "gate" in flat(given.roles))

    # --- operations

    def _operation(self, node: Node, carries: bool) -> Operation:
        given = self.arguments[node.name]
        rule, path = self._rule(node)
        if not carries and path is None:
            rule = None
        args, kwargs = given.args, given.kwargs
        if path is not None and node.how != "module":  # the function of a batch normalisation
            args, kwargs = args[:1], {}
        return Operation(node.name, node, args, kwargs, rule, path, given.roles, given.inputs if carries else ())

    def _rule(self, node: Node) -> tuple[Rule | None, str | None]:
        """With the path of the module, if it is that of one."""
        if node.how == "module":
            return module_rule(self.model.get_submodule(node.target), self.rules), node.target
        if node.kind == "batch_norm" and node.within:
            path, mean = node.within[-1], node.args[1:2] or (node.kwargs.get("running_mean"),)
            module = self.model.get_submodule(path)
            own = mean == (Attribute(f"{path}.running_mean"),)
            if own and isinstance(module, nn.modules.batchnorm._BatchNorm) and not computed(module):
                return self.rules[nn.BatchNorm2d], path
        return self.rules.get(node.kind), None


def _places(nodes: list[Node]) -> str:
    """Each once: where operations of one kind are in many modules, the first of them."""
    places: dict[str, list[str]] = {}
    for node in nodes:
        places.setdefault(node.kind, []).append(node.place)
    return ", ".join(p[0] if len(p) == 1 else f"{p[0]} and {len(p) - 1} more of its kind" for p in places.values())


def _text(output: Any) -> str:
    if isinstance(output, Result):
        return output.name
    return f"({', '.join(map(_text, output))})" if isinstance(output, (tuple, list)) else type(output).__name__


def _fold(operations: list[Operation], output: Result) -> list[Operation]:
    """Makes a batch normalisation part of the convolution before it, where nothing else uses that."""
    users = collections.Counter([output])
    for operation in operations:
        users.update(results_in((operation.args, operation.kwargs)))
    kept: dict[str, Operation] = {}
    for operation in operations:
        source = next(iter(results_in(operation.args)), IMAGES)
        previous = kept.get(source.name)
        if (
            operation.rule in (batch_norm, batch_statistics)
            and previous is not None
            and previous.rule in (convolution, convolution_module)
            and users[source] == 1
        ):
            del kept[previous.name]
            previous.norm, previous.name = operation, operation.name
            kept[operation.name] = previous
        else:
            kept[operation.name] = operation
    return list(kept.values())
