"""Kernels that are sequences of smaller ones, as convolutions and views use them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays
from jaxcompress.tracing._conv import run_conv
from jaxcompress.tracing._weights import Weight, part_by_part


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["chain"],
    meta_fields=["permutation", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class MovedChain:
    """A chain with its axes moved, in another dtype.

    Attributes:
        chain: what is moved.
        permutation: static. Axis d of the view is this axis of the chain.
        dtype: static. Of the view.
    """

    chain: arrays.ConvChain
    permutation: tuple[int, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        return tuple(self.chain.shape[d] for d in self.permutation)

    def todense(self) -> jax.Array:
        """The view, dense."""
        return self.chain.todense().transpose(self.permutation).astype(self.dtype)


CHAINS = (arrays.ConvChain, MovedChain)


def holds_chain(value: Any) -> bool:
    """Whether it is a chain, or has one among its parts."""
    leaves = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, CHAINS))
    return any(isinstance(x, CHAINS) for x in leaves)


def apply_chain(weight: Weight, operand: int, values: list[Any], eqn: Any, run: Callable) -> Any:
    """The result of an equation with a chain as an operand; None where there is no rule."""
    if eqn.primitive.name == "conv_general_dilated" and operand == 1:
        return chain_conv(values[0], weight.value, eqn)
    viewed = chain_view(weight.value, eqn, run) if operand == 0 else None
    return None if viewed is None else Weight(viewed, weight.path)


def moved(value: Any) -> MovedChain:
    """A chain, or a view of one, as a view."""
    if isinstance(value, MovedChain):
        return value
    return MovedChain(value, tuple(range(value.ndim)), np.dtype(value.dtype))


def chain_view(value: Any, eqn: Any, run: Callable[..., Any]) -> Any:
    """What an equation that only views makes of a chain; None without a rule."""
    name, view = eqn.primitive.name, moved(value)
    alike = part_by_part(value, name, run)
    if alike is not None:
        return alike
    if name == "convert_element_type":
        dtype = np.dtype(eqn.outvars[0].aval.dtype)
        floating = jnp.issubdtype(dtype, jnp.floating)
        return dataclasses.replace(view, dtype=dtype) if floating else None
    if name == "transpose":
        axes = tuple(view.permutation[d] for d in eqn.params["permutation"])
        return dataclasses.replace(view, permutation=axes)
    if name == "rev":
        return _reversed(view, {view.permutation[d] for d in eqn.params["dimensions"]})
    return None


def chain_conv(x: jax.Array, value: Any, eqn: Any) -> jax.Array | None:
    """One convolution per stage; None where the equation does not use the kernel as one.

    Each spatial axis, with its stride, dilations and padding, goes to the stage that extends
    along it. In a grouped convolution all groups of features meet the same stages but the last.
    """
    params, view = eqn.params, moved(value)
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    outputs, inputs, *spatial = (view.permutation[d] for d in numbers.rhs_spec)
    features = (view.chain.ndim - 1, view.chain.ndim - 2)
    if params["batch_group_count"] != 1 or {outputs, inputs} != set(features):
        return None
    kernels = [
        (arrays.todense(stage).astype(view.dtype), count)
        for stage, count in zip(view.chain.stages, view.chain.groups, strict=True)
    ]
    if (outputs, inputs) != features:
        kernels = [(_swapped(*kernel), kernel[1]) for kernel in reversed(kernels)]
    if groups > 1 and kernels[-1][1] != 1:
        return None
    out = eqn.outvars[0].aval
    if any(0 in kernel.shape for kernel, _ in kernels):
        return jnp.zeros(out.shape, out.dtype)
    owner = [next((i for i, (k, _) in enumerate(kernels) if k.shape[d] != 1), 0) for d in spatial]
    last = len(kernels) - 1
    for i, (kernel, count) in enumerate(kernels):
        kernel = kernel.transpose(*features, *spatial)
        if i < last:
            kernel = jnp.tile(kernel, (groups, *(1,) * (kernel.ndim - 1)))
        x = run_conv(
            x,
            kernel,
            params,
            spatial={d for d, stage in enumerate(owner) if stage == i},
            groups=count * groups,
            out_spec=numbers.out_spec if i == last else numbers.lhs_spec,
        )
    return x.astype(out.dtype)


def _reversed(view: MovedChain, axes: set[int]) -> MovedChain | None:
    """Reversed along axes of the chain; None along features that come in groups."""
    stages, counts = list(view.chain.stages), view.chain.groups
    for axis in axes:
        from_end = axis - view.chain.ndim
        if from_end == -2:
            at = 0
        elif from_end == -1:
            at = len(stages) - 1
        else:
            at = next((i for i, s in enumerate(stages) if s.shape[axis] != 1), 0)
        if from_end >= -2 and counts[at] != 1:
            return None
        stages[at] = jnp.flip(arrays.todense(stages[at]), axis)
    return dataclasses.replace(view, chain=arrays.ConvChain(tuple(stages), counts))


def _swapped(kernel: jax.Array, groups: int) -> jax.Array:
    """The kernel from outputs to inputs."""
    *spatial, inputs, outputs = kernel.shape
    each = kernel.reshape(*spatial, inputs, groups, outputs // max(groups, 1))
    return jnp.swapaxes(each, -1, -3).reshape(*spatial, outputs // max(groups, 1), groups * inputs)
