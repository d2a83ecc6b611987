"""Labels of axes: merged, split, joined, and made equal."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from jaxcompress.tracing.positions._atoms import ALWAYS, Atoms, Label


def whole(size: int) -> Label:
    """Of an axis of which nothing can leave."""
    return np.zeros((size, 0), np.int64)


def merge(labels: Sequence[Label]) -> Label:
    """Of the axis that a reshape makes of several, the last one running fastest."""
    dims = [len(label) for label in labels]
    columns = []
    for i, label in enumerate(labels):
        shape = [1] * len(dims)
        shape[i] = dims[i]
        for column in label.T:
            columns.append(np.broadcast_to(column.reshape(shape), dims).reshape(-1))
    return np.stack(columns, 1) if columns else whole(math.prod(dims))


def join(labels: Sequence[Label]) -> Label:
    """Of an axis that has the positions of several, one after the other."""
    width = max(label.shape[1] for label in labels)
    return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in labels])


def split(atoms: Atoms, label: Label, dims: Sequence[int], why: str) -> list[Label]:
    """Of the axes that a reshape makes of one.

    An atom that varies along one of them goes there. One that varies along several is defined
    as a new atom of each of these axes; where that is not regular, as along an axis that was
    joined of others, all positions are.
    """
    rows = atoms.resolve(label).reshape(*dims, -1)
    found: list[list[np.ndarray]] = [[] for _ in dims]
    for column in np.moveaxis(rows, -1, 0):
        varying = [d for d, n in enumerate(dims) if n > 1 and np.any(column != column.take([0], d))]
        if not varying:
            # All stay or leave as one.
            d = int(np.argmax(np.asarray(dims) > 1))
            found[d].append(np.full(dims[d], column.flat[0]))
            continue
        at = tuple(slice(None) if d in varying else 0 for d in range(len(dims)))
        if len(varying) == 1:
            found[varying[0]].append(column[at])
            continue
        cell = column[at].reshape(-1)
        if (cell == ALWAYS).any() or len(np.unique(cell)) < len(cell):
            several = [atoms.fresh(n) if n > 1 else whole(n) for n in dims]
            unify(atoms, label, merge(several), why, by_rows=True)
            return several
        parts = [atoms.fresh(dims[d]) for d in varying]
        atoms.define(cell, merge(parts))
        for d, part in zip(varying, parts, strict=True):
            found[d].append(part[:, 0])
    return [
        np.stack(columns, 1) if columns else whole(n)
        for columns, n in zip(found, dims, strict=True)
    ]


def unify(atoms: Atoms, a: Label, b: Label, why: str, *, by_rows: bool = False) -> None:
    """The positions of two axes stay or leave together, one by one.

    Args:
        atoms: of the labels.
        a: of an axis.
        b: of another one.
        why: the equation that says so.
        by_rows: whether rows of several atoms are made equal atom by atom, in their order,
            without a look at how the axes are made of others.
    """
    if a is b or (a.shape[1] == 0 == b.shape[1]):
        return
    while True:
        first, second = atoms.resolve(a), atoms.resolve(b)
        first, second = _without_common(first, second)
        if first.shape[1] == 0 and second.shape[1] == 0:
            return
        left, right = (first != ALWAYS).sum(1), (second != ALWAYS).sum(1)
        one_sided = (left == 0) != (right == 0)
        if one_sided.any():
            reason = next(iter(_reasons(atoms, a, b, one_sided)), why)
            atoms.freeze(first[one_sided], reason)
            atoms.freeze(second[one_sided], reason)
            continue
        single = (left == 1) & (right == 1)
        if single.any():
            atoms.unite(first[single].max(1), second[single].max(1))
            continue
        if not _define(atoms, first, second, left) and not _define(atoms, second, first, right):
            if by_rows or not _unify_several(atoms, a, b, why):
                _unify_rows(atoms, first, second, why)
                continue
            return


def _reasons(atoms: Atoms, a: Label, b: Label, rows: np.ndarray) -> list[str]:
    """Why one side of the first of these rows stays."""
    i = int(np.argmax(rows))
    return [*atoms.reasons(a[i : i + 1]), *atoms.reasons(b[i : i + 1])]


def _without_common(a: Label, b: Label) -> tuple[Label, Label]:
    """Without the atoms that stand in a row of both."""
    in_both = (a[:, :, None] == b[:, None, :]) & (a[:, :, None] != ALWAYS)
    a = np.where(in_both.any(2), ALWAYS, a)
    b = np.where(in_both.any(1), ALWAYS, b)
    return a[:, a.any(0)], b[:, b.any(0)]


def _define(atoms: Atoms, a: Label, b: Label, count: np.ndarray) -> bool:
    """Defines the atoms that stand alone in a row of `a` by the row of `b`."""
    alone = count == 1
    if not alone.any():
        return False
    found, first = np.unique(a[alone].max(1), return_index=True)
    parts = b[alone][first]
    # What is part of another in the same step waits for the next one.
    free = ~np.isin(found, parts)
    if not free.any():
        atoms.freeze(found[:, None], "it would depend on itself")
        return True
    atoms.define(found[free], parts[free])
    return True


def _unify_rows(atoms: Atoms, a: Label, b: Label, why: str) -> None:
    """Rows of as many atoms: the first ones are the same, the second ones, …"""
    pairs: list[tuple[int, int]] = []
    for x, y in zip(a, b, strict=True):
        one, other = x[x != ALWAYS].tolist(), y[y != ALWAYS].tolist()
        if len(one) == len(other):
            pairs += zip(one, other, strict=True)
        else:
            atoms.freeze(np.array([one]), why)
            atoms.freeze(np.array([other]), why)
    if pairs:
        atoms.unite(*np.array(pairs).T)


def _unify_several(atoms: Atoms, a: Label, b: Label, why: str) -> bool:
    """Two axes that are both merged of others: by the finest axes that both are made of.

    False where there are none.
    """
    first, second = atoms.resolve(a), atoms.resolve(b)
    dims = _radices(first, second)
    if dims is None:
        return False
    pairs = zip(split(atoms, first, dims, why), split(atoms, second, dims, why), strict=True)
    for x, y in pairs:
        for _ in range(2):
            one, other = atoms.resolve(x), atoms.resolve(y)
            if min(one.shape[1], other.shape[1]) < 2:
                unify(atoms, x, y, why)
                break
            # Along one of the finest axes both have several atoms: all are tied.
            for columns in (one, other):
                for column in columns.T[1:]:
                    _tie(atoms, columns[:, 0], column, why)
    return True


def _tie(atoms: Atoms, a: np.ndarray, b: np.ndarray, why: str) -> None:
    if (a == ALWAYS).any() or (b == ALWAYS).any():
        atoms.freeze(np.stack([a, b], 1), why)
    else:
        atoms.unite(a, b)


def _radices(a: Label, b: Label) -> list[int] | None:
    """Sizes of axes, the last one fastest, of which each atom of both varies along some."""
    size = len(a)
    cuts = {1, size}
    for column in (*a.T, *b.T):
        changes = np.flatnonzero(column[1:] != column[:-1]) + 1
        if not len(changes):
            continue
        stride = math.gcd(size, *changes.tolist())
        values = column[::stride]
        period = next(n for n in range(1, len(values) + 1) if _repeats(values, n))
        cuts |= {stride, stride * period}
    chain = sorted(cuts)
    if any(high % low for low, high in itertools.pairwise(chain)):
        return None
    return [high // low for low, high in itertools.pairwise(chain)][::-1]


def _repeats(values: np.ndarray, period: int) -> bool:
    times, rest = divmod(len(values), period)
    return not rest and np.array_equal(np.tile(values[:period], times), values)
