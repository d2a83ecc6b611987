"""Compressed arrays on their way to the equation that uses them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

ARITHMETIC = frozenset("add sub mul div max min".split())
"""Elementwise operations, which decode a weight that has codes."""

KEPT = frozenset("copy copy_p name sharding_constraint reshard mesh_cast".split())
"""Operations that leave a weight as it is."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["path"])
@dataclasses.dataclass(frozen=True)
class Weight:
    """A compressed parameter, or a view of it.

    Attributes:
        value: the compressed array.
        path: static. That of the leaf, for errors.
    """

    value: Any
    path: str


def part_by_part(value: Any, name: str, run: Callable[..., Any]) -> Any:
    """What an equation makes of a value all of whose arrays it takes alike; None: it does not.

    Args:
        value: a compressed array, or a view of one.
        name: of the primitive.
        run: `values -> (results, records)`, the equation on dense values.
    """
    if name in KEPT:
        return value
    if name in ("pvary", "pcast", "pbroadcast"):
        return jax.tree.map(lambda part: run([part])[0][0], value)
    if name == "stop_gradient":
        return jax.tree.map(jax.lax.stop_gradient, value)
    return None
