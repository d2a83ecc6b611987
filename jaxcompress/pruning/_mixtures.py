"""Budgets made of others, and of numbers: mixtures, floors, a number for each path."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._types import ArrayLike
from jaxcompress.pruning._budgets import Budget, matching, require_budget


def balanced(first: Budget, second: Budget, weight: ArrayLike) -> Budget:
    """A mixture of two budgets.

    Args:
        first: all of it at weight 0.
        second: all of it at weight 1.
        weight: a scalar in [0, 1]. May be traced: `vmap` finds the best mixture.

    Returns:
        A budget with the densities in between, which meets the total where both do.

    Raises:
        ValueError: `weight` is a number outside of [0, 1].

    Examples:
        >>> half = jc.pruning.balanced(jc.pruning.uniform(), jc.pruning.erdos_renyi(), 0.5)
        >>> p = jc.prune(0.9, budget=half)
    """
    require_budget("balanced", "first", first)
    require_budget("balanced", "second", second)
    _check.number("balanced", "weight", weight, 0, 1)

    def densities(shapes, sizes, density):
        one = first.densities(shapes, sizes, density)
        two = second.densities(shapes, sizes, density)
        w = jnp.clip(jnp.asarray(weight, jnp.float32), 0.0, 1.0)
        return {path: one[path] + w * (two[path] - one[path]) for path in shapes}

    return Budget(densities, first.exact and second.exact)


def floored(budget: Budget, floor: ArrayLike) -> Budget:
    """A budget in which no leaf keeps less than a fraction of itself.

    What the floor takes, the leaves above it give in proportion to their densities. A leaf
    keeps the floor of its weights up to rounding, and one at least as long as the total allows.

    Args:
        budget: the one to correct.
        floor: a scalar in [0, 1]. May be traced. Where the total is below it, it is the total.

    Returns:
        A budget that meets the same total.

    Raises:
        ValueError: `floor` is a number outside of [0, 1].

    Examples:
        >>> p = jc.prune(0.99, budget=jc.pruning.floored(jc.pruning.erdos_renyi(), 0.005))
    """
    require_budget("floored", "budget", budget)
    _check.number("floored", "floor", floor, 0, 1)

    def densities(shapes, sizes, density):
        given = budget.densities(shapes, sizes, density)
        paths = [path for path in shapes if sizes[path]]
        if not paths:
            return given
        n = jnp.asarray(_fractions([sizes[path] for path in paths]))
        d = jnp.stack([given[path] for path in paths])
        total = jnp.sum(n * d)
        low = jnp.minimum(jnp.clip(jnp.asarray(floor, jnp.float32), 0.0, 1.0), total)
        # sum of n max(low, t d) is the largest of its values for each number of leaves above
        # the floor, the densest first; so t is the least of the solutions for each number.
        falling = jnp.argsort(-d)
        above, held = jnp.cumsum((n * d)[falling]), 1.0 - jnp.cumsum(n[falling])
        scale = jnp.min((total - low * held) / jnp.maximum(above, jnp.finfo(jnp.float32).tiny))
        return given | dict(zip(paths, jnp.clip(jnp.maximum(low, scale * d), 0, 1), strict=True))

    return Budget(densities, budget.exact)


def per_path(sparsities: Mapping[str, ArrayLike], default: ArrayLike | None = None) -> Budget:
    """A sparsity for each leaf, by path patterns.

    Args:
        sparsities: from a path pattern to the fraction removed; the first pattern that matches
            a leaf decides. Numbers may be traced.
        default: that of the other leaves; None: they share what is left of the total evenly.

    Returns:
        A budget for `jc.prune(sparsity, budget=…)`, which meets the total up to the rounding
        of each leaf, as far as the other leaves can. With a default, the sparsity given to
        `prune` has no effect.

    Raises:
        ValueError: a number outside of [0, 1], or a pattern that matches no leaf.

    Examples:
        >>> budget = jc.pruning.per_path({"head": 0.5}, default=0.75)
        >>> params = {"body": jnp.ones((4, 4)), "head": jnp.ones((2, 4))}
        >>> kept = jc.compress(jc.prune(0.0, budget=budget), params)
        >>> jax.tree.map(lambda w: float(w.sum()), kept)
        {'body': 4.0, 'head': 4.0}
    """
    if not isinstance(sparsities, Mapping):
        rule, got = "be a dict from path patterns to numbers", _check.describe(sparsities)
        raise TypeError(_check.message("per_path", "sparsities", rule, got))
    for pattern, value in sparsities.items():
        _check.number("per_path", f"sparsities[{pattern!r}]", value, 0, 1)
    if default is not None:
        _check.number("per_path", "default", default, 0, 1)

    def densities(shapes, sizes, density):
        kept: dict[str, jax.Array] = {}
        for pattern, value in sparsities.items():
            for path in matching("per_path", pattern, shapes):
                kept.setdefault(path, 1.0 - jnp.clip(jnp.asarray(value, jnp.float32), 0.0, 1.0))
        others = [path for path in shapes if path not in kept]
        if default is not None:
            rest = 1.0 - jnp.asarray(default, jnp.float32)
        else:
            n = dict(zip(shapes, _fractions([sizes[p] for p in shapes]), strict=True))
            share = sum((float(n[p]) for p in others), 0.0)
            left = density - sum((n[p] * d for p, d in kept.items()), jnp.float32(0.0))
            rest = left / share if share else jnp.float32(0.0)
        return kept | {path: jnp.clip(rest, 0.0, 1.0) for path in others}

    return Budget(densities, exact=False)


def _fractions(sizes: list[int]) -> np.ndarray:
    n = np.array(sizes, np.float64)
    return (n / max(n.sum(), 1.0)).astype(np.float32)
