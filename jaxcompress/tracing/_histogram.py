"""Histograms that merge exactly, and ranges chosen on them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import Numeric
from jaxcompress.tracing._observers import Observer, Range

_LOWEST = -126


class Histogram(NamedTuple):
    r"""Counts of entries in equal bins of :math:`[-2^e, 2^e)`.

    Attributes:
        counts: uint32[bins].
        exponent: int32, :math:`e`.
        low: float32, the smallest finite entry.
        high: float32, the largest.
        nonfinite: uint32, how many entries were NaN or infinite; they are in no bin.
    """

    counts: jax.Array
    exponent: jax.Array
    low: jax.Array
    high: jax.Array
    nonfinite: jax.Array


def histogram(*, bins: int = 2048) -> Observer:
    """A histogram whose range doubles when needed.

    Doubling merges neighbouring bins exactly, so the order and the grouping of batches do
    not change one count.

    Args:
        bins: static. An even number.

    Returns:
        An `Observer` of `Histogram`s. Counts are exact up to 2^32 entries in a bin; subnormal
        numbers may count as zeros.

    Raises:
        ValueError: `bins` is odd or not positive.

    Examples:
        >>> observer = jc.observers.histogram(bins=4)
        >>> x = jnp.array([[0.1, -0.2, 3.0]])
        >>> observer.finalize(observer.update(observer.init(3), x)).counts
        Array([0, 1, 1, 1], dtype=uint32)
    """
    _check.integer("histogram", "bins", bins, 2)
    if bins % 2:
        raise ValueError(_check.message("histogram", "bins", "be even", bins))

    def init(features):
        del features
        zero = jnp.zeros((), jnp.uint32)
        counts = jnp.zeros((bins,), jnp.uint32)
        infinity = jnp.full((), jnp.inf)
        return Histogram(counts, jnp.full((), _LOWEST, jnp.int32), infinity, -infinity, zero)

    def update(state, x):
        x = x.astype(jnp.float32)
        finite = jnp.isfinite(x)
        largest = jnp.max(jnp.where(finite, jnp.abs(x), 0.0), initial=0.0)
        _, exponent = jnp.frexp(largest)
        exponent = jnp.maximum(jnp.where(largest > 0, exponent, _LOWEST), _LOWEST)
        exponent = exponent.astype(jnp.int32)
        place = jnp.floor(jnp.ldexp(jnp.where(finite, x, 0.0), -exponent) * (bins // 2))
        # A value just below zero may round up to the bin's end, or to zero.
        top = jnp.where(x < 0, bins // 2 - 1, bins - 1)
        place = jnp.clip(place.astype(jnp.int32) + bins // 2, 0, top)
        counts = jnp.zeros((bins,), jnp.uint32).at[place].add(finite.astype(jnp.uint32))
        seen = Histogram(
            counts,
            exponent,
            jnp.min(jnp.where(finite, x, jnp.inf), initial=jnp.inf),
            jnp.max(jnp.where(finite, x, -jnp.inf), initial=-jnp.inf),
            jnp.sum(~finite, dtype=jnp.uint32),
        )
        return merge(state, seen)

    def merge(a, b):
        exponent = jnp.maximum(a.exponent, b.exponent)
        counts = _coarser(a, exponent) + _coarser(b, exponent)
        return Histogram(
            counts,
            exponent,
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
            a.nonfinite + b.nonfinite,
        )

    def finalize(state):
        nothing = state.low > state.high
        low, high = (jnp.where(nothing, 0.0, x) for x in (state.low, state.high))
        return state._replace(low=low, high=high)

    return Observer(init, update, merge, finalize)


def _coarser(state: Histogram, exponent: jax.Array) -> jax.Array:
    """The counts in bins of a wider range."""
    half = state.counts.shape[0] // 2
    shift = jnp.minimum(exponent - state.exponent, 31)
    place = jnp.right_shift(jnp.arange(-half, half, dtype=jnp.int32), shift) + half
    return jnp.zeros_like(state.counts).at[place].add(state.counts)


def percentile_range(hist: Histogram, fraction: Numeric, *, symmetric: bool = True) -> Range:
    """The range that holds a fraction of all entries.

    Args:
        hist: what was seen.
        fraction: in [0, 1]. May be traced.
        symmetric: static. About zero; else as much is left out below as above.

    Returns:
        A `Range`, as fine as the bins, never wider than what was seen.

    Raises:
        ValueError: `fraction` is a number outside of [0, 1].
    """
    _check.number("percentile_range", "fraction", fraction, 0, 1)
    fraction = jnp.asarray(fraction, jnp.float32)
    if symmetric:
        counts, edges = _magnitudes(hist)
        inside = jnp.cumsum(counts) >= fraction * jnp.sum(counts) * (1 - 1e-6)
        return _within(hist, edges[jnp.argmax(inside)])
    counts, width = hist.counts.astype(jnp.float32), _width(hist)
    half = counts.shape[0] // 2
    total = jnp.sum(counts)
    left_out = (1 - fraction) / 2 * total * (1 + 1e-6)
    first = jnp.argmax(jnp.cumsum(counts) > left_out)
    last = counts.shape[0] - 1 - jnp.argmax(jnp.cumsum(counts[::-1]) > left_out)
    low, high = ((place - half).astype(jnp.float32) * width for place in (first, last + 1))
    return Range(jnp.maximum(low, hist.low), jnp.minimum(high, hist.high))


def mse_range(hist: Histogram, bits: Numeric, *, candidates: int = 128) -> Range:
    r"""The symmetric range whose integer grid has the least squared error.

    .. math:: \min_t \sum_i c_i \left(x_i - \Delta\,
        \mathrm{clip}(\lfloor x_i / \Delta \rceil, -q, q)\right)^2,
        \quad \Delta = t / q, \quad q = 2^{b-1} - 1

    over the centres :math:`x_i` of the bins.

    Args:
        hist: what was seen.
        bits: :math:`b`, at least 2. May be traced.
        candidates: static. How many thresholds are tried, evenly spaced up to the largest.

    Returns:
        A `Range`.

    Raises:
        ValueError: `bits` is a number below 2.

    Source: Banner et al. 2018, arXiv:1810.05723, section 3. Differs: the error is measured
    on the histogram, not on a fitted distribution.
    """
    _check.number("mse_range", "bits", bits, 2)
    _check.integer("mse_range", "candidates", candidates, 1)
    top = 2.0 ** (jnp.asarray(bits, jnp.float32) - 1) - 1
    counts, edges = _magnitudes(hist)
    centres = edges - _width(hist) / 2
    largest = jnp.maximum(-hist.low, hist.high)

    def error(threshold):
        step = jnp.where(threshold > 0, threshold, 1.0) / top
        rounded = step * jnp.minimum(jnp.round(centres / step), top)
        return jnp.sum(counts * jnp.square(centres - rounded))

    thresholds = largest * jnp.arange(1, candidates + 1, dtype=jnp.float32) / candidates
    return _within(hist, thresholds[jnp.argmin(jax.vmap(error)(thresholds))])


def entropy_range(hist: Histogram, bits: Numeric, *, candidates: int = 128) -> Range:
    r"""The symmetric range whose quantized histogram keeps most of the information.

    For a threshold the counts beyond it are added to the last bin, :math:`P`; the counts
    within are merged into :math:`2^{b-1}` levels and spread again over the bins that are not
    empty, :math:`Q`; the threshold with the least :math:`KL(P \| Q)` is taken.

    Args:
        hist: what was seen; zeros are left out, as they need no level.
        bits: :math:`b`, at least 2. May be traced.
        candidates: static. How many thresholds are tried.

    Returns:
        A `Range`.

    Raises:
        ValueError: `bits` is a number below 2.

    Source: Migacz 2017, "8-bit Inference with TensorRT", GTC. Differs: bins that only Q
    leaves empty are given a count of 1e-4, and levels may be as many as bins.
    """
    _check.number("entropy_range", "bits", bits, 2)
    _check.integer("entropy_range", "candidates", candidates, 1)
    counts, edges = _magnitudes(hist)
    counts = counts.at[0].set(0.0)
    size = counts.shape[0]
    index = jnp.arange(size, dtype=jnp.float32)
    levels = 2.0 ** (jnp.asarray(bits, jnp.float32) - 1)

    def divergence(end):
        inside = index < end
        beyond = jnp.sum(jnp.where(inside, 0.0, counts))
        within = jnp.where(inside, counts, 0.0)
        p = within + jnp.where(index == end - 1, beyond, 0.0)
        used = jnp.minimum(levels, end)
        level = jnp.clip(jnp.floor(index * used / end), 0, size - 1).astype(jnp.int32)
        sums = jnp.zeros((size,)).at[level].add(within)
        filled = jnp.zeros((size,)).at[level].add((within > 0).astype(jnp.float32))
        q = jnp.where(within > 0, (sums / jnp.maximum(filled, 1.0))[level], 0.0)
        p, q = p / jnp.maximum(jnp.sum(p), 1.0), q / jnp.maximum(jnp.sum(q), 1.0)
        ratio = jnp.where(p > 0, p / jnp.maximum(q, 1e-4 / size), 1.0)
        return jnp.sum(p * jnp.log(ratio))

    # Fewer bins than levels would lose nothing whatever is cut off.
    last = jnp.max(jnp.where(counts > 0, index + 1, 1.0))
    first = jnp.minimum(levels, last)
    steps = jnp.linspace(0.0, 1.0, candidates)
    ends = jnp.round(first + (last - first) * steps)
    best = ends[jnp.argmin(jax.vmap(divergence)(ends))]
    return _within(hist, edges[best.astype(jnp.int32) - 1])


def percentile(fraction: Numeric = 0.999, *, symmetric: bool = True, bins: int = 2048) -> Observer:
    """Observer of the range that holds a fraction of all entries; see `percentile_range`."""
    return _chosen(lambda hist: percentile_range(hist, fraction, symmetric=symmetric), bins)


def mse(bits: Numeric = 8, *, bins: int = 2048) -> Observer:
    """Observer of the range with the least squared error; see `mse_range`."""
    return _chosen(lambda hist: mse_range(hist, bits), bins)


def entropy(bits: Numeric = 8, *, bins: int = 2048) -> Observer:
    """Observer of the range with the least loss of information; see `entropy_range`."""
    return _chosen(lambda hist: entropy_range(hist, bits), bins)


def _chosen(choose, bins: int) -> Observer:
    seen = histogram(bins=bins)
    return seen._replace(finalize=lambda state: choose(seen.finalize(state)))


def _width(hist: Histogram) -> jax.Array:
    return jnp.ldexp(jnp.float32(2.0 / hist.counts.shape[0]), hist.exponent)


def _magnitudes(hist: Histogram) -> tuple[jax.Array, jax.Array]:
    """Counts of |x| in half as many bins, and the upper edges of these."""
    half = hist.counts.shape[0] // 2
    counts = hist.counts.astype(jnp.float32)
    counts = counts[half:] + counts[:half][::-1]
    return counts, _width(hist) * jnp.arange(1, half + 1, dtype=jnp.float32)


def _within(hist: Histogram, threshold: jax.Array) -> Range:
    """The range up to the threshold, but no wider than what was seen."""
    threshold = jnp.minimum(threshold, jnp.maximum(-hist.low, hist.high))
    return Range(-threshold, threshold)
