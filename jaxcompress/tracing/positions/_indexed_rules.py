"""Entries at places that numbers say: known ones, or any."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcompress.tracing.positions._atoms import Label
from jaxcompress.tracing.positions._labels import split, whole
from jaxcompress.tracing.positions._reading import OUTSIDE, Reading
from jaxcompress.tracing.positions._values import Labels, Value, numbers_of


def along_constant(label: Label, size: int, start: Value, reading: Reading, why: str) -> Label:
    """`size` positions of an axis from a number on; all of it stays where that is unknown."""
    if size == len(label):
        return label
    at = numbers_of(start)
    if at is None:
        reading.freeze((label,), why)
        return whole(size)
    first = int(np.clip(int(at), 0, len(label) - size))
    part = label[first : first + size]
    reading.cut(label, part)
    return part


def gathered(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Slices of a table: its windows keep their positions, what indices point at stays."""
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    table, indices = ins[0].labels, ins[1].labels
    batched = _batched(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, ins, reading, why
    )
    gone = (*numbers.collapsed_slice_dims, *batched)
    rest, chosen = _chosen(ins[1], numbers.start_index_map, len(indices) - 1)
    places = _places(eqn, numbers, ins, chosen, gone)
    found: list[Label | None] = [None] * len(eqn.outvars[0].aval.shape)
    windows = [d for d in range(len(table)) if d not in gone]
    for d, at in zip(windows, numbers.offset_dims, strict=True):
        size = p["slice_sizes"][d]
        if size == len(table[d]):
            found[at] = table[d]
        elif places is not None and d in places:
            found[at] = table[d][places[d]]
            reading.touch(OUTSIDE, (table[d],))
        else:
            reading.freeze((table[d],), why)
            found[at] = whole(size)
    left = [at for at in range(len(found)) if at not in numbers.offset_dims]
    labels = list(indices[:-1])
    for d in numbers.collapsed_slice_dims:
        if places is None or d not in places:
            reading.freeze((table[d],), why)
            continue
        reading.touch(OUTSIDE, (table[d],))
        picked = table[d][places[d]]
        if not rest:
            reading.freeze((picked,), why)
        parts = split(reading.atoms, picked, rest, why) if len(rest) > 1 else [picked]
        for label, part in zip(labels, parts, strict=False):
            reading.unify(label, part, why)
    reading.freeze(indices[-1:], why)
    for at, label in zip(left, labels, strict=True):
        found[at] = label
    return [tuple(x for x in found if x is not None)]


def _batched(of_table: Sequence[int], of_indices: Sequence[int], ins, reading: Reading, why: str):
    """The axes of a table that have an index of their own for each position, and theirs."""
    for d, i in zip(of_table, of_indices, strict=True):
        reading.unify(ins[0].labels[d], ins[1].labels[i], why)
    return tuple(of_table)


def _chosen(indices: Value, mapped: Sequence[int], batch: int) -> tuple[list[int], Any]:
    """The sizes of the batch of indices, and the indices where they are known and of one axis."""
    sizes = [len(x) for x in indices.labels[:batch]]
    known = numbers_of(indices) if len(mapped) == 1 else None
    return sizes, None if known is None else known.reshape(-1)


def _places(eqn, numbers, ins, chosen, gone) -> dict[int, Any] | None:
    """From the indexed axis to the positions that are taken of it; None where unknown."""
    if chosen is None or numbers.operand_batching_dims:
        return None
    (d,) = numbers.start_index_map
    size, length = eqn.params["slice_sizes"][d], len(ins[0].labels[d])
    if chosen.size and (chosen.min() < 0 or chosen.max() > length - size):
        # What stands in place of entries out of bounds has no position.
        return None
    if d in gone:
        return {d: chosen}
    return {d: np.arange(chosen[0], chosen[0] + size)} if chosen.size == 1 else None


def scattered(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """Updates of a table at indices: as `gathered`, the other way round."""
    numbers = eqn.params["dimension_numbers"]
    table, indices, updates = (value.labels for value in ins)
    batched = _batched(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, ins, reading, why
    )
    gone = (*numbers.inserted_window_dims, *batched)
    rest, chosen = _chosen(ins[1], numbers.scatter_dims_to_operand_dims, len(indices) - 1)
    windows = [d for d in range(len(table)) if d not in gone]
    for d, at in zip(windows, numbers.update_window_dims, strict=True):
        if len(updates[at]) == len(table[d]):
            reading.unify(table[d], updates[at], why)
            continue
        last = len(table[d]) - len(updates[at])
        if chosen is not None and chosen.size == 1 and not batched and 0 <= chosen[0] <= last:
            part = table[d][chosen[0] : chosen[0] + len(updates[at])]
            reading.touch(OUTSIDE, (table[d],))
            reading.unify(part, updates[at], why)
        else:
            reading.freeze((table[d], updates[at]), why)
    left = [at for at in range(len(updates)) if at not in numbers.update_window_dims]
    for d in numbers.inserted_window_dims:
        known = chosen is not None and not batched and len(rest) == 1
        if known and np.isin(np.asarray(chosen), np.arange(len(table[d]))).all():
            reading.touch(OUTSIDE, (table[d],))
            reading.unify(table[d][chosen], updates[left[0]], why)
        else:
            reading.freeze((table[d],), why)
    for at, label in zip(left, indices[:-1], strict=True):
        reading.unify(updates[at], label, why)
    reading.freeze(indices[-1:], why)
    return [table]
