"""Where the axes of a parameter are after it was viewed: transposed, reshaped, cast."""

import math
from typing import Any

from jaxcompress.tracing._dot import read_dot

Axes = tuple[tuple[tuple[int, int], ...], ...]
"""For each axis of a view the `(axis, size)` of the leaf that it was merged of; axes of size 1
are left out."""

_KEPT = frozenset(
    "convert_element_type copy copy_p reduce_precision stop_gradient sharding_constraint reshard"
    " mesh_cast pvary pcast pbroadcast name optimization_barrier device_put".split()
)


def leaf_axes(shape: tuple[int, ...]) -> Axes:
    """Those of the leaf itself."""
    return tuple(((i, n),) if n != 1 else () for i, n in enumerate(shape))


def viewed_axes(eqn: Any, axes: Axes | None) -> Axes | None:
    """Those of what an equation makes of a view; None where it is no longer the whole leaf."""
    if axes is None or eqn.primitive.name in _KEPT:
        return axes
    name, params = eqn.primitive.name, eqn.params
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name == "transpose":
        return tuple(axes[i] for i in params["permutation"])
    if name in ("squeeze", "expand_dims") or (name == "reshape" and params["dimensions"] is None):
        return _regrouped(axes, out)
    if name == "broadcast_in_dim" and math.prod(out) == math.prod(shape):
        return _regrouped(axes, out)
    return None


def slice_axes(axes: Axes | None, layer: int) -> Axes | None:
    """Those of one trip of the scan over axis `layer` of the leaf."""
    if axes is None or axes[0] not in ((), *(((layer, n),) for _, n in axes[0])):
        return None
    return axes[1:]


def contracted_axes(eqn: Any, operand: int, axes: Axes | None) -> tuple[int, ...] | None:
    """The axes of the leaf that a product sums over, in the order of the features.

    None where the operand is not the whole leaf, or a product for each index of a batch.
    """
    if axes is None:
        return None
    if eqn.primitive.name == "conv_general_dilated":
        if eqn.params["batch_group_count"] != 1:
            return None
        summed = eqn.params["dimension_numbers"].rhs_spec[1:]
    elif eqn.primitive.name == "dot_general":
        dot = read_dot(eqn, operand)
        if any(a in dot.x and a in dot.out for a in dot.w):
            return None
        summed = [dot.w.index(a) for a in dot.x if a not in dot.out]
    else:
        return None
    return tuple(axis for i in summed for axis, _ in axes[i])


def _regrouped(axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """The same axes in the same order, merged or split into the axes of `shape`."""
    rest = [pair for group in axes for pair in group]
    out = []
    for size in shape:
        group: list[tuple[int, int]] = []
        while math.prod(n for _, n in group) < size and rest:
            group.append(rest.pop(0))
        if math.prod(n for _, n in group) != size:
            return None
        out.append(tuple(group))
    return tuple(out) if not rest else None
