"""Eight booleans in a byte, in the layout that is quickest to read."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._sharding import is_explicit, on_mesh_of


def axis_of_bytes(shape: tuple[int, ...]) -> int:
    """The axis, -1 or -2, along which eight entries share a byte.

    Along the last but one, neighbours in memory are bits of neighbouring bytes, which vector
    units read as quickly as booleans; along the last, a third slower. It is taken where eight
    divide it, so that no bit is wasted.
    """
    return -2 if len(shape) > 1 and shape[-2] > 0 and shape[-2] % 8 == 0 else -1


def pack_bits(keep: jax.Array, along: int) -> jax.Array:
    """uint8, the shape of `keep` with an eighth of the axis `along`, rounded up.

    Args:
        keep: `bool`, with at least one axis, sharded in any way.
        along: static. -1 or -2. The first entry is in the lowest bit.
    """
    if is_explicit(keep):
        pack = functools.partial(pack_bits, along=along)
        packed: Any = jax.sharding.auto_axes(pack, out_sharding=_of_bytes(keep, along))
        return packed(keep)
    length = keep.shape[along]
    count = -(-length // 8)
    padding = [(0, 0)] * keep.ndim
    padding[along] = (0, 8 * count - length)
    shape = _with(keep.shape, along, count, 8)
    eights = jnp.pad(keep, padding).reshape(shape).astype(jnp.uint8)
    return jnp.sum(eights << _places(len(shape), along), along, dtype=jnp.uint8)


def unpack_bits(bits: jax.Array, along: int, length: int) -> jax.Array:
    """What `pack_bits` packed; fused into what reads it under `jit`.

    Args:
        bits: as it gave them, also under `vmap`.
        along: static. As there.
        length: static. Of that axis before.
    """
    if is_explicit(bits):
        spread = functools.partial(unpack_bits, along=along, length=length)
        spec: list[Any] = list(jax.typeof(bits).sharding.spec)
        spec[along] = None
        out = on_mesh_of(bits, jax.sharding.PartitionSpec(*spec))
        unpacked: Any = jax.sharding.auto_axes(spread, out_sharding=out)
        return unpacked(bits)
    eights = jnp.expand_dims(bits, along) >> _places(bits.ndim + 1, along)
    whole = (eights & np.uint8(1)).reshape(_with(bits.shape, along, 8 * bits.shape[along]))
    return jax.lax.slice_in_dim(whole, 0, length, axis=whole.ndim + along).astype(bool)


def _places(ndim: int, along: int) -> jax.Array:
    shape = [1] * ndim
    shape[along] = 8
    return jnp.arange(8, dtype=jnp.uint8).reshape(shape)


def _with(shape: tuple[int, ...], along: int, *instead: int) -> tuple[int, ...]:
    place = len(shape) + along
    return (*shape[:place], *instead, *shape[place + 1 :])


def _of_bytes(keep: jax.Array, along: int) -> jax.sharding.NamedSharding:
    """That of `keep`, where bytes along the axis can be: whole bytes on each device."""
    sharding = jax.typeof(keep).sharding
    spec: list[Any] = list(sharding.spec)
    names = spec[along] or ()
    names = names if isinstance(names, tuple) else (names,)
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    if keep.shape[along] % (8 * devices):
        spec[along] = None
    return on_mesh_of(keep, jax.sharding.PartitionSpec(*spec))
