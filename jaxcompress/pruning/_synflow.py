"""SynFlow: the flow of all-positive synapses, pruned step by step, without data."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import _check, tree
from jaxcompress._sharding import place_like
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.pruning._counts import fraction_at, kept_count
from jaxcompress.pruning._score_trees import (
    dtype_of_scores,
    is_floating,
    require_dense,
    score_of_unchosen,
    wide,
)
from jaxcompress.pruning._select import largest_of_tree

_MOST_TRIES = 12
_LARGEST_SHIFT = 32.0


def synflow(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    sparsity: ArrayLike,
    steps: int = 100,
    where: tree.Where = tree.is_weight,
) -> PyTree:
    r"""How much of the flow through a network of positive weights passes each weight.

    .. math:: S = \left|w \odot \frac{\partial R}{\partial w}\right|, \qquad
        R = \mathbf 1^\top f(|\theta|, \mathbf 1)

    The smallest go in steps, each with the scores of what is left: after step k of n the
    density is :math:`(1 - s)^{k/n}` over all chosen leaves together. Where no biases and no
    skip connections are, the scores of each layer add up to R, so no layer empties before
    the others.

    Args:
        fn: a function `fn(params, *args)`; all floating-point outputs are added up. Leave
            softmax and normalization by the batch out of it: the flow has to grow with each
            weight.
        params: any pytree of dense arrays. Absolute values are taken of all floating-point
            leaves; narrow ones are computed in float32.
        *args: ones stand in for all floating-point arrays (`jax.ShapeDtypeStruct`s will do,
            one example is enough); everything else is handed on.
        sparsity: :math:`s`, the fraction removed of the chosen leaves, 0 to 1. May be traced.
        steps: static. n, the number of steps.
        where: static. Which leaves are pruned, as in `jc.masked`; give `jc.prune` the same ones.

    Returns:
        A tree of scores for `jc.prune(sparsity, score=scores, scope="global")`, which then finds
        the masks of the last step: 0 where a weight went, above 0 where it stays, with the
        scores of the last step up to a common factor. Shapes of `params`, in float32 or
        wider. Other floating-point leaves hold infinity (they are not to go), those of other
        dtypes zeros, and what is no array None.

    Raises:
        TypeError: `fn` can't be called; a chosen leaf is not real floating point, or a leaf is
            compressed.
        ValueError: `sparsity` is a number outside of [0, 1], or no scalar; `steps` below 1; `fn`
            returns no floating-point array.

    Cost: a gradient and a global selection a step, in one loop. Where R leaves the range of
    float32 (deep and wide networks) the chosen leaves are multiplied by one common factor that
    brings it back, found by at most 11 more gradients when it changes. In a chain of layers
    this leaves the order as it is. With biases or skip connections it does not: pass float64
    params there, as the paper does.

    Examples:
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.array([[1.0, -3.0]]), "b": jnp.array([[2.0], [1.0]])}
        >>> scores = jc.pruning.synflow(fn, params, jnp.ones((1, 1)), sparsity=0.5, steps=2)
        >>> jax.tree.map(lambda s: s > 0, scores)
        {'a': Array([[False,  True]], dtype=bool), 'b': Array([[False],
               [ True]], dtype=bool)}
        >>> sparse = jc.compress(jc.prune(0.5, score=scores, scope="global"), params)

    Source: Tanaka et al. 2020, arXiv:2006.05467, algorithm 1. Differs: a weight that went
    never comes back, also where what is left has no flow at all.
    """
    if not callable(fn):
        rule, fix = "be a function of the params", "Pass the function first and the params second."
        raise TypeError(_check.message("synflow", "fn", rule, _check.describe(fn), fix))
    if callable(sparsity):
        raise TypeError(_check.message("synflow", "sparsity", "be a number", "a function"))
    _check.number("synflow", "sparsity", sparsity, 0, 1)
    _check.integer("synflow", "steps", steps, 1)
    problem = _problem(fn, params, args, where)
    scores = _iterated(problem, fraction_at(sparsity, 0), steps)
    flat, treedef = jax.tree.flatten(params)
    found = iter(scores)
    chosen = zip(flat, problem.chosen, strict=True)
    return jax.tree.unflatten(
        treedef, [next(found) if hit else score_of_unchosen(x) for x, hit in chosen]
    )


class _Problem(NamedTuple):
    """The magnitudes of the chosen leaves, and the flow as a function of those."""

    chosen: list[bool]
    weights: list[jax.Array]
    flow: Callable[[list[jax.Array]], jax.Array]


def _problem(fn, params: PyTree, args: tuple[Any, ...], where: tree.Where) -> _Problem:
    chosen = jax.tree.leaves(tree.select(params, where, function="synflow"))
    for (path, x), hit in zip(tree.leaves_with_paths(params), chosen, strict=True):
        if hit or tree.is_array_like(x):
            require_dense("synflow", x, path)
    flat, treedef = jax.tree.flatten(params)
    flat = [jnp.abs(wide(x)) if is_floating(x) else x for x in flat]
    ones = jax.tree.map(_ones, args)

    def flow(weights):
        given = iter(weights)
        leaves = [next(given) if hit else x for x, hit in zip(flat, chosen, strict=True)]
        out = jax.tree.leaves(fn(jax.tree.unflatten(treedef, leaves), *ones))
        sums = [jnp.sum(wide(y)) for y in out if is_floating(y)]
        if not sums:
            rule, got = "return a floating-point array", [_check.describe(y) for y in out]
            raise ValueError(_check.message("synflow", "fn", rule, got))
        return _added(sums)

    return _Problem(chosen, [x for x, hit in zip(flat, chosen, strict=True) if hit], flow)


def _iterated(problem: _Problem, sparsity: jax.Array, steps: int) -> list[jax.Array]:
    weights, total = problem.weights, sum(w.size for w in problem.weights)

    def step(k, carry):
        masks, _, shift = carry
        live = [jnp.where(m, w, jnp.zeros_like(w)) for m, w in zip(masks, weights, strict=True)]
        scores, shift = _in_range(problem.flow, live, shift)
        part = (k.astype(jnp.float32) + 1) / steps
        # The last one as `jc.prune` counts it, whatever the rounding of the power.
        removed = jnp.where(k == steps - 1, sparsity, 1 - (1 - sparsity) ** part)
        masks = largest_of_tree(
            [jnp.where(m, _number(s), -1) for m, s in zip(masks, scores, strict=True)],
            kept_count(removed, total),
        )
        kept = [
            jnp.where(m, jnp.maximum(s, jnp.finfo(s.dtype).tiny), jnp.zeros_like(s))
            for m, s in zip(masks, scores, strict=True)
        ]
        return masks, kept, shift

    masks = [place_like(jnp.ones(w.shape, bool), w) for w in weights]
    start = (masks, [jnp.zeros_like(w) for w in weights], jnp.zeros((), jnp.float32))
    return lax.fori_loop(0, steps, step, start)[1]


def _in_range(flow, weights: list[jax.Array], shift: jax.Array):
    """The scores of `weights` times `2**shift`, for the first shift tried that fits the floats."""

    def scored(shift):
        scaled = [w * jnp.exp2(shift).astype(w.dtype) for w in weights]
        gradient = jax.grad(flow)(scaled)
        return [jnp.abs(w * g) for w, g in zip(scaled, gradient, strict=True)]

    def fits(total):
        least = 2.0 ** (jnp.finfo(total.dtype).minexp // 2)
        return jnp.isfinite(total) & (total >= least)

    def searching(state):
        _, _, _, _, total, tries = state
        return (tries == 0) | (~fits(total) & (tries < _MOST_TRIES))

    def attempt(state):
        low, high, last, _, total, tries = state
        # NaN is an infinity times a weight that went.
        above = ~jnp.isfinite(total)
        high = jnp.where((tries > 0) & above, last, high)
        low = jnp.where((tries > 0) & ~above, last, low)
        shift = jnp.where(tries > 0, (low + high) / 2, last)
        scores = scored(shift)
        return low, high, shift, scores, _total(scores), tries + 1

    bound = jnp.full_like(shift, _LARGEST_SHIFT)
    nothing = [jnp.zeros_like(w) for w in weights]
    start = (-bound, bound, shift, nothing, _total(nothing), jnp.zeros((), jnp.int32))
    _, _, shift, scores, _, _ = lax.while_loop(searching, attempt, start)
    return scores, shift


def _total(scores: list[jax.Array]) -> jax.Array:
    return _added([jnp.sum(s) for s in scores])


def _added(sums: list[jax.Array]) -> jax.Array:
    dtype = functools.reduce(jnp.promote_types, [s.dtype for s in sums])
    return functools.reduce(jnp.add, [s.astype(dtype) for s in sums])


def _number(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), jnp.zeros_like(x), x)


def _ones(x: Any) -> Any:
    if not is_floating(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.ones(x.shape, dtype_of_scores(x))
    return jnp.ones_like(x, dtype=dtype_of_scores(x))
