"""Operations and bytes of one equation."""

import math
from typing import Any

import numpy as np

ELEMENTWISE = frozenset(
    "add sub mul div rem neg abs sign max min floor ceil round integer_pow square clamp select_n"
    " eq ne lt le gt ge and or xor not is_finite nextafter add_any shift_left"
    " shift_right_logical shift_right_arithmetic population_count".split()
)
TRANSCENDENTAL = frozenset(
    "exp exp2 expm1 log log1p tanh logistic sin cos tan sqrt rsqrt cbrt pow erf erfc erf_inv"
    " atan2 asin acos atan sinh cosh asinh acosh atanh".split()
)
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin"
    " cumsum cumprod cummax cummin cumlogsumexp".split()
)
_MOVING = frozenset(
    "broadcast_in_dim convert_element_type bitcast_convert_type reduce_precision reshape squeeze"
    " expand_dims transpose slice split iota stop_gradient copy copy_p name rev pad"
    " optimization_barrier sharding_constraint reshard mesh_cast pvary pcast".split()
)
_FUSED = ELEMENTWISE | TRANSCENDENTAL | _MOVING


def flops(eqn: Any) -> int:
    """Floating-point operations of one run; a multiplication and an addition are two.

    Matrix products and convolutions by their multiplications; elementwise operations one for
    each result, reductions one for each operand's entry; 0 for all others, casts included.
    As XLA does, transcendental functions (exp, tanh, sqrt, …) are left out, and so are a
    convolution's products with padding and with the zeros of a dilated input. In a ragged
    product each row meets the matrix of its own group only.
    """
    name = eqn.primitive.name
    if name == "dot_general":
        return _product(eqn, eqn.params["dimension_numbers"])
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        total = _product(eqn, numbers.dot_dimension_numbers)
        (contract, _), _ = numbers.dot_dimension_numbers
        # The groups share out the contracted axis: each result sums over its part of it.
        shared_out = numbers.lhs_ragged_dimensions[0] in contract
        return total // max(1, eqn.invars[2].aval.shape[-1]) if shared_out else total
    if name in ELEMENTWISE:
        return math.prod(eqn.outvars[0].aval.shape)
    if name in _REDUCTIONS:
        return math.prod(eqn.invars[0].aval.shape)
    return 0


def _product(eqn: Any, dimension_numbers: Any) -> int:
    (contract, _), _ = dimension_numbers
    joined = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * joined


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
    """Bytes of the operands and of the results.

    Of a gather or a slice at a computed place only the part that it reads, and of its
    counterparts that write (a cache, a scatter) only the part that they write.
    """
    name = eqn.primitive.name
    if name in ("gather", "dynamic_slice"):
        return sum(map(_bytes, eqn.invars[1:])) + 2 * _bytes(eqn.outvars[0])
    if name == "dynamic_update_slice":
        return sum(map(_bytes, eqn.invars[1:])) + _bytes(eqn.invars[1])
    if name.startswith("scatter"):
        return _bytes(eqn.invars[1]) + 3 * _bytes(eqn.invars[2])
    return sum(map(_bytes, (*eqn.invars, *eqn.outvars)))


def is_fused(eqn: Any) -> bool:
    """Whether compilers do the equation on the way, without a pass over memory of its own."""
    return eqn.primitive.name in _FUSED


def _bytes(v: Any) -> int:
    return math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 1)
