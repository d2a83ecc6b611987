"""From units to places: which positions of which leaves stay."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.pruning.structured._base import Dependencies, Group, Keep, Member


def member_mask(group: Group, member: Member, mask: Any) -> Any:
    """Whether each position stays, `[*layers, positions]`, by a mask of the group's units.

    Args:
        group: of the member.
        member: of which the positions are.
        mask: numbers or bools `[*layers, size]`, NumPy's or traced. Positions of no unit get 1.
    """
    xp = np if isinstance(mask, np.ndarray) else jnp
    found = xp.take(mask, np.maximum(member.units, 0), axis=-1)
    return xp.where(member.units >= 0, found, xp.ones((), found.dtype))


def kept_positions(keep: Keep) -> dict[str, dict[int, np.ndarray]]:
    """By path and axis which positions stay, `bool [*layers, positions]`; where some leave."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for group in keep.dependencies.groups:
        mask = keep.masks.get(group.name)
        if mask is None or np.all(mask):
            continue
        for member in group.members:
            stays = member_mask(group, member, np.asarray(mask, bool))
            axes = found.setdefault(member.path, {})
            axes[member.axis] = axes[member.axis] & stays if member.axis in axes else stays
    return found


def leaf_factors(
    dependencies: Dependencies, masks: Mapping[str, Any]
) -> dict[str, list[tuple[int, Any]]]:
    """By path the factors of a leaf: `(axis, [*layers, positions])`, one for each member.

    Args:
        dependencies: of the function.
        masks: as `member_mask` takes them, by the name of the group; may be traced.
    """
    found: dict[str, list[tuple[int, Any]]] = {}
    for group in dependencies.groups:
        if group.name in masks:
            for member in group.members:
                factor = member_mask(group, member, masks[group.name])
                found.setdefault(member.path, []).append((member.axis, factor))
    return found


def along(factor: Any, axis: int, ndim: int) -> Any:
    """`[*layers, positions]` as what a leaf of `ndim` axes can be multiplied by."""
    layers = factor.ndim - 1
    shape = [*factor.shape[:layers], *[1] * (ndim - layers)]
    shape[axis] = factor.shape[-1]
    return factor.reshape(shape)


def units_of(group: Group, member: Member, values: jax.Array) -> jax.Array:
    """The sum over the positions of each unit, `[*layers, size]`.

    Args:
        group: of the member.
        member: of which the positions are.
        values: `[*layers, positions]`.
    """
    moved = jnp.moveaxis(values, -1, 0)
    # Positions of no unit go to a place of their own, which is cut off.
    where = np.where(member.units >= 0, member.units, group.size)
    sums = jax.ops.segment_sum(moved, where, num_segments=group.size + 1)
    return jnp.moveaxis(sums[: group.size], 0, -1)
