"""Arrays in scaled or rotated features: what is undone on the activations instead."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, _sharding, arrays
from jaxcompress.tracing import _views
from jaxcompress.tracing._dot import Dot, per_token

MOVED = (arrays.Rescaled, arrays.Rotated)


def dot_activations(x: jax.Array, value: Any, dot: Dot) -> jax.Array | None:
    """The activations in the features of `value.inner`; None where these are not summed over."""
    if isinstance(value, arrays.Rescaled):
        places = {i: dot.x.index(a) for i, a in enumerate(dot.w) if a in dot.x}
        return _scaled(x, value.scale, places)
    label = dot.w[value.axis]
    if label not in dot.x or label in dot.out:
        return None
    turned = arrays.rotate(x, value.signs, dot.x.index(label), value.order)
    return turned.astype(x.dtype)


def conv_activations(x: jax.Array, value: Any, params: dict[str, Any]) -> jax.Array | None:
    """The same for a convolution, whose input features are scaled or rotated at each place."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    features, inputs = numbers.lhs_spec[1], numbers.rhs_spec[1]
    if params["batch_group_count"] != 1:
        return None
    if isinstance(value, arrays.Rescaled):
        # Each group of features meets the same inputs of the kernel.
        scale = jnp.concatenate([value.scale] * groups, axis=inputs)
        scale = scale if value.scale.shape[inputs] > 1 else value.scale
        return _scaled(x, scale, {inputs: features})
    if value.axis != inputs:
        return None
    signs = jnp.concatenate([value.signs] * groups)
    return arrays.rotate(x, signs, features, value.order).astype(x.dtype)


def inside(value: Any) -> Any:
    """What is multiplied with the new activations, in the dtype of the whole."""
    inner = value.inner
    if inner.dtype == value.dtype:
        return inner
    return _views.cast(inner, value.dtype)


def step_inside(step_of: Any, path: str | None) -> Any:
    """The integer step of the new activations; ranges seen outside say nothing of it."""
    if step_of is None or step_of is per_token:
        return step_of

    def refused(x: jax.Array, dot: Dot) -> jax.Array:
        del x, dot
        rule = "be 'dynamic' for leaves in scaled or rotated features"
        raise ValueError(_check.message("lift", "activations", rule, "ranges of sites", path=path))

    return refused


def moved_view(value: Any, eqn: Any, others: list[Any], run: Callable[..., Any]) -> Any:
    """What an equation that only views makes of such an array, as `_views.view` does."""
    name = eqn.primitive.name
    if name in ("slice", "dynamic_slice"):
        seen = _cut(value, eqn, others, run)
    elif name in ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "rev"):
        seen = _seen(value, eqn, others, run)
    else:
        return _views.view(value, eqn, others, run)
    return _views.view(value, eqn, others, run) if seen is None else seen


def _scaled(x: jax.Array, scale: jax.Array, places: dict[int, int]) -> jax.Array | None:
    """The product along axes of `x`, from those of the scale; None where it has others."""
    if any(n > 1 and i not in places for i, n in enumerate(scale.shape)):
        return None
    kept = [i for i in sorted(places, key=lambda i: places[i]) if scale.shape[i] > 1]
    shape = [1] * x.ndim
    for i in kept:
        shape[places[i]] = scale.shape[i]
    gone = tuple(i for i in range(scale.ndim) if i not in kept)
    order = sorted(range(len(kept)), key=lambda j: kept[j])
    factor = jax.lax.squeeze(scale, gone).transpose([order.index(j) for j in range(len(kept))])
    f = lambda x, factor: arrays.rescale(x, factor).astype(x.dtype)  # noqa: E731
    return _sharding.automatic(f, x, factor.reshape(shape), like_first=True)


def _inner_view(value: Any, eqn: Any, others: list[Any], run: Callable[..., Any]) -> Any:
    inner = value.inner
    if isinstance(inner, MOVED):
        return moved_view(inner, eqn, others, run)
    if hasattr(type(inner), "todense"):
        return _views.view(inner, eqn, others, run)
    return run([inner, *others])[0][0]


def _seen(value: Any, eqn: Any, others: list[Any], run: Callable[..., Any]) -> Any:
    """The view of what is inside and of the factor, or along the moved axis; else None."""
    old, new = value.shape, eqn.outvars[0].aval.shape
    if math.prod(new) != math.prod(old):
        return None
    if isinstance(value, arrays.Rescaled):
        scale = _views.part_view(value.scale, old, eqn, whole=False)
        inner = None if scale is None else _inner_view(value, eqn, others, run)
        return None if inner is None else dataclasses.replace(value, inner=inner, scale=scale)
    axis = _viewed_axis(eqn, value.axis)
    inner = None if axis is None else _inner_view(value, eqn, others, run)
    return None if inner is None else dataclasses.replace(value, inner=inner, axis=axis)


def _viewed_axis(eqn: Any, axis: int) -> int | None:
    """Where an axis goes; None where it is reversed, split or merged."""
    name, params = eqn.primitive.name, eqn.params
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name == "rev":
        return None if axis in params["dimensions"] else axis
    i = j = 0
    for before, after in _views.runs(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape):
        if i <= axis < i + before:
            return j if (before, after) == (1, 1) else None
        i, j = i + before, j + after
    return None


def _cut(value: Any, eqn: Any, others: list[Any], run: Callable[..., Any]) -> Any:
    """A slice of what is inside; None through the axis of a rotation."""
    params, shape, new = eqn.params, value.shape, eqn.outvars[0].aval.shape
    static = eqn.primitive.name == "slice"
    if static and params["strides"] is not None:
        return None
    if isinstance(value, arrays.Rotated) and new[value.axis] != shape[value.axis]:
        return None
    inner = _inner_view(value, eqn, others, run)
    if inner is None or isinstance(value, arrays.Rotated):
        return None if inner is None else dataclasses.replace(value, inner=inner)
    starts = list(params["start_indices"] if static else others)
    scale = _views.part_cut(value.scale, shape, starts, new)
    return dataclasses.replace(value, inner=inner, scale=scale)
