"""What is done between layers: activations, norms and pools, by the names people know."""

from typing import Any

import numpy as np

_CALLS = frozenset(
    "relu relu6 gelu silu swish elu celu selu leaky_relu hard_tanh hard_sigmoid hard_silu"
    " hard_swish softmax log_softmax softplus soft_sign sigmoid log_sigmoid mish glu tanh"
    " squareplus sparse_plus logsumexp standardize softsign".split()
)
_PRIMITIVES = {
    "tanh": "tanh",
    "logistic": "sigmoid",
    "erf": "gelu",
    "erfc": "gelu",
    "exp": "exp",
    "rsqrt": "norm",
    "reduce_max": "max",
    "reduce_window_max": "max pool",
    "reduce_window_sum": "average pool",
    "reduce_window": "pool",
    "cumsum": "cumulative sum",
    "sin": "sin",
    "sort": "sort",
    "top_k": "top k",
}
# What stands for several that were found one after the other.
_SEVERAL = (({"max", "exp"}, "softmax"), ({"cube", "tanh"}, "gelu"))


def mark(eqn: Any, marks: tuple[str, ...]) -> tuple[str, ...]:
    """The marks of the result of an equation."""
    name = eqn.primitive.name
    new = _PRIMITIVES.get(name)
    if name == "max" and _zero(eqn.invars[1]):
        new = "relu"
    elif name == "integer_pow" and eqn.params["y"] == 3:
        new = "cube"
    if new is None or new in marks or (new == "exp" and "softmax" in marks):
        return marks
    marks = (*marks, new)
    for parts, whole in _SEVERAL:
        if parts <= set(marks):
            marks = (*(m for m in marks if m not in parts), whole)
    return marks


def marks_of_call(eqn: Any) -> tuple[str, ...]:
    """The mark of a call of a function that has a name, as `jax.nn.silu`."""
    inner = eqn.params.get("call_jaxpr")
    debug = getattr(getattr(inner, "jaxpr", inner), "debug_info", None)
    # A custom derivative has no name but that of the function it is of.
    name = str(eqn.params.get("name") or getattr(debug, "func_name", "")).lstrip("_")
    return (name,) if name in _CALLS else ()


def shown(marks: tuple[str, ...], *, normed: bool = False) -> str:
    """The marks as a label; without what only helped to find others.

    Args:
        marks: in the order of the program.
        normed: whether the norm has a node of its own.
    """
    hidden = {"max", "cube", "exp"} | ({"norm"} if normed else set())
    return ", ".join(m for m in dict.fromkeys(marks) if m not in hidden)


def _zero(v: Any) -> bool:
    return hasattr(v, "val") and np.ndim(v.val) == 0 and float(v.val) == 0.0
