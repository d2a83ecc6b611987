"""What comes out of reading a program for its positions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.tracing._jaxprs import Location
from jaxcompress.tracing.positions._atoms import Atoms, Label
from jaxcompress.tracing.positions._labels import unify
from jaxcompress.tracing.positions._values import Labels, Value

OUTSIDE: Location = ()
"""The program itself, in which all scans stand."""


class Places(NamedTuple):
    """The values of an equation.

    Attributes:
        given: the operands.
        ins: the same, as the equation uses them: a constant has labels of its own in each use.
        outs: the results.
        computes: whether it uses all of its operands; not where it takes parts of them.
    """

    given: tuple[Value, ...]
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    computes: bool = True


class Reading:
    """Filled while a program is read.

    Attributes:
        rules: of the user, an `AxisRule` by the name of an operation.
        atoms: of all labels.
        plan: the values of each equation, by its location.
        notes: labels whose leaving is not what zeros give, with the reason.
        consts: the values of the arrays that the program closes over.
        stacks: for each argument that is used the scans that cut it, one tuple for each way.
    """

    def __init__(self, rules: Mapping[str, Any] | None = None) -> None:
        self.rules = dict(rules or {})
        self.atoms = Atoms()
        self.plan: dict[Location, Places] = {}
        self.notes: list[tuple[Label, str]] = []
        self.consts: list[Value] = []
        self.stacks: dict[int, set[tuple[Location, ...]]] = {}
        self._touched: dict[Location, dict[int, Label]] = {OUTSIDE: {}}
        self._parts: list[tuple[Label, Label]] = []

    def unify(self, a: Label, b: Label, why: str) -> None:
        """The positions of both leave together."""
        unify(self.atoms, a, b, why)

    def freeze(self, labels: Sequence[Label], why: str) -> None:
        """The positions of all of these stay."""
        for label in labels:
            if label.shape[1]:
                self.atoms.freeze(label, why)

    def touch(self, scope: Location, labels: Labels) -> None:
        """An equation in the scan at `scope` has values with these labels."""
        seen = self._touched.setdefault(scope, {})
        for label in labels:
            if label.shape[1]:
                seen[id(label)] = label

    def cut(self, label: Label, part: Label) -> None:
        """A part of an axis is taken by place: layers may differ only if all have as much there."""
        if len(self._touched) > 1:
            self._parts.append((label, part))

    def uses(self, atoms: np.ndarray) -> bool:
        """Whether an equation does something with positions of these, beside leaving them out."""
        wanted = np.zeros(self.atoms.count, bool)
        wanted[atoms] = True
        return any(
            wanted[self.atoms.resolve(label)].any()
            for places in self.plan.values()
            for value in (*(places.ins if places.computes else ()), *places.outs)
            for label in value.labels
            if label.shape[1]
        )

    def homes(self) -> dict[Location, np.ndarray]:
        """For each scan which atoms are met in there, and nowhere outside of it."""
        if len(self._touched) == 1:
            return {}
        for label, part in self._parts:
            everything, here = (np.unique(self.atoms.resolve(x)) for x in (label, part))
            if len(everything) != len(here):
                self.touch(OUTSIDE, (label,))
        met = {}
        for scope, labels in self._touched.items():
            met[scope] = np.zeros(self.atoms.count, bool)
            for label in labels.values():
                met[scope][self.atoms.resolve(label)] = True
        found = {}
        for scope in self._touched:
            if scope == OUTSIDE:
                continue
            elsewhere = [met[s] for s in met if s[: len(scope)] != scope]
            found[scope] = ~np.any(elsewhere, axis=0) & np.any(
                [met[s] for s in met if s[: len(scope)] == scope], axis=0
            )
        return found
