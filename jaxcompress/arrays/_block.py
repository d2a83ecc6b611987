"""Block-sparse arrays: the kept blocks, and one bit per block that says where."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress.arrays import _base
from jaxcompress.arrays._masked import require_same_shape
from jaxcompress.arrays._packed import Packed, pack_bits


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "mask"],
    meta_fields=["block", "shape"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class BlockSparse(_base.Sparse):
    """A sparse array whose entries are kept or lost a block at a time.

    The last `len(block)` axes are cut into blocks; each index of the axes before them has
    blocks of its own. The grid has the shape `[*leading axes, ceil(size / block) of the others]`.

    Attributes:
        values: `[kept, *block]`, the kept blocks in C order of the grid; an array or `Packed`.
            Blocks at the end of an axis that `block` does not divide are filled up with
            zeros, and what stands there counts for nothing.
        mask: `Packed` of one bit, of the shape of the grid.
        block: static. No longer than the axes that it cuts.
        shape: static.
    """

    values: Any
    mask: Packed
    block: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """That of the values."""
        return self.values.dtype

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return grid_of(self.shape, self.block)

    def present(self) -> jax.Array:
        """`bool`, the dense shape: which entries lie in a kept block."""
        kept = self.mask.todense().astype(bool)
        return unblocked(jnp.expand_dims(kept, _last(self.block)), self.block, self.shape)

    def places(self) -> tuple[jax.Array, ...]:
        """Where the blocks of `values` lie in the grid: an index for each of its axes."""
        kept = self.mask.todense().astype(bool)
        return jnp.nonzero(kept, size=self.values.shape[0], fill_value=0)

    def todense(self) -> jax.Array:
        """The dense array, zero where nothing is kept."""
        values = _base.todense(self.values)
        if 0 in values.shape:
            return jnp.zeros(self.shape, self.dtype)
        lead = len(self.shape) - len(self.block)
        sizes: list[int] = list(self.grid[:lead])
        at: list[Any] = list(self.places())
        for i, size in enumerate(self.block):
            sizes += [self.grid[lead + i], size]
            at.insert(lead + 2 * i + 1, slice(None))
        # Whole rows of blocks are written where they belong: several times faster on CPU than
        # a gather, which looks up every entry.
        out = jnp.zeros(sizes, self.dtype).at[tuple(at)].set(values, unique_indices=True)
        return _merged(out, self.block, self.shape)

    def __repr__(self) -> str:
        return _base.show(self, block=self.block, kept=self.values.shape[0])


def block_sparse(
    dense: jax.Array | np.ndarray, present: jax.Array | np.ndarray, *, block: Sequence[int]
) -> BlockSparse:
    """Stores the blocks of `dense` that have an entry where `present`.

    Args:
        dense: any shape and dtype; concrete.
        present: `bool`, the same shape.
        block: static. Sizes of a block along as many of the last axes; the last blocks may be
            smaller, and none is longer than its axis.

    Returns:
        The `BlockSparse` array. Entries that are not present become zero.

    Raises:
        TypeError: an argument is traced, or `block` is no sequence of integers.
        ValueError: the shapes differ, or `block` has no axis, too many, or one below 1.

    Examples:
        >>> dense = np.diag(np.float32([1, 2, 3, 4, 5]))
        >>> block_sparse(dense, dense != 0, block=(2, 2))
        BlockSparse(float32[5, 5], block=(2, 2), kept=3, nbytes=50)

    Source: Gray et al. 2017, "GPU kernels for block-sparse weights"; Narang et al. 2017,
    arXiv:1711.02782. Differs: bits instead of indices say where.
    """
    _base.require_concrete("block_sparse", "dense", dense, present)
    require_same_shape("block_sparse", dense, present)
    values = jnp.asarray(dense)
    shape, block = values.shape, _require_block(block, np.ndim(dense))
    lead = len(shape) - len(block)
    block = tuple(min(b, max(n, 1)) for b, n in zip(block, shape[lead:], strict=True))
    keep = np.asarray(present, bool)
    entries = np.where(keep, np.asarray(values), np.zeros((), values.dtype))
    kept = np.any(_blocked(keep, block), _last(block))
    return BlockSparse(
        jnp.asarray(_blocked(entries, block)[kept]), pack_bits(kept, 1, signed=False), block, shape
    )


def grid_of(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Number of blocks along each axis; axes before those of `block` keep their size."""
    lead = len(shape) - len(block)
    return shape[:lead] + tuple(-(-n // b) for n, b in zip(shape[lead:], block, strict=True))


def unblocked(blocks: jax.Array, block: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """From blocks `[*grid, *block]`, of size 1 where all entries of one agree, to the array."""
    lead, grid = len(shape) - len(block), grid_of(shape, block)
    blocks = jnp.broadcast_to(blocks, grid + block)
    order = [*range(lead)]
    for i in range(len(block)):
        order += [lead + i, len(grid) + i]
    return _merged(blocks.transpose(order), block, shape)


def _merged(x: jax.Array, block: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """`[*lead, grid, block, grid, block, …]` as the array; what fills up the ends is cut off."""
    lead = len(shape) - len(block)
    whole = [g * b for g, b in zip(grid_of(shape, block)[lead:], block, strict=True)]
    x = x.reshape((*shape[:lead], *whole))
    return jax.lax.slice(x, (0,) * x.ndim, shape)


def _blocked(x: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """The array as blocks `[*grid, *block]`, filled up with zeros."""
    lead, grid = x.ndim - len(block), grid_of(x.shape, block)
    ends = [g * b - n for g, b, n in zip(grid[lead:], block, x.shape[lead:], strict=True)]
    x = np.pad(x, [(0, 0)] * lead + [(0, end) for end in ends])
    split = [size for pair in zip(grid[lead:], block, strict=True) for size in pair]
    x = x.reshape((*grid[:lead], *split))
    within = range(lead + 1, x.ndim, 2)
    return np.moveaxis(x, within, range(-len(block), 0))


def _last(block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(-len(block), 0))


def _require_block(block: Any, ndim: int) -> tuple[int, ...]:
    if not isinstance(block, (tuple, list)):
        rule, got = "be a tuple of integers", _check.describe(block)
        raise TypeError(_check.message("block_sparse", "block", rule, got))
    for i, size in enumerate(block):
        _check.integer("block_sparse", f"block[{i}]", size, 1)
    if not 1 <= len(block) <= ndim:
        rule = f"have 1 to {ndim} sizes, as `dense` has axes" if ndim else "cut an axis of `dense`"
        got = f"{tuple(block)} for a shape of {ndim} dimensions"
        raise ValueError(_check.message("block_sparse", "block", rule, got))
    return tuple(int(size) for size in block)
