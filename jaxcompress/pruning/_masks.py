"""The mask of a leaf: the structure that pruning finds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import arrays, tree
from jaxcompress._types import PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keep", "statistic"],
    meta_fields=["nm", "axis", "block"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which entries of a leaf live.

    Attributes:
        keep: `bool`, the shape of the leaf.
        nm: static. `(n, m)` when at most n of each m entries along `axis` are kept.
        axis: static. Counted from the front; None without `nm`.
        statistic: what a `RunningScore` has gathered, of its own types; None without one.
        block: static. Of the groups that live together, one size for each axis; None: single
            weights.
    """

    keep: jax.Array
    nm: tuple[int, int] | None = None
    axis: int | None = None
    statistic: Any = None
    block: tuple[int, ...] | None = None

    def project(self, w: jax.Array) -> jax.Array:
        """Zero where not kept, also where the dropped entry is NaN or infinite."""
        return jnp.where(self.keep, w, jnp.zeros((), w.dtype))

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
    tree.map_arrays_with_path(lambda path, w, mask: out.update({path: mask.keep}), params, masks)
    return out
