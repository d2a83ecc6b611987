"""Ids of examples, and where on disk their outputs are."""

from typing import Any, NamedTuple

import numpy as np

from jaxcompress import _check
from jaxcompress.distillation._cache_file import File

_RULE = "be signed integers of 64 bits or text"


class Run(NamedTuple):
    """Sorted ids, with the number of the file and the row of each."""

    ids: np.ndarray
    files: np.ndarray
    rows: np.ndarray


def read_ids(function: str, ids: Any) -> np.ndarray:
    """Any array or sequence of ids as int64, or as the bytes of text in UTF-8."""
    _require_known(function, ids)
    if not hasattr(ids, "dtype"):
        ids = _as_array(function, ids)
    ids = np.asarray(ids)
    if ids.dtype.kind == "O":
        ids = _as_array(function, ids.tolist())
    if ids.dtype.kind in "US":
        return _as_bytes(function, ids)
    largest = int(ids.max(initial=0)) if ids.dtype.kind == "u" else 0
    if ids.dtype.kind not in "iu" or largest >= 2**63:
        got = _check.describe(ids) + (f" with {largest}" if largest else "")
        raise TypeError(_check.message(function, "ids", _RULE, got))
    return ids.astype(np.int64)


def _require_known(function: str, ids: Any) -> None:
    if any(_check.is_traced(x) for x in _flat(ids)):
        rule, got = "be known: files are read and written by the host", "traced ones"
        fix = "Call it outside of jit, where batches are made, and pass outputs in the batch."
        raise TypeError(_check.message(function, "ids", rule, got, fix))


def _as_array(function: str, ids: Any) -> np.ndarray:
    """NumPy itself would turn a list of numbers and text into text."""
    flat = list(_flat(ids))
    if not flat:
        return np.asarray(ids, np.int64)
    numbers = all(isinstance(x, (int, np.integer)) and not isinstance(x, bool) for x in flat)
    text = all(isinstance(x, (str, bytes)) for x in flat)
    if not (numbers or text) or any(x and x[-1] in ("\0", 0) for x in flat if text):
        raise TypeError(_check.message(function, "ids", _RULE, _check.describe(ids)))
    if text and len({type(x) is str for x in flat}) > 1:
        raise TypeError(_check.message(function, "ids", "not mix str and bytes", repr(ids)))
    try:
        return np.asarray(ids, np.int64) if numbers else np.asarray(ids)
    except (OverflowError, ValueError):
        raise TypeError(_check.message(function, "ids", _RULE, _check.describe(ids))) from None


def _as_bytes(function: str, ids: np.ndarray) -> np.ndarray:
    try:
        if ids.dtype.kind == "U":
            return np.char.encode(ids, "utf-8")
        np.char.decode(ids, "utf-8")
        return ids
    except UnicodeError as error:
        rule = "be valid Unicode where they are text"
        raise TypeError(_check.message(function, "ids", rule, str(error))) from None


def _flat(ids: Any):
    if isinstance(ids, (list, tuple, range)):
        for x in ids:
            yield from _flat(x)
    else:
        yield ids


def first_run(files: list[File]) -> list[Run]:
    """The index of files; of an id in several, the first file counts."""
    if not files:
        return []
    ids = np.concatenate([file.ids for file in files])
    numbers = np.repeat(np.arange(len(files)), [len(file.ids) for file in files])
    rows = np.concatenate([np.arange(len(file.ids)) for file in files])
    ids, first = np.unique(ids, return_index=True)
    return [Run(ids, numbers[first], rows[first])]


def added(runs: list[Run], ids: np.ndarray, number: int) -> list[Run]:
    """The index with the ids of one more file; of those that are there the first file counts.

    Runs are merged when they are of like length, so that all writes together cost O(n log n).
    """
    order = np.argsort(ids, kind="stable")
    order = order[~find(runs, ids[order])[0]]
    runs = [*runs, Run(ids[order], np.full(len(order), number), order)]
    while len(runs) > 1 and len(runs[-2].ids) <= 2 * len(runs[-1].ids):
        joined = [np.concatenate(parts) for parts in zip(*runs[-2:], strict=True)]
        order = np.argsort(joined[0], kind="stable")
        runs = [*runs[:-2], Run(*(x[order] for x in joined))]
    return runs


def find(runs: list[Run], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each id is there; the number of its file, its row."""
    there = np.zeros(len(ids), bool)
    files, rows = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    for run in runs:
        if len(run.ids):
            place = np.minimum(np.searchsorted(run.ids, ids), len(run.ids) - 1)
            hit = run.ids[place] == ids
            there |= hit
            files = np.where(hit, run.files[place], files)
            rows = np.where(hit, run.rows[place], rows)
    return there, files, rows
