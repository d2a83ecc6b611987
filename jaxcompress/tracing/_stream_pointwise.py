"""What acts on each entry does to an axis that turns."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jec
import numpy as np

from jaxcompress.tracing._stream_graph import Axis, Graph, State

# Where nothing varies along an axis, neither does what these make of it.
_ELEMENTWISE = frozenset(
    "abs and cbrt ceil clamp cos eq erf exp exp2 expm1 floor ge gt integer_pow is_finite le log"
    " log1p logistic lt max min ne not or pow rem round rsqrt sign sin sqrt tanh".split()
)


def _ndim(eqn: Any) -> int:
    return len(eqn.outvars[0].aval.shape)


def _is_flat(v: Any, state: State, d: int) -> bool:
    shape = v.aval.shape
    return not shape or shape[d] == 1 or d in state.flat


def _along(eqn, states, d: int) -> tuple[list[Axis | None], bool]:
    """The entries of an axis of all operands, and whether the others do not vary along it."""
    found = [
        state.axes.get(d) if v.aval.shape else None
        for v, state in zip(eqn.invars, states, strict=True)
    ]
    calm = all(
        axis is not None or _is_flat(v, state, d)
        for axis, v, state in zip(found, eqn.invars, states, strict=True)
    )
    return found, calm


def _flat(eqn, states) -> frozenset[int]:
    return frozenset(
        d
        for d in range(_ndim(eqn))
        if all(_is_flat(v, state, d) for v, state in zip(eqn.invars, states, strict=True))
    )


def forbid(axes: Sequence[Axis | None], graph: Graph, why: str) -> None:
    for axis in axes:
        graph.refuse(axis, why)


def other(eqn, states, graph, why) -> State:
    for state in states:
        forbid(list(state.axes.values()), graph, why)
    return State({}, _flat(eqn, states) if eqn.primitive.name in _ELEMENTWISE else frozenset())


def each(eqn, states, graph, why, one) -> State:
    """`one(axes, d)` gives the entry of an axis of the result; None where it is forbidden."""
    axes = {}
    for d in range(_ndim(eqn)):
        found, calm = _along(eqn, states, d)
        if not any(found):
            continue
        new = one(found, d) if calm else None
        if new is None:
            forbid(found, graph, why)
        else:
            axes[d] = new
    return State(axes, _flat(eqn, states))


def added(eqn, states, graph, why) -> State:
    def one(found, d):
        axes = [axis for axis in found if axis is not None]
        if len(axes) == 1:
            return _shifted(eqn, axes[0], found.index(axes[0]), graph)
        for stream, other in (axes, axes[::-1]):
            vector = other.leaf is not None and other.leaf.vector and not other.leaf.shift
            if stream.gains and vector and other.plain:
                graph.used(other, ("offset", stream.gains), stream.node)
                return stream
        return united(axes, graph)

    return each(eqn, states, graph, why, one)


def _shifted(eqn, axis: Axis, place: int, graph: Graph) -> Axis | None:
    """A stream, and something that does not vary along it: the rotation keeps the constant."""
    if not axis.plain:
        return None
    other = eqn.invars[1 - place]
    fixed = isinstance(other, jec.Literal) and np.ndim(other.val) == 0
    if axis.leaf is None or axis.leaf.scaled or not fixed:
        return graph.value(axis)
    if eqn.primitive.name == "sub" and place == 1:
        return graph.value(axis)
    by = -float(other.val) if eqn.primitive.name == "sub" else float(other.val)
    return axis._replace(leaf=axis.leaf._replace(shift=axis.leaf.shift + by))


def united(axes: Sequence[Axis], graph: Graph) -> Axis | None:
    if not all(axis.plain for axis in axes):
        return None
    first, *rest = (graph.value(axis) for axis in axes)
    for axis in rest:
        graph.unite(first.node, axis.node)
    return first


def _scaled(axis: Axis) -> Axis:
    return axis if axis.leaf is None else axis._replace(leaf=axis.leaf._replace(scaled=True))


def multiplied(eqn, states, graph, why) -> State:
    def one(found, d):
        axes = [axis for axis in found if axis is not None]
        if len(axes) == 1:
            return _scaled(axes[0])
        for stream, gain in (axes, axes[::-1]):
            vector = gain.leaf is not None and gain.leaf.vector and gain.plain
            if vector and stream.leaf is None and not stream.square:
                assert gain.leaf is not None
                graph.used(gain, ("gain", gain.leaf.shift), stream.node)
                return stream._replace(gains=(*stream.gains, gain.node))
        if any(axis.leaf for axis in axes):
            return None
        both = united(axes, graph)
        return None if both is None else both._replace(square=True)

    return each(eqn, states, graph, why, one)


def divided(eqn, states, graph, why) -> State:
    return each(
        eqn, states, graph, why, lambda found, d: _scaled(found[0]) if not found[1] else None
    )


def squared(eqn, states, graph, why) -> State:
    def one(found, d):
        axis = found[0]
        return axis._replace(square=True) if axis.plain and axis.leaf is None else None

    return each(eqn, states, graph, why, one)


def negated(eqn, states, graph, why) -> State:
    return each(eqn, states, graph, why, lambda found, d: _scaled(found[0]))


def selected(eqn, states, graph, why) -> State:
    def one(found, d):
        axes = [axis for axis in found if axis is not None]
        if len({axis.gains for axis in axes}) == 1 and len(axes) == len(found) - 1:
            both = united([axis._replace(gains=()) for axis in axes], graph)
            return None if both is None else both._replace(gains=axes[0].gains)
        return united(axes, graph)

    return each(eqn, states, graph, why, one)
