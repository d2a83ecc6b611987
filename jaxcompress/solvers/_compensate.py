"""Rows of a layer projected one by one, each error made up for by those that follow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._products import product
from jaxcompress.solvers._hessian import check_layer

_LAZY = 128  # rows whose errors reach the rows after them in one product
_INNER = 32  # of those, rows that a cache holds
_SMALL = 512  # rows of a layer that is done before a program with one more loop is compiled


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
    dense = wide(layer)
    (k, n), blocks = layer.shape, -(-layer.shape[0] // block_size)
    together = max(1, min(_LAZY // block_size, blocks))
    size = together * block_size
    few = [d for d in range(1, _INNER + 1) if block_size % d == 0]
    inner = few[-1] if k > _SMALL else block_size
    levels = tuple(sorted({size, block_size, inner, 1}, reverse=True))
    padding = max(1, -(-k // size)) * size - k
    upper = jnp.pad(jnp.triu(wide(factor).astype(dense.dtype)), ((0, padding), (0, padding)))
    diagonal = jnp.pad(jnp.diagonal(upper)[:k], (0, padding), constant_values=jnp.inf)
    dense = jnp.pad(dense, ((0, padding), (0, 0)))

    def parts(level, rows, corner, first, structure):
        """Rows that all errors before `first` have reached: projected, and their own errors."""
        part = levels[level]

        def one(errors, number):
            start = number * part
            mine = lax.dynamic_slice_in_dim(rows, start, part)
            across = lax.dynamic_slice_in_dim(corner, start, part, 1)
            before = _reached(across, errors, number) if level == 0 else product(across.T, errors)
            mine = mine - before
            own = lax.dynamic_slice_in_dim(across, start, part)
            given, place = structure, first + start
            if part == block_size:
                spread = lax.dynamic_slice_in_dim(diagonal, place, part)
                given = choose(mine, spread, place)
            if part == 1:
                new, own, below = row(mine, own, place, given)
            else:
                new, own, below = parts(level + 1, mine, own, place, given)
            chosen = given if part == block_size else below
            return lax.dynamic_update_slice_in_dim(errors, own, start, 0), (new, chosen)

        count = rows.shape[0] // part
        errors, (new, chosen) = lax.scan(
            one, jnp.zeros_like(rows), jnp.arange(count, dtype=jnp.int32)
        )
        flat = lambda x: x.reshape((x.shape[0] * x.shape[1], *x.shape[2:]))  # noqa: E731
        chosen = chosen if part <= block_size else jax.tree.map(flat, chosen)
        return flat(new), errors, chosen

    def row(mine, pivot, place, structure):
        projected = project(mine[0], structure, place % block_size)
        _check_row(projected, n)
        projected = projected.astype(layer.dtype).astype(mine.dtype)[None]
        # A row that fills up the last block has no error.
        true = place < k
        error = (mine - projected) / jnp.where(true, pivot, jnp.ones_like(pivot))
        return projected, jnp.where(true, error, jnp.zeros_like(error)), ()

    new, _, structures = parts(0, dense, upper, jnp.zeros((), jnp.int32), ())
    new = new[:k].astype(layer.dtype)
    return new, jax.tree.map(lambda s: s[:blocks], structures)


def _reached(across: jax.Array, errors: jax.Array, number: jax.Array) -> jax.Array:
    """What the errors of the first `number` parts do to the next one."""
    part = across.shape[1]
    if across.shape[0] <= _SMALL:
        return product(across.T, errors)  # those to come are zero

    def add(i, total):
        theirs = lax.dynamic_slice_in_dim(across, i * part, part)
        return total + product(theirs.T, lax.dynamic_slice_in_dim(errors, i * part, part))

    start = jnp.zeros((part, errors.shape[1]), errors.dtype)
    return lax.fori_loop(0, number, add, start)


def _check_row(row: Any, outputs: int) -> None:
    if jnp.shape(row) != (outputs,):
        rule, got = f"return a row of shape [{outputs}]", _check.describe(row)
        raise ValueError(_check.message("compensate", "project", rule, got))
