"""A function for params of which some positions are gone."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.tracing._jaxprs import is_array, trace
from jaxcompress.tracing._sites import is_extra, require_function
from jaxcompress.tracing._stand_ins import shapes_of, stand_ins
from jaxcompress.tracing.positions._program import read_program
from jaxcompress.tracing.positions._replay import replay
from jaxcompress.tracing.positions._user_rules import AxisRule


def without_positions(
    fn: Callable[..., PyTree],
    like: PyTree,
    positions: Mapping[str, Mapping[int, np.ndarray]],
    *,
    rescale: bool = False,
    rules: Mapping[str, AxisRule] | None = None,
) -> Callable[..., PyTree]:
    """`fn` for params without some positions.

    Args:
        fn: any function of params and more.
        like: params that it takes; shapes alone are held on to.
        positions: by path and axis which positions stay, `bool [*layers, positions]`.
        rescale: static. Whether numbers that come from a size change with it; a warning says
            which ones could come from one size or another: they stay.
        rules: of the user, for what can't be read.
    """
    require_function("shrink", fn)
    old = shapes_of(like)

    expected = {
        path: _small(leaf.shape, positions.get(path, {})) if is_array(leaf) else None
        for path, leaf in tree.leaves_with_paths(old)
    }

    def run(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        _require(params, expected)
        traced = trace(fn, (stand_ins(old, params), *args), kwargs, parts=True)
        program = read_program(traced, rules)
        arrays = [leaf for leaf in jax.tree.leaves(params) if is_array(leaf)]
        values = [*arrays, *traced.leaves[len(arrays) :]]
        given = []
        for path, v in zip(traced.paths, traced.jaxpr.invars, strict=True):
            axes = {} if is_extra(path) else positions.get(path, {})
            given.append(tuple(axes.get(d) for d in range(len(v.aval.shape))))
        replayed = replay(program, values, given, rescale=rescale)
        for why in dict.fromkeys(replayed.unsure):
            warnings.warn(f"shrink: {why}; it was kept.", stacklevel=2)
        return traced.results(replayed.results)

    return run


def _small(shape: tuple[int, ...], axes: Mapping[int, np.ndarray]) -> tuple[int, ...]:
    """The shape of a leaf without what is gone."""
    sizes = dict(enumerate(shape))
    sizes |= {d: int(mask.sum(-1).max(initial=0)) for d, mask in axes.items()}
    return tuple(sizes.values())


def _require(params: PyTree, expected: Mapping[str, Any]) -> None:
    leaves = tree.by_path("shrink", "params", params)
    for path in dict.fromkeys((*expected, *leaves)):
        leaf: Any = leaves.get(path)
        shape = tuple(leaf.shape) if is_array(leaf) else None
        if (path in leaves) == (path in expected) and shape == expected[path]:
            continue
        rule = "be the small ones that jc.shrink returned, or have their shapes"
        got = "none" if path not in leaves else _check.describe(leaf)
        raise ValueError(_check.message("shrink", "params", rule, got, path=path))
