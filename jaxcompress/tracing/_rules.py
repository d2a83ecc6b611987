"""What each operation does with each type of compressed array."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays
from jaxcompress.tracing import _conv_chain, _dot, _moved, _sums, _views
from jaxcompress.tracing._blocks import multiply_blocks
from jaxcompress.tracing._conv import thin_conv
from jaxcompress.tracing._gather import take
from jaxcompress.tracing._joined import Joined
from jaxcompress.tracing._product import Product
from jaxcompress.tracing._weights import ARITHMETIC, Weight

StepOf = Callable[[jax.Array, _dot.Dot], jax.Array] | None
"""From activations and how they are joined with a weight to their integer step."""


def apply_rule(
    weight: Weight, operand: int, values: list[Any], eqn: Any, run: Callable, step_of: StepOf
) -> Any:
    """The result of an equation with one compressed operand; None where there is no rule.

    Args:
        weight: the operand.
        operand: its index.
        values: all operands.
        eqn: the equation.
        run: `values -> (results, records)`, the equation on dense values.
        step_of: None for floating-point products.
    """
    name, others = eqn.primitive.name, values[:operand] + values[operand + 1 :]
    if isinstance(weight.value, _conv_chain.CHAINS):
        return _conv_chain.apply_chain(weight, operand, values, eqn, run)
    if name == "dot_general":
        if _conv_chain.holds_chain(weight.value):
            return None
        dot, dtype = _dot.read_dot(eqn, operand), eqn.outvars[0].aval.dtype
        return multiply(others[0], weight.value, dot, dtype, step_of, weight.path)
    if isinstance(weight.value, _sums.SUMS):
        rule = functools.partial(apply_rule, step_of=step_of)
        return _sums.apply(weight, operand, values, eqn, run, rule)
    if isinstance(weight.value, _moved.MOVED):
        return _apply_moved(weight, operand, values, eqn, run, step_of)
    value = _unpacked(weight.value)
    low_rank = isinstance(value, (Product, arrays.LowRank))

    def decoded():
        return run([*values[:operand], value.todense(), *values[operand + 1 :]])[0][0]

    if isinstance(value, Joined):
        return None
    if name == "conv_general_dilated" and operand == 1:
        return thin_conv(others[0], _views.as_product(value), eqn) if low_rank else decoded()
    if name == "gather" and operand == 0:
        rows = take(weight.value, others[0], eqn)
        return rows if rows is not None or low_rank else decoded()
    if name in ARITHMETIC and not low_rank:
        return decoded()
    if name == "ragged_dot_general" and operand == 1:
        return _ragged(others, _views.as_product(value), eqn) if low_rank else decoded()
    if operand == 0:
        viewed = _views.view(value, eqn, others, run)
        if viewed is None or isinstance(viewed, jax.Array):
            return viewed
        return Weight(viewed, weight.path)
    return None


def _apply_moved(
    weight: Weight, operand: int, values: list[Any], eqn: Any, run: Callable, step_of: StepOf
) -> Any:
    """For a leaf in scaled or rotated features: what is inside meets activations in the same."""
    name, value = eqn.primitive.name, weight.value
    others = values[:operand] + values[operand + 1 :]
    if name == "conv_general_dilated" and operand == 1:
        x, inner = _moved.conv_activations(others[0], value, eqn.params), _moved.inside(value)
        if x is not None:
            step_of = _moved.step_inside(step_of, weight.path)
            if not hasattr(type(inner), "todense"):
                return run([x, inner])[0][0]
            return apply_rule(Weight(inner, weight.path), 1, [x, inner], eqn, run, step_of)
    if name == "gather" and operand == 0:
        rows = take(value, others[0], eqn)
        if rows is not None:
            return rows
    decoding = ARITHMETIC | {"conv_general_dilated", "gather", "ragged_dot_general"}
    if name in decoding:
        return run([*values[:operand], value.todense(), *values[operand + 1 :]])[0][0]
    viewed = _moved.moved_view(value, eqn, others, run) if operand == 0 else None
    if viewed is None or isinstance(viewed, jax.Array):
        return viewed
    return Weight(viewed, weight.path)


def multiply(
    x: jax.Array, value: Any, dot: _dot.Dot, dtype: Any, step_of: StepOf, path: str | None = None
) -> jax.Array:
    """A matrix product with a compressed array, or with a plain one."""
    if isinstance(value, Joined):
        return _multiply_parts(x, value, dot, dtype, step_of)
    if isinstance(value, _sums.SUMS):
        rule = functools.partial(multiply, step_of=step_of, path=path)
        return _sums.product(x, value, dot, dtype, rule)
    moved = _moved.dot_activations(x, value, dot) if isinstance(value, _moved.MOVED) else None
    if moved is not None:
        step_of = _moved.step_inside(step_of, path)
        return multiply(moved, _moved.inside(value), dot, dtype, step_of, path)
    y = _multiply_blocks(x, value, dot, dtype) if step_of is None else None
    if y is not None:
        return y
    value = _unpacked(value)
    if isinstance(value, (Product, arrays.LowRank)):
        return _dot.thin(x, _views.as_product(value), dot, dtype)
    if _views.is_plain(value) and _dot.scales_outside(value, dot):
        if step_of is None or not jnp.issubdtype(value.codes.dtype, jnp.integer):
            return _dot.weight_only(x, value, dot, dtype)
        return _dot.integer(x, value, dot, dtype, step_of(x, dot))
    dense = value.todense() if hasattr(type(value), "todense") else value
    return _dot.plain(x, dense, dot, dot.params["preferred_element_type"]).astype(dtype)


def _multiply_blocks(x: jax.Array, value: Any, dot: _dot.Dot, dtype: Any) -> jax.Array | None:
    """The product with kept blocks, or with the codes in them; None where there are none."""
    if isinstance(value, arrays.BlockSparse):
        return multiply_blocks(x, value, dot, dtype)
    coded = isinstance(value, arrays.Quantized) and isinstance(value.codes, arrays.BlockSparse)
    if not coded or value.group is not None or not _absent_is_zero(value):
        return None
    if not _dot.scales_outside(value, dot):
        return None
    value = dataclasses.replace(value, scale=arrays.todense(value.scale))
    steps = arrays.todense(value.codes.values).astype(x.dtype)
    codes = dataclasses.replace(value.codes, values=steps)
    y = multiply_blocks(x, codes, dot, _dot.wide(x.dtype))
    return None if y is None else _dot.scaled(y, value, dot, dtype)


def _multiply_parts(x, joined: Joined, dot: _dot.Dot, dtype, step_of) -> jax.Array:
    """Along a contracted axis the parts' products add up, along others they are joined."""
    label = dot.w[joined.axis]
    pieces = [x] * len(joined.parts)
    if label in dot.x:
        sizes = np.cumsum([part.shape[joined.axis] for part in joined.parts])
        pieces = jnp.split(x, sizes[:-1], axis=dot.x.index(label))
    results = [
        multiply(piece, part, dot, dtype, step_of)
        for piece, part in zip(pieces, joined.parts, strict=True)
    ]
    if label in dot.out:
        return jnp.concatenate(results, axis=dot.out.index(label))
    return functools.reduce(jnp.add, results)


def join(values: list[Any], eqn: Any) -> Weight | None:
    """Weights that are concatenated, as the kernels of the gates of an LSTM; None for others."""
    if eqn.primitive.name != "concatenate":
        return None
    parts = [v.value if isinstance(v, Weight) else v for v in values]
    paths = [v.path for v in values if isinstance(v, Weight)]
    return Weight(Joined(parts, eqn.params["dimension"]), " + ".join(paths))


def _unpacked(value: Any) -> Any:
    """Packed codes one by one and nested scales as floats, where scales may stay outside."""
    if not isinstance(value, arrays.Quantized) or value.group is not None:
        return value
    value = dataclasses.replace(value, scale=arrays.todense(value.scale))
    if isinstance(value.codes, arrays.Packed) or (
        arrays.is_compressed(value.codes) and _absent_is_zero(value)
    ):
        return dataclasses.replace(value, codes=value.codes.todense())
    return value


def _absent_is_zero(value: arrays.Quantized) -> bool:
    return value.zero_point is None and not value.binary


def _ragged(others: list[Any], product: Product, eqn: Any) -> jax.Array | None:
    """Per group the first factor; the second, which all groups share, after it."""
    params, out = eqn.params, eqn.outvars[0].aval
    numbers = params["ragged_dot_dimension_numbers"]
    joined = (*numbers.dot_dimension_numbers[0][1], *numbers.rhs_group_dimensions)
    # As the factors of a low-rank [groups, inputs, outputs] come, with the outputs in v.
    plain = product.left == (0, 1) and product.groups == ((0,), (1,), (2,)) and 2 not in joined
    if not plain:
        return None
    x, group_sizes = others
    y = jax.lax.ragged_dot_general(
        x,
        product.u.astype(product.dtype),
        group_sizes,
        numbers,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    y = jnp.einsum(
        "...r,rn->...n",
        y.astype(x.dtype),
        product.v.astype(product.dtype),
        preferred_element_type=out.dtype,
    )
    return y.astype(out.dtype)
