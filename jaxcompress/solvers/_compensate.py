"""Rows of a layer projected one by one, each error made up for by those that follow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress.solvers._hessian import check_layer, product, working

_LAZY = 128  # rows whose errors reach the rows after them in one product


def compensate(
    w: jax.Array | np.ndarray,
    factor: jax.Array | np.ndarray,
    choose: Callable[..., Any],
    project: Callable[..., jax.Array],
    *,
    block_size: int = 128,
) -> tuple[jax.Array, Any]:
    r"""Projects a layer in the space of its outputs: optimal brain surgeon, row by row.

    With the rows :math:`w_j` of the layer, their projections :math:`p_j` and the factor
    :math:`U` of the inverse Hessian, for j in order

    .. math:: w_i \leftarrow w_i - \frac{U_{ji}}{U_{jj}}\,(w_j - p_j) \qquad (i > j)

    which is the least-squares answer of all later rows to the error of row j.

    Args:
        w: `[k, n]`, inputs by outputs, any real float dtype.
        factor: `[k, k]`, the upper triangular factor that `prepare` gives; what is below the
            diagonal is not read.
        choose: static. `(rows, diagonal, start) -> structure`, called once for each block of
            `block_size` rows, with their current values `[block_size, n]`, the diagonal of the
            factor there, and the index of the first of them. `(rows / diagonal[:, None])**2` is
            what dropping an entry costs. Where blocks don't divide k, the last one is filled up
            with zeros, and its diagonal with infinity.
        project: static. `(row, structure, i) -> row`, for the row with index i in its block, in
            float32 (or float64 with such a `w`).
        block_size: static. Rows that share a structure.

    Returns:
        The new layer, of the shape and dtype of `w`, each row as `project` gave it; and the
        structures, stacked. The cast to a narrow dtype counts as part of the error. A NaN stays
        in its column. Call it inside of `jax.jit`: the callbacks are part of the program.

    Raises:
        ValueError: shapes that do not fit, or `block_size` below 1.
        TypeError: `w` or `factor` is not real floating point.

    Cost: :math:`O(k^2 n)`, almost all of it in products of 128 rows; the program does not grow
    with the layer.

    Examples:
        >>> prepared, _ = jc.solvers.prepare(jnp.array([[1.0, 0.9], [0.9, 1.0]]), 0.0)
        >>> new, _ = jc.solvers.compensate(
        ...     jnp.array([[0.4], [0.4]]),
        ...     prepared.factor,
        ...     choose=lambda rows, diagonal, start: (),
        ...     project=lambda row, structure, i: jnp.round(row),
        ... )
        >>> new
        Array([[0.],
               [1.]], dtype=float32)

    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; with masks, Frantar & Alistarh
    2023, arXiv:2301.00774, algorithm 1.
    """
    check_layer("compensate", w, factor, "factor")
    _check.integer("compensate", "block_size", block_size, 1)
    layer = jnp.asarray(w)
    dense = working(layer)
    (k, n), blocks = layer.shape, -(-layer.shape[0] // block_size)
    together = max(1, min(_LAZY // block_size, blocks))
    size = together * block_size
    chunks = max(1, -(-k // size))
    padding = chunks * size - k
    upper = jnp.pad(jnp.triu(working(factor).astype(dense.dtype)), ((0, padding), (0, padding)))
    diagonal = jnp.pad(jnp.diagonal(upper)[:k], (0, padding), constant_values=jnp.inf)
    dense = jnp.pad(dense, ((0, padding), (0, 0)))

    def chunk(errors, number):
        first = number * size
        across = lax.dynamic_slice_in_dim(upper, first, size, 1)
        rows = lax.dynamic_slice_in_dim(dense, first, size)
        rows = rows - product(across.T, errors)
        inside = lax.dynamic_slice_in_dim(across, first, size)
        (rows, own), structures = lax.scan(
            lambda carry, b: block(carry, b, inside, first),
            (rows, jnp.zeros_like(rows)),
            jnp.arange(together),
        )
        return lax.dynamic_update_slice_in_dim(errors, own, first, 0), (rows, structures)

    def block(carry, b, inside, first):
        start = b * block_size
        mine = lax.dynamic_slice_in_dim(carry[0], start, block_size)
        spread = lax.dynamic_slice_in_dim(diagonal, first + start, block_size)
        structure = choose(mine, spread, first + start)

        def step(i, carry):
            rows, errors = carry
            place = start + i
            row = lax.dynamic_index_in_dim(rows, place, keepdims=False)
            projected = project(row, structure, i)
            _check_row(projected, n)
            projected = projected.astype(layer.dtype).astype(row.dtype)
            weights = lax.dynamic_index_in_dim(inside, place, keepdims=False)
            true = first + place < k
            pivot = jnp.where(true, weights[place], jnp.ones((), row.dtype))
            error = jnp.where(true, (row - projected) / pivot, jnp.zeros_like(row))
            later = jnp.where(np.arange(size) > place, weights, jnp.zeros_like(weights))
            rows = rows - later[:, None] * error[None, :]
            rows = lax.dynamic_update_index_in_dim(rows, projected, place, 0)
            return rows, lax.dynamic_update_index_in_dim(errors, error, place, 0)

        return lax.fori_loop(0, block_size, step, carry), structure

    _, (rows, structures) = lax.scan(chunk, jnp.zeros_like(dense), jnp.arange(chunks))
    new = rows.reshape((chunks * size, n))[:k].astype(layer.dtype)
    flat = lambda s: s.reshape((chunks * together, *s.shape[2:]))[:blocks]  # noqa: E731
    return new, jax.tree.map(flat, structures)


def _check_row(row: Any, outputs: int) -> None:
    if jnp.shape(row) != (outputs,):
        rule, got = f"return a row of shape [{outputs}]", _check.describe(row)
        raise ValueError(_check.message("compensate", "project", rule, got))
