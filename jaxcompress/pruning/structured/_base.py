"""Dependency groups: what has to leave together; and the choice of what stays."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from jaxcompress import _check
from jaxcompress.tracing.positions import AxisRule

if TYPE_CHECKING:
    from jaxcompress.pruning.structured._blocks import Dropped


class Member(NamedTuple):
    """The places of a leaf that the units of a group are made of.

    Attributes:
        path: of the leaf.
        axis: of the leaf, counted from the front, axes of layers included.
        units: int32, for each position along the axis the unit that it leaves with; -1: it
            stays whatever happens to this group. A unit may have several positions (a head, a
            channel in a flattened image), and a position may belong to units of several groups
            (a head and a feature of all heads): it stays where all of them stay.
    """

    path: str
    axis: int
    units: np.ndarray


class Group(NamedTuple):
    """Units of one kind, each of which can be removed on its own: channels, neurons, heads, …

    Attributes:
        name: the leaf and axis that write the units, as `conv1/kernel[3]`; unique.
        size: how many units.
        members: all places that leave with a unit, of all leaves, in the order of the leaves.
        layers: sizes of the leading axes, of every leaf among the members, whose indices have
            units of their own: the layers of a scan. They may lose different units, but as many
            each. Empty for all others.
        inexact: None where removal gives what zeros in all places of a unit give; else why not.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    layers: tuple[int, ...] = ()
    inexact: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of scores and masks of the group: `[*layers, size]`."""
        return (*self.layers, self.size)


class Frozen(NamedTuple):
    """Positions of an axis of a leaf that can't be removed.

    Attributes:
        path: of the leaf.
        axis: of the leaf.
        count: how many positions of the axis stay.
        reason: the operation, and where it is.
    """

    path: str
    axis: int
    count: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Dependencies:
    """What can be removed from a function, and what can't.

    Attributes:
        groups: those with units to remove, the first written first.
        frozen: axes of leaves of which some positions stay, with the reasons.
        shapes: of the leaves of the params, by path.
        rules: of the user, by which the function was read.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    rules: Mapping[str, AxisRule] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Group:
        """The group of this name."""
        named = {group.name: group for group in self.groups}
        if name not in named:
            rule, fix = "be the name of a group", f"There are {list(named)[:20]}."
            raise KeyError(_check.message("dependencies", "name", rule, repr(name), fix))
        return named[name]

    def __str__(self) -> str:
        from jaxcompress.pruning.structured._table import dependencies_text

        return dependencies_text(self)


@dataclasses.dataclass(frozen=True)
class Keep:
    """What stays: static, from `jc.select`.

    Attributes:
        dependencies: of the function.
        masks: from the names of groups to `bool` arrays of their shape, true where a unit
            stays; in each layer as many. Groups that are not named stay whole.
        blocks: the residual blocks to leave out, with the layers of a scan that stay; of
            `jc.pruning.select_blocks`.
    """

    dependencies: Dependencies
    masks: Mapping[str, np.ndarray]
    blocks: tuple["Dropped", ...] = ()
