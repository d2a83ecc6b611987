"""Numbers of a projection: of a step, and of each leaf."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import Numeric, PyTree


def number_at(value: Numeric, step: Any) -> jax.Array:
    """The value of a number or of a schedule at `step`, as a strongly typed array."""
    value = value(step) if callable(value) else value
    value = jnp.asarray(value)
    return jax.lax.convert_element_type(value, value.dtype)


def by_leaf(
    function: str, argument: str, value: Numeric | Mapping[str, Numeric], params: PyTree
) -> dict[str, Numeric]:
    """The number of each leaf by its path: one for all, or those of a mapping.

    Raises:
        ValueError: a mapping that lacks a leaf or names one that is not there.
    """
    paths: list[str] = []
    tree.map_arrays_with_path(lambda path, w: paths.append(path), params)
    if not isinstance(value, Mapping):
        return dict.fromkeys(paths, value)
    missing, unknown = sorted(set(paths) - set(value)), sorted(set(value) - set(paths))
    if missing or unknown:
        rule = "name the chosen leaves, and only those"
        got = f"none for {missing}" if missing else f"{unknown}, which are not chosen"
        fix = "Choose leaves with jc.masked."
        raise ValueError(_check.message(function, argument, rule, got, fix))
    return dict(value)
