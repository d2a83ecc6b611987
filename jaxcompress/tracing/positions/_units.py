"""Units: atoms of one kind, which touch the same axes of the same arguments."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcompress.tracing._jaxprs import Location
from jaxcompress.tracing.positions._atoms import ALWAYS
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


def kinds(reading: Reading, arguments: Sequence[Value]) -> list[Kind]:
    """What can leave of the arguments; the order is that of the first places."""
    axes = [
        (i, d, reading.atoms.resolve(label))
        for i, value in enumerate(arguments)
        for d, label in enumerate(value.labels)
    ]
    depth = _depths(reading, axes)
    # Atoms that touch the same axes as often, in the same way, are of one kind.
    width = max((rows.shape[1] for _, _, rows in axes), default=0)
    numbers = np.random.default_rng(0).integers(1, 2**63, (len(axes), width, 2), np.uint64)
    prints = np.zeros((reading.atoms.count, 2), np.uint64)
    used = np.zeros(reading.atoms.count, bool)
    for k, (_, _, rows) in enumerate(axes):
        # Heads come before features in the rows of a merged axis, though they may be as many.
        for c, column in enumerate(rows.T):
            found, count = np.unique(column, return_counts=True)
            prints[found] += numbers[k, c] * count[:, None].astype(np.uint64)
            used[found] = True
    used[ALWAYS] = False
    used = np.flatnonzero(used)
    table = np.concatenate([prints[used], depth[used, None].astype(np.uint64)], 1)
    _, kind_of = np.unique(table, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    of_atom = np.full(reading.atoms.count, -1, np.int64)
    of_atom[used] = kind_of
    number = int(kind_of.max()) + 1 if len(used) else 0
    members: list[list[np.ndarray]] = [[] for _ in range(number)]
    order = np.full(reading.atoms.count, -1, np.int64)
    sizes = np.zeros(number, np.int64)
    places: list[list[Place]] = [[] for _ in range(number)]
    for argument, d, rows in axes:
        for column in rows.T:
            here = of_atom[column]
            for kind in np.unique(here[here >= 0]).tolist():
                mine = np.where(here == kind, column, 0)
                new = mine[(mine > 0) & (order[mine] < 0)]
                new = new[np.sort(np.unique(new, return_index=True)[1])]
                order[new] = sizes[kind] + np.arange(len(new))
                sizes[kind] += len(new)
                members[kind].append(new)
                units = np.where(mine > 0, order[mine], -1).astype(np.int32)
                places[kind].append(Place(argument, d, units))
    noted = _notes(reading)
    found = []
    for kind in sorted(range(number), key=lambda k: _first(places[k])):
        atoms = np.concatenate(members[kind])
        note = next((noted[a] for a in atoms.tolist() if a in noted), None)
        found.append(Kind(atoms, places[kind], int(depth[atoms[0]]), note))
    return found


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


def _depths(reading: Reading, axes) -> np.ndarray:
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
