"""Truncated SVD as a projection."""

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric
from jaxcompress.factorization._basis import (
    Basis,
    as_matrix,
    column_limit,
    is_wide,
    kept_columns,
    require_matrix,
    side_limit,
)
from jaxcompress.factorization._decompose import Method, check_method, decompose
from jaxcompress.factorization._whitened import whitened_rows
from jaxcompress.projections import Projection, number_at, of_leaves


def low_rank(
    rank: Numeric | None = None,
    energy: Numeric | None = None,
    *,
    max_rank: int | None = None,
    method: Method = "auto",
) -> Projection:
    r"""The nearest matrix of a given rank: the truncated singular value decomposition.

    .. math:: W = U S V^\top \;\mapsto\; U_r U_r^\top W

    A leaf is seen as a matrix of `prod(shape[:-1])` rows and `shape[-1]` columns: a Flax
    kernel by its outputs. A held structure projects on the held subspace.

    Args:
        rank: :math:`r`, at least 0; above the full rank it counts as full. A number, a JAX
            scalar or an Optax schedule; may be traced. Rounded to an integer.
        energy: instead of `rank`: the smallest :math:`r` that holds this fraction, 0 to 1, of
            the sum of the *squared* singular values of the leaf. May be traced.
        max_rank: static. The most columns that the structure may hold; by default `rank`
            where that is a Python number, else the full rank.
        method: static. How the singular vectors are found, see `jc.factorization.svd`. A sketch
            is taken only where it is much cheaper: of large leaves with a small `max_rank`.

    Returns:
        A projection whose structure has a `Basis` per leaf. The error in the Frobenius norm is
        the root of the sum of the dropped squared singular values. A NaN or infinite entry
        makes the whole leaf NaN. Rank 0 gives zeros. All-zero and empty leaves stay as they are.
        Gradients are those of the projection on the held subspace, finite also where singular
        values repeat.

    Raises:
        ValueError: both or none of `rank` and `energy`, or one out of range; a chosen leaf
            has fewer than two dimensions.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    With statistics (`jc.compress(…, stats=jc.calibrate(…, gram=True))`) the outputs change least
    instead: the whitened decomposition, `energy` is that of the outputs, `method` is exact by
    default, and `damping` is not needed. See `jc.factorization.weighted_svd`.

    Cost: `find` is an `svd`, which one search of `rank` or `energy` under `vmap` shares;
    `project` two products, O(m n r). `pack` gives r (m + n) numbers, and leaves a leaf dense
    where these are not fewer.

    Examples:
        >>> params = {"w": jnp.diag(jnp.array([3.1, 2.1, 0.5]))}
        >>> jc.compress(jc.low_rank(rank=2), params)["w"].diagonal().astype(int)
        Array([3, 2, 0], dtype=int32)
        >>> jc.compress(jc.low_rank(energy=0.6), params)["w"].diagonal().astype(int)
        Array([3, 0, 0], dtype=int32)

    Source: Eckart & Young 1936; for networks Denton et al. 2014, arXiv:1404.0736.
    """
    if (rank is None) == (energy is None):
        raise ValueError(
            _check.message(
                "low_rank",
                "rank",
                "be given, or else `energy`, but not both",
                f"rank={rank!r}, energy={energy!r}",
            )
        )
    if energy is not None:
        _check.numeric("low_rank", "energy", energy, 0, 1)
    check_method("low_rank", method)
    columns = column_limit("low_rank", rank, max_rank)
    wanted: Numeric = energy if rank is None else rank  # pyright: ignore[reportAssignmentType]

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads
        knob = number_at(wanted, step).astype(jnp.float32)

        def leaf(path, w):
            require_matrix("low_rank", path, w)
            limit, left = side_limit(w.shape, columns), is_wide(w.shape)

            def vectors(w, knob):
                found = decompose(jax.lax.stop_gradient(as_matrix(w)), limit, method)
                q = found.u if left else found.vt.T
                return kept_columns(q, found, knob, energy is not None)

            return Basis(automatic(vectors, w, knob, like_first=False), left)

        return tree.map_arrays_with_path(leaf, params)

    def rows(params, *, step=0):
        knob = number_at(wanted, step).astype(jnp.float32)
        tree.map_arrays_with_path(lambda path, w: require_matrix("low_rank", path, w), params)
        return whitened_rows(params, knob, energy is not None, columns, method)

    return of_leaves(find, rows=rows)
