"""Which positions of its operands and results an equation ties together."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress.tracing._flops import ELEMENTWISE, TRANSCENDENTAL
from jaxcompress.tracing._size_rules import ALIKE, REDUCTIONS, WINDOWS
from jaxcompress.tracing.positions import _indexed_rules as indexed
from jaxcompress.tracing.positions import _move_rules as moves
from jaxcompress.tracing.positions import _product_rules as products
from jaxcompress.tracing.positions._labels import whole
from jaxcompress.tracing.positions._reading import OUTSIDE, Reading
from jaxcompress.tracing.positions._values import Labels, Value, fixed

Rule = Callable[[Any, Sequence[Value], Reading, str], list[Labels]]


def relate(eqn: Any, ins: Sequence[Value], reading: Reading, why: str) -> list[Labels]:
    """The labels of the results of an equation without jaxprs inside.

    What there is no rule for stays as it is: all axes of its operands are frozen.
    """
    name = eqn.primitive.name
    if name in _RULES:
        rule: Rule = _RULES[name]
    elif name in ELEMENTWISE or name in TRANSCENDENTAL or name in ALIKE:
        rule = _alike
    elif name in REDUCTIONS:
        rule = _reduced
    elif name in WINDOWS or name.startswith("select_and_"):
        rule = _windows
    elif name.startswith("scatter"):
        rule = indexed.scattered
    else:
        rule = _fixed
    return rule(eqn, ins, reading, why)


def _fixed(eqn, ins, reading: Reading, why) -> list[Labels]:
    for value in ins:
        reading.freeze(value.labels, why)
    return [fixed(v.aval.shape) for v in eqn.outvars]


def _alike(eqn, ins, reading: Reading, why) -> list[Labels]:
    shape = eqn.outvars[0].aval.shape
    if any(value.labels and len(value.labels) != len(shape) for value in ins):
        return _fixed(eqn, ins, reading, why)
    found = []
    for d, size in enumerate(shape):
        # An axis of size 1 is repeated along the others.
        several = [x.labels[d] for x in ins if x.labels and len(x.labels[d]) == size]
        for label in several[1:]:
            reading.unify(several[0], label, why)
        short = [x.labels[d] for x in ins if x.labels and len(x.labels[d]) != size]
        reading.freeze(short, why)
        found.append(several[0] if several else whole(size))
    return [tuple(found)] * len(eqn.outvars)


def _reduced(eqn, ins, reading, why) -> list[Labels]:
    del reading, why
    summed = eqn.params["axes"]
    left = tuple(label for d, label in enumerate(ins[0].labels) if d not in summed)
    return [left] * len(eqn.outvars)


def _along(eqn, ins, reading: Reading, why) -> list[Labels]:
    """Along one axis entries change their place."""
    del why
    for value in ins[1:]:
        for a, b in zip(ins[0].labels, value.labels, strict=True):
            reading.unify(a, b, eqn.primitive.name)
    return [ins[0].labels] * len(eqn.outvars)


def _largest(eqn, ins, reading: Reading, why) -> list[Labels]:
    across = eqn.params.get("axis", len(ins[0].labels) - 1)
    reading.freeze((ins[0].labels[across],), why)
    count = eqn.outvars[0].aval.shape[across]
    found = tuple(whole(count) if d == across else x for d, x in enumerate(ins[0].labels))
    return [found] * len(eqn.outvars)


def _windows(eqn, ins, reading: Reading, why) -> list[Labels]:
    """Windows of more than one entry hold what lies there together."""
    p, ndim = eqn.params, len(eqn.outvars[0].aval.shape)
    ones = (1,) * ndim
    plain = [
        (window, stride, tuple(pad), base, dilation) == (1, 1, (0, 0), 1, 1)
        for window, stride, pad, base, dilation in zip(
            p["window_dimensions"],
            p.get("window_strides") or ones,
            p["padding"],
            p.get("base_dilation") or ones,
            p.get("window_dilation") or ones,
            strict=True,
        )
    ]
    found: list[Labels] = []
    for v in eqn.outvars:
        labels = []
        for d, size in enumerate(v.aval.shape):
            several = [value.labels[d] for value in ins if value.labels]
            if plain[d]:
                for label in several[1:]:
                    reading.unify(several[0], label, why)
                labels.append(several[0])
            else:
                reading.freeze(several, why)
                labels.append(whole(size))
        found.append(tuple(labels))
    return found


def _drawn(eqn, ins, reading: Reading, why) -> list[Labels]:
    """Random numbers, of which some are left out: the same ones in all layers. The keys stay."""
    for value in ins:
        reading.freeze(value.labels, why)
    keys = len(ins[0].labels)
    shape = eqn.outvars[0].aval.shape
    drawn = tuple(reading.atoms.fresh(n) for n in shape[keys:])
    reading.touch(OUTSIDE, drawn)
    return [(*fixed(shape[:keys]), *drawn)]


def _collected(eqn, ins, reading: Reading, why) -> list[Labels]:
    """Sums over named axes, and over those that a `vmap` of a name has left."""
    gone = [d for d in eqn.params["axes"] if isinstance(d, int)]
    found = []
    for value in ins:
        reading.freeze([value.labels[d] for d in gone], why)
        found.append(tuple(label for d, label in enumerate(value.labels) if d not in gone))
    return found


def _barrier(eqn, ins, reading, why) -> list[Labels]:
    del eqn, reading, why
    return [value.labels for value in ins]


_RULES: dict[str, Rule] = {
    "argmax": _reduced,
    "argmin": _reduced,
    "broadcast_in_dim": moves.broadcast,
    "concatenate": moves.joined,
    "conv_general_dilated": products.convolved,
    "dot_general": products.multiplied,
    "dynamic_slice": moves.sliced_at,
    "dynamic_update_slice": moves.updated_at,
    "gather": indexed.gathered,
    "optimization_barrier": _barrier,
    "pad": moves.padded,
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin"), _collected),
    "random_bits": _drawn,
    "reshape": moves.reshaped,
    "rev": moves.reversed_,
    "slice": moves.sliced,
    "sort": _along,
    "split": moves.divided,
    "squeeze": moves.squeezed,
    "stack": moves.stacked,
    "tile": moves.tiled,
    "top_k": _largest,
    "transpose": moves.transposed,
    "unstack": moves.unstacked,
}
