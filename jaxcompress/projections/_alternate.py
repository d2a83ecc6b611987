"""Phases: compressed and dense in turn."""

import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import Numeric
from jaxcompress.projections._base import Projection
from jaxcompress.projections._combine import _require_projection
from jaxcompress.projections._due import found_when
from jaxcompress.projections._numbers import number_at
from jaxcompress.projections._time import Timed, timed


def alternated(
    projection: Projection,
    compressed: Numeric,
    dense: Numeric,
    begin: Numeric = 0,
    end: Numeric | None = None,
) -> Projection:
    """In force for `compressed` updates, suspended for `dense`, and so on: AC/DC.

    The structure is found anew where a compressed phase begins and held during it. While it
    is suspended all weights train; those that come back start from zero and are dropped
    again if they have not grown. From `end` on it is in force for good.

    Args:
        projection: what to find and hold, as `jc.prune(0.9)`.
        compressed: length of a compressed phase in updates, at least 1. May be traced.
        dense: length of a dense phase in updates, at least 1. May be traced.
        begin: first step of the first compressed phase; all before is dense. May be traced.
        end: step at which the last compressed phase begins; None for no end. May be traced.

    Returns:
        The projection whose structure is `Timed(active, inner)`. For `jc.projected`, which
        clears the moments of what is dropped or comes back.

    Raises:
        ValueError: a number below its bound.

    Cost: one `jax.lax.cond`, as `jc.every`.

    Examples:
        >>> p = jc.alternated(jc.prune(0.5), compressed=10, dense=5, begin=20, end=100)
        >>> [bool(p.find({"w": jnp.ones((2, 2))}, step=s).active) for s in (19, 20, 30, 35, 100)]
        [False, True, False, True, True]

    Source: Peste et al. 2021, arXiv:2106.12379, algorithm 1.
    """
    _require_projection("alternated", projection)
    _check.numeric("alternated", "compressed", compressed, 1)
    _check.numeric("alternated", "dense", dense, 1)
    _check.numeric("alternated", "begin", begin)
    if end is not None:
        _check.numeric("alternated", "end", end)

    def at(value, step):
        return jnp.asarray(number_at(value, step), jnp.int32)

    def find(params, *, previous=None, grads=None, step=0):
        step = jnp.asarray(step, jnp.int32)
        length = jnp.maximum(at(compressed, step), 1)
        since = step - at(begin, step)
        place = since % (length + jnp.maximum(at(dense, step), 1))
        active, due = (since >= 0) & (place < length), (since >= 0) & (place == 0)
        if end is not None:
            last = step >= at(end, step)
            active, due = active | last, (due & ~last) | (step == at(end, step))
        if previous is None:
            return Timed(active, projection.find(params, grads=grads, step=step))
        inner = found_when(
            due,
            lambda: projection.find(params, previous=previous.inner, grads=grads, step=step),
            previous.inner,
        )
        return Timed(active, inner)

    return timed(
        projection,
        find,
        lambda everywhere: alternated(everywhere, compressed, dense, begin, end),
    )
