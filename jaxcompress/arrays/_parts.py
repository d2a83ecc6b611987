"""What changes of the dense array mean for the parts of a compressed one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress import _check
from jaxcompress.arrays import _base
from jaxcompress.arrays._codebook import Codebook
from jaxcompress.arrays._convolutions import ConvChain, map_stages
from jaxcompress.arrays._low_rank import LowRank
from jaxcompress.arrays._quantized import Quantized
from jaxcompress.arrays._rescaled import Rescaled
from jaxcompress.arrays._rotated import Rotated
from jaxcompress.arrays._sum import Sum


def cast(leaf: Any, dtype: Any) -> Any:
    """The compressed array that stands for `leaf.todense().astype(dtype)`, without decoding.

    Args:
        leaf: a compressed array of floating-point values.
        dtype: static. A floating-point dtype.

    Returns:
        The same class. Quantized, rescaled and rotated arrays and codebooks only note the
        dtype. The factors of a low-rank array and the values of a sparse one are cast, so that
        a low-rank array may differ by the rounding of its factors, and a sum by that of its
        parts.

    Raises:
        TypeError: `leaf` holds no floating-point values, or `dtype` is no such dtype.

    Examples:
        >>> jc.arrays.cast(jc.pack(jc.quantize(4), jnp.ones((8, 8))), jnp.bfloat16).dtype
        dtype(bfloat16)
    """
    dtype = np.dtype(dtype)
    if not _base.is_compressed(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        rule = "be a compressed array of floating-point values"
        raise TypeError(_check.message("cast", "leaf", rule, _check.describe(leaf)))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(_check.message("cast", "dtype", "be a floating-point dtype", dtype.name))
    if isinstance(leaf, (Quantized, Codebook, Rescaled, Rotated)):
        return dataclasses.replace(leaf, dtype=dtype)
    if isinstance(leaf, LowRank):
        return LowRank(*(_cast_part(x, dtype) for x in (leaf.u, leaf.v)))
    if isinstance(leaf, ConvChain):
        return map_stages(leaf, lambda x: _cast_part(x, dtype))
    if isinstance(leaf, Sum):
        return Sum(tuple(_cast_part(x, dtype) for x in leaf.parts))
    return dataclasses.replace(leaf, values=_cast_part(leaf.values, dtype))


def _cast_part(x: Any, dtype: np.dtype) -> Any:
    return cast(x, dtype) if _base.is_compressed(x) else x.astype(dtype)


def partition_specs(leaf: Any, spec: PartitionSpec) -> Any:
    """How the parts of a compressed array are sharded where the dense array is by `spec`.

    Args:
        leaf: a compressed array.
        spec: static. Of the dense array.

    Returns:
        A tree of `PartitionSpec`s with the structure of `leaf`; None where the parts can't be
        cut so: bit planes, sparse entries and groups of scales only go whole.

    Examples:
        >>> leaf = jc.pack(jc.low_rank(1), jnp.ones((8, 8)))
        >>> tuple(jc.arrays.partition_specs(leaf, jax.P("x", None)).u)
        ('x', None)
    """
    axes = (*spec, *(None,) * (leaf.ndim - len(spec)))
    if all(axis is None for axis in axes):
        return jax.tree.map(lambda _: PartitionSpec(), leaf)
    if isinstance(leaf, LowRank):
        u = _part_specs(leaf.u, (*axes[:-1], None))
        v = _part_specs(leaf.v, (None, axes[-1]))
        return None if u is None or v is None else LowRank(u, v)
    if isinstance(leaf, Sum):
        parts = tuple(_part_specs(x, axes) for x in leaf.parts)
        return None if any(part is None for part in parts) else Sum(parts)
    if isinstance(leaf, Quantized) and leaf.group is None:
        codes = _part_specs(leaf.codes, axes)
        if codes is None:
            return None
        scale = _part_specs(leaf.scale, axes)
        zero_point = None if leaf.zero_point is None else _part_specs(leaf.zero_point, axes)
        return dataclasses.replace(leaf, codes=codes, scale=scale, zero_point=zero_point)
    if isinstance(leaf, Rescaled):
        inner, scale = _part_specs(leaf.inner, axes), _part_specs(leaf.scale, axes)
        return None if inner is None else dataclasses.replace(leaf, inner=inner, scale=scale)
    if isinstance(leaf, Rotated) and axes[leaf.axis] is None:
        inner, signs = _part_specs(leaf.inner, axes), PartitionSpec()
        return None if inner is None else dataclasses.replace(leaf, inner=inner, signs=signs)
    return None


def _part_specs(x: Any, axes: tuple[Any, ...]) -> Any:
    """Of an array: an axis of size 1 is shared by all shards."""
    if _base.is_compressed(x):
        return partition_specs(x, PartitionSpec(*axes))
    sizes = zip(x.shape, axes, strict=True)
    return PartitionSpec(*(axis if size > 1 else None for size, axis in sizes))
