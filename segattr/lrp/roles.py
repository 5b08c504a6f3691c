"""Where relevance goes in an operation: which of its arguments carry it, and which are gates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from segattr.networks.reader.graph import results_in
from segattr.networks.reader.record import Node, Result, mapped

# Results that only choose, scale or normalise something: they depend on the image, but carry no relevance.
GATES = frozenset(
    (
        *("sigmoid", "hardsigmoid", "special_expit", "softmax", "softmin", "log_softmax", "logsumexp"),
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "rpow", "rdiv"),
        *("norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "matrix_norm", "var", "std", "var_mean"),
        *("std_mean", "sign", "sgn", "heaviside", "gt", "lt", "ge", "le", "eq", "ne", "isnan", "isinf", "isfinite"),
        *("argmax", "argmin", "argsort", "floor", "ceil", "round", "trunc", "erf", "sin", "cos", "cosine_similarity"),
        *("cdist", "detach", "data", "long", "int", "bool", "byte", "any", "all", "prod", "cov", "corrcoef"),
    )
)
# Results that have only their shape from an image.
BLANK = frozenset(
    (
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones"),
        *("new_empty", "new_full", "new_tensor"),
    )
)
# Among the arguments at these places the first that can carries; the other ones are its gates.
_FACTORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mul", "multiply", "matmul", "bmm", "mm", "mv", "inner", "outer", "tensordot", "kron"), (0, 1)),
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv", "addr", "addcmul"), (1, 2)),
    **dict.fromkeys(("einsum",), tuple(range(1, 9))),
}
# Arguments that can carry, where not all can.
_CARRIERS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("div", "divide", "truediv", "true_divide", "pow", "float_power", "linear", "batch_norm"), (0,)),
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), (0,)),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), (0,)),
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu", "clamp", "masked_fill"), (0,)),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as", "type_as", "grid_sample", "gather", "getitem"), (0,)),
    **dict.fromkeys(("index_select", "take_along_dim", "masked_select", "clamp_min", "clamp_max", "clip", "to"), (0,)),
    **dict.fromkeys((f"max_unpool{n}d" for n in (1, 2, 3)), (0,)),
    "bilinear": (0,),
    "scaled_dot_product_attention": (2,),
    "addcdiv": (0, 1),
    "where": (1, 2),
    "lerp": (0, 1),
    "setitem": (0, 2),
    "index_put": (0, 2),
    "index_add": (0, 3),
    "index_copy": (0, 3),
    "index_fill": (0,),
    "scatter": (0, 3),
    "scatter_add": (0, 3),
    "masked_scatter": (0, 2),
}
# Names of arguments that functions and methods of torch may be called by.
_NAMES = ({"input", "query", "tensors", "self"}, {"other", "key", "mat2", "exponent"})
_THIRD = {"scaled_dot_product_attention": {"value"}}
# Operations that also give indices.
CHOOSING = frozenset(
    (
        *("max", "min", "median", "nanmedian", "mode", "sort", "topk", "kthvalue", "cummax", "cummin"),
        *(f"{kind}max_pool{d}d_with_indices" for kind in ("", "adaptive_") for d in (1, 2, 3)),
        *(f"{kind}MaxPool{d}d" for kind in ("", "Adaptive") for d in (1, 2, 3)),
    )
)


class Arguments(NamedTuple):
    """Of an operation, with the role of each positional one, and those that relevance could go to."""

    args: Any
    kwargs: Any
    roles: Any
    inputs: tuple[Result, ...]


def arguments(node: Node, roles: Mapping[Result, str]) -> Arguments:
    """What an operation gets, by name only where that says nothing about relevance.

    Args:
        node: the operation.
        roles: of the results before it.
    """

    def role(value: Any) -> Any:
        if isinstance(value, Result):
            return roles[value]
        return mapped(role, value) if isinstance(value, (tuple, list)) else "free"

    if node.how == "module":
        inputs = [r for r in results_in((node.args, node.kwargs)) if roles[r] == "signal"]
        return Arguments(node.args, node.kwargs, mapped(role, node.args), tuple(inputs))
    args, kwargs = _by_place(node)
    found = list(mapped(role, args))
    able = () if node.kind in GATES or node.kind in BLANK else _CARRIERS.get(node.kind, range(len(found)))
    found = [own if i in able else _without_signals(own) for i, own in enumerate(found)]
    factors = [i for i in _FACTORS.get(node.kind, ()) if i < len(found) and found[i] == "signal"]
    for i in factors[1:]:
        found[i] = "gate"
    return Arguments(args, kwargs, tuple(found), tuple(_inputs(args, tuple(found))))


def _by_place(node: Node) -> tuple[Any, Any]:
    """Its arguments, the first of them by their places, also where they are given by name."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for names in (*_NAMES, _THIRD.get(node.kind, set()))[len(args) :]:
        args += [kwargs.pop(name) for name in names & kwargs.keys()]
    return tuple(args), kwargs


def _without_signals(roles: Any) -> Any:
    return mapped(_without_signals, roles) if isinstance(roles, (tuple, list)) else roles.replace("signal", "gate")


def _inputs(args: Any, roles: Any) -> list[Result]:
    if isinstance(roles, (tuple, list)):
        return [found for arg, role in zip(args, roles, strict=True) for found in _inputs(arg, role)]
    return [args] if roles == "signal" else []


def flat(roles: Any) -> list[str]:
    return [leaf for role in roles for leaf in flat(role)] if isinstance(roles, (tuple, list)) else [roles]
