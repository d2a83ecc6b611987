"""Ramps from one number to another between two steps: linear, cubic, cosine, exponential.

They are Optax schedules, with nothing static: all four numbers may be traced, so `jax.vmap`
sweeps them and a change compiles nothing anew. Steps are read in float32: each one is told
from the next up to 2**24, about 16.8 million.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import ArrayLike

Schedule = Callable[[ArrayLike], jax.Array]
"""A float32 number at each step; an `optax.Schedule`."""


def cubic(initial: ArrayLike, final: ArrayLike, begin: ArrayLike, end: ArrayLike) -> Schedule:
    r"""Fast at first and slower and slower towards the end: the ramp of gradual pruning.

    .. math:: s_t = s_f + (s_i - s_f)\left(1 - \frac{t - t_b}{t_e - t_b}\right)^3

    Args:
        initial: value up to step `begin`, a scalar. May be traced.
        final: value from step `end` on, a scalar. May be traced.
        begin: last step at `initial`, a scalar. May be traced.
        end: first step at `final`, a scalar, at least `begin`. May be traced. With
            `begin == end` (or a traced `end` below `begin`) the value jumps to `final` at
            `begin`.

    Returns:
        A function from a step (an integer or a float, of any shape) to the value there, in
        float32; both ends are met to the last bit.

    Raises:
        TypeError: an argument is not a real number.
        ValueError: `end` is below `begin`, both known.

    Cost: a few scalar operations.

    Examples:
        >>> sparsity = jc.schedules.cubic(0.0, 0.8, 0, 10)
        >>> sparsity(0), sparsity(5), sparsity(10)
        (Array(0., dtype=float32), Array(0.7, dtype=float32), Array(0.8, dtype=float32))

    Source: Zhu & Gupta 2017, arXiv:1710.01878, equation 1. Differs: the value is defined at
    every step; hold it between prunings with `jc.every`.
    """
    return _ramp("cubic", _scaled(lambda left: left**3), initial, final, begin, end)


def linear(initial: ArrayLike, final: ArrayLike, begin: ArrayLike, end: ArrayLike) -> Schedule:
    r"""The same amount at each step.

    .. math:: s_t = s_f + (s_i - s_f)\left(1 - \frac{t - t_b}{t_e - t_b}\right)

    Args:
        initial: value up to step `begin`, a scalar. May be traced.
        final: value from step `end` on, a scalar. May be traced.
        begin: last step at `initial`, a scalar. May be traced.
        end: first step at `final`, a scalar, at least `begin`. May be traced. Equal to
            `begin`, it makes a jump there, as in `cubic`.

    Returns:
        A function from a step (an integer or a float, of any shape) to the value there, in
        float32; both ends are met to the last bit.

    Raises:
        TypeError: an argument is not a real number.
        ValueError: `end` is below `begin`, both known.

    Cost: a few scalar operations.

    Examples:
        >>> strength = jc.schedules.linear(0.0, 1.0, 100, 300)
        >>> strength(50), strength(250)
        (Array(0., dtype=float32), Array(0.75, dtype=float32))
    """
    return _ramp("linear", _scaled(lambda left: left), initial, final, begin, end)


def cosine(initial: ArrayLike, final: ArrayLike, begin: ArrayLike, end: ArrayLike) -> Schedule:
    r"""Half a period of a cosine: slow at both ends.

    .. math:: s_t = s_f + \tfrac12 (s_i - s_f)
        \left(1 + \cos\left(\pi\,\frac{t - t_b}{t_e - t_b}\right)\right)

    Args:
        initial: value up to step `begin`, a scalar. May be traced.
        final: value from step `end` on, a scalar. May be traced.
        begin: last step at `initial`, a scalar. May be traced.
        end: first step at `final`, a scalar, at least `begin`. May be traced. Equal to
            `begin`, it makes a jump there, as in `cubic`.

    Returns:
        A function from a step (an integer or a float, of any shape) to the value there, in
        float32; both ends are met to the last bit.

    Raises:
        TypeError: an argument is not a real number.
        ValueError: `end` is below `begin`, both known.

    Cost: a few scalar operations.

    Examples:
        >>> temperature = jc.schedules.cosine(8.0, 2.0, 0, 1000)
        >>> temperature(0), temperature(500), temperature(2000)
        (Array(8., dtype=float32), Array(5., dtype=float32), Array(2., dtype=float32))

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, one period.
    """

    shape = lambda left: 0.5 * (1.0 - jnp.cos(jnp.pi * left))  # noqa: E731
    return _ramp("cosine", _scaled(shape), initial, final, begin, end)


def exponential(initial: ArrayLike, final: ArrayLike, begin: ArrayLike, end: ArrayLike) -> Schedule:
    r"""The same share of what is left goes at each step: for sparsities.

    .. math:: 1 - s_t = (1 - s_i)\left(\frac{1 - s_f}{1 - s_i}\right)^{(t - t_b)/(t_e - t_b)}

    Args:
        initial: value up to step `begin`, a scalar, at most 1. May be traced.
        final: value from step `end` on, a scalar, at most 1. May be traced. At 1 the value
            jumps there after `begin`.
        begin: last step at `initial`, a scalar. May be traced.
        end: first step at `final`, a scalar, at least `begin`. May be traced. Equal to
            `begin`, it makes a jump there, as in `cubic`.

    Returns:
        A function from a step (an integer or a float, of any shape) to the value there, in
        float32; both ends are met to the last bit. A traced number above 1 gives NaN between
        the ends.

    Raises:
        TypeError: an argument is not a real number.
        ValueError: `end` is below `begin`, or `initial` or `final` above 1, where known.

    Cost: a few scalar operations.

    Examples:
        >>> sparsity = jc.schedules.exponential(0.0, 0.75, 0, 2)
        >>> sparsity(0), sparsity(1), sparsity(2)
        (Array(0., dtype=float32), Array(0.5, dtype=float32), Array(0.75, dtype=float32))

    Source: Han et al. 2015, arXiv:1506.02626, prune in rounds; the constant share of each round
    is that of Frankle & Carbin 2019, arXiv:1803.03635.
    """

    def between(start, stop, left):
        dense, sparse = 1.0 - start, 1.0 - stop
        return 1.0 - jnp.power(dense, left) * jnp.power(sparse, 1.0 - left)

    ramp = _ramp("exponential", between, initial, final, begin, end)
    _check.number("exponential", "initial", initial, None, 1)
    _check.number("exponential", "final", final, None, 1)
    return ramp


def _ramp(function, between, initial, final, begin, end) -> Schedule:
    """The ramp that is `between(initial, final, fraction of steps still to go)`."""
    for name, value in {"initial": initial, "final": final, "begin": begin, "end": end}.items():
        if callable(value):
            raise TypeError(_check.message(function, name, "be a real number", "a schedule"))
        _check.number(function, name, value)
    if not (_check.is_traced(begin) or _check.is_traced(end)) and end < begin:
        raise ValueError(_check.message(function, "end", f"be at least `begin` ({begin})", end))

    def schedule(step: ArrayLike) -> jax.Array:
        start, stop, first, last, now = (
            jnp.asarray(x, jnp.float32) for x in (initial, final, begin, end, step)
        )
        length = jnp.where(last > first, last - first, 1.0)
        left = jnp.clip((last - now) / length, 0.0, 1.0)
        value = between(start, stop, left)
        before, after = now <= first, now >= jnp.maximum(first, last)
        return jnp.where(after, stop, jnp.where(before, start, value))

    return schedule


def _scaled(shape):
    """Between the ends by `shape`, of the fraction of steps still to go."""
    return lambda start, stop, left: stop + (start - stop) * shape(left)
