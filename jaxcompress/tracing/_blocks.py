"""Matrix products with a block-sparse operand."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _sharding
from jaxcompress.arrays import BlockSparse, Packed, todense
from jaxcompress.tracing._dot import Dot, wide

# What one trip holds of gathered activations: larger buffers fall out of the caches, and a
# 2048x2048 product in blocks of 16x16 then takes six times as long.
_TRIP_BYTES = 1 << 22


def multiply_blocks(x: jax.Array, weight: BlockSparse, dot: Dot, dtype: Any) -> jax.Array | None:
    r"""The product over the kept blocks alone; None where decoding the weight is cheaper.

    .. math:: y_c = \sum_{k:\, c_k = c} x_{r_k} V_k

    for block k in row r and column c of the grid: one gather, one batched product and one sum
    by segments, at most some MB of activations at a time.

    Args:
        x: activations of any shape.
        weight: two-dimensional, cut along both axes; else None is returned.
        dot: how they are joined; None is returned unless along one axis of each.
        dtype: static. Of the result.

    Returns:
        The result. What is not kept is not multiplied: a NaN or infinity of `x` reaches the
        outputs that have a kept block at that input, where a dense product gives NaN everywhere.

    Cost: `2 rows * kept * prod(block)` operations. Measured for a float32 layer of 2048x2048
    on two idle CPU cores, milliseconds at batch 256 / at batch 1 (medians of 90 to 130 rounds):

    ================  ===========  ==========  =============
    blocks, sparsity  product      decoded     float32 layer
    ================  ===========  ==========  =============
    128x128, 95%      0.73 / 0.08  5.1 / 0.48  4.8 / 0.32
    128x128, 90%      1.3 / 0.10   5.2 / 0.50  4.8 / 0.33
    32x32, 95%        1.4 / 0.09   5.3 / 0.65  4.8 / 0.33
    32x32, 90%        2.4 / 0.13   5.4 / 0.73  4.8 / 0.33
    16x16, 95%        2.1 / 0.23   5.3 / 1.02  4.8 / 0.41
    16x16, 90%        3.9 / 0.24   5.4 / 0.73  4.9 / 0.42
    ================  ===========  ==========  =============

    Decoded are, at batch 256, blocks of 16x16 at 75% (9.6 as a product), of 8x8 at 90% (9.2) and
    of 64x1 at 90%, and any at 50%.
    """
    joined = [a for a in dot.w if a in dot.x]
    fits = weight.ndim == len(weight.block) == 2 and len(joined) == 1 and joined[0] not in dot.out
    floats = all(jnp.issubdtype(each.dtype, jnp.floating) for each in (x, weight))
    if not fits or not floats or 0 in (x.size, *weight.values.shape) or _sharding.is_explicit(x):
        return None
    side = dot.w.index(joined[0])
    tokens = jnp.moveaxis(x, dot.x.index(joined[0]), -1)
    free, length = tokens.shape[:-1], tokens.shape[-1]
    rows = math.prod(free)
    if not _is_cheaper(rows, weight):
        return None
    tokens = jnp.pad(
        tokens.reshape((rows, length)),
        ((0, 0), (0, weight.grid[side] * weight.block[side] - length)),
    )

    def product(tokens):
        return _product(tokens, weight, side, dot.params["precision"]).astype(dtype)

    trips = -(-rows * weight.values.shape[0] * max(weight.block) * 4 // _TRIP_BYTES)
    y = _in_trips(product, tokens, trips)
    labels = [a for a in dot.x if a != joined[0]] + [dot.w[1 - side]]
    y = y.reshape((*free, weight.shape[1 - side]))
    return y.transpose([labels.index(a) for a in dot.out])


def transposed(weight: BlockSparse) -> BlockSparse:
    """The transpose of a two-dimensional array that is cut along both axes."""
    kept, places = weight.mask.todense().astype(bool), weight.places()
    values = todense(weight.values)
    if values.shape[0]:
        # Which of the values comes when the grid is read by columns.
        number = (
            jnp.zeros(kept.shape, jnp.int32)
            .at[places]
            .set(jnp.arange(values.shape[0], dtype=jnp.int32))
        )
        at = jnp.nonzero(kept.T, size=values.shape[0], fill_value=0)
        values = values[number.T[at]]
    planes = jnp.packbits(kept.T.reshape((1, kept.size)), axis=1)
    return dataclasses.replace(
        weight,
        values=values.swapaxes(1, 2),
        mask=Packed(planes, kept.T.shape, False),
        block=weight.block[::-1],
        shape=weight.shape[::-1],
    )


def _is_cheaper(rows: int, weight: BlockSparse) -> bool:
    """By times measured on CPU, in rows of a dense product of the same shape.

    Beside its entries, three times as slow as dense ones, each block costs what 1000 dense
    entries do; a decoded weight costs what 20 rows do.
    """
    density = weight.values.shape[0] / math.prod(weight.grid)
    relative = 3 + 1000 / math.prod(weight.block)
    return rows * density * relative < rows + 20


def _product(tokens: jax.Array, weight: BlockSparse, side: int, precision: Any) -> jax.Array:
    """`[rows, inputs] -> [rows, outputs]`, the inputs filled up to whole blocks."""
    (rows, _), grid, block = tokens.shape, weight.grid, weight.block
    places = weight.places()
    cut = tokens.reshape((rows, grid[side], block[side])).swapaxes(0, 1)
    parts = jax.lax.dot_general(
        cut.at[places[side]].get(mode="clip"),
        todense(weight.values),
        (((2,), (1 + side,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=wide(tokens.dtype),
    )
    sums = jax.ops.segment_sum(parts, places[1 - side], grid[1 - side])
    y = sums.swapaxes(0, 1).reshape((rows, grid[1 - side] * block[1 - side]))
    return y[:, : weight.shape[1 - side]]


def _in_trips(f: Any, rows: jax.Array, trips: int) -> jax.Array:
    """`f(rows)`, some rows at a time."""
    count = len(rows)
    # A power of two divides the usual batches. Each trip takes rows from all over the batch,
    # so that a sharded one stays where it is.
    size = -(-count // (1 << (trips - 1).bit_length()))
    trips = -(-count // size)
    if trips == 1:
        return f(rows)
    rows = jnp.pad(rows, ((0, trips * size - count), (0, 0)))
    # Without what a derivative needs of each trip: to gather it again is faster than to keep it.
    f = jax.checkpoint(f, prevent_cse=False)
    y = jax.lax.map(f, rows.reshape((size, trips, rows.shape[1])).swapaxes(0, 1))
    return y.swapaxes(0, 1).reshape((size * trips, y.shape[2]))[:count]
