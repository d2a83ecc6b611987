"""From what was projected to what is removed."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.projections import Relaxed, Timed
from jaxcompress.pruning.structured._base import Dependencies, Group, Keep
from jaxcompress.pruning.structured._leaves import member_leaves, present, require_dependencies
from jaxcompress.pruning.structured._unit_mask import UnitMask


def kept_units(dependencies: Dependencies, source: PyTree) -> Keep:
    """What `jc.shrink` has to keep of params whose units were zeroed in training.

    Args:
        dependencies: from `jc.dependencies`, those that the projection was made of.
        source: either what holds the masks of `jc.pruning.prune_groups`: its structure, as
            `jc.structure(opt_state)` gives it, or the whole state of an optimizer; or params, of
            which a unit leaves when all its places are zero, as group lasso makes them. Leaves
            that are not there have no say, nor have running statistics; NaN is not zero.

    Returns:
        The `Keep` for `jc.shrink(fn, params, keep, x)`. One unit of each group stays at least,
        and in each layer of a scan as many as in the one that keeps most: there zeroed units,
        the first ones, are kept.

    Raises:
        TypeError: called under `jit`, `vmap` or `grad`: what stays is static.
        ValueError: masks of other dependencies, or of a batch; a structure that `jc.relaxed`
            has not brought to strength 1; params without a leaf of the dependencies.

    Cost: one pass over the params on the host; of masks next to nothing.

    Examples:
        >>> params = {"a": jnp.array([[0.0, 3.0]]), "b": jnp.array([[0.0], [2.0]])}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> groups = jc.dependencies(fn, params, jnp.ones((1, 1)))
        >>> jc.pruning.kept_units(groups, params).masks
        {'a[1]': array([False,  True])}
    """
    require_dependencies("kept_units", dependencies)
    if any(_check.is_traced(x) for x in jax.tree.leaves(source)):
        rule, fix = "be concrete, since what stays is static", "Call it outside of jit and vmap."
        raise TypeError(_check.message("kept_units", "source", rule, "a traced array", fix))
    structures, held = _masks_of(source)
    if structures:
        found = {g.name: _by_masks(g, held) for g in dependencies.groups}
        live = {name: x for name, x in found.items() if x is not None}
    else:
        leaves = member_leaves("kept_units", dependencies, source)
        live = {g.name: _by_places(g, leaves) for g in present(dependencies.groups, leaves)}
    return Keep(dependencies, {name: _as_many_each(x) for name, x in live.items()})


def _masks_of(source: PyTree) -> tuple[bool, dict[str, list[UnitMask]]]:
    """Whether there are structures, and the masks in force among them by the path of the leaf."""
    is_node = lambda x: isinstance(x, (UnitMask, Timed, Relaxed))  # noqa: E731
    found: dict[str, list[UnitMask]] = {}
    any_there = False
    for path, node in jax.tree_util.tree_flatten_with_path(source, is_leaf=is_node)[0]:
        if isinstance(node, UnitMask):
            found.setdefault(path[-1].key, []).append(node)
            any_there = True
        elif is_node(node):
            there, inner = _masks_of(node.inner)
            any_there = any_there or there
            if there and isinstance(node, Relaxed) and np.min(np.asarray(node.strength)) < 1:
                rule, got = "be hard: at strength 1", f"a jc.relaxed one at {node.strength}"
                fix = "Train on until its schedule ends."
                raise ValueError(_check.message("kept_units", "source", rule, got, fix))
            in_force = not isinstance(node, Timed) or bool(np.all(node.active))
            for name, masks in inner.items() if in_force else ():
                found.setdefault(name, []).extend(masks)
    return any_there, found


def _by_masks(group: Group, held: Mapping[str, list[UnitMask]]) -> np.ndarray | None:
    """Units that stay in a leaf: of its own masks all have to keep it. None without masks."""
    live, seen = np.zeros(group.shape, bool), False
    for member in group.members:
        stays = None
        for mask in held.get(member.path, []):
            for name, axis, factor in zip(mask.groups, mask.axes, mask.stays, strict=True):
                if (name, axis) != (group.name, member.axis):
                    continue
                factor = np.asarray(factor)
                if factor.shape != (*group.layers, len(member.units)):
                    rule = f"hold masks of shape {[*group.layers, len(member.units)]}"
                    fix = "Take one example of a batch, with the dependencies of its params."
                    got = _check.describe(factor)
                    raise ValueError(
                        _check.message("kept_units", "source", rule, got, fix, path=member.path)
                    )
                stays = factor if stays is None else stays & factor
        if stays is not None:
            live, seen = live | _any_of_units(group, member.units, stays), True
    return live if seen else None


def _by_places(group: Group, leaves: Mapping[str, Any]) -> np.ndarray:
    """Units with a place that is not zero."""
    live = np.zeros(group.shape, bool)
    for member in group.members:
        w = np.asarray(leaves[member.path])
        others = tuple(i for i in range(len(group.layers), w.ndim) if i != member.axis)
        live |= _any_of_units(group, member.units, np.any(w != 0, axis=others))
    return live


def _any_of_units(group: Group, units: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`[*layers, size]`, whether any position of a unit is true; positions `[*layers, …]`."""
    live = np.zeros(group.shape, bool)
    owned = np.flatnonzero(units >= 0)
    for layer in np.ndindex(group.layers):
        live[layer] = np.bincount(units[owned], positions[layer][owned], group.size) > 0
    return live


def _as_many_each(live: np.ndarray) -> np.ndarray:
    """With the first of the others where a layer has fewer than most, or none."""
    if not live.size:
        return live
    count = max(int(live.sum(-1).max()), 1)
    order = np.argsort(~live, axis=-1, kind="stable")
    out = np.zeros_like(live)
    np.put_along_axis(out, order[..., :count], True, axis=-1)
    return out
