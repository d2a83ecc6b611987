"""Numbers that come from a size: the n of a mean, n - 1 of a variance, 1/sqrt(d) of attention."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress.tracing.positions._removed_scalars import SAME, scalar

Shape = tuple[int, ...]


class Extent(NamedTuple):
    """How many entries there are, in the program as traced and in the smaller one."""

    old: int
    new: int


class Carried(NamedTuple):
    """The sizes that a number which a value is scaled by may come from.

    Attributes:
        sums: how many entries went into each entry of the value, if it is a sum; several
            where it may be seen as a sum in several ways.
        linear: whether it is a product with weights, or rows of a table, and what was added
            or moved since: then a scale of it may come from the sizes of its own axes.
    """

    sums: tuple[Extent, ...] = ()
    linear: bool = False


NOTHING = Carried()
"""What arguments and constants carry."""


class Rescaled(NamedTuple):
    """A number in an equation that comes from a size which is another one now.

    Attributes:
        operand: the index of the number among the operands.
        value: what to put in its place; None where it could come from several sizes that
            differ now: then it stays what it was.
        why: in words.
    """

    operand: int
    value: float | None
    why: str


class _Form(NamedTuple):
    """A number as `(size - fewer) ** power`."""

    power: float
    fewer: int = 0

    def of(self, size: int) -> float:
        return math.nan if size <= self.fewer else float(size - self.fewer) ** self.power


_OF_SUMS = {
    "div": (_Form(1.0), _Form(0.5), _Form(0.25), _Form(1.0, 1)),
    "mul": (_Form(-1.0), _Form(-0.5), _Form(-0.25), _Form(-1.0, 1)),
}
_OF_AXES = {
    "div": (_Form(0.5), _Form(0.25)),
    "mul": (_Form(-0.5), _Form(-0.25), _Form(0.5)),
}
# Activations have 0.5 and the square root of 2 in them, on axes of whatever size.
_TOO_COMMON = {"div": (1, 2), "mul": (1, 2, 4)}


def size_literal(
    eqn: Any, known: Sequence[Any], ins: Sequence[Carried], shapes: Sequence[Shape]
) -> Rescaled | None:
    """The number of a product or quotient that comes from a size, and what it is now.

    Of a sum over `n` entries it is a divisor `n`, `n ** 0.5`, `n ** 0.25` or `n - 1`, or a
    factor that is the inverse of one; of a product with weights only the roots are. Of what is
    linear in weights it may also be a divisor `d ** 0.5` or `d ** 0.25`, a factor that is the
    inverse of one, or `d ** 0.5`, from the size `d` of one of its own axes; of the last one, where
    several have that size. A number is from a size if it equals that power of it, to the rounding
    of its dtype.

    Args:
        eqn: the equation, as traced.
        known: of each operand its value where that is one number, known while tracing: a
            literal's, or one of `uniform_values`.
        ins: what each operand carries, of `attach`.
        shapes: of each operand its shape in the smaller program.

    Returns:
        None where it comes from no size, or from one that is the same now.
    """
    name = eqn.primitive.name
    if name not in _OF_SUMS:
        return None
    for i in (1, 0) if name == "mul" else (1,):
        number = scalar(known[i])
        if number is None or known[1 - i] is not None or abs(number) in (0.0, 1.0, math.inf):
            continue
        dtype, old = eqn.invars[i].aval.dtype, eqn.invars[1 - i].aval.shape
        found = _sums(name, number, dtype, ins[1 - i])
        if ins[1 - i].linear and len(old) == len(shapes[1 - i]):
            axes = [Extent(*sizes) for sizes in zip(old, shapes[1 - i], strict=True)]
            found += _axes(name, number, dtype, axes)
        if any(extent.old != extent.new for extent, _ in found):
            return _decided(i, number, found)
    return None


def _decided(operand: int, number: float, found: list[tuple[Extent, _Form]]) -> Rescaled:
    values = {form.of(extent.new) for extent, form in found}
    sizes = ", ".join(f"{a} (now {b})" for a, b in dict.fromkeys(extent for extent, _ in found))
    if len(values) > 1:
        return Rescaled(operand, None, f"{number:g} may come from any of the sizes {sizes}")
    (value,) = values
    if math.isnan(value):
        return Rescaled(operand, None, f"{number:g} comes from the size {sizes}: nothing is left")
    return Rescaled(operand, value, f"{number:g} comes from the size {sizes}: now {value:g}")


def _sums(name, number, dtype, carried: Carried) -> list[tuple[Extent, _Form]]:
    # Products with weights are no means: a number as large as the width is chance.
    forms = [form for form in _OF_SUMS[name] if not carried.linear or abs(form.power) < 1]
    matched = [(extent, _form(number, dtype, extent.old, forms)) for extent in carried.sums]
    return [(extent, form) for extent, form in matched if form is not None]


def _axes(name, number, dtype, extents) -> list[tuple[Extent, _Form]]:
    found = []
    for extent in extents:
        if extent.old in _TOO_COMMON[name]:
            continue
        form = _form(number, dtype, extent.old, _OF_AXES[name])
        if form is not None:
            found.append((extent, form))
    last = [pair for pair in found if pair[0] == extents[-1]]
    # Features stand last: that an axis of heads or places is as long is chance. Where only
    # another one of them changes, none can be told from the other.
    return last if last and last[0][0].old != last[0][0].new else found


def _form(number: float, dtype: Any, old: int, forms: Iterable[_Form]) -> _Form | None:
    """The form of the number that is nearest; None where none is it to rounding."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    eps = float(jnp.finfo(dtype).eps) if inexact else 0.0
    near = [(abs(form.of(old) - number), form) for form in forms]
    near = [(by, form) for by, form in near if by <= eps * abs(number)]
    return min(near, key=lambda pair: pair[0])[1] if near else None


_PASSED = SAME | frozenset(
    "reshape broadcast_in_dim squeeze expand_dims transpose rev slice dynamic_slice split tile"
    " unstack convert_element_type reduce_precision neg".split()
)
_LINEAR = frozenset("add sub add_any mul concatenate stack pad dynamic_update_slice".split())


def attach(eqn: Any, ins: Sequence[Carried], shapes: Sequence[Shape]) -> list[Carried]:
    """What the results of an equation carry.

    Args:
        eqn: the equation, as traced, without jaxprs inside.
        ins: what its operands carry.
        shapes: of each operand its shape in the smaller program.
    """
    name = eqn.primitive.name
    old = [v.aval.shape for v in eqn.invars]
    result = NOTHING
    if name in _PASSED:
        several = len(ins) == len(eqn.outvars) > 1
        return list(ins) if several else [ins[0]] * len(eqn.outvars)
    if name == "reduce_sum":
        result = Carried(_times(_extent(eqn.params["axes"], old[0], shapes[0]), ins[0].sums))
    elif name == "dot_general":
        (left, _), _ = eqn.params["dimension_numbers"]
        # Of two products, as the scores of attention, no axis is one of features.
        result = Carried((_extent(left, old[0], shapes[0]),), not (ins[0].linear and ins[1].linear))
    elif name == "conv_general_dilated":
        _, *rest = eqn.params["dimension_numbers"].rhs_spec
        result = Carried((_extent(rest, old[1], shapes[1]),), True)
    elif name == "gather":
        result = Carried((), True)
    elif name in _LINEAR:
        result = Carried((), any(carried.linear for carried in ins))
    elif name == "div":
        result = Carried((), ins[0].linear)
    elif name == "select_n":
        result = Carried((), any(carried.linear for carried in ins[1:]))
    return [result] * len(eqn.outvars)


def _extent(axes: Iterable[int], old: Shape, new: Shape) -> Extent:
    axes = list(axes)
    return Extent(math.prod(old[d] for d in axes), math.prod(new[d] for d in axes))


def _times(extent: Extent, sums: Sequence[Extent]) -> tuple[Extent, ...]:
    """A sum of sums is one over all of their entries, too."""
    whole = [Extent(extent.old * each.old, extent.new * each.new) for each in sums]
    return tuple(dict.fromkeys([extent, *whole]))
