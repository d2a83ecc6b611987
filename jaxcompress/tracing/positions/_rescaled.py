"""Numbers of a program that come from sizes which are others now, and where they stand."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jec

from jaxcompress.tracing._jaxprs import Location, bodies, constant
from jaxcompress.tracing.positions._kept import Kept
from jaxcompress.tracing.positions._reading import Reading
from jaxcompress.tracing.positions._size_literals import (
    NOTHING,
    Carried,
    Rescaled,
    attach,
    size_literal,
)
from jaxcompress.tracing.positions._taken import shape_of


def rescaled(jaxpr: Any, reading: Reading, stays: Kept) -> dict[Location, Rescaled]:
    """What to put in place of operands, by the location of the equation.

    Args:
        jaxpr: open.
        reading: of it.
        stays: which positions there are now.
    """
    found: dict[Location, Rescaled] = {}
    _follow(jaxpr, [NOTHING] * len(jaxpr.invars), reading, stays, (), found)
    return found


def _follow(jaxpr, ins: Sequence[Carried], reading: Reading, stays: Kept, here, found):
    carried: dict[Any, Carried] = dict(zip(jaxpr.invars, ins, strict=True))

    def of(v: Any) -> Carried:
        return NOTHING if isinstance(v, jec.Literal) else carried.get(v, NOTHING)

    for i, eqn in enumerate(jaxpr.eqns):
        location, given = (*here, i), [of(v) for v in eqn.invars]
        operands = reading.plan[location].ins
        inside = bodies(eqn)
        if inside:
            results = [NOTHING] * len(eqn.outvars)
            for k, body in enumerate(inside):
                if (*location, k, 0) not in reading.plan:
                    # It depends on no argument and was not read.
                    continue
                entering = [
                    given[n] if constant(body, j) or j in body.sliced else NOTHING
                    for j, n in enumerate(body.inputs)
                ]
                leaving = _follow(body.jaxpr, entering, reading, stays, (*location, k), found)
                for result, n in zip(leaving, body.outputs, strict=True):
                    if n is not None:
                        results[n] = result
        else:
            masks = [stays.of(value) for value in operands]
            pairs = zip(eqn.invars, masks, strict=True)
            shapes = [shape_of(v.aval.shape, mask) for v, mask in pairs]
            number = size_literal(eqn, [value.known for value in operands], given, shapes)
            if number is not None:
                found[location] = number
            results = attach(eqn, given, shapes)
        carried.update(zip(eqn.outvars, results, strict=True))
    return [of(v) for v in jaxpr.outvars]
