"""Truncated SVD as a projection."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric
from jaxcompress.factorization._decompose import SVD, Method, check_method, decompose
from jaxcompress.projections import Projection, number_at, of_leaves

_HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.tree_util.register_dataclass, data_fields=["vectors"], meta_fields=["left"])
@dataclasses.dataclass(frozen=True)
class Basis:
    """The subspace of a leaf, seen as a matrix of `prod(shape[:-1])` by `shape[-1]`.

    Attributes:
        vectors: float32, orthonormal singular vectors in the columns; zero columns beyond
            the rank.
        left: static. Whether they span columns (left) or rows (right) of the matrix: those
            of the shorter side.
    """

    vectors: jax.Array
    left: bool

    def project(self, w: jax.Array) -> jax.Array:
        """The orthogonal projection on the subspace, by two thin products."""
        return automatic(
            lambda w, q: (
                _product(*_factors(_matrix(w), q, self.left)).reshape(w.shape).astype(w.dtype)
            ),
            w,
            self.vectors,
            like_first=True,
        )

    def pack(self, w: Any, path: str) -> arrays.LowRank:
        """The two factors, without the columns beyond the rank."""
        del path
        dense = arrays.todense(w)
        vectors = np.asarray(self.vectors)
        vectors = jnp.asarray(vectors[:, (vectors != 0).any(axis=0)])
        u, v = _factors(_matrix(dense), vectors, self.left)
        u = u.reshape(dense.shape[:-1] + u.shape[-1:])
        return arrays.LowRank(u.astype(dense.dtype), v.astype(dense.dtype))


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

    Cost: `find` is an `svd`, which one search of `rank` or `energy` under `vmap` shares;
    `project` two products, O(m n r). `pack`
    gives r (m + n) numbers, and leaves a leaf dense where these are not fewer.

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
            rows, width = math.prod(w.shape[:-1]), w.shape[-1]
            limit = min(rows, width) if columns is None else min(rows, width, columns)
            left = rows <= width

            def vectors(w, knob):
                found = decompose(jax.lax.stop_gradient(_matrix(w)), limit, method)
                q = found.u if left else found.vt.T
                kept = jnp.round(knob) if energy is None else _rank_of_energy(found, knob)
                # A product, so that NaN is not hidden; the columns beyond the rank are zero.
                live = jnp.arange(limit, dtype=jnp.float32) < kept
                return jnp.where(live[None, :], q, 0.0)

            return Basis(automatic(vectors, w, knob, like_first=False), left)

        return tree.map_arrays_with_path(leaf, params)

    return of_leaves(find)


def column_limit(function: str, rank: Numeric | None, max_rank: int | None) -> int | None:
    """How many columns to hold: `max_rank`, else a static rank, else all of them (None)."""
    if rank is not None:
        _check.numeric(function, "rank", rank, 0)
    if max_rank is not None:
        _check.integer(function, "max_rank", max_rank, 0)
        return int(max_rank)
    return round(float(rank)) if isinstance(rank, (int, float, np.number)) else None


def require_matrix(function: str, path: str, w: jax.Array) -> None:
    """Refuses leaves that can't be seen as a matrix of floats."""
    _check.floating(function, "params", w, path)
    if w.ndim < 2:
        raise ValueError(
            _check.message(
                function,
                "params",
                "have leaves of two or more dimensions",
                _check.describe(w),
                "Choose other leaves with jc.masked(p, where).",
                path=path,
            )
        )


def _rank_of_energy(found: SVD, energy: jax.Array) -> jax.Array:
    """The smallest rank whose squared singular values hold the fraction of their sum."""
    # Summed from the smallest up, so that the tail is exact where it decides.
    beyond = jnp.square(found.error)
    dropped = jnp.cumsum(jnp.square(found.s)[::-1])[::-1] + beyond
    total = jnp.sum(jnp.square(found.s)) + beyond
    return jnp.sum((dropped > (1.0 - energy) * total).astype(jnp.float32))


def _matrix(w: jax.Array) -> jax.Array:
    return w.reshape(math.prod(w.shape[:-1]), w.shape[-1]).astype(jnp.float32)


def _factors(matrix: jax.Array, q: jax.Array, left: bool) -> tuple[jax.Array, jax.Array]:
    if left:
        return q, jnp.matmul(q.T, matrix, precision=_HIGHEST)
    return jnp.matmul(matrix, q, precision=_HIGHEST), q.T


def _product(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(u, v, precision=_HIGHEST)
