"""From units to places: which positions of which leaves stay."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
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
    """By path and axis which positions stay, `bool [*layers, positions]`; where some leave.

    Raises:
        TypeError: `keep` is something else, or a mask is not of bools.
        ValueError: a mask has no group or another shape, keeps nothing, or keeps other numbers of
            units in the layers of a scan.
    """
    _require(keep)
    found: dict[str, dict[int, np.ndarray]] = {}
    for group in keep.dependencies.groups:
        mask = keep.masks.get(group.name)
        if mask is None or np.all(mask):
            continue
        for member in group.members:
            stays = member_mask(group, member, np.asarray(mask))
            axes = found.setdefault(member.path, {})
            axes[member.axis] = axes[member.axis] & stays if member.axis in axes else stays
    return found


def _require(keep: Any) -> None:
    if not isinstance(keep, Keep):
        rule, got = "be what stays, from jc.select", _check.describe(keep)
        raise TypeError(_check.message("shrink", "keep", rule, got))
    if not isinstance(keep.dependencies, Dependencies):
        rule, got = "hold dependencies, of jc.dependencies", _check.describe(keep.dependencies)
        raise TypeError(_check.message("shrink", "keep", rule, got))
    groups = {group.name: group for group in keep.dependencies.groups}
    for name, mask in keep.masks.items():
        if name not in groups:
            rule, fix = (
                "hold masks of groups of the dependencies",
                f"There are {list(groups)[:20]}.",
            )
            raise ValueError(_check.message("shrink", "keep", rule, f"one of {name!r}", fix))
        shape, got = groups[name].shape, _check.describe(mask)
        if getattr(getattr(mask, "dtype", None), "name", "") != "bool":
            raise TypeError(_check.message("shrink", "keep", "hold bools", got, path=name))
        if mask.shape != shape:
            rule = f"hold masks of the shape {list(shape)} of their group"
            raise ValueError(_check.message("shrink", "keep", rule, got, path=name))
        counts = np.unique(np.sum(_of_layers_left(mask, groups[name], keep), -1))
        if 0 in counts or len(counts) > 1:
            rule = "keep a unit of each group at least, and as many in each layer"
            got = f"{counts.tolist()} units"
            raise ValueError(_check.message("shrink", "keep", rule, got, path=name))


def _of_layers_left(mask: np.ndarray, group: Group, keep: Keep) -> np.ndarray:
    """The mask of the layers that are not left out: those of others don't matter."""
    paths = {member.path for member in group.members}
    for gone in keep.blocks:
        if gone.stays and group.layers and not paths.isdisjoint(gone.block.leaves):
            mask = mask[np.asarray(gone.stays)]
    return mask


def along(factor: Any, axis: int, ndim: int) -> Any:
    """`[*layers, positions]` as what a leaf of `ndim` axes can be multiplied by."""
    layers = factor.ndim - 1
    shape = [*factor.shape[:layers], *[1] * (ndim - layers)]
    shape[axis] = factor.shape[-1]
    return factor.reshape(shape)
