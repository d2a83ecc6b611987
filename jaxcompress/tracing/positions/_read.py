"""Reading a program: the labels of every value, in all jaxprs inside."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress.tracing._flops import ELEMENTWISE, TRANSCENDENTAL
from jaxcompress.tracing._jaxprs import Body, Location, bodies, constant, run_equation, scope_of
from jaxcompress.tracing._walk import join
from jaxcompress.tracing.positions._labels import whole
from jaxcompress.tracing.positions._neutral import neutral
from jaxcompress.tracing.positions._reading import OUTSIDE, Places, Reading
from jaxcompress.tracing.positions._removed import removed_values, uniform_values
from jaxcompress.tracing.positions._rules import relate
from jaxcompress.tracing.positions._user_rules import name_of, relate_by
from jaxcompress.tracing.positions._values import Lazy, Value, fixed, literal, unknown

_PARTS = frozenset("slice dynamic_slice gather split unstack".split())
_CASTS = frozenset("convert_element_type copy copy_p reduce_precision sharding_constraint".split())


def read(jaxpr: Any, consts: Sequence[Any], ins: Sequence[Value], reading: Reading) -> list[Value]:
    """The values of the results; what the equations say of all positions goes to `reading`."""
    reading.consts = [_constant(reading, np.shape(array), _given(array)) for array in consts]
    return _read(jaxpr, reading.consts, ins, reading, (), "", OUTSIDE)


def _read(jaxpr, consts, ins, reading: Reading, here: Location, scope: str, loop: Location):
    known: dict[Any, Value] = dict(zip(jaxpr.invars, ins, strict=True))
    known.update(zip(jaxpr.constvars, consts, strict=True))

    def value(v: Any) -> Value:
        return literal(v.val) if isinstance(v, jec.Literal) else known[v]

    for i, eqn in enumerate(jaxpr.eqns):
        given = tuple(value(v) for v in eqn.invars)
        at, location = join(scope, scope_of(eqn)), (*here, i)
        why = f"`{eqn.primitive.name}` at {at}" if at else f"`{eqn.primitive.name}`"
        inside, uses = bodies(eqn), given
        if is_constant(given) and not eqn.effects:
            results = _constants(jaxpr, eqn, given, reading)
        elif inside and name_of(eqn) not in reading.rules:
            looped = _looped(inside)
            # They are constants before the first trip only.
            uses = tuple(
                _used(v, reading)._replace(known=None, constant=None) if n in looped else v
                for n, v in enumerate(given)
            )
            results = _enter(eqn, inside, uses, reading, location, at, why, loop)
        else:
            uses = tuple(_used(v, reading) for v in given)
            by_rule = name_of(eqn) in reading.rules
            results = (_by_rule if by_rule else _equation)(eqn, uses, reading, why, loop)
        computes = not inside and eqn.primitive.name not in _PARTS
        reading.plan[location] = Places(given, uses, tuple(results), computes)
        known.update(zip(eqn.outvars, results, strict=True))
    return [value(v) for v in jaxpr.outvars]


def is_constant(values: Sequence[Value]) -> bool:
    """Whether an equation with these operands gives the same whatever the arguments are."""
    return all(value.constant is not None for value in values)


def _constant(
    reading: Reading, shape: tuple[int, ...], lazy: Any, known: Any = None, flat: Any = ()
) -> Value:
    """A value that is the same whatever the arguments: its positions are free."""
    labels = tuple(reading.atoms.fresh(n) for n in shape)
    return Value(labels, (known,) * len(shape), known, lazy, frozenset(flat))


def _used(value: Value, reading: Reading) -> Value:
    """A constant as one equation uses it, which need not be all of it."""
    if value.constant is None or not value.labels:
        return value
    return value._replace(labels=tuple(reading.atoms.fresh(len(label)) for label in value.labels))


def _looped(inside: Sequence[Body]) -> set[int]:
    """The operands that are others in each trip of a loop."""
    return {
        i
        for body in inside
        for j, i in enumerate(body.inputs)
        if j in body.sliced or not constant(body, j)
    }


def _constants(jaxpr, eqn, given: Sequence[Value], reading: Reading) -> list[Value]:
    def compute():
        return run_equation(jaxpr, eqn, [value.constant and value.constant() for value in given])

    # All results at once, as run_equation has them.
    everything: list[Any] = []

    def result(k):
        if not everything:
            everything[:] = compute()
        return everything[k]

    simple = not bodies(eqn)
    numbers = uniform_values(eqn, [value.known for value in given]) if simple else []
    found = []
    for k, v in enumerate(eqn.outvars):
        aval: Any = v.aval
        lazy = Lazy(lambda k=k: result(k), all(v.constant and v.constant.known for v in given))
        number = numbers[k] if k < len(numbers) else None
        plain = jnp.issubdtype(aval.dtype, jnp.number) or aval.dtype == bool
        scalar = aval.shape == () and plain and not isinstance(v, jec.DropVar)
        if number is None and scalar and lazy.known:
            number = lazy()[()]
        flat = _flat(eqn, given) if number is None else range(len(aval.shape))
        found.append(_constant(reading, aval.shape, lazy, number, flat))
    return found


def _flat(eqn: Any, given: Sequence[Value]) -> set[int]:
    """Axes along which the result of constants does not vary: it was repeated along them."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        (value,), at = given, eqn.params["broadcast_dimensions"]
        pairs = list(zip(at, value.labels, strict=True))
        varying = {d for d, label in pairs if len(label) == shape[d] > 1}
        return set(range(len(shape))) - (varying - {at[i] for i in value.flat})
    if name in ELEMENTWISE or name in TRANSCENDENTAL or name in _CASTS:
        whole = [value for value in given if len(value.labels) == len(shape)]
        return set(range(len(shape))).intersection(*(value.flat for value in whole))
    return set()


def _by_rule(eqn, given, reading: Reading, why: str, loop: Location) -> list[Value]:
    labels = relate_by(reading.rules[name_of(eqn)], eqn, given, reading, why)
    results = [unknown(axes) for axes in labels]
    _touch(given, results, reading, loop)
    return results


def _equation(eqn, given, reading: Reading, why: str, loop: Location) -> list[Value]:
    known = [value.known for value in given]
    removed = [_removed(value) for value in given]
    for mixed in neutral(eqn, removed, known):
        label, at = given[mixed.operand].labels[mixed.axis], why.partition(" at ")[2]
        reason = f"{mixed.why}, at {at}" if at else mixed.why
        if mixed.kind == "freeze":
            reading.freeze((label,), reason)
        else:
            reading.notes.append((label, reason))
    labels = relate(eqn, given, reading, why)
    results = [
        Value(*pair)
        for pair in zip(labels, map(tuple, removed_values(eqn, removed, known)), strict=True)
    ]
    if eqn.primitive.name in _CASTS and given[0].source is not None:
        return [result._replace(source=given[0].source) for result in results]
    _touch(given, results, reading, loop)
    return results


def _touch(given: Sequence[Value], results: Sequence[Value], reading: Reading, loop: Location):
    """An equation in the scan at `loop` has these operands and results."""
    for value in given:
        if value.source is not None:
            reading.stacks.setdefault(value.source[0], set()).add(value.source[1])
        if value.constant is None:
            reading.touch(loop, value.labels)
        elif value.known is None:
            # The entries differ, so layers can't have their own.
            reading.touch(OUTSIDE, value.labels)
    for result in results:
        reading.touch(loop, result.labels)


def _removed(value: Value) -> tuple[Any, ...]:
    """The constants of a value; where nothing can leave, the one that fits the other axes."""
    pairs = list(zip(value.labels, value.removed, strict=True))
    fitting = next((c for label, c in pairs if label.shape[1] and c is not None), None)
    if fitting is None:
        return value.removed
    return tuple(c if label.shape[1] else fitting for label, c in pairs)


def _enter(eqn, inside, given, reading: Reading, location, scope, why, loop) -> list[Value]:
    found: list[list[Value]] = [[] for _ in eqn.outvars]
    for k, body in enumerate(inside):
        specs = (
            (eqn.params["in_specs"], eqn.params["out_specs"]) if body.label == "shard_map" else None
        )
        within = (*location, k) if body.label == "scan" else loop
        entering = [
            _entering(body, j, given[i], specs and specs[0][i], reading, location, why)
            for j, i in enumerate(body.inputs)
        ]
        leaving = _settled(body, entering, reading, (*location, k), scope, within, why)
        for j, i in enumerate(body.outputs):
            if i is not None:
                spec = specs and specs[1][i]
                shape = eqn.outvars[i].aval.shape
                found[i].append(_leaving(leaving[j], shape, spec, reading, why))
    return [_agreed(several, reading, why) for several in found]


def _settled(body: Body, entering, reading: Reading, here, scope, loop, why) -> list[Value]:
    """The results of a body; of a loop, what holds in all trips."""
    consts = [_held(array) for array in body.consts]
    while True:
        leaving = _read(body.jaxpr, consts, entering, reading, here, scope, loop)
        changed = False
        for j, k in body.carried.items():
            for a, b in zip(entering[j].labels, leaving[k].labels, strict=True):
                reading.unify(a, b, why)
            removed = _common([entering[j].removed, leaving[k].removed])
            if removed != entering[j].removed:
                entering[j], changed = entering[j]._replace(removed=removed), True
            leaving[k] = entering[j]
        if not changed:
            return leaving


def _held(array: Any) -> Value:
    """An array inside of a program: it stays as it is."""
    return Value(fixed(np.shape(array)), (None,) * np.ndim(array), None, _given(array))


def _given(array: Any) -> Lazy:
    """An array that a program closes over."""
    return Lazy(lambda: array, not _check.is_traced(array))


def _entering(body: Body, j: int, value: Value, spec, reading: Reading, location, why) -> Value:
    shape = body.jaxpr.invars[j].aval.shape
    if j in body.sliced:
        reading.freeze(value.labels[:1], f"one for each trip of {why}")
        source = value.source and (value.source[0], (*value.source[1], location))
        return Value(value.labels[1:], value.removed[1:], value.known, None, source=source)
    if not constant(body, j):
        if value.source is not None:
            reading.stacks.setdefault(value.source[0], set()).add(())
        return Value(value.labels, value.removed)
    return _sharded(value, shape, spec, reading, why)


def _leaving(value: Value, shape, spec, reading: Reading, why) -> Value:
    extra = len(shape) - len(value.labels)
    if extra:
        # What a scan stacks.
        layers = tuple(whole(n) for n in shape[:extra])
        return Value((*layers, *value.labels), (*(None,) * extra, *value.removed))
    return _sharded(value, shape, spec, reading, why)


def _sharded(value: Value, shape, spec, reading: Reading, why) -> Value:
    """Each device has a part of an axis: all of it stays."""
    cut = [d for d, axis in enumerate(spec or ()) if axis is not None]
    if not cut:
        return value
    reading.freeze([value.labels[d] for d in cut], why)
    labels = [whole(n) if d in cut else value.labels[d] for d, n in enumerate(shape)]
    return Value(tuple(labels), value.removed)


def _agreed(several: list[Value], reading: Reading, why: str) -> Value:
    """What is known of a value that comes from one of several places."""
    if len(several) == 1:
        return several[0]
    for other in several[1:]:
        for a, b in zip(several[0].labels, other.labels, strict=True):
            reading.unify(a, b, why)
    return Value(several[0].labels, _common([value.removed for value in several]))


def _common(several: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(
        axes[0] if all(_same(axes[0], x) for x in axes[1:]) else None
        for axes in zip(*several, strict=True)
    )


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and bool(a == b)
