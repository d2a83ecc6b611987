"""The mask of a leaf: the structure that pruning finds."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays, tree
from jaxcompress._sharding import is_explicit, place_like
from jaxcompress._types import PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bits", "statistic"],
    meta_fields=["length", "nm", "axis", "block"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which entries of a leaf live, one bit each. `Mask.of(keep)` makes one.

    Attributes:
        bits: uint8, the shape of the leaf with eight entries of its last axis in a byte, the
            first in the lowest bit. Of a scalar leaf one byte, 0 or 1.
        length: static. Of the last axis of the leaf; None: the leaf is a scalar.
        nm: static. `(n, m)` when at most n of each m entries along `axis` are kept.
        axis: static. Counted from the front; None without `nm`.
        statistic: what a `RunningScore` has gathered, of its own types; None without one.
        block: static. Of the groups that live together, one size for each axis; None: single
            weights.
    """

    bits: jax.Array
    length: int | None
    nm: tuple[int, int] | None = None
    axis: int | None = None
    statistic: Any = None
    block: tuple[int, ...] | None = None

    @classmethod
    def of(cls, keep: jax.Array, **fields: Any) -> "Mask":
        """The mask that keeps where `keep`, bool of the shape of the leaf, is true."""
        keep = jnp.asarray(keep)
        return cls(_pack_bits(keep), keep.shape[-1] if keep.ndim else None, **fields)

    @property
    def keep(self) -> jax.Array:
        """`bool`, the shape of the leaf; fused into what reads it under `jit`."""
        return _unpack_bits(self.bits, self.length)

    def keep_like(self, w: jax.Array) -> jax.Array:
        """`keep`, sharded as the leaf `w`."""
        return place_like(self.keep, w)

    @property
    def nbytes(self) -> int:
        """Of the bits; 1/32 of a float32 leaf whose last axis is a multiple of 8."""
        return tree.nbytes(self.bits)

    def project(self, w: jax.Array) -> jax.Array:
        """Zero where not kept, also where the dropped entry is NaN or infinite."""
        return jnp.where(self.keep_like(w), w, jnp.zeros((), w.dtype))

    def pack(self, w: Any, path: str) -> Any:
        """The non-zero entries and where they are; of a coded leaf, the codes of those."""
        del path
        dense = self.project(arrays.todense(w))
        present = dense != 0
        if not isinstance(w, (arrays.Quantized, arrays.Codebook)):
            return self._sparse(dense, present)
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


def keeps_by_path(params: PyTree, masks: PyTree) -> dict[str, jax.Array]:
    """From the path of each leaf to what its mask keeps."""
    out: dict[str, jax.Array] = {}
    tree.map_arrays_with_path(
        lambda path, w, mask: out.update({path: mask.keep_like(w)}), params, masks
    )
    return out


def _pack_bits(keep: jax.Array) -> jax.Array:
    if keep.ndim == 0:
        return keep.astype(jnp.uint8)
    if is_explicit(keep):
        packed: Any = jax.sharding.auto_axes(_pack_bits, out_sharding=_of_bytes(keep))
        return packed(keep)
    *rest, length = keep.shape
    count = -(-length // 8)
    whole = jnp.pad(keep, [(0, 0)] * len(rest) + [(0, 8 * count - length)])
    eights = whole.reshape(*rest, count, 8).astype(jnp.uint8)
    return jnp.sum(eights << _places(keep.ndim), -1, dtype=jnp.uint8)


def _unpack_bits(bits: jax.Array, length: int | None) -> jax.Array:
    if length is None:
        return bits.astype(bool)
    if is_explicit(bits):
        spread = functools.partial(_unpack_bits, length=length)
        spec = jax.sharding.PartitionSpec(*jax.typeof(bits).sharding.spec[:-1], None)
        unpacked: Any = jax.sharding.auto_axes(spread, out_sharding=spec)
        return unpacked(bits)
    *rest, count = bits.shape
    eights = (bits[..., None] >> _places(bits.ndim)) & np.uint8(1)
    return eights.reshape(*rest, 8 * count)[..., :length].astype(bool)


def _places(ndim: int) -> jax.Array:
    return jnp.arange(8, dtype=jnp.uint8).reshape((1,) * ndim + (8,))


def _of_bytes(keep: jax.Array) -> jax.sharding.PartitionSpec:
    """That of `keep`, where bytes of its last axis can be: whole bytes on each device."""
    sharding = jax.typeof(keep).sharding
    *rest, last = sharding.spec
    names = () if last is None else last if isinstance(last, tuple) else (last,)
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    return jax.sharding.PartitionSpec(*rest, last if keep.shape[-1] % (8 * devices) == 0 else None)
