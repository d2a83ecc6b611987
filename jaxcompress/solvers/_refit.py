"""The best weights of a layer for a mask that is given."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._products import product
from jaxcompress._types import ArrayLike
from jaxcompress.solvers._hessian import check_layer, damp

_PENALTY = 1.0  # of ADMM, next to a Hessian with a diagonal of ones
_ENTRIES = 2**22  # of the matrices of the columns that are solved together


def refit(
    w: jax.Array | np.ndarray,
    gram: jax.Array | np.ndarray,
    keep: jax.Array | np.ndarray,
    *,
    iterations: ArrayLike | None = None,
    damping: ArrayLike = 0.01,
) -> jax.Array:
    r"""The kept weights that best make up for the others, which are zero.

    .. math:: \min_{v}\ \operatorname{tr}\,(v - w)^T H (v - w)
        \quad\text{with } v = 0 \text{ outside of the mask}, \qquad H = G + d\,s\,I

    with G, H, s as in `prepare`. Exactly, column by column: with K the kept rows of a column and
    R the others, :math:`H_{KK}\,(v - w)_K = H_{KR}\,w_R`. Or, with `iterations`, for all columns
    together by the alternating direction method of multipliers (ADMM) with one factorization,
    in variables for which H has a diagonal of ones.

    Args:
        w: `[k, n]`, the dense weights, any real float dtype.
        gram: `[k, k]`, `x.T @ x` of the inputs.
        keep: bool `[k, n]`.
        iterations: None solves exactly: the choice up to k of some hundreds. A number is that of
            the iterations of ADMM, for large k: 20 are usual. It may be traced.
        damping: :math:`d \ge 0`, raised where H is not positive definite. May be traced.

    Returns:
        Shape and dtype of `w`; exactly zero outside of `keep`. No column has a larger error
        :math:`|x v - x w|^2`, computed from `gram`, than the plain `w * keep`: a column where it
        would (or where the system can't be solved) keeps its plain weights. So a mask that keeps
        everything returns `w`. A NaN stays in its column.

    Raises:
        TypeError: `w` or `gram` is not real floating point, `keep` not boolean, a number is none.
        ValueError: shapes do not fit, or a number is negative.

    Cost: exact :math:`n k^3 / 3` multiply-adds, in memory for about 4M matrix entries at a
    time. ADMM :math:`k^3 + t\,k^2 n` for t iterations.

    Examples:
        >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> w = jnp.array([[1.0], [4.0]])
        >>> jc.solvers.refit(w, gram, jnp.array([[False], [True]]), damping=0.0)
        Array([[0. ],
               [4.5]], dtype=float32)

    Source: Boža 2024, arXiv:2401.02938, algorithm 1 (ADMM); the exact solution is that of
    textbook least squares. Differs: ADMM runs on the change of the weights, so that
    it starts from zero and loses no digits to the weights, and the result is checked.
    """
    check_layer("refit", w, gram)
    rule = f"be a boolean array of shape {list(w.shape)}"
    if not hasattr(keep, "dtype") or not jnp.issubdtype(keep.dtype, jnp.bool):
        raise TypeError(_check.message("refit", "keep", rule, _check.describe(keep)))
    if keep.shape != w.shape:
        raise ValueError(_check.message("refit", "keep", rule, _check.describe(keep)))
    _check.number("refit", "damping", damping, 0.0)
    if iterations is not None:
        _check.number("refit", "iterations", iterations, 0)
        iterations = jnp.asarray(iterations).astype(jnp.int32)
    return _refit(
        jnp.asarray(w), jnp.asarray(gram), jnp.asarray(keep), jnp.asarray(damping), iterations
    )


@jax.jit
def _refit(w, gram, keep, damping, iterations):
    if w.size == 0:
        return w
    damped = damp(gram, damping)
    dense = wide(w).astype(damped.hessian.dtype)
    dropped = jnp.where(keep, jnp.zeros_like(dense), dense)
    if iterations is None:
        change = exact_change(damped.hessian, dropped, keep)
    else:
        change = _admm(damped.hessian, dropped, keep, iterations)
    plain = jnp.where(keep, w, jnp.zeros_like(w))
    new = jnp.where(keep, (dense + change).astype(w.dtype), jnp.zeros_like(w))
    unit = wide(gram) / damped.scale
    better = _errors(unit, new, dense) < _errors(unit, plain, dense)
    return jnp.where(better[None, :], new, plain)


def exact_change(hessian: jax.Array, dropped: jax.Array, keep: jax.Array) -> jax.Array:
    """What the kept weights change by when those in `dropped`, zero elsewhere, go.

    Outside of `keep` the result means nothing.
    """
    k, n = dropped.shape
    wanted = product(hessian, dropped)
    eye = jnp.eye(k, dtype=hessian.dtype)

    def column(item):
        keep, wanted = item
        # The identity outside of the mask: all systems have one size, and don't mix.
        system = jnp.where(keep[:, None] & keep[None, :], hessian, eye)
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), wanted)

    together = max(1, min(n, _ENTRIES // (k * k)))
    return lax.map(column, (keep.T, wanted.T), batch_size=together).T


def _admm(hessian, dropped, keep, iterations):
    """As `exact_change`, approximately."""
    k = dropped.shape[0]
    norms = jnp.sqrt(jnp.diagonal(hessian))[:, None]
    eye = jnp.eye(k, dtype=hessian.dtype)
    system = hessian / (norms * norms.T) + _PENALTY * eye
    step = _PENALTY * jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), eye)
    target = -norms * dropped  # the change of the dropped weights

    def iterate(_, state):
        split, dual = state
        change = product(step, split - dual)
        split = jnp.where(keep, change + dual, target)
        return split, dual + change - split

    split, _ = lax.fori_loop(0, iterations, iterate, (target, jnp.zeros_like(target)))
    return jnp.where(keep, split, jnp.zeros_like(split)) / norms


def _errors(gram: jax.Array, new: jax.Array, dense: jax.Array) -> jax.Array:
    change = new.astype(dense.dtype) - dense
    return jnp.sum(change * product(gram, change), axis=0)
