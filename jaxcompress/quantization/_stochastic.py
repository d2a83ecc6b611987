"""Stochastic rounding: to one of both neighbours, so that the mean is exact."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, _keys, arrays
from jaxcompress._sharding import automatic, place_like
from jaxcompress._types import PyTree
from jaxcompress.projections import Projection, is_leaf_structure
from jaxcompress.quantization._cluster import Centroids, _assign
from jaxcompress.quantization._float_grid import FloatGrid
from jaxcompress.quantization._grid import Grid
from jaxcompress.quantization._pack import pattern_of

Values = Grid | FloatGrid | Centroids
"""What a leaf can be rounded to: each has `project` and `pack`."""


def neighbours(values: Values, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values below and above each of `x`, the nearer one first; twice the same beyond the ends.

    Args:
        values: the grid or the codebook.
        x: float32, any shape. An exact zero has no neighbour but itself.

    Returns:
        Both in float32, the same to the last bit eagerly and under `jit`.
    """
    if isinstance(values, Centroids):
        return automatic(_neighbours_in_codebook, x, values.values, like_first=True)
    # A product that is fused into a later sum is rounded once less: it must not be.
    nearest = jax.lax.optimization_barrier(values.project(x))
    if isinstance(values, FloatGrid):
        scale = values._expanded(x)
        # Where a format has no zero, one stays zero anyhow.
        table = jnp.asarray(values.format.values, jnp.float32)
        beside = automatic(
            _beside_in_table, nearest * (1.0 / scale), x - nearest, table, like_first=True
        )
        other = jnp.where(x == 0, 0.0, beside * scale)
        return nearest, jax.lax.optimization_barrier(other)
    scale, _ = values._expanded(x)
    spacing = scale * jnp.where(values.bits == 1, 2.0, 1.0)
    other = values.project(nearest + jnp.sign(x - nearest) * spacing)
    return nearest, jax.lax.optimization_barrier(other)


def _neighbours_in_codebook(x: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    place = _assign(x, values)
    nearest = values[place]
    side = jnp.sign(x - nearest)
    last = jnp.sum(jnp.isfinite(values)).astype(jnp.int32) - 1
    beside = jnp.where(jnp.isnan(side), 0.0, side).astype(jnp.int32)
    other = values[jnp.clip(place.astype(jnp.int32) + beside, 0, jnp.maximum(last, 0))]
    alone = (x == 0) | jnp.isnan(x)
    return jnp.where(alone, x, nearest), jnp.where(alone, x, other)


def _beside_in_table(u: jax.Array, way: jax.Array, table: jax.Array) -> jax.Array:
    side = jnp.sign(way)
    side = jnp.where(jnp.isnan(side), 0.0, side).astype(jnp.int32)
    return table[jnp.clip(_assign(u, table).astype(jnp.int32) + side, 0, table.size - 1)]


def round_randomly(values: Values, x: jax.Array, uniform: jax.Array) -> jax.Array:
    """One of both neighbours, each with the probability that makes `x` the mean.

    Args:
        values: the grid or the codebook.
        x: any float dtype. What is a value already, as exactly as its dtype tells, stays.
        uniform: float32 in [0, 1), of the shape of `x`.
    """
    wide = x.astype(jnp.float32)
    nearest, other = neighbours(values, wide)
    away = uniform * jnp.abs(other - nearest) < jnp.abs(wide - nearest)
    same = nearest.astype(x.dtype) == x
    return jnp.where(away & ~same, other, nearest).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stochastic:
    """A grid or a codebook that is rounded to at random, always in the same way.

    Attributes:
        inner: the `Grid`, `FloatGrid` or `Centroids`.
        key: the data of the key of this leaf and this find.
        implementation: static. Which generator the key is for.
    """

    inner: Values
    key: jax.Array
    implementation: str = dataclasses.field(metadata={"static": True})

    def project(self, w: jax.Array) -> jax.Array:
        """A neighbour of each weight; values of the grid stay, and so does NaN."""
        key = jax.random.wrap_key_data(self.key, impl=self.implementation)
        uniform = jax.random.uniform(key, w.shape, jnp.float32)
        return round_randomly(self.inner, w, place_like(uniform, w))

    def pack(self, w: Any, path: str) -> Any:
        """As the inner one packs what is drawn."""
        drawn, pattern = self.project(arrays.todense(w)), pattern_of(w)
        return self.inner.pack(
            drawn if pattern is None else arrays.with_entries(pattern, drawn), path
        )


def stochastic(projection: Projection, *, key: jax.Array) -> Projection:
    r"""Rounds weights up or down at random, so that they are kept on average.

    .. math:: P(\hat w = q^+) = \frac{w - q^-}{q^+ - q^-}, \qquad E[\hat w] = w

    with :math:`q^- \le w \le q^+` the neighbouring values. Small updates are then not lost but
    applied now and then: with `jc.project_params` low-precision weights train without a dense
    copy. Beyond the ends of the range a weight goes to the end.

    Args:
        projection: static. `jc.quantize`, `jc.quantization.floats`, `jc.cluster` and the like
            of any options, also inside of `jc.masked`, `jc.every` and others.
        key: a `jax.random.key`. May be traced. Each leaf folds in its path and each find its
            step, so the draw depends on neither the other leaves nor their order.

    Returns:
        The projection whose structure has a `Stochastic` per leaf. Given the structure it is
        deterministic, idempotent, the same under `jit`, and packs exactly. At one bit the mean
        is that of the weight clipped to :math:`\pm\Delta`; an exact zero stays zero.

    Raises:
        TypeError: `projection` is not a `Projection` or rounds to nothing; `key` is no key.

    Cost: a random number and three roundings per weight.

    Examples:
        >>> rounding = jc.quantize(2, axis=None, ranges=jc.quantization.absmax)
        >>> p = jc.quantization.stochastic(rounding, key=jax.random.key(0))
        >>> params = {"w": jnp.full((100, 100), 0.25).at[0, 0].set(1.0)}
        >>> out = jc.compress(p, params)["w"]
        >>> jnp.unique(out), jnp.abs(out.mean() - 0.25) < 0.02
        (Array([0., 1.], dtype=float32), Array(True, dtype=bool))
        >>> opt = optax.chain(optax.sgd(0.1), jc.project_params(p))

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3.1; one bit as in Courbariaux et al.
    2015, arXiv:1511.00363, section 2.3. Differs: a draw is made at each `find`.
    """
    typed = typed_key("stochastic", key)
    implementation = str(jax.random.key_impl(typed))

    def wrap(path: str, found: Values, step: Any) -> Stochastic:
        own = _keys.of_leaf(typed, path, step)
        return Stochastic(found, jax.random.key_data(own), implementation)

    return around("stochastic", projection, wrap)


def around(
    function: str, projection: Projection, wrap: Callable[[str, Any, Any], Any]
) -> Projection:
    """`projection` with the structure of each leaf inside of another one.

    Args:
        function: static. The name to put first in errors.
        projection: one that finds `Values`.
        wrap: `(path, found, step) -> structure`, which has `inner`, `project` and `pack`.
    """
    if not isinstance(projection, Projection):
        rule, got = "be a jaxcompress Projection", _check.describe(projection)
        fix = "Pass jc.quantize(bits) or jc.cluster(num_values)."
        raise TypeError(_check.message(function, "projection", rule, got, fix))

    def find(params, *, previous=None, grads=None, step=0):
        held = None if previous is None else inside(previous)
        found = projection.find(params, previous=held, grads=grads, step=step)

        def leaf(path, s):
            if not isinstance(s, Values):
                rule, got = "round to a grid or a codebook", f"one with {type(s).__name__}"
                fix = "Pass jc.quantize(bits) or jc.cluster(num_values)."
                raise TypeError(_check.message(function, "projection", rule, got, fix))
            return wrap(jax.tree_util.keystr(path, simple=True, separator="/"), s, step)

        return jax.tree_util.tree_map_with_path(leaf, found, is_leaf=is_leaf_structure)

    def inside(structure: PyTree) -> PyTree:
        unwrap = lambda s: s.inner if is_leaf_structure(s) else s  # noqa: E731
        return jax.tree.map(unwrap, structure, is_leaf=is_leaf_structure)

    other = projection.everywhere
    return projection._replace(
        find=find,
        everywhere=None if other is None else around(function, other, wrap),
        observe=None,
        rows=None,
    )


def typed_key(function: str, key: Any) -> jax.Array:
    """One typed key; refuses what `jax.random` does not take for one."""
    _check.key(function, key)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)
