"""Integers or narrow floats with scales and zero points."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import _base

Groups = tuple[int, int] | tuple[tuple[int, int], ...] | None
"""`(axis, size)`, or several, where a scale serves `size` consecutive entries; None: nowhere."""


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
        codes: :math:`c`, an int8, uint8, float8_e4m3fn or float8_e5m2 array, `Packed`, a sparse
            array of one of these; or, without a zero point, a float32 `Codebook`, whose values
            the scales then multiply.
        scale: :math:`\Delta`, of the rank of the codes, of size 1 along shared axes: float32,
            bfloat16 or float8_e8m0fnu, or itself a `Quantized` array of dtype float32.
        zero_point: :math:`z`, integers or float32 of the shape of `scale`, or None for 0.
        dtype: static. That of the dense array.
        group: static. `(axis, size)`: along that axis one scale serves `size` consecutive
            entries, and the last one what is left. Several such pairs for blocks. None for no
            groups.
        binary: static. The codes 0 and 1 stand for -1 and 1.
    """

    codes: Any
    scale: Any
    zero_point: jax.Array | None
    dtype: np.dtype
    group: Groups = None
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
        scale = _base.todense(self.scale).astype(jnp.float32)
        return (steps * self._expand(scale)).astype(self.dtype)

    def _expand(self, x: jax.Array) -> jax.Array:
        return expand_groups(x, shape=self.shape, group=self.group)

    def __repr__(self) -> str:
        return _base.show(
            self, codes=self.codes if _base.is_compressed(self.codes) else self.codes.dtype
        )


def expand_groups(scale: jax.Array, *, shape: tuple[int, ...], group: Groups) -> jax.Array:
    """One entry per group as one entry per index of the grouped axes.

    Args:
        scale: one entry per group along each grouped axis.
        shape: static. That of the dense array.
        group: static. `(axis, size)`, several of these, or None: then `scale` is returned.

    Examples:
        >>> jc.arrays.expand_groups(jnp.array([1.0, 2.0]), shape=(5,), group=(0, 3))
        Array([1., 1., 1., 2., 2.], dtype=float32)
    """
    for axis, size in group_pairs(group):
        scale = jnp.repeat(scale, size, axis=axis)
        scale = jax.lax.slice_in_dim(scale, 0, shape[axis], axis=axis)
    return scale


def group_pairs(group: Groups) -> tuple[tuple[int, int], ...]:
    """The groups of a `Quantized` array as pairs of an axis and a size.

    Examples:
        >>> group_pairs((0, 128)), group_pairs(((0, 128), (1, 128))), group_pairs(None)
        (((0, 128),), ((0, 128), (1, 128)), ())
    """
    if group is None:
        return ()
    return group if not group or isinstance(group[0], tuple) else (group,)  # pyright: ignore[reportReturnType]
