"""Wanda: weights by the size of the inputs that they meet."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import PyTree
from jaxcompress.pruning._score_trees import require_dense, score_of_unchosen, wide
from jaxcompress.solvers import Layout, layouts
from jaxcompress.tracing import Statistics


def wanda(
    params: PyTree, stats: Mapping[str, Statistics], *, where: tree.Where = tree.is_weight
) -> PyTree:
    r"""Each weight times the norm of the input that it meets, :math:`|W_{ij}|\,\|X_i\|_2`.

    Args:
        params: any pytree of dense arrays.
        stats: from `jc.calibrate(fn, params, batches, moments=True)`, or with `gram=True`
            instead, whose diagonal is read. A convolution needs the latter: each place of its
            kernel meets other inputs; so does a leaf of three or more dimensions that sums
            over all but one, as it might be one.
        where: static. Which leaves, as in `jc.masked`; give `jc.prune` the same ones.

    Returns:
        A tree of scores: shapes of `params`, in float32 or wider. Other floating-point leaves
        hold infinity (they are not to go), those of other dtypes zeros, and what is no array
        None. A leaf with several sites meets all their inputs; layers of a scan each their
        own. The paper compares within an output: `scope=-1` in `jc.prune` for a kernel
        `(inputs, outputs)`.

    Raises:
        ValueError: chosen leaves without statistics (embeddings have none), with statistics
            of too little, or of which sites use only a part.
        TypeError: a chosen leaf is not real floating point, or a value of `stats` is not
            `Statistics`.

    Cost: one pass over the weights. `moments` are far cheaper than Gram matrices.

    Examples:
        >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
        >>> fn = lambda p, x: x @ p["w"]
        >>> stats = jc.calibrate(fn, params, [jnp.array([[3.0, 0.5], [4.0, 0.0]])], moments=True)
        >>> jc.pruning.wanda(params, stats)["w"]
        Array([[ 5.  , 10.  ],
               [ 1.5 ,  0.25]], dtype=float32)

    Source: Sun et al. 2023, arXiv:2306.11695, equation 1.
    """
    for name, one in stats.items():
        if not isinstance(one, Statistics):
            rule, got = "be what jc.calibrate returns", _check.describe(one)
            raise TypeError(_check.message("wanda", "stats", rule, got, path=name))
    chosen = jax.tree.leaves(tree.select(params, where, function="wanda"))
    leaves = [
        (path, w) for (path, w), c in zip(tree.leaves_with_paths(params), chosen, strict=True) if c
    ]
    for path, w in leaves:
        require_dense("wanda", w, path)
    found = {}
    for path, (layout, several) in layouts("wanda", stats, dict(leaves)).items():
        squares = [_squared_norms(path, one, layout) for one in several]
        found[path] = _scaled(layout, dict(leaves)[path], jnp.sqrt(sum(squares[1:], squares[0])))
    return tree.map_with_path(
        lambda path, w: found[path] if path in found else score_of_unchosen(w), params
    )


def _scaled(layout: Layout, w: jax.Array, norms: jax.Array) -> jax.Array:
    def scale(w, norms):
        matrices = layout.matrices(jnp.abs(wide(w)))
        return layout.leaf(matrices * norms.astype(matrices.dtype)[:, :, None])

    return automatic(scale, jnp.asarray(w), norms, like_first=True)


def _squared_norms(path: str, one: Statistics, layout: Layout) -> jax.Array:
    """Of each feature, summed over tokens: `[layers * groups, features]`."""
    free = [n for i, n in enumerate(layout.shape[layout.stacked :], layout.stacked) if n != 1]
    free = len(free) - sum(layout.shape[a] != 1 for a in layout.axes)
    # A convolution has one axis of outputs, and its moments are those of whole channels.
    enough = free > 1 or len(layout.shape) - layout.stacked <= 2
    if one.gram is not None:
        squares = jnp.diagonal(one.gram.matrix, axis1=-2, axis2=-1)
    elif one.moments is not None and enough and one.moments.mean.ndim == layout.stacked + 1:
        mean, variance = one.moments.mean, one.moments.variance
        squares = jnp.expand_dims(one.moments.count, -1) * (variance + jnp.square(mean))
    else:
        wanted = "moments" if enough and one.moments is None else "gram"
        rule = f"hold {'moments' if wanted == 'moments' else 'Gram matrices'} for this leaf"
        fix = f"Call jc.calibrate(…, {wanted}=True)."
        got = "statistics without"
        raise ValueError(_check.message("wanda", "stats", rule, got, fix, path=path))
    if squares.shape[-1] != layout.features:
        rule = f"have {layout.features} features, as the leaf has"
        got = _check.describe(squares)
        raise ValueError(_check.message("wanda", "stats", rule, got, path=path))
    if not _check.is_traced(squares) and not bool(jnp.isfinite(squares).all()):
        rule, got = "be finite", "statistics with NaN or infinities"
        raise ValueError(_check.message("wanda", "stats", rule, got, path=path))
    return squares.reshape((-1, layout.features))
