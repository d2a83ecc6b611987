"""Products and convolutions: positions that are summed over, and positions that stay."""

from typing import Any

from jaxcompress.tracing._dot import read_dot
from jaxcompress.tracing.positions._labels import split, whole
from jaxcompress.tracing.positions._reading import Reading
from jaxcompress.tracing.positions._values import Labels, fixed


def multiplied(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """A product: what is summed over leaves on both sides, batches leave together."""
    dot, known = read_dot(eqn, 1), {}
    for letters, value in zip((dot.x, dot.w), ins, strict=True):
        for letter, label in zip(letters, value.labels, strict=True):
            reading.unify(known.setdefault(letter, label), label, why)
    return [tuple(known[letter] for letter in dot.out)]


def convolved(eqn: Any, ins: Any, reading: Reading, why: str) -> list[Labels]:
    """A convolution; of groups, the features are groups of features of their own."""
    p, ((x, kernel), shape) = eqn.params, ([v.labels for v in ins], eqn.outvars[0].aval.shape)
    lhs, rhs, result = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        reading.freeze((*x, *kernel), why)
        return [fixed(shape)]
    features, inputs, outputs = x[lhs[1]], kernel[rhs[1]], kernel[rhs[0]]
    # A position of an image is not apart from its neighbours.
    reading.freeze([*(x[d] for d in lhs[2:]), *(kernel[d] for d in rhs[2:])], why)
    groups = p["feature_group_count"]
    if groups == 1:
        reading.unify(features, inputs, why)
    else:
        atoms = reading.atoms
        group, within = split(atoms, features, (groups, len(features) // groups), why)
        other, _ = split(atoms, outputs, (groups, len(outputs) // groups), why)
        reading.unify(group, other, why)
        reading.unify(within, inputs, why)
    found = [whole(n) for n in shape]
    found[result[0]], found[result[1]] = x[lhs[0]], outputs
    return [tuple(found)]
