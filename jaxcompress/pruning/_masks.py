"""The mask of a leaf: the structure that pruning finds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import arrays, tree
from jaxcompress._sharding import place_like
from jaxcompress.pruning._bits import axis_of_bytes, pack_bits, unpack_bits


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bits", "statistic"],
    meta_fields=["length", "along", "nm", "axis", "block"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which entries of a leaf live, one bit each. `Mask.of(keep)` makes one.

    Attributes:
        bits: uint8, the shape of the leaf with eight entries of the axis `along` in a byte, the
            first in the lowest bit. Of a scalar leaf one byte, 0 or 1.
        length: static. Of the axis `along` of the leaf; None: the leaf is a scalar.
        along: static. -2, the axis before the last, where eight divide its length; else -1.
        nm: static. `(n, m)` when at most n of each m entries along `axis` are kept.
        axis: static. Counted from the front; None without `nm`.
        statistic: what a `RunningScore` has gathered, of its own types; None without one.
        block: static. Of the groups that live together, one size for each axis; None: single
            weights.
    """

    bits: jax.Array
    length: int | None
    along: int = -1
    nm: tuple[int, int] | None = None
    axis: int | None = None
    statistic: Any = None
    block: tuple[int, ...] | None = None

    @classmethod
    def of(cls, keep: jax.Array, **fields: Any) -> "Mask":
        """The mask that keeps where `keep`, bool of the shape of the leaf, is true."""
        keep = jnp.asarray(keep)
        if keep.ndim == 0:
            return cls(keep.astype(jnp.uint8), None, **fields)
        along = axis_of_bytes(keep.shape)
        return cls(pack_bits(keep, along), keep.shape[along], along, **fields)

    @property
    def keep(self) -> jax.Array:
        """`bool`, the shape of the leaf; fused into what reads it under `jit`."""
        if self.length is None:
            return self.bits.astype(bool)
        return unpack_bits(self.bits, self.along, self.length)

    def keep_like(self, w: jax.Array) -> jax.Array:
        """`keep`, sharded as the leaf `w`."""
        return place_like(self.keep, w)

    @property
    def nbytes(self) -> int:
        """Of the bits; 1/32 of a float32 leaf where eight divide one of its last two axes."""
        return tree.nbytes(self.bits)

    def project(self, w: jax.Array) -> jax.Array:
        """Zero where not kept, also where the dropped entry is NaN or infinite."""
        return jnp.where(self.keep_like(w), w, jnp.zeros((), w.dtype))

    def pack(self, w: Any, path: str) -> Any:
        """The non-zero entries and where they are; of a coded leaf, the codes of those."""
        dense = self.project(arrays.todense(w))
        present = dense != 0
        if not isinstance(w, (arrays.Quantized, arrays.Codebook)):
            return self._sparse(dense, present)
        if isinstance(w.codes, arrays.Codebook):
            # Codes of a table inside of scales: the scales stay as they are.
            return dataclasses.replace(w, codes=self.pack(w.codes, path))
        codes = arrays.todense(w.codes)
        bits = w.codes.bits if isinstance(w.codes, arrays.Packed) else None
        pattern = self._sparse(codes, present)
        if isinstance(w, arrays.Codebook) or w.binary:
            pattern = arrays.restrict(pattern, present)
        return dataclasses.replace(w, codes=arrays.with_entries(pattern, codes, bits=bits))

    def _sparse(self, dense: jax.Array, present: jax.Array) -> Any:
        block = self.block or ()
        # Indices of leading axes are blocks of their own.
        while block and block[0] == 1:
            block = block[1:]
        if block:
            return arrays.block_sparse(dense, present, block=block)
        if self.nm is None or self.axis is None:
            return arrays.bit_mask(dense, present)
        n, m = self.nm
        return arrays.n_m(dense, present, n=n, m=m, axis=self.axis)
