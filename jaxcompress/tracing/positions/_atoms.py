"""Atoms: what stays or leaves as one, and what stays only where several others do.

Every position of every axis of a program has a *label*: a row of atoms, all of which have to
stay for the position to stay. Merging axes of heads and of features gives rows of two atoms.
A label of an axis is an `int64` array `[positions, atoms]`, filled up with `ALWAYS`.
"""

import numpy as np

ALWAYS = 0
"""The atom that can't leave."""
Label = np.ndarray
_ALONE = "nothing of it can leave"


class Atoms:
    """Atoms in sets by union; some are defined as several others together.

    It is filled while a program is read. Whatever is done to it is a sound consequence of an
    equation between rows of atoms, though it may tie more together than needed.
    """

    def __init__(self) -> None:
        self._count = 1
        self._above = np.zeros(1024, np.int64)
        self._parts = np.zeros((1024, 1), np.int64)
        self._defined = np.zeros(1024, bool)
        self._frozen = np.zeros(1024, bool)
        self._frozen[ALWAYS] = True
        self._reasons: dict[int, str] = {}

    def fresh(self, size: int) -> Label:
        """An axis whose positions are free of each other."""
        start, self._count = self._count, self._count + size
        while self._count > len(self._above):
            self._above = np.concatenate([self._above, np.zeros_like(self._above)])
            self._parts = np.concatenate([self._parts, np.zeros_like(self._parts)])
            self._defined = np.concatenate([self._defined, np.zeros_like(self._defined)])
            self._frozen = np.concatenate([self._frozen, np.zeros_like(self._frozen)])
        ids = np.arange(start, self._count)
        self._above[ids] = ids
        return ids[:, None]

    @property
    def count(self) -> int:
        """One more than the largest atom."""
        return self._count

    def roots(self, ids: np.ndarray) -> np.ndarray:
        """The first atom of the set of each."""
        found = self._above[ids]
        while True:
            further = self._above[found]
            if np.array_equal(further, found):
                break
            found = further
        self._above[ids] = found
        return found

    def resolve(self, label: Label) -> Label:
        """The same rows in atoms that are neither defined by others nor frozen, each once."""
        rows = self.roots(label)
        while self._defined[rows].any():
            # What is not defined stands for itself, in the first of its parts.
            parts = self._parts[rows]
            parts[..., 0] = np.where(self._defined[rows], parts[..., 0], rows)
            rows = self.roots(parts.reshape(len(rows), -1))
        rows = np.where(self._frozen[rows], ALWAYS, rows)
        if rows.shape[1] > 1:
            rows = _distinct(rows)
        return rows[:, rows.any(0)]

    def freeze(self, label: Label, why: str) -> None:
        """These positions stay."""
        for atom in np.unique(self.resolve(label)).tolist():
            if atom != ALWAYS:
                self._frozen[atom] = True
                self._reasons[atom] = why

    def reasons(self, label: Label) -> list[str]:
        """Why positions stay: one reason for each that can't leave."""
        stays = ~self.resolve(label).any(1)
        roots = self.roots(label[stays])
        plain = ~self._defined[roots].any(1)
        found = [_ALONE] * int(plain.sum()) if label.shape[1] == 0 else []
        if label.shape[1]:
            found += [self._reasons.get(atom, _ALONE) for atom in roots[plain, 0].tolist()]
        return found + [self._reason(row) for row in roots[~plain]]

    def _reason(self, row: np.ndarray) -> str:
        """Of atoms some of which are defined by others: that of the first one there is."""
        waiting = row[::-1].tolist()
        while waiting:
            atom = int(self.roots(np.array([waiting.pop()]))[0])
            if self._defined[atom]:
                waiting += self._parts[atom][::-1].tolist()
            elif atom in self._reasons:
                return self._reasons[atom]
        return _ALONE

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Atoms of two equal rows of numbers are the same, one by one. None is defined."""
        while True:
            a, b = self.roots(a), self.roots(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            for atom in np.unique(high[self._frozen[high]]).tolist():
                self._pass_on(atom, low[high == atom])
            # Of several that one should be united with the last one wins; the others follow.
            self._above[high] = low

    def _pass_on(self, frozen: int, atoms: np.ndarray) -> None:
        for atom in atoms.tolist():
            self._frozen[atom] = True
            if atom != ALWAYS:
                self._reasons.setdefault(atom, self._reasons.get(frozen, _ALONE))

    def define(self, atoms: np.ndarray, parts: Label) -> None:
        """Atoms, distinct roots, stay where all their parts do. They are none of the parts."""
        width = parts.shape[1]
        if width > self._parts.shape[1]:
            wider = np.zeros((len(self._parts), width), np.int64)
            wider[:, : self._parts.shape[1]] = self._parts
            self._parts = wider
        self._parts[atoms] = ALWAYS
        self._parts[atoms, :width] = parts
        self._defined[atoms] = True


def _distinct(rows: Label) -> Label:
    """Rows in which what stands twice stands once, in its first place."""
    rows = rows.copy()
    for later in range(1, rows.shape[1]):
        again = (rows[:, :later] == rows[:, later : later + 1]).any(1)
        rows[again, later] = ALWAYS
    return rows
