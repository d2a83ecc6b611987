"""From the positions of arguments that stay to those of every value."""

from collections.abc import Sequence

import numpy as np

from jaxcompress import _check
from jaxcompress.tracing.positions._atoms import Label
from jaxcompress.tracing.positions._reading import Reading
from jaxcompress.tracing.positions._taken import Masks
from jaxcompress.tracing.positions._units import Kind, kinds
from jaxcompress.tracing.positions._values import Value

Given = tuple[np.ndarray | None, ...]
"""For each axis which positions stay, `bool [*layers, positions]`; None: all."""


class Kept:
    """Which atoms stay, and by them which positions of any label."""

    def __init__(self, reading: Reading, atoms: np.ndarray) -> None:
        self._reading = reading
        self._atoms = atoms
        self._found: dict[int, tuple[Label, np.ndarray | None]] = {}

    def of(self, value: Value) -> Masks:
        """For each axis of a value which positions stay; None: all."""
        return tuple(self._mask(label) for label in value.labels)

    def _mask(self, label: Label) -> np.ndarray | None:
        # The label is held on to, so that no other one gets its number.
        if id(label) not in self._found:
            mask = np.asarray(self._atoms[self._reading.atoms.resolve(label)].all(1))
            self._found[id(label)] = (label, None if mask.all() else mask)
        return self._found[id(label)][1]


def kept(
    reading: Reading, values: Sequence[Value], given: Sequence[Given], names: Sequence[str]
) -> Kept:
    """Finds which atoms stay.

    Where layers of a scan lose units of their own, the first ones stay in here, as many: the
    program runs alike in all layers.

    Args:
        reading: of the program.
        values: of which it is known what stays.
        given: for each of these.
        names: the same, for errors.
    """
    atoms = np.ones(reading.atoms.count, bool)
    expected: dict[tuple[int, int], np.ndarray] = {}
    for kind in kinds(reading, values):
        mask = _of_units(kind, given)
        if mask.all():
            continue
        first = kind.places[0]
        count = np.unique(mask.sum(-1))
        if len(count) > 1:
            got = f"{count.min()} to {count.max()} of {mask.shape[-1]} units"
            rule = "keep as many in each layer"
            raise _refused(rule, got, names[first.argument], first.axis)
        if kind.layers == 0 and len(np.unique(mask.reshape(-1, mask.shape[-1]), axis=0)) > 1:
            rule, got = "keep the same units in all layers here", "others in some"
            raise _refused(rule, got, names[first.argument], first.axis)
        atoms[kind.atoms] = mask if mask.ndim == 1 else np.arange(mask.shape[-1]) < int(count[0])
        for place in kind.places:
            stays = np.where(place.units >= 0, mask[..., place.units], True)
            at = (place.argument, place.axis)
            expected[at] = expected[at] & stays if at in expected else stays
    for i, (axes, name) in enumerate(zip(given, names, strict=True)):
        for d, mask in enumerate(axes):
            if mask is not None and not np.all(mask == expected.get((i, d), True)):
                rule = "remove all of what leaves together, and nothing else"
                got = f"{np.count_nonzero(~mask)} positions to remove"
                raise _refused(rule, got, name, d)
    return Kept(reading, atoms)


def _of_units(kind: Kind, given: Sequence[Given]) -> np.ndarray:
    """Which units have a position that stays, `[*layers, units]`."""
    size = len(kind.atoms)
    found = np.zeros(size, bool)
    for place in kind.places:
        mask = given[place.argument][place.axis]
        if mask is None:
            mask = np.ones(len(place.units), bool)
        present = np.flatnonzero(place.units >= 0)
        flat = np.reshape(mask, (-1, mask.shape[-1]))
        here = np.zeros((len(flat), size), bool)
        for row, stays in zip(here, flat, strict=True):
            row[place.units[present[stays[present]]]] = True
        found = found | here.reshape(*mask.shape[:-1], size)
    return found


def _refused(rule: str, got: str, name: str, axis: int) -> ValueError:
    fix = "Use masks of jc.select for the same function."
    return ValueError(
        _check.message("shrink", "keep", rule, f"{got} of axis {axis}", fix, path=name)
    )
