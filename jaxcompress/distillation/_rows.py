"""Rows of logits as distributions over the classes: what the losses on logits share.

All is done with logarithms of probabilities, and what is masked out is replaced before it is
computed with, so that neither a value nor a gradient is NaN where the loss is finite.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check


class Row(NamedTuple):
    """A distribution over the classes: which it has, their logs (0 elsewhere), themselves."""

    present: jax.Array
    logs: jax.Array
    probabilities: jax.Array


def require_temperature(function: str, temperature: Any, rows: tuple[int, ...]) -> None:
    """Refuses what is neither a scalar nor one number per row, and known ones not in (0, inf)."""
    rule = "be a real number above 0"
    rule += f", or {list(rows)} of them, one per row" if rows else ""
    got = _check.describe(temperature)
    if temperature is None or isinstance(temperature, (bool, str)) or callable(temperature):
        raise TypeError(_check.message(function, "temperature", rule, got))
    kind = jnp.result_type(temperature)
    if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
        raise TypeError(_check.message(function, "temperature", rule, got))
    if jnp.shape(temperature) not in ((), rows):
        raise ValueError(_check.message(function, "temperature", rule, got))
    if not _check.is_traced(temperature):
        known = np.asarray(temperature)
        if not np.all((known > 0) & np.isfinite(known)):
            raise ValueError(_check.message(function, "temperature", rule, temperature))


def require_logits(function: str, argument: str, logits: Any) -> None:
    """Refuses what is not a real floating-point array with a last axis of classes."""
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        rule, fix = "be real floating-point logits", "Give logits, not labels."
        raise TypeError(_check.message(function, argument, rule, _check.describe(logits), fix))
    if logits.ndim == 0:
        rule, got = "have a last axis of classes", _check.describe(logits)
        raise ValueError(_check.message(function, argument, rule, got))


def read(function, student, teacher, temperature, where):
    """Both logits, the temperature and the mask, checked, in the dtype to compute in."""
    for name, logits in {"student_logits": student, "teacher_logits": teacher}.items():
        require_logits(function, name, logits)
    if student.shape != teacher.shape:
        rule = f"have the shape of `student_logits`, {list(student.shape)}"
        fix = "Both have a logit for each class of each row; broadcast them yourself."
        got = _check.describe(teacher)
        raise ValueError(_check.message(function, "teacher_logits", rule, got, fix))
    require_temperature(function, temperature, student.shape[:-1])
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    double = jnp.float64 in (student.dtype, teacher.dtype)
    dtype = jnp.float64 if double else jnp.float32
    keep = mask_of(function, where, student.shape)
    temperature = jnp.asarray(temperature, dtype)
    return student.astype(dtype), teacher.astype(dtype), temperature, keep


def mask_of(function, where, shape):
    if where is None:
        return jnp.ones(shape, bool)
    rule = f"be booleans that broadcast to the logits' shape {list(shape)}"
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(_check.message(function, "where", rule, _check.describe(where)))
    try:
        return jnp.broadcast_to(jnp.asarray(where), shape)
    except ValueError:
        got = _check.describe(where)
        raise ValueError(_check.message(function, "where", rule, got)) from None


def positive(temperature):
    """The temperature, NaN where it is not above 0: what is traced cannot be refused."""
    return jnp.where(temperature > 0, temperature, jnp.nan)


def share(function, argument, value, dtype):
    """A number in [0, 1]: checked if known, NaN if it is outside."""
    _check.number(function, argument, value, 0.0, 1.0)
    value = jnp.asarray(value, dtype)
    return jnp.where((value >= 0) & (value <= 1), value, jnp.nan)


def ids_below(size, ids):
    """The ids in int32, `size` in place of those that are not 0 to `size - 1`."""
    # Widened before the comparison, narrowed after it: no id wraps into the range.
    ids = jnp.asarray(ids)
    ids = ids if ids.dtype.itemsize > 4 else ids.astype(jnp.int32)
    return jnp.where((ids >= 0) & (ids < size), ids, size).astype(jnp.int32)


def column(row):
    """One number per row, to be used on the rows."""
    return row if row.ndim == 0 else jnp.expand_dims(row, -1)


def softmax(logits, temperature, keep) -> Row:
    """Each row's distribution; NaN at a temperature that is not above 0, if it has classes."""
    present, z = shifted(logits, temperature, keep)
    some = jnp.any(present, -1, keepdims=True)
    powers = jnp.where(present, jnp.exp(z), 0.0)
    total = jnp.where(some, jnp.sum(powers, -1, keepdims=True), 1.0)
    return Row(present, jnp.where(present, z - jnp.log(total), 0.0), powers / total)


def shifted(logits, temperature, keep):
    """Which classes there are, and their logits below the largest over the temperature."""
    present = keep & (logits != -jnp.inf)
    # Shifted, then divided: the largest is 0 to the last bit, and no log is above 0.
    z = jnp.where(present, logits, 0.0) - largest(logits, present)
    return present, jnp.where(present, z / column(positive(temperature)), 0.0)


def largest(x, present):
    """The largest entry present of each row, 0 if there is none. Has no gradient."""
    x = jax.lax.stop_gradient(jnp.where(present, x, -jnp.inf))
    top = jnp.max(x, -1, keepdims=True, initial=-jnp.inf)
    return jnp.where(jnp.any(present, -1, keepdims=True), top, 0.0)


def log_sum(x, present):
    """The logarithm of the sum of exponentials of those present, -inf if there are none."""
    top, some = largest(x, present), jnp.any(present, -1)
    powers = jnp.where(present, jnp.exp(jnp.where(present, x - top, 0.0)), 0.0)
    total = jnp.where(some, jnp.sum(powers, -1), 1.0)
    return jnp.where(some, jnp.squeeze(top, -1) + jnp.log(total), -jnp.inf)


def ruled_out(p: Row):
    """The infinite terms of classes that the teacher has and the student rules out."""
    return jnp.where(p.probabilities > 0, jnp.inf, 0.0)


def surprise(q: Row, p: Row):
    """The terms of the cross-entropy: each class's `-p log q`, of the teacher's p."""
    # A probability of 0 reads no logarithm: as a slope, times a weight, it may overflow.
    logs = jnp.where(p.probabilities > 0, q.logs, 0.0)
    return jnp.where(p.present & ~q.present, ruled_out(p), -p.probabilities * logs)
