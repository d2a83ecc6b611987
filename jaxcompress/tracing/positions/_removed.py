"""What a value is at removed positions: the constant that zeros of parameters turn into."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress.tracing.positions._removed_moves import MOVES
from jaxcompress.tracing.positions._removed_products import PRODUCTS
from jaxcompress.tracing.positions._removed_scalars import (
    POINTWISE,
    SAME,
    Constant,
    pointwise,
    scalar,
)

Constants = tuple[Constant, ...]
"""For each axis of a value what all entries are at a removed position of it."""

Rule = Callable[[Any, Sequence[Constants], Sequence[Constant]], list[Constants]]

_RULES: dict[str, Rule] = {**MOVES, **PRODUCTS}


def removed_values(
    eqn: Any, ins: Sequence[Constants], known: Sequence[Any] | None = None
) -> list[Constants]:
    """What the results of an equation are at removed positions of each of their axes.

    Says of a model whose parameters are 0 at the removed positions what its other values are
    there. None says nothing. An axis that nothing is ever removed of may have any constant.

    Taken for granted: what meets a 0 in a product is finite, a 0 is not divided by 0, and
    indices are in bounds.

    Args:
        eqn: one without jaxprs inside.
        ins: of each operand a constant, or None, per axis.
        known: of each operand its value where that is one number, known while tracing.

    Returns:
        Of each result a constant, or None, per axis; None for all that there is no rule for.
    """
    nothing: list[Constants] = [(None,) * len(v.aval.shape) for v in eqn.outvars]
    known = [scalar(c) for c in known or [None] * len(eqn.invars)]
    ins = [
        (c,) * len(v.aval.shape) if c is not None else tuple(axes)
        for v, axes, c in zip(eqn.invars, ins, known, strict=True)
    ]
    name = eqn.primitive.name
    if name in SAME and len(ins) == len(nothing):
        return [tuple(axes) for axes in ins]
    try:
        if name in POINTWISE:
            return _pointwise(eqn, ins, known)
        rule = _RULES.get(name)
        outs = nothing if rule is None else rule(eqn, ins, known)
    except (AttributeError, KeyError):  # A parameter of another JAX: nothing is known then.
        return nothing
    shapes = [v.aval.shape for v in eqn.outvars]
    fit = [len(axes) for axes in outs] == [len(shape) for shape in shapes]
    return outs if fit else nothing


def _pointwise(eqn, ins, known) -> list[Constants]:
    shape = eqn.outvars[0].aval.shape
    shapes = [v.aval.shape for v in eqn.invars]
    result = []
    for d in range(len(shape)):
        # An operand of size 1, or without axes, has the same value at every position.
        here = [
            axes[d] if len(old) == len(shape) and old[d] == shape[d] else c
            for axes, old, c in zip(ins, shapes, known, strict=True)
        ]
        result.append(pointwise(eqn, here))
    return [tuple(result)] * len(eqn.outvars) if len(eqn.outvars) == 1 else []


def uniform_values(eqn: Any, known: Sequence[Any]) -> list[Constant]:
    """Of each result its value, where all its entries are one number known while tracing.

    Args:
        eqn: one without jaxprs inside.
        known: of each operand its value where that is such a number, else None.
    """
    name = eqn.primitive.name
    known = [scalar(c) for c in known]
    nothing: list[Constant] = [None] * len(eqn.outvars)
    if not known or (len(eqn.outvars) != 1 and name not in SAME):
        return nothing
    if name in SAME and len(known) == len(nothing):
        return known
    # A value of no entries is any number; none is safe to compute with.
    if any(0 in v.aval.shape for v in (*eqn.invars, *eqn.outvars)):
        return nothing
    if name in POINTWISE:
        return nothing if None in known else [pointwise(eqn, known)]
    if name in _KEEPING:
        return [known[0]]
    return nothing


_KEEPING = frozenset(
    "broadcast_in_dim reshape squeeze expand_dims transpose rev slice dynamic_slice tile copy"
    " reduce_max reduce_min cummax cummin".split()
)
