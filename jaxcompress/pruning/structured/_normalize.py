"""Making scores of different groups comparable, for one ranking of all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress import _check

Normalize = Callable[[jax.Array], jax.Array]
"""`scores[*layers, size] -> scores` of one group; layers of a scan have a scale each."""


def by_mean(scores: jax.Array) -> jax.Array:
    """Scores over their mean: how a unit compares with an average one of its group.

    Zeros don't count in the mean: units that are gone already, while pruning grows, would lift
    those that are left above the units of other groups.

    Args:
        scores: `[*layers, size]`, of one group, at least 0.

    Returns:
        As many; zeros where all are zero.

    Examples:
        >>> jc.pruning.by_mean(jnp.array([1.0, 3.0]))
        Array([0.5, 1.5], dtype=float32)

    Source: the default of Torch-Pruning's importances.
    """
    living = jnp.sum(scores != 0, axis=-1, keepdims=True).astype(scores.dtype)
    return _over(scores, _over(jnp.sum(scores, axis=-1, keepdims=True), living))


def by_largest(scores: jax.Array) -> jax.Array:
    """Scores over the largest of the group.

    Args:
        scores: `[*layers, size]`, of one group, at least 0.

    Returns:
        As many; zeros where all are zero.

    Examples:
        >>> jc.pruning.by_largest(jnp.array([1.0, 4.0]))
        Array([0.25, 1.  ], dtype=float32)

    Source: Molchanov et al. 2017, arXiv:1611.06440, section 2.2 has the 2-norm of a layer's
    scores in this place.
    """
    return _over(scores, jnp.max(scores, axis=-1, keepdims=True, initial=0.0))


def by_total(scores: jax.Array) -> jax.Array:
    """Scores over their sum: shares of a whole, smaller in larger groups.

    Args:
        scores: `[*layers, size]`, of one group, at least 0.

    Returns:
        As many; zeros where all are zero.

    Examples:
        >>> jc.pruning.by_total(jnp.array([1.0, 3.0]))
        Array([0.25, 0.75], dtype=float32)
    """
    return _over(scores, jnp.sum(scores, axis=-1, keepdims=True))


def between_extremes(scores: jax.Array) -> jax.Array:
    """Scores moved and scaled to [0, 1]: the smallest of a group is 0, the largest 1.

    Args:
        scores: `[*layers, size]`, of one group, of any sign.

    Returns:
        As many; zeros where all are equal.

    Examples:
        >>> jc.pruning.between_extremes(jnp.array([1.0, 2.0, 5.0]))
        Array([0.  , 0.25, 1.  ], dtype=float32)
    """
    if scores.shape[-1] == 0:
        return scores
    low = jnp.min(scores, axis=-1, keepdims=True)
    return _over(scores - low, jnp.max(scores, axis=-1, keepdims=True) - low)


def by_deviation(scores: jax.Array) -> jax.Array:
    r"""Standard scores, :math:`(s - \mu) / \sigma`, with the standard deviation of all units.

    Args:
        scores: `[*layers, size]`, of one group, of any sign.

    Returns:
        As many; zeros where all are equal.

    Examples:
        >>> jc.pruning.by_deviation(jnp.array([1.0, 3.0]))
        Array([-1.,  1.], dtype=float32)

    Differs from Torch-Pruning's "gaussian": it divides by the deviation of a sample (n - 1).
    """
    centered = scores - jnp.mean(scores, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    positive = variance > 0
    # Two choices: the gradient of a root at zero is infinite.
    root = jnp.sqrt(jnp.where(positive, variance, jnp.ones_like(variance)))
    return _over(centered, jnp.where(positive, root, variance))


def _over(scores: jax.Array, scale: jax.Array) -> jax.Array:
    """The quotient; zeros over zero. A NaN in the scale stays NaN."""
    zero = scale == 0
    return jnp.where(zero, jnp.zeros_like(scores), scores / jnp.where(zero, 1.0, scale))


def require_normalize(function: str, normalize: object) -> None:
    """Refuses what is no function, as a name."""
    if normalize is not None and not callable(normalize):
        rule = "be None or a function, as jc.pruning.by_mean"
        raise TypeError(_check.message(function, "normalize", rule, _check.describe(normalize)))
