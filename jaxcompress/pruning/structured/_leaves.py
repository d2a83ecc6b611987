"""The leaves of params that groups have members in, and the norms of their units."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning._groups import l2
from jaxcompress.pruning.structured._base import Dependencies, Group
from jaxcompress.pruning.structured._unit_scores import is_trained, reduced

Leaves = Mapping[str, jax.Array]
"""From paths to leaves that lose positions with the units of groups."""


def member_leaves(
    function: str, dependencies: Any, params: PyTree, where: tree.Where | None = is_trained
) -> dict[str, jax.Array]:
    """The floating-point leaves of `params` that groups have members in, by path.

    Leaves that are not there are left out: an optimizer is often given a part of what a
    function takes.

    Args:
        function: named in errors.
        dependencies: of the function.
        params: any pytree.
        where: which leaves count; None: all.

    Raises:
        TypeError: a leaf is packed.
        ValueError: no leaf is there; one has another shape.
    """
    require_dependencies(function, dependencies)
    wanted, found = member_paths(dependencies.groups), {}
    if where is None:
        chosen = tree.map_with_path(lambda _, w: True, params)
    else:
        chosen = tree.select(params, where, function=function)
    hits = jax.tree.leaves(chosen)
    for (path, w), hit in zip(tree.leaves_with_paths(params), hits, strict=True):
        if not hit or path not in wanted:
            continue
        if tree.is_array_like(w):
            rule, fix = "be dense", "Call jc.todense first; pack afterwards."
            got = type(w).__name__
            raise TypeError(_check.message(function, "params", rule, got, fix, path=path))
        if not is_floating(w):
            continue
        shape = tuple(dependencies.shapes[path].shape)
        if w.shape != shape:
            rule, fix = f"have the shape {list(shape)}", "Call jc.dependencies on these params."
            got = _check.describe(w)
            raise ValueError(_check.message(function, "params", rule, got, fix, path=path))
        found[path] = w
    if not found:
        rule = "hold a leaf that loses units"
        fix = f"Those of the dependencies are {sorted(wanted)[:20]}."
        got = [path for path, _ in tree.leaves_with_paths(params)][:20]
        raise ValueError(_check.message(function, "params", rule, got, fix))
    return found


def require_dependencies(function: str, dependencies: Any) -> None:
    """Refuses what `jc.dependencies` does not give."""
    if not isinstance(dependencies, Dependencies):
        rule, fix = "be Dependencies", "Call jc.dependencies(fn, params, x)."
        got = _check.describe(dependencies)
        raise TypeError(_check.message(function, "dependencies", rule, got, fix))


def is_floating(w: Any) -> bool:
    """Whether it is an array of real floating-point numbers."""
    return hasattr(w, "dtype") and bool(jnp.issubdtype(w.dtype, jnp.floating))


def member_paths(groups: Iterable[Group]) -> set[str]:
    """The paths of all leaves that lose positions."""
    return {member.path for group in groups for member in group.members}


def present(groups: Iterable[Group], leaves: Leaves) -> list[Group]:
    """The groups with the members that are there; without those that have none."""
    found = []
    for group in groups:
        members = tuple(m for m in group.members if m.path in leaves)
        if members:
            found.append(group._replace(members=members))
    return found


def sizes_of(group: Group, leaves: Leaves) -> np.ndarray:
    """How many entries of the leaves each unit has, int64 `[size]`."""
    sizes = np.zeros(group.size, np.int64)
    for member in group.members:
        shape = leaves[member.path].shape
        others = [n for i, n in enumerate(shape) if i >= len(group.layers) and i != member.axis]
        owned = member.units[member.units >= 0]
        sizes += np.bincount(owned, minlength=group.size) * int(np.prod(others, dtype=np.int64))
    return sizes


def norms_of(group: Group, leaves: Leaves) -> jax.Array:
    """The 2-norm of each unit, `[*layers, size]`: no overflow, and at zero the gradient zero."""
    return reduced(group, group.members, [leaves[m.path] for m in group.members], l2)
