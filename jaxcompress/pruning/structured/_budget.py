"""Budgets: as many units as a number of parameters, bytes or operations allows."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning.structured._base import Dependencies, Keep
from jaxcompress.pruning.structured._ladder import Ladder, best
from jaxcompress.pruning.structured._places import kept_positions
from jaxcompress.pruning.structured._unit_scores import is_trained
from jaxcompress.tracing import cost

Shrink = Callable[..., tuple[PyTree, Callable[..., PyTree]]]
"""`jc.shrink`: `(fn, params, keep, *args) -> (small_params, small_fn)`."""


class UnitBudget(NamedTuple):
    """How much may be left, for `jc.select(…, keep=…)`.

    Attributes:
        limit: static. A float: the fraction of what there is without any removal, in (0, 1]; an
            integer: the amount itself.
        measure: `Keep -> number`, which must not fall where more units stay.

    Examples:
        Half of the entries of one leaf:

        >>> kept = lambda keep: np.prod(jc.pruning.kept_shapes(keep)["a"].shape)
        >>> budget = jc.pruning.UnitBudget(0.5, kept)
    """

    limit: float | int
    measure: Callable[[Keep], float]


def kept_shapes(keep: Keep) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `jc.shrink` leaves of each leaf, without running or tracing anything.

    Args:
        keep: static. From `jc.select`; the units alone are read, not `blocks`.

    Returns:
        From the path of each leaf to its shape and dtype. `jc.tree.size` and `jc.tree.nbytes`
        of that, and of `keep.dependencies.shapes`, are the parameters and bytes after and
        before.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 1))}
        >>> groups = jc.dependencies(apply, params, jnp.ones((1, 2)))
        >>> after = jc.pruning.kept_shapes(jc.select(groups, params, keep=0.5))
        >>> jc.tree.size(groups.shapes), jc.tree.size(after), after["a"].shape
        (12, 6, (2, 2))
    """
    shapes = dict(keep.dependencies.shapes)
    for path, axes in kept_positions(keep).items():
        full = list(shapes[path].shape)
        for axis, stays in axes.items():
            counts = np.unique(np.sum(stays, axis=-1))
            if len(counts) > 1:
                rule, got = "keep as many positions in each layer", counts.tolist()
                raise ValueError(_check.message("kept_shapes", "keep", rule, got, path=path))
            full[axis] = int(counts[0])
        shapes[path] = jax.ShapeDtypeStruct(tuple(full), shapes[path].dtype)
    return shapes


def parameter_budget(limit: float | int, *, leaves: tree.Where = is_trained) -> UnitBudget:
    """At most so many parameters.

    Args:
        limit: static. A float: the fraction that stays, in (0, 1]; an integer: the number.
        leaves: static. Which leaves are counted, those that no unit has a part of included; as
            in `unit_scores`.

    Returns:
        A budget for `jc.select(…, keep=…)`.

    Raises:
        ValueError: `limit` is out of range.
        TypeError: `limit` is no static number.

    Cost: `select` counts shapes at most 17 times for 100,000 units; nothing is traced.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 2))}
        >>> groups = jc.dependencies(apply, params, jnp.ones((1, 8)))
        >>> keep = jc.select(groups, params, keep=jc.pruning.parameter_budget(100))
        >>> jc.tree.size(jc.pruning.kept_shapes(keep))
        100
    """
    _require_limit("parameter_budget", limit)
    return UnitBudget(limit, lambda keep: tree.size(_counted(kept_shapes(keep), leaves)))


def byte_budget(limit: float | int, *, leaves: tree.Where = lambda path, leaf: True) -> UnitBudget:
    """At most so many bytes of parameters, each leaf in its own dtype.

    Args:
        limit: static. A float: the fraction that stays, in (0, 1]; an integer: the number.
        leaves: static. Which leaves are counted; by default all.

    Returns:
        A budget for `jc.select(…, keep=…)`. For bytes after packing give a `UnitBudget` of your
        own, that packs what is left.

    Raises:
        ValueError: `limit` is out of range.
        TypeError: `limit` is no static number.

    Cost: as `parameter_budget`.

    Examples:
        >>> half = jc.pruning.byte_budget(0.5)
        >>> at_most_a_megabyte = jc.pruning.byte_budget(2**20)
    """
    _require_limit("byte_budget", limit)
    return UnitBudget(limit, lambda keep: tree.nbytes(_counted(kept_shapes(keep), leaves)))


def flop_budget(
    limit: float | int,
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    shrink: Shrink | None = None,
) -> UnitBudget:
    """At most so many floating-point operations of one call.

    Args:
        limit: static. A float: the fraction that stays, in (0, 1]; an integer: the number.
        fn: the function that the dependencies are of.
        params: its params; arrays or `jax.ShapeDtypeStruct`s.
        *args: further arguments of one call; the same.
        shrink: static. None: `jc.shrink`.

    Returns:
        A budget for `jc.select(…, keep=…)`, measured by `jc.cost` on the smaller function.

    Raises:
        ValueError: `limit` is out of range.
        TypeError: `limit` is no static number, or `fn` can't be called.

    Cost: `select` shrinks and traces `fn` on shapes alone for each try, about 10 to 17 times.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params, x = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 2))}, jnp.ones((1, 8))
        >>> groups = jc.dependencies(apply, params, x)
        >>> half = jc.pruning.flop_budget(0.5, apply, params, x)
        >>> int(jc.select(groups, params, keep=half).masks["a[1]"].sum())
        8
    """
    _require_limit("flop_budget", limit)
    if not callable(fn):
        rule, fix = "be a function of the params", "Pass the function after the limit."
        raise TypeError(_check.message("flop_budget", "fn", rule, _check.describe(fn), fix))
    if shrink is None:
        from jaxcompress.pruning.structured._shrink import shrink
    shapes = jax.tree.map(_abstract, params)

    def measure(keep: Keep) -> int:
        if not kept_positions(keep):
            return cost(fn, shapes, *args).flops
        small, small_fn = shrink(fn, shapes, keep, *args)
        return cost(small_fn, small, *args).flops

    return UnitBudget(limit, measure)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x


def _counted(shapes: Mapping[str, Any], leaves: tree.Where) -> dict[str, Any]:
    # A dict by paths has those paths: patterns choose as they do in the params.
    chosen = tree.select(dict(shapes), leaves, function="select")
    return {path: leaf for path, leaf in shapes.items() if chosen[path]}


def _require_limit(function: str, limit: Any) -> None:
    if isinstance(limit, float):
        _check.number(function, "limit", limit, 0, 1, "An amount is an integer.")
        if limit == 0:
            raise ValueError(_check.message(function, "limit", "be above 0", 0.0))
    else:
        _check.integer(function, "limit", limit, 1)


def masks_of(ladders: Sequence[Ladder], scores: Mapping[str, np.ndarray], fraction: float):
    """The masks at a fraction of each ranking."""
    counts = {name: count for rank in ladders for name, count in rank.at(fraction).items()}
    return {name: best(scores[name], count) for name, count in counts.items()}


def within(
    budget: UnitBudget,
    dependencies: Dependencies,
    ladders: Sequence[Ladder],
    scores: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The masks at the largest fraction, one for all rankings, that the budget allows.

    Args:
        budget: the limit, and what is measured.
        dependencies: of the function.
        ladders: the rankings.
        scores: as `ladder` takes them.
    """

    def amount(fraction: float) -> float:
        found = budget.measure(Keep(dependencies, masks_of(ladders, scores, fraction)))
        _check.number("select", "keep", found)
        return float(found)

    limit = float(budget.limit)
    if isinstance(budget.limit, float):
        limit = budget.limit * float(budget.measure(Keep(dependencies, {})))
        # Products of fractions that are whole numbers are so up to rounding.
        limit += abs(limit) * 2.0**-40
    levels = np.unique(np.concatenate([[0.0], *[rank.levels for rank in ladders]]))
    low, high = 0, len(levels)
    least = amount(levels[0])
    if least > limit:
        rule = "be met by what `floor` and `multiple_of` leave"
        got = f"a limit of {math.floor(limit)}, and {least:g} at least"
        raise ValueError(_check.message("select", "keep", rule, got))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if amount(levels[middle]) <= limit else (low, middle)
    return masks_of(ladders, scores, levels[low])
