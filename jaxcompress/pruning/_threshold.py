r"""The k-th largest of many numbers by counting: nothing is sorted, gathered or moved.

The answer is bracketed between two integers. A pass over the entries counts how many reach
each of 7 places that cut the bracket in 8, so it shrinks eightfold: 11 passes for float32,
6 for bfloat16 and float16, 22 for float64, fewer if a place happens to part the entries.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress._sharding import on_several_devices
from jaxcompress._types import ArrayLike

_BITS = 3  # of the answer per pass. 4 makes fewer passes that cost more: slower on a CPU.


class Space(NamedTuple):
    """Integers ordered as the floats they stand for; static."""

    floating: np.dtype
    signed: np.dtype  # of a key
    unsigned: np.dtype  # of the distance between two keys
    infinity: int  # the key of inf

    @property
    def lowest(self) -> int:
        """The key of every NaN, one below that of -inf."""
        return -self.infinity - 1

    @property
    def size(self) -> int:
        """How many keys there are."""
        return 2 * self.infinity + 2


class Bracket(NamedTuple):
    """Two places, `low` reached by at least k entries and `high` by fewer, with both counts."""

    low: jax.Array
    high: jax.Array
    reach_low: jax.Array
    reach_high: jax.Array


def space_of(dtypes: Sequence[jnp.dtype]) -> Space:
    """The narrowest keys that hold every value of all `dtypes`."""
    common = {jnp.dtype(d) for d in dtypes}
    if common == {jnp.dtype(jnp.bfloat16)}:
        return _space(jnp.bfloat16, np.int16, np.uint32, 0x7F80)
    if common == {jnp.dtype(jnp.float16)}:
        return _space(jnp.float16, np.int16, np.uint32, 0x7C00)
    if jnp.dtype(jnp.float64) in common:
        return _space(jnp.float64, np.int64, np.uint64, 0x7FF0_0000_0000_0000)
    return _space(jnp.float32, np.int32, np.uint32, 0x7F80_0000)


def keys(x: jax.Array, space: Space) -> jax.Array:
    r"""Integers with :math:`key(a) < key(b) \iff a < b`, of the shape of `x`.

    The magnitudes of floats are ordered as their bits are, so the key is that integer with
    the sign of the float: -0 and +0 share 0. Subnormals stay apart, even on a machine whose
    float comparisons take them for zero. Every NaN, of either sign, gets `space.lowest`.
    """
    if x.dtype == jnp.bfloat16 and space.signed == np.int32:
        bits = lax.bitcast_convert_type(x, np.int16).astype(np.int32) << np.int32(16)
    else:
        bits = lax.bitcast_convert_type(x.astype(space.floating), space.signed)
    magnitude = bits & np.array(np.iinfo(space.signed).max, space.signed)
    signed = jnp.where(bits < 0, -magnitude, magnitude)
    lowest = np.array(space.lowest, space.signed)
    return jnp.where(magnitude > np.array(space.infinity, space.signed), lowest, signed)


def key_at(place: jax.Array, space: Space) -> jax.Array:
    """The key at `place`: place 0 is that of NaN, `space.size` is just above that of inf."""
    bits = 8 * space.unsigned.itemsize
    start = np.array(space.lowest % 2**bits, space.unsigned)
    return lax.bitcast_convert_type(place + start, np.dtype(f"int{bits}")).astype(space.signed)


def search(
    reach: Callable[[jax.Array], jax.Array],
    size: int,
    total: ArrayLike,
    k: jax.Array,
    dtype: np.dtype,
) -> Bracket:
    """Narrows [0, size) to the last place that at least k entries reach.

    Args:
        reach: how many entries are at or above each of several places. It never grows with
            the place, is `total` at 0 and 0 at `size`.
        size: static. How many places there are.
        total: uint32, at least `k`.
        k: uint32.
        dtype: static. An unsigned dtype that holds `size`.

    Returns:
        A bracket with `reach_low == k`, found early, or else with `high == low + 1`.

    Cost: at most `ceil(log2(size) / 3)` calls of `reach`; none when `k` is 0 or `total`.
    """
    bits, rest = np.array(_BITS, dtype), np.array(2**_BITS - 1, dtype)
    cuts = np.arange(1, 2**_BITS, dtype=dtype)
    end = jnp.asarray(np.array(size, dtype))
    start = Bracket(
        low=jnp.where(k == 0, end, jnp.zeros_like(end)),
        high=end,
        reach_low=jnp.where(k == 0, k, jnp.asarray(total, np.uint32)),
        reach_high=jnp.zeros_like(k),
    )

    def unfinished(b: Bracket) -> jax.Array:
        return (b.high - b.low > np.array(1, dtype)) & (b.reach_low != k)

    def narrow(b: Bracket) -> Bracket:
        width = b.high - b.low
        # low + width * cuts / 8, without overflow
        places = b.low + (width >> bits) * cuts + ((width & rest) * cuts >> bits)
        counts = reach(places)
        enough = counts >= k
        return Bracket(
            low=jnp.max(jnp.where(enough, places, b.low)),
            high=jnp.min(jnp.where(enough, b.high, places)),
            reach_low=jnp.min(jnp.where(enough, counts, b.reach_low)),
            reach_high=jnp.max(jnp.where(enough, b.reach_high, counts)),
        )

    return lax.while_loop(unfinished, narrow, start)


def count(tests: Sequence[jax.Array]) -> jax.Array:
    """How many entries of each of several boolean arrays are True: uint32, one per array.

    On one device a single reduction with several results: it reads what the tests share once,
    and XLA vectorizes it on a CPU, which it does not do for a plain sum (ten times slower). On
    a mesh plain sums: they go straight to scalars, which are added over the devices, where
    the several results of one reduction would be gathered from all.
    """
    if any(on_several_devices(t) for t in tests):
        return jnp.stack([jnp.sum(t, dtype=np.uint32) for t in tests])
    terms = tuple(t.astype(np.uint32) for t in tests)
    if terms[0].ndim:
        terms = lax.reduce(
            terms,
            (np.uint32(0),) * len(terms),
            lambda a, b: tuple(lax.add(p, q) for p, q in zip(a, b, strict=True)),
            tuple(range(terms[0].ndim)),
        )
    return jnp.stack(terms)


def strides(shape: tuple[int, ...]) -> np.ndarray:
    """Distances in C order between neighbours along each axis: uint32, one per axis."""
    return np.cumprod((1, *shape[:0:-1]), dtype=np.uint32)[::-1][: len(shape)]


def order(shape: tuple[int, ...], steps: ArrayLike, offset: ArrayLike) -> jax.Array:
    """The index of each entry: `offset` plus `steps` along each axis, modulo 2**32."""
    index = jnp.full(shape, offset, np.uint32)
    for axis in range(len(shape)):
        index = index + lax.broadcasted_iota(np.uint32, shape, axis) * jnp.asarray(steps)[axis]
    return index


def _space(floating, signed, unsigned, infinity: int) -> Space:
    return Space(jnp.dtype(floating), np.dtype(signed), np.dtype(unsigned), infinity)
