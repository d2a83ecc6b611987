"""Sizes of axes that have to agree: which of them are equal, which are products or sums."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxcompress import _check

Axes = tuple[int, ...]
"""The numbers of the axes of a value, as `Sizes` counts them."""


class _Relation(NamedTuple):
    """The size of `whole` is `factor` times the product of the parts, or is their sum."""

    whole: int
    parts: Axes
    factor: int
    total: bool
    why: str

    def of(self, sizes: Sequence[int]) -> int:
        return sum(sizes) if self.total else self.factor * math.prod(sizes)

    def rest(self, whole: int, sizes: Sequence[int]) -> int | None:
        """The size of the one part that is not among `sizes`; None where there is none."""
        if self.total:
            return whole - sum(sizes)
        others = self.factor * math.prod(sizes)
        return None if others == 0 or whole % others else whole // others


class Sizes:
    """Axes of values, in sets of equal size, by union; filled while a program is read.

    Each axis has a size in the program as it was traced, and a new one: given, or following
    from others, else the old one.
    """

    def __init__(self) -> None:
        self._old: list[int] = []
        self._above: dict[int, int] = {}
        # Of the first axis of a set: its new size, and what says so.
        self._new: dict[int, tuple[int, str]] = {}
        self._relations: list[_Relation] = []

    def axes(self, shape: Sequence[int]) -> Axes:
        """Fresh ones."""
        first = len(self._old)
        self._old += shape
        return tuple(range(first, len(self._old)))

    def old(self, axis: int) -> int:
        """As traced."""
        return self._old[axis]

    def new(self, axis: int) -> int:
        """The size to run with."""
        root = self._root(axis)
        return self._new[root][0] if root in self._new else self._old[root]

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """The new shape of a value."""
        return tuple(map(self.new, axes))

    def changed(self, axes: Axes) -> bool:
        """Whether the new shape is another one."""
        return any(self.new(axis) != self._old[axis] for axis in axes)

    def give(self, axis: int, size: int, source: str) -> None:
        """Says the new size of an axis, and where it is from."""
        root = self._root(axis)
        have, first = self._new.setdefault(root, (size, source))
        if have != size:
            raise _mismatch(f"{have} for {first} and {size} for {source}")

    def keep(self, axes: Sequence[int], why: str) -> None:
        """These can have their old sizes only."""
        for axis in axes:
            self.give(axis, self._old[axis], why)

    def unite(self, a: Sequence[int], b: Sequence[int], why: str) -> None:
        """The axes of both have equal sizes, one by one."""
        for i, j in zip(a, b, strict=True):
            i, j = self._root(i), self._root(j)
            if i == j:
                continue
            given = self._new.pop(j, None)
            have = self._new.setdefault(i, given) if given is not None else None
            if given is not None and have is not None and have[0] != given[0]:
                sizes = f"{have[0]} for {have[1]} and {given[0]} for {given[1]}"
                raise _mismatch(f"{sizes}, which meet in {why}")
            self._above[j] = i

    def product(self, whole: int, parts: Sequence[int], why: str, factor: int = 1) -> None:
        """The size of one axis is the product of others, times a number."""
        self._relations.append(_Relation(whole, tuple(parts), factor, False, why))

    def total(self, whole: int, parts: Sequence[int], why: str) -> None:
        """The size of one axis is the sum of others."""
        self._relations.append(_Relation(whole, tuple(parts), 1, True, why))

    def solve(self) -> None:
        """Finds the sizes that follow from products and sums."""
        left = list(self._relations)
        while left:
            later = [relation for relation in left if not self._follows(relation)]
            if len(later) == len(left):
                self._assume(later[0])
            left = later

    def _follows(self, relation: _Relation) -> bool:
        whole = self._known(relation.whole)
        sizes = [self._known(part) for part in relation.parts]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes):
            self.give(relation.whole, relation.of(known), relation.why)
            return True
        if whole is None or len(known) < len(sizes) - 1:
            return False
        rest = relation.rest(whole, known)
        if rest is None or rest < 0:
            raise _mismatch(f"{whole}, which is no multiple of {known} in {relation.why}")
        self.give(relation.parts[sizes.index(None)], rest, relation.why)
        return True

    def _assume(self, relation: _Relation) -> None:
        """Nothing says what the parts are: as traced, where that fits."""
        whole = self._known(relation.whole)
        sizes = [self.new(part) for part in relation.parts]
        if whole is not None and relation.of(sizes) != whole:
            parts = [self._old[part] for part in relation.parts]
            raise _mismatch(f"{whole} for an axis that {relation.why} splits into {parts}", _SPLIT)
        self.keep([part for part in relation.parts if self._known(part) is None], relation.why)

    def _known(self, axis: int) -> int | None:
        root = self._root(axis)
        return self._new[root][0] if root in self._new else None

    def _root(self, axis: int) -> int:
        while axis in self._above:
            axis = self._above[axis]
        return axis


_SPLIT = "Which of these axes changes can't be told; change one that is an axis of a parameter."


def _mismatch(got: str, fix: str = "Change all axes that meet, and no others.") -> ValueError:
    rule = "have new sizes that fit together"
    return ValueError(_check.message("resized", "params", rule, got, fix))
