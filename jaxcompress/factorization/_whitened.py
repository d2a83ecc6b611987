"""Low rank in the space of outputs: the whitened decomposition of a leaf."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._products import product
from jaxcompress._types import PyTree
from jaxcompress.factorization._basis import (
    Basis,
    Kept,
    as_matrix,
    is_wide,
    kept_columns,
    side_limit,
    unless_whole,
)
from jaxcompress.factorization._decompose import SVD, Method, decompose
from jaxcompress.factorization._weighted import root_of
from jaxcompress.projections import RowRule, Rows
from jaxcompress.solvers import Layout, mean_inputs
from jaxcompress.tracing import Statistics


def whitened_rows(params: PyTree, kept: Mapping[str, Kept], method: Method, center: bool) -> Rows:
    """What `jc.compress(…, stats=…)` does with leaves of low rank, each as a whole.

    Args:
        params: the dense leaves.
        kept: how much of each.
        method: static. Of the decomposition.
        center: static. Whether the means of the inputs count for nothing.
    """
    data: Mapping[str, Any] = dict(tree.leaves_with_paths(params))

    def whole(path, w, gram, layout, several) -> tuple[jax.Array, Basis]:
        weight = weight_of("compress", path, gram, layout, several if center else None)
        each = kept[path]
        limit = side_limit(w.shape, each.columns)
        return _solved(w, weight, each.knob, each.energy, layout, limit, method)

    return Rows(no_rows, data, {}, structure=lambda path, chosen: chosen, whole=whole)


def weight_of(
    function: str,
    path: str,
    gram: jax.Array,
    layout: Layout,
    centered_by: list[Statistics] | None = None,
) -> jax.Array:
    """The weights of a leaf's rows, `[matrices, features, features]`: its Gram matrices.

    Args:
        function: for errors.
        path: for errors.
        gram: as of `jc.solvers.gram_of`.
        layout: of the leaf; refused where the leaf, by its last axis, is not its matrix.
        centered_by: the statistics from whose means it is centred, or None.
    """
    last = len(layout.shape) - 1
    if last in layout.axes and (len(layout.axes) > 1 or layout.stacked or layout.groups > 1):
        rule = "sum over the last axis alone, or not over it"
        got = f"a product over the axes {layout.axes}"
        raise ValueError(_check.message(function, "params", rule, got, path=path))
    if centered_by is None:
        return gram
    mean = mean_inputs(function, path, centered_by)
    if mean.shape[-1] != layout.features or layout.groups > 1:
        rule, got = "have one mean for each feature to be centred", "those of a convolution"
        fix = "Leave it to another projection, by jc.partition, or pass center=False."
        raise ValueError(_check.message(function, "stats", rule, got, fix, path=path))
    rows = mean.reshape((-1, layout.features, 1))
    counts = [one.gram.count for one in centered_by if one.gram is not None]
    count = sum(counts[1:], counts[0]).reshape((-1, 1, 1))
    return gram - count * rows * jnp.swapaxes(rows, 1, 2)


def weighted_matrix(w: jax.Array, weight: jax.Array, layout: Layout) -> jax.Array:
    """The leaf times the roots of its weights, by its last axis, in float32; NaN counts as zero."""
    w = _without_nan(w)
    weighted = jax.vmap(lambda g, m: root_of(g).times(m))(weight, layout.matrices(w))
    return as_matrix(layout.leaf(weighted))


def _without_nan(w: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(w), jnp.zeros_like(w), w).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(3, 4))
def whitened_factors(
    w: jax.Array, weight: jax.Array, kept: jax.Array, layout: Layout, limit: int
) -> tuple[jax.Array, jax.Array]:
    """The factors u and v of a rank, as matrices, by which the outputs change least."""
    w = _without_nan(w)
    found = decompose(weighted_matrix(w, weight, layout), limit, "exact")
    return _factors(w, _side(found, layout, kept, False), layout)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _solved(w, weight, knob, energy: bool, layout: Layout, limit: int, method: Method):
    """The leaf and its basis."""
    wide, w32 = is_wide(w.shape), _without_nan(w)
    # Nearly dependent inputs need all digits of it.
    how = "exact" if method == "auto" else method
    found = decompose(weighted_matrix(w32, weight, layout), limit, how)
    q = _side(found, layout, knob, energy)
    new = product(*_factors(w32, q, layout))
    if _on_rows(layout) == wide:
        # The subspace of the new leaf on its shorter side, as `find` gives it.
        other = decompose(new, limit, "gram")
        live = jnp.any(q != 0, axis=0)[None, :]
        q = jnp.where(live, other.u if wide else other.vt.T, 0.0)
    new = unless_whole(new, as_matrix(w32), q)
    return new.reshape(w.shape).astype(w.dtype), Basis(q, wide)


def _on_rows(layout: Layout) -> bool:
    """Whether the weight is on rows, or on columns where the last axis is summed over.

    In both cases the subspace is on the other side, and nothing is inverted.
    """
    return len(layout.shape) - 1 not in layout.axes


def _side(found: SVD, layout: Layout, knob: jax.Array, energy: bool) -> jax.Array:
    return kept_columns(found.vt.T if _on_rows(layout) else found.u, found, knob, energy)


def _factors(w: jax.Array, q: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    matrix = as_matrix(w)
    return (product(matrix, q), q.T) if _on_rows(layout) else (q, product(q.T, matrix))


def _refused(*args: Any) -> Any:
    del args
    raise AssertionError("a whole leaf has no rows")


no_rows = RowRule(_refused, _refused)
