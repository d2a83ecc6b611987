"""How many weights, or groups of them, each leaf keeps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections import number_at
from jaxcompress.pruning._budgets import Budget, Shapes, Sizes


def fraction_at(sparsity: Numeric, step: Any) -> jax.Array:
    """The sparsity in force, float32 in [0, 1]."""
    value = number_at(sparsity, step)
    if value.ndim:
        rule, got = "give a scalar at each step", _check.describe(value)
        raise ValueError(_check.message("prune", "sparsity", rule, got))
    return jnp.clip(value.astype(jnp.float32), 0.0, 1.0)


def kept_count(sparsity: jax.Array, size: int) -> jax.Array:
    """What is left of `size` entries, uint32: all but `sparsity` times as many, rounded."""
    return jnp.uint32(size) - jnp.round(sparsity * size).astype(jnp.uint32)


def leaf_counts(
    params: PyTree, scores: PyTree, sparsity: jax.Array, budget: Budget | None
) -> dict[str, jax.Array]:
    """From the path of each leaf to how many of its scores (weights, or groups) are kept."""
    shapes, sizes = _shapes(params), {p: math.prod(s) for p, s in _shapes(scores).items()}
    if budget is None:
        return {path: kept_count(sparsity, size) for path, size in sizes.items()}
    total = kept_count(sparsity, sum(sizes.values()))
    return kept_counts(budget, shapes, sizes, sparsity, total)


def kept_counts(
    budget: Budget, shapes: Shapes, sizes: Sizes, sparsity: jax.Array, total: jax.Array
) -> dict[str, jax.Array]:
    """How many entries each leaf keeps, uint32; exactly `total` in all for an exact budget.

    A leaf with a density above zero keeps one at least, as long as the total has as many.

    Args:
        budget: the densities.
        shapes: of the leaves.
        sizes: of what is counted in each.
        sparsity: the fraction removed.
        total: uint32, how many entries live in all.
    """
    densities = budget.densities(shapes, sizes, 1.0 - sparsity)
    # Rounding is carried from leaf to leaf, so that it does not add up; the largest leaf comes
    # last and takes what float32 could not resolve.
    paths = sorted(shapes, key=lambda path: sizes[path])
    after = np.cumsum([0, *[sizes[path] for path in reversed(paths)]])[::-1][1:]
    left, carry, counts = total, jnp.float32(0.0), {}
    # No leaf that has a share is lost to rounding, as long as there is one weight for each.
    least = {p: jnp.uint32(densities[p] > 0) if sizes[p] else jnp.uint32(0) for p in paths}
    others = sum(least.values(), jnp.uint32(0))
    enough = (others <= total).astype(jnp.uint32)
    for path, room in zip(paths, after, strict=True):
        wanted = densities[path] * np.float32(sizes[path]) + carry
        rounded = jnp.clip(jnp.round(wanted), 0.0, _below(sizes[path]))
        full = np.uint32(sizes[path])
        count = jnp.where(densities[path] >= 1, full, rounded.astype(jnp.uint32))
        count = jnp.maximum(count, least[path] * enough)
        others = others - least[path]
        if budget.exact:
            room = np.uint32(room)
            count = jnp.maximum(count, jnp.maximum(left, room) - room)
            count = jnp.minimum(count, left - others * enough)
            carry = jnp.clip(wanted - count.astype(jnp.float32), -1.0, 1.0)
            left = left - count
        counts[path] = count
    return counts


def _below(size: int) -> np.float32:
    """The largest float32 that is at most `size`."""
    nearest = np.float32(size)
    return nearest if int(nearest) <= size else np.nextafter(nearest, np.float32(0))


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    tree.map_arrays_with_path(lambda path, x: shapes.update({path: x.shape}), params)
    return shapes
