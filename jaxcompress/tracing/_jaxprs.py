"""Jaxprs of any function, and the jaxprs inside of their equations, by public API alone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core as jec

from jaxcompress import tree
from jaxcompress._types import PyTree

Location = tuple[int, ...]
"""Where an equation is: its index, the body it is entered by, the index in there, …"""


class Traced(NamedTuple):
    """A function as a jaxpr, with what went into it.

    Attributes:
        jaxpr: open; its `constvars` take `consts`.
        consts: arrays that the function closed over.
        leaves: the array leaves of the arguments, compressed arrays whole, one per invar.
        paths: of the leaves: those of the first argument as in `jaxcompress.tree`, the others
            after `[1]/`, `[2]/` or `[name]/`.
        results: from the values of the outvars to what the function returns.
    """

    jaxpr: Any
    consts: Sequence[Any]
    leaves: list[Any]
    paths: list[str]
    results: Callable[[Sequence[Any]], PyTree]


def trace(
    fn: Callable[..., PyTree], args: tuple[Any, ...], kwargs: dict[str, Any], *, parts: bool = False
) -> Traced:
    """Traces `fn` as `jax.jit` would: on the arrays inside of compressed arrays if `parts`.

    Else on dense stand-ins of these.

    Arrays (NumPy's too) are traced. Everything else (Python numbers, strings, functions,
    modules) keeps its value, as a static argument does.
    """
    named = [(f"[{i}]", arg) for i, arg in enumerate(args)]
    # In the order in which a pytree has them.
    named += [(f"[{name}]", arg) for name, arg in sorted(kwargs.items())]
    flat, paths = [], []
    for i, (name, arg) in enumerate(named):
        for path, leaf in _parts(arg) if parts else tree.leaves_with_paths(arg):
            flat.append(leaf)
            paths.append(path if i == 0 else f"{name}/{path}".removesuffix("/"))
    is_leaf = None if parts else tree.is_array_like
    treedef = jax.tree.structure((args, kwargs), is_leaf=is_leaf)
    dynamic = [i for i, leaf in enumerate(flat) if is_array(leaf)]
    returned = []

    def flat_fn(*arrays):
        filled = list(flat)
        for i, array in zip(dynamic, arrays, strict=True):
            filled[i] = array
        args, kwargs = jax.tree.unflatten(treedef, filled)
        leaves, out_treedef = jax.tree.flatten(fn(*args, **kwargs))
        returned[:] = [out_treedef, leaves]
        return [leaf for leaf in leaves if is_array(leaf)]

    closed = jax.make_jaxpr(flat_fn)(*(stand_in(flat[i]) for i in dynamic))
    out_treedef, leaves = returned
    static = [None if is_array(leaf) else leaf for leaf in leaves]
    computed = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    # The leaves were tracers of a finished trace: nothing may hold them on.
    returned.clear()

    def results(values):
        filled = list(static)
        for i, value in zip(computed, values, strict=True):
            filled[i] = value
        return jax.tree.unflatten(out_treedef, filled)

    return Traced(
        closed.jaxpr,
        closed.consts,
        [flat[i] for i in dynamic],
        [paths[i] for i in dynamic],
        results,
    )


def _parts(arg: PyTree) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(arg)
    return [(tree.path_string(path), leaf) for path, leaf in flat]


def is_array(x: Any) -> bool:
    """Whether `x` is traced by `trace`."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def stand_in(leaf: Any) -> Any:
    """What a leaf is traced as: itself, or the dense shape of a compressed array."""
    if tree.is_array_like(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


class Body(NamedTuple):
    """A jaxpr inside of an equation.

    Attributes:
        label: what it is to its equation, as `scan` or `branch`.
        jaxpr: open.
        consts: for its `constvars`.
        inputs: for each invar of the jaxpr, the index of the equation's operand.
        outputs: for each outvar of the jaxpr, the index of the equation's result, or None.
        sliced: which invars get one slice of their operand, along axis 0, in each trip.
        carried: from the index of an invar to that of the outvar which replaces it in the
            next trip.
        trips: how often it runs; None where that depends on values.
    """

    label: str
    jaxpr: Any
    consts: Sequence[Any]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    sliced: frozenset[int] = frozenset()
    carried: dict[int, int] = {}  # noqa: RUF012
    trips: int | None = 1


_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}


def bodies(eqn: Any) -> list[Body]:
    """The jaxprs that an equation runs, where it is known how; empty for all others."""
    name = eqn.primitive.name
    operands, results = range(len(eqn.invars)), range(len(eqn.outvars))
    if name in _CALLS:
        return [_body(name, eqn.params[_CALLS[name]], operands, results)]
    if name == "cond":
        return [_body("branch", b, operands[1:], results) for b in eqn.params["branches"]]
    if name == "while":
        test, step = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        first = test + step
        carried = {step + i: i for i in results}
        tested = [*range(test), *operands[first:]]
        return [
            _body("test", eqn.params["cond_jaxpr"], tested, [None], trips=None),
            _body(
                "while", eqn.params["body_jaxpr"], operands[test:], results, carried=carried
            )._replace(trips=None),
        ]
    if name == "scan":
        return [_scan(eqn)]
    return []


def _scan(eqn: Any) -> Body:
    body = _body("scan", eqn.params["jaxpr"], range(len(eqn.invars)), range(len(eqn.outvars)))
    # An operand that is sliced has one axis more than what the body gets of it.
    sliced = [
        i
        for i, v in enumerate(body.jaxpr.invars)
        if len(v.aval.shape) < len(eqn.invars[i].aval.shape)
    ]
    carries = sum(
        len(v.aval.shape) == len(out.aval.shape)
        for v, out in zip(body.jaxpr.outvars, eqn.outvars, strict=True)
    )
    first = len(eqn.invars) - len(sliced) - carries
    carried = {first + i: i for i in range(carries)}
    return body._replace(sliced=frozenset(sliced), carried=carried, trips=eqn.params["length"])


def _body(label, jaxpr, inputs, outputs, carried=None, trips: int | None = 1) -> Body:
    inner = getattr(jaxpr, "jaxpr", None) or jaxpr
    consts = getattr(jaxpr, "consts", None) or ()
    return Body(
        label, inner, consts, tuple(inputs), tuple(outputs), carried=carried or {}, trips=trips
    )


def constant(body: Body, i: int) -> bool:
    """Whether invar `i` of a loop's body has the same value in every trip."""
    if i in body.sliced:
        return False
    return i not in body.carried or body.jaxpr.outvars[body.carried[i]] is body.jaxpr.invars[i]


def scope_of(eqn: Any) -> str:
    """The name stack of an equation, relative to the jaxpr it stands in."""
    return str(eqn.source_info.name_stack)


def run_equations(jaxpr: Any, eqns: Sequence[Any], read: Callable[[Any], Any], write) -> None:
    """Runs equations as they are, under their own names and in their own context."""
    defined, needed = {}, {}
    for eqn in eqns:
        for v in eqn.invars:
            if not isinstance(v, jec.Literal) and v not in defined:
                needed[v] = None
        defined.update({v: None for v in eqn.outvars if not isinstance(v, jec.DropVar)})
    effects = set().union(*(eqn.effects for eqn in eqns))
    part = jaxpr.replace(
        constvars=[], invars=list(needed), outvars=list(defined), eqns=list(eqns), effects=effects
    )
    values = jax.core.eval_jaxpr(part, [], *(read(v) for v in needed))
    for v, value in zip(defined, values, strict=True):
        write(v, value)


def run_equation(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of one equation, run as it is on other values of its operands."""
    given = {
        v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, jec.Literal)
    }
    results = {}
    run_equations(jaxpr, [eqn], given.__getitem__, results.__setitem__)
    return [results.get(v) for v in eqn.outvars]
