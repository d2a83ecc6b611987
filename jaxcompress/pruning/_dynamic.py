"""Dynamic sparse training: a mask of constant size that drops weights and grows others."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import Numeric
from jaxcompress.projections import Projection, of_leaves
from jaxcompress.pruning import _threshold
from jaxcompress.pruning._budgets import Budget, require_budget
from jaxcompress.pruning._counts import fraction_at, leaf_counts
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning._nm import axis_of_groups, keep_n_of_m, require_nm
from jaxcompress.pruning._rank import require_score, scores_of
from jaxcompress.pruning._scores import Score, magnitude, random, uniform_like
from jaxcompress.pruning._select import largest


def rigl(
    sparsity: Numeric | None = None,
    drop_fraction: Numeric = 0.3,
    *,
    key: jax.Array,
    budget: Budget | None = None,
    initial: Score | None = None,
    nm: tuple[int, int] | None = None,
    axis: int | Mapping[str, int] = -2,
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
        nm: static. `(n, m)` instead of `sparsity`: n of each m consecutive weights live at each
            step, and :math:`\lfloor \alpha_t n \rceil` of them are exchanged in each group.
        axis: static. Where the groups of `nm` run, as in `jc.prune`.

    Returns:
        A projection whose structure has a `Mask` per leaf with exactly the wanted number of
        living weights at each step. Inside of `jc.projected` grown weights start at zero, with
        zero moments. A weight dropped in a step may be grown in the same one; it just lives on.

    Raises:
        ValueError: a number out of its range; both or none of `sparsity` and `nm`; no gradients:
            it needs `jc.projected` or `jc.straight_through` (whose latent weights remember
            their values).
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

    keeps = _Keeps("rigl", sparsity, budget, nm, axis)
    return _exchange(keeps, drop_fraction, key, initial, by_gradient)


def sparse_evolution(
    sparsity: Numeric | None = None,
    drop_fraction: Numeric = 0.3,
    *,
    key: jax.Array,
    budget: Budget | None = None,
    initial: Score | None = None,
    nm: tuple[int, int] | None = None,
    axis: int | Mapping[str, int] = -2,
) -> Projection:
    r"""Drops the smallest weights and grows as many at random.

    Args:
        sparsity: as in `rigl`.
        drop_fraction: as in `rigl`; the paper holds it at 0.3.
        key: a `jax.random.key` for the first mask and for all that grows. May be traced.
        budget: static. As in `rigl`.
        initial: static. As in `rigl`.
        nm: static. As in `rigl`.
        axis: static. As in `rigl`.

    Returns:
        As `rigl`. No gradient is needed: it works in `jc.project_params` too. The draw of a
        step depends on `key`, the step and the path of the leaf alone.

    Raises:
        ValueError: a number out of its range; both or none of `sparsity` and `nm`.
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

    keeps = _Keeps("sparse_evolution", sparsity, budget, nm, axis)
    return _exchange(keeps, drop_fraction, key, initial, at_random)


class _Keeps(NamedTuple):
    """How many weights live, and where: the static side of an exchange."""

    function: str
    sparsity: Numeric | None
    budget: Budget | None
    nm: tuple[int, int] | None
    axis: int | Mapping[str, int]


def _exchange(
    keeps: _Keeps,
    drop_fraction: Numeric,
    key: jax.Array,
    initial: Score | None,
    growth: Callable[..., jax.Array],
) -> Projection:
    function = keeps.function
    _check.numeric(function, "drop_fraction", drop_fraction, 0, 1)
    if initial is not None:
        require_score(function, "initial", initial)
    _check.key(function, key)
    first = random(key) if initial is None else initial
    renew = _unstructured(keeps) if keeps.nm is None else _in_groups(keeps, keeps.nm)

    def find(params, *, previous=None, grads=None, step=0):
        renewed = renew(params, step, fraction_at(drop_fraction, step))
        if previous is None:
            scores, _ = scores_of(first, params, None, grads, step)
            return tree.map_arrays_with_path(lambda p, x: renewed(p, x, None, None), scores)
        grads = jax.tree.map(lambda _: None, params) if grads is None else grads

        def leaf(path, w, g, mask: Mask):
            return renewed(path, magnitude(w), mask.keep_like(w), growth(path, w, g, step))

        return tree.map_arrays_with_path(leaf, params, grads, previous)

    return of_leaves(find, from_zero=True)


def _unstructured(keeps: _Keeps):
    """`(params, step, drop) -> (path, sizes, keep, growth) -> Mask`: so many of each leaf."""
    function, sparsity, budget = keeps.function, keeps.sparsity, keeps.budget
    if sparsity is None:
        _refuse_both(function, "None")
    _check.numeric(function, "sparsity", sparsity, 0, 1)
    if budget is not None:
        require_budget(function, "budget", budget)
    wanted: Numeric = sparsity  # pyright: ignore[reportAssignmentType]

    def at(params, step, drop):
        counts = leaf_counts(params, params, fraction_at(wanted, step), budget)

        def renewed(path, sizes, keep, growth) -> Mask:
            count = counts[path]
            if keep is None:
                return Mask.of(largest(sizes, count))
            living = _threshold.count([keep])[0]
            exchanged = jnp.round(drop * count.astype(jnp.float32)).astype(jnp.uint32)
            surviving = jnp.minimum(count - jnp.minimum(exchanged, count), living)
            survivors = largest(_ranked(sizes, keep), surviving)
            grown = largest(_ranked(growth, ~survivors), count - surviving)
            return Mask.of(survivors | grown)

        return renewed

    return at


def _in_groups(keeps: _Keeps, nm: tuple[int, int]):
    """The same for n of each m. A short last group keeps all it has up to n."""
    if keeps.sparsity is not None:
        _refuse_both(keeps.function, f"sparsity={keeps.sparsity!r} and nm={nm!r}")
    if keeps.budget is not None:
        rule = "be left out with `nm`"
        got = _check.describe(keeps.budget)
        raise ValueError(_check.message(keeps.function, "budget", rule, got))
    n, m = require_nm(keeps.function, nm)

    def at(params, step, drop):
        del params, step
        exchanged = jnp.round(drop * n).astype(jnp.int32)

        def renewed(path, sizes, keep, growth) -> Mask:
            along = axis_of_groups(keeps.function, keeps.axis, path, sizes)
            choose = lambda x, count: keep_n_of_m(x, count, m=m, axis=along)  # noqa: E731
            if keep is None:
                return Mask.of(choose(sizes, n), nm=(n, m), axis=along)
            survivors = choose(_ranked(sizes, keep), n - exchanged) & keep
            # What lives comes first, so that exactly n do, however few there were.
            finite = jnp.minimum(_ranked(growth, ~survivors), jnp.finfo(growth.dtype).max)
            ranked = jnp.where(survivors, jnp.array(jnp.inf, growth.dtype), finite)
            return Mask.of(choose(ranked, n), nm=(n, m), axis=along)

        return renewed

    return at


def _refuse_both(function: str, got: str):
    rule = "be given, or else `nm`, but not both"
    raise ValueError(_check.message(function, "sparsity", rule, got))


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
