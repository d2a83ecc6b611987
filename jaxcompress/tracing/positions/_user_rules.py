"""Rules of the user for what can't be read: kernels, callbacks, functions of other languages."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxcompress import _check
from jaxcompress.tracing.positions._atoms import Label
from jaxcompress.tracing.positions._labels import whole
from jaxcompress.tracing.positions._reading import Reading
from jaxcompress.tracing.positions._values import Labels, Value


class AxisRule(NamedTuple):
    """Which axes of an operation lose positions together, in letters as `jnp.einsum` has them.

    Attributes:
        axes: `"b h t d, b h t d -> b h t d"`: a name for each axis of each operand and result,
            with blanks between the names and commas between the values. Axes of one name lose
            the same positions; those named `_` stay as they are. Along a name that no result
            has, zeros in one of the operands have to add nothing.
        call: runs the operation on smaller values, and returns its result, or a tuple of its
            results. None: the operation itself runs on any sizes.

    Examples:
        >>> rule = jc.pruning.AxisRule("t d, d f -> t f")
        >>> rules = {"my_kernel": rule}  # the name of a primitive, or of a jitted function
    """

    axes: str
    call: Callable[..., Any] | None = None


def name_of(eqn: Any) -> str:
    """What a rule of the user goes by: of a jitted function its own name."""
    name = eqn.primitive.name
    return eqn.params.get("name", name) if name in ("jit", "pjit") else name


def relate_by(
    rule: AxisRule, eqn: Any, ins: Sequence[Value], reading: Reading, why: str
) -> list[Labels]:
    """The labels of the results by a rule of the user."""
    left, right = _sides(rule, eqn)
    known: dict[str, Label] = {}
    zero: set[str] = set()
    kept = {name for names in right for name in names}
    for names, value in zip(left, ins, strict=True):
        for name, label, removed in zip(names, value.labels, value.removed, strict=True):
            if name == "_":
                reading.freeze((label,), why)
                continue
            reading.unify(known.setdefault(name, label), label, why)
            if removed == 0:
                zero.add(name)
    # As in a product: what is summed over adds nothing where one operand is zero.
    for name in known.keys() - kept - zero:
        reading.notes.append((known[name], f"what is removed may not be zero, in {why}"))
    results = []
    for names, v in zip(right, eqn.outvars, strict=True):
        sizes = zip(names, v.aval.shape, strict=True)
        results.append(tuple(known[name] if name in known else whole(n) for name, n in sizes))
    return results


def _sides(rule: AxisRule, eqn: Any) -> list[list[list[str]]]:
    """The names of the axes of the operands, and of the results."""
    sides = [[names.split() for names in side.split(",")] for side in rule.axes.split("->")]
    wanted = [[len(v.aval.shape) for v in vs] for vs in (eqn.invars, eqn.outvars)]
    if [[len(names) for names in side] for side in sides] == wanted:
        return sides
    shapes = " -> ".join(
        ", ".join(str(list(v.aval.shape)) for v in vs) for vs in (eqn.invars, eqn.outvars)
    )
    rule_text = f"name each axis of {name_of(eqn)!r}, which has {shapes}"
    raise ValueError(_check.message("dependencies", "rules", rule_text, repr(rule.axes)))
