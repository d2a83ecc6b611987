"""Arrays that were concatenated, compressed ones among them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class Joined:
    """Arrays side by side.

    Attributes:
        parts: compressed arrays, views of them, or plain arrays.
        axis: static. The axis along which they lie.
    """

    parts: list[Any]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the whole."""
        return self.parts[0].dtype

    def todense(self) -> jax.Array:
        """The whole, dense."""
        dense = [p.todense() if hasattr(type(p), "todense") else p for p in self.parts]
        return jnp.concatenate(dense, axis=self.axis)
