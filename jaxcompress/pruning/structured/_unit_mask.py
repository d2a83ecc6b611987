"""The structure of a leaf whose groups lose units: which of its positions stay."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress._sharding import place_like
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning.structured._places import along


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stays", "statistic"],
    meta_fields=["groups", "axes", "shape"],
)
@dataclasses.dataclass(frozen=True)
class UnitMask:
    """Which positions of a leaf stay: one factor for each group that owns some of them.

    Attributes:
        stays: `bool [*layers, positions]` for each member of a group, in the order of the
            groups.
        groups: static. The name of the group of each.
        axes: static. The axis of each, counted from the front.
        shape: static. Of the leaf.
        statistic: what a `RunningScore` has gathered of the leaf; None without one.
    """

    stays: tuple[jax.Array, ...]
    groups: tuple[str, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    statistic: Any = None

    @property
    def keep(self) -> jax.Array:
        """`bool`, the shape of the leaf; fused into what reads it under `jit`."""
        factors = [along(x, i, len(self.shape)) for x, i in zip(self.stays, self.axes, strict=True)]
        if not factors:
            return jnp.ones(self.shape, bool)
        return jnp.broadcast_to(functools.reduce(jnp.logical_and, factors), self.shape)

    @property
    def nbytes(self) -> int:
        """Of the factors: a byte for each position of an axis."""
        return tree.nbytes(self.stays)

    def project(self, w: jax.Array) -> jax.Array:
        """Zero where a unit has left, also in the place of NaN and infinities."""
        return jnp.where(place_like(self.keep, w), w, jnp.zeros((), w.dtype))

    def pack(self, w: Any, path: str) -> Any:
        """The positions that stay, whole, where they fill blocks; else single entries."""
        single = {*self.axes, *(i for x in self.stays for i in range(x.ndim - 1))}
        block = tuple(1 if i in single else max(n, 1) for i, n in enumerate(self.shape))
        return Mask.of(self.keep, block=None if math.prod(block) == 1 else block).pack(w, path)
