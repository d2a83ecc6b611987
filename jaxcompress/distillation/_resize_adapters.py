"""Adapters without parameters: pooling, interpolation, normalization."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._adapters import Fit, without_params
from jaxcompress.distillation._batches import unit


def average_pool_adapter(axes: Sequence[int] = (-3, -2)) -> Fit:
    r"""Means over bins of the student's positions, as many as the teacher has positions.

    .. math:: y_i = \frac{1}{e_i - b_i} \sum_{j=b_i}^{e_i - 1} x_j, \quad
        b_i = \lfloor i n / m \rfloor, \quad e_i = \lceil (i + 1)\, n / m \rceil

    with :math:`n` positions of the student and :math:`m` of the teacher. Where :math:`m` does not
    divide :math:`n` neighbouring bins share a position.

    Args:
        axes: static. Which axes to pool, each to the teacher's size: by default the two
            before the channels; `(-2,)` for tokens `[..., tokens, channels]`.

    Returns:
        An adapter without params. A value that is not finite stays in its bins.

    Raises:
        TypeError: `axes` are no integers.
        ValueError: the teacher's features are larger than the student's, or have no positions,
            or the two have not equally many axes; raised when it is fitted.

    Cost: one pass over the feature for each axis.

    Examples:
        >>> adapter = jc.distillation.average_pool_adapter((0,))(jnp.zeros(6), jnp.zeros(3))
        >>> adapter.apply({}, jnp.arange(6.0))
        Array([0.5, 2.5, 4.5], dtype=float32)

    Source: the adaptive average pooling of PyTorch.
    """
    axes = _integers("average_pool_adapter", axes)

    def fit(student, teacher):
        sizes = _sizes("average_pool_adapter", axes, student, teacher)

        def pooled(feature):
            feature = wide(feature)
            for axis, size in sizes.items():
                feature = _pooled(feature, axis, size)
            return feature

        return without_params(pooled)

    return fit


def global_pool_adapter(axes: Sequence[int] = (-3, -2)) -> Fit:
    """The mean over whole axes, which are dropped: from feature maps to one row per image.

    Args:
        axes: static. By default the two before the channels; `(-2,)` for tokens.

    Returns:
        An adapter without params.

    Raises:
        TypeError: `axes` are no integers.
        ValueError: the student's feature has no such axis, or nothing along it; raised when it
            is fitted.

    Cost: one reduction.

    Examples:
        >>> maps, rows = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 3))
        >>> jc.distillation.global_pool_adapter()(maps, rows).apply({}, maps).shape
        (2, 3)
    """
    axes = _integers("global_pool_adapter", axes)

    def fit(student, teacher):
        del teacher
        dropped = tuple(_own_axes("global_pool_adapter", axes, student))
        return without_params(lambda feature: jnp.mean(wide(feature), dropped))

    return fit


def resize_adapter(axes: Sequence[int] = (-2,), *, antialias: bool = True) -> Fit:
    """Linear interpolation along axes to the teacher's sizes; bilinear along two of them.

    Positions are centres of cells: entry `i` of `n` stands at `(i + 1/2) / n` of the length.

    Args:
        axes: static. `(-2,)` for tokens `[..., tokens, channels]`, the default; `(-3, -2)` for
            feature maps. All tokens along an axis are interpolated: take a class token away.
        antialias: static. Where the teacher has fewer positions, whether the kernel is widened
            so that each position of the student counts.

    Returns:
        An adapter without params. A value that is not finite makes NaN all that lies with it
        along `axes`, and padding is interpolated too: set to zero what does not count.

    Raises:
        TypeError: `axes` are no integers.
        ValueError: the two have not equally many axes, or no positions along one of them;
            raised when it is fitted.

    Cost: one thin product for each axis that changes.

    Examples:
        >>> adapter = jc.distillation.resize_adapter((0,))(jnp.zeros(2), jnp.zeros(4))
        >>> adapter.apply({}, jnp.array([0.0, 4.0]))
        Array([0., 1., 3., 4.], dtype=float32)

    Source: `jax.image.resize`.
    """
    axes = _integers("resize_adapter", axes)

    def fit(student, teacher):
        sizes = _sizes("resize_adapter", axes, student, teacher, larger=True)

        def resized(feature):
            feature = wide(feature)
            shape = [sizes.get(axis, n) for axis, n in enumerate(feature.shape)]
            return jax.image.resize(feature, shape, "linear", antialias)

        return without_params(resized)

    return fit


def layer_norm_adapter(epsilon: ArrayLike = 1e-5) -> Fit:
    r"""Mean 0 and variance 1 over the channels, without scale or offset.

    .. math:: y = (x - \mathrm{mean}\,x) / \sqrt{\mathrm{var}\,x + \epsilon}

    Args:
        epsilon: :math:`\epsilon > 0`. May be traced. A row of equal channels becomes zero.

    Returns:
        An adapter without params, of features with channels in their last axis.

    Raises:
        TypeError: `epsilon` is no real number.
        ValueError: a known `epsilon` is not above 0; the feature has no channels (when fitted).

    Cost: two reductions.

    Examples:
        >>> adapter = jc.distillation.layer_norm_adapter()(jnp.zeros(2), jnp.zeros(2))
        >>> adapter.apply({}, jnp.array([1.0, 3.0])).round(3)
        Array([-1.,  1.], dtype=float32)

    Source: Ba et al. 2016, arXiv:1607.06450, section 3.
    """
    _check.number("layer_norm_adapter", "epsilon", epsilon, 0.0)
    if not _check.is_traced(epsilon) and not np.asarray(epsilon) > 0:
        raise ValueError(_check.message("layer_norm_adapter", "epsilon", "be above 0", epsilon))

    def fit(student, teacher):
        del teacher
        _own_axes("layer_norm_adapter", (-1,), student)

        def normalized(feature):
            feature = wide(feature)
            centred = feature - jnp.mean(feature, -1, keepdims=True)
            variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
            return centred * jax.lax.rsqrt(variance + jnp.asarray(epsilon).astype(feature.dtype))

        return without_params(normalized)

    return fit


def l2_norm_adapter(axes: Sequence[int] = (-1,)) -> Fit:
    r"""Length 1: :math:`y = x / \|x\|_2`.

    Args:
        axes: static. Over which the norm is taken, by default the channels.

    Returns:
        An adapter without params. Large and small rows do not over- or underflow. A row of zeros
        gives zeros, with zero gradients; one with a NaN or an infinity gives NaN.

    Raises:
        TypeError: `axes` are no integers.
        ValueError: the feature has no such axis, or nothing along it; raised when it is fitted.

    Cost: two reductions.

    Examples:
        >>> adapter = jc.distillation.l2_norm_adapter()(jnp.zeros(2), jnp.zeros(2))
        >>> adapter.apply({}, jnp.array([3.0, 4.0])).round(3)
        Array([0.6, 0.8], dtype=float32)
    """
    axes = _integers("l2_norm_adapter", axes)

    def fit(student, teacher):
        del teacher
        over = tuple(_own_axes("l2_norm_adapter", axes, student))
        return without_params(lambda feature: unit(wide(feature), over))

    return fit


def _pooled(x: jax.Array, axis: int, bins: int) -> jax.Array:
    """The mean of each bin along an axis; see `average_pool_adapter`."""
    n = x.shape[axis]
    if n < bins:
        rule, got = f"have at least {bins} positions along axis {axis}", _check.describe(x)
        raise ValueError(_check.message("average_pool_adapter", "feature", rule, got))
    if n % bins == 0:
        shape = (*x.shape[:axis], bins, n // bins, *x.shape[axis + 1 :])
        return jnp.mean(x.reshape(shape), axis + 1)
    # Bins of unequal width: each is filled up to the widest, and what fills it is not counted.
    first = np.arange(bins) * n // bins
    widths = -(-(np.arange(bins) + 1) * n // bins) - first
    offsets = np.arange(widths.max())
    counted = offsets < widths[:, None]
    entries = jnp.take(x, np.minimum(first[:, None] + offsets, n - 1), axis=axis, mode="clip")
    tail = (1,) * (x.ndim - axis - 1)
    head = (1,) * axis
    entries = jnp.where(counted.reshape(head + counted.shape + tail), entries, 0.0)
    total = jnp.sum(entries, axis + 1)
    return total / widths.reshape(head + widths.shape + tail).astype(x.dtype)


def _integers(function: str, axes: Any) -> tuple[int, ...]:
    for axis in axes if isinstance(axes, Sequence) else (axes,):
        _check.integer(function, "axes", axis, -(10**9))
    return tuple(axes) if isinstance(axes, Sequence) else (axes,)


def _own_axes(function: str, axes: tuple[int, ...], student: Any) -> list[int]:
    """The axes from the front; refuses one that is not there or has no entries."""
    found = [_check.axis(function, "axes", axis, len(student.shape)) for axis in axes]
    if any(student.shape[axis] == 0 for axis in found) or len(set(found)) < len(found):
        rule, got = f"have entries along axes {axes}, each named once", _check.describe(student)
        raise ValueError(_check.message(function, "student", rule, got))
    return found


def _sizes(
    function: str, axes: tuple[int, ...], student: Any, teacher: Any, *, larger: bool = False
) -> dict[int, int]:
    """From each axis to the teacher's size."""
    if len(student.shape) != len(teacher.shape):
        rule, got = f"have the axes of {_check.describe(student)}", _check.describe(teacher)
        raise ValueError(_check.message(function, "teacher", rule, got))
    sizes = {axis: teacher.shape[axis] for axis in _own_axes(function, axes, student)}
    if any(m == 0 or (m > student.shape[axis] and not larger) for axis, m in sizes.items()):
        bound = "" if larger else f", and no more of them than {_check.describe(student)}"
        rule, got = f"have entries along axes {axes}{bound}", _check.describe(teacher)
        fix = "" if larger else "Choose resize_adapter to enlarge the student's."
        raise ValueError(_check.message(function, "teacher", rule, got, fix))
    return sizes
