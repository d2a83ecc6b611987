"""Adapters with parameters to train: a matrix on the channels, a convolution."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress.distillation._adapters import Adapter, Fit

Initializer = Callable[..., jax.Array]

_LECUN = jax.nn.initializers.lecun_normal()


def linear_adapter(*, bias: bool = True, initializer: Initializer = _LECUN) -> Fit:
    r"""A linear map of the channels, at each position: a 1x1 convolution.

    .. math:: y_{\dots j} = \sum_i x_{\dots i} K_{ij} + b_j

    Args:
        bias: static. Whether there is :math:`b`, zero at first.
        initializer: static. `(key, shape, dtype)` -> :math:`K`, one of `jax.nn.initializers`. The
            default is `lecun_normal()`, of variance 1 / student channels; `he_normal()` has
            twice that, which suits features after a ReLU.

    Returns:
        An adapter of features with channels in their last axis. Its params are
        `{"kernel": [student channels, teacher channels], "bias": [teacher channels]}`.

    Raises:
        TypeError: `initializer` is no function.
        ValueError: a feature has no axis, or no channels; raised when it is fitted.

    Cost: one product per batch, at the precision of `jax.default_matmul_precision`.

    Examples:
        >>> x, y = jnp.ones((2, 7, 7, 4)), jnp.ones((2, 7, 7, 8))
        >>> adapter = jc.distillation.linear_adapter()(x, y)
        >>> params = adapter.init(jax.random.key(0))
        >>> jax.tree.map(jnp.shape, params)
        {'bias': (8,), 'kernel': (4, 8)}
        >>> adapter.apply(params, x).shape
        (2, 7, 7, 8)

    Source: the regressor of Romero et al. 2015, arXiv:1412.6550, section 2.2, for layers that
    are not convolutions. Differs: without the teacher's nonlinearity after it.
    """
    _require_initializer("linear_adapter", initializer)

    def fit(student, teacher):
        ours, theirs = _channels("linear_adapter", student, teacher)

        def init(key):
            return _params(key, (ours, theirs), bias, initializer)

        def apply(params, feature):
            _require_channels("linear_adapter", feature, ours)
            feature, kernel = _alike(feature, params["kernel"])
            return _plus(jnp.matmul(feature, kernel), params)

        return Adapter(init, apply)

    return fit


def convolution_adapter(
    *,
    spatial: int = 2,
    bias: bool = True,
    initializer: Initializer = _LECUN,
) -> Fit:
    r"""A convolution without padding, just as wide as brings one size to the other.

    The kernel has :math:`n_\mathrm{student} - n_\mathrm{teacher} + 1` entries along each spatial
    axis; with equal sizes it is `linear_adapter`.

    Args:
        spatial: static. How many spatial axes there are, 1 to 3: those before the channels.
            All axes before them are batch.
        bias: static. Whether a number is added to each of the teacher's channels, zero at first.
        initializer: static. As in `linear_adapter`; the variance is that of all entries that
            one output sums.

    Returns:
        An adapter of features `[..., *space, channels]`. Its params are `{"kernel": [*widths,
        student channels, teacher channels], "bias": [teacher channels]}`.

    Raises:
        TypeError: `initializer` is no function, `spatial` no integer.
        ValueError: the teacher's features are larger than the student's, or the two have not
            equally many axes; raised when it is fitted.

    Cost: wide kernels are costly: from 32x32 to 16x16 they have 17x17 entries for each two
    channels. `average_pool_adapter` with `linear_adapter` has none of it.

    Examples:
        >>> x, y = jnp.ones((2, 6, 6, 4)), jnp.ones((2, 4, 5, 8))
        >>> adapter = jc.distillation.convolution_adapter()(x, y)
        >>> params = adapter.init(jax.random.key(0))
        >>> params["kernel"].shape, adapter.apply(params, x).shape
        ((3, 2, 4, 8), (2, 4, 5, 8))

    Source: Romero et al. 2015, arXiv:1412.6550, section 2.2. Differs: without the teacher's
    nonlinearity after it.
    """
    _require_initializer("convolution_adapter", initializer)
    _check.integer("convolution_adapter", "spatial", spatial, 1, 3)

    def fit(student, teacher):
        ours, theirs = _channels("convolution_adapter", student, teacher)
        space = slice(-1 - spatial, -1)
        widths = tuple(
            s - t + 1 for s, t in zip(student.shape[space], teacher.shape[space], strict=False)
        )
        ranks = len(student.shape), len(teacher.shape)
        if ranks[0] != ranks[1] or ranks[0] <= spatial or min(widths) < 1:
            rule = (
                f"have {spatial} spatial axes, no larger than those of {_check.describe(student)}"
            )
            fix = "Choose resize_adapter to enlarge the student's."
            got = _check.describe(teacher)
            raise ValueError(_check.message("convolution_adapter", "teacher", rule, got, fix))

        def init(key):
            return _params(key, (*widths, ours, theirs), bias, initializer)

        def apply(params, feature):
            _require_channels("convolution_adapter", feature, ours)
            feature, kernel = _alike(feature, params["kernel"])
            batch, rest = feature.shape[: -1 - spatial], feature.shape[-1 - spatial :]
            if any(n < w for n, w in zip(rest, widths, strict=False)):
                rule, got = f"be at least {list(widths)} wide", _check.describe(feature)
                raise ValueError(_check.message("convolution_adapter", "feature", rule, got))
            flat = feature if len(batch) == 1 else feature.reshape(math.prod(batch), *rest)
            axes = tuple(range(1, spatial + 1))
            ends = (0, spatial + 1, *axes)
            numbers = jax.lax.ConvDimensionNumbers(
                ends, (spatial + 1, spatial, *range(spatial)), ends
            )
            out = jax.lax.conv_general_dilated(
                flat, kernel, (1,) * spatial, "VALID", dimension_numbers=numbers
            )
            out = out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])
            return _plus(out, params)

        return Adapter(init, apply)

    return fit


def _params(key: jax.Array, shape: tuple[int, ...], bias: bool, initializer: Initializer):
    kernel = {"kernel": initializer(key, shape, jnp.float32)}
    return kernel | ({"bias": jnp.zeros(shape[-1], jnp.float32)} if bias else {})


def _alike(feature: Any, kernel: Any) -> tuple[jax.Array, jax.Array]:
    """Both in the wider of their dtypes, float32 at least."""
    feature, kernel = wide(feature), wide(kernel)
    dtype = np.promote_types(feature.dtype, kernel.dtype)
    return feature.astype(dtype), kernel.astype(dtype)


def _plus(result: jax.Array, params: dict[str, Any]) -> jax.Array:
    if "bias" not in params:
        return result
    bias = jnp.asarray(params["bias"]).astype(result.dtype)
    return result + bias.reshape((1,) * (result.ndim - 1) + bias.shape)


def _require_initializer(function: str, initializer: Any) -> None:
    if not callable(initializer):
        rule, fix = "be a function (key, shape, dtype)", "Take one of jax.nn.initializers."
        got = _check.describe(initializer)
        raise TypeError(_check.message(function, "initializer", rule, got, fix))


def _channels(function: str, student: Any, teacher: Any) -> tuple[int, int]:
    """How many channels the two have."""
    for name, x in {"student": student, "teacher": teacher}.items():
        if not x.shape or x.shape[-1] == 0:
            rule, got = "have a last axis of channels", _check.describe(x)
            raise ValueError(_check.message(function, name, rule, got))
    return student.shape[-1], teacher.shape[-1]


def _require_channels(function: str, feature: Any, channels: int) -> None:
    if feature.shape[-1:] != (channels,):
        rule, got = f"have the {channels} channels it was fitted to", _check.describe(feature)
        raise ValueError(_check.message(function, "feature", rule, got))
