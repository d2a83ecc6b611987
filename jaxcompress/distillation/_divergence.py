"""Kullback-Leibler divergence of two rows of logits, exact to its own size in float32."""

import jax.numpy as jnp

from jaxcompress.distillation._rows import Row, column, largest, ruled_out, softmax

NEAR = 0.5  # below this |log ratio|, its series beats the plain formula


def kl(student, teacher, temperature, keep):
    """KL as the sum of `q - p - p log(q / p) >= 0`, each term exact to its own size."""
    q, p = softmax(student, temperature, keep), softmax(teacher, temperature, keep)
    both = q.present & p.present
    ratio = jnp.where(both, log_ratio(q, p, student, teacher, temperature), 0.0)
    near = jnp.abs(ratio) <= NEAR
    far = q.probabilities - p.probabilities - p.probabilities * ratio
    terms = jnp.where(near, p.probabilities * excess(jnp.where(near, ratio, 0.0)), far)
    # A class that only the student has: q - 0 - 0.
    terms = jnp.where(both, terms, q.probabilities)
    terms = jnp.where(p.present & ~q.present, ruled_out(p), terms)
    return jnp.sum(terms, -1)


def log_ratio(q: Row, p: Row, student, teacher, temperature):
    """`log(q / p)`; for like rows from the logits' difference, which loses no digits.

    There `q / p` is `exp(d) / sum(p exp(d))` with d the difference over the temperature.
    """
    both = q.present & p.present
    d = jnp.where(both, student, 0.0) - jnp.where(both, teacher, 0.0)
    top, bottom = largest(d, both), -largest(-d, both)
    narrow = (top - bottom) / column(temperature) <= 1.0
    like = jnp.all(q.present == p.present, -1, keepdims=True) & narrow
    d = jnp.where(both & like, (d - top) / column(temperature), 0.0)
    mean = jnp.sum(p.probabilities * jnp.expm1(d), -1, keepdims=True)
    fine = d - jnp.log1p(jnp.where(like, mean, 0.0))
    return jnp.where(like, fine, q.logs - p.logs)


def excess(x):
    """`exp(x) - 1 - x` for |x| up to `NEAR`, to relative rounding."""
    return 0.5 * x * x * excess_series(x)


def excess_series(x):
    """`(exp(x) - 1 - x) / (x * x / 2)` by its series."""
    series = jnp.ones_like(x)
    for k in range(15 if x.dtype == jnp.float64 else 9, 2, -1):
        series = 1.0 + x / k * series
    return series
