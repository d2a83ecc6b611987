"""Keeping exactly the k largest, of one array or of all leaves of a tree together."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.pruning import _threshold
from jaxcompress.tree import path_string

_MOST = 2**32 - 1  # entries that a uint32 counts


def largest(scores: jax.Array | np.ndarray, k: ArrayLike) -> jax.Array:
    r"""The mask of the `k` largest entries; exactly that many, whatever the ties.

    .. math:: \textstyle\sum_i m_i = \min(\max(k, 0), n), \qquad
        m_i > m_j \Rightarrow (s_i, -i) > (s_j, -j)

    Entries are ordered by score and, where scores are equal, by index in C order: the first
    is kept. -0 equals +0. NaN ranks below -inf, so it is kept last. The order is that of the
    bits: subnormals are told apart on every machine, and no rounding takes place.

    Args:
        scores: any shape, also scalar and empty; any real float dtype, compared exactly.
        k: how many to keep, a scalar of integer or float dtype. May be traced. It is rounded
            down and clipped to [0, n]; a traced NaN counts as 0.

    Returns:
        bool, the shape and sharding of `scores`, with `min(max(k, 0), n)` entries True.

    Raises:
        TypeError: `scores` is not real floating point, or `k` is no real number.
        ValueError: `k` is not a scalar or is NaN, or `scores` has more than 2**32 - 1 entries.

    Cost: one pass that writes an integer per entry, at most 11 that count (6 for bfloat16
    and float16, 22 for float64) and one that writes the mask; at most `log2(n) / 3` more where
    a tie must be broken. Memory: that integer, as wide as a score. Devices exchange a few
    integers a pass. Under `vmap` all examples pass together, until the last one is done.

    Examples:
        >>> largest(jnp.array([0.5, 2.0, -1.0, 2.0, 0.5]), 3)
        Array([ True,  True, False,  True, False], dtype=bool)
        >>> jax.vmap(lambda k: largest(jnp.arange(4.0), k))(jnp.arange(3)).sum(axis=1)
        Array([0, 1, 2], dtype=int32)

    Source: bracketing a rank by counts is classical (Floyd and Rivest 1975, Algorithm 489, for
    the sampled form). Differs: several places a pass, on the integers that order floats.
    """
    _check.floating("largest", "scores", scores)
    return _largest("largest", [jnp.asarray(scores)], k)[0]


def largest_of_tree(scores: PyTree, k: ArrayLike) -> PyTree:
    """The masks of the `k` largest entries of all leaves together.

    As `largest` of the leaves laid end to end, which they never are: each leaf is counted
    where it lies and the counts are added. Ties go to the leaf that comes first in flattening
    order, then to the entry that comes first in C order.

    Args:
        scores: a tree of real floating-point arrays, dtypes may differ; `None` stays.
        k: how many to keep in all, as in `largest`. May be traced.

    Returns:
        The structure of `scores`; bool leaves of the shapes and shardings of its leaves, with
        `min(max(k, 0), n)` entries True in all.

    Raises:
        TypeError: a leaf is not real floating point, or `k` is no real number.
        ValueError: `k` is not a scalar or is NaN, or there are more than 2**32 - 1 entries.

    Cost: that of `largest` on as many entries. Leaves that are all bfloat16 or all float16 take
    half the passes; where dtypes differ, all are compared in the widest, at least float32.
    Beside a float64 leaf, subnormals of other dtypes may rank as zeros.

    Examples:
        >>> largest_of_tree({"a": jnp.array([3.0, 1.0]), "b": jnp.array([[2.0, 3.0]])}, 2)
        {'a': Array([ True, False], dtype=bool), 'b': Array([[False,  True]], dtype=bool)}

    Source: as `largest`.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(scores)
    for path, leaf in flat:
        _check.floating("largest_of_tree", "scores", leaf, path_string(path))
    leaves = [jnp.asarray(leaf) for _, leaf in flat]
    return jax.tree.unflatten(structure, _largest("largest_of_tree", leaves, k))


def _largest(function: str, leaves: list[jax.Array], k: ArrayLike) -> list[jax.Array]:
    total = sum(math.prod(x.shape) for x in leaves)
    if total > _MOST:
        fix = "Select within parts and share k out among them."
        rule = "have at most 2**32 - 1 entries in all"
        raise ValueError(_check.message(function, "scores", rule, total, fix))
    kept = _clipped(function, k, total)
    if total == 0:
        return [jnp.zeros(x.shape, bool) for x in leaves]
    return _masks(leaves, kept)


def _clipped(function: str, k: ArrayLike, total: int) -> jax.Array:
    """`floor(min(max(k, 0), total))` as a uint32, exact for any dtype of `k`; NaN is 0."""
    real = jnp.issubdtype(jnp.result_type(k), jnp.number) if hasattr(k, "dtype") else True
    if callable(k) or not real or jnp.iscomplexobj(k):
        raise TypeError(_check.message(function, "k", "be a real number", _check.describe(k)))
    if hasattr(k, "shape") and jnp.ndim(k) != 0:
        raise ValueError(_check.message(function, "k", "be a scalar", _check.describe(k)))
    _check.number(function, "k", k)
    if isinstance(k, (int, float)) and not hasattr(k, "dtype"):
        return jnp.asarray(np.uint32(min(max(k, 0), total)))
    value = jnp.asarray(k)
    if jnp.issubdtype(value.dtype, jnp.integer):
        value = jnp.maximum(value, jnp.zeros_like(value))
        if value.dtype.itemsize <= 4:
            return jnp.minimum(value.astype(np.uint32), np.uint32(total))
        return jnp.minimum(value, np.array(total, value.dtype)).astype(np.uint32)
    value = value if value.dtype == np.float64 else value.astype(np.float32)
    most = np.array(total, value.dtype)
    most = most if int(most) <= total else np.nextafter(most, np.zeros_like(most))
    low = jnp.minimum(jnp.where(value >= 1, value, jnp.zeros_like(value)), most)
    return jnp.where(value > most, np.uint32(total), low.astype(np.uint32))


@jax.jit
def _masks(leaves: list[jax.Array], k: jax.Array) -> list[jax.Array]:
    sizes = [x.size for x in leaves]
    total, offsets = sum(sizes), np.cumsum([0, *sizes[:-1]]).astype(np.uint32)
    space = _threshold.space_of([x.dtype for x in leaves])
    found = [_threshold.keys(x, space) for x in leaves]
    steps = [_threshold.strides(x.shape) for x in leaves]
    final = np.uint32(total - 1)

    def at_or_above(places: jax.Array) -> jax.Array:
        bounds = list(_threshold.key_at(places, space))
        return _added([_threshold.count([x >= b for b in bounds]) for x in found])

    bracket = _threshold.search(at_or_above, space.size, np.uint32(total), k, space.unsigned)
    threshold = _threshold.key_at(bracket.low, space)
    # Either `low` parts off exactly k entries, or all between `low` and `high` are tied.
    tied = bracket.reach_low - bracket.reach_high
    wanted = k - bracket.reach_high

    def tied_up_to(places: jax.Array) -> jax.Array:
        # The barrier makes the indices depend on the pass: XLA would otherwise compute them
        # before the loop and hold them, at four bytes an entry.
        held = (places, threshold, [*map(jnp.asarray, steps)], [*map(jnp.asarray, offsets)])
        places, equal, across, starts = lax.optimization_barrier(held)
        lasts = list(final - places)
        counts = []
        for x, step, start in zip(found, across, starts, strict=True):
            index = _threshold.order(x.shape, step, start)
            counts.append(_threshold.count([(x == equal) & (index <= i) for i in lasts]))
        return _added(counts)

    def first_tied() -> jax.Array:
        return final - _threshold.search(tied_up_to, total, tied, wanted, np.dtype(np.uint32)).low

    last = lax.cond(tied != wanted, first_tied, lambda: jnp.asarray(final))
    masks = []
    for x, step, start in zip(found, steps, offsets, strict=True):
        early = _threshold.order(x.shape, step, start) <= last
        masks.append((x > threshold) | ((x == threshold) & early))
    return masks


def _added(counts: list[jax.Array]) -> jax.Array:
    out = counts[0]
    for c in counts[1:]:
        out = out + c
    return out
