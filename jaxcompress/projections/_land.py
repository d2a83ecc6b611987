"""Updates whose sum with the parameters lands on a target."""

import jax
import jax.numpy as jnp

from jaxcompress._dtypes import wide_dtype
from jaxcompress._types import PyTree


def wide(dtype) -> jnp.dtype:
    """float32 for narrower floats: an update in it can reach every narrow value."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return wide_dtype(dtype)


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` with the precision of `dtype`, in the dtype of `x`.

    XLA may skip the rounding of a cast to a narrow type and back; it does not skip this one.
    """
    if not jnp.issubdtype(dtype, jnp.floating) or x.dtype == dtype:
        return x
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def apply(params: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates` without a promotion of dtypes that strict mode would refuse."""

    def leaf(w, u):
        if w is None or u is None:
            return w
        common = wide(max(w.dtype, u.dtype, key=lambda dtype: dtype.itemsize))
        return rounded(w.astype(common) + u.astype(common), w.dtype).astype(w.dtype)

    return jax.tree.map(leaf, params, updates, is_leaf=lambda x: x is None)


def land(params: PyTree, target: PyTree) -> PyTree:
    """Updates for which `optax.apply_updates(params, updates)` is `target`.

    Exact at zeros of the target, and to the last bit for bfloat16 and float16 targets no more
    than 2^16 times smaller than the parameter; in float32 within one rounding of the larger
    of the two, which no float32 update can better.
    """

    def leaf(w, t):
        if w is None or not jnp.issubdtype(w.dtype, jnp.floating):
            return None if w is None else t - w
        dtype, narrow = wide(w.dtype), w.dtype
        w, t = w.astype(dtype), rounded(t.astype(dtype), narrow)
        update = t - w
        # The rounding of t - w, added back: what is still missing after the sum.
        return update + (t - (w + update))

    return jax.tree.map(leaf, params, target, is_leaf=lambda x: x is None)


def land_where_moved(params: PyTree, target: PyTree, moved: PyTree, updates: PyTree) -> PyTree:
    """`land`, but the update as it came for leaves that no projection touched."""
    landed = land(params, target)
    return jax.tree.map(
        lambda u, new, t, mine: u if t is new else mine,
        updates,
        moved,
        target,
        landed,
        is_leaf=lambda x: x is None,
    )
