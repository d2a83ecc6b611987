"""N:M masks by comparisons inside of each group, never by a sort."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._sharding import automatic
from jaxcompress.pruning._threshold import keys, space_of
from jaxcompress.tracing import Site


def keep_n_of_m(scores: jax.Array, n: jax.Array | int, *, m: int, axis: int) -> jax.Array:
    """Keeps the n largest of each run of m entries along an axis.

    Args:
        scores: any shape with the axis; any float dtype. NaN ranks lowest.
        n: how many to keep in each group. May be traced.
        m: static. Length of a group. Where it does not divide, the last group is what is
            left: a shorter group from which also up to n are kept, as hardware sees it after
            padding with zeros.
        axis: static. The axis along which groups run.

    Returns:
        A `bool` array of the shape of `scores` with exactly `min(n, length of the group)`
        True in each group; of equal scores the first ones are kept.

    Raises:
        TypeError: `scores` is not real floating point, `m` or `axis` no integer, `n` no number.
        ValueError: `m` is below 1, `n` a number outside of [0, m], no such axis.

    Cost: m(m - 1) elementwise comparisons.

    Examples:
        >>> keep_n_of_m(jnp.array([4.0, 1.0, 3.0, 3.0, 9.0]), 2, m=4, axis=0)
        Array([ True, False,  True, False,  True], dtype=bool)

    Source: Mishra et al. 2021, arXiv:2104.08378, section 3.
    """
    _check.integer("keep_n_of_m", "m", m, 1)
    _check.number("keep_n_of_m", "n", n, 0, m)
    scores = jnp.asarray(scores)
    _check.floating("keep_n_of_m", "scores", scores)
    along = _check.axis("keep_n_of_m", "axis", axis, scores.ndim)
    return automatic(
        lambda scores, n: _keep(scores, n, m, along),
        scores,
        jnp.asarray(n, jnp.int32),
        like_first=True,
    )


def require_nm(function: str, nm: tuple[int, int]) -> tuple[int, int]:
    """`(n, m)`; refuses what is no such tuple."""
    if not isinstance(nm, tuple) or len(nm) != 2:
        raise TypeError(_check.message(function, "nm", "be a tuple (n, m)", repr(nm)))
    n, m = nm
    _check.integer(function, "nm[1]", m, 1)
    _check.integer(function, "nm[0]", n, 0, m)
    return n, m


def axis_of_groups(function: str, axis: int | Mapping[str, int], path: str, x: jax.Array) -> int:
    """The axis of a leaf along which its groups run, counted from the front."""
    fix = "Choose other leaves with jc.masked."
    if x.ndim == 0:
        rule, got = "have leaves with a dimension when `nm` is given", _check.describe(x)
        raise ValueError(_check.message(function, "params", rule, got, fix, path=path))
    if x.ndim == 1:
        return 0
    if isinstance(axis, Mapping):
        if path not in axis:
            rule = "have an axis for each chosen leaf"
            raise ValueError(_check.message(function, "axis", rule, sorted(axis), fix, path=path))
        axis = axis[path]
    return _check.axis(function, "axis", axis, x.ndim, path)


def contraction_axes(sites: Sequence[Site]) -> dict[str, int]:
    """The axis of each leaf along which sparse hardware wants its groups of m.

    Args:
        sites: what consumes the leaves, from `jc.sites(fn, params, *args)`.

    Returns:
        From the path of a leaf to the axis that its product sums over, for
        `jc.prune(nm=…, axis=…)`: the input channels of a convolution, the innermost summed axis
        of a matrix product. Leaves that are used in several ways, in part, or by a lookup are
        left out.

    Examples:
        >>> fn = lambda p, x: x @ p["w"].T
        >>> axes = jc.pruning.contraction_axes(jc.sites(fn, {"w": jnp.ones((2, 8))}, jnp.ones(8)))
        >>> p = jc.prune(nm=(2, 4), axis=axes)
        >>> axes
        {'w': 1}
    """
    found: dict[str, set[int | None]] = {}
    for site in sites:
        if site.op == "gather":
            continue
        first = site.op == "conv_general_dilated"
        axis = site.axes[0 if first else -1] if site.axes else None
        found.setdefault(site.path, set()).add(axis)
    agreed = {path: next(iter(axes)) for path, axes in found.items() if len(axes) == 1}
    return {path: axis for path, axis in agreed.items() if axis is not None}


def _keep(scores: jax.Array, n: jax.Array, m: int, axis: int) -> jax.Array:
    length = scores.shape[axis]
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    groups = -(-length // m)
    # Integers in the order of the floats: NaN lowest, subnormals told apart.
    space = space_of([scores.dtype])
    padding = [(0, 0)] * scores.ndim
    padding[axis] = (0, groups * m - length)
    ranked = jnp.pad(keys(scores, space), padding, constant_values=space.lowest)
    grouped = ranked.reshape(scores.shape[:axis] + (groups, m) + scores.shape[axis + 1 :])
    members = [jax.lax.index_in_dim(grouped, i, axis + 1, keepdims=False) for i in range(m)]
    kept = []
    for i, mine in enumerate(members):
        rank = jnp.zeros(mine.shape, jnp.int32)
        for j, other in enumerate(members):
            if j != i:
                before = other >= mine if j < i else other > mine
                rank = rank + before.astype(jnp.int32)
        kept.append(rank < n)
    keep = jnp.stack(kept, axis=axis + 1).reshape(ranked.shape)
    return jax.lax.slice_in_dim(keep, 0, length, axis=axis)
