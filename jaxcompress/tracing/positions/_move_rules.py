"""Equations that move entries: each position of a result is one of an operand."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcompress.tracing._views import runs
from jaxcompress.tracing.positions._atoms import ALWAYS, Label
from jaxcompress.tracing.positions._indexed_rules import along_constant
from jaxcompress.tracing.positions._labels import join, merge, split, whole
from jaxcompress.tracing.positions._reading import OUTSIDE, Reading
from jaxcompress.tracing.positions._values import Labels, fixed


def transposed(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Axes in another order."""
    del reading, why
    return [tuple(ins[0].labels[d] for d in eqn.params["permutation"])]


def broadcast(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Positions of a new axis are alike: any of them may leave."""
    shape = eqn.outvars[0].aval.shape
    found: list[Label | None] = [None] * len(shape)
    for label, d in zip(ins[0].labels, eqn.params["broadcast_dimensions"], strict=True):
        if len(label) == shape[d]:
            found[d] = label
        else:
            reading.freeze((label,), why)
    return [
        tuple(
            label if label is not None else reading.atoms.fresh(n) if n > 1 else whole(n)
            for label, n in zip(found, shape, strict=True)
        )
    ]


def reshaped(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Axes that are merged, split, or both."""
    labels, old, new = ins[0].labels, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if 0 in (*old, *new) or eqn.params["dimensions"] is not None:
        reading.freeze(labels, why)
        return [fixed(new)]
    found: list[Label] = []
    i = j = 0
    for before, after in runs(old, new):
        here, dims = labels[i : i + before], new[j : j + after]
        # An axis of one entry comes and goes; its entry stays.
        reading.freeze([label for label in here if len(label) == 1], why)
        long = [label for label in here if len(label) > 1]
        sizes = [n for n in dims if n > 1]
        if tuple(map(len, long)) == tuple(sizes):
            several = list(long)
        else:
            merged = long[0] if len(long) == 1 else merge(long)
            several = [merged] if len(sizes) == 1 else split(reading.atoms, merged, sizes, why)
        found += [several.pop(0) if n > 1 else whole(1) for n in dims]
        i, j = i + before, j + after
    return [tuple(found)]


def squeezed(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Axes of one entry go; the entry stays."""
    labels = ins[0].labels
    gone = [d % len(labels) for d in eqn.params["dimensions"]]
    reading.freeze([labels[d] for d in gone], why)
    return [tuple(label for d, label in enumerate(labels) if d not in gone)]


def sliced(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """A part of an axis, or every n-th position."""
    del why
    p = eqn.params
    steps = p["strides"] or (1,) * len(ins[0].labels)
    found = []
    limits = zip(ins[0].labels, p["start_indices"], p["limit_indices"], steps, strict=True)
    for label, start, limit, step in limits:
        part = label[start:limit:step] if (start, limit, step) != (0, len(label), 1) else label
        if part is not label:
            _by_place(reading, label, part, step == 1)
        found.append(part)
    return [tuple(found)]


def _by_place(reading: Reading, label: Label, part: Label, contiguous: bool) -> None:
    if contiguous:
        reading.cut(label, part)
    else:
        reading.touch(OUTSIDE, (label,))


def reversed_(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """The last position first."""
    del why
    turned = eqn.params["dimensions"]
    reading.touch(OUTSIDE, tuple(ins[0].labels[d] for d in turned))
    return [tuple(x[::-1] if d in turned else x for d, x in enumerate(ins[0].labels))]


def padded(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """What is filled in may leave as it likes."""
    del why
    found = []
    for label, (low, high, interior) in zip(
        ins[0].labels, eqn.params["padding_config"], strict=True
    ):
        if (low, high, interior) == (0, 0, 0):
            found.append(label)
            continue
        reading.touch(OUTSIDE, (label,))
        inner = reading.atoms.fresh(len(label) + interior * max(len(label) - 1, 0))
        rows = join([inner, label[:0]])
        rows[:: interior + 1] = ALWAYS
        rows[:: interior + 1, : label.shape[1]] = label
        rows = rows[max(-low, 0) : len(rows) - max(-high, 0)]
        ends = [reading.atoms.fresh(max(n, 0)) for n in (low, high)]
        found.append(join([ends[0], rows, ends[1]]))
    return [tuple(found)]


def joined(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """One after the other along an axis."""
    across = eqn.params["dimension"]
    found = []
    for d, label in enumerate(ins[0].labels):
        if d == across:
            parts = [value.labels[d] for value in ins]
            both = join(parts)
            for part in parts:
                reading.cut(both, part)
            found.append(both)
            continue
        for value in ins[1:]:
            reading.unify(label, value.labels[d], why)
        found.append(label)
    return [tuple(found)]


def divided(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Cut into parts along an axis."""
    del why
    across, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"])
    label = ins[0].labels[across]
    parts = np.split(label, ends[:-1])
    for part in parts:
        reading.cut(label, part)
    return [_with(ins[0].labels, across, part) for part in parts]


def stacked(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Several values along a new axis."""
    for value in ins[1:]:
        for a, b in zip(ins[0].labels, value.labels, strict=True):
            reading.unify(a, b, why)
    labels = list(ins[0].labels)
    labels.insert(eqn.params["axis"], whole(len(ins)))
    return [tuple(labels)]


def unstacked(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Each position of an axis is a value of its own."""
    labels, across = ins[0].labels, eqn.params["axis"]
    reading.freeze((labels[across],), why)
    return [tuple(x for d, x in enumerate(labels) if d != across)] * len(eqn.outvars)


def tiled(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Several times all positions, one after the other."""
    del reading, why
    reps = eqn.params["reps"]
    return [tuple(np.tile(x, (n, 1)) for x, n in zip(ins[0].labels, reps, strict=True))]


def sliced_at(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """A part of an axis that starts where a number says."""
    labels, sizes = ins[0].labels, eqn.params["slice_sizes"]
    found = []
    for label, size, start in zip(labels, sizes, ins[1:], strict=True):
        found.append(along_constant(label, size, start, reading, why))
    return [tuple(found)]


def updated_at(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """A part of an axis is replaced, from where a number says."""
    del eqn
    labels, new = ins[0].labels, ins[1].labels
    for label, part, start in zip(labels, new, ins[2:], strict=True):
        here = along_constant(label, len(part), start, reading, why)
        reading.unify(here, part, why)
    return [labels]


def _with(labels: Sequence[Label], d: int, label: Label) -> Labels:
    return (*labels[:d], label, *labels[d + 1 :])
