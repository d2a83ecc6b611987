"""Removing again: the dependencies of what is left, and two removals as one."""

import dataclasses

import numpy as np

from jaxcompress import _check
from jaxcompress.pruning.structured._base import Dependencies, Keep
from jaxcompress.pruning.structured._budget import kept_shapes
from jaxcompress.pruning.structured._places import kept_positions


def remaining(keep: Keep) -> Dependencies:
    """The dependencies of the smaller function: the same groups, by the units that stay.

    Args:
        keep: static. What stays, from `jc.select`; without `blocks`.

    Returns:
        `Dependencies` with the shapes of the small params. Nothing is traced.

    Raises:
        ValueError: layers of a scan that keep different units in an order of their own, so that
            no single order of units is that of all.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 1))}
        >>> groups = jc.dependencies(apply, params, jnp.ones((1, 2)))
        >>> jc.pruning.remaining(jc.select(groups, params, keep=0.5)).groups[0].size
        2
    """
    before, positions = keep.dependencies, kept_positions(keep)
    groups = []
    for group in before.groups:
        mask = np.asarray(keep.masks.get(group.name, np.ones(group.shape, bool)), bool)
        rows = mask.reshape(-1, group.size)
        # The place of each unit among those that stay, layer by layer.
        ranks = np.cumsum(rows, axis=-1) - 1
        members = []
        for member in group.members:
            stays = positions.get(member.path, {}).get(member.axis)
            if stays is None:
                stays = np.ones(len(member.units), bool)
            stays = np.broadcast_to(stays, (*group.layers, len(member.units)))
            found = [
                np.where(member.units[stay] >= 0, rank[member.units[stay]], -1)
                for rank, stay in zip(ranks, stays.reshape(len(ranks), -1), strict=True)
            ]
            if any(not np.array_equal(one, found[0]) for one in found):
                rule = "keep units in one order in all layers"
                got = f"other orders along axis {member.axis}"
                raise ValueError(_check.message("remaining", "keep", rule, got, path=member.path))
            members.append(member._replace(units=found[0].astype(np.int32)))
        size = int(rows[0].sum()) if len(rows) else group.size
        groups.append(group._replace(size=size, members=tuple(members)))
    return dataclasses.replace(before, groups=tuple(groups), shapes=kept_shapes(keep))


def composed(first: Keep, second: Keep) -> Keep:
    """What stays of the original after two removals.

    Args:
        first: static. Of the original.
        second: static. Of what is left, with dependencies as `remaining` gives them.

    Returns:
        One `Keep` with the dependencies of the first; its blocks are those of both.

    Raises:
        ValueError: a mask of the second has not as many units as the first leaves.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.array([[3.0, 0.1, 1.0, 2.0]]), "b": jnp.ones((4, 1))}
        >>> first = jc.select(jc.dependencies(apply, params, jnp.ones((1, 1))), params, keep=0.75)
        >>> left = jc.pruning.remaining(first)
        >>> second = jc.select(left, None, keep=0.7, scores={"a[1]": jnp.array([1.0, 3.0, 2.0])})
        >>> jc.pruning.composed(first, second).masks["a[1]"]
        array([False, False,  True,  True])
    """
    masks = dict(first.masks)
    for group in first.dependencies.groups:
        name = group.name
        if name not in second.masks:
            continue
        mask = np.array(first.masks.get(name, np.ones(group.shape, bool)), bool)
        inner = np.asarray(second.masks[name], bool)
        if inner.size != mask.sum():
            rule = f"have {int(mask.sum())} units, as the first leaves"
            got = _check.describe(inner)
            raise ValueError(_check.message("composed", "second", rule, got, path=name))
        mask[mask] = inner.reshape(inner.size)
        masks[name] = mask
    return Keep(first.dependencies, masks, (*first.blocks, *second.blocks))
