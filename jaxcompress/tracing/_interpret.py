"""Running a jaxpr with some of its equations replaced."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec

from jaxcompress.tracing._control_flow import Entry, enter
from jaxcompress.tracing._jaxprs import (
    Location,
    Traced,
    bodies,
    run_equation,
    run_equations,
    scope_of,
)
from jaxcompress.tracing._weights import Weight

Records = dict[str, Any]


class Hooks(NamedTuple):
    """What to do otherwise than the jaxpr says.

    Equations that are neither touched nor get a `Weight` run as they are; higher-order ones
    are entered only if something inside of them is touched or a `Weight` goes in.

    Attributes:
        touched: locations of the equations to hand to `equation`.
        equation: `(location, eqn, values, given, run) -> (results, records)`, where
            `run(values)` does what the equation did. Records are values by key that go out
            beside the function's result.
        dense: `(weight, eqn) -> array`, where only an array can go.
        stacks: `(key, location)`: whether in the scan or the sharded map at this location the
            records of `key` are stacked along a new leading axis (and what is `given` by that
            key is cut along it). Else they are merged.
        identity: `(key, shapes) -> record`, what merges into any other without a trace; None
            where nothing is recorded.
        merge: `(key, record, record) -> record`.
        scoped: whether `equation` computes by itself, and needs the name stack of the equation;
            not where it runs equations, which have their own.
    """

    touched: frozenset[Location]
    equation: Callable[..., tuple[list[Any], Records]]
    dense: Callable[[Weight, Any], Any] | None = None
    stacks: Callable[[str, Location], bool] | None = None
    identity: Callable[[str, Any], Any] | None = None
    merge: Callable[[str, Any, Any], Any] | None = None
    scoped: bool = True


def interpret(
    traced: Traced, values: Sequence[Any], hooks: Hooks, given: Records | None = None
) -> tuple[list[Any], Records]:
    """The values of the outvars, and the records.

    Args:
        traced: the function.
        values: for each invar an array or a `Weight`.
        hooks: what to do otherwise.
        given: values by key that the hooks may need, as ranges of activations.
    """
    within = frozenset(
        location[:end] for location in hooks.touched for end in range(1, len(location), 2)
    )
    return _evaluate(traced.jaxpr, traced.consts, values, given or {}, hooks, within, ())


def _evaluate(
    jaxpr: Any,
    consts: Iterable[Any],
    values: Sequence[Any],
    given: Records,
    hooks: Hooks,
    within: frozenset[Location],
    here: Location,
) -> tuple[list[Any], Records]:
    known: dict[Any, Any] = {}
    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))
    records: Records = {}
    last = _last_uses(jaxpr)
    waiting: list[Any] = []

    def read(v):
        return v.val if isinstance(v, jec.Literal) else known[v]

    def flush(at):
        if waiting:
            run_equations(jaxpr, waiting, read, known.__setitem__)
            waiting.clear()
        for v in [v for v in known if last.get(v, -1) < at]:
            del known[v]

    for i, eqn in enumerate(jaxpr.eqns):
        location = (*here, i)
        lifted = any(
            isinstance(known.get(v), Weight) for v in eqn.invars if not isinstance(v, jec.Literal)
        )
        inside = bodies(eqn) if lifted or location in within else []
        if not (inside or lifted or location in hooks.touched):
            waiting.append(eqn)
            continue
        flush(i)
        operands = [read(v) for v in eqn.invars]
        run = functools.partial(_run, jaxpr, eqn, inside, given, hooks, within, location)
        if location in hooks.touched or (lifted and not inside):
            with _scope(eqn) if hooks.scoped else contextlib.nullcontext():
                results, new = hooks.equation(location, eqn, operands, given, run)
        else:
            results, new = run(operands)
        records.update(new)
        known.update(zip(eqn.outvars, results, strict=True))
    flush(len(jaxpr.eqns))
    return [read(v) for v in jaxpr.outvars], records


def _run(jaxpr, eqn, inside, given, hooks, within, location, operands):
    if not inside:
        return run_equation(jaxpr, eqn, operands), {}

    def run_body(k, values, given):
        body = inside[k]
        at = (*location, k)
        return _evaluate(body.jaxpr, body.consts, values, given, hooks, within, at)

    def as_it_is(values):
        return run_equation(jaxpr, eqn, values)

    entry = Entry(eqn, inside, location, run_body, as_it_is, hooks)
    with _scope(eqn):
        return enter(entry, operands, given)


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    last = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last.update({v: i for v in eqn.invars if not isinstance(v, jec.Literal)})
    end = len(jaxpr.eqns)
    last.update({v: end for v in jaxpr.outvars if not isinstance(v, jec.Literal)})
    return last


def _scope(eqn: Any):
    scope = scope_of(eqn)
    return jax.named_scope(scope) if scope else contextlib.nullcontext()
