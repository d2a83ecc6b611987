"""Integers with scales and zero points."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import _base


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero_point"],
    meta_fields=["dtype", "group", "binary"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Quantized(_base.Sized):
    r"""A quantized array, :math:`(c - z)\,\Delta` in float32, cast to `dtype`.

    Where the codes are sparse, an absent one stands for the value 0, whatever the zero point.

    Attributes:
        codes: :math:`c`, an int8 or uint8 array, `Packed`, or a sparse array of codes.
        scale: :math:`\Delta`, float32, of the rank of the codes, of size 1 along shared axes.
        zero_point: :math:`z`, uint8 of the shape of `scale`, or None for 0.
        dtype: static. That of the dense array.
        group: static. `(axis, size)`: along that axis one scale serves `size` consecutive
            entries, and the last one what is left. None for no groups.
        binary: static. The codes 0 and 1 stand for -1 and 1.
    """

    codes: Any
    scale: jax.Array
    zero_point: jax.Array | None
    dtype: np.dtype
    group: tuple[int, int] | None = None
    binary: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes."""
        return self.codes.shape

    def todense(self) -> jax.Array:
        """The dense array."""
        steps = _base.todense(self.codes).astype(jnp.float32)
        if self.binary:
            steps = 2.0 * steps - 1.0
        if self.zero_point is not None:
            steps = steps - self._expand(self.zero_point).astype(jnp.float32)
        if _base.is_sparse(self.codes):
            steps = jnp.where(self.codes.present(), steps, 0.0)
        return (steps * self._expand(self.scale)).astype(self.dtype)

    def _expand(self, x: jax.Array) -> jax.Array:
        return expand_groups(x, shape=self.shape, group=self.group)

    def __repr__(self) -> str:
        return _base.show(
            self, codes=self.codes if _base.is_compressed(self.codes) else self.codes.dtype
        )


def expand_groups(
    scale: jax.Array, *, shape: tuple[int, ...], group: tuple[int, int] | None
) -> jax.Array:
    """One entry per group as one entry per index of the grouped axis.

    Args:
        scale: one entry per group along the grouped axis.
        shape: static. That of the dense array.
        group: static. `(axis, size)`, or None: then `scale` is returned.
    """
    if group is None:
        return scale
    axis, size = group
    return jax.lax.slice_in_dim(jnp.repeat(scale, size, axis=axis), 0, shape[axis], axis=axis)
