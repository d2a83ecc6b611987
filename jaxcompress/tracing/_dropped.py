"""Running a function without some of its residual blocks, with gates on them, or measured."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np

from jaxcompress import _sharding
from jaxcompress.tracing._control_flow import Entry, enter
from jaxcompress.tracing._interpret import Hooks, Records
from jaxcompress.tracing._jaxprs import Location, bodies, run_equation, run_equations, scope_of
from jaxcompress.tracing._residual_blocks import Blocks
from jaxcompress.tracing._residuals import alive, closed, sum_of
from jaxcompress.tracing._values import Loop, Value

Rows = Mapping[str, np.ndarray]
"""From the names of scans over layers to the indices of the layers that run."""

_CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call"))


class Probe(NamedTuple):
    """Two values of one jaxpr to compare.

    Attributes:
        name: of the block.
        x: variable of what goes in, or of `f` where `minus`.
        y: variable of the sum.
        minus: whether what goes in is the sum without `f`.
    """

    name: str
    x: Any
    y: Any
    minus: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do otherwise than the jaxpr says.

    Attributes:
        blocks: of the function.
        live: the values to compute.
        kept: from the location of an addition to the operand that is left of it.
        rows: from the location of a scan to the indices of the trips to run.
        gates: from the location of an addition to its operands that have gates, each with the
            names of blocks one of which has to run.
        trips: from the location of a scan to its name: it has a gate for each trip.
        probes: from the location of an equation to what to compare after it.
        compare: `(x, y) -> record`, numbers that add up.
        inner: locations of equations inside of which something is done otherwise.
        less: those inside of which something is no longer needed.
    """

    blocks: Blocks
    live: set[Value]
    kept: Mapping[Location, int]
    rows: Mapping[Location, np.ndarray]
    gates: Mapping[Location, Mapping[int, frozenset[str]]]
    trips: Mapping[Location, str]
    probes: Mapping[Location, tuple[Probe, ...]]
    compare: Callable[[Any, Any], Any] | None
    inner: frozenset[Location]
    less: frozenset[Location]

    def runs(self, location: Location) -> bool:
        """Whether an equation is needed, or has effects of what is there."""
        graph = self.blocks.state.graph
        if any(v in self.live for v in graph.results[location]):
            return True
        return any(
            at[: len(location)] == location and all(v in self.live for v in operands)
            for at, operands in graph.effects.items()
        )


def plan(
    blocks: Blocks,
    *,
    dropped: Iterable[str] = (),
    rows: Rows | None = None,
    gates: Iterable[str] = (),
    probes: Mapping[str, Sequence[str]] | None = None,
    compare: Callable[[Any, Any], Any] | None = None,
) -> Plan:
    """Prepares a run.

    Args:
        blocks: of the function.
        dropped: names of the blocks to leave out, other than scans.
        rows: of scans of which layers are left out.
        gates: names of blocks and scans that have gates.
        probes: by name of what is compared, the names of blocks that follow each other.
        compare: `(x, y) -> record`, numbers that add up.
    """
    state, residuals = blocks.state, blocks.residuals
    graph = state.graph
    edges = closed(state, [edge for name in dropped for edge in residuals[name].edges])
    cuts = {_loop(blocks, name).location: np.asarray(kept) for name, kept in (rows or {}).items()}
    empty = [_loop(blocks, name) for name, kept in (rows or {}).items() if len(kept) == 0]
    live = alive(state, edges, empty)
    kept = {location: 1 - k for location, k in edges}
    trips = {at.location: name for name in gates if (at := residuals[name]).loop is not None}
    opened = _gated(blocks, gates)
    found: dict[Location, tuple[Probe, ...]] = {}
    for name, parts in (probes or {}).items():
        at, probe = _probe(blocks, name, parts)
        found[at] = (*found.get(at, ()), probe)
    lost = alive(state) - live
    return Plan(
        blocks,
        live,
        kept,
        cuts,
        opened,
        trips,
        found,
        compare,
        _around([*kept, *cuts, *opened, *trips, *found], itself=[*cuts, *trips]),
        _around([at for at, outs in graph.results.items() if any(v in lost for v in outs)]),
    )


def execute(
    plan: Plan, values: Sequence[Any], given: Records | None = None
) -> tuple[list[Any], Records]:
    """The results of the function, and what was compared, by name.

    Args:
        plan: what to do.
        values: for each invar an array; None where it is not needed.
        given: by the name of a block its gate: true where it runs; of a scan one for each trip.
    """
    traced = plan.blocks.traced
    return _evaluate(plan, traced.jaxpr, traced.consts, values, given or {}, ())


def _gated(blocks: Blocks, names: Iterable[str]) -> dict[Location, dict[int, frozenset[str]]]:
    """The operands of additions with gates; a sum of two is there if one of them is."""
    found: dict[Location, dict[int, frozenset[str]]] = {}
    todo = [(edge, frozenset((n,))) for n in names for edge in blocks.residuals[n].edges]
    while todo:
        (location, k), own = todo.pop()
        found.setdefault(location, {})[k] = own
        outer = sum_of(blocks.state, location) if len(found[location]) > 1 else None
        todo += [] if outer is None else [(outer, frozenset().union(*found[location].values()))]
    return found


def _loop(blocks: Blocks, name: str) -> Loop:
    loop = blocks.residuals[name].loop
    if loop is None:
        raise ValueError(f"{name!r} is no scan")
    return loop


def _around(locations: Iterable[Location], itself: Iterable[Location] = ()) -> frozenset[Location]:
    around = {at[:end] for at in locations for end in range(1, len(at), 2)}
    return frozenset(around | set(itself))


def _probe(blocks: Blocks, name: str, parts: Sequence[str]) -> tuple[Location, Probe]:
    """Where the sum of the last block is known beside what the first one gets."""
    graph = blocks.state.graph
    first, last = (blocks.residuals[part] for part in (parts[0], parts[-1]))
    one = len(parts) == 1
    minus = one and first.kept is None
    if minus:
        entering = [first.branch]
    else:
        entering = [first.root] if first.kept is None else [first.kept, first.root]
    here = last.location[:-1] if last.loop is None else (*last.location, 0)
    while True:
        scope = graph.scopes[here]
        for value in entering:
            x = next((v for v, known in scope.items() if known == value), None)
            for i, v in _results(graph, here):
                if x is not None and graph.scopes[here][v] == last.y:
                    return (*here, i), Probe(name, x, v, minus)
        if not here:
            raise ValueError(f"{name!r} can't be measured")
        here = here[:-2]


def _results(graph, here: Location):
    """The variables that the equations of a jaxpr give, with the index of the equation."""
    where = {}
    for at, outs in graph.results.items():
        if at[:-1] == here:
            for value in outs:
                where.setdefault(value, at[-1])
    return [(where[value], v) for v, value in graph.scopes[here].items() if value in where]


def _evaluate(
    plan: Plan,
    jaxpr: Any,
    consts: Iterable[Any],
    values: Sequence[Any],
    given: Records,
    here: Location,
) -> tuple[list[Any], Records]:
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))
    records: Records = {}
    waiting: list[Any] = []

    def read(v):
        return v.val if isinstance(v, jec.Literal) else known[v]

    def flush():
        if waiting:
            run_equations(jaxpr, waiting, read, known.__setitem__)
            waiting.clear()

    for i, eqn in enumerate(jaxpr.eqns):
        location = (*here, i)
        if not plan.runs(location):
            known.update(dict.fromkeys(eqn.outvars))
            continue
        inside = bodies(eqn)
        special = location in plan.kept or location in plan.gates
        if not (inside or special or location in plan.probes):
            waiting.append(eqn)
            continue
        flush()
        operands = [read(v) for v in eqn.invars]
        if location in plan.kept:
            kept = operands[plan.kept[location]]
            results, new = [_placed(kept, eqn.outvars[0].aval)], {}
        elif inside and _enters(plan, eqn, location, operands):
            results, new = _enter(plan, jaxpr, eqn, inside, location, operands, given)
        else:
            results, new = run_equation(jaxpr, eqn, operands), {}
        if location in plan.gates:
            results = [_select(plan.gates[location], given, operands, results[0])]
        known.update(zip(eqn.outvars, results, strict=True))
        records |= new
        for probe in plan.probes.get(location, ()):
            x, y = known[probe.x], known[probe.y]
            assert plan.compare is not None
            records[probe.name] = plan.compare(y - x if probe.minus else x, y)
    flush()
    return [read(v) for v in jaxpr.outvars], records


def _select(gates, given: Records, operands: Sequence[Any], total: Any) -> Any:
    """The sum, or what is left of it."""
    on = {
        k: functools.reduce(jnp.logical_or, [given[n] for n in names]) for k, names in gates.items()
    }
    for k, gate in on.items():
        kept = _placed(operands[1 - k], jax.typeof(total))
        total = jax.lax.select(gate, total, kept)
    return total


def _enters(plan: Plan, eqn, location: Location, operands) -> bool:
    if location in plan.inner:
        return True
    if location in plan.less and eqn.primitive.name not in _CUSTOM:
        return True
    return any(
        x is None or jnp.shape(x) != v.aval.shape for x, v in zip(operands, eqn.invars, strict=True)
    )


def _enter(plan: Plan, jaxpr, eqn, inside, location, operands, given):
    def run(k: int, values: list[Any], given: Records) -> tuple[list[Any], Records]:
        body = inside[k]
        results, records = _evaluate(plan, body.jaxpr, body.consts, values, given, (*location, k))
        results = [
            r if needed else None
            for r, needed in zip(results, _needed(plan, body, location, k), strict=True)
        ]
        if location in plan.trips:
            gate = given[plan.trips[location]]
            for j, end in body.carried.items():
                if results[end] is not None:
                    old: Any = _placed(values[j], body.jaxpr.outvars[end].aval)
                    results[end] = jax.lax.select(gate, results[end], old)
        return results, records

    if eqn.primitive.name in _CUSTOM:
        # Its derivative is one of the block, too: what is left is differentiated anew.
        return run(0, operands, given)
    if location in plan.rows and len(plan.rows[location]) == 0:
        ends = {k: operands[inside[0].inputs[j]] for j, k in inside[0].carried.items()}
        return [ends.get(k) for k in range(len(eqn.outvars))], {}
    operands = list(operands)
    for k, body in enumerate(inside):
        entries = plan.blocks.state.graph.scopes[(*location, k)]
        for j in body.carried:
            # What is not needed is not carried, also where its beginning is there.
            if entries[body.jaxpr.invars[j]] not in plan.live:
                operands[body.inputs[j]] = None
    if location in plan.rows:
        rows, body = plan.rows[location], inside[0]
        cut = {body.inputs[j] for j in body.sliced}
        operands = [
            rows_of(x, rows, eqn.params["length"]) if i in cut else x
            for i, x in enumerate(operands)
        ]
        eqn = eqn.replace(params={**eqn.params, "length": len(rows)})

    def add(name, a, b):
        del name
        return jax.tree.map(jnp.add, a, b)

    def zeros(name, shapes):
        del name
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def stacks(name, at):
        residual = plan.blocks.residuals.get(name)
        return residual is not None and residual.loop is not None and residual.location == at

    hooks = Hooks(frozenset(), lambda *_: ([], {}), stacks=stacks, identity=zeros, merge=add)
    entry = Entry(eqn, inside, location, run, functools.partial(run_equation, jaxpr, eqn), hooks)
    scope = scope_of(eqn)
    with jax.named_scope(scope) if scope else contextlib.nullcontext():
        return enter(entry, operands, given)


def _needed(plan: Plan, body, location: Location, k: int) -> list[bool]:
    """For each result of a body whether something needs it."""
    graph = plan.blocks.state.graph
    if body.label == "test":
        return [True]
    inner = {end: j for j, end in body.carried.items()}
    scope, outer = graph.scopes[(*location, k)], graph.results[location]
    return [
        (scope[body.jaxpr.invars[inner[i]]] if i in inner else outer[i]) in plan.live
        for i in range(len(body.jaxpr.outvars))
    ]


def rows_of(x: Any, rows: np.ndarray, length: int) -> Any:
    """Some rows of an array, along its first axis; all of one that has them already."""
    if x is None or x.shape[0] != length or len(rows) == length:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(rows), *x.shape[1:]), x.dtype)
    if isinstance(x, np.ndarray):
        return x[rows]
    # Slices keep the sharding of the other axes.
    ends = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]
    runs = [
        jax.lax.slice_in_dim(x, int(rows[a]), int(rows[b - 1]) + 1)
        for a, b in itertools.pairwise(ends)
    ]
    return runs[0] if len(runs) == 1 else jax.lax.concatenate(runs, 0)


def _placed(value: Any, aval: Any) -> Any:
    """Sharded as the sum would be, on an explicit mesh."""
    if not _sharding.is_explicit(value):
        return value
    sharding = getattr(aval, "sharding", None)
    if sharding is None or jax.typeof(value).sharding == sharding:
        return value
    return jax.sharding.reshard(value, sharding)
