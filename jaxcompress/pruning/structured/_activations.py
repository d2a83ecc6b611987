"""Scores of units from the activations that they carry."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.pruning.structured._base import Dependencies, Member
from jaxcompress.pruning.structured._unit_scores import reduced
from jaxcompress.tracing import Statistics, calibrate
from jaxcompress.tracing.observers import Observer, Range


def root_mean_square(stats: Statistics) -> jax.Array:
    r"""Of each feature, :math:`\sqrt{\sigma^2 + \mu^2}`, from `jc.calibrate(…, moments=True)`.

    Args:
        stats: of one site.

    Raises:
        ValueError: there are no moments.

    Examples:
        >>> fn, x = lambda p, x: x @ p["w"], jnp.array([[3.0, 0.0], [4.0, 1.0]])
        >>> stats = jc.calibrate(fn, {"w": jnp.ones((2, 1))}, [x], moments=True)
        >>> jc.pruning.root_mean_square(stats["w"])
        Array([3.535534  , 0.70710677], dtype=float32)
    """
    if stats.moments is None:
        rule, got = "hold moments", "statistics without"
        fix = "Call jc.calibrate(…, moments=True)."
        raise ValueError(_check.message("unit_statistics", "stats", rule, got, fix))
    return jnp.sqrt(stats.moments.variance + jnp.square(stats.moments.mean))


def unit_statistics(
    dependencies: Dependencies,
    stats: Mapping[str, Statistics],
    *,
    read: Callable[[Statistics], jax.Array] = root_mean_square,
) -> dict[str, jax.Array]:
    """Scores from statistics of the activations that the leaves of a unit read.

    A unit that a layer writes is what the next layers sum over: the score is the mean of that
    feature's statistics over all these layers and, where a unit is several features (a head, a
    channel in a flattened image), over those.

    Args:
        dependencies: static. From `jc.dependencies`.
        stats: from `jc.calibrate`, of the same function.
        read: static. `Statistics -> [*layers, features]`: one number for each feature.

    Returns:
        Scores for `jc.select(…, scores=…)`, as of `unit_scores`, of the groups that a site sums
        over. Sites whose features aren't positions of the leaf (grouped convolutions, parts of
        a leaf) don't count.

    Raises:
        ValueError: no group has statistics; `read` finds none.
        TypeError: a value of `stats` is not `Statistics`.

    Cost: a few operations on arrays of features.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.array([[1.0, 3.0, -2.0]]), "b": jnp.ones((3, 1))}
        >>> x = jnp.array([[1.0], [2.0]])
        >>> groups = jc.dependencies(apply, params, x)
        >>> stats = jc.calibrate(apply, params, [x], moments=True)
        >>> jc.pruning.unit_statistics(groups, stats, read=lambda s: s.moments.mean)
        {'a[1]': Array([1.5, 4.5, 0. ], dtype=float32)}
    """
    by_path: dict[str, list[Statistics]] = {}
    for name, one in stats.items():
        if not isinstance(one, Statistics):
            rule, got = "be what jc.calibrate returns", _check.describe(one)
            raise TypeError(_check.message("unit_statistics", "stats", rule, got, path=name))
        by_path.setdefault(re.sub(r":\d+$", "", name), []).append(one)
    found = {}
    for group in dependencies.groups:
        members, values = [], []
        for member in group.members:
            shape = tuple(dependencies.shapes[member.path].shape)
            for one in by_path.get(member.path, ()):
                along = _along(member, shape, one, len(group.layers), read)
                if along is not None:
                    # As a leaf of the positions alone.
                    members.append(member._replace(axis=len(group.layers)))
                    values.append(along)
        if members:
            found[group.name] = reduced(group, members, values, _average)
    if not found:
        rule, got = "have a site that sums over units of a group", f"those of {sorted(by_path)}"
        raise ValueError(_check.message("unit_statistics", "stats", rule, got))
    return found


def activation_scores(
    dependencies: Dependencies,
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Any],
    *,
    measure: Callable[[jax.Array], jax.Array] = jnp.abs,
) -> dict[str, jax.Array]:
    """The mean size of what each unit hands on, over batches of data.

    Args:
        dependencies: static. From `jc.dependencies(fn, params, *batch)`.
        fn: the function.
        params: its params.
        batches: as in `jc.calibrate`.
        measure: static. Of each activation, elementwise. `jnp.abs`: the mean absolute
            activation; `lambda x: x != 0`: how often it is not zero, one minus the average
            percentage of zeros (APoZ); `jnp.square`: the mean energy.

    Returns:
        Scores for `jc.select(…, scores=…)`, as of `unit_statistics`.

    Raises:
        ValueError: what `jc.calibrate` and `unit_statistics` refuse.

    Cost: one call of `fn` a batch, under `jit`. No activation outlives its batch.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.ones((2, 1))}
        >>> x = jnp.array([[1.0], [-2.0], [3.0], [5.0]])
        >>> groups = jc.dependencies(apply, params, x)
        >>> jc.pruning.activation_scores(groups, apply, params, [x], measure=lambda x: x != 0)
        {'a[1]': Array([0.75, 0.25], dtype=float32)}

    Source: Hu et al. 2016, arXiv:1607.03250, equation 1 (APoZ); Molchanov et al. 2017,
    arXiv:1611.06440, section 2.2 (the mean activation).
    """
    stats = calibrate(fn, params, batches, ranges=_mean_of(measure))
    return unit_statistics(dependencies, stats, read=lambda one: one.low)


def _mean_of(measure: Callable[[jax.Array], jax.Array]) -> Observer:
    """The mean of a measure of each feature, in the place of a range."""

    def update(state, x):
        new = measure(x.astype(jnp.float32)).astype(jnp.float32)
        return merge(state, (jnp.float32(x.shape[0]), jnp.sum(new, axis=0)))

    def merge(a, b):
        return jax.tree.map(jnp.add, a, b)

    def finalize(state):
        mean = state[1] / jnp.maximum(state[0], 1.0)
        return Range(mean, mean)

    def init(features):
        return jnp.zeros((), jnp.float32), jnp.zeros((features,), jnp.float32)

    return Observer(init, update, merge, finalize)


def _average(values: jax.Array, axes: tuple[int, ...], sizes: jax.Array) -> jax.Array:
    return jnp.sum(values, axes) / sizes


def _along(
    member: Member,
    shape: tuple[int, ...],
    stats: Statistics,
    layers: int,
    read: Callable[[Statistics], jax.Array],
) -> jax.Array | None:
    """The statistic of each position of a member, `[*layers, positions]`; None if it has none."""
    if stats.axes is None or stats.stacked != layers or member.axis not in stats.axes:
        return None
    values = jnp.asarray(read(stats))
    lead, size = shape[:layers], shape[member.axis]
    if values.shape[:layers] != lead or values.ndim != layers + 1:
        rule = f"return one number for each feature, {[*lead, 'features']}"
        got = _check.describe(values)
        raise ValueError(_check.message("unit_statistics", "read", rule, got, path=member.path))
    # A convolution has features of channels alone.
    axes = stats.axes if len(stats.axes) > 1 and values.shape[-1] != size else (member.axis,)
    sizes = [shape[a] for a in axes]
    if values.shape[-1] != math.prod(sizes):
        return None
    others = tuple(layers + i for i, a in enumerate(axes) if a != member.axis)
    return jnp.mean(values.reshape((*lead, *sizes)), axis=others)
