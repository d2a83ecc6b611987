"""Numbers of directions that noise does not explain: EVBMF and Gavish & Donoho."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._types import ArrayLike
from jaxcompress.factorization._ranks import (
    checked_sides,
    checked_values,
    count_above,
    largest,
    rounding,
    scalar,
    unit_of,
)

# Of the search for the noise: points of a grid in the logarithm, then shrinkings of two cells.
_GRID, _SHRINKINGS = 128, 32


def evbmf_rank(s: jax.Array, shape: tuple[int, int], noise: ArrayLike | None = None) -> jax.Array:
    r"""The rank that empirical variational Bayesian matrix factorization finds.

    The matrix, of sides :math:`L \le M`, is read as a product of two factors with Gaussian
    priors, plus Gaussian noise of variance :math:`\sigma^2`. With priors fitted to the matrix,
    the global minimum of the free energy keeps the singular values above

    .. math:: \sigma \sqrt{M \bar x}, \quad \bar x = (1 + \bar\tau)(1 + \alpha / \bar\tau),
        \quad \alpha = L / M, \quad \Phi(\bar\tau) + \Phi(\bar\tau / \alpha) = 0,
        \quad \Phi(z) = \frac{\log(1 + z)}{z} - \frac12

    Where it is not given, :math:`\sigma^2` minimizes the same free energy,

    .. math:: \sum_h \psi(x_h) + L \log \sigma^2, \quad x_h = \frac{s_h^2}{M \sigma^2}, \quad
        \psi(x) = \begin{cases} x & x \le \bar x \\ x + \log(1 + \tau) +
        \alpha \log(1 + \tau / \alpha) - \tau & \text{else} \end{cases}, \quad
        x = (1 + \tau)(1 + \alpha / \tau)

    between bounds that hold for every minimum.

    Args:
        s: as in `energy_rank`, all min(m, n) of them.
        shape: static. :math:`(m, n)` of the matrix.
        noise: :math:`\sigma`, the standard deviation of the noise of an entry, at least 0. May be
            traced.

    Returns:
        int32, of shape [...], at most `numerical_rank(s, shape)`; below :math:`L / (1 + \alpha)`
        with the noise unknown. 0 where all values are zero, or k is; k where one is NaN or
        infinite. For a matrix with one side of 1, whose noise can't be told from it, it is 0.

    Raises:
        TypeError: `s` is not real floating point, `shape` not two integers.
        ValueError: `s` has not min(m, n) values, or a negative `noise`.

    Cost: one pass; with the noise unknown 160 passes, with logarithms, in turn.

    Examples:
        >>> u, v, noise = (
        ...     jax.random.normal(jax.random.key(i), shape)
        ...     for i, shape in enumerate([(60, 4), (4, 40), (60, 40)])
        ... )
        >>> s = jnp.linalg.svd(u @ v + 0.1 * noise, compute_uv=False)
        >>> jc.factorization.evbmf_rank(s, (60, 40))
        Array(4, dtype=int32)

    Source: Nakajima et al. 2013, "Global analytic solution of fully-observed variational Bayesian
    matrix factorization"; the threshold and the bounds in the form of Nakajima et al. 2015,
    "Condition for perfect dimensionality recovery by variational Bayesian PCA"; for networks
    Kim et al. 2016, arXiv:1511.06530. Differs: :math:`\bar\tau` is solved for, where common codes
    take :math:`2.5129 \sqrt\alpha`; the noise, of which the free energy may have many local
    minima, is searched on a grid of 128 points in the logarithm first, and never taken below the
    rounding errors of `s`.
    """
    x = checked_values("evbmf_rank", s)
    small, large = checked_sides("evbmf_rank", shape, x, every=True)
    if noise is not None:
        _check.number("evbmf_rank", "noise", noise, 0)
    if small == 0:
        return jnp.zeros(x.shape[:-1], jnp.int32)
    scale, floor = largest(x), rounding(x, large)
    root = math.sqrt(large * _evb_threshold(small / large))
    if noise is None:
        unit = unit_of(scale)
        deviation = unit * jnp.exp(
            0.5 * _evb_log_variance(x / unit, floor / unit, small=small, large=large)
        )
        threshold = jnp.maximum(root * deviation, floor)
    else:
        threshold = jnp.maximum(root * scalar(noise, x), floor)
    return count_above(x, threshold)


def gavish_donoho_rank(
    s: jax.Array, shape: tuple[int, int], noise: ArrayLike | None = None
) -> jax.Array:
    r"""The rank of the best hard threshold for a low-rank matrix in white noise.

    No other threshold on singular values has an asymptotic mean squared error as small:

    .. math:: \lambda(\beta) \sqrt{M}\,\sigma, \quad \lambda(\beta)^2 =
        2 (\beta + 1) + \frac{8 \beta}{\beta + 1 + \sqrt{\beta^2 + 14 \beta + 1}},
        \quad \beta = L / M

    for sides :math:`L \le M`; where the noise is unknown,
    :math:`\lambda(\beta)\,s_{\mathrm{median}} / \sqrt{\mu_\beta}`, with the median
    :math:`\mu_\beta` of the Marchenko–Pastur distribution.

    Args:
        s: as in `energy_rank`, all min(m, n) of them.
        shape: static. :math:`(m, n)` of the matrix.
        noise: :math:`\sigma`, the standard deviation of the noise of an entry, at least 0. May be
            traced.

    Returns:
        int32, of shape [...], at most `numerical_rank(s, shape)`; at most half of k with the noise
        unknown. 0 where all values are zero, or k is; k where one is NaN or infinite.

    Raises:
        TypeError: `s` is not real floating point, `shape` not two integers.
        ValueError: `s` has not min(m, n) values, or a negative `noise`.

    Cost: one pass.

    Examples:
        >>> s = jnp.array([9.0, 5.0, 1.2, 1.0, 0.8, 0.6])
        >>> jc.factorization.gavish_donoho_rank(s, (6, 6))
        Array(2, dtype=int32)
        >>> jc.factorization.gavish_donoho_rank(s, (6, 6), noise=1.0)
        Array(1, dtype=int32)

    Source: Gavish & Donoho 2014, arXiv:1305.5870. Differs: the median is
    exact, not the authors' cubic fit of :math:`\omega(\beta) = \lambda(\beta) / \sqrt{\mu_\beta}`;
    values at the threshold are dropped.
    """
    x = checked_values("gavish_donoho_rank", s)
    small, large = checked_sides("gavish_donoho_rank", shape, x, every=True)
    if noise is not None:
        _check.number("gavish_donoho_rank", "noise", noise, 0)
    if small == 0:
        return jnp.zeros(x.shape[:-1], jnp.int32)
    b = small / large
    factor = math.sqrt(2 * (b + 1) + 8 * b / (b + 1 + math.sqrt(b * b + 14 * b + 1)))
    if noise is None:
        high, low = (small - 1) // 2, small // 2
        median = 0.5 * x[..., high : high + 1] + 0.5 * x[..., low : low + 1]
        threshold = factor / math.sqrt(_marchenko_pastur_median(b)) * median
    else:
        threshold = factor * math.sqrt(large) * scalar(noise, x)
    return count_above(x, jnp.maximum(threshold, rounding(x, large)))


@functools.partial(jax.jit, static_argnames=("small", "large"))
def _evb_log_variance(x: jax.Array, floor: jax.Array, *, small: int, large: int) -> jax.Array:
    """The logarithm of the variance of the noise, of shape [..., 1]; the largest of `x` is 1."""
    alpha = small / large
    bar = _evb_threshold(alpha)
    most = math.ceil(small / (1 + alpha)) - 1
    squares = jnp.square(x) * (1 / large)
    tail = jnp.mean(squares[..., most:], axis=-1, keepdims=True)
    least = jnp.maximum(squares[..., most : most + 1] * (1 / bar), tail)
    # All zero: the floor is zero too, and nothing is above it.
    tiny = float(np.finfo(x.dtype).tiny)
    least = jnp.maximum(least, jnp.maximum(jnp.square(floor) * (1 / (large * bar)), tiny))
    start = jnp.log(least)
    width = jnp.maximum(jnp.log(jnp.mean(squares, axis=-1, keepdims=True)) - start, 0.0)

    def free_energy(place):
        log_variance = start + width * place
        ratio = squares * jnp.exp(-log_variance)
        half = 0.5 * (ratio - (1 + alpha))
        above = ratio > bar
        tau = jnp.where(above, half + jnp.sqrt(jnp.maximum(jnp.square(half) - alpha, 0.0)), 1.0)
        # Of x - tau, without its cancellation.
        kept = 1 + alpha + alpha / tau + jnp.log1p(tau) + alpha * jnp.log1p(tau * (1 / alpha))
        total = jnp.sum(jnp.where(above, kept, ratio), axis=-1, keepdims=True)
        return total + small * log_variance

    def look(best, i):
        place = jnp.full_like(start, 1 / (_GRID - 1)) * i
        value = free_energy(place)
        better = value < best[1]
        return (jnp.where(better, place, best[0]), jnp.where(better, value, best[1])), None

    nowhere = (jnp.zeros_like(start), jnp.full_like(start, jnp.inf))
    (grid, value), _ = lax.scan(look, nowhere, jnp.arange(_GRID, dtype=x.dtype))
    golden = (math.sqrt(5) - 1) / 2

    def shrink(_, ends):
        low, high = ends
        left, right = high - golden * (high - low), low + golden * (high - low)
        is_left = free_energy(left) < free_energy(right)
        return jnp.where(is_left, low, left), jnp.where(is_left, right, high)

    cell = 1 / (_GRID - 1)
    ends = jnp.maximum(grid - cell, 0.0), jnp.minimum(grid + cell, 1.0)
    low, high = lax.fori_loop(0, _SHRINKINGS, shrink, ends)
    middle = 0.5 * (low + high)
    return start + width * jnp.where(free_energy(middle) < value, middle, grid)


@functools.cache
def _evb_threshold(alpha: float) -> float:
    """The ratio of squared singular value to variance above which a direction is kept."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    # A falling function; its zero is about 2.5 sqrt(alpha).
    low, high = math.sqrt(alpha), 4 * math.sqrt(alpha)
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if phi(middle) + phi(middle / alpha) > 0 else (low, middle)
    return (1 + low) * (1 + alpha / low)


@functools.cache
def _marchenko_pastur_median(beta: float) -> float:
    """The median of squared singular values of noise, over the larger side.

    With t = 1 + r^2 - 2 r cos(a), r = sqrt(beta), the distribution has the density
    2 sin(a)^2 / (pi t) in a, whose integral is elementary.
    """
    r = math.sqrt(beta)

    def below(a: float) -> float:
        inner = math.atan2(r * math.sin(a), 1 - r * math.cos(a))
        return (a + inner - (inner - r * math.sin(a)) / beta) / math.pi

    low, high = 0.0, math.pi
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if below(middle) < 0.5 else (low, middle)
    return 1 + beta - 2 * r * math.cos(low)
