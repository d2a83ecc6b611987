"""Running array code that has no rule for explicitly sharded axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def automatic(f: Callable[..., Any], *arrays: jax.Array, like_first: bool) -> Any:
    """`f(*arrays)`, with the axes of an Explicit mesh left to the compiler inside `f`.

    Decompositions, sorts and gathers have no explicit sharding rule; under an Auto mesh or
    none this is a plain call.

    Args:
        f: any function of arrays.
        *arrays: its arguments.
        like_first: static. The results are sharded like the first array; otherwise
            they are replicated.
    """
    sharding = getattr(jax.typeof(arrays[0]), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in getattr(mesh, "axis_types", ()):
        return f(*arrays)
    out = sharding if like_first else PartitionSpec()
    return jax.sharding.auto_axes(f, out_sharding=out)(*arrays)
