"""The activations of a site as rows of features."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing._dot import read_dot

# Sites that multiply activations; a gather only looks rows up.
PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot_general"))


def activations_of(operand: int) -> int:
    """The index of the activations, where the weight has that index."""
    return 1 - operand


def contracted(eqn: Any, operand: int) -> tuple[int, ...]:
    """The axes of the activations that the product sums over."""
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        return (eqn.params["dimension_numbers"].lhs_spec[1],)
    if name == "ragged_dot_general":
        return tuple(eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0])
    dot = read_dot(eqn, operand)
    return tuple(i for i, a in enumerate(dot.x) if a not in dot.out)


def as_rows(eqn: Any, operand: int, x: jax.Array) -> jax.Array:
    """`[tokens, features]`: the features are what the product sums over, in its order."""
    axes = contracted(eqn, operand)
    x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    features = math.prod(x.shape[x.ndim - len(axes) :])
    return x.reshape((math.prod(x.shape[: x.ndim - len(axes)]), features))


def as_patches(eqn: Any, operand: int, x: jax.Array) -> jax.Array:
    """As `as_rows`; for a convolution `[groups, tokens, features]`, of all it sums over.

    These are the input features of a group and the places of the kernel, in this order.
    """
    if eqn.primitive.name != "conv_general_dilated":
        return as_rows(eqn, operand, x)
    params, kernel = eqn.params, eqn.invars[1].aval.shape
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    spatial = [kernel[d] for d in numbers.rhs_spec[2:]]
    patches = jax.lax.conv_general_dilated_patches(
        x,
        spatial,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        jax.lax.ConvDimensionNumbers(numbers.lhs_spec, numbers.rhs_spec, (0, *range(1, x.ndim))),
        precision=jax.lax.Precision.HIGHEST,
    )
    features = patches.shape[1] // groups
    tokens = patches.size // max(patches.shape[1], 1)
    patches = jnp.moveaxis(patches, 1, 0).reshape((groups, features, tokens))
    return patches.transpose(0, 2, 1)
