"""Indices into a few shared values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _sharding
from jaxcompress.arrays import _base


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "values"], meta_fields=["dtype"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Codebook(_base.Sized):
    """An array whose entries share a few values: `values[codes]`, cast to `dtype`.

    Where the codes are sparse, an absent one stands for the value 0.

    Attributes:
        codes: a uint8 array, `Packed`, or a sparse array of codes.
        values: float32, one dimension.
        dtype: static. That of the dense array.
    """

    codes: Any
    values: jax.Array
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes."""
        return self.codes.shape

    def todense(self) -> jax.Array:
        """The dense array."""
        if self.values.shape[0] == 0:
            return jnp.zeros(self.shape, self.dtype)
        codes = _base.todense(self.codes).astype(jnp.int32)
        dense = _sharding.automatic(_look_up, codes, self.values, like_first=True)
        if _base.is_sparse(self.codes):
            dense = jnp.where(self.codes.present(), dense, 0.0)
        return dense.astype(self.dtype)

    def __repr__(self) -> str:
        codes = self.codes if _base.is_compressed(self.codes) else self.codes.dtype
        return _base.show(self, values=self.values.shape[0], codes=codes)


def _look_up(codes: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.take(values, codes, mode="clip")
