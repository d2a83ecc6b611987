"""Matrix products with a compressed operand."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.arrays import Quantized
from jaxcompress.tracing._product import Product


class Dot(NamedTuple):
    """Which axes of the activations and of the weight a product joins, and where they go.

    Attributes:
        x: a label for each axis of the activations.
        w: the same for the weight.
        out: the same for the result. Contracted labels are not in it.
        operand: index of the weight among the operands.
        params: those of the equation.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    out: tuple[int, ...]
    operand: int
    params: dict[str, Any]


def read_dot(eqn: Any, operand: int) -> Dot:
    """The labels of a `dot_general` whose weight is the operand of that index."""
    contract, batch = eqn.params["dimension_numbers"]
    ndims = [len(v.aval.shape) for v in eqn.invars]
    left = list(range(ndims[0]))
    right = [ndims[0] + i for i in range(ndims[1])]
    for pairs in (contract, batch):
        for i, j in zip(*pairs, strict=True):
            right[j] = left[i]
    shared = [left[i] for i in batch[0]]
    used = {left[i] for i in (*contract[0], *batch[0])}
    out = shared + [a for a in left if a not in used] + [a for a in right if a not in used]
    sides = (left, right) if operand == 1 else (right, left)
    return Dot(tuple(sides[0]), tuple(sides[1]), tuple(out), operand, eqn.params)


def thin(x: jax.Array, product: Product, dot: Dot, dtype: Any) -> jax.Array:
    """Two thinner products, in the order that takes fewer operations."""
    # Labels of the factors' axes, apart from those of the activations' free axes. An axis
    # that was merged of several is split in the activations and in the result.
    base = 1 + max((*dot.x, *dot.w), default=0)
    split = {
        a: tuple(base + i for i in group) for a, group in zip(dot.w, product.groups, strict=True)
    }
    rank = base + 1 + max(product.sizes)
    sizes = {base + i: size for i, size in product.sizes.items()}
    whole = dict(zip(dot.x, x.shape, strict=True)) | dict(zip(dot.w, product.shape, strict=True))

    def labels(axes):
        return tuple(b for a in axes for b in split.get(a, (a,)))

    x = x.reshape([sizes[b] if b in sizes else whole[b] for b in labels(dot.x)])
    fine = dot._replace(x=labels(dot.x), out=labels(dot.out))
    factors = [
        (product.u, (*(base + a for a in product.left), rank)),
        (product.v, (rank, *(base + a for a in product.right))),
    ]
    orders = [_plan(x, fine, factors), _plan(x, fine, factors[::-1])]
    _, middle, (first, second) = min(orders, key=lambda plan: plan[0])
    y = _einsum(
        x, fine.x, first[0].astype(product.dtype), first[1], middle, dot.params, wide(x.dtype)
    )
    y = _einsum(
        y.astype(x.dtype),
        middle,
        second[0].astype(product.dtype),
        second[1],
        fine.out,
        dot.params,
        dtype,
    )
    return y.reshape([whole[a] for a in dot.out])


def wide(dtype: Any) -> Any:
    """What sums and scales are kept in between: at least float32."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _plan(x: jax.Array, dot: Dot, factors):
    """Operations, labels in between, and the order of the factors."""
    (first, first_labels), (second, second_labels) = factors
    sizes = dict(zip(dot.x, x.shape, strict=True))
    for factor, labels in factors:
        sizes.update(zip(labels, factor.shape, strict=True))
    joined = dict.fromkeys((*dot.x, *first_labels))
    middle = tuple(a for a in joined if a in (*second_labels, *dot.out))
    operations = math.prod(sizes[a] for a in joined)
    operations += math.prod(sizes[a] for a in dict.fromkeys((*middle, *second_labels)))
    return operations, middle, ((first, first_labels), (second, second_labels))


def _einsum(a, a_labels, b, b_labels, out_labels, params, dtype):
    return jnp.einsum(
        a,
        list(a_labels),
        b,
        list(b_labels),
        list(out_labels),
        precision=params["precision"],
        preferred_element_type=dtype,
    )


def scales_outside(weight: Quantized, dot: Dot) -> bool:
    """Whether the scales may be applied to the result: none differ along contracted axes."""
    contracted = set(dot.x) & set(dot.w) - set(dot.out)
    return all(
        size == 1 or label not in contracted
        for size, label in zip(weight.scale.shape, dot.w, strict=True)
    )


def codes_of(weight: Quantized, dtype: Any) -> jax.Array:
    """The steps that the scale multiplies, with the zero point taken off, in `dtype`."""
    steps = weight.codes.astype(dtype)
    if weight.binary:
        return steps + steps - jnp.ones((), dtype)
    if weight.zero_point is None:
        return steps
    if jnp.issubdtype(weight.zero_point.dtype, jnp.floating):
        # Integers of 8 bits are exact in any dtype, others are taken off before rounding.
        return (weight.codes.astype(jnp.float32) - weight.zero_point).astype(dtype)
    return steps - weight.zero_point.astype(dtype)


def weight_only(x: jax.Array, weight: Quantized, dot: Dot, dtype: Any) -> jax.Array:
    """Floating-point activations times integer codes; the scales multiply the result."""
    y = plain(x, codes_of(weight, x.dtype), dot, wide(x.dtype))
    return scaled(y, weight, dot, dtype)


def scaled(y: jax.Array, weight: Quantized, dot: Dot, dtype: Any) -> jax.Array:
    """A product with the codes, in `wide`, times their scales."""
    return (y * to_result(weight.scale, dot.w, dot).astype(y.dtype)).astype(dtype)


def integer(x: jax.Array, weight: Quantized, dot: Dot, dtype: Any, step: jax.Array) -> jax.Array:
    r"""int8 activations times int8 codes, summed in int32.

    .. math:: y = \Delta_x \Delta_w \left(\sum q_x c - z \sum q_x\right)

    Args:
        x: activations.
        weight: with scales that may be applied outside.
        dot: how they are joined.
        dtype: static. Of the result.
        step: :math:`\Delta_x`, of the rank of `x`, of size 1 along contracted axes.
    """
    codes, zero_point = _signed(weight)
    q = jnp.clip(jnp.round(x.astype(jnp.float32) * (1 / step)), -127, 127)
    # By way of int32: on CPU a cast from float32 to int8 is slow.
    q = q.astype(jnp.int32).astype(jnp.int8)
    total = plain(q, codes, dot, jnp.int32).astype(jnp.float32)
    if zero_point is not None:
        contracted = tuple(i for i, a in enumerate(dot.x) if a not in dot.out)
        sums = jnp.sum(q, axis=contracted, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
        # Along contracted axes the zero point is of size 1: they are the scale's.
        total = total - to_result(sums, dot.x, dot) * to_result(zero_point, dot.w, dot)
    scale = weight.scale.astype(jnp.float32)
    total = total * to_result(step, dot.x, dot) * to_result(scale, dot.w, dot)
    return total.astype(dtype)


def _signed(weight: Quantized) -> tuple[jax.Array, jax.Array | None]:
    if weight.binary:
        return codes_of(weight, jnp.int8), None
    zero_point = None
    if weight.zero_point is not None:
        zero_point = weight.zero_point.astype(jnp.float32)
    if weight.codes.dtype == jnp.int8:
        return weight.codes, zero_point
    shifted = (weight.codes.astype(jnp.int16) - 128).astype(jnp.int8)
    base = jnp.zeros(weight.scale.shape, jnp.float32) if zero_point is None else zero_point
    return shifted, base - 128


def plain(x: jax.Array, w: jax.Array, dot: Dot, dtype: Any) -> jax.Array:
    """The product as the equation has it, on other arrays."""
    params = dot.params | {"preferred_element_type": dtype}
    return jax.lax.dot_general(*((x, w) if dot.operand == 1 else (w, x)), **params)


def to_result(part: jax.Array, labels: Sequence[int], dot: Dot) -> jax.Array:
    """A part of one operand, of size 1 along contracted axes, as it multiplies the result."""
    kept = [(i, a) for i, a in enumerate(labels) if a in dot.out]
    gone = tuple(i for i, a in enumerate(labels) if a not in dot.out)
    part = jax.lax.squeeze(part, gone)
    order = sorted(range(len(kept)), key=lambda i: dot.out.index(kept[i][1]))
    part = part.transpose(order)
    places = {dot.out.index(a) for _, a in kept}
    return jnp.expand_dims(part, tuple(set(range(len(dot.out))) - places))


def per_token(x: jax.Array, dot: Dot) -> jax.Array:
    """The step that takes the largest entry of each row to 127; 1 for rows of zeros."""
    contracted = tuple(i for i, a in enumerate(dot.x) if a not in dot.out)
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=contracted, keepdims=True, initial=0.0)
    return jnp.where(largest == 0, 1.0, largest / 127)
