"""From units to places: which positions of which leaves stay."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.pruning.structured._base import Group, Keep, Member


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


def along(factor: Any, axis: int, ndim: int) -> Any:
    """`[*layers, positions]` as what a leaf of `ndim` axes can be multiplied by."""
    layers = factor.ndim - 1
    shape = [*factor.shape[:layers], *[1] * (ndim - layers)]
    shape[axis] = factor.shape[-1]
    return factor.reshape(shape)
