"""Names of values inside of a function."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
from jax.ad_checkpoint import checkpoint_name

from jaxcompress import _check
from jaxcompress.tracing._jaxprs import Location, bodies, scope_of
from jaxcompress.tracing._sites import sites_among
from jaxcompress.tracing._walk import Step, join


def name(x: jax.Array, tag: str) -> jax.Array:
    """Gives a value a name by which `jc.capture` finds it.

    Args:
        x: any array.
        tag: static. The name; inside of a `jax.named_scope` the scope's name comes before it.

    Returns:
        `x`. Under `jit` this costs nothing: no operation is left of it. It is
        `jax.ad_checkpoint.checkpoint_name`, so the tag also serves the policies of
        `jax.checkpoint`.

    Raises:
        TypeError: `tag` is not a string.

    Examples:
        >>> fn = lambda p, x: jc.name(x @ p["w"], "hidden").sum()
        >>> y, values = jc.capture(fn, "hidden")({"w": jnp.ones((2, 3))}, jnp.ones((1, 2)))
        >>> values["hidden"]
        Array([[2., 2., 2.]], dtype=float32)
    """
    if not isinstance(tag, str):
        raise TypeError(_check.message("name", "tag", "be a string", _check.describe(tag)))
    return checkpoint_name(x, tag)


class Named(NamedTuple):
    """A value that has a name.

    Attributes:
        name: of a tag, a scope or a site.
        location: of the equation that computes it.
        result: index among that equation's results.
        aval: its shape and dtype.
    """

    name: str
    location: Location
    result: int
    aval: Any


def named_values(jaxpr: Any, steps: Sequence[Step]) -> list[Named]:
    """Every value with a name, in the order of the program.

    A tag names a value. A scope (`jax.named_scope`, a Flax Linen or Haiku module) names what
    is computed in it and used outside. A parameter's path names the result of its site.
    Further values of one name get `:1`, `:2`, ….
    """
    found = [
        Named(join(step.scope, step.eqn.params["name"]), step.location, 0, step.eqn.outvars[0].aval)
        for step in steps
        if step.eqn.primitive.name == "name" and not step.testing
    ]
    found += _scopes(jaxpr, (), "")
    outputs = {step.location: step.eqn.outvars[0].aval for step in steps if step.eqn.outvars}
    testing = {step.location: step.testing for step in steps}
    sites = [
        Named(s.path, s.location, 0, outputs[s.location])
        for s in sites_among(steps)
        if not testing[s.location]
    ]
    taken: dict[str, int] = {}
    numbered = []
    # A tag or a scope that is called as a path is meant before the path.
    for value in (*sorted(found, key=lambda v: v.location), *sites):
        use = taken[value.name] = taken.get(value.name, -1) + 1
        numbered.append(value if use == 0 else value._replace(name=f"{value.name}:{use}"))
    return numbered


def _scopes(jaxpr: Any, here: Location, outer: str) -> list[Named]:
    """Results of the scopes that begin in this jaxpr or in those inside of it."""
    scopes = [tuple(scope_of(eqn).split("/")) if scope_of(eqn) else () for eqn in jaxpr.eqns]
    uses = _uses(jaxpr)
    found = []
    for depth in range(1, 1 + max(map(len, scopes), default=0)):
        for first, end in _runs(
            [scope[:depth] if len(scope) >= depth else None for scope in scopes]
        ):
            label = join(outer, "/".join(scopes[first][:depth]))
            for i in range(first, end):
                found += [
                    Named(label, (*here, i), k, v.aval)
                    for k, v in enumerate(jaxpr.eqns[i].outvars)
                    if any(not first <= use < end for use in uses.get(v, ()))
                ]
    for i, eqn in enumerate(jaxpr.eqns):
        for k, body in enumerate(bodies(eqn)):
            if body.label != "test":
                found += _scopes(body.jaxpr, (*here, i, k), join(outer, scope_of(eqn)))
    return found


def _uses(jaxpr: Any) -> dict[Any, list[float]]:
    uses: dict[Any, list[float]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, jec.Literal):
                uses.setdefault(v, []).append(i)
    for v in jaxpr.outvars:
        if not isinstance(v, jec.Literal):
            uses.setdefault(v, []).append(math.inf)
    return uses


def _runs(labels: Sequence[Any]):
    """Beginnings and ends of the runs of equal labels other than None."""
    first = 0
    for i in range(1, len(labels) + 1):
        if i == len(labels) or labels[i] != labels[first]:
            if labels[first] is not None:
                yield first, i
            first = i
