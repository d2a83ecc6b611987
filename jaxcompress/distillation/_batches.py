"""Batches of features, [batch, ..., channels]: what the losses on features share.

What does not count is replaced by zeros before it is computed with, so that neither a value
nor a gradient is NaN where the loss is finite. Lengths of zero are replaced by one for a division.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check

ALL: tuple[Callable, str] = (lambda shape: shape, "shape")
POSITIONS: tuple[Callable, str] = (lambda shape: shape[:-1], "axes before the channels")
ROWS_AND_CHANNELS: tuple[Callable, str] = (
    lambda shape: (shape[0], shape[-1]),
    "batch and channels",
)
ROWS: tuple[Callable, str] = (lambda shape: shape[:1], "batch")
"""What of two shapes must agree, and its name."""

_ADAPT = "Bring the features together first with an adapter: a projection, pooling, interpolation."


def read(function: str, student, teacher, where, agree: tuple[Callable, str], ndim: int = 2):
    """Both features, checked, zero where they do not count, and which do, [batch, ...]."""
    check(function, "student", student, ndim)
    check(function, "teacher", teacher, ndim)
    require(function, "teacher", teacher, agree, "the student's", student)
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    double = jnp.float64 in (student.dtype, teacher.dtype)
    dtype = jnp.float64 if double else jnp.float32
    keep = mask_of(function, where, student.shape, teacher.shape)
    return masked(student.astype(dtype), keep), masked(teacher.astype(dtype), keep), keep


def check(function: str, name: str, features: Any, ndim: int) -> None:
    """Refuses what is not real floating-point features of at least `ndim` axes."""
    got = _check.describe(features)
    if not hasattr(features, "dtype") or not jnp.issubdtype(features.dtype, jnp.floating):
        raise TypeError(_check.message(function, name, "be real floating-point features", got))
    if features.ndim < ndim:
        axes = "[batch, ..., channels]" if ndim == 2 else "[batch, positions..., channels]"
        raise ValueError(_check.message(function, name, f"have the axes {axes}", got))


def require(function: str, name: str, features, agree, whose: str, other) -> None:
    """Refuses features whose shape does not agree with another's where it must."""
    part, label = agree
    expected = part(other.shape)
    if part(features.shape) != expected:
        rule, got = f"have {whose} {label} {list(expected)}", _check.describe(features)
        raise ValueError(_check.message(function, name, rule, got, _ADAPT))


def mask_of(function: str, where, *shapes: Sequence[int]) -> jax.Array:
    """Which rows or positions count: booleans whose shape begins that of all the features."""
    if where is None:
        return jnp.ones(shapes[0][:1], bool)
    leading = list(shapes[0][:-1])
    while any(
        list(shape[: len(leading)]) != leading or len(shape) <= len(leading) for shape in shapes
    ):
        leading.pop()
    rule = f"be booleans of shape {list(leading[:1])}, one per row"
    if len(leading) > 1:
        rule += f", or of more of the leading axes {leading}"
    got = _check.describe(where)
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(_check.message(function, "where", rule, got))
    shape = jnp.shape(where)
    if not shape or list(shape) != leading[: len(shape)]:
        raise ValueError(_check.message(function, "where", rule, got))
    return jnp.asarray(where)


def masked(x: jax.Array, keep: jax.Array) -> jax.Array:
    """`x`, zero where it does not count; what was there is not read."""
    return jnp.where(jnp.expand_dims(keep, range(keep.ndim, x.ndim)), x, 0.0)


def rows_of(keep: jax.Array) -> jax.Array:
    """Which rows count: those of which anything does."""
    return jnp.any(keep, tuple(range(1, keep.ndim)))


def counted(keep: jax.Array, shape: Sequence[int], dtype) -> jax.Array:
    """How many of the entries of each row count, at least 1."""
    each = jnp.sum(keep, tuple(range(1, keep.ndim)), dtype=dtype)
    return jnp.maximum(each * math.prod(shape[keep.ndim :]), 1.0)


def flat(x: jax.Array) -> jax.Array:
    """One vector per row."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def rescaled(x: jax.Array, axis: int | Sequence[int]) -> jax.Array:
    """`x` to a magnitude of about 1, for what does not depend on scale; so that has no gradient.

    By a power of two, so that differences lose no digits.
    """
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0))
    top = jnp.where(top == 0, 1.0, top)
    mantissa, _ = jnp.frexp(top)
    return x / (top / mantissa)


def unit(x: jax.Array, axis: int | Sequence[int] = -1) -> jax.Array:
    """`x` over its Euclidean length; a vector of zeros stays, and gets no gradient."""
    x = rescaled(x, axis)
    squares = jnp.sum(jnp.square(x), axis, keepdims=True)
    none = squares == 0
    return jnp.where(none, 0.0, x / jnp.sqrt(jnp.where(none, 1.0, squares)))


def root(squares: jax.Array) -> jax.Array:
    """The square root, with gradient zero at zero."""
    none = squares == 0
    return jnp.where(none, 0.0, jnp.sqrt(jnp.where(none, 1.0, squares)))
