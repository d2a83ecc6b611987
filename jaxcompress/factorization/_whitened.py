"""Low rank in the space of outputs: the whitened decomposition of a leaf."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.factorization._basis import Basis, as_matrix, is_wide, kept_columns, side_limit
from jaxcompress.factorization._decompose import Method, decompose, product
from jaxcompress.factorization._weighted import root_of
from jaxcompress.projections import RowRule, Rows


def whitened_rows(
    params: PyTree, knob: jax.Array, energy: bool, columns: int | None, method: Method
) -> Rows:
    """What `jc.compress(…, stats=…)` does with leaves of low rank, each as a whole.

    Args:
        params: the dense leaves.
        knob: the rank, or the energy of the weighted leaf.
        energy: static. Which of the two.
        columns: static. The most that a structure holds; None: all.
        method: static. Of the decomposition.
    """
    data: Mapping[str, Any] = dict(tree.leaves_with_paths(params))

    def whole(path: str, w: jax.Array, gram: jax.Array, layout: Any) -> tuple[jax.Array, Basis]:
        last = w.ndim - 1
        if last in layout.axes and (len(layout.axes) > 1 or layout.stacked or layout.groups > 1):
            rule = "sum over the last axis alone, or not over it"
            got = f"a product over the axes {layout.axes}"
            raise ValueError(_check.message("compress", "params", rule, got, path=path))
        limit = side_limit(w.shape, columns)
        return _solved(w, gram, knob, energy, layout, limit, method)

    return Rows(_never, data, {}, structure=lambda path, chosen: chosen, whole=whole)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _solved(w, gram, knob, energy: bool, layout: Any, limit: int, method: Method):
    """The leaf and its basis. The weight is on rows, or on columns where the last axis is
    summed over; in both cases the subspace is on the other side, and nothing is inverted."""
    on_rows, wide = w.ndim - 1 not in layout.axes, is_wide(w.shape)
    matrices = jnp.where(jnp.isnan(w), jnp.zeros_like(w), w).astype(jnp.float32)
    weighted = jax.vmap(lambda g, m: root_of(g).times(m))(gram, layout.matrices(matrices))
    a, matrix = as_matrix(layout.leaf(weighted)), as_matrix(matrices)
    # Nearly dependent inputs need all digits of it.
    found = decompose(a, limit, "exact" if method == "auto" else method)
    q = found.vt.T if on_rows else found.u
    q = kept_columns(q, found, knob, energy)
    new = product(product(matrix, q), q.T) if on_rows else product(q, product(q.T, matrix))
    if on_rows == wide:
        # The subspace of the new leaf on its shorter side, as `find` gives it.
        other = decompose(new, limit, "gram")
        live = jnp.any(q != 0, axis=0)[None, :]
        q = jnp.where(live, other.u if wide else other.vt.T, 0.0)
    return new.reshape(w.shape).astype(w.dtype), Basis(q, wide)


def _refused(*args: Any) -> Any:
    del args
    raise AssertionError("a whole leaf has no rows")


_never = RowRule(_refused, _refused)
