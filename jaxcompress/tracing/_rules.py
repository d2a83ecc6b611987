"""What each operation does with each type of compressed array."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import arrays
from jaxcompress.tracing import _dot, _views
from jaxcompress.tracing._conv import thin_conv
from jaxcompress.tracing._gather import take
from jaxcompress.tracing._product import Product
from jaxcompress.tracing._weights import Weight

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
    value = _unpacked(weight.value)
    low_rank = isinstance(value, (Product, arrays.LowRank))
    out = eqn.outvars[0].aval

    def decoded():
        return run([*values[:operand], value.todense(), *values[operand + 1 :]])[0][0]

    if name == "dot_general":
        dot = _dot.read_dot(eqn, operand)
        if low_rank:
            return _dot.thin(others[0], _views.as_product(value), dot, out)
        if _views.is_plain(value) and _dot.scales_outside(value, dot):
            if step_of is None:
                return _dot.weight_only(others[0], value, dot, out)
            return _dot.integer(others[0], value, dot, out, step_of(others[0], dot))
        return decoded()
    if name == "conv_general_dilated" and operand == 1:
        return thin_conv(others[0], _views.as_product(value), eqn) if low_rank else decoded()
    if name == "gather" and operand == 0:
        rows = take(value, others[0], eqn)
        return rows if rows is not None or low_rank else decoded()
    if name == "ragged_dot_general" and operand == 1:
        return _ragged(others, _views.as_product(value), eqn) if low_rank else decoded()
    if operand == 0:
        viewed = _views.view(value, eqn, others, run)
        if viewed is None or isinstance(viewed, jax.Array):
            return viewed
        return Weight(viewed, weight.path)
    return None


def _unpacked(value: Any) -> Any:
    """Codes of less than 8 bits one to a byte, where nothing else stands for a value."""
    if not isinstance(value, arrays.Quantized) or value.group is not None:
        return value
    absent_is_zero = value.zero_point is None and not value.binary
    if isinstance(value.codes, arrays.Packed) or (
        arrays.is_compressed(value.codes) and absent_is_zero
    ):
        return dataclasses.replace(value, codes=value.codes.todense())
    return value


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
