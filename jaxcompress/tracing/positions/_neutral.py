"""Whether a reduction gives the same without its removed entries as with them."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.tracing.positions._removed_moves import is_plain_window
from jaxcompress.tracing.positions._removed_products import is_depthwise, is_plain_axis
from jaxcompress.tracing.positions._removed_scalars import Constant, scalar


class Mixed(NamedTuple):
    """An axis that an equation mixes positions of, and what removing some of them does.

    Attributes:
        operand: its index.
        axis: of the operand.
        kind: "statistic": a sum of removed entries that are not 0, or not known, which a
            smaller model leaves out; "freeze": the result depends on removed entries, or on
            where entries are, in a way that nothing can make up for.
        why: in words.
    """

    operand: int
    axis: int
    kind: str
    why: str


def neutral(
    eqn: Any, ins: Sequence[tuple[Constant, ...]], known: Sequence[Any] | None = None
) -> list[Mixed]:
    """The axes of operands along which entries can't be removed without a difference.

    What has no mention is exact: the axis is not mixed along, or its removed entries are the
    neutral element of the reduction: 0 of a sum, 1 of a product, -inf of a maximum.

    Args:
        eqn: one without jaxprs inside; for primitives that are not known, and for the places
            that indices point at, nothing is said.
        ins: of each operand the constant, or None, per axis; see `removed_values`.
        known: of each operand its value where that is one number, known while tracing.
    """
    known = [scalar(c) for c in known or [None] * len(eqn.invars)]
    ins = [
        (c,) * len(v.aval.shape) if c is not None else tuple(axes)
        for v, axes, c in zip(eqn.invars, ins, known, strict=True)
    ]
    rule = _RULES.get(eqn.primitive.name)
    try:
        return [] if rule is None else rule(eqn, ins)
    except (AttributeError, KeyError) as error:  # A parameter of another JAX.
        why = f"{eqn.primitive.name} can't be read ({type(error).__name__})"
        return [
            Mixed(i, d, "freeze", why)
            for i, v in enumerate(eqn.invars)
            for d in range(len(v.aval.shape))
        ]


def _is_neutral(kind: str, c: Constant, dtype: Any) -> bool:
    if c is None:
        return False
    if kind in ("sum", "xor", "or"):
        return c == 0
    if kind == "prod":
        return c == 1
    if kind == "and":
        return c == (1 if dtype == np.bool_ else -1)
    if kind in ("max", "logsumexp"):
        return c == _bounds(dtype)[0]
    return kind == "min" and c == _bounds(dtype)[1]


@functools.lru_cache(maxsize=64)
def _bounds(dtype: Any) -> tuple[float, float]:
    if dtype == np.bool_:
        return 0.0, 1.0
    if np.issubdtype(dtype, np.integer):
        return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    return -math.inf, math.inf


def _along(eqn, ins, axes, kind: str) -> list[Mixed]:
    name, dtype = eqn.primitive.name, eqn.invars[0].aval.dtype
    found = []
    for d in axes:
        c = ins[0][d]
        if _is_neutral(kind, c, dtype):
            continue
        is_sum = kind == "sum" and not name.startswith("cum")
        found.append(Mixed(0, d, "statistic" if is_sum else "freeze", _why(name, c)))
    return found


def _why(name: str, c: Constant) -> str:
    what = "removed entries that are not known" if c is None else f"removed entries that are {c:g}"
    return f"{name} over {what}"


def _reduced(eqn, ins):
    kind = eqn.primitive.name.removeprefix("reduce_")
    return _along(eqn, ins, eqn.params["axes"], kind)


def _cumulative(eqn, ins):
    return _along(eqn, ins, [eqn.params["axis"]], eqn.primitive.name.removeprefix("cum"))


def _windows(eqn, ins):
    shape = eqn.invars[0].aval.shape
    del ins
    why = f"{eqn.primitive.name} takes windows of neighbours"
    return [Mixed(0, d, "freeze", why) for d in range(len(shape)) if not is_plain_window(eqn, d)]


def _ordered(axes_of):
    """The place or the order of entries is the result."""

    def rule(eqn, ins):
        del ins
        why = f"{eqn.primitive.name} depends on how many entries there are, and where"
        operands = range(len(eqn.invars)) if eqn.primitive.name == "sort" else range(1)
        return [Mixed(i, d, "freeze", why) for i in operands for d in axes_of(eqn)]

    return rule


def _contracted(eqn, ins):
    (left, right), _ = eqn.params["dimension_numbers"]
    return _of_product(eqn, ins, left, right)


def _of_product(eqn, ins, left, right):
    found = []
    for a, b in zip(left, right, strict=True):
        pair = (ins[0][a], ins[1][b])
        if 0.0 in pair and all(c is None or math.isfinite(c) for c in pair):
            continue
        why = f"{eqn.primitive.name} sums products of removed entries that may not be 0"
        found += [Mixed(0, a, "statistic", why), Mixed(1, b, "statistic", why)]
    return found


def _ragged(eqn, ins):
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left, right), _ = numbers.dot_dimension_numbers
    why = "ragged_dot_general counts the rows of each group"
    places = [*numbers.lhs_ragged_dimensions]
    return _of_product(eqn, ins, left, right) + [Mixed(0, d, "freeze", why) for d in places]


def _convolved(eqn, ins):
    numbers = eqn.params["dimension_numbers"]
    found = []
    if not is_depthwise(eqn):
        found += _of_product(eqn, ins, [numbers.lhs_spec[1]], [numbers.rhs_spec[1]])
    for i in range(len(ins[0]) - 2):
        if not is_plain_axis(eqn, i):
            why = "conv_general_dilated takes windows of neighbours"
            found.append(Mixed(0, numbers.lhs_spec[2 + i], "freeze", why))
    return found


_RULES = {
    "argmax": _ordered(lambda eqn: eqn.params["axes"]),
    "argmin": _ordered(lambda eqn: eqn.params["axes"]),
    "approx_top_k": _ordered(
        lambda eqn: [eqn.params["reduction_dimension"] % len(eqn.invars[0].aval.shape)]
    ),
    "conv_general_dilated": _convolved,
    "dot_general": _contracted,
    "fft": _ordered(
        lambda eqn: range(len(eqn.invars[0].aval.shape))[-len(eqn.params["fft_lengths"]) :]
    ),
    "ragged_dot_general": _ragged,
    "reduce": _ordered(lambda eqn: eqn.params["dimensions"]),
    "sort": _ordered(lambda eqn: [eqn.params["dimension"]]),
    "top_k": _ordered(lambda eqn: [eqn.params.get("axis", -1) % len(eqn.invars[0].aval.shape)]),
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split(),
        _reduced,
    ),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _cumulative),
    **dict.fromkeys(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min"
        " select_and_scatter_add select_and_gather_add".split(),
        _windows,
    ),
}
