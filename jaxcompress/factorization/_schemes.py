"""The schemes of a kernel: each at a rank, and the best of several at one cost."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._sharding import automatic
from jaxcompress.factorization._basis import is_wide, kept_columns
from jaxcompress.factorization._cp import CP, cp
from jaxcompress.factorization._decompose import SVD, Method, decompose
from jaxcompress.factorization._ranks import rank_of_energy
from jaxcompress.factorization._scheme_costs import Sizes, costs, rank_limits
from jaxcompress.factorization._separated import Separated, first_axes, matrix_shape, unfolded
from jaxcompress.factorization._tucker import Tucker, tucker

_ITERATIONS = {"tucker": 3, "cp": 100}


class Knob(NamedTuple):
    """How far to go.

    Attributes:
        kind: static. `"rank"`, `"energy"` or `"fraction"`.
        values: one number, or two of Tucker.
    """

    kind: str
    values: tuple[jax.Array, ...]


class Options(NamedTuple):
    """Static.

    Attributes:
        columns: the most that a structure holds, one number or two; None: all.
        iterations: None for the defaults.
        method: of the decompositions.
        sizes: of the inputs and outputs of the convolution; None: parameters count.
        most: the fraction where it is static.
    """

    columns: tuple[int, ...] | None = None
    iterations: int | None = None
    method: Method = "auto"
    sizes: Sizes | None = None
    most: float | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """A leaf that stays as it is."""

    def project(self, w: jax.Array) -> jax.Array:
        """The leaf."""
        return w

    def pack(self, w: Any, path: str) -> Any:
        """The leaf."""
        del path
        return w


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """Several structures of a leaf, and which of them is in force.

    Attributes:
        options: the structures.
        best: int32, the place of one of them.
    """

    options: tuple[Any, ...]
    best: jax.Array

    def project(self, w: jax.Array) -> jax.Array:
        """By the structure in force."""

        def projected(w, best, options):
            return jax.lax.switch(best, [s.project for s in options], w)

        return automatic(projected, w, self.best, self.options, like_first=True)  # pyright: ignore[reportArgumentType]

    def pack(self, w: Any, path: str) -> Any:
        """By the structure in force."""
        return self.options[int(self.best)].pack(w, path)


def fit(w: jax.Array, scheme: str, knob: Knob, options: Options) -> Any:
    """The structure of a kernel with no axis of size 0."""
    limits = rank_limits(scheme, w.shape)
    if options.columns is not None:
        pairs = zip(limits, options.columns * len(limits), strict=False)
        limits = tuple(min(pair) for pair in pairs)
    table = _table(scheme, w.shape, limits, options.sizes)
    if knob.kind == "fraction":
        # What no fraction takes needs no room.
        most = np.float32(np.inf if options.most is None else options.most)
        may = np.argwhere((table < 1) & (table <= most))
        limits = tuple(int(n) + 1 for n in may.max(axis=0, initial=0))
        table = table[tuple(slice(n) for n in limits)]
    iterations = _ITERATIONS.get(scheme, 0) if options.iterations is None else options.iterations

    def found(w, table, *values):
        return _found(w, table, values, scheme, knob.kind, limits, iterations, options.method)

    return automatic(found, w, jnp.asarray(table), *knob.values, like_first=False)


# One program for all leaves of a shape.
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _found(w, table, values, scheme: str, kind: str, limits, iterations: int, method: Method):
    w, axes = jax.lax.stop_gradient(w), first_axes(scheme, w.ndim)
    if axes is not None:
        return _separated(w, axes, limits[0], kind, values[0], table, method)
    w = w.astype(jnp.float32)
    if scheme == "cp":
        rank = _fitting(table, values[0]) if kind == "fraction" else jnp.round(values[0])
        return cp(w, limits[0], rank, iterations)

    def ranks(ins, outs):
        return _tucker_ranks(kind, values, ins, outs, table)

    return Tucker(*tucker(w, limits, ranks, iterations, method))


def choose(w: jax.Array, schemes: Sequence[str], knob: Knob, options: Options) -> Any:
    """The structure of a scheme, or of the best of several; of the leaf where none is smaller."""
    if knob.kind == "fraction":
        schemes = smaller_schemes(schemes, w.shape, options)
    if not schemes or w.size == 0:
        return Whole()
    found = tuple(fit(w, scheme, knob, options) for scheme in schemes)
    if len(found) == 1:
        return found[0]
    named = zip(found, schemes, strict=True)
    prices = jnp.stack([cost_of(s, scheme, w.shape, options.sizes) for s, scheme in named])
    errors = jnp.stack([relative_error(w, s) for s in found])
    best = jnp.argmin(merits(errors, prices, knob.values[0])).astype(jnp.int32)
    return Choice(found, best)


def smaller_schemes(schemes: Sequence[str], shape: tuple[int, ...], options: Options) -> list[str]:
    """Those that cost less than the dense kernel at rank 1."""
    if 0 in shape:
        return []
    return [s for s in schemes if costs(s, shape, options.sizes).flat[0] < 1]


def relative_error(w: jax.Array, s: Any) -> jax.Array:
    """The Frobenius norm of what a structure leaves out, over that of the leaf."""

    def error(w, s):
        new, old = s.project(w).astype(jnp.float32), w.astype(jnp.float32)
        unit = jnp.max(jnp.abs(old), initial=0.0)
        unit = jnp.where(unit > 0, unit, 1.0)
        size, left = (jnp.linalg.norm(jnp.ravel(x / unit)) for x in (old, old - new))
        return left / jnp.where(size > 0, size, 1.0)

    return automatic(error, w, s, like_first=False)


def cost_of(s: Any, scheme: str, shape: tuple[int, ...], sizes: Sizes | None) -> jax.Array:
    """Of a structure, as a fraction of the dense kernel; rank 0 counts as 1."""
    table = jnp.asarray(costs(scheme, shape, sizes))
    counts = [jnp.sum(jnp.any(x != 0, axis=0), dtype=jnp.int32) for x in _columns(s)]
    return table[tuple(jnp.maximum(n - 1, 0) for n in counts)]


def ranks_of(s: Any) -> tuple[int, ...]:
    """The columns that are not zero."""
    return tuple(int((np.asarray(x) != 0).any(axis=0).sum()) for x in _columns(s))


def _columns(s: Any) -> tuple[jax.Array, ...]:
    if isinstance(s, Tucker):
        return s.inputs, s.outputs
    return (s.inputs,) if isinstance(s, CP) else (s.vectors,)


def merits(errors: jax.Array, prices: jax.Array, fraction: jax.Array) -> jax.Array:
    """The smaller the better: errors, at most 1, within the cost, else costs."""
    return jnp.where(prices > fraction.astype(jnp.float32), 2.0 + prices, errors)


def _table(scheme, shape, limits, sizes) -> np.ndarray:
    return costs(scheme, shape, sizes)[tuple(slice(n) for n in limits)]


def _fitting(table: jax.Array, fraction: jax.Array) -> jax.Array:
    """The largest rank that fits, at least 1."""
    within = jnp.sum(table <= fraction.astype(jnp.float32), dtype=jnp.int32)
    return jnp.maximum(within, 1).astype(jnp.float32)


def _separated(w, axes, limit: int, kind: str, value, table, method: Method) -> Separated:
    found = decompose(unfolded(w, axes), limit, method)
    q = found.u if is_wide(matrix_shape(w.shape, axes)) else found.vt.T
    knob = _fitting(table, value) if kind == "fraction" else value
    return Separated(kept_columns(q, found, knob, kind == "energy"), axes)


def _tucker_ranks(kind: str, values, ins, outs, table) -> tuple[jax.Array, jax.Array]:
    if kind == "fraction":
        # Of all pairs that fit the one with the smallest sum of dropped squares.
        unit = jnp.maximum(jnp.max(ins.s), jnp.max(outs.s))
        tails = [_tails(found, jnp.where(unit == 0, 1.0, unit)) for found in (ins, outs)]
        bound = tails[0][:, None] + tails[1][None, :]
        fits = (table < 1) & (table <= values[0].astype(jnp.float32))
        best = jnp.argmin(jnp.where(fits, bound, jnp.inf))
        p, q = jnp.unravel_index(best, table.shape)
        return (p + 1).astype(jnp.float32), (q + 1).astype(jnp.float32)
    pair = values if len(values) == 2 else values * 2
    if kind == "rank":
        return jnp.round(pair[0]), jnp.round(pair[1])
    p, q = (
        rank_of_energy(found.s, value, found.error).astype(jnp.float32)
        for found, value in zip((ins, outs), pair, strict=True)
    )
    return p, q


def _tails(found: SVD, unit: jax.Array) -> jax.Array:
    """The sum of what is dropped after the first, the second… squared singular value."""
    squares = jnp.square(found.s / unit)
    return jnp.cumsum(squares[::-1])[::-1] - squares + jnp.square(found.error / unit)
