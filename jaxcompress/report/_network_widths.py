"""How wide a layer is, by its weight."""

import math
from typing import Any


def widths_of(eqn: Any, weight: int) -> tuple[int | None, int, tuple[int, ...]]:
    """Features in, features out and the window of a product; `weight` is its operand."""
    shape, params = eqn.invars[weight].aval.shape, eqn.params
    if eqn.primitive.name == "dot_general":
        contract, batch = (numbers[weight] for numbers in params["dimension_numbers"])
        free = [n for d, n in enumerate(shape) if d not in (*contract, *batch)]
        return math.prod(shape[d] for d in contract), math.prod(free), ()
    if eqn.primitive.name == "conv_general_dilated":
        out, inner, *space = params["dimension_numbers"].rhs_spec
        features = shape[inner] * params["feature_group_count"]
        return features, shape[out], tuple(shape[d] for d in space)
    if eqn.primitive.name == "gather":
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kept = [n for d, n in enumerate(sizes) if d not in gone]
        return None, math.prod(kept), ()
    return shape[-2], shape[-1], ()
