r"""Ranges: how much of the weights a grid covers.

A range is a function `(x, axes, error) -> (low, high)`, of float32 weights in which NaN marks
what doesn't count, the axes of a run, and `error(low, high)`, the sum of squared errors of each run
on the grid over that range. Both results have size 1 along `axes`, with low at most 0 and high
at least 0. Any function of that form will do.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import _check
from jaxcompress._types import ArrayLike

Error = Callable[[jax.Array, jax.Array], jax.Array]
Ranges = Callable[[jax.Array, tuple[int, ...], Error], tuple[jax.Array, jax.Array]]


def min_max(x: jax.Array, axes: tuple[int, ...], error: Error) -> tuple[jax.Array, jax.Array]:
    r"""All of the weights: :math:`[\min(w, 0), \max(w, 0)]`.

    Args:
        x: float32; NaN does not count.
        axes: static. The axes of a run.
        error: not used.

    Returns:
        Both ends, 0 for an empty run. A symmetric grid takes the larger magnitude.

    Examples:
        >>> ranges = jc.quantization.min_max
        >>> p = jc.quantize(2, axis=None, symmetric=False, ranges=ranges)
        >>> jc.compress(p, {"w": jnp.array([[2.0, -1.0], [1.25, 0.25]])})["w"]
        Array([[ 2., -1.],
               [ 1.,  0.]], dtype=float32)

    Source: Jacob et al. 2017, arXiv:1712.05877, section 3.
    """
    del error
    counts = ~jnp.isnan(x)
    reduced = {"axis": axes, "keepdims": True, "initial": 0.0, "where": counts}
    return jnp.min(x, **reduced), jnp.max(x, **reduced)


def absmax(x: jax.Array, axes: tuple[int, ...], error: Error) -> tuple[jax.Array, jax.Array]:
    r"""As far to both sides: :math:`\pm\max|w|`.

    Args:
        x: as `min_max`.
        axes: as `min_max`.
        error: not used.

    Returns:
        Both ends. On a symmetric grid that is `min_max`; an asymmetric one has its zero point
        in the middle.

    Examples:
        >>> p = jc.quantize(2, ranges=jc.quantization.absmax)
        >>> jc.compress(p, {"w": jnp.array([[1.0], [0.4], [-0.6]])})["w"]
        Array([[ 1.],
               [ 0.],
               [-1.]], dtype=float32)
    """
    low, high = min_max(x, axes, error)
    largest = jnp.maximum(-low, high)
    return -largest, largest


def percentile(q: ArrayLike = 99.9) -> Ranges:
    r"""The middle of the weights: what lies outside is clipped.

    .. math:: \mathrm{low} = \min(Q_{1 - q/100}(w), 0), \quad \mathrm{high} = \max(Q_{q/100}(w), 0)

    with quantiles that are interpolated linearly between the weights of a run.

    Args:
        q: in percent, 50 to 100. May be traced.

    Returns:
        A range. At 100 it is `min_max`.

    Raises:
        ValueError: `q` is a number outside of [50, 100].

    Cost: a sort of each run.

    Examples:
        >>> p = jc.quantize(8, axis=None, ranges=jc.quantization.percentile(75.0))
        >>> jc.compress(p, {"w": jnp.array([[0.0, 1.0, 2.0, 3.0, 100.0]])})["w"].max()
        Array(3., dtype=float32)

    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2 (there on activations).
    """
    _check.number("percentile", "q", q, 50, 100)

    def ranges(x, axes, error):
        del error
        if x.size == 0:
            return min_max(x, axes, lambda low, high: low)
        share = jnp.asarray(q, jnp.float32) / 100
        # In one axis, for NaN-aware quantiles are taken along one only.
        moved = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
        flat = moved.reshape(moved.shape[: x.ndim - len(axes)] + (-1,))
        ends = jnp.nanquantile(flat, jnp.stack([1 - share, share]), axis=-1)
        ends = jnp.where(jnp.isnan(ends), 0.0, ends)
        low, high = (jnp.expand_dims(end, axes) for end in ends)
        return jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)

    return ranges


def mse(refinements: int = 8) -> Ranges:
    r"""The part of `min_max` on whose grid the weights have the smallest squared error.

    .. math:: \min_f \sum_i (w_i - \hat w_i(f\,\mathrm{low}, f\,\mathrm{high}))^2

    The factor f is searched for each run: among :math:`2^{-i/2}`, i from 0 to 11, then evenly
    between the neighbours of the best. The result is never worse than that of `min_max`.

    Args:
        refinements: static. How many factors the second search tries.

    Returns:
        A range.

    Raises:
        ValueError: `refinements` is below 0.

    Cost: `12 + refinements` passes over the weights, in one loop.

    Examples:
        >>> w = {"w": jax.random.normal(jax.random.key(0), (256, 8))}
        >>> error = lambda p: float(jnp.mean((jc.compress(p, w)["w"] - w["w"]) ** 2))
        >>> wide = error(jc.quantize(3, ranges=jc.quantization.min_max))
        >>> error(jc.quantize(3, ranges=jc.quantization.mse())) < 0.7 * wide
        True

    Source: Choukroun et al. 2019, arXiv:1902.06822, section 3.1; the search as in Banner et al.
    2019, arXiv:1810.05723. Differs: two stages, so that runs with large outliers are met too.
    """
    _check.integer("mse", "refinements", refinements, 0)
    return SmallestError(refinements)


class SmallestError(NamedTuple):
    """What `mse` makes: equal for equal arguments, so that a compiled search is found again."""

    refinements: int

    def __call__(
        self, x: jax.Array, axes: tuple[int, ...], error: Error
    ) -> tuple[jax.Array, jax.Array]:
        """The range, of each run."""
        low, high = min_max(x, axes, error)

        def better(best, factor):
            loss, found = best
            new = error(low * factor, high * factor)
            closer = new < loss
            return jnp.where(closer, new, loss), jnp.where(closer, factor, found)

        def coarse(i, best):
            return better(best, jnp.exp2(-0.5 * jnp.asarray(i, jnp.float32)) * jnp.ones_like(low))

        best = lax.fori_loop(1, 12, coarse, (error(low, high), jnp.ones_like(low)))
        below, above = best[1] * 2**-0.5, jnp.minimum(best[1] * 2**0.5, 1.0)

        def fine(i, best):
            share = (jnp.asarray(i, jnp.float32) + 1.0) / (self.refinements + 1.0)
            return better(best, below + (above - below) * share)

        _, factor = lax.fori_loop(0, self.refinements, fine, best)
        return low * factor, high * factor
