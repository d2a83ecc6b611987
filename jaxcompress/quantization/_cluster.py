"""Weight sharing by k-means as a projection."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric
from jaxcompress.projections import Projection, number_at, of_leaves
from jaxcompress.quantization._pack import packed_codes, pattern_without_zeros, refuse_nan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Centroids:
    """The values that the weights of a leaf share.

    Attributes:
        values: float32, ascending; infinite ones at the end are not used.
    """

    values: jax.Array

    def project(self, w: jax.Array) -> jax.Array:
        """The nearest value; an exact zero stays zero and NaN stays NaN."""

        def nearest(w, values):
            x = w.astype(jnp.float32)
            shared = values[_assign(x, values)]
            return jnp.where((x == 0) | jnp.isnan(x), x, shared).astype(w.dtype)

        return automatic(nearest, w, self.values, like_first=True)

    def pack(self, w: Any, path: str) -> arrays.Codebook:
        """Indices of as many bits as the number of values needs, sparse where `w` has zeros."""
        dense = self.project(arrays.todense(w))
        refuse_nan(dense, path)
        values = np.asarray(self.values)
        values = jnp.asarray(values[np.isfinite(values)])
        bits = max(1, int(len(values) - 1).bit_length())
        codes = _assign(dense.astype(jnp.float32), values).astype(jnp.uint8)
        pattern = pattern_without_zeros(w, dense)
        codes = packed_codes(codes, pattern, bits, signed=False)
        return arrays.Codebook(codes, values, dtype=np.dtype(dense.dtype))


def cluster(
    num_values: Numeric, *, max_values: int | None = None, iterations: int = 20
) -> Projection:
    r"""Lets the weights of a leaf share a few values, found by k-means.

    .. math:: \min_{c_1 \ldots c_k} \sum_{w_i \ne 0} \min_j (w_i - c_j)^2

    Lloyd's iterations from values spread evenly over the range, or from those held so far. An
    exact zero stays zero and belongs to no cluster, so that `chain(prune(0.9), cluster(16))`
    is pruning and weight sharing as in Deep Compression.

    Args:
        num_values: :math:`k`, 1 to 256. A number, a JAX scalar or an Optax schedule; may be
            traced when `max_values` is given.
        max_values: static. The most values there can be; the number given, if it is static.
        iterations: static. Lloyd's iterations in each `find`.

    Returns:
        A projection whose structure has the `Centroids` of each leaf. NaN stays NaN and is
        refused by `pack`; an infinite weight goes to the outermost value. An all-equal leaf
        stays as it is, and so does an all-zero or an empty one.

    Raises:
        ValueError: `num_values` is a number outside of [1, 256] or above `max_values`; it is
            not a static integer and `max_values` is missing.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: `iterations` times a binary search and a sum by cluster per weight.

    Examples:
        >>> params = {"w": jnp.array([[1.0, 1.1, 0.0], [-2.0, -2.2, 1.2]])}
        >>> jc.compress(jc.cluster(2), params)["w"]
        Array([[ 1.1,  1.1,  0. ],
               [-2.1, -2.1,  1.1]], dtype=float32)

    Source: Han et al. 2016, arXiv:1510.00149, section 3. Differs: an empty cluster keeps its
    value, and the centroids are fitted to the weights at each `find`, not by their gradients.
    """
    _check.numeric("cluster", "num_values", num_values, 1, 256)
    _check.integer("cluster", "iterations", iterations, 0)
    if max_values is None:
        if isinstance(num_values, bool) or not isinstance(num_values, (int, np.integer)):
            raise ValueError(
                _check.message(
                    "cluster",
                    "max_values",
                    "be given when `num_values` is not a static integer",
                    "None",
                    "It sets the size of the codebook.",
                )
            )
        max_values = int(num_values)
    _check.integer("cluster", "max_values", max_values, 1, 256)
    _check.numeric("cluster", "num_values", num_values, 1, max_values)
    size = max_values

    def find(params, *, previous=None, grads=None, step=0):
        del grads
        count = jnp.clip(jnp.round(number_at(num_values, step).astype(jnp.float32)), 1, size)

        def leaf(path, w, held):
            _check.floating("cluster", "params", w, path)
            start = jnp.full(size, jnp.nan, jnp.float32) if held is None else held.values
            fit = functools.partial(_fit, size=size, iterations=iterations)
            return Centroids(automatic(fit, w, count, start, like_first=False))

        if previous is None:
            return tree.map_arrays_with_path(lambda path, w: leaf(path, w, None), params)
        return tree.map_arrays_with_path(leaf, params, previous)

    return of_leaves(find)


def _fit(w: jax.Array, count: jax.Array, held: jax.Array, *, size: int, iterations: int):
    """Centroids of the non-zero finite entries, from `held` on if it has `count` of them."""
    x = w.astype(jnp.float32)
    used = jnp.isfinite(x) & (x != 0)
    index = jnp.arange(size, dtype=jnp.float32)
    low = jnp.min(x, where=used, initial=jnp.inf)
    high = jnp.max(x, where=used, initial=-jnp.inf)
    nothing = low > high
    low, high = jnp.where(nothing, 0.0, low), jnp.where(nothing, 0.0, high)
    # Evenly spread; a single value starts at the middle.
    place = jnp.where(count > 1, index * (1.0 / jnp.maximum(count - 1, 1.0)), 0.5)
    values = jnp.where(index < count, low * (1.0 - place) + high * place, jnp.inf)
    same = jnp.sum(jnp.isfinite(held)) == count.astype(jnp.int32)
    values = jnp.where(same, held, values)
    flat, weight = x.ravel(), used.ravel().astype(jnp.float32)

    def lloyd(_, values):
        nearest = _assign(flat, values)
        # The mean of the residuals: an all-equal cluster keeps its value to the last bit.
        residual = jnp.where(weight > 0, flat - values[nearest], 0.0)
        total = jax.ops.segment_sum(residual, nearest, size)
        members = jax.ops.segment_sum(weight, nearest, size)
        moved = values + total * (1.0 / jnp.maximum(members, 1.0))
        return jnp.sort(jnp.where(members > 0, moved, values))

    return jax.lax.fori_loop(0, iterations, lloyd, values)


def _assign(x: jax.Array, values: jax.Array) -> jax.Array:
    """Index of the nearest of ascending values; of two equally near ones the smaller."""
    middles = values[:-1] * 0.5 + values[1:] * 0.5
    return jnp.searchsorted(middles, x, side="left")
