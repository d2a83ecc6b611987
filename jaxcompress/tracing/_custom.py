"""Derivatives that a function defines itself, for values of other shapes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.tracing._jaxprs import run_equation

CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call"))


class Side(NamedTuple):
    """The shape of what a rule takes or gives: that of an operand or result of the equation."""

    operand: bool
    index: int


Run = Callable[[Any, Sequence[Any], list[Side], list[Side]], Sequence[Any]]
"""`(closed, values, ins, outs) -> results`: a rule's jaxpr on values of the new shapes."""


def rebind(
    jaxpr: Any, eqn: Any, values: Sequence[Any], forward: Callable[..., Any], run: Run
) -> Sequence[Any]:
    """An equation of `CUSTOM` on values of other shapes, its rule adapted too.

    Args:
        jaxpr: the equation stands in.
        eqn: the equation.
        values: of the operands, in their new shapes.
        forward: from these to the results.
        run: runs a rule, traced with the old shapes, in the new ones.
    """
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    results = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
    real = [i for i, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.inexact)]
    smooth = [k for k, aval in enumerate(results) if jnp.issubdtype(aval.dtype, jnp.inexact)]
    operands = [Side(True, i) for i in range(len(avals))]
    moving_ins, moving_outs = [Side(True, i) for i in real], [Side(False, k) for k in smooth]

    def as_traced(xs):
        """Its real results as a function of its real operands, at the old shapes."""

        def f(*moving):
            filled = list(xs)
            for i, x in zip(real, moving, strict=True):
                filled[i] = x
            outs = run_equation(jaxpr, eqn, filled)
            return [outs[k] for k in smooth]

        return f, [xs[i] for i in real]

    def tangents(xs, dots):
        f, moving = as_traced(xs)
        return jax.jvp(f, moving, dots)[1]

    def cotangents(xs, bars):
        f, moving = as_traced(xs)
        return jax.vjp(f, *moving)[1](bars)

    if eqn.primitive.name == "custom_jvp_call":
        call = jax.custom_jvp(forward)

        def jvp(xs, dots):
            moving = [dots[i] for i in real]
            closed = jax.make_jaxpr(tangents)(avals, [avals[i] for i in real])
            found = run(closed, [*xs, *moving], operands + moving_ins, moving_outs)
            outs = call(*xs)
            full = [np.zeros(out.shape, jax.dtypes.float0) for out in outs]
            for k, dot in zip(smooth, found, strict=True):
                full[k] = dot
            return outs, full

        call.defjvp(jvp)
        return call(*values)
    call = jax.custom_vjp(forward)

    def backward(xs, bars):
        bars = [bars[k] for k in smooth]
        closed = jax.make_jaxpr(cotangents)(avals, [results[k] for k in smooth])
        found = run(closed, [*xs, *bars], operands + moving_outs, moving_ins)
        full: list[Any] = [None] * len(xs)
        for i, bar in zip(real, found, strict=True):
            full[i] = bar
        return tuple(full)

    call.defvjp(lambda *xs: (call(*xs), xs), backward)
    return call(*values)
