"""What is known of a value while a program is read for its positions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.tracing._jaxprs import Location
from jaxcompress.tracing.positions._atoms import Label
from jaxcompress.tracing.positions._labels import whole

Labels = tuple[Label, ...]


class Lazy:
    """A value that depends on no argument, computed when it is asked for, once.

    Attributes:
        known: whether the numbers are known now: not where it depends on what is traced outside
            of the function, which closes over it.
    """

    def __init__(self, compute: Callable[[], Any], known: bool = True) -> None:
        self.known = known
        self._compute: Callable[[], Any] | None = compute
        self._value: Any = None

    def __call__(self) -> Any:
        """The value, on the host where it can be; keys of random numbers stay as they are."""
        if self._compute is not None:
            self._value, self._compute = self._computed(self._compute), None
        return self._value

    def _computed(self, compute: Callable[[], Any]) -> Any:
        if not self.known:
            return compute()
        with jax.ensure_compile_time_eval():
            value = compute()
        extended = jnp.issubdtype(value.dtype, jax.dtypes.extended)
        return value if extended else np.asarray(value)


class Value(NamedTuple):
    """A value of a program.

    Attributes:
        labels: of its axes.
        removed: for each axis the number that stands everywhere at a position that left, if
            one does and all parameters are zero there; None where none is known.
        known: the number that stands everywhere; None where none is known.
        constant: gives the value, where it depends on no argument; else None.
        flat: axes along which a constant is known not to vary.
        source: the argument that it is, perhaps cast, or a slice of, in scans at these locations.
    """

    labels: Labels
    removed: tuple[float | None, ...]
    known: Any = None
    constant: Lazy | None = None
    flat: frozenset[int] = frozenset()
    source: tuple[int, tuple[Location, ...]] | None = None


def fixed(shape: tuple[int, ...]) -> Labels:
    """The labels of a value of which nothing can leave."""
    return tuple(whole(n) for n in shape)


def unknown(labels: Labels) -> Value:
    """Of which only the labels are known."""
    return Value(labels, (None,) * len(labels))


def literal(number: Any) -> Value:
    """A number that stands in the program."""
    shape = np.shape(number)
    known = number if shape == () else None
    return Value(fixed(shape), (None,) * len(shape), known, Lazy(lambda: np.asarray(number)))


def numbers_of(value: Value) -> Any:
    """The numbers of a constant, where they are known now; else None."""
    return value.constant() if value.constant is not None and value.constant.known else None
