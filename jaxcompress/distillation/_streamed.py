"""Divergences of two models' last layers, summed over chunks of tokens and of classes.

The forward pass goes over the classes twice, for the normalizers (with a running maximum) and
for the divergence; the backward pass goes over them once more, making logits again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.distillation._streamed_terms import pair, slopes, terms


class Side(NamedTuple):
    """A model's last layer: `hidden @ head + bias`."""

    hidden: jax.Array
    head: jax.Array
    bias: jax.Array | None


class Plan(NamedTuple):
    """What is static: rows and classes at a time, and which heads are [classes, features]."""

    tokens: int
    classes: int
    transposed: tuple[bool, bool]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def streamed_loss(plan: Plan, student: Side, teacher: Side, temperature, numbers):
    return _forward(plan, student, teacher, temperature, numbers)[0]


def _forward(plan, student, teacher, temperature, numbers):
    """The loss and what the backward pass needs, a few numbers per token."""
    reverse, mixture = numbers or (None, None)
    starts = _starts(plan, student)
    blank = (
        jnp.full(temperature.shape[1:], -jnp.inf, temperature.dtype),
        jnp.zeros_like(temperature[0]),
    )

    def one(_, xs):
        ours, theirs, t = xs
        sides = student._replace(hidden=ours), teacher._replace(hidden=theirs)

        def normalize(carry, first):
            z = _logits(plan, *sides, first, t.dtype)
            return tuple(_running(c, x, t) for c, x in zip(carry, z, strict=True)), None

        def add(carry, first):
            s, z = _logits(plan, *sides, first, t.dtype)
            x = pair(s, z, norms[0], norms[1], t[:, None])
            new = terms(x, reverse, mixture), slopes(x, reverse, mixture)
            return tuple(c + jnp.sum(n, -1) for c, n in zip(carry, new, strict=True)), None

        norms = _over(normalize, (blank, blank), starts)
        norms = tuple((_column(top), _log(total)) for top, total in norms)
        zero = jnp.zeros_like(t)
        value, slope = _over(add, (zero, zero), starts)
        return None, (t * t * value, norms, slope)

    _, (loss, norms, slope) = jax.lax.scan(one, None, (student.hidden, teacher.hidden, temperature))
    return loss, (student, teacher, temperature, numbers, norms, slope)


def _backward(plan, kept, cotangent):
    """The student's gradients, a slice of its head at a time."""
    student, teacher, temperature, numbers, norms, slope = kept
    reverse, mixture = numbers or (None, None)
    axis, dtype = int(not plan.transposed[0]), temperature.dtype
    tokens = student.hidden, teacher.hidden, temperature, norms, slope, cotangent

    def by_classes(carry, first):
        d_hidden, d_head, d_bias = carry
        start = _start(plan, student, first)
        head = _slice(plan, student.head, start, axis).astype(dtype)

        def by_tokens(carry, xs):
            ours, theirs, t, norms, slope, cotangent = xs
            sides = student._replace(hidden=ours), teacher._replace(hidden=theirs)
            s, z = _logits(plan, *sides, first, dtype)
            x = pair(s, z, norms[0], norms[1], t[:, None])
            g = slopes(x, reverse, mixture) - x.q * slope[:, None]
            g = g * (cotangent * t)[:, None]
            back = jax.lax.dot_general(g, head, (((1,), (axis,)), ((), ())))
            left, right = (ours.astype(dtype), g) if axis == 1 else (g, ours.astype(dtype))
            outer = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))
            return (carry[0] + outer, carry[1] + jnp.sum(g, 0)), back

        zero = jnp.zeros(head.shape, dtype), jnp.zeros(plan.classes, dtype)
        (outer, bias), back = jax.lax.scan(by_tokens, zero, tokens)
        d_head, d_bias = _add(d_head, outer, start, axis), _add(d_bias, bias, start, 0)
        return (d_hidden + back, d_head, d_bias), None

    zeros = (
        jnp.zeros(student.hidden.shape, dtype),
        jnp.zeros(student.head.shape, dtype),
        jnp.zeros(student.head.shape[axis], dtype),
    )
    d_hidden, d_head, d_bias = _over(by_classes, zeros, _starts(plan, student))
    bias = None if student.bias is None else d_bias.astype(student.bias.dtype)
    grads = Side(d_hidden.astype(student.hidden.dtype), d_head.astype(student.head.dtype), bias)
    return grads, None, None, None


streamed_loss.defvjp(_forward, _backward)


def _over(step, carry, firsts):
    """`carry` after each chunk of classes; without a loop where there is one."""
    if firsts.size == 1:
        return step(carry, firsts[0])[0]
    return jax.lax.scan(step, carry, firsts)[0]


def _starts(plan, student):
    """The first class of each chunk."""
    classes = student.head.shape[int(not plan.transposed[0])]
    return jnp.arange(0, classes, plan.classes, dtype=jnp.int32)


def _start(plan, student, first):
    """Where a slice begins that has the chunk's classes: the last reaches back to its width."""
    return jnp.minimum(first, student.head.shape[int(not plan.transposed[0])] - plan.classes)


def _slice(plan, x, start, axis):
    whole = x.shape[axis] == plan.classes
    return x if whole else jax.lax.dynamic_slice_in_dim(x, start, plan.classes, axis)


def _add(x, part, start, axis):
    if x.shape == part.shape:
        return x + part
    old = jax.lax.dynamic_slice_in_dim(x, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, start, axis)


def _logits(plan, student, teacher, first, dtype):
    """Both models' logits of a chunk of classes; -inf for those of the chunk before."""
    start = _start(plan, student, first)
    fresh = start + jnp.arange(plan.classes, dtype=jnp.int32) >= first
    found = []
    for side, transposed in zip((student, teacher), plan.transposed, strict=True):
        axis = int(not transposed)
        kind = side.hidden.dtype if side.hidden.dtype == side.head.dtype else dtype
        head = _slice(plan, side.head, start, axis).astype(kind)
        dims = (((1,), (1 - axis,)), ((), ()))
        z = jax.lax.dot_general(side.hidden.astype(kind), head, dims, preferred_element_type=dtype)
        if side.bias is not None:
            z = z + _slice(plan, side.bias, start, 0).astype(dtype)[None]
        found.append(jnp.where(fresh[None], z, -jnp.inf))
    return found


def _running(carry, z, temperature):
    """The largest logit so far, and the sum of the exponentials below it."""
    top, total = carry
    new = jnp.maximum(top, jnp.max(z, -1))
    safe = jnp.where(new == -jnp.inf, 0.0, new)
    old = jnp.where(top == -jnp.inf, 0.0, total * jnp.exp((top - safe) / temperature))
    return new, old + jnp.sum(jnp.exp((z - safe[:, None]) / temperature[:, None]), -1)


def _column(top):
    return jnp.where(top == -jnp.inf, 0.0, top)[:, None]


def _log(total):
    return jnp.log(jnp.where(total == 0, 1.0, total))[:, None]
