"""Training the factors of low-rank weights."""

import functools

import jax
import jax.numpy as jnp

from jaxcompress import _check, arrays, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric, PyTree
from jaxcompress.factorization._basis import as_matrix, column_limit, require_matrix, side_limit
from jaxcompress.factorization._decompose import decompose
from jaxcompress.projections import Reparametrization, number_at


def low_rank_factors(
    rank: Numeric, *, max_rank: int | None = None, where: tree.Where = tree.is_weight
) -> Reparametrization:
    r"""Weights as products of two trained factors, :math:`W = U V`.

    The factors start at the truncated SVD, :math:`U_r S_r^{1/2}` and :math:`S_r^{1/2} V_r^\top`,
    which are balanced: :math:`U^\top U = V V^\top`.

    Args:
        rank: :math:`r`, at least 1; above the full rank it counts as full. May be traced: the
            columns beyond it then start at zero, and stay there under the gradient.
        max_rank: static. Number of columns; by default `rank` where that is a Python number,
            else the full rank.
        where: static. The leaves to factorize, see `jaxcompress.tree.select`.

    Returns:
        A `Reparametrization` whose latents are the params with `arrays.LowRank(u, v)` at the
        chosen leaves, of shapes `shape[:-1] + (r,)` and `(r, shape[-1])`.
        `jc.pack(opt_state, params)` gives them.

    Raises:
        ValueError: `rank` below 1; a chosen leaf has fewer than two dimensions.
        TypeError: a chosen leaf is not real floating point.

    Cost: one `jc.factorization.svd` per leaf in `init`, one product of the factors per step.

    Examples:
        >>> opt = jc.reparametrized(optax.adam(1e-3), jc.low_rank_factors(rank=2))
        >>> jc.latent(opt.init({"w": jnp.ones((6, 4))}))["w"].u.shape
        (6, 2)

    Source: Sainath et al. 2013, "Low-rank matrix factorization for deep neural network
    training"; started from the SVD as in Denton et al. 2014, arXiv:1404.0736.
    """
    _check.numeric("low_rank_factors", "rank", rank, 1)
    columns = column_limit("low_rank_factors", rank, max_rank)

    def init(params: PyTree) -> PyTree:
        chosen = tree.select(params, where, function="low_rank_factors")

        def leaf(path, w, is_chosen):
            if not is_chosen:
                return jnp.asarray(w) if hasattr(w, "dtype") else w
            require_matrix("low_rank_factors", path, w)
            width = side_limit(w.shape, columns)
            kept = jnp.round(number_at(rank, 0).astype(jnp.float32))
            u, v = automatic(functools.partial(_balanced, width=width), w, kept, like_first=False)
            return arrays.LowRank(u, v)

        return tree.map_with_path(leaf, params, chosen)

    return Reparametrization(init, arrays.todense)


def _balanced(w: jax.Array, rank: jax.Array, *, width: int) -> tuple[jax.Array, jax.Array]:
    u, s, vt, _ = decompose(as_matrix(w), width)
    root = jnp.sqrt(s) * (jnp.arange(width, dtype=jnp.float32) < rank).astype(jnp.float32)
    u = (u * root[None, :]).reshape(w.shape[:-1] + (width,))
    return u.astype(w.dtype), (root[:, None] * vt).astype(w.dtype)
