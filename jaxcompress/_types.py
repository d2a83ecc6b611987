"""Type aliases shared by all rooms of the library."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

ArrayLike = jax.typing.ArrayLike
"""A Python number, a NumPy array or a JAX array, concrete or traced."""

Numeric = ArrayLike | Callable[[ArrayLike], ArrayLike]
"""A number, a JAX scalar (concrete or traced) or an Optax schedule of the step."""

PyTree = Any
"""Any nesting of dicts, lists, NamedTuples, Flax states, Equinox modules… of leaves."""

Shaped = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""Whatever has a shape and a dtype."""
