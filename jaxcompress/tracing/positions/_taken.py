"""Taking the positions of an array that stay, and counting them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress import _sharding

Mask = np.ndarray | None
"""Which positions of an axis stay, `bool` of the old length; None: all."""
Masks = tuple[Mask, ...]
"""One for each axis."""


def take_positions(x: Any, masks: Sequence[Mask]) -> Any:
    """`x` without the positions that are gone: a slice where these are regular, else a gather.

    Args:
        x: an array of any dtype, also of random keys, or traced. NumPy's stay NumPy's.
        masks: for each axis.
    """
    return take_indices(x, [None if mask is None else np.flatnonzero(mask) for mask in masks])


def take_indices(x: Any, indices: Sequence[np.ndarray | None]) -> Any:
    """`x` at the positions of each axis that are asked for, in their order; None: all of them."""
    needed = {d: at for d, at in enumerate(indices) if at is not None and not _all(at, x.shape[d])}
    if not needed:
        return x
    if isinstance(x, np.ndarray):
        for d, at in needed.items():
            x = np.take(x, at, axis=d)
        return x
    if not _sharding.is_explicit(x):
        return _take(x, needed)
    shape = [len(needed[d]) if d in needed else n for d, n in enumerate(x.shape)]
    place = fitting(jax.typeof(x).sharding, shape)
    return jax.sharding.auto_axes(lambda x: _take(x, needed), out_sharding=place)(x)


def kept(mask: Mask, size: int) -> np.ndarray:
    """Which positions of an axis stay, as an array."""
    return np.ones(size, bool) if mask is None else mask


def shape_of(old: Sequence[int], masks: Sequence[Mask]) -> tuple[int, ...]:
    """The shape without the positions that are gone."""
    return tuple(
        n if m is None else int(np.count_nonzero(m)) for n, m in zip(old, masks, strict=True)
    )


def ranks(mask: np.ndarray) -> np.ndarray:
    """How many positions stay before each position: where one that stays is now."""
    return np.cumsum(mask) - mask


def same(a: Mask, b: Mask) -> bool:
    """Whether the same positions stay."""
    if a is None or b is None:
        other = b if a is None else a
        return other is None or bool(np.all(other))
    return np.array_equal(a, b)


def narrowed(x: Any, have: Sequence[Mask], want: Sequence[Mask]) -> Any:
    """`x`, that has the positions `have`, without those that are not in `want` either.

    What is in `want` has to be in `have`.
    """
    indices = []
    for a, b in zip(have, want, strict=True):
        if b is None:
            indices.append(None)
        else:
            indices.append(np.flatnonzero(b) if a is None else ranks(a)[b])
    return take_indices(x, indices)


def spread(x: Any, masks: Sequence[Mask]) -> Any:
    """An array of the old shape with `x` where it was; any entries of `x` elsewhere."""
    return take_indices(
        x, [None if mask is None else np.minimum(ranks(mask), mask.sum() - 1) for mask in masks]
    )


def fitting(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The sharding, but for axes of a new size that the devices can't share."""
    spec, mesh = [*sharding.spec], sharding.mesh
    for d, (entry, size) in enumerate(zip(sharding.spec, shape, strict=False)):
        names: Any = entry if isinstance(entry, tuple) else (entry,)
        # What is left to the compiler has no name.
        parts = math.prod(mesh.shape[name] for name in names if isinstance(name, str))
        if size % parts:
            spec[d] = None
    if spec == [*sharding.spec]:
        return sharding
    return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def _all(at: np.ndarray, size: int) -> bool:
    return len(at) == size and np.array_equal(at, np.arange(size))


def _take(x: jax.Array, indices: dict[int, np.ndarray]) -> jax.Array:
    starts, ends, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
    rest = dict(indices)
    for d, at in indices.items():
        regular = _regular(at)
        if regular is not None:
            starts[d], ends[d], strides[d] = regular
            del rest[d]
    if len(rest) < len(indices):
        x = lax.slice(x, starts, ends, strides)
    for d, at in rest.items():
        x = _gather(x, at, d)
    return x


def _regular(at: np.ndarray) -> tuple[int, int, int] | None:
    """Start, end and stride of a slice."""
    if len(at) == 0:
        return 0, 0, 1
    steps = np.diff(at)
    step = int(steps[0]) if len(steps) else 1
    if step < 1 or np.any(steps != step):
        return None
    return int(at[0]), int(at[-1]) + 1, step


def _gather(x: jax.Array, at: np.ndarray, axis: int) -> jax.Array:
    others = tuple(d for d in range(x.ndim) if d != axis)
    return lax.gather(
        x,
        at[:, None].astype(np.int32),
        lax.GatherDimensionNumbers(others, (axis,), (axis,)),
        tuple(1 if d == axis else n for d, n in enumerate(x.shape)),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        indices_are_sorted=bool(np.all(np.diff(at) >= 0)),
        unique_indices=len(np.unique(at)) == len(at),
    )
