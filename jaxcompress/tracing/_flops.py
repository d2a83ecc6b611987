"""Operations and bytes of one equation."""

import math
from typing import Any

import numpy as np

_ELEMENTWISE = frozenset(
    "add sub mul div rem neg abs sign max min floor ceil round exp exp2 expm1 log log1p tanh"
    " logistic sin cos tan sqrt rsqrt cbrt square pow integer_pow erf erfc erf_inv atan2 asin"
    " acos atan sinh cosh asinh acosh atanh clamp select_n eq ne lt le gt ge and or xor not"
    " is_finite nextafter add_any".split()
)
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin cumsum"
    " cumprod cummax cummin cumlogsumexp".split()
)
_FUSED = _ELEMENTWISE | frozenset(
    "broadcast_in_dim convert_element_type reshape squeeze expand_dims transpose slice iota"
    " stop_gradient copy copy_p name rev pad".split()
)


def flops(eqn: Any) -> int:
    """Floating-point operations of one run; a multiplication and an addition are two.

    Matrix products and convolutions by their multiplications; elementwise operations one for
    each result, reductions one for each operand's entry; 0 for all others. A convolution's
    products with padding and with the zeros of a dilated input are not counted, as XLA does.
    """
    name = eqn.primitive.name
    shapes = [v.aval.shape for v in eqn.invars]
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        joined = math.prod(shapes[0][i] for i in contract)
        return 2 * math.prod(eqn.outvars[0].aval.shape) * joined
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contract, _), _ = numbers.dot_dimension_numbers
        joined = math.prod(shapes[0][i] for i in contract)
        return 2 * math.prod(eqn.outvars[0].aval.shape) * joined
    if name in _ELEMENTWISE:
        return math.prod(eqn.outvars[0].aval.shape)
    if name in _REDUCTIONS:
        return math.prod(shapes[0])
    return 0


def _convolution(eqn: Any) -> int:
    params = eqn.params
    numbers = params["dimension_numbers"]
    lhs, rhs = (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    products = lhs[numbers.lhs_spec[0]] // params["batch_group_count"]
    products *= rhs[numbers.rhs_spec[0]] * rhs[numbers.rhs_spec[1]]
    for i, (low, _) in enumerate(params["padding"]):
        size, kernel = lhs[numbers.lhs_spec[2 + i]], rhs[numbers.rhs_spec[2 + i]]
        place = np.arange(out[numbers.out_spec[2 + i]])[:, None] * params["window_strides"][i]
        place = place + np.arange(kernel) * params["rhs_dilation"][i] - low
        dilation = params["lhs_dilation"][i]
        hits = (place >= 0) & (place <= (size - 1) * dilation) & (place % dilation == 0)
        products *= int(hits.sum())
    return 2 * products


def moved_bytes(eqn: Any) -> int:
    """Bytes of the operands and of the results; of a gather only the rows that it reads."""
    if eqn.primitive.name == "gather":
        return sum(map(_bytes, eqn.invars[1:])) + 2 * _bytes(eqn.outvars[0])
    return sum(map(_bytes, (*eqn.invars, *eqn.outvars)))


def is_fused(eqn: Any) -> bool:
    """Whether compilers do the equation on the way, without a pass over memory of its own."""
    return eqn.primitive.name in _FUSED


def _bytes(v: Any) -> int:
    return math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 1)
