"""A family of divergences class by class, with the derivative: what a streamed loss sums.

With `m = λ p + (1 - λ) q` it is `(1 - ρ) KL(p || m) + ρ KL(q || m)`. Written with the terms
`m - p - p log(m / p) >= 0`, so that nothing cancels in the sum. The derivative for the student's
logits is `g - q sum(g)`, with `g = q dF/dq` class by class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.distillation._divergence import NEAR, excess


class Pair(NamedTuple):
    """Both distributions over some classes: logs where present, probabilities, `log(q / p)`."""

    in_student: jax.Array
    in_teacher: jax.Array
    log_q: jax.Array
    q: jax.Array
    p: jax.Array
    ratio: jax.Array


def pair(student, teacher, student_norm, teacher_norm, temperature) -> Pair:
    """From logits and what normalizes their rows, `(largest, log of the sum)`, as columns."""
    in_student, in_teacher = student != -jnp.inf, teacher != -jnp.inf
    (s_top, s_log), (t_top, t_log) = student_norm, teacher_norm
    # Shifted, then divided, and normalizers apart: an offset of a row costs no digits.
    s = jnp.where(in_student, student, s_top) - s_top
    t = jnp.where(in_teacher, teacher, t_top) - t_top
    log_q, log_p = s / temperature - s_log, t / temperature - t_log
    ratio = (s - t) / temperature - (s_log - t_log)
    return Pair(
        in_student,
        in_teacher,
        log_q,
        jnp.where(in_student, jnp.exp(log_q), 0.0),
        jnp.where(in_teacher, jnp.exp(log_p), 0.0),
        jnp.where(in_student & in_teacher, ratio, 0.0),
    )


def terms(x: Pair, reverse, mixture):
    """What each class adds to the divergence; without the two numbers, to `KL(p || q)`."""
    both = x.in_student & x.in_teacher
    if reverse is None:
        of_teacher = jnp.where(x.in_teacher & (x.p > 0), jnp.inf, 0.0)
        return jnp.where(both, _gap(x.p, x.q, x.ratio), jnp.where(x.in_student, x.q, of_teacher))
    m = mixture * x.p + (1.0 - mixture) * x.q
    u = _log_mixed(x.ratio, mixture)
    to_p, to_q = _gap(x.p, m, u), _gap(x.q, m, u - x.ratio)
    to_p = jnp.where(both, to_p, jnp.where(x.in_student, m, _alone(x.p, mixture)))
    to_q = jnp.where(both, to_q, jnp.where(x.in_student, _alone(x.q, 1.0 - mixture), m))
    # A divergence without weight is not there, be it infinite.
    to_p, to_q = jnp.where(reverse < 1, to_p, 0.0), jnp.where(reverse > 0, to_q, 0.0)
    return (1.0 - reverse) * to_p + reverse * to_q


def slopes(x: Pair, reverse, mixture):
    """`g = q dF/dq` of each class; a class that makes the divergence infinite has none."""
    both = x.in_student & x.in_teacher
    if reverse is None:
        return jnp.where(both, -x.p, 0.0)
    rest = 1.0 - mixture
    u = _log_mixed(x.ratio, mixture)
    v = u - x.ratio
    # q p / m and q q / m, as exponentials of logs: no quotient of two that underflow.
    of_p = -rest * jnp.exp(x.log_q - u)
    of_q = x.q - x.q * v - rest * jnp.exp(jnp.where(rest > 0, x.log_q - v, 0.0))
    alone = -x.q * jnp.where(rest > 0, jnp.log(jnp.where(rest > 0, rest, 1.0)), 0.0)
    of_q = jnp.where(both, of_q, jnp.where(x.in_student, alone, 0.0))
    return (1.0 - reverse) * jnp.where(both, of_p, 0.0) + reverse * of_q


def _gap(p, m, log):
    """`m - p - p log(m / p)`, exact to its own size."""
    near = jnp.abs(log) <= NEAR
    return jnp.where(near, p * excess(jnp.where(near, log, 0.0)), m - p - p * log)


def _alone(p, share):
    """The same where `m = share * p`."""
    some = share > 0
    log = jnp.where(some, jnp.log(jnp.where(some, share, 1.0)), -jnp.inf)
    there = p > 0
    return jnp.where(there, share * p - p - jnp.where(there, p, 1.0) * log, 0.0)


def _log_mixed(ratio, mixture):
    """`log(m / p) = log(λ + (1 - λ) e^ratio)`."""
    near = jnp.abs(ratio) <= 1.0
    fine = jnp.log1p((1.0 - mixture) * jnp.expm1(jnp.where(near, ratio, 0.0)))
    logs = jnp.log(mixture), jnp.log1p(-mixture) + ratio
    return jnp.where(near, fine, jnp.logaddexp(jnp.broadcast_to(logs[0], ratio.shape), logs[1]))
