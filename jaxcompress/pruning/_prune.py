"""Pruning as a projection: what is scored, and how scores are compared."""

import functools
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._sharding import automatic, place_like
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections import Projection, of_leaves
from jaxcompress.pruning import _row_rules
from jaxcompress.pruning._budgets import Budget, require_budget
from jaxcompress.pruning._counts import fraction_at, kept_count, leaf_counts
from jaxcompress.pruning._groups import Groups
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning._nm import axis_of_groups, keep_n_of_m, require_nm
from jaxcompress.pruning._protect import protected
from jaxcompress.pruning._rank import observer_of, require_score, scores_of
from jaxcompress.pruning._scores import Score, magnitude
from jaxcompress.pruning._select import largest, largest_of_tree


def prune(
    sparsity: Numeric | None = None,
    *,
    score: Score = magnitude,
    groups: Groups | None = None,
    nm: tuple[int, int] | None = None,
    axis: int | Mapping[str, int] = -2,
    scope: Literal["leaf", "global"] | int = "leaf",
    budget: Budget | None = None,
    floor: Numeric | None = 0.0,
) -> Projection:
    r"""Keeps the weights that matter most and sets the others to zero.

    .. math:: w_i \mapsto w_i \,[\,\mathrm{score}_i \text{ is among the }
        n - \lfloor s n \rceil \text{ largest}\,]

    Args:
        sparsity: :math:`s`, the fraction removed, 0 to 1. A number, a JAX scalar or an Optax
            schedule of the step (`jc.schedules.cubic` for gradual pruning); may be traced.
            A traced value outside of [0, 1] counts as the nearer end. Each leaf, or the whole
            tree with a global scope or a budget, keeps exactly :math:`n - \lfloor s n \rceil`
            weights (half to even, in float32): of equal scores the first ones in C order,
            then in leaf order, live. With `groups`, n counts groups instead of weights.
        score: static. What is ranked: a function `(params, *, grads=None, step=0) -> scores`,
            as `jc.pruning.magnitude` or one of your own; a `jc.pruning.RunningScore`, as
            `jc.pruning.movement()`; or a tree of scores that you computed, as those of
            `jc.pruning.snip`, whose arrays may be traced. The largest live.
        groups: static. Weights that live and die together, as `jc.pruning.blocks(4, 4)` or
            `jc.pruning.slices(-1)`; None: each weight for itself.
        nm: static. `(n, m)` instead of `sparsity`: the n largest of each m consecutive
            weights along `axis` are kept, as sparse tensor cores want it with `(2, 4)`.
        axis: static. Where the groups of `nm` run. The default is the axis that is summed
            over in Flax's layouts (`(in, out)`, and `(height, width, in, out)`); pass -1 for
            `(out, in)` layouts such as Equinox's, or a dict from paths to axes, as
            `jc.pruning.contraction_axes` reads off the function. A leaf with one dimension has
            but one.
        scope: static. What is compared with what. `"leaf"`: the sparsity holds for each leaf;
            `"global"`: for all chosen leaves together, by one threshold; an integer: for each
            index along that axis by itself, as -1 for each output of a Flax kernel (Wanda).
        budget: static. How the total is shared out over the leaves, as
            `jc.pruning.erdos_renyi()`; None: as `scope` says.
        floor: the fraction of each leaf that a global scope keeps before leaves are compared,
            and at least one weight (or group) of each, as long as the total allows: no layer
            collapses. None allows it. A number or a schedule; may be traced. A budget that gives
            a leaf anything leaves it one weight at least; `jc.pruning.floored` raises that.
            Without either the sparsity of each leaf is exact, and so of 10 channels none is left
            at 0.95.

    Returns:
        A projection whose structure has a `Mask` per leaf. NaN ranks below every number, so
        it goes first. An empty leaf stays empty; a scalar counts as one weight. It drops
        nothing at sparsity 0 and everything at 1. Chosen by default are floating-point
        leaves of two or more dimensions; `jc.masked` chooses others.

    Raises:
        ValueError: `sparsity` is a number outside of [0, 1]; both or none of `sparsity` and
            `nm`; arguments that exclude each other; `nm` not 0 <= n <= m; scores of another
            shape, or none for a leaf.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: `find` counts, and never sorts: some ten passes over the weights (`largest`), m(m-1)
    comparisons for `nm`; sharded leaves are not gathered. `project` is one elementwise pass.

    Examples:
        >>> params = {"w": jnp.array([[1.0, -4.0], [3.0, 0.5]]), "b": jnp.ones(2)}
        >>> jc.compress(jc.prune(0.5), params)["w"]
        Array([[ 0., -4.],
               [ 3.,  0.]], dtype=float32)
        >>> jc.compress(jc.prune(0.5, groups=jc.pruning.slices(-1)), params)["w"]
        Array([[ 0. , -4. ],
               [ 0. ,  0.5]], dtype=float32)
        >>> gradual = jc.prune(jc.schedules.cubic(0.0, 0.9, begin=0, end=1000))
        >>> opt = jc.projected(optax.adam(1e-3), jc.every(100, gradual))

    Source: Han et al. 2015, arXiv:1506.02626; gradual schedule from Zhu & Gupta 2017,
    arXiv:1710.01878; N:M from Mishra et al. 2021, arXiv:2104.08378.
    """
    if (sparsity is None) == (nm is None):
        got = f"sparsity={sparsity!r}, nm={nm!r}"
        _refuse("sparsity", "be given, or else `nm`, but not both", got)
    require_score("prune", "score", score)
    whole = isinstance(scope, (int, np.integer)) and not isinstance(scope, bool)
    if not whole and not (isinstance(scope, str) and scope in ("leaf", "global")):
        _refuse("scope", 'be "leaf", "global" or an axis', repr(scope))
    if nm is not None:
        _refuse_beside("nm", scope=(scope, "leaf"), groups=(groups, None), budget=(budget, None))
        return _prune_n_of_m(nm, axis, score)
    if budget is not None:
        require_budget("prune", "budget", budget)
        _refuse_beside("budget", scope=(scope, "leaf"))
    if whole:
        _refuse_beside("an axis as `scope`", groups=(groups, None))
    if groups is not None and not isinstance(groups, Groups):
        _refuse("groups", "be a Groups, as jc.pruning.blocks(4, 4)", _check.describe(groups))
    if floor is not None:
        _check.numeric("prune", "floor", floor, 0, 1)
        if scope != "global" and (callable(floor) or _check.is_traced(floor) or floor != 0):
            fix = "With a budget: budget=jc.pruning.floored(budget, floor)."
            _refuse("floor", 'be left out without scope="global"', _check.describe(floor), fix)
    _check.numeric("prune", "sparsity", sparsity, 0, 1)
    wanted: Numeric = sparsity  # pyright: ignore[reportAssignmentType]

    def find(params, *, previous=None, grads=None, step=0):
        scores, statistics = scores_of(score, params, previous, grads, step)
        if groups is None:
            keep = select(params, scores, step)
        else:
            keep = select(params, tree.map_arrays_with_path(groups.reduce, scores), step)
            keep = tree.map_arrays_with_path(functools.partial(_spread, groups), keep, params)

        def leaf(path, kept, statistic):
            block = None if groups is None else groups.block(path, kept.shape)
            return Mask.of(kept, statistic=statistic, block=block)

        return tree.map_arrays_with_path(leaf, keep, statistics)

    def select(params: PyTree, scores: PyTree, step) -> PyTree:
        fraction = fraction_at(wanted, step)
        if scope == "global":
            total = sum(x.size for x in jax.tree.leaves(scores))
            ranked = jax.tree.map(lambda x: protected(x, floor, step), scores)
            return largest_of_tree(ranked, kept_count(fraction, total))
        if scope != "leaf":
            return tree.map_arrays_with_path(
                lambda path, x: _largest_along(path, x, int(scope), fraction), scores
            )
        counts = leaf_counts(params, scores, fraction, budget)
        return tree.map_arrays_with_path(lambda path, x: largest(x, counts[path]), scores)

    def rows(params, *, step=0):
        masks = find(params, step=step)
        plain = score is magnitude and groups is None and isinstance(scope, str)
        rule = _row_rules.by_cost if plain else _row_rules.given
        return _row_rules.mask_rows(rule, params, masks, {})

    return of_leaves(find, observer_of(score), rows=rows)


def _spread(groups: Groups, path: str, kept: jax.Array, w: jax.Array) -> jax.Array:
    return place_like(groups.expand(path, kept, w.shape), w)


def _largest_along(path: str, scores: jax.Array, axis: int, sparsity: jax.Array) -> jax.Array:
    """The same fraction of each index along an axis."""
    along = _check.axis("prune", "scope", axis, scores.ndim, path)
    rest = scores.size // scores.shape[along] if scores.size else 0
    count = kept_count(sparsity, rest)
    return automatic(
        lambda x, k: jax.vmap(lambda row: largest(row, k), along, along)(x),
        scores,
        count,
        like_first=True,
    )


def _prune_n_of_m(nm: tuple[int, int], axis: int | Mapping[str, int], score: Score) -> Projection:
    n, m = require_nm("prune", nm)
    if not isinstance(axis, Mapping):
        _check.integer("prune", "axis", axis, -64)

    def find(params, *, previous=None, grads=None, step=0):
        scores, statistics = scores_of(score, params, previous, grads, step)

        def leaf(path, x, statistic):
            along = axis_of_groups("prune", axis, path, x)
            return Mask.of(
                keep_n_of_m(x, n, m=m, axis=along), nm=(n, m), axis=along, statistic=statistic
            )

        return tree.map_arrays_with_path(leaf, scores, statistics)

    rule = _row_rules.n_of_m(n, m) if score is magnitude else _row_rules.given

    def rows(params, *, step=0):
        masks = find(params, step=step)
        axes: dict[str, int] = {}
        along = lambda path, w, mask: axes.update({path: mask.axis})  # noqa: E731
        tree.map_arrays_with_path(along, params, masks)
        innermost = axes if rule.group is not None else {}
        return _row_rules.mask_rows(rule, params, masks, innermost)

    return of_leaves(find, observer_of(score), rows=rows)


def _refuse_beside(what: str, **given) -> None:
    for name, (value, default) in given.items():
        if value is not default and value != default:
            _refuse(name, f"be {default!r} with {what}", repr(value))


def _refuse(argument: str, rule: str, got: str, fix: str = ""):
    raise ValueError(_check.message("prune", argument, rule, got, fix))
