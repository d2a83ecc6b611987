"""Factors fitted to the inputs that they really get."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcompress import _check, arrays, tree
from jaxcompress._products import product
from jaxcompress._types import PyTree
from jaxcompress.factorization._basis import as_matrix
from jaxcompress.factorization._decompose import decompose
from jaxcompress.factorization._weighted import root_of
from jaxcompress.factorization._whitened import weight_of
from jaxcompress.solvers import Layout, gram_of, layouts
from jaxcompress.tracing import Statistics


def refit_factors(packed: PyTree, params: PyTree, stats: Mapping[str, Statistics]) -> PyTree:
    r"""The factor on the side of the outputs, fitted anew with the other one held.

    .. math:: \min_V \|X' U V - X' W\|^2 = \|X' U V^* - X' W\|^2, \qquad
        V^* = (R\,U)^+ R\,W, \quad R^\top R = X'^\top X'

    Factors are found for the inputs X of the dense model. In the compressed one the layers
    before have changed them into X', and one linear solve per layer takes that into account. Where
    W is multiplied from the other side, :math:`x W^\top`, it is U that is fitted.

    Args:
        packed: params with `arrays.LowRank` leaves of dense factors, as `jc.pack` gives them.
        params: the dense params that they came from.
        stats: of the compressed function,
            `jc.calibrate(fn, jc.todense(packed), batches, gram=True)`.

    Returns:
        `packed` with new factors, of the same shapes and dtypes; ranks stay as they are. Other
        leaves are not touched. No output of a layer is further from the dense layer's on X' than
        before, up to rounding; directions that X' does not have are left out of the fit.

    Raises:
        ValueError: a leaf of low rank without statistics, or of another shape than in `params`.
        TypeError: factors that are compressed themselves.

    Cost: for each leaf one eigendecomposition of its Gram matrix, one decomposition of an
    `[inputs, rank]` matrix. Works under `jit` and `vmap`.

    Examples:
        >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
        >>> a, b, x = (jax.random.normal(jax.random.key(i), (16, 16)) for i in range(3))
        >>> params = {"a": a, "b": b}
        >>> packed = jc.pack(jc.low_rank(4), params)
        >>> stats = jc.calibrate(fn, jc.todense(packed), [x], gram=True)
        >>> better = jc.factorization.refit_factors(packed, params, stats)
        >>> error = lambda p: float(jnp.linalg.norm(jc.lift(fn)(p, x) - fn(params, x)))
        >>> error(better) < error(packed)
        True

    Source: Wang et al. 2024, SVD-LLM, arXiv:2403.07378, section 3.3. To find both factors for X',
    with as many calibrations as there are layers, use `jc.solvers.sequential`.
    """
    dense = tree.by_path("refit_factors", "params", params)
    leaves = {
        path: w
        for path, w in tree.by_path("refit_factors", "packed", packed).items()
        if isinstance(w, arrays.LowRank)
    }
    for path, w in leaves.items():
        if path not in dense or jnp.shape(dense[path]) != w.shape:
            rule = f"have a leaf of shape {list(w.shape)}, as in `packed`"
            got = _check.describe(dense[path]) if path in dense else "none"
            raise ValueError(_check.message("refit_factors", "params", rule, got, path=path))
        if arrays.is_compressed(w.u) or arrays.is_compressed(w.v):
            rule, got = "have dense factors", f"{type(w.u).__name__} and {type(w.v).__name__}"
            fix = "Fit them before they are quantized."
            raise TypeError(_check.message("refit_factors", "packed", rule, got, fix, path=path))
    new = {}
    for path, (layout, several) in layouts("refit_factors", stats, leaves).items():
        gram = gram_of("refit_factors", path, several, layout)
        weight = weight_of("refit_factors", path, gram, layout)
        new[path] = arrays.LowRank(
            *_refit(leaves[path].u, leaves[path].v, jnp.asarray(dense[path]), weight, layout)
        )
    return tree.map_with_path(lambda path, w: new.get(path, w), packed)


@functools.partial(jax.jit, static_argnums=4)
def _refit(u, v, w, weight, layout: Layout) -> tuple[jax.Array, jax.Array]:
    if w.ndim - 1 in layout.axes:
        root = root_of(weight[0])
        target = root.times(as_matrix(w).T)
        fitted = _least_squares(root.times(v.astype(jnp.float32).T), target).T
        return fitted.reshape(u.shape).astype(u.dtype), v
    factor = layout._replace(shape=u.shape)

    def weighted(leaf: jax.Array, at: Layout) -> jax.Array:
        x = jax.vmap(lambda g, m: root_of(g).times(m))(weight, at.matrices(leaf))
        return as_matrix(at.leaf(x))

    fitted = _least_squares(
        weighted(u.astype(jnp.float32), factor), weighted(w.astype(jnp.float32), layout)
    )
    return u, fitted.astype(v.dtype)


def _least_squares(a: jax.Array, b: jax.Array) -> jax.Array:
    """The smallest x with the least `|a x - b|`, without the directions that are rounding."""
    found = decompose(a, None, "exact")
    noise = max(a.shape) * jnp.finfo(a.dtype).eps * jnp.max(found.s, initial=0.0)
    live = found.s > noise
    inverse = jnp.where(live, 1 / jnp.where(live, found.s, 1.0), 0.0)
    return product(found.vt.T, inverse[:, None] * product(found.u.T, b))
