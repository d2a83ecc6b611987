"""A leaf as matrices of features by outputs, in the order of its statistics."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress.tracing import Statistics


class Layout(NamedTuple):
    """How a leaf is cut into matrices; static. Eager, each way would be five small programs.

    Attributes:
        shape: of the leaf.
        stacked: how many leading axes are layers of a scan.
        axes: those that are summed over, in the order of the features; none for one feature.
        groups: of a grouped convolution; 1 elsewhere.
    """

    shape: tuple[int, ...]
    stacked: int
    axes: tuple[int, ...]
    groups: int

    @property
    def features(self) -> int:
        """How many rows each matrix has."""
        return math.prod(self.shape[a] for a in self.axes)

    def _order(self) -> list[int]:
        first = [*range(self.stacked), *self.axes]
        return [*first, *(a for a in range(len(self.shape)) if a not in first)]

    @functools.partial(jax.jit, static_argnums=0)
    def matrices(self, leaf: jax.Array) -> jax.Array:
        """`[layers * groups, features, outputs]`."""
        layers, features = math.prod(self.shape[: self.stacked]), self.features
        outputs = leaf.size // max(layers * features * self.groups, 1)
        x = jnp.transpose(leaf, self._order())
        x = jnp.moveaxis(x.reshape((layers, features, self.groups, outputs)), 2, 1)
        return x.reshape((layers * self.groups, features, outputs))

    @functools.partial(jax.jit, static_argnums=0)
    def leaf(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `matrices`; with fewer rows, shorter along the innermost axis."""
        layers, outputs = matrices.shape[0] // self.groups, matrices.shape[2]
        shape, features = list(self.shape), matrices.shape[1]
        if features != self.features:
            shape[self.axes[-1]] = features // math.prod(self.shape[a] for a in self.axes[:-1])
        x = matrices.reshape((layers, self.groups, features, outputs))
        order = self._order()
        x = jnp.moveaxis(x, 1, 2).reshape([shape[a] for a in order])
        return jnp.transpose(x, [order.index(i) for i in range(len(order))])

    def with_innermost(self, axis: int | None, gram: jax.Array) -> tuple["Layout", jax.Array]:
        """The layout in which `axis` runs fastest among the features, and its Gram matrices."""
        if axis is None or axis == self.axes[-1]:
            return self, gram
        other = self._replace(axes=(*(a for a in self.axes if a != axis), axis))
        sizes = [self.shape[a] for a in self.axes]
        places = jnp.arange(self.features).reshape(sizes)
        order = jnp.transpose(places, [self.axes.index(a) for a in other.axes])
        order = order.reshape(self.features)
        return other, gram[:, order][:, :, order]


def layouts(
    function: str, stats: Mapping[str, Statistics], leaves: Mapping[str, Any]
) -> dict[str, tuple[Layout, list[Statistics]]]:
    """The layout and the statistics of each leaf; those of several sites are put together.

    Raises:
        ValueError: a leaf has no statistics, or its sites use it in different ways or in part.
    """
    found: dict[str, list[Statistics]] = {}
    for name, one in stats.items():
        found.setdefault(re.sub(r":\d+$", "", name), []).append(one)
    missing = [path for path in leaves if path not in found]
    if missing:
        rule, got = "have statistics of each chosen leaf", f"none of {missing}"
        fix = "Calibrate the function that uses them, or leave them out: jc.masked, `where`."
        raise ValueError(_check.message(function, "stats", rule, got, fix))
    return {path: _joined(function, path, found[path], leaf) for path, leaf in leaves.items()}


def _joined(function: str, path: str, several: list[Statistics], leaf: Any):
    first = several[0]
    alike = all((s.axes, s.stacked) == (first.axes, first.stacked) for s in several)
    if not alike or first.axes is None:
        rule = "be of sites that use the whole leaf in one way"
        got = f"sites that sum over {[s.axes for s in several]}"
        fix = "Choose other leaves with jc.masked."
        raise ValueError(_check.message(function, "stats", rule, got, fix, path=path))
    groups = 1
    if first.gram is not None and first.gram.matrix.ndim == first.stacked + 3:
        groups = first.gram.matrix.shape[first.stacked]
    layout = Layout(tuple(leaf.shape), first.stacked, first.axes, groups)
    if first.gram is not None and first.gram.matrix.shape[-1] != layout.features:
        rule = f"have {layout.features} features, as the leaf has"
        got = _check.describe(first.gram.matrix)
        raise ValueError(_check.message(function, "stats", rule, got, path=path))
    return layout, several


def gram_of(function: str, path: str, several: list[Statistics], layout: Layout) -> jax.Array:
    """The Gram matrices of all sites together: `[layers * groups, features, features]`."""
    total = None
    for one in several:
        if one.gram is None:
            rule, fix = "hold Gram matrices", "Call jc.calibrate(…, gram=True)."
            got = "statistics without"
            raise ValueError(_check.message(function, "stats", rule, got, fix, path=path))
        matrix = one.gram.matrix
        if not _check.is_traced(matrix) and not np.isfinite(np.asarray(matrix)).all():
            rule, got = "be finite", "a Gram matrix with NaN or infinities"
            raise ValueError(_check.message(function, "stats", rule, got, path=path))
        total = matrix if total is None else total + matrix
    return jnp.asarray(total).reshape((-1, layout.features, layout.features))
