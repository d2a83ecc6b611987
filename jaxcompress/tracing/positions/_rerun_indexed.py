"""Running on what stays: gathers and scatters."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jaxcompress.tracing.positions._equation import Equation, fail, known, refuse, require, run
from jaxcompress.tracing.positions._taken import Mask, kept, narrowed, ranks, same, take_positions

_DROP = lax.GatherScatterMode.FILL_OR_DROP
# From a column of the indices to the axis that it points into, and how much is taken there.
_Columns = dict[int, tuple[int, int]]


def gather(call: Equation) -> list[Any]:
    """Axes that are taken whole may lose any; indexed ones where the indices are known."""
    p, numbers = call.params, call.params["dimension_numbers"]
    table, old = call.ins[0], call.old_ins[0]
    out, sizes = call.outs[0], list(p["slice_sizes"])
    rows = [m for d, m in enumerate(out) if d not in numbers.offset_dims]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = [d for d in range(len(old)) if d not in gone]
    columns: _Columns = {}
    for d, place in zip(window, numbers.offset_dims, strict=True):
        sizes[d] = _window(call, d, sizes[d], out[place], numbers.start_index_map, columns)
    for d in numbers.collapsed_slice_dims:
        if table[d] is not None:
            columns[numbers.start_index_map.index(d)] = d, 1
    for d, batch in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        require(call, same(table[d], rows[batch]), table[d], d)
    indices, lost, outside = _indices(call, rows, columns, p["mode"])
    if np.any(lost):
        refuse(call, table[columns[min(columns)][0]], columns[min(columns)][0])
    flags = {"indices_are_sorted": False, "unique_indices": False} if np.any(outside) else {}
    return run(call, [call.values[0], indices], slice_sizes=tuple(sizes), **flags)


def scatter(call: Equation) -> list[Any]:
    """As `gather`; what is written to entries that are gone is left out."""
    p, numbers = call.params, call.params["dimension_numbers"]
    table, old, sizes = call.ins[0], call.old_ins[0], call.old_ins[2]
    for d, mask in enumerate(table):
        require(call, same(mask, call.outs[0][d]), mask, d)
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [d for d in range(len(old)) if d not in gone]
    rows = [m for d, m in enumerate(call.ins[2]) if d not in numbers.update_window_dims]
    columns: _Columns = {}
    indexed = numbers.scatter_dims_to_operand_dims
    for d, place in zip(window, numbers.update_window_dims, strict=True):
        _window(call, d, sizes[place], call.ins[2][place], indexed, columns)
    for d in numbers.inserted_window_dims:
        if table[d] is not None:
            columns[indexed.index(d)] = d, 1
    for d, batch in zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    ):
        require(call, same(table[d], rows[batch]), table[d], d)
    indices, lost, outside = _indices(call, rows, columns, p["mode"])
    changes: dict[str, Any] = {}
    if np.any(lost):
        changes["mode"] = _DROP
    if np.any(lost | outside):
        changes |= {"indices_are_sorted": False, "unique_indices": False}
    return run(call, [call.values[0], indices, call.values[2]], **changes)


def _window(
    call: Equation, d: int, size: int, part: Mask, indexed: Sequence[int], columns: _Columns
) -> int:
    """The new size of what is taken of axis `d` at once, of which `part` stays."""
    mask, total = call.ins[0][d], call.old_ins[0][d]
    if mask is None or size == total:
        require(call, same(mask, part), part if mask is None else mask, d)
    elif d not in indexed:
        require(call, same(mask[:size], part), mask, d)
    else:
        columns[indexed.index(d)] = d, size
        start = _start(call, indexed.index(d), total - size, d)
        require(call, same(mask[start : start + size], part), mask, d)
    return int(kept(part, size).sum())


def _start(call: Equation, column: int, last: int, d: int) -> int:
    """Where all windows along axis `d` start."""
    indices = known(call, 1)
    starts = np.empty(0) if indices is None else np.unique(indices[..., column])
    if len(starts) != 1:
        refuse(call, call.ins[0][d], d)
    start = int(starts[0])
    if not 0 <= start <= last:
        if call.params["mode"] == _DROP:
            fail(call, f"a window that starts at {start} of axis {d}, outside")
        start = min(max(start, 0), last)
    return start


def _indices(
    call: Equation, rows: Sequence[Mask], columns: _Columns, mode: Any
) -> tuple[Any, np.ndarray, np.ndarray]:
    """The indices of the rows that stay, as they are now; and which are gone or were outside."""
    none = np.zeros((), bool)
    have = call.ins[1]
    if not columns:
        if any(m is not None for m in rows) or any(m is not None for m in have):
            return _rows_of(call, rows), none, none
        return call.values[1], none, none
    indices = known(call, 1)
    if indices is None:
        d = columns[min(columns)][0]
        refuse(call, call.ins[0][d], d)
    indices = take_positions(indices, [*rows, None])
    dtype, indices = indices.dtype, indices.astype(np.int64)
    lost, outside = none, none
    for column, (d, size) in columns.items():
        mask = kept(call.ins[0][d], call.old_ins[0][d])
        at, last = indices[..., column], len(mask) - size
        near = np.clip(at, 0, last)
        off = (near != at) & (mode == _DROP)
        # A window may start with what is gone.
        missing = ~off & ~mask[near] & (size == 1)
        indices[..., column] = np.where(off | missing, mask.sum(), ranks(mask)[near])
        lost, outside = lost | missing, outside | off
    return indices.astype(dtype), lost, outside


def _rows_of(call: Equation, rows: Sequence[Mask]) -> Any:
    have = call.ins[1]
    for d, (a, b) in enumerate(zip(have, rows, strict=False)):
        if a is not None:
            missing = ~a if b is None else b & ~a
            require(call, not np.any(missing), a, d)
    return narrowed(call.values[1], have, [*rows, None])
