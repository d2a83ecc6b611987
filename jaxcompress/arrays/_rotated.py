"""Arrays that are held rotated by a randomized Hadamard transform."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxcompress import _sharding
from jaxcompress._dtypes import wide
from jaxcompress.arrays import _base
from jaxcompress.arrays._hadamard import hadamard
from jaxcompress.arrays._rescaled import wide_dense


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inner", "signs"],
    meta_fields=["axis", "order", "dtype"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Rotated(_base.Sized):
    r"""An array :math:`w = R^\top v`, in float32 or wider, cast to `dtype`.

    .. math:: R = \tfrac{1}{\sqrt b}\,(I \otimes H_b)\,\operatorname{diag}(s)

    along one axis, with random signs s and the Hadamard matrices of `jc.arrays.hadamard`. R is
    orthogonal, so where a product sums over that axis `jc.lift` rotates the activations:
    :math:`x w = (R x)\,v`.

    Attributes:
        inner: v, an array or a compressed array.
        signs: s, int8 of the size of the axis.
        axis: static. Counted from the front.
        order: static. b, the order of the Hadamard matrices, which divides the size.
        dtype: static. That of the dense array.
    """

    inner: Any
    signs: jax.Array
    axis: int
    order: int
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of what is inside."""
        return self.inner.shape

    def todense(self) -> jax.Array:
        """The dense array."""
        dense = rotate_back(wide_dense(self.inner), self.signs, self.axis, self.order)
        return dense.astype(self.dtype)

    def __repr__(self) -> str:
        return _base.show(self, axis=self.axis, order=self.order, inner=self.inner)


def rotate(x: jax.Array, signs: jax.Array, axis: int, order: int) -> jax.Array:
    r""":math:`R x` along an axis, in float32 or wider.

    Args:
        x: any shape.
        signs: of the size of the axis.
        axis: static.
        order: static. Order of the Hadamard matrices.
    """

    def f(x, signs):
        x = wide(x)
        return hadamard(x * _along(signs, x, axis), axis=axis, order=order)

    return _sharding.automatic(f, x, signs, like_first=True)


def rotate_back(x: jax.Array, signs: jax.Array, axis: int, order: int) -> jax.Array:
    r""":math:`R^\top x`, the inverse of `rotate`."""

    def f(x, signs):
        x = hadamard(wide(x), axis=axis, order=order, transpose=True)
        return x * _along(signs, x, axis)

    return _sharding.automatic(f, x, signs, like_first=True)


def _along(signs: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return signs.astype(x.dtype).reshape(shape)
