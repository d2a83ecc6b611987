"""Arrays that are held with a factor on each feature."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxcompress._dtypes import wide
from jaxcompress.arrays import _base


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["inner", "scale"], meta_fields=["dtype"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Rescaled(_base.Sized):
    r"""An array :math:`w = f \cdot v`, the product in float32 or wider, cast to `dtype`.

    Where f differs only along axes that a product sums over, `jc.lift` multiplies the activations
    with it: :math:`x w = (x f)\,v`. Then v may be codes, whose product is one of integers.

    Attributes:
        inner: v, an array or a compressed array.
        scale: f, float32, of the rank of v, of size 1 along shared axes.
        dtype: static. That of the dense array.
    """

    inner: Any
    scale: jax.Array
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of what is inside."""
        return self.inner.shape

    def todense(self) -> jax.Array:
        """The dense array."""
        return rescale(wide_dense(self.inner), self.scale).astype(self.dtype)

    def __repr__(self) -> str:
        return _base.show(self, inner=self.inner)


def rescale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The product with a factor of the same rank, in float32 or wider."""
    x = wide(x)
    return x * scale.astype(x.dtype)


def wide_dense(x: Any) -> jax.Array:
    """A part made dense: an array, a compressed array, or a view of one."""
    return wide(x.todense() if hasattr(type(x), "todense") else x)
