"""All values of a jaxpr as one graph, across the jaxprs inside of its equations."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jec

from jaxcompress.tracing._jaxprs import Body, Location, bodies, constant

Value = int
"""A value of the graph: operands are numbered before results, but for what a loop carries."""


class Op(NamedTuple):
    """An equation without a jaxpr inside of it.

    Attributes:
        location: where it is.
        eqn: the equation.
        ins: its operands; None for literals.
        outs: its results.
    """

    location: Location
    eqn: Any
    ins: tuple[Value | None, ...]
    outs: tuple[Value, ...]


class Loop(NamedTuple):
    """A scan or a while.

    Attributes:
        location: where it is.
        body: what it repeats.
        operands: its operands; None for literals.
        entries: for each invar of the body the value inside.
        ends: for each outvar of the body the value inside.
        results: for each result of the equation the value outside.
        frame: the loop around it.
        sharded: whether it is in a sharded map.
    """

    location: Location
    body: Body
    operands: tuple[Value | None, ...]
    entries: tuple[Value, ...]
    ends: tuple[Value | None, ...]
    results: tuple[Value, ...]
    frame: Location
    sharded: bool


@dataclasses.dataclass
class Graph:
    """Values and what they are computed from.

    A value keeps its number where it goes into a `jit`, a `checkpoint`, a custom derivative, a
    branch or a sharded map, and where it comes out. In a loop everything is numbered anew.

    Attributes:
        parents: for each value those that it is computed from.
        avals: for each value its shape and dtype, where it was first seen.
        frames: for each value the body of the loop that it is in, `()` outside of loops.
        weights: for each value whether it depends on a parameter.
        inputs: for each value whether it depends on anything else that is passed in.
        producers: for each value its `Op`, or None.
        ops: in the order of the program.
        loops: the same.
        results: for the location of each equation its results.
        scopes: for the location of each jaxpr its variables; `()` is the outermost.
        leaves: for each invar of the outermost jaxpr its value.
        outs: what the function returns; None for literals.
        effects: equations with side effects, with all their operands.
        closed: arrays that the outermost jaxpr closes over and that count as passed in.
    """

    parents: list[list[Value]] = dataclasses.field(default_factory=list)
    avals: list[Any] = dataclasses.field(default_factory=list)
    frames: list[Location] = dataclasses.field(default_factory=list)
    weights: list[bool] = dataclasses.field(default_factory=list)
    inputs: list[bool] = dataclasses.field(default_factory=list)
    producers: list[Op | None] = dataclasses.field(default_factory=list)
    ops: list[Op] = dataclasses.field(default_factory=list)
    loops: list[Loop] = dataclasses.field(default_factory=list)
    results: dict[Location, tuple[Value, ...]] = dataclasses.field(default_factory=dict)
    scopes: dict[Location, dict[Any, Value]] = dataclasses.field(default_factory=dict)
    leaves: list[Value] = dataclasses.field(default_factory=list)
    outs: list[Value | None] = dataclasses.field(default_factory=list)
    effects: dict[Location, tuple[Value, ...]] = dataclasses.field(default_factory=dict)
    closed: dict[Any, Value] = dataclasses.field(default_factory=dict)

    def add(self, aval: Any, frame: Location, parents: Iterable[Value | None] = ()) -> Value:
        """A new value."""
        known = [p for p in parents if p is not None]
        self.parents.append(known)
        self.avals.append(aval)
        self.frames.append(frame)
        self.weights.append(any(self.weights[p] for p in known))
        self.inputs.append(any(self.inputs[p] for p in known))
        self.producers.append(None)
        return len(self.parents) - 1

    def is_weight(self, value: Value) -> bool:
        """Whether it is a parameter or computed from parameters alone."""
        return self.weights[value] and not self.inputs[value]

    def before(self, ends: Iterable[Value], stop: Value = -1) -> set[Value]:
        """The values and all that they are computed from; those up to `stop` not followed."""
        found, todo = set(), list(ends)
        while todo:
            value = todo.pop()
            if value not in found:
                found.add(value)
                if value > stop:
                    todo += self.parents[value]
        return found


def graph_of(jaxpr: Any, paths: Sequence[str | None]) -> Graph:
    """The graph of an open jaxpr.

    Args:
        jaxpr: open.
        paths: for each invar the path of the parameter leaf that it is, or None.
    """
    graph = Graph()
    for v, path in zip(jaxpr.invars, paths, strict=True):
        value = graph.add(v.aval, ())
        graph.weights[value], graph.inputs[value] = path is not None, path is None
        graph.leaves.append(value)
    # A function of params alone has its inputs closed over.
    for v in jaxpr.constvars if None not in paths else ():
        graph.closed[v] = graph.add(v.aval, ())
        graph.inputs[graph.closed[v]] = True
    graph.outs = _read(graph, jaxpr, graph.leaves, (), (), False)
    return graph


def _read(
    graph: Graph,
    jaxpr: Any,
    ins: Sequence[Value | None],
    here: Location,
    frame: Location,
    sharded: bool,
) -> list[Value | None]:
    known: dict[Any, Value] = {
        v: graph.closed[v] if v in graph.closed else graph.add(v.aval, frame)
        for v in jaxpr.constvars
    }
    for v, value in zip(jaxpr.invars, ins, strict=True):
        known[v] = graph.add(v.aval, frame) if value is None else value
    graph.scopes[here] = known

    def value_of(v: Any) -> Value | None:
        return None if isinstance(v, jec.Literal) else known[v]

    for i, eqn in enumerate(jaxpr.eqns):
        location = (*here, i)
        operands = tuple(value_of(v) for v in eqn.invars)
        inside = bodies(eqn)
        if not inside:
            outs = tuple(graph.add(v.aval, frame, operands) for v in eqn.outvars)
            op = Op(location, eqn, operands, outs)
            graph.ops.append(op)
            for value in outs:
                graph.producers[value] = op
        elif inside[-1].label in ("scan", "while"):
            outs = _loop(graph, eqn, inside, operands, location, frame, sharded)
        elif inside[0].label == "branch":
            outs = _branches(graph, eqn, inside, operands, location, frame, sharded)
        else:
            outs = _call(graph, inside[0], operands, location, frame, sharded)
        if not inside and _acts(eqn):
            graph.effects[location] = tuple(v for v in operands if v is not None)
        graph.results[location] = outs
        known.update(zip(eqn.outvars, outs, strict=True))
    return [value_of(v) for v in jaxpr.outvars]


def _acts(eqn: Any) -> bool:
    """Whether an equation does something that can be seen, as to print."""
    # A sum over the axis of a mesh is marked, too; it has no public type.
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def _inside(graph, body: Body, entries, here, frame, sharded) -> list[Value | None]:
    return _read(graph, body.jaxpr, entries, here, frame, sharded)


def _call(graph, body: Body, operands, location, frame, sharded) -> tuple[Value, ...]:
    sharded = sharded or body.label == "shard_map"
    entries = [operands[j] for j in body.inputs]
    ends = _inside(graph, body, entries, (*location, 0), frame, sharded)
    # A call may return a literal.
    avals = [v.aval for v in body.jaxpr.outvars]
    return tuple(
        graph.add(aval, frame) if end is None else end
        for end, aval in zip(ends, avals, strict=True)
    )


def _branches(graph, eqn, inside, operands, location, frame, sharded) -> tuple[Value, ...]:
    ends = [
        _inside(graph, body, [operands[j] for j in body.inputs], (*location, k), frame, sharded)
        for k, body in enumerate(inside)
    ]
    return tuple(
        graph.add(v.aval, frame, (operands[0], *(branch[k] for branch in ends)))
        for k, v in enumerate(eqn.outvars)
    )


def _loop(graph: Graph, eqn, inside, operands, location, frame, sharded) -> tuple[Value, ...]:
    body, at = inside[-1], (*location, len(inside) - 1)
    entries = []
    for j, v in enumerate(body.jaxpr.invars):
        value = graph.add(v.aval, at, (operands[body.inputs[j]],))
        # What a trip leaves to the next is no parameter, whatever it starts with.
        graph.inputs[value] |= not constant(body, j) and j not in body.sliced
        entries.append(value)
    tested: list[Value | None] = []
    if body.label == "while":
        test = inside[0]
        count = len(test.inputs) - len(body.carried)
        fixed = [
            graph.add(v.aval, (*location, 0), (operands[test.inputs[j]],))
            for j, v in enumerate(test.jaxpr.invars[:count])
        ]
        carried = [entries[j] for j in body.carried]
        tested = _inside(graph, test, [*fixed, *carried], (*location, 0), (*location, 0), sharded)
    ends = _inside(graph, body, entries, at, at, sharded)
    inner = {k: j for j, k in body.carried.items()}
    for j, k in body.carried.items():
        end = ends[k]
        graph.parents[entries[j]] += [] if end is None else [end]
    results = tuple(
        # What is carried needs its beginning, even where no trip reads it.
        graph.add(v.aval, frame, (ends[k], *([entries[inner[k]]] if k in inner else []), *tested))
        for k, v in enumerate(eqn.outvars)
    )
    graph.loops.append(
        Loop(location, body, operands, tuple(entries), tuple(ends), results, frame, sharded)
    )
    return results
