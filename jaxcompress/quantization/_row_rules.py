"""Quantization in the space of outputs: the rows of a layer, each on its grid."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays, tree
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import RowRule, Rows
from jaxcompress.quantization._grid import Fit, Grid, fit_grid
from jaxcompress.quantization._ranges import min_max, mse
from jaxcompress.quantization._runs import Runs

_SMALLEST_ERROR = mse()  # one object, so that programs with it are found again


def rows_by(
    params: PyTree,
    widths: Mapping[str, int | jax.Array],
    runs: Mapping[str, Runs],
    fit: Fit,
) -> Rows:
    """GPTQ: the grid of each group is fitted to its rows as they are when their turn comes.

    Leaves that do not fall into groups along one axis, one step for each index of all others,
    and those whose groups can't be taken in turn, have the grids of the dense weights.

    Args:
        params: the dense weights.
        widths: the bits of each leaf.
        runs: static. Of each leaf.
        fit: how.
    """
    known = [width for width in widths.values() if isinstance(width, int)]
    small = {width <= 4 for width in known}
    if fit.ranges is None and len(known) == len(widths) and len(small) == 1:
        fit = fit._replace(ranges=_SMALLEST_ERROR if small.pop() else min_max)
    numbers = {
        path: (jnp.asarray(width, jnp.int32), jnp.asarray(fit.clip, jnp.float32))
        for path, width in widths.items()
    }
    beforehand = functools.cache(lambda: _fixed_rows(params, numbers, runs, fit))
    if fit.scales is not None and fit.scales.values[0] <= 0:
        return beforehand()  # the steps of all groups are multiples of one
    along: dict[str, tuple[int, int]] = {}
    for path, own in runs.items():
        pairs = arrays.group_pairs(own.group)
        if len(pairs) == 1 and not own.shared:
            along[path] = pairs[0]
    sizes = {size for _, size in along.values()}
    if len(sizes) != 1:
        return beforehand()

    def structure(path: str, chosen: Grid) -> Grid:
        return dataclasses.replace(chosen, bits=numbers[path][0], group=along[path])

    return Rows(
        _grouped(sizes.pop(), fit._replace(clip=1.0)),
        numbers,
        {path: axis for path, (axis, _) in along.items()},
        structure=structure,
        otherwise=beforehand,
    )


def _fixed_rows(params: PyTree, numbers, runs: Mapping[str, Runs], fit: Fit) -> Rows:
    """Each row on the grid of its leaf: GPTQ with static groups."""
    data, held = {}, {}
    static = fit._replace(clip=1.0)

    def leaf(path, w):
        held[path], data[path] = _grid_and_rows(w, *numbers[path], runs[path], static)

    tree.map_arrays_with_path(leaf, params)
    return Rows(_fixed, data, {}, structure=lambda path, chosen: held[path])


@functools.partial(jax.jit, static_argnums=(3, 4))
def _grid_and_rows(w, bits, clip, runs: Runs, fit: Fit) -> tuple[Grid, Grid]:
    """The grid of a leaf, and that of each entry; eager it would be forty small programs."""
    grid = fit_grid(w, bits, runs, fit._replace(clip=clip))
    scale, zero_point = grid._expanded(w)
    fields = {"scale": jnp.broadcast_to(scale, w.shape), "second": None, "group": None}
    if zero_point is not None:
        fields["zero_point"] = jnp.broadcast_to(zero_point, w.shape)
    return grid, dataclasses.replace(grid, **fields)


def _choose_fixed(data: Grid, rows, diagonal, start, features) -> Grid:
    del diagonal
    # The rows that fill up the last block get the grid of the last true one.
    mine = jnp.minimum(start + np.arange(rows.shape[0]), max(features - 1, 0))
    return _taken(data, lambda x: x[mine])


def _round_fixed(row: jax.Array, grid: Grid, i: jax.Array) -> jax.Array:
    return _taken(grid, lambda x: x[i]).project(row)


_fixed = RowRule(_choose_fixed, _round_fixed)


@functools.lru_cache(maxsize=128)
def _grouped(size: int, fit: Fit) -> RowRule:
    """One object for the same settings, so that their program is compiled once."""

    def choose(numbers: tuple[jax.Array, ArrayLike], rows, diagonal, start, features) -> Grid:
        del diagonal
        bits, clip = numbers
        true = start + np.arange(rows.shape[0]) < features
        rows = jnp.where(true[:, None], rows, jnp.nan)
        return fit_grid(rows, bits, Runs((), (0, size)), fit._replace(clip=clip))

    def project(row: jax.Array, grid: Grid, i: jax.Array) -> jax.Array:
        one = _taken(grid, lambda x: x[i // size])
        return dataclasses.replace(one, group=None).project(row)

    return RowRule(choose, project, group=size)


def _taken(grid: Grid, take: Callable[[jax.Array], jax.Array]) -> Grid:
    return jax.tree.map(lambda x: take(x) if x.ndim else x, grid)
