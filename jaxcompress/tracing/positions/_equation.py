"""An equation with what it is run again on."""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.extend.core as jec
import numpy as np
from jax.sharding import NamedSharding

from jaxcompress import _check
from jaxcompress.tracing._jaxprs import run_equation, scope_of
from jaxcompress.tracing.positions._taken import Mask, Masks, fitting, shape_of


class Equation(NamedTuple):
    """An equation, values of its operands, and which positions of these are gone.

    Attributes:
        jaxpr: the equation stands in.
        eqn: the equation.
        values: of its operands, without the positions that are gone.
        ins: for each operand.
        outs: for each result.
        constants: for each operand its full value, where that is known.
    """

    jaxpr: Any
    eqn: Any
    values: Sequence[Any]
    ins: Sequence[Masks]
    outs: Sequence[Masks]
    constants: Sequence[np.ndarray | None]

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def old_ins(self) -> list[tuple[int, ...]]:
        """The shapes of the operands, with all positions."""
        return [tuple(v.aval.shape) for v in self.eqn.invars]

    @property
    def old_outs(self) -> list[tuple[int, ...]]:
        """The shapes of the results, with all positions."""
        return [tuple(v.aval.shape) for v in self.eqn.outvars]

    @property
    def new_outs(self) -> list[tuple[int, ...]]:
        """The shapes that the results have to have."""
        return [shape_of(*pair) for pair in zip(self.old_outs, self.outs, strict=True)]


def run(call: Equation, values: Sequence[Any] | None = None, **params: Any) -> list[Any]:
    """The results of the equation with other values of its operands, or parameters.

    Values stand for their operands one by one: also where two are the same variable, or a number.
    """
    eqn, values = call.eqn, call.values if values is None else values
    places = zip(eqn.invars, values, call.values, strict=True)
    invars = [
        v if new is (v.val if isinstance(v, jec.Literal) else old) else jec.Var(jax.typeof(new))
        for v, new, old in places
    ]
    for name, value in eqn.params.items():
        if isinstance(value, NamedSharding):
            # The only results that say where they lie and are several: of random numbers, last.
            params[name] = fitting(value, call.new_outs[-1])
    eqn = eqn.replace(invars=invars, params={**eqn.params, **params})
    return run_equation(call.jaxpr, eqn, values)


def known(call: Equation, operand: int) -> np.ndarray | None:
    """The full value of an operand, if it is the same whenever the program runs."""
    constant, value = call.constants[operand], call.values[operand]
    if constant is None and isinstance(call.eqn.invars[operand], jec.Literal):
        constant = None if _check.is_traced(value) else value
    return None if constant is None else np.asarray(constant)


def require_whole(call: Equation, axes: Sequence[Any], masks: Masks) -> None:
    """Refuses what is gone of some axes."""
    for d in axes:
        if masks[d] is not None:
            refuse(call, masks[d], d)


def require(call: Equation, true: bool, mask: Mask, axis: int) -> None:
    """Refuses what is gone of an axis if that is not `true`."""
    if not true:
        refuse(call, mask, axis)


def refuse(call: Equation, mask: Mask, axis: int) -> NoReturn:
    """Says that the equation can't run without these positions."""
    gone = "others" if mask is None else f"{np.count_nonzero(~mask)} of {len(mask)} positions"
    fail(call, f"{gone} of axis {axis} removed")


def fail(call: Equation, got: str) -> NoReturn:
    """Says that the equation can't run without some positions."""
    scope = scope_of(call.eqn)
    where = f"`{call.eqn.primitive.name}`" + (f" at {scope}" if scope else "")
    rule = f"leave what {where} can run on"
    raise ValueError(_check.message("shrink", "keep", rule, got, "Keep these positions."))
