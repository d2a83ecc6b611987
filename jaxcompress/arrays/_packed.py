"""Integers of any width from 1 to 8 bits, stored as bit planes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress.arrays import _base


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["planes"], meta_fields=["shape", "signed"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Packed(_base.Sized):
    """Integers of b bits: exactly b bits each, up to the last byte of a plane.

    Attributes:
        planes: `uint8[b, ceil(n / 8)]`; plane j holds bit j of every entry in C order, eight
            to the byte, the first entry in the highest bit.
        shape: static.
        signed: static. Two's complement.
    """

    planes: jax.Array
    shape: tuple[int, ...]
    signed: bool

    @property
    def bits(self) -> int:
        """Width of an entry."""
        return self.planes.shape[0]

    @property
    def dtype(self) -> np.dtype:
        """int8 or uint8."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    def todense(self) -> jax.Array:
        """The integers, as int8 or uint8."""
        codes = jnp.zeros((self.size,), jnp.uint8)
        for j in range(self.bits):
            plane = jnp.unpackbits(self.planes[j], count=self.size)
            # The top bit of a narrow signed entry also fills the bits above it.
            top = self.signed and j == self.bits - 1
            weight = (0xFF << j) & 0xFF if top else 1 << j
            codes = codes | (plane * np.uint8(weight))
        return jax.lax.bitcast_convert_type(codes.reshape(self.shape), self.dtype)

    def __repr__(self) -> str:
        return _base.show(self, bits=self.bits)


def pack_bits(codes: jax.Array | np.ndarray, bits: int, *, signed: bool | None = None) -> Packed:
    """Packs small integers, b bits each.

    Args:
        codes: integers or booleans of any shape; concrete.
        bits: static, 1 to 8.
        signed: static. Whether they are stored in two's complement; None: where
            one of them is negative.

    Returns:
        The `Packed` array; `todense()` gives the codes back exactly.

    Raises:
        TypeError: `codes` is traced or not integer.
        ValueError: a code does not fit.

    Examples:
        >>> packed = pack_bits(np.array([-4, 3, 0, 1], np.int8), 3)
        >>> packed.nbytes, packed.todense()
        (3, Array([-4,  3,  0,  1], dtype=int8))
    """
    _base.require_concrete("pack_bits", "codes", codes)
    _check.integer("pack_bits", "bits", bits, 1, 8)
    values = np.asarray(codes)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    # NumPy knows the narrow integers of JAX (int4) only through JAX.
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(
            _check.message("pack_bits", "codes", "be integers", _check.describe(values))
        )
    if not np.issubdtype(values.dtype, np.integer):
        values = values.astype(np.int8)
    if signed is None:
        signed = bool((values < 0).any())
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if values.size and (values.min() < low or values.max() > high):
        got = f"codes from {values.min()} to {values.max()}"
        raise ValueError(_check.message("pack_bits", "codes", f"be in [{low}, {high}]", got))
    flat = values.ravel().astype(np.uint8)
    planes = np.stack([np.packbits((flat >> j) & 1) for j in range(bits)])
    return Packed(jnp.asarray(planes), values.shape, signed)
