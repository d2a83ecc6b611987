"""Low rank plus something: the error of any projection, corrected by two thin factors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._dtypes import wide
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric, PyTree
from jaxcompress.factorization._basis import as_matrix, column_limit, require_matrix, side_limit
from jaxcompress.factorization._correction import Correction, correcting_rows
from jaxcompress.factorization._decompose import Method, check_method, decompose
from jaxcompress.projections import (
    Chained,
    Projection,
    chain,
    number_at,
    observed,
    of_leaves,
    rows_of,
)
from jaxcompress.projections._base import choose


def low_rank_plus(
    base: Projection,
    rank: Numeric,
    *,
    iterations: int = 5,
    max_rank: int | None = None,
    method: Method = "auto",
) -> Projection:
    r"""A projection whose error is corrected by a matrix of low rank: LQER, LoftQ, GoDec.

    .. math:: W \;\mapsto\; P(W - U V) + U V

    P is any projection: `jc.quantize(4)` for quantized plus low-rank weights, `jc.prune(0.9)` for
    sparse plus low-rank ones. Its structure and the factors are found in turn, from UV = 0,

    .. math:: S_t = P(W - U_{t-1} V_{t-1}), \qquad
        U_t V_t = \operatorname{SVD}_r(W - S_t)

    with the structure of P found anew each time, and the pair is kept for which the weights are
    nearest to W, summed over all leaves. The error never grows with `iterations`.

    Args:
        base: P, any projection.
        rank: r, at least 0; above the full rank it counts as full. A number, a JAX scalar or an
            Optax schedule; may be traced. Rounded to an integer.
        iterations: static. t, at least 1. With 1 the factors are those of LQER.
        max_rank: static. Number of columns of the factors; by default `rank` where that is a
            Python number, else the full rank.
        method: static. Of the decompositions, see `jc.factorization.svd`.

    Returns:
        A projection whose structure is that of a `jc.chain`: `Correction`s that are taken off, the
        structure of `base`, and the same ones put back. `pack` gives `arrays.Sum` of the packed
        base and `arrays.LowRank` where these are smaller than the dense leaf, which `jc.lift` runs
        and `jc.factorization.adapter_mask` lets train on. Rank 0 is `base` alone. A leaf that
        `base` does not touch stays as it is. A NaN or infinite entry makes its leaf NaN. It is
        idempotent as far as the dtype resolves steps of `base` beside UV.

    Raises:
        ValueError: `rank` below 0, `iterations` below 1; a chosen leaf is compressed already, or
            has fewer than two dimensions.
        TypeError: `base` is not a `Projection`; a chosen leaf is not real floating point.

    With statistics (`jc.compress(…, stats=…)`) the base is projected for its outputs, by GPTQ or
    SparseGPT, and the factors are those by which the outputs of W - S change least, in closed form
    (QERA): one round, whatever `iterations`.

    Cost: `find` is t times a `find` of `base` and an `svd`: hold it with `jc.every` in training.
    `project` is that of `base` and a thin product; r (m + n) numbers more.

    Examples:
        >>> w = jax.random.normal(jax.random.key(0), (64, 64))
        >>> def error(p):
        ...     return float(jnp.linalg.norm(jc.compress(p, w) - w))
        >>> plain, lqer, loftq = (
        ...     error(p)
        ...     for p in (
        ...         jc.quantize(3),
        ...         jc.factorization.low_rank_plus(jc.quantize(3), 4, iterations=1),
        ...         jc.factorization.low_rank_plus(jc.quantize(3), 4),
        ...     )
        ... )
        >>> plain > lqer > loftq
        True
        >>> jc.pack(jc.factorization.low_rank_plus(jc.quantize(3), 4), w).nbytes, w.nbytes
        (3840, 16384)

    Source: Zhang et al. 2024, arXiv:2402.02446 (LQER); Li et al. 2023, arXiv:2310.08659, algorithm
    1 (LoftQ); Zhou & Tao 2011, "GoDec"; with statistics Zhang et al. 2024, arXiv:2410.06040 (QERA).
    Differs: the base part is P(W - UV) for the last factors,
    on the grid held, where the papers keep the P(W - UV) before them; that is nearer to W. The
    best pair is kept, not the last.
    """
    if not isinstance(base, Projection):
        chain(base)  # for its error
    _check.numeric("low_rank_plus", "rank", rank, 0)
    _check.integer("low_rank_plus", "iterations", iterations, 1)
    check_method("low_rank_plus", method)
    columns = column_limit("low_rank_plus", rank, max_rank)
    raw = _plus(base.everywhere or base, rank, iterations, columns, method)
    return choose(raw, tree.is_weight, function="find")._replace(everywhere=raw)


def _plus(
    base: Projection, rank: Numeric, iterations: int, columns: int | None, method: Method
) -> Projection:
    """The same on all leaves that it is given."""
    shift = of_leaves(_by_find).everywhere
    assert shift is not None
    chained = chain(shift, base, shift)

    def find(params, *, previous=None, grads=None, step=0):
        paths, dense, treedef = _matrices(params)
        dense = [wide(jax.lax.stop_gradient(w)) for w in dense]
        dtypes = [np.dtype(w.dtype) for w in jax.tree.leaves(params)]
        held = None if previous is None else previous.parts[1]
        knob = jnp.round(number_at(rank, step).astype(jnp.float32))

        def corrections(factors, put_back):
            return {
                path: Correction(u, v, put_back, dtype)
                for path, (u, v), dtype in zip(paths, factors, dtypes, strict=True)
            }

        def nearer(factors):
            """The structure of the base and new factors, and how far they are from the leaves."""
            rest = treedef.unflatten(dense)
            if factors is not None:
                rest = shift.project(rest, corrections(factors, False))
            found = base.find(rest, previous=held, grads=grads, step=step)
            based = jax.tree.leaves(base.project(rest, found))
            new = [
                _factors(w - s, knob, side_limit(w.shape, columns), method, dtype)
                for w, s, dtype in zip(dense, based, dtypes, strict=True)
            ]
            rest = shift.project(treedef.unflatten(dense), corrections(new, False))
            left = jax.tree.map(lambda w, s: w - s, rest, base.project(rest, found))
            return found, new, _square(jax.tree.leaves(left))

        def again(_, state):
            factors, best = state
            now = nearer(factors)
            better = now[2] < best[2]
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)
            return now[1], best

        first = nearer(None)
        found, factors, _ = first
        if iterations > 1:
            state = (factors, first)
            found, factors, _ = jax.lax.fori_loop(1, iterations, again, state)[1]
        # Buffers of its own: a step may donate the structure.
        twice = jax.tree.map(jnp.array, factors)
        return Chained((corrections(factors, False), found, corrections(twice, True)))

    def rows(params, *, step=0):
        paths, dense, _ = _matrices(params)
        knob = jnp.round(number_at(rank, step).astype(jnp.float32))
        before, after = correcting_rows(dict(zip(paths, dense, strict=True)), knob, columns)
        return Chained((before, rows_of(base, params, step), after))

    def observe(params, structure, *, grads=None, step=0):
        before, inside, after = structure.parts
        rest = shift.project(params, before)
        return Chained((before, observed(base, rest, inside, grads, step), after))

    return Projection(
        find,
        chained.project,
        chained.pack,
        observe=None if base.observe is None else observe,
        rows=None if base.rows is None else rows,
    )


def _matrices(params: PyTree) -> tuple[list[str], list[jax.Array], Any]:
    """The leaves and their paths; refuses compressed ones."""
    for path, w in tree.leaves_with_paths(params):
        if tree.is_array_like(w):
            rule, got = "have dense leaves", type(w).__name__
            fix = "Pass the dense params, or jc.todense of them."
            raise ValueError(_check.message("low_rank_plus", "params", rule, got, fix, path=path))
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [tree.path_string(path) for path, _ in flat]
    tree.require_distinct("find", "params", paths)
    for path, (_, w) in zip(paths, flat, strict=True):
        require_matrix("low_rank_plus", path, w)
    return paths, [w for _, w in flat], treedef


def _factors(
    w: jax.Array, rank: jax.Array, width: int, method: Method, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """The balanced factors of the truncated SVD, in the dtype in which they are kept."""

    def split(w, rank):
        u, s, vt, _ = decompose(as_matrix(w), width, method)
        live, root = jnp.arange(width, dtype=jnp.float32) < rank, jnp.sqrt(s)
        u = jnp.where(live[None, :], u * root[None, :], 0.0)
        v = jnp.where(live[:, None], root[:, None] * vt, 0.0)
        return u.reshape((*w.shape[:-1], width)).astype(dtype), v.astype(dtype)

    return automatic(split, w, rank, like_first=False)


def _square(leaves: list[jax.Array]) -> jax.Array:
    """The sum of all squares; leaves that are not finite, which nothing makes better, aside."""
    total = jnp.zeros((), jnp.float32)
    for x in leaves:
        square = jnp.sum(jnp.square(x.astype(jnp.float32)))
        total = total + jnp.where(jnp.isfinite(square), square, 0.0)
    return total


def _by_find(*args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    raise AssertionError("corrections are found with the structure of the base")
