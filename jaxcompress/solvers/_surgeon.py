"""Exact optimal brain surgeon: the weight that costs the least goes, the others make up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._products import product
from jaxcompress._types import ArrayLike
from jaxcompress.solvers._hessian import PrepareInfo, check_layer, damp, inverse_factor
from jaxcompress.solvers._refit import refit

_ENTRIES = 2**20  # of the inverses of the columns that are worked on together: a cache's worth


class RemovalTrace(NamedTuple):
    """The order in which each column loses its weights, and what each of them costs.

    Attributes:
        losses: `[k, n]`. By how much the t-th removal from a column raises its damped error.
        rank: int32 `[k, n]`. How many weights of its column go before this one.
        info: how the inversion of the Hessian went; if it is not `ok`, the rest means nothing.
    """

    losses: jax.Array
    rank: jax.Array
    info: PrepareInfo


class Surgery(NamedTuple):
    """A pruned layer.

    Attributes:
        w: `[k, n]`, the new weights.
        keep: bool `[k, n]`.
        loss: by how much the damped error rose, the sum of the losses taken.
        info: how the inversion of the Hessian went.
    """

    w: jax.Array
    keep: jax.Array
    loss: jax.Array
    info: PrepareInfo


def surgeon(
    w: jax.Array | np.ndarray,
    gram: jax.Array | np.ndarray,
    keep_count: ArrayLike,
    *,
    damping: ArrayLike = 0.01,
) -> Surgery:
    r"""Prunes a small layer greedily and exactly, one weight at a time.

    Always that weight goes which raises the error of the outputs the least, while all others of
    its column move to make up for it:

    .. math:: q = \arg\min_q \frac{w_q^2}{[H^{-1}]_{qq}}, \qquad
        w \leftarrow w - \frac{w_q}{[H^{-1}]_{qq}} H^{-1}_{:,q}, \qquad
        H^{-1} \leftarrow H^{-1} - \frac{H^{-1}_{:,q} H^{-1}_{q,:}}{[H^{-1}]_{qq}}

    The next weight of all is that of the column whose next one costs the least. The weights are
    those of `refit` for the mask, which is where the updates lead, without their rounding.

    Args:
        w: `[k, n]`, any real float dtype. NaN counts as zero, so it goes first; a weight of a
            dead input too.
        gram: `[k, k]`, `x.T @ x` of the inputs.
        keep_count: how many weights of the layer live. Rounded down and clipped to [0, k n]. May
            be traced.
        damping: as in `prepare`. May be traced.

    Returns:
        The new weights, of the shape and dtype of `w`, and the mask, with exactly that many
        True. Equal costs: the first input, then the first output, goes first.

    Raises:
        TypeError: `w` or `gram` is not real floating point, a number is none.
        ValueError: shapes do not fit, `damping` is negative or `keep_count` NaN.

    Cost: :math:`O(n k^3)` time, one inverse of `[k, k]` a column, in memory for about 1M entries
    at a time (at least one column). For k of some hundreds; use `compensate` beyond.

    Examples:
        >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> w = jnp.array([[1.0, 3.0], [1.5, 0.1]])
        >>> result = jc.solvers.surgeon(w, gram, 2, damping=0.0)
        >>> np.asarray(result.w).round(2)
        array([[0.  , 3.09],
               [2.4 , 0.  ]], dtype=float32)

    Source: Frantar and Alistarh 2022 (OBC), arXiv:2208.11580, algorithm 1 and section 4.1 (global
    step); Hassibi and Stork 1993. Differs: losses have no factor 1/2; the global step is taken
    on running maxima of the traces instead of with a heap, to the same end.
    """
    check_layer("surgeon", w, gram)
    _check.number("surgeon", "damping", damping, 0.0)
    _check.number("surgeon", "keep_count", keep_count)
    w = jnp.asarray(w)
    count = jnp.asarray(keep_count, jnp.float32 if w.size < 2**24 else jnp.int32)
    kept = jnp.where(count > 0, jnp.minimum(count, w.size), 0).astype(jnp.int32)
    return _surgeon(w, jnp.asarray(gram), kept, jnp.asarray(damping))


def removal_trace(
    w: jax.Array | np.ndarray, gram: jax.Array | np.ndarray, *, damping: ArrayLike = 0.01
) -> RemovalTrace:
    """Removes all weights of each column, one at a time, and tells what each removal costs.

    The first half of `surgeon`, for a choice of your own: over several layers, or in groups.
    For a count of removals in each column the mask is `trace.rank >= counts`, and the weights
    are `refit(w, gram, mask)`.

    Args:
        w: as in `surgeon`.
        gram: as in `surgeon`.
        damping: as in `prepare`. May be traced.

    Returns:
        The losses in the units of `gram` times weights squared, and the ranks.

    Raises:
        TypeError: `w` or `gram` is not real floating point, `damping` is no number.
        ValueError: shapes do not fit, or `damping` is negative.

    Cost: as `surgeon`.

    Examples:
        >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> trace = jc.solvers.removal_trace(jnp.array([[1.0], [1.5]]), gram, damping=0.0)
        >>> trace.rank.T
        Array([[0, 1]], dtype=int32)
        >>> np.asarray(trace.losses.T).round(2)
        array([[0.19, 5.76]], dtype=float32)

    Source: as `surgeon`.
    """
    check_layer("removal_trace", w, gram)
    _check.number("removal_trace", "damping", damping, 0.0)
    return _trace(jnp.asarray(w), jnp.asarray(gram), jnp.asarray(damping))


@jax.jit
def _surgeon(w, gram, kept, damping):
    trace = _trace(w, gram, damping)
    removed = w.size - kept
    counts = _shares(trace.losses, removed)
    keep = trace.rank >= counts[None, :]
    taken = jnp.arange(w.shape[0], dtype=jnp.int32)[:, None] < counts[None, :]
    loss = jnp.sum(jnp.where(taken, trace.losses, jnp.zeros_like(trace.losses)))
    new = refit(jnp.where(jnp.isnan(w), jnp.zeros_like(w), w), gram, keep, damping=damping)
    return Surgery(new, keep, loss, trace.info)


def _shares(losses: jax.Array, removed: jax.Array) -> jax.Array:
    """How many go of each column when always the cheapest next one goes.

    A removal has to wait for those before it in its column, so it happens as if it cost the most
    of them: the running maximum, and of equal ones all of a column go before the next column.
    """
    if losses.size == 0:
        return jnp.zeros(losses.shape[1], jnp.int32)
    cost = lax.cummax(losses, axis=0)
    # A sort is nothing next to the k steps that made each of these numbers.
    last = jnp.sort(cost.ravel())[jnp.maximum(removed - 1, 0)]
    below = jnp.sum(cost < last, axis=0, dtype=jnp.int32)
    tied = jnp.sum(cost == last, axis=0, dtype=jnp.int32)
    before = jnp.cumsum(tied, dtype=jnp.int32) - tied
    rest = removed - jnp.sum(below, dtype=jnp.int32) - before
    return below + jnp.clip(rest, 0, tied)


@jax.jit
def _trace(w, gram, damping):
    damped = damp(gram, damping)
    factor = inverse_factor(damped)
    if w.size == 0:
        return RemovalTrace(jnp.zeros(w.shape), jnp.zeros(w.shape, jnp.int32), damped.info)
    inverse = product(factor.T, factor)
    dense = wide(w).astype(factor.dtype)
    dense = jnp.where(jnp.isnan(dense) | damped.dead[:, None], jnp.zeros_like(dense), dense)
    k, n = dense.shape
    together = max(1, min(n, _ENTRIES // (k * k)))
    losses, rank = lax.map(lambda c: _column(c, inverse), dense.T, batch_size=together)
    return RemovalTrace(losses.T, rank.T, damped.info)


def _column(w: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    k = w.size
    smallest = jnp.finfo(w.dtype).tiny

    def remove(t, state):
        w, inverse, rank, losses = state
        alive = rank == k
        # Positive in exact arithmetic.
        pivots = jnp.maximum(jnp.diagonal(inverse), smallest)
        costs = jnp.square(w) / pivots
        costs = jnp.where(alive & ~jnp.isnan(costs), costs, jnp.inf)
        # `argmin` would take a removed weight where all living ones cost inf.
        q = jnp.argmax(alive & (costs == jnp.min(costs)))
        loss, pivot = costs[q], pivots[q]
        # Rounding must not bring removed weights back.
        column = jnp.where(alive, inverse[:, q], jnp.zeros_like(w))
        w = w - column * (w[q] / pivot)
        inverse = inverse - column[:, None] * (column[None, :] / pivot)
        return w, inverse, rank.at[q].set(t), losses.at[t].set(loss)

    start = (w, inverse, jnp.full((k,), k, jnp.int32), jnp.zeros_like(w))
    _, _, rank, losses = lax.fori_loop(0, k, remove, start)
    return losses, rank
