"""Running a program on arguments of which some positions are gone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np

from jaxcompress.tracing._custom import CUSTOM, Side, rebind
from jaxcompress.tracing._interpret import Hooks, interpret
from jaxcompress.tracing._jaxprs import Traced, bodies, run_equation
from jaxcompress.tracing.positions._kept import Given, Kept, kept
from jaxcompress.tracing.positions._program import Program, parameter
from jaxcompress.tracing.positions._read import is_constant, read
from jaxcompress.tracing.positions._reading import Reading
from jaxcompress.tracing.positions._rerun import rerun
from jaxcompress.tracing.positions._rescaled import rescaled
from jaxcompress.tracing.positions._taken import Masks, take_positions
from jaxcompress.tracing.positions._user_rules import AxisRule, name_of
from jaxcompress.tracing.positions._values import Value, numbers_of

_INDEXED = frozenset(("gather", "dynamic_slice", "dynamic_update_slice"))


class Replayed(NamedTuple):
    """A program on fewer positions.

    Attributes:
        results: of the program.
        unsure: numbers that may come from one size or another: they were left as they are.
    """

    results: list[Any]
    unsure: list[str]


class _How(NamedTuple):
    """How to run a program.

    Attributes:
        rescale: whether numbers that come from a size change with it.
        rules: of the user.
        unsure: filled with those that may come from one size or another.
    """

    rescale: bool
    rules: Mapping[str, AxisRule]
    unsure: list[str]


def replay(
    program: Program, values: Sequence[Any], given: Sequence[Given], *, rescale: bool
) -> Replayed:
    """The results of a program for arguments without the positions that are gone.

    Args:
        program: read with all positions.
        values: of the arguments.
        given: for each argument which positions stay.
        rescale: static. Whether numbers that come from a size change with it.
    """
    names = program.traced.paths
    stays = kept(program.reading, program.arguments, given, names)
    how = _How(rescale, program.reading.rules, [])
    return Replayed(_run(program.traced, program.reading, values, stays, how), how.unsure)


def _run(
    traced: Traced, reading: Reading, values: Sequence[Any], stays: Kept, how: _How
) -> list[Any]:
    numbers = rescaled(traced.jaxpr, reading, stays) if how.rescale else {}
    how.unsure.extend(number.why for number in numbers.values() if number.value is None)
    numbers = {at: (n.operand, n.value) for at, n in numbers.items() if n.value is not None}
    touched = set(numbers)
    for location, places in reading.plan.items():
        if any(_changed(stays, values) for values in places[:3]):
            touched.add(location)
            # An equation with jaxprs inside is entered, whether or not one there changes.
            touched.add((*location, 0, -1))

    def equation(location, eqn, operands, given, run) -> Any:
        places = reading.plan[location]
        before, after = ([stays.of(value) for value in side] for side in (places.ins, places.outs))
        pairs = zip(operands, places.given, strict=True)
        if is_constant(places.given) and not eqn.effects:
            full = [_whole(x, value, stays) for x, value in pairs]
            results = run_equation(traced.jaxpr, eqn, full)
            return [take_positions(*pair) for pair in zip(results, after, strict=True)], {}
        operands = [
            x
            if value.constant is None or value is use
            else take_positions(_whole(x, value, stays), _first(masks, value))
            for (x, value), use, masks in zip(pairs, places.ins, before, strict=True)
        ]
        if name_of(eqn) in reading.rules:
            return _by_rule(reading.rules[name_of(eqn)], traced.jaxpr, eqn, operands), {}
        if eqn.primitive.name in CUSTOM:
            inner = any(at[: len(location)] == location for at in numbers)
            return _custom(traced.jaxpr, eqn, operands, before, after, inner, how), {}
        if bodies(eqn):
            return run(operands)
        if location in numbers:
            operand, number = numbers[location]
            invars = list(eqn.invars)
            operands[operand] = jnp.full_like(operands[operand], number)
            # A number that is written in the program is not read from the operands.
            invars[operand] = jec.Var(jax.typeof(operands[operand]))
            eqn = eqn.replace(invars=invars)
        indexed = eqn.primitive.name in _INDEXED or eqn.primitive.name.startswith("scatter")
        constants = [numbers_of(x) if indexed else None for x in places.ins]
        return rerun(traced.jaxpr, eqn, operands, before, after, constants), {}

    consts = [
        take_positions(array, stays.of(value))
        for array, value in zip(traced.consts, reading.consts, strict=True)
    ]
    return interpret(
        traced._replace(consts=consts), values, Hooks(frozenset(touched), equation, scoped=False)
    )[0]


def _by_rule(rule: AxisRule, jaxpr: Any, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    if rule.call is None:
        return run_equation(jaxpr, eqn, operands)
    results = rule.call(*operands)
    return results if isinstance(results, (tuple, list)) else [results]


def _changed(stays: Kept, values: Sequence[Value]) -> bool:
    return any(mask is not None for value in values for mask in stays.of(value))


def _first(masks: Masks, value: Value) -> Masks:
    """The same, but the first positions where it makes no difference: a slice, not a gather."""
    return tuple(
        np.arange(len(mask)) < mask.sum() if mask is not None and d in value.flat else mask
        for d, mask in enumerate(masks)
    )


def _whole(x: Any, value: Value, stays: Kept) -> Any:
    """A constant with all of its positions, also where a loop or a branch gives back less."""
    if value.constant is None or all(mask is None for mask in stays.of(value)):
        return x
    return jnp.asarray(value.constant())


def _custom(
    jaxpr: Any,
    eqn: Any,
    values: Sequence[Any],
    before: Sequence[Masks],
    after: Sequence[Masks],
    rescale: bool,
    how: _How,
) -> Sequence[Any]:
    """An equation with a derivative of its own, whose rule is replayed too.

    Where numbers in it change, its rule does not fit any more: it is differentiated as it is.
    """
    (body,) = bodies(eqn)

    def forward(*xs):
        return _part(body.jaxpr, body.consts, xs, before, after, how)

    def run(closed, inner, ins, outs):
        given, wanted = ([_side(side, before, after) for side in x] for x in (ins, outs))
        unscaled = how._replace(rescale=False)
        return _part(closed.jaxpr, closed.consts, inner, given, wanted, unscaled)

    return forward(*values) if rescale else rebind(jaxpr, eqn, values, forward, run)


def _side(side: Side, before: Sequence[Masks], after: Sequence[Masks]) -> Masks:
    return before[side.index] if side.operand else after[side.index]


def _part(jaxpr, consts, values, before, after, how: _How) -> list[Any]:
    """A jaxpr that is not a whole function, where it is known what stays at both of its ends."""
    reading = Reading(how.rules)
    arguments = [parameter(reading, i, v.aval.shape) for i, v in enumerate(jaxpr.invars)]
    results = read(jaxpr, consts, arguments, reading)
    names = ["an operand" for _ in arguments] + ["a result" for _ in results]
    stays = kept(reading, [*arguments, *results], [*before, *after], names)
    traced = Traced(jaxpr, consts, [], names[: len(arguments)], lambda values: values)
    return _run(traced, reading, values, stays, how)
