"""Products of two thin factors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import _base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(_base.Sized):
    """An array of low rank, `u @ v`: the product in float32, cast to the dtype of `u`.

    Attributes:
        u: `[*shape[:-1], rank]`, an array or `Quantized`.
        v: `[rank, shape[-1]]`, an array or `Quantized`.
    """

    u: Any
    v: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the product."""
        return (*self.u.shape[:-1], *self.v.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """That of `u`."""
        return self.u.dtype

    @property
    def rank(self) -> int:
        """Number of columns of `u`."""
        return self.v.shape[0]

    def todense(self) -> jax.Array:
        """The product."""
        u, v = (_base.todense(x).astype(jnp.float32) for x in (self.u, self.v))
        product = jnp.tensordot(u, v, axes=1, precision=jax.lax.Precision.HIGHEST)
        return product.astype(self.dtype)

    def __repr__(self) -> str:
        return _base.show(self, rank=self.rank)
