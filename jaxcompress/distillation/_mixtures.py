"""Divergences from a mixture of two rows, exact to their own size and smooth to the ends."""

import jax.numpy as jnp

from jaxcompress.distillation._divergence import NEAR, excess, excess_series, log_ratio
from jaxcompress.distillation._rows import ruled_out, softmax

# Where one probability is exp(80) times the other, the smaller one no longer counts.
_DEEP = 80.0


def skewed(student, teacher, temperature, keep, alpha):
    """KL(p || m) with `m = alpha p + (1 - alpha) q`, the teacher's p and the student's q."""
    q, p = softmax(student, temperature, keep), softmax(teacher, temperature, keep)
    ratio = _log_ratio(q, p, student, teacher, temperature)
    u = _log_mixture(ratio, alpha)
    near = jnp.abs(ratio) <= NEAR
    fine = p.probabilities * excess(jnp.where(near, u, 0.0))
    far = (1 - alpha) * (q.probabilities - p.probabilities) - p.probabilities * u
    lost = p.present & ~q.present & (alpha == 0)
    return jnp.sum(jnp.where(lost, ruled_out(p), jnp.where(near, fine, far)), -1)


def jensen(student, teacher, temperature, keep, beta, normalized):
    """`beta KL(p || m) + (1 - beta) KL(q || m)`, or that over `beta (1 - beta)`.

    The first is the second times `beta (1 - beta)`, so only the second needs care.
    """
    q, p = softmax(student, temperature, keep), softmax(teacher, temperature, keep)
    ratio = _log_ratio(q, p, student, teacher, temperature)
    # With the roles exchanged beta is 1 - beta: only the end at 0 is left.
    swap = beta > 0.5
    b, ratio = jnp.where(swap, 1 - beta, beta), jnp.where(swap, -ratio, ratio)
    x = jnp.where(swap, q.probabilities, p.probabilities)
    y = jnp.where(swap, p.probabilities, q.probabilities)
    # log(m / x) = u and log(m / y) = b s, of which s is finite at b = 0 too.
    u = _log_mixture(ratio, b)
    relative = jnp.expm1(jnp.clip(-ratio, -_DEEP, _DEEP))
    slope = _log1p_over(b * relative)
    far = -x * u / (1 - b) - (x - y) * slope
    near = jnp.abs(ratio) <= NEAR
    s = jnp.where(near, relative * slope, 0.0)
    fine = x * excess(jnp.where(near, u, 0.0)) / (1 - b)
    fine += 0.5 * y * b * s * s * excess_series(b * s)
    terms = jnp.where(near, fine, far)
    if not normalized:
        return b * (1 - b) * jnp.sum(terms, -1)
    only_p, only_q = p.present & ~q.present & ~swap, q.present & ~p.present & swap
    infinite = jnp.where(only_p, ruled_out(p), jnp.where(only_q, ruled_out(q), 0.0))
    return jnp.sum(jnp.where((b == 0) & (infinite > 0), infinite, terms), -1)


def _log_ratio(q, p, student, teacher, temperature):
    """`log(q / p)`, and its bound where only one of the two has the class."""
    ratio = log_ratio(q, p, student, teacher, temperature)
    return jnp.where(q.present & p.present, ratio, jnp.where(p.present, -_DEEP, _DEEP))


def _log_mixture(ratio, a):
    """`log(a + (1 - a) exp(ratio))` for a in [0, 1], with its slope at both ends."""
    # The bounds lie within the other branch, as the slope of clip at its bounds is a half.
    heavy = jnp.log(a + (1 - a) * jnp.exp(jnp.clip(ratio, -_DEEP, -0.5)))
    heavy = jnp.where((a == 0) & (ratio < -_DEEP), ratio, heavy)
    light = jnp.log1p((1 - a) * jnp.expm1(jnp.clip(ratio, -1.5, _DEEP)))
    return jnp.where(ratio < -1.0, heavy, light)


def _log1p_over(x):
    """`log(1 + x) / x` for `x > -1`, and 1 at 0."""
    small = jnp.abs(x) < 0.1
    tiny, other = jnp.where(small, x, 0.0), jnp.where(small, 1.0, x)
    count = 17 if x.dtype == jnp.float64 else 9
    series = jnp.full_like(x, 1 / count)
    for k in range(count - 1, 0, -1):
        series = 1 / k - tiny * series
    return jnp.where(small, series, jnp.log1p(other) / other)
