"""Running on what stays: equations that move entries, make them or leave them out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcompress.tracing.positions._equation import (
    Equation,
    fail,
    known,
    refuse,
    require,
    require_whole,
    run,
)
from jaxcompress.tracing.positions._taken import (
    Mask,
    kept,
    ranks,
    same,
    shape_of,
    spread,
    take_indices,
    take_positions,
)


def broadcast(call: Equation) -> list[Any]:
    """`broadcast_in_dim`: axes that are new, or of size 1, are as long as there is left."""
    (old, *_), out = call.old_ins, call.outs[0]
    for d, place in enumerate(call.params["broadcast_dimensions"]):
        if old[d] != 1 or call.ins[0][d] is not None:
            require(call, same(call.ins[0][d], out[place]), out[place], place)
    return run(call, shape=call.new_outs[0])


def reshape(call: Equation) -> list[Any]:
    """Merged and split axes lose whole rows, columns, …, so that the order stays."""
    shape = call.new_outs[0]
    if math.prod(shape) != math.prod(call.values[0].shape):
        fail(call, f"{list(call.values[0].shape)} to be shaped to {list(shape)}")
    return run(call, new_sizes=shape)


def cut(call: Equation) -> list[Any]:
    """`slice`, of any stride."""
    p, indices = call.params, []
    strides = p["strides"] or [1] * len(p["start_indices"])
    for d, (start, stride) in enumerate(zip(p["start_indices"], strides, strict=True)):
        stays = kept(call.ins[0][d], call.old_ins[0][d])
        wanted = start + stride * np.flatnonzero(kept(call.outs[0][d], call.old_outs[0][d]))
        require(call, bool(np.all(stays[wanted])), call.ins[0][d], d)
        indices.append(ranks(stays)[wanted])
    return [take_indices(call.values[0], indices)]


def pad(call: Equation) -> list[Any]:
    """What stays of the padding is counted anew; where it is irregular it is gathered."""
    x, fill = call.values
    used, config, order = [], [], []
    for d, (low, _, interior) in enumerate(call.params["padding_config"]):
        size, total = call.old_ins[0][d], call.old_outs[0][d]
        stays, source = kept(call.ins[0][d], size), np.full(total, -1)
        places = low + (interior + 1) * np.arange(size)
        inside = (places >= 0) & (places < total)
        source[places[inside]] = np.flatnonzero(inside)
        source = source[kept(call.outs[0][d], total)]
        filled = source >= 0
        require(call, bool(np.all(stays[source[filled]])), call.ins[0][d], d)
        used.append(ranks(stays)[source[filled]])
        config.append(_config(filled))
        order.append(None if config[-1] else np.where(filled, np.cumsum(filled) - 1, filled.sum()))
    x = take_indices(x, used)
    # One entry of padding at the end can be gathered as often as it is needed.
    config = tuple(each or (0, 1, 0) for each in config)
    (x,) = run(call, [x, fill], padding_config=config)
    return [take_indices(x, order)]


def _config(filled: np.ndarray) -> tuple[int, int, int] | None:
    """Low, high and interior padding around entries at these places; None: irregular."""
    at = np.flatnonzero(filled)
    if len(at) == 0:
        return len(filled), 0, 0
    gaps = np.diff(at)
    if np.any(gaps != gaps[:1]):
        return None
    return int(at[0]), int(len(filled) - 1 - at[-1]), int(gaps[0]) - 1 if len(gaps) else 0


def split(call: Equation) -> list[Any]:
    """Each part is as long as what is left of it."""
    axis = call.params["axis"]
    return run(call, sizes=tuple(shape[axis] for shape in call.new_outs))


def tile(call: Equation) -> list[Any]:
    """Copies of what stays; of which some may be gone, as a whole or in parts."""
    reps, order = [], []
    for d, times in enumerate(call.params["reps"]):
        size, stays = call.old_ins[0][d], kept(call.ins[0][d], call.old_ins[0][d])
        wanted = np.flatnonzero(kept(call.outs[0][d], size * times)) % max(size, 1)
        require(call, bool(np.all(stays[wanted])), call.outs[0][d], d)
        at, left = ranks(stays)[wanted], int(stays.sum())
        copies, rest = divmod(len(at), max(left, 1))
        whole = rest == 0 and np.array_equal(at, np.tile(np.arange(left), copies))
        reps.append(copies if whole else 1)
        order.append(None if whole else at)
    return [take_indices(run(call, reps=tuple(reps))[0], order)]


def iota(call: Equation) -> list[Any]:
    """The numbers of what stays."""
    p, (masks,) = call.params, call.outs
    axis, shape = p["dimension"], call.new_outs[0]
    if masks[axis] is None:
        return run(call, shape=shape)
    # Of another length along all other axes, it is the same all the same.
    long = [*shape]
    long[axis] = call.old_outs[0][axis]
    (whole,) = run(call, shape=tuple(long))
    return [take_positions(whole, [m if d == axis else None for d, m in enumerate(masks)])]


def draw(call: Equation) -> list[Any]:
    """Random numbers of the old shape, so that what stays gets those that it got before."""
    lead = len(call.ins[0]) if call.eqn.primitive.name in ("random_bits", "random_split") else 0
    results = run(call)
    return [
        None if x is None else take_positions(x, [*[None] * lead, *masks[lead:]])
        for x, masks in zip(results, call.outs, strict=True)
    ]


def draw_gamma(call: Equation) -> list[Any]:
    """`random_gamma`, of which each entry has a key by its place."""
    key, shape = call.values
    lead = len(call.ins[0])
    masks = [None if d < lead else m for d, m in enumerate(call.ins[1])]
    if 0 in shape_of(call.old_ins[1], call.ins[1]):
        return [shape]
    (x,) = run(call, [key, spread(shape, masks)])
    return [take_positions(x, masks)]


def dynamic_slice(call: Equation) -> list[Any]:
    """Axes are cut in full, or from a place that is known."""
    x, *starts = call.values
    for d, size in enumerate(call.params["slice_sizes"]):
        starts[d] = _start(call, d, size, call.ins[0][d], call.outs[0][d], 1)
    return run(call, [x, *starts], slice_sizes=call.new_outs[0])


def dynamic_update_slice(call: Equation) -> list[Any]:
    """As `dynamic_slice`."""
    x, update, *starts = call.values
    for d, size in enumerate(call.old_ins[1]):
        require(call, same(call.ins[0][d], call.outs[0][d]), call.outs[0][d], d)
        starts[d] = _start(call, d, size, call.ins[0][d], call.ins[1][d], 2)
    return run(call, [x, update, *starts])


def _start(call: Equation, d: int, size: int, mask: Mask, part: Mask, first: int) -> Any:
    """Where the part of axis `d` starts that is cut out or written."""
    value, total = call.values[first + d], call.old_ins[0][d]
    if mask is None or size == total:
        require(call, same(mask, part), part if mask is None else mask, d)
        return value
    start = known(call, first + d)
    if start is None:
        refuse(call, mask, d)
    at = min(max(int(start), 0), total - size)
    require(call, same(mask[at : at + size], part), mask, d)
    return np.asarray(ranks(mask)[at], start.dtype)


def sort(call: Equation) -> list[Any]:
    """`sort`, `top_k` and the like, along axes of which nothing is gone."""
    p, ndim = call.params, len(call.ins[0])
    along = p.get("dimension", p.get("axis", p.get("reduction_dimension", -1))) % ndim
    return _along(call, [along])


def search(call: Equation) -> list[Any]:
    """`argmax` and the like: the place of an entry says nothing once others are gone."""
    return _along(call, call.params["axes"])


def transform(call: Equation) -> list[Any]:
    """`fft`, of which the last axes are whole."""
    return _along(call, [-1 - d for d in range(len(call.params["fft_lengths"]))])


def join(call: Equation) -> list[Any]:
    """`stack` and `unstack`: what has an axis less can't be gone."""
    whole = call.outs[0] if call.eqn.primitive.name == "stack" else call.ins[0]
    require_whole(call, [call.params["axis"]], whole)
    return run(call)


def squeeze(call: Equation) -> list[Any]:
    """Axes that leave are whole."""
    return _along(call, call.params["dimensions"])


def _along(call: Equation, axes: Sequence[int]) -> list[Any]:
    for masks in call.ins:
        require_whole(call, axes, masks)
    return run(call)
