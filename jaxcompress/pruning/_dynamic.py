"""Dynamic sparse training: a mask of constant size that drops weights and grows others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import Numeric
from jaxcompress.projections import Projection, of_leaves
from jaxcompress.pruning import _threshold
from jaxcompress.pruning._budgets import Budget
from jaxcompress.pruning._counts import fraction_at, leaf_counts
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning._rank import scores_of
from jaxcompress.pruning._scores import Score, magnitude, random, uniform_like
from jaxcompress.pruning._select import largest


def rigl(
    sparsity: Numeric,
    drop_fraction: Numeric = 0.3,
    *,
    key: jax.Array,
    budget: Budget | None = None,
    initial: Score | None = None,
) -> Projection:
    r"""Drops the smallest weights and grows those whose gradient is largest.

    .. math:: S = \text{top}_{k - d}(|\theta|\,m), \quad
        G = \text{top}_{d}(|\nabla L|\,(1 - S)), \quad m' = S \cup G, \quad
        d = \lfloor \alpha_t k \rceil

    Args:
        sparsity: the fraction removed, 0 to 1: of each leaf, or of the whole by `budget`. A
            number, a JAX scalar or an Optax schedule; may be traced. A schedule that rises, as
            `jc.schedules.cubic`, makes it GraNet: dense to sparse, with growth at each step.
        drop_fraction: :math:`\alpha_t`, the fraction of the living weights of a leaf that is
            exchanged. A number or an Optax schedule, as `jc.schedules.cosine(0.3, 0.0, 0, end)`
            in the paper; may be traced.
        key: a `jax.random.key` for the first mask. May be traced.
        budget: static. How the total is shared out, as `jc.pruning.erdos_renyi()`; None: the
            same sparsity in each leaf.
        initial: static. What the first mask is ranked by; None: at random, as in the paper.

    Returns:
        A projection whose structure has a `Mask` per leaf with exactly the wanted number of
        living weights at each step. Inside of `jc.projected` grown weights start at zero, with
        zero moments. A weight dropped in a step may be grown in the same one.

    Raises:
        ValueError: a number out of its range; no gradients: it needs `jc.projected` or
            `jc.straight_through` (whose latent weights remember their values).
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: two selections (`largest`) a find, nothing in between: wrap it in `jc.every`. It
    needs no gradient beyond the one that the optimizer gets anyway.

    Examples:
        >>> explore = jc.pruning.rigl(
        ...     0.9,
        ...     jc.schedules.cosine(0.3, 0.0, 0, 750),
        ...     key=jax.random.key(0),
        ...     budget=jc.pruning.erdos_renyi(),
        ... )
        >>> opt = jc.projected(optax.adam(1e-3), jc.every(100, explore, end=750))

    Source: Evci et al. 2020, arXiv:1911.11134, algorithm 1; with a schedule of the sparsity,
    Liu et al. 2021, arXiv:2106.10404. Differs: the update of the step that finds the mask is
    applied, and weights are ranked after it.
    """

    def by_gradient(path, w, g, step):
        del w, step
        if g is None:
            _refuse_without_gradients("rigl", path)
        return magnitude(g)

    return _exchange("rigl", sparsity, drop_fraction, key, budget, initial, by_gradient)


def sparse_evolution(
    sparsity: Numeric,
    drop_fraction: Numeric = 0.3,
    *,
    key: jax.Array,
    budget: Budget | None = None,
    initial: Score | None = None,
) -> Projection:
    r"""Drops the smallest weights and grows as many at random.

    Args:
        sparsity: as in `rigl`.
        drop_fraction: as in `rigl`; the paper holds it at 0.3.
        key: a `jax.random.key` for the first mask and for all that grows. May be traced.
        budget: static. As in `rigl`.
        initial: static. As in `rigl`.

    Returns:
        As `rigl`. No gradient is needed: it works in `jc.project_params` too. The draw of a
        step depends on `key`, the step and the path of the leaf alone.

    Raises:
        ValueError: a number out of its range.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: as `rigl`.

    Examples:
        >>> p = jc.pruning.sparse_evolution(0.9, key=jax.random.key(0))
        >>> opt = jc.projected(optax.sgd(0.1, momentum=0.9), jc.every(100, p))

    Source: Mocanu et al. 2018, arXiv:1707.04780, algorithm 1. Differs: the weights of
    smallest magnitude go, as in RigL's comparison, instead of the smallest positive and the
    largest negative ones apart.
    """

    def at_random(path, w, g, step):
        del g
        return uniform_like(jax.random.fold_in(key, 1), path, w, step)

    return _exchange("sparse_evolution", sparsity, drop_fraction, key, budget, initial, at_random)


def _exchange(
    function: str,
    sparsity: Numeric,
    drop_fraction: Numeric,
    key: jax.Array,
    budget: Budget | None,
    initial: Score | None,
    growth: Callable[..., jax.Array],
) -> Projection:
    _check.number(function, "sparsity", sparsity, 0, 1)
    _check.number(function, "drop_fraction", drop_fraction, 0, 1)
    first = random(key) if initial is None else initial

    def find(params, *, previous=None, grads=None, step=0):
        counts = leaf_counts(params, params, fraction_at(sparsity, step), budget)
        if previous is None:
            scores, _ = scores_of(first, params, None, grads, step)
            return tree.map_arrays_with_path(lambda p, x: Mask.of(largest(x, counts[p])), scores)
        grads = jax.tree.map(lambda _: None, params) if grads is None else grads
        drop = fraction_at(drop_fraction, step)

        def leaf(path, w, g, mask: Mask):
            return _renewed(w, growth(path, w, g, step), mask.keep_like(w), counts[path], drop)

        return tree.map_arrays_with_path(leaf, params, grads, previous)

    return of_leaves(find, from_zero=True)


def _renewed(
    w: jax.Array, growth: jax.Array, keep: jax.Array, count: jax.Array, drop: jax.Array
) -> Mask:
    """Exactly `count` weights: the largest survivors, and the rest where `growth` is largest."""
    living = _threshold.count([keep])[0]
    exchanged = jnp.round(drop * count.astype(jnp.float32)).astype(jnp.uint32)
    surviving = jnp.minimum(count - jnp.minimum(exchanged, count), living)
    survivors = largest(_ranked(magnitude(w), keep), surviving)
    grown = largest(_ranked(growth, ~survivors), count - surviving)
    return Mask.of(survivors | grown)


def _ranked(scores: jax.Array, candidates: jax.Array) -> jax.Array:
    """Scores with NaN, the lowest of all, outside of the candidates; NaN among them is -inf."""
    lowest, none = jnp.array(-jnp.inf, scores.dtype), jnp.array(jnp.nan, scores.dtype)
    return jnp.where(candidates, jnp.where(jnp.isnan(scores), lowest, scores), none)


def _refuse_without_gradients(function: str, path: str) -> None:
    raise ValueError(
        _check.message(
            function,
            "grads",
            "be given",
            "None",
            "Use it in jc.projected, or hand update the gradients: update(..., grads=grads).",
            path=path,
        )
    )
