"""Scores of units: what all weights that leave with a unit are worth together."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, _keys, tree
from jaxcompress._dtypes import wide
from jaxcompress._sharding import automatic, is_explicit
from jaxcompress._types import PyTree
from jaxcompress.pruning._groups import Norm, l2, require_norm
from jaxcompress.pruning._scores import RunningScore, magnitude
from jaxcompress.pruning.structured._base import Dependencies, Group, Member

Score = Callable[..., PyTree] | PyTree
"""A function `(params, *, grads=None, step=0) -> scores`, or the scores themselves, a tree of
arrays with the paths of the params."""

_STATISTICS = "mean var running_mean running_var mean_ema var_ema".split()


def is_trained(path: str, leaf: Any) -> bool:
    """The leaves that count by default: real floating point, and no running statistics.

    Those are told by their names: anything under `batch_stats` (Flax Linen), and a last part of
    the path that is `mean`, `var` (Flax NNX), `running_mean`, `running_var`, `mean_ema` or
    `var_ema`.

    Args:
        path: of the leaf.
        leaf: anything.

    Examples:
        >>> jc.pruning.is_trained("norm/scale", jnp.ones(3))
        True
        >>> jc.pruning.is_trained("norm/mean", jnp.ones(3))
        False
    """
    parts = path.split("/")
    if "batch_stats" in parts or parts[-1] in _STATISTICS:
        return False
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def unit_scores(
    dependencies: Dependencies,
    params: PyTree,
    *,
    score: Score = magnitude,
    norm: Norm = l2,
    leaves: tree.Where = is_trained,
    grads: PyTree = None,
    step: Any = 0,
) -> dict[str, jax.Array]:
    r"""What each unit of each group is worth, by the scores of all its weights.

    .. math:: S_u = \Big\| \big(s_w\big)_{w \in W(u)} \Big\|, \qquad
        W(u) = \bigcup_{m \in \mathrm{members}} \{w : w \text{ at a position of } u \text{ in } m\}

    with a norm of choice. A weight where two axes of one leaf belong to a unit, as the diagonal
    of a square matrix between channels of one residual stream, counts for both.

    Args:
        dependencies: static. Of the function, from `jc.dependencies`.
        params: any pytree, of the paths and shapes of the dependencies. May be traced.
        score: of single weights. A function as `jc.pruning.magnitude`, `saliency`, `lamp` or
            `random(key)`, or a tree as `taylor`, `fisher`, `snip`, `hessian_diagonal` and `wanda`
            give it; may be traced. Functions get None in the place of leaves that don't count.
        norm: static. What makes one number of those of a unit: `jc.pruning.l2`, `l1`, `mean`,
            `largest_score` of absolute scores, `total` of signed ones. One of your own,
            `(scores, axes, sizes)`, is taken twice: over each position of each member (with
            sizes 1), then over what a unit has of these, padded with zeros, with the number of
            its weights as sizes; both together have to be the norm of all.
        leaves: static. Which leaves count, as in `jc.masked`. `"**/scale"` scores by the scales
            of normalizations alone (network slimming), `"**/kernel"` without biases.
        grads: the tree of gradients for a `score` that needs them.
        step: handed on to `score`.

    Returns:
        From the name of each group that has a leaf that counts to its scores `[*layers, size]`, in
        float32 or wider; the largest should stay. NaN in a weight makes its unit NaN.

    Raises:
        ValueError: `leaves` matches nothing; a leaf is not there, or has another shape than in
            the dependencies; a tree of scores without one for a leaf that counts.
        TypeError: `score` is a `RunningScore` (pass what it found), or a leaf that counts is
            compressed.

    Cost: that of the score, and one reduction of each leaf for each of its axes that groups have
    positions along (two with `l2`, for its scale). Differentiable, also where a unit is zero.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.array([[3.0, 0.0, 1.0]]), "b": jnp.array([[4.0], [2.0], [0.0]])}
        >>> groups = jc.dependencies(apply, params, jnp.ones((1, 1)))
        >>> jc.pruning.unit_scores(groups, params)
        {'a[1]': Array([5., 2., 1.], dtype=float32)}
        >>> jc.pruning.unit_scores(groups, params, norm=jc.pruning.l1, leaves="b")
        {'a[1]': Array([4., 2., 0.], dtype=float32)}

    Source: Fang et al. 2023, arXiv:2301.12900, section 3.3 (all coupled weights of a unit
    together); Li et al. 2017, arXiv:1608.08710; Molchanov et al. 2019, arXiv:1906.10771; Liu et
    al. 2017, arXiv:1708.06519. Differs from Torch-Pruning's group magnitude, the mean over the
    members of sums of squares: the order inside of a group is the same for the same leaves.
    """
    require_norm("unit_scores", norm)
    counted = _scored(dependencies, params, score, leaves, grads, step)
    found = {}
    for group in dependencies.groups:
        members = [m for m in group.members if m.path in counted]
        if members:
            found[group.name] = reduced(group, members, [counted[m.path] for m in members], norm)
    return found


def random_units(dependencies: Dependencies, key: jax.Array) -> dict[str, jax.Array]:
    """Scores drawn uniformly from [0, 1) for each unit: the baseline of all others.

    Args:
        dependencies: static. From `jc.dependencies`.
        key: a `jax.random.key`. May be traced. Each group folds in its name.

    Returns:
        Scores for `jc.select(…, scores=…)`, as of `unit_scores`; no values of params are needed.

    Raises:
        TypeError: `key` is none.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 1))}
        >>> groups = jc.dependencies(apply, params, jnp.ones((1, 2)))
        >>> scores = jc.pruning.random_units(groups, jax.random.key(0))
        >>> int(jc.select(groups, params, keep=0.5, scores=scores).masks["a[1]"].sum())
        2
    """
    _check.key("random_units", key)
    return {
        group.name: jax.random.uniform(_keys.of_leaf(key, group.name), group.shape, jnp.float32)
        for group in dependencies.groups
    }


def reduced(
    group: Group, members: Sequence[Member], scores: Sequence[jax.Array], norm: Norm
) -> jax.Array:
    """One number for each unit, `[*layers, size]`, from the scores of its weights.

    Args:
        group: that the members are of.
        members: those that count.
        scores: of the leaf of each member.
        norm: static. As in `unit_scores`.
    """
    layers = len(group.layers)
    places, sizes = _places(group, members, [s.shape for s in scores])

    def reduce(*scores):
        scores = [wide(s) for s in scores]
        dtype = jnp.result_type(*[s.dtype for s in scores])
        parts = [_positions(m, s, layers, norm) for m, s in zip(members, scores, strict=True)]
        # What has no position there reads a zero.
        parts = [*parts, jnp.zeros((*group.layers, 1), dtype)]
        joined = jnp.concatenate([p.astype(dtype) for p in parts], axis=-1)
        slots = jnp.take(joined, places, axis=-1)
        counts = jnp.broadcast_to(jnp.asarray(sizes, dtype), group.shape)
        return norm(slots, (slots.ndim - 1,), counts)

    # Gathers have no rule for Explicit meshes; a leaf that is on one has to come first.
    order = sorted(range(len(scores)), key=lambda i: not is_explicit(scores[i]))
    back = [order.index(i) for i in range(len(scores))]
    found = automatic(
        lambda *s: reduce(*[s[i] for i in back]), *[scores[i] for i in order], like_first=False
    )
    _require_shape(found, group.shape, group.name)
    return found


def _positions(member: Member, scores: jax.Array, layers: int, norm: Norm) -> jax.Array:
    """One number for each position along the axis, `[*layers, positions]`."""
    others = tuple(i for i in range(layers, scores.ndim) if i != member.axis)
    if not others:
        return scores
    shape = (*scores.shape[:layers], scores.shape[member.axis])
    found = norm(scores, others, jnp.ones(shape, scores.dtype))
    _require_shape(found, shape, member.path)
    return found


def _require_shape(found: Any, shape: tuple[int, ...], path: str) -> None:
    if jnp.shape(found) != shape:
        rule, got = f"return shape {list(shape)}, one number each", _check.describe(found)
        raise ValueError(_check.message("unit_scores", "norm", rule, got, path=path))


def _places(
    group: Group, members: Sequence[Member], shapes: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the positions of each unit are among those of all members; how many weights it has.

    Returns:
        `[size, slots]`, padded with the place after the last, and `[size]`.
    """
    end = sum(len(member.units) for member in members)
    tables, sizes, start = [], np.zeros(group.size, np.int64), 0
    for member, shape in zip(members, shapes, strict=True):
        owned = np.flatnonzero(member.units >= 0)
        owned = owned[np.argsort(member.units[owned], kind="stable")]
        units = member.units[owned]
        number = np.bincount(units, minlength=group.size)
        first = np.cumsum(number) - number
        table = np.full((group.size, number.max(initial=0)), end, np.int32)
        table[units, np.arange(len(units)) - first[units]] = start + owned
        tables.append(table)
        others = [n for i, n in enumerate(shape) if i >= len(group.layers) and i != member.axis]
        sizes += number * math.prod(others)
        start += len(member.units)
    return np.concatenate(tables, axis=1), sizes


def _scored(dependencies, params, score, leaves, grads, step) -> Mapping[str, jax.Array]:
    """The scores of the leaves that count and that groups have members in, by path."""
    if not isinstance(dependencies, Dependencies):
        rule, fix = "be Dependencies", "Call jc.dependencies(fn, params, x)."
        got = _check.describe(dependencies)
        raise TypeError(_check.message("unit_scores", "dependencies", rule, got, fix))
    if isinstance(score, RunningScore):
        rule, fix = "be a function or a tree of scores", "Pass the scores that it found."
        raise TypeError(_check.message("unit_scores", "score", rule, "a RunningScore", fix))
    chosen = tree.select(params, leaves, function="unit_scores")
    counts = {
        path: w
        for (path, w), hit in zip(
            tree.leaves_with_paths(params), jax.tree.leaves(chosen), strict=True
        )
        if hit
    }
    wanted = {m.path: None for group in dependencies.groups for m in group.members}
    have = tree.by_path("unit_scores", "params", params)
    for path in wanted:
        _require_leaf(dependencies, path, have, counts)
    wanted = [path for path in wanted if path in counts]
    if not wanted:
        rule, got = "choose a leaf that loses units", f"only {sorted(counts)[:20]}"
        raise ValueError(_check.message("unit_scores", "leaves", rule, got))
    if callable(score):
        alone = tree.map_with_path(lambda _, w, hit: w if hit else None, params, chosen)
        scores = score(alone, grads=grads, step=step)
    else:
        scores = score
    by_path = tree.by_path("unit_scores", "score", scores)
    for path in wanted:
        if path not in by_path or jnp.shape(by_path[path]) != counts[path].shape:
            rule = f"have a score for each weight that counts, {list(counts[path].shape)}"
            got = _check.describe(by_path[path]) if path in by_path else f"{sorted(by_path)[:20]}"
            fix = "Or choose what counts by `leaves`."
            raise ValueError(_check.message("unit_scores", "score", rule, got, fix, path=path))
        _check.floating("unit_scores", "score", by_path[path], path)
    return {path: jnp.asarray(by_path[path]) for path in wanted}


def _require_leaf(dependencies: Dependencies, path: str, have: Mapping, counts: Mapping) -> None:
    shape = tuple(dependencies.shapes[path].shape)
    if path not in have or tuple(jnp.shape(have[path])) != shape:
        rule = f"have a leaf of shape {list(shape)}, as in the dependencies"
        got = _check.describe(have[path]) if path in have else f"the paths {sorted(have)[:20]}"
        fix = "Call jc.dependencies on these params."
        raise ValueError(_check.message("unit_scores", "params", rule, got, fix, path=path))
    if path in counts and tree.is_array_like(counts[path]):
        rule, fix = "hold dense leaves", "Score and shrink before packing."
        got = type(counts[path]).__name__
        raise TypeError(_check.message("unit_scores", "params", rule, got, fix, path=path))
