"""Sums of arrays that are held apart: a base and what corrects it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._sharding import place_like
from jaxcompress.arrays import _base
from jaxcompress.arrays._low_rank import LowRank
from jaxcompress.arrays._rescaled import wide_dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Sum(_base.Sized):
    r"""An array :math:`w = \sum_i w_i`, added in float32 or wider and cast once.

    `jc.lift` runs what is linear in the weight on each part by its own rule and adds the results:
    a base and a low-rank correction cost one product and two thin ones, and w is never formed.

    Attributes:
        parts: :math:`w_i`, two or more: arrays and compressed arrays of one shape and dtype.
    """

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of each part."""
        return tuple(self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """That of each part."""
        return self.parts[0].dtype

    def todense(self) -> jax.Array:
        """The dense array."""
        return total([_unrounded(part) for part in self.parts], self.dtype)

    def __repr__(self) -> str:
        parts = [x if _base.is_compressed(x) else _check.describe(x) for x in self.parts]
        return _base.show(self, parts=f"({', '.join(map(str, parts))})")


def add(*parts: Any) -> Sum:
    """The array that is the sum of its parts, which stay apart.

    Args:
        *parts: two or more arrays or compressed arrays, all of one shape and one floating-point
            dtype. Those of a `Sum` become parts of the new one. May be traced.

    Returns:
        A `Sum`. `jc.factorization.add_adapters` and `jc.factorization.low_rank_plus` make such.

    Raises:
        TypeError: a part is no array of floating-point values.
        ValueError: fewer than two parts, or parts of different shapes or dtypes.

    Examples:
        >>> base = jc.pack(jc.quantize(8), jnp.ones((8, 8)))
        >>> w = jc.arrays.add(base, jc.arrays.LowRank(jnp.ones((8, 1)), jnp.ones((1, 8))))
        >>> w.nbytes, float(w.todense().mean())
        (160, 2.0)
    """
    flat: list[Any] = []
    for part in parts:
        flat += part.parts if isinstance(part, Sum) else [part]
    if len(flat) < 2:
        rule = "be two or more"
        raise ValueError(_check.message("add", "parts", rule, f"{len(flat)} of them"))
    for part in flat:
        _check.floating("add", "parts", part)
    kinds = [_check.describe(part) for part in flat]
    if len(set(kinds)) > 1:
        rule, got = "have one shape and dtype", ", ".join(kinds)
        fix = "Cast one with jc.arrays.cast or astype."
        raise ValueError(_check.message("add", "parts", rule, got, fix))
    return Sum(tuple(flat))


def total(dense: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """The sum of dense arrays, in float32 or wider, sharded as the first of them."""
    first, *others = (wide(x) for x in dense)
    placed = [first, *(place_like(x, first) for x in others)]
    return functools.reduce(jnp.add, placed).astype(dtype)


def _unrounded(part: Any) -> jax.Array:
    """A part made dense in float32 or wider, without the rounding to its own dtype."""
    if isinstance(part, LowRank):
        return LowRank(_unrounded(part.u), _unrounded(part.v)).todense()
    noted = _base.is_compressed(part) and any(
        field.name == "dtype" for field in dataclasses.fields(part)
    )
    if noted and part.dtype.itemsize < 4:
        part = dataclasses.replace(part, dtype=np.dtype(jnp.float32))
    return wide_dense(part)
