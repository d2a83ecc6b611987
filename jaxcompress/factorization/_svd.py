"""Truncated SVD as a projection."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric
from jaxcompress.factorization._basis import (
    Basis,
    Kept,
    as_matrix,
    column_limit,
    is_wide,
    kept_columns,
    require_matrix,
    side_limit,
)
from jaxcompress.factorization._decompose import Method, check_method, decompose
from jaxcompress.factorization._whitened import whitened_rows
from jaxcompress.projections import Projection, by_leaf, number_at, of_leaves


def low_rank(
    rank: Numeric | Mapping[str, Numeric] | None = None,
    energy: Numeric | Mapping[str, Numeric] | None = None,
    *,
    max_rank: int | None = None,
    method: Method = "auto",
    center: bool = False,
) -> Projection:
    r"""The nearest matrix of a given rank: the truncated singular value decomposition.

    .. math:: W = U S V^\top \;\mapsto\; U_r U_r^\top W

    A leaf is seen as a matrix of `prod(shape[:-1])` rows and `shape[-1]` columns: a Flax
    kernel by its outputs. A held structure projects on the held subspace.

    Args:
        rank: :math:`r`, at least 0; from the full rank on the leaf stays as it is, to the last
            bit. A number, a JAX scalar or an Optax schedule; may be traced. Rounded to an
            integer. Or a mapping from the path of each chosen leaf to one of these, such as
            `jc.factorization.budgeted_ranks(…).ranks`.
        energy: instead of `rank`: the smallest :math:`r` that holds this fraction, 0 to 1, of
            the sum of the *squared* singular values of the leaf. May be traced, or a mapping.
        max_rank: static. The most columns that the structure may hold; by default `rank`
            where that is a Python number, else the full rank.
        method: static. How the singular vectors are found, see `jc.factorization.svd`. A sketch
            is taken only where it is much cheaper: of large leaves with a small `max_rank`.
        center: static. With statistics: whether only what varies in the outputs counts, not
            their means. Then call `jc.solvers.correct_bias`, which restores the means, and
            calibrate with `moments=True`. Means beyond 300 standard deviations of their
            feature leave no digits of float32 to the variance.

    Returns:
        A projection whose structure has a `Basis` per leaf. The error in the Frobenius norm is
        the root of the sum of the dropped squared singular values. A NaN or infinite entry
        makes the whole leaf NaN. Rank 0 gives zeros. All-zero and empty leaves stay as they are.
        Gradients are those of the projection on the held subspace, finite also where singular
        values repeat.

    Raises:
        ValueError: both or none of `rank` and `energy`, or one out of range; a chosen leaf
            has fewer than two dimensions; a mapping that lacks a leaf or names one that is not
            chosen.
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
    _require("rank", rank, None)
    _require("energy", energy, 1)
    check_method("low_rank", method)
    by_energy = rank is None

    def numbers(params, step) -> dict[str, Kept]:
        given = by_leaf(
            "low_rank",
            "energy" if by_energy else "rank",
            energy if by_energy else rank,  # pyright: ignore[reportArgumentType]
            params,
        )
        kept = {}
        for path, each in given.items():
            columns = column_limit("low_rank", None if by_energy else each, max_rank)
            kept[path] = Kept(number_at(each, step).astype(jnp.float32), by_energy, columns)
        return kept

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads
        kept = numbers(params, step)

        def leaf(path, w):
            require_matrix("low_rank", path, w)
            limit, left = side_limit(w.shape, kept[path].columns), is_wide(w.shape)

            def vectors(w, knob):
                found = decompose(jax.lax.stop_gradient(as_matrix(w)), limit, method)
                q = found.u if left else found.vt.T
                return kept_columns(q, found, knob, by_energy)

            return Basis(automatic(vectors, w, kept[path].knob, like_first=False), left)

        return tree.map_arrays_with_path(leaf, params)

    def rows(params, *, step=0):
        tree.map_arrays_with_path(lambda path, w: require_matrix("low_rank", path, w), params)
        return whitened_rows(params, numbers(params, step), method, center)

    return of_leaves(find, rows=rows)


def _require(name: str, given: Numeric | Mapping[str, Numeric] | None, high: int | None) -> None:
    if isinstance(given, Mapping):
        for path, each in given.items():
            _check.numeric("low_rank", f"{name}[{path!r}]", each, 0, high)
    elif given is not None:
        _check.numeric("low_rank", name, given, 0, high)
