"""Removed positions of what is viewed, moved, joined or picked: constants stay what they are."""

import math
from typing import Any

from jaxcompress.tracing._views import runs
from jaxcompress.tracing.positions._removed_scalars import agree


def _transposed(eqn, ins, known):
    del known
    return [tuple(ins[0][d] for d in eqn.params["permutation"])]


def _broadcast(eqn, ins, known):
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    # Along a new axis every position holds the same.
    result = [known[0]] * len(new)
    for i, d in enumerate(eqn.params["broadcast_dimensions"]):
        if old[i] == new[d]:
            result[d] = ins[0][i]
    return [tuple(result)]


def _reshaped(eqn, ins, known):
    del known
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    result: list[Any] = [None] * len(new)
    if 0 in (*old, *new) or eqn.params["dimensions"] is not None:
        return [tuple(result)]
    i = j = 0
    for before, after in runs(old, new):
        here = [d for d in range(i, i + before) if old[d] > 1]
        there = [d for d in range(j, j + after) if new[d] > 1]
        constant = agree([ins[0][d] for d in here])
        for d in there:
            result[d] = constant
        ones = [d for d in range(i, i + before) if old[d] == 1]
        for a, b in zip(ones, [d for d in range(j, j + after) if new[d] == 1], strict=False):
            result[b] = ins[0][a]
        i, j = i + before, j + after
    return [tuple(result)]


def _squeezed(eqn, ins, known):
    del known
    gone = {d % len(ins[0]) for d in eqn.params["dimensions"]}
    return [tuple(c for d, c in enumerate(ins[0]) if d not in gone)]


def _each(eqn, ins, known):
    """Every result's entries are the operand's, of the same axis."""
    del known
    return [ins[0]] * len(eqn.outvars)


def _padded(eqn, ins, known):
    config = eqn.params["padding_config"]
    grown = [low > 0 or high > 0 or inner > 0 for low, high, inner in config]
    result = []
    for d, c in enumerate(ins[0]):
        others = any(more for k, more in enumerate(grown) if k != d)
        result.append(agree([c, known[1]]) if others else c)
    return [tuple(result)]


def _joined(eqn, ins, known):
    del eqn, known
    return [tuple(map(agree, zip(*ins, strict=True)))]


def _stacked(eqn, ins, known):
    del known
    axis = eqn.params["axis"] % (len(ins[0]) + 1)
    result = list(map(agree, zip(*ins, strict=True)))
    result.insert(axis, None)
    return [tuple(result)]


def _unstacked(eqn, ins, known):
    del known
    axis = eqn.params["axis"] % len(ins[0])
    return [tuple(c for d, c in enumerate(ins[0]) if d != axis)] * len(eqn.outvars)


def _updated(eqn, ins, known):
    """Along axes that are written whole, and along those that are not, both hold the same."""
    del eqn, known
    return [tuple(map(agree, zip(ins[0], ins[1], strict=True)))]


def _gathered(eqn, ins, known):
    """Windows keep their axes; what one index array picks along one axis keeps that one's.

    Which picked place belongs to which position is for the caller to know.
    """
    numbers = eqn.params["dimension_numbers"]
    table, out = ins[0], [None] * len(eqn.outvars[0].aval.shape)
    if known[0] is not None:
        return [(known[0],) * len(out)]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    left = [d for d in range(len(table)) if d not in gone]
    for d, place in zip(left, numbers.offset_dims, strict=True):
        out[place] = table[d]
    rest = [d for d in range(len(out)) if d not in numbers.offset_dims]
    # The places of the index array are in order, its last axis left out.
    places = dict(zip(range(len(rest)), rest, strict=True))
    batched = numbers.start_indices_batching_dims
    for a, b in zip(numbers.operand_batching_dims, batched, strict=True):
        out[places[b]] = table[a]
    picked = [d for i, d in places.items() if i not in batched]
    if len(picked) == 1 == len(numbers.start_index_map) == len(numbers.collapsed_slice_dims):
        out[picked[0]] = table[numbers.start_index_map[0]]
    return [tuple(out)]


def _scattered(eqn, ins, known):
    del known
    numbers = eqn.params["dimension_numbers"]
    table, _, updates = ins
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    left = [d for d in range(len(table)) if d not in gone]
    kind = eqn.primitive.name.replace("-", "_").removeprefix("scatter").lstrip("_")
    result: list[Any] = [None] * len(table)
    for d, place in zip(left, numbers.update_window_dims, strict=True):
        both = agree([table[d], updates[place]])
        if kind == "mul":
            result[d] = 0.0 if table[d] == 0.0 else None
        elif both == 0.0 or kind not in ("add", "sub"):
            result[d] = both
    return [tuple(result)]


def _sorted(eqn, ins, known):
    """A slice that is constant is so in any order."""
    del known
    across = eqn.params["dimension"]
    return [tuple(None if d == across else c for d, c in enumerate(axes)) for axes in ins]


def _largest(eqn, ins, known):
    del known
    across = eqn.params.get("axis", len(ins[0]) - 1) % len(ins[0])
    values = tuple(None if d == across else c for d, c in enumerate(ins[0]))
    return [values, (None,) * len(values)]


def _filled(eqn, ins, known):
    """Of no entries, or drawn, or counted: nothing is known."""
    del ins, known
    return [(None,) * len(v.aval.shape) for v in eqn.outvars]


def is_plain_window(eqn: Any, d: int) -> bool:
    """Whether the windows of an equation are single entries along an axis, one for each."""
    p = eqn.params
    window, stride = p["window_dimensions"][d], p["window_strides"][d]
    dilations = [(p.get(f"{kind}_dilation") or (1,) * (d + 1))[d] for kind in ("base", "window")]
    return (window, stride, tuple(p["padding"][d]), *dilations) == (1, 1, (0, 0), 1, 1)


def windows_meet_entries(eqn: Any) -> bool:
    """Whether no window lies in the padding alone."""
    p = eqn.params
    if any(n != 1 for kind in ("base", "window") for n in p.get(f"{kind}_dilation") or ()):
        return False
    sizes = p["window_dimensions"]
    return (
        all(max(pad) < size for pad, size in zip(p["padding"], sizes, strict=True))
        and math.prod(eqn.invars[0].aval.shape) > 0
    )


MOVES = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _joined,
    "dynamic_slice": _each,
    "dynamic_update_slice": _updated,
    "gather": _gathered,
    "iota": _filled,
    "pad": _padded,
    "reshape": _reshaped,
    "rev": _each,
    "slice": _each,
    "sort": _sorted,
    "split": _each,
    "squeeze": _squeezed,
    "stack": _stacked,
    "tile": _each,
    "top_k": _largest,
    "transpose": _transposed,
    "unstack": _unstacked,
    **dict.fromkeys(
        "scatter scatter-add scatter-sub scatter-mul scatter-max scatter-min scatter_add"
        " scatter_sub scatter_mul scatter_max scatter_min".split(),
        _scattered,
    ),
}
