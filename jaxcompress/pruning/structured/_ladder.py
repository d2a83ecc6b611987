"""Exact counts: how many units each group of a ranking keeps, as one number grows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxcompress.pruning.structured._base import Group

# Of a size: what float32 can't tell from a whole number counts as one.
_SLACK = 2.0**-20


class Ladder(NamedTuple):
    """A ranking of several groups: the first steps are of the best units.

    Attributes:
        groups: the names of the groups.
        least: how many units each keeps in any case.
        owners: for each step the index of the group that grows.
        counts: for each step how many units that group has after it.
        sums: for each step how many all groups have after it.
        size: how many units fractions are of.
    """

    groups: tuple[str, ...]
    least: np.ndarray
    owners: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    size: int

    def at(self, fraction: float) -> dict[str, int]:
        """The counts at a fraction of `size`: as many steps as fit into it, rounded down."""
        target = whole(fraction, self.size)
        taken = int(np.searchsorted(self.sums, target, side="right"))
        counts = self.least.copy()
        np.maximum.at(counts, self.owners[:taken], self.counts[:taken])
        return dict(zip(self.groups, counts.tolist(), strict=True))

    @property
    def levels(self) -> np.ndarray:
        """The fractions at which a step more fits."""
        return self.sums / max(self.size, 1)


def whole(fraction: float, size: int) -> int:
    """The fraction of a size, rounded down; what rounding errors alone keep from a whole is one."""
    return int(np.floor(size * fraction + size * _SLACK))


def ladder(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    multiples: Mapping[str, int],
    floors: Mapping[str, float | int | None],
    sizes: Mapping[str, int],
) -> Ladder:
    """The steps of all groups by what the units are worth that a step adds.

    Units of the layers of a scan that have one rank count as one, with the mean of their
    scores. A step over several units is worth their mean.

    Args:
        groups: of one ranking.
        scores: by name `[*layers, size]`, float64 without NaN.
        multiples: by name of what the counts are multiples, unless all units stay.
        floors: by name the least count (an integer) or fraction of `sizes`, or None.
        sizes: by name how many units fractions are of.
    """
    least, owners, counts, widths, values = [], [], [], [], []
    for i, group in enumerate(groups):
        allowed = allowed_counts(
            group.size, multiples[group.name], floors[group.name], sizes[group.name]
        )
        with np.errstate(invalid="ignore"):
            ranks = by_rank(scores[group.name])
            values.append(_means(ranks, allowed))
        least.append(allowed[0])
        owners.append(np.full(len(allowed) - 1, i))
        counts.append(allowed[1:])
        widths.append(np.diff(allowed))
    # Stable: of equal ones the first group's, and its own in their order.
    order = np.argsort(-np.concatenate(values), kind="stable")
    sums = sum(least) + np.cumsum(np.concatenate(widths)[order])
    return Ladder(
        tuple(group.name for group in groups),
        np.asarray(least, np.int64),
        np.concatenate(owners)[order],
        np.concatenate(counts)[order],
        sums,
        sum(sizes[group.name] for group in groups),
    )


def allowed_counts(size: int, multiple: int, floor: float | int | None, of: int) -> np.ndarray:
    """The numbers of units that a group may keep, rising: multiples, and all.

    At least one, and the floor: the next multiple that is no less.
    """
    least = 1
    if isinstance(floor, float):
        # Up: the same number as a count is met, and rounding errors do not add one.
        least = max(least, int(np.ceil(floor * of - of * _SLACK)))
    elif floor is not None:
        least = max(least, int(floor))
    first = -(-least // multiple) * multiple
    return np.array([*range(first, size, multiple), size], np.int64)


def by_rank(scores: np.ndarray) -> np.ndarray:
    """The scores of each rank, falling, `[size]`: of layers, the mean."""
    falling = -np.sort(-scores, axis=-1)
    return _known(np.mean(falling.reshape(-1, scores.shape[-1]), axis=0))


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The mask of the `count` largest of each layer; of equal ones the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order[..., :count], True, axis=-1)
    return mask


def _means(ranks: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The mean score of what each step adds."""
    if len(allowed) == 1:
        return np.zeros(0)
    return _known(np.add.reduceat(ranks, allowed[:-1]) / np.diff(allowed))


def _known(x: np.ndarray) -> np.ndarray:
    """Infinities of both signs together are the lower one."""
    return np.where(np.isnan(x), -np.inf, x)
