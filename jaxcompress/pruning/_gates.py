"""Hard-concrete gates: random numbers in [0, 1] that are often exactly 0 or 1."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._sharding import place_like
from jaxcompress._types import ArrayLike

TEMPERATURE, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sample_gates(
    log_alpha: jax.Array,
    key: jax.Array,
    temperature: ArrayLike = TEMPERATURE,
    gamma: ArrayLike = GAMMA,
    zeta: ArrayLike = ZETA,
) -> jax.Array:
    r"""Draws gates from the hard-concrete distribution; differentiable in its parameters.

    .. math:: g = \min(1, \max(0, \bar s)), \qquad \bar s = \gamma + (\zeta - \gamma)\,
        \sigma\left(\frac{\ln u - \ln(1 - u) + \ln\alpha}{\beta}\right), \quad u \sim U(0, 1)

    Args:
        log_alpha: :math:`\ln\alpha`, any shape, one number per gate.
        key: a `jax.random.key`. May be traced.
        temperature: :math:`\beta`, above 0. May be traced.
        gamma: below 0. May be traced.
        zeta: above 1. May be traced.

    Returns:
        Gates in [0, 1] of the shape of `log_alpha`, float32 or wider: exactly 0 and exactly 1
        each with a probability above zero. The gradient is zero at both.

    Raises:
        TypeError: `log_alpha` is not real floating point; raised while tracing.
        ValueError: a number out of its range.

    Examples:
        >>> log_alpha = jnp.zeros(1000)
        >>> g = jc.pruning.sample_gates(log_alpha, jax.random.key(0))
        >>> (g == 0).mean().round(1), (g == 1).mean().round(1)
        (Array(0.2, dtype=float32), Array(0.2, dtype=float32))

    Source: Louizos et al. 2018, arXiv:1712.01312, equations 10 and 11.
    """
    x = _checked("sample_gates", log_alpha, temperature, gamma, zeta)
    noise = place_like(jax.random.logistic(key, x.shape, x.dtype), x)
    return _stretched((noise + x) / _like(temperature, x), gamma, zeta)


def fixed_gates(
    log_alpha: jax.Array, gamma: ArrayLike = GAMMA, zeta: ArrayLike = ZETA
) -> jax.Array:
    r"""The gates of a trained model, without noise.

    .. math:: \hat g = \min(1, \max(0, \gamma + (\zeta - \gamma)\,\sigma(\ln\alpha)))

    Args:
        log_alpha: as in `sample_gates`.
        gamma: as in `sample_gates`.
        zeta: as in `sample_gates`.

    Returns:
        Gates in [0, 1]: exactly 0 and exactly 1 for small and for large `log_alpha`.

    Raises:
        TypeError: `log_alpha` is not real floating point; raised while tracing.
        ValueError: a number out of its range.

    Examples:
        >>> jc.pruning.fixed_gates(jnp.array([-3.0, 0.0, 3.0]))
        Array([0. , 0.5, 1. ], dtype=float32)

    Source: Louizos et al. 2018, arXiv:1712.01312, equation 13.
    """
    return _stretched(_checked("fixed_gates", log_alpha, 1.0, gamma, zeta), gamma, zeta)


def expected_l0(
    log_alpha: jax.Array,
    temperature: ArrayLike = TEMPERATURE,
    gamma: ArrayLike = GAMMA,
    zeta: ArrayLike = ZETA,
) -> jax.Array:
    r"""The expected number of gates that are not zero: a penalty with a gradient everywhere.

    .. math:: \sum_i P(g_i \ne 0) = \sum_i
        \sigma\left(\ln\alpha_i - \beta \ln\frac{-\gamma}{\zeta}\right)

    Args:
        log_alpha: as in `sample_gates`.
        temperature: as in `sample_gates`.
        gamma: as in `sample_gates`.
        zeta: as in `sample_gates`.

    Returns:
        A scalar, to add to a loss that samples its own gates.

    Raises:
        TypeError: `log_alpha` is not real floating point; raised while tracing.
        ValueError: a number out of its range.

    Examples:
        >>> jc.pruning.expected_l0(jnp.zeros(10)).round(1)
        Array(8.3, dtype=float32)

    Source: Louizos et al. 2018, arXiv:1712.01312, equation 12.
    """
    x = _checked("expected_l0", log_alpha, temperature, gamma, zeta)
    return jnp.sum(opening(x, temperature, gamma, zeta))


def opening(x: jax.Array, temperature: ArrayLike, gamma: ArrayLike, zeta: ArrayLike) -> jax.Array:
    """The probability that a gate is not zero."""
    ratio = jnp.log(-_like(gamma, x) / _like(zeta, x))
    return jax.nn.sigmoid(x - _like(temperature, x) * ratio)


def _stretched(x: jax.Array, gamma: ArrayLike, zeta: ArrayLike) -> jax.Array:
    low, high = _like(gamma, x), _like(zeta, x)
    s = low + (high - low) * jax.nn.sigmoid(x)
    return jnp.where(s <= 0, jnp.zeros_like(s), jnp.where(s >= 1, jnp.ones_like(s), s))


def _like(value: ArrayLike, x: jax.Array) -> jax.Array:
    return jnp.asarray(value).astype(x.dtype)


def _checked(
    function: str, log_alpha: jax.Array, temperature: ArrayLike, gamma: ArrayLike, zeta: ArrayLike
) -> jax.Array:
    _check.floating(function, "log_alpha", log_alpha)
    require_numbers(function, temperature, gamma, zeta)
    return wide(log_alpha)


def require_numbers(function: str, temperature: Any, gamma: Any, zeta: Any) -> None:
    require_open(function, "temperature", temperature, 0, None)
    require_open(function, "gamma", gamma, None, 0)
    require_open(function, "zeta", zeta, 1, None)


def require_open(
    function: str, argument: str, value: Any, low: float | None, high: float | None
) -> None:
    """Refuses a schedule, and what is known to lie outside of an interval or on its ends."""
    if callable(value):
        rule = "be a number"
        raise TypeError(_check.message(function, argument, rule, "a schedule"))
    _check.number(function, argument, value, low, high)
    if not _check.is_traced(value) and float(value) in (low, high):
        rule = f"lie between {low} and {high}, exclusive"
        raise ValueError(_check.message(function, argument, rule, value))
