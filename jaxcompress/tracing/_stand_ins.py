"""Params of which only shapes are held on to, and what stands in for smaller ones in a trace."""

import jax

from jaxcompress import _sharding
from jaxcompress._types import PyTree
from jaxcompress.tracing._jaxprs import is_array


def shapes_of(params: PyTree) -> PyTree:
    """`jax.ShapeDtypeStruct`s in place of arrays; everything else as it is."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf,
        params,
    )


def stand_ins(old: PyTree, new: PyTree) -> PyTree:
    """Shapes of the old params, with the dtypes and Explicit shardings of the new ones."""

    def leaf(old, new):
        if not is_array(new):
            return new
        sharding = jax.typeof(new).sharding if _sharding.is_explicit(new) else None
        return jax.ShapeDtypeStruct(old.shape, new.dtype, sharding=sharding)

    return jax.tree.map(leaf, old, new)
