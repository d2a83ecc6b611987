"""The singular value decomposition under weights on both sides of a matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._products import product
from jaxcompress._types import Numeric
from jaxcompress.factorization import _lapack as lapack
from jaxcompress.factorization._basis import column_limit
from jaxcompress.factorization._decompose import Method, check_method, decompose


class WeightedSVD(NamedTuple):
    r"""The best factors under weights, :math:`W \approx u v`.

    Attributes:
        u: `[m, r]`; zero columns beyond the rank.
        v: `[r, n]`; zero rows beyond the rank.
        s: `[r]`, the singular values of the weighted matrix, falling; all of them, also those
            beyond the rank.
        loss: the weighted squared error of `u @ v`, as it follows from the singular values.
    """

    u: jax.Array
    v: jax.Array
    s: jax.Array
    loss: jax.Array


def weighted_svd(
    w: jax.Array | np.ndarray,
    rank: Numeric,
    *,
    left: jax.Array | np.ndarray | None = None,
    right: jax.Array | np.ndarray | None = None,
    left_offset: jax.Array | np.ndarray | None = None,
    max_rank: int | None = None,
    method: Method = "exact",
) -> WeightedSVD:
    r"""The matrix of a given rank that is nearest under weights on rows and columns.

    .. math:: \min_{\mathrm{rank}\,W' \le r} \operatorname{tr}\left( A\,(W - W')\,B\,(W - W')^\top
        \right) = \sum_{i > r} \sigma_i^2, \qquad
        \sigma = \text{singular values of } A^{1/2}\, W\, B^{1/2}

    With a layer :math:`y = x W`, `left` weighs input features and `right` outputs:

    - none: the truncated SVD;
    - `left` a vector: ASVD (powers of activation sizes, squared), FWSVD (Fisher information of
      rows);
    - `left` the Gram matrix :math:`X^\top X` of the inputs: the outputs change least, SVD-LLM's
      whitening, DRONE, and PCA of the outputs;
    - `right` too: the Hessian of the outputs, as in K-FAC.

    Where one side alone is weighted nothing is inverted: :math:`W' = W V_r V_r^\top` with the
    right singular vectors of :math:`L W`, :math:`L^\top L = A`. L comes from the eigenvectors
    of the matrix scaled to ones on its diagonal, so that features of very different sizes keep
    their digits, and a singular matrix is like any other.

    Args:
        w: `[m, n]`, any real float dtype; computed in float32 (float64 for such a `w`).
        rank: r, at least 0; above the full rank it counts as full. May be traced: one
            decomposition then serves a `vmap` over ranks.
        left: A, `[m, m]` positive semidefinite, or the diagonal `[m]`, at least 0; None for
            ones. May be traced.
        right: B, `[n, n]` or `[n]`, or None. May be traced.
        left_offset: a vector `[m]`, c, for :math:`A = \mathrm{left} + c\,c^\top`: the covariance
            of N inputs times N as `left` and :math:`\sqrt N` times their mean as c are their
            Gram matrix, without the digits that a large mean costs it. May be traced.
        max_rank: static. Columns of the factors; by default `rank` where that is a Python number,
            else the full rank.
        method: static. Of the decomposition of the weighted matrix, see `svd`.

    Returns:
        A `WeightedSVD`, finite for finite arguments. Rows of W without weight follow from the
        others; where both sides are weighted, columns without weight become zero. A NaN or
        infinite entry of any argument makes the factors NaN, up to the rank.

    Raises:
        ValueError: shapes that do not fit, `rank` below 0, negative entries of a diagonal
            that can be read, `left_offset` without `left`, or an unknown method.
        TypeError: an argument is not real floating point.

    Cost: one eigendecomposition for each full weight and one decomposition of an `[m, n]` matrix.

    Examples:
        >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> found = jc.factorization.weighted_svd(w, 1, left=jnp.array([1.0, 100.0]))
        >>> found.u @ found.v  # the second feature is ten times as large
        Array([[0., 0.],
               [0., 1.]], dtype=float32)
        >>> found.loss
        Array(9., dtype=float32)

    Source: Wang et al. 2024, SVD-LLM, arXiv:2403.07378; Yuan et al. 2023, ASVD,
    arXiv:2312.05821; Hsu et al. 2022, FWSVD, arXiv:2207.00112. Differs: no Cholesky factor, and
    no inverse where one side is weighted.
    """
    _check_arguments(w, left, right, left_offset)
    check_method("weighted_svd", method)
    columns = column_limit("weighted_svd", rank, max_rank)
    w = wide(w)
    left, right, offset = (
        None if x is None else jnp.asarray(x, w.dtype) for x in (left, right, left_offset)
    )
    diagonal = left is not None and left.ndim == 1 and offset is None
    if diagonal and right is not None and right.ndim == 2:
        # The root of the second side is inverted: better the diagonal one.
        turned = _factors(w.T, rank, right, left, None, columns, method)
        return turned._replace(u=turned.v.T, v=turned.u.T)
    return _factors(w, rank, left, right, offset, columns, method)


def _check_arguments(w, left, right, left_offset) -> None:
    _check.floating("weighted_svd", "w", w)
    if len(w.shape) != 2:
        fix = "Use jax.vmap for a stack of layers."
        got = _check.describe(w)
        raise ValueError(_check.message("weighted_svd", "w", "be a matrix", got, fix))
    if left_offset is not None and left is None:
        rule, got = "be given with `left`", "left=None"
        raise ValueError(_check.message("weighted_svd", "left_offset", rule, got))
    m, n = w.shape
    wanted = (
        ("left", left, ((m,), (m, m))),
        ("right", right, ((n,), (n, n))),
        ("left_offset", left_offset, ((m,),)),
    )
    for name, x, shapes in wanted:
        if x is None:
            continue
        _check.floating("weighted_svd", name, x)
        if tuple(x.shape) not in shapes:
            rule = f"have the shape {' or '.join(str(list(shape)) for shape in shapes)}"
            raise ValueError(_check.message("weighted_svd", name, rule, _check.describe(x)))
        if name != "left_offset" and not _check.is_traced(x):
            values = np.asarray(x, np.float64)
            lowest = np.min(values if x.ndim == 1 else np.diagonal(values), initial=0.0)
            if lowest < 0:
                rule = "have no negative entries on its diagonal"
                raise ValueError(_check.message("weighted_svd", name, rule, float(lowest)))


class Root(NamedTuple):
    """L with `L.T @ L` the weight, `diag(side) @ vectors @ diag(root)`, transposed.

    Attributes:
        side: `[k]`, the roots of the diagonal.
        vectors: `[k, k]`, those of the correlations; None for a diagonal weight.
        root: `[k]`, the roots of their eigenvalues.
        offset: a further row, or None.
    """

    side: jax.Array
    vectors: jax.Array | None
    root: jax.Array
    offset: jax.Array | None

    def times(self, w: jax.Array) -> jax.Array:
        """`L @ w`."""
        x = self.side[:, None] * w
        if self.vectors is not None:
            x = self.root[:, None] * product(self.vectors.T, x)
        rows = [] if self.offset is None else [product(self.offset[None, :], w)]
        return jnp.concatenate([x, *rows])

    def transposed_times(self, v: jax.Array) -> jax.Array:
        """`L.T @ v`."""
        if self.vectors is not None:
            v = product(self.vectors, self.root[:, None] * v)
        return self.side[:, None] * v

    def inverse_times(self, v: jax.Array) -> jax.Array:
        """The pseudo-inverse of L times v."""
        if self.vectors is not None:
            v = product(self.vectors, _reciprocal(self.root)[:, None] * v)
        return _reciprocal(self.side)[:, None] * v


def _reciprocal(x: jax.Array) -> jax.Array:
    noise = x.shape[0] * jnp.finfo(x.dtype).eps * jnp.max(jnp.square(x), initial=0.0)
    live = jnp.square(x) > noise
    return jnp.where(live, 1 / jnp.where(live, x, jnp.ones_like(x)), jnp.where(jnp.isnan(x), x, 0))


def root_of(weight: jax.Array, offset: jax.Array | None = None) -> Root:
    """Of a diagonal `[k]`, or of a positive semidefinite matrix `[k, k]`."""
    if weight.ndim == 1:
        return Root(jnp.sqrt(weight), None, jnp.ones_like(weight), offset)
    side = jnp.sqrt(jnp.maximum(jnp.diagonal(weight), 0.0))
    inverse = jnp.where(side > 0, 1 / jnp.where(side > 0, side, jnp.ones_like(side)), 0.0)
    values, vectors = lapack.eigh(weight * inverse[:, None] * inverse[None, :])
    return Root(side, vectors, jnp.sqrt(jnp.maximum(values, 0.0)), offset)


def _factors(w, rank, left, right, offset, columns: int | None, method: Method) -> WeightedSVD:
    width = min(w.shape) if columns is None else min(*w.shape, columns)
    rows = None if left is None else root_of(left, offset)
    cols = None if right is None else root_of(right)
    weighted = w if rows is None else rows.times(w)
    weighted = weighted if cols is None else cols.times(weighted.T).T
    found = decompose(weighted, width if method in ("auto", "randomized") else None, method)
    kept = jnp.round(jnp.asarray(rank, w.dtype))
    live = (jnp.arange(width, dtype=w.dtype) < kept)[:, None]
    if rows is None:
        u = found.u[:, :width]
        v = product(u.T, w)
    elif cols is None:
        v = found.vt[:width]
        u = product(w, v.T)
    else:
        v = cols.inverse_times(found.vt[:width].T).T
        u = product(w, cols.transposed_times(found.vt[:width].T))
    places = jnp.arange(found.s.shape[0], dtype=w.dtype)
    dropped = jnp.where(places < kept, 0.0, jnp.square(found.s))
    loss = jnp.sum(dropped[::-1]) + jnp.square(found.error)
    return WeightedSVD(jnp.where(live.T, u, 0.0), jnp.where(live, v, 0.0), found.s, loss)
