"""Runs: which weights of a leaf share a step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, arrays


class Runs(NamedTuple):
    """How a leaf falls into runs; static.

    Attributes:
        shared: the axes along which one step serves all.
        group: where it serves some consecutive entries. Along all other axes each index has
            its own.
    """

    shared: tuple[int, ...]
    group: arrays.Groups


class Granularity(NamedTuple):
    """How a user says it; static."""

    axis: int | tuple[int, ...] | None
    group_size: int | None
    group_axis: int
    blocks: Mapping[int, int] | None

    def check(self, function: str) -> None:
        """Refuses what no leaf could have."""
        if self.group_size is not None:
            _check.integer(function, "group_size", self.group_size, 1)
            if self.blocks is not None:
                got, fix = "both", "Write blocks={-2: 32} for group_size=32."
                rule = "be left out with `blocks`"
                raise ValueError(_check.message(function, "group_size", rule, got, fix))
        _check.integer(function, "group_axis", self.group_axis, -64)
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        for each in axes if self.axis is not None else ():
            _check.integer(function, "axis", each, -64)
        for along, size in (self.blocks or {}).items():
            _check.integer(function, "blocks", along, -64)
            _check.integer(function, "blocks", size, 1)

    def of(self, function: str, w: Any, path: str) -> Runs:
        """The runs of a leaf."""
        every = tuple(range(w.ndim))
        if self.group_size is not None and w.ndim > 0:
            along = 0
            if w.ndim > 1:
                along = _check.axis(function, "group_axis", self.group_axis, w.ndim, path)
            return Runs((), (along, self.group_size))
        own = set()
        if self.axis is not None and w.ndim > 1:
            wanted = self.axis if isinstance(self.axis, tuple) else (self.axis,)
            own = {_check.axis(function, "axis", a, w.ndim, path) for a in wanted}
        if self.blocks is None or w.ndim < 2:
            return Runs(tuple(a for a in every if a not in own), None)
        sizes = {
            _check.axis(function, "blocks", a, w.ndim, path): n for a, n in self.blocks.items()
        }
        pairs = tuple(sorted(sizes.items()))
        shared = tuple(a for a in every if a not in own and a not in sizes)
        return Runs(shared, pairs[0] if len(pairs) == 1 else pairs or None)


def split(x: jax.Array, runs: Runs) -> tuple[jax.Array, tuple[int, ...]]:
    """`[.., length, ..]` as `[.., groups, size, ..]`, filled up with NaN; the axes of a run."""
    axes = list(runs.shared)
    for axis, size in reversed(arrays.group_pairs(runs.group)):
        groups = -(-x.shape[axis] // size)
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, groups * size - x.shape[axis])
        x = jnp.pad(x, padding, constant_values=jnp.nan)
        x = x.reshape(x.shape[:axis] + (groups, size) + x.shape[axis + 1 :])
        axes = [a if a <= axis else a + 1 for a in axes] + [axis + 1]
    return x, tuple(sorted(axes))


def squeezed(x: jax.Array, runs: Runs) -> jax.Array:
    """What was reduced over the axes of `split`, with the rank of the leaf again."""
    for axis, _ in arrays.group_pairs(runs.group):
        x = jnp.squeeze(x, axis + 1)
    return x
