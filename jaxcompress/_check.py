"""Trace-time checks, and the one format of every error message.

`function: argument must rule, got what [at path]. What to do.`
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxcompress._types import Numeric


def message(
    function: str, argument: str, rule: str, got: Any, fix: str = "", *, path: str | None = None
) -> str:
    """The text of an error: who, which argument, the rule, what came, where, what to do."""
    where = "" if path is None else f" at {path!r}"
    return f"{function}: `{argument}` must {rule}, got {got}{where}.{' ' if fix else ''}{fix}"


def describe(x: Any) -> str:
    """`float32[3, 4]` for anything with a shape and a dtype, else its type and value, cut."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{getattr(x.dtype, 'name', x.dtype)}{list(x.shape)}"
    value = repr(x)
    return f"{type(x).__name__} {value if len(value) <= 200 else value[:200] + '…'}"


def is_traced(x: Any) -> bool:
    """Whether the value of `x` is unknown while tracing."""
    return isinstance(x, jax.core.Tracer)


def number(
    function: str,
    argument: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    fix: str = "",
) -> None:
    """Refuses what is not a real scalar and, where the value is known, what is out of range.

    Traced values pass.
    """
    bounds = "be a real number"
    if low is not None and high is not None:
        bounds += f" in [{low}, {high}]"
    elif low is not None or high is not None:
        bounds += f" of at least {low}" if high is None else f" of at most {high}"
    if value is None or callable(value) or isinstance(value, (bool, str)):
        raise TypeError(message(function, argument, bounds, describe(value), fix))
    if is_traced(value):
        if jnp.ndim(value) != 0:
            raise ValueError(message(function, argument, bounds, describe(value), fix))
        return
    try:
        array = np.asarray(value)
        scalar = float(array)
    except (TypeError, ValueError):
        raise TypeError(message(function, argument, bounds, describe(value), fix)) from None
    below = low is not None and scalar < low
    above = high is not None and scalar > high
    if below or above or scalar != scalar:
        raise ValueError(message(function, argument, bounds, scalar, fix))


def numeric(
    function: str,
    argument: str,
    value: Numeric | None,
    low: float | None = None,
    high: float | None = None,
    fix: str = "",
) -> None:
    """As `number`, but schedules pass: their value is known only at a step."""
    if not callable(value):
        number(function, argument, value, low, high, fix)


def integer(function: str, argument: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuses what is not a static Python integer in range."""
    rule = (
        f"be a static integer of at least {low}"
        if high is None
        else f"be a static integer in [{low}, {high}]"
    )
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(message(function, argument, rule, describe(value)))
    if value < low or (high is not None and value > high):
        raise ValueError(message(function, argument, rule, value))


def axis(function: str, argument: str, value: Any, ndim: int, path: str | None = None) -> int:
    """The axis counted from the front; refuses one that the leaf does not have."""
    integer(function, argument, value, -(10**9))
    if not -ndim <= value < ndim:
        raise ValueError(
            message(
                function, argument, f"be an axis of a leaf with {ndim} dimensions", value, path=path
            )
        )
    return value % ndim


def floating(function: str, argument: str, leaf: Any, path: str | None = None) -> None:
    """Refuses a leaf that is not a real floating-point array."""
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            message(
                function,
                argument,
                "hold real floating-point leaves",
                describe(leaf),
                "Choose other leaves with jc.masked(p, where).",
                path=path,
            )
        )


def key(function: str, value: Any) -> None:
    """Refuses what `jax.random` does not take for one key."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    one = shape == () if typed else dtype is not None and dtype == jnp.uint32 and len(shape) == 1
    if not one:
        rule, got = "be one key of jax.random", describe(value)
        raise TypeError(message(function, "key", rule, got, "Pass jax.random.key(0)."))
