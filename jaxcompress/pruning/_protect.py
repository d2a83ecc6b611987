"""Floors of a global selection: what each leaf keeps before leaves are compared."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._types import Numeric
from jaxcompress.projections import number_at
from jaxcompress.pruning import _threshold
from jaxcompress.pruning._select import largest


def protected(scores: jax.Array, floor: Numeric | None, step: jax.Array) -> jax.Array:
    """The scores with infinity at those that a leaf must not lose; an empty leaf has none.

    Args:
        scores: of one leaf, or of its groups.
        floor: the fraction of them that stays, and at least one; None protects nothing.
        step: where a schedule is read.
    """
    if floor is None or scores.size == 0:
        return scores
    best = jnp.array(jnp.inf, scores.dtype)
    # Infinite scores would tie with what is protected; NaN stays.
    scores = jnp.minimum(scores, jnp.finfo(scores.dtype).max)
    if _is_zero(floor):
        return jnp.where(_first_of_largest(scores), best, scores)
    fraction = jnp.clip(number_at(floor, step).astype(jnp.float32), 0.0, 1.0)
    least = jnp.maximum(jnp.ceil(fraction * scores.size).astype(jnp.uint32), np.uint32(1))
    return jnp.where(largest(scores, least), best, scores)


def _is_zero(floor: Numeric) -> bool:
    known = not callable(floor) and not _check.is_traced(floor)
    return known and float(np.asarray(floor)) == 0.0


def _first_of_largest(scores: jax.Array) -> jax.Array:
    """`largest(scores, 1)` in two passes instead of eleven; NaN counts as -inf."""
    index = _threshold.order(scores.shape, _threshold.strides(scores.shape), np.uint32(0))
    scores = jnp.where(jnp.isnan(scores), jnp.array(-jnp.inf, scores.dtype), scores)
    tied = scores == jnp.max(scores)
    first = jnp.min(jnp.where(tied, index, np.uint32(2**32 - 1)))
    return tied & (index == first)
