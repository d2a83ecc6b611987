"""Rows of compressed embedding tables."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import arrays
from jaxcompress.tracing._product import Product, product_rows


def take(value: Any, indices: jax.Array, eqn: Any) -> jax.Array | None:
    """The rows that a gather asks for, decoding no others; None for other gathers.

    `jnp.take(table, indices, axis=0)` and `table[indices]` are such gathers. Indices outside
    of the table give what they give for a dense one.
    """
    params, shape = eqn.params, value.shape
    numbers = params["dimension_numbers"]
    whole_rows = (
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(params["slice_sizes"]) == (1, *shape[1:])
    )
    if not whole_rows:
        return None
    places = indices[..., 0]
    last = shape[0] - 1
    clipped = jnp.clip(places.astype(jnp.int32), 0, max(last, 0))
    if isinstance(value, Product):
        cut = product_rows(value)
        if cut is None:
            return None
        stacked, rebuild = cut
        taken = jnp.take(stacked, clipped.reshape(-1), axis=0, mode="clip")
        rows = jax.vmap(lambda row: rebuild(row).todense())(taken)
        rows = rows.reshape(*clipped.shape, *shape[1:])
    else:
        rows = arrays.take_rows(value, clipped)
    out = eqn.outvars[0].aval
    if params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = params["fill_value"]
        fill = jnp.nan if fill is None else fill
        inside = (places >= 0) & (places <= last)
        inside = jnp.expand_dims(inside, tuple(range(places.ndim, rows.ndim)))
        rows = jnp.where(inside, rows, jnp.asarray(fill, rows.dtype))
    # The axes of the indices come first here; the equation says where those of a row go.
    return jnp.moveaxis(rows, tuple(range(places.ndim, rows.ndim)), numbers.offset_dims).astype(
        out.dtype
    )
