"""Compressed arrays on their way to the equation that uses them."""

import dataclasses
import functools
from typing import Any

import jax


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
