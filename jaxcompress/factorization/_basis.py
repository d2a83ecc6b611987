"""The subspace of a leaf, and the leaf seen as a matrix."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric
from jaxcompress.factorization._decompose import SVD
from jaxcompress.factorization._ranks import rank_of_energy


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

        def projected(w, q):
            new = product(*_factors(as_matrix(w), q, self.left)).reshape(w.shape).astype(w.dtype)
            return unless_whole(new, w, q)

        return automatic(projected, w, self.vectors, like_first=True)

    def pack(self, w: Any, path: str) -> arrays.LowRank:
        """The two factors, without the columns beyond the rank."""
        del path
        dense = arrays.todense(w)
        vectors = np.asarray(self.vectors)
        vectors = jnp.asarray(vectors[:, (vectors != 0).any(axis=0)])
        u, v = _factors(as_matrix(dense), vectors, self.left)
        u = u.reshape(dense.shape[:-1] + u.shape[-1:])
        return arrays.LowRank(u.astype(dense.dtype), v.astype(dense.dtype))


class Kept(NamedTuple):
    """How much of a leaf is kept.

    Attributes:
        knob: the rank, or the energy.
        energy: static. Which of the two.
        columns: static. The most that a structure holds; None: all.
    """

    knob: jax.Array
    energy: bool
    columns: int | None


def column_limit(function: str, rank: Numeric | None, max_rank: int | None) -> int | None:
    """How many columns to hold: `max_rank`, else a static rank, else all of them (None)."""
    if rank is not None:
        _check.numeric(function, "rank", rank, 0)
    if max_rank is not None:
        _check.integer(function, "max_rank", max_rank, 0)
        return int(max_rank)
    return round(float(rank)) if isinstance(rank, (int, float, np.number)) else None


def kept_columns(q: jax.Array, found: SVD, knob: jax.Array, energy: bool) -> jax.Array:
    """Singular vectors up to a rank, or to that which holds an energy; zeros beyond it."""
    kept = jnp.round(knob)
    if energy:
        kept = rank_of_energy(found.s, knob, found.error).astype(jnp.float32)
    live = jnp.arange(q.shape[1], dtype=jnp.float32) < kept
    return jnp.where(live[None, :], q, 0.0)


def unless_whole(new: jax.Array, w: jax.Array, q: jax.Array) -> jax.Array:
    """`new`, or `w` itself to the last bit where the columns of `q` span the whole space."""
    if q.shape[0] != q.shape[1]:
        return new
    # A NaN is no direction: what it makes of the leaf stays.
    return jnp.where(jnp.all(jnp.any(jnp.abs(q) > 0, axis=0)), w, new)


def is_wide(shape: tuple[int, ...]) -> bool:
    """Whether the columns of a leaf span the smaller space: its basis is the left one."""
    return math.prod(shape[:-1]) <= shape[-1]


def side_limit(shape: tuple[int, ...], columns: int | None) -> int:
    """How many columns the structure of a leaf holds."""
    full = min(math.prod(shape[:-1]), shape[-1])
    return full if columns is None else min(full, columns)


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


def as_matrix(w: jax.Array) -> jax.Array:
    """The leaf by its last axis, in float32."""
    return w.reshape(math.prod(w.shape[:-1]), w.shape[-1]).astype(jnp.float32)


def _factors(matrix: jax.Array, q: jax.Array, left: bool) -> tuple[jax.Array, jax.Array]:
    if left:
        return q, product(q.T, matrix)
    return product(matrix, q), q.T
