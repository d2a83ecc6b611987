"""Running on what stays: convolutions, windows and products."""

from typing import Any

import numpy as np

from jaxcompress.tracing.positions._equation import Equation, require, require_whole, run
from jaxcompress.tracing.positions._taken import kept, same


def convolve(call: Equation) -> list[Any]:
    """Channels and images may go; of groups all, or as many channels of each."""
    p = call.params
    lhs, rhs, out = p["dimension_numbers"]
    for masks, spec in ((call.ins[0], lhs), (call.ins[1], rhs), (call.outs[0], out)):
        require_whole(call, spec[2:], masks)
    groups = p["feature_group_count"]
    if p["batch_group_count"] != 1:
        for masks in (*call.ins, *call.outs):
            require_whole(call, range(len(masks)), masks)
        return run(call)
    made = call.outs[0][out[1]]
    require(call, same(call.ins[1][rhs[0]], made), call.ins[1][rhs[0]], rhs[0])
    if groups == 1:
        taken = call.ins[0][lhs[1]]
        require(call, same(call.ins[1][rhs[1]], taken), taken, lhs[1])
        return run(call)
    (x, kernel), features = call.old_ins, call.ins[0][lhs[1]]
    inputs = kept(features, x[lhs[1]]).reshape(groups, -1)
    left = inputs.any(1)
    shared = kept(call.ins[1][rhs[1]], kernel[rhs[1]])
    # Each group that stays takes the channels that the kernel has, and makes as many as another.
    require(call, np.array_equal(inputs, np.outer(left, shared)), features, lhs[1])
    counts = kept(made, kernel[rhs[0]]).reshape(groups, -1).sum(1)
    alike = len(set(counts[left].tolist())) <= 1 and not counts[~left].any()
    require(call, alike, made, rhs[0])
    return run(call, feature_group_count=int(left.sum()))


def slide(call: Equation) -> list[Any]:
    """`reduce_window`, and what its derivatives run: only axes of windows of one entry lose any."""
    p, ndim = call.params, len(call.params["window_dimensions"])
    fields = zip(
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
        p.get("base_dilation") or [1] * ndim,
        p.get("window_dilation") or [1] * ndim,
        strict=True,
    )
    slid = [
        d
        for d, (size, stride, padding, base, dilation) in enumerate(fields)
        if (size, stride, tuple(padding), base, dilation) != (1, 1, (0, 0), 1, 1)
    ]
    for masks in (*call.ins, *call.outs):
        if len(masks) == ndim:
            require_whole(call, slid, masks)
    return run(call)


def contract(call: Equation) -> list[Any]:
    """`dot_general`: what is gone of one operand is gone of the other."""
    (left, right), (batch_left, batch_right) = call.params["dimension_numbers"]
    for a, b in zip((*left, *batch_left), (*right, *batch_right), strict=True):
        require(call, same(call.ins[0][a], call.ins[1][b]), call.ins[0][a], a)
    return run(call)


def contract_ragged(call: Equation) -> list[Any]:
    """`ragged_dot_general`: the axis that is cut into groups, and that of groups, are whole."""
    numbers = call.params["ragged_dot_dimension_numbers"]
    require_whole(call, numbers.lhs_ragged_dimensions, call.ins[0])
    require_whole(call, numbers.rhs_group_dimensions, call.ins[1])
    require_whole(call, range(len(call.ins[2])), call.ins[2])
    (left, right), (batch_left, batch_right) = numbers.dot_dimension_numbers
    for a, b in zip((*left, *batch_left), (*right, *batch_right), strict=True):
        require(call, same(call.ins[0][a], call.ins[1][b]), call.ins[0][a], a)
    return run(call)
