"""What each primitive does to an axis that turns: keeps it, sums over it, or forbids it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxcompress.tracing import _stream_moves as moves
from jaxcompress.tracing import _stream_pointwise as pointwise
from jaxcompress.tracing._stream_graph import Graph, State

_SAME = frozenset(
    "convert_element_type copy copy_p reduce_precision stop_gradient sharding_constraint reshard"
    " mesh_cast pvary pcast pbroadcast name device_put".split()
)
Rule = Callable[[Any, Sequence[State], Graph, str], State]


def apply_rule(eqn: Any, states: Sequence[State], graph: Graph, why: str) -> list[State]:
    """The states of the results; `why` names the equation where it forbids to turn an axis."""
    name = eqn.primitive.name
    rounds = name == "convert_element_type" and not jnp.issubdtype(
        eqn.params["new_dtype"], jnp.floating
    )
    if name in _SAME and not rounds:
        return [states[0]]
    if name == "optimization_barrier":
        return list(states)
    rule = _RULES.get(name, pointwise.other)
    if name == "integer_pow" and eqn.params["y"] != 2:
        rule = pointwise.other
    return [rule(eqn, states, graph, why)] * len(eqn.outvars)


_RULES: dict[str, Rule] = {
    "add": pointwise.added,
    "add_any": pointwise.added,
    "sub": pointwise.added,
    "mul": pointwise.multiplied,
    "div": pointwise.divided,
    "square": pointwise.squared,
    "integer_pow": pointwise.squared,
    "neg": pointwise.negated,
    "select_n": pointwise.selected,
    "reduce_sum": moves.reduced,
    "transpose": moves.transposed,
    "broadcast_in_dim": moves.broadcast,
    "reshape": moves.reshaped,
    "squeeze": moves.squeezed,
    "slice": moves.cut,
    "dynamic_slice": moves.cut,
    "rev": moves.cut,
    "pad": moves.cut,
    "concatenate": moves.joined,
    "gather": moves.gathered,
    "dot_general": moves.dot,
}
