"""How many directions of a matrix count, read off its singular values."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._types import ArrayLike


def energy_rank(s: jax.Array, energy: ArrayLike) -> jax.Array:
    r"""The smallest rank that holds a fraction of the sum of the *squared* singular values.

    .. math:: \min \Big\{ r : \sum_{i \le r} s_i^2 \ge e \sum_i s_i^2 \Big\}

    The relative error of the truncation is then at most :math:`\sqrt{1 - e}` in the Frobenius
    norm. It is the rank that `jc.low_rank(energy=e)` takes.

    Args:
        s: singular values, falling, of shape [..., k]; any float dtype, narrow ones are
            computed in float32. Leading axes are a batch.
        energy: :math:`e`, from 0 to 1. May be traced.

    Returns:
        int32, of shape [...]. 0 where all values are zero, or k is; k where one is NaN or infinite.

    Raises:
        TypeError: `s` is not real floating point; raised while tracing.
        ValueError: `s` has no axis, or `energy` is out of range.

    Cost: one cumulative sum.

    Examples:
        >>> s = jnp.array([3.0, 1.0, 0.1])
        >>> jc.factorization.energy_rank(s, 0.8), jc.factorization.energy_rank(s, 0.99)
        (Array(1, dtype=int32), Array(2, dtype=int32))

    Source: the cumulative percentage of variance of Jolliffe 2002, "Principal component
    analysis", section 6.1.1. Many codes take the fraction of the sum of the values themselves.
    """
    x = checked_values("energy_rank", s)
    _check.number("energy_rank", "energy", energy, 0, 1)
    return rank_of_energy(x, scalar(energy, x), jnp.zeros(x.shape[:-1], x.dtype))


def numerical_rank(
    s: jax.Array, shape: tuple[int, int], rtol: ArrayLike | None = None
) -> jax.Array:
    r"""The number of singular values that are more than rounding errors.

    .. math:: \#\{ i : s_i > t\, s_{\max} \}, \qquad t = \max(m, n)\,\varepsilon

    Args:
        s: as in `energy_rank`, not all of them where the others are known to be small.
        shape: static. :math:`(m, n)` of the matrix.
        rtol: :math:`t`, at least 0, instead of the above, in which :math:`\varepsilon` is that
            of `s`, or of float32 where `s` is narrower. Always relative. May be traced.

    Returns:
        int32, of shape [...]. 0 where all values are zero, or k is; k where one is NaN or infinite.

    Raises:
        TypeError: `s` is not real floating point, `shape` not two integers.
        ValueError: `s` has no axis or more values than the matrix has, or a negative `rtol`.

    Cost: one pass.

    Examples:
        >>> s = jnp.array([2.0, 1.0, 1e-7])
        >>> jc.factorization.numerical_rank(s, (8, 3))
        Array(2, dtype=int32)
        >>> jc.factorization.numerical_rank(s, (8, 3), rtol=0.6)
        Array(1, dtype=int32)

    Source: the rule of `numpy.linalg.matrix_rank` and of Press et al. 2007, "Numerical recipes".
    `jnp.linalg.matrix_rank` has it too, but takes its `rtol` as absolute.
    """
    x = checked_values("numerical_rank", s)
    _, large = checked_sides("numerical_rank", shape, x, every=False)
    if rtol is not None:
        _check.number("numerical_rank", "rtol", rtol, 0)
        return count_above(x, scalar(rtol, x) * largest(x))
    return count_above(x, rounding(x, large))


def stable_rank(s: jax.Array) -> jax.Array:
    r"""The ratio of the squared Frobenius norm to the squared spectral norm.

    .. math:: \frac{\|W\|_F^2}{\|W\|_2^2} = \sum_i \Big(\frac{s_i}{s_1}\Big)^2

    At most the rank, and little changed by small singular values: a smooth stand-in for it.

    Args:
        s: as in `energy_rank`.

    Returns:
        float32 (float64 of a float64 `s`), of shape [...], from 1 to k. 0, with gradient 0, where
        all values are zero, or k is; NaN where one is NaN or infinite. Differentiable.

    Raises:
        TypeError: `s` is not real floating point; raised while tracing.
        ValueError: `s` has no axis.

    Cost: one pass.

    Examples:
        >>> jc.factorization.stable_rank(jnp.array([2.0, 1.0, 1.0]))
        Array(1.5, dtype=float32)

    Source: Rudelson & Vershynin 2007, arXiv:math/0503442.
    """
    x = checked_values("stable_rank", s)
    return jnp.sum(jnp.square(x / unit_of(largest(x))), axis=-1)


def effective_rank(s: jax.Array) -> jax.Array:
    r"""The exponential of the entropy of the singular values, as fractions of their sum.

    .. math:: \exp\Big( -\sum_i p_i \log p_i \Big), \qquad p_i = s_i / \sum_j s_j

    r equal values and zeros else give r.

    Args:
        s: as in `energy_rank`.

    Returns:
        float32 (float64 of a float64 `s`), of shape [...], from 1 to k. 0, with gradient 0, where
        all values are zero, or k is; NaN where one is NaN or infinite. Differentiable; the
        gradient, which grows without bound towards a zero value, is 0 at one.

    Raises:
        TypeError: `s` is not real floating point; raised while tracing.
        ValueError: `s` has no axis.

    Cost: one pass, with logarithms.

    Examples:
        >>> jc.factorization.effective_rank(jnp.array([2.0, 2.0, 0.0]))
        Array(2., dtype=float32)

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    x = checked_values("effective_rank", s)
    x = x / unit_of(largest(x))
    p = x / unit_of(jnp.sum(x, axis=-1, keepdims=True))
    absent = p == 0
    entropy = -jnp.sum(jnp.where(absent, 0.0, p * jnp.log(jnp.where(absent, 1.0, p))), axis=-1)
    # Of no values at all or zeros the entropy is 0, but so is the rank.
    some = jnp.any(x != 0, axis=-1)
    return jnp.where(some, jnp.exp(entropy), 0.0)


def rank_of_energy(s: jax.Array, energy: jax.Array, error: jax.Array) -> jax.Array:
    """`energy_rank`, unchecked, of the first singular values; the root of the rest is `error`."""
    unit = unit_of(largest(s))
    x, beyond = s / unit, jnp.square(error[..., None] / unit)
    # Summed from the smallest up, so that the tail is exact where it decides.
    dropped = jnp.cumsum(jnp.square(x)[..., ::-1], axis=-1)[..., ::-1] + beyond
    return count_above(dropped, (1.0 - energy) * dropped[..., :1])


def checked_values(function: str, s: jax.Array) -> jax.Array:
    """Singular values in float32 or wider."""
    _check.floating(function, "s", s)
    if s.ndim == 0:
        rule = "have the singular values along its last axis"
        raise ValueError(_check.message(function, "s", rule, _check.describe(s)))
    return wide(s)


def checked_sides(
    function: str, shape: tuple[int, int], x: jax.Array, *, every: bool
) -> tuple[int, int]:
    """The smaller and the larger side of the matrix."""
    if (
        not isinstance(shape, tuple)
        or len(shape) != 2
        or any(isinstance(d, bool) or not isinstance(d, (int, np.integer)) for d in shape)
    ):
        rule, fix = "be a static (m, n)", "Of a kernel pass (math.prod(w.shape[:-1]), w.shape[-1])."
        raise TypeError(_check.message(function, "shape", rule, _check.describe(shape), fix))
    small, large = int(min(shape)), int(max(shape))
    k = x.shape[-1]
    if k > small or (every and k < small):
        rule = f"have {'' if every else 'at most '}{small} singular values of a matrix {shape}"
        raise ValueError(_check.message(function, "s", rule, _check.describe(x)))
    return small, large


def scalar(value: ArrayLike, like: jax.Array) -> jax.Array:
    return jnp.asarray(value).astype(like.dtype)


def largest(x: jax.Array) -> jax.Array:
    """Of shape [..., 1], or [..., 0] of no values at all."""
    return x[..., :1]


def unit_of(top: jax.Array) -> jax.Array:
    """What to divide by: 1 where all is zero."""
    return jnp.where(top == 0, jnp.ones_like(top), top)


def rounding(x: jax.Array, large: int) -> jax.Array:
    return large * float(np.finfo(x.dtype).eps) * largest(x)


def count_above(x: jax.Array, threshold: jax.Array) -> jax.Array:
    """How many are above; all of them where any is not finite, so that nothing is lost unseen."""
    threshold = jnp.broadcast_to(threshold, x.shape)
    finite = jnp.all(jnp.isfinite(x) & jnp.isfinite(threshold), axis=-1)
    above = jnp.sum((x > threshold).astype(jnp.int32), axis=-1)
    return jnp.where(finite, above, x.shape[-1]).astype(jnp.int32)
