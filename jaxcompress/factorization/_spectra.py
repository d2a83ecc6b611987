"""The singular values of all leaves, and ranks for them under one budget."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.factorization._basis import as_matrix, require_matrix
from jaxcompress.factorization._budget import RankAllocation, allocate_ranks
from jaxcompress.factorization._decompose import decompose
from jaxcompress.factorization._whitened import weight_of, weighted_matrix
from jaxcompress.solvers import gram_of, layouts
from jaxcompress.tracing import Site, Statistics


def spectra(
    params: PyTree,
    *,
    stats: Mapping[str, Statistics] | None = None,
    where: tree.Where = tree.is_weight,
    center: bool = False,
) -> dict[str, jax.Array]:
    r"""The singular values of each leaf, by its path, falling.

    .. math:: \sigma(W) \quad\text{or with statistics}\quad \sigma\big((X^\top X)^{1/2}\,W\big)

    The sum of the squares beyond a rank is the squared error of the leaf, or of its outputs,
    that `jc.compress` with `jc.low_rank` leaves.

    Args:
        params: any pytree; leaves are seen as matrices by their last axis, as `jc.low_rank` does.
        stats: from `jc.calibrate(fn, params, batches, gram=True)`, or None.
        where: static. The leaves, see `jaxcompress.tree.select`.
        center: static. As in `jc.low_rank`.

    Returns:
        float32, of shape [min(m, n)] for each chosen leaf.

    Raises:
        ValueError: a chosen leaf has fewer than two dimensions, or with `stats` none that fit.
        TypeError: a chosen leaf is not real floating point.

    Cost: one singular value decomposition of each leaf, without vectors; without statistics one of
    the smaller Gram matrix.

    Examples:
        >>> jc.factorization.spectra({"w": jnp.diag(jnp.array([1.0, 3.0])), "b": jnp.ones(2)})
        {'w': Array([3., 1.], dtype=float32)}

    Source: Eckart & Young 1936; with statistics Wang et al. 2024, arXiv:2403.07378.
    """
    leaves = chosen_matrices("spectra", params, where)
    if stats is None:
        return {path: automatic(_values, w, like_first=False) for path, w in leaves.items()}
    found = {}
    for path, (layout, several) in layouts("spectra", stats, leaves).items():
        gram = gram_of("spectra", path, several, layout)
        weight = weight_of("spectra", path, gram, layout, several if center else None)
        weighted = functools.partial(_weighted_values, layout=layout)
        found[path] = automatic(weighted, leaves[path], weight, like_first=False)
    return found


def budgeted_ranks(
    params: PyTree,
    fraction: ArrayLike | None = None,
    total: ArrayLike | None = None,
    *,
    stats: Mapping[str, Statistics] | None = None,
    cost: Literal["parameters", "bytes"] | Sequence[Site] = "parameters",
    importance: Mapping[str, ArrayLike] | None = None,
    align: int = 1,
    min_rank: int = 1,
    where: tree.Where = tree.is_weight,
    center: bool = False,
) -> RankAllocation:
    r"""Ranks of all leaves with the least sum of errors under one budget.

    `allocate_ranks` of the `spectra` of the leaves. Each leaf may stay dense, and does where
    factors would not be cheaper.

    Args:
        params: any pytree.
        fraction: the budget, 0 to 1, as a fraction of the cost of the chosen leaves dense. May be
            traced.
        total: instead of it, the budget itself.
        stats: as in `spectra`: errors are then those of the outputs.
        cost: static. What the budget is of: `"parameters"`; `"bytes"`, in the dtype of each
            leaf; or the sites of the function, `jc.sites(fn, params, x)`, for their
            floating-point operations under `jc.lift`.
        importance: as in `allocate_ranks`; `measured_importance` finds them.
        align: static. As in `allocate_ranks`: ranks are multiples of it, or the leaf is dense.
        min_rank: static. As in `allocate_ranks`.
        where: static. The leaves, see `jaxcompress.tree.select`.
        center: static. As in `jc.low_rank`.

    Returns:
        A `RankAllocation`: ranks and the predicted loss. Hand its ranks to `jc.low_rank`, for the
        same leaves.

    Raises:
        ValueError: as `spectra` and `allocate_ranks`; a chosen leaf is used by no site.
        TypeError: as `spectra`.

    Cost: that of `spectra` and `allocate_ranks`. Budgets under `vmap` share one decomposition.

    Examples:
        >>> a, b = jnp.diag(jnp.arange(1.0, 9.0)), jnp.full((8, 8), 2.0)
        >>> found = jc.factorization.budgeted_ranks({"a": a, "b": b}, 0.7)
        >>> {path: int(rank) for path, rank in found.ranks.items()}
        {'a': 8, 'b': 1}
        >>> packed = jc.pack(jc.low_rank(found.ranks), {"a": a, "b": b})
        >>> {path: type(w).__name__ for path, w in packed.items()}
        {'a': 'ArrayImpl', 'b': 'LowRank'}

    Source: see `allocate_ranks`.
    """
    values = spectra(params, stats=stats, where=where, center=center)
    leaves = chosen_matrices("budgeted_ranks", params, where)
    shapes = {p: (math.prod(w.shape[:-1]), w.shape[-1]) for p, w in leaves.items()}
    return allocate_ranks(
        values,
        shapes,
        fraction,
        total,
        cost=_costs(cost, leaves, shapes),
        importance=importance,
        align=align,
        min_rank=min_rank,
    )


def _costs(cost: Any, leaves: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> Any:
    """From each path to the costs of the dense leaf and of one rank."""
    if isinstance(cost, str):
        if cost == "parameters":
            return cost
        if cost != "bytes":
            rule = 'be "parameters", "bytes" or what jc.sites returns'
            raise ValueError(_check.message("budgeted_ranks", "cost", rule, repr(cost)))
        each = {path: w.dtype.itemsize for path, w in leaves.items()}
        return {p: (math.prod(s) * each[p], sum(s) * each[p]) for p, s in shapes.items()}
    dense, each = dict.fromkeys(leaves, 0.0), dict.fromkeys(leaves, 0.0)
    for site in cost:
        if site.path in dense:
            shape = leaves[site.path].shape
            (m, n), outside = shapes[site.path], 1
            for axis, size in enumerate(shape[:-1]):
                # Of heads and layers each has a second product of its own.
                outside *= 1 if site.axes is None or axis in site.axes else size
            outside = 1 if site.axes == (len(shape) - 1,) else outside
            dense[site.path] += site.flops
            each[site.path] += site.flops * (m + outside * n) / (m * n)
    for path, count in dense.items():
        if not count:
            rule, got = "have a site of each chosen leaf", "none"
            raise ValueError(_check.message("budgeted_ranks", "cost", rule, got, path=path))
    return {path: (dense[path], each[path]) for path in leaves}


def chosen_matrices(function: str, params: PyTree, where: tree.Where) -> dict[str, Any]:
    """The leaves that `where` chooses, by their paths, each of two or more dimensions."""
    picked = jax.tree.leaves(tree.select(params, where, function=function))
    flat = zip(tree.leaves_with_paths(params), picked, strict=True)
    leaves = {path: w for (path, w), hit in flat if hit}
    for path, w in leaves.items():
        require_matrix(function, path, w)
    return leaves


@jax.jit
def _values(w: jax.Array) -> jax.Array:
    return decompose(as_matrix(w), None, "gram").s


@functools.partial(jax.jit, static_argnames="layout")
def _weighted_values(w: jax.Array, weight: jax.Array, *, layout: Any) -> jax.Array:
    return jnp.linalg.svd(weighted_matrix(w, weight, layout), compute_uv=False)
