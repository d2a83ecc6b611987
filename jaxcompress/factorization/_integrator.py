"""One step on the manifold of low-rank matrices, on arrays: the K, L and S steps."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import arrays
from jaxcompress._products import product
from jaxcompress.factorization import _lapack as lapack
from jaxcompress.factorization._basis import as_matrix
from jaxcompress.factorization._decompose import SVD, decompose
from jaxcompress.factorization._ranks import count_above, largest, unit_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["u", "s", "v", "rank"],
    meta_fields=["shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class DynamicalFactors:
    r"""A leaf as :math:`U S V^\top`, seen as a matrix of `prod(shape[:-1])` by `shape[-1]`.

    Attributes:
        u: `[m, max_rank]`, float32, orthonormal columns; zeros beyond the rank.
        s: `[max_rank, max_rank]`, float32, not diagonal; zeros beyond the rank.
        v: `[n, max_rank]`, as `u`.
        rank: int32 scalar.
        shape: static. That of the leaf.
        dtype: static. That of the leaf.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array
    rank: jax.Array
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Of the factors with their zeros."""
        return sum(x.nbytes for x in (self.u, self.s, self.v, self.rank))

    def todense(self) -> jax.Array:
        """The leaf."""
        return dense(self.u, self.s, self.v).reshape(self.shape).astype(self.dtype)

    def pack(self, path: str) -> arrays.LowRank:
        """Two balanced factors of the true rank."""
        del path
        r = int(self.rank)
        u, s, v = (np.asarray(x)[..., :r] for x in (self.u, self.s[:r], self.v))
        if np.isfinite(s).all():
            left, values, right = np.linalg.svd(s)
            u, v = u @ (left * np.sqrt(values)), v @ (right.T * np.sqrt(values))
        else:
            u = u @ s
        u = jnp.asarray(u.reshape((*self.shape[:-1], r)))
        return arrays.LowRank(u.astype(self.dtype), jnp.asarray(v.T).astype(self.dtype))


class Coordinates(NamedTuple):
    r"""A direction at :math:`U S V^\top`, of which an optimizer sees the numbers.

    .. math:: U A V^\top + B V^\top + U C^\top + \tilde U E\, \tilde V^\top

    The four terms are orthogonal, so that norms are those of the matrix.

    Attributes:
        core: A, `[max_rank, max_rank]`.
        left: B, `[m, max_rank]`, outside of the span of U.
        right: C, `[n, max_rank]`, outside of the span of V.
        corner: E, `[max_rank, max_rank]`, between the directions of B and of C.
    """

    core: jax.Array
    left: jax.Array
    right: jax.Array
    corner: jax.Array


class Gradient(NamedTuple):
    """The coordinates of a gradient, and the directions of its corner."""

    numbers: Coordinates
    left: jax.Array
    right: jax.Array


def dense(u: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
    """The matrix."""
    return product(product(u, s), v.T)


def first(
    w: jax.Array, knob: jax.Array, *, width: int, adaptive: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`u, s, v, rank` of the truncated SVD of a leaf."""
    w = as_matrix(w)
    found = decompose(lax.stop_gradient(w), width)
    rank = _rank(found, knob, adaptive)
    # Directions that are missing are completed; the leading ones keep their spans.
    u, v = (_live(_orthonormal(q), rank) for q in (found.u, found.vt.T))
    return u, product(product(u.T, w), v), v, rank


def gradient(g: jax.Array, u: jax.Array, v: jax.Array) -> Gradient:
    """The gradient of a leaf as the bases of the leaf see it."""
    g = as_matrix(g)
    ahead, back = product(g, v), product(u.T, g).T
    left, right = _outside(ahead, u), _outside(back, v)
    a, b = _directions(left, u), _directions(right, v)
    corner = product(product(a.T, g), b)
    return Gradient(Coordinates(product(u.T, ahead), left, right, corner), a, b)


def advanced(
    u: jax.Array,
    s: jax.Array,
    v: jax.Array,
    rank: jax.Array,
    a: jax.Array,
    b: jax.Array,
    move: Coordinates,
    knob: jax.Array,
    *,
    adaptive: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`u, s, v, rank` after a step along `move`, whose corner lies between `a` and `b`."""
    live = jnp.arange(s.shape[0], dtype=jnp.int32) < rank
    # Beyond the rank the gradient is zero, of which some optimizers make 0/0.
    core = jnp.where(live[:, None] & live[None, :], move.core, 0.0)
    left = _outside(jnp.where(live[None, :], move.left, 0.0), u)
    right = _outside(jnp.where(live[None, :], move.right, 0.0), v)
    there = jnp.any(a != 0, axis=0)[:, None] & jnp.any(b != 0, axis=0)[None, :]
    corner = jnp.where(there, move.corner, 0.0)
    # K and L, the directions in use first.
    order = jnp.argsort(~jnp.concatenate([live, live]))
    wide_u = _orthonormal(jnp.concatenate([u, left], 1)[:, order])
    wide_v = _orthonormal(jnp.concatenate([v, right], 1)[:, order])
    # S: the leaf itself and the four terms, in the new bases.
    uu, vv = product(wide_u.T, u), product(wide_v.T, v)
    whole = product(product(uu, s + core) + product(wide_u.T, left), vv.T)
    whole = whole + product(uu, product(wide_v.T, right).T)
    whole = whole + product(product(product(wide_u.T, a), corner), product(wide_v.T, b).T)
    rows, columns = (jnp.arange(d, dtype=jnp.int32) < 2 * rank for d in whole.shape)
    whole = jnp.where(rows[:, None] & columns[None, :], whole, 0.0)
    found = decompose(lax.stop_gradient(whole), s.shape[0], "exact")
    rank = _rank(found, knob, adaptive)
    new_u = _aligned(product(wide_u, found.u), u, rank)
    new_v = _aligned(product(wide_v, found.vt.T), v, rank)
    new_s = product(product(product(new_u.T, wide_u), whole), product(wide_v.T, new_v))
    return new_u, new_s, new_v, rank


def _rank(found: SVD, knob: jax.Array, adaptive: bool) -> jax.Array:
    """The rank itself, or the smallest whose truncation costs no more than the tolerance."""
    width = found.s.shape[-1]
    if adaptive:
        unit = unit_of(largest(found.s))
        squares, beyond = jnp.square(found.s / unit), jnp.square(found.error[None] / unit)
        dropped = jnp.cumsum(squares[::-1])[::-1] + beyond
        kept = count_above(dropped, jnp.square(knob) * dropped[:1])
    else:
        kept = jnp.round(jnp.clip(knob, 0.0, float(width))).astype(jnp.int32)
    return jnp.clip(kept, min(1, width), width)


def _orthonormal(y: jax.Array) -> jax.Array:
    """As many orthonormal columns as fit, each near its own; those that depend on others become
    any that do not.

    The polar factor of the normalized columns. Whatever these span, the columns at their places
    span too. A QR decomposition would do as well, but see `_lapack`.
    """
    y = lax.stop_gradient(y)[:, : y.shape[0]]
    if not y.size:
        return y
    length = jnp.linalg.norm(y, axis=0, keepdims=True)
    u, _, vt = lapack.svd(y / jnp.where(length == 0, 1.0, length))
    return lax.stop_gradient(product(u, vt))


def _outside(y: jax.Array, q: jax.Array) -> jax.Array:
    """Columns without what lies in the span of `q`."""
    return y - product(q, product(q.T, y))


def _directions(y: jax.Array, q: jax.Array) -> jax.Array:
    """Those of columns outside of `q`, signed as these; zero where a column is."""
    y = lax.stop_gradient(y)
    out = _orthonormal(y)
    out = jnp.where(jnp.sum(out * y, axis=0)[None, :] < 0, -out, out)
    return jnp.where(jnp.any(y != 0, axis=0)[None, :], _outside(out, q), 0.0)


def _live(q: jax.Array, rank: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(q.shape[1], dtype=jnp.int32) < rank)[None, :], q, 0.0)


def _aligned(new: jax.Array, old: jax.Array, rank: jax.Array) -> jax.Array:
    """The first `rank` columns, turned within their span to where the old ones lie nearest."""
    new, old = lax.stop_gradient(_live(new, rank)), lax.stop_gradient(old)
    if not new.size:
        return new
    live = jnp.arange(new.shape[1], dtype=jnp.int32) < rank
    both = live[:, None] & live[None, :]
    left, _, right = lapack.svd(jnp.where(both, product(new.T, old), jnp.eye(len(live))))
    return _live(product(new, product(left, right)), rank)
