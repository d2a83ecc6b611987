"""Which groups lose units, and which are ranked together."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from jaxcompress import _check, tree
from jaxcompress.pruning.structured._base import Dependencies, Group, Member

Pattern = str | re.Pattern | Callable[[Group], bool]
"""Chooses groups: the name of one, or a glob or regular expression that matches its name or the
path of one of its members, or a predicate."""

Scope = Literal["local", "global", "isomorphic"]
Overlap = Literal["blocks", "strides", "both"]
_T = TypeVar("_T")


def matches(pattern: Any, group: Group) -> bool:
    """Whether a pattern chooses a group."""
    if isinstance(pattern, (str, re.Pattern)):
        # A name holds the axis in brackets, which a glob takes for a set of characters.
        if pattern == group.name:
            return True
        regex = tree.glob(pattern) if isinstance(pattern, str) else pattern
        names = [group.name, *(member.path for member in group.members)]
        return any(regex.fullmatch(name) is not None for name in names)
    return bool(pattern(group))


def matching(
    function: str, argument: str, patterns: Any, groups: Iterable[Group]
) -> dict[str, bool]:
    """From the name of each group to whether one of the patterns chooses it."""
    if isinstance(patterns, (str, re.Pattern)) or callable(patterns):
        patterns = (patterns,)
    hits = {group.name: False for group in groups}
    for pattern in patterns:
        one = _hits(function, argument, pattern, groups)
        hits = {name: hit or one[name] for name, hit in hits.items()}
    return hits


def _hits(function: str, argument: str, pattern: Any, groups: Iterable[Group]) -> dict[str, bool]:
    if not isinstance(pattern, (str, re.Pattern)) and not callable(pattern):
        rule = "hold names of groups, path patterns or predicates"
        raise TypeError(_check.message(function, argument, rule, _check.describe(pattern)))
    hits = {group.name: matches(pattern, group) for group in groups}
    if not any(hits.values()):
        rule = "match the name or the path of a member of at least one group"
        names = list(hits)
        shown = "\n  ".join(names[:50])
        more = f"\n  … {len(names) - 50} more" if len(names) > 50 else ""
        fix = f"The groups there are:\n  {shown}{more}"
        got = f"{getattr(pattern, 'pattern', pattern)!r}, which matches none"
        raise ValueError(_check.message(function, argument, rule, got, fix))
    return hits


def by_group(
    function: str, argument: str, value: _T | Mapping[Any, _T], groups: Sequence[Group], default: _T
) -> dict[str, _T]:
    """One value for each group: of the first pattern that matches, or the default."""
    if not isinstance(value, Mapping):
        return {group.name: value for group in groups}
    found: dict[str, _T] = {}
    for pattern, one in value.items():
        for name, hit in _hits(function, argument, pattern, groups).items():
            if hit:
                found.setdefault(name, one)
    return {group.name: found.get(group.name, default) for group in groups}


def without_overlap(
    groups: Sequence[Group], overlap: Overlap, labels: Mapping[str, Any]
) -> list[Group]:
    """The groups that lose units, where several would cut the same positions.

    Along a merged axis of heads and features, the units of one group are runs of positions, those
    of the other are strides. The longest runs (or the shortest) go first, and no group that has
    a position of one before.

    Args:
        groups: those to choose from.
        overlap: as in `select`.
        labels: by name. Groups of different labels were asked for one by one: both stay.
    """
    if overlap == "both":
        return list(groups)
    runs = {group.name: _run(group) for group in groups}
    sign = -1 if overlap == "blocks" else 1
    chosen: list[Group] = []
    for group in sorted(groups, key=lambda group: sign * runs[group.name]):
        clash = any(labels[o.name] == labels[group.name] and _overlap(o, group) for o in chosen)
        if not clash:
            chosen.append(group)
    kept = {group.name for group in chosen}
    return [group for group in groups if group.name in kept]


def _run(group: Group) -> int:
    """The longest run of positions of one unit."""
    return max((_run_of(member) for member in group.members), default=1)


def _run_of(member: Member) -> int:
    units = member.units
    ends = np.flatnonzero(np.diff(units, append=-2, prepend=-2))
    return max((int(b - a) for a, b in itertools.pairwise(ends) if units[a] >= 0), default=1)


def _overlap(a: Group, b: Group) -> bool:
    of_b: dict[tuple[str, int], list[np.ndarray]] = {}
    for member in b.members:
        of_b.setdefault((member.path, member.axis), []).append(member.units >= 0)
    return any(
        bool(np.any((member.units >= 0) & owned))
        for member in a.members
        for owned in of_b.get((member.path, member.axis), ())
    )


def signature(dependencies: Dependencies, group: Group) -> tuple:
    """What two groups have in common whose structure is the same up to sizes.

    For each member: the last name of its path (without counters), how many axes its leaf has,
    which one, and whether a unit has one position or several.
    """
    members = []
    for member in group.members:
        last = member.path.rsplit("/", 1)[-1]
        several = int(np.sum(member.units >= 0)) > len(np.unique(member.units[member.units >= 0]))
        ndim = len(dependencies.shapes[member.path].shape)
        members.append(("" if last.isdigit() else last, ndim, member.axis, several))
    return (len(group.layers), *sorted(members))


def ranked_together(
    dependencies: Dependencies, groups: Sequence[Group], scope: Scope, labels: Mapping[str, Any]
) -> list[list[Group]]:
    """The groups of each ranking."""
    keys = {
        "local": lambda group: group.name,
        "global": lambda group: labels[group.name],
        "isomorphic": lambda group: (labels[group.name], signature(dependencies, group)),
    }[scope]
    found: dict[Any, list[Group]] = {}
    for group in groups:
        found.setdefault(keys(group), []).append(group)
    return list(found.values())
