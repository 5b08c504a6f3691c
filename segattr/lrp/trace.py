"""The operations of a classifier, in order, as data: traced by torch.fx, with in-place operations made explicit."""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from segattr.lrp.adjoints import VIEWS, Rule, batch_norm, batch_statistics, conv2d, conv2d_module
from segattr.networks.modes import evaluating


@dataclass(frozen=True)
class Result:
    """Stands for the result of an operation among the arguments of another."""

    name: str


@dataclass(frozen=True)
class Attribute:
    """Stands for a parameter or buffer of the classifier among the arguments of an operation."""

    path: str


@dataclass
class Operation:
    """One operation of a classifier.

    Args:
        name: of its result.
        path: of its module; None for a function or method.
        kind: what it is called, ``"Conv2d"`` or ``"flatten"`` say.
        rule: runs it and gives its adjoint; a plain function for one that only computes with sizes.
        args: positional arguments, with placeholders.
        kwargs: further arguments, with placeholders.
        inputs: names of the results that gradients go to; none if it only computes with sizes.
        norm: batch normalisation of its result that is made part of it.
    """

    name: str
    path: str | None
    kind: str
    rule: Callable[..., Any] | None
    args: Any
    kwargs: Any
    inputs: tuple[str, ...]
    norm: "Operation | None" = None

    def __post_init__(self) -> None:
        self.label = self.path or self.name  # the name changes when a normalisation becomes part of it

    @property
    def place(self) -> str:
        """Where it is in the classifier, for messages."""
        return f"{self.path} ({self.kind}, node {self.name})" if self.path else f"{self.kind} (node {self.name})"

    def run(self, model: nn.Module, results: Mapping[str, Any]) -> Any:
        """Runs the rule with the arguments filled in; its errors name the operation."""

        def fill(argument: Any) -> Any:
            if isinstance(argument, Result):
                return results[argument.name]
            if isinstance(argument, Attribute):
                return operator.attrgetter(argument.path)(model)
            return argument

        args, kwargs = fx.node.map_aggregate((self.args, self.kwargs), fill)
        if self.path is not None:
            args = (model.get_submodule(self.path), *args)
        if self.norm is not None:
            norm, module = self.norm.rule, model.get_submodule(self.norm.path or "")
            assert norm is not None
            kwargs = {**kwargs, "norm": lambda x: norm(module, x)}
        assert self.rule is not None
        try:
            return self.rule(*args, **kwargs)
        except (TypeError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"model: LRP cannot do {self.place}: {error}") from error


def trace(model: nn.Module, rules: Mapping[Any, Rule]) -> tuple[str, list[Operation]]:
    """The name of the input of a classifier, and the operations that its output depends on, in their order.

    Args:
        model: called with images; further arguments must have defaults.
        rules: of the operations, by type of module, function, or name of a method.

    Raises:
        TypeError: a model that cannot be traced, or whose output is not one tensor; an operation without a rule.
    """
    graph = _graph(model, rules)
    modules = dict(model.named_modules())
    renamed: dict[fx.Node, fx.Node] = {}  # what in-place operations overwrote
    sizes: set[str] = set()  # results that are not tensors
    operations: dict[str, Operation] = {}
    image, *_ = (node.name for node in graph.nodes if node.op == "placeholder")

    def stand_in(node: fx.Node) -> Any:
        node = renamed.get(node, node)
        return Attribute(str(node.target)) if node.op == "get_attr" else Result(node.name)

    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), stand_in)
        names = tuple(_results((args, kwargs)))
        module = modules[str(node.target)] if node.op == "call_module" else None
        path = str(node.target) if module is not None else None
        rule: Callable[..., Any] | None  # none is an error only if the output depends on the operation
        if _computes_sizes(node, names, sizes):
            sizes.add(node.name)
            rule = _method(node.target) if node.op == "call_method" else node.target
        else:
            rule = rules.get(node.target) if module is None else module_rule(module, rules)
        kind = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
        inputs = () if node.name in sizes else tuple(name for name in names if name not in sizes)
        if _in_place(node, module) and (name := _overwritten_view(node, operations)):
            raise TypeError(
                f"model: expected {kind} (node {node.name}) not to overwrite a view of {name}: not in place"
            )
        operations[node.name] = Operation(node.name, path, kind, rule, args, kwargs, inputs)
        if _in_place(node, module):
            overwritten = renamed.get(node.args[0], node.args[0])
            renamed |= {old: node for old, new in renamed.items() if new is overwritten} | {overwritten: node}

    (output,) = (node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise TypeError(f"model: expected one tensor of class scores as its output, got {output.args[0]}")
    needed = _needed(operations, stand_in(output.args[0]).name)
    for operation in needed:
        if operation.rule is None:
            raise TypeError(refusal(operation))
    return image, _fold(needed)


def refusal(operation: Operation) -> str:
    return (
        f"model: LRP has no adjoint for {operation.place}: register one with segattr.lrp.adjoint if the operation is "
        "linear around its input, or use a classifier of convolutions, linear layers, batch normalisation, ReLU and "
        "pooling"
    )


def module_rule(module: nn.Module, rules: Mapping[Any, Rule]) -> Rule | None:
    """The rule of the type of a module, or of the one that it has its forward method from."""
    for kind in type(module).__mro__:
        if kind in rules and getattr(kind, "forward", None) is type(module).forward:
            return rules[kind]
    return None


def _graph(model: nn.Module, rules: Mapping[Any, Rule]) -> fx.Graph:
    """Traced in evaluation mode, as branches that depend on the mode are followed once and for all."""

    class Proxy(fx.Proxy):
        """Keeps ``+=`` apart from ``+``, which overwrites nothing."""

        def __iadd__(self, other: Any) -> fx.Proxy:
            return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    class Tracer(fx.Tracer):
        def proxy(self, node: fx.Node) -> fx.Proxy:
            return Proxy(node, self)

        def is_leaf_module(self, module: nn.Module, path: str) -> bool:
            return module_rule(module, rules) is not None or super().is_leaf_module(module, path)

    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    with evaluating(model):
        try:
            return Tracer().trace(model, concrete_args=defaults or None)
        except Exception as error:  # whatever the code of the model does with a stand-in for an image
            raise TypeError(f"model: torch.fx cannot trace it: {error}") from error


def _results(arguments: Any) -> Iterator[str]:
    """Names of the results among arguments, in order."""
    found: list[str] = []
    fx.node.map_aggregate(arguments, lambda a: found.append(a.name) if isinstance(a, Result) else None)
    return iter(found)


def _computes_sizes(node: fx.Node, names: tuple[str, ...], sizes: set[str]) -> bool:
    """Whether the result is made of sizes of tensors, not of their values."""
    of_tensor = (node.op == "call_method" and node.target in ("size", "dim")) or (
        node.target is getattr and node.args[1] in ("shape", "ndim")
    )
    return of_tensor or (node.op == "call_function" and bool(names) and sizes.issuperset(names))


def _method(name: Any) -> Callable[..., Any]:
    return getattr(Tensor, str(name))


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation overwrites its first argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    named = str(getattr(node.target, "__name__", node.target))
    return named.endswith("_") or node.target is operator.iadd or bool(node.kwargs.get("inplace"))


def _overwritten_view(node: fx.Node, operations: Mapping[str, Operation]) -> str | None:
    """The name of what an in-place operation overwrites besides its argument, if that is used later."""
    argument = node.args[0]
    while isinstance(argument, fx.Node) and argument.name in operations and operations[argument.name].rule in VIEWS:
        argument = argument.args[0]
        if isinstance(argument, fx.Node) and any(node < user for user in argument.users):
            return argument.name
    return None


def _needed(operations: dict[str, Operation], output: str) -> list[Operation]:
    """The operations that the output depends on, in order."""
    wanted = {output}
    needed = []
    for operation in reversed(operations.values()):
        if operation.name in wanted:
            wanted.update(_results((operation.args, operation.kwargs)))
            needed.append(operation)
    return needed[::-1]


def _fold(operations: list[Operation]) -> list[Operation]:
    """Makes a batch normalisation part of the convolution before it, where nothing else uses that."""
    users: dict[str, int] = {}
    for operation in operations:
        for name in _results((operation.args, operation.kwargs)):
            users[name] = users.get(name, 0) + 1
    kept: dict[str, Operation] = {}
    for operation in operations:
        previous = kept.get(operation.inputs[0]) if operation.inputs else None
        if (
            operation.rule in (batch_norm, batch_statistics)
            and previous is not None
            and previous.rule in (conv2d, conv2d_module)
            and users[previous.name] == 1
        ):
            del kept[previous.name]
            previous.norm, previous.name = operation, operation.name
            kept[operation.name] = previous
        else:
            kept[operation.name] = operation
    return list(kept.values())
