"""Low rank plus sparse as a convex problem: robust principal component analysis."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._products import product
from jaxcompress._types import ArrayLike
from jaxcompress.factorization._decompose import decompose

# Of Lin, Chen & Ma: the first penalty, its growth, and its end.
_FIRST, _GROWTH, _MOST = 1.25, 1.5, 1e7


class RobustPCA(NamedTuple):
    """The parts of a matrix.

    Attributes:
        low_rank: `[m, n]`.
        sparse: `[m, n]`, with exact zeros.
        error: of their sum, in the Frobenius norm, relative to the matrix.
        iterations: how many were taken.
    """

    low_rank: jax.Array
    sparse: jax.Array
    error: jax.Array
    iterations: jax.Array


def robust_pca(
    w: jax.Array | np.ndarray,
    weight: ArrayLike | None = None,
    *,
    tolerance: ArrayLike = 1e-6,
    iterations: int = 200,
) -> RobustPCA:
    r"""Splits a matrix into a low-rank and a sparse one: principal component pursuit.

    .. math:: \min_{L + S = W} \|L\|_* + \lambda\,\|S\|_1

    Neither the rank nor the places are given. With :math:`\lambda = 1 / \sqrt{\max(m, n)}` both
    parts are recovered exactly, with high probability, where the singular vectors of L are spread
    out and the entries of S few and anywhere. To start `jc.factorization.low_rank_plus` or to see
    whether a layer is of this kind; with a given rank and sparsity that one is nearer.

    Args:
        w: `[m, n]`, any real float dtype; computed in float32 (float64 for such a `w`).
        weight: :math:`\lambda`, above 0: larger for fewer sparse entries. May be traced. None: as
            above.
        tolerance: of the error of the sum, relative, at least 0. May be traced.
        iterations: static. The most to take.

    Returns:
        A `RobustPCA` in the dtype that it was computed in. A NaN or infinite entry makes all NaN.
        No gradient flows through it.

    Raises:
        ValueError: `w` is no matrix; a number out of range.
        TypeError: `w` is not real floating point.

    Cost: one exact decomposition in each iteration, of which about 30 are taken.

    Examples:
        >>> low = jnp.outer(jnp.linspace(1.0, 2.0, 30), jnp.linspace(-1.0, 1.0, 20))
        >>> found = jc.factorization.robust_pca(low.at[3, 4].add(5.0).at[20, 11].add(-3.0))
        >>> bool(jnp.abs(found.low_rank - low).max() < 1e-3), int((found.sparse != 0).sum())
        (True, 2)

    Source: Candès et al. 2009, arXiv:0912.3599; the inexact augmented Lagrange multipliers of Lin,
    Chen & Ma 2010, arXiv:1009.5055, algorithm 5.
    """
    _check.floating("robust_pca", "w", w)
    if len(w.shape) != 2:
        fix = "Use jax.vmap for a stack of layers."
        raise ValueError(_check.message("robust_pca", "w", "be a matrix", _check.describe(w), fix))
    if weight is not None:
        _check.number("robust_pca", "weight", weight, 0)
    _check.number("robust_pca", "tolerance", tolerance, 0)
    _check.integer("robust_pca", "iterations", iterations, 1)
    w = jax.lax.stop_gradient(wide(w))
    if not w.size:
        zero = jnp.zeros((), w.dtype)
        return RobustPCA(w, w, zero, jnp.zeros((), jnp.int32))
    if weight is None:
        weight = 1.0 / math.sqrt(max(w.shape))
    return _pursued(w, jnp.asarray(weight, w.dtype), jnp.asarray(tolerance, w.dtype), iterations)


def _pursued(w: jax.Array, weight: jax.Array, tolerance: jax.Array, most: int) -> RobustPCA:
    largest = jnp.max(jnp.abs(w))
    unit = jnp.where(largest == 0, 1.0, largest)
    x = w / unit
    spectral = decompose(x, 1, "exact").s[0]
    spectral = jnp.where(spectral == 0, 1.0, spectral)
    norm = jnp.maximum(jnp.linalg.norm(x), jnp.finfo(x.dtype).tiny)
    first = _FIRST / spectral
    zero = jnp.zeros_like(x)
    dual = x / jnp.maximum(spectral, 1.0 / weight)

    def going_on(state):
        *_, error, i = state
        return (i < most) & (error > tolerance)

    def step(state):
        _, sparse, dual, penalty, _, i = state
        u, s, vt, _ = decompose(x - sparse + dual / penalty, None, "exact")
        low = product(u * _shrunk(s, 1.0 / penalty)[None, :], vt)
        sparse = _shrunk(x - low + dual / penalty, weight / penalty)
        left = x - low - sparse
        dual = dual + penalty * left
        penalty = jnp.minimum(_GROWTH * penalty, _MOST * first)
        return low, sparse, dual, penalty, jnp.linalg.norm(left) / norm, i + 1

    # Infinite, and typed as the later ones.
    error = jnp.full_like(norm, jnp.inf)
    start = (zero, zero, dual, first, error, jnp.zeros((), jnp.int32))
    low, sparse, _, _, error, taken = jax.lax.while_loop(going_on, step, start)
    return RobustPCA(low * unit, sparse * unit, error, taken)


def _shrunk(x: jax.Array, by: jax.Array) -> jax.Array:
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - by, 0.0)
