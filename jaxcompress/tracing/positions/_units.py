"""Units: atoms of one kind, which touch the same axes of the same arguments."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcompress.tracing._jaxprs import Location
from jaxcompress.tracing.positions._atoms import ALWAYS, Label
from jaxcompress.tracing.positions._reading import Reading
from jaxcompress.tracing.positions._values import Value


class Place(NamedTuple):
    """Positions of an axis of an argument, and the units that they leave with.

    Attributes:
        argument: its index.
        axis: of it.
        units: for each position a unit, or -1.
    """

    argument: int
    axis: int
    units: np.ndarray


class Kind(NamedTuple):
    """Units of one kind.

    Attributes:
        atoms: one for each unit.
        places: of arguments, in the order of these.
        layers: how many leading axes of the arguments are layers of scans whose units are apart.
        note: why removal is not what zeros give; None where it is.
    """

    atoms: np.ndarray
    places: list[Place]
    layers: int
    note: str | None


Axes = list[tuple[int, int, Label]]
"""Arguments, their axes, and the resolved labels of these."""


def kinds(reading: Reading, arguments: Sequence[Value]) -> list[Kind]:
    """What can leave of the arguments; the order is that of the first places."""
    axes: Axes = [
        (i, d, reading.atoms.resolve(label))
        for i, value in enumerate(arguments)
        for d, label in enumerate(value.labels)
    ]
    depth = _depths(reading, axes)
    kind_of = _kinds_of_atoms(axes, depth)
    number = int(kind_of.max()) + 1
    atoms: list[list[int]] = [[] for _ in range(number)]
    places: list[list[Place]] = [[] for _ in range(number)]
    unit_of = np.full(len(depth), -1, np.int32)
    for argument, d, rows in axes:
        for column in rows.T:
            here = kind_of[column]
            for kind in np.unique(here[here >= 0]).tolist():
                mine = here == kind
                new = column[mine & (unit_of[column] < 0)]
                # Units are numbered in the order of their first positions.
                new = new[np.sort(np.unique(new, return_index=True)[1])]
                unit_of[new] = len(atoms[kind]) + np.arange(len(new))
                atoms[kind] += new.tolist()
                places[kind].append(Place(argument, d, np.where(mine, unit_of[column], -1)))
    noted = _notes(reading)
    found = []
    for kind in sorted(range(number), key=lambda k: _first(places[k])):
        several = atoms[kind]
        note = next((noted[atom] for atom in several if atom in noted), None)
        found.append(Kind(np.array(several), places[kind], int(depth[several[0]]), note))
    return found


def _kinds_of_atoms(axes: Axes, depth: np.ndarray) -> np.ndarray:
    """For each atom its kind, -1 for what is in no argument or can't leave.

    Atoms are of one kind that stand equally often in the same columns of the same axes, which is
    seen by sums of random numbers. The column tells heads from features, which may be as many.
    """
    width = max((rows.shape[1] for _, _, rows in axes), default=0)
    numbers = np.random.default_rng(0).integers(1, 2**63, (len(axes), width, 2), np.uint64)
    prints = np.zeros((len(depth), 3), np.uint64)
    prints[:, 2] = depth
    used = np.zeros(len(depth), bool)
    for k, (_, _, rows) in enumerate(axes):
        for c, column in enumerate(rows.T):
            found, count = np.unique(column, return_counts=True)
            prints[found, :2] += numbers[k, c] * count[:, None].astype(np.uint64)
            used[found] = True
    used[ALWAYS] = False
    kind_of = np.full(len(depth), -1, np.int64)
    kind_of[used] = np.unique(prints[used], axis=0, return_inverse=True)[1].reshape(-1)
    return kind_of


def _first(places: list[Place]) -> tuple[int, int, int, int]:
    """Where units are first; of several there, those first whose positions are in longer runs."""
    place = places[0]
    owned = place.units >= 0
    runs = int(np.count_nonzero(np.diff(place.units, prepend=-1)))
    return place.argument, place.axis, int(np.argmax(owned)), runs


def _notes(reading: Reading) -> dict[int, str]:
    noted: dict[int, str] = {}
    for label, why in reading.notes:
        for atom in np.unique(reading.atoms.resolve(label)).tolist():
            noted.setdefault(atom, why)
    return noted


def _depths(reading: Reading, axes: Axes) -> np.ndarray:
    """For each atom how many leading axes of all its arguments are layers of its own scan."""
    depth = np.zeros(reading.atoms.count, np.int64)
    homes = reading.homes()
    chains: dict[int, tuple[Location, ...]] = {}
    for argument, several in reading.stacks.items():
        chains[argument] = next(iter(several)) if len(several) == 1 else ()
    for scope in sorted(homes, key=len):
        home = homes[scope].copy()
        found = None
        for argument, _, rows in axes:
            atoms = np.unique(rows)
            atoms = atoms[home[atoms] & (atoms > 0)]
            if not len(atoms):
                continue
            chain = chains.get(argument, ())
            level = next((n for n in range(1, len(chain) + 1) if chain[n - 1] == scope[:-1]), 0)
            if level == 0 or found not in (None, level):
                home[atoms] = False
            else:
                found = level
        if found is not None:
            depth[home] = found
    return depth
