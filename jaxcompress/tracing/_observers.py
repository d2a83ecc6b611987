"""Streaming statistics of activations.

Each is an `Observer`: a state that batches are added to and that merges with those of other
batches, shards and processes, and what it says at the end. The ranges go to
`jc.quantize_activations` and `jc.lift`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric, PyTree

Per = Literal["tensor", "channel"]


class Observer(NamedTuple):
    """Streaming statistics of rows of features.

    Laws: `merge` is associative, `merge(init(n), s) == s`, and `update(s, x)` is
    `merge(s, update(init(n), x))`. So neither the size of the batches nor the way they are
    spread over devices matters.

    Attributes:
        init: `features -> state`, of nothing seen yet.
        update: `(state, x[tokens, features]) -> state`.
        merge: `(state, state) -> state`, the first seen before the second.
        finalize: `state -> statistics`.
    """

    init: Callable[[int], PyTree]
    update: Callable[[PyTree, jax.Array], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    finalize: Callable[[PyTree], Any]


class Range(NamedTuple):
    """Where activations lie: float32 scalars, or one for each feature."""

    low: jax.Array
    high: jax.Array


class Moments(NamedTuple):
    """Number of tokens, mean and (population) variance."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


class Gram(NamedTuple):
    """Number of tokens, and the sum of :math:`x x^T` over them, float32[features, features]."""

    count: jax.Array
    matrix: jax.Array


def absmax(*, per: Per = "tensor") -> Observer:
    r"""The symmetric range :math:`\pm\max|x|`.

    Args:
        per: static. `"tensor"`, or `"channel"` for one range per feature.

    Returns:
        An `Observer` of `Range`s. A NaN makes the range NaN; without any token it is 0.

    Examples:
        >>> observer = jc.observers.absmax()
        >>> observer.finalize(observer.update(observer.init(2), jnp.array([[1.0, -3.0]]))).high
        Array(3., dtype=float32)
    """
    axis = _axis("absmax", per)

    def update(state, x):
        return jnp.maximum(state, jnp.max(jnp.abs(_wide(x)), axis=axis, initial=0.0))

    return Observer(
        lambda features: jnp.zeros(_shape(per, features), jnp.float32),
        update,
        jnp.maximum,
        lambda state: Range(-state, state),
    )


def min_max(*, per: Per = "tensor") -> Observer:
    """The range from the smallest to the largest entry.

    Args:
        per: static. `"tensor"`, or `"channel"` for one range per feature.

    Returns:
        An `Observer` of `Range`s. A NaN makes the range NaN; without any token it is 0.
    """
    axis = _axis("min_max", per)

    def update(state, x):
        x = _wide(x)
        seen = Range(jnp.min(x, axis, initial=jnp.inf), jnp.max(x, axis, initial=-jnp.inf))
        return merge(state, seen)

    def merge(a, b):
        return Range(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))

    def finalize(state):
        nothing = state.low > state.high
        return Range(*(jnp.where(nothing, 0.0, x) for x in state))

    def init(features):
        shape = _shape(per, features)
        return Range(*(jnp.full(shape, end, jnp.float32) for end in (jnp.inf, -jnp.inf)))

    return Observer(init, update, merge, finalize)


class _Average(NamedTuple):
    weight: jax.Array
    low: jax.Array
    high: jax.Array


def moving_average(decay: Numeric = 0.99, *, per: Per = "tensor") -> Observer:
    r"""Moving averages of the extremes of each batch, the last batches counting most.

    .. math:: m_t = \frac{1 - d}{1 - d^t}\sum_{i \le t} d^{\,t-i}\,\max x_i

    Args:
        decay: :math:`d`, in [0, 1). May be traced.
        per: static. `"tensor"`, or `"channel"` for one range per feature.

    Returns:
        An `Observer` of `Range`s. A batch without tokens does not count. Merging two states
        gives what the batches of the first, then those of the second give.

    Raises:
        ValueError: `decay` is a number outside of [0, 1).

    Source: Jacob et al. 2017, arXiv:1712.05877, section 3.1. Differs: the average is
    corrected for its start at zero, as Adam's are.
    """
    _check.number("moving_average", "decay", decay, 0, 1 - 1e-7)
    axis = _axis("moving_average", per)

    def update(state, x):
        x = _wide(x)
        if x.shape[0] == 0:
            return state
        share = 1 - jnp.asarray(decay, jnp.float32)
        seen = _Average(1 - share, share * jnp.min(x, axis), share * jnp.max(x, axis))
        return merge(state, seen)

    def merge(a, b):
        # The weight is what is left of the past: decay to the number of batches.
        later = b.weight
        return _Average(a.weight * later, a.low * later + b.low, a.high * later + b.high)

    def finalize(state):
        seen = 1 - state.weight
        scale = jnp.where(seen > 0, 1 / jnp.where(seen > 0, seen, 1.0), 0.0)
        return Range(state.low * scale, state.high * scale)

    def init(features):
        zero = jnp.zeros(_shape(per, features), jnp.float32)
        return _Average(jnp.ones((), jnp.float32), zero, zero)

    return Observer(init, update, merge, finalize)


class _Sums(NamedTuple):
    count: jax.Array
    mean: jax.Array
    squares: jax.Array


def mean_variance(*, per: Per = "tensor") -> Observer:
    """Mean and variance, stable for means far from zero.

    Args:
        per: static. `"tensor"`, or `"channel"` for those of each feature.

    Returns:
        An `Observer` of `Moments`; zeros without any token.

    Source: Chan, Golub, LeVeque 1983, The American Statistician 37(3), equation 2.1.
    """
    axis = _axis("mean_variance", per)

    def update(state, x):
        x = _wide(x)
        number = x.shape[0] if per == "channel" else x.size
        if number == 0:
            return state
        mean = jnp.mean(x, axis)
        squares = jnp.sum(jnp.square(x - jnp.expand_dims(mean, axis)), axis)
        return merge(state, _Sums(jnp.float32(number), mean, squares))

    def merge(a, b):
        count = a.count + b.count
        share = b.count / jnp.maximum(count, 1.0)
        apart = b.mean - a.mean
        squares = a.squares + b.squares + jnp.square(apart) * a.count * share
        mean = jnp.where(a.count > 0, a.mean + apart * share, b.mean)
        return _Sums(count, mean, squares)

    def finalize(state):
        return Moments(state.count, state.mean, state.squares / jnp.maximum(state.count, 1.0))

    def init(features):
        zero = jnp.zeros(_shape(per, features), jnp.float32)
        return _Sums(jnp.zeros((), jnp.float32), zero, zero)

    return Observer(init, update, merge, finalize)


def gram() -> Observer:
    r"""The Gram matrix :math:`\sum x x^T` in float32, without storing the activations.

    Returns:
        An `Observer` of `Gram`s.

    Cost: :math:`2 n d^2` operations for n tokens of d features, and :math:`4 d^2` bytes.
    """

    def update(state, x):
        x = _wide(x)
        matrix = automatic(_gram_of, x, like_first=False)
        return Gram(state.count + x.shape[0], state.matrix + matrix)

    def merge(a, b):
        return Gram(a.count + b.count, a.matrix + b.matrix)

    def init(features):
        return Gram(jnp.zeros((), jnp.float32), jnp.zeros((features, features), jnp.float32))

    return Observer(init, update, merge, lambda state: state)


def _gram_of(x: jax.Array) -> jax.Array:
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)


def together(**observers: Observer) -> Observer:
    """Several observers of the same activations as one.

    Args:
        **observers: by name.

    Returns:
        An `Observer` whose state and statistics are dicts by these names.

    Raises:
        TypeError: one is no `Observer`.
    """
    for name, observer in observers.items():
        if not isinstance(observer, Observer):
            rule = "be an Observer"
            raise TypeError(_check.message("together", name, rule, _check.describe(observer)))

    def each(f):
        return lambda *states: {
            name: f(observer)(*(state[name] for state in states))
            for name, observer in observers.items()
        }

    return Observer(
        lambda features: {name: o.init(features) for name, o in observers.items()},
        lambda state, x: {name: o.update(state[name], x) for name, o in observers.items()},
        each(lambda observer: observer.merge),
        each(lambda observer: observer.finalize),
    )


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _axis(function: str, per: Any) -> tuple[int, ...]:
    if per not in ("tensor", "channel"):
        raise ValueError(_check.message(function, "per", "be 'tensor' or 'channel'", repr(per)))
    return (0, 1) if per == "tensor" else (0,)


def _shape(per: Per, features: int) -> tuple[int, ...]:
    return () if per == "tensor" else (features,)
