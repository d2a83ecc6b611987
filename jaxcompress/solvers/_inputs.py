"""The input features of a leaf by its statistics, and arrays that hold one number for each."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.solvers._layout import Layout, layouts
from jaxcompress.tracing import Statistics


class Inputs(NamedTuple):
    """Where the channels of the activations are in a leaf; static.

    Attributes:
        layout: of the leaf.
        axes: the axes of the leaf along which the channels differ: all that are summed over,
            of a convolution the input features alone.
        groups: how often they are repeated in the activations: the groups of a convolution.
    """

    layout: Layout
    axes: tuple[int, ...]
    groups: int

    @property
    def count(self) -> int:
        """Channels of a group."""
        return math.prod(self.layout.shape[a] for a in self.axes)

    def placed(self, values: jax.Array) -> jax.Array:
        """From `[*layers, channels]` to the rank of the leaf, of size 1 along other axes."""
        shape, stacked = self.layout.shape, self.layout.stacked
        order = [*range(stacked), *self.axes]
        x = values.reshape([shape[a] for a in order])
        x = x.transpose(sorted(range(len(order)), key=lambda i: order[i]))
        return jnp.expand_dims(x, tuple(i for i in range(len(shape)) if i not in order))

    def others(self) -> tuple[int, ...]:
        """The axes along which `placed` is of size 1."""
        kept = {*range(self.layout.stacked), *self.axes}
        return tuple(i for i in range(len(self.layout.shape)) if i not in kept)


def with_statistics(
    function: str, params: PyTree, stats: Mapping[str, Any], where: tree.Where | None
) -> dict[str, tuple[jax.Array, Layout, list[Statistics]]]:
    """The leaves that `where` chooses, with the statistics of their sites.

    None chooses each real floating-point leaf that has usable ones: of sites that all sum over
    the same whole axes.
    """
    for name, one in stats.items():
        if not isinstance(one, Statistics):
            rule, got = "be what jc.calibrate returns", _check.describe(one)
            raise TypeError(_check.message(function, "stats", rule, got, path=name))
    leaves = dict(tree.leaves_with_paths(params))
    if where is None:
        used: dict[str, set[Any]] = {}
        for name, one in stats.items():
            head, _, tail = name.rpartition(":")
            path = head if tail.isdigit() and head else name
            used.setdefault(path, set()).add((one.axes, one.stacked))
        usable = {path for path, ways in used.items() if len(ways) == 1 and min(ways)[0]}
        chosen = [p for p, w in leaves.items() if p in usable and _is_dense(w)]
    else:
        picked = jax.tree.leaves(tree.select(params, where, function=function))
        chosen = [path for path, hit in zip(leaves, picked, strict=True) if hit]
        for path in chosen:
            _check.floating(function, "params", leaves[path], path)
    found = layouts(function, stats, {path: leaves[path] for path in chosen})
    return {path: (jnp.asarray(leaves[path]), *found[path]) for path in chosen}


def _is_dense(w: Any) -> bool:
    array = hasattr(w, "dtype") and not tree.is_array_like(w)
    return array and jnp.issubdtype(w.dtype, jnp.floating)


def inputs_of(layout: Layout, channels: int, one: Statistics) -> Inputs | None:
    """Where the channels are, from their number; None where the statistics don't tell."""
    if channels == layout.features:
        return Inputs(layout, layout.axes, 1)
    first = layout.shape[layout.axes[0]]
    if one.gram is not None and one.gram.matrix.ndim == one.stacked + 3:
        groups = one.gram.matrix.shape[one.stacked]
    elif 1 not in layout.shape[layout.stacked :]:
        groups = channels // first
    elif channels == 1:
        groups = 1
    else:
        return None
    if channels == groups:
        return Inputs(layout._replace(groups=groups), (), groups)
    known = channels == groups * first
    return Inputs(layout._replace(groups=groups), layout.axes[:1], groups) if known else None


def mean_inputs(function: str, path: str, several: list[Statistics]) -> jax.Array:
    """Of each channel, over the tokens of all sites: `[*layers, channels]`."""
    totals, counts = [], []
    for one in several:
        if one.moments is None:
            rule, got = "hold the mean of each feature", "statistics without"
            fix = "Call jc.calibrate(…, moments=True)."
            raise ValueError(_check.message(function, "stats", rule, got, fix, path=path))
        number = jnp.expand_dims(one.moments.count, -1)
        totals.append(one.moments.mean * number)
        counts.append(number)
    return sum(totals[1:], totals[0]) / jnp.maximum(sum(counts[1:], counts[0]), 1.0)
