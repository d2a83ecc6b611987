"""Convolutions with a low-rank kernel."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing._product import Product


def thin_conv(x: jax.Array, product: Product, eqn: Any) -> jax.Array | None:
    """Two thinner convolutions; None where the factors do not split the kernel usefully.

    One factor has to hold a single axis of the kernel. The output features: a convolution to
    `rank` features, then a 1x1 one. The input features: a 1x1 one to `rank` features, then the
    rest. A spatial axis: each input feature along it, to `rank` features, then the others.
    """
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    kernels = _kernels(product, numbers.rhs_spec)
    if kernels is None:
        return None
    u, v = kernels
    for alone, rest in ((v, u), (u, v)):
        axes = [d for d, size in enumerate(alone.shape[:-1]) if size > 1]
        if axes in ([], [0]) and rest.shape[0] == 1:
            return _output_last(x, alone, rest, params)
        if axes in ([], [1]) and rest.shape[1] == 1 and groups == 1:
            return _input_first(x, alone, rest, params)
        if len(axes) == 1 and axes[0] > 1 and rest.shape[axes[0]] == 1 and groups == 1:
            return _along_first(x, alone, rest, axes[0], params)
    return None


def _kernels(product: Product, spec) -> tuple[jax.Array, jax.Array] | None:
    """Both factors as `[output features, input features, spatial axes, rank]`.

    Of size 1 along what the other factor has. None where an axis of the kernel is merged.
    """
    groups = [[a for a in product.groups[d] if product.sizes[a] > 1] for d in spec]
    if any(len(group) > 1 for group in groups):
        return None
    order = [group[0] for group in groups if group]

    def kernel(factor, labels):
        kept = [a for a in order if a in labels]
        gone = tuple(i for i, a in enumerate(labels) if a not in kept)
        labels = [a for a in labels if a in kept]
        factor = jnp.squeeze(factor.astype(product.dtype), gone)
        factor = factor.transpose(*(labels.index(a) for a in kept), len(kept))
        missing = [i for i, group in enumerate(groups) if not group or group[0] not in kept]
        return jnp.expand_dims(factor, missing)

    return kernel(product.u, product.left), kernel(jnp.moveaxis(product.v, 0, -1), product.right)


def _output_last(x, alone, rest, params):
    groups = params["feature_group_count"]
    rank, spatial = alone.shape[-1], rest.ndim - 3
    first = jnp.moveaxis(rest, -1, 1)[0]
    first = jnp.tile(first, (groups, *(1,) * (first.ndim - 1)))
    y = run_conv(x, first, params, out_spec=params["dimension_numbers"].lhs_spec)
    second = alone.reshape(alone.shape[0], rank, *(1,) * spatial)
    return _pointwise(y, second, params, groups, params["dimension_numbers"].out_spec)


def _input_first(x, alone, rest, params):
    rank, spatial = alone.shape[-1], rest.ndim - 3
    first = jnp.moveaxis(alone, -1, 0).reshape(rank, -1, *(1,) * spatial)
    y = _pointwise(x, first, params, 1, params["dimension_numbers"].lhs_spec)
    return run_conv(y, jnp.moveaxis(rest[:, 0], -1, 1), params)


def _along_first(x, alone, rest, axis, params):
    numbers = params["dimension_numbers"]
    features = x.shape[numbers.lhs_spec[1]]
    first = jnp.moveaxis(alone[0], -1, 0)
    first = jnp.tile(first, (features, *(1,) * (first.ndim - 1)))
    along, others = {axis - 2}, set(range(rest.ndim - 3)) - {axis - 2}
    y = run_conv(x, first, params, spatial=along, groups=features, out_spec=numbers.lhs_spec)
    second = jnp.moveaxis(rest, -1, 2)
    second = second.reshape(second.shape[0], -1, *second.shape[3:])
    return run_conv(y, second, params, spatial=others)


def run_conv(x, kernel, params, *, spatial=None, groups=None, out_spec=None):
    """The convolution of the equation with another kernel, along some spatial axes only."""
    numbers = params["dimension_numbers"]
    count = kernel.ndim - 2
    spatial = set(range(count)) if spatial is None else spatial

    def only(values, other):
        return [value if i in spatial else other for i, value in enumerate(values)]

    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        only(params["window_strides"], 1),
        only(params["padding"], (0, 0)),
        only(params["lhs_dilation"], 1),
        only(params["rhs_dilation"], 1),
        jax.lax.ConvDimensionNumbers(
            numbers.lhs_spec, tuple(range(count + 2)), out_spec or numbers.out_spec
        ),
        feature_group_count=params["feature_group_count"] if groups is None else groups,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    ).astype(x.dtype)


def _pointwise(x, kernel, params, groups, out_spec):
    plain = params | {
        "window_strides": (1,) * (kernel.ndim - 2),
        "padding": ((0, 0),) * (kernel.ndim - 2),
        "lhs_dilation": (1,) * (kernel.ndim - 2),
        "rhs_dilation": (1,) * (kernel.ndim - 2),
    }
    return run_conv(x, kernel, plain, groups=groups, out_spec=out_spec)
