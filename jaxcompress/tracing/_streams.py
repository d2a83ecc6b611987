"""Streams: axes of values that can be rotated, with all parameters that touch them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jec

from jaxcompress._types import PyTree
from jaxcompress.tracing._jaxprs import Body, Location, bodies, constant, scope_of, trace
from jaxcompress.tracing._sites import param_paths, require_function
from jaxcompress.tracing._stream_graph import NOTHING, Axis, Graph, Node, State, parameter
from jaxcompress.tracing._stream_rules import apply_rule
from jaxcompress.tracing._walk import join

_CALLS = frozenset("jit pjit remat2 remat checkpoint custom_jvp_call custom_vjp_call".split())


class Member(NamedTuple):
    """An axis of a parameter that touches a stream.

    Attributes:
        path: of the leaf.
        axis: of the leaf.
        role: `weight` turns with the stream; `gain` multiplies it, as that of a norm; `offset`
            is added after a gain.
        reads: whether a product sums over the axis, with the stream.
        gains: paths of the gains that are applied before.
        shift: of a gain, what the function adds to it (1 for `x * (1 + scale)`).
        stacked: how many leading axes of the leaf are layers of a scan.
    """

    path: str
    axis: int
    role: str
    reads: bool
    gains: tuple[str, ...]
    shift: float
    stacked: int


class Stream(NamedTuple):
    """An axis that runs through a function and may be rotated.

    Attributes:
        size: its features.
        members: what has to change with it.
        refused: why it can't be rotated; None where it can.
    """

    size: int
    members: tuple[Member, ...]
    refused: str | None


def streams(fn: Callable[..., PyTree], params: PyTree, *args: Any, **kwargs: Any) -> list[Stream]:
    """The axes of the values inside of `fn` that turn when parameters turn.

    A stream is written by weights and biases, read by weights, and goes only through what an
    orthogonal matrix that keeps the vector of ones commutes with: sums, numbers, masks, means,
    RMSNorm and LayerNorm, whose gains and offsets are folded into what reads them. The
    residual stream of a transformer whose norms stand before its layers is one, and so are
    the values of its attention heads. Anything else along the axis (an activation, a reshape
    that merges it, a gain between two sums as in a transformer whose norms come after)
    refuses it.

    Args:
        fn: any function `fn(params, *args, **kwargs)`. It is traced, not run.
        params: any pytree of arrays, or of `jax.ShapeDtypeStruct`s.
        *args: further arguments, as `fn` takes them.
        **kwargs: the same.

    Returns:
        The `Stream`s that some weight writes and another one reads, the widest first; and what
        weights write that can't be rotated, with the reason.

    Raises:
        TypeError: `fn` can't be called.

    Examples:
        >>> fn = lambda p, x: 2 * (x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((8, 4)), "b": jnp.ones((4, 2))}
        >>> for stream in jc.tracing.streams(fn, params, jnp.ones((1, 8))):
        ...     print(stream.size, [(m.path, m.axis) for m in stream.members], stream.refused)
        4 [('a', 1), ('b', 0)] None
        2 [('b', 1)] it is a result of the function

    Source: the invariance is that of Ashkboos et al. 2024, arXiv:2401.15024, section 3.
    """
    require_function("streams", fn)
    traced = trace(fn, (params, *args), kwargs, parts=True)
    graph, shapes, given = Graph(), {}, []
    for path, v in zip(param_paths(traced), traced.jaxpr.invars, strict=True):
        given.append(NOTHING if path is None else parameter(path, v.aval.shape))
        if path is not None:
            shapes[path] = v.aval.shape
    for state in _read(traced.jaxpr, given, graph, (), ""):
        for axis in state.axes.values():
            graph.refuse(axis, "it is a result of the function")
    graph.check()
    found = []
    for root, nodes in graph.sets().items():
        members = tuple(_member(node, graph) for node in sorted(nodes))
        refused = graph.reasons.get(root)
        written = any(node in graph.writers for node in nodes)
        if written and (refused is not None or any(m.reads for m in members)):
            found.append(Stream(shapes[root[0]][root[1]], members, refused))
    return sorted(found, key=lambda stream: -stream.size)


def _member(node: Node, graph: Graph) -> Member:
    path, axis = node
    role, what = next(iter(graph.roles[node]))
    gains = () if role == "gain" else tuple(path for path, _ in what)
    shift = what if role == "gain" else 0.0
    return Member(path, axis, role, node in graph.readers, gains, shift, len(graph.stacks[node]))


def _read(
    jaxpr: Any, given: Sequence[State], graph: Graph, here: Location, scope: str
) -> list[State]:
    known = dict(zip(jaxpr.invars, given, strict=True))

    def state(v):
        return NOTHING if isinstance(v, jec.Literal) else known.get(v, NOTHING)

    for i, eqn in enumerate(jaxpr.eqns):
        states = [state(v) for v in eqn.invars]
        at = join(scope, scope_of(eqn))
        why = f"{eqn.primitive.name} at {at}" if at else eqn.primitive.name
        results = _enter(eqn, states, graph, (*here, i), at, why)
        if results is None:
            results = apply_rule(eqn, states, graph, why)
        known.update(zip(eqn.outvars, results, strict=True))
    return [state(v) for v in jaxpr.outvars]


def _enter(eqn, states, graph: Graph, here: Location, scope, why) -> list[State] | None:
    """The results of an equation with jaxprs inside; None where they are not read."""
    inside, name = bodies(eqn), eqn.primitive.name
    if name == "scan":
        return _scanned(eqn, inside[0], states, graph, here, scope, why)
    if name not in _CALLS and name != "cond":
        return None
    if name == "cond":
        states = [_values(state, graph) for state in states]
    several = []
    for k, body in enumerate(inside):
        given = [states[j] for j in body.inputs]
        several.append(_read(body.jaxpr, given, graph, (*here, k), scope))
    shapes = [v.aval.shape for v in eqn.outvars]
    return [
        _agreed(list(each), shape, graph, why)
        for each, shape in zip(zip(*several, strict=True), shapes, strict=True)
    ]


def _scanned(eqn, body: Body, states, graph: Graph, here, scope, why) -> list[State]:
    given = []
    for j, v in enumerate(body.jaxpr.invars):
        state = states[body.inputs[j]]
        if j in body.sliced:
            state = _slice(state, v.aval.shape, graph, here, why)
        elif not constant(body, j):
            state = State(_values(state, graph).axes)
        given.append(state)
    results = _read(body.jaxpr, given, graph, (*here, 0), scope)
    out = []
    for k, (state, v) in enumerate(zip(results, eqn.outvars, strict=True)):
        before = [j for j, i in body.carried.items() if i == k]
        if before:
            out.append(_agreed([given[before[0]], state], v.aval.shape, graph, why))
        else:
            values = _values(state, graph)
            out.append(
                State(
                    {d + 1: axis for d, axis in values.axes.items()},
                    frozenset(d + 1 for d in values.flat),
                )
            )
    return out


def _slice(state: State, shape, graph: Graph, here: Location, why: str) -> State:
    """One trip's part of what a scan cuts along its first axis."""
    graph.refuse(state.axes.get(0), why)
    vector = sum(n != 1 for n in shape) == 1
    axes = {}
    for d, axis in state.axes.items():
        if d > 0:
            leaf = axis.leaf and axis.leaf._replace(stack=(*axis.leaf.stack, here), vector=vector)
            axes[d - 1] = axis._replace(leaf=leaf)
    return State(axes, frozenset(d - 1 for d in state.flat if d > 0))


def _values(state: State, graph: Graph) -> State:
    return State({d: graph.value(axis) for d, axis in state.axes.items()}, state.flat)


def _agreed(several: list[State], shape, graph: Graph, why: str) -> State:
    """What is known of a value that comes from one of several places."""
    if len(several) == 1:
        return several[0]
    several = [_values(state, graph) for state in several]
    axes: dict[int, Axis] = {}
    for d in range(len(shape)):
        found = [state.axes[d] for state in several if d in state.axes]
        calm = all(d in state.axes or d in state.flat or shape[d] == 1 for state in several)
        if not found:
            continue
        if not calm or len({(axis.gains, axis.square) for axis in found}) > 1:
            for axis in found:
                graph.refuse(axis, why)
            continue
        for axis in found[1:]:
            graph.unite(found[0].node, axis.node)
        axes[d] = found[0]
    return State(axes, frozenset.intersection(*(state.flat for state in several)))
