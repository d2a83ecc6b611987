"""N:M sparse arrays: n slots for each m entries, and where in the group each slot belongs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress.arrays import _base
from jaxcompress.arrays._block import BlockSparse, block_sparse
from jaxcompress.arrays._masked import BitMasked, bit_mask, require_same_shape
from jaxcompress.arrays._packed import Packed, pack_bits


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "indices"],
    meta_fields=["n", "m", "axis", "shape"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class NM(_base.Sparse):
    """A sparse array with at most n entries in each run of m along an axis.

    The slots are those of an array whose `axis` is moved to the end and cut into groups,
    `[..., groups, n]`, in C order. Where fewer than n entries of a group were kept, the slots
    left over hold others of its entries (zeros, when weights were pruned), or point beyond the
    end in the last group of an axis that m does not divide.

    Attributes:
        values: the slots, one dimension; an array or `Packed`.
        indices: `Packed`, the place of each slot in its group, `ceil(log2(m))` bits (at least 1).
        n: static.
        m: static.
        axis: static. Counted from the front.
        shape: static.
    """

    values: Any
    indices: Packed
    n: int
    m: int
    axis: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """That of the values."""
        return self.values.dtype

    def present(self) -> jax.Array:
        """`bool`, the dense shape: which entries have a slot."""
        return self._spread(jnp.ones(self.indices.shape, bool))

    def todense(self) -> jax.Array:
        """The dense array, zero where nothing is kept."""
        return self._spread(_base.todense(self.values))

    def _spread(self, slots: jax.Array) -> jax.Array:
        moved, groups = _moved_shape(self.shape, self.axis, self.m)
        slots = slots.reshape((*moved[:-1], groups, self.n))
        place = self.indices.todense().reshape(slots.shape)
        out = jnp.zeros((*moved[:-1], groups, self.m), slots.dtype)
        # Each entry takes its slot by comparison: faster than a scatter where m is small.
        member = jnp.arange(self.m, dtype=place.dtype).reshape((1,) * (out.ndim - 1) + (self.m,))
        for i in range(self.n):
            hit = place[..., i : i + 1] == member
            out = jnp.where(hit, slots[..., i : i + 1], out)
        flat = out.reshape((*moved[:-1], groups * self.m))[..., : moved[-1]]
        return jnp.moveaxis(flat, -1, self.axis)

    def __repr__(self) -> str:
        return _base.show(self, n=self.n, m=self.m)


def n_m(
    dense: jax.Array | np.ndarray, present: jax.Array | np.ndarray, *, n: int, m: int, axis: int
) -> NM:
    """Stores the entries of `dense` where `present`, n slots for each m along an axis.

    Args:
        dense: any shape with the axis, any dtype; concrete.
        present: `bool`, the same shape.
        n: static. Slots per group.
        m: static. Length of a group, 1 to 256; the last group may be shorter.
        axis: static.

    Returns:
        The `NM` array. Entries that are not present become zero.

    Raises:
        TypeError: an argument is traced.
        ValueError: the shapes differ, or a group has more than n present.

    Examples:
        >>> keep = np.array([True, False, False, True])
        >>> n_m(np.array([1, 0, 0, 2], np.int32), keep, n=2, m=4, axis=0)
        NM(int32[4], n=2, m=4, nbytes=10)
    """
    _base.require_concrete("n_m", "dense", dense, present)
    require_same_shape("n_m", dense, present)
    _check.integer("n_m", "m", m, 1, 256)
    _check.integer("n_m", "n", n, 0, m)
    axis = _check.axis("n_m", "axis", axis, np.ndim(dense))
    values = jnp.asarray(dense)
    shape, (moved, groups) = values.shape, _moved_shape(values.shape, axis, m)
    padding = [(0, 0)] * (len(shape) - 1) + [(0, groups * m - shape[axis])]

    def grouped(x):
        x = np.pad(np.moveaxis(np.asarray(x), axis, -1), padding)
        return x.reshape((*moved[:-1], groups, m))

    keep, entries = grouped(np.asarray(present, bool)), grouped(values)
    most = int(keep.sum(-1).max(initial=0))
    if most > n:
        raise ValueError(_check.message("n_m", "present", f"keep at most {n} of each {m}", most))
    # Present entries first, in order; then others, which fill the unused slots.
    place = np.argsort(~keep, axis=-1, kind="stable")[..., :n]
    used = np.take_along_axis(keep, place, -1)
    slots = np.where(used, np.take_along_axis(entries, place, -1), np.zeros((), entries.dtype))
    bits = max(1, (m - 1).bit_length())
    indices = pack_bits(place.ravel().astype(np.uint8), bits, signed=False)
    return NM(jnp.asarray(slots.ravel()), indices, n, m, axis, shape)


Pattern = BitMasked | BlockSparse | NM


def with_entries(
    pattern: Pattern,
    dense: jax.Array | np.ndarray,
    *,
    bits: int | None = None,
    signed: bool | None = None,
) -> Pattern:
    """The pattern of a sparse array with other entries, as codes instead of weights.

    Args:
        pattern: where entries are kept.
        dense: the new entries, of the dense shape of `pattern`; any dtype.
        bits: static. Packs the values to this width where it is below 8; None does not.
        signed: static. See `pack_bits`.

    Returns:
        An array of the class of `pattern`.

    Raises:
        TypeError: an argument is traced, or `pattern` is not sparse.
        ValueError: the shapes differ, or an entry does not fit `bits`.

    Examples:
        >>> mask = bit_mask(np.array([0.0, 2.5, 0.0]), np.array([False, True, False]))
        >>> with_entries(mask, np.array([0, 3, 0], np.uint8), bits=2).todense()
        Array([0, 3, 0], dtype=uint8)
    """
    _require_pattern("with_entries", pattern, dense)
    if np.shape(dense) != pattern.shape:
        rule = f"have the shape {pattern.shape}"
        raise ValueError(_check.message("with_entries", "dense", rule, np.shape(dense)))
    if isinstance(pattern, BitMasked):
        out = bit_mask(dense, pattern.present())
    elif isinstance(pattern, BlockSparse):
        out = block_sparse(dense, pattern.present(), block=pattern.block)
    else:
        out = n_m(dense, pattern.present(), n=pattern.n, m=pattern.m, axis=pattern.axis)
    if bits is None or bits >= 8:
        return out
    return dataclasses.replace(out, values=pack_bits(out.values, bits, signed=signed))


def restrict(pattern: Pattern, present: jax.Array) -> Pattern:
    """The pattern where it keeps exactly what is present, else a bit mask that does.

    For codes that have none for zero: they can't fill the slots that `NM` has left over, nor
    the rest of a block.

    Args:
        pattern: a sparse array.
        present: `bool`, its dense shape; concrete.

    Raises:
        TypeError: an argument is traced, or `pattern` is not sparse.
        ValueError: the shapes differ.
    """
    _require_pattern("restrict", pattern, present)
    require_same_shape("restrict", pattern, present)
    if bool((pattern.present() == present).all()):
        return pattern
    return bit_mask(present, present)


def _require_pattern(function: str, pattern: Any, entries: Any) -> None:
    if not _base.is_sparse(pattern):
        rule = "be a BitMasked, BlockSparse or NM array"
        raise TypeError(_check.message(function, "pattern", rule, _check.describe(pattern)))
    _base.require_concrete(function, "pattern", entries, *jax.tree.leaves(pattern))


def _moved_shape(shape: tuple[int, ...], axis: int, m: int) -> tuple[tuple[int, ...], int]:
    """The shape with the axis at the end, and the number of groups along it."""
    return (*shape[:axis], *shape[axis + 1 :], shape[axis]), -(-shape[axis] // m)
