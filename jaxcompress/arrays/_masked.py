"""Unstructured sparse arrays: the kept entries, and one bit per entry that says where."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress.arrays import _base
from jaxcompress.arrays._packed import Packed, pack_bits


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "mask"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class BitMasked(_base.Sparse):
    """A sparse array with any pattern.

    Attributes:
        values: the kept entries in C order, one dimension; an array or `Packed`.
        mask: `Packed` of one bit, of the dense shape.
        shape: static.
    """

    values: Any
    mask: Packed
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """That of the values."""
        return self.values.dtype

    def present(self) -> jax.Array:
        """`bool`, the dense shape: which entries are kept."""
        return self.mask.todense().astype(bool)

    def todense(self) -> jax.Array:
        """The dense array, zero where nothing is kept."""
        present, values = self.present(), _base.todense(self.values)
        if values.shape[0] == 0:
            return jnp.zeros(self.shape, self.dtype)
        place = jnp.cumsum(present.reshape(self.size).astype(jnp.int32)) - 1
        taken = jnp.take(values, place, mode="clip").reshape(self.shape)
        return jnp.where(present, taken, jnp.zeros((), self.dtype))

    def __repr__(self) -> str:
        return _base.show(self, kept=self.values.shape[0])


def bit_mask(dense: jax.Array | np.ndarray, present: jax.Array | np.ndarray) -> BitMasked:
    """Stores the entries of `dense` where `present`.

    Args:
        dense: any shape and dtype; concrete.
        present: `bool`, the same shape.

    Returns:
        The `BitMasked` array. Entries that are not present are lost.

    Raises:
        TypeError: an argument is traced.
        ValueError: the shapes differ.

    Examples:
        >>> bit_mask(np.array([0.0, 2.0, 0.0]), np.array([False, True, False]))
        BitMasked(float32[3], kept=1, nbytes=5)
    """
    _base.require_concrete("bit_mask", "dense", dense, present)
    require_same_shape("bit_mask", dense, present)
    keep = np.asarray(present, bool)
    values = jnp.asarray(np.asarray(dense)[keep])
    return BitMasked(values, pack_bits(keep, 1, signed=False), keep.shape)


def require_same_shape(function: str, dense: Any, present: Any) -> None:
    """Refuses a mask of another shape."""
    if np.shape(dense) != np.shape(present):
        raise ValueError(
            _check.message(
                function, "present", f"have the shape {np.shape(dense)}", np.shape(present)
            )
        )
