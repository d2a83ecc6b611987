"""Compressed arrays cut along their first axis: one layer of a stack, a row of a table."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress.arrays import _base
from jaxcompress.arrays._block import BlockSparse, unblocked
from jaxcompress.arrays._codebook import Codebook
from jaxcompress.arrays._convolutions import ConvChain, rows_of_chain
from jaxcompress.arrays._low_rank import LowRank
from jaxcompress.arrays._masked import BitMasked
from jaxcompress.arrays._nm import NM
from jaxcompress.arrays._packed import Packed
from jaxcompress.arrays._quantized import Quantized, expand_groups, group_pairs
from jaxcompress.arrays._rescaled import Rescaled
from jaxcompress.arrays._rotated import Rotated
from jaxcompress.arrays._sum import Sum, total


class Rows(NamedTuple):
    """A compressed array ready to be cut.

    Attributes:
        stacked: arrays with the first axis of the dense array in front.
        rebuild: from one slice of each of them the row: a compressed array, or a dense one
            where the row has no compressed form.
    """

    stacked: Any
    rebuild: Callable[[Any], Any]


def rows(leaf: Any) -> Rows:
    """A compressed array as the rows along its first axis, each to be rebuilt by itself.

    For every `i`, `rebuild(jax.tree.map(lambda x: x[i], stacked))` stands for
    `leaf.todense()[i]`. What all rows share (a factor, a codebook, a scale) is not copied.
    This is what `jax.lax.scan` over stacked layers and lookups in a table need.

    Args:
        leaf: a compressed array with one dimension or more. May be traced.

    Returns:
        `Rows`. Works under `jit`, `vmap` and `scan`.

    Raises:
        TypeError: `leaf` is no compressed array.
        ValueError: it has no axis to cut along.

    Cost: nothing for whole bytes. Bit planes whose rows are not whole bytes are unpacked to
    one byte an entry, and N:M arrays with groups along the first axis are decoded.

    Examples:
        >>> layers = jc.pack(jc.quantize(4), jnp.ones((3, 8, 8)))
        >>> stacked, rebuild = jc.arrays.rows(layers)
        >>> rebuild(jax.tree.map(lambda x: x[0], stacked)).shape
        (8, 8)
    """
    if not _base.is_compressed(leaf):
        raise TypeError(
            _check.message("rows", "leaf", "be a compressed array", _check.describe(leaf))
        )
    if leaf.ndim == 0:
        raise ValueError(
            _check.message("rows", "leaf", "have an axis to cut along", _check.describe(leaf))
        )
    return _rows(leaf)


def take_rows(leaf: Any, indices: jax.Array) -> jax.Array:
    """`jnp.take(leaf.todense(), indices, axis=0, mode="clip")`, decoding only those rows.

    Args:
        leaf: a compressed array with one dimension or more.
        indices: integers of any shape.

    Returns:
        Dense, of shape `indices.shape + leaf.shape[1:]`.

    Raises:
        TypeError: `leaf` is no compressed array.

    Examples:
        >>> table = jc.pack(jc.quantize(4), jnp.arange(64.0).reshape(4, 16))
        >>> jc.arrays.take_rows(table, jnp.array([2, 0])).shape
        (2, 16)
    """
    stacked, rebuild = rows(leaf)
    flat = indices.reshape(math.prod(indices.shape))
    taken = jax.tree.map(lambda x: jnp.take(x, flat, axis=0, mode="clip"), stacked)
    dense = jax.vmap(lambda row: _base.todense(rebuild(row)))(taken)
    return dense.reshape((*indices.shape, *leaf.shape[1:]))


def _rows(leaf: Any) -> Rows:
    """The same for a part: a plain array is cut as it is."""
    if not _base.is_compressed(leaf):
        return Rows(leaf, lambda row: row)
    return _CUTS[type(leaf)](leaf)


def _packed(leaf: Packed) -> Rows:
    shape = leaf.shape[1:]
    size = math.prod(shape)
    if size % 8 or not size:
        return Rows(leaf.todense(), lambda row: row)
    planes = leaf.planes.reshape((leaf.bits, leaf.shape[0], size // 8))
    return Rows(
        jnp.moveaxis(planes, 1, 0), lambda row: dataclasses.replace(leaf, planes=row, shape=shape)
    )


def _low_rank(leaf: LowRank) -> Rows:
    stacked, rebuild = _rows(leaf.u)
    if leaf.ndim > 2:
        return Rows(stacked, lambda row: LowRank(rebuild(row), leaf.v))

    def product(row):
        u, v = (_base.todense(x).astype(jnp.float32) for x in (rebuild(row), leaf.v))
        row = jnp.tensordot(u, v, axes=1, precision=jax.lax.Precision.HIGHEST)
        return row.astype(leaf.dtype)

    return Rows(stacked, product)


def _quantized(leaf: Quantized) -> Rows:
    parts = {"scale": leaf.scale, "zero_point": leaf.zero_point}
    present = {name: x for name, x in parts.items() if x is not None}
    pairs = group_pairs(leaf.group)
    first = tuple(pair for pair in pairs if pair[0] == 0)
    if first:
        # A row lies in one group: its scale is that of its group.
        present = {
            name: expand_groups(_base.todense(x), shape=leaf.shape, group=first)
            for name, x in present.items()
        }
    rest = tuple((axis - 1, size) for axis, size in pairs if axis > 0)
    group = rest if len(rest) > 1 else rest[0] if rest else None
    own = {name: _rows(x) for name, x in present.items() if x.shape[0] == leaf.shape[0]}
    shared = {name: _base.todense(x)[0] for name, x in present.items() if name not in own}

    def rebuilt(codes, row):
        mine = {name: own[name].rebuild(part) for name, part in row.items()}
        return dataclasses.replace(leaf, codes=codes, group=group, **(shared | mine))

    return _with_codes(leaf.codes, {name: cut.stacked for name, cut in own.items()}, rebuilt)


def _codebook(leaf: Codebook) -> Rows:
    return _with_codes(leaf.codes, {}, lambda codes, row: dataclasses.replace(leaf, codes=codes))


def _with_codes(codes: Any, own: dict[str, Any], rebuilt: Callable[[Any, Any], Any]) -> Rows:
    """Rows of codes, put back into what gives them their values."""
    if _base.is_sparse(codes):
        stacked, entries = _entries(codes)

        def dense(row):
            values, present = entries(row[0])
            decoded = rebuilt(values, row[1]).todense()
            return jnp.where(present, decoded, jnp.zeros((), decoded.dtype))

        return Rows((stacked, own), dense)
    stacked, rebuild = _rows(codes)
    return Rows((stacked, own), lambda row: rebuilt(rebuild(row[0]), row[1]))


def _rescaled(leaf: Rescaled) -> Rows:
    stacked, rebuild = _rows(leaf.inner)
    if leaf.scale.shape[0] == 1:
        return Rows(stacked, lambda row: Rescaled(rebuild(row), leaf.scale[0], leaf.dtype))
    return Rows((stacked, leaf.scale), lambda row: Rescaled(rebuild(row[0]), row[1], leaf.dtype))


def _rotated(leaf: Rotated) -> Rows:
    if leaf.axis == 0:
        # A row is a sum over all of them.
        return Rows(leaf.todense(), lambda row: row)
    stacked, rebuild = _rows(leaf.inner)
    return Rows(
        stacked, lambda row: dataclasses.replace(leaf, inner=rebuild(row), axis=leaf.axis - 1)
    )


def _sum(leaf: Sum) -> Rows:
    cuts = [_rows(part) for part in leaf.parts]

    def rebuilt(row):
        parts = [cut.rebuild(x) for cut, x in zip(cuts, row, strict=True)]
        if any(_base.is_compressed(part) for part in parts):
            return Sum(tuple(parts))
        return total(parts, leaf.dtype)

    return Rows(tuple(cut.stacked for cut in cuts), rebuilt)


def _sparse(leaf: Any) -> Rows:
    stacked, entries = _entries(leaf)
    return Rows(stacked, lambda row: entries(row)[0])


def _entries(leaf: Any) -> tuple[Any, Callable[[Any], tuple[jax.Array, jax.Array]]]:
    """What to cut, and from one row of it the dense entries and which of them are present."""
    if isinstance(leaf, BitMasked):
        return _masked_entries(leaf)
    if isinstance(leaf, BlockSparse):
        return _block_entries(leaf)
    if leaf.axis == 0:
        return (leaf.todense(), leaf.present()), lambda row: row
    slots = math.prod(leaf.indices.shape) // max(leaf.shape[0], 1)
    shape = (leaf.shape[0], slots)
    values, rebuild_values = _rows(_reshaped(leaf.values, shape))
    indices, rebuild_indices = _rows(_reshaped(leaf.indices, shape))

    def entries(row):
        places = rebuild_indices(row[1])
        if not _base.is_compressed(places):
            # Rows that are not whole bytes come unpacked.
            places = _Dense(places)
        cut = dataclasses.replace(
            leaf,
            values=rebuild_values(row[0]),
            indices=places,
            axis=leaf.axis - 1,
            shape=leaf.shape[1:],
        )
        return cut.todense(), cut.present()

    return (values, indices), entries


@dataclasses.dataclass(frozen=True)
class _Dense:
    """Places of slots that need no unpacking."""

    places: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape

    def todense(self) -> jax.Array:
        return self.places


def _masked_entries(leaf: BitMasked):
    stacked, rebuild = _packed(leaf.mask)
    counts = jnp.sum(leaf.present(), axis=tuple(range(1, leaf.ndim)), dtype=jnp.int32)
    before = jnp.cumsum(counts) - counts
    values = _base.todense(leaf.values)

    def entries(row):
        mask, start = row
        present = _base.todense(rebuild(mask)).astype(bool)
        if values.shape[0] == 0:
            return jnp.zeros(present.shape, values.dtype), present
        flat = present.reshape((math.prod(present.shape),)).astype(jnp.int32)
        place = (start + jnp.cumsum(flat) - 1).reshape(present.shape)
        taken = jnp.take(values, place, mode="clip")
        return jnp.where(present, taken, jnp.zeros((), values.dtype)), present

    return (stacked, before), entries


def _block_entries(leaf: BlockSparse):
    kept = leaf.mask.todense().astype(bool)
    place = (jnp.cumsum(kept.reshape((kept.size,)).astype(jnp.int32)) - 1).reshape(kept.shape)
    values, shape = _base.todense(leaf.values), leaf.shape[1:]
    cut = len(leaf.block) == leaf.ndim
    block = leaf.block[1:] if cut else leaf.block

    def entries(row):
        if cut:
            # A row of the array is one row of each block along a row of the grid.
            at, inside = row // leaf.block[0], row % leaf.block[0]
            row, slot = (place[at], kept[at]), (inside,)
        else:
            slot = ()
        mask = jnp.expand_dims(row[1], tuple(range(-len(block), 0)))
        present = unblocked(mask, block, shape)
        if 0 in values.shape:
            return jnp.zeros(shape, values.dtype), present
        taken = values.at[row[0], *slot].get(mode="clip")
        taken = jnp.where(mask, taken, jnp.zeros((), values.dtype))
        return unblocked(taken, block, shape), present

    return (jnp.arange(leaf.shape[0], dtype=jnp.int32) if cut else (place, kept)), entries


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    return dataclasses.replace(x, shape=shape) if isinstance(x, Packed) else x.reshape(shape)


_CUTS: dict[type, Callable[[Any], Rows]] = {
    Packed: _packed,
    LowRank: _low_rank,
    ConvChain: lambda leaf: Rows(*rows_of_chain(leaf)),
    Quantized: _quantized,
    Codebook: _codebook,
    Rescaled: _rescaled,
    Rotated: _rotated,
    Sum: _sum,
    BitMasked: _sparse,
    BlockSparse: _sparse,
    NM: _sparse,
}
